"""The preprocessing recipe: applied as timm applies it, and read back or refused by key."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.errors import DataError, OutputError

IMAGENET = Preprocessing(
    input="pixel_values",
    size=(32, 32),
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.9,
)
GREY = Preprocessing("x", (28, 28), 1, (0.286,), (0.353,), "bilinear", 1.0)


def picture(width, height, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def record(**changes):
    whole = {
        "input": "x",
        "size": [4, 4],
        "channels": 3,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    }
    whole |= changes
    return {key: value for key, value in whole.items() if value is not ...}


@pytest.mark.parametrize("recipe", [IMAGENET, GREY])
def test_a_recipe_is_read_back_as_it_was_written(recipe, tmp_path):
    path = recipe.save_beside(tmp_path / "model.v1.onnx")
    assert path == tmp_path / "model.v1.preprocessing.json"
    assert Preprocessing.beside(tmp_path / "model.v1.onnx") == recipe
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_model_without_a_recipe_has_none(tmp_path):
    assert Preprocessing.beside(tmp_path / "model.onnx") is None


def test_a_recipe_is_not_written_into_a_missing_folder(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        IMAGENET.save_beside(tmp_path / "nowhere" / "model.onnx")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mean": ...}, "'mean' is missing"),
        ({"means": [1.0]}, "'means' is unknown"),
        ({"input": ""}, "'input' must be the name of a model input"),
        ({"size": 224}, "'size' must be height and width in pixels, not 224"),
        ({"size": [224, -1]}, "'size' must be"),
        ({"size": [224, True]}, "'size' must be"),
        ({"channels": 4}, "'channels' must be 1 or 3, not 4"),
        ({"mean": ["a", "b", "c"]}, "'mean' must be a list of numbers"),
        ({"mean": [0.5]}, "'mean' has 1 values for 3 channels"),
        ({"std": [0.5, 0.0, 0.5]}, "'std' must be a list of positive numbers"),
        ({"interpolation": "lanczos"}, "'interpolation' must be bicubic or bilinear"),
        ({"interpolation": ["bicubic"]}, "'interpolation' must be bicubic or bilinear"),
        ({"crop_pct": 1.5}, "'crop_pct' must be a number above 0 and at most 1, not 1.5"),
        ({"crop_pct": float("nan")}, "'crop_pct' must be"),
    ],
)
def test_a_malformed_recipe_is_refused_by_file_and_key(changes, reason, tmp_path):
    path = tmp_path / "model.preprocessing.json"
    path.write_text(json.dumps(record(**changes)), encoding="utf-8")
    with pytest.raises(DataError, match=r"model\.preprocessing\.json: ") as error:
        Preprocessing.beside(tmp_path / "model.onnx")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "not JSON"), (b"\xff\xfe\x00", "not JSON"), (b"[1]", "holds list, not an object")],
)
def test_a_file_that_is_no_recipe_is_refused(content, reason, tmp_path):
    (tmp_path / "model.preprocessing.json").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        Preprocessing.beside(tmp_path / "model.onnx")


def test_normalise_follows_its_formula():
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 32, 32), np.uint8)
    expected = np.empty(pixels.shape)
    for channel in range(3):
        scaled = pixels[:, channel].astype(np.float64) / 255
        expected[:, channel] = (scaled - IMAGENET.mean[channel]) / IMAGENET.std[channel]
    result = IMAGENET.normalise(pixels)
    assert result.dtype == np.float32
    # four roundings of numbers below 1, the last divided by std
    tolerance = 4 * np.finfo(np.float32).eps / min(IMAGENET.std)
    np.testing.assert_allclose(result, expected, atol=tolerance, rtol=0)
    swapped = IMAGENET.normalise(pixels[:, ::-1])[:, ::-1]
    assert np.abs(swapped - expected).max() > 100 * tolerance


def test_pictures_of_another_size_are_not_normalised():
    with pytest.raises(DataError, match=r"\[n, 3, 32, 32\], not \[2, 3, 31, 32\]"):
        IMAGENET.normalise(np.zeros((2, 3, 31, 32), np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("recipe", [IMAGENET, GREY])
def test_a_picture_of_any_mode_becomes_one_input(recipe, mode):
    result = recipe.apply(picture(50, 40, mode))
    assert result.shape == (recipe.channels, *recipe.size)
    assert result.dtype == np.float32


PROCESSOR = {
    "do_normalize": True,
    "do_center_crop": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": (0.5, 0.4, 0.3),
    "image_std": (0.2, 0.3, 0.4),
}


def test_an_image_processor_that_crops_becomes_a_recipe():
    recipe = Preprocessing.from_transformers(PROCESSOR, name="x")
    expected = ("x", (224, 224), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.875)
    assert recipe == Preprocessing(*expected)


def test_an_image_processor_that_does_not_normalise_becomes_a_recipe_that_does_not():
    recipe = Preprocessing.from_transformers(PROCESSOR | {"do_normalize": False}, name="x")
    assert (recipe.mean, recipe.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_an_image_processor_that_squeezes_is_replaced_by_a_crop_with_a_warning(caplog):
    squeezes = PROCESSOR | {"do_center_crop": False, "size": {"height": 64, "width": 48}}
    recipe = Preprocessing.from_transformers(squeezes, name="x")
    assert (recipe.size, recipe.crop_pct) == ((64, 48), 1.0)
    assert "will be cropped instead" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rescale_factor": 1 / 127.5}, "not by 1/255"),
        ({"size": {"height": 256, "width": 256}}, "which no centre crop says"),
        ({"resample": 0}, "'interpolation' must be bicubic or bilinear, not 'nearest'"),
    ],
)
def test_an_image_processor_that_does_something_else_is_refused(changes, reason):
    with pytest.raises(DataError, match=reason):
        Preprocessing.from_transformers(PROCESSOR | changes, name="x")


def test_a_timm_config_that_does_not_crop_is_refused():
    with pytest.raises(DataError, match="'squash' is not 'center'"):
        Preprocessing.from_timm({"crop_mode": "squash"}, name="x")


def test_the_library_reads_recipes_without_torch():
    code = "import sys, corp_onnx.data.preprocessing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (48, 32)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (211, 317), (40, 40), (20, 90)])
def test_a_picture_is_preprocessed_as_timm_does_it(interpolation, size, crop_pct, width, height):
    from timm.data import create_transform

    recipe = Preprocessing("x", size, 3, IMAGENET.mean, IMAGENET.std, interpolation, crop_pct)
    transform = create_transform(
        input_size=(3, *size),
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode="center",
        mean=recipe.mean,
        std=recipe.std,
    )
    image = picture(width, height)
    tolerance = 4 * np.finfo(np.float32).eps / min(recipe.std)
    expected = transform(image).numpy()
    np.testing.assert_allclose(recipe.apply(image), expected, atol=tolerance, rtol=0)
    assert np.abs(recipe.apply(image)[:, :, ::-1] - expected).max() > 0.1
