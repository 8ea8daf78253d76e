"""SoftPAG: perturbation guidance with chosen attention heads and a continuous strength.

Ahn, Kang et al., "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models", 2025,
arXiv 2506.10978; identity attention in the weak pass is PAG, Ahn et al., 2024, arXiv 2403.17377.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..attention import Lerp
from ..errors import AttnCtrlError
from ..heads import HeadBatch, HeadSet
from ..schedule import parse_layers
from ..sites import Site, Tokens
from .base import Control, Edit


Target = Literal["identity", "uniform", "mean_query"]


@dataclass(frozen=True, eq=False)
class SoftPAG(Control):
    """Guidance away from a pass whose chosen heads are blended toward a weak target.

    final = uncond + g·(cond − uncond) + scale·(cond − perturbed), with or without classifier-free guidance. In the perturbed
    pass the output of every chosen head is ``lerp(o, target, strength)``: A' = (1−u)·A + u·T with T the identity matrix, the
    uniform matrix, or the attention row of the mean query (after norm and rotary embedding) for all rows. No N x N matrix.

    Args:
        heads: a `HeadSet` or anything that `HeadSet.parse` reads; a `HeadBatch` for one set per image of the batch (the heads of
            image i are what a run with its set alone would perturb); None for every head of `layers`.
        layers: layer numbers as `parse_layers` reads them; None for all layers. With `heads` given, keeps only these layers.
        strength: u, 0 (off) to 1 (the heads attend to the target alone); multiplied by each head's weight.
        scale: w, always +w·(cond − perturbed).
        target: "identity" (each token sees itself), "uniform" (all keys alike) or "mean_query".
        region: "all" perturbs every row of the sequence, text rows too (what published head sets were found with); "image"
            only image rows, and among image keys only, so that the prompt still reaches the image.
        mode: for target "identity" with region "image". "mask": the token itself against the text keys, as if the other image
            tokens were masked; "mass": the row keeps its share of image and text.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high), the noise levels at which the control acts besides; None for all. See `Schedule`.
        weight: `weight(fraction, sigma) -> float` multiplies the scale at every step.
    """

    heads: HeadSet | HeadBatch | str | Iterable | None = None
    layers: str | int | Iterable[int] | None = None
    strength: float = 1.0
    scale: float = 3.0
    target: Target = "identity"
    region: Literal["all", "image"] = "all"
    mode: Literal["mask", "mass"] = "mask"
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None
    weight: Callable[[float, float | None], float] | None = None

    guides = True

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        if self.target not in get_args(Target):
            wrong.append(f"target={self.target!r} is not one of {', '.join(get_args(Target))}")
        if self.region not in ("all", "image"):
            wrong.append(f"region={self.region!r} is neither 'all' nor 'image'")
        if self.mode not in ("mask", "mass"):
            wrong.append(f"mode={self.mode!r} is neither 'mask' nor 'mass'")
        if wrong:
            raise AttnCtrlError("SoftPAG: " + "; ".join(wrong))
        if self.heads is not None:
            if not isinstance(self.heads, HeadBatch):
                object.__setattr__(self, "heads", HeadSet.parse(self.heads))
            if any(not 0 <= self.strength * weight <= 1 for weight in self.heads.weights):
                raise AttnCtrlError("SoftPAG: strength times a head's weight leaves 0-1")
        self.schedule

    @property
    def neutral(self) -> bool:
        unused = self.heads is not None and not any(self.heads.weights)
        return self.strength == 0 or self.scale == 0 or unused

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        primary = [site for site in sites if site.primary]
        layers = set(parse_layers(self.layers, len(primary)))
        if self.heads is None:
            weights = {site.path: torch.ones(site.heads) for site in primary if site.layer in layers}
        else:
            weights = self.heads.resolve(sites)
            if self.layers is not None:
                weights = {
                    site.path: weights[site.path] for site in sites if site.path in weights and site.layer in layers
                }
                if not weights:
                    raise AttnCtrlError(f"SoftPAG: none of the heads {self.heads} is in layers {self.layers!r}")
        return {path: weight * self.strength for path, weight in weights.items() if weight.any()}

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        region = tokens.span("image") if self.region == "image" and len(tokens.streams) > 1 else None
        return Edit(lerps=(Lerp(self.target, heads, region=region, mode=self.mode),))
