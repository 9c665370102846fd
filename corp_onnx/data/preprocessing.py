"""How a picture becomes a model's input: the recipe beside a model, read and applied.

A model ``m.onnx`` may have a file ``m.preprocessing.json`` beside it::

    {"input": "pixel_values", "size": [224, 224], "channels": 3,
     "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
     "interpolation": "bicubic", "crop_pct": 0.9}
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from corp_onnx.errors import DataError
from corp_onnx.files import whole

_log = logging.getLogger(__name__)

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODES = {1: "L", 3: "RGB"}
"""Pillow's name for pictures of one and of three channels."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What a picture goes through before it enters a model.

    The shorter side is resized to ``size / crop_pct``, the centre is cut out, and each channel is
    normalised: ``x = (pixel / 255 - mean) / std``. This is timm's evaluation transform with
    ``crop_mode="center"``, step for step.

    Attributes:
        input: Name of the model input that it feeds.
        size: Height and width of that input, in pixels.
        channels: 3 for colour (RGB), 1 for grey.
        mean: One per channel, of pixels scaled to 0…1.
        std: One per channel, of pixels scaled to 0…1.
        interpolation: The filter of the resize.
        crop_pct: Share of the resized picture's shorter side that is cut out, in (0, 1].

    >>> grey = Preprocessing("x", (2, 2), 1, (0.5,), (0.25,), "bilinear", 1.0)
    >>> grey.normalise(np.full((1, 1, 2, 2), 255, np.uint8)).ravel()
    array([2., 2., 2., 2.], dtype=float32)
    """

    input: str
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"]
    crop_pct: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Preprocessing:
        """The recipe of a record that somebody else wrote, once every value has been checked.

        Raises:
            DataError: If a key is missing or unknown, or a value unusable; it says which.
        """
        missing, unknown = sorted(set(_CHECKS) - set(record)), sorted(set(record) - set(_CHECKS))
        if missing or unknown:
            what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is unknown"
            raise DataError(f"key {what}")
        for key, (expected, accepts) in _CHECKS.items():
            if not accepts(record[key]):
                raise DataError(f"{key!r} must be {expected}, not {record[key]!r}")
        for key in ("mean", "std"):
            if len(record[key]) != record["channels"]:
                values = f"{len(record[key])} values for {record['channels']} channels"
                raise DataError(f"{key!r} has {values}")
        return cls(**record)

    @staticmethod
    def path_beside(model: Path) -> Path:
        """Where the recipe of a model lies: ``<model's stem>.preprocessing.json``."""
        return model.with_name(f"{model.stem}.preprocessing.json")

    @classmethod
    def beside(cls, model: Path) -> Preprocessing | None:
        """The recipe beside a model, or None if there is none.

        Raises:
            DataError: If the file is not such a recipe; it names the file and the key.
        """
        path = cls.path_beside(model)
        if not path.is_file():
            return None
        try:
            return cls.of(_record(path))
        except DataError as error:
            raise DataError(f"{path}: {error}; correct it or remove the file") from error

    @classmethod
    def from_timm(cls, config: Mapping[str, Any], *, name: str) -> Preprocessing:
        """The recipe of a timm data config (``timm.data.resolve_data_config``).

        Args:
            config: The data config.
            name: The model input that it feeds.

        Raises:
            DataError: If such a recipe cannot say what the config asks for.
        """
        if config["crop_mode"] != "center":
            raise DataError(f"crop mode {config['crop_mode']!r} is not 'center'")
        channels, height, width = config["input_size"]
        return cls.of(
            {
                "input": name,
                "size": (height, width),
                "channels": channels,
                "mean": tuple(config["mean"]),
                "std": tuple(config["std"]),
                "interpolation": config["interpolation"],
                "crop_pct": config["crop_pct"],
            }
        )

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any], *, name: str) -> Preprocessing:
        """The recipe of an image processor of transformers (its ``to_dict()``).

        A processor that squeezes pictures of any shape into the input, without a crop, becomes a
        recipe that crops the largest centre of the same shape; a warning is logged.

        Args:
            config: The processor's settings.
            name: The model input that it feeds.

        Raises:
            DataError: If such a recipe cannot say what the processor does.
        """
        if not math.isclose(config.get("rescale_factor", 0), 1 / 255, rel_tol=1e-6):
            raise DataError(f"pixels are scaled by {config.get('rescale_factor')}, not by 1/255")
        height, width, crop_pct = _cropped(config)
        normalised = config.get("do_normalize", True)
        return cls.of(
            {
                "input": name,
                "size": (height, width),
                "channels": len(config["image_mean"]),
                "mean": tuple(mean if normalised else 0.0 for mean in config["image_mean"]),
                "std": tuple(std if normalised else 1.0 for std in config["image_std"]),
                "interpolation": Image.Resampling(config["resample"]).name.lower(),
                "crop_pct": crop_pct,
            }
        )

    def save_beside(self, model: Path) -> Path:
        """Write the recipe beside a model, whole or not at all, and return its path.

        Raises:
            OutputError: If it cannot be written.
        """
        path = self.path_beside(model)
        with whole(path) as draft:
            draft.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    def apply(self, image: Image.Image) -> Float32[np.ndarray, "c h w"]:
        """One picture of any size and mode as one model input, without the batch axis."""
        height, width = self.size
        whole = image.convert(MODES[self.channels])
        whole = whole.resize(self._resized(*whole.size), RESAMPLING[self.interpolation])
        left, top = round((whole.width - width) / 2), round((whole.height - height) / 2)
        return self._as_input(whole.crop((left, top, left + width, top + height)))

    def apply_within(
        self, image: Image.Image, box: tuple[float, float, float, float], *, mirrored: bool
    ) -> Float32[np.ndarray, "c h w"]:
        """A part of a picture, resized to fill the model input.

        Args:
            image: Of any size and mode.
            box: Left, upper, right and lower edge of the part, in pixels.
            mirrored: Whether left and right change places.
        """
        height, width = self.size
        whole = image.convert(MODES[self.channels])
        part = whole.resize((width, height), RESAMPLING[self.interpolation], box=box)
        return self._as_input(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part)

    def normalise(self, pixels: UInt8[np.ndarray, "n c h w"]) -> Float32[np.ndarray, "n c h w"]:
        """Pictures that have the right size already: only ``(pixel / 255 - mean) / std``.

        Raises:
            DataError: If channels, height or width are not those of the model.
        """
        if pixels.shape[1:] != (self.channels, *self.size):
            raise DataError(
                f"input {self.input!r} takes pictures [n, {self.channels}, {self.size[0]}, "
                f"{self.size[1]}], not {list(pixels.shape)}"
            )
        mean = np.array(self.mean, np.float32).reshape(-1, 1, 1)
        std = np.array(self.std, np.float32).reshape(-1, 1, 1)
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def _as_input(self, picture: Image.Image) -> Float32[np.ndarray, "c h w"]:
        """A picture that has the right size and mode."""
        pixels = np.asarray(picture, dtype=np.uint8).reshape(*self.size, self.channels)
        normalised: np.ndarray = self.normalise(pixels.transpose(2, 0, 1)[None])[0]
        return normalised

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize, rounded as torchvision and timm round them."""
        goal_height, goal_width = (math.floor(side / self.crop_pct) for side in self.size)
        if goal_height == goal_width:
            short, long = min(width, height), max(width, height)
            longer = int(goal_width * long / short)
            return (goal_width, longer) if width <= height else (longer, goal_height)
        ratio = min(height / goal_height, width / goal_width)
        return round(width / ratio), round(height / ratio)


def _cropped(config: Mapping[str, Any]) -> tuple[int, int, float]:
    """Height, width and ``crop_pct`` of what an image processor of transformers makes."""
    size = dict(config.get("size") or {})
    if config.get("do_center_crop") and set(size) == {"shortest_edge"}:
        crop = config["crop_size"]
        return crop["height"], crop["width"], crop["height"] / size["shortest_edge"]
    if config.get("do_center_crop") or set(size) != {"height", "width"}:
        raise DataError(f"pictures are resized to {size}, which no centre crop says")
    _log.warning("the image processor squeezes pictures to %s; they will be cropped instead", size)
    return size["height"], size["width"], 1.0


def keep_beside(recipe: Preprocessing | None, model: Path) -> Path | None:
    """Write the recipe of a model beside it, if it has one; what lies there else is warned of."""
    if recipe is not None:
        return recipe.save_beside(model)
    left = Preprocessing.path_beside(model)
    if left.is_file():
        _log.warning(
            "%s was there before, and will be read with %s; remove it if it is of another model",
            *(left, model),
        )
    return None


def _record(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file, lists as tuples."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"it is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"it holds {type(record).__name__}, not an object with keys")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_CHECKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "input": ("the name of a model input", lambda v: isinstance(v, str) and bool(v)),
    "size": (
        "height and width in pixels",
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_whole, v)),
    ),
    "channels": ("1 or 3", lambda v: _is_whole(v) and v in MODES),
    "mean": ("a list of numbers", lambda v: isinstance(v, tuple) and all(map(_is_real, v))),
    "std": (
        "a list of positive numbers",
        lambda v: isinstance(v, tuple) and all(_is_real(x) and x > 0 for x in v),
    ),
    "interpolation": (
        " or ".join(RESAMPLING),
        lambda v: isinstance(v, str) and v in RESAMPLING,
    ),
    "crop_pct": ("a number above 0 and at most 1", lambda v: _is_real(v) and 0 < v <= 1),
}
"""What every key must hold, in words and as a test."""
