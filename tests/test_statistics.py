"""Statistics: what is saved is what is loaded, and parts add up to the whole."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import calibrate, gather
from corp_onnx.calibration.statistics import FORMAT, Statistics, merged
from corp_onnx.errors import DataError, OutputError
from corp_onnx.plan import uniform
from corp_onnx.solve import Recipe, solve
from tests.inputs import activations, dataset
from tests.tolerances import distance

SAME = 1e-6


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("transformer")


@pytest.fixture(scope="module")
def statistics(model):
    return calibrate(model, find_blocks(model), dataset(model, x=activations()))


@pytest.fixture
def saved(statistics, tmp_path):
    path = tmp_path / "statistics.npz"
    statistics.save(path)
    return path


def assert_equal(actual, expected):
    """Every array bit for bit, and everything else by value."""
    for name in ("tokens", "samples", "source", "sha256"):
        assert getattr(actual, name) == getattr(expected, name)
    assert actual.sites.keys() == expected.sites.keys()
    assert actual.energies.keys() == expected.energies.keys()
    for name, moments in expected.sites.items():
        found = actual.sites[name]
        assert found.count == moments.count
        assert np.array_equal(found.mean, moments.mean)
        assert np.array_equal(found.scatter, moments.scatter)
    for name, energy in expected.energies.items():
        assert np.array_equal(actual.energies[name], energy)
    for role in ("seen", "held_out"):
        before, after = getattr(expected, role), getattr(actual, role)
        assert len(before) == len(after)
        for batch, loaded in zip(before, after, strict=True):
            assert batch.keys() == loaded.keys()
            for name, array in batch.items():
                assert loaded[name].dtype == array.dtype
                assert np.array_equal(loaded[name], array)


# Files


def test_what_is_saved_is_loaded(statistics, saved):
    assert_equal(Statistics.load(saved), statistics)


def test_more_than_ten_batches_keep_their_order(statistics, tmp_path):
    batches = tuple({"x": np.full((1, 2), number, np.float32)} for number in range(12))
    many = replace(statistics, held_out=batches)
    many.save(tmp_path / "many.npz")
    assert_equal(Statistics.load(tmp_path / "many.npz"), many)


def test_input_names_may_hold_slashes_and_dots(statistics, tmp_path):
    odd = replace(statistics, held_out=({"a/b.npy": np.arange(3), "file": np.arange(2)},))
    odd.save(tmp_path / "odd.npz")
    assert_equal(Statistics.load(tmp_path / "odd.npz"), odd)


def test_any_file_name_will_do(statistics, tmp_path):
    statistics.save(tmp_path / "statistics.of.model")
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.of.model"]
    assert_equal(Statistics.load(tmp_path / "statistics.of.model"), statistics)


def test_loaded_moments_are_read_only(saved):
    moments = Statistics.load(saved).sites["mlp.0.hidden"]
    with pytest.raises(ValueError, match="read-only"):
        moments.scatter[0, 0] = 1


def test_a_symmetric_matrix_is_stored_once(statistics, saved):
    full = sum(moments.scatter.size for moments in statistics.sites.values())
    with zipfile.ZipFile(saved) as archive:
        names = [name for name in archive.namelist() if name.startswith("scatter/")]
        stored = sum(np.load(archive.open(name)).size for name in names)
    assert stored < 0.6 * full


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere/statistics.npz", "nowhere does not exist"),
        (".", "it is a folder"),
        ("/proc/statistics.npz", "takes no files"),
    ],
)
def test_statistics_that_cannot_be_written_are_an_error(statistics, tmp_path, target, message):
    with pytest.raises(OutputError, match=message):
        statistics.save(tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_as_it_was(statistics, saved, monkeypatch):
    before = saved.read_bytes()

    def full(stream, **arrays):
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match="No space left on device"):
        statistics.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def rewritten(path, **changes):
    """A copy of an archive with entries replaced; None takes one away."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for name, value in changes.items():
        arrays.pop(name)
        if value is not None:
            arrays[name] = value
    np.savez(path, **arrays)


def about(path):
    with np.load(path) as stored:
        return json.loads(stored["about"].tobytes())


def encoded(document):
    return np.frombuffer(json.dumps(document).encode(), np.uint8)


SPOILERS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an archive"),
    "foreign archive": lambda path: np.savez(path, x=np.arange(3)),
    "archive of files": lambda path: zipped(path, "notes.txt", b"about"),
    "pickled": lambda path: np.savez(path, about=np.array([{}], object), allow_pickle=True),
    "one array": lambda path: array_file(path),
    "no scatter": lambda path: rewritten(path, **{"scatter/mlp.0.hidden": None}),
    "scatter of another size": lambda path: rewritten(path, **{"scatter/mlp.0.hidden": np.ones(3)}),
    "no energy": lambda path: rewritten(path, **{"energy/attention.0": None}),
    "about is a list": lambda path: rewritten(path, about=encoded([1, 2])),
    "about is no JSON": lambda path: rewritten(path, about=np.arange(3, dtype=np.uint8)),
    "about says too little": lambda path: rewritten(path, about=encoded({"format": FORMAT})),
}


def array_file(path):
    with path.open("wb") as stream:
        np.save(stream, np.arange(3))


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def zipped(path, name, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_file_that_holds_something_else_is_refused(saved, spoil):
    spoil(saved)
    with pytest.raises(DataError, match="holds no calibration statistics") as caught:
        Statistics.load(saved)
    assert str(saved) in str(caught.value)
    assert "corp-onnx calibrate" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; make it with `corp-onnx calibrate`"):
        Statistics.load(tmp_path / "none.npz")


def test_another_format_is_refused_by_number(saved):
    rewritten(saved, about=encoded(about(saved) | {"format": 99}))
    with pytest.raises(DataError, match="was written in format 99, this version reads 2"):
        Statistics.load(saved)


# Sums


@pytest.fixture(scope="module")
def shards(model):
    x, catalog = activations(24), find_blocks(model)
    parts = [gather(model, catalog, [{"x": x[index::3]}], source="s") for index in range(3)]
    return parts, gather(model, catalog, [{"x": x}], source="s")


def test_merged_shards_are_one_run(shards, tmp_path):
    parts, whole = shards
    for index, part in enumerate(parts):
        part.save(tmp_path / f"{index}.npz")
    found = merged(Statistics.load(tmp_path / f"{index}.npz") for index in range(3))
    assert (found.samples, found.source, found.tokens) == (24, "s", whole.tokens)
    for name, moments in whole.sites.items():
        assert found.sites[name].count == moments.count
        assert distance(found.sites[name].mean, moments.mean) <= SAME
        assert distance(found.sites[name].scatter, moments.scatter) <= SAME
    for name, energy in whole.energies.items():
        assert distance(found.energies[name], energy) <= SAME


def test_merged_shards_verify_with_samples_of_all(shards):
    parts, _ = shards
    held = [tuple({"x": np.array([[part, at]])} for at in range(4)) for part in range(3)]
    given = [
        replace(part, held_out=own, seen=own[:2]) for part, own in zip(parts, held, strict=True)
    ]
    found = merged(given)
    assert [batch["x"].tolist() for batch in found.held_out] == [
        *([[part, 0]] for part in range(3)),
        [[0, 1]],
    ]
    assert [batch["x"].tolist() for batch in found.seen] == [[[0, 0]], [[1, 0]]]


def test_a_shard_that_is_given_twice_is_refused(shards):
    (first, second, _), _ = shards
    with pytest.raises(DataError, match="statistics of s are given twice"):
        merged([first, second, first])


def test_shards_of_different_size_weigh_by_their_tokens(model):
    x, catalog = activations(24), find_blocks(model)
    small, large = (gather(model, catalog, [{"x": part}]) for part in (x[:3], x[3:]))
    whole = gather(model, catalog, [{"x": x}])
    for found in (small + large, large + small):
        for name, energy in whole.energies.items():
            assert distance(found.energies[name], energy) <= SAME
    unweighted = (small.energies["attention.0"] + large.energies["attention.0"]) / 2
    assert distance(unweighted, whole.energies["attention.0"]) > 1e-3


def test_a_sum_names_every_source_and_keeps_the_first_batches(shards):
    (first, second, _), _ = shards
    batch = {"x": np.zeros((1, 2, 10))}
    other = replace(second, source="t", seen=(batch,), held_out=(batch,))
    assert (first + other).source == "s, t"
    assert (first + other).held_out == (batch,)
    assert (other + replace(first, held_out=({"x": np.ones(1)},))).held_out == (batch,)


def test_statistics_of_different_models_cannot_be_added(tiny, shards):
    (first, *_), _ = shards
    other = tiny("mlp")
    found = gather(other, find_blocks(other), [{"x": activations(3)}], source="other")
    with pytest.raises(DataError, match="s and other were taken of different models"):
        first + found


# Use


def test_statistics_of_another_model_are_refused(tiny, statistics):
    other = tiny("mlp")
    catalog = find_blocks(other)
    plan = uniform(catalog, {"mlp": 0.5}, align=1)
    with pytest.raises(DataError, match=r"\(memory\) were taken of another model"):
        solve(other, catalog, plan, statistics, Recipe("corp"))


def test_statistics_without_a_site_are_refused(model, statistics):
    catalog = find_blocks(model)
    plan = uniform(catalog, {"mlp": 0.5}, align=1)
    sites = {name: site for name, site in statistics.sites.items() if name != "mlp.1.hidden"}
    with pytest.raises(DataError, match=r"hold nothing of mlp\.1\.hidden; calibrate again"):
        solve(model, catalog, plan, replace(statistics, sites=sites), Recipe("corp"))
