"""The flags that several commands share, and what their text means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from corp_onnx.errors import PlanError
from corp_onnx.session import CPU, Runtime
from corp_onnx.sizes import Sizes
from corp_onnx.solve.ranking import RANKINGS
from corp_onnx.solve.solver import ELIMINATION

Exporter = Literal["torchscript", "dynamo"]
ModelFile = Annotated[Path, typer.Argument(help="An ONNX file.", metavar="MODEL")]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
LogLevel = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shapes", help="Input dimensions for counting: NAME:1x3x224x224. Repeatable."),
]
DEFAULT_PROVIDERS = ",".join(CPU)
Providers = Annotated[
    str, typer.Option("--providers", help="Execution providers of ONNX Runtime, comma-separated.")
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
DEFAULT_CROPS = 2
Crops = Annotated[
    int, typer.Option("--crops", min=1, help="Calibrate on so many crops of every picture.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
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
Ranking = Annotated[
    str | None,
    typer.Option(
        "--ranking",
        help=f"What stays: {ELIMINATION} (best's default), {', '.join(RANKINGS)} (else energy).",
    ),
]


def runtime_of(providers: str, threads: int, custom_op_library: Path | None) -> Runtime:
    """How models are run, from the text of the flags."""
    return Runtime(
        tuple(name.strip() for name in providers.split(",")),
        threads,
        custom_op_library=custom_op_library,
    )


def sizes_of(shapes: list[str] | None) -> Sizes:
    """``NAME:1x3x224x224`` as dimensions by input name.

    Raises:
        PlanError: If a text is of another form.
    """
    sizes = {}
    for text in shapes or []:
        name, _, dims = text.rpartition(":")
        numbers = dims.split("x")
        if not name or not all(number.isdigit() and int(number) for number in numbers):
            raise PlanError(f"--shapes {text!r} is not of the form NAME:1x3x224x224")
        sizes[name] = tuple(int(number) for number in numbers)
    return sizes


def shard_of(text: str) -> tuple[int, int]:
    """``i/n`` as numbers, i from 0.

    Raises:
        PlanError: If the text is of another form.
    """
    index, _, parts = text.partition("/")
    if not (index.isdigit() and parts.isdigit() and int(index) < int(parts)):
        raise PlanError(f"--shard {text!r} is not of the form i/n with i from 0 to n - 1")
    return int(index), int(parts)
