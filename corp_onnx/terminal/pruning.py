"""The verbs that cut a model and judge the result: `prune`, `sweep` and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corp_onnx import commands
from corp_onnx.deploy.targets import SYMMETRIC, TargetOptions, open_target
from corp_onnx.device import device_of
from corp_onnx.errors import PlanError
from corp_onnx.graph.model import described
from corp_onnx.latency.stopwatch import Stopwatch
from corp_onnx.pipeline import Settings
from corp_onnx.plan import DEFAULT_ALIGN
from corp_onnx.precision import Request
from corp_onnx.solve import Recipe
from corp_onnx.terminal import engine_options, options, screen
from corp_onnx.verify.checks import Gates


def prune(
    model: options.ModelFile,
    output: options.OutputFile,
    data: options.MaybeData = None,
    stats: options.StatisticsFile = None,
    method: options.MethodName = "best",
    mlp: options.MlpShare = None,
    qk: options.QueryKeyShare = None,
    vo: options.ValueShare = None,
    macs: options.MacsKept = None,
    params: options.ParamsKept = None,
    latency: options.LatencyKept = None,
    target: engine_options.MaybeTarget = None,
    batch: engine_options.Batch = None,
    cache: engine_options.Cache = None,
    align: options.Align = DEFAULT_ALIGN,
    ridge: options.Ridge = None,
    ranking: options.Ranking = None,
    precision: options.PrecisionName = "fp32",
    weight_only: options.WeightBits = None,
    narrow_io: options.NarrowIo = False,
    max_error: options.MaxError = None,
    min_agreement: options.MinAgreement = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    crops: options.Crops = None,
    allow_random: options.AllowRandom = False,
    shapes: options.Shapes = None,
    rotary: options.Rotary = False,
    device: options.Device = "cpu",
    providers: options.Providers = None,
    threads: options.Threads = 0,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Cut a model, repair it, verify it, write it. Without shares: --mlp 0.5 --qk 0.5."""
    options.require_one_of(data, stats, samples is not None or crops is not None or allow_random)
    if latency is None and (batch is not None or cache is not None):
        raise PlanError("--batch and --cache say how a model is timed for --latency; give that too")
    if target is not None and latency is None and precision != "int8" and weight_only is None:
        raise PlanError("--target is where --latency is measured, or int8 is to run; give one too")
    place = target or engine_options.DEFAULT_TARGET
    sizes = options.sizes_of(shapes)
    request = Request(precision, weight_only, not narrow_io, place in SYMMETRIC)
    settings = Settings(
        align,
        Recipe(method, ranking, ridge, device=device_of(device)),
        Gates(max_error, min_agreement),
        sizes,
        rotary,
        options.runtime_of(providers, threads, custom_op_library, device),
        seed,
        crops,
        request,
    )
    source = None
    if data is not None:
        source = commands.Source(data, samples, seed, allow_random, sizes)
    asked = TargetOptions(threads=threads, cache=cache, custom_op_library=custom_op_library)
    timed_on = open_target(place, asked)
    watch = Stopwatch() if latency is None else Stopwatch.of(described(model), sizes, batch)
    wanted = options.widths_of(
        {"mlp": mlp, "qk": qk, "vo": vo},
        {"macs": macs, "params": params},
        engine_options.deadline_of(latency, timed_on, watch, cache),
    )
    screen.run(commands.Prune(model, output, source, stats, wanted, settings), as_json, log_level)


def sweep(
    model: options.ModelFile,
    data: options.Data,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    macs: options.MacsList = None,
    params: options.ParamsList = None,
    target: engine_options.TargetName = "ort-cpu",
    method: options.MethodName = "best",
    align: options.Align = DEFAULT_ALIGN,
    ridge: options.Ridge = None,
    max_error: options.MaxError = None,
    min_agreement: options.MinAgreement = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    crops: options.Crops = None,
    allow_random: options.AllowRandom = False,
    shapes: options.Shapes = None,
    rotary: options.Rotary = False,
    device: options.Device = "cpu",
    providers: options.Providers = None,
    threads: options.Threads = 0,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Error, MACs and latency over several budgets; picks the smallest that keeps your limits."""
    sizes = options.sizes_of(shapes)
    settings = Settings(
        align,
        Recipe(method, None, ridge, device=device_of(device)),
        Gates(max_error, min_agreement),
        sizes,
        rotary,
        options.runtime_of(providers, threads, custom_op_library, device),
        seed,
        crops,
    )
    source = commands.Source(data, samples, seed, allow_random, sizes)
    budgets = options.budgets_of(macs, params)
    timed_on = open_target(target, TargetOptions(threads, custom_op_library=custom_op_library))
    command = commands.Sweep(model, folder, source, budgets, settings, timed_on)
    screen.run(command, as_json, log_level)


def verify(
    dense: Annotated[Path, typer.Argument(help="The reference.", metavar="DENSE")],
    pruned: Annotated[Path, typer.Argument(help="The model to judge.", metavar="PRUNED")],
    data: options.Data,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Class numbers: .npy, .npz or text.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="The tensor to compare; may be internal.")
    ] = None,
    max_error: options.MaxError = None,
    min_agreement: options.MinAgreement = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    allow_random: options.AllowRandom = False,
    providers: options.Providers = None,
    threads: options.Threads = 0,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Compare two models on the same inputs."""
    command = commands.Verify(
        dense,
        pruned,
        commands.Source(data, samples, seed, allow_random),
        labels,
        output,
        Gates(max_error, min_agreement),
        options.runtime_of(providers, threads, custom_op_library),
    )
    screen.run(command, as_json, log_level)
