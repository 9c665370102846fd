"""The command line: arguments, one call, the printed result, the exit status.

Exit status: 0 done and verified, 1 done but a check or gate failed, 2 wrong request or unusable
input, 3 nothing prunable was found, 130 interrupted.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from corp_onnx import commands, engine_options, engines, options, screen
from corp_onnx.checking import Gates
from corp_onnx.commands import Source
from corp_onnx.demo import Demo
from corp_onnx.deploy.targets import SYMMETRIC, TargetOptions, open_target
from corp_onnx.device import device_of
from corp_onnx.errors import CorpError, NothingPrunable, PlanError
from corp_onnx.graph import described
from corp_onnx.pipeline import Settings
from corp_onnx.plan import DEFAULT_ALIGN
from corp_onnx.precision import Request
from corp_onnx.solve import DEFAULT_RIDGE, Recipe
from corp_onnx.timing import Stopwatch

DONE, UNVERIFIED, UNUSABLE, NOTHING = 0, 1, 2, 3

COLLECTED = (50_000, 20, 50)
"""Graphs are many small objects: looking for garbage among them less often saves a sixth."""

app = typer.Typer(
    name="corp-onnx",
    help="Cut an exported ONNX transformer to half its width, and repair it in closed form.",
    callback=screen.about,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="For results.")] = Path("runs/demo"),
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Prune the bundled model on the bundled images and print the evidence."""
    screen.run(Demo(run_dir), as_json, log_level)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="timm:NAME, hf:DIR or script.py:function.")],
    output: options.OutputFile,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Local weights: .safetensors or .pth.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Draw weights instead of loading any.")
    ] = False,
    exporter: Annotated[options.Exporter, typer.Option("--exporter")] = "torchscript",
    opset: Annotated[int | None, typer.Option("--opset", help="Default: 17, dynamo 18.")] = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Write an ONNX file with a dynamic batch, its preprocessing beside it (needs torch)."""
    command = commands.Export(source, output, checkpoint, random_weights, exporter, opset)
    screen.run(command, as_json, log_level)


@app.command()
def inspect(
    model: options.ModelFile,
    shapes: options.Shapes = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Show what can be cut, why the rest cannot, and where the MACs are."""
    screen.run(commands.Inspect(model, options.sizes_of(shapes)), as_json, log_level)


@app.command()
def calibrate(
    model: options.ModelFile,
    data: options.Data,
    output: options.OutputFile,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    crops: options.Crops = None,
    allow_random: options.AllowRandom = False,
    shard: Annotated[
        str, typer.Option("--shard", help="i/n: one of n random parts, i from 0.")
    ] = "0/1",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUT.partial, and keep one.")
    ] = False,
    shapes: options.Shapes = None,
    device: options.Device = "cpu",
    providers: options.Providers = None,
    threads: options.Threads = 0,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Gather statistics once; `prune --stats` then tries any ratio in seconds."""
    command = commands.Calibrate(
        model,
        output,
        Source(data, samples, seed, allow_random),
        crops,
        options.shard_of(shard),
        resume,
        options.sizes_of(shapes),
        options.runtime_of(providers, threads, custom_op_library, device),
        device_of(device),
    )
    screen.run(command, as_json, log_level)


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Statistics of shards.", metavar="FILE...")],
    output: options.OutputFile,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Add up statistics that were gathered in shards."""
    screen.run(commands.Merge(tuple(files), output), as_json, log_level)


@app.command()
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
    ridge: options.Ridge = DEFAULT_RIDGE,
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
        options.runtime_of(providers, threads, custom_op_library, device),
        seed,
        crops,
        request,
    )
    source = None if data is None else Source(data, samples, seed, allow_random)
    asked = TargetOptions(threads=threads, cache=cache, custom_op_library=custom_op_library)
    timed_on = open_target(place, asked)
    watch = Stopwatch() if latency is None else Stopwatch.of(described(model), sizes, batch)
    wanted = options.widths_of(
        {"mlp": mlp, "qk": qk, "vo": vo},
        {"macs": macs, "params": params},
        engine_options.deadline_of(latency, timed_on, watch, cache),
    )
    screen.run(commands.Prune(model, output, source, stats, wanted, settings), as_json, log_level)


@app.command()
def sweep(
    model: options.ModelFile,
    data: options.Data,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    macs: options.MacsList = None,
    params: options.ParamsList = None,
    target: engine_options.TargetName = "ort-cpu",
    method: options.MethodName = "best",
    align: options.Align = DEFAULT_ALIGN,
    ridge: options.Ridge = DEFAULT_RIDGE,
    max_error: options.MaxError = None,
    min_agreement: options.MinAgreement = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    crops: options.Crops = None,
    allow_random: options.AllowRandom = False,
    shapes: options.Shapes = None,
    device: options.Device = "cpu",
    providers: options.Providers = None,
    threads: options.Threads = 0,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Error, MACs and latency over several budgets; picks the smallest that keeps your limits."""
    settings = Settings(
        align,
        Recipe(method, None, ridge, device=device_of(device)),
        Gates(max_error, min_agreement),
        options.sizes_of(shapes),
        options.runtime_of(providers, threads, custom_op_library, device),
        seed,
        crops,
    )
    source, budgets = Source(data, samples, seed, allow_random), options.budgets_of(macs, params)
    timed_on = open_target(target, TargetOptions(threads, custom_op_library=custom_op_library))
    command = commands.Sweep(model, folder, source, budgets, settings, timed_on)
    screen.run(command, as_json, log_level)


@app.command()
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
        Source(data, samples, seed, allow_random),
        labels,
        output,
        Gates(max_error, min_agreement),
        options.runtime_of(providers, threads, custom_op_library),
    )
    screen.run(command, as_json, log_level)


app.command()(engines.build)
app.command()(engines.bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    gc.set_threshold(*COLLECTED)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(arguments, prog_name="corp-onnx")
    except SystemExit as end:
        return int(end.code or DONE)
    except NothingPrunable as error:
        return screen.complain(error, NOTHING)
    except (CorpError, OSError) as error:
        return screen.complain(error, UNUSABLE)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
