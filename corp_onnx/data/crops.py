"""Several inputs from every picture: more varied activations from the same folder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Shaped

from corp_onnx.data.stores import Images, Layout

AREAS = (0.4, 1.0)
"""Least and greatest share of a picture's area that a random crop asks for."""

STRETCH = 4 / 3
"""How much wider or narrower than the model's input a random crop may be."""

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels, as Pillow takes them."""


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """Every picture ``crops`` times: plain first, then random crops, half of them mirrored.

    All pictures come once before any comes again: sample ``j * len(pictures) + i`` is variant ``j``
    of picture ``i``. What it shows follows from ``(seed, i, j)`` alone, so every part of the data
    and every reading of it agree.
    """

    pictures: Images
    crops: int
    seed: int

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Those of the pictures, for every variant."""
        labels = self.pictures.labels
        return None if labels is None else labels * self.crops

    def __len__(self) -> int:
        return self.crops * len(self.pictures)

    def layout(self, index: int) -> Layout:
        """What the preprocessing makes of any picture."""
        return self.pictures.layout(self.place(index))

    def place(self, index: int) -> int:
        """The number of the picture that it is a crop of."""
        return index % len(self.pictures)

    def name(self, index: int) -> str:
        """The picture's file."""
        return self.pictures.name(self.place(index))

    def read(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """The crops, resized and normalised."""
        made = [self._variant(*divmod(index, len(self.pictures))) for index in indices.tolist()]
        return {self.pictures.preprocessing.input: np.stack(made)}

    def _variant(self, variant: int, picture: int) -> Float32[np.ndarray, "c h w"]:
        preprocessing, image = self.pictures.preprocessing, self.pictures.open(picture)
        if variant == 0:
            return preprocessing.apply(image)
        rng = np.random.default_rng((self.seed, picture, variant))
        height, width = preprocessing.size
        box = random_box(image.size, width / height, rng)
        return preprocessing.apply_within(image, box, mirrored=bool(rng.integers(2)))


def random_box(size: tuple[int, int], aspect: float, rng: np.random.Generator) -> Box:
    """A random part of a picture: its area and its aspect within `AREAS` and `STRETCH`.

    A part that would stick out is made smaller, in its own aspect, until it fits.

    Args:
        size: Width and height of the picture.
        aspect: Width over height of the model's input.
        rng: Draws area, aspect (evenly on a log scale) and place.
    """
    area = rng.uniform(*AREAS) * size[0] * size[1]
    drawn = aspect * STRETCH ** rng.uniform(-1, 1)
    wide, high = math.sqrt(area * drawn), math.sqrt(area / drawn)
    shrunk = min(1.0, size[0] / wide, size[1] / high)
    wide, high = min(wide * shrunk, size[0]), min(high * shrunk, size[1])  # whatever the rounding
    left, top = rng.uniform(0, size[0] - wide), rng.uniform(0, size[1] - high)
    return left, top, min(left + wide, size[0]), min(top + high, size[1])
