"""Measure, print, and keep the result: ``python -m benchmarks NAME...``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import (
    ablation,
    alignment,
    alike,
    budgets,
    calibration,
    crops,
    cuda,
    deadlines,
    demo,
    devices,
    effort,
    exactness,
    family,
    inspection,
    kernels,
    language,
    latency,
    macs,
    operators,
    precisions,
    punctual,
    quality,
    quantisers,
    rotary,
    sizes,
    values,
)
from benchmarks.outcome import Benchmark, Place
from benchmarks.report import DONE, RESULTS, Heading, report, status_of

DATA = ("tokenizers", "pillow")
TORCH = ("torch", "timm", "transformers", "onnxscript")
GPU = ("onnxruntime-gpu", "cupy-cuda13x", "nvidia-ml-py")

BENCHMARKS: Mapping[str, Benchmark] = {
    "demo": Benchmark(demo.measure, "the bundled model, cut and repaired by every method"),
    "exactness": Benchmark(
        exactness.measure, "ratio 0 and changes of basis give back the dense function", TORCH
    ),
    "exports": Benchmark(
        alike.measure, "four exports of one encoder, pruned, are one function", TORCH
    ),
    "inspect": Benchmark(
        inspection.measure, "how long `inspect` takes on graphs of many nodes", (*TORCH, "gguf")
    ),
    "quality": Benchmark(
        quality.measure, "error and accuracy of cut models, by method", DATA, quality.MODELS
    ),
    "budgets": Benchmark(
        budgets.measure, "equal multiply-adds, by method and choice of widths", DATA, budgets.MODELS
    ),
    "ablation": Benchmark(
        ablation.measure, "what every ingredient of best is worth", DATA, ablation.MODELS
    ),
    "values": Benchmark(
        values.measure, "what halving the values of every head must cost", DATA, values.MODELS
    ),
    "sizes": Benchmark(
        sizes.measure, "error by the number of calibration samples", DATA, sizes.MODELS
    ),
    "effort": Benchmark(
        effort.measure,
        "time and memory of pruning DINOv2 ViT-S by best",
        ("pillow",),
        effort.MODELS,
    ),
    "language": Benchmark(
        language.measure,
        "perplexity of a language model with narrower MLPs and values",
        (*TORCH, "gguf"),
    ),
    "rotary": Benchmark(
        rotary.measure, "what cutting rotated queries and keys would cost", (*TORCH, "gguf")
    ),
    "calibration": Benchmark(
        calibration.measure, "time and memory of calibrating, and of a new ratio after it"
    ),
    "crops": Benchmark(
        crops.measure, "what random crops of the calibration pictures give and cost", ("pillow",)
    ),
    "latency": Benchmark(
        latency.measure,
        "speed-up against the MAC ratio, by target and precision",
        (*TORCH, "openvino"),
        latency.MODELS,
        apart=True,
    ),
    "cuda": Benchmark(
        cuda.measure,
        "speed-up against the MAC ratio on an NVIDIA GPU",
        (*TORCH, *GPU),
        cuda.MODELS,
        apart=True,
        on_gpu=True,
    ),
    "kernels": Benchmark(
        kernels.measure,
        "where an NVIDIA GPU spends its time on dense and cut models",
        (*TORCH, *GPU),
        kernels.MODELS,
        apart=True,
        on_gpu=True,
    ),
    "devices": Benchmark(
        devices.measure,
        "calibrating and solving on the processor and on an NVIDIA GPU",
        (*TORCH, *GPU),
        on_gpu=True,
    ),
    "family": Benchmark(
        family.measure, "what a cut costs as models grow", GPU, family.MODELS, on_gpu=True
    ),
    "deadlines": Benchmark(
        deadlines.measure,
        "half of the latency, by choice of widths",
        (*DATA, "openvino"),
        deadlines.MODELS,
    ),
    "punctual": Benchmark(
        punctual.measure,
        "half of the latency, by target and batch: whether it is met",
        (*TORCH, "openvino"),
        tuple(punctual.MODELS),
        apart=True,
    ),
    "operators": Benchmark(
        operators.measure,
        "operators of the optimised graph, and where the time goes",
        (*TORCH, "openvino"),
        operators.MODELS,
    ),
    "alignment": Benchmark(
        alignment.measure,
        "what widths that are no multiple of 8 are worth",
        (*DATA, "openvino"),
    ),
    "precisions": Benchmark(
        precisions.measure, "cut, then rounded: errors and sizes", DATA, precisions.MODELS
    ),
    "quantisers": Benchmark(
        quantisers.measure,
        "our typed models and those of ONNX Runtime's tools",
        DATA,
        quantisers.MODELS,
    ),
    "macs": Benchmark(macs.measure, "multiply-adds of DeiT, dense and cut, by hand count", TORCH),
}

ALL = "all"


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks that are named; 0 if all their checks hold."""
    parser = _parser()
    asked = parser.parse_args(argv)
    names = _everywhere() if asked.names == [ALL] else asked.names
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    if not names:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:12} {benchmark.about}")
        return DONE
    for name in names:
        if asked.only not in {None, *BENCHMARKS[name].models}:
            offered = ", ".join(BENCHMARKS[name].models) or "none by name"
            parser.error(f"--only {asked.only}: {name} measures {offered}")
    place = Place(*(asked.assets, asked.exports, asked.quick, asked.only, asked.seeds, asked.first))
    return status_of(lambda: max([_run(name, place, asked.out, argv) for name in names]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        epilog="`python -m benchmarks.imagenet` has options of its own",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*BENCHMARKS, ALL)))
    parser.add_argument("--out", type=Path, default=RESULTS, help="for results")
    parser.add_argument("--assets", type=Path, default=Path(".assets"), help="models and data")
    parser.add_argument(
        "--exports",
        type=Path,
        default=Path(".assets/exports"),
        help="kept exports; made if missing",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few samples, to see that it works; writes nothing"
    )
    parser.add_argument("--only", metavar="MODEL", help="measure only this model")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="how many draws of calibration samples"
    )
    parser.add_argument(
        "--first", type=int, default=0, metavar="SEED", help="of these draws; 0 unless said"
    )
    return parser


def _everywhere() -> list[str]:
    """Those that need no GPU."""
    return [name for name, benchmark in BENCHMARKS.items() if not benchmark.on_gpu]


def _run(name: str, place: Place, out: Path, argv: Sequence[str]) -> int:
    """Measure one thing, print it, write it down unless it was only a glance."""
    benchmark = BENCHMARKS[name]
    if benchmark.apart and place.only is None:
        models = benchmark.models[: 1 if place.quick else None]
        return max([_run(name, replace(place, only=model), out, argv) for model in models])
    model = [re.sub("[ /,]+", "-", place.only)] if place.only else []
    draws = [f"seed-{place.first}"] if place.first else []
    title = "-".join((name, *model, *draws))
    heading = Heading(title, benchmark.about, benchmark.packages, ("benchmarks", *argv))
    return report(heading, lambda: benchmark.measure(place), None if place.quick else out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
