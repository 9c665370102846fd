"""The flags that several commands share, and what their text means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from corp_onnx.allocation.budget import Budget, Unit
from corp_onnx.allocation.deadline import Deadline
from corp_onnx.blocks import Axis
from corp_onnx.deploy.records import Precision
from corp_onnx.device import DeviceName
from corp_onnx.errors import PlanError
from corp_onnx.graph.sizes import Sizes
from corp_onnx.plan import DEFAULT_SHARES
from corp_onnx.providers import CPU, CUDA, EXACT
from corp_onnx.session import Runtime
from corp_onnx.solve import DEFAULT_RIDGE
from corp_onnx.solve.ranking import RANKINGS
from corp_onnx.solve.recipe import ELIMINATION, Method
from corp_onnx.terminal.shapes import parse_shapes

Exporter = Literal["torchscript", "dynamo"]
ModelFile = Annotated[Path, typer.Argument(help="An ONNX file.", metavar="MODEL")]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
LogLevel = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shapes", help="Input dimensions for counting: NAME:1x3x224x224,…; repeatable."),
]
Device = Annotated[
    DeviceName, typer.Option("--device", help="Where activations are summed and systems solved.")
]
DEFAULT_PROVIDERS: Mapping[DeviceName, tuple[str, ...]] = {"cpu": CPU, "cuda": CUDA}
Providers = Annotated[
    str | None,
    typer.Option(
        "--providers",
        help="Execution providers of ONNX Runtime, comma-separated; default: those of the device.",
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Threads; 0 takes all cores.")]
CustomOps = Annotated[
    Path | None, typer.Option("--custom-op-library", help="Shared library of custom operators.")
]
DATA_HELP = (
    "Folder of images, .npz (keys are input names), .npy, script.py:load_data or module:Class."
)
Data = Annotated[str, typer.Option("--data", help=DATA_HELP)]
MaybeData = Annotated[str | None, typer.Option("--data", help=DATA_HELP)]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Take only so many.")]
Crops = Annotated[
    int | None,
    typer.Option(
        "--crops", min=1, help="Inputs of every picture; default: crops fill up to 256 inputs."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of every random choice.")]
AllowRandom = Annotated[
    bool, typer.Option("--allow-random", help="Let --data random feed noise (ruins statistics).")
]
MaxError = Annotated[
    float | None, typer.Option("--max-error", help="Fail above this held-out relative error.")
]
MinAgreement = Annotated[
    float | None, typer.Option("--min-agreement", help="Fail below this top-1 agreement.")
]
MlpShare = Annotated[float | None, typer.Option("--mlp", help="Share of MLP width to remove.")]
QueryKeyShare = Annotated[
    float | None, typer.Option("--qk", help="Share of query-key width to remove.")
]
ValueShare = Annotated[
    float | None, typer.Option("--vo", help="Share of value-output width to remove.")
]
Rotary = Annotated[
    bool,
    typer.Option("--rotary", help="Cut rotated queries and keys too, by whole pairs of channels."),
]
MacsKept = Annotated[
    float | None, typer.Option("--macs", help="Share of all MACs to keep; widths by block.")
]
ParamsKept = Annotated[
    float | None, typer.Option("--params", help="Share of all parameters to keep.")
]
LatencyKept = Annotated[
    str | None,
    typer.Option("--latency", help="Share of the dense time to keep on --target, or such as 5ms."),
]
MacsList = Annotated[
    str | None, typer.Option("--macs", help="Shares of all MACs to keep, such as 0.8,0.6,0.4.")
]
ParamsList = Annotated[
    str | None, typer.Option("--params", help="Shares of all parameters to keep, likewise.")
]
StatisticsFile = Annotated[
    Path | None, typer.Option("--stats", help="Statistics of an earlier calibration.")
]
PrecisionName = Annotated[
    Precision, typer.Option("--precision", help="What it computes with; checked against fp32.")
]
NarrowIo = Annotated[
    bool, typer.Option("--narrow-io", help="Inputs and outputs in fp16 or bf16 too.")
]
WeightBits = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option("--weight-only", help="Store weights of linear layers so, compute in fp32."),
]
MethodName = Annotated[Method, typer.Option("--method")]
Align = Annotated[int, typer.Option("--align", help="Widths become multiples of this.")]
Ridge = Annotated[
    float | None,
    typer.Option(
        "--ridge",
        help="Regularisation, relative to the layer's variance; default: by held-out samples, or "
        f"{DEFAULT_RIDGE:g} where there is nothing to choose by.",
    ),
]
Ranking = Annotated[
    str | None,
    typer.Option(
        "--ranking",
        help=f"What stays: {ELIMINATION} (best's default), {', '.join(RANKINGS)} (else energy).",
    ),
]
Widths = Mapping[Axis, float] | Budget | Deadline
"""Shares to remove of every axis, or what may stay of the whole, or how long it may take."""

DEFAULT_BUDGETS = "0.8,0.6,0.5,0.4"


def require_one_of(data: str | None, stats: Path | None, chosen: bool) -> None:
    """See whether there is one source of what is known of the inputs.

    Args:
        data: Inputs.
        stats: A file of statistics.
        chosen: Whether some flag says which of the inputs count.

    Raises:
        PlanError: If not, or if the flag has nothing to choose from.
    """
    if (data is None) == (stats is None):
        raise PlanError("give either --data (inputs to calibrate on) or --stats (a file of them)")
    if stats is not None and chosen:
        raise PlanError(
            "--samples, --crops and --allow-random say what is calibrated on; with --stats that is "
            "done: leave them out"
        )


def widths_of(
    shares: Mapping[Axis, float | None],
    kept: Mapping[Unit, float | None],
    deadline: Deadline | None = None,
) -> Widths:
    """How wide a model shall be, from the flags that were given.

    Raises:
        PlanError: If they contradict each other.
    """
    removed = {axis: share for axis, share in shares.items() if share is not None}
    budgets: list[Budget | Deadline] = [
        Budget(unit, share) for unit, share in kept.items() if share is not None
    ]
    budgets += [] if deadline is None else [deadline]
    if len(budgets) > 1 or (budgets and removed):
        raise PlanError(
            "give either shares to remove (--mlp, --qk, --vo), or one share to keep of the whole "
            "(--macs, --params or --latency), from which all widths follow"
        )
    return budgets[0] if budgets else removed or DEFAULT_SHARES


def budgets_of(macs: str | None, params: str | None) -> tuple[Budget, ...]:
    """Several budgets, from ``0.8,0.6``; the largest first.

    Raises:
        PlanError: If both kinds are given, or something else than shares.
    """
    if macs is not None and params is not None:
        raise PlanError("give either --macs or --params, not both")
    unit: Unit = "macs" if params is None else "params"
    text = params or macs or DEFAULT_BUDGETS
    try:
        shares = {float(part) for part in text.split(",")}
    except ValueError as error:
        raise PlanError(f"--{unit} {text!r} is no list of shares such as 0.8,0.6,0.4") from error
    return tuple(Budget(unit, share) for share in sorted(shares, reverse=True))


def runtime_of(
    providers: str | None,
    threads: int,
    custom_op_library: Path | None,
    device: DeviceName = "cpu",
) -> Runtime:
    """How models are run, from the text of the flags."""
    names = DEFAULT_PROVIDERS[device]
    if providers is not None:
        names = tuple(name.strip() for name in providers.split(","))
    return Runtime(names, threads, custom_op_library=custom_op_library, provider_options=EXACT)


def sizes_of(shapes: list[str] | None) -> Sizes:
    """``NAME:1x3x224x224`` as dimensions by input name, in any spelling of `parse_shapes`.

    Raises:
        PlanError: If a text is of another form, or a dimension is 0.
    """
    sizes = parse_shapes(shapes or [], "--shapes")
    for name, dims in sizes.items():
        if 0 in dims:
            raise PlanError(f"--shapes gives {name} a dimension of 0; it must be at least 1")
    return sizes


def shard_of(text: str) -> tuple[int, int]:
    """``i/n`` as numbers, i from 0.

    Raises:
        PlanError: If the text is of another form.
    """
    index, _, parts = text.partition("/")
    if not (index.isdecimal() and parts.isdecimal() and int(index) < int(parts)):
        raise PlanError(f"--shard {text!r} is not of the form i/n with i from 0 to n - 1")
    return int(index), int(parts)
