"""The verbs that make models run somewhere: `build` and `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corp_onnx import commands
from corp_onnx.deploy.records import PRECISIONS
from corp_onnx.deploy.targets import TARGETS, TargetOptions, open_target, require_taken
from corp_onnx.errors import PlanError
from corp_onnx.graph.sizes import DEFAULT_BATCH
from corp_onnx.latency.race import RUNS, WARMUP
from corp_onnx.latency.stopwatch import Stopwatch
from corp_onnx.terminal import engine_options, options, screen


def build(
    model: options.ModelFile,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for the engine.")],
    target: engine_options.TargetName = "ort-cpu",
    precision: options.PrecisionName = "fp32",
    data: options.MaybeData = None,
    graph_level: engine_options.Level = "all",
    min_shapes: engine_options.MinShapes = None,
    opt_shapes: engine_options.OptShapes = None,
    max_shapes: engine_options.MaxShapes = None,
    workspace: engine_options.Workspace = None,
    optimization_level: engine_options.Effort = 3,
    refit: engine_options.Refit = False,
    version_compatible: engine_options.VersionCompatible = False,
    cache: engine_options.Cache = None,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Make a model ready for one target: an engine, and the record of how it was built."""
    asked = engine_options.target_options(
        graph_level=graph_level,
        cache=cache,
        shapes=(min_shapes, opt_shapes, max_shapes),
        workspace=workspace,
        optimization_level=optimization_level,
        custom_op_library=custom_op_library,
        refit=refit,
        version_compatible=version_compatible,
    )
    built_for = open_target(target, asked)
    require_taken(asked, [target])
    source = engine_options.source_of(data, [precision])
    runtime = options.runtime_of(None, 0, custom_op_library)
    command = commands.Build(model, folder, built_for, precision, source, runtime)
    screen.run(command, as_json, log_level)


def bench(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="Models, folders of engines, or times of trtexec; the first is the measure."
        ),
    ],
    targets: engine_options.TargetNames = "ort-cpu",
    precisions: engine_options.PrecisionNames = None,
    data: options.MaybeData = None,
    batches: engine_options.Batches = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Turns not counted.")] = WARMUP,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Turns counted.")] = RUNS,
    profile: Annotated[
        bool, typer.Option("--profile", help="Tell where the time goes, by operator.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Tell the memory of each engine alone.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="A PNG of the times.")] = None,
    shapes: options.Shapes = None,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    arena: Annotated[bool, typer.Option(help="Let ONNX Runtime keep freed memory.")] = True,
    graph_level: engine_options.Level = "all",
    min_shapes: engine_options.MinShapes = None,
    opt_shapes: engine_options.OptShapes = None,
    max_shapes: engine_options.MaxShapes = None,
    workspace: engine_options.Workspace = None,
    optimization_level: engine_options.Effort = 3,
    refit: engine_options.Refit = False,
    version_compatible: engine_options.VersionCompatible = False,
    cuda_graph: engine_options.CudaGraph = False,
    cache: engine_options.Cache = None,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Time models turn by turn, so that drift hits all alike."""
    asked = engine_options.target_options(
        threads=threads,
        arena=arena,
        graph_level=graph_level,
        cache=cache,
        shapes=(min_shapes, opt_shapes, max_shapes),
        workspace=workspace,
        optimization_level=optimization_level,
        custom_op_library=custom_op_library,
        refit=refit,
        version_compatible=version_compatible,
        cuda_graph=cuda_graph,
    )
    names = engine_options.names_of(targets, TARGETS, "--target")
    require_taken(asked, names, builds=not all(model.is_dir() for model in models))
    types = engine_options.names_of(precisions or "fp32", PRECISIONS, "--precision")
    sizes = options.sizes_of(shapes)
    counts = engine_options.batches_of(batches)
    if commands.are_times(tuple(models)):
        run_here = (targets, warmup, runs, asked, data, shapes) != (
            *("ort-cpu", WARMUP, RUNS, TargetOptions(), None, None),
        )
        if run_here or profile or memory or len(types) > 1 or len(counts) > 1:
            raise PlanError(
                "times of trtexec are of one precision and one batch, and nothing is run: give no "
                "flags but --precision, --batch, --seed, --plot and --json"
            )
        measured_in, batch = types[0] if precisions else None, (*counts, DEFAULT_BATCH)[0]
        imported = commands.Imported(tuple(models), measured_in, batch, seed, plot)
        screen.run(imported, as_json, log_level)
        return
    command = commands.Bench(
        tuple(models),
        tuple(open_target(name, asked) for name in names),
        types,
        counts,
        Stopwatch(sizes=sizes, warmup=warmup, runs=runs, seed=seed),
        engine_options.source_of(data, types, seed),
        profile,
        memory,
        plot,
        options.runtime_of(None, threads, custom_op_library),
    )
    screen.run(command, as_json, log_level)
