"""Calibration: run the model on unlabelled inputs and gather the moments of every axis."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from threadpoolctl import threadpool_limits

from corp_onnx.blocks import Catalog, axes_of
from corp_onnx.calibration.moments import Moments
from corp_onnx.calibration.resume import Partial
from corp_onnx.calibration.scarcity import require_enough
from corp_onnx.calibration.sites import Site, Thinning
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.data.dataset import Dataset
from corp_onnx.data.samples import drawn, enriched, held_apart
from corp_onnx.device import HOST, Device
from corp_onnx.errors import DataError, NothingPrunable
from corp_onnx.graph.extracts import exposed
from corp_onnx.graph.model import Model
from corp_onnx.session import Runtime, open_session

log = logging.getLogger(__name__)

BATCH_SIZE = 8
MOST_SEEN = 32


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
            size = samples_in(batch)
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


def _tensors(sites: Iterable[Site]) -> list[str]:
    return list(itertools.chain.from_iterable(site.tensors() for site in sites))
