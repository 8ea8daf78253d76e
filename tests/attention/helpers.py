"""What the attention tests share: random inputs and plans, and the error budget."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from attnctrl.attention import KeyGroup, Lerp, NegativeText, Plan, Segment, as_tokens
from attnctrl.attention.groups import Tokens


ROUNDINGS = 6  # to the dtype: probabilities, group output, merge, strength, target, lerp


def qkv(
    batch: int,
    heads: int,
    n_q: int,
    n_k: int | None = None,
    dim: int = 16,
    *,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
    std: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v (B, H, N, D) whose logits have about the given standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    n_k, kv_heads = n_k or n_q, kv_heads or heads
    shapes = (batch, heads, n_q, dim), (batch, kv_heads, n_k, dim), (batch, kv_heads, n_k, dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (q * math.sqrt(std)).to(dtype), (k * math.sqrt(std)).to(dtype), v.to(dtype)


def budget(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> float:
    """How far a fused float path may be from the float64 oracle, from dtype and lengths alone.

    Sums of m terms drift like sqrt(m) roundings; 4 of these deviations are allowed. With unit roundoffs u of the dtype
    and u_acc of its accumulator (float32 for half types), the logits bounded by S = scale max|q| max|k| (Euclidean
    norms):

        logit          |ds|  = 4 sqrt(D) u_acc S
        probability    |dp|/p = 2 |ds| + u_exp + 4 sqrt(n) u_acc,    u_exp = 2**-20, what aten's vectorised exp promises (float64: u)
        output         max|v| (|dp|/p + ROUNDINGS u)
    """
    dtype = q.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    u, u_acc = torch.finfo(dtype).eps / 2, torch.finfo(exact).eps / 2
    u_exp = u_acc if dtype == torch.float64 else 2.0**-20
    dim, n = q.shape[-1], k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    bound = scale * float(q.double().norm(dim=-1).max()) * float(k.double().norm(dim=-1).max())
    p = 8 * math.sqrt(dim) * u_acc * bound + u_exp + 4 * math.sqrt(n) * u_acc
    return float(v.double().abs().max()) * (p + ROUNDINGS * u)


def random_tokens(n: int, rng: random.Random, least: int = 1) -> Tokens:
    """A run, or scattered tokens, of 0..n."""
    size = rng.randint(least, n)
    if rng.random() < 0.5:
        start = rng.randint(0, n - size)
        return slice(start, start + size)
    return as_tokens(rng.sample(range(n), size))


def split(n: int, parts: int, rng: random.Random) -> list[Tokens]:
    """0..n cut into disjoint groups, runs or scattered."""
    order = list(range(n))
    if rng.random() < 0.6:
        rng.shuffle(order)
    cuts = [0, *sorted(rng.sample(range(1, n), min(parts, n) - 1)), n]
    return [as_tokens(order[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def size(tokens: Tokens) -> int:
    return tokens.stop - tokens.start if isinstance(tokens, slice) else len(tokens)


def random_segments(
    n_q: int, n_k: int, rng: random.Random, *, batch: int = 1, heads: int = 1, keep: int | None = None
) -> tuple[Segment, ...]:
    """Segments that cover all rows once, with biases of every kind; key ``keep`` is always visible (so no row is
    empty).
    """
    found = []
    for queries in split(n_q, rng.randint(1, 4), rng):
        keys = [group for group in split(n_k, rng.randint(1, 4), rng)]
        groups = [
            KeyGroup(tokens, _bias(tokens, rng, batch, heads), rng.choice((1.0, 1.0, 0.5, 2.0)))
            for tokens in keys
            if rng.random() < 0.7
        ]
        if keep is not None:
            groups = [KeyGroup(g.tokens, 0.5, g.scale) if _holds(g.tokens, keep) else g for g in groups]
            if not any(_holds(group.tokens, keep) for group in groups):
                groups.append(KeyGroup(slice(keep, keep + 1)))
        found.append(Segment(queries, tuple(groups)))
    return tuple(found)


def random_plan(n: int, rng: random.Random, *, batch: int, heads: int, keep: int = 0) -> Plan:
    """Overlapping weighted segments or a negative text, up to two lerps, sometimes a head scale."""
    segments: tuple[Segment, ...] = ()
    negative = random_negative(n, rng) if rng.random() < 0.2 else None
    if negative is None and rng.random() < 0.8:
        segments = random_segments(n, n, rng, batch=batch, heads=heads, keep=keep)
        if rng.random() < 0.4:
            segments = overlapped(segments, random_segments(n, n, rng, batch=batch, heads=heads, keep=keep), rng)
    lerps = tuple(random_lerp(n, rng, batch, heads) for _ in range(rng.randint(0, 2)))
    head_scale = torch.rand(heads, generator=_generator(rng)) + 0.5 if rng.random() < 0.3 else None
    return Plan(segments, lerps, head_scale, negative=negative)


def random_negative(n: int, rng: random.Random) -> NegativeText:
    """Image, prompt and negative prompt of a joint sequence, in any order."""
    image, positive, negative = rng.sample(split(n, 3, rng), 3)
    scale, tau = rng.choice((0.5, 2.0, 5.0)), rng.choice((1.2, 2.5, 20.0))
    return NegativeText(image, positive, negative, scale, tau, rng.choice((0.25, 1.0)), rng.choice(("l1", "l2")))


def random_mask(n_k: int, rng: random.Random, batch: int, heads: int, keep: int = 0) -> Tensor:
    """A key padding mask, bool or additive, in which key ``keep`` is open."""
    shape = (rng.choice((1, batch)), rng.choice((1, heads)), 1, n_k)
    mask = torch.rand(shape, generator=_generator(rng)) < 0.7
    mask[..., keep] = True
    return mask if rng.random() < 0.5 else torch.where(mask, 0.25, rng.choice((-1e4, -math.inf)))


def growth(plan: Plan) -> float:
    """By how much a plan may enlarge an error of attention: s Z+ - (s - 1) Z-, and twice that for the norms' ratio."""
    if plan.negative is None:
        return 1.0
    scale = plan.negative.scale
    return 1 + 2 * plan.negative.alpha * (abs(scale) + abs(scale - 1))


def steepest(plan: Plan) -> float:
    """The largest scale of logits in a plan."""
    return max((group.scale for segment in plan.segments for group in segment.keys), default=1.0)


def overlapped(left: tuple[Segment, ...], right: tuple[Segment, ...], rng: random.Random) -> tuple[Segment, ...]:
    """Both sets, every token in one of each, their weights a random partition of 1."""
    n = sum(size(segment.queries) for segment in left)
    share = torch.rand(n, generator=_generator(rng), dtype=torch.float64)
    index = torch.arange(n)
    one = [Segment(s.queries, s.keys, share[index[s.queries]]) for s in left]
    two = [Segment(s.queries, s.keys, 1 - share[index[s.queries]]) for s in right]
    return (*one, *two)


def random_lerp(n: int, rng: random.Random, batch: int, heads: int) -> Lerp:
    shape = (heads,) if rng.random() < 0.5 else (batch, heads)
    strength = torch.rand(shape, generator=_generator(rng))
    strength[torch.rand(shape, generator=_generator(rng)) < 0.3] = 0.0
    strength[torch.rand(shape, generator=_generator(rng)) < 0.2] = 1.0
    region = None if rng.random() < 0.4 else random_tokens(n, rng)
    target = rng.choice(("identity", "uniform", "mean_query", "argmax", "smoothed"))
    mode = rng.choice(("mask", "mass"))
    if target != "smoothed":
        return Lerp(target, strength, region, mode)
    tokens = n if region is None else size(region)
    rows = rng.choice([d for d in range(1, tokens + 1) if tokens % d == 0])
    grid = (rows, tokens // rows) if rng.random() < 0.7 else (rows, 1, tokens // rows)
    return Lerp(target, strength, region, mode, sigma=rng.choice((0.4, 1.0, 3.0, 50.0, math.inf)), grid=grid)


def _bias(tokens: Tokens, rng: random.Random, batch: int, heads: int) -> float | Tensor:
    kind = rng.random()
    if kind < 0.4:
        return 0.0
    if kind < 0.6:
        return rng.choice((-math.inf, 1.5, -0.7, math.log(2)))
    lead = rng.choice(((), (1, 1), (batch, 1), (1, heads), (batch, heads)))
    if kind < 0.7:
        return torch.randn((*lead, 1) if lead else (), generator=_generator(rng))
    bias = torch.randn(*lead, size(tokens), generator=_generator(rng))
    bias[torch.rand(bias.shape, generator=_generator(rng)) < 0.2] = -math.inf
    return bias


def _holds(tokens: Tokens, token: int) -> bool:
    return tokens.start <= token < tokens.stop if isinstance(tokens, slice) else token in tokens.tolist()


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))
