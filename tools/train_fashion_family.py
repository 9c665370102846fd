"""Train one vision transformer on Fashion-MNIST in three sizes, all alike but for their width.

::

    python -m tools.train_fashion_family 5M --data DIR --out DIR --device cuda

Depth, tokens, epochs and everything else of the training are the same, so that what a cut costs can
be compared by size (``python -m benchmarks family``). One size takes minutes on a GPU, and days on
a processor. See ``train_fashion_vit`` for the data, and for the much smaller model that comes with
the package.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from tools.train_fashion_vit import (
    DATA,
    SEED,
    Split,
    accuracy,
    augmented,
    normalised,
    predicted,
    read_split,
    vision_transformer,
    write_images,
    write_model,
    write_preprocessing,
)

BATCH, EPOCHS = 256, 40
DECAY, DROP_PATH = 0.05, 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """Width of the stream, number of heads, highest rate; MLPs are four times as wide."""

    width: int
    heads: int
    rate: float

    def network(self) -> VisionTransformer:
        """Before training."""
        return vision_transformer(self.width, self.heads, mlp_ratio=4, drop_path=DROP_PATH)


FAMILY: Mapping[str, Shape] = {
    "1M": Shape(128, 2, 1e-3),
    "5M": Shape(256, 4, 1e-3),
    "20M": Shape(512, 8, 3e-4),
}
"""By millions of parameters; heads of 64. The largest does not train at the rate of the others, and
at its own gets no better than they do."""


def train(
    model: VisionTransformer,
    training: Split,
    test: Split,
    *,
    epochs: int,
    rate: float,
    device: str,
) -> None:
    """All epochs, in bfloat16 where torch does so by itself."""
    model.to(device)
    images = normalised(training.images).to(device)
    labels = torch.from_numpy(training.labels.copy()).long().to(device)
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * steps, pct_start=0.15, cycle_momentum=False
    )
    generator = torch.Generator(device).manual_seed(SEED)
    start = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator, device=device)
        for batch in order.split(BATCH)[:steps]:
            with torch.autocast(device, torch.bfloat16):
                logits = model(augmented(images[batch], generator))
            loss = functional.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        share = accuracy(predicted(model, normalised(test.images).to(device)), test.labels)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: test {share:.4f}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Train, export, check, and write one model of the family, and the images to judge it by."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=FAMILY)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path(".assets/family"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--few", type=int, help="train on so many images only, for a trial")
    options = parser.parse_args()

    training, test = read_split(options.data, "train"), read_split(options.data, "t10k")
    few = Split(training.images[: options.few], training.labels[: options.few])
    shape = FAMILY[options.size]
    model = shape.network()
    train(model, few, test, epochs=options.epochs, rate=shape.rate, device=options.device)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.size}.onnx"
    command = f"python -m tools.train_fashion_family {options.size} --epochs {options.epochs}"
    write_model(model.cpu(), test, path, command=command)
    write_preprocessing(path.with_suffix(".preprocessing.json"))
    write_images(training, test, options.out, count=len(test.images))


if __name__ == "__main__":
    main()
