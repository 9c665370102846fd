"""The flags of verbs that make models run on a target, and what their text means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from corp_onnx.allocation.deadline import Deadline
from corp_onnx.commands import Source
from corp_onnx.deploy.records import PRECISIONS, Precision, Target
from corp_onnx.deploy.targets import TARGETS, TargetOptions
from corp_onnx.errors import PlanError
from corp_onnx.latency.stopwatch import Stopwatch
from corp_onnx.session import GraphLevel
from corp_onnx.terminal.shapes import parse_ranges

TargetName = Annotated[str, typer.Option("--target", help=f"One of {', '.join(TARGETS)}.")]
MaybeTarget = Annotated[str | None, typer.Option("--target", help=f"One of {', '.join(TARGETS)}.")]
TargetNames = Annotated[
    str, typer.Option("--target", help=f"One or several of {', '.join(TARGETS)}.")
]
PrecisionNames = Annotated[
    str | None, typer.Option("--precision", help=f"One or several of {', '.join(PRECISIONS)}.")
]
Batch = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Samples of one inference; default: of --shapes."),
]
Batches = Annotated[
    str | None, typer.Option("--batch", help="Samples of one inference, such as 1,8,32.")
]
Level = Annotated[
    GraphLevel, typer.Option("--graph-level", help="How far ONNX Runtime rewrites the graph.")
]
MinShapes = Annotated[
    list[str] | None,
    typer.Option(
        *("--min-shapes", "--minShapes", "--trt-min-shapes"),
        help="Smallest sizes TensorRT builds for: NAME:1x3x224x224.",
    ),
]
OptShapes = Annotated[
    list[str] | None,
    typer.Option(
        *("--opt-shapes", "--optShapes", "--trt-opt-shapes"),
        help="Sizes TensorRT is tuned for, likewise.",
    ),
]
MaxShapes = Annotated[
    list[str] | None,
    typer.Option(
        *("--max-shapes", "--maxShapes", "--trt-max-shapes"),
        help="Largest sizes TensorRT builds for.",
    ),
]
Workspace = Annotated[
    float | None,
    typer.Option("--workspace", min=0, help="GiB that a kernel of TensorRT may take."),
]
Effort = Annotated[
    int,
    typer.Option(
        "--optimization-level", min=0, max=5, help="How long TensorRT looks for fast kernels."
    ),
]
Refit = Annotated[
    bool, typer.Option("--refit", help="Let weights of an engine of TensorRT be changed later.")
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Let later versions of TensorRT run it.")
]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="Launch all kernels of a run of TensorRT at once.")
]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Folder for what may be used again, such as times.")
]

DEFAULT_TARGET = "ort-cpu"

Name = TypeVar("Name", bound=str)


def deadline_of(
    latency: str | None, target: Target, stopwatch: Stopwatch, cache: Path | None
) -> Deadline | None:
    """How long a model may take, from ``0.6`` or ``5ms``.

    Raises:
        PlanError: If the text is neither.
    """
    if latency is None:
        return None
    in_ms = latency.endswith("ms")
    try:
        limit = float(latency.removesuffix("ms"))
    except ValueError as error:
        raise PlanError(
            f"--latency {latency!r} is neither a share to keep such as 0.6 nor a time such as 5ms"
        ) from error
    return Deadline(limit, in_ms, target, stopwatch, cache)


def target_options(
    *,
    threads: int = 0,
    arena: bool = True,
    graph_level: GraphLevel = "all",
    cache: Path | None = None,
    shapes: tuple[list[str] | None, list[str] | None, list[str] | None] = (None, None, None),
    workspace: float | None = None,
    optimization_level: int = 3,
    custom_op_library: Path | None = None,
    refit: bool = False,
    version_compatible: bool = False,
    cuda_graph: bool = False,
) -> TargetOptions:
    """What was asked of a target; ``shapes`` are smallest, likeliest and largest.

    Raises:
        PlanError: If shapes are of another form, or contradict each other.
    """
    return TargetOptions(
        threads=threads,
        arena=arena,
        graph_level=graph_level,
        cache=cache,
        shapes=parse_ranges(*(texts or () for texts in shapes)),
        workspace_bytes=None if workspace is None else int(workspace * 2**30),
        optimization_level=optimization_level,
        custom_op_library=custom_op_library,
        refit=refit,
        version_compatible=version_compatible,
        cuda_graph=cuda_graph,
    )


def names_of(text: str, known: Iterable[Name], flag: str) -> tuple[Name, ...]:
    """Names from ``a,b``, each once.

    Raises:
        PlanError: If one is not known.
    """
    by_text = {str(name): name for name in known}
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in by_text]:
        raise PlanError(f"{flag} {unknown[0]!r} is none of {', '.join(by_text)}")
    return tuple(by_text[name] for name in names)


def source_of(data: str | None, precisions: Sequence[Precision], seed: int = 0) -> Source | None:
    """Inputs to bring models into a precision with.

    Raises:
        PlanError: If there is nothing to do with them.
    """
    if data is None:
        return None
    if set(precisions) == {"fp32"}:
        raise PlanError(
            "--data is for ranges and the check of another precision, and none is asked for: leave "
            "it out, or give --precision too"
        )
    return Source(data, seed=seed)


def batches_of(text: str | None) -> tuple[int, ...]:
    """Batch sizes from ``1,8,32``; none where none are asked for.

    Raises:
        PlanError: If the text is of another form.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise PlanError(f"--batch {text!r} is no list of sizes such as 1,8,32")
    return tuple(dict.fromkeys(map(int, parts)))
