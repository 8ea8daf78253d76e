"""ConcentricCausal against a model that is given the positions, and a dense mask, written down token by token."""

import pytest
import torch
import transformers as tf

from attnctrl import PAI, PASTA, PINE, AttnCtrlError, ConcentricCausal, attach
from attnctrl.controls.concentric_causal import rings_of

from ..models.common import awake
from . import dense as ref
from .models import IMAGE, PAD, TEXT, VISION, Prompts, prompts, tiny
from .test_language import WRITTEN, assert_steps, state, steps


SIDE = 4
RINGS = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def model():
    """A LLaVA of 4 x 4 image tokens."""
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(**{**VISION, "image_size": 32})
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return awake(tf.LlavaForConditionalGeneration(config)).double()


def case():
    """Two prompts of two images each; the second is padded on the left."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(2, 100, (2, 44), generator=generator)
    mask = torch.ones_like(words)
    words[1, :2], mask[1, :2] = PAD, 0
    for row, starts in enumerate(((3, 21), (4, 20))):
        for start in starts:
            words[row, start : start + 16] = IMAGE
    pictures = torch.randn(4, 3, 32, 32, generator=generator).double()
    return Prompts({"input_ids": words, "attention_mask": mask, "pixel_values": pictures}), ((3, 21), (4, 20))


def placed(starts, length):
    """(position of every token and three written ones, ring or -1, number of the image or -1)."""
    positions, rings, image, at, t = [], [], [], 0, 0
    while t < length + 3:
        if t in starts:
            flat = [ring for line in RINGS for ring in line]
            positions += [at + ring for ring in flat]
            rings += flat
            image += [starts.index(t)] * 16
            at, t = at + 2, t + 16
        else:
            positions.append(at)
            rings.append(-1)
            image.append(-1)
            at, t = at + 1, t + 1
    return positions, rings, image


def reference(lm, prompt, starts, edit=None):
    layouts = [placed(one, prompt.length) for one in starts]

    def see(layer, s, mask, q_at, k_at):
        mask = mask.expand(len(s), -1, -1, -1).clone()
        for b, (_, ring, image) in enumerate(layouts):
            for i, a in enumerate(q_at.tolist()):
                for j, c in enumerate(k_at.tolist()):
                    if image[a] >= 0 and image[a] == image[c]:
                        mask[b, 0, i, j] = ring[c] <= ring[a]
        return ref.softmax(s, mask) if edit is None else edit(layer, s, mask, q_at, k_at)

    every = torch.tensor([positions for positions, _, _ in layouts])
    found, cache, mask = [], tf.DynamicCache(config=lm.config.get_text_config()), prompt.inputs["attention_mask"]
    with ref.dense(lm.model.language_model, see) as tracker, torch.no_grad():
        for step in range(4):
            tracker.total = prompt.length + step
            inputs = dict(prompt.inputs)
            if step:
                mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                inputs = {"input_ids": WRITTEN[:, step - 1 : step], "attention_mask": mask}
            at = every[:, : prompt.length] if step == 0 else every[:, tracker.total - 1 : tracker.total]
            found.append(lm(**inputs, position_ids=at, past_key_values=cache, use_cache=True).logits)
    return found


def test_equals_positions_and_mask():
    """Prefill and decode, left padding, two images, grouped heads; alone and with amplified images behind it."""
    lm = model()
    prompt, starts = case()
    plain = steps(lm, prompt)
    before = state(lm)
    with attach(lm, ConcentricCausal()) as session:
        found = steps(lm, prompt)
        assert "4 x 4 tokens in 2 rings" in session.report() and "trained with it" in session.report()
    assert_steps(found, reference(lm, prompt, starts), plain)
    with attach(lm, PAI(alpha=0.8, layers="1:"), ConcentricCausal()):
        found = steps(lm, prompt)
    assert_steps(found, reference(lm, prompt, starts, ref.pai(prompt.image, 0.8, range(1, 4))), plain)
    assert state(lm) == before
    assert all(torch.equal(a, b) for a, b in zip(steps(lm, prompt), plain, strict=True))


def test_single_precision():
    prompt, starts = case()
    wanted = reference(model(), prompt, starts)
    lm = model().float()
    prompt.inputs["pixel_values"] = prompt.inputs["pixel_values"].float()
    with attach(lm, ConcentricCausal()):
        found = steps(lm, prompt)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[:, -4:].double(), other[:, -4:], rtol=0, atol=2e-4)


def test_generate():
    lm = model()
    prompt, _ = case()
    with attach(lm, ConcentricCausal()):
        written = lm.generate(**prompt.inputs, max_new_tokens=5, do_sample=False)
        for options in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(written, lm.generate(**prompt.inputs, max_new_tokens=5, do_sample=False, **options))
    alone = {"input_ids": prompt.inputs["input_ids"][1:, 2:], "pixel_values": prompt.inputs["pixel_values"][2:]}
    with attach(lm, ConcentricCausal()):  # the padded prompt by itself
        one = lm.generate(**alone, attention_mask=torch.ones(1, 42), max_new_tokens=5, do_sample=False)
    assert torch.equal(one[:, 42:], written[1:, 44:])


def test_rings():
    assert rings_of(SIDE, SIDE).tolist() == RINGS
    assert rings_of(3, 5).tolist() == [[0] * 5, [0, 1, 1, 1, 0], [0] * 5]
    assert rings_of(1, 3).tolist() == [[0, 0, 0]]
    assert int(rings_of(24, 24).max()) == 11


def test_refusals():
    for name, match in (
        ("qwen2_vl", "in sections"),
        ("gemma3", "plain causal masks"),
        ("llava_next", "more than whole images"),
        ("llama", "names no image_token_id"),
    ):
        other = tiny(name)
        with pytest.raises(AttnCtrlError, match=match), attach(other, ConcentricCausal()):
            other(**prompts(name, other).inputs)
    lm, (prompt, _) = model(), case()
    with pytest.raises(AttnCtrlError, match="edit the same rows"):
        attach(lm, ConcentricCausal(), PINE([(0, 1), (1, 2)]))
    with attach(lm, ConcentricCausal(), PASTA((0, 2))), pytest.raises(AttnCtrlError, match="edits rows of the image"):
        lm(**prompt.inputs)
    with attach(lm, ConcentricCausal()), pytest.raises(AttnCtrlError, match="do not account|no number of images"):
        lm(**{**prompt.inputs, "input_ids": prompt.inputs["input_ids"][:, :30]})
