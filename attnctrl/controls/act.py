"""Attention calibration: what heads waste on sinks in the middle of a text is given back to the other tokens.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration", 2024, arXiv 2406.15765.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.rows import PATTERN, Edits, RowEdit, Tally
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Model, Prompt, check_strength, per_head


@dataclass(eq=False)
class _Columns:
    """Of the heads of a layer: the probability that each position received (B, H, n), and from how many queries it could, (B, 1, n)."""

    mass: Tensor
    count: Tensor

    def sinks(self, threshold: float | Tensor, first: Tensor) -> Tensor:
        """(B, H, n) bool; `first` (B, n) bool is exempt."""
        return (self.mass > threshold * self.count) & (self.count > 0) & ~first[:, None].to(self.mass.device)


@dataclass(frozen=True, eq=False)
class ACT(LanguageControl):
    """Calibrates heads of any language model. The mean that key k receives from the rows that see it, while the prompt is read, is c_k;
    a key is a sink of a head where c_k > threshold, but never the first token, which holds what no token deserves. With m_S the
    mass of the sinks, in all rows of that head

        p_j <- beta_s·p_j   in S,      p_j·(1 + (1 − beta_s)·m_S / m_R)   elsewhere,      beta_s = 1 − strength·(1 − beta)

    The sum of each row stays. Sinks are found before the prompt's own rows are calibrated, in a second pass over tiles of rows, and are
    kept for the rows that are written, which never become sinks. More prompt adds to the means.

    Args:
        heads: heads that calibration helps; the paper finds them by a calibration set. None takes all of `layers`.
        threshold: 0.1 in the authors' code, 0.15 for dialogue.
        alpha: the paper's form of it, threshold = alpha / N with N tokens in the prompt; 5 there. None takes `threshold`.
        beta: share that sinks keep, 0.4; 1 is off.
        layers: "2:-1", all but the first two and the last.
        strength: 0 (off) to 1.
    """

    heads: HeadSet | str | Iterable | None = None
    threshold: float = 0.1
    alpha: float | None = None
    beta: float = 0.4
    layers: str | int | Iterable[int] | None = None
    strength: float = 1.0

    needs_image = False
    per_layer = True

    def __post_init__(self) -> None:
        wrong = [] if 0 < self.threshold <= 1 else [f"threshold={self.threshold} is not above 0 and at most 1"]
        wrong += [f"alpha={self.alpha} is not above 0"] * (self.alpha is not None and not self.alpha > 0)
        wrong += [] if 0 <= self.beta <= 1 else [f"beta={self.beta} is not between 0 and 1"]
        check_strength("ACT", self.strength, wrong)
        object.__setattr__(self, "tally", Tally())  # of one attachment: `fit` makes a copy

    @property
    def neutral(self) -> bool:
        return self.beta == 1 or self.strength == 0

    def fit(self, model: Model) -> ACT:
        super().fit(model)
        return replace(self)

    def default_layers(self, count: int) -> Any:
        return "2:-1" if count > 3 else None

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        share = self.strength * (1 - self.beta)
        key = (self, site.layer)
        if prompt.reads:
            prompt.notes[(*key, "heads")] = per_head(weights)
        heads, by = prompt.notes[(*key, "heads")]
        if prompt.reads:
            before = prompt.notes.get(key)
            offset = prompt.total - n_k
            prompt.notes[key] = edit = self.calibration(prompt, share * by, offset, before and before.columns)
        else:
            edit = replace(prompt.notes[key], offset=prompt.total - n_k, surveys=False, mask=None)
        return (RowEdit(edit, None, heads),)

    def calibration(
        self, prompt: Prompt, share: float | Tensor, offset: int = 0, before: _Columns | None = None
    ) -> _Calibrate:
        """The edit of a layer that reads a prompt, with the first key at `offset`. `share` of the sinks' probability moves, a number or
        (B|1, H, 1)."""
        limit = self.threshold if self.alpha is None else self.alpha / prompt.valid.sum(1)[:, None, None]
        return _Calibrate(share, offset, limit, prompt, before, self.tally)

    def says(self) -> tuple[str, ...]:
        if not self.tally["heads"]:
            return ()
        return (f"ACT: {self.tally['sinks'] / self.tally['heads']:.3g} sinks a head of its layers",)


@dataclass(eq=False)
class _Calibrate(Edits):
    """Of one layer. `share` of the sinks' probability moves: a number or (B|1, H, 1); `offset`: position of the first key."""

    share: float | Tensor
    offset: int
    limit: float | Tensor
    prompt: Prompt
    columns: _Columns | None
    tally: Tally
    sinks: Tensor | None = None
    surveys: bool = True
    mask: Tensor | None = None  # the sinks as numbers of the keys that p has
    stage: ClassVar[int] = PATTERN

    def survey(self, p: Tensor, seen: Tensor, rows: range) -> None:
        valid = self.prompt.valid[:, self.prompt.past + rows.start : self.prompt.past + rows.stop].to(p)[:, None, None]
        self.sinks = self.mask = None
        mass, count = (valid @ p)[:, :, 0], (valid @ seen.to(p))[:, :, 0]
        mass, count = (F.pad(x, (self.offset, 0)) for x in (mass, count))
        before = self.columns
        if before is not None:
            mass, count = (
                x + F.pad(y, (0, x.shape[-1] - y.shape[-1])) for x, y in ((mass, before.mass), (count, before.count))
            )
        self.columns = _Columns(mass, count)

    def __call__(self, p: Tensor) -> Tensor:
        if self.sinks is None:
            valid = self.prompt.valid.to(p.device)
            first = torch.arange(valid.shape[1], device=p.device) == valid.int().argmax(1)[:, None]
            limit = self.limit.to(p) if isinstance(self.limit, Tensor) else self.limit
            self.sinks = self.columns.sinks(limit, first)
            self.tally.add(heads=float(p.shape[0] * p.shape[1]), sinks=self.sinks.sum())
        if self.mask is None:
            sinks = self.sinks[:, :, None, self.offset :].to(p)
            self.mask = F.pad(sinks, (0, max(0, p.shape[-1] - sinks.shape[-1])))
        share = self.share.to(p)[..., None] if isinstance(self.share, Tensor) else self.share
        on = p * self.mask
        off = p - on
        mass, rest = on.sum(-1, keepdim=True), off.sum(-1, keepdim=True)
        share = torch.where(rest > 0, share, torch.zeros_like(rest))  # a row that sees nothing but sinks stays
        return torch.addcmul(off * (1 + share * mass / torch.where(rest > 0, rest, 1.0)), on, 1 - share)
