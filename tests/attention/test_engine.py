import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attnctrl.attention import (
    KeyGroup,
    Lerp,
    NegativeText,
    Plan,
    Segment,
    dense,
    group_attend,
    group_masses,
    merge,
    record_kernels,
    run,
    run_rows,
    signatures,
    tiled,
    with_mask,
)
from attnctrl.errors import AttnCtrlError

from .helpers import budget, growth, overlapped, qkv, random_mask, random_plan, random_segments, size, steepest


TARGETS = ("identity", "uniform", "mean_query", "argmax")
REGIONS = (None, slice(4, 17), torch.tensor([0, 3, 4, 9, 15, 20]))


def assert_exact(q, k, v, plan, **named):
    found, expected = run(q, k, v, plan, **named), dense(q, k, v, plan, **named)
    assert found.dtype == q.dtype and found.shape == expected.shape
    error = float((found.double() - expected).abs().max())
    allowed = budget(q, k * max(1.0, steepest(plan)), v, named.get("scale")) * growth(plan)
    assert error <= allowed, f"{error:.3g} > {allowed:.3g} for {plan.describe()}"


# --- plain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_neutral_plans_are_the_models_own_call(dtype, kv_heads, causal):
    q, k, v = qkv(2, 4, 21, kv_heads=kv_heads, dtype=dtype)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3, is_causal=causal, enable_gqa=kv_heads != 4)
    neutral = (
        Plan(),
        Plan(rows=(1,)),
        Plan(lerps=(Lerp("identity", torch.zeros(4)), Lerp("argmax", torch.zeros(2, 4)))),
        Plan((Segment(slice(0, None), (KeyGroup(slice(0, None)),)),)),
        Plan((Segment(slice(0, 21), (KeyGroup(slice(0, 9), 0.5), KeyGroup(slice(9, 21), 0.5))),)),
    )
    for plan in neutral[:4]:
        with record_kernels() as log:
            assert torch.equal(run(q, k, v, plan, scale=0.3, causal=causal), expected), plan.describe()
        assert log == {"sdpa": 1}, "a neutral plan costs no extra call"
    torch.testing.assert_close(run(q, k, v, neutral[4], scale=0.3, causal=causal), expected)
    assert torch.equal(run_rows(q, k, v, (), scale=0.3, causal=causal), expected)


def test_plain_causal_is_aligned_to_the_bottom_right():
    for n_q, n_k in ((1, 9), (4, 9)):
        assert_exact(*qkv(1, 4, n_q, n_k, kv_heads=2), Plan(), causal=True)


# --- random plans against the oracle ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(150))
def test_random_plans(seed):
    rng = random.Random(seed)
    n, heads, batch = rng.choice((5, 16, 37)), 4, rng.choice((1, 2))
    dtype = rng.choice((torch.float64, torch.float64, torch.float32, torch.bfloat16))
    plan = random_plan(n, rng, batch=batch, heads=heads)
    if dtype != torch.float64 and any(lerp.target == "argmax" for lerp in plan.lerps):
        dtype = torch.float64  # near ties may fall to another key
    q, k, v = qkv(batch, heads, n, dtype=dtype, kv_heads=rng.choice((4, 2, 1)), std=rng.choice((1, 4, 16)), seed=seed)
    causal = rng.random() < 0.4
    plan.check(n, n, heads, batch)
    if rng.random() < 0.3:
        mask = random_mask(n, rng, batch, heads)
        plan = with_mask(plan, mask.to(dtype) if mask.is_floating_point() else mask, n, n)
    assert_exact(q, k, v, plan, causal=causal)


@pytest.mark.parametrize("seed", range(40))
def test_random_segments_with_other_lengths(seed):
    rng = random.Random(1000 + seed)
    n_q, n_k = rng.choice(((3, 40), (1, 20), (20, 33), (33, 20)))
    q, k, v = qkv(2, 4, n_q, n_k, kv_heads=rng.choice((4, 2)), std=4, seed=seed)
    causal = n_q <= n_k and rng.random() < 0.5
    plan = Plan(random_segments(n_q, n_k, rng, batch=2, heads=4, keep=0))
    plan.check(n_q, n_k, 4, 2)
    assert_exact(q, k, v, plan, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("std", [1, 4, 16])
def test_isolated_regions_with_text(dtype, std):
    """Four scattered regions of an image, each with its own text: one maskless call per region."""
    rng = random.Random(3)
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 4, (200,), generator=generator) == torch.arange(4)[:, None]
    groups = dict(signatures(masks))
    segments = []
    for region, tokens in groups.items():
        text = slice(200 + 8 * region[0], 208 + 8 * region[0])
        keys = (KeyGroup(tokens), KeyGroup(text))
        segments += [Segment(tokens, keys), Segment(text, keys)]
    plan = Plan(tuple(rng.sample(segments, len(segments))))
    plan.check(232, 232)
    q, k, v = qkv(2, 3, 232, dtype=dtype, std=std, dim=32)
    with record_kernels() as log:
        assert_exact(q, k, v, plan)
    assert log == {"sdpa": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scales", [(7.3, 7.3), (7.3, 1.9), (1.0, 0.2)])
def test_scaled_groups_are_one_call(scales, dtype):
    """One scale is that of the call; several multiply the keys."""
    q, k, v = qkv(2, 4, 18, 30, kv_heads=2, dtype=dtype)
    keys = (KeyGroup(slice(20, 30), scale=scales[0]), KeyGroup(torch.tensor([1, 4, 9]), scale=scales[1]))
    plan = Plan((Segment(slice(0, 18), keys),))
    plan.check(18, 30, heads=4, batch=2)
    with record_kernels() as log:
        assert_exact(q, k, v, plan, scale=0.3)
    assert sum(log.values()) == 1
    assert (
        float(
            (run(q, k, v, plan) - run(q, k, v, Plan((Segment(slice(0, 18), [KeyGroup(g.tokens) for g in keys]),))))
            .abs()
            .max()
        )
        > 1e-3
    )


@pytest.mark.parametrize("policy", ["union", "priority", "mean"])
@pytest.mark.parametrize("seed", range(4))
def test_overlap_policies(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(3, 40, generator=generator) < 0.5
    masks[0] |= ~masks.any(0)
    q, k, v = qkv(1, 2, 40, seed=seed)
    if policy == "priority":
        first = masks.int().argmax(0)
        masks = first == torch.arange(3)[:, None]
    if policy == "mean":
        weights = masks.double() / masks.double().sum(0)
        plan = Plan(
            tuple(
                Segment(m.nonzero().flatten(), (KeyGroup(m.nonzero().flatten()),), w[m])
                for m, w in zip(masks, weights)
            )
        )
        outs = [F.scaled_dot_product_attention(q, k[:, :, m], v[:, :, m]) for m in masks]
        expected = sum(w[:, None] * out for w, out in zip(weights, outs, strict=True))
    else:
        found = signatures(masks)
        plan = Plan(
            tuple(
                Segment(own, tuple(KeyGroup(t) for s, t in found if set(s) & set(signature)))
                for signature, own in found
            )
        )
        allowed = (masks[:, :, None] & masks[:, None]).any(0)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    plan.check(40, 40)
    torch.testing.assert_close(run(q, k, v, plan), expected)


def test_a_fully_masked_group_takes_no_mass():
    q, k, v = qkv(1, 2, 12, dtype=torch.float32)
    dead = KeyGroup(slice(0, 6), torch.full((6,), -math.inf))
    outs, lses = group_attend(q, k, v, (dead, KeyGroup(slice(6, 12))))
    torch.testing.assert_close(merge(outs, lses)[0], F.scaled_dot_product_attention(q, k[:, :, 6:], v[:, :, 6:]))
    assert (group_masses(q, k, (dead, slice(6, 12)))[..., 0] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_group_masses(causal, kv_heads):
    q, k, v = qkv(2, 4, 20, kv_heads=kv_heads)
    keys = (
        KeyGroup(slice(0, 3)),
        KeyGroup(torch.tensor([3, 7, 9]), 0.5),
        KeyGroup(torch.tensor([4, 5, 6, 8])),
        slice(10, 20),
    )
    s = q @ k.repeat_interleave(4 // kv_heads, 1).mT / 4
    s[..., [3, 7, 9]] += 0.5
    if causal:
        s = s.masked_fill(~torch.ones(20, 20).bool().tril(), -math.inf)
    p = s.softmax(-1)
    columns = ([0, 1, 2], [3, 7, 9], [4, 5, 6, 8], list(range(10, 20)))
    expected = torch.stack([p[..., c].sum(-1) for c in columns], -1)
    torch.testing.assert_close(group_masses(q, k, keys, causal=causal), expected)
    out, _ = merge(*group_attend(q, k, v, keys, causal=causal))
    torch.testing.assert_close(out, p @ v.repeat_interleave(4 // kv_heads, 1))


# --- lerps -----------------------------------------------------------------------------------------------------------


def explicit(q, k, v, target, u, region, mode):
    """SoftPAG and its siblings with an explicit L x L pattern, from the published equations."""
    n = q.shape[2]
    s = q @ k.mT * q.shape[-1] ** -0.5
    a = s.softmax(-1)
    inside = torch.ones(n, dtype=torch.bool) if region is None else torch.zeros(n, dtype=torch.bool)
    if region is not None:
        inside[region] = True
    eye = torch.eye(n, dtype=q.dtype).expand_as(a)
    if target == "mean_query":
        t = (q[:, :, inside].mean(2, keepdim=True) @ k.mT * q.shape[-1] ** -0.5).softmax(-1).expand_as(a)
    elif target == "identity" and mode == "mask":
        t = s.masked_fill(inside[None, :] & (eye == 0), -math.inf).softmax(-1)
    else:
        best = F.one_hot(s.masked_fill(~inside, -math.inf).argmax(-1), n).to(q.dtype)
        ones = (inside.to(q.dtype) / inside.sum()).expand_as(a)
        to = {"identity": eye, "uniform": ones, "argmax": best}[target]
        mass = a[..., inside].sum(-1, keepdim=True)
        t = mass * to + a * ~inside  # the rest of the row keeps its probabilities
    u = u.reshape(-1, q.shape[1], 1, 1) * inside.to(q.dtype)[:, None]
    return ((1 - u) * a + u * t) @ v


@pytest.mark.parametrize("target, region, mode", list(itertools.product(TARGETS, REGIONS, ("mask", "mass"))))
def test_soft_targets(target, region, mode):
    q, k, v = qkv(2, 6, 24, std=4)
    for u in (torch.tensor([0, 0.7, 0, 0, 1.0, 0.2]).double(), torch.rand(2, 6).double(), torch.ones(6).double()):
        plan = Plan(lerps=(Lerp(target, u, region, mode),))
        plan.check(24, 24, 6, 2)
        torch.testing.assert_close(run(q, k, v, plan), explicit(q, k, v, target, u, region, mode))


@pytest.mark.parametrize("target, region", list(itertools.product(TARGETS, REGIONS)))
def test_only_the_chosen_heads_and_rows_change(target, region):
    q, k, v = qkv(2, 6, 24, dtype=torch.float32)
    plain = F.scaled_dot_product_attention(q, k, v)
    u = torch.tensor([[0, 0.7, 0, 0, 0.3, 0], [0, 0, 0, 0, 1.0, 0]])
    out = run(q, k, v, Plan(lerps=(Lerp(target, u, region),)))
    assert torch.equal(out[0, [0, 2, 3, 5]], plain[0, [0, 2, 3, 5]])
    assert torch.equal(out[1, [0, 1, 2, 3, 5]], plain[1, [0, 1, 2, 3, 5]]), "strength 0 of a row is bit-exact too"
    inside = torch.ones(24, dtype=torch.bool) if region is None else torch.zeros(24, dtype=torch.bool)
    if region is not None:
        inside[region] = True
    assert torch.equal(out[:, :, ~inside], plain[:, :, ~inside]), "rows outside the region are untouched"
    assert (out[0, 1, inside] != plain[0, 1, inside]).any(-1).all()


def test_zero_strength_hides_even_infinities():
    q, k, v = qkv(1, 2, 6, dtype=torch.float32)
    v[:, 1, 3] = math.inf
    out = run(q, k, v, Plan(lerps=(Lerp("identity", torch.tensor([1.0, 0.0])),)))
    assert torch.equal(out[:, 1], F.scaled_dot_product_attention(q, k, v)[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_identity_at_full_strength_is_v(dtype, kv_heads):
    q, k, v = qkv(2, 6, 24, kv_heads=kv_heads, dtype=dtype)
    expected = v.repeat_interleave(6 // kv_heads, 1)
    with record_kernels() as log:
        short = run(q, k, v, Plan(lerps=(Lerp("identity", torch.ones(6)),)))
    assert not log, "neither q nor k is needed"
    assert torch.equal(short, expected)
    long = run(q, k, v, Plan(lerps=(Lerp("identity", torch.ones(6), heads=tuple(range(6))),)))
    assert torch.equal(long, expected), "the shortcut equals the lerp bit for bit"
    q.fill_(math.nan)
    assert torch.equal(run(q, k, v, Plan(lerps=(Lerp("identity", torch.ones(6)),))), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_strength_per_row_equals_separate_runs(target):
    q, k, v = qkv(3, 4, 15, dtype=torch.float32)
    u = torch.tensor([[0, 0.5, 0, 1], [0, 0, 0, 0], [0.2, 0, 0, 0.9]])
    together = run(q, k, v, Plan(lerps=(Lerp(target, u),)))
    for row in range(3):
        alone = run(q[row : row + 1], k[row : row + 1], v[row : row + 1], Plan(lerps=(Lerp(target, u[row]),)))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2**-22)


@pytest.mark.parametrize("target", TARGETS)
def test_heads_one_by_one_are_the_layer(target):
    q, k, v = qkv(1, 3, 15)
    one_by_one = tuple(Lerp(target, torch.eye(3)[head] * 0.6) for head in range(3))
    whole = run(q, k, v, Plan(lerps=(Lerp(target, torch.full((3,), 0.6)),)))
    torch.testing.assert_close(run(q, k, v, Plan(lerps=one_by_one)), whole, rtol=1e-14, atol=1e-14)


def test_an_empty_rest_leaves_only_the_target():
    q, k, v = qkv(1, 2, 9)
    for mode in ("mask", "mass"):
        lerp = Lerp("identity", torch.ones(2), slice(0, 9), mode)
        torch.testing.assert_close(run(q, k, v, Plan(lerps=(lerp,))), v)


def test_identity_needs_a_square():
    q, k, v = qkv(1, 2, 4, 9)
    with pytest.raises(AttnCtrlError, match="as many queries as keys"):
        run(q, k, v, Plan(lerps=(Lerp("identity", torch.tensor([0.5, 0.0])),)))


# --- batch rows ------------------------------------------------------------------------------------------------------


def test_rows_with_different_plans():
    rng = random.Random(5)
    q, k, v = qkv(5, 4, 18, kv_heads=2)
    plans = (
        Plan(random_segments(18, 18, rng, batch=1, heads=4, keep=0), rows=(3, 1)),
        Plan(lerps=(Lerp("identity", torch.tensor([0, 0.4, 0, 1])),), rows=(0,)),
        Plan(lerps=(Lerp("identity", torch.ones(4)),), head_scale=torch.tensor([1.0, 2, 3, 4]), rows=(4,)),
    )
    for causal in (False, True):
        out = run_rows(q, k, v, plans, causal=causal)
        for plan in plans:
            rows = list(plan.rows)
            torch.testing.assert_close(out[rows], dense(q, k, v, plan, causal=causal)[rows])
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        assert torch.equal(out[2], plain[2])


def test_cfg_halves_share_one_call():
    q, k, v = qkv(2, 4, 30, dtype=torch.bfloat16)
    plan = Plan(lerps=(Lerp("identity", torch.tensor([0, 0.7, 0, 0])),), rows=(1,))
    with record_kernels() as log:
        out = run(q, k, v, plan)
    assert log == {"sdpa": 1}
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(out[0], plain[0])
    assert torch.equal(out[1, 1], torch.lerp(plain[1, 1], v[1, 1], torch.tensor(0.7, dtype=torch.bfloat16)))


@pytest.mark.parametrize("rows", [((0,), (0, 1)), ((0,), (7,)), ((0,), None)])
def test_rows_must_be_disjoint_and_exist(rows):
    scale = torch.ones(2)
    with pytest.raises(AttnCtrlError, match="two plans|do not exist"):
        run_rows(*qkv(2, 2, 4), [Plan(head_scale=scale, rows=r) for r in rows])


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_gradients(seed):
    """Against finite differences, which know nothing of the engine."""
    rng = random.Random(seed)
    n, rows = 9, (1,) if seed % 2 else None
    causal = rng.random() < 0.4
    segments = random_segments(n, n, rng, batch=1, heads=4, keep=0)
    if seed % 3 == 0:
        segments = overlapped(segments, random_segments(n, n, rng, batch=1, heads=4, keep=0), rng)
    lerps = tuple(
        Lerp(target, torch.tensor([0, 0.7, 0, 0.4]), region, rng.choice(("mask", "mass")))
        for target, region in zip(rng.sample(TARGETS, 2), (None, slice(2, 7)), strict=True)
    )
    plan = Plan(
        segments if seed % 4 else (), lerps, torch.rand(4, generator=torch.Generator().manual_seed(seed)), rows
    )
    inputs = [x.requires_grad_() for x in qkv(2, 4, n, dim=4, kv_heads=2, seed=seed)]
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, plan, causal=causal), inputs, fast_mode=True)


def test_biased_groups_stay_fused_under_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 20, dtype=torch.float32))
    plan = Plan((Segment(slice(0, 20), (KeyGroup(slice(0, 5), 1.0), KeyGroup(slice(5, 20)))),))
    with record_kernels() as log:
        run(q, k, v, plan)
    assert log == {"sdpa": 1}
    with record_kernels() as log, torch.no_grad():
        run(q, k, v, plan)
    assert log == {"cpu_flash": 2}


# --- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operator inside the block returns (in elements of its storage)."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.untyped_storage().nbytes() // max(1, one.element_size()))
        return result


def largest(n, make, runner=run, causal=False, grad=False):
    q, k, v = (x.requires_grad_(grad) for x in qkv(1, 2, n, dim=8, dtype=torch.float32))
    plan = make(n)
    with Largest() as seen:
        out = runner(q, k, v, plan, causal=causal)
        if grad:
            out.sum().backward()
    return seen.numel


def _scattered(n):
    even, odd = torch.arange(0, n, 2), torch.arange(1, n, 2)
    return Plan(
        (Segment(even, (KeyGroup(odd),)), Segment(odd, (KeyGroup(even, 0.5), KeyGroup(odd, torch.randn(len(odd))))))
    )


def _lerp(target, region):
    def make(n):
        tokens = None if region is None else slice(0, n // 2) if region == "run" else torch.arange(0, n, 3)
        return Plan(lerps=(Lerp(target, torch.tensor([0.5, 0.0]), tokens, "mass"),))

    return make


MEMORY = {
    "scattered": _scattered,
    "biased": lambda n: Plan((Segment(slice(0, n), (KeyGroup(slice(0, n // 3), 1.0), KeyGroup(slice(n // 3, n)))),)),
    "weights": lambda n: Plan(
        (Segment(slice(0, n), (KeyGroup(slice(0, n)),), 0.5), Segment(slice(0, n), (KeyGroup(slice(0, 9)),), 0.5))
    ),
    "negative": lambda n: Plan(negative=NegativeText(slice(16, n), slice(0, 8), slice(8, 16))),
    "key mask": lambda n: with_mask(_lerp("uniform", "run")(n), torch.arange(n) % 5 > 0, n, n),
    "smoothed": lambda n: Plan(
        lerps=(Lerp("smoothed", torch.tensor([0.5, 0.0]), slice(n // 2, n), sigma=1.0, grid=(8, n // 16)),)
    ),
    **{f"{t} {r}": _lerp(t, r) for t in TARGETS for r in (None, "run", "scattered")},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_linear(name, causal, grad, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 1 << 10)
    small, large = (largest(n, MEMORY[name], causal=causal, grad=grad) for n in (192, 384))
    assert large <= 2.2 * small, f"{small} -> {large} elements"
    assert large < 384 * 384 / 2


def test_the_memory_test_sees_a_matrix():
    small, large = (largest(n, _scattered, dense) for n in (192, 384))
    assert large >= 3.5 * small


# --- kernels and compilation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_kernel_by_name_serves_the_whole_plan(seed):
    rng = random.Random(seed)
    plan = random_plan(20, rng, batch=2, heads=4)
    q, k, v = qkv(2, 4, 20, seed=seed)
    with record_kernels() as log:
        out = run(q, k, v, plan, kernel="math")
    assert set(log) <= {"math"}
    torch.testing.assert_close(out, dense(q, k, v, plan))


COMPILED = {
    "plain": Plan(),
    "slices": Plan(
        (
            Segment(slice(0, 10), (KeyGroup(slice(0, 12)), KeyGroup(slice(16, 20)))),
            Segment(slice(10, 20), (KeyGroup(slice(0, 4), 0.5), KeyGroup(slice(4, 20)))),
        )
    ),
    "scattered": Plan(
        (
            Segment(torch.arange(0, 20, 2), (KeyGroup(torch.arange(1, 20, 2)),)),
            Segment(torch.arange(1, 20, 2), (KeyGroup(slice(0, 20), torch.linspace(-1, 1, 20)),)),
        )
    ),
    "softpag": Plan(lerps=(Lerp("identity", torch.tensor([0, 0.7, 0, 0.2])),)),
    "softpag rows": Plan(lerps=(Lerp("identity", torch.tensor([0, 0.7, 0, 0.2])),), rows=(1,)),
    "v only": Plan(lerps=(Lerp("identity", torch.ones(4)),)),
    "uniform region": Plan(lerps=(Lerp("uniform", torch.tensor([0, 0.7, 0, 0.2]), slice(3, 9)),)),
    "mean query": Plan(lerps=(Lerp("mean_query", torch.tensor([0.3, 0.7, 0, 0])),)),
    "argmax": Plan(lerps=(Lerp("argmax", torch.tensor([0.3, 0.7, 0, 0])),)),
    "smoothed": Plan(lerps=(Lerp("smoothed", torch.tensor([0.3, 0.7, 0, 0]), slice(4, 20), sigma=1.0, grid=(4, 4)),)),
    "smoothed alone": Plan(lerps=(Lerp("smoothed", torch.ones(4), slice(4, 20), sigma=1.0, grid=(4, 4)),)),
    "negative": Plan(negative=NegativeText(slice(8, 20), slice(0, 4), slice(4, 8))),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name, causal):
    torch._dynamo.reset()
    plan = COMPILED[name]
    q, k, v = qkv(2, 4, 20, dtype=torch.float32)
    expected = run(q, k, v, plan, causal=causal)
    compiled = torch.compile(lambda q, k, v: run(q, k, v, plan, causal=causal), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected, rtol=0, atol=2**-21)


def test_changing_a_strength_does_not_recompile():
    torch._dynamo.reset()
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph.forward

    q, k, v = qkv(2, 4, 20, dtype=torch.float32)
    strength = torch.tensor([0, 0.7, 0, 0.2])
    function = torch.compile(lambda q, k, v, plan: run(q, k, v, plan), fullgraph=True, backend=backend)
    for value in (0.7, 0.3, 1.0, 0.0):
        strength[1] = value
        plan = Plan(lerps=(Lerp("identity", strength.clone(), heads=(1, 3)),))
        torch.testing.assert_close(function(q, k, v, plan), run(q, k, v, plan), rtol=0, atol=2**-21)
    assert len(compiles) == 1


def test_inputs_and_global_randomness_are_left_alone():
    q, k, v = qkv(2, 4, 20, dtype=torch.float32)
    before = [x.clone() for x in (q, k, v)]
    state = torch.get_rng_state()
    for plan in COMPILED.values():
        run(q, k, v, plan)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert size(slice(0, 4)) == 4
