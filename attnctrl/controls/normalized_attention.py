"""Normalized attention guidance (NAG): negative prompts where classifier-free guidance is missing or fails.

Chen et al., "Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models", 2025, arXiv 2505.21179.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..attention import KeyGroup, NegativeText, Segment, as_tokens
from ..errors import AttnCtrlError
from ..regions import Region
from ..schedule import parse_layers
from ..sites import Site, Tokens
from .base import Control, Edit


@dataclass(frozen=True, eq=False)
class NormalizedAttention(Control):
    """Pushes the attention output of image tokens away from a negative prompt, in every pass, without a pass of its own.

    With Z⁺ and Z⁻ the output of an image token, all heads together, given the prompt or the negative prompt:

        Z = s·Z⁺ − (s−1)·Z⁻      r = ‖Z‖ / ‖Z⁺‖      Ẑ = Z·min(r, tau)/r      out = alpha·Ẑ + (1−alpha)·Z⁺

    The negative prompt is appended to the text. Prompt and image never see it, it sees the image and itself; the image's own
    keys are shared, so an attention call costs one more small call. Works with distilled models and few steps, and beside CFG,
    where it changes the conditional rows.

    Args:
        negative_prompt: what the picture should not show; "" is the empty prompt.
        scale: s; 1 is off. This is not the w of a perturbed pass.
        tau: how much the norm of a token may grow.
        alpha: share of the guided output, 0 (off) to 1.
        norm: "l2", as the published code computes it, or "l1", as the paper writes it.
        layers: layers that are guided, as `parse_layers` reads them; None for all. The others follow the prompt alone.
        start, stop: fractions of the steps; outside them the model runs without the extra tokens.
        sigma: (low, high), the noise levels at which the control acts besides; None for all. See `Schedule`.
    """

    negative_prompt: str = ""
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    norm: Literal["l2", "l1"] = "l2"
    layers: str | int | Iterable[int] | None = None
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None

    shapes = True

    def __post_init__(self) -> None:
        wrong = []
        if not isinstance(self.negative_prompt, str):
            wrong.append(f"negative_prompt={self.negative_prompt!r} is not a text")
        if not math.isfinite(self.scale):
            wrong.append(f"scale={self.scale} is not a finite number; 1 is off")
        if not 0 < self.tau < math.inf:
            wrong.append(f"tau={self.tau} is not above 0 and finite")
        if not 0 <= self.alpha <= 1:
            wrong.append(f"alpha={self.alpha} is not between 0 (off) and 1")
        if self.norm not in ("l2", "l1"):
            wrong.append(f"norm={self.norm!r} is neither 'l2' nor 'l1'")
        if wrong:
            raise AttnCtrlError("NormalizedAttention: " + "; ".join(wrong))
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @property
    def neutral(self) -> bool:
        return self.scale == 1 or self.alpha == 0

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Every site with text: the negative prompt is kept apart in all layers, 1 where it also guides."""
        text = [site for site in sites if site.kind in ("joint", "cross")]
        if not text:
            raise AttnCtrlError("NormalizedAttention needs attention to a text; this model has none")
        layers = parse_layers(self.layers, len({site.layer for site in text}))
        return {site.path: torch.full((site.heads,), float(site.layer in layers)) for site in text}

    def regions_in_use(self) -> tuple[Region, ...]:
        return (Region(self.negative_prompt, box=(0, 0, 1, 1)),)

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        if not bool(heads.any()):
            return self._apart(site, tokens, without=("text",))
        image = slice(0, None) if site.kind == "cross" else tokens.span("image")
        texts = tokens.span("text"), tokens.span("region:0")
        return Edit(negative=NegativeText(image, *texts, self.scale, self.tau, self.alpha, self.norm))

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        return self._apart(site, tokens, without=[name for name, *_ in tokens.streams if name != "region:0"])

    def _apart(self, site: Site, tokens: Tokens, without: Iterable[str]) -> Edit:
        """Attention without the negative prompt, whose own rows see all but some streams."""
        own = tokens.span("region:0")
        rest = _all_but(tokens, ("region:0",))
        if site.kind == "cross":
            return Edit(segments=(Segment(slice(0, None), (KeyGroup(rest),)),))
        keys = KeyGroup(_all_but(tokens, without))
        return Edit(segments=(Segment(rest, (KeyGroup(rest),)), Segment(own, (keys,))))


def _all_but(tokens: Tokens, names: Iterable[str]) -> slice | torch.Tensor:
    kept = torch.ones(tokens.length, dtype=torch.bool)
    for name in names:
        kept[tokens.span(name)] = False
    return as_tokens(kept)
