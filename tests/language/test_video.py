"""Tokens of videos are image tokens: dense float64 references on families that take videos."""

import pytest
import torch

from attnctrl import PAI, AttnCtrlError, RecordAttention, TokenPruning, attach

from . import dense as ref
from .models import PAD, VIDEO, Prompts, tiny
from .test_image_controls import plain_patterns
from .test_language import assert_steps, reference, steps
from .test_token_pruning import least, without


TOKENS = {"llava_next_video": 4, "llava_onevision": 5, "qwen2_vl": 8, "qwen2_5_vl": 8}


def videos(name, model):
    """Two prompts of 3 + video + 4 tokens; the second one is two tokens shorter and padded on the left."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(2, 100, (2, 7), generator=generator).tolist()
    qwen = name.startswith("qwen")
    start = [122] * qwen
    lines = [[1, *words[0][:2]], [PAD, PAD, 1]]
    ids = torch.tensor([[*a, *start, *[VIDEO] * TOKENS[name], *b[3:]] for a, b in zip(lines, words, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if qwen:
        inputs["pixel_values_videos"] = torch.randn(2 * 32, 96, generator=generator).to(model.dtype)
        inputs["video_grid_thw"] = torch.tensor([[2, 4, 4]] * 2)
        inputs["mm_token_type_ids"] = 2 * (ids == VIDEO).long()
    else:
        inputs["pixel_values_videos"] = torch.randn(2, 4, 3, 16, 16, generator=generator).to(model.dtype)
    found = Prompts(inputs)
    found.image = ids == VIDEO
    return found


@pytest.mark.parametrize("name", TOKENS)
def test_videos_equal_dense(name):
    model = tiny(name)
    prompt = videos(name, model)
    plain = steps(model, prompt)
    with attach(model, PAI(alpha=0.8, layers="1:"), RecordAttention()) as session:
        found = steps(model, prompt)
        with pytest.raises(AttnCtrlError, match="a video in the prompt"):
            session.attention_values(0)
    assert_steps(found, reference(model, prompt, ref.pai(prompt.image, 0.8, range(1, 4))), plain)
    gone = least(plain_patterns(model, prompt), prompt, 2, 3)
    with attach(model, TokenPruning(keep=3)):
        found = steps(model, prompt)
    assert_steps(found, reference(model, prompt, without(gone, 2)), plain)


@pytest.mark.parametrize("name", TOKENS)
def test_generate(name):
    model = tiny(name, torch.float32)
    run = dict(**videos(name, model).inputs, max_new_tokens=4, do_sample=False)
    plain = model.generate(**run)
    with attach(model, PAI(alpha=2.0, layers="0:")) as session:
        found = model.generate(**run)
        assert torch.equal(found, model.generate(**run, use_cache=False))
    assert "PAI: 4 layers, acted 32 times" in session.report()
    assert torch.equal(plain, model.generate(**run))
