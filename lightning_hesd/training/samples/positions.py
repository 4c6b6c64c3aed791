"""Positions of batches that represent an epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    Positions = np.ndarray[Any, np.dtype[np.int64]]

PERIODS = np.arange(2, 33)
"""Periods k: every k-th batch of an epoch is represented in proportion, whatever its remainder."""

MAX_TRIED = 32
"""Maximal number of gaps between runs of positions that are tried, from the widest one downward."""


def spread_positions(count: int, total: int, *, evenness: float = 0.3) -> list[int]:
    """Choose positions that represent an epoch.

    A term of the loss may be active in every k-th batch only, or change with the position. The positions have the right
    proportion of both as nearly as possible, for all k up to 32. (Positions at equal distances would contain every
    second batch, for example, always or never.) They are the best of some candidates: runs of consecutive positions at
    equal distances, and random positions, one from each of equal sections of the epoch.

    Args:
        count: Number of positions.
        total: Number of batches in an epoch.
        evenness: Weight of an even spread over the epoch, relative to the proportions of every k-th batch.

    Returns:
        The positions, ascending; all positions if there are at most `count`.

    Examples:
        >>> spread_positions(4, 16)
        [5, 6, 9, 10]
    """
    if count >= total:
        return list(range(total))
    rests = np.concatenate([np.arange(period) for period in PERIODS])
    periods = np.repeat(PERIODS, PERIODS)
    expected = count * np.ceil((total - rests) / periods).clip(0) / total
    first = (np.cumsum(PERIODS) - PERIODS)[:, None]
    middles = (np.arange(count) + 0.5) / count * total

    def imbalance(positions: Positions) -> float:
        """Return the largest error of the proportions, in batches, plus the weighted error of the spread."""
        found = np.bincount((positions % PERIODS[:, None] + first).ravel(), minlength=len(expected))
        uneven = np.abs(positions + 0.5 - middles).max() * count / total
        return float(np.abs(found - expected).max() + evenness * uneven)

    best: list[int] = min(_candidates(count, total), key=imbalance).tolist()
    return best


def _candidates(count: int, total: int) -> Iterator[Positions]:
    """Yield candidates, fewer for larger `count`."""
    tried = max(1, min(MAX_TRIED, MAX_TRIED * 256 // count))
    numbers = np.arange(count)
    for run in sorted({max(1, round(count / 2**halvings)) for halvings in range(count.bit_length() + 1)}):
        runs = math.ceil(count / run)
        widest = (total - count) // (runs - 1) if runs > 1 else 0
        for gap in range(max(0, widest - tried + 1), widest + 1):
            positions = numbers + gap * (numbers // run)
            yield positions + (total - 1 - positions[-1]) // 2
    ends = np.arange(count + 1) * total // count
    generator = np.random.default_rng(0)
    for _ in range(4 * tried):
        yield generator.integers(ends[:-1], ends[1:])
