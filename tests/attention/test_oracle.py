"""The oracle itself, against torch's own attention and formulas written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnctrl.attention import KeyGroup, Lerp, Plan, Segment, dense, with_mask
from attnctrl.attention.oracle import materialize

from .helpers import qkv


@pytest.mark.parametrize("causal", [False, True])
def test_plain_is_torch(causal):
    q, k, v = qkv(2, 4, 9, kv_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(dense(q, k, v, Plan(), causal=causal), expected)


def test_bottom_right_causal():
    q, k, v = qkv(1, 1, 3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    torch.testing.assert_close(
        dense(q, k, v, Plan(), causal=True), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )


def test_segments_are_a_mask():
    q, k, v = qkv(1, 2, 6)
    plan = Plan(
        (
            Segment(slice(0, 4), (KeyGroup(slice(0, 2)), KeyGroup(slice(2, 4), 0.5))),
            Segment(slice(4, 6), (KeyGroup(torch.tensor([1, 5]), torch.tensor([0.0, -math.inf])),)),
        )
    )
    mask = torch.full((6, 6), -math.inf, dtype=torch.float64)
    mask[:4, :2], mask[:4, 2:4], mask[4:, 1] = 0.0, 0.5, 0.0
    torch.testing.assert_close(dense(q, k, v, plan), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_scales_multiply_logits_before_biases_and_masks():
    q, k, v = qkv(1, 2, 6)
    groups = (KeyGroup(slice(0, 2), 0.5, scale=3.0), KeyGroup(torch.tensor([3, 5]), scale=0.25))
    mask = torch.zeros(6, dtype=torch.float64)
    mask[3] = 0.75
    plan = with_mask(Plan((Segment(slice(0, 6), groups),)), mask[None, None, None], 6, 6)
    s = (q @ k.mT / 4)[..., [0, 1, 3, 5]] * torch.tensor([3.0, 3.0, 0.25, 0.25])
    s = s + torch.tensor([0.5, 0.5, 0.75, 0.0])
    torch.testing.assert_close(dense(q, k, v, plan), s.softmax(-1) @ v[:, :, [0, 1, 3, 5]])


def test_weights_blend_segments():
    q, k, v = qkv(1, 2, 6)
    left, right = (
        Segment(slice(0, 6), (KeyGroup(slice(0, 3)),), 0.25),
        Segment(slice(0, 6), (KeyGroup(slice(3, 6)),), 0.75),
    )
    one = F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3])
    two = F.scaled_dot_product_attention(q, k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(dense(q, k, v, Plan((left, right))), 0.25 * one + 0.75 * two)


def test_lerp_targets_by_hand():
    q, k, v = qkv(1, 2, 5)
    s = q @ k.mT / 4
    plain = s.softmax(-1) @ v
    u = torch.tensor([0.0, 0.5])
    targets = {
        "identity": v,
        "uniform": v.mean(2, keepdim=True).expand_as(v),
        "mean_query": ((q.mean(2, keepdim=True) @ k.mT / 4).softmax(-1) @ v).expand_as(v),
        "argmax": torch.stack([v[0, h][s[0, h].argmax(-1)] for h in range(2)])[None],
    }
    for name, target in targets.items():
        expected = plain.clone()
        expected[:, 1] = 0.5 * plain[:, 1] + 0.5 * target[:, 1]
        torch.testing.assert_close(dense(q, k, v, Plan(lerps=(Lerp(name, u),))), expected)


def test_rows_and_head_scale():
    q, k, v = qkv(3, 2, 4)
    out = dense(q, k, v, Plan(head_scale=torch.tensor([2.0, 0.0]), rows=(2, 0)))
    plain = dense(q, k, v, Plan())
    torch.testing.assert_close(out[1], plain[1])
    torch.testing.assert_close(out[[0, 2], 0], 2 * plain[[0, 2], 0])
    assert (out[[0, 2], 1] == 0).all()


def test_materialize_shapes():
    weights, biases = materialize(Plan((Segment(slice(0, 4), (KeyGroup(slice(0, 3)),)),)), 2, 3, 4, 5)
    assert weights[0].shape == (4,)
    assert biases[0].shape == (2, 3, 4, 5)
    assert (biases[0][..., 3:] == -math.inf).all()
