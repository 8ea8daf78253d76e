"""Masks that the model itself passes: ``with_mask``, and ``mask=`` of ``run``."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from attnctrl.attention import (
    KeyGroup,
    Lerp,
    NegativeText,
    Plan,
    Segment,
    dense,
    record_kernels,
    run,
    run_rows,
    with_mask,
)
from attnctrl.errors import AttnCtrlError

from .helpers import budget, qkv


N = 18
SEGMENTS = (
    Segment(slice(0, 10), (KeyGroup(slice(0, 6), 0.5), KeyGroup(slice(10, 18)))),
    Segment(slice(10, 18), (KeyGroup(slice(4, 18), torch.linspace(-1, 1, 14)),)),
)
PLANS = {
    "whole": Plan(head_scale=torch.tensor([1.0, 0.5, 0, 2])),
    "segments": Plan(SEGMENTS),
    "negative": Plan(negative=NegativeText(slice(0, 10), slice(10, 14), slice(14, 18))),
    **{
        f"{target} {region is not None} {mode}": Plan(
            lerps=(Lerp(target, torch.tensor([0, 0.4, 1.0, 0.2]), region, mode),)
        )
        for target, region, mode in itertools.product(
            ("identity", "uniform", "mean_query", "argmax"), (None, slice(3, 12)), ("mask", "mass")
        )
    },
    "smoothed": Plan(
        lerps=(Lerp("smoothed", torch.tensor([0, 0.4, 1.0, 0.2]), slice(0, 12), sigma=1.0, grid=(3, 4)),)
    ),
    "smoothed alone": Plan(lerps=(Lerp("smoothed", torch.ones(4), slice(0, 12), sigma=1.0, grid=(3, 4)),)),
    "both": Plan(SEGMENTS, (Lerp("uniform", torch.tensor([0, 0.4, 1.0, 0.2]), slice(3, 12)),)),
}


def padding(batch: int = 2) -> torch.Tensor:
    """(B, 1, 1, N) bool: other padding in every sample."""
    mask = torch.ones(batch, 1, 1, N, dtype=torch.bool)
    mask[0, ..., 12:15] = False
    mask[-1, ..., [2, 9, 16]] = False
    return mask


def spellings(mask: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What models pass for the same padding."""
    zero = torch.zeros((), dtype=dtype)
    return {
        "bool": mask,
        "minimum": torch.where(mask, zero, torch.finfo(dtype).min),
        "infinity": torch.where(mask, zero, -math.inf),
        "ten thousand": (1 - mask.to(dtype)) * -10000.0,
        "expanded": mask.expand(-1, -1, N, -1),
        "repeated": mask.repeat(1, 4, N, 1),
    }


DOUBLE_ONLY = "argmax"  # near ties may fall to another key in a shorter float


@pytest.mark.parametrize(
    "name, dtype",
    [
        (name, dtype)
        for name in PLANS
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        if dtype == torch.float64 or DOUBLE_ONLY not in name
    ],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_padded_keys(name, dtype, kv_heads):
    """The same as absent keys, for every plan, spelling, sample and dtype; nothing of a padded key leaks."""
    q, k, v = qkv(2, 4, N, kv_heads=kv_heads, dtype=dtype)
    mask = padding()
    for spelling, written in spellings(mask, dtype).items():
        plan = with_mask(PLANS[name], written, N, N)
        out, expected = run(q, k, v, plan), dense(q, k, v, plan)
        factor = 10 if plan.negative is not None else 1
        assert float((out.double() - expected).abs().max()) <= factor * budget(q, k, v), spelling
        torch.testing.assert_close(expected, dense(q, k, v, with_mask(PLANS[name], mask, N, N)), msg=spelling)
    if "identity" in name:
        return  # a row's own value stays, padded or not
    other = [x.clone() for x in (k, v)]
    for x in other:
        x[0, :, 12:15] += 3
        x[1, :, [2, 9, 16]] -= 2
    again = run(q, *other, with_mask(PLANS[name], mask, N, N))
    torch.testing.assert_close(again, run(q, k, v, with_mask(PLANS[name], mask, N, N)), rtol=0, atol=budget(q, k, v))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("additive", [False, True])
def test_padded_rows_that_see_nothing(name, additive):
    """Some models hide everything from padded rows as well: the other rows are exact."""
    q, k, v = qkv(2, 4, N)
    mask = padding()
    pairs = mask & mask.transpose(2, 3)
    if additive:
        pairs = torch.where(pairs, 0.0, -math.inf).double()
    out = run(q, k, v, PLANS[name], mask=pairs)
    expected = dense(q, k, v, with_mask(PLANS[name], mask, N, N))
    for row in range(2):
        alive = mask[row, 0, 0]
        torch.testing.assert_close(out[row, :, alive], expected[row, :, alive])
    assert out.isfinite().all()


def test_one_row_that_differs_is_a_mask_of_pairs():
    pairs = padding() & padding().transpose(2, 3)
    pairs[0, 0, 3, 5] = False
    with pytest.raises(AttnCtrlError, match="masks pairs of tokens"):
        with_mask(PLANS["segments"], pairs, N, N)
    with pytest.raises(AttnCtrlError, match="masks pairs of tokens"):
        with_mask(PLANS["segments"], torch.where(pairs, 0.0, -math.inf) + torch.eye(N), N, N)


def test_a_plain_plan_is_the_models_call_bit_for_bit():
    q, k, v = qkv(2, 4, N, kv_heads=2, dtype=torch.bfloat16)
    for mask in (padding(), padding()[:1], torch.rand(2, 1, N, N) < 0.8, torch.randn(N, N).bfloat16()):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        neutral = Plan(lerps=(Lerp("identity", torch.zeros(4)),))
        assert torch.equal(run(q, k, v, neutral, mask=mask), expected)
        assert torch.equal(run(q, k, v, with_mask(neutral, mask, N, N)), expected)
        assert torch.equal(run_rows(q, k, v, (), mask=mask), expected)


def test_rows_in_no_plan_keep_the_mask():
    q, k, v = qkv(3, 4, N, dtype=torch.float32)
    mask = padding(3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    plans = (Plan(SEGMENTS, rows=(2,)), Plan(lerps=(Lerp("identity", torch.tensor([0, 0.5, 0, 0])),), rows=(1,)))
    with record_kernels() as log:
        out = run_rows(q, k, v, plans, mask=mask)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1, [0, 2, 3]], expected[1, [0, 2, 3]])
    assert log["sdpa"] >= 1
    alone = dense(q[2:], k[2:], v[2:], with_mask(Plan(SEGMENTS), mask[2:], N, N))
    torch.testing.assert_close(out[2:].double(), alone, rtol=0, atol=budget(q, k, v))
    masked = [with_mask(plan, mask[list(plan.rows)], N, N) for plan in plans]
    assert torch.equal(run_rows(q, k, v, masked, mask=mask), out)
    with pytest.raises(AttnCtrlError, match="would lose the mask"):
        run_rows(q, k, v, masked)


PAIRS = {
    "identity": Lerp("identity", torch.tensor([0, 0.5, 1.0, 0])),
    "uniform": Lerp("uniform", torch.tensor([[0, 0.5, 1.0, 0], [0.3, 0, 0, 0]])),
    "mean_query": Lerp("mean_query", torch.tensor([0, 0.5, 1.0, 0])),
    "smoothed": Lerp("smoothed", torch.tensor([0, 0.5, 1.0, 0]), sigma=1.0, grid=(3, 6)),
    "mean_query region": Lerp("mean_query", torch.tensor([0, 0.5, 1.0, 0]), slice(3, 12)),
    "smoothed region": Lerp(
        "smoothed", torch.tensor([0, 0.5, 1.0, 0]), torch.arange(0, 18, 3), sigma=1.0, grid=(2, 3)
    ),
    "smoothed region alone": Lerp("smoothed", torch.ones(4), slice(3, 9), sigma=1.0, grid=(2, 3)),
    "uniform alone": Lerp("uniform", torch.ones(4)),
    "mean_query alone": Lerp("mean_query", torch.ones(4)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["bool", "heads", "additive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masks_of_pairs(name, kind, dtype, kv_heads):
    """Lerps under a mask that tells rows apart."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 4 if kind == "heads" else 1, N, N, generator=generator) < 0.6
    mask[..., 0] = True
    if kind == "additive":
        mask = torch.where(mask, torch.randn(mask.shape, generator=generator), -math.inf).to(dtype)
    q, k, v = qkv(2, 4, N, kv_heads=kv_heads, dtype=dtype)
    plan = with_mask(Plan(lerps=(PAIRS[name],)), mask, N, N)
    assert plan.key_bias is None
    error = float((run(q, k, v, plan).double() - dense(q, k, v, plan)).abs().max())
    assert error <= budget(q, k, v)


def test_masks_of_pairs_by_hand():
    q, k, v = qkv(1, 2, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    uniform = mask.double() / mask.sum(-1, keepdim=True)
    mean = (q.mean(2, keepdim=True) @ k.mT / 4).expand(-1, -1, 6, -1).masked_fill(~mask, -math.inf).softmax(-1)
    for target, expected in (("uniform", uniform @ v), ("mean_query", mean @ v), ("identity", v)):
        out = run(q, k, v, Plan(lerps=(Lerp(target, torch.ones(2)),)), mask=mask)
        torch.testing.assert_close(out, expected.expand_as(out))


@pytest.mark.parametrize(
    "plan, reason",
    [
        (PLANS["segments"], "has segments"),
        (PLANS["negative"], "a negative text"),
        (PLANS["both"], "segments, uniform in a region"),
        (PLANS["identity True mask"], "identity in a region"),
        (PLANS["argmax False mask"], "target argmax"),
    ],
)
def test_what_a_mask_of_pairs_cannot_do_is_refused(plan, reason):
    with pytest.raises(AttnCtrlError, match=reason) as caught:
        with_mask(plan, torch.ones(N, N, dtype=torch.bool).tril(), N, N)
    assert "HINT" in str(caught.value)
    with_mask(plan, torch.ones(N, N, dtype=torch.bool), N, N)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_without_a_key_is_no_nan(name, dtype):
    """Segments may leave a sample without any open key, and whole samples may be padding."""
    q, k, v = qkv(3, 4, N, dtype=dtype)
    mask = torch.ones(3, 1, 1, N, dtype=torch.bool)
    mask[0, ..., 4:] = False
    mask[1] = False
    for written in spellings(mask, dtype).values():
        plan = with_mask(PLANS[name], written, N, N)
        assert run(q, k, v, plan)[[0, 2]].isfinite().all()
        if written.dtype == torch.bool:
            assert run(q, k, v, plan).isfinite().all()


def test_masks_that_fit_nothing_are_refused():
    ones = torch.ones
    for mask in (ones(N + 1).bool(), ones(2, 1, 5, N).bool(), ones(1, N).long(), ones(1, 1, 1, 1, N).bool()):
        with pytest.raises(AttnCtrlError, match="a mask is bool or float"):
            with_mask(Plan(), mask, N, N)
    with pytest.raises(AttnCtrlError, match="3 batch rows for a plan of 2"):
        with_mask(Plan(rows=(0, 1)), ones(3, 1, 1, N).bool(), N, N)
    masked = with_mask(Plan(), ones(N).bool(), N, N)
    with pytest.raises(AttnCtrlError, match="already has a mask"):
        with_mask(masked, ones(N).bool(), N, N)
    with pytest.raises(AttnCtrlError, match="before its mask"):
        masked.on(1)


def test_programs_are_shared_with_the_unmasked_plan():
    plan = Plan(SEGMENTS)
    for _ in range(3):
        run(*qkv(2, 4, N), with_mask(plan, padding(), N, N))
    assert len(plan.programs) == 1


def test_causal_with_padding():
    q, k, v = qkv(2, 4, N)
    for plan in (Plan(), PLANS["segments"], PLANS["both"]):
        plan = with_mask(plan, padding(), N, N)
        torch.testing.assert_close(run(q, k, v, plan, causal=True), dense(q, k, v, plan, causal=True))
