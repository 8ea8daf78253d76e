"""Explicit attention in tiles of bounded size: what no fused kernel offers.

Every function here loops over query rows so that a tile holds at most ``TILE`` logits (or one row, if a row is
longer). Where gradients flow, tiles are recomputed in the backward pass instead of kept, so memory stays linear there
too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


TILE = 1 << 21  # logits of a tile


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, limits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and LSE.

    Args:
        q: (B, H, n_q, D), k: (B, H, n_k, D), v: (B, H, n_k, D_v).
        bias: (B|1, H|1, 1, n_k), -inf forbids.
        limits: (n_q,), row i sees the first limits[i] keys.

    Returns:
        out (B, H, n_q, D_v) in the dtype of q, lse (B, H, n_q) in float32 (float64). A row without keys: zeros, -inf.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = k.to(exact), v.to(exact)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    outs, lses = [], []
    for rows in _tiles(q, k.shape[2]):
        part, limit = q[:, :, rows], None if limits is None else limits[rows]
        if grad and q.shape[2] > part.shape[2]:
            out, lse = checkpoint(_tile, part, keys, values, scale, bias, limit, use_reentrant=False)
        else:
            out, lse = _tile(part, keys, values, scale, bias, limit)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))


def tiled_argmax(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, limits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Largest logit of each row and the key that has it, the first of equals: values (B, H, n_q), keys (B, H, n_q)
    int64.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(exact)
    found = []
    with torch.no_grad():
        for rows in _tiles(q, k.shape[2]):
            limit = None if limits is None else limits[rows]
            found.append(_logits(q[:, :, rows], keys, scale, bias, limit).max(-1))
    return torch.cat([one.values for one in found], 2), torch.cat([one.indices for one in found], 2)


def _tiles(q: Tensor, n_k: int) -> Iterator[slice]:
    step = max(1, TILE // max(1, q.shape[0] * q.shape[1] * n_k))
    for start in range(0, q.shape[2], step):
        yield slice(start, min(start + step, q.shape[2]))


def _logits(q: Tensor, keys: Tensor, scale: float, bias: Tensor | None, limits: Tensor | None) -> Tensor:
    s = (q.to(keys.dtype) * scale) @ keys.transpose(-1, -2)
    if bias is not None:
        s = s + bias
    if limits is not None:
        hidden = torch.arange(keys.shape[2], device=q.device) >= limits.to(q.device)[:, None]
        s = s.masked_fill(hidden, -math.inf)
    return s


def _tile(q, keys, values, scale, bias, limits) -> tuple[Tensor, Tensor]:
    s = _logits(q, keys, scale, bias, limits)
    top = s.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    dead = total == 0
    out = (p @ values) / torch.where(dead, torch.ones_like(total), total)
    lse = torch.where(dead, total, total.clamp_min(torch.finfo(total.dtype).tiny).log() + top)
    return out, lse.masked_fill(dead, -math.inf).squeeze(-1)
