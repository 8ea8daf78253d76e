"""Attention to the image made sharper where the model is sure of itself and flatter where it is not.

Chen et al., "Why Is Spatial Reasoning Hard for VLMs? An Attention Mechanism Perspective on Focus Areas", 2025, arXiv 2503.01773.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.rows import FAR, Gain, RowEdit, Tally
from ..errors import AttnCtrlError
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Model, Prompt, check_strength, not_finite, per_head, scaled


@dataclass(frozen=True, eq=False)
class AdaptVis(LanguageControl):
    """Scales the scores of image tokens in the last row of the prompt:

        s_j <- (1 + strength·(w − 1))·s_j       j in the image;  w = low where c < threshold, else high

    c is the probability of the likeliest first token, found by reading the prompt once without any control; each prompt of a batch has
    its own. Negative scores move the other way. With low = high (ScalingVis in the paper) the prompt is read only once. Rows that are
    generated stay as they are. What follows on a prompt in the same cache is scaled by the weight of its beginning.

    Args:
        low: 0.5; 0.8 for some sets in the paper. high: 1.5; 1.2 and 2 are used too. 1 leaves the prompt alone.
        threshold: 0.3.
        layers: None for all.
        heads: restrict to these; their weights multiply w − 1.
        strength: 0 (off) to 1.
    """

    low: float = 0.5
    high: float = 1.5
    threshold: float = 0.3
    layers: str | int | Iterable[int] | None = None
    heads: HeadSet | str | Iterable | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        wrong = not_finite(self, "low", "high", above=0)
        wrong += [] if 0 <= self.threshold <= 1 else [f"threshold={self.threshold} is not between 0 and 1"]
        check_strength("AdaptVis", self.strength, wrong)
        object.__setattr__(self, "tally", Tally())  # of one attachment: `fit` makes a copy

    @property
    def neutral(self) -> bool:
        return self.low == self.high == 1 or self.strength == 0

    @property
    def previews(self) -> bool:
        return self.low != self.high

    def fit(self, model: Model) -> AdaptVis:
        super().fit(model)
        return replace(self)

    def previewed(self, prompt: Prompt, logits: Tensor | None) -> None:
        if logits is None:
            raise AttnCtrlError(
                "AdaptVis needs the model's confidence, and the model returns no logits\nHINT: low = high needs none"
            )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        confidence = wide.softmax(-1).amax(-1).tolist()
        prompt.notes[(self, "weights")] = tuple(self.low if c < self.threshold else self.high for c in confidence)
        self.tally.add(prompts=len(confidence), low=sum(c < self.threshold for c in confidence))

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        rows = prompt.row_of_last()
        if min(rows) >= prompt.length:
            return ()
        if not self.previews:
            by_prompt = (self.low,) * prompt.batch
        elif (self, "weights") in prompt.notes:
            by_prompt = prompt.notes[(self, "weights")]
        else:
            raise AttnCtrlError("AdaptVis has not seen the logits of this prompt\nHINT: call the model with its head")
        heads, by = per_head(weights)
        start = tuple(
            FAR if w == 1 or at is None else row
            for w, at, row in zip(by_prompt, prompt.first_image, rows, strict=True)
        )
        grow = torch.tensor(by_prompt, device=prompt.image.device)[:, None].double() - 1
        factor = prompt.keys(prompt.image, n_k) * (grow * self.strength)
        return (RowEdit(Gain(scaled(factor, by)), start, heads, tuple(row + 1 for row in rows)),)

    def says(self) -> tuple[str, ...]:
        n = self.tally["prompts"]
        return (f"AdaptVis: {self.tally['low']:.0f} of {n:.0f} prompts below the threshold",) * bool(n)
