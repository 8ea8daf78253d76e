"""GIFT, AdaptVis, SPIN, ACT, VHR and recorded attention against dense float64 formulas."""

import pytest
import torch
from PIL import Image

from attnctrl import ACT, GIFT, PAI, PAINT, SPIN, VAR, VHR, AdaptVis, AttnCtrlError, RecordAttention, attach
from attnctrl.controls.paint import emphasised
from attnctrl.controls.vhr import reacting_heads
from attnctrl.families.language import find_language

from . import dense as ref
from .models import IMAGE, prompts, tiny
from .test_language import ALL, CLOSE, VLMS, WRITTEN, Characters, assert_steps, reference, state, steps


def question(prompt):
    at = torch.arange(prompt.length)
    after = torch.stack([at > int(row.nonzero()[-1]) for row in prompt.image])
    return after & prompt.valid


def plain_patterns(model, prompt):
    """layer -> p of the prompt, (B, H, n, n), without edits."""
    found = {}

    def edit(layer, s, mask, q_at, k_at):
        found[layer] = ref.softmax(s, mask)
        return found[layer]

    reference(model, prompt, edit, written=WRITTEN[:, :0])
    return found


def saliency_of(pattern, prompt, words=None):
    words = question(prompt) if words is None else words
    rows = [row.nonzero().flatten().tolist() for row in words]
    return [ref.salient(pattern[b][:, :, prompt.image[b]], rows[b]) for b in range(len(rows))]


@pytest.mark.parametrize("name", VLMS)
def test_families_equal_dense(name):
    """All of them together, prefill and decode, left padding and grouped heads; and what RecordAttention saw."""
    model = tiny(name)
    prompt = prompts(name, model)
    plain = steps(model, prompt)
    before = state(model)
    sure = plain[0][:, -1].softmax(-1).amax(-1)
    threshold = float(sure.mean())
    controls = (
        AdaptVis(low=0.4, high=1.9, threshold=threshold, layers="1:"),
        ACT(heads="1.1,1.3,2.0", threshold=0.1, beta=0.3, layers="1:3"),
        GIFT(alpha=2.0, saliency_layer=1, layers="1:3"),
        SPIN(keep=0.5, factor=0.2, layers="2:"),
        RecordAttention(layers="1:"),
    )
    with attach(model, *controls) as session:
        found = steps(model, prompt)
        shown = [session.attention_values(i, row=1, layers="1,3") for i in range(4)]
        one = session.attention_values(-1, heads="2.3")
    assert state(model) == before
    weights = [0.4 if c < threshold else 1.9 for c in sure.tolist()]
    saliency = saliency_of(plain_patterns(model, prompt)[1], prompt)
    sinks, seen = {}, []

    def edit(layer, s, mask, q_at, k_at):
        mask = mask.expand(2, -1, -1, -1)
        raw, picture = s.clone(), ref.known(prompt.image, k_at)
        last = (q_at == prompt.length - 1).nonzero().flatten().tolist()
        for b in range(2) if layer >= 1 else ():
            for i in last:
                s[b, :, i] = torch.where(picture[b], s[b, :, i] * weights[b], s[b, :, i])
        p = ref.softmax(s, mask)
        if layer in (1, 2):
            heads = {1: (1, 3), 2: (0,)}[layer]
            p = ref.act(p, mask, prompt.valid, q_at, k_at, 0.1, 0.3, heads, sinks.setdefault(layer, {}))
            p = ref.gift(p, prompt.image, question(prompt), q_at, k_at, saliency, 2.0)
        whole = torch.zeros(
            *p.shape[:2], int(prompt.image[1].sum()), dtype=p.dtype
        )  # a window may have left some behind
        kept = p[:, :, -1][:, :, picture[1]]
        whole[:, :, whole.shape[2] - kept.shape[2] :] = kept
        seen.append(whole)
        return ref.spin(raw, p, mask, prompt.image, q_at, k_at, 2, 0.2) if layer >= 2 else p

    assert_steps(found, reference(model, prompt, edit), plain)
    assert any(some for layer in sinks.values() for some in layer.values())
    for step, values in enumerate(shown):
        wanted = (seen[4 * step + 1][1] + seen[4 * step + 3][1]).mean(0) / 2
        assert values.shape == (2, 2)
        torch.testing.assert_close(values.flatten(), wanted[:4].float(), **CLOSE)
    assert one.shape == (2, 2) and "GIFT: measured what 2 questions looked at" in session.report()


def reinforced(model, prompt, alpha, layers, heads=range(4), order=True):
    """(logits of all steps, chosen heads per layer): one pair of whole runs per layer, heads multiplied in hooks."""
    attention = [layer.self_attn for layer in find_language(model).decoder.layers]
    factors = {layer: torch.ones(2, 4, dtype=torch.float64) for layer in ALL}
    seen, alone = {}, [None]

    def hook(layer):
        def scale(module, args):
            z = args[0].unflatten(-1, (4, 8))
            if z.shape[1] > 1:
                seen[layer] = z[:, -1]
            by = factors[layer] if alone[0] is None else factors[layer][alone[0]][None]
            return ((z * by[:, None, :, None]).flatten(2),)

        return scale

    hooks = [module.o_proj.register_forward_pre_hook(hook(i)) for i, module in enumerate(attention)]
    chosen = {}
    for layer in layers:
        steps(model, prompt, written=WRITTEN[:, :0])
        with_image = seen[layer].clone()
        for row in range(2):
            text = prompt.valid[row] & ~prompt.image[row]
            alone[0] = row
            with torch.no_grad():
                extra = {"token_type_ids": torch.zeros(1, int(text.sum())).long()}
                model(
                    input_ids=prompt.inputs["input_ids"][row][text][None],
                    **(extra if "token_type_ids" in prompt.inputs else {}),
                )
            alone[0] = None
            without = seen[layer][0]
            distance = [float((a - b).pow(2).sum().sqrt()) for a, b in zip(with_image[row], without, strict=True)]
            size = [float(z.pow(2).sum()) for z in without]
            d, n = torch.tensor(distance), torch.tensor(size)
            for h in range(4):
                if distance[h] > d.mean() + d.std() and size[h] > n.mean() + n.std():
                    distance[h] = 0.0
            middle = sum(sorted(distance)[1:3]) / 2
            chosen[layer, row] = {h for h in heads if distance[h] > middle}
            if order:
                factors[layer][row] = torch.tensor([alpha if h in chosen[layer, row] else 1.0 for h in range(4)])
    if not order:
        for (layer, row), some in chosen.items():
            factors[layer][row] = torch.tensor([alpha if h in some else 1.0 for h in range(4)])
    found = steps(model, prompt)
    for one in hooks:
        one.remove()
    return found, chosen


@pytest.mark.parametrize("name", VLMS)
def test_vhr_equals_separate_runs(name):
    model = tiny(name)
    prompt = prompts(name, model)
    plain = steps(model, prompt)
    before = state(model)
    with attach(model, VHR(alpha=3.0, layers="1:")) as session:
        found = steps(model, prompt)
        control = next(iter(session._fitted.values()))
        assert torch.equal(found[0], steps(model, prompt)[0])
    wanted, chosen = reinforced(model, prompt, 3.0, (1, 2, 3))
    assert_steps(found, wanted, plain)
    assert control.tally["heads"] == 2 * sum(map(len, chosen.values())) and state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))


def test_vhr_measures_layer_by_layer():
    """Measured all at once other heads would be chosen; the rule of outliers; generation with and without a cache."""
    model = tiny("llava")
    differ = False
    for seed in range(3, 9):
        prompt = prompts("llava", model, seed=seed)
        wanted, _ = reinforced(model, prompt, 3.0, (1, 2, 3))
        with attach(model, VHR(alpha=3.0, layers="1:")):
            assert_steps(steps(model, prompt), wanted)
        differ |= bool((reinforced(model, prompt, 3.0, (1, 2, 3), order=False)[0][0] - wanted[0]).abs().max() > 1e-3)
    assert differ
    image, text = torch.zeros(1, 6, 2), torch.zeros(1, 6, 2)
    image[0, :, 0] = torch.tensor([1.0, 2, 3, 4, 5, 50])
    assert reacting_heads(image, text).tolist() == [[False, False, False, True, True, True]]
    text[0, 5, 1] = 40.0  # it answers to the text
    assert reacting_heads(image, text).tolist() == [[False, False, True, True, True, False]]


def test_gift_finds_layer_and_words():
    model = tiny("llava")
    prompt = prompts("llava", model, images=2)
    plain, patterns = steps(model, prompt), plain_patterns(model, prompt)

    def run(control, saliency, layers):
        def edit(layer, s, mask, q_at, k_at):
            p = ref.softmax(s, mask)
            if layer not in layers:
                return p
            return ref.gift(p, prompt.image, question(prompt), q_at, k_at, saliency, 3.0)

        with attach(model, control) as session:
            found = steps(model, prompt)
        assert_steps(found, reference(model, prompt, edit), plain)
        return session

    run(GIFT(alpha=3.0, saliency_layer=0, layers="2:"), saliency_of(patterns[0], prompt), (2, 3))  # in one pass
    rises = []
    for b in range(2):
        rows = question(prompt)[b].nonzero().flatten().tolist()
        sums = [
            sum(float((p[b, :, i] - p[b, :, i - 1])[:, prompt.image[b]].clamp(min=0).sum()) for i in rows)
            for p in patterns.values()
        ]
        rises.append(sums.index(max(sums)))
    own = [saliency_of(patterns[rises[b]], prompt)[b] for b in range(2)]
    run(GIFT(alpha=3.0, layers="1,2"), own, (1, 2))
    ids = prompt.inputs["input_ids"]
    ids[:, -4:] = torch.tensor([[ord(c) for c in "abcd"], [ord(c) for c in "dcab"]])
    plain, patterns = steps(model, prompt), plain_patterns(model, prompt)
    words = torch.zeros_like(prompt.valid)
    words[0, -4:-2] = words[1, -2:] = True
    wanted = saliency_of(patterns[1], prompt, words)
    run(GIFT(alpha=3.0, saliency_layer=1, layers="2:", words="ab", tokenizer=Characters()), wanted, (2, 3))
    empty = GIFT(alpha=3.0, saliency_layer=1, layers="2:", words=[(0, 2)])  # words that stand before the image
    with attach(model, empty) as session:
        assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))
    assert "2 of them looked nowhere" in session.report()


@pytest.mark.parametrize("images, modulate", [(1, False), (2, False), (2, True)])
def test_paint_equals_dense(images, modulate):
    model = tiny("llava")
    prompt = prompts("llava", model, images=images)
    plain, tower = steps(model, prompt), []
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, out: tower.append(kwargs["hidden_states"]), with_kwargs=True
        )
    steps(model, prompt, written=WRITTEN[:, :0])
    inputs = list(tower)
    with attach(model, PAINT(alpha=0.9, beta=0.6, top=0.5, modulate=modulate)) as session:
        found = steps(model, prompt)
    first = model.model.vision_tower.encoder.layers[0].self_attn  # of two layers: the first one, and the last but one
    seen = torch.zeros(2 * images, 4, dtype=torch.float64)
    for i, hidden in enumerate(inputs[0]):
        for part in (slice(0, 16), slice(16, 32)):
            q, k = first.q_proj(hidden)[0, part], first.k_proj(hidden)[:, part]
            seen[i] += torch.softmax(k @ q / 4, 0)[1:].detach()
    factor = torch.zeros(prompt.image.shape, dtype=torch.float64)
    values = torch.zeros_like(seen)
    for i, row in enumerate(seen.tolist()):
        ranked = sorted(row)
        low, high = (ranked[int(x)] + (x % 1) * (ranked[int(x) + 1] - ranked[int(x)]) for x in (0.75, 2.25))
        for j, value in enumerate(row):
            summary = value > high + 1.5 * (high - low)
            values[i, j] = 0.6 if summary else 0.9 * (value >= ranked[2])
    factor[prompt.image] = values.flatten()

    def edit(layer, s, mask, q_at, k_at):
        looks, picture = ref.softmax(s, mask), ref.known(prompt.image, k_at)
        for b in range(2) if layer >= 2 else ():
            for i in (q_at >= prompt.length - 1).nonzero().flatten().tolist():
                sees = looks[b, :, i][:, picture[b]].sum(1)
                by = sees / max(sees.tolist()) if modulate else torch.ones_like(sees)
                for j, at in enumerate(k_at.tolist()):
                    s[b, :, i, j] += (float(factor[b, at]) if at < prompt.length else 0.0) * by * s[b, :, i, j].abs()
        return ref.softmax(s, mask)

    assert_steps(found, reference(model, prompt, edit), plain)
    run = dict(**prompt.inputs, max_new_tokens=4, do_sample=False)
    with (
        attach(model, PAINT(alpha=0.9, beta=0.6, top=0.5, modulate=modulate)),
        torch.no_grad(),
    ):  # the tower runs before the first call
        written = model.generate(**run)
        assert torch.equal(written, model.generate(**run, use_cache=False))
        beams = dict(**run, num_beams=2, num_return_sequences=2)
        if images == 1:  # transformers 5.17 spreads several images of a prompt over its beams
            assert torch.equal(model.generate(**beams), model.generate(**beams, use_cache=False))
        first_token = model(**prompt.inputs).logits[:, -1].argmax(-1)
    assert torch.equal(written[:, prompt.length], first_token)
    assert "top and" in session.report() and 0 < (values == 0.9).sum() < values.numel()


def test_paint_needs_a_class_token():
    first, late = torch.rand(1, 16), torch.full((1, 16), 0.5) + 0.01 * torch.arange(16)
    late[0, 3] = 9.0
    first[0, [3, 5, 7, 9]] = torch.tensor([8.0, 7.0, 6.0, 5.0])
    top, summary = emphasised(first, late, 0.25)
    assert summary[0].nonzero().flatten().tolist() == [3] and top[0].nonzero().flatten().tolist() == [5, 7, 9]
    for name in ("qwen2_vl", "paligemma", "llava_next"):
        with pytest.raises(AttnCtrlError, match="class token"):
            attach(tiny(name, torch.float32), PAINT())


def test_act_on_text_and_in_parts():
    """The paper's threshold, a model without images, and a prompt that is read in two calls."""
    model = tiny("llama")
    prompt = prompts("llama", model)
    sinks = {}

    def edit(layer, s, mask, q_at, k_at):
        p = ref.softmax(s, mask)
        if layer not in (1, 2):
            return p
        mask = mask.expand(2, -1, -1, -1)
        return ref.act(p, mask, prompt.valid, q_at, k_at, (1.2,), 0.4, ALL, sinks.setdefault(layer, {}))

    plain = steps(model, prompt)
    with attach(model, ACT(alpha=1.2, layers="1,2")) as session:
        found = steps(model, prompt)
        assert "sinks a head of" in session.report()
    assert_steps(found, reference(model, prompt, edit), plain)
    for part in sinks.values():
        assert 0 < sum(map(len, part.values()))
    cut = 4
    with attach(model, ACT(alpha=1.2, layers="1,2")) as session, torch.no_grad():
        first = {key: value[:, :cut] for key, value in prompt.inputs.items()}
        cache = model(**first).past_key_values
        rest = {**prompt.inputs, "input_ids": prompt.inputs["input_ids"][:, cut:]}
        model(**rest, past_key_values=cache)
        now = session._prompts[cache]
        control = next(iter(session._fitted.values()))
        columns = now.notes[(control, 1)].columns
    patterns = plain_patterns(model, prompt)
    torch.testing.assert_close(columns.mass, patterns[1].sum(2), **CLOSE)  # the first edited layer: before any edit
    seen = [
        [int(prompt.valid[b, at:].sum()) if prompt.valid[b, at] else 0 for at in range(prompt.length)]
        for b in range(2)
    ]
    assert columns.count[:, 0].tolist() == seen


@pytest.mark.parametrize(
    "control",
    [
        *(VHR(alpha=1), VHR(strength=0), SPIN(keep=1), SPIN(factor=1), SPIN(strength=0), AdaptVis(1, 1)),
        *(AdaptVis(strength=0), GIFT(alpha=0), GIFT(strength=0), PAINT(0, 0), ACT(beta=1), ACT(strength=0)),
    ],
    ids=repr,
)
def test_neutral_is_nothing(control):
    model = tiny("llava", torch.float32)
    before = state(model)
    with attach(model, control) as session:
        assert state(model) == before and "neutral" in session.report()


def test_untouched_rows_are_bit_identical():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    plain = steps(model, prompt)
    with attach(model, RecordAttention()):  # looks, and changes nothing
        assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))
    sure = plain[0][:, -1].softmax(-1).amax(-1).tolist()
    for low, high in ((1.0, 1.7), (0.6, 1.0)):  # threshold between the two prompts: one of them has the weight 1
        with attach(model, AdaptVis(low, high, threshold=sum(sure) / 2)):
            found = steps(model, prompt)
        same = [row for row in range(2) if (sure[row] < sum(sure) / 2) == (low == 1)]
        assert len(same) == 1 and torch.equal(found[0][same], plain[0][same])
        assert not torch.equal(found[0], plain[0])
    for control in (SPIN(keep=0.5), GIFT(saliency_layer=0, layers="2:"), AdaptVis(low=1.5)):
        with attach(model, control):
            found = steps(model, prompt)[0]
        assert torch.equal(found[:, :-1], plain[0][:, :-1]) and not torch.equal(found[:, -1], plain[0][:, -1])
    found = []
    for make in (lambda: AdaptVis(0.5, 0.5), lambda: AdaptVis(0.5, 1.5, threshold=1.0)):
        with attach(model, make()):  # both routes to the same weight
            found.append(steps(model, prompt))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_generate_with_and_without_cache(name):
    model = tiny(name, torch.float32)
    prompt = prompts(name, model)
    run = dict(**prompt.inputs, max_new_tokens=6, do_sample=False)
    plain = model.generate(**run)
    controls = (AdaptVis(low=0.3, high=2.5, threshold=0.01), ACT(threshold=0.1), GIFT(layers="1:"), SPIN(keep=0.5))
    with attach(model, *controls, VHR(alpha=2.5, layers="1:")) as session:
        cached = model.generate(**run)
        assert torch.equal(cached, model.generate(**run, use_cache=False))
        if name != "qwen2_vl":
            assert torch.equal(cached, model.generate(**run, cache_implementation="static"))
    assert not torch.equal(plain, cached) and torch.equal(plain, model.generate(**run))
    assert "VHR: reinforced" in session.report() and "AdaptVis: " in session.report()
    with attach(model, RecordAttention()) as session:
        assert torch.equal(plain, model.generate(**run))
        values = [session.attention_values(i, row=1) for i in range(6)]
        model.generate(**run, use_cache=False)
        for i, one in enumerate(values):
            torch.testing.assert_close(session.attention_values(i, row=1), one)
        with pytest.raises(AttnCtrlError, match="token 6 does not exist: 6 tokens"):
            session.attention_values(6)
        model.generate(**{**run, "do_sample": True}, num_return_sequences=2)
        torch.testing.assert_close(session.attention_values(0, row=3), values[0])
        model.generate(**run, num_beams=2)
        with pytest.raises(AttnCtrlError, match="beam search"):
            session.attention_values(0)


def test_padding_changes_nothing():
    model = tiny("llava")
    prompt = prompts("llava", model)
    alone = {key: value[1:] for key, value in prompt.inputs.items()}
    alone.update({key: alone[key][:, 2:] for key in ("input_ids", "attention_mask")})
    controls = (AdaptVis(threshold=0.01), ACT(threshold=0.1), GIFT(layers="1:"), SPIN(keep=0.5), VHR(layers="1:"))
    with attach(model, *controls), torch.no_grad():
        together = model(**prompt.inputs).logits[1, 2:]
        torch.testing.assert_close(model(**alone).logits[0], together, **CLOSE)


def test_pictures():
    model = tiny("llava")
    prompt = prompts("llava", model, images=2)
    picture = Image.new("RGB", (40, 20), (0, 0, 255))
    with attach(model, RecordAttention(layers="2:"), PAI(alpha=3.0)) as session:
        steps(model, prompt)
        values = session.attention_values(1, 1)
        shown = session.attention_map(1, picture, 1)
        for call, words in (
            (lambda: session.attention_values(0, 2), "image 2 does not exist: prompt 0 has 2"),
            (lambda: session.attention_values(0, row=2), "row 2 does not exist"),
            (lambda: session.attention_values(0, layers="0"), "none of these heads was recorded"),
            (lambda: session.attention_map(0, "x.png"), "the image is a str"),
        ):
            with pytest.raises(AttnCtrlError, match=words):
                call()
    assert shown.size == picture.size
    peak = int(values.argmax())
    corner = shown.getpixel((39 * (peak % 2), 19 * (peak // 2)))
    assert min(corner[:2]) > 150 and picture.getpixel((0, 0)) == (0, 0, 255)
    low = int(values.argmin())
    assert sum(shown.getpixel((39 * (low % 2), 19 * (low // 2)))) < sum(corner)
    with attach(model, VAR(dims=[1, 4, 9], tau=2.3, layers="1:", skip_last_layer=False)) as session:
        with pytest.raises(AttnCtrlError, match="no sinks were looked for"):
            session.sink_values()
        entered = []
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
            for layer in model.model.language_model.layers[1:3]
        ]
        steps(model, prompt, written=WRITTEN[:, :0])
        sinks = session.sink_values(1, row=1, layers="1,2")
        assert session.sink_map(picture, 1).size == picture.size
        with pytest.raises(AttnCtrlError, match="VAR looked at none"):
            session.sink_values(layers="0")
    for hook in hooks:
        hook.remove()
    places = prompt.image[1].nonzero().flatten()[4:]
    marks = [x[1, places][:, [1, 4, 9]].abs().amax(1) / x[1, places].pow(2).mean(1).sqrt() > 2.3 for x in entered]
    assert torch.equal(sinks.flatten(), (marks[0].float() + marks[1].float()) / 2) and 0 < sinks.sum() < 4
    model = tiny("vipllava")
    prompt = prompts("vipllava", model)
    with attach(model, RecordAttention()) as session:
        steps(model, prompt)
        with pytest.raises(AttnCtrlError, match="is not known"):
            session.attention_values(0)


def test_errors_name_what_is_wrong():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    with attach(model, PAI()) as session, pytest.raises(AttnCtrlError, match="no attention was recorded"):
        session.attention_values(0)
    with attach(model, AdaptVis()), pytest.raises(AttnCtrlError, match="has not seen the logits"):
        model.model(**prompt.inputs)
    text = {key: prompt.inputs[key].clamp(max=IMAGE - 1) for key in ("input_ids", "attention_mask")}
    for control in (AdaptVis(), GIFT(layers="1:"), SPIN(), VHR(), RecordAttention()):
        with attach(model, control), pytest.raises(AttnCtrlError, match="no image token in the prompt"):
            model(**text)
        with pytest.raises(AttnCtrlError, match="names no image_token_id"):
            attach(tiny("llama", torch.float32), control)
    assert len(steps(model, prompt)) == 4
    for make in (
        lambda: GIFT(words="cat"),
        lambda: GIFT(words=[(3, 2)]),
        lambda: ACT(beta=2),
        lambda: ACT(threshold=0),
        lambda: SPIN(keep=2),
        lambda: VHR(alpha=float("nan")),
        lambda: AdaptVis(low=0),
    ):
        with pytest.raises(AttnCtrlError):
            make()
    for control, words in (
        (GIFT(saliency_layer=9), "0 to 3"),
        (VHR(heads="1.9"), "heads 0 to 3"),
        (ACT(heads="0.1", layers="1:"), "none of the heads lies in"),
        (GIFT(layers="1:", words=[(2, 40)]), "do not lie in prompt 0"),
    ):
        with pytest.raises(AttnCtrlError, match=words), attach(model, control):
            model(**prompt.inputs)
