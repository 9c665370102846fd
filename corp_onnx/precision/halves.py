"""A float32 model in float16 or bfloat16, with casts around what stays in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.model import Model, nodes_of_subgraphs
from corp_onnx.precision.norms import fused_norms
from corp_onnx.precision.ranges import peaks
from corp_onnx.precision.records import FORMATS, Draft, Exempt, Format, Request
from corp_onnx.precision.sensitive import (
    Reasons,
    kept_by_range,
    kept_by_structure,
    measured_tensors,
    moved_from,
)
from corp_onnx.precision.slots import Types, types_of
from corp_onnx.session import Runtime

UNMEASURED = (
    "there were no calibration inputs: ranges of weights were looked at, not of activations"
)


def halved(
    model: Model, request: Request, batches: Sequence[Batch], runtime: Runtime | None = None
) -> Draft:
    """The model in 16 bits, less what its operators, constants and values do not allow.

    Written-out norms are fused first. Without batches only constants are looked at.
    """
    whole, fused = fused_norms(model, batches)
    types = types_of(whole, FORMATS[request.precision], batches)
    kept = kept_by_structure(whole.graph, types)
    if batches:
        origin = moved_from(whole.graph)
        origins = {n: origin.get(n, n) for n in measured_tensors(whole.graph, types, kept)}
        found = peaks(whole, list(dict.fromkeys(origins.values())), batches, runtime)
        reached = {name: found[source] for name, source in origins.items()} | found
        kept = kept_by_range(whole.graph, types, reached) | kept
    ops = {node.name: node for node in whole.graph.nodes}
    return Draft(
        with_casts(whole, types, kept, keep_io_types=request.keep_io_types),
        tuple(
            Exempt(name, ops[name].op, reason)
            for name, reason in kept.items()
            if types.float_inputs(ops[name]) or types.float_outputs(ops[name])
        ),
        fused=fused,
        samples=sum(map(samples_in, batches)),
        notes=() if batches else (UNMEASURED,),
    )


def with_casts(model: Model, types: Types, kept: Reasons, *, keep_io_types: bool) -> Model:
    """The model in a narrow type, but for nodes that are kept.

    Constants are rounded once here. A tensor that is read in both types is cast once. Names of
    inputs, outputs and nodes stay.
    """
    graph = model.graph.copy()
    casts = _Casts(types, graph, kept)
    casts.retype(keep_io_types=keep_io_types)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return model.with_graph(graph)


@dataclass(slots=True)
class _Casts:
    """A graph while the types of its tensors change."""

    types: Types
    graph: gs.Graph
    kept: Reasons
    narrow: set[int] = field(default_factory=set)
    """Tensors that are made in the narrow type."""
    floats: set[int] = field(default_factory=set)
    """Tensors that were float32 to begin with."""
    versions: dict[tuple[int, bool], gs.Tensor] = field(default_factory=dict)
    """Of a tensor, by its identity, and whether it is the narrow one."""
    emit: Emitter = field(init=False)

    def __post_init__(self) -> None:
        self.emit = Emitter.of(self.graph)

    def retype(self, *, keep_io_types: bool) -> None:
        """Decide what every tensor is made as, then let every node read what it wants."""
        nodes = list(self.graph.nodes)
        wanted = {node.name: set(self._narrow_inputs(node)) for node in nodes}
        floats = {node.name: self.types.float_inputs(node) for node in nodes}
        bodies = [
            (node, slot)
            for node in nodes_of_subgraphs(self.graph)
            for slot in self.types.float_inputs(node)
        ]
        for node in nodes:
            self._make_narrow(node)
        self._retype_ends(keep_io_types=keep_io_types)
        for node in nodes:
            for slot in floats[node.name]:
                node.inputs[slot] = self._read(node.inputs[slot], narrow=slot in wanted[node.name])
        for node, slot in bodies:
            node.inputs[slot] = self._read(node.inputs[slot], narrow=False)
        for body in self.graph.subgraphs(recursive=True):
            body.outputs = [self._read(tensor, narrow=False) for tensor in body.outputs]

    def _narrow_inputs(self, node: gs.Node) -> Sequence[int]:
        return () if node.name in self.kept else self.types.narrow_inputs(node)

    def _make_narrow(self, node: gs.Node) -> None:
        """Let a node make narrow outputs, if it may."""
        if node.name in self.kept:
            return
        places = self.types.narrow_outputs(node)
        if places and node.op == "Cast":
            node.attrs["to"] = self.types.format.code
        if places and node.op == "Attention":
            node.attrs["softmax_precision"] = int(onnx.TensorProto.FLOAT)
        for slot in places:
            self.narrow.add(id(node.outputs[slot]))
        for slot in places:
            _set_type(node.outputs[slot], self.types.format)

    def _retype_ends(self, *, keep_io_types: bool) -> None:
        """Give inputs and outputs of the graph the types that they shall have."""
        for tensor in self.graph.inputs:
            if not keep_io_types and tensor.dtype == np.float32:
                self.narrow.add(id(tensor))
                _set_type(tensor, self.types.format)
        for tensor in self.graph.outputs:
            made_narrow = id(tensor) in self.narrow
            if not tensor.inputs or not (made_narrow or tensor.dtype == np.float32):
                continue
            if made_narrow == keep_io_types:
                self._recast(tensor, made_narrow=made_narrow)

    def _recast(self, tensor: gs.Tensor, *, made_narrow: bool) -> None:
        """Let an output keep its name, and the node behind it make another tensor."""
        (maker,) = tensor.inputs
        made = gs.Variable(self._fresh(tensor.name), dtype=tensor.dtype)
        slot = next(i for i, output in enumerate(maker.outputs) if output is tensor)
        maker.outputs[slot] = made
        self.versions[id(tensor), made_narrow] = made
        self.versions[id(tensor), not made_narrow] = tensor
        cast = self._cast(made, narrow=not made_narrow)
        (node,) = cast.inputs
        node.outputs[0] = tensor
        tensor.dtype = cast.dtype

    def _read(self, tensor: gs.Tensor, *, narrow: bool) -> gs.Tensor:
        """A tensor in the type that a reader wants; the cast is shared by all of them."""
        known = self.versions.get((id(tensor), narrow))
        if known is not None:
            return known
        if isinstance(tensor, gs.Constant):
            version = self._rounded(tensor) if narrow else tensor
        else:
            same = narrow == (id(tensor) in self.narrow)
            version = tensor if same else self._cast(tensor, narrow=narrow)
        self.versions[id(tensor), narrow] = version
        return version

    def _rounded(self, tensor: gs.Constant) -> gs.Constant:
        with np.errstate(over="ignore"):  # where it matters, the reader is kept
            values = np.asarray(tensor.values).astype(self.types.format.dtype)
        return gs.Constant(self._fresh(f"{tensor.name}_{self.types.format.name}"), values)

    def _cast(self, tensor: gs.Tensor, *, narrow: bool) -> gs.Variable:
        code = self.types.format.code if narrow else int(onnx.TensorProto.FLOAT)
        emit = self.emit.under(tensor.name)
        cast = emit.node("Cast", [tensor], dtype=np.float32, attrs={"to": code})
        if narrow:
            _set_type(cast, self.types.format)
        return cast

    def _fresh(self, name: str) -> str:
        fresh, number = name, 0
        while fresh in self.emit.taken:
            fresh, number = f"{name}_{number}", number + 1
        self.emit.taken.add(fresh)
        return fresh


def _set_type(tensor: gs.Tensor, form: Format) -> None:
    """As the library that writes graphs has it: bfloat16 by ONNX's number."""
    tensor.dtype = form.dtype if form.dtype == np.float16 else form.code
