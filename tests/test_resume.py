"""An interrupted calibration: nothing is counted twice, nothing lost, nothing mixed up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import calibrate
from corp_onnx.calibration.resume import Partial
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.errors import DataError
from corp_onnx.graph.model import from_proto
from tests.builders import TINY
from tests.inputs import activations, dataset
from tests.test_calibrate import SAME, apart

MODEL = TINY["separate"]
BATCH = 4


class Interrupted(Exception):
    """Stands for a power cut."""


@dataclass
class PowerCut:
    """Ends the run once so many samples were read."""

    after: int
    read: int = 0

    def __call__(self, samples: int) -> None:
        self.read += samples
        if self.read >= self.after:
            raise Interrupted


@pytest.fixture
def partial(tmp_path):
    return Partial(tmp_path / "statistics.npz.partial", "these data", seconds=0.0)


def calibrated(partial=None, *, samples=64, model=MODEL, on_batch=lambda samples: None):
    built = from_proto(model(0).proto)
    data = dataset(built, x=activations(samples))
    return calibrate(
        built, find_blocks(built), data, batch_size=BATCH, partial=partial, on_batch=on_batch
    )


def interrupted(partial, after):
    with pytest.raises(Interrupted):
        calibrated(partial, on_batch=PowerCut(after))


def test_going_on_gives_what_an_unbroken_run_gives(partial):
    interrupted(partial, after=12)
    kept = Statistics.load(partial.path).samples
    assert 0 < kept < 12
    read = []
    resumed, whole = calibrated(partial, on_batch=read.append), calibrated()
    assert resumed.samples == whole.samples == sum(read)
    assert read[0] == kept
    assert apart(resumed, whole) <= SAME
    assert resumed.source == whole.source
    for ours, theirs in zip(resumed.held_out, whole.held_out, strict=True):
        np.testing.assert_array_equal(ours["x"], theirs["x"])


@pytest.mark.parametrize("wrong", ["read again", "left out"])
def test_a_batch_counted_twice_or_never_is_noticed(partial, wrong):
    interrupted(partial, after=12)
    kept = Statistics.load(partial.path)
    whole = calibrated()
    twin = {"read again": whole + kept, "left out": kept}[wrong]
    with pytest.raises(AssertionError):
        assert apart(twin, whole) <= SAME


def test_a_run_that_ended_before_its_last_step_reads_nothing_again(partial):
    whole = calibrated(partial)
    read = []
    again = calibrated(partial, on_batch=read.append)
    assert read == [whole.samples]
    assert apart(again, whole) == 0


def test_it_goes_on_across_several_interruptions(partial):
    interrupted(partial, after=12)
    interrupted(partial, after=28)
    assert apart(calibrated(partial), calibrated()) <= SAME


def test_another_request_or_model_is_refused(partial, tmp_path):
    interrupted(partial, after=12)
    other = Partial(partial.path, "other data", seconds=0.0)
    with pytest.raises(DataError, match="with these data, not with other data; ask for the same"):
        calibrated(other)
    with pytest.raises(DataError, match="with another model"):
        calibrated(partial, model=TINY["packed_split"])
    assert partial.path.exists()


def test_saves_are_some_time_apart(tmp_path):
    patient = Partial(tmp_path / "statistics.npz.partial", "these data", seconds=3600.0)
    interrupted(patient, after=28)
    assert not patient.path.exists()
