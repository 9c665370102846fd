"""Models come in whole or not at all, in one form, and go out as they came."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from corp_onnx.blocks import find_blocks
from corp_onnx.errors import CorpError, GraphError, OutputError
from corp_onnx.graph.model import from_proto, load, save
from tests.builders import HIDDEN, TINY, WIDTH, Net, feeds, mlp, relu
from tests.full_width import run, squared_error

SOME = pytest.mark.parametrize("name", ["mlp_gemm", "transformer", "operator_mask", "mlp_half"])


@pytest.fixture
def proto():
    return TINY["mlp"](0).proto


@pytest.fixture
def path(tmp_path, proto):
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def save_with_data(proto, path):
    """Save with all weights in a file beside the model, leaving ``proto`` as it is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    onnx.save(copy, path, save_as_external_data=True, location="weights", size_threshold=0)
    return path


# Round trips


@SOME
def test_a_model_goes_out_as_it_came_in(name, tmp_path):
    proto = TINY[name](0).proto
    onnx.save(proto, tmp_path / "in.onnx")
    save(load(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    again = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(again, full_check=True)
    given = feeds(proto, 2, 5)
    (expected,), (actual,) = run(proto, given), run(again, given)
    assert squared_error(actual, expected) == 0
    assert list(again.graph.input) == list(proto.graph.input)
    assert list(again.graph.output) == list(proto.graph.output)
    assert again.opset_import == proto.opset_import
    assert again.metadata_props == proto.metadata_props
    assert (again.producer_name, again.producer_version) == ("tiny", "1.0")


def test_saving_twice_gives_the_same_file(path, tmp_path):
    save(load(path), tmp_path / "one.onnx")
    save(load(tmp_path / "one.onnx"), tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_an_input_that_nothing_reads_stays(tmp_path):
    net = Net(0)
    net.input("unused", "batch", 3)
    y = mlp(net, net.x(), relu)
    model = from_proto(net.build(y))
    assert [value.name for value in model.proto().graph.input] == ["unused", "x"]


def test_external_data_is_read(path, proto, tmp_path):
    save_with_data(proto, tmp_path / "split.onnx")
    assert (tmp_path / "split.onnx").stat().st_size < path.stat().st_size
    model = load(tmp_path / "split.onnx")
    given = feeds(proto, 2, 5)
    assert squared_error(*run(model, given), *run(proto, given)) == 0


def test_models_too_large_for_protobuf_get_a_file_of_weights(path, proto, tmp_path, monkeypatch):
    net = Net(0)
    y = net.linear(net.x(), WIDTH, 200)  # large enough to be moved out
    monkeypatch.setattr("corp_onnx.graph.model.LARGEST_PROTOBUF_BYTES", 1000)
    model = from_proto(net.build(y))
    save(model, tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").stat().st_size >= 4 * 200 * WIDTH
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "large.onnx",
        "large.onnx.data",
        "model.onnx",
    ]
    again = load(tmp_path / "large.onnx")
    given = feeds(model.proto(), 2, 5)
    assert squared_error(*run(again, given), *run(model, given)) == 0


# Files that are no models


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(GraphError, match="does not exist or is not a file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(GraphError, match="does not exist or is not a file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x89PNG\r\n\x1a\n" + bytes(range(200)), b"\0" * 100]
)
def test_a_file_that_is_something_else(content, tmp_path):
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(GraphError, match=r"other\.onnx.*export or download it again"):
        load(tmp_path / "other.onnx")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_a_truncated_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content)) - 1])
    with pytest.raises(GraphError, match=f"{path.stat().st_size} bytes.*truncated"):
        load(path)


def test_sparse_weights_are_said_not_to_be_read(proto):
    weight = proto.graph.initializer[0]
    values = numpy_helper.from_array(np.ones(1, np.float32), weight.name)
    indices = numpy_helper.from_array(np.zeros(1, np.int64))
    sparse = helper.make_sparse_tensor(values, indices, list(weight.dims))
    proto.graph.sparse_initializer.append(sparse)
    del proto.graph.initializer[0]
    with pytest.raises(GraphError, match=r"sparse tensors \(constant_0\), which are not read"):
        from_proto(proto)


def test_a_model_without_a_graph(tmp_path):
    empty = helper.make_model(helper.make_graph([], "empty", [], []))
    onnx.save(empty, tmp_path / "empty.onnx")
    with pytest.raises(GraphError, match="holds no ONNX graph"):
        load(tmp_path / "empty.onnx")


def test_weights_that_are_missing(proto, tmp_path):
    save_with_data(proto, tmp_path / "split.onnx")
    (tmp_path / "weights").unlink()
    with pytest.raises(GraphError, match="put the external data file back beside the model"):
        load(tmp_path / "split.onnx")


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_draws_random_numbers_is_noted(training):
    net = Net(0)
    y = mlp(net, net.x(), lambda net, y: net("Dropout", relu(net, y), 0.1, np.array(training)))
    notes = from_proto(net.build(y)).notes
    assert [note[:35] for note in notes] == ["the model draws random numbers (Dro"] * training


def test_a_file_without_its_weights(proto, tmp_path):
    stripped = onnx.ModelProto()
    stripped.CopyFrom(proto)
    for tensor in stripped.graph.initializer[:2]:
        tensor.ClearField("raw_data")
    onnx.save(stripped, tmp_path / "stripped.onnx")
    with pytest.raises(GraphError, match="stripped of its weights: 2 initializers hold no values"):
        load(tmp_path / "stripped.onnx")


def test_weights_that_are_truncated(proto, tmp_path):
    save_with_data(proto, tmp_path / "split.onnx")
    data = (tmp_path / "weights").read_bytes()
    (tmp_path / "weights").write_bytes(data[:-8])
    with pytest.raises(GraphError, match="weights"):
        load(tmp_path / "split.onnx")


def test_weights_outside_the_folder_of_the_model(proto, tmp_path):
    (tmp_path / "inner").mkdir()
    save_with_data(proto, tmp_path / "split.onnx")
    model = onnx.load(tmp_path / "split.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = re.sub("^weights$", "../weights", entry.value)
    (tmp_path / "inner" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="keeps weights in another file that cannot be read"):
        load(tmp_path / "inner" / "model.onnx")


@pytest.mark.parametrize(
    ("opset", "advice"), [(0, "convert_version"), (9, "convert_version"), (999, "pip install")]
)
def test_an_opset_that_is_not_known(proto, tmp_path, opset, advice):
    proto.opset_import[0].version = opset
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match=rf"uses opset {opset}\D.*{advice}"):
        load(tmp_path / "model.onnx")


# Results that cannot be written


def test_a_result_that_would_replace_a_folder(proto, tmp_path):
    with pytest.raises(OutputError, match="it is a folder; name a file"):
        save(from_proto(proto), tmp_path)


def test_a_result_in_a_folder_that_does_not_exist(proto, tmp_path):
    with pytest.raises(OutputError, match="none does not exist"):
        save(from_proto(proto), tmp_path / "none" / "model.onnx")


def test_a_result_in_a_folder_that_is_a_file(proto, path):
    with pytest.raises(OutputError, match="does not exist"):
        save(from_proto(proto), path / "model.onnx")


def test_nothing_is_left_when_writing_fails(proto, path, monkeypatch):
    before = path.read_bytes()

    def full(model, file, **options):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    for target in (path, path.with_name("new.onnx")):
        with pytest.raises(OutputError, match="No space left on device"):
            save(from_proto(proto), target)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


def test_errors_are_those_of_the_package():
    assert issubclass(GraphError, CorpError)
    assert issubclass(OutputError, CorpError)


# Fingerprints


def test_a_fingerprint_is_that_of_the_content(path, tmp_path):
    first = load(path).fingerprint
    (tmp_path / "copy.onnx").write_bytes(path.read_bytes())
    assert load(tmp_path / "copy.onnx").fingerprint == first
    assert first.opset == 18
    assert first.producer == "tiny 1.0"
    assert re.fullmatch("[0-9a-f]{64}", first.sha256)


def test_a_fingerprint_changes_with_the_weights(proto, path):
    first = load(path).fingerprint
    (bias,) = (t for t in proto.graph.initializer if tuple(t.dims) == (HIDDEN,))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1e-3, bias.name))
    onnx.save(proto, path)
    assert load(path).fingerprint.sha256 != first.sha256
    assert from_proto(proto).fingerprint.sha256 != first.sha256


def test_a_fingerprint_changes_with_external_weights(proto, tmp_path):
    save_with_data(proto, tmp_path / "split.onnx")
    first = load(tmp_path / "split.onnx").fingerprint
    data = bytearray((tmp_path / "weights").read_bytes())
    data[0] ^= 1
    (tmp_path / "weights").write_bytes(data)
    assert load(tmp_path / "split.onnx").fingerprint.sha256 != first.sha256


# Canonical form


@pytest.mark.parametrize("name", ["", "same"])
def test_every_node_gets_a_name_of_its_own(proto, name):
    for node in proto.graph.node:
        node.name = name
    proto.graph.node[2].name = f"{name or 'MatMul'}_0"
    model = from_proto(proto)
    names = [node.name for node in model.graph.nodes]
    assert len(set(names)) == len(names) == 5
    assert "" not in names
    assert len(find_blocks(model).blocks) == 1


@pytest.mark.parametrize(
    "attribute",
    [
        {"value": numpy_helper.from_array(np.full(1, 0.5, np.float32))},
        {"value_float": 0.5},
        {"value_floats": [0.5]},
    ],
)
def test_constants_are_no_nodes(attribute):
    net = Net(0)
    half = net("Constant", **attribute)
    model = from_proto(net.build(net("Mul", mlp(net, net.x(), relu), half)))
    assert {node.op for node in model.graph.nodes} == {"MatMul", "Add", "Relu", "Mul"}
    constant = model.graph.tensors()[half]
    assert isinstance(constant, gs.Constant)
    assert np.array_equal(np.ravel(constant.values), [0.5])


def test_integers_are_no_nodes_either():
    net = Net(0)
    shape = net("Constant", value_ints=[0, -1])
    axis = net("Constant", value_int=2)
    y = net("Reshape", net.x(), shape)
    model = from_proto(net.build(net("Unsqueeze", y, net("Reshape", axis, [1]))))
    tensors = model.graph.tensors()
    assert tensors[shape].values.tolist() == [0, -1]
    assert tensors[axis].values == 2
    assert tensors[axis].shape == ()


def test_a_constant_that_is_an_output_stays_a_node():
    net = Net(0)
    value = net("Constant", value=numpy_helper.from_array(np.ones(3, np.float32)))
    proto = net.build(mlp(net, net.x(), relu), value)
    model = from_proto(proto)
    (made,) = run(model, feeds(proto, 1, 2))
    assert made[value].tolist() == [1, 1, 1]


@pytest.mark.parametrize("from_file", [True, False])
def test_functions_of_the_model_are_inlined(from_file, tmp_path):
    proto = with_function()
    if from_file:
        onnx.save(proto, tmp_path / "model.onnx")
        model = load(tmp_path / "model.onnx")
    else:
        model = from_proto(proto)
    assert "Twice" not in {node.op for node in model.graph.nodes}
    assert len(find_blocks(model).blocks) == 1
    given = feeds(proto, 2, 5)
    assert squared_error(*run(model, given), *run(proto, given)) < 1e-12


def with_function():
    net = Net(0)
    y = mlp(net, net.x(), lambda net, y: net("Twice", y, domain="local"))
    nodes = [helper.make_node("Add", ["a", "a"], ["s"]), helper.make_node("Relu", ["s"], ["b"])]
    opsets = [helper.make_opsetid("", 18)]
    net_model = net.build(net("Identity", "x"))
    del net_model.graph.output[:]
    net_model.graph.output.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, [None] * 3))
    net_model.functions.append(helper.make_function("local", "Twice", ["a"], ["b"], nodes, opsets))
    return net_model


def test_tensors_keep_their_names(proto):
    model = from_proto(proto)
    names = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    assert set(model.graph.tensors()) == names


def test_outputs_keep_the_shapes_that_the_caller_sees(proto):
    """Beside them the file may say something else of the same tensor."""
    other = proto.graph.value_info.add()
    other.CopyFrom(proto.graph.output[0])
    other.type.tensor_type.shape.dim[0].dim_param = "elsewhere"
    assert from_proto(proto).proto().graph.output[0] == proto.graph.output[0]


def test_nodes_come_in_an_order_in_which_they_can_run(proto):
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert [node.op for node in from_proto(proto).graph.nodes] == [
        "MatMul",
        "Add",
        "Relu",
        "MatMul",
        "Add",
    ]
