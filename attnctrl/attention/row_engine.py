"""Runs edits of rows: explicit rows, in tiles of at most ``tiled.TILE`` scores (half of ``rows.CHUNK`` on the CPU), beside the model's own
kernel for the rest.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctrl.attention import rows as sizes
from attnctrl.attention import tiled
from attnctrl.attention.blocks import exact, heads_of
from attnctrl.attention.dispatch import attend
from attnctrl.attention.kernels import count_kernel
from attnctrl.attention.plan import additive
from attnctrl.attention.rows import LOOK, OUTPUT, PATTERN, RowEdit
from attnctrl.errors import AttnCtrlError


_SCRATCH = threading.local()  # one buffer a thread: fresh memory costs more than what is written into it


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
        """The scores of a tile of rows, -inf where a row may not look; may change `s`."""
        n_k = s.shape[-1]
        if self.pairs is not None:
            part = self.pairs[:, :, rows.start : rows.stop]
            s = s.masked_fill(~part, -math.inf) if part.dtype == torch.bool else s + part.to(s)
        if self.keys is not None:
            s = s + self.keys.to(s)[:, :, None]
        if self.causal:
            first = max(0, rows.start + n_k - n_q + 1)  # keys before it are seen by all of these rows
            if first < n_k:
                behind = torch.arange(first, n_k, device=s.device)
                last = torch.arange(rows.start, rows.stop, device=s.device) + (n_k - n_q)
                s[..., first:].masked_fill_(behind > last[:, None], -math.inf)
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
        plain: the model's own attention, (B, H, n_q, D_v), called only if some row of some head is not edited. Such rows come out as
            it makes them, bit for bit; the others are written into what it returns, unless that needs its gradient.
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
    new = _explicit(q, k, v, edits, first, mask, scale, softcap, looks=not acting)
    if new is None:
        return out
    rows = range(first, n_q)
    chosen: Tensor | None = None
    for edit in acting:
        one = edit.chosen(rows, batch, heads, q.device)
        if one is None:
            chosen = None
            break
        chosen = one if chosen is None else chosen | one
    return _with_rows(out, first, _where(chosen, new, out[:, :, first:]))


def _explicit(
    q, k, v, edits: Sequence[RowEdit], first: int, mask: Mask, scale, softcap, looks: bool = False
) -> Tensor | None:
    """Rows first: of q under all edits, every head; None where the edits only look."""
    (batch, heads, n_q, dim), n_k, kv = q.shape, k.shape[2], k.shape[1]
    edits = sorted(edits, key=lambda edit: edit.what.stage)
    count_kernel("explicit rows")
    wide = exact(q)
    scale = dim**-0.5 if scale is None else scale
    tile = min(tiled.TILE, sizes.CHUNK // 2) if q.device.type == "cpu" else tiled.TILE
    step = max(1, tile // max(1, batch * heads * n_k))
    tiles = [range(start, min(start + step, n_q)) for start in range(first, n_q, step)]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    part_by_part = len(tiles) == 1 and k.dtype != wide and q.device.type == "cpu" and not grad
    if not part_by_part:
        k, v = k.to(wide), v if looks else v.to(wide)
    apart = any(x is not None and x.shape[1] > 1 for x in (mask.keys, mask.pairs))
    scored = softcap is not None or any(edit.what.stage < PATTERN for edit in edits)
    ends = mask.causal and mask.pairs is None and mask.keys is None and not scored and len(tiles) > 1

    def end(rows: range) -> int:
        """Behind the last key that a tile sees, where nothing but the order of tokens hides the others and it is worth it."""
        seen = max(1, rows.stop + n_k - n_q)
        return seen if ends and 8 * seen < 7 * n_k else n_k

    def pattern(rows: range, survey: bool = False) -> tuple[Tensor, Tensor | None]:
        """p of a tile, and for a survey which keys its rows see."""
        part = (q[:, :, rows.start : rows.stop].to(wide) * scale).reshape(batch, kv, -1, dim)
        s = _scores(part, k) if part_by_part else part @ k[:, :, : end(rows)].transpose(-1, -2)
        s = s.reshape(batch, heads, len(rows), -1)
        if s.shape[-1] < n_k:
            s = F.pad(s, (0, n_k - s.shape[-1]), value=-math.inf)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        for edit in edits:
            if edit.what.stage < PATTERN:
                s = _where(edit.chosen(rows, batch, heads, q.device), edit.what(s), s)
        s = mask.rows(s, rows, n_q)
        p = torch.softmax(s, -1)
        if mask.keys is not None or mask.pairs is not None:
            p = torch.where(p.isnan(), torch.zeros_like(p), p)  # a row that sees nothing
        return p, (s if apart else s[:, :1]) != -math.inf if survey else None

    surveys = [edit.what for edit in edits if edit.what.surveys]
    for rows in tiles if surveys else ():
        p, seen = pattern(rows, survey=True)
        for what in surveys:
            what.survey(p, seen, rows)
    outs = []
    for rows in tiles:
        p, _ = pattern(rows)
        for edit in edits:
            if edit.what.stage == PATTERN:
                p = _where(edit.chosen(rows, batch, heads, q.device), edit.what(p), p)
        for edit in edits:
            if edit.what.stage == LOOK:
                edit.what.see(p, rows)
        if looks:
            continue
        p = p.reshape(batch, kv, -1, n_k)[..., : end(rows)]
        out = _mixed(p, v) if part_by_part else p @ v[:, :, : p.shape[-1]]
        outs.append(out.reshape(batch, heads, len(rows), -1).to(q.dtype))
    if looks:
        return None
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H_kv, r, D) with k (B, H_kv, n, D) of a narrower type, (B, H_kv, r, n); no gradient."""
    s, rows = q.new_empty(*q.shape[:3], k.shape[2]), q.flatten(0, 1)
    for heads, wide in _widened(k, q.dtype):
        torch.bmm(rows[heads], wide.transpose(1, 2), out=s.view(-1, *s.shape[2:])[heads])
    return s


def _mixed(p: Tensor, v: Tensor) -> Tensor:
    """p (B, H_kv, r, n) with v (B, H_kv, n, D) of a narrower type, (B, H_kv, r, D); no gradient."""
    out, rows = p.new_empty(*p.shape[:3], v.shape[3]), p.flatten(0, 1)
    for heads, wide in _widened(v, p.dtype):
        torch.bmm(rows[heads], wide, out=out.view(-1, *out.shape[2:])[heads])
    return out


def _widened(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """x (B, H, n, D) in a wider type, some of its B·H heads at a time: (heads, (heads, n, D)). Each is gone when the next one comes."""
    each, x = x.shape[2] * x.shape[3], x.flatten(0, 1)
    step = min(len(x), max(1, round(sizes.CHUNK / each)))
    kept = getattr(_SCRATCH, "kept", None)
    if kept is None or kept.dtype != dtype or kept.numel() < step * each:
        kept = _SCRATCH.kept = torch.empty(step * each, dtype=dtype)
    for start in range(0, len(x), step):
        part = x[start : start + step]
        yield slice(start, start + step), kept[: part.numel()].view(part.shape).copy_(part)


def _with_rows(out: Tensor, first: int, new: Tensor) -> Tensor:
    """`out` (B, H, n_q, D) with its rows from `first` on exchanged, in place where no gradient needs the old ones."""
    if first == 0:
        return new
    if out.requires_grad or new.requires_grad:
        return torch.cat([out[:, :, :first], new], 2)
    out[:, :, first:] = new
    return out


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
        out = _with_rows(out, rows.start, new)
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
