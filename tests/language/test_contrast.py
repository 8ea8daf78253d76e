"""PAI's contrast with the text without the image, against two whole runs."""

import math

import pytest
import torch

from attnctrl import PAI, AttnCtrlError, attach

from .models import prompts, tiny
from .test_language import WRITTEN, state, steps


def log_probabilities(logits):
    return logits[:, -1].log_softmax(-1)


def text_alone(model, prompt, written):
    """log p of each next token after the prompt without image tokens and padding: one row at a time, without a cache."""
    found = []
    for row in range(len(written)):
        ids = prompt.inputs["input_ids"][row][prompt.valid[row] & ~prompt.image[row]]
        with torch.no_grad():
            found.append(
                torch.stack(
                    [
                        log_probabilities(model(input_ids=torch.cat([ids, written[row, :n]])[None]).logits)[0]
                        for n in range(written.shape[1] + 1)
                    ]
                )
            )
    return torch.stack(found)  # (B, steps, V)


@pytest.mark.parametrize("name", ["llava", "gemma3", "mistral3"])
def test_contrast(name):
    model = tiny(name)
    prompt = prompts(name, model)
    run = dict(**prompt.inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True)
    gamma = 1 + 0.5 * (2.6 - 1)
    with attach(model, PAI(alpha=0.8, gamma=2.6, strength=0.5)) as session:
        found = model.generate(**run)
        again = model.generate(**run, use_cache=False)
    assert torch.equal(found.sequences, again.sequences)
    assert "contrasted 8 tokens" in session.report()
    written = found.sequences[:, prompt.length :]
    alone = text_alone(model, prompt, written[:, :3])
    with attach(model, PAI(alpha=0.4)):
        edited = torch.stack([log_probabilities(one) for one in steps(model, prompt, written=written[:, :3])], 1)
    wanted = alone + gamma * (edited - alone)
    wanted[edited < edited.amax(-1, keepdim=True) + math.log(0.1)] = -math.inf
    torch.testing.assert_close(torch.stack(found.scores, 1), wanted.to(found.scores[0]), rtol=0, atol=1e-4)
    assert torch.equal(written, wanted.argmax(-1)) and (alone - edited).abs().max() > 0.1


def test_unlikely_tokens_are_cut_off():
    image, text = torch.tensor([[0.60, 0.30, 0.07, 0.03]]).log(), torch.tensor([[0.10, 0.60, 0.20, 0.10]]).log()
    found = PAI(gamma=2.0).contrast(image, text)
    torch.testing.assert_close(found, torch.tensor([[3.6, 0.15, 0.0245, 0.0]]).log())
    assert torch.equal(PAI(gamma=1.0).contrast(image, text)[0, :3], image[0, :3])


def test_contrast_with_positions_in_sections():
    """The offset that Qwen2-VL keeps for a prompt is not that of its text."""
    model = tiny("qwen2_vl", torch.float32)
    prompt = prompts("qwen2_vl", model)
    run = dict(**prompt.inputs, max_new_tokens=5)
    with attach(model, PAI(alpha=0.0, gamma=1.0)):  # the most likely token stays it
        assert torch.equal(
            model.generate(**run, do_sample=False), model.generate(**run, do_sample=False, use_cache=False)
        )
        found = model.generate(**run, do_sample=False)
        torch.manual_seed(0)
        sampled = model.generate(**run, do_sample=True, num_return_sequences=3)
    assert torch.equal(found, model.generate(**run, do_sample=False)) and sampled.shape[0] == 6


def test_off_and_errors():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    before = state(model)
    for control in (PAI(alpha=0), PAI(gamma=2.0, strength=0)):
        with attach(model, control) as session:
            assert state(model) == before and "neutral" in session.report()
    plain = steps(model, prompt)
    with attach(model, PAI(alpha=0, gamma=2.0)):  # calls outside `generate` are the model's own
        assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))
        with pytest.raises(AttnCtrlError, match="beam search"):
            model.generate(**prompt.inputs, num_beams=2, max_new_tokens=2)
        cache = model(**prompt.inputs, use_cache=True).past_key_values
        mask = torch.cat([prompt.inputs["attention_mask"], torch.ones(2, 3).long()], 1)
        model(input_ids=WRITTEN[:, :1], attention_mask=mask[:, :-2], past_key_values=cache)
        ids = torch.cat([prompt.inputs["input_ids"], WRITTEN], 1)
        with pytest.raises(AttnCtrlError, match="cache holds an answer"):
            model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(AttnCtrlError, match="gamma=inf"):
        PAI(gamma=math.inf)
