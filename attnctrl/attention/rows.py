"""Edits of the logits and the pattern of some query rows: explicit rows, in tiles, beside the fused kernel for the rest.

A language model answers from few rows: the last one of the prompt, the rows after an image, one row a step when it decodes.
For these the scores s (B, H, r, n_k) are small, and everything that is said in terms of s or of the pattern p = softmax(s) is
exact. A tile holds at most ``tiled.TILE`` scores; nothing grows with n_q x n_k.

    Gain       s_j <- s_j + f_j s_j,  or  s_j + f_j |s_j|           before masks and softmax
    Bias       s_j <- s_j + b_j                                     p_j grows by the factor exp(b_j) and p is normalised again
    Recycle    p of sink keys goes to the other keys of the image   after the softmax; the sum of p stays
    Columns    how much probability each key receives               only looks
    Pattern    the probabilities of a few rows                      only looks

Gains act first, then biases, then what acts on p, each kind in the order given, then what looks at p, last what acts on the output of
a head. A control may bring a kind of its own: an `Edits` with a stage. Rows whose only edit is a bias for all rows stay on the fused
kernel, with a bias per key; rows that are only looked at stay the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctrl.attention import tiled
from attnctrl.attention.blocks import exact, heads_of
from attnctrl.attention.dispatch import attend
from attnctrl.attention.kernels import count_kernel
from attnctrl.attention.plan import additive
from attnctrl.errors import AttnCtrlError


SCORES, BIAS, PATTERN, LOOK, OUTPUT = range(5)  # stages, in the order in which they act


class Edits:
    """What an edit of rows does at its stage.

    SCORES and BIAS: called with s (B, H, r, n_k) before the mask, returns it edited. PATTERN: with p = softmax(s), likewise; with
    `surveys`, `survey(p, seen, rows)` is given every tile of p, and which keys each row may see, before the first one is edited. LOOK:
    `see(p, rows)`, p as it is used. OUTPUT: called with q of the edited rows, k, and which keys they see, (B|1, 1, r, n_k) bool; returns factors
    (B, H, r) of their output.
    """

    stage: ClassVar[int]
    surveys: bool = False


@dataclass(frozen=True, eq=False)
class Gain(Edits):
    """s + factor * s, or s + factor * abs(s) with ``absolute``; ``factor`` is (B|1, H|1, n_k)."""

    factor: Tensor
    absolute: bool = False
    stage: ClassVar[int] = SCORES

    def __call__(self, s: Tensor) -> Tensor:
        return s + self.factor.to(s)[:, :, None] * (s.abs() if self.absolute else s)


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
        """(B, 1, n, 3) in float64: image, its non-sinks, sinks; nothing where the image holds no sink."""
        seen = (self.image & self.sinks).any(-1, keepdim=True)
        return torch.stack([self.image & seen, self.image & ~self.sinks & seen, self.sinks & seen], -1)[
            :, None
        ].double()

    def __call__(self, p: Tensor) -> Tensor:
        n = self.sinks.shape[1]
        share = self.share.to(p) if isinstance(self.share, Tensor) else self.share
        part, sets = p[..., :n], self._sets_like(p)
        mass_image, mass_free, mass_sinks = (part @ sets).split(1, -1)
        edit = (mass_image >= self.min_image_mass) & (mass_free >= self.min_non_sink * mass_image) & (mass_free > 0)
        moved = share * mass_sinks * edit
        if self.tally is not None:
            self.tally.add(rows=float(mass_free.numel()), edited=edit.sum(), moved=moved.sum())
        change = torch.cat([moved / torch.where(edit, mass_free, 1.0), -share * edit.to(p)], -1)
        new = torch.addcmul(part, part, change @ sets[..., 1:].transpose(-1, -2))
        return new if n == p.shape[-1] else torch.cat([new, p[..., n:]], -1)

    def _sets_like(self, p: Tensor) -> Tensor:
        if getattr(self, "_like", None) is None or self._like.dtype != p.dtype or self._like.device != p.device:
            object.__setattr__(self, "_like", self.sets.to(p))
        return self._like


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
                part = p[row] if self.heads is None else p[row, list(self.heads)]
                self.parts[row].append(part[:, inside][:, :, keys.to(p.device)])

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


@dataclass(frozen=True, eq=False)
class Mask:
    """What a model lets its queries see: ``causal`` (bottom-right aligned) and ``keys`` (B|1, H|1, n_k), added to the logits; or, where
    that cannot say it, ``pairs`` (B|1, H|1, n_q, n_k), bool or added.
    """

    causal: bool
    keys: Tensor | None = None
    pairs: Tensor | None = None

    @classmethod
    def read(cls, mask: Tensor | None, n_q: int, n_k: int, causal: bool) -> Mask:
        """From what the model passes: None, (B, n_k) with 1 = key may be seen, or (B|1, H|1, n_q, n_k). Reads values where n_q > 1."""
        if mask is None:
            return cls(causal and n_q > 1)
        if mask.ndim == 2:
            return cls(causal and n_q > 1, additive(mask.bool())[:, None])
        if n_q == 1:
            return cls(False, additive(mask)[:, :, 0])
        seen = mask
        if mask.is_floating_point():
            bias = additive(mask)
            seen = bias == 0
            if not bool((seen | (bias == -math.inf)).all()):
                return cls(False, pairs=bias)
        keys = seen[:, :, -1:]
        below = torch.ones(n_q, n_k, dtype=torch.bool, device=mask.device).tril(n_k - n_q)
        if bool((seen == (keys & below)).all()):
            return cls(True, None if bool(keys.all()) else additive(keys[:, :, 0]))
        return cls(False, pairs=seen)

    def rows(self, s: Tensor, rows: range, n_q: int) -> Tensor:
        """The scores of a tile of rows, -inf where a row may not look."""
        n_k = s.shape[-1]
        if self.pairs is not None:
            part = self.pairs[:, :, rows.start : rows.stop]
            s = s.masked_fill(~part, -math.inf) if part.dtype == torch.bool else s + part.to(s)
        if self.keys is not None:
            s = s + self.keys.to(s)[:, :, None]
        if self.causal:
            last = torch.arange(rows.start, rows.stop, device=s.device) + (n_k - n_q)
            s = s.masked_fill(torch.arange(n_k, device=s.device) > last[:, None], -math.inf)
        return s


def edit_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edits: Sequence[RowEdit],
    plain: Callable[[], Tensor],
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention (B, H, n_q, D_v) under edits of rows.

    Args:
        q: (B, H, n_q, D). k: (B, H_kv, n_k, D), v: (B, H_kv, n_k, D_v).
        plain: the model's own attention, (B, H, n_q, D_v); called only if some row of some head is not edited. Such rows come out as
            it makes them, bit for bit.
        softcap: s <- softcap * tanh(s / softcap) before all edits.
    """
    if not edits:
        return plain()
    batch, heads, n_q, _ = q.shape
    gates = [edit for edit in edits if edit.what.stage == OUTPUT]
    if gates:
        rest = [edit for edit in edits if edit not in gates]
        out = edit_rows(q, k, v, rest, plain, mask=mask, scale=scale, softcap=softcap)
        return _gated(q, k, out, gates, mask)
    fused = [edit for edit in edits if edit.fuses] if softcap is None else []
    explicit = [edit for edit in edits if edit not in fused]
    first = min((min(edit.start) if edit.start is not None else 0 for edit in explicit), default=n_q)
    acting = [edit for edit in explicit if edit.what.stage < LOOK]
    whole = [edit for edit in acting if (edit.start is None or max(edit.start) <= 0) and edit.stop is None]
    if any(edit.heads is None or len(edit.heads) == heads for edit in whole):
        return _explicit(q, k, v, edits, 0, mask, scale, softcap)
    out = _fused(q, k, v, fused, plain, mask, scale) if fused else plain()
    if first >= n_q:
        return out
    new = _explicit(q, k, v, edits, first, mask, scale, softcap)
    if not acting:
        return out
    rows = range(first, n_q)
    chosen: Tensor | None = None
    for edit in acting:
        one = edit.chosen(rows, batch, heads, q.device)
        if one is None:
            chosen = None
            break
        chosen = one if chosen is None else chosen | one
    tail = out[:, :, first:]
    new = new if chosen is None else torch.where(chosen, new, tail)
    return new if first == 0 else torch.cat([out[:, :, :first], new], 2)


def _explicit(q, k, v, edits: Sequence[RowEdit], first: int, mask: Mask, scale, softcap) -> Tensor:
    """Rows first: of q under all edits, every head."""
    (batch, heads, n_q, dim), n_k, kv = q.shape, k.shape[2], k.shape[1]
    edits = sorted(edits, key=lambda edit: edit.what.stage)
    count_kernel("explicit rows")
    wide = exact(q)
    keys, values = k.to(wide).transpose(-1, -2), v.to(wide)
    scale = dim**-0.5 if scale is None else scale
    step = max(1, tiled.TILE // max(1, batch * heads * n_k))
    tiles = [range(start, min(start + step, n_q)) for start in range(first, n_q, step)]

    def pattern(rows: range) -> tuple[Tensor, Tensor]:
        part = q[:, :, rows.start : rows.stop].to(wide) * scale
        s = (part.reshape(batch, kv, -1, dim) @ keys).reshape(batch, heads, len(rows), n_k)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        for edit in edits:
            if edit.what.stage < PATTERN:
                s = _where(edit.chosen(rows, batch, heads, q.device), edit.what(s), s)
        s = mask.rows(s, rows, n_q)
        p = torch.softmax(s, -1)
        if mask.keys is not None or mask.pairs is not None:
            p = torch.where(p.isnan(), torch.zeros_like(p), p)  # a row that sees nothing
        return p, s

    surveys = [edit.what for edit in edits if edit.what.surveys]
    for rows in tiles if surveys else ():
        p, s = pattern(rows)
        for what in surveys:
            what.survey(p, s != -math.inf, rows)
    outs = []
    for rows in tiles:
        p, _ = pattern(rows)
        for edit in edits:
            if edit.what.stage == PATTERN:
                p = _where(edit.chosen(rows, batch, heads, q.device), edit.what(p), p)
        for edit in edits:
            if edit.what.stage == LOOK:
                edit.what.see(p, rows)
        out = p.reshape(batch, kv, -1, n_k) @ values
        outs.append(out.reshape(batch, heads, len(rows), -1).to(q.dtype))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _gated(q: Tensor, k: Tensor, out: Tensor, gates: list[RowEdit], mask: Mask) -> Tensor:
    """The output (B, H, n_q, D_v) with the rows of each gate multiplied by its factors."""
    batch, heads, n_q = out.shape[:3]
    for gate in gates:
        rows = range(min(0 if gate.start is None else min(gate.start), n_q), n_q)
        if not rows:
            continue
        tail = out[:, :, rows.start :]
        seen = mask.rows(q.new_zeros(1, 1, len(rows), k.shape[2]), rows, n_q)[:, :1] != -math.inf
        factor = gate.what(q[:, :, rows.start :], k, seen)[..., None]
        new = _where(gate.chosen(rows, batch, heads, q.device), tail * factor.to(tail.dtype), tail)
        out = torch.cat([out[:, :, : rows.start], new], 2) if rows.start else new
    return out


def _where(chosen: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if chosen is None else torch.where(chosen, new, old)


def _fused(q, k, v, edits: list[RowEdit], plain: Callable[[], Tensor], mask: Mask, scale) -> Tensor:
    """Biases for all rows: one fused call for the heads that have one."""
    heads, wide = q.shape[1], exact(q)
    touched = sorted({head for edit in edits for head in (range(heads) if edit.heads is None else edit.heads)})
    total: Tensor | float = 0.0
    for edit in edits:
        bias = edit.what.bias.to(q.device, wide)
        if edit.heads is not None:
            here = torch.zeros(heads, 1, dtype=torch.bool, device=q.device)
            here[list(edit.heads)] = True
            bias = torch.where(here, bias, torch.zeros_like(bias))
        total = total + bias
    every = len(touched) == heads
    if not every:
        group = heads // k.shape[1]
        total = total[:, touched]
        full = plain()
        q = heads_of(q, touched)
        k, v = (heads_of(x, [head // group for head in touched]) for x in (k, v))
    if mask.pairs is not None:
        if mask.pairs.shape[1] != 1:
            raise AttnCtrlError("a mask that differs between heads does not go with a bias per key")
        total = total[:, :, None]
        if mask.pairs.dtype == torch.bool:
            total = total.masked_fill(~mask.pairs, -math.inf)
        else:
            total = total + mask.pairs.to(wide)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=total.to(q.dtype), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        bias = total if mask.keys is None else total + mask.keys.to(total)
        cpu = (
            q.device.type == "cpu"
        )  # where the kernel that takes a bias with a causal mask is one that returns the LSE
        out = attend(q, k, v, scale=scale, causal=mask.causal, key_bias=bias, need_lse=cpu and mask.causal)[0]
    if every:
        return out
    full = full.clone()
    full[:, touched] = out.to(full.dtype)
    return full
