"""What corp_onnx calls of TensorRT and CUDA is there, in both major versions, as it is called."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest

from tests.fake_tensorrt import fake_tensorrt
from tools.tensorrt_api import members

ROOT = Path(__file__).parents[1]
TYPINGS = ROOT / "tests" / "typings"
LISTS = {
    path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/tensorrt_api").iterdir()
}


def classes(path):
    body = ast.parse(path.read_text()).body
    return {
        node.name: members(node)
        for node in body
        if isinstance(node, ast.ClassDef) and node.name[0] != "_"
    }


OURS = classes(TYPINGS / "tensorrt" / "__init__.pyi")
MEMBERS = [
    (name, member) for name, known in OURS.items() for member in known if member != "__iter__"
]


def fits(ours, theirs):
    """Whether a method may be called as ours says, for some overload of theirs."""
    bare = [name.rstrip("=") for name in ours]
    return any(
        bare == [name.rstrip("=") for name in each[: len(bare)]]
        and all(name.endswith("=") for name in each[len(bare) :])
        for each in theirs
    )


@pytest.mark.parametrize("version", LISTS)
@pytest.mark.parametrize(("name", "member"), MEMBERS)
def test_what_is_called_is_there(name, member, version):
    if member == "__buffer__":  # pybind11 has it in C
        return
    ours, theirs = OURS[name][member], LISTS[version][name][member]
    if isinstance(ours, list):
        assert all(fits(overload, theirs) for overload in ours)
    elif ours == "settable":
        assert theirs == "settable" or (name, member) in {("ITensor", "name"), ("ITensor", "shape")}
    else:
        assert theirs == ours


def test_both_majors_are_known():
    assert sorted(version.split(".")[0] for version in LISTS) == ["10", "11"]


@pytest.mark.parametrize("flag", ["FP16", "BF16", "INT8", "FP8", "OBEY_PRECISION_CONSTRAINTS"])
def test_flags_of_weak_types_are_gone_in_11_and_not_used(flag):
    assert flag in LISTS["10.13"]["BuilderFlag"]
    assert flag not in LISTS["11.4"]["BuilderFlag"]
    assert flag not in OURS["BuilderFlag"]


def test_a_call_that_does_not_fit_is_seen():
    assert not fits(["network"], [["network", "config"]])
    assert not fits(["config", "network"], [["network", "config"]])
    assert fits([], [["strategy="], ["runtime_config="]])


@pytest.mark.parametrize("version", ["10.13.0.35", "11.4.0.106"])
@pytest.mark.parametrize(("name", "member"), MEMBERS)
def test_the_fake_is_called_as_the_real_one(name, member, version):
    if member in {"__buffer__", "__len__", "__getitem__"}:
        return
    ours = OURS[name][member]
    fake = getattr(fake_tensorrt(version), name)
    if isinstance(ours, list):
        parameters = list(inspect.signature(getattr(fake, member)).parameters)[1:]
        assert parameters == [each.rstrip("=") for each in ours[0]]
    else:
        assert hasattr(fake, member) or member in fake.known


def test_what_is_called_of_cuda_is_there():
    """The package may be here because torch brings it; it can be asked without a GPU."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    stub = ast.parse((TYPINGS / "cuda/bindings/runtime.pyi").read_text()).body
    for node in stub:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert hasattr(runtime, node.name)
        if isinstance(node, ast.ClassDef) and ast.unparse(node.bases[:1]) == "IntEnum":
            for each in node.body:
                assert isinstance(each, ast.Assign)
                (target,) = each.targets
                value = getattr(getattr(runtime, node.name), target.id)
                assert int(value) == ast.literal_eval(each.value)


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaGraphInstantiate", "cudaEventRecord"])
def test_cuda_takes_its_arguments_in_this_order(call):
    runtime = pytest.importorskip("cuda.bindings.runtime")
    stub = ast.parse((TYPINGS / "cuda/bindings/runtime.pyi").read_text()).body
    (ours,) = [n for n in stub if isinstance(n, ast.FunctionDef) and n.name == call]
    said = getattr(runtime, call).__doc__.split("\n")[0]
    places = [said.index(arg.arg) for arg in ours.args.args]
    assert places == sorted(places)
