import pytest
import torch
from torch.nn import functional as F

import attnctrl as ac
from attnctrl.attention import Plan, run
from attnctrl.sites import Site, lay_out


SITES = tuple(Site(f"b.{i}.attn", i, "joint", 4, ("image", "text")) for i in range(12))
TOKENS = lay_out(("image", "text"), {"image": 6, "text": 3}, (2, 3))


def scaled(control, path="b.1.attn", layer=1):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator) for _ in range(3))
    edit = control.edit(SITES[layer], TOKENS, control.touches(SITES)[path])
    plan = Plan(edit.segments, edit.lerps, edit.head_scale)
    plan.check(9, 9, 4, 2)
    return run(q, k, v, plan), F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    "arguments, factors",
    [
        ({}, [1, 0, 1, 0.5]),
        ({"strength": 0.5}, [1, 0.5, 1, 0.75]),
        ({"factor": 3.0}, [1, 3, 1, 2]),
        ({"factor": -1.0, "strength": 0.5}, [1, 0, 1, 0.5]),
    ],
)
def test_heads_are_multiplied(arguments, factors):
    control = ac.HeadScale("1.1,1.3:0.5,10.0", **arguments)
    assert list(control.touches(SITES)) == ["b.1.attn", "b.10.attn"]
    out, before = scaled(control)
    torch.testing.assert_close(out, before * torch.tensor(factors)[:, None, None])
    assert torch.equal(out[:, [0, 2]], before[:, [0, 2]]), "other heads are left alone"


def test_a_head_that_is_off_leaves_nothing():
    out, _ = scaled(ac.HeadScale([(1, 2)]))
    assert (out[:, 2] == 0).all()


def test_one_set_per_image():
    control = ac.HeadScale(ac.HeadBatch(["1.0", "1.2:0.5"]))
    out, before = scaled(control)
    factors = torch.tensor([[0, 1, 1, 1], [1, 1, 0.5, 1]])
    torch.testing.assert_close(out, before * factors[..., None, None])


def test_in_the_pass_itself_or_in_a_perturbed_pass():
    assert not ac.HeadScale("1.1").guides
    weak = ac.HeadScale("1.1", scale=2.0, weight=lambda fraction, sigma: 0.5)
    assert weak.guides and weak.scale == 2.0 and weak.schedule.weight(0.0, None) == 0.5


def test_neutral():
    for arguments in ({"strength": 0.0}, {"factor": 1.0}, {"scale": 0.0}):
        assert ac.HeadScale("1.1", **arguments).neutral
    assert ac.HeadScale("1.1:0").neutral and list(ac.HeadScale("1.1:0,2.0").touches(SITES)) == ["b.2.attn"]
    assert not ac.HeadScale("1.1").neutral


def test_refused_arguments_are_named_together():
    with pytest.raises(ac.AttnCtrlError) as caught:
        ac.HeadScale(None, strength=2.0, factor=float("inf"), weight=lambda fraction, sigma: 1.0)
    for part in ("heads=None", "strength=2.0", "factor=inf", "weight", "HINT"):
        assert part in str(caught.value)
    for heads in ("12.0", "1.4"):
        with pytest.raises(ac.AttnCtrlError, match="0 to"):
            ac.HeadScale(heads).touches(SITES)
    with pytest.raises(ac.AttnCtrlError, match="leaves 0-1"):
        ac.HeadScale("1.1:2").touches(SITES)
