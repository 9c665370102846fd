"""Labels: one whole number per sample, matched to the samples that are used."""

from __future__ import annotations

import numpy as np
import pytest

from corp_onnx.data.dataset import open_data
from corp_onnx.data.labels import read_labels
from corp_onnx.errors import DataError
from corp_onnx.graph.inputs import InputSpec

INPUTS = (InputSpec("x", np.dtype(np.float32), (None, 4)),)
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.float32).reshape(10, 4))
    return str(tmp_path / "x.npy")


@pytest.fixture
def data(source):
    return open_data(source, INPUTS)


def text(path, content):
    path.write_text(content)
    return path


def npy(path, values):
    np.save(path, values)
    return path


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


FORMS = {
    "npy": lambda folder: npy(folder / "labels.npy", np.array(LABELS, np.uint8)),
    "npz": lambda folder: npz(folder / "labels.npz", label=np.array(LABELS), other=np.arange(3)),
    "text": lambda folder: text(folder / "labels.txt", "\n".join(map(str, LABELS)) + "\n"),
    "any suffix": lambda folder: text(folder / "labels", " ".join(map(str, LABELS))),
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_labels_are_read_in_the_order_of_the_samples(data, tmp_path, write):
    found = read_labels(write(tmp_path), data)
    assert found == LABELS
    assert all(type(label) is int for label in found)


def test_labels_follow_a_subset(source, tmp_path):
    data = open_data(source, INPUTS, samples=4, seed=3)
    found = read_labels(npy(tmp_path / "labels.npy", LABELS), data)
    assert found == [LABELS[index] for index in data.indices]
    assert found != LABELS[:4]


def test_labels_follow_what_was_kept_of_a_loader(tmp_path):
    """A loader's subset is drawn while it runs; its samples have other numbers in the store."""
    body = "import numpy as np\ndef load_data():\n    for i in range(10):\n"
    text(tmp_path / "loader.py", f"{body}        yield {{'x': np.full((1, 4), i, np.float32)}}\n")
    data = open_data(f"{tmp_path / 'loader.py'}:load_data", INPUTS, samples=4, seed=1)
    found = read_labels(npy(tmp_path / "labels.npy", LABELS), data)
    positions = data.arrays()["x"][:, 0].astype(int)
    assert positions.tolist() != [0, 1, 2, 3]
    assert data.places.tolist() == positions.tolist()
    assert found == [LABELS[position] for position in positions]


def test_labels_of_samples_that_are_not_used_may_be_there(data, tmp_path):
    assert read_labels(npy(tmp_path / "labels.npy", [*LABELS, 7]), data) == LABELS


def test_too_few_labels_are_refused_with_both_numbers(data, tmp_path):
    message = r"holds 9 labels, but .*x\.npy has at least 10 samples; give one label per sample"
    with pytest.raises(DataError, match=message):
        read_labels(npy(tmp_path / "labels.npy", LABELS[:9]), data)


REFUSED = {
    "no numbers": (lambda f: text(f / "a.txt", "cat\ndog"), "holds no labels.*'cat'"),
    "fractions": (lambda f: text(f / "a.txt", "1.5 2.5"), "holds no labels"),
    "bytes": (lambda f: (f / "a.txt").write_bytes(b"\x97\x00") and f / "a.txt", "holds no labels"),
    "floats": (lambda f: npy(f / "a.npy", np.ones(10)), r"float64 of shape \(10,\), not whole"),
    "a matrix": (lambda f: npy(f / "a.npy", np.ones((10, 1), int)), r"shape \(10, 1\), not whole"),
    "another key": (
        lambda f: npz(f / "a.npz", labels=np.arange(10)),
        "holds no labels.*'label' in",
    ),
    "a broken npz": (lambda f: text(f / "a.npz", "PK"), "holds no labels"),
    "an array as npz": (
        lambda f: npy(f / "a.npy", np.arange(10)).rename(f / "b.npz"),
        "holds no labels",
    ),
    "an empty npy": (lambda f: text(f / "a.npy", ""), "holds no labels"),
    "a pickle": (lambda f: npy(f / "a.npy", np.array([{}, 1], object)), "holds no labels"),
    "nothing": (lambda f: f / "none.npy", "none.npy do not exist"),
    "a folder": (lambda f: f, "do not exist"),
    "an empty file": (lambda f: text(f / "a.txt", ""), "holds 0 labels"),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_list_of_labels_is_refused(data, tmp_path, write, message):
    path = write(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read_labels(path, data)
    assert "\n" not in str(caught.value)
