"""Smoothed energy guidance (SEG): guidance away from a pass whose image queries are blurred.

Hong, "Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention", 2024, arXiv 2408.00760.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..attention import Lerp
from ..errors import AttnCtrlError
from ..heads import HeadBatch, HeadSet
from ..schedule import Schedule, parse_layers
from ..sites import Site, Tokens
from .base import Control, Edit


@dataclass(frozen=True, eq=False)
class SmoothedEnergy(Control):
    """Guidance away from a pass with blurred attention logits.

    final = uncond + g·(cond − uncond) + scale·(cond − perturbed). In the perturbed pass the image queries of the chosen heads
    are convolved with a Gaussian over the token grid, which blurs the logits along the query axis; text rows stay as they
    are. Queries are blurred as attention gets them, after norms and rotary embedding.

    Args:
        layers: layer numbers as `parse_layers` reads them; None for all layers. With `heads` given, keeps only these layers. The
            paper takes the middle block of a UNet.
        heads: a `HeadSet` or anything that `HeadSet.parse` reads, or a `HeadBatch`; None for every head of `layers`.
        sigma: width of the Gaussian in image tokens. Infinity gives every image row the attention of the mean query, which is not
            the limit of wide Gaussians: those are cut at the size of the image. Up to 1/6 nothing is blurred.
        strength: u, 0 (off) to 1; blends the outputs, times each head's weight.
        scale: w, always +w·(cond − perturbed).
        start, stop: fractions of the steps, the first step included.
        sigma_range: (low, high), the noise levels at which the control acts besides; None for all. Other controls call it `sigma`.
        weight: `weight(fraction, sigma of the step) -> float` multiplies the scale at every step.
    """

    layers: str | int | Iterable[int] | None = None
    heads: HeadSet | HeadBatch | str | Iterable | None = None
    sigma: float = math.inf
    strength: float = 1.0
    scale: float = 3.0
    start: float = 0.0
    stop: float = 1.0
    sigma_range: tuple[float, float] | None = None
    weight: Callable[[float, float | None], float] | None = None

    guides = True

    def __post_init__(self) -> None:
        wrong = []
        if isinstance(self.sigma, (tuple, list)):
            wrong.append(
                f"sigma={self.sigma} is no width of a Gaussian; a range of noise levels goes into sigma_range"
            )
        elif not self.sigma > 0:
            wrong.append(f"sigma={self.sigma} is not above 0")
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        if wrong:
            raise AttnCtrlError("SmoothedEnergy: " + "; ".join(wrong))
        if self.heads is not None and not isinstance(self.heads, HeadBatch):
            object.__setattr__(self, "heads", HeadSet.parse(self.heads))
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.start, self.stop, self.sigma_range, self.weight)

    @property
    def neutral(self) -> bool:
        unused = self.heads is not None and not any(self.heads.weights)
        return self.strength == 0 or self.scale == 0 or 6 * self.sigma <= 1 or unused

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        primary = [site for site in sites if site.primary]
        layers = parse_layers(self.layers, len({site.layer for site in primary}))
        if self.heads is None:
            found = {s.path: torch.ones(s.heads) for s in primary if s.layer in layers and s.kind != "cross"}
        else:
            kept = {site.path for site in sites if self.layers is None or site.layer in layers}
            found = {path: weights for path, weights in self.heads.resolve(sites).items() if path in kept}
        wrong = [site.path for site in sites if site.path in found and site.kind == "cross"]
        if wrong:
            raise AttnCtrlError(f"SmoothedEnergy blurs self-attention; {', '.join(wrong)} attends to the text alone")
        if not found:
            chosen = f"none of the heads {self.heads} is in" if self.heads is not None else "no self-attention is in"
            raise AttnCtrlError(f"SmoothedEnergy: {chosen} layers {self.layers!r}")
        found = {path: weights * self.strength for path, weights in found.items()}
        if any(((weights < 0) | (weights > 1)).any() for weights in found.values()):
            raise AttnCtrlError("SmoothedEnergy: strength times a head's weight leaves 0-1")
        return {path: weights for path, weights in found.items() if weights.any()}

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        region = tokens.span("image") if len(tokens.streams) > 1 else None
        return Edit(lerps=(Lerp("smoothed", heads, region=region, sigma=self.sigma, grid=tokens.grid),))
