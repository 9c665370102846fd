"""`demo`: the main job on the bundled model, what a cut costs, and how much is repaired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from corp_onnx import example
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import calibrate
from corp_onnx.commands.records import Answer, Progress, Source
from corp_onnx.data.batching import Batch
from corp_onnx.data.labels import read_labels
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.files import made
from corp_onnx.graph.macs import Counts, count
from corp_onnx.graph.model import Model, load, save
from corp_onnx.graph.shapes import usual_facts
from corp_onnx.latency.race import race
from corp_onnx.plan import DEFAULT_SHARES, uniform
from corp_onnx.session import Runtime, Session, open_session
from corp_onnx.solve import Method, Recipe, solve
from corp_onnx.solved import in_sequence
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.comparison import compare

BATCH_SIZE = 32
EVALUATION_BATCH = 100
REPAIRS = {
    "dense": "dense",
    "none": "pruned, no repair",
    "mean": "pruned, mean-only repair",
    "corp": "pruned, the paper's repair",
    "best": "pruned, best",
}
ONE_SHOT: tuple[Method, ...] = ("none", "mean", "corp")
"""Solved from the same statistics of the dense model."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the demonstration; ``mlp``, ``qk`` and ``vo`` are shares removed."""

    method: str
    mlp: float
    qk: float
    vo: float
    top1: float
    relative_error: float
    macs: int
    params: int
    bytes: int
    median_ms: float


@dataclass(frozen=True, slots=True)
class Demo:
    """Prune the bundled Fashion-MNIST transformer with every method; labels only judge it."""

    folder: Path

    def __call__(self, progress: Progress) -> Answer:
        """Calibrate, cut in every way, compare and time all models."""
        made(self.folder)
        dense = load(example.MODEL)
        models = {"dense": dense, **_pruned(dense, progress)}
        paths = {"dense": example.MODEL}
        for method in models.keys() - {"dense"}:
            paths[method] = self.folder / f"fashion_vit_{method}.onnx"
            save(models[method], paths[method])
        preprocessing = Preprocessing.beside(example.MODEL)
        if preprocessing is not None:
            preprocessing.save_beside(paths["best"])
        rows = _rows({name: models[name] for name in REPAIRS}, paths)
        document = {"rows": [asdict(row) for row in rows], "output": str(paths["best"])}
        return Answer(document, _table(rows, paths["best"]))


def _pruned(dense: Model, progress: Progress) -> dict[str, Model]:
    """The bundled model cut to half, by method."""
    catalog = find_blocks(dense)
    plan = uniform(catalog, DEFAULT_SHARES)
    data = Source(str(example.CALIBRATION)).open(example.MODEL, open_session(example.MODEL))
    statistics = calibrate(dense, catalog, data, on_batch=progress)
    solutions = {
        method: solve(dense, catalog, plan, statistics, Recipe(method)) for method in ONE_SHOT
    }
    solutions["best"] = in_sequence(
        *(dense, catalog, plan, data, Recipe()),
        on_batch=progress,
        on_block=lambda _: progress(1, "blocks"),
    ).solution
    return {
        method: operate(dense, catalog, solution).model for method, solution in solutions.items()
    }


def _rows(models: dict[str, Model], paths: dict[str, Path]) -> list[Row]:
    sessions = {name: open_session(path) for name, path in paths.items()}
    data = Source(str(example.TEST)).open(example.MODEL, sessions["dense"])
    labels = read_labels(example.TEST, data)
    feeds = next(data.batches(BATCH_SIZE))
    resting = {name: open_session(path, Runtime(spinning=False)) for name, path in paths.items()}
    times = race([_inference(resting[name], feeds) for name in models])
    rows = []
    for (name, model), latency in zip(models.items(), times.latencies, strict=True):
        found = compare(
            sessions["dense"], sessions[name], data.batches(EVALUATION_BATCH), labels=labels
        )
        counts = _counts(model)
        shares = {"mlp": 0.0, "qk": 0.0} if name == "dense" else dict(DEFAULT_SHARES)
        rows.append(
            Row(
                name,
                shares["mlp"],
                shares["qk"],
                0.0,
                (found.top1 or {})["pruned"],
                found.relative_error,
                counts.total,
                counts.params,
                paths[name].stat().st_size,
                latency.median_ms,
            )
        )
    return rows


def _inference(session: Session, feeds: Batch) -> Callable[[], object]:
    return lambda: session.run(feeds)


def _counts(model: Model) -> Counts:
    return count(model.graph, usual_facts(model.graph))


def _table(rows: list[Row], output: Path) -> Group:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Fashion-MNIST, half of MLP and query-key width removed")
    for column in ("top-1", "error", "MACs", "parameters", "file", f"batch of {BATCH_SIZE}"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            REPAIRS[row.method],
            f"{row.top1:.1%}",
            f"{row.relative_error:.3f}",
            f"{row.macs / 1e6:.1f} M",
            f"{row.params / 1e6:.2f} M",
            f"{row.bytes / 1e6:.2f} MB",
            f"{row.median_ms:.2f} ms",
        )
    usage = (
        f"\nThe repaired model is {output}. It is plain ONNX; use it like the dense one:\n\n"
        "    import onnxruntime\n"
        f'    session = onnxruntime.InferenceSession("{output}")\n'
        '    logits = session.run(None, {"image": images})[0]   # [n, 1, 28, 28], float32\n\n'
        "Now your own:\n\n"
        "    corp-onnx inspect model.onnx\n"
        "    corp-onnx prune model.onnx -o small.onnx --data images/\n"
    )
    return Group(table, Text(usage))
