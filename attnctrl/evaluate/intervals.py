"""Uncertainty of a measured rate, and whether two methods differ on the same items.

Wilson, "Probable inference, the law of succession, and statistical inference" (1927); McNemar, "Note on the sampling error
of the difference between correlated proportions or percentages" (1947), here in its exact binomial form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import AttnCtrlError


Z95 = 1.959963984540054


def wilson(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Lower and upper end, in 0-1, of the Wilson interval of `right / total`; (0, 1) when nothing was counted."""
    if not 0 <= right <= total:
        raise AttnCtrlError(
            f"{right} right of {total} is no rate\nHINT: wilson(right, total) wants 0 <= right <= total"
        )
    if total == 0:
        return 0.0, 1.0
    rate = right / total
    middle = rate + z * z / (2 * total)
    spread = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if right == 0 else (middle - spread) / scale
    high = 1.0 if right == total else (middle + spread) / scale
    return low, high


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p value that two methods, judged on the same items, are equally often right."""
    a, b = _paired(first, second, bool)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `second - first` over shared items, and the 95 % percentile interval of that mean."""
    a, b = _paired(first, second, float)
    gain = b - a
    picks = np.random.default_rng(seed).integers(len(gain), size=(resamples, len(gain)))
    low, high = np.quantile(gain[picks].mean(1), [0.025, 0.975])
    return float(gain.mean()), float(low), float(high)


def percent(right: int, total: int) -> str:
    """ "97 / 100 | 97.0 % | 91.5 - 99.0": the three cells of a result table."""
    low, high = wilson(right, total)
    rate = f"{100 * right / total:.1f} %" if total else "-"
    return f"{right} / {total} | {rate} | {100 * low:.1f} - {100 * high:.1f}"


def _paired(first: Sequence, second: Sequence, kind: type) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=kind), np.asarray(second, dtype=kind)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise AttnCtrlError(
            f"a paired comparison needs two equally long lists, not shapes {a.shape} and {b.shape}\n"
            "HINT: judge both methods on the same prompts and seeds"
        )
    return a, b
