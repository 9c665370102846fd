"""The one place that opens an ONNX Runtime session."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any, Literal

import numpy as np
import onnx

from corp_onnx.errors import BackendUnavailable, DataError, GraphError
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.model import Model, serialized, write
from corp_onnx.graph.widened import in_float32, is_bfloat16
from corp_onnx.providers import (
    CPU,
    MISSING,
    conflict,
    load_libraries,
    require_available,
    require_started,
    warn_of_conflict,
)

LOG_ONLY_FATAL = 4
"""What ONNX Runtime logs of lesser errors it also raises."""

APART = "session.optimized_model_external_initializers_file_name"

GraphLevel = Literal["none", "basic", "extended", "all"]
"""How far ONNX Runtime rewrites a graph when it loads it."""

GRAPH_LEVELS: Mapping[GraphLevel, str] = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}

UNKNOWN = "is not a registered function/op"
"""What ONNX Runtime says of an operator that it does not have."""

NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """How models are run: execution providers in order, threads, a library of custom operators."""

    providers: tuple[str, ...] = CPU
    threads: int = 0
    spinning: bool = True
    """Whether idle threads wait busily for the next run: faster alone, slower beside others.

    Models that are timed turn by turn must not: the one that rests would take the other's cores.
    """
    custom_op_library: Path | None = None
    graph_level: GraphLevel = "all"
    arena: bool = True
    """Whether freed memory is kept for the next run."""
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    optimised: Path | None = None
    """Where ONNX Runtime writes the graph that it made of the model."""
    optimised_apart: bool = False
    """Whether its weights go into a file beside it, as those of a large model must."""
    profile: Path | None = None
    """Begin of the name of a file of the times of all operators; `Session.profile` finishes it."""


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A model that is loaded and can be run."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    _session: Any

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Output arrays by name; inputs that the model does not have are left out.

        Raises:
            DataError: If an input is missing, or ONNX Runtime cannot run the model on these.
        """
        names = list(self.outputs if outputs is None else outputs)
        with self._given(feeds) as taken:
            results = self._session.run(names, taken)
        return dict(zip(names, results, strict=True))

    def run_on(
        self, device: str, feeds: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], float]:
        """The same, and the milliseconds from inputs on a device to outputs there, uncopied.

        Args:
            device: As ONNX Runtime names it, ``cuda`` or ``cpu``.
            feeds: Arrays of the host, as for `run`.
        """
        bound, place = self._session.io_binding(), _onnxruntime().OrtValue.ortvalue_from_numpy
        with self._given(feeds, (RuntimeError,)) as taken:
            for name, array in taken.items():
                bound.bind_ortvalue_input(name, place(np.asarray(array, order="C"), device, 0))
            for name in self.outputs:
                bound.bind_output(name, device)
            bound.synchronize_inputs()
            start = perf_counter()
            self._session.run_with_iobinding(bound)
            bound.synchronize_outputs()
            elapsed_ms = (perf_counter() - start) * 1000
            results = bound.copy_outputs_to_cpu()
        return dict(zip(self.outputs, results, strict=True)), elapsed_ms

    @contextmanager
    def _given(
        self, feeds: Mapping[str, np.ndarray], also: tuple[type[Exception], ...] = ()
    ) -> Iterator[dict[str, np.ndarray]]:
        """What the model reads of them; what fails is told with their shapes."""
        missing = [spec.name for spec in self.inputs if spec.name not in feeds]
        if missing:
            raise DataError(
                f"the model also reads {', '.join(missing)}, which the data do not have; they have "
                f"{', '.join(feeds)}"
            )
        taken = {spec.name: spec.of_its_width(feeds[spec.name]) for spec in self.inputs}
        try:
            yield taken
        except _failures(_onnxruntime()) + also as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in taken.items())
            raise DataError(
                f"ONNX Runtime cannot run the model on inputs of shape {shapes}: "
                f"{str(error).strip()[:500]}; check the data against what the model was made for"
            ) from error

    def profile(self) -> Path:
        """Stop timing operators: the file with their times, for a `Runtime` that asks for it."""
        return Path(self._session.end_profiling())


def open_session(source: Model | Path, runtime: Runtime | None = None) -> Session:
    """Load a model into ONNX Runtime.

    A `Model` in bfloat16, for which many kernels are missing, is run in float32.

    Raises:
        BackendUnavailable: If ONNX Runtime, or an execution provider asked for, is missing or
            does not start.
        GraphError: If ONNX Runtime cannot load the model.
    """
    runtime = runtime or Runtime()
    ort = _onnxruntime()
    require_available(ort, runtime.providers)
    load_libraries(ort, runtime.providers)
    options = ort.SessionOptions()
    options.log_severity_level = LOG_ONLY_FATAL
    _set(ort, options, runtime)
    if runtime.custom_op_library is not None:
        _register(ort, options, runtime.custom_op_library)
    given = [(name, dict(runtime.provider_options.get(name, {}))) for name in runtime.providers]
    try:
        session = _open(ort, source, options, given)
    except _failures(ort) as error:
        unknown = UNKNOWN in str(error)
        raise GraphError(
            f"ONNX Runtime {ort.__version__} cannot load the model: {str(error)[:500]}"
            + ("; a library of such operators is named by --custom-op-library" if unknown else "")
        ) from error
    require_started(runtime.providers, session.get_providers())
    return wrapped(session)


def version() -> str:
    """The version of ONNX Runtime that is installed."""
    return str(_onnxruntime().__version__)


def _set(ort: ModuleType, options: Any, runtime: Runtime) -> None:  # noqa: ANN401 (ONNX Runtime ships no types)
    options.intra_op_num_threads = runtime.threads
    options.enable_cpu_mem_arena = runtime.arena
    level = getattr(ort.GraphOptimizationLevel, GRAPH_LEVELS[runtime.graph_level])
    options.graph_optimization_level = level
    if not runtime.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if runtime.optimised is not None:
        options.optimized_model_filepath = str(runtime.optimised)
        if runtime.optimised_apart:
            name = f"{runtime.optimised.name}.data"
            options.add_session_config_entry(APART, name)
    if runtime.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(runtime.profile)


Providers = list[tuple[str, dict[str, str]]]


def _open(ort: ModuleType, source: Model | Path, options: Any, providers: Providers) -> Any:  # noqa: ANN401 (ONNX Runtime ships no types)
    if isinstance(source, Path):
        return ort.InferenceSession(str(source), options, providers=providers)
    proto: onnx.ModelProto = source.proto()
    if is_bfloat16(proto):
        proto = in_float32(proto)
    message = serialized(proto)
    if message is not None:
        return ort.InferenceSession(message, options, providers=providers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        write(proto, path)
        return ort.InferenceSession(str(path), options, providers=providers)


def _onnxruntime() -> ModuleType:
    """The onnxruntime module, or an error that says how to get it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(conflict() or MISSING) from error
    warn_of_conflict()
    return onnxruntime  # type: ignore[no-any-return]


def require_providers(providers: Sequence[str]) -> None:
    """See whether execution providers are installed.

    Raises:
        BackendUnavailable: If not; it says which are.
    """
    require_available(_onnxruntime(), providers)


def _register(ort: ModuleType, options: Any, library: Path) -> None:  # noqa: ANN401 (ONNX Runtime ships no types)
    if not library.is_file():
        raise BackendUnavailable(f"the custom operator library {library} does not exist")
    try:
        options.register_custom_ops_library(str(library.resolve()))
    except _failures(ort) as error:
        raise BackendUnavailable(
            f"{library} is no library of custom operators that ONNX Runtime {ort.__version__} can "
            f"load: {str(error)[:500]}"
        ) from error


def _failures(ort: ModuleType) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a model that it cannot load or run."""
    state = ort.capi.onnxruntime_pybind11_state
    return (
        state.Fail,
        state.InvalidGraph,
        state.InvalidArgument,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotFound,
        state.NotImplemented,
        state.EPFail,
        state.RuntimeException,
    )


def wrapped(session: Any) -> Session:  # noqa: ANN401 (ONNX Runtime ships no types)
    """What ONNX Runtime opened, as the rest of the program takes it."""
    inputs = tuple(
        InputSpec(
            value.name,
            np.dtype(NUMPY_TYPES.get(value.type, np.float32)),
            tuple(size if isinstance(size, int) else None for size in value.shape),
        )
        for value in session.get_inputs()
    )
    return Session(inputs, tuple(value.name for value in session.get_outputs()), session)


def library() -> tuple[ModuleType, tuple[type[Exception], ...]]:
    """ONNX Runtime, for targets that open sessions in ways of their own, and what it raises.

    Raises:
        BackendUnavailable: If it is not installed.
    """
    ort = _onnxruntime()
    return ort, _failures(ort)
