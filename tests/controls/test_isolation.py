import pytest
import torch

import attnctrl as ac
from attnctrl.attention import Plan, run
from attnctrl.sites import Site, lay_out

from ..dense import DenseAttention, plain
from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3, tiny_unet, unet_call
from ..processors.tiny_pipelines import PIPELINES


TEXT = 5
DISJOINT = [(0, 0, 0.5, 1), (0.5, 0.25, 1, 1)]
CROSSING = [(0, 0, 0.75, 1), (0.25, 0, 1, 0.5)]
THREE = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0.25, 0.5, 0.75, 1)]
FAMILIES = {
    "sd3": (tiny_sd3, sd3_call),
    "sd3.5": (lambda: tiny_sd3(dual=True), sd3_call),
    "flux": (tiny_flux, flux_call),
    "unet": (tiny_unet, unet_call),
}


def masks_of(boxes, side: int, overlap: str = "union") -> torch.Tensor:
    """(S, side * side) bool; the boxes end on token borders."""
    masks = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[round(y0 * side) : round(y1 * side), round(x0 * side) : round(x1 * side)] = True
    masks = masks.flatten(1)
    if overlap == "priority":
        for i in range(len(masks) - 1):
            masks[i] &= ~masks[i + 1 :].any(0)
    return masks


def allowed(n: int, first: int, masks: torch.Tensor, background: str) -> torch.Tensor:
    """Who sees whom, written token by token; image tokens stand from `first` on."""
    table = torch.ones(n, n, dtype=torch.bool)
    members = [set(column.nonzero().flatten().tolist()) for column in masks.T]
    for i, mine in enumerate(members):
        for j, other in enumerate(members):
            ok = bool(mine & other) or (not mine and not other)
            if background == "free":
                ok = ok or not mine or not other
            table[first + i, first + j] = ok
    return table


def formula(boxes, background="free", overlap="union", strength=1.0, text_first=False, layers=None):
    """Dense isolation of every self- or joint attention call of a model with square grids."""

    def attend(index, q, k, v):
        n = k.shape[2]
        out = plain(q, k, v)
        if n == TEXT or (layers is not None and index not in layers):
            return out
        image = n if round(n**0.5) ** 2 == n else n - TEXT
        masks = masks_of(boxes, round(image**0.5), overlap)
        table = allowed(n, TEXT if text_first and image < n else 0, masks, background)
        return torch.lerp(out, plain(q, k, v, table), strength)

    return attend


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("boxes", [DISJOINT, CROSSING, THREE], ids=["disjoint", "crossing", "three"])
@pytest.mark.parametrize(
    "options", [{}, {"background": "isolated", "strength": 0.6}, {"overlap": "priority"}], ids=str
)
def test_equals_dense_masks(family, boxes, options):
    build, call = FAMILIES[family]
    model, inputs = build(), call()
    with torch.no_grad():
        with DenseAttention(formula(boxes, **options, text_first=family == "flux")):
            wanted = model(**inputs)[0]
        with ac.attach(model, ac.Isolation(boxes, **options)):
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (got - model(**inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "flux, true CFG"])
def test_pipelines_isolate_both_halves_of_guidance(name):
    pipeline = PIPELINES[name]()
    with DenseAttention(formula(DISJOINT, text_first=name.startswith("flux"))):
        wanted = pipeline()
    with ac.attach(pipeline.pipe, ac.Isolation(DISJOINT)) as session:
        got = pipeline()
    assert set(session.hits[session.controls[0]].values()) == {session.calls["passes"]}
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert (got - pipeline()).abs().max() > 1e-3


@pytest.mark.parametrize(
    "neutral", [{"strength": 0}, {"subjects": ()}, {"subjects": [ac.Region("a", box=(0, 0, 1, 1), strength=0)] * 2}]
)
@pytest.mark.parametrize("family", ["sd3", "unet"])
def test_neutral_is_bit_identical(neutral, family):
    build, call = FAMILIES[family]
    model, inputs = build(), call()
    with torch.no_grad():
        before = model(**inputs)[0]
        with ac.attach(model, ac.Isolation(**{"subjects": DISJOINT, **neutral})):
            assert torch.equal(model(**inputs)[0], before)


def test_layers_and_steps():
    model, inputs = tiny_sd3(), sd3_call(batch=1)
    with torch.no_grad():
        before = model(**inputs)[0]
        with DenseAttention(formula(DISJOINT, layers=[1])):
            wanted = model(**inputs)[0]
        with ac.attach(model, ac.Isolation(DISJOINT, layers=1, start=0.25, stop=0.75)) as session:
            for step, inside in enumerate((False, True, True, False)):
                session.set_step(step, 4)
                out = model(**inputs)[0]
                if inside:
                    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
                else:
                    assert torch.equal(out, before)


def test_subjects_do_not_hear_each_other_within_a_block():
    """One subject's tokens of the latents change: no token of the other subject does. The background hears both."""
    model, inputs = tiny_sd3(layers=2), sd3_call()
    outs = []
    for value in (0.0, 1.0):
        caught = []
        handle = model.transformer_blocks[0].register_forward_hook(lambda m, a, out, into=caught: into.append(out[1]))
        changed = inputs["hidden_states"].clone()
        changed[..., :2] += value  # the first column of tokens
        with torch.no_grad(), ac.attach(model, ac.Isolation([(0, 0, 0.25, 1), (0.75, 0, 1, 1)])):
            model(**{**inputs, "hidden_states": changed})
        handle.remove()
        outs.append(caught[0].reshape(2, 4, 4, -1))
    assert torch.equal(outs[0][:, :, 3], outs[1][:, :, 3])
    assert not torch.allclose(outs[0][:, :, 1], outs[1][:, :, 1])


def test_guidance_by_perturbed_heads_is_isolated_too():
    model, inputs = tiny_sd3(), sd3_call()
    iso = formula(DISJOINT)

    def weak(index, q, k, v):
        out = iso(index, q, k, v)
        if index == 1:
            out[:, 2] = v[:, 2]
        return out

    with torch.no_grad():
        with DenseAttention(iso):
            cond = model(**inputs)[0]
        with DenseAttention(weak):
            perturbed = model(**inputs)[0]
        with ac.attach(model, ac.Isolation(DISJOINT), ac.SoftPAG(heads="1.2", scale=3.0)):
            got = model(**inputs)[0]
    torch.testing.assert_close(got, cond + 3 * (cond - perturbed), rtol=1e-3, atol=1e-4)


def test_videos_have_the_subjects_in_every_frame():
    tokens = lay_out(("image", "text"), {"image": 32, "text": 3}, (2, 4, 4))
    site = Site("b.0.attn", 0, "joint", 2, ("image", "text"))
    plan = Plan(ac.Isolation(DISJOINT).edit(site, tokens, torch.ones(2)).segments)
    plan.check(35, 35, 2)
    q, k, v = (torch.randn(1, 2, 35, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    table = allowed(35, 0, masks_of(DISJOINT, 4).repeat(1, 2), "free")
    torch.testing.assert_close(run(q, k, v, plan), plain(q, k, v, table))


def test_the_strength_of_regions_counts():
    model, inputs = tiny_sd3(), sd3_call()
    weak = [ac.Region(str(i), box=box, strength=0.5) for i, box in enumerate(DISJOINT)]
    with torch.no_grad():
        with ac.attach(model, ac.Isolation(weak, strength=0.8)):
            got = model(**inputs)[0]
        with ac.attach(model, ac.Isolation(DISJOINT, strength=0.4)):
            torch.testing.assert_close(got, model(**inputs)[0])


def test_masks_lists_and_texts_are_subjects():
    left, right = torch.zeros(8, 8), torch.zeros(8, 8)
    left[:, :4], right[2:, 4:] = 1, 1
    model, inputs = tiny_sd3(), sd3_call()
    outs = []
    halves = [[(0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1)], "the right one@0.5,0.25,1,1"]
    for subjects in (DISJOINT, (left, right), halves, torch.stack([left, right])):
        with torch.no_grad(), ac.attach(model, ac.Isolation(subjects)):
            outs.append(model(**inputs)[0])
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_mistakes_are_named():
    model, inputs = tiny_sd3(), sd3_call()
    for subjects, options, message in (
        ([(0, 0, 0.5, 1), (0.5, 0, 0.6, 0.1)], {}, "'subject 1' covers no token of the 4 x 4"),
        ([ac.Region("cat", box=(0, 0, 0.5, 0.5)), (0, 0, 1, 1)], {"overlap": "priority"}, "'cat' lies wholly under"),
    ):
        with torch.no_grad(), ac.attach(model, ac.Isolation(subjects, **options)):
            with pytest.raises(ac.AttnCtrlError, match=message):
                model(**inputs)
    for options, message in (
        ({"subjects": [(0, 0, 1, 1)]}, "one subject has no other"),
        ({"background": "none", "overlap": "mean", "strength": 2}, "background='none'.*overlap='mean'.*strength=2"),
        ({"subjects": "a@0,0,1,1"}, "one subject, not a list"),
        ({"subjects": ac.Region("a", box=(0, 0, 1, 1))}, "one subject, not a list"),
        ({"subjects": [(0, 0, 1, 1), []]}, "subject 1 is empty"),
        ({"subjects": [(0, 0, 1, 1), (0.5, 0, 0.5, 1)]}, "'subject 1'"),
        ({"start": 0.5, "stop": 0.5}, "holds no step"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=message):
            ac.Isolation(**{"subjects": DISJOINT, **options})
    with pytest.raises(ac.AttnCtrlError, match="both decide who attends to whom"):
        ac.attach(model, ac.Isolation(DISJOINT), ac.SharedAttention())
    with pytest.raises(ac.AttnCtrlError, match="0 to 2"):
        ac.attach(model, ac.Isolation(DISJOINT, layers=3))
