"""One attention call on whichever kernel can do it: ``attend(q, k, v) -> (out, lse)``, and ``merge`` of such results.

Layouts are (B, H, N, D) and LSE (B, H, N), float32 (float64 for float64 input), with ``lse = log sum_j exp(s_ij)``. A
row that sees no key returns zeros and lse = -inf. Causal attention is aligned to the bottom right: the last query sees
every key.

    n_q = 3, n_k = 5      x x x . .
                          x x x x .
                          x x x x x
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnctrl.attention.kernels import KERNELS, Call, Kernel, choose, count_kernel, facts
from attnctrl.errors import AttnCtrlError


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_bias: Tensor | None = None,
    limits: Tensor | None = None,
    need_lse: bool = True,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention and its LSE.

    Args:
        q: (B, H, n_q, D). k: (B, H_kv, n_k, D), v: (B, H_kv, n_k, D_v) with H a multiple of H_kv; keys are never
            repeated.
        scale: 1 / sqrt(D) if None.
        causal: bottom-right aligned.
        key_bias: (n_k,) or (B|1, H|1, n_k), added to the logits; -inf forbids a key.
        limits: (n_q,) how many of the first keys each row sees; only the math kernel takes it.
        need_lse: if False, the second value is None and every kernel is in play.
        kernel: a name out of ``KERNELS``; it runs or raises. None chooses.

    Returns:
        out (B, H, n_q, D_v) in the dtype of q, lse (B, H, n_q) in float32 (float64 for float64).
    """
    _check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n_q, n_k = q.shape[2], k.shape[2]
    bias = None if key_bias is None else _bias(key_bias, q, n_k)
    if kernel is not None and kernel not in KERNELS:
        raise AttnCtrlError(f"no kernel named {kernel!r}\nHINT: one of {', '.join(KERNELS)}")
    if n_q == 0 or n_k == 0:  # aten's CPU kernel divides by zero
        return _nothing(q, v, n_q, need_lse)
    if causal and limits is None and n_q != n_k and n_q > 1:
        return _causal_uneven(q, k, v, scale, bias, need_lse, kernel)
    causal = causal and n_q > 1

    call = facts(q, k, v, causal=causal, bias=bias, limits=limits, need_lse=need_lse)
    chosen = choose(call, kernel)
    count_kernel(chosen.name)
    extra = {} if limits is None else {"limits": limits}
    if call.gqa == 1:
        out, lse = chosen.run(*map(_rows_dense, (q, k, v)), scale, causal, bias, need_lse, **extra)
        return out, lse if need_lse else None
    return _grouped(chosen, call, q, k, v, scale, bias, need_lse, extra)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """aten's CPU kernel reads out of bounds instead of complaining."""
    right = q.ndim == k.ndim == v.ndim == 4
    right = right and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]
    right = right and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0
    if not right or not q.dtype == k.dtype == v.dtype:
        found = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in zip("qkv", (q, k, v), strict=True))
        raise AttnCtrlError(f"q (B, H, n_q, D), k (B, H_kv, n_k, D), v (B, H_kv, n_k, D_v) of one dtype; got {found}")


def _bias(bias: Tensor, q: Tensor, n_k: int) -> Tensor:
    """(n,), (B|1, H|1, n) or (B|1, H|1, 1, n) -> (B|1, H|1, 1, n) in float32 (float64)."""
    bias = bias.to(q.device, torch.float64 if q.dtype == torch.float64 else torch.float32)
    bias = bias[None, None, None] if bias.ndim == 1 else bias.unsqueeze(2) if bias.ndim == 3 else bias
    ok = bias.ndim == 4 and bias.shape[2] == 1 and bias.shape[3] == n_k
    if not ok or bias.shape[0] not in (1, q.shape[0]) or bias.shape[1] not in (1, q.shape[1]):
        raise AttnCtrlError(
            f"key bias {tuple(bias.shape)} for {n_k} keys and q {tuple(q.shape)}; (n,) or (B|1, H|1, n)"
        )
    return bias


def _rows_dense(x: Tensor) -> Tensor:
    """aten's CPU kernel reads garbage when the last dimension has a stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _nothing(q: Tensor, v: Tensor, n_q: int, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    shape = (q.shape[0], q.shape[1], n_q)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_zeros(*shape, v.shape[3]), q.new_full(shape, -math.inf, dtype=dtype) if need_lse else None


def _causal_uneven(q, k, v, scale, bias, need_lse, kernel):
    """Bottom-right causal with n_q != n_k: the earlier keys in full, the last square causal, merged by LSE."""
    n_q, n_k = q.shape[2], k.shape[2]
    name = {"scale": scale, "kernel": kernel}
    if n_q > n_k:
        blank = n_q - n_k
        out, lse = attend(q[:, :, blank:], k, v, causal=True, key_bias=bias, need_lse=need_lse, **name)
        empty, empty_lse = _nothing(q, v, blank, need_lse)
        return torch.cat([empty, out], 2), torch.cat([empty_lse, lse], 2) if need_lse else None
    early = n_k - n_q
    parts = [
        attend(q, k[:, :, :early], v[:, :, :early], key_bias=None if bias is None else bias[..., :early], **name),
        attend(
            q,
            k[:, :, early:],
            v[:, :, early:],
            causal=True,
            key_bias=None if bias is None else bias[..., early:],
            **name,
        ),
    ]
    out, lse = merge([part[0] for part in parts], [part[1] for part in parts])
    return out, lse if need_lse else None


def merge(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over disjoint key groups put together: exact.

    Args:
        outs: G x (B, H, N, D) or one (G, B, H, N, D). lses: G x (B, H, N) or one (G, B, H, N), with any log-bias
            added.

    Returns:
        out (B, H, N, D) in the dtype of the outs, summed in float32 (float64); lse (B, H, N). Without any key: zeros,
        -inf.
    """
    stacked = lses if isinstance(lses, Tensor) else torch.stack(tuple(lses))
    top = stacked.detach().amax(0)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    mass = (stacked - top).exp()
    total = mass.sum(0)
    dead = total == 0
    total = total.masked_fill(dead, 1.0)
    share = mass / total
    out: Tensor | None = None
    for one, weight in zip(outs, share, strict=True):
        term = one.to(weight.dtype) * weight[..., None]
        out = term if out is None else out + term
    return out.to(outs[0].dtype), (total.log() + top).masked_fill(dead, -math.inf)


def _grouped(chosen: type[Kernel], call: Call, q, k, v, scale, bias, need_lse, extra):
    """Grouped heads without repeating keys: the group becomes query rows, or, where rows or heads differ, a stride-0
    view.
    """
    batch, heads, n_q, _ = q.shape
    kv = k.shape[1]
    if not call.causal and not call.limits and (bias is None or bias.shape[1] == 1):
        folded = q.reshape(batch, kv, call.gqa * n_q, q.shape[3])
        out, lse = chosen.run(*map(_rows_dense, (folded, k, v)), scale, False, bias, need_lse)
    else:
        view = [x.reshape(batch * kv, 1, *x.shape[2:]).expand(-1, call.gqa, -1, -1) for x in (k, v)]
        if bias is not None:
            bias = bias.expand(batch, heads, 1, -1).reshape(batch * kv, call.gqa, 1, -1)
        rows = q.reshape(batch * kv, call.gqa, n_q, q.shape[3])
        out, lse = chosen.run(*map(_rows_dense, (rows, *view)), scale, call.causal, bias, need_lse, **extra)
    return out.reshape(batch, heads, n_q, -1), lse.reshape(batch, heads, n_q) if need_lse else None
