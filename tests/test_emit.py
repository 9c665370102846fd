"""New names are nobody else's, those that follow from them neither."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.model import from_proto
from corp_onnx.pipeline import Settings, prune
from tests.builders import WIDTH, Net
from tests.full_width import run
from tests.test_pipeline import data_of
from tests.tolerances import distance

HALF = {"mlp": 0.5, "qk": 0.5}


def graph_with(*names):
    """A graph that has tensors of these names."""
    x, *others = (gs.Variable(name, np.float32, [2]) for name in ("x", *names))
    nodes = [gs.Node("Relu", f"n{at}", inputs=[x], outputs=[y]) for at, y in enumerate(others)]
    return gs.Graph(nodes, inputs=[x], outputs=others)


@pytest.mark.parametrize(
    ("taken", "made"),
    [
        ("a", "b/Relu_0"),
        ("b/Relu_0", "b/Relu_1"),
        ("b/Relu_0_output", "b/Relu_1"),
        ("b/Relu_0_output_1", "b/Relu_0"),
    ],
)
def test_a_node_s_name_leaves_room_for_its_output_s(taken, made):
    graph = graph_with(taken)
    output = Emitter.of(graph, "b").node("Relu", [graph.inputs[0]])
    assert output.inputs[0].name == made
    assert output.name == f"{made}_output" != taken


@pytest.mark.parametrize("taken", ["b/Split_0_output_0", "b/Split_0_output_1", "b/sizes_0"])
def test_parts_have_names_of_their_own(taken):
    graph = graph_with(taken)
    parts = Emitter.of(graph, "b").split(graph.inputs[0], [1, 1], 0, 13)
    names = {part.name for part in parts} | {t.name for t in parts[0].inputs[0].inputs}
    assert len(names) == 4
    assert taken not in names


def test_names_inside_a_branch_are_taken_too():
    graph = graph_with("y")
    branch = graph_with("b/Relu_0_output")
    condition = gs.Constant("c", np.array(True))
    either = gs.Node("If", "if", {"then_branch": branch, "else_branch": branch}, [condition])
    either.outputs.append(gs.Variable("z", np.float32))
    graph.nodes.append(either)
    output = Emitter.of(graph, "b").node("Relu", [graph.inputs[0]])
    assert output.name == "b/Relu_1_output"


def test_a_rewritten_node_takes_no_tensor_s_name():
    net = Net(0)
    sums = net("Einsum", net.x(), net.input("z", "batch", "rows", WIDTH), equation="bnd,bmd->bnm")
    proto = net.build(net("Softmax", net("Relu", sums)))
    (einsum,) = [node for node in proto.graph.node if node.op_type == "Einsum"]
    (relu,) = [node for node in proto.graph.node if node.op_type == "Relu"]
    (softmax,) = [node for node in proto.graph.node if node.op_type == "Softmax"]
    relu.output[0] = softmax.input[0] = f"{einsum.name}/Transpose_0_output"
    rng = np.random.default_rng(0)
    given = {
        name: rng.standard_normal((2, rows, WIDTH), dtype=np.float32)
        for name, rows in (("x", 3), ("z", 5))
    }
    ((before,), (after,)) = (run(model, given)[0].values() for model in (proto, from_proto(proto)))
    assert distance(after, before) < 1e-6


def test_a_pruned_model_without_names_of_nodes_can_be_pruned_again(files, tmp_path):
    errors = []
    for nameless in (False, True):
        once, twice = tmp_path / f"once{nameless}.onnx", tmp_path / "twice.onnx"
        settings = Settings(align=1)
        prune(
            files.model,
            once,
            data_of(files.model, files.data),
            shares_removed=HALF,
            settings=settings,
        )
        proto = onnx.load(once)
        if nameless:
            for node in proto.graph.node:
                node.ClearField("name")
            onnx.save(proto, once)
        done = prune(
            once, twice, data_of(once, files.data), shares_removed={"vo": 0.5}, settings=settings
        )
        assert done.verification.passed
        errors.append(done.verification.comparison.relative_error)
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
