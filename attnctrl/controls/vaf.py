"""Visual amplification fusion: the image louder, the system prompt quieter, in the layers where image and text meet.

Yin et al., "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language Models", 2025,
arXiv 2503.13107.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attention.rows import Gain, RowEdit
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Prompt, check_strength, not_finite, per_head, scaled


@dataclass(frozen=True, eq=False)
class VAF(LanguageControl):
    """Scales scores in the rows behind the last image, of the prompt and of what is generated:

        s_j <- (1 + strength·(image − 1))·s_j       j in the image
        s_j <- (1 + strength·(system − 1))·s_j      j in the text before the first image

    which equals scaling these keys for these rows. Negative scores move away from zero too: a factor above 1 lowers them.

    Args:
        image: 1.15 in the authors' code; 1 leaves the image alone.
        system: 0.95 in the authors' code (0.9 is also found); 1 leaves the system prompt alone.
        layers: layers 9 to 14 of 32 in the paper, which None scales to the depth of the model.
        heads: restrict to these heads; their weights multiply the strength.
        strength: 0 (off) to 1.
    """

    image: float = 1.15
    system: float = 0.95
    layers: str | int | Iterable[int] | None = None
    heads: HeadSet | str | Iterable | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength("VAF", self.strength, not_finite(self, "image", "system", above=0))

    @property
    def neutral(self) -> bool:
        return self.strength == 0 or (self.image == 1 and self.system == 1)

    def default_layers(self, count: int) -> Any:
        first = round(count * 9 / 32)
        return range(first, max(first + 1, round(count * 15 / 32)))

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        heads, by = per_head(weights)
        factor = prompt.keys(prompt.image, n_k).float() * (self.image - 1)
        factor = (factor + prompt.keys(prompt.system, n_k).float() * (self.system - 1)) * self.strength
        return (RowEdit(Gain(scaled(factor, by)), prompt.rows_after_image(), heads),)
