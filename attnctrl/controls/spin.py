"""Image-guided head suppression: at each step the heads that attend least to the image are turned down.

Sarkar et al., "Mitigating Hallucinations in Vision-Language Models through Image-Guided Head Suppression", 2025, arXiv 2505.16411.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention.rows import OUTPUT, Edits, RowEdit
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Prompt, check_strength, per_head


@dataclass(frozen=True, eq=False)
class SPIN(LanguageControl):
    """In the last row of the prompt and every row that is generated, ranks the heads of a layer by the sum of their scores q·k over the
    image, as far as the row sees it, and multiplies the output of all but the first by `factor`:

        z_h <- (1 + strength·(factor − 1))·z_h       unless h is among the ⌊keep·H⌋ highest

    Attention itself stays with the model's kernel. Each prompt and each row ranks its own heads.

    Args:
        keep: 0.95 in the authors' code, 0.7 to 0.95 in its examples; 1 is off.
        factor: what is left of the other heads; 0.08 in the authors' example for LLaVA-1.5, 0 switches them off.
        layers: None for all; 0 to 19 in some of the authors' examples.
        heads: turn down these only (all are ranked); their weights multiply the strength.
        strength: 0 (off) to 1.
    """

    keep: float = 0.95
    factor: float = 0.08
    layers: str | int | Iterable[int] | None = None
    heads: HeadSet | str | Iterable | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        wrong = [] if 0 <= self.keep <= 1 else [f"keep={self.keep} is not between 0 and 1"]
        wrong += [] if 0 <= self.factor <= 1 else [f"factor={self.factor} is not between 0 and 1"]
        check_strength("SPIN", self.strength, wrong)

    @property
    def neutral(self) -> bool:
        return self.keep == 1 or self.factor == 1 or self.strength == 0

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        heads, by = per_head(weights)
        factor: Any = 1 + self.strength * (self.factor - 1) * by
        image = prompt.keys(prompt.image, n_k)
        gate = _Gate(image, int(self.keep * site.heads + 1e-9), factor)
        return (RowEdit(gate, prompt.rows_that_answer_from_images(), heads),)


@dataclass(frozen=True, eq=False)
class _Gate(Edits):
    """`factor` for all heads but `keep`; `image` (B, n_k)."""

    image: Tensor
    keep: int
    factor: float | Tensor
    stage: ClassVar[int] = OUTPUT

    def __call__(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        (batch, heads, rows, dim), kv = q.shape, k.shape[1]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        image = self.image.to(k.device)[:, None, None] & seen  # (B, 1, r, n_k): a window may leave some behind
        total = (image.to(wide) @ k.to(wide))[:, :, None]  # (B, H_kv, 1, r, D)
        score = (q.to(wide).reshape(batch, kv, -1, rows, dim) * total).sum(-1).reshape(batch, heads, rows)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        factor = self.factor.to(score) if isinstance(self.factor, Tensor) else score.new_tensor(self.factor)
        return torch.where((rank < self.keep) | ~image.any(-1), torch.ones_like(score), factor)
