"""Calibration: run the model on unlabelled inputs and gather the moments of every axis."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from corp_onnx.blocks import Catalog, axes_of
from corp_onnx.data import Dataset
from corp_onnx.device import HOST, Device
from corp_onnx.errors import DataError, NothingPrunable, TooFewSamples
from corp_onnx.extracts import exposed
from corp_onnx.graph import Model
from corp_onnx.moments import Moments
from corp_onnx.resume import Partial
from corp_onnx.session import Runtime, open_session
from corp_onnx.sites import Site, Thinning
from corp_onnx.statistics import Batch, Statistics

log = logging.getLogger(__name__)

BATCH_SIZE = 8
HELD_OUT_SHARE = 0.2
MOST_HELD_OUT = 32
MOST_SEEN = 32
ENOUGH_TOKENS_PER_CHANNEL = 10
FILLED, MOST_CROPS = 256, 4
"""Fewer pictures are filled up to so many inputs by crops, of each at most so many."""


def calibrate(
    model: Model,
    catalog: Catalog,
    data: Dataset,
    *,
    batch_size: int = BATCH_SIZE,
    runtime: Runtime | None = None,
    seed: int = 0,
    crops: int | None = 1,
    partial: Partial | None = None,
    device: Device = HOST,
    on_batch: Callable[[int], None] = lambda samples: None,
) -> Statistics:
    """Moments of every axis that can be cut, over all samples but those held out.

    Activations are read as outputs of the dense graph, batch by batch; memory does not grow with
    the number of samples. Blocks are summed side by side, each on one thread: many small products
    gain nothing from threads of their own. Positions that nobody may attend to (padding) count in
    no moment.

    Args:
        model: The dense model.
        catalog: Its blocks.
        data: Unlabelled samples; a share of them is held out, to verify with.
        batch_size: Samples per run.
        runtime: How the model is run.
        seed: Decides which samples are held out, and what crops show.
        crops: Inputs to make of every picture that is not held out, `enriched`. One of as
            many tokens counts, so that only running the model takes longer.
        partial: Keeps what is summed so far, and what an interrupted run has summed before.
        device: Where it is summed.
        on_batch: Called after every batch with its number of samples.

    Raises:
        DataError: If an activation holds NaN or infinity.
        TooFewSamples: If an axis has more channels than there are tokens.
        NothingPrunable: If no block has an axis that statistics are needed for.
    """
    held_out, used = held_apart(data, seed)
    used = enriched(used, crops, seed)
    earlier = partial.load(model.fingerprint.sha256) if partial else None
    statistics = gather(
        model,
        catalog,
        used.batches(batch_size, after=earlier.samples if earlier else 0),
        runtime=runtime,
        source=data.source,
        crops=used.crops,
        seed=seed,
        earlier=earlier,
        keep=partial.keep if partial else None,
        device=device,
        on_batch=on_batch,
    )
    require_enough(statistics)
    seen = tuple(drawn(used, MOST_SEEN, seed).batches(batch_size))
    return replace(
        statistics,
        source=data.source,
        seen=seen,
        held_out=tuple(held_out.batches(batch_size)),
    )


def gather(
    model: Model,
    catalog: Catalog,
    batches: Iterable[Batch],
    *,
    runtime: Runtime | None = None,
    source: str = "",
    crops: float = 1.0,
    seed: int = 0,
    earlier: Statistics | None = None,
    keep: Callable[[Callable[[], Statistics]], None] | None = None,
    device: Device = HOST,
    on_batch: Callable[[int], None] = lambda samples: None,
) -> Statistics:
    """Moments over exactly these batches, none held out and none too few.

    With ``earlier`` they are added to what was gathered before. ``keep`` is called after every
    batch and may ask for the statistics so far. Of every batch one in ``crops`` tokens counts,
    evenly spaced from a start that follows from the seed.

    Raises:
        DataError: If there are no batches, or an activation holds NaN or infinity.
        NothingPrunable: If no block has an axis that statistics are needed for.
    """
    sites = tuple(Site(block, device=device) for block in catalog.blocks if axes_of(block))
    if not sites:
        raise NothingPrunable(
            "no block of the model has an axis to calibrate; `corp-onnx inspect` says why"
        )
    runtime = replace(runtime or Runtime(), spinning=False)
    session = open_session(exposed(model, _tensors(sites)), runtime)
    samples = 0
    if earlier:
        on_batch(earlier.samples)

    def so_far() -> Statistics:
        new = replace(summed(sites, samples, source, model.fingerprint.sha256), crops=crops)
        return earlier + new if earlier else new

    with ThreadPoolExecutor(os.cpu_count()) as pool, threadpool_limits(1, user_api="blas"):
        for batch in batches:
            tensors = session.run(batch)
            before = samples + (earlier.samples if earlier else 0)
            thinning = Thinning.drawn(crops, seed, before)
            list(pool.map(lambda site, read=tensors, thin=thinning: site.add(read, thin), sites))
            size = len(next(iter(batch.values())))
            samples += size
            on_batch(size)
            if keep:
                keep(so_far)
    if not samples and not earlier:
        raise DataError(f"{source or 'the data'} holds no samples; give at least a few dozen")
    return so_far()


def summed(sites: Iterable[Site], samples: int, source: str, sha256: str) -> Statistics:
    """What the sites have summed."""
    moments: dict[str, Moments] = {}
    for site in sites:
        moments |= site.moments()
    energies = {site.block.id: site.energy() for site in sites if site.tokens}
    tokens = {site.block.id: site.tokens for site in sites if site.tokens}
    return Statistics(moments, energies, tokens, samples, source, sha256)


def enriched(data: Dataset, crops: int | None, seed: int, *, of: int = 1) -> Dataset:
    """Pictures with random crops of theirs: so many inputs of each, or as many as fill a small set.

    Args:
        data: What is calibrated on; samples that are no pictures stay as they are.
        crops: Inputs of every picture; None adds crops until there are ``FILLED`` inputs.
        seed: Of the crops.
        of: How many such parts there are in all.
    """
    if crops is not None:
        return data.augmented(crops, seed)
    return data.augmented(MOST_CROPS, seed, most=FILLED // of)


def require_enough(statistics: Statistics) -> None:
    """Fail where an axis has more channels than tokens, warn where it has few.

    Raises:
        TooFewSamples: If there is such an axis; says how many samples would do for all of them.
        DataError: If every token is masked.
    """
    per_channel = {
        name: moments.count / moments.width for name, moments in statistics.sites.items()
    }
    scarcest = min(per_channel, key=per_channel.__getitem__, default="")
    if scarcest and per_channel[scarcest] < 1:
        raise _too_few(statistics, scarcest)
    few = sum(tokens < ENOUGH_TOKENS_PER_CHANNEL for tokens in per_channel.values())
    if few:
        log.warning(
            "%s has only %.1f tokens per channel%s; the repair may fit the calibration data more "
            "than the task: %d or more are better",
            scarcest,
            per_channel[scarcest],
            f", and {few - 1} other sites have few" if few > 1 else "",
            ENOUGH_TOKENS_PER_CHANNEL,
        )


def _too_few(statistics: Statistics, site: str) -> DataError:
    """What to say of a site that has more channels than tokens."""
    moments = statistics.sites[site]
    if not moments.count:
        return DataError(
            f"no token of {statistics.source} reaches {site}: its mask hides all of them; check "
            "the mask among the inputs"
        )
    samples = round(statistics.samples / statistics.crops)
    per_sample = moments.count / samples
    used = int(np.ceil(ENOUGH_TOKENS_PER_CHANNEL * moments.width / per_sample))
    held_out = int(np.ceil(used * HELD_OUT_SHARE / (1 - HELD_OUT_SHARE)))
    return TooFewSamples(
        f"{samples} samples give {moments.count} tokens, fewer than the "
        f"{moments.width} channels of {site}; give at least {used + min(MOST_HELD_OUT, held_out)} "
        f"samples ({ENOUGH_TOKENS_PER_CHANNEL} tokens per channel, and some to verify with)"
    )


def _tensors(sites: Iterable[Site]) -> list[str]:
    return list(itertools.chain.from_iterable(site.tensors() for site in sites))


def drawn(data: Dataset, most: int, seed: int) -> Dataset:
    """A random choice of samples, in the order of the data."""
    order = np.random.default_rng(seed).permutation(data.samples)
    return data.take(np.sort(order[: max(most, data.fixed_batch or 1)]))


def held_apart(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Some samples to verify with, and all others."""
    fixed = data.fixed_batch or 1
    wanted = min(MOST_HELD_OUT, round(HELD_OUT_SHARE * data.samples))
    count = max(fixed, wanted - wanted % fixed)
    if data.samples < count + fixed:
        log.warning("there are too few samples to hold any out; verifying with those calibrated on")
        return data, data
    order = np.random.default_rng(seed).permutation(data.samples)
    return data.take(np.sort(order[:count])), data.take(np.sort(order[count:]))
