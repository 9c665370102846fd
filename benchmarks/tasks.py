"""Real encoders with real inputs: what to calibrate on, what to test on, how to judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from benchmarks import neighbours
from benchmarks.outcome import Place
from corp_onnx import example
from corp_onnx.commands import Source
from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.data.dataset import Dataset, open_data
from corp_onnx.data.labels import read_labels
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.session import open_session

SEED = 0

Judge = Callable[[np.ndarray, np.ndarray], float]
"""From the tensor on calibration and on test samples to an accuracy."""

IMAGENET = Preprocessing(
    *("input_image", (224, 224), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    interpolation="bicubic",
    crop_pct=224 / 256,
)
"""Shorter side to 256 pixels, centre of 224, ImageNet's mean and standard deviation."""

FEATURES = "/backbone/layernorm/Add_1_output_0"
"""Where DINOv2 ViT-S ends and a small decoder begins."""

SENTENCE = "461"
"""The vector of a text in MiniLM-L3."""

PHOTO_BATCH, GLOSS_BATCH, FASHION_BATCH = 8, 32, 64

CLASSES, GLOSSES_PER_CLASS, MOST_TOKENS = 10, 800, 64


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A model, two sets of samples with none in common, and accuracies of one of its tensors."""

    name: str
    model: Path
    tensor: str
    calibration: tuple[Batch, ...]
    test: tuple[Batch, ...]
    judges: Mapping[str, Judge]

    @property
    def samples(self) -> dict[str, int]:
        """How many there are of each kind."""
        parts = {"calibration": self.calibration, "test": self.test}
        return {part: sum(map(samples_in, batches)) for part, batches in parts.items()}


def photographs(place: Place, seed: int = SEED) -> Task:
    """DINOv2 ViT-S on labelled photographs, two thirds of each class to calibrate.

    The class of the nearest calibration photograph is the answer. The vector of a photograph is the
    class token (token 0 of the tensor), as DINOv2's authors do; the error is of all tokens.
    """
    model = place.asset("vit_s_focus.onnx")
    data = photo_data(place)
    _, labels = np.unique(data.labels or (), return_inverse=True)
    parts = photo_parts(place, data, seed)
    gallery, query = (labels[part] for part in parts)

    def nearest(x: np.ndarray, y: np.ndarray) -> float:
        return neighbours.accuracy(x[:, 0], gallery, y[:, 0], query, neighbours=1)

    calibration, test = (tuple(data.take(part).batches(PHOTO_BATCH)) for part in parts)
    return Task(
        "DINOv2 ViT-S on photographs", model, FEATURES, calibration, test, {"1-nn": nearest}
    )


def photo_data(place: Place) -> Dataset:
    """All photographs, as DINOv2 ViT-S takes them."""
    inputs = open_session(place.asset("vit_s_focus.onnx")).inputs
    return open_data(str(place.asset("photos")), inputs, preprocessing=IMAGENET)


def photo_parts(place: Place, data: Dataset, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Places of the photographs to calibrate and to test on."""
    classes, labels = np.unique(data.labels or (), return_inverse=True)
    return _split(labels, len(classes), share=2 / 3, every=4 if place.quick else 1, seed=seed)


def glosses(place: Place) -> Task:
    """MiniLM-L3 on WordNet's glosses of nouns, of the ten commonest lexicographer classes.

    Half of each class is to calibrate; five of these vote on the class of a test gloss.
    """
    codes, labels, parts = encoded_glosses(place)
    gallery, query = (labels[part] for part in parts)

    def vote(x: np.ndarray, y: np.ndarray) -> float:
        return neighbours.accuracy(x, gallery, y, query, neighbours=5)

    calibration, test = (tuple(padded([codes[i] for i in part])) for part in parts)
    model = place.asset("minilm_l3.onnx")
    return Task("MiniLM-L3 on glosses", model, SENTENCE, calibration, test, {"5-nn": vote})


def encoded_glosses(place: Place) -> tuple[list[Encoding], np.ndarray, list[np.ndarray]]:
    """Token numbers and class of every gloss, and the places of the two sets, by length."""
    per_class = GLOSSES_PER_CLASS // (20 if place.quick else 1)
    texts, labels = _nouns(place.asset("data.noun"), per_class)
    tokenizer = Tokenizer.from_file(str(place.asset("minilm_l6/tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MOST_TOKENS)
    codes = tokenizer.encode_batch(texts)
    # Of equal length together, so that batches hold little padding.
    parts = [
        np.array(sorted(part, key=lambda place: len(codes[place])))
        for part in _split(labels, CLASSES, share=0.5)
    ]
    return codes, labels, parts


def fashion(place: Place) -> Task:
    """The bundled classifier on the bundled images."""
    session = open_session(example.MODEL)
    step = 8 if place.quick else 1
    parts = [
        Source(str(path)).open(example.MODEL, session)
        for path in (example.CALIBRATION, example.TEST)
    ]
    calibration, test = (part.take(range(0, part.samples, step)) for part in parts)
    truth = np.array(read_labels(example.TEST, test))

    def top1(_: np.ndarray, logits: np.ndarray) -> float:
        return float((logits.argmax(axis=1) == truth).mean())

    batches = [tuple(part.batches(FASHION_BATCH)) for part in (calibration, test)]
    return Task("Fashion ViT", example.MODEL, "logits", batches[0], batches[1], {"top-1": top1})


def _split(
    labels: np.ndarray, classes: int, *, share: float, every: int = 1, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the samples to calibrate and to test on: ``share`` and the rest of each class."""
    rng = np.random.default_rng(seed)
    first, second = [], []
    for label in range(classes):
        members = rng.permutation(np.flatnonzero(labels == label))[::every]
        count = round(share * len(members))
        first.append(members[:count])
        second.append(members[count:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def definitions(path: Path) -> list[str]:
    """Every gloss of WordNet's file of nouns, in its order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.partition("| ")[2].strip() for line in lines if not line.startswith(" ")]


def _nouns(path: Path, per_class: int) -> tuple[list[str], np.ndarray]:
    """Glosses of the commonest classes, each of one noun only, and their classes."""
    rows = [
        (line.split(maxsplit=2)[1], line.partition("| ")[2].strip())
        for line in path.read_text(encoding="utf-8").splitlines()
        if not line.startswith(" ")
    ]
    common = [name for name, _ in Counter(name for name, _ in rows).most_common(CLASSES)]
    uses = Counter(text for _, text in rows)
    rng = np.random.default_rng(SEED)
    texts: list[str] = []
    for name in common:
        own = [text for label, text in rows if label == name and uses[text] == 1]
        texts += [own[place] for place in rng.permutation(len(own))[:per_class]]
    return texts, np.repeat(np.arange(CLASSES), per_class)


def padded(codes: Sequence[Encoding]) -> Iterator[Batch]:
    """Token numbers in batches, filled up to the longest of each."""
    left = iter(codes)
    while batch := list(islice(left, GLOSS_BATCH)):
        ids = np.zeros((len(batch), max(len(code) for code in batch)), np.int64)
        mask = np.zeros_like(ids)
        for row, code in enumerate(batch):
            ids[row, : len(code)] = code.ids
            mask[row, : len(code)] = 1
        yield {"input_ids": ids, "attention_mask": mask}
