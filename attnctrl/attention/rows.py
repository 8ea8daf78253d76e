"""Edits of the logits and the pattern of some query rows: explicit rows, in tiles, beside the fused kernel for the rest.

A language model answers from few rows: the last one of the prompt, the rows after an image, one row a step when it decodes.
For these the scores s (B, H, r, n_k) are small, and everything that is said in terms of s or of the pattern p = softmax(s) is
exact; they are made in tiles, and nothing grows with n_q x n_k.

    Gain       s_j <- s_j + f_j s_j,  or  s_j + f_j |s_j|           before masks and softmax
    Bias       s_j <- s_j + b_j                                     p_j grows by the factor exp(b_j) and p is normalised again
    Recycle    p of sink keys goes to the other keys of the image   after the softmax; the sum of p stays
    Columns    how much probability each key receives               only looks
    Pattern    the probabilities of a few rows                      only looks

Gains act first, then biases, then what acts on p, each kind in the order given, then what looks at p, last what acts on the output of
a head. A control may bring a kind of its own: an `Edits` with a stage. Rows whose only edit is a bias for all rows stay on the fused
kernel, with a bias per key; rows that are only looked at stay the model's own. `row_engine.edit_rows` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor


SCORES, BIAS, PATTERN, LOOK, OUTPUT = range(5)  # stages, in the order in which they act
CHUNK = 1 << 18  # numbers of a temporary on the CPU: what stays in its cache costs a fraction of fresh memory


def pieces(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """`x` in slices along `dim`, on the CPU of about CHUNK numbers each: to copy into a wider type one by one."""
    size = x.shape[dim]
    if x.device.type == "cpu":
        size = CHUNK * size // max(1, x.numel())
    return x.split(max(1, size), dim)


class Edits:
    """What an edit of rows does at its stage.

    SCORES and BIAS: called with s (B, H, r, n_k) before the mask, returns it edited. PATTERN: with p = softmax(s), likewise; with
    `surveys`, `survey(p, seen, rows)` is given every tile of p, and which keys each row may see, (B, H|1, r, n_k) bool, before the first
    one is edited. LOOK: `see(p, rows)`, p as it is used. OUTPUT: called with q of the edited rows, k, and which keys they see,
    (B|1, 1, r, n_k) bool; returns factors (B, H, r) of their output.
    """

    stage: ClassVar[int]
    surveys: bool = False

    def sets_like(self, p: Tensor) -> Tensor:
        """`self.sets`, in the type and on the device of p, and kept so."""
        if getattr(self, "_like", None) is None or self._like.dtype != p.dtype or self._like.device != p.device:
            object.__setattr__(self, "_like", self.sets.to(p))
        return self._like


@dataclass(frozen=True, eq=False)
class Gain(Edits):
    """s + factor * s, or s + factor * abs(s) with ``absolute``; ``factor`` is (B|1, H|1, n_k)."""

    factor: Tensor
    absolute: bool = False
    stage: ClassVar[int] = SCORES

    def __call__(self, s: Tensor) -> Tensor:
        return torch.addcmul(s, self.factor.to(s)[:, :, None], s.abs() if self.absolute else s)


@dataclass(frozen=True, eq=False)
class Bias(Edits):
    """s + bias; ``bias`` is (B|1, H|1, n_k)."""

    bias: Tensor
    stage: ClassVar[int] = BIAS

    def __call__(self, s: Tensor) -> Tensor:
        return s + self.bias.to(s)[:, :, None]


@dataclass(eq=False)
class Tally:
    """Counts on the device, read only when somebody asks."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def __getitem__(self, name: str) -> float:
        return float(self.sums.get(name, 0.0))


@dataclass(frozen=True, eq=False)
class Recycle(Edits):
    """Moves a share of the probability of sink keys to the keys of the image that are no sinks, in proportion to what these have.

    With m_V the mass of the image, m_F that of its non-sinks, m_S that of all sinks (text included), a row of a head is edited
    where the image holds a sink, m_V >= min_image_mass and m_F >= min_non_sink * m_V:

        p_j <- (1 - share) p_j  (sinks),   p_j (1 + share m_S / m_F)  (image, no sink),   p_j  (the rest)

    Args:
        sinks: (B, n) bool. image: (B, n) bool. Both for the first n keys; keys behind them are neither.
        share: 0 to 1, a number or (H, 1, 1).
        tally: counts the ``rows`` (of heads) that were asked, those that were ``edited``, and the mass that ``moved``.
    """

    sinks: Tensor
    image: Tensor
    share: float | Tensor
    min_non_sink: float
    min_image_mass: float
    tally: Tally | None = None
    stage: ClassVar[int] = PATTERN

    @cached_property
    def sets(self) -> Tensor:
        """(3, B, 1, 1, n) bool: image, its non-sinks, sinks; nothing where the image holds no sink."""
        seen = (self.image & self.sinks).any(-1, keepdim=True)
        found = torch.stack([self.image & seen, self.image & ~self.sinks & seen, self.sinks & seen])
        return found[:, :, None, None]

    def __call__(self, p: Tensor) -> Tensor:
        n = self.sinks.shape[1]
        share = self.share.to(p) if isinstance(self.share, Tensor) else self.share
        parts = p[..., :n] * self.sets_like(p)
        mass_image, mass_free, mass_sinks = parts.sum(-1, keepdim=True)
        edit = (mass_image >= self.min_image_mass) & (mass_free >= self.min_non_sink * mass_image) & (mass_free > 0)
        moved = share * mass_sinks * edit
        if self.tally is not None:
            self.tally.add(rows=float(mass_free.numel()), edited=edit.sum(), moved=moved.sum())
        new = p.clone()
        new[..., :n].addcmul_(parts[1], moved / torch.where(edit, mass_free, 1.0)).addcmul_(
            parts[2], -share * edit.to(p)
        )
        return new


@dataclass(eq=False)
class Columns(Edits):
    """Sums the probability that keys receive over rows and heads into ``total`` (B, n_k), and changes nothing."""

    total: Tensor | None = None
    stage: ClassVar[int] = LOOK

    def see(self, p: Tensor, rows: range) -> None:
        mass = p.sum((1, 2))
        self.total = mass if self.total is None else self.total + mass


@dataclass(eq=False)
class Pattern(Edits):
    """Keeps the probabilities of chosen rows at chosen keys.

    Args:
        rows: per batch row the queries that are kept, in rising order. keys: per batch row (n,) int64.
        heads: which heads are kept; None all.
    """

    rows: tuple[tuple[int, ...], ...]
    keys: tuple[Tensor, ...]
    heads: tuple[int, ...] | None = None
    parts: list[list[Tensor]] = field(default_factory=list)
    stage: ClassVar[int] = LOOK

    def see(self, p: Tensor, rows: range) -> None:
        self.parts = self.parts or [[] for _ in self.rows]
        for row, (wanted, keys) in enumerate(zip(self.rows, self.keys, strict=True)):
            inside = [i - rows.start for i in wanted if i in rows]
            if inside:
                first, end = inside[0], inside[-1] + 1
                part = p[row, :, first:end] if end - first == len(inside) else p[row][:, inside]
                part = part if self.heads is None or len(self.heads) == len(part) else part[list(self.heads)]
                self.parts[row].append(part.index_select(-1, keys.to(p.device)))

    def of(self, row: int) -> Tensor:
        """(H, rows, keys) of a batch row."""
        return torch.cat(self.parts[row], 1)

    def edit(self) -> RowEdit:
        """The edit that looks: at all rows from the first one that is kept."""
        return RowEdit(self, tuple(rows[0] if rows else FAR for rows in self.rows))


FAR = 1 << 60  # a row behind every row


@dataclass(frozen=True, eq=False)
class RowEdit:
    """One edit of some rows and heads.

    ``start`` has one entry per batch row, the first query row that is edited (n_q or more for none); None edits every row. ``heads``
    are the heads that are edited; None all. ``stop`` likewise the row behind the last one that is edited; None for no end.
    """

    what: Edits
    start: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    stop: tuple[int, ...] | None = None

    @property
    def fuses(self) -> bool:
        """A fused kernel can do it."""
        return isinstance(self.what, Bias) and self.start is None and self.stop is None

    def chosen(self, rows: range, batch: int, heads: int, device: torch.device) -> Tensor | None:
        """Which rows and heads of a tile are edited, broadcastable to (B, H, r, 1); None for all."""
        found = None
        if self.start is not None and max(self.start) > rows.start:
            first = torch.tensor(self.start, device=device)[:, None, None, None]
            found = torch.arange(rows.start, rows.stop, device=device)[:, None] >= first
        if self.stop is not None:
            end = torch.tensor(self.stop, device=device)[:, None, None, None]
            before = torch.arange(rows.start, rows.stop, device=device)[:, None] < end
            found = before if found is None else found & before
        if self.heads is not None and len(self.heads) < heads:
            here = torch.zeros(heads, dtype=torch.bool, device=device)
            here[list(self.heads)] = True
            here = here[None, :, None, None]
            found = here if found is None else found & here
        return found
