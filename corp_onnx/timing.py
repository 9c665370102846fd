"""Models built for one target and timed there, turn by turn."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import onnx_graphsurgeon as gs

from corp_onnx.deploy.records import Build, Engine, Precision, Target
from corp_onnx.errors import PlanError, QuantisedModel
from corp_onnx.graph import Model, load, write
from corp_onnx.latency import RUNS, WARMUP, Race, race, timing_inputs
from corp_onnx.shapes import usual_sequence
from corp_onnx.sizes import DEFAULT_BATCH, Sizes, input_sizes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """A model, a file or a folder that something was built into; where it runs, in which types."""

    model: Model | Path
    target: Target
    precision: Precision = "fp32"

    @contextmanager
    def opened(self) -> Iterator[tuple[Engine, gs.Graph]]:
        """The engine until it is no longer needed, and a graph with its inputs."""
        with tempfile.TemporaryDirectory(prefix="corp_onnx.") as folder:
            build, graph = self._built(Path(folder))
            engine = self.target.load(build)
            try:
                yield engine, graph or _inputs_of(engine)
            finally:
                engine.close()

    def _built(self, folder: Path) -> tuple[Build, gs.Graph | None]:
        model = self.model
        if isinstance(model, Path) and model.is_dir():
            return self._fitting(Build.read(model)), None
        if isinstance(model, Path):
            graph = readable(model)
            return self.target.build(model, folder, self.precision), graph
        path = folder / "typed.onnx"
        write(model.proto(), path)
        return self.target.build(path, folder, self.precision), model.graph

    def _fitting(self, build: Build) -> Build:
        if (build.target, build.precision) != (self.target.name, self.precision):
            raise PlanError(
                f"{build.path.parent} was built for {build.target} in {build.precision}, not for "
                f"{self.target.name} in {self.precision}; say so with --target and --precision"
            )
        return build


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """How engines are timed.

    Attributes:
        batch: Samples of one inference.
        sizes: Dimensions of inputs that are not to be guessed.
        warmup: Turns that do not count, at the least.
        runs: Turns that count.
        seed: Of the inputs, and of the order within turns.
    """

    batch: int = DEFAULT_BATCH
    sizes: Sizes = field(default_factory=dict)
    warmup: int = WARMUP
    runs: int = RUNS
    seed: int = 0

    def race(self, lanes: Sequence[Lane]) -> Race:
        """Build every model, or take what was built of it, and time all turn by turn.

        Raises:
            CorpError: As `Target.build`, `Target.load` and `Engine.run`.
            PlanError: If a model is of another batch, or an input is not to be found.
        """
        with ExitStack() as opened:
            engines = [opened.enter_context(lane.opened()) for lane in lanes]
            self._require_known([graph for _, graph in engines])
            log.info("timing %d engines at batch %d", len(engines), self.batch)
            return race(
                [self._inference(*engine) for engine in engines],
                devices=[partial(_device_ms, engine) for engine, _ in engines],
                warmup=self.warmup,
                runs=self.runs,
                seed=self.seed,
            )

    def _inference(self, engine: Engine, graph: gs.Graph) -> Callable[[], object]:
        """One inference, on inputs made for timing."""
        known = {tensor.name for tensor in graph.inputs}
        given = {name: shape for name, shape in self.sizes.items() if name in known}
        sequence = usual_sequence(graph, given)
        sizes = input_sizes(graph, batch=self.batch, sequence=sequence, given=given)
        if not given and (found := next(iter(sizes.values()))[0]) != self.batch:
            raise PlanError(
                f"a model has a fixed batch of {found}, so it cannot be timed at batch "
                f"{self.batch}; export it with a dynamic one"
            )
        feeds = timing_inputs(engine.inputs, sizes, seed=self.seed)
        return lambda: engine.run(feeds)

    def _require_known(self, graphs: Sequence[gs.Graph]) -> None:
        known = {tensor.name for graph in graphs for tensor in graph.inputs}
        if unknown := sorted(self.sizes.keys() - known):
            raise PlanError(
                f"--shapes names {', '.join(unknown)}, but the inputs are "
                f"{', '.join(sorted(known))}"
            )


def readable(path: Path) -> gs.Graph | None:
    """The graph of a file; None of a quantised one, which can be run but not be cut.

    Raises:
        GraphError: If it is no ONNX model that can be read.
    """
    try:
        return load(path).graph
    except QuantisedModel:
        return None


def _inputs_of(engine: Engine) -> gs.Graph:
    """A graph without nodes, to say what an engine reads whose model is not at hand."""
    return gs.Graph(inputs=[gs.Variable(s.name, s.dtype, list(s.shape)) for s in engine.inputs])


def _device_ms(engine: Engine) -> float | None:
    return engine.device_ms
