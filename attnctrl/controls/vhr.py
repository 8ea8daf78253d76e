"""Vision-aware head reinforcement: the heads whose output the image changes most are made louder.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", 2024, arXiv 2412.13949.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.rows import Tally
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Model, Prompt, check_strength


@dataclass(frozen=True, eq=False)
class VHR(LanguageControl):
    """Multiplies the output z of heads that react to the image, before the output projection, in all rows:

        z_h <- (1 + strength·(alpha − 1))·z_h       for heads above the median divergence of their layer

    The divergence is ‖z_h(prompt) − z_h(prompt without its image tokens)‖₂ at the prompt's last token. It counts as 0 where it and
    ‖z_h(without)‖² both lie more than a standard deviation above their layer's mean: such a head answers to the text. Layers are measured
    in order, each with the earlier ones reinforced in both readings, so that the cache of the prompt is consistent. Heads are chosen when
    a prompt is begun and kept until the next one; a prompt without an image keeps its heads as they are.

    The text without the image is read twice: once for what the layers are called with, once layer by layer. Other controls do not act
    in it.

    Args:
        alpha: 2 in the paper; 1 is off, from 4 on texts degenerate.
        layers: the second and the last 14 of 32 in the paper (LLaVA-1.5 and LLaVA-NeXT; the last 18 in InstructBLIP): None takes the
            same parts of any model.
        heads: choose among these only; their weights multiply the strength.
        strength: 0 (off) to 1.
    """

    alpha: float = 2.0
    layers: str | int | Iterable[int] | None = None
    heads: HeadSet | str | Iterable | None = None
    strength: float = 1.0

    compares = True

    def __post_init__(self) -> None:
        wrong = [] if math.isfinite(self.alpha) else [f"alpha={self.alpha} is not a finite number"]
        check_strength("VHR", self.strength, wrong)
        object.__setattr__(self, "tally", Tally())  # of one attachment: `fit` makes a copy

    @property
    def neutral(self) -> bool:
        return self.alpha == 1 or self.strength == 0

    def fit(self, model: Model) -> VHR:
        super().fit(model)
        return replace(self)

    def default_layers(self, count: int) -> Any:
        return sorted({min(1, count - 1), *range(count - max(1, round(count * 14 / 32)), count)})

    def compare(self, site: Site, prompt: Prompt, image: Tensor, text: Tensor) -> None:
        has_image = torch.tensor([at is not None for at in prompt.first_image], device=image.device)
        chosen = reacting_heads(image, text) & has_image[:, None]
        prompt.notes[(self, site.layer)] = chosen
        self.tally.add(layers=1.0, heads=chosen.sum(), prompts=has_image.sum())

    def head_scale(self, site: Site, prompt: Prompt, weights: Tensor) -> Tensor:
        chosen = prompt.notes[(self, site.layer)]
        return 1 + (self.strength * (self.alpha - 1)) * weights.to(chosen.device) * chosen

    def says(self) -> tuple[str, ...]:
        if not self.tally["prompts"]:
            return ()
        return (f"VHR: reinforced {self.tally['heads'] / self.tally['prompts']:.3g} heads a layer and prompt",)


def reacting_heads(image: Tensor, text: Tensor) -> Tensor:
    """Which heads react to the image, (B, H) bool, from their outputs (B, H, D) with it and without it."""
    image, text = (z if z.dtype == torch.float64 else z.float() for z in (image, text))
    divergence, size = (image - text).norm(dim=-1), text.square().sum(-1)
    divergence = divergence.masked_fill(_outlying(divergence) & _outlying(size), 0.0)
    return divergence > divergence.median(1, keepdim=True).values


def _outlying(x: Tensor) -> Tensor:
    return x > x.mean(1, keepdim=True) + x.std(1, keepdim=True)
