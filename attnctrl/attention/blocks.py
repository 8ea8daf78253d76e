"""Attention of one block: its rows over its key bundles, maskless where it can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctrl.attention.dispatch import attend, merge
from attnctrl.attention.groups import Tokens, put, take
from attnctrl.attention.kernels import count_kernel
from attnctrl.attention.program import Block, Bundle
from attnctrl.errors import AttnCtrlError


@dataclass(frozen=True, eq=False)
class Inputs:
    """What every step of one call shares. q (B, H, n_q, D), k and v (B, H_kv, n_k, D), mask (B|1, H|1, 1|n_q, n_k) as the
    model passes it, key_bias (B|1, H|1, n_k) what it adds to the keys' logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    causal: bool
    kernel: str | None
    picked: tuple[int, ...] | None = None  # q, k, v are these heads only; biases and masks still have all
    mask: Tensor | None = None
    key_bias: Tensor | None = None
    own: int | None = None  # the first keys that are the rows' own, where keys of other rows follow

    def rows(self, tokens: Tokens) -> Inputs:
        """Only these batch rows; a key bias comes after."""
        q, k, v = (take(x, tokens, 0) for x in (self.q, self.k, self.v))
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else take(self.mask, tokens, 0)
        return replace(self, q=q, k=k, v=v, mask=mask)

    def heads(self, names: Sequence[int]) -> Inputs:
        """Only these query heads, each with its own key head."""
        q = heads_of(self.q, names)
        return replace(self, q=q, k=self._of_keys(self.k, names), v=self._of_keys(self.v, names), picked=tuple(names))

    @property
    def picked_mask(self) -> Tensor | None:
        """The mask of these heads."""
        return _of_heads(self.mask, self.picked)

    def v_of_heads(self, names: Sequence[int]) -> Tensor:
        """v (B, h, n_k, D_v) of these query heads."""
        return self._of_keys(self.v, names)

    def _of_keys(self, x: Tensor, names: Sequence[int]) -> Tensor:
        group = self.q.shape[1] // x.shape[1]
        return heads_of(x, [head // group for head in names])


def heads_of(x: Tensor, names: Sequence[int]) -> Tensor:
    """Heads of x (B, H, ...), ascending, repeats allowed: a view for a run, else a copy of just these heads."""
    pieces: list[list[int]] = []
    for name in names:
        if pieces and pieces[-1][1] == name:
            pieces[-1][1] = name + 1
        else:
            pieces.append([name, name + 1])
    if pieces == [[0, x.shape[1]]]:
        return x
    parts = [x.narrow(1, a, b - a) for a, b in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def plain(inputs: Inputs) -> Tensor:
    """The call that the model would have made."""
    q, k, v = inputs.q, inputs.k, inputs.v
    n_q, n_k = q.shape[2], k.shape[2]
    mask = inputs.picked_mask
    causal = inputs.causal and n_q > 1
    own = inputs.kernel is None and not (causal and (n_q != n_k or mask is not None))
    if not own:
        if mask is not None and inputs.key_bias is None:
            raise AttnCtrlError("a mask of token pairs goes neither with causal attention nor with a kernel by name")
        bias = _of_heads(inputs.key_bias, inputs.picked)
        named = {"scale": inputs.scale, "causal": inputs.causal, "kernel": inputs.kernel, "key_bias": bias}
        return attend(q, k, v, need_lse=False, **named)[0]
    count_kernel("sdpa")
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=inputs.scale, is_causal=causal, enable_gqa=grouped
    )


def empty_out(inputs: Inputs) -> Tensor:
    """(B, H, n_q, D_v), laid out (B, n_q, H, D_v) as the output projection wants it."""
    (batch, heads, n_q, _), dim = inputs.q.shape, inputs.v.shape[3]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (inputs.q, inputs.k, inputs.v)):
        return inputs.q.new_empty(batch, heads, n_q, dim)  # autograd refuses to write to a view after a view of it
    return inputs.q.new_empty(batch, n_q, heads, dim).transpose(1, 2)


def attend_block(
    inputs: Inputs, block: Block, *, need_lse: bool, queries: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The rows of a block over its keys: out (B, H, rows, D_v), lse (B, H, rows) or None.

    ``queries`` stand in for the block's rows (as many of them if causal).
    """
    q = take(inputs.q, block.queries) if queries is None else queries
    bundles = block.bundles
    if len(bundles) > 1 and not need_lse and _prefers_vector(inputs, q, bundles):
        bundles = (block.vector,)
    if len(bundles) == 1 and not need_lse:
        return _attend_bundle(inputs, q, bundles[0], False)
    if len(bundles) == 0:
        out, lse = attend(q, inputs.k[:, :, :0], inputs.v[:, :, :0], scale=inputs.scale)
        return out, lse
    outs, lses = [], []
    for bundle in bundles:
        out, lse = _attend_bundle(inputs, q, bundle, True)
        outs.append(out)
        lses.append(_plus(lse, bundle.bias, inputs.picked))
    return (outs[0], lses[0]) if len(outs) == 1 else merge(outs, lses)


def _prefers_vector(inputs: Inputs, q: Tensor, bundles: tuple[Bundle, ...]) -> bool:
    """One call with a bias per key instead of a merge by LSE: fused kernels have no gradient through the LSE."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (q, inputs.k, inputs.v))


def _attend_bundle(inputs: Inputs, q: Tensor, bundle: Bundle, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    k, scale = scaled_keys(inputs, bundle)
    v, bias = take(inputs.v, bundle.keys), key_bias(inputs, bundle)
    shared = {"scale": scale, "need_lse": need_lse, "kernel": inputs.kernel}
    if bundle.limits is not None:
        return attend(q, k, v, key_bias=bias, limits=bundle.limits, **shared)
    if bundle.pieces is None:
        return attend(q, k, v, key_bias=bias, **shared)
    parts = []
    for start, stop, keys, causal in bundle.pieces:
        part_bias = None if bias is None else bias[..., :keys]
        rows = q[:, :, start:stop]
        parts.append(attend(rows, k[:, :, :keys], v[:, :, :keys], causal=causal, key_bias=part_bias, **shared))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2) if need_lse else None


def scaled_keys(inputs: Inputs, bundle: Bundle) -> tuple[Tensor, float | None]:
    """The bundle's keys and the scale of the logits: one number is part of that, different ones multiply the keys."""
    k = take(inputs.k, bundle.keys)
    if isinstance(bundle.scale, Tensor):
        return k * bundle.scale.to(k.device, k.dtype)[:, None], inputs.scale
    if bundle.scale == 1:
        return k, inputs.scale
    return k, (k.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale) * bundle.scale


def key_bias(inputs: Inputs, bundle: Bundle) -> Tensor | None:
    """What is added to the logits of the bundle's keys, by the plan and by the mask: (1|B, 1|h, n), or None."""
    bias = _of_heads(bundle.key_bias(inputs.q.device, exact(inputs.q)), inputs.picked)
    if inputs.key_bias is None:
        return bias
    mask = take(_of_heads(inputs.key_bias, inputs.picked).to(inputs.q.device, exact(inputs.q)), bundle.keys)
    return mask if bias is None else bias + mask


def _of_heads(bias: Tensor | None, picked: tuple[int, ...] | None) -> Tensor | None:
    if bias is None or picked is None or bias.ndim < 3 or bias.shape[1] == 1:
        return bias
    return heads_of(bias, picked)


def _plus(lse: Tensor, bias: float | Tensor, picked: tuple[int, ...] | None) -> Tensor:
    if not isinstance(bias, Tensor):
        return lse if bias == 0 else lse + bias
    bias = bias.to(lse.device, lse.dtype)
    return lse + (bias if bias.ndim < 3 else _of_heads(bias, picked))


def exact(x: Tensor) -> torch.dtype:
    """What sums are made in: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense_bias(inputs: Inputs, block: Block) -> Tensor:
    """The bias of every key as the block sees it, -inf where it does not: (B|1, H|1, n_k)."""
    bundle, n_k, device = block.vector, inputs.k.shape[2], inputs.k.device
    bias = key_bias(inputs, bundle)
    if bias is None:
        bias = torch.zeros(1, 1, bundle.size, device=device, dtype=exact(inputs.k))
    full = bias.new_full((*bias.shape[:2], n_k), -math.inf)
    if isinstance(bundle.keys, slice):
        take(full, bundle.keys, 2).copy_(bias)
    else:
        full.index_copy_(2, bundle.keys.to(device), bias)
    return full


def own_scale(block: Block, tokens: Tokens, n_k: int) -> float | Tensor:
    """What multiplies the logit of each of these tokens with its own key, which is in the block: a number, or (n,)."""
    scale = block.vector.scale
    if not isinstance(scale, Tensor):
        return scale
    return take(put(scale.new_ones(n_k), block.vector.keys, scale, 0), tokens, 0)


def add_weighted(total: Tensor, tokens: Tokens, part: Tensor, weight: float | Tensor) -> None:
    """total[tokens] += weight * part, in place; total (B, H, n_q, D) in float32 or wider, weight one number or
    (tokens,).
    """
    if isinstance(weight, Tensor):
        weight = weight.to(total.device, total.dtype)
        weight = weight if weight.ndim == 0 else weight[:, None]
    part = part.to(total.dtype) * weight
    if isinstance(tokens, slice):
        take(total, tokens).add_(part)
    else:
        total.index_add_(2, tokens.to(total.device), part.expand(-1, -1, len(tokens), -1))
