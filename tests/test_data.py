from __future__ import annotations

import json
import logging
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from corp_onnx.data.dataset import Dataset, open_data
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.data.samples import drawn, held_apart
from corp_onnx.errors import DataError
from corp_onnx.graph.inputs import InputSpec

PIXELS = InputSpec("pixels", np.dtype(np.float32), (None, 3, 8, 8))
ONE = InputSpec("x", np.dtype(np.float32), (None, 4))
TEXT = (
    InputSpec("input_ids", np.dtype(np.int64), (None, None)),
    InputSpec("attention_mask", np.dtype(np.int64), (None, None)),
)
PREPROCESSING = Preprocessing(
    "pixels", (8, 8), 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0
)


def spec(dtype: type, *shape: int | None, name: str = "x") -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def joined(data: Dataset, batch_size: int, name: str = "x") -> np.ndarray:
    return np.concatenate([batch[name] for batch in data.batches(batch_size)])


def saved(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def script(folder: Path, body: str, function: str = "load_data") -> str:
    (folder / "loader.py").write_text(f"import numpy as np\n{body}")
    return f"{folder / 'loader.py'}:{function}"


def picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, level, level)).save(path)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    np.save(tmp_path / "rows.npy", np.arange(40, dtype=np.float32).reshape(10, 4))
    return str(tmp_path / "rows.npy")


@pytest.fixture
def photos(tmp_path: Path) -> str:
    for level, name in enumerate(["dog/b.png", "cat/deep/a.JPG", "cat/c.webp", "dog/a.gif"]):
        picture(tmp_path / "photos" / name, level * 40)
    return str(tmp_path / "photos")


def refused(source: str, *inputs: InputSpec, preprocessing: Preprocessing | None = None) -> str:
    """The message that opening the source, or reading all of it, ends with."""
    with pytest.raises(DataError) as caught:
        list(open_data(source, inputs, preprocessing=preprocessing).batches(4))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Sources


def test_a_folder_gives_pictures_in_path_order_with_their_labels(photos):
    data = open_data(photos, [PIXELS], preprocessing=PREPROCESSING)
    assert data.samples == 4
    assert data.source == photos
    assert data.labels == ("cat", "cat", "dog", "dog")
    (first, second) = data.batches(3)
    assert first["pixels"].shape == (3, 3, 8, 8)
    assert first["pixels"].dtype == np.float32
    levels = np.concatenate([first["pixels"], second["pixels"]])[:, 0, 4, 4] * 0.25 + 0.5
    # c.webp, deep/a.JPG, a.gif, b.png; JPEG and WebP are lossy
    np.testing.assert_allclose(levels * 255, [80, 40, 120, 0], atol=3)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"])
def test_every_image_format_is_read(tmp_path, suffix):
    picture(tmp_path / f"one.{suffix}", 128)
    data = open_data(str(tmp_path), [PIXELS], preprocessing=PREPROCESSING)
    np.testing.assert_allclose(data.arrays()["pixels"], (128 / 255 - 0.5) / 0.25, atol=0.05)
    assert data.labels is None


def test_hidden_and_other_files_are_passed_over_and_half_labelled_is_unlabelled(tmp_path):
    picture(tmp_path / ".thumbnails" / "small.png", 1)
    picture(tmp_path / "cat" / "a.png", 1)
    picture(tmp_path / "b.png", 1)
    (tmp_path / "._c.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("about")
    data = open_data(str(tmp_path), [PIXELS], preprocessing=PREPROCESSING)
    assert data.samples == 2
    assert data.labels is None


def test_pictures_are_opened_only_as_batches_are_taken(tmp_path, monkeypatch):
    for number in range(200):
        picture(tmp_path / f"{number:03}.png", number)
    opened: list[str] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path.name), real(path))[1])

    batches = open_data(str(tmp_path), [PIXELS], preprocessing=PREPROCESSING).batches(16)
    assert opened == []
    next(batches)
    assert opened == [f"{number:03}.png" for number in range(16)]
    next(batches)
    assert len(opened) == 32


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_its_rows(tmp_path, save, order):
    ids = np.asarray(np.random.default_rng(0).integers(0, 99, (7, 5)), order=order)
    save(tmp_path / "text.npz", attention_mask=np.ones((7, 5), np.int64), input_ids=ids)
    data = open_data(str(tmp_path / "text.npz"), TEXT)
    assert data.samples == 7
    np.testing.assert_array_equal(joined(data, 3, "input_ids"), ids)
    assert [batch["attention_mask"].shape for batch in data.batches(3)] == [(3, 5), (3, 5), (1, 5)]


def test_an_axis_of_no_length_is_a_shape_like_any_other(tmp_path):
    past = np.zeros((3, 2, 0), np.float32)
    data = open_data(saved(tmp_path / "a.npz", x=past), [spec(np.float32, None, 2, None)])
    assert [batch["x"].shape for batch in data.batches(2)] == [(2, 2, 0), (1, 2, 0)]


def test_npy_gives_its_rows_to_the_only_input(rows):
    np.testing.assert_array_equal(joined(open_data(rows, [ONE]), 4), np.load(rows))


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_on_disk_are_read_batch_by_batch(tmp_path, kind):
    array = np.zeros((256, 64, 64), np.float32)
    source = tmp_path / f"big.{kind}"
    np.save(source, array) if kind == "npy" else np.savez(source, x=array)
    batch_bytes, total_bytes = array[:8].nbytes, array.nbytes
    tracemalloc.start()
    for _ in open_data(str(source), [spec(np.float32, None, 64, 64)]).batches(8):
        pass
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The batch, the one before it, and what checking for NaN takes: well under a tenth of the file.
    assert peak_bytes < 3 * batch_bytes < total_bytes / 10


def test_script_yields_batches_and_may_reuse_its_buffer(tmp_path):
    (tmp_path / "beside.py").write_text("STEP = 1.0\n")
    body = """
from beside import STEP
def load_data():
    buffer = np.zeros((2, 4), np.float32)
    for _ in range(3):
        buffer += STEP
        yield {"x": buffer}
"""
    before = list(sys.path)
    data = open_data(script(tmp_path, body), [ONE])
    assert sys.path == before
    np.testing.assert_array_equal(joined(data, 4)[:, 0], [1, 1, 2, 2, 3, 3])


def test_script_may_return_a_list_and_define_dataclasses(tmp_path):
    body = """
from dataclasses import dataclass
@dataclass
class Part:
    rows: "int"
def load_data():
    return [{"x": np.ones((Part(2).rows, 4), np.float32)}]
"""
    assert open_data(script(tmp_path, body), [ONE]).samples == 2


READER = """
import numpy as np
class Reader:
    def __init__(self):
        self.left = 3
    def get_next(self):
        self.left -= 1
        return {"x": np.full((1, 4), self.left, np.float32)} if self.left >= 0 else None
ready = Reader()
"""


@pytest.mark.parametrize("name", ["Reader", "ready"])
def test_calibration_data_reader_is_drained(tmp_path, monkeypatch, name):
    (tmp_path / f"readers_{name}.py").write_text(READER)
    monkeypatch.chdir(tmp_path)
    data = open_data(f"readers_{name}:{name}", [ONE])
    np.testing.assert_array_equal(joined(data, 8)[:, 0], [2, 1, 0])
    assert open_data(script(tmp_path, READER, "Reader"), [ONE]).samples == 3


def test_sequences_of_different_length_are_never_merged(tmp_path):
    body = """
def load_data():
    for rows, length in [(2, 5), (3, 5), (2, 7), (1, 5)]:
        ids = np.full((rows, length), length)
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}
"""
    data = open_data(script(tmp_path, body), TEXT)
    assert data.samples == 8
    shapes = [batch["input_ids"].shape for batch in data.batches(3)]
    assert shapes == [(3, 5), (2, 5), (2, 7), (1, 5)]
    assert [batch["input_ids"].shape for batch in data.take([5, 6]).batches(3)] == [(2, 7)]
    with pytest.raises(DataError, match="differ in shape and make no single array"):
        data.arrays()


def test_the_order_of_keys_does_not_split_a_batch(tmp_path):
    body = """
def load_data():
    ids = np.ones((1, 3), np.int64)
    yield {"input_ids": ids, "attention_mask": ids}
    yield {"attention_mask": ids, "input_ids": ids}
"""
    assert len(list(open_data(script(tmp_path, body), TEXT).batches(8))) == 1


def test_random_needs_leave_and_then_is_reproducible():
    inputs = [ONE, spec(np.int64, None, 3, name="ids")]
    message = refused("random", *inputs)
    assert "none of the correlations" in message
    assert "--allow-random" in message
    draw = [open_data("random", inputs, samples=9, seed=s, allow_random=True) for s in (1, 1, 2)]
    first, again, other = (joined(data, 4) for data in draw)
    assert first.shape == (9, 4)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert set(np.unique(joined(draw[0], 4, "ids"))) <= {0, 1}
    with pytest.raises(DataError, match="leaves some of its input 'input_ids' open"):
        open_data("random", TEXT, allow_random=True)
    sizes = {spec.name: (1, 7) for spec in TEXT}
    data = open_data("random", TEXT, samples=5, allow_random=True, sizes=sizes)
    assert {array.shape for array in data.arrays().values()} == {(5, 7)}


# Order, subsets, splits


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(batch_size=st.integers(1, 12), samples=st.integers(1, 10), seed=st.integers(0, 9))
def test_batches_are_the_same_rows_at_any_batch_size(rows, batch_size, samples, seed):
    data = open_data(rows, [ONE], samples=samples, seed=seed)
    together = joined(data, batch_size)
    np.testing.assert_array_equal(together, data.arrays()["x"])
    np.testing.assert_array_equal(together, joined(data, batch_size))
    assert len(together) == data.samples == samples
    assert np.all(np.diff(together[:, 0]) > 0)


@given(share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_split_shares_nothing_and_loses_nothing(rows, share, seed):
    data = open_data(rows, [ONE])
    parts = [part.arrays()["x"][:, 0] for part in data.split(share, seed)]
    assert all(np.all(np.diff(part) > 0) for part in parts)
    first, second = map(set, parts)
    assert first | second == set(data.arrays()["x"][:, 0])
    assert not first & second
    assert len(first) == min(max(round(10 * share), 1), 9)


@pytest.mark.parametrize(("samples", "share", "first"), [(10, 0.5, 4), (9, 0.9, 4), (8, 0.1, 4)])
def test_where_batches_are_of_one_size_the_first_part_fills_some(rows, samples, share, first):
    fixed = open_data(rows, [spec(np.float32, 4, 4, name="x")], samples=samples)
    parts = fixed.split(share, 0)
    assert [part.samples for part in parts] == [first, 8 - first]
    assert all(len(batch["x"]) == 4 for part in parts for batch in part.batches(1))
    with pytest.raises(DataError, match="takes at least 8 samples"):
        fixed.take(range(7)).split(share, 0)


def test_a_split_and_a_subset_follow_the_seed_and_keep_labels(photos, rows):
    data = open_data(photos, [PIXELS], preprocessing=PREPROCESSING)
    part, rest = data.split(0.5, 3)
    again, _ = data.split(0.5, 3)
    np.testing.assert_array_equal(part.indices, again.indices)
    assert sorted(part.labels + rest.labels) == ["cat", "cat", "dog", "dog"]
    assert data.take([3, 0]).labels == ("dog", "cat")
    subsets = {tuple(open_data(rows, [ONE], samples=5, seed=s).indices) for s in range(8)}
    assert len(subsets) > 1
    with pytest.raises(ValueError, match="read-only"):
        data.indices[0] = 1


@pytest.mark.parametrize(("share", "kept"), [(0.0, 10), (1.0, 10), (0.5, 1)])
def test_a_split_that_leaves_a_part_empty_is_refused(rows, share, kept):
    with pytest.raises(DataError, match=f"{kept} samples of .* cannot be split"):
        open_data(rows, [ONE], samples=kept).split(share, 0)


def test_a_stream_keeps_a_uniform_subset_and_no_more(tmp_path):
    body = """
def load_data():
    numbers = np.repeat(np.arange(40, dtype=np.float32)[:, None], 4, axis=1)
    yield from ({"x": batch} for batch in np.split(numbers, 10))
"""
    source = script(tmp_path, body)
    times = np.zeros(40)
    for seed in range(300):
        data = open_data(source, [ONE], samples=10, seed=seed)
        assert len(data.store) == data.samples == 10
        kept = data.arrays()["x"][:, 0].astype(int)
        assert np.all(np.diff(kept) > 0)
        times[kept] += 1
    deviation = np.sqrt(300 * 0.25 * 0.75)
    assert np.abs(times - 300 * 0.25).max() < 5 * deviation


def test_asking_for_more_than_there_is_warns(rows, caplog):
    assert open_data(rows, [ONE], samples=11).samples == 10
    assert "10 samples, not the 11 asked for" in caplog.text


# A fixed batch size


def test_a_fixed_batch_size_is_kept_and_the_rest_left_out(rows, caplog):
    data = open_data(rows, [spec(np.float32, 4, 4)])
    assert [batch["x"].shape for batch in data.batches(1)] == [(4, 4), (4, 4)]
    assert "2 of the 10" in caplog.text
    caplog.clear()
    assert len(list(open_data(rows, [spec(np.float32, 5, 4)]).batches(1))) == 2
    assert caplog.text == ""


@pytest.mark.parametrize("seed", range(4))
def test_batches_of_one_size_stay_together_where_lengths_differ(tmp_path, caplog, seed):
    body = """
def load_data():
    for length in (*range(1, 9), *range(1, 9)):
        yield {"x": np.full((3, length), length, np.float32)}
"""
    data = open_data(script(tmp_path, body), [spec(np.float32, 4, None)])
    assert (data.samples, data.filling().samples) == (48, 32)
    parts = [*held_apart(data, seed), drawn(data, 11, seed), *data.split(0.5, seed)]
    assert [part.samples for part in parts] == [4, 28, 8, 16, 16]
    assert "left out" not in caplog.text
    for part in parts:
        batches = [batch["x"] for batch in part.batches(1)]
        assert sum(map(len, batches)) == part.samples
        assert {len(batch) for batch in batches} == {4}
    assert not set(parts[0].indices.tolist()) & set(parts[1].indices.tolist())
    list(data.batches(1))
    assert "16 of the 48" in caplog.text


def test_a_fixed_batch_size_that_nothing_fills_is_refused(rows):
    with pytest.raises(DataError, match="exactly 11 samples, which the 10"):
        open_data(rows, [spec(np.float32, 11, 4)])
    data = open_data(rows, [spec(np.float32, 4, 4)])
    with pytest.raises(DataError, match="exactly 4 samples, which the 3"):
        data.take([0, 1, 2]).batches(4)


def test_inputs_without_a_common_batch_axis_are_refused(rows):
    assert "'scale' is a single number with no axis" in refused(
        rows, ONE, spec(np.float32, name="scale")
    )
    message = refused(rows, spec(np.float32, 2, 4), spec(np.float32, 1, 4, name="y"))
    assert "different fixed sizes ('x' has 2, 'y' has 1)" in message


# Dtypes and values


@pytest.mark.parametrize(
    ("given_as", "wanted"),
    [
        (np.int32, np.int64),
        (np.int64, np.int32),
        (np.int64, np.bool_),
        (np.bool_, np.int64),
        (np.uint8, np.int64),
        (np.float64, np.float32),
        (np.float64, np.float16),
        (np.float32, np.float16),
    ],
)
def test_safe_casts_keep_every_value(tmp_path, given_as, wanted):
    array = np.array([[0, 1], [1, 0]]).astype(given_as)
    data = open_data(saved(tmp_path / "a.npz", x=array), [spec(wanted, None, 2)])
    (batch,) = data.batches(2)
    assert batch["x"].dtype == wanted
    np.testing.assert_array_equal(batch["x"], array)


@pytest.mark.parametrize(
    ("given_as", "wanted", "reason"),
    [
        (np.float32, np.int64, "a cast would drop fractions"),
        (np.float32, np.bool_, "a cast would drop fractions"),
        (np.int64, np.float32, "convert them with .astype first"),
        (np.uint8, np.float32, "pixels must be scaled as they were in training"),
        (np.complex64, np.float32, "no safe cast"),
        ("U3", np.int64, "no safe cast"),
    ],
)
def test_other_casts_are_refused_with_the_reason(tmp_path, given_as, wanted, reason):
    array = np.ones((2, 2)).astype(given_as)
    message = refused(saved(tmp_path / "a.npz", x=array), spec(wanted, None, 2))
    assert f"gives 'x' as {array.dtype}, but the model expects {np.dtype(wanted)}" in message
    assert reason in message


@pytest.mark.parametrize(
    ("value", "given_as", "wanted", "limits"),
    [
        (2**40, np.int64, np.int32, "int32 only goes from -2147483648 to 2147483647"),
        (2, np.int64, np.bool_, "bool only goes from 0 to 1"),
        (-1, np.int64, np.uint64, "uint64 only goes from 0"),
        (2**63, np.uint64, np.int64, "int64 only goes"),
    ],
)
def test_whole_numbers_outside_the_dtype_are_refused(tmp_path, value, given_as, wanted, limits):
    array = np.zeros((6, 2), given_as)
    array[5, 1] = value
    message = refused(saved(tmp_path / "a.npz", x=array), spec(wanted, None, 2))
    assert "input 'x': sample 5 of" in message
    assert str(value) in message
    assert limits in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_place(tmp_path, value):
    array = np.zeros((6, 2, 3), np.float32)
    array[5, 1, 2] = value
    message = refused(saved(tmp_path / "a.npz", x=array), spec(np.float32, None, 2, 3))
    assert "input 'x': a value of sample 5 of" in message
    assert "at [1, 2] is not finite" in message


def test_a_number_too_large_for_float16_is_refused(tmp_path):
    source = saved(tmp_path / "a.npz", x=np.array([[1.0], [1e6]]))
    assert "sample 1 of" in refused(source, spec(np.float16, None, 1))
    assert "is too large for float16" in refused(source, spec(np.float16, None, 1))


def test_uint8_pixels_are_normalised_as_pictures_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), np.uint8)
    source = saved(tmp_path / "a.npz", pixels=pixels)
    data = open_data(source, [PIXELS], preprocessing=PREPROCESSING)
    expected = (pixels.astype(np.float32) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(joined(data, 2, "pixels"), expected, atol=1e-6)
    other = InputSpec("pixels", np.dtype(np.uint8), PIXELS.shape)
    raw = open_data(source, [other], preprocessing=PREPROCESSING)
    np.testing.assert_array_equal(raw.arrays()["pixels"], pixels)


# Names and shapes


def test_names_that_do_not_match_are_listed_with_the_closest(tmp_path):
    ids = np.ones((2, 3), np.int64)
    message = refused(saved(tmp_path / "a.npz", input_id=ids, extra=ids), *TEXT)
    assert "has the arrays 'extra', 'input_id'" in message
    assert "inputs are 'input_ids', 'attention_mask'" in message
    assert "missing: 'input_ids', 'attention_mask'; unknown: 'extra', 'input_id'" in message
    assert "'input_id' may be meant as 'input_ids'" in message


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((2, 3, 9, 8), "[n, 3, 9, 8]"),
        ((2, 8, 8), "[n, 8, 8]"),
        ((2, 3, 8, 8, 1), "[n, 3, 8, 8, 1]"),
    ],
)
def test_a_wrong_shape_is_refused_with_both(tmp_path, shape, found):
    source = saved(tmp_path / "a.npz", pixels=np.zeros(shape, np.float32))
    message = refused(source, PIXELS)
    assert f"gives 'pixels' the shape {found}, but the model expects [n, 3, 8, 8]" in message


def test_a_preprocessing_for_another_size_or_input_is_refused(photos):
    larger = InputSpec("pixels", np.dtype(np.float32), (None, 3, 16, 16))
    assert "shape [n, 3, 8, 8], but the model expects [n, 3, 16, 16]" in refused(
        photos, larger, preprocessing=PREPROCESSING
    )
    other = InputSpec("image", np.dtype(np.float32), (None, 3, 8, 8))
    message = refused(photos, other, preprocessing=PREPROCESSING)
    assert "for an input 'pixels', but the model's input is 'image'" in message


def test_arrays_with_different_numbers_of_samples_are_refused(tmp_path):
    source = saved(
        tmp_path / "a.npz",
        input_ids=np.ones((3, 2), np.int64),
        attention_mask=np.ones((2, 2), np.int64),
    )
    message = refused(source, *TEXT)
    assert "'input_ids' has 3" in message
    assert "'attention_mask' has 2" in message
    assert "is a single number" in refused(saved(tmp_path / "b.npz", x=np.float32(1)), ONE)


# Files that are not what they should be


def test_a_folder_without_preprocessing_shows_one_that_can_be_copied(photos, tmp_path):
    message = refused(photos, InputSpec("image", np.dtype(np.float32), (None, 3, 518, None)))
    assert "no <model>.preprocessing.json" in message
    example = message[message.index("{") :]
    (tmp_path / "m.preprocessing.json").write_text(example)
    assert json.loads(example)["input"] == "image"
    assert Preprocessing.beside(tmp_path / "m.onnx").size == (518, 224)
    assert "takes none" in refused(photos, spec(np.int64, None, None))


def test_a_missing_or_unknown_path_is_refused(tmp_path):
    assert "no data at" in refused(str(tmp_path / "nothing"), ONE)
    assert "no data at ''" in refused("", ONE)
    (tmp_path / "table.csv").write_text("1,2")
    message = refused(str(tmp_path / "table.csv"), ONE)
    assert "not of a kind that can be read; give a folder of images" in message


def test_empty_sources_are_refused(tmp_path):
    assert "no images in it" in refused(str(tmp_path), PIXELS, preprocessing=PREPROCESSING)
    empty = np.zeros((0, 4), np.float32)
    assert "has no samples" in refused(saved(tmp_path / "a.npz", x=empty), ONE)
    np.save(tmp_path / "a.npy", empty)
    assert "has no samples" in refused(str(tmp_path / "a.npy"), ONE)
    source = script(tmp_path, "def load_data():\n    return []\n")
    assert "without yielding a sample" in refused(source, ONE)
    assert "has no samples" in refused(saved(tmp_path / "b.npz"), ONE)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5])
def test_a_broken_picture_is_named(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"good.{suffix}")
    whole = (tmp_path / f"good.{suffix}").read_bytes()
    broken = tmp_path / "cat" / f"worse.{suffix}"
    broken.parent.mkdir()
    broken.write_bytes(whole[: int(kept * len(whole))])
    message = refused(str(tmp_path), PIXELS, preprocessing=PREPROCESSING)
    assert message.startswith(f"{broken} cannot be read as an image")


def test_arrays_of_python_objects_are_never_unpickled(tmp_path):
    ragged = np.array([[1], [2, 3]], dtype=object)
    np.save(tmp_path / "a.npy", ragged, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=ragged)
    assert "pickled Python objects" in refused(str(tmp_path / "a.npy"), ONE)
    assert "'x' in" in refused(str(tmp_path / "a.npz"), ONE)
    body = "def load_data():\n    yield {'x': np.array([[1], [2, 3]], dtype=object)}\n"
    assert "'x' is an object array" in refused(script(tmp_path, body), ONE)


def test_files_that_are_cut_short_or_no_arrays_are_refused(tmp_path, rows):
    whole = Path(rows).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-8])
    message = refused(str(tmp_path / "cut.npy"), ONE)
    assert f"cut short: it has {len(whole) - 8} of {len(whole)} bytes" in message
    np.savez_compressed(tmp_path / "good.npz", x=np.random.default_rng(0).random((99, 4)))
    spoilt = bytearray((tmp_path / "good.npz").read_bytes())
    spoilt[len(spoilt) // 2] ^= 255
    (tmp_path / "spoilt.npz").write_bytes(spoilt)
    assert "not a whole .npz archive" in refused(str(tmp_path / "spoilt.npz"), ONE)
    (tmp_path / "text.npy").write_text("not an array")
    assert "is not a NumPy array" in refused(str(tmp_path / "text.npy"), ONE)
    (tmp_path / "text.npz").write_text("not an archive")
    assert "not a whole .npz archive" in refused(str(tmp_path / "text.npz"), ONE)


def test_one_array_for_several_inputs_is_refused(rows, photos):
    assert "a .npy holds one input, but the model has 'input_ids', 'attention_mask'" in refused(
        rows, *TEXT
    )
    assert "a folder of images holds one input" in refused(photos, *TEXT)


def test_requests_for_nothing_are_refused(rows):
    with pytest.raises(DataError, match="at least one sample is needed, not 0"):
        open_data(rows, [ONE], samples=0)
    with pytest.raises(DataError, match="at least one sample, not 0"):
        open_data(rows, [ONE]).batches(0)


# The user's own code


def test_a_loader_that_is_not_there_is_refused(tmp_path):
    assert "does not exist" in refused(str(tmp_path / "no.py:load_data"), ONE)
    source = script(tmp_path, "def load():\n    return []\n")
    assert "no 'load_data' in it; callable there: load" in refused(source, ONE)
    assert "the module nowhere.at.all cannot be imported" in refused("nowhere.at.all:Reader", ONE)
    assert "imports something that is missing (No module named 'nowhere')" in refused(
        script(tmp_path, "import nowhere\n"), ONE
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("load_data = 3", "is a int, neither a function"),
        ("def load_data(path): ...", "cannot be called without arguments"),
        ("def load_data(): return {'x': np.ones((1, 4))}", "returned a dict; it must yield"),
        ("def load_data(): return 3", "returned a int; it must yield"),
        ("def load_data(): yield np.ones((1, 4))", "is a ndarray; it must be a dict"),
        ("def load_data(): yield {0: np.ones((1, 4))}", "must be a dict of input names"),
        ("def load_data(): yield {'x': [[1.0] * 4]}", "'x' is list, not a plain NumPy array"),
        ("def load_data(): yield {'x': np.float32(1)}", "'x' is float32, not a plain NumPy"),
        ("class load_data:\n    def get_next(self): return 3", "batch 0 of .* is a int"),
        ("def load_data(): yield {'x': np.ones((1, 5))}", r"shape \[n, 5\], but .* \[n, 4\]"),
        ("def load_data(): yield {'y': np.ones((1, 4))}", "unknown: 'y'"),
    ],
)
def test_a_loader_of_something_else_is_refused(tmp_path, body, reason):
    with pytest.raises(DataError, match=reason):
        open_data(script(tmp_path, body), [ONE])


def test_a_batch_that_does_not_fit_stops_the_loader_at_once(tmp_path):
    body = """
def load_data():
    yield {"y": np.ones((1, 4), np.float32)}
    raise AssertionError("went on")
"""
    assert "unknown: 'y'" in refused(script(tmp_path, body), ONE)


@pytest.mark.parametrize(
    "error", ["KeyError", "ImportError", "AttributeError", "FileNotFoundError"]
)
@pytest.mark.parametrize(
    "body",
    [
        "def load_data():\n    yield from ()\n    raise {}('mine')\n",
        "class load_data:\n    def get_next(self):\n        raise {}('mine')\n",
        "def load_data():\n    return raised()\ndef raised():\n    raise {}('mine')\n",
    ],
)
def test_errors_in_the_users_code_say_where_they_are(tmp_path, error, body):
    source = script(tmp_path, body.format(error))
    before = list(sys.path)
    lines = (tmp_path / "loader.py").read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines, 1) if "raise " in text]
    where = rf"raised {error}: '?mine'? \(loader\.py, line {line}\)"
    with pytest.raises(DataError, match=where) as caught:
        open_data(source, [ONE])
    assert type(caught.value.__cause__).__name__ == error
    assert sys.path == before


def test_an_error_inside_a_library_is_told_where_the_user_called_it(tmp_path):
    source = script(tmp_path, "import json\ndef load_data():\n    yield json.loads('x')\n")
    assert "raised JSONDecodeError: " in refused(source, ONE)
    assert "(loader.py, line 4)" in refused(source, ONE)


def test_an_error_while_a_script_is_read_says_where_it_is(tmp_path):
    source = script(tmp_path, "import math\nmath.sqrt(-1)\n")
    assert "raised ValueError: " in refused(source, ONE)
    assert "(loader.py, line 3)" in refused(source, ONE)


def test_what_a_loader_gave_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    body = "def load_data():\n    yield {'x': np.ones((5, 4), np.float32)}\n"
    open_data(script(tmp_path, body), [ONE], samples=2)
    assert "yielded 5 samples, 2 are kept" in caplog.text
