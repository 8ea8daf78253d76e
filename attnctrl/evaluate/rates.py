"""Measured rates with their 95 % intervals, of single items or of groups that belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .intervals import wilson


@dataclass(frozen=True)
class Rate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """ "97.0 (91.5 - 99.0)"."""
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} - {100 * self.high:.1f})"

    def plain(self) -> list[float]:
        return [round(number, 6) for number in (self.value, self.low, self.high)]


def share(right: int, total: int) -> Rate:
    """`right` of `total` with its Wilson interval; of nothing, 0 with the interval 0 - 1."""
    return Rate(right / total if total else 0.0, *wilson(right, total))


def resampled(
    counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, resamples: int = 2000, seed: int = 0
) -> Rate:
    """A statistic of sums, with the percentile interval of a bootstrap over groups.

    Args:
        counts: (groups, k), one row per picture, say: what lies in one group is not independent.
        statistic: sums (..., k) -> values (...).
    """
    counts = np.asarray(counts, dtype=np.float64)
    weights = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples)
    low, high = np.quantile(statistic(weights @ counts), [0.025, 0.975])
    return Rate(float(statistic(counts.sum(0))), float(low), float(high))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(np.asarray(whole, dtype=np.float64)), where=whole > 0)
