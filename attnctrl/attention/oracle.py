"""The same plan with explicit N x N matrices in float64: what the engine is held against.

This is the only path of the package that allocates N x N, and it shares no arithmetic with the engine. For every
segment s

    L_s[i, j]  = bias of key j where the segment holds i and j, else -inf          (materialize)
    c_s[j]     = scale of key j in the segment                                      (scales_of)
    out        = sum_s diag(w_s) softmax(scale q (c_s k)' + mask + L_s) v
    out       <- alpha Z^ + (1 - alpha) Z+   in the image rows of a negative text   (dense_negative)
    out       <- (1 - u) out + u T v         for every lerp, T explicit             (dense_lerp)
    out        = head_scale * out
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctrl.attention.groups import Tokens
from attnctrl.attention.plan import FORBIDS, KeyGroup, Lerp, NegativeText, Plan, Segment, Watch


def dense(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """Attention under a plan, (B, H, n_q, D_v) float64; q (B, H, n_q, D), k and v (B, H_kv, n_k, D)."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if plan.rows is not None:
        out = dense(q, k, v, Plan(), scale=scale, causal=causal)
        rows = list(plan.rows)
        out[rows] = dense(q[rows], k[rows], v[rows], replace(plan, rows=None), scale=scale, causal=causal)
        return out
    if plan.by_row:
        one = [one_row(plan, row, q.shape[0], k.shape[2]) for row in range(q.shape[0])]
        order = [[row, *(other for other in range(q.shape[0]) if other != row)] for row in range(q.shape[0])]
        keys, values = ([x[rows].transpose(0, 1).flatten(1, 2)[None] for rows in order] for x in (k, v))
        return torch.cat([dense(q[i : i + 1], keys[i], values[i], one[i], scale=scale) for i in range(len(one))])
    weights, biases = materialize(plan, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    keys = [k * c[:, None] for c in scales_of(plan, k.shape[2], k.device)]
    logits = [logits_of(q, some, plan, scale, causal) + bias for some, bias in zip(keys, biases, strict=True)]
    out = sum(w[:, None] * (softmax(s) @ v) for w, s in zip(weights, logits, strict=True))
    if plan.negative is not None:
        out = dense_negative(plan.negative, logits_of(q, k, plan, scale, causal), v, out)
    for lerp in plan.lerps:
        if isinstance(lerp, Watch):
            continue
        target = sum(
            w[:, None] * (dense_lerp(lerp, q, some, s, scale, causal) @ v)
            for w, some, s in zip(weights, keys, logits, strict=True)
        )
        u = lerp.strength.double().to(q.device).reshape(-1, q.shape[1], 1, 1)
        if lerp.heads is not None:
            untouched = [head for head in range(q.shape[1]) if head not in lerp.heads]
            u = u.clone()
            u[:, untouched] = 0
        if lerp.region is not None:
            u = u * mask_of(lerp.region, q.shape[2], q.device).double()[:, None]
        out = (1 - u) * out + u * target
    if plan.head_scale is not None:
        out = out * plan.head_scale.double().to(q.device).reshape(-1, q.shape[1], 1, 1)
    return out


def logits_of(q: Tensor, k: Tensor, plan: Plan, scale: float | None, causal: bool) -> Tensor:
    """(B, H, n_q, n_k) under the plan's mask, -inf where a row may not look."""
    s = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        offset = s.shape[-1] - s.shape[-2]
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(offset), -math.inf)
    if plan.key_bias is not None:
        s = s + plan.key_bias.double()[:, :, None]
    elif plan.mask is not None:
        if plan.mask.dtype == torch.bool:
            s = s.masked_fill(~plan.mask, -math.inf)
        else:
            s = (s + plan.mask.double()).masked_fill(plan.mask <= FORBIDS, -math.inf)
    return s


def one_row(plan: Plan, row: int, batch: int, n_k: int) -> Plan:
    """The plan of one batch row over the keys of all rows, its own first, then those of the others in order."""
    order = [row, *(other for other in range(batch) if other != row)]

    def at(tokens: Tokens, lender: int) -> Tensor:
        return mask_of(tokens, n_k, "cpu").nonzero().flatten() + order.index(lender) * n_k

    def of_row(x: Tensor | None, lead: int) -> Tensor | None:
        return x[row : row + 1] if isinstance(x, Tensor) and x.ndim == lead and x.shape[0] > 1 else x

    segments = []
    for segment in plan.segments:
        if segment.rows is not None and row not in segment.rows:
            continue
        borrowed, peers = [], segment.peers
        for lender in peers.sources(row, batch) if peers is not None else ():
            tokens = torch.tensor([i for a, b in peers.lent(lender, n_k) for i in range(a, b)], dtype=torch.int64)
            borrowed += [KeyGroup(at(tokens, lender), peers.added(lender, n_k))] if len(tokens) else []
        own = []
        for group in segment.keys:
            these, bias = at(group.tokens, row), of_row(group.bias, 3)
            if borrowed and peers.instead is not None:
                kept = ~mask_of(peers.instead, n_k, "cpu")[these]
                per_key = isinstance(bias, Tensor) and bias.ndim > 0 and bias.shape[-1] > 1
                these, bias = these[kept], bias[..., kept] if per_key else bias
            own.append(KeyGroup(these, bias, group.scale))
        segments.append(Segment(segment.queries, (*own, *borrowed), segment.weight))
    lerps = [replace(lerp, strength=of_row(lerp.strength, 2)) for lerp in plan.lerps if not isinstance(lerp, Watch)]
    closed = [
        lerp if lerp.region is None else replace(lerp, region=mask_of(lerp.region, n_k, "cpu").nonzero().flatten())
        for lerp in lerps
    ]
    bias = plan.key_bias
    if bias is not None:
        bias = bias.expand(batch, -1, -1)[order].transpose(0, 1).flatten(1)[None]
    return Plan(tuple(segments), tuple(closed), of_row(plan.head_scale, 2), key_bias=bias)


def materialize(
    plan: Plan, batch: int, heads: int, n_q: int, n_k: int, device: torch.device | str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """For each segment its weights (n_q,) and its log-bias (B, H, n_q, n_k), -inf where a row may not look."""
    if plan.negative is not None:
        _, positive, _ = views_of(plan.negative, n_q, n_k, device)
        bias = torch.zeros(n_q, n_k, dtype=torch.float64, device=device).masked_fill(~positive, -math.inf)
        return [torch.ones(n_q, dtype=torch.float64, device=device)], [bias.expand(batch, heads, -1, -1)]
    weights, biases = [], []
    for segment in plan.segments or (Segment(slice(0, n_q), (KeyGroup(slice(0, n_k)),)),):
        rows = mask_of(segment.queries, n_q, device)
        weight = torch.zeros(n_q, dtype=torch.float64, device=device)
        weight[rows] = torch.as_tensor(segment.weight, dtype=torch.float64, device=device)
        bias = torch.full((batch, heads, n_k), -math.inf, dtype=torch.float64, device=device)
        for group in segment.keys:
            bias[:, :, mask_of(group.tokens, n_k, device)] = torch.as_tensor(
                group.bias, dtype=torch.float64, device=device
            )
        weights.append(weight)
        biases.append(bias[:, :, None].masked_fill(~rows[:, None], -math.inf))
    return weights, biases


def scales_of(plan: Plan, n_k: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """For each segment what multiplies the logits of every key, (n_k,)."""
    found = []
    for segment in plan.segments or (Segment(slice(0, 0), ()),):
        scale = torch.ones(n_k, dtype=torch.float64, device=device)
        for group in segment.keys:
            scale[mask_of(group.tokens, n_k, device)] = group.scale
        found.append(scale)
    return found


def dense_lerp(lerp: Lerp, q: Tensor, k: Tensor, s: Tensor, scale: float | None, causal: bool) -> Tensor:
    """The target pattern T (B, H, n_q, n_k) of a lerp; s are the logits, -inf where a row may not look."""
    n_q, n_k = s.shape[-2:]
    allowed = s > -math.inf
    rows = mask_of(slice(0, n_q) if lerp.region is None else lerp.region, n_q, s.device)
    if lerp.of_queries:
        other = q[:, :, rows].mean(2, keepdim=True) if lerp.target == "mean_query" else q.clone()
        if lerp.target == "smoothed":
            other[:, :, rows] = convolved(q[:, :, rows], lerp.grid, lerp.sigma)
        logits = (other @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        # s = q k' + bias: the bias is what remains, the other queries take it over
        bias = torch.where(
            allowed, s - (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale), 0.0
        )
        return softmax(torch.where(allowed, logits + bias, -math.inf))
    if lerp.region is None:
        return one_target(lerp.target, s)
    inside = mask_of(lerp.region, n_k, s.device)
    if lerp.target == "identity" and lerp.mode == "mask":
        own = torch.eye(n_q, n_k, dtype=torch.bool, device=s.device)
        return softmax(s.masked_fill(inside & ~own, -math.inf))
    pattern = softmax(s)
    mass = (pattern * inside).sum(-1, keepdim=True)
    if lerp.target == "identity":
        chosen = torch.eye(n_q, n_k, dtype=s.dtype, device=s.device)
    else:
        chosen = one_target(lerp.target, s.masked_fill(~inside, -math.inf))
    rest = softmax(s.masked_fill(inside, -math.inf))
    return mass * chosen + (1 - mass) * rest


def convolved(q: Tensor, grid: tuple[int, ...], sigma: float) -> Tensor:
    """q (B, H, N, D) convolved with a two-dimensional Gaussian over the last two axes of the grid, reflected."""
    rows, columns = grid[-2:]
    taps = []
    for n in (rows, columns):
        width = math.ceil(6 * sigma)
        width = min(width if width % 2 else width + 1, n + 1 if n % 2 == 0 else n)
        x = torch.arange(width, dtype=torch.float64, device=q.device) - width // 2
        taps.append(torch.exp(-(x**2) / (2 * sigma**2)))
    kernel = torch.outer(*taps)
    kernel = kernel / kernel.sum()
    images = q.unflatten(2, (-1, rows, columns)).movedim(-1, 3).reshape(-1, 1, rows, columns)
    high, wide = len(taps[0]) // 2, len(taps[1]) // 2
    out = F.conv2d(F.pad(images, (wide, wide, high, high), mode="reflect"), kernel[None, None])
    return out.reshape(*q.shape[:2], -1, q.shape[3], rows * columns).transpose(3, 4).flatten(2, 3)


def views_of(negative: NegativeText, n_q: int, n_k: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Image rows (n_q,), and who sees whom with the positive and with the negative text in force, (n_q, n_k) bool.

    Rows of the negative text see all but the positive one, whichever text the image follows.
    """
    image = mask_of(negative.image, n_q, device)
    texts = mask_of(negative.positive, n_k, device), mask_of(negative.negative, n_k, device)
    views = []
    for other in (1, 0):
        view = (~texts[other]).expand(n_q, n_k).clone()
        if n_q == n_k and not image.all():
            view[texts[0]] = ~texts[1]
            view[texts[1]] = ~texts[0]
        views.append(view)
    return image, *views


def dense_negative(negative: NegativeText, s: Tensor, v: Tensor, positive: Tensor) -> Tensor:
    """Z+ (B, H, n_q, D_v) with its image rows pushed away from Z-; s are the logits."""
    image, _, against = views_of(negative, *s.shape[-2:], s.device)
    other = softmax(s.masked_fill(~against, -math.inf)) @ v
    away = negative.scale * positive - (negative.scale - 1) * other
    size = (lambda z: z.pow(2).sum((1, 3)).sqrt()) if negative.norm == "l2" else (lambda z: z.abs().sum((1, 3)))
    ratio = size(away) / size(positive)
    held = away * (ratio.clamp(max=negative.tau) / ratio)[:, None, :, None].nan_to_num(0.0)
    out = negative.alpha * held + (1 - negative.alpha) * positive
    return torch.where(image[:, None], out, positive)


def one_target(target: str, s: Tensor) -> Tensor:
    """Identity matrix, uniform over what a row sees, or one-hot at its largest logit: (B, H, n_q, n_k)."""
    allowed = (s > -math.inf).double()
    if target == "identity":
        return torch.eye(*s.shape[-2:], dtype=s.dtype, device=s.device).expand_as(s)
    if target == "uniform":
        return allowed / allowed.sum(-1, keepdim=True).clamp_min(1)
    return torch.zeros_like(s).scatter_(-1, s.argmax(-1, keepdim=True), 1.0) * allowed


def softmax(s: Tensor) -> Tensor:
    """Softmax along keys; a row that sees nothing is zero."""
    return torch.softmax(s, -1).nan_to_num(0.0)


def mask_of(tokens: Tokens, n: int, device: torch.device | str) -> Tensor:
    """(n,) bool."""
    mask = torch.zeros(n, dtype=torch.bool, device=device)
    mask[tokens] = True
    return mask
