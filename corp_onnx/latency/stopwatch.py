"""Lanes, each a model and where it runs; a stopwatch builds them and times them in turn."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import onnx_graphsurgeon as gs

from corp_onnx.deploy.records import Build, Engine, Precision, Target
from corp_onnx.errors import PlanError
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.model import Model, described, write
from corp_onnx.graph.shapes import usual_sequence
from corp_onnx.graph.sizes import DEFAULT_BATCH, Sizes, batch_of, input_sizes
from corp_onnx.latency.race import RUNS, WARMUP, Race, race, timing_inputs

log = logging.getLogger(__name__)

PROFILES = 3
"""Of every engine."""


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """A model, a file or a folder that something was built into; where it runs, in which types."""

    model: Model | Path
    target: Target
    precision: Precision = "fp32"

    def graph(self) -> gs.Graph | None:
        """That of the model; None of an engine that was built."""
        if isinstance(self.model, Path):
            return None if self.model.is_dir() else described(self.model)
        return self.model.graph

    def reads(self) -> gs.Graph:
        """The same; of an engine one without nodes, which says what it reads."""
        graph = self.graph()
        if graph is not None:
            return graph
        engine = self.target.load(self._kept())
        try:
            return inputs_of(engine, {})
        finally:
            engine.close()

    @contextmanager
    def built(self, watch: Stopwatch) -> Iterator[tuple[Build, Sizes | None]]:
        """The build until it is no longer needed; sizes of its inputs, where the model is known."""
        with tempfile.TemporaryDirectory(prefix="corp_onnx.", ignore_cleanup_errors=True) as folder:
            graph = self.graph()
            if graph is None:
                yield self._kept(), None
            else:
                sizes = watch.sizes_of(graph)
                yield self._built(self.target.sized(sizes), Path(folder)), sizes

    @contextmanager
    def opened(self, watch: Stopwatch) -> Iterator[tuple[Engine, Sizes]]:
        """The engine until it is no longer needed, and the sizes of its inputs."""
        with self.built(watch) as (build, sizes):
            engine = self.target.load(build)
            try:
                yield engine, sizes or watch.sizes_of_engine(engine)
            finally:
                engine.close()

    def _built(self, target: Target, folder: Path) -> Build:
        if isinstance(self.model, Path):
            return target.build(self.model, folder, self.precision)
        path = folder / "typed.onnx"
        write(self.model.proto(), path)
        return target.build(path, folder, self.precision)

    def _kept(self) -> Build:
        """What was built into the folder, if it is what is to run."""
        assert isinstance(self.model, Path), "a folder"
        build = Build.read(self.model)
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
        likely: Sizes of models beside an engine, for dimensions that it leaves open.
    """

    batch: int = DEFAULT_BATCH
    sizes: Sizes = field(default_factory=dict)
    warmup: int = WARMUP
    runs: int = RUNS
    seed: int = 0
    likely: Sizes = field(default_factory=dict)

    @staticmethod
    def of(graph: gs.Graph, sizes: Sizes | None = None, batch: int | None = None) -> Stopwatch:
        """For the batch that is asked for, else that of the model, else of the sizes, else 1.

        Args:
            graph: Of the model, which may have a fixed batch.
            sizes: Dimensions of inputs that are not to be guessed; those of others are kept.
            batch: Samples of one inference.

        Raises:
            PlanError: If sizes do not fit the model.
        """
        sizes = sizes or {}
        if batch is None:
            given = _of_inputs(graph, sizes)
            with_batch = {name: shape for name, shape in given.items() if len(shape) > 1}
            batch = batch_of(input_sizes(graph, batch=batch_of(with_batch), given=given))
        return Stopwatch(batch, sizes)

    def race(self, lanes: Sequence[Lane], *, on_end: Callable[[], object] = lambda: None) -> Race:
        """Build every model, or take what was built of it, and time all turn by turn.

        Args:
            lanes: What is timed; the first is the measure.
            on_end: Called after the last turn, while all engines are still there.

        Raises:
            CorpError: As `Target.build`, `Target.load` and `Engine.run`.
            PlanError: If a model is of another batch, or an input is not to be found.
        """
        with ExitStack() as opened:
            watch = self.beside(lanes)
            engines = [opened.enter_context(lane.opened(watch)) for lane in lanes]
            self._require_known([engine for engine, _ in engines])
            log.info("timing %d engines at batch %d", len(engines), self.batch)
            found = race(
                [self._inference(*engine) for engine in engines],
                devices=[partial(_device_ms, engine) for engine, _ in engines],
                warmup=self.warmup,
                runs=self.runs,
                seed=self.seed,
            )
            on_end()
            return found

    def operator_times(self, lanes: Sequence[Lane]) -> tuple[Mapping[str, float], ...]:
        """Milliseconds of one inference of every engine, by kind of operator.

        All engines are profiled in turn, again and again; medians tell less of what else the
        machine does.

        Raises:
            CorpError: As `race`.
        """
        watch = self.beside(lanes)
        with ExitStack() as opened:
            engines = [opened.enter_context(lane.opened(watch)) for lane in lanes]
            feeds = [timing_inputs(one.inputs, sizes, seed=self.seed) for one, sizes in engines]
            turns = [
                [one.operator_times(fed) for (one, _), fed in zip(engines, feeds, strict=True)]
                for _ in range(PROFILES)
            ]
        return tuple(
            {kind: median(times[kind] for times in of_engine) for kind in of_engine[0]}
            for of_engine in zip(*turns, strict=True)
        )

    def _inference(self, engine: Engine, sizes: Sizes) -> Callable[[], object]:
        """One inference, on inputs made for timing."""
        feeds = timing_inputs(engine.inputs, sizes, seed=self.seed)
        return lambda: engine.run(feeds)

    def sizes_of(self, graph: gs.Graph) -> Sizes:
        """Dimensions of all inputs: those given, the batch, and what is usual.

        Raises:
            PlanError: If the batch cannot be kept.
        """
        given = _of_inputs(graph, self.sizes)
        sequence = usual_sequence(graph, given)
        sizes = input_sizes(graph, batch=self.batch, sequence=sequence, given=given)
        found = batch_of(sizes)
        if sizes and found != self.batch:
            raise PlanError(
                f"{'--shapes gives a batch' if given else 'a model has a fixed batch'} of {found}, "
                f"so it cannot be timed at batch {self.batch}; give --batch {found}"
                + ("" if given else ", or export it with a dynamic one")
            )
        return sizes

    def sizes_of_engine(self, engine: Engine) -> Sizes:
        """The same of an engine, whose model is not at hand to say what is usual."""
        return self.sizes_of(inputs_of(engine, self.likely))

    def beside(self, lanes: Sequence[Lane]) -> Stopwatch:
        """One that knows the sizes of the models among the lanes, where there are engines too."""
        graphs = [lane.graph() for lane in lanes] if any(map(_is_engine, lanes)) else []
        likely: dict[str, tuple[int, ...]] = {}
        for graph in graphs:
            likely |= {} if graph is None else self.sizes_of(graph)
        return replace(self, likely=likely)

    def _require_known(self, engines: Sequence[Engine]) -> None:
        known = {spec.name for engine in engines for spec in engine.inputs}
        if unknown := sorted(self.sizes.keys() - known):
            raise PlanError(
                f"--shapes names {', '.join(unknown)}, but the inputs are "
                f"{', '.join(sorted(known))}"
            )


def inputs_of(engine: Engine, likely: Sizes) -> gs.Graph:
    """A graph without nodes, to say what an engine reads; open dimensions as they likely are."""

    def dims(spec: InputSpec) -> list[int | None]:
        known = likely.get(spec.name, ())
        fits = len(known) == len(spec.shape)
        guessed = known if fits else (None,) * len(spec.shape)
        return [
            guess if size is None else size for size, guess in zip(spec.shape, guessed, strict=True)
        ]

    return gs.Graph(inputs=[gs.Variable(s.name, s.dtype, dims(s)) for s in engine.inputs])


def _of_inputs(graph: gs.Graph, sizes: Sizes) -> Sizes:
    """Those of inputs that the graph has: others are another model's."""
    known = {tensor.name for tensor in graph.inputs}
    return {name: shape for name, shape in sizes.items() if name in known}


def _is_engine(lane: Lane) -> bool:
    return isinstance(lane.model, Path) and lane.model.is_dir()


def _device_ms(engine: Engine) -> float | None:
    return engine.device_ms
