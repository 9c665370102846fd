"""The verbs that gather statistics: `calibrate` and `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corp_onnx import commands
from corp_onnx.device import device_of
from corp_onnx.terminal import options, screen


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
    rotary: options.Rotary = False,
    device: options.Device = "cpu",
    providers: options.Providers = None,
    threads: options.Threads = 0,
    custom_op_library: options.CustomOps = None,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Gather statistics once; `prune --stats` then tries any ratio in seconds."""
    sizes = options.sizes_of(shapes)
    command = commands.Calibrate(
        model,
        output,
        commands.Source(data, samples, seed, allow_random, sizes),
        crops,
        options.shard_of(shard),
        resume,
        sizes,
        rotary,
        options.runtime_of(providers, threads, custom_op_library, device),
        device_of(device),
    )
    screen.run(command, as_json, log_level)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Statistics of shards.", metavar="FILE...")],
    output: options.OutputFile,
    as_json: options.AsJson = False,
    log_level: options.LogLevel = "warning",
) -> None:
    """Add up statistics that were gathered in shards."""
    screen.run(commands.Merge(tuple(files), output), as_json, log_level)
