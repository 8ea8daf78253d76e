"""More attention to the image where the answer is written.

Liu et al., "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", 2024, arXiv 2407.21771.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..attention.rows import Gain, RowEdit, Tally
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Model, Prompt, check_strength, not_finite, per_head, scaled


@dataclass(frozen=True, eq=False)
class PAI(LanguageControl):
    """Raises the scores of image tokens in the last row of the prompt and in every row that is generated:

        s_j <- s_j + strength·alpha·|s_j|        j in the image, all heads

    so a positive score is multiplied by 1 + alpha and a negative one by 1 − alpha; this also changes how attention divides inside the
    image. With `gamma`, `generate` also contrasts each token's log-probabilities with those of the text without the image, read beside it
    without edits and with a cache of its own:

        score = log p + strength·(gamma − 1)·(log p − log p_text),  −inf where p < max p / 10

    Args:
        alpha: 0.2 in the paper; 0 is off. Negative values lower the image.
        gamma: None is off; 1.1 in the authors' examples. 1 only cuts unlikely tokens off. Not with beam search.
        layers: "2:" in the paper: all but the first two.
        heads: restrict to these heads; their weights multiply alpha.
        strength: 0 (off) to 1.
    """

    alpha: float = 0.2
    layers: str | int | Iterable[int] | None = "2:"
    heads: HeadSet | str | Iterable | None = None
    strength: float = 1.0
    gamma: float | None = None

    def __post_init__(self) -> None:
        given = ("alpha",) if self.gamma is None else ("alpha", "gamma")
        check_strength("PAI", self.strength, not_finite(self, *given))
        object.__setattr__(self, "tally", Tally())  # of one attachment: `fit` makes a copy

    @property
    def neutral(self) -> bool:
        return (self.alpha == 0 and self.gamma is None) or self.strength == 0

    @property
    def contrasts(self) -> bool:
        return self.gamma is not None

    def fit(self, model: Model) -> PAI:
        super().fit(model)
        return replace(self)

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        if self.alpha == 0:
            return ()
        heads, by = per_head(weights)
        factor = prompt.keys(prompt.image, n_k).float() * (self.alpha * self.strength)
        return (RowEdit(Gain(scaled(factor, by), absolute=True), prompt.rows_that_answer(), heads),)

    def default_layers(self, count: int) -> Any:
        return "2:"

    def contrast(self, image: Tensor, text: Tensor) -> Tensor:
        self.tally.add(steps=1.0)
        more = self.strength * (self.gamma - 1)
        likely = image >= image.amax(-1, keepdim=True) + math.log(0.1)
        return (image + more * (image - text)).masked_fill(~likely, -math.inf)

    def says(self) -> tuple[str, ...]:
        steps = self.tally["steps"]
        return (f"PAI: contrasted {steps:.0f} tokens with the text without the image",) * bool(steps)
