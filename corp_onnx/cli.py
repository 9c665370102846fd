"""The command line: arguments, one call, the printed result, the exit status.

Exit status: 0 done and verified, 1 done but a check or gate failed, 2 wrong request or unusable
input, 3 nothing prunable was found, 130 interrupted.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from corp_onnx import commands, options, present
from corp_onnx.blocks import Axis
from corp_onnx.commands import Answer, Source
from corp_onnx.demo import Demo
from corp_onnx.errors import CorpError, NothingPrunable, PlanError
from corp_onnx.pipeline import Gates
from corp_onnx.plan import DEFAULT_ALIGN
from corp_onnx.session import Runtime
from corp_onnx.solve import DEFAULT_RIDGE, Method, Recipe
from corp_onnx.solve.ranking import RANKINGS

DONE, UNVERIFIED, UNUSABLE, NOTHING, INTERRUPTED = 0, 1, 2, 3, 130

COLLECTED = (50_000, 20, 50)
"""Graphs are many small objects: looking for garbage among them less often saves a sixth."""

app = typer.Typer(
    name="corp-onnx",
    help="Cut an exported ONNX transformer to half its width, and repair it in closed form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Folder for the results.")] = Path(
        "runs/demo"
    ),
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Prune the bundled model on the bundled images and print the evidence."""
    _run(Demo(run_dir), as_json, log_level)


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
    _run(command, as_json, log_level)


@app.command()
def inspect(
    model: options.ModelFile,
    shapes: options.Shapes = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Show what can be cut, why the rest cannot, and where the MACs are."""
    _run(commands.Inspect(model, options.sizes_of(shapes)), as_json, log_level)


@app.command()
def calibrate(
    model: options.ModelFile,
    data: options.Data,
    output: options.OutputFile,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    allow_random: options.AllowRandom = False,
    shard: Annotated[
        str, typer.Option("--shard", help="i/n: one of n random parts, i from 0.")
    ] = "0/1",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUT.partial, and keep one.")
    ] = False,
    shapes: options.Shapes = None,
    providers: options.Providers = options.DEFAULT_PROVIDERS,
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
        options.shard_of(shard),
        resume,
        options.sizes_of(shapes),
        options.runtime_of(providers, threads, custom_op_library),
    )
    _run(command, as_json, log_level)


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Statistics of shards.", metavar="FILE...")],
    output: options.OutputFile,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Add up statistics that were gathered in shards."""
    _run(commands.Merge(tuple(files), output), as_json, log_level)


@app.command()
def prune(
    model: options.ModelFile,
    output: options.OutputFile,
    data: options.MaybeData = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Statistics of an earlier calibration.")
    ] = None,
    method: Annotated[Method, typer.Option("--method")] = "corp",
    mlp: options.MlpShare = None,
    qk: options.QueryKeyShare = None,
    align: Annotated[
        int, typer.Option("--align", help="Widths become multiples of this.")
    ] = DEFAULT_ALIGN,
    ridge: Annotated[
        float, typer.Option("--ridge", help="Regularisation, relative to the layer's variance.")
    ] = DEFAULT_RIDGE,
    ranking: Annotated[
        str, typer.Option("--ranking", help=f"One of {', '.join(RANKINGS)}.")
    ] = "energy",
    max_error: options.MaxError = None,
    min_agreement: options.MinAgreement = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    allow_random: options.AllowRandom = False,
    shapes: options.Shapes = None,
    providers: options.Providers = options.DEFAULT_PROVIDERS,
    threads: options.Threads = 0,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Cut a model, repair it, verify it, write it. Without shares: --mlp 0.5 --qk 0.5."""
    if (data is None) == (stats is None):
        raise PlanError("give either --data (inputs to calibrate on) or --stats (a file of them)")
    given: dict[Axis, float | None] = {"mlp": mlp, "qk": qk}
    command = commands.Prune(
        model,
        output,
        None if data is None else Source(data, samples, seed, allow_random),
        stats,
        {axis: share for axis, share in given.items() if share is not None},
        align,
        Recipe(method, ranking, ridge),
        Gates(max_error, min_agreement),
        options.sizes_of(shapes),
        options.runtime_of(providers, threads, custom_op_library),
    )
    _run(command, as_json, log_level)


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
    providers: options.Providers = options.DEFAULT_PROVIDERS,
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
    _run(command, as_json, log_level)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="Models; the first is compared with.")],
    target: Annotated[Literal["ort-cpu"], typer.Option("--target")] = "ort-cpu",
    precision: Annotated[Literal["fp32"], typer.Option("--precision")] = "fp32",
    batch: Annotated[int, typer.Option("--batch", min=1)] = 1,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Turns not counted.")] = 5,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Turns counted.")] = 50,
    shapes: options.Shapes = None,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Time models turn by turn, so that drift hits all alike."""
    runtime = Runtime(threads=threads, custom_op_library=custom_op_library)
    command = commands.Bench(
        tuple(models), batch, warmup, runs, options.sizes_of(shapes), seed, runtime
    )
    _run(command, as_json, log_level)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    gc.set_threshold(*COLLECTED)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(arguments, prog_name="corp-onnx")
    except SystemExit as end:
        return int(end.code or DONE)
    except NothingPrunable as error:
        return _complain(error, NOTHING)
    except CorpError as error:
        return _complain(error, UNUSABLE)
    return DONE


def _run(command: Callable[[commands.Progress], Answer], as_json: bool, log_level: str) -> None:
    """Carry a command out: progress and logs on standard error, the answer on standard output."""
    screen = Console(stderr=True)
    _log_to(screen, log_level)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} samples"),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    try:
        with bar:
            task = bar.add_task("calibrating", total=None, visible=False)
            answer = command(lambda done: bar.update(task, advance=done, visible=True))
    except KeyboardInterrupt:
        raise typer.Exit(_complain("interrupted; no output written", INTERRUPTED)) from None
    if as_json:
        print(present.as_json(answer.document))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(answer.table)
    raise typer.Exit(answer.status)


def _log_to(screen: Console, level: str) -> None:
    if level.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise PlanError(f"--log-level {level!r} is none of debug, info, warning and error")
    handler = RichHandler(console=screen, show_path=False, show_time=False)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)


def _complain(error: object, status: int) -> int:
    print(f"corp-onnx: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
