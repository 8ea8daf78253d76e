import math

import pytest
import torch

import attnctrl as ac
from attnctrl.icons.recipes.text import build_tokenizer
from attnctrl.sites import Site, Tokens, lay_out

from ..dense import DenseAttention, plain, scores
from ..models import (
    flux_call,
    pixart_call,
    sd3_call,
    tiny_flux,
    tiny_pixart,
    tiny_sd3,
    tiny_unet,
    unet_call,
)
from ..processors.tiny_pipelines import PIPELINES
from .test_isolation import masks_of
from .test_subject_masks import blobs, found_in


TEXT = 5
FAMILIES = {
    "sd3": (tiny_sd3, sd3_call),
    "sd3.5": (lambda: tiny_sd3(dual=True), sd3_call),
    "flux": (tiny_flux, flux_call),
    "unet": (tiny_unet, unet_call),
}
TOKENS = {"red cat": [1, 3], "dog": [2]}
SHARED = {"red cat": [1, 3], "cat": [3, 4]}  # token 3 belongs to both
DISJOINT = [(0, 0, 0.5, 1), (0.5, 0.25, 1, 1)]
CROSSING = [(0, 0, 0.75, 1), (0.25, 0, 1, 0.5)]


def biases(members: list[set[int]], phrases: list[list[int]], strengths: list[float]) -> torch.Tensor:
    """(N, TEXT) what is added to the logits, token by token; members are the phrases in whose place an image token is."""
    table = torch.zeros(len(members), TEXT, dtype=torch.float64)
    for i, mine in enumerate(members):
        for t in range(TEXT):
            owners = [p for p, tokens in enumerate(phrases) if t in tokens]
            if owners and not mine & set(owners):
                table[i, t] = max(math.log(1 - strengths[p]) if strengths[p] < 1 else -math.inf for p in owners)
    return table


def formula(tokens, boxes, strengths=(1.0, 1.0), text_first=False, rows=None, layers=None, masks=None, when=None):
    """Dense attention under the table, in the attention to a text of every model with square grids."""

    def attend(index, q, k, v):
        n_q, n_k = q.shape[2], k.shape[2]
        out = plain(q, k, v)
        square = round(n_k**0.5) ** 2 == n_k
        if (square and n_k != TEXT) or (layers is not None and index not in layers) or (when and not when(index)):
            return out
        image = n_q if n_k == TEXT else n_q - TEXT
        for row in range(len(q)) if rows is None else rows(len(q)):
            inside = masks_of(boxes, round(image**0.5)) if masks is None else masks[row]
            members = [set(column.nonzero().flatten().tolist()) for column in inside.T]
            table = torch.zeros(n_q, n_k, dtype=torch.float64)
            first, text = (TEXT, 0) if text_first else (0, n_k - TEXT)
            table[first : first + image, text : text + TEXT] = biases(members, list(tokens.values()), strengths)
            out[row] = (scores(q[row], k[row]) + table).softmax(-1) @ v[row]
        return out

    return attend


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("boxes", [DISJOINT, CROSSING], ids=["disjoint", "crossing"])
@pytest.mark.parametrize("tokens", [TOKENS, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_equals_dense_masks(family, boxes, tokens, strength):
    build, call = FAMILIES[family]
    model, inputs = build(), call()
    places = dict(zip(tokens, boxes))
    with torch.no_grad():
        with DenseAttention(formula(tokens, boxes, [strength] * 2, family == "flux")):
            wanted = model(**inputs)[0]
        with ac.attach(model, ac.ConstrainedCrossAttention(places, tokens, strength=strength)):
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (got - model(**inputs)[0]).abs().max() > 1e-4


def cond_rows(batch: int) -> range:
    return range(batch // 2, batch)


@pytest.mark.parametrize(
    "name, options",
    [
        ("sd", {"rows": cond_rows}),
        ("sd3", {"rows": cond_rows}),
        ("flux", {"text_first": True}),
        ("flux, true CFG", {"text_first": True, "when": lambda index: index // 4 % 2 == 0}),
    ],
)
def test_pipelines_constrain_the_conditional_rows(name, options):
    pipeline = PIPELINES[name]()
    with DenseAttention(formula(TOKENS, DISJOINT, **options)):
        wanted = pipeline()
    with ac.attach(pipeline.pipe, ac.ConstrainedCrossAttention(dict(zip(TOKENS, DISJOINT)), TOKENS)):
        got = pipeline()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert (got - pipeline()).abs().max() > 1e-4


@pytest.mark.parametrize(
    "neutral",
    [
        {"strength": 0},
        {"phrases": {}, "tokens": {}},
        {"phrases": {"dog": ac.Region(box=(0, 0, 0.5, 1), strength=0)}, "tokens": {"dog": [2]}},
        {"phrases": {"dog": (0, 0, 1, 1)}, "tokens": {"dog": [2]}},
    ],
    ids=["strength", "none", "region", "everywhere"],
)
@pytest.mark.parametrize("family", ["sd3", "flux", "unet"])
def test_neutral_is_bit_identical(neutral, family):
    build, call = FAMILIES[family]
    model, inputs = build(), call()
    with torch.no_grad():
        before = model(**inputs)[0]
        given = {"phrases": dict(zip(TOKENS, DISJOINT)), "tokens": TOKENS, **neutral}
        with ac.attach(model, ac.ConstrainedCrossAttention(**given)):
            assert torch.equal(model(**inputs)[0], before)


def test_layers_steps_and_strengths_of_regions():
    model, inputs = tiny_sd3(), sd3_call(batch=1)
    places = {"red cat": ac.Region(box=DISJOINT[0], strength=0.5), "dog": [DISJOINT[1]]}
    with torch.no_grad():
        before = model(**inputs)[0]
        with DenseAttention(formula(TOKENS, DISJOINT, (0.4, 0.8), layers=[1])):
            wanted = model(**inputs)[0]
        control = ac.ConstrainedCrossAttention(places, TOKENS, layers=1, strength=0.8, start=0.25, stop=0.75)
        with ac.attach(model, control) as session:
            for step, inside in enumerate((False, True, True, False)):
                session.set_step(step, 4)
                out = model(**inputs)[0]
                if inside:
                    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
                else:
                    assert torch.equal(out, before)


def test_found_masks_are_the_places_of_every_image():
    model, inputs = tiny_sd3(), sd3_call()
    masks = found_in(blobs(), blur=0.0)
    inside = [torch.stack([region.tokens((4, 4)) for region in masks.regions(image)]) for image in range(2)]
    assert not torch.equal(*inside)
    with torch.no_grad():
        with DenseAttention(formula(masks.phrases, None, masks=inside)):
            wanted = model(**inputs)[0]
        with ac.attach(model, ac.ConstrainedCrossAttention(masks)) as session:
            session.set_step(1, 2)
            got = model(**inputs)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_padding_of_the_prompt_stays_hidden():
    """PixArt masks its padding: what stands there makes no difference under the control either."""
    model, inputs = tiny_pixart(), pixart_call()
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    hidden = inputs["encoder_attention_mask"] == 0
    assert hidden.any()
    other["encoder_hidden_states"][hidden] += 1
    with torch.no_grad(), ac.attach(model, ac.ConstrainedCrossAttention({"dog": (0, 0, 0.5, 1)}, {"dog": [1]})):
        torch.testing.assert_close(model(**other)[0], model(**inputs)[0])


def test_guidance_by_perturbed_heads_is_constrained_too():
    model, inputs = tiny_sd3(), sd3_call()
    constrained = formula(TOKENS, DISJOINT)

    def weak(index, q, k, v):
        out = constrained(index, q, k, v)
        if index == 1:
            out[:, 2] = v[:, 2]
        return out

    with torch.no_grad():
        with DenseAttention(constrained):
            cond = model(**inputs)[0]
        with DenseAttention(weak):
            perturbed = model(**inputs)[0]
        control = ac.ConstrainedCrossAttention(dict(zip(TOKENS, DISJOINT)), TOKENS)
        with ac.attach(model, control, ac.SoftPAG(heads="1.2", scale=3.0)):
            got = model(**inputs)[0]
    torch.testing.assert_close(got, cond + 3 * (cond - perturbed), rtol=1e-3, atol=1e-4)


def test_videos_and_coarse_levels_have_the_places_of_the_picture():
    control = ac.ConstrainedCrossAttention({"dog": (0, 0, 0.5, 1)}, {"dog": [2]})
    tokens = lay_out(("image", "text"), {"image": 32, "text": 3}, (2, 4, 4))
    hiding, rest = control.edit(Site("a", 0, "joint", 2, ("image", "text")), tokens, torch.ones(2)).segments
    assert hiding.queries.tolist() == [i for i in range(32) if i % 4 > 1] and hiding.keys[0].tokens == slice(0, 34)
    assert len(rest.queries) == 16 + 3
    small = ac.ConstrainedCrossAttention({"dog": (0, 0, 0.25, 0.25)}, {"dog": [2]})
    small.check_grid((4, 4))
    with pytest.warns(UserWarning, match="'dog' covers no token of the 2 x 2 grid of a coarser level"):
        edit = small.edit(Site("a", 0, "cross", 2, ("image",)), Tokens((("text", 0, 3),), (2, 2)), torch.ones(2))
    assert [segment.queries for segment in edit.segments] == [slice(1, 4), slice(0, 1)]


def test_phrases_are_found_in_the_prompt(tmp_path):
    tokenizer = build_tokenizer(tmp_path, captions=200)
    prompt = "a red cat and a blue dog"
    places = {"red cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 1)}
    wanted = ac.SubjectMasks.in_prompt(places, prompt, tokenizer).phrases
    found = ac.ConstrainedCrossAttention.in_prompt(places, prompt, tokenizer, layers=1)
    assert found.tokens == wanted and found.layers == 1
    both = ac.ConstrainedCrossAttention.in_prompt(places, prompt, tokenizer, (tokenizer, 77)).tokens
    assert both == {name: (*these, *(77 + i for i in these)) for name, these in wanted.items()}
    with pytest.raises(ac.AttnCtrlError, match="'bird' is not in the prompt"):
        ac.ConstrainedCrossAttention.in_prompt({"bird": (0, 0, 1, 1)}, prompt, tokenizer)
    with pytest.raises(ac.AttnCtrlError, match="needs a tokenizer"):
        ac.ConstrainedCrossAttention.in_prompt(places, prompt)


def test_mistakes_are_named():
    place = (0, 0, 0.5, 1)
    for given, message in (
        ({"phrases": {"cat": place}}, "'cat' has no tokens.*HINT: ConstrainedCrossAttention.in_prompt"),
        ({"phrases": {"cat": place}, "tokens": {"cat": []}, "strength": 2}, "strength=2.*'cat' has no tokens"),
        ({"phrases": {"cat": place}, "tokens": {"cat": [-1]}}, "'cat' has token -1"),
        ({"phrases": {"cat": place}, "tokens": {"cat": [1], "dog": [2]}}, "tokens of 'dog', which has no place"),
        ({"phrases": [place]}, "neither a mapping of phrases to places"),
        ({"phrases": {"cat": []}, "tokens": {"cat": [1]}}, "cat is empty"),
        ({"phrases": ac.SubjectMasks(TOKENS), "tokens": TOKENS}, "brings its own"),
        ({"phrases": ac.SubjectMasks(TOKENS, stop=0.8), "stop": 0.5}, "found until 0.8"),
        ({"start": 0.5, "stop": 0.5}, "holds no step"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=f"(?s){message}"):
            ac.ConstrainedCrossAttention(**given)
    model, inputs = tiny_sd3(), sd3_call()
    for places, tokens, message in (
        ({"cat": (0, 0, 0.1, 0.1)}, {"cat": [1]}, "'cat' covers no token of the 4 x 4"),
        ({"cat": place}, {"cat": [7]}, "'cat' has token 7, and the text has 5 tokens"),
    ):
        with torch.no_grad(), ac.attach(model, ac.ConstrainedCrossAttention(places, tokens)):
            with pytest.raises(ac.AttnCtrlError, match=message):
                model(**inputs)
    everything = ac.ConstrainedCrossAttention({"cat": place}, {"cat": range(5)})
    with torch.no_grad(), ac.attach(tiny_unet(), everything) as session:
        with pytest.raises(ac.AttnCtrlError, match="outside all places would see none"):
            session.model(**unet_call())
    with pytest.raises(ac.AttnCtrlError, match="both decide who attends to whom"):
        ac.attach(model, everything, ac.Isolation(DISJOINT))
    with pytest.raises(ac.AttnCtrlError, match="0 to 2"):
        ac.attach(model, ac.ConstrainedCrossAttention({"cat": place}, {"cat": [1]}, layers=3))
