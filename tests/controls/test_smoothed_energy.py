import math

import pytest
import torch
from torch.nn import functional as F

import attnctrl as ac
from attnctrl.attention import Plan, run
from attnctrl.sites import Site, lay_out

from ..dense import plain, scores


SITES = (
    *(Site(f"b.{i}.attn", i, "joint", 4, ("image", "text")) for i in range(12)),
    Site("b.0.attn2", 0, "self", 4, ("image",), primary=False),
    Site("b.1.cross", 1, "cross", 4, ("image",), primary=False),
)
TEXT_FIRST = lay_out(("text", "image"), {"image": 24, "text": 5}, (4, 6))
IMAGE_FIRST = lay_out(("image", "text"), {"image": 24, "text": 5}, (4, 6))
ALONE = lay_out(("image",), {"image": 24}, (4, 6))
VIDEO = lay_out(("text", "image"), {"image": 24, "text": 5}, (2, 3, 4))


def qkv(n):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, n, 8, generator=generator).double() for _ in range(3)]


def blurred(q, grid, sigma):
    """The paper's blur of image queries (B, H, N, D): depth-wise convolution over H * D channels, reflected."""
    frames, (rows, columns) = math.prod(grid[:-2]), grid[-2:]
    taps = []
    for n in (rows, columns):
        width = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        x = torch.arange(min(width, n + 1 if n % 2 == 0 else n)).double()
        taps.append(torch.exp(-(((x - x.mean()) / sigma) ** 2) / 2))
    kernel = torch.outer(*(t / t.sum() for t in taps))
    batch, heads, _, dim = q.shape
    x = (
        q.reshape(batch, heads, frames, rows, columns, dim)
        .permute(0, 2, 1, 5, 3, 4)
        .reshape(-1, heads * dim, rows, columns)
    )
    x = F.pad(x, (len(taps[1]) // 2,) * 2 + (len(taps[0]) // 2,) * 2, mode="reflect")
    x = F.conv2d(x, kernel.expand(heads * dim, 1, -1, -1), groups=heads * dim)
    return x.reshape(batch, frames, heads, dim, rows * columns).permute(0, 2, 1, 4, 3).reshape(q.shape)


@pytest.mark.parametrize("tokens", [TEXT_FIRST, IMAGE_FIRST, ALONE, VIDEO])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 100.0, math.inf])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_equals_blurred_queries_with_explicit_maps(tokens, sigma, strength):
    control = ac.SmoothedEnergy(heads="3.0,3.2:0.5", sigma=sigma, strength=strength)
    weights = control.touches(SITES)["b.3.attn"]
    assert weights.tolist() == pytest.approx([strength, 0, strength / 2, 0])
    edit = control.edit(SITES[3], tokens, weights)
    q, k, v = qkv(tokens.length)
    plan = Plan(edit.segments, edit.lerps)
    plan.check(tokens.length, tokens.length, 4, 2)
    image = tokens.span("image")
    weak = q.clone()
    own = q[:, :, image]
    weak[:, :, image] = own.mean(2, keepdim=True) if sigma == math.inf else blurred(own, tokens.grid, sigma)
    u = weights.double()[:, None, None]
    expected = (1 - u) * plain(q, k, v) + u * (scores(weak, k).softmax(-1) @ v)
    out = run(q, k, v, plan)
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[:, [1, 3]], F.scaled_dot_product_attention(q, k, v)[:, [1, 3]])


def test_whole_layers_at_full_strength_keep_the_text_rows():
    control = ac.SmoothedEnergy("3")
    edit = control.edit(SITES[3], TEXT_FIRST, control.touches(SITES)["b.3.attn"])
    q, k, v = qkv(29)
    out = run(q, k, v, Plan(lerps=edit.lerps))
    torch.testing.assert_close(out[:, :, :5], plain(q, k, v)[:, :, :5])
    assert (out[:, :, 5:] == out[:, :, 5:6]).all(), "infinite sigma: every image row is the mean query's"


def test_touches_self_attention():
    assert list(ac.SmoothedEnergy("1,10").touches(SITES)) == ["b.1.attn", "b.10.attn"]
    assert len(ac.SmoothedEnergy().touches(SITES)) == 12
    assert list(ac.SmoothedEnergy(heads=[("b.0.attn2", 1)]).touches(SITES)) == ["b.0.attn2"]
    assert list(ac.SmoothedEnergy("1", heads="1.0,2.0").touches(SITES)) == ["b.1.attn"]
    assert list(ac.SmoothedEnergy(heads="1.0:0,3.1").touches(SITES)) == ["b.3.attn"], "head 1.0 weighs nothing"
    assert torch.equal(ac.SmoothedEnergy("1", strength=0.5).touches(SITES)["b.1.attn"], torch.full((4,), 0.5))


@pytest.mark.parametrize(
    "control, reason",
    [
        (ac.SmoothedEnergy("12"), "0 to 11"),
        (ac.SmoothedEnergy(heads="12.0"), "layers 0 to 11"),
        (ac.SmoothedEnergy(heads=[("b.1.cross", 0)]), "b.1.cross attends to the text alone"),
        (ac.SmoothedEnergy("2", heads="1.0"), "none of the heads 1.0 is in layers '2'"),
        (ac.SmoothedEnergy(heads="1.0:3"), "leaves 0-1"),
    ],
)
def test_what_does_not_exist_is_refused(control, reason):
    with pytest.raises(ac.AttnCtrlError, match=reason):
        control.touches(SITES)


def test_neutral():
    assert ac.SmoothedEnergy().guides and not ac.SmoothedEnergy().neutral
    nothing = ({"heads": "1.0:0,3.1:0"}, {"heads": ac.HeadBatch([None, "1.0:0"])})
    for wrong in ({"strength": 0.0}, {"scale": 0.0}, {"sigma": 0.16}, *nothing):
        assert ac.SmoothedEnergy(**wrong).neutral


def test_refused_arguments_are_named_together():
    with pytest.raises(ac.AttnCtrlError) as caught:
        ac.SmoothedEnergy(sigma=-1.0, strength=2.0)
    assert "sigma=-1.0" in str(caught.value) and "strength=2.0" in str(caught.value)
    with pytest.raises(ac.AttnCtrlError):
        ac.SmoothedEnergy(sigma=math.nan)
