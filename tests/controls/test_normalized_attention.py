import pytest
import torch

import attnctrl as ac
from attnctrl.attention import Plan, run
from attnctrl.sites import Site, Tokens, lay_out

from ..dense import plain


JOINT = tuple(Site(f"b.{i}.attn", i, "joint", 3, ("image", "text")) for i in range(12))
SECOND = Site("b.0.attn2", 0, "self", 3, ("image",), primary=False)
CROSS = tuple(Site(f"u.{i}.attn2", i, "cross", 3, ("image",), primary=False) for i in range(4))
SELF = tuple(Site(f"u.{i}.attn1", i, "self", 3, ("image",)) for i in range(4))
LAYOUTS = {
    "text first": lay_out(("text", "image"), {"image": 12, "text": 5}, (3, 4), regions=(4,)),
    "image first": lay_out(("image", "text"), {"image": 12, "text": 5}, (3, 4), regions=(4,)),
    "registers": lay_out(
        ("registers", "text", "image"), {"registers": 2, "image": 12, "text": 5}, (3, 4), regions=(4,)
    ),
}
KEYS = Tokens((("text", 0, 5), ("region:0", 5, 9)), (3, 4))


def qkv(n_q, n_k=None):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 8, generator=generator).double() for n in (n_q, n_k or n_q, n_k or n_q)]


def plan_of(edit, n_q, n_k):
    plan = Plan(edit.segments, edit.lerps, negative=edit.negative)
    plan.check(n_q, n_k, 3, 2)
    return plan


def guided(plus, minus, control):
    """The paper's equations; the norm over all heads of a token."""
    away = control.scale * plus - (control.scale - 1) * minus
    flat = [z.transpose(1, 2).flatten(2) for z in (away, plus)]
    top, bottom = (z.norm(dim=-1, p=2 if control.norm == "l2" else 1)[:, None, :, None] for z in flat)
    ratio = top / bottom
    return control.alpha * away * ratio.clamp(max=control.tau) / ratio + (1 - control.alpha) * plus


def without(tokens, *names):
    kept = torch.ones(tokens.length, dtype=torch.bool)
    for name in names:
        kept[tokens.span(name)] = False
    return kept


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_joint_sites(layout, norm):
    control = ac.NormalizedAttention("blur", scale=4.0, tau=1.3, alpha=0.5, norm=norm)
    tokens = LAYOUTS[layout]
    heads = control.touches(JOINT)["b.7.attn"]
    q, k, v = qkv(tokens.length)
    out = run(q, k, v, plan_of(control.edit(JOINT[7], tokens, heads), tokens.length, tokens.length))
    plus = plain(q, k, v, without(tokens, "region:0"))
    minus = plain(q, k, v, without(tokens, "text"))
    image, negative = tokens.span("image"), tokens.span("region:0")
    torch.testing.assert_close(out[:, :, image], guided(plus, minus, control)[:, :, image])
    torch.testing.assert_close(out[:, :, negative], minus[:, :, negative])
    others = without(tokens, "image", "region:0")
    torch.testing.assert_close(out[:, :, others], plus[:, :, others])


@pytest.mark.parametrize("n_q", [12, 9])
def test_cross_sites(n_q):
    control = ac.NormalizedAttention("blur", scale=4.0, tau=1.3, alpha=0.5)
    q, k, v = qkv(n_q, 9)
    heads = control.touches((*SELF, *CROSS))["u.1.attn2"]
    out = run(q, k, v, plan_of(control.edit(CROSS[1], KEYS, heads), n_q, 9))
    plus, minus = plain(q, k[:, :, :5], v[:, :, :5]), plain(q, k[:, :, 5:], v[:, :, 5:])
    torch.testing.assert_close(out, guided(plus, minus, control))
    for edit in (control.bystander(CROSS[1], KEYS), control.edit(CROSS[1], KEYS, torch.zeros(3))):
        torch.testing.assert_close(run(q, k, v, plan_of(edit, n_q, 9)), plus)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_rows_and_layers_are_as_if_the_prompt_were_not_there(layout):
    control, tokens = ac.NormalizedAttention("blur", layers="3"), LAYOUTS[layout]
    q, k, v = qkv(tokens.length)
    rest = without(tokens, "region:0")
    expected = plain(q[:, :, rest], k[:, :, rest], v[:, :, rest])
    negative = tokens.span("region:0")
    off = control.edit(JOINT[2], tokens, control.touches(JOINT)["b.2.attn"])
    assert off.negative is None
    for edit, seen in ((control.bystander(JOINT[2], tokens), ~rest), (off, without(tokens, "text"))):
        out = run(q, k, v, plan_of(edit, tokens.length, tokens.length))
        torch.testing.assert_close(out[:, :, rest], expected)
        torch.testing.assert_close(out[:, :, negative], plain(q[:, :, negative], k, v, seen))


def test_bystanders_are_not_reached_by_the_negative_prompt():
    control, tokens = ac.NormalizedAttention("blur"), LAYOUTS["image first"]
    q, k, v = qkv(tokens.length)
    plan = plan_of(control.bystander(JOINT[0], tokens), tokens.length, tokens.length)
    before = run(q, k, v, plan)
    k[:, :, tokens.span("region:0")] += 2
    v[:, :, tokens.span("region:0")] -= 3
    rest = without(tokens, "region:0")
    assert torch.equal(run(q, k, v, plan)[:, :, rest], before[:, :, rest])


def test_touches_every_site_with_text():
    control = ac.NormalizedAttention("blur", layers="2,10")
    found = control.touches((*JOINT, SECOND))
    assert list(found) == [site.path for site in JOINT]
    assert [site.layer for site in JOINT if found[site.path].any()] == [2, 10]
    assert list(ac.NormalizedAttention().touches((*SELF, *CROSS))) == [site.path for site in CROSS]
    with pytest.raises(ac.AttnCtrlError, match="attention to a text"):
        control.touches(SELF)
    with pytest.raises(ac.AttnCtrlError, match="0 to 11"):
        ac.NormalizedAttention(layers="12").touches(JOINT)


@pytest.mark.parametrize("prompt", ["", "blur, text"])
def test_the_negative_prompt_is_encoded_as_one_region(prompt):
    control = ac.NormalizedAttention(prompt)
    (region,) = control.regions_in_use()
    assert region.prompt == prompt and region.tokens((3, 4)).all()
    assert control.shapes and not control.guides and control.branch == "cond"


def test_neutral():
    assert ac.NormalizedAttention("x", scale=1.0).neutral
    assert ac.NormalizedAttention("x", alpha=0.0).neutral
    assert not ac.NormalizedAttention("").neutral
    assert ac.NormalizedAttention("x", stop=0.5).schedule.stop == 0.5


def test_refused_arguments_are_named_together():
    with pytest.raises(ac.AttnCtrlError) as caught:
        ac.NormalizedAttention(None, scale=float("nan"), tau=0.0, alpha=2.0, norm="max")
    for part in ("negative_prompt=None", "scale=nan", "tau=0.0", "alpha=2.0", "norm='max'"):
        assert part in str(caught.value)
