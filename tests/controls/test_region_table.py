"""Negative prompts, phrases and scaled texts of regions: the table of one call in float64, and whole pipelines."""

import pytest
import torch

import attnctrl as ac
from attnctrl.attention import Plan, dense, run
from attnctrl.controls.regional_prompts import located
from attnctrl.families import find_family
from attnctrl.icons.recipes.text import build_tokenizer
from attnctrl.requests import describe, restore
from attnctrl.sites import Site, Tokens

from ..dense import scores
from ..models import TINY
from ..processors.tiny_pipelines import PIPELINES


GRID = (4, 4)
TEXT = 7
BOXES = {
    "disjoint": [(0, 0, 0.5, 1), (0.5, 0.25, 1, 1)],
    "crossing": [(0, 0, 0.75, 1), (0.25, 0.25, 1, 0.75)],
}
SITES = {
    "image first": (("image", 16), ("text", TEXT), ("region:0", 4), ("region:1", 3), ("region:2", 0), ("region:3", 5)),
    "text first": (("region:0", 4), ("region:1", 3), ("region:2", 0), ("region:3", 5), ("text", TEXT), ("image", 16)),
    "registers": (("other", 2), ("text", TEXT), ("region:0", 4), ("region:1", 3), ("image", 16)),
    "cross": (("text", TEXT), ("region:0", 4), ("region:1", 3), ("region:2", 0), ("region:3", 5)),
    "self": (("image", 16),),
}


def states(length: int, seed: int) -> torch.Tensor:
    return torch.randn(1, length, 16, generator=torch.Generator().manual_seed(seed))


def tokens_of(name: str, phrases: bool = False) -> tuple[Site, Tokens]:
    kind = name if name in ("cross", "self") else "joint"
    placed, at = [], 0
    for stream, length in SITES[name]:
        if not (phrases and stream.startswith("region:")):
            placed.append((stream, at, at + length))
            at += length
    return Site("attn", 0, kind, 2, tuple(stream for stream, *_ in placed)), Tokens(tuple(placed), GRID)


def by_the_table(control, site, tokens, q, k, v, negative: bool, active: bool = True) -> torch.Tensor:
    """Regional and base attention of every row, written over what each token is: ("I", place), ("B", number), ("R", region) or "O"."""
    roles = []
    for name, start, stop in tokens.streams:
        kind = {"image": "I", "text": "B", "other": "O"}.get(name, "R")
        roles += [(kind, int(name[7:]) if kind == "R" else i) for i in range(stop - start)]
    rows = [("I", p) for p in range(16)] if site.kind == "cross" else roles
    regions = control.regions
    masks = torch.stack([region.tokens(GRID) for region in regions])
    if control.overlap == "priority":
        masks[0] &= ~masks[1]
    on = [r for r, region in enumerate(regions) if region.has_negative or not negative]
    slot, behind = {}, len(regions)
    for r in on:
        slot[r] = r
        if negative:
            spans = {name: stop - start for name, start, stop in tokens.streams}
            slot[r] = behind if spans.get(f"region:{behind}") else r
            behind += 1
    phrases = {r: set(regions[r].numbers) for r in on if regions[r].of_prompt and not negative}
    said = set().union(*phrases.values())
    area = [masks[r].sum() / 16 for r in range(len(regions))]

    def text_of(r, role):
        kind, at = role
        return (kind == "B" and at in phrases[r]) if r in phrases else (kind == "R" and at == slot[r])

    def base(role, other):
        return other[0] in "IBO"

    def image_row(mine):
        def sees(role, other):
            kind, at = other
            if kind == "I":
                return not control.isolate or any(bool(masks[r, at]) for r in mine)
            if kind == "B" and at not in said and (control.with_base or any(r in phrases for r in mine)):
                return 1.0
            for r in mine:
                if text_of(r, other):
                    return float(1 / area[r]) if control.area_scale else 1.0
            return kind == "O"

        return sees

    def text_row(r):
        def sees(role, other):
            kind, at = other
            free = r in phrases and kind == "B" and at not in said
            return text_of(r, other) or kind == "O" or free or (kind == "I" and bool(masks[r, at]))

        return sees

    def row(i, sees):
        factor = torch.tensor([float(sees(rows[i], other)) for other in roles])
        s = (scores(q[:, :, i : i + 1], k) * factor).masked_fill(factor == 0, -torch.inf)
        return s.softmax(-1) @ v

    out = []
    for i, (kind, at) in enumerate(rows):
        if kind == "R":
            owner = next((r for r in on if text_of(r, (kind, at))), None)
            out.append(row(i, text_row(owner) if owner is not None else lambda role, other: role == other))
            continue
        value = plain = row(i, base)
        edits = []
        if kind == "I":
            mine = [r for r in range(len(regions)) if masks[r, at]]
            both = [r for r in mine if r in on]
            if control.overlap == "mean":
                edits = [(row(i, image_row([r])), regions[r].strength / len(mine)) for r in both]
            elif both:
                edits = [(row(i, image_row(both)), sum(regions[r].strength for r in both) / len(both))]
        elif at in said and kind == "B":
            owner = next(r for r in on if text_of(r, (kind, at)))
            edits = [(row(i, text_row(owner)), regions[owner].strength)]
        for edited, weight in edits if active else ():
            value = value + weight * control.strength * (1 - control.base_weight) * (edited - plain)
        out.append(value)
    return torch.cat(out, 2)


def qkv(site, tokens) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    n_q = 16 if site.kind == "cross" else tokens.length
    shapes = (2, 2, n_q, 8), (2, 2, tokens.length, 8), (2, 2, tokens.length, 8)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def check(control, name, negative=False, phrases=False, active=1.0) -> torch.Tensor:
    site, tokens = tokens_of(name, phrases)
    q, k, v = qkv(site, tokens)
    heads = torch.full((2,), active)
    edit = control.beside(site, tokens, heads) if negative else control.edit(site, tokens, heads)
    plan = Plan(edit.segments)
    plan.check(q.shape[2], k.shape[2], heads=2, batch=2)
    wanted = by_the_table(control, site, tokens, q, k, v, negative, bool(active))
    torch.testing.assert_close(run(q, k, v, plan), wanted, rtol=1e-6, atol=1e-6)  # weights are float32
    torch.testing.assert_close(dense(q, k, v, plan), wanted, rtol=1e-6, atol=1e-6)
    return wanted


def prompted(boxes="disjoint", negatives=("a", "b"), **options) -> ac.RegionalPrompts:
    """Region a with a negative prompt as long as its prompt, region b with a longer one."""
    regions = []
    for i, box in enumerate(BOXES[boxes]):
        against = states((4, 5)[i], 20 + i) if "ab"[i] in negatives else None
        own = {"prompt_embeds": states((4, 3)[i], 10 + i), "negative_prompt_embeds": against}
        regions.append(ac.Region("ab"[i], box=box, strength=(1.0, 0.8)[i], **own))
    return ac.RegionalPrompts(regions, **options)


def phrased(boxes="disjoint", **options) -> ac.RegionalPrompts:
    words = [(1, 2), (4,)]
    regions = [
        ac.Region.phrase("ab"[i], box, numbers=words[i], strength=(1.0, 0.8)[i]) for i, box in enumerate(BOXES[boxes])
    ]
    return ac.RegionalPrompts(regions, **options)


RULES = [
    {"base_weight": 0.0},
    {"base_weight": 0.3, "overlap": "mean"},
    {"base_weight": 0.3, "overlap": "priority", "isolate": False},
    {"base_weight": 0.0, "strength": 0.7, "isolate": False, "overlap": "mean"},
]


# -- negative prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["image first", "text first", "cross", "self"])
def test_rows_of_both_halves_equal_the_table(name, rule, boxes):
    control = prompted(boxes, **rule)
    if name != "self" or control.isolate:  # else untouched
        check(control, name, negative=True)
        check(control, name)


def test_one_negative_prompt_of_two(monkeypatch):
    """Its text takes the place of its region's prompt; the other region is none in unconditional rows."""
    for name in ("image first", "cross"):
        streams = [(s, n) for s, n in SITES[name] if s not in ("region:2", "region:3")]
        monkeypatch.setitem(SITES, name, (*streams, ("region:2", 0)))
        for rule in RULES:
            check(prompted("crossing", "b", **rule), name, negative=True)


@pytest.mark.parametrize("name", ["image first", "cross"])
def test_layers_without_regions_are_plain_in_both_halves(name):
    for negative in (False, True):
        check(prompted("crossing", base_weight=0.2), name, negative, active=0.0)


FAMILIES = ("sd", "sdxl", "sd3", "pixart", "auraflow", "flux, true CFG", "wan", "qwen", "hunyuan image")


def first_calls(run, *controls) -> list[torch.Tensor]:
    """Predictions of the first step, [conditional, unconditional], and the whole result."""
    found = []
    handle = run.model.register_forward_hook(lambda m, a, out: found.append(out[0].clone()))
    with ac.attach(run.pipe, *controls):
        out = run()
    handle.remove()
    two = len(found) == 2 * run.inputs["num_inference_steps"]
    return [*(found[:2] if two else found[0].chunk(2)[::-1]), out]


@pytest.mark.parametrize("negatives", ["ab", "b"])
@pytest.mark.parametrize("name", FAMILIES)
def test_negative_prompts_in_pipelines(name, negatives):
    """The unconditional prediction is that of regions with the negative prompts as their prompts."""
    run = PIPELINES[name]()
    if name == "hunyuan image":  # prompts of one length
        run = run.where(prompt_embeds_mask=torch.ones(2, 5, dtype=torch.int64))
    calls = []
    handle = run.model.register_forward_pre_hook(lambda m, a, kw: calls.append((a, kw)), with_kwargs=True)
    plain = first_calls(run)
    handle.remove()
    family, control = find_family(run.model), prompted(negatives=negatives, base_weight=0.2)
    bound = family.bind(run.model.forward, *calls[1 if family.cfg == "separate" else 0])
    batch = family.rows(bound)
    if family.cfg == "batched":
        bound = family.select_rows(bound, slice(0, batch // 2), batch)
    against = [
        ac.Region(r.prompt, box=r.box, strength=r.strength, prompt_embeds=r.negative_prompt_embeds)
        for r in control.regions
        if r.has_negative
    ]
    with torch.no_grad(), ac.attach(run.model, ac.RegionalPrompts(against, base_weight=0.2)):
        wanted = run.model(**bound)[0]
    cond, uncond, out = first_calls(run, control)
    only_cond = first_calls(run, prompted(negatives="", base_weight=0.2))
    torch.testing.assert_close(uncond, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cond, only_cond[0], rtol=1e-4, atol=1e-5)
    assert (uncond - plain[1]).abs().max() > 1e-3
    assert (out - only_cond[2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_negative_prompts_need_guidance(name):
    run = PIPELINES[name]().where(guidance_scale=1.0)
    results = []
    for negatives in ("ab", ""):
        with ac.attach(run.pipe, prompted(negatives=negatives)) as session:
            results.append(run())
        told = "note: regions have negative prompts, which nothing follows" in session.report()
        assert told == (negatives == "ab" and name == "sd")  # two calls a step: a missing one is not known beforehand
    assert torch.equal(*results)


@pytest.mark.parametrize("neutral", [{"strength": 0}, {"base_weight": 1}])
def test_neutral_negative_prompts_change_nothing(neutral):
    run = PIPELINES["sd3"]()
    before = run()
    with ac.attach(run.pipe, prompted(**neutral)):
        assert torch.equal(run(), before)


# -- phrases of the prompt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["image first", "text first", "registers", "cross", "self"])
def test_phrases_equal_the_table(name, rule, boxes):
    control = phrased(boxes, **rule)
    if name != "self" or control.isolate:
        check(control, name, phrases=True)
    site, tokens = tokens_of(name, phrases=True)
    assert control.beside(site, tokens, torch.ones(2)).segments == ()
    assert control.edit(site, tokens, torch.zeros(2)).segments == ()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["image first", "cross"])
def test_a_phrase_beside_a_prompt_of_its_own(name, rule, monkeypatch):
    """And with a negative prompt, which stands behind all prompts."""
    own = ac.Region("a", box=BOXES["crossing"][0], prompt_embeds=states(4, 1))
    phrase = ac.Region.phrase("b", BOXES["crossing"][1], numbers=(2, 3), negative_prompt="dull")
    streams = [(s, n) for s, n in SITES[name] if not s.startswith("region:")]
    monkeypatch.setitem(SITES, name, (*streams, ("region:0", 4), ("region:1", 0), ("region:2", 5)))
    for negative in (False, True):
        check(ac.RegionalPrompts([own, phrase], **rule), name, negative)


@pytest.mark.parametrize("name", ["sd3", "flux", "unet"])
def test_phrases_append_nothing(name):
    build, call = TINY[name]
    model, inputs = build(), call()
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda m, a, kw: lengths.append(kw["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    control = phrased(base_weight=0.1)
    with torch.no_grad():
        before = model(**inputs)[0]
        with ac.attach(model, control) as session:
            after = model(**inputs)[0]
        assert session.hits[control]
        with ac.attach(model, phrased(strength=0)):
            assert torch.equal(model(**inputs)[0], before)
    handle.remove()
    assert len(set(lengths)) == 1 and (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["sd", "sd3", "flux, true CFG"])
def test_phrases_leave_unconditional_rows_alone(name):
    """Conditional rows are as in the bare denoiser, where every row is one."""
    run, control = (
        PIPELINES[name](),
        ac.RegionalPrompts(
            [ac.Region.phrase("ab"[i], box, numbers=((1, 2), (4,))[i]) for i, box in enumerate(BOXES["disjoint"])],
            base_weight=0.2,
        ),
    )
    calls = []
    handle = run.model.register_forward_pre_hook(lambda m, a, kw: calls.append((a, kw)), with_kwargs=True)
    plain = first_calls(run)
    handle.remove()
    family = find_family(run.model)
    bound = family.bind(run.model.forward, *calls[0])
    batch = family.rows(bound)
    if family.cfg == "batched":
        bound = family.select_rows(bound, slice(batch // 2, batch), batch)
    with torch.no_grad(), ac.attach(run.model, control):
        wanted = run.model(**bound)[0]
    cond, uncond, out = first_calls(run, control)
    torch.testing.assert_close(cond, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(uncond, plain[1], rtol=1e-4, atol=1e-5)
    assert (cond - plain[0]).abs().max() > 1e-4 and (out - plain[2]).abs().max() > 1e-4


def test_phrases_are_looked_up(tmp_path):
    tokenizer = build_tokenizer(tmp_path, captions=50)
    prompt = "a red cat and a blue car and a cat"
    words = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
    found = located([ac.Region.phrase("red cat", BOXES["disjoint"][0]), "a dog@0,0,1,1"], prompt, [tokenizer])
    assert "".join(words[i] for i in found[0].numbers).replace("</w>", "") == "redcat"
    assert found[1].numbers is None and not found[1].of_prompt
    second = ac.Region.phrase("cat", BOXES["disjoint"][0], occurrence=2)
    (only,) = located([second], prompt, [tokenizer])
    assert only.numbers[0] > found[0].numbers[-1]
    both = located([second], prompt, [tokenizer, (tokenizer, 30)])[0].numbers
    assert both == (*only.numbers, *(30 + i for i in only.numbers))
    control = ac.RegionalPrompts.in_prompt([second], prompt, tokenizer, base_weight=0.1)
    assert control.regions[0].numbers == only.numbers and control.base_weight == 0.1
    for wrong, said in (
        (ac.Region.phrase("cat", box=(0, 0, 1, 1)), "'cat' stands 2 times.*\nHINT: .*occurrence=1"),
        (ac.Region.phrase("cat", box=(0, 0, 1, 1), occurrence=3), "no occurrence 3 .*\nHINT: it stands there 2 times"),
        (ac.Region.phrase("green fish", box=(0, 0, 1, 1)), "'green fish' is not in the prompt"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=said):
            located([wrong], prompt, [tokenizer])
    with pytest.raises(ac.AttnCtrlError, match="needs a tokenizer"):
        ac.RegionalPrompts.in_prompt([second], prompt)


def test_refused_phrases():
    box = (0, 0, 0.5, 1)
    sd3 = TINY["sd3"][0]()
    with pytest.raises(ac.AttnCtrlError, match="phrase 'cat' are not looked up yet\nHINT: .*in_prompt"):
        ac.attach(sd3, ac.RegionalPrompts([ac.Region.phrase("cat", box)]))
    with pytest.raises(ac.AttnCtrlError, match="phrases 'red cat' and 'cat' share tokens"):
        ac.RegionalPrompts(
            [ac.Region.phrase("red cat", box, numbers=(1, 2)), ac.Region.phrase("cat", box, numbers=(2,))]
        )
    far = ac.RegionalPrompts([ac.Region.phrase("cat", box, numbers=(90,))])
    with (
        torch.no_grad(),
        ac.attach(sd3, far),
        pytest.raises(ac.AttnCtrlError, match="'cat' has token 90, and the text"),
    ):
        sd3(**TINY["sd3"][1]())
    for wrong, said in (
        ({"text": " "}, "phrase is empty"),
        ({"text": "cat", "occurrence": 0}, "region 'cat': occurrence 0"),
        ({"text": "cat", "numbers": ()}, "region 'cat': numbers"),
        ({"text": "cat", "prompt_embeds": states(2, 0)}, "region 'cat' is a phrase"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=said):
            ac.Region.phrase(wrong.pop("text"), box, **wrong)
    with pytest.raises(ac.AttnCtrlError, match="region 'cat': occurrence and numbers are those of a phrase"):
        ac.Region("cat", box=box, occurrence=2)


# -- scaled texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("name", ["image first", "text first", "cross"])
@pytest.mark.parametrize(
    "rule", [{}, {"overlap": "mean"}, {"base_weight": 0.3, "isolate": True}, {"with_base": False}]
)
def test_omost_equals_scaled_logits(name, boxes, rule):
    """Captions share one softmax with the base prompt; logits of a caption are multiplied by the picture's area over its own."""
    for control, phrases in ((prompted(boxes), False), (phrased(boxes), True)):
        regions = [r for r in control.regions]
        check(ac.RegionalPrompts.preset("omost", regions, **rule), name, phrases=phrases)
    check(ac.RegionalPrompts.preset("omost", prompted(boxes).regions, **rule), name, negative=True)


def test_omost_of_whole_pictures_is_one_prompt():
    """With areas of 1, captions everywhere are tokens of one text."""
    site, tokens = tokens_of("cross")
    q, k, v = qkv(site, tokens)
    regions = [ac.Region(name, box=(0, 0, 1, 1)) for name in "ab"]
    edit = ac.RegionalPrompts.preset("omost", regions).edit(site, tokens, torch.ones(2))
    n = TEXT + 4 + 3
    torch.testing.assert_close(run(q, k, v, Plan(edit.segments)), scores(q, k[:, :, :n]).softmax(-1) @ v[:, :, :n])


# -- requests --------------------------------------------------------------------------------------------------------------


def test_requests_carry_negative_prompts_and_phrases():
    regions = [
        ac.Region("a cat", box=(0, 0, 0.5, 1), negative_prompt="a dog"),
        ac.Region.phrase("a car", box=(0.5, 0, 1, 1), occurrence=2, numbers=(3, 4), negative_prompt=""),
        ac.Region("a fish", box=(0, 0, 1, 1)),
    ]
    facts = describe(ac.RegionalPrompts(regions))
    assert "negative_prompt" not in facts["regions"][2] and "of_prompt" not in facts["regions"][0]
    again = restore(facts).regions
    assert [r.negative_prompt for r in again] == ["a dog", "", None]
    assert again[1].of_prompt and again[1].numbers == (3, 4) and again[1].occurrence == 2
