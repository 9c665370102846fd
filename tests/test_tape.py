"""What is written to a tape comes back, until it is forgotten."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from corp_onnx.errors import OutputError
from corp_onnx.sequential.tape import Tape


def test_tensors_come_back_batch_by_batch(tmp_path):
    tape = Tape(tmp_path / "tape")
    made = [
        {"a/b": np.full((2, batch), batch, np.float16), "c": np.array(batch)} for batch in (1, 2)
    ]
    for batch, tensors in enumerate(made):
        tape.write(batch, tensors)
    for batch, tensors in enumerate(made):
        found = tape.read(batch)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert np.array_equal(found[name], tensor)
    assert tape.read(0, ["c"]).keys() == {"c"}


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tape = Tape(tmp_path / "tape")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match=r"No space left on device; .* TMPDIR") as caught:
        tape.write(0, {"a": np.zeros(3)})
    assert str(tmp_path) in str(caught.value)


def test_what_is_forgotten_leaves_the_disk(tmp_path):
    tape = Tape(tmp_path / "tape")
    tape.write(0, {"a": np.zeros(3), "b": np.ones(3)})
    tape.forget(["b", "never written"])
    assert tape.read(0).keys() == {"b"}
    assert len(list((tmp_path / "tape").iterdir())) == 1
    with pytest.raises(KeyError):
        tape.read(0, ["a"])
    tape.write(0, {"a": np.full(3, 2.0)})
    assert np.array_equal(tape.read(0)["a"], np.full(3, 2.0))
    assert np.array_equal(tape.read(0)["b"], np.ones(3))
