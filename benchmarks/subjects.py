"""Real models to be cut and judged: calibration samples by seed, test samples, dense tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import exports, language, neighbours, tasks
from benchmarks.outcome import Place, Row
from benchmarks.samples import Data, Samples, Texts, Windows, drawn, halves
from benchmarks.tasks import Judge
from corp_onnx import example
from corp_onnx.blocks import Axis, Catalog, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.commands import Source
from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.data.dataset import open_data
from corp_onnx.data.labels import read_labels
from corp_onnx.graph.macs import count
from corp_onnx.graph.model import Model, load
from corp_onnx.graph.shapes import evaluate
from corp_onnx.session import Runtime, open_session
from corp_onnx.verify.comparison import comparable

log = logging.getLogger(__name__)

CUTS: Mapping[str, dict[Axis, float]] = {
    "MLP": {"mlp": 0.5},
    "QK": {"qk": 0.5},
    "both": {"mlp": 0.5, "qk": 0.5},
    "all three": {"mlp": 0.5, "qk": 0.5, "vo": 0.5},
}
CROPS = 1
"""Of every picture: as many as ``corp-onnx prune`` makes by default of 256 pictures or more."""

FASHION_DRAWN, PICTURES_DRAWN, GLOSSES_DRAWN = 768, 256, 2048
FASHION_WHOLE = 1024
GLOSSES_JUDGED = 2000
"""Calibration samples by draw, and texts among which and by which neighbours are sought."""

WALLPAPER_CROPS = 3

Tensors = tuple[np.ndarray, np.ndarray]
"""Of the gallery (calibration samples, or none) and of the test samples."""

Reading = Callable[[Batch, np.ndarray], np.ndarray]
"""From a batch and the model's output for it to what is judged."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model, calibration samples of one draw, and how a cut model is judged.

    Attributes:
        title: What it is, in words.
        model: The dense model; its first output is what is judged.
        catalog: Its blocks.
        samples: To calibrate on.
        gallery: Samples whose classes are known to a nearest-neighbour judge; empty without one.
        test: Samples that no method sees.
        judges: Accuracies, or a perplexity.
        reading: What of the output is judged.
        cuts: Names in `CUTS`.
        seed: Of the draw, of the halves and of the crops.
        crops: Inputs to make of every picture.
        runtime: How it is run.
        dense: The dense model's tensors, once they are known.
    """

    title: str
    model: Model
    catalog: Catalog
    samples: Samples
    gallery: tuple[Batch, ...]
    test: tuple[Batch, ...]
    judges: Mapping[str, Judge]
    reading: Reading
    cuts: tuple[str, ...]
    seed: int
    crops: int = CROPS
    runtime: Runtime | None = None
    dense: Tensors = (np.empty(0), np.empty(0))

    def known(self) -> Subject:
        """With the dense tensors."""
        return replace(self, dense=self._tensors(self.model))

    def with_samples(self, samples: Samples) -> Subject:
        """Calibrated on others."""
        return replace(self, samples=samples)

    def statistics(self) -> Statistics:
        """Of the dense model, over all calibration samples."""
        return gather(
            self.model,
            self.catalog,
            self.samples.batches(self.crops, self.seed),
            runtime=self.runtime,
            source=self.title,
            crops=self.samples.crops(self.crops),
            seed=self.seed,
        )

    def parts(self) -> list[Iterable[Batch]]:
        """The calibration samples in two halves, for `fit_in_sequence`."""
        return [half.batches(self.crops, self.seed) for half in halves(self.samples, self.seed)]

    def measured(self, model: Model) -> Row:
        """Error, accuracies, and the share of the multiply-adds that is left."""
        found = self._tensors(model)
        lost = np.square(found[1] - self.dense[1], dtype=np.float64).sum()
        error = float(lost / np.square(self.dense[1], dtype=np.float64).sum())
        macs = self._macs(model) / self._macs(self.model)
        return {"error": error, "MACs": macs} | self.accuracies(found)

    def accuracies(self, tensors: Tensors | None = None) -> dict[str, float]:
        """By every judge; of the dense model unless told otherwise."""
        return {name: judge(*(tensors or self.dense)) for name, judge in self.judges.items()}

    @property
    def tested(self) -> int:
        """How many test samples there are."""
        return sum(map(samples_in, self.test))

    def _macs(self, model: Model) -> int:
        return count(model.graph, evaluate(model.graph, self.catalog.sizes)).total

    def _tensors(self, model: Model) -> Tensors:
        session = open_session(model, self.runtime)
        name = model.graph.outputs[0].name

        def run(batches: Sequence[Batch]) -> np.ndarray:
            read = [self.reading(batch, session.run(batch)[name]) for batch in batches]
            return np.concatenate(read) if read else np.empty(0)

        return run(self.gallery), run(self.test)


def subjects(
    place: Place, names: Iterable[str], seeds: Mapping[str, int], default: int
) -> Iterator[tuple[str, Subject]]:
    """Every model that was asked for, with every draw, its dense tensors known."""
    for name in names if place.only is None else [place.only]:
        asked = place.seeds or (1 if place.quick else seeds.get(name, default))
        for seed in range(place.first, place.first + asked):
            log.info("%s, seed %d", name, seed)
            yield name, MAKERS[name](place, seed).known()


def fashion(place: Place, seed: int) -> Subject:
    """The bundled classifier; no pictures but arrays, so there are no crops."""
    files = (example.MODEL, example.CALIBRATION, example.TEST)
    return classifier(place, "Fashion ViT", files, FASHION_DRAWN, seed)


def fashion_whole(place: Place, seed: int) -> Subject:
    """The same with all of its images."""
    files = (example.MODEL, example.CALIBRATION, example.TEST)
    return classifier(place, "Fashion ViT", files, FASHION_WHOLE, seed)


def dinov2(place: Place, seed: int) -> Subject:
    """The encoder on unseen photographs: those left over by the draw, and those of others."""
    model = _encoder(place)
    data = Data(tasks.photo_data(place), tasks.PHOTO_BATCH)
    samples, others = drawn(data, 24 if place.quick else PICTURES_DRAWN, seed)
    papers = open_data(
        str(place.asset("wallpapers")), data.data.inputs, preprocessing=tasks.IMAGENET
    )
    if place.quick:
        papers, others = papers.take(range(4)), others.take(np.arange(4))
    test = (
        *others.batches(1, 0),
        *papers.augmented(WALLPAPER_CROPS, 0).batches(tasks.PHOTO_BATCH),
    )
    return Subject(
        *("DINOv2 ViT-S encoder", model, find_blocks(model), samples, (), test),
        *({}, _whole, tuple(CUTS), seed),
    )


def dinov2_neighbours(place: Place, seed: int) -> Subject:
    """The encoder by the nearest labelled photograph: two thirds calibrate, and are the gallery."""
    task, data = tasks.photographs(place, seed), tasks.photo_data(place)
    model = _encoder(place)
    first, _ = tasks.photo_parts(place, data, seed)
    samples = Data(data.take(first), tasks.PHOTO_BATCH)
    return Subject(
        *("DINOv2 ViT-S encoder, labelled", model, find_blocks(model), samples),
        *(task.calibration, task.test, task.judges, _whole, tuple(CUTS), seed),
    )


def minilm_l3(place: Place, seed: int) -> Subject:
    """MiniLM-L3, which ends in the vector of a text."""
    model = comparable(load(place.asset("minilm_l3.onnx")), tasks.SENTENCE)
    return _texts(place, seed, "MiniLM-L3", model, _whole)


def minilm_l6(place: Place, seed: int) -> Subject:
    """MiniLM-L6; the vector of a text is the mean over its tokens."""
    model = load(exports.drawn(place, "minilm_l6_eager", "ts17"))
    return _texts(place, seed, "MiniLM-L6", model, _mean_of_tokens)


def classifier(
    place: Place,
    title: str,
    files: tuple[Path, Path, Path],
    count: int,
    seed: int,
    runtime: Runtime | None = None,
) -> Subject:
    """A model, arrays to draw ``count`` calibration samples from, and labelled ones to test on."""
    path, known, unseen = files
    model, session = load(path), open_session(path)
    pool, test = (Source(str(each)).open(path, session) for each in (known, unseen))
    if place.quick:
        test = test.take(range(0, test.samples, 10))
    truth = np.array(read_labels(unseen, test))

    def top1(_: np.ndarray, logits: np.ndarray) -> float:
        return float((logits.argmax(axis=1) == truth).mean())

    batch = tasks.FASHION_BATCH
    samples, _ = drawn(Data(pool, batch), 128 if place.quick else count, seed)
    return Subject(
        *(title, model, find_blocks(model), samples, (), tuple(test.batches(batch))),
        *({"top-1": top1}, _whole, tuple(CUTS), seed),
        runtime=runtime,
    )


def smollm2(place: Place, seed: int) -> Subject:
    """A language model, judged by the perplexity of definitions."""
    model = load(exports.drawn(place, "smollm2", "dynamo18"))
    tests, *draws = language.sets(place, seed + 1)

    def perplexity(_: np.ndarray, logits: np.ndarray) -> float:
        return language.perplexity(tests, logits)

    samples, test = (Windows(part, language.BATCH) for part in (draws[seed], tests))
    return Subject(
        *("SmolLM2-135M", model, find_blocks(model), samples, (), tuple(test.batches(1, 0))),
        *({"perplexity": perplexity}, _whole, (), seed),
    )


MAKERS: Mapping[str, Callable[[Place, int], Subject]] = {
    "fashion": fashion,
    "dinov2": dinov2,
    "fashion-whole": fashion_whole,
    "dinov2-neighbours": dinov2_neighbours,
    "minilm-l3": minilm_l3,
    "minilm-l6": minilm_l6,
    "smollm2": smollm2,
    "smollm2-narrow": smollm2,
}


def _encoder(place: Place) -> Model:
    """DINOv2 without the decoder behind it: nothing counts that does not make the features."""
    return comparable(load(place.asset("vit_s_focus.onnx")), tasks.FEATURES)


def _texts(place: Place, seed: int, title: str, model: Model, reading: Reading) -> Subject:
    """Calibrated on some of the glosses of one set; neighbours are sought from one to the other."""
    codes, labels, (first, second) = tasks.encoded_glosses(place)
    most = 40 if place.quick else GLOSSES_JUDGED
    near, far = (part[:: -(-len(part) // most)] for part in (first, second))

    def vote(x: np.ndarray, y: np.ndarray) -> float:
        return neighbours.accuracy(x, labels[near], y, labels[far], neighbours=5)

    pool = Texts([codes[index] for index in first])
    samples, _ = drawn(pool, 320 if place.quick else GLOSSES_DRAWN, seed)
    gallery, test = (tuple(Texts([codes[i] for i in part]).batches(1, 0)) for part in (near, far))
    return Subject(
        *(title, model, find_blocks(model), samples, gallery, test),
        *({"5-nn": vote}, reading, tuple(CUTS), seed),
    )


def _whole(batch: Batch, output: np.ndarray) -> np.ndarray:
    return output


def _mean_of_tokens(batch: Batch, output: np.ndarray) -> np.ndarray:
    mask = batch["attention_mask"][..., None].astype(output.dtype)
    mean: np.ndarray = (output * mask).sum(axis=1) / mask.sum(axis=1)
    return mean
