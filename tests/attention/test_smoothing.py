import math

import pytest
import torch
import torch.nn.functional as F

from attnctrl.attention import KeyGroup, Lerp, Plan, Segment, dense, record_kernels, run
from attnctrl.attention.oracle import convolved
from attnctrl.attention.smoothing import blur, blur_matrix, kernel_width
from attnctrl.errors import AttnCtrlError

from .helpers import budget, qkv


GRIDS = [(4, 6), (5, 5), (1, 7), (6, 1), (2, 3), (3, 2, 4), (9, 2)]


@pytest.mark.parametrize(
    "n, sigma, width",
    [(64, 0.1, 1), (64, 0.17, 3), (64, 1.0, 7), (64, 1.1, 7), (64, 100, 65), (63, 100, 63), (2, 9, 3), (1, 9, 1)],
)
def test_kernel_width(n, sigma, width):
    assert kernel_width(n, sigma) == width


def test_blur_matrix_by_hand():
    a, b = 1.0, math.exp(-0.5)
    total = a + 2 * b
    expected = torch.tensor([[a, 2 * b, 0], [b, a, b], [0, 2 * b, a]], dtype=torch.float64) / total
    assert kernel_width(3, 1.0) == 3
    torch.testing.assert_close(blur_matrix(3, 1.0, "cpu", torch.float64), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 40.0])
def test_blur_is_a_reflected_convolution(grid, sigma):
    n = math.prod(grid)
    q, _, _ = qkv(2, 3, n, dim=5)
    torch.testing.assert_close(blur(q, grid, sigma), convolved(q, grid, sigma))
    if len(grid) == 3:
        frame = n // grid[0]
        alone = blur(q[:, :, :frame], grid[1:], sigma)
        torch.testing.assert_close(blur(q, grid, sigma)[:, :, :frame], alone, msg="frames are blurred apart")


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (3, 2, 4)])
@pytest.mark.parametrize("sigma", [0.4, 2.0, 30.0])
@pytest.mark.parametrize("text", [0, 5])
def test_smoothed_attention_by_hand(grid, sigma, text):
    """Explicit matrices: logits of the blurred queries; text rows plain."""
    n = math.prod(grid)
    q, k, v = qkv(2, 3, n + text, std=2)
    image = slice(text, n + text)
    u = torch.tensor([0.3, 0, 1.0]).double()
    weak = q.clone()
    weak[:, :, image] = convolved(q[:, :, image], grid, sigma)
    plain, blurred = ((x @ k.mT / 4).softmax(-1) @ v for x in (q, weak))
    region = image if text else None
    plan = Plan(lerps=(Lerp("smoothed", u, region, sigma=sigma, grid=grid),))
    plan.check(n + text, n + text, 3)
    out = run(q, k, v, plan)
    torch.testing.assert_close(out, plain + u[:, None, None] * (blurred - plain))
    torch.testing.assert_close(out[:, :, :text], plain[:, :, :text])
    assert torch.equal(out[:, 1], F.scaled_dot_product_attention(q, k, v)[:, 1])


@pytest.mark.parametrize("region", [None, slice(3, 15)])
def test_a_kernel_of_one_token_is_the_models_own_call(region):
    q, k, v = qkv(1, 2, 12 if region is None else 15, dtype=torch.float32)
    plan = Plan(lerps=(Lerp("smoothed", torch.ones(2), region, sigma=0.16, grid=(3, 4)),))
    assert plan.is_plain
    assert torch.equal(run(q, k, v, plan), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_infinite_sigma_is_the_mean_query_of_the_region(strength):
    q, k, v = qkv(2, 3, 17)
    image, u = slice(5, 17), torch.full((3,), strength).double()
    lerp = Lerp("smoothed", u, image, sigma=math.inf, grid=(3, 4))
    out = run(q, k, v, Plan(lerps=(lerp,)))
    mean = (q[:, :, image].mean(2, keepdim=True) @ k.mT / 4).softmax(-1) @ v
    plain = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, :, image], plain[:, :, image].lerp(mean.expand(-1, -1, 12, -1), strength))
    torch.testing.assert_close(out[:, :, :5], plain[:, :, :5])
    assert torch.equal(out, run(q, k, v, Plan(lerps=(Lerp("mean_query", u, image),))))


def test_a_wide_kernel_is_not_the_mean():
    q, _, _ = qkv(1, 1, 12)
    assert (blur(q, (3, 4), 1e4) - q.mean(2, keepdim=True)).abs().max() > 0.05


FULL = {
    "smoothed": {"region": slice(4, 16), "sigma": 1.0, "grid": (3, 4)},
    "smoothed whole": {"sigma": 1.0, "grid": (4, 4)},
    "mean_query": {"region": torch.tensor([0, 3, 4, 9])},
    "mean_query whole": {},
    "uniform": {},
    "argmax": {},
}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_at_full_strength_what_is_replaced_is_not_computed(name, kv_heads):
    q, k, v = qkv(2, 4, 16, kv_heads=kv_heads, dtype=torch.float32)
    target = name.removesuffix(" whole")
    short = Plan(lerps=(Lerp(target, torch.ones(4), **FULL[name]),), rows=(1,))
    long = Plan(lerps=(Lerp(target, torch.ones(4), heads=(0, 1, 2, 3), **FULL[name]),), rows=(1,))
    with record_kernels() as log:
        out = run(q, k, v, short)
    expected = dense(q, k, v, short)
    assert float((out.double() - expected).abs().max()) <= budget(q, k, v)
    torch.testing.assert_close(out, run(q, k, v, long), rtol=0, atol=2**-21)
    rows = {"smoothed": 2, "mean_query": 2, "smoothed whole": 1, "mean_query whole": 1}.get(name, 0)
    assert sum(log.values()) == 1 + rows, "one call for the other batch row, the rest for this one"


def test_garbage_in_unset_rows_does_not_leak():
    """At full strength the old rows are overwritten, not multiplied by zero: poison what the allocator hands out."""
    q, k, v = qkv(1, 2, 64, dtype=torch.float32)
    plan = Plan(lerps=(Lerp("smoothed", torch.ones(2), slice(0, 16), sigma=1.0, grid=(4, 4)),))
    expected = dense(q, k, v, plan)
    for _ in range(5):
        poison = torch.full((1, 64, 2, 16), math.nan)
        del poison
        torch.testing.assert_close(run(q, k, v, plan).double(), expected, rtol=0, atol=budget(q, k, v))


def test_segments_and_smoothing_together():
    q, k, v = qkv(2, 3, 20)
    segments = (
        Segment(slice(0, 10), (KeyGroup(slice(0, 12)),)),
        Segment(slice(10, 20), (KeyGroup(slice(0, 4), 0.5), KeyGroup(slice(8, 20)))),
    )
    for strength in (torch.ones(3), torch.tensor([[0, 0.5, 1.0], [0.2, 0, 0]])):
        plan = Plan(segments, (Lerp("smoothed", strength, slice(4, 19), sigma=0.8, grid=(5, 3)),))
        torch.testing.assert_close(run(q, k, v, plan), dense(q, k, v, plan))


def test_strength_per_row_equals_separate_runs():
    q, k, v = qkv(3, 4, 16, dtype=torch.float32)
    u = torch.tensor([[0, 0.5, 0, 1], [0, 0, 0, 0], [0.2, 0, 0, 0.9]])
    lerp = {"region": slice(1, 16), "sigma": 1.0, "grid": (3, 5)}
    together = run(q, k, v, Plan(lerps=(Lerp("smoothed", u, **lerp),)))
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(together[1], plain[1])
    assert torch.equal(together[0, [0, 2]], plain[0, [0, 2]])
    for row in range(3):
        alone = run(
            q[row : row + 1], k[row : row + 1], v[row : row + 1], Plan(lerps=(Lerp("smoothed", u[row], **lerp),))
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2**-21)


def test_gradients_flow_through_the_blur():
    inputs = [x.requires_grad_() for x in qkv(1, 2, 9, dim=4)]
    for strength in (torch.tensor([0.4, 0.7]), torch.ones(2)):
        plan = Plan(lerps=(Lerp("smoothed", strength, slice(3, 9), sigma=0.7, grid=(2, 3)),))
        assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, plan), inputs, fast_mode=True)


def test_the_grid_must_hold_the_rows():
    plan = Plan(lerps=(Lerp("smoothed", torch.ones(2), sigma=1.0, grid=(3, 4)),))
    with pytest.raises(AttnCtrlError, match="3 x 4 has 12 tokens, got 13"):
        run(*qkv(1, 2, 13), plan)


def test_describe_names_sigma():
    plan = Plan(lerps=(Lerp("smoothed", torch.ones(2), slice(0, 12), sigma=2.5, grid=(3, 4)),))
    assert plan.describe() == "smoothed (sigma 2.5) 1 on heads 0,1, 12 region tokens"
