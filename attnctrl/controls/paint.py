"""Selected image tokens amplified: the patches that the vision tower itself attends to.

"Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", 2025, arXiv 2501.12206.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention.rows import SCORES, Edits, Gain, RowEdit, Tally
from ..errors import AttnCtrlError
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Model, Prompt, check_strength, not_finite, per_head, scaled


@dataclass(frozen=True, eq=False)
class PAINT(LanguageControl):
    """Raises the scores of two sets of image tokens in the last row of the prompt and in every row that is generated:

        s_j <- s_j + strength·alpha·|s_j|       j in the top: the patches that the class token of the vision tower attends to most in
                                                its first layer, without those of the summary
        s_j <- s_j + strength·beta·|s_j|        j in the summary: patches that stand out in its last layer but one, with more attention
                                                than Q3 + 1.5·(Q3 − Q1)

    Attention of the class token is summed over heads. Only for models whose vision tower has a class token and whose image tokens
    are its patches one by one (LLaVA with CLIP).

    The paper also describes a modulation of heads: the amplification of each follows its measured sensitivity to the image. The authors' code
    has none and the paper gives no formula, so `modulate` is written from the description: in each row that is edited, alpha and beta of a
    head are multiplied by m_h / max_h m_h, with m_h the attention of the head to the image before this edit. It is off unless asked for.

    The paper's own ablation grows captions to twice their length at alpha = 0.7 and breaks them at 0.9.

    Args:
        alpha: 0.5 to 0.9 in the authors' scripts. beta: 0.3 there, 0.4 best in the paper. Both 0 is off.
        top: share of the patches in the top, 0.25.
        layers: "2:", all but the first two.
        heads: restrict to these; their weights multiply alpha and beta.
        strength: 0 (off) to 1.
        modulate: amplify heads by their sensitivity to the image.
    """

    alpha: float = 0.5
    beta: float = 0.3
    top: float = 0.25
    layers: str | int | Iterable[int] | None = None
    heads: HeadSet | str | Iterable | None = None
    strength: float = 1.0
    modulate: bool = False

    tower_layers = (0, -2)

    def __post_init__(self) -> None:
        wrong = not_finite(self, "alpha", "beta")
        wrong += [] if 0 <= self.top <= 1 else [f"top={self.top} is not between 0 and 1"]
        check_strength("PAINT", self.strength, wrong)
        object.__setattr__(self, "tally", Tally())  # of one attachment: `fit` makes a copy

    @property
    def neutral(self) -> bool:
        return self.alpha == self.beta == 0 or self.strength == 0

    def fit(self, model: Model) -> PAINT:
        super().fit(model)
        if not model.class_token:
            raise AttnCtrlError(
                f"PAINT reads the class token of the vision tower; {model.name} has none, or its image tokens are not the tower's patches\n"
                "HINT: PAI amplifies all image tokens, in any model"
            )
        return replace(self)

    def default_layers(self, count: int) -> Any:
        return "2:"

    def read(self, prompt: Prompt) -> None:
        super().read(prompt)
        prompt.notes.pop((self, "factor"), None)

    def _factor(self, prompt: Prompt) -> Tensor:
        """(B, n): alpha in the top, beta in the summary, 0 elsewhere."""
        key = (self, "factor")
        if key not in prompt.notes:
            first, late = (torch.cat(prompt.notes[("class token", layer)]) for layer in self.tower_layers)
            image, patches, copies = prompt.whole.image.to(first.device), first.shape[1], 1
            if int(image.sum()) != first.numel():  # the tower ran before rows were copied
                image, copies = image[:: prompt.copies], prompt.copies
            tokens = int(image.sum())
            more = len(prompt.notes[("class token", 0)]) > 1
            if tokens != first.numel() or (more and prompt.batch > 1):
                raise AttnCtrlError(
                    f"PAINT: the vision tower saw {len(first)} images of {patches} patches, the prompts hold {tokens} image tokens"
                    + "\nHINT: one prompt a batch, where images follow in a later prompt" * more
                )
            top, summary = emphasised(first, late, self.top)
            values = torch.where(summary, self.beta, torch.where(top, self.alpha, 0.0)).flatten().double()
            factor = torch.zeros(image.shape, dtype=torch.float64, device=values.device)
            factor[image] = values  # row by row, in the order of the images
            prompt.notes[key] = factor.repeat_interleave(copies, 0)
            self.tally.add(images=len(first), top=top.sum(), summary=summary.sum())
        return prompt.notes[key]

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        heads, by = per_head(weights)
        factor = prompt.keys(self._factor(prompt), n_k) * self.strength
        gain: Edits = Gain(scaled(factor, by), absolute=True)
        if self.modulate:
            seen = prompt.keys(prompt.valid, n_k, beyond=True)
            gain = _Modulated(gain, prompt.keys(prompt.image, n_k), seen)
        return (RowEdit(gain, prompt.rows_that_answer_from_images(), heads),)

    def says(self) -> tuple[str, ...]:
        n = self.tally["images"]
        if not n:
            return ()
        return (f"PAINT: {self.tally['top'] / n:.3g} top and {self.tally['summary'] / n:.3g} summary tokens an image",)


@dataclass(frozen=True, eq=False)
class _Modulated(Edits):
    """A gain, in each head times its attention to the image, over the largest of all heads; image and seen are (B, n_k) bool."""

    gain: Gain
    image: Tensor
    seen: Tensor
    stage: ClassVar[int] = SCORES

    def __call__(self, s: Tensor) -> Tensor:
        seen, image = (x.to(s.device)[:, None, None] for x in (self.seen, self.image))
        mass = (s.masked_fill(~seen, -math.inf).softmax(-1) * image).sum(-1, keepdim=True)
        most = mass.amax(1, keepdim=True)
        return s + (self.gain(s) - s) * torch.where(most > 0, mass / most, torch.zeros_like(mass))


def emphasised(first: Tensor, late: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Top and summary of each image, (N, patches) bool, from the class token's attention to patches in an early and a late layer."""
    low, high = (late.quantile(at, 1, keepdim=True) for at in (0.25, 0.75))
    summary = late > high + 1.5 * (high - low)
    strongest = first.topk(int(share * first.shape[1]), 1).indices
    top = torch.zeros_like(summary).scatter_(1, strongest, True)
    return top & ~summary, summary
