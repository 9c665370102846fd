"""The paper's table, on a miniature of ImageNet and with a tiny network of timm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import imagenet
from benchmarks.published import PUBLISHED, CutModel, Measured, accuracy, checks, cost
from benchmarks.report import UNUSABLE
from corp_onnx.solve import METHODS
from corp_onnx.verify.comparison import Comparison
from tests.miniature import MODEL, VAL, WNIDS, Knowing, files, make_folder
from tests.tolerances import distance, rounding

ROOT = Path(__file__).parents[1]

TOKENS, WIDTH, HIDDEN, HEADS, HEAD, DEPTH, PATCH = 101, 64, 192, 2, 32, 6, 16
"""Of the network; one token more than there are patches."""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As it was, after each test: the command turns downloads off for its whole process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def measurement(*, top1=(0.72, 0.40), cut="both", method="corp", broken=(), samples=50_000):
    """A measurement, as far as the comparison reads it; 40 % of the answers changed."""
    comparison = Comparison(
        *(samples, "output", 0.5, {}, 0.8, 0.6), {"dense": top1[0], "pruned": top1[1]}
    )
    return Measured(CutModel(cut, method, Path("x"), (100, 60), broken, 9, 1.5), comparison)


def verdicts(model, *measured, share=0.5):
    """The checks by name, without that of the model."""
    return {check.name.removeprefix(model): check for check in checks(model, share, measured)}


def test_drops_are_held_against_the_published_ones():
    row = accuracy("deit_tiny_patch16_224", 0.5, measurement(top1=(0.7202, 0.4536)))
    assert row["drop"] == pytest.approx(26.66)
    assert row["published drop"] == pytest.approx(72.02 - 41.36)
    assert row["more than published"] == pytest.approx(-4.0)


UNPUBLISHED = {
    "no repair": ("deit_tiny_patch16_224", 0.5, {"method": "none"}),
    "means only": ("deit_tiny_patch16_224", 0.5, {"method": "mean"}),
    "other share": ("deit_tiny_patch16_224", 0.4, {}),
    "row that repeats another": ("deit_base_patch16_224", 0.5, {}),
    "other model": (MODEL, 0.5, {}),
}


@pytest.mark.parametrize(("model", "share", "what"), UNPUBLISHED.values(), ids=list(UNPUBLISHED))
def test_what_is_not_published_is_not_compared(model, share, what):
    row = accuracy(model, share, measurement(**what))
    assert [row[key] for key in row if "published" in key] == [None] * 4


def test_the_published_table_is_that_of_the_paper():
    assert {model: paper.dense for model, paper in PUBLISHED.items()} == {
        "deit_tiny_patch16_224": 72.02,
        "deit_small_patch16_224": 79.72,
        "deit_base_patch16_224": 81.74,
        "deit3_large_patch16_224": 84.58,
        "deit3_huge_patch14_224": 84.97,
    }
    for paper in PUBLISHED.values():
        assert all(0 < top1 < paper.dense for top1 in paper.pruned.values())


@pytest.mark.parametrize(("more", "holds"), [(-5.0, True), (0.5, True), (0.6, False), (5, False)])
def test_a_repair_that_loses_more_than_published_is_seen(more, holds):
    """Of 50,000 pictures with 40 % changed answers: 2 · 100 · sqrt(0.4 / 50000) = 0.57 points."""
    measured = measurement(top1=(0.7202, (41.36 - more) / 100))
    found = verdicts("deit_tiny_patch16_224", measured)
    assert found[", both, corp: loses no more than published"].passed is holds


@pytest.mark.parametrize(("off", "holds"), [(0.3, True), (-0.3, True), (0.5, False), (-0.5, False)])
def test_another_dense_model_than_the_published_one_is_seen(off, holds):
    """Of 50,000 pictures: 2 · 100 · sqrt(0.72 · 0.28 / 50000) = 0.40 points."""
    measured = measurement(top1=((72.02 + off) / 100, 0.3))
    found = verdicts("deit_tiny_patch16_224", measured)
    assert found[": the dense model is as accurate as published"].passed is holds


def test_a_check_of_prune_that_broke_is_told_of_repairs_only():
    broken = measurement(broken=("promises",)), measurement(broken=("repair",), method="mean")
    found = verdicts(MODEL, *broken)
    assert list(found) == [", both, corp: as promised"]
    assert not found[", both, corp: as promised"].passed
    assert [cost(one)["checks broken"] for one in broken] == ["promises", "repair"]


def test_multiply_adds_are_given_before_and_after():
    row = cost(measurement())
    assert (row["dense MACs"], row["pruned MACs"]) == (100, 60)
    assert row["MACs removed"] == pytest.approx(0.4)


WRONG_REQUESTS = {
    "no folder": [],
    "unknown cut": ["--imagenet", "x", "--cuts", "mlp,heads"],
    "unknown method": ["--imagenet", "x", "--methods", "magic"],
    "no pictures": ["--imagenet", "x", "--limit", "0"],
    "one checkpoint for all": ["--imagenet", "x", "--checkpoint", "x.pth"],
}


@pytest.mark.parametrize("arguments", WRONG_REQUESTS.values(), ids=list(WRONG_REQUESTS))
def test_a_request_that_makes_no_sense_ends_at_once(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        imagenet.main(arguments)
    assert ended.value.code == UNUSABLE
    assert "usage" in capsys.readouterr().err


def test_a_folder_that_is_none_ends_with_its_reason(tmp_path, capsys):
    assert imagenet.main(["--imagenet", str(tmp_path), "--models", MODEL]) == UNUSABLE
    assert "has no folder 'train'" in capsys.readouterr().err


@dataclass(frozen=True, slots=True, eq=False)
class Mini:
    """The miniature, and the network that knows it."""

    folder: Path
    knowing: Knowing
    checkpoint: Path


@dataclass(frozen=True, slots=True, eq=False)
class Ran:
    """A run: status, document, its file, and the pictures that went in."""

    status: int
    document: dict[str, Any]
    file: Path
    calibrated: dict[Path, np.ndarray]
    tested: dict[Path, np.ndarray]

    def rows(self, table: str) -> dict[tuple[str, str], dict[str, Any]]:
        """The rows of the table with this word in its title, by cut and method."""
        (rows,) = (rows for title, rows in self.document["tables"].items() if table in title)
        return {(row["cut"], row["method"]): row for row in rows}


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("mini") / "imagenet")
    knowing = Knowing(folder)
    return Mini(folder, knowing, knowing.save(folder.parent / "tiny.pth"))


def run(mini, out, *arguments, folder=None):
    """The command, with an eye on what is calibrated and tested on."""
    seen: tuple[dict[Path, np.ndarray], ...] = ({}, {})

    def kept(data, store):
        for place, index in enumerate(data.indices):
            (array,) = data.take([place]).arrays().values()
            store[Path(data.store.name(int(index))).resolve()] = array[0]
        return data

    def watched(dense, small, opened, **rest):
        return prune(dense, small, lambda model: kept(opened(model), seen[0]), **rest)

    prune, logged = imagenet.prune, imagenet._logged
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(imagenet, "prune", watched)
        patch.setattr(imagenet, "_logged", lambda data: logged(kept(data, seen[1])))
        status = imagenet.main(
            [
                *("--imagenet", str(folder or mini.folder), "--models", MODEL),
                *("--checkpoint", str(mini.checkpoint), "--out", str(out), *arguments),
            ]
        )
    (file,) = out.iterdir()
    return Ran(status, json.loads(file.read_text()), file, *seen)


@pytest.fixture(scope="module")
def ran(mini, tmp_path_factory):
    """Every cut by every method, once for all tests; a picture of val lies in train as well."""
    source = files(mini.folder, "val")[0]
    copy = mini.folder / "train" / source.parent.name / "copy.JPEG"
    copy.write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("results")
    everything = len(files(mini.folder, "train"))
    found = run(mini, out, "--calibration", str(everything))
    copy.unlink()
    return found


def right(mini, order, paths=None):
    """Per cent of val that torch answers with the place of its class in this order."""
    paths = files(mini.folder, "val") if paths is None else paths
    truth = np.array([order.index(path.parent.name) for path in paths])
    return 100 * float((mini.knowing.answers(paths) == truth).mean())


@pytest.mark.slow
def test_every_cut_by_every_method_is_in_the_result(ran):
    wanted = {(cut, method) for cut in ("mlp", "qk", "both") for method in METHODS}
    assert set(ran.rows("top-1")) == set(ran.rows("cost")) == wanted
    assert ran.document["passed"] is (ran.status == 0)
    assert ran.document["benchmark"] == "imagenet-test-vit"
    assert ran.file.name.startswith(f"{ran.document['date']}-imagenet-test-vit-")
    assert {"command", "device", "versions", "commit", "seconds"} <= set(ran.document)


@pytest.mark.slow
def test_the_result_names_no_folder_of_this_machine(mini, ran):
    assert str(mini.folder.parent) not in ran.file.read_text()
    assert "--imagenet imagenet" in ran.document["command"]
    assert ran.document["settings"]["weights"] == "tiny.pth"


@pytest.mark.slow
def test_dense_accuracy_is_what_torch_and_timm_say(mini, ran):
    """Classes in sorted order. In the order in which they were made it would be another."""
    wanted = right(mini, sorted(WNIDS))
    assert wanted > 100 / len(WNIDS), "the network knows something"
    assert wanted != right(mini, list(WNIDS))
    assert {row["dense"] for row in ran.rows("top-1").values()} == {wanted}


@pytest.mark.slow
def test_classes_under_each_other_s_names_are_seen(mini, tmp_path):
    """Every class answers for the next one: what torch finds right then, and no more."""
    order = sorted(WNIDS)
    for part in ("train", "val"):
        (tmp_path / "turned" / part).mkdir(parents=True)
        for wnid, name in zip(order, [*order[1:], order[0]], strict=True):
            (tmp_path / "turned" / part / name).symlink_to(mini.folder / part / wnid)
    arguments = ("--calibration", "50", "--limit", "10", "--cuts", "qk", "--methods", "none")
    found = run(mini, tmp_path / "out", *arguments, folder=tmp_path / "turned")
    (row,) = found.rows("top-1").values()
    paths = list(found.tested)
    assert Counter(path.parent.name for path in paths) == dict.fromkeys(order, 2)
    assert row["dense"] == right(mini, [order[-1], *order[:-1]], paths) < right(mini, order, paths)


@pytest.mark.slow
def test_train_is_calibrated_on_and_val_is_tested_on(mini, ran):
    assert sorted(ran.tested) == files(mini.folder, "val")
    assert sorted(ran.calibrated) == files(mini.folder, "train")
    settings = ran.document["settings"]
    assert settings["test_pictures"] == VAL * len(WNIDS)
    assert settings["calibration_pictures"] == len(ran.calibrated)


@pytest.mark.slow
def test_a_copy_of_a_test_picture_is_not_calibrated_on(ran):
    assert "copy.JPEG" not in {path.name for path in ran.calibrated}
    assert ran.document["settings"]["left_out_because_also_in_test"] == 1


@pytest.mark.slow
def test_both_sets_are_prepared_as_timm_does(mini, ran):
    """Within rounding of one product and one difference; another crop would show."""
    config = mini.knowing.config
    assert ran.document["settings"]["preprocessing"] == {
        "input": "pixel_values",
        "size": list(config["input_size"][1:]),
        "channels": config["input_size"][0],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
    }
    limit = rounding(width=4, dtype=np.float32)
    for store in (ran.calibrated, ran.tested):
        found, paths = np.stack(list(store.values())), list(store)
        assert distance(found, mini.knowing.seen(paths).numpy()) <= limit
        assert distance(found, mini.knowing.seen(paths, crop_pct=0.875).numpy()) > limit


def by_hand(*, hidden, head):
    """Patches, projections, products, MLPs, classifier: multiply-adds of one picture."""
    patches = (TOKENS - 1) * WIDTH * 3 * PATCH**2
    projections = TOKENS * WIDTH * HEADS * (2 * head + 2 * HEAD)
    products = HEADS * TOKENS**2 * (head + HEAD)
    mlp = 2 * TOKENS * WIDTH * hidden
    return patches + DEPTH * (projections + products + mlp) + WIDTH * len(WNIDS)


@pytest.mark.slow
def test_multiply_adds_are_those_counted_by_hand(ran):
    wanted = {
        "mlp": by_hand(hidden=HIDDEN // 2, head=HEAD),
        "qk": by_hand(hidden=HIDDEN, head=HEAD // 2),
        "both": by_hand(hidden=HIDDEN // 2, head=HEAD // 2),
    }
    dense = by_hand(hidden=HIDDEN, head=HEAD)
    for (cut, _), row in ran.rows("cost").items():
        assert (row["dense MACs"], row["pruned MACs"]) == (dense, wanted[cut])
        assert row["MACs removed"] == 1 - wanted[cut] / dense


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["mlp", "qk", "both"])
def test_repair_costs_less_error_than_none(ran, cut):
    rows = ran.rows("cost")
    assert 0 < rows[cut, "corp"]["error"] < rows[cut, "none"]["error"]


@pytest.mark.slow
def test_a_model_of_other_classes_is_refused(mini, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / "fewer" / part).mkdir(parents=True)
        for wnid in WNIDS[1:]:
            (tmp_path / "fewer" / part / wnid).symlink_to(mini.folder / part / wnid)
    arguments = ["--imagenet", str(tmp_path / "fewer"), "--models", MODEL]
    arguments += ["--checkpoint", str(mini.checkpoint), "--calibration", "9"]
    assert imagenet.main([*arguments, "--out", str(tmp_path / "out")]) == UNUSABLE
    assert "tells 5 classes apart, but train and val have 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nothing_is_downloaded(mini, tmp_path):
    """With an empty cache of timm, in a process of its own: the switch is read on import."""
    arguments = ("--imagenet", mini.folder, "--models", MODEL, "--calibration", "9")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.imagenet", *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == UNUSABLE
    assert "nothing is downloaded here" in done.stderr
    assert "Traceback" not in done.stderr
