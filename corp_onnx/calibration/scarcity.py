"""Whether there are samples enough: for every axis, for some of them, or for none.

An axis needs more tokens than it has channels. Where one sees a single token of a sample, as behind
a pooled feature map or a class token alone, while others see many, thousands of samples would be
asked for its sake. It is left as it is instead, and that is said.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import ceil

from corp_onnx.blocks import Axis, Block, Catalog, axes_of
from corp_onnx.blocks.withheld import withheld
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.samples import HELD_OUT_SHARE, MOST_HELD_OUT
from corp_onnx.errors import DataError, TooFewSamples

log = logging.getLogger(__name__)

ENOUGH_TOKENS_PER_CHANNEL = 10

ROLES: Mapping[Axis, tuple[str, ...]] = {
    "mlp": ("hidden",),
    "qk": ("query", "key"),
    "vo": ("context",),
}
"""The sites of every axis that have to see enough."""


def require_enough(statistics: Statistics) -> None:
    """Fail where an axis has more channels than tokens, warn where it has few.

    Axes that `spared` would leave alone need nothing.

    Raises:
        TooFewSamples: If there is such an axis; says how many samples would do for all of them.
        DataError: If every token is masked.
    """
    lone = _lone(statistics)
    per_channel = {
        name: moments.count / moments.width
        for name, moments in statistics.sites.items()
        if name not in lone or moments.count >= moments.width
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


def spared(catalog: Catalog, statistics: Statistics, samples: float | None = None) -> Catalog:
    """Leave alone what sees a single token of a sample, and fewer of them than it has channels.

    Args:
        catalog: The blocks of a model.
        statistics: Of all samples, or of a few of them.
        samples: How many there are in all, where the statistics are of a few.
    """
    given = _pictures(statistics) if samples is None else samples
    return withheld(
        catalog, {block.id: _scarce(block, statistics, given) for block in catalog.blocks}
    )


def _scarce(block: Block, statistics: Statistics, given: float) -> Mapping[Axis, str]:
    """Axes of a block for which there are too few samples, one token each, and why."""
    lone = _lone(statistics)
    twins = block.twins or (block.id,)
    return {
        axis: _reason(width, given)
        for axis in axes_of(block)
        for role in ROLES[axis]
        if lone.issuperset(sites := [f"{twin}.{role}" for twin in twins])
        and (width := statistics.sites[sites[0]].width) > given * len(twins)
    }


def _lone(statistics: Statistics) -> frozenset[str]:
    """Sites that see one token of a sample, where others see more."""
    pictures = max(_pictures(statistics), 1)
    tokens = {name: round(one.count / pictures) for name, one in statistics.sites.items()}
    if max(tokens.values(), default=0) <= 1:
        return frozenset()
    return frozenset(name for name, count in tokens.items() if count == 1)


def _pictures(statistics: Statistics) -> int:
    """Samples, where all crops of a picture are one."""
    return round(statistics.samples / statistics.crops)


def _reason(width: int, given: float) -> str:
    return (
        f"it sees a single token of a sample, and {given:g} samples are fewer than its {width} "
        f"channels; give at least {_needed(width, 1)} to cut it"
    )


def _too_few(statistics: Statistics, site: str) -> DataError:
    """What to say of a site that has more channels than tokens."""
    moments = statistics.sites[site]
    if not moments.count:
        return DataError(
            f"no token of {statistics.source or 'the data'} reaches {site}: its mask hides all of "
            "them; check the mask among the inputs"
        )
    samples = _pictures(statistics)
    needed = _needed(moments.width, moments.count / samples)
    return TooFewSamples(
        f"{samples} samples give {moments.count} tokens, fewer than the "
        f"{moments.width} channels of {site}; give at least {needed} "
        f"samples ({ENOUGH_TOKENS_PER_CHANNEL} tokens per channel, and some to verify with)"
    )


def _needed(width: int, per_sample: float) -> int:
    """Samples of so many tokens that are enough, with those to verify with."""
    used = ceil(ENOUGH_TOKENS_PER_CHANNEL * width / per_sample)
    held_out = ceil(used * HELD_OUT_SHARE / (1 - HELD_OUT_SHARE))
    return used + min(MOST_HELD_OUT, held_out)
