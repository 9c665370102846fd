"""Crops of pictures: varied, reproducible, never of a held-out picture; and tokens thinned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import calibrate, gather
from corp_onnx.calibration.resume import Partial
from corp_onnx.calibration.sites import Thinning
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.crops import AREAS, STRETCH, random_box
from corp_onnx.data.dataset import Dataset, open_data
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.data.samples import enriched
from corp_onnx.errors import DataError, TooFewSamples
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.model import from_proto
from tests import numpy_block
from tests.builders import WIDTH, Net, residual_block
from tests.inputs import activations, dataset, sentences
from tests.oracles import two_pass
from tests.test_calibrate import BLOCK_ROUNDING, SAME, apart
from tests.test_resume import Interrupted, PowerCut
from tests.tolerances import distance

TOKENS = 7
RECIPE = Preprocessing("x", (TOKENS, WIDTH), 1, (0.5,), (0.25,), "bicubic", 0.9)
SPEC = InputSpec("x", np.dtype(np.float32), (None, 1, TOKENS, WIDTH))
PICTURES = 12


def folder_of(folder: Path, pictures: list[np.ndarray]) -> str:
    """Grey pictures in two subfolders."""
    for number, pixels in enumerate(pictures):
        path = folder / "ab"[number * 2 // len(pictures)] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(folder)


def opened(source: str) -> Dataset:
    return open_data(source, [SPEC], preprocessing=RECIPE)


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> str:
    """Pictures of noise, of different sizes."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (30 + 3 * i, 64 - 2 * i)) for i in range(PICTURES)]
    return folder_of(tmp_path_factory.mktemp("noise"), pictures)


@pytest.fixture(scope="module")
def plain_levels(tmp_path_factory) -> str:
    """Pictures of one grey each, which every crop of them shows."""
    pictures = [np.full((20, 30), 10 * i) for i in range(20)]
    return folder_of(tmp_path_factory.mktemp("levels"), pictures)


@pytest.fixture(scope="module")
def model():
    """Rows of the picture are tokens."""
    net = Net(0)
    pixels = net.input("x", "batch", 1, TOKENS, WIDTH)
    return from_proto(net.build(residual_block(net, net("Reshape", pixels, [0, TOKENS, WIDTH]))))


# Which crops


def test_a_crop_asked_for_is_cut_resized_mirrored_and_normalised():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    colour = replace(RECIPE, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), size=(12, 16))
    box = (10.0, 5.0, 50.0, 35.0)
    found = colour.apply_within(picture, box, mirrored=True)
    pixels = np.asarray(picture.resize((24, 16), Image.Resampling.BICUBIC))[2:14, 4:20]
    by_hand = ((pixels[:, ::-1] / 255 - colour.mean) / colour.std).transpose(2, 0, 1)
    one_level = 1.01 / 255 / min(colour.std)  # Pillow rounds to whole levels
    np.testing.assert_allclose(found, by_hand, atol=one_level, rtol=0)
    unmirrored = colour.apply_within(picture, box, mirrored=False)
    assert np.abs(unmirrored - by_hand).max() > 10 * one_level
    np.testing.assert_array_equal(unmirrored[:, :, ::-1], found)


@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    aspect=st.sampled_from([1.0, 0.7, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_random_box_lies_within_the_picture_and_keeps_the_aspect(size, aspect, seed):
    left, top, right, bottom = random_box(size, aspect, np.random.default_rng(seed))
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    rounding = 1 + 64 * np.finfo(np.float64).eps * max(size) / min(right - left, bottom - top)
    stretch = (right - left) / (bottom - top) / aspect
    assert 1 / STRETCH / rounding <= stretch <= STRETCH * rounding
    assert (right - left) * (bottom - top) <= AREAS[1] * size[0] * size[1] * rounding


def test_boxes_of_a_square_picture_have_the_areas_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box((1000, 1000), 1.0, rng) for _ in range(2000)])
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / 1e6
    assert AREAS[0] <= areas.min() < AREAS[0] + 0.02
    assert areas.max() > 0.95
    assert np.std(boxes[:, 0]) > 50


def test_pictures_of_one_pixel_have_crops_too(tmp_path):
    data = opened(folder_of(tmp_path, [np.full((1, 1), 255), np.full((1, 300), 255)]))
    np.testing.assert_array_equal(data.augmented(5, 0).arrays()["x"], np.float32(2))


def test_about_half_of_the_crops_are_mirrored(tmp_path):
    ramp = np.tile(np.arange(0, 250, 2), (125, 1))
    crops = opened(folder_of(tmp_path, [ramp, ramp])).augmented(100, 3).arrays()["x"][2:]
    mirrored = int((crops[:, 0, :, 0] > crops[:, 0, :, -1]).all(axis=1).sum())
    assert 69 <= mirrored <= 129  # 99 of 198 expected, the standard deviation is 7


# The augmented data set


def assert_variants(augmented: np.ndarray, plain: np.ndarray, crops: int) -> None:
    """All pictures once as they are, then again and again as crops unlike each other."""
    variants = augmented.reshape(crops, *plain.shape)
    np.testing.assert_array_equal(variants[0], plain)
    for picture in range(len(plain)):
        for one in range(crops):
            for other in range(one):
                assert (variants[one, picture] != variants[other, picture]).any()


def test_all_pictures_come_plain_and_then_again_as_crops(noise):
    data = opened(noise)
    augmented = data.augmented(3, 0)
    assert augmented.samples == 3 * PICTURES
    assert (augmented.crops, data.crops) == (3, 1)
    assert_variants(augmented.arrays()["x"], data.arrays()["x"], 3)


@pytest.mark.parametrize("wrong", ["all alike", "picture by picture", "none plain", "crops alike"])
def test_wrong_twins_of_variants_are_noticed(noise, wrong):
    plain = opened(noise).arrays()["x"]
    right = opened(noise).augmented(3, 0).arrays()["x"]
    crops = right[PICTURES : 2 * PICTURES]
    twin = {
        "all alike": np.concatenate([plain] * 3),
        "picture by picture": right.reshape(3, *plain.shape).swapaxes(0, 1).reshape(right.shape),
        "none plain": right[::-1],
        "crops alike": np.concatenate([plain, crops, crops]),
    }[wrong]
    with pytest.raises(AssertionError):
        assert_variants(twin, plain, 3)


def test_a_crop_depends_on_seed_picture_and_variant_alone(noise):
    data = opened(noise)
    whole = data.augmented(4, 5).arrays()["x"].reshape(4, PICTURES, 1, TOKENS, WIDTH)
    shards = [data.take(range(start, PICTURES, 2)) for start in (0, 1)]
    for start, shard in enumerate(shards):
        ours = shard.augmented(4, 5)
        assert ours.samples == 4 * PICTURES // 2
        read = np.concatenate([batch["x"] for batch in ours.batches(5)])
        np.testing.assert_array_equal(read, whole[:, start::2].reshape(read.shape))
    fewer = data.augmented(2, 5).arrays()["x"]
    np.testing.assert_array_equal(fewer, whole[:2].reshape(fewer.shape))
    other = data.augmented(4, 6).arrays()["x"].reshape(whole.shape)
    np.testing.assert_array_equal(other[0], whole[0])
    assert (other[1:] != whole[1:]).any(axis=(2, 3, 4)).all()


def test_what_a_data_set_can_do_its_crops_can(noise):
    data = opened(noise).take([3, 1, 8])
    augmented = data.augmented(2, 0)
    assert augmented.labels == ("a", "a", "b") * 2
    np.testing.assert_array_equal(augmented.places, [3, 1, 8] * 2)
    values = augmented.arrays()["x"]
    np.testing.assert_array_equal(augmented.take([5, 0]).arrays()["x"], values[[5, 0]])
    first, second = augmented.split(0.5, 0)
    assert sorted([*first.indices, *second.indices]) == sorted(augmented.indices)
    assert [len(batch["x"]) for batch in augmented.batches(4)] == [4, 2]
    assert augmented.augmented(3, 0) is augmented


def test_a_broken_picture_is_named_in_its_crops(tmp_path):
    source = folder_of(tmp_path, [np.zeros((9, 9))] * 2)
    (tmp_path / "a" / "00.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"00\.png cannot be read as an image"):
        opened(source).augmented(2, 0).take([2]).arrays()


def test_what_is_no_picture_stays_as_it_is(tmp_path, noise):
    np.savez(tmp_path / "rows.npz", x=np.zeros((4, 1, TOKENS, WIDTH), np.uint8))
    data = opened(str(tmp_path / "rows.npz"))
    assert data.augmented(3, 0) is data
    assert opened(noise).augmented(1, 0).crops == 1
    with pytest.raises(DataError, match="at least one crop of every picture is needed, not 0"):
        opened(noise).augmented(0, 0)


# Held-out pictures


def levels(batches) -> set[int]:
    """The greys that some batches show."""
    pixels = np.concatenate([batch["x"] for batch in batches])[:, 0, 0, 0]
    return set(np.round((pixels * 0.25 + 0.5) * 255).astype(int).tolist())


def assert_apart(held_out: set[int], seen: set[int]) -> None:
    assert not held_out & seen
    assert len(held_out | seen) == 20


def test_no_crop_of_a_held_out_picture_is_calibrated_on(model, plain_levels):
    found = calibrate(model, find_blocks(model), opened(plain_levels).take(range(20)), crops=2)
    assert sum(len(batch["x"]) for batch in found.held_out) == 4
    assert (found.samples, found.crops) == (32, 2)
    assert_apart(levels(found.held_out), levels(found.seen))


def test_what_fills_a_set_up_a_little_thins_its_tokens_a_little(model, plain_levels, monkeypatch):
    """As many tokens count as without crops, not half as many."""
    monkeypatch.setitem(enriched.__globals__, "FILLED", 20)
    data, catalog = opened(plain_levels).take(range(20)), find_blocks(model)
    found, plain = (calibrate(model, catalog, data, crops=crops) for crops in (None, 1))
    assert (found.samples, plain.samples) == (20, 16)
    assert found.crops == 20 / 16
    for name, moments in found.sites.items():
        assert abs(moments.count / plain.sites[name].count - 1) <= 0.05


def test_a_split_after_cropping_is_noticed(plain_levels):
    """The wrong twin: crops of held-out pictures leak."""
    held_out, used = opened(plain_levels).augmented(2, 0).split(0.2, 0)
    with pytest.raises(AssertionError):
        assert_apart(levels(held_out.batches(8)), levels(used.batches(8)))


def test_held_out_pictures_are_plain(model, noise):
    plain = opened(noise).arrays()["x"]
    found = calibrate(model, find_blocks(model), opened(noise), crops=3)
    held_out = np.concatenate([batch["x"] for batch in found.held_out])
    assert all((picture == plain).all(axis=(1, 2, 3)).any() for picture in held_out)
    cropped = np.concatenate([batch["x"] for batch in found.seen])
    assert not all((picture == plain).all(axis=(1, 2, 3)).any() for picture in cropped)


# Tokens


@pytest.fixture(scope="module")
def block():
    weights = numpy_block.draw(np.random.default_rng(3))
    model, x = numpy_block.as_model(weights), activations(12, 5)
    return model, find_blocks(model), x, numpy_block.forward(weights, x)


def assert_thinned(statistics: Statistics, truth, rows: np.ndarray) -> None:
    """Only these tokens count, the same for query and key."""
    assert {moments.count for moments in statistics.sites.values()} == {len(rows)}
    assert statistics.tokens == {"attention.0": len(rows)}
    mean, scatter = two_pass(truth["hidden"][rows])
    hidden = statistics.sites["mlp.0.hidden"]
    assert distance(hidden.mean, mean) <= BLOCK_ROUNDING
    assert distance(hidden.scatter, scatter) <= BLOCK_ROUNDING
    energy = (truth["query"][rows] ** 2 * truth["key"][rows] ** 2).mean(axis=0)
    assert distance(statistics.energies["attention.0"], energy) <= BLOCK_ROUNDING


def rows_that_count(crops: int, sizes: list[int], seed: int) -> np.ndarray:
    """Of batches of so many samples of 5 tokens: every ``crops``-th, from a start of its own."""
    starts = np.cumsum([0, *sizes[:-1]])
    offsets = [int(crops * np.random.default_rng((seed, at)).random()) for at in starts]
    numbers = [
        5 * at + np.arange(offset, 5 * size, crops)
        for at, size, offset in zip(starts, sizes, offsets, strict=True)
    ]
    return np.concatenate(numbers)


@pytest.mark.parametrize(("crops", "seed"), [(2, 0), (3, 4), (7, 1)])
def test_of_every_batch_one_in_so_many_tokens_counts(block, crops, seed):
    model, catalog, x, truth = block
    batches = [{"x": x[:5]}, {"x": x[5:9]}, {"x": x[9:]}]
    statistics = gather(model, catalog, batches, crops=crops, seed=seed)
    assert statistics.samples == 12
    assert_thinned(statistics, truth, rows_that_count(crops, [5, 4, 3], seed))


@pytest.mark.parametrize("wrong", ["shifted", "first only", "keys of other tokens"])
def test_wrong_twins_of_thinning_are_noticed(block, wrong):
    model, catalog, x, truth = block
    statistics = gather(model, catalog, [{"x": x}], crops=2, seed=0)
    rows = rows_that_count(2, [12], 0)
    assert_thinned(statistics, truth, rows)
    if wrong == "keys of other tokens":
        truth = truth | {"key": np.roll(truth["key"], 1, axis=0)}
    else:
        rows = {"shifted": rows ^ 1, "first only": np.arange(30)}[wrong]
    with pytest.raises(AssertionError):
        assert_thinned(statistics, truth, rows)


def test_starts_differ_from_batch_to_batch_and_from_seed_to_seed():
    starts = [[Thinning.drawn(4, seed, at).first for at in range(0, 320, 8)] for seed in (0, 1)]
    assert set(starts[0]) == set(starts[1]) == {0, 1, 2, 3}
    assert starts[0] != starts[1]


def test_a_batch_of_few_tokens_still_counts():
    assert Thinning(8, 5).of(np.arange(3)).tolist() == [2]
    assert Thinning(8, 5).of(np.arange(0)).tolist() == []
    assert Thinning(8, 5).of(np.arange(20)).tolist() == [5, 13]


def test_padding_goes_before_tokens_are_thinned(tiny, rng):
    model = tiny("text_encoder")
    batch = sentences(rng, samples=30, length=9)
    seen = int(batch["seen"].sum())
    assert seen % 3 == 0
    statistics = gather(model, find_blocks(model), [batch], crops=3, seed=0)
    assert {moments.count for moments in statistics.sites.values()} == {seen // 3}


def test_the_work_does_not_grow_with_the_crops(model, noise):
    used, hidden = opened(noise), "mlp.0.hidden"
    one, *more = (
        gather(model, find_blocks(model), used.augmented(n, 0).batches(4), crops=n)
        for n in (1, 2, 5)
    )
    for statistics in more:
        for name, moments in statistics.sites.items():
            batches = statistics.samples / 4
            assert abs(moments.count - one.sites[name].count) <= batches  # each rounds by one
        assert distance(statistics.sites[hidden].mean, one.sites[hidden].mean) > SAME


def test_data_that_are_no_pictures_are_not_thinned(tiny):
    model = tiny("mlp")
    data = dataset(model, x=activations(40))
    found, plain = (calibrate(model, find_blocks(model), data, crops=n) for n in (3, 1))
    assert (found.crops, found.samples) == (1, 32)
    assert apart(found, plain) == 0


def test_too_few_pictures_are_counted_as_pictures(model, noise):
    data = opened(noise).take(range(2))
    with pytest.raises(TooFewSamples) as one:
        calibrate(model, find_blocks(model), data)
    with pytest.raises(TooFewSamples) as three:
        calibrate(model, find_blocks(model), data, crops=3)
    assert str(one.value).startswith("1 samples give 7 tokens")
    wanted = [str(error.value).split("give at least")[1] for error in (one, three)]
    assert wanted[0] == wanted[1]
    assert str(three.value).startswith("1 samples give")


# Files, resuming, the command line


def test_going_on_gives_the_same_crops_and_tokens(model, noise, tmp_path):
    def run(partial=None, on_batch=lambda samples: None):
        return calibrate(
            *(model, find_blocks(model), opened(noise)),
            batch_size=4,
            crops=3,
            partial=partial,
            on_batch=on_batch,
        )

    partial = Partial(tmp_path / "statistics.npz.partial", "these data", seconds=0.0)
    with pytest.raises(Interrupted):
        run(partial, PowerCut(16))
    assert 0 < Statistics.load(partial.path).samples < 16
    resumed, whole = run(partial), run()
    assert apart(resumed, whole) <= SAME
    assert resumed.crops == whole.crops == 3


def test_crops_are_kept_in_the_file_and_older_files_have_one(model, noise, tmp_path):
    path = tmp_path / "statistics.npz"
    found = calibrate(model, find_blocks(model), opened(noise), crops=2)
    found.save(path)
    assert Statistics.load(path).crops == 2
    assert (found + replace(found, crops=1)).crops == 2
    with np.load(path) as stored:
        arrays = dict(stored)
    about = json.loads(arrays["about"].tobytes())
    del about["crops"]
    np.savez(path, **arrays | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)})
    assert Statistics.load(path).crops == 1


@pytest.fixture
def on_disk(model, tmp_path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(model.proto(), path)
    RECIPE.save_beside(path)
    return path


def test_calibrate_fills_few_pictures_up_unless_told_otherwise(command, on_disk, noise, tmp_path):
    arguments = ("calibrate", on_disk, "--data", noise, "-o", tmp_path / "s.npz", "--json")
    usual, plain = (json.loads(command(*arguments, *more).stdout) for more in ((), ("--crops", 1)))
    assert (usual["crops"], usual["samples"], usual["held_out"]) == (4, 40, 2)
    assert (plain["crops"], plain["samples"], plain["held_out"]) == (1, 10, 2)
    refused = command(*arguments, "--crops", 0)
    assert refused.status == 2
    assert "--crops" in refused.stderr
    told = command(*arguments[:-1], "--crops", 3)
    assert "30 samples of" in told.stdout
    assert "3 crops of every picture" in " ".join(told.stdout.split())


def test_prune_tells_its_crops_and_those_of_its_statistics(command, on_disk, noise, tmp_path):
    statistics, cut = tmp_path / "s.npz", ("--mlp", 0.25, "--align", 1, "--json")
    command("calibrate", on_disk, "--data", noise, "-o", statistics, "--crops", 3)
    out = ("prune", on_disk, "-o", tmp_path / "small.onnx", *cut)
    crops = [
        json.loads(command(*out, *more).stdout)["crops"]
        for more in (("--data", noise), ("--data", noise, "--crops", 1), ("--stats", statistics))
    ]
    assert crops == [4, 1, 3]


def test_a_partial_of_another_number_of_crops_is_refused(command, on_disk, noise, tmp_path):
    output, left = tmp_path / "s.npz", tmp_path / "s.npz.partial"
    arguments = ("calibrate", on_disk, "--data", noise, "-o", output, "--resume")
    assert command(*arguments[:-1]).status == 0
    request = f"--data {noise} --samples None --seed 0 --crops 2 --shard 0/1"
    replace(Statistics.load(output), source=request).save(left)
    refused = command(*arguments, "--crops", 3)
    assert refused.status == 2
    assert "--crops 2 --shard 0/1, not with" in refused.message
    assert command(*arguments, "--crops", 2).status == 0
    assert not left.exists()


def test_shards_of_crops_add_up_to_all_crops(model, noise):
    data, catalog = opened(noise), find_blocks(model)
    parts = [data.take(range(at, PICTURES, 2)).augmented(3, 0) for at in (0, 1)]
    one, other = (gather(model, catalog, part.batches(6)) for part in parts)
    whole = gather(model, catalog, data.augmented(3, 0).batches(6))
    assert apart(one + other, whole) <= SAME
    changed = gather(model, catalog, data.augmented(3, 1).batches(6))
    assert apart(changed, whole) > SAME
