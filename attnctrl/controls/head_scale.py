"""Attention heads turned down, off or up: what a head contributes, seen by its absence.

Head masking as in Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv 1905.10650.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..errors import AttnCtrlError
from ..heads import HeadBatch, HeadSet
from ..sites import Site, Tokens
from .base import Control, Edit


@dataclass(frozen=True, eq=False)
class HeadScale(Control):
    """Multiplies the output of chosen heads, before the output projection.

        out_h ← (1 + strength·weight_h·(factor − 1))·out_h

    Without `scale` that is done in the model's own pass, in the conditional rows. With `scale` it makes a perturbed pass to
    guide away from: final = uncond + g·(cond − uncond) + scale·(cond − perturbed).

    Args:
        heads: a `HeadSet` or anything that `HeadSet.parse` reads, or a `HeadBatch`. Its weights multiply the strength.
        strength: 0 (off: heads stay as they are) to 1 (full: heads are multiplied by `factor`).
        factor: 0 switches heads off, 2 doubles them.
        scale: None, or the w of a perturbed pass.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high), the noise levels at which the control acts besides; None for all. See `Schedule`.
        weight: `weight(fraction, sigma) -> float` multiplies `scale` at every step.
    """

    heads: HeadSet | HeadBatch | str | Iterable
    strength: float = 1.0
    factor: float = 0.0
    scale: float | None = None
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None
    weight: Callable[[float, float | None], float] | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.heads is None:
            wrong.append("heads=None selects nothing")
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        if not math.isfinite(self.factor):
            wrong.append(f"factor={self.factor} is not a finite number")
        if self.weight is not None and self.scale is None:
            wrong.append("weight multiplies a scale, and there is none")
        if wrong:
            raise AttnCtrlError("HeadScale: " + "; ".join(wrong) + "\nHINT: HeadScale('3.5', factor=0.0)")
        if not isinstance(self.heads, HeadBatch):
            object.__setattr__(self, "heads", HeadSet.parse(self.heads))
        self.schedule

    @property
    def guides(self) -> bool:
        return self.scale is not None

    @property
    def neutral(self) -> bool:
        return self.strength == 0 or self.factor == 1 or self.scale == 0 or not any(self.heads.weights)

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        found = {path: weights * self.strength for path, weights in self.heads.resolve(sites).items()}
        if any(((weights < 0) | (weights > 1)).any() for weights in found.values()):
            raise AttnCtrlError(
                "HeadScale: strength times a head's weight leaves 0-1\nHINT: factor multiplies the heads"
            )
        return {path: weights for path, weights in found.items() if weights.any()}

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        return Edit(head_scale=1 + heads * (self.factor - 1))
