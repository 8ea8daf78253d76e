"""More attention to the image where the answer is written.

Liu et al., "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", 2024, arXiv 2407.21771.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attention.rows import Gain, RowEdit
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Prompt, check_strength, per_head, scaled


@dataclass(frozen=True, eq=False)
class PAI(LanguageControl):
    """Raises the scores of image tokens in the last row of the prompt and in every row that is generated:

        s_j <- s_j + strength·alpha·|s_j|        j in the image, all heads

    so a positive score is multiplied by 1 + alpha and a negative one by 1 − alpha; this also changes how attention divides inside the
    image. The paper's second part, contrast with a pass without the image, is a matter of logits and not done here.

    Args:
        alpha: 0.2 in the paper; 0 is off. Negative values lower the image.
        layers: "2:" in the paper: all but the first two.
        heads: restrict to these heads; their weights multiply alpha.
        strength: 0 (off) to 1.
    """

    alpha: float = 0.2
    layers: str | int | Iterable[int] | None = "2:"
    heads: HeadSet | str | Iterable | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        wrong = [] if abs(self.alpha) < float("inf") else [f"alpha={self.alpha} is not a finite number"]
        check_strength("PAI", self.strength, wrong)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 or self.strength == 0

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        heads, by = per_head(weights)
        factor = prompt.keys(prompt.image, n_k).float() * (self.alpha * self.strength)
        return (RowEdit(Gain(scaled(factor, by), absolute=True), prompt.rows_that_answer(), heads),)

    def default_layers(self, count: int) -> Any:
        return "2:"
