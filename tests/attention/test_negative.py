import math

import pytest
import torch
import torch.nn.functional as F

from attnctrl.attention import KeyGroup, Lerp, NegativeText, Plan, Segment, dense, record_kernels, run, with_mask

from .helpers import budget, growth, qkv


ORDERS = {
    "text first": (slice(8, 24), slice(3, 8), slice(0, 3)),
    "image first": (slice(0, 16), slice(16, 21), slice(21, 24)),
    "scattered": (torch.arange(0, 24, 2), torch.tensor([1, 5, 7, 9]), torch.tensor([3, 11, 13, 15, 17, 19, 21, 23])),
}
NORMS = {"l2": lambda z: z.pow(2).sum((1, 3)).sqrt(), "l1": lambda z: z.abs().sum((1, 3))}


def by_hand(q, k, v, image, positive, negative, scale, tau, alpha, norm):
    """Two full attentions of one sequence, then the paper's equations."""
    keep = torch.ones(24, dtype=torch.bool)
    outs = []
    for dropped in (negative, positive):
        seen = keep.clone()
        seen[dropped] = False
        outs.append(F.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen]))
    plus, minus = outs
    away = scale * plus - (scale - 1) * minus
    ratio = NORMS[norm](away) / NORMS[norm](plus)
    held = away * (ratio.clamp(max=tau) / ratio)[:, None, :, None]
    guided = alpha * held + (1 - alpha) * plus
    out = torch.empty_like(plus)
    out[:, :, image] = guided[:, :, image]
    out[:, :, positive] = plus[:, :, positive]
    out[:, :, negative] = minus[:, :, negative]
    return out, ratio[:, image]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("scale, tau, alpha", [(5.0, 2.5, 0.25), (5.0, 1.1, 1.0), (0.0, 2.5, 0.5), (1.5, 50.0, 1.0)])
def test_joint_attention_by_hand(order, norm, scale, tau, alpha):
    q, k, v = qkv(2, 3, 24, std=4)
    plan = Plan(negative=NegativeText(*ORDERS[order], scale, tau, alpha, norm))
    plan.check(24, 24, 3, 2)
    expected, ratio = by_hand(q, k, v, *ORDERS[order], scale, tau, alpha, norm)
    if tau == 1.1:
        assert (ratio > tau).any() and (ratio < 1e9).all(), "the bound is active somewhere"
    if tau == 50.0:
        assert (ratio < tau).all()
    torch.testing.assert_close(run(q, k, v, plan), expected)
    torch.testing.assert_close(dense(q, k, v, plan), expected)


def test_register_tokens_follow_the_positive_text():
    """Rows that are neither image nor text: all but the negative text sees them, and they see the same."""
    q, k, v = qkv(1, 2, 24)
    plan = Plan(negative=NegativeText(slice(10, 24), slice(4, 8), slice(8, 10), 3.0, 1.2, 0.5))
    plan.check(24, 24)
    out = run(q, k, v, plan)
    torch.testing.assert_close(out, dense(q, k, v, plan))
    seen = torch.tensor([i for i in range(24) if i not in (8, 9)])
    torch.testing.assert_close(
        out[:, :, :8], F.scaled_dot_product_attention(q[:, :, :8], k[:, :, seen], v[:, :, seen])
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("n_q", [7, 9])
def test_cross_attention_by_hand(kv_heads, n_q):
    """n_q = 9 equals the number of keys: every query is image, so it is cross-attention all the same."""
    q, k, v = qkv(2, 4, n_q, 9, kv_heads=kv_heads)
    how = NegativeText(slice(0, None), slice(0, 4), slice(4, 9), 4.0, 1.3, 0.5)
    plan = Plan(negative=how)
    plan.check(n_q, 9, 4, 2)
    plus, minus = (
        F.scaled_dot_product_attention(q, k[:, :, part], v[:, :, part], enable_gqa=True)
        for part in (slice(0, 4), slice(4, 9))
    )
    away = 4 * plus - 3 * minus
    ratio = NORMS["l2"](away) / NORMS["l2"](plus)
    held = away * (ratio.clamp(max=1.3) / ratio)[:, None, :, None]
    with record_kernels() as log:
        out = run(q, k, v, plan)
    torch.testing.assert_close(out, 0.5 * held + 0.5 * plus)
    torch.testing.assert_close(dense(q, k, v, plan), out)
    assert log == {"sdpa": 2}


def test_the_norm_runs_over_all_heads():
    q, k, v = qkv(1, 3, 24, std=4)
    v = v * torch.tensor([0.1, 1.0, 6.0]).double()[:, None, None]
    image, positive, negative = ORDERS["text first"]
    plan = Plan(negative=NegativeText(image, positive, negative, 5.0, 1.2, 1.0))
    whole = run(q, k, v, plan)[:, :, image]
    heads = [run(*(x[:, h : h + 1] for x in (q, k, v)), plan)[:, :, image] for h in range(3)]
    assert (whole - torch.cat(heads, 1)).abs().max() > 0.05
    torch.testing.assert_close(whole, by_hand(q, k, v, image, positive, negative, 5.0, 1.2, 1.0, "l2")[0][:, :, image])


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 40.0])
def test_the_same_text_twice_is_the_positive_text(scale):
    q, k, v = qkv(1, 2, 20)
    k[:, :, 4:8], v[:, :, 4:8] = k[:, :, :4], v[:, :, :4]
    out = run(q, k, v, Plan(negative=NegativeText(slice(8, 20), slice(0, 4), slice(4, 8), scale)))
    seen = torch.arange(20) // 4 != 1
    torch.testing.assert_close(
        out[:, :, 8:], F.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen])[:, :, 8:]
    )


@pytest.mark.parametrize("weights", [(1.0, 0.25), (5.0, 0.0)])
def test_neutral_values_are_the_positive_text(weights):
    q, k, v = qkv(1, 2, 24)
    image, positive, negative = ORDERS["image first"]
    out = run(q, k, v, Plan(negative=NegativeText(image, positive, negative, weights[0], 2.5, weights[1])))
    seen = torch.ones(24, dtype=torch.bool)
    seen[negative] = False
    expected = F.scaled_dot_product_attention(q[:, :, seen], k[:, :, seen], v[:, :, seen])
    torch.testing.assert_close(out[:, :, seen], expected)


def test_a_row_of_zeros_stays_zero():
    q, k, v = qkv(1, 2, 24)
    image, positive, negative = ORDERS["text first"]
    v[:, :, 3:] = 0
    out = run(q, k, v, Plan(negative=NegativeText(image, positive, negative)))
    assert (out[:, :, image] == 0).all()


@pytest.mark.parametrize("order", ["text first", "image first"])
def test_the_image_meets_itself_once(order):
    q, k, v = qkv(1, 2, 24, dtype=torch.float32)
    with record_kernels() as log:
        run(q, k, v, Plan(negative=NegativeText(*ORDERS[order])))
    assert log == {"cpu_flash": 3, "sdpa": 2}, "image, two texts; and the rows of the two texts"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_error_budget(dtype, kv_heads):
    q, k, v = qkv(2, 4, 24, kv_heads=kv_heads, dtype=dtype)
    plan = Plan(negative=NegativeText(*ORDERS["text first"], 5.0, 1.5, 0.5))
    error = float((run(q, k, v, plan).double() - dense(q, k, v, plan)).abs().max())
    assert error <= budget(q, k, v) * growth(plan)


def test_lerps_and_head_scale_come_after():
    q, k, v = qkv(2, 3, 24)
    image, positive, negative = ORDERS["image first"]
    how = NegativeText(image, positive, negative)
    guided = run(q, k, v, Plan(negative=how))
    u, scale = torch.tensor([0.5, 0, 1.0]).double(), torch.tensor([1, 0, 2.0]).double()
    out = run(q, k, v, Plan((), (Lerp("identity", u),), scale, negative=how))
    torch.testing.assert_close(out, (guided + u[:, None, None] * (v - guided)) * scale[:, None, None])
    # a target's keys are those that the row sees with the positive text
    out = run(q, k, v, Plan((), (Lerp("uniform", torch.ones(3)),), negative=how))
    seen, own = torch.arange(21), torch.cat([torch.arange(16), torch.arange(21, 24)])
    torch.testing.assert_close(out[:, :, :21], v[:, :, seen].mean(2, keepdim=True).expand(-1, -1, 21, -1))
    torch.testing.assert_close(out[:, :, 21:], v[:, :, own].mean(2, keepdim=True).expand(-1, -1, 3, -1))


def test_padded_text_and_rows():
    """Padding in either text equals shorter texts; the other batch row is the model's own call under its mask."""
    q, k, v = qkv(2, 3, 24)
    image, positive, negative = ORDERS["image first"]
    mask = torch.ones(2, 1, 1, 24, dtype=torch.bool)
    mask[1, ..., [19, 20, 23]] = False
    out = run(q, k, v, Plan(negative=NegativeText(image, positive, negative), rows=(1,)), mask=mask)
    assert torch.equal(out[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0])
    short = [i for i in range(24) if i not in (19, 20, 23)]
    cut = NegativeText(image, slice(16, 19), slice(19, 21))
    expected = run(*(x[1:, :, short] for x in (q, k, v)), Plan(negative=cut))
    torch.testing.assert_close(out[1:, :, short], expected)


@pytest.mark.parametrize("seed", range(4))
def test_gradients(seed):
    inputs = [x.requires_grad_() for x in qkv(2, 2, 9, dim=4, seed=seed)]
    order = [(slice(4, 9), slice(0, 2), slice(2, 4)), (slice(0, 5), slice(5, 8), slice(8, 9))][seed % 2]
    plan = Plan(negative=NegativeText(*order, 3.0, 1.3, 0.7, ("l2", "l1")[seed // 2]), rows=(1,))
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, plan), inputs, fast_mode=True)


def test_causal():
    q, k, v = qkv(1, 2, 24)
    for order in ORDERS.values():
        plan = Plan((), (Lerp("mean_query", torch.tensor([0.0, 0.4])),), negative=NegativeText(*order))
        torch.testing.assert_close(run(q, k, v, plan, causal=True), dense(q, k, v, plan, causal=True))


def test_segments_say_the_same_for_the_texts():
    """The text rows of a negative text are segments written out."""
    q, k, v = qkv(1, 2, 24)
    image, positive, negative = ORDERS["image first"]
    segments = (
        Segment(slice(0, 21), (KeyGroup(slice(0, 21)),)),
        Segment(negative, (KeyGroup(image), KeyGroup(negative))),
    )
    both = [run(q, k, v, plan) for plan in (Plan(segments), Plan(negative=NegativeText(image, positive, negative)))]
    torch.testing.assert_close(both[0][:, :, 16:], both[1][:, :, 16:])


def test_describe():
    plan = Plan(negative=NegativeText(slice(0, 16), slice(16, 20), slice(20, 24)))
    assert plan.describe() == "negative text, scale 5, tau 2.5, alpha 0.25, l2"
    masked = with_mask(plan, torch.arange(24) < 20, 24, 24)
    assert masked.describe().endswith("; under a key mask") and not math.isnan(masked.key_bias[0, 0, 0])
