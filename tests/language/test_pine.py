"""PINE against a dense float64 formula that turns every query and key by its position, with complex numbers."""

import math
from contextlib import contextmanager

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from attnctrl import ACT, PAI, PASTA, PINE, VHR, AttnCtrlError, HeadScale, attach
from attnctrl.families.language import find_language

from . import dense as ref
from .folders import tokenizer
from .models import IMAGE, PAD, Prompts, tiny
from .test_language import CLOSE, WRITTEN, assert_steps, state, steps


GIVEN = []  # (segments per row in positions of the batch, tracker of lengths)


def turned(x, by):
    """(…, D) as complex numbers (…, D/2), turned by positions (…)."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * by[..., None].double() * speed)


def score(q, q_at, k, k_at):
    return (turned(q, q_at) * turned(k, k_at).conj()).real.sum(-1)


def _attention(module, q, k, v, mask, scaling=None, **kwargs):
    segments, tracker = GIVEN[-1]
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    total = tracker.total
    q_at, k_at = torch.arange(total - q.shape[2], total), torch.arange(total)
    back = torch.view_as_real(turned(q.double(), -q_at)), torch.view_as_real(turned(k, -k_at))
    q, k = (torch.cat([x[..., 0], x[..., 1]], -1) for x in back)  # as they were before they were rotated
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, spans in enumerate(segments):
        end = spans[-1][1]
        seen = mask.expand(len(q), -1, -1, -1)[b, 0]
        for h in range(q.shape[1]):
            bare = q[b, h] @ k[b, h].T * scaling
            for i, at in enumerate(q_at.tolist()):
                inside = [s for s in spans if s[0] <= at < s[1]]
                others = [s for s in spans if s not in inside]
                place, look, own_place = k_at.clone(), seen[i, :total].clone(), at
                if at >= spans[0][0] and len(spans) > 1:
                    rows = range(*(x - int(q_at[0]) for x in inside[0])) if inside else (i,)
                    region = torch.zeros(total, dtype=torch.bool)
                    for a, c in others:
                        region[a:c] = True
                    p = sum(torch.softmax(bare[r].masked_fill(~region, -math.inf), -1) for r in rows)
                    nearer = 0
                    for a, c in inside + sorted(others, key=lambda s: -float(p[s[0] : s[1]].sum() / (s[1] - s[0]))):
                        place[a:c] = torch.arange(end - (c - a), end) - nearer
                        nearer += c - a
                        if (a, c) in others:
                            look[a:c] = True
                    if inside:
                        own_place = int(place[at])
                s = score(q[b, h, i], torch.tensor(own_place), k[b, h], place) * scaling
                out[b, h, i] = torch.softmax(s.masked_fill(~look, -math.inf), -1).nan_to_num(0.0) @ v[b, h]
    return out.transpose(1, 2), None


AttentionInterface.register("dense_pine", _attention)
AttentionMaskInterface.register("dense_pine", ref._mask)


@contextmanager
def formula(model, segments):
    decoder, tracker = find_language(model).decoder, ref.Tracker()
    own, decoder.config._attn_implementation = decoder.config._attn_implementation, "dense_pine"
    GIVEN.append((segments, tracker))
    try:
        yield tracker
    finally:
        GIVEN.pop()
        decoder.config._attn_implementation = own


def case(name):
    """(prompts, segments for PINE, the same as positions of the batch): three and two segments, the second row padded."""
    words = torch.randint(2, 100, (2, 16), generator=torch.Generator().manual_seed(5))
    words[:, 0] = 1
    mask = torch.ones_like(words)
    words[1, :2], mask[1, :2] = PAD, 0
    if name == "llava":
        words[:, 5:9] = IMAGE
        segments, places = [[(3, 9), (9, 11), (11, 13)], [(2, 8), (8, 11)]], None
        extra = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6)).double()}
    elif name == "from edge to edge":  # no text before the segments, none behind them
        segments, extra = [[(0, 5), (5, 16)], [(0, 4), (4, 10), (10, 14)]], {}
    else:
        segments, extra = [[(3, 6), (6, 10), (10, 12)], [(0, 4), (4, 9)]], {}
    places = [segments[0], [(a + 2, b + 2) for a, b in segments[1]]]
    return Prompts({"input_ids": words, "attention_mask": mask, **extra}), segments, places


@pytest.mark.parametrize("name", ["llama", "llava", "from edge to edge"])
def test_equals_the_formula(name):
    """Prefill and decode, left padding, grouped heads, prompts with different numbers of segments; nothing is left behind."""
    model = tiny("llava" if name == "llava" else "llama")
    prompt, segments, places = case(name)
    plain = steps(model, prompt)
    before = state(model)
    with attach(model, PINE(segments)) as session:
        found = steps(model, prompt)
    with formula(model, places) as tracker:
        wanted = steps(model, prompt, tracker)
    assert_steps(found, wanted, plain)
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))
    assert "PINE: rows of heads behind the segments that had each of them nearest: " in session.report()


def test_the_order_of_segments_does_not_matter():
    model = tiny("llama")
    words = torch.randint(2, 100, (1, 20), generator=torch.Generator().manual_seed(7))
    spans = [(2, 6), (6, 9), (9, 14)]
    answers, plain = [], []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        parts = [words[:, slice(*spans[i])] for i in order]
        ids = torch.cat([words[:, :2], *parts, words[:, 14:]], 1)
        prompt = Prompts({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        lengths = [part.shape[1] for part in parts]
        ends = [2 + sum(lengths[: i + 1]) for i in range(3)]
        plain.append(steps(model, prompt))
        with attach(model, PINE([(end - n, end) for end, n in zip(ends, lengths, strict=True)])):
            answers.append([logits[:, -6:] for logits in steps(model, prompt)])
            written = model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False)[:, 20:]
            again = model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False, use_cache=False)[:, 20:]
            static = model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False, cache_implementation="static")[
                :, 20:
            ]
            beams = model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False, num_beams=2)[:, 20:]
        assert torch.equal(written, again) and torch.equal(written, static)
        answers[-1] += [written, beams]
    for other, without in zip(answers[1:], plain[1:], strict=True):
        for one, two in zip(answers[0], other, strict=True):
            torch.testing.assert_close(one, two, **CLOSE)
        assert (plain[0][0][:, -1] - without[0][:, -1]).abs().max() > 1e-3


def test_single_precision():
    """The fused kernels of the CPU take it; the formula is checked in double."""
    prompt, segments, _ = case("llama")
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = tiny("llama", dtype)
        with attach(model, PINE(segments)):
            found[dtype] = steps(model, prompt)
    for one, other in zip(found[torch.float32], found[torch.float64], strict=True):
        torch.testing.assert_close(one[:, -4:].double(), other[:, -4:], rtol=0, atol=2e-4)


def test_one_segment_changes_nothing():
    model = tiny("llama")
    prompt, _, _ = case("llama")
    plain = steps(model, prompt)
    with attach(model, PINE([(2, 9)])):
        assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))


def test_beside_other_controls():
    """Scaled heads and VHR act on what PINE gives; what edits rows itself is refused."""
    model = tiny("llama")
    prompt, segments, places = case("llama")
    with attach(model, PINE(segments), HeadScale(heads="1.2", factor=0.0)):
        found = steps(model, prompt)
    gate = [layer.self_attn.o_proj for layer in model.model.layers][1]
    zero = torch.ones(32, dtype=torch.float64)
    zero[16:24] = 0

    hook = gate.register_forward_pre_hook(lambda module, args: (args[0] * zero,))
    with formula(model, places) as tracker:
        wanted = steps(model, prompt, tracker)
    hook.remove()
    assert_steps(found, wanted)
    picture, seen, _ = case("llava")
    with attach(tiny("llava"), PINE(seen), VHR(layers="1:")) as session:
        assert len(steps(session.model, picture)) == 1 + WRITTEN.shape[1]
    for other in (PASTA((0, 2)), ACT(heads="1.1"), PINE(segments)):
        with pytest.raises(AttnCtrlError, match="edit the same rows"):
            attach(model, PINE(segments), other)


def test_segments_as_text():
    model, words = tiny("llama"), tokenizer()
    text = "what is in the picture of a red car and blue sky answer"
    inputs = words(text, return_tensors="pt", return_token_type_ids=False)
    prompt = Prompts(dict(inputs))
    with attach(model, PINE(["the picture of", "a red car and", "blue sky"], tokenizer=words)):
        found = steps(model, prompt, written=WRITTEN[:1])
    with attach(model, PINE([(4, 7), (7, 11), (11, 13)])):
        wanted = steps(model, prompt, written=WRITTEN[:1])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_refusals():
    model = tiny("llama")
    prompt, segments, _ = case("llama")

    def refused(control, match, on=model, inputs=prompt.inputs):
        with pytest.raises(AttnCtrlError, match=match), attach(on, control):
            on(**inputs)

    refused(PINE([(2, 5), (6, 9)]), "end at token 5 and go on at 6")
    refused(PINE([(2, 5), (4, 9)]), "end at token 5 and go on at 4")
    refused(PINE([(2, 5), (5, 40)]), "does not lie in prompt 0 of 16 tokens")
    refused(PINE([[(2, 5), (5, 7)]] * 3), "has segments for 3 prompts, the batch has 2")
    refused(PINE(["zebra", "yak"], tokenizer=tokenizer()), "zebra")
    for name in ("gemma3", "qwen2_vl"):
        refused(PINE(segments), "PINE has to know how", on=tiny(name))
    for wrong, match in (("text", "segments='text'"), ([], "segments="), ([(1, 2), 3], "no segment")):
        with pytest.raises(AttnCtrlError, match=match):
            PINE(wrong)
    with pytest.raises(AttnCtrlError, match="need tokenizer"):
        PINE(["a", "b"])
    with pytest.raises(AttnCtrlError, match="names no image_token_id"):
        attach(model, PINE(segments), PAI())
    assert "attnctrl" not in model.config._attn_implementation
