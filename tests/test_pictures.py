"""Folders shaped like ImageNet: classes, even draws, no picture on both sides."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.pictures import Picture, Pictures, apart, drawn, linked, open_pictures
from corp_onnx.errors import DataError

WNIDS = ("n03", "n01", "n02")
"""As they are made; the sorted order is another."""


def fill(folder: Path, wnid: str, count: int, part: str = "train") -> None:
    """Files that are pictures by name, each with other bytes."""
    for number in range(count):
        write(folder / part / wnid / f"{wnid}_{part}_{number}.JPEG", f"{part} {wnid} {number:03}")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def folder(tmp_path):
    for wnid in WNIDS:
        fill(tmp_path, wnid, 6)
        fill(tmp_path, wnid, 2, "val")
    return tmp_path


@pytest.fixture
def flat(tmp_path):
    """The same with a ``val`` that is not sorted into classes."""
    for wnid in WNIDS:
        fill(tmp_path, wnid, 6)
    for number in range(4):
        write(tmp_path / "val" / f"v{number}.JPEG", f"val {number}")
    return tmp_path


def shown(pictures):
    """How many pictures there are of each class."""
    return Counter(picture.wnid for picture in pictures)


def names(pictures):
    return [picture.path.name for picture in pictures]


def test_classes_are_counted_in_sorted_order(folder):
    pictures = open_pictures(folder)
    assert pictures.classes == ("n01", "n02", "n03")
    assert (pictures.train.count, pictures.val.count) == (18, 6)
    assert all(picture.path.parent.name == picture.wnid for picture in all_of(pictures))


def all_of(pictures: Pictures) -> tuple[Picture, ...]:
    return drawn(pictures.train, 18, 0) + drawn(pictures.val, 6, 0)


def test_a_class_of_val_alone_counts_too(folder):
    fill(folder, "n00", 1, "val")
    assert open_pictures(folder).classes == ("n00", "n01", "n02", "n03")


def test_hidden_files_other_files_and_empty_folders_are_passed_over(folder):
    write(folder / "train" / "n01" / ".hidden.JPEG", "")
    write(folder / "train" / "n01" / "notes.txt", "")
    write(folder / "train" / ".cache" / "x.JPEG", "")
    (folder / "train" / "n09").mkdir()
    pictures = open_pictures(folder)
    assert (pictures.classes, pictures.train.count) == (("n01", "n02", "n03"), 18)


@pytest.mark.parametrize("count", range(1, 19))
def test_a_draw_is_even_over_the_classes(folder, count):
    pictures = drawn(open_pictures(folder).train, count, seed=1)
    found = shown(pictures)
    assert len(set(pictures)) == count
    assert max(found.values()) - min(found.get(wnid, 0) for wnid in WNIDS) <= 1


def test_a_small_class_gives_all_it_has(folder):
    fill(folder, "n00", 1)
    assert shown(drawn(open_pictures(folder).train, 13, seed=0)) == {
        "n00": 1, "n01": 4, "n02": 4, "n03": 4
    }  # fmt: skip


def test_a_seed_decides_a_draw(folder):
    train = open_pictures(folder).train
    assert drawn(train, 7, seed=3) == drawn(train, 7, seed=3)
    assert len({drawn(train, 7, seed=seed) for seed in range(5)}) == 5


def test_classes_of_a_remainder_differ_by_seed(folder):
    train = open_pictures(folder).train
    assert {frozenset(shown(drawn(train, 1, seed))) for seed in range(20)} == {
        frozenset([wnid]) for wnid in WNIDS
    }


def test_all_are_taken_where_there_are_not_so_many(folder, caplog):
    assert len(drawn(open_pictures(folder).train, 100, seed=0)) == 18
    assert "has 18 pictures, not the 100 asked for" in caplog.text


def test_copies_of_test_pictures_are_left_out(folder):
    copied = next((folder / "val" / "n02").iterdir())
    write(folder / "train" / "n01" / "copy.JPEG", copied.read_text())
    pictures = open_pictures(folder)
    calibration, test = drawn(pictures.train, 19, 0), drawn(pictures.val, 6, 0)
    assert "copy.JPEG" in names(calibration)
    assert set(names(calibration)) - set(names(apart(calibration, test))) == {"copy.JPEG"}


def test_pictures_of_equal_size_are_not_taken_for_copies(folder):
    pictures = open_pictures(folder)
    calibration, test = drawn(pictures.train, 18, 0), drawn(pictures.val, 6, 0)
    write(calibration[0].path, "val n01 xyz")  # as long as those of val
    assert apart(calibration, test) == calibration


def test_nothing_to_calibrate_on_but_test_pictures_is_an_error(folder):
    test = drawn(open_pictures(folder).val, 6, 0)
    with pytest.raises(DataError, match="in the test set as well"):
        apart(test, test)


def test_links_are_sorted_by_class(folder, tmp_path):
    pictures = drawn(open_pictures(folder).val, 6, 0)
    linked(pictures, tmp_path / "links")
    found = {
        path.resolve(): path.parent.name
        for path in (tmp_path / "links").rglob("*")
        if path.is_file()
    }
    assert found == {picture.path.resolve(): picture.wnid for picture in pictures}


@dataclass(frozen=True)
class Form:
    """A way of writing labels."""

    file: str
    text: str


LABELLED = {
    "wnids": Form("val.txt", "v0.JPEG n03\nv1.JPEG n01\nv2.JPEG n03\nv3.JPEG n02\n"),
    "numbers": Form("val.txt", "v0.JPEG 2\nv1.JPEG 0\nv2.JPEG 2\nv3.JPEG 1\n"),
    "in any order": Form("val.txt", "v3 n02\nv2 n03\n\nv1 n01\nv0 n03\n"),
    "kaggle": Form(
        "LOC_val_solution.csv",
        "ImageId,PredictionString\nv0,n03 1 2 3 4 \nv1,n01 1 2 3 4 n01 5 6 7 8\n"
        "v2,n03 1 1 2 2\nv3,n02 1 1 2 2\n",
    ),
}


@pytest.mark.parametrize("form", LABELLED.values(), ids=list(LABELLED))
def test_a_flat_val_takes_its_classes_from_a_file(flat, form):
    labels = write(flat / form.file, form.text)
    pictures = open_pictures(flat, None if form.file == "val.txt" else labels)
    assert pictures.val.by_class == {
        "n01": ("v1.JPEG",),
        "n02": ("v3.JPEG",),
        "n03": ("v0.JPEG", "v2.JPEG"),
    }
    assert pictures.classes == ("n01", "n02", "n03")


WRONG_LABELS = {
    "development kit": ("1\n0\n2\n1\n", "one word only.*development kit.*write wnids"),
    "too few": ("v0 n03\nv1 n01\nv2 n03\n", "says nothing of v3.JPEG"),
    "counted from 1": ("v0 3\nv1 1\nv2 3\nv3 2\n", "names a class 3, which train does not have"),
    "unknown": ("v0 n03\nv1 n01\nv2 n03\nv3 n44\n", "names a class n44"),
}


@pytest.mark.parametrize(("text", "reason"), WRONG_LABELS.values(), ids=list(WRONG_LABELS))
def test_labels_that_cannot_be_used_are_refused(flat, text, reason):
    write(flat / "val.txt", text)
    with pytest.raises(DataError, match=reason):
        open_pictures(flat)


def test_a_flat_val_without_labels_is_refused(flat):
    with pytest.raises(DataError, match=r"by class, and there is no .*val\.txt"):
        open_pictures(flat)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_part_is_named(folder, part):
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=f"has no folder '{part}'"):
        open_pictures(folder)


@pytest.mark.parametrize(("part", "reason"), [("train", "one for each class"), ("val", "neither")])
def test_a_part_without_pictures_is_refused(folder, part, reason):
    for path in itertools.chain.from_iterable(sub.iterdir() for sub in (folder / part).iterdir()):
        path.unlink()
    with pytest.raises(DataError, match=f"{part} has no pictures.*{reason}"):
        open_pictures(folder)


def test_one_folder_for_both_is_refused(folder):
    (folder / "val").rename(folder / "elsewhere")
    (folder / "val").symlink_to(folder / "train")
    with pytest.raises(DataError, match="are one folder"):
        open_pictures(folder)
