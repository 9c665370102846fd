"""An ONNX model as a graph of nodes: load, canonicalise, clone, save, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_graphsurgeon.logger import G_LOGGER

from corp_onnx.errors import GraphError, QuantisedModel
from corp_onnx.files import whole
from corp_onnx.graph.canonical import canonicalise
from corp_onnx.graph.canonical.constants import constants_from_nodes, cut_weights, name_every_node
from corp_onnx.graph.canonical.notes import notes_of
from corp_onnx.graph.canonical.quantised import pack_narrow_constants, quantised_ops
from corp_onnx.graph.inlining import inlined
from corp_onnx.graph.operators import STANDARD

# It writes to standard output, and warns of types that it then reads all the same.
G_LOGGER.severity = G_LOGGER.ERROR

OLDEST_OPSET = 11
LARGEST_PROTOBUF_BYTES = 2**31 - 1

VALUES = (
    *("raw_data", "float_data", "int32_data", "int64_data"),
    *("double_data", "uint64_data", "string_data"),
)
"""Where a tensor may keep what it holds."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies a model file: its content's SHA-256, its opset and who wrote it."""

    sha256: str
    opset: int
    producer: str


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A graph in canonical form, with what surrounds it in the file.

    Canonical means: constants are ``gs.Constant`` tensors and never nodes, model-local functions
    are inlined, every node has a name of its own, and what `canonical` has a plain form for is in
    that form. ``graph`` is never edited: stages copy it.
    """

    graph: gs.Graph
    fingerprint: Fingerprint
    header: onnx.ModelProto
    notes: tuple[str, ...] = ()
    """What a user should know of how the model is read and written."""

    def with_graph(self, graph: gs.Graph) -> Model:
        """The same surroundings with another graph."""
        return Model(graph, self.fingerprint, self.header, self.notes)

    def proto(self) -> onnx.ModelProto:
        """The model as protobuf: metadata, producer and opsets as they were in the file."""
        model = onnx.ModelProto()
        model.CopyFrom(self.header)
        pack_narrow_constants(self.graph)
        model.graph.CopyFrom(gs.export_onnx(self.graph, do_type_check=False).graph)
        _match_domains(model)
        return model


def load(path: Path) -> Model:
    """Read an ONNX file, with its external data, into canonical form.

    Raises:
        GraphError: If it is not a complete ONNX model of a known opset.
        QuantisedModel: If its weights or activations are quantised already.
    """
    proto = inlined(_read(path))
    opset = _require_known_opset(proto, path)
    _require_float(proto, path)
    fingerprint = Fingerprint(_sha256(path, proto), opset, _producer(proto))
    return from_proto(_with_weights(proto, path), fingerprint)


def files_of(path: Path) -> Iterator[Path]:
    """The file of a model, and those that it keeps weights in.

    Raises:
        GraphError: If it is no ONNX model.
    """
    yield path
    yield from _beside(path, _read(path))


def described(path: Path) -> gs.Graph:
    """The graph of a file; of a quantised one, which can be run but not be cut, as it is there.

    Raises:
        GraphError: If it is no ONNX model that can be read.
    """
    try:
        return load(path).graph
    except QuantisedModel:
        return gs.import_onnx(_with_weights(_read(path), path))


def from_proto(proto: onnx.ModelProto, fingerprint: Fingerprint | None = None) -> Model:
    """Bring a model that is already in memory into canonical form.

    Raises:
        GraphError: If it keeps weights as sparse tensors, or functions that do not fit its opset.
    """
    if proto.graph.sparse_initializer:
        names = ", ".join(tensor.values.name for tensor in proto.graph.sparse_initializer[:3])
        raise GraphError(
            f"weights are stored as sparse tensors ({names}), which are not read; store them as "
            "ordinary initializers"
        )
    if fingerprint is None:
        digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
        fingerprint = Fingerprint(digest, opset_of(proto), _producer(proto))
    proto = inlined(proto)
    header = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name not in {"graph", "functions"}:
            getattr(header, field.name).extend(value) if field.is_repeated else setattr(
                header, field.name, value
            )
    graph = gs.import_onnx(proto)
    _declare_outputs(graph, proto)
    constants_from_nodes(graph)
    name_every_node(graph)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    cut_weights(graph)
    canonicalise(graph)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return Model(graph, fingerprint, header, notes_of(graph))


def save(model: Model, path: Path) -> None:
    """Write a model whole or not at all: to a temporary name beside ``path``, then by rename.

    Models beyond protobuf's 2 GB get their weights in ``<name>.data`` beside them.

    Raises:
        OutputError: If it cannot be written.
    """
    write(model.proto(), path)


def write(proto: onnx.ModelProto, path: Path) -> None:
    """The same for a model as protobuf."""
    location = f"{path.name}.data" if is_large(proto) else None
    with whole(path) as draft:
        onnx.save(proto, draft, save_as_external_data=location is not None, location=location)


def is_large(proto: onnx.ModelProto) -> bool:
    """Whether a model is too large for one protobuf message."""
    return _size_bytes(proto) > LARGEST_PROTOBUF_BYTES


def serialized(proto: onnx.ModelProto) -> bytes | None:
    """A model as one protobuf message; None if it is too large for that.

    `is_large` is not asked before: it takes as long.
    """
    try:
        message = bytes(proto.SerializeToString())
    except (EncodeError, ValueError):
        return None
    return message if len(message) <= LARGEST_PROTOBUF_BYTES else None


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the standard operator set that a model imports; 0 if it imports none."""
    versions = [entry.version for entry in proto.opset_import if entry.domain in STANDARD]
    return max(versions, default=0)


def nodes_of_subgraphs(graph: gs.Graph) -> Iterator[gs.Node]:
    """Every node inside If, Loop and Scan bodies, at any depth."""
    for subgraph in graph.subgraphs(recursive=True):
        yield from subgraph.nodes


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise GraphError(f"{path} does not exist or is not a file; give the path of an .onnx file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, UnicodeDecodeError) as error:
        raise GraphError(
            f"{path} ({path.stat().st_size} bytes) is not an ONNX model, or it is truncated: "
            f"{_first_line(error)}; export or download it again"
        ) from error
    if not proto.graph.node or not proto.ir_version:
        raise GraphError(f"{path} holds no ONNX graph; export or download it again")
    return proto


def _with_weights(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """A model with what it keeps in other files."""
    try:
        onnx.external_data_helper.load_external_data_for_model(proto, str(path.parent))
    except (FileNotFoundError, onnx.checker.ValidationError, ValueError) as error:
        raise GraphError(
            f"{path} keeps weights in another file that cannot be read ({_first_line(error)}); "
            "put the external data file back beside the model, as a file and not as a link"
        ) from error
    _require_values(proto, path)
    return proto


def _require_values(proto: onnx.ModelProto, path: Path) -> None:
    tensors = [tensor for tensor in proto.graph.initializer if 0 not in tensor.dims]
    empty = [tensor for tensor in tensors if not any(getattr(tensor, name) for name in VALUES)]
    if empty:
        raise GraphError(
            f"{path} was stripped of its weights: {len(empty)} initializers hold no values, "
            f"{empty[0].name!r} of shape {list(empty[0].dims)} among them; give the whole model"
        )


def _require_known_opset(proto: onnx.ModelProto, path: Path) -> int:
    opset, newest = opset_of(proto), onnx.defs.onnx_opset_version()
    if opset > newest:
        raise GraphError(
            f"{path} uses opset {opset}, but the installed onnx package knows opsets up to "
            f"{newest}; upgrade it with `pip install --upgrade onnx`"
        )
    if opset < OLDEST_OPSET:
        raise GraphError(
            f"{path} uses opset {opset}; opset {OLDEST_OPSET} or later is needed: convert it with "
            "onnx.version_converter.convert_version, or export it again"
        )
    return opset


def _require_float(proto: onnx.ModelProto, path: Path) -> None:
    found = quantised_ops(proto)
    if found:
        raise QuantisedModel(
            f"{path} is quantised already (it holds {', '.join(found)}): rounded weights cannot be "
            "repaired exactly; prune the floating-point model first and quantise the result"
        )


def _declare_outputs(graph: gs.Graph, proto: onnx.ModelProto) -> None:
    """Give outputs the shapes that the caller sees: simplifiers may record others beside them."""
    for tensor, value in zip(graph.outputs, proto.graph.output, strict=True):
        if isinstance(tensor, gs.Variable) and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            tensor.shape = [getattr(d, d.WhichOneof("value") or "", None) for d in dims]


def _match_domains(model: onnx.ModelProto) -> None:
    """Import the domains of operators that rewriting brought in, and no others."""
    imported = {entry.domain for entry in model.opset_import}
    used = {node.domain for node in model.graph.node} - STANDARD
    for domain in sorted(used - imported):
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))


def _sha256(path: Path, proto: onnx.ModelProto) -> str:
    """Digest of the file and of the external data files that it names."""
    digest = hashlib.sha256()
    for file in [path, *_beside(path, proto)]:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _beside(path: Path, proto: onnx.ModelProto) -> list[Path]:
    """The external data files that a model names."""
    tensors = [tensor for tensor in proto.graph.initializer if uses_external_data(tensor)]
    names = {ExternalDataInfo(tensor).location for tensor in tensors}
    return [path.parent / name for name in sorted(names)]


def _size_bytes(proto: onnx.ModelProto) -> int:
    try:
        return int(proto.ByteSize())
    except (EncodeError, ValueError):
        return LARGEST_PROTOBUF_BYTES + 1


def _producer(proto: onnx.ModelProto) -> str:
    return f"{proto.producer_name} {proto.producer_version}".strip() or "unknown"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
