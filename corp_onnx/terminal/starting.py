"""The verbs that one starts with: `demo`, `export` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corp_onnx import commands
from corp_onnx.terminal import options, screen


def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="For results.")] = Path("runs/demo"),
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Prune the bundled model on the bundled images and print the evidence."""
    screen.run(commands.Demo(run_dir), as_json, log_level)


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


def inspect(
    model: options.ModelFile,
    shapes: options.Shapes = None,
    rotary: options.Rotary = False,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Show what can be cut, why the rest cannot, and where the MACs are."""
    screen.run(commands.Inspect(model, options.sizes_of(shapes), rotary), as_json, log_level)
