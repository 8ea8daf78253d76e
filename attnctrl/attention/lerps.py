"""Blend heads toward a target: SoftPAG, SoftUG, SoftSEG, SoftMG and SEG without an attention map.

Ahn, Kang et al., Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models, 2025,
arXiv 2506.10978. With A the attention of a head and u its strength, (1 - u) A + u T applied to v is

    lerp(out, t, u),   t = v (T = 1), the mean of v (T uniform), attn(q̄, k, v) (one row for all), v of the largest logit (one-hot)

so only t is computed, and only for the heads with a strength. SEG takes t = attn(blurred q, k, v), see
``smoothing.py``. See ``plan.Lerp`` for regions. q̄ and blurred queries are made of q as attention gets it, after norms
and rotary embedding.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attnctrl.attention import groups
from attnctrl.attention.blocks import (
    Inputs,
    add_weighted,
    attend_block,
    dense_bias,
    exact,
    own_scale,
    plain,
    scaled_keys,
)
from attnctrl.attention.groups import Tokens, take
from attnctrl.attention.plan import Lerp, additive
from attnctrl.attention.program import Block, Program, Region
from attnctrl.attention.smoothing import blur
from attnctrl.attention.tiled import tiled_argmax
from attnctrl.errors import AttnCtrlError


def apply_lerp(inputs: Inputs, program: Program, number: int, lerp: Lerp, out: Tensor) -> Tensor:
    """Edit the lerp's heads and rows of ``out`` (B, H, n_q, D_v) in place; ``number`` is the lerp's place in its plan.

    Heads are read and written run by run, as views: selecting them with an index copies the whole strided tensor
    first.
    """
    n_q, n_k = inputs.q.shape[2], inputs.k.shape[2] if inputs.own is None else inputs.own
    if n_q != n_k and (lerp.target == "identity" or (lerp.region is not None and not lerp.of_queries)):
        raise AttnCtrlError(f"a lerp to {lerp.target} needs as many queries as keys, got {n_q} and {n_k}")
    rows: Tokens = slice(0, n_q)
    if lerp.region is not None:
        rows = groups.tokens_of(groups.spans(lerp.region, n_q), out.device)
    runs = groups.runs(lerp.heads)
    strength = lerp.strength.to(out.device, out.dtype)
    strength = (strength[None] if strength.ndim == 1 else strength)[..., None, None]
    if lerp.target == "identity" and lerp.region is None:
        for a, b in runs:
            _blend(out[:, a:b], rows, take(inputs.v_of_heads(range(a, b)), rows), strength[:, a:b], lerp)
        return out
    some = inputs.heads(lerp.heads)
    if some.mask is not None and some.key_bias is None:
        target = _masked_target(some, lerp, rows)
    elif lerp.region is None:
        target = _target(some, program, lerp)
    else:
        target = _region_target(some, program, number, lerp, rows)
    at = 0
    for a, b in runs:
        _blend(out[:, a:b], rows, target[:, at : at + b - a], strength[:, a:b], lerp)
        at += b - a
    return out


def _blend(out: Tensor, rows: Tokens, target: Tensor, strength: Tensor, lerp: Lerp) -> None:
    """out[rows] <- lerp(out[rows], target, strength), in place; bit-exact where the strength is 0, and at 1 what stood
    there does not matter.
    """
    part = take(out, rows)
    if lerp.full:
        groups.put(out, rows, target.to(part.dtype).expand_as(part))
        return
    if lerp.everywhere and isinstance(rows, slice) and not (out.requires_grad or target.requires_grad):
        part.lerp_(target.to(part.dtype).expand_as(part), strength)
        return
    blended = torch.lerp(part, target.to(part.dtype).expand_as(part), strength)
    if not lerp.everywhere:
        blended = torch.where(strength == 0, part, blended)
    groups.put(out, rows, blended)


def _target(some: Inputs, program: Program, lerp: Lerp) -> Tensor:
    """The target of every row: (B, h, n_q, D_v), or (B, h, 1, D_v) if it is the same for all; ``some`` are the lerp's
    heads.
    """
    whole = program.plain and (not some.causal or lerp.target in ("argmax", "smoothed"))
    mean = _mean_query(some.q) if lerp.target == "mean_query" else None
    if lerp.target == "smoothed":
        some = replace(some, q=blur(some.q, lerp.grid, lerp.sigma))
    total = None if whole else _zeros(some)
    for block in program.blocks:
        target = _block_target(some, block, lerp, mean)
        if whole:
            return target
        add_weighted(total, block.queries, target, block.weight)
    return total


def _region_target(some: Inputs, program: Program, number: int, lerp: Lerp, rows: Tokens) -> Tensor:
    """The target of the region's rows, (B, h, rows, D_v), or (B, h, 1, D_v) if it is the same for all."""
    mean = _mean_query(take(some.q, rows)) if lerp.target == "mean_query" else None
    if lerp.target == "smoothed":
        some = replace(some, q=groups.put(some.q.clone(), rows, blur(take(some.q, rows), lerp.grid, lerp.sigma)))
    single = len(program.blocks) == 1 and not program.weighted
    total = None if single else _zeros(some)
    for block in program.blocks:
        region = block.regions[number]
        if region.rows == 0:
            continue
        if lerp.of_queries:
            target = _block_target(some, region.whole, lerp, mean)
        else:
            target = _kept_rest(some, region, lerp)
        if single:
            return target
        weight = block.weight
        if isinstance(weight, Tensor) and weight.ndim:
            weight = take(weight.to(target.device), region.chosen, 0)
        add_weighted(total, region.queries, target, weight)
    return take(_zeros(some) if total is None else total, rows)


def _masked_target(some: Inputs, lerp: Lerp, rows: Tokens) -> Tensor:
    """The target of these rows under a mask of token pairs, (B, h, rows, D_v)."""
    if lerp.target == "uniform":
        allowed = (additive(some.picked_mask) > -math.inf).to(exact(some.v))
        return (allowed @ some.v.to(allowed.dtype)) / allowed.sum(-1, keepdim=True).clamp_min(1)
    q = take(some.q, rows)
    q = blur(q, lerp.grid, lerp.sigma) if lerp.target == "smoothed" else _mean_query(q).expand_as(q)
    return plain(replace(some, q=q, mask=take(some.mask, rows)))


def _zeros(inputs: Inputs) -> Tensor:
    batch, heads, n_q, _ = inputs.q.shape
    return inputs.q.new_zeros((batch, heads, n_q, inputs.v.shape[3]), dtype=exact(inputs.q))


def _mean_query(q: Tensor) -> Tensor:
    return q.mean(2, keepdim=True, dtype=exact(q)).to(q.dtype)


def _block_target(some: Inputs, block: Block, lerp: Lerp, mean: Tensor) -> Tensor:
    if lerp.target == "mean_query":
        return _mean_query_target(some, block, mean)
    if lerp.target == "smoothed":
        return attend_block(some, block, need_lse=False)[0]
    return _uniform(some, block) if lerp.target == "uniform" else _argmax(some, block)


def _mean_query_target(some: Inputs, block: Block, mean: Tensor) -> Tensor:
    """attn(q̄) over the block's keys, one row; if causal, row i sees the keys up to its own."""
    queries = mean.expand(-1, -1, block.rows, -1) if some.causal else mean
    return attend_block(some, block, need_lse=False, queries=queries)[0]


def _uniform(some: Inputs, block: Block) -> Tensor:
    """The mean of v over the keys that a row may attend to: (B, h, 1, D_v), if causal (B, h, rows, D_v)."""
    bundle = block.vector
    v = take(some.v, bundle.keys)
    if bundle.size == 0:
        return v.new_zeros(*v.shape[:2], 1, v.shape[3])
    bias = dense_bias(some, block) if len(bundle.parts) or some.key_bias is not None else None
    wide = exact(v)
    if bias is None and not some.causal:
        return v.mean(2, keepdim=True, dtype=wide)
    v, allowed = v.to(wide), v.new_ones(1, 1, bundle.size, 1, dtype=wide)
    if bias is not None:
        open_keys = (take(bias, bundle.keys) > -math.inf)[..., None]
        v, allowed = v.masked_fill(~open_keys, 0.0), open_keys.to(wide)
    if not some.causal:
        return v.sum(2, keepdim=True) / allowed.sum(2, keepdim=True).clamp_min(1)
    seen = _seen(block, v.device)
    sums, numbers = (torch.cat([torch.zeros_like(x[:, :, :1]), x.cumsum(2)], 2) for x in (v, allowed))
    return sums.index_select(2, seen) / numbers.index_select(2, seen).clamp_min(1)


def _seen(block: Block, device: torch.device) -> Tensor:
    """How many of the block's keys each of its rows sees, (rows,); causal blocks only."""
    if block.vector.limits is not None:
        return block.vector.limits.to(device)
    steps = [
        torch.arange(p.keys - (p.stop - p.start) + 1, p.keys + 1, device=device)
        if p.causal
        else torch.full((p.stop - p.start,), p.keys, device=device)
        for p in block.vector.pieces
    ]
    return torch.cat(steps) if steps else torch.zeros(0, dtype=torch.int64, device=device)


def _argmax(some: Inputs, block: Block) -> Tensor:
    """v of the largest logit of each row, (B, h, rows, D_v)."""
    q, bundle = take(some.q, block.queries), block.vector
    k, scale = scaled_keys(some, bundle)
    v = take(some.v, bundle.keys)
    if bundle.size == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    bias = None
    if len(bundle.parts) or some.key_bias is not None:
        bias = take(dense_bias(some, block), bundle.keys).unsqueeze(2)
    limits = _seen(block, q.device) if some.causal else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _, best = tiled_argmax(q, k, scale, bias, limits)
    return v.gather(2, best[..., None].expand(-1, -1, -1, v.shape[3]))


def _kept_rest(some: Inputs, region: Region, lerp: Lerp) -> Tensor:
    """w t + (1 - w) o^R: the target among the region's keys, attention to the rest R of the keys kept."""
    rest, lse_rest = attend_block(some, region.outside, need_lse=True)
    v = take(some.v, region.queries)
    if lerp.target == "identity" and lerp.mode == "mask":
        lse_in = _own_logit(some, region)
    else:
        _, lse_in = attend_block(some, region.inside, need_lse=True)
    if lerp.target == "identity":
        target = v
    else:
        target = _uniform(some, region.inside) if lerp.target == "uniform" else _argmax(some, region.inside)
    only_in, only_rest = lse_rest == -math.inf, lse_in == -math.inf
    difference = lse_in.masked_fill(only_rest, 0.0) - lse_rest.masked_fill(only_in, 0.0)
    share = torch.sigmoid(difference).masked_fill(only_in, 1.0).masked_fill(only_rest, 0.0)[..., None]
    return target.to(share.dtype) * share + rest.to(share.dtype) * (1 - share)


def _own_logit(some: Inputs, region: Region) -> Tensor:
    """s_ii with its bias, (B, h, rows); -inf where the row may not see itself."""
    wide = exact(some.q)
    q, k = take(some.q, region.queries).to(wide), take(some.k, region.queries).to(wide)
    scale = q.shape[-1] ** -0.5 if some.scale is None else some.scale
    bias = take(dense_bias(some, region.inside), region.queries)
    own = own_scale(region.inside, region.queries, some.k.shape[2])
    own = own.to(q.device, wide) if isinstance(own, Tensor) else own
    return (q * k).sum(-1) * own * scale + bias.to(wide)
