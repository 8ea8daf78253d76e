"""Heads found by measuring: calibrate_act against whole runs, detect_retrieval_heads on a planted induction head."""

import pytest
import torch
import transformers as tf

from attnctrl import ACT, AttnCtrlError, HeadScale, HeadSet, attach, calibrate_act, detect_retrieval_heads
from attnctrl.search.retrieval import Needle, _hide, _recall

from .folders import tokenizer
from .models import prompts, tiny
from .test_language import state, steps


def log_probability(model, prompt, answer):
    """Of an answer (ids) after a prompt of one row, token by token with a cache."""
    logits = torch.cat([one[:, -1] for one in steps(model, prompt, written=torch.tensor([answer[:-1]]).long())])
    return float(logits.log_softmax(-1)[range(len(answer)), answer].sum())


def single(name, model, row, seed):
    prompt = prompts(name, model, seed=seed)
    part = {key: value[row : row + 1] for key, value in prompt.inputs.items()}
    prompt.inputs, prompt.image, prompt.valid = part, prompt.image[row : row + 1], prompt.valid[row : row + 1]
    return prompt


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_calibrate_act(name, tmp_path):
    """Every gain is that of two whole runs; a head that was made to help is found; a stopped search goes on."""
    model = tiny(name)
    given = [single(name, model, row, seed) for row, seed in ((0, 3), (1, 4), (1, 5))]  # two are padded on the left
    act = ACT(threshold=0.09, beta=0.2, layers="1:3")
    planted = (2, 1)
    answers = []
    for prompt in given:
        plain = steps(model, prompt, written=torch.zeros(1, 0).long())[0][0, -1].log_softmax(-1)
        with attach(model, ACT(heads=[planted], threshold=0.09, beta=0.2)):
            helped = steps(model, prompt, written=torch.zeros(1, 0).long())[0][0, -1].log_softmax(-1)
        answers.append([int((helped - plain).argmax()), 9, 17][: len(answers) + 1])
    examples = [(prompt.inputs, answer) for prompt, answer in zip(given, answers, strict=True)]
    before = state(model)
    found = calibrate_act(model, examples, act=act, batch_size=3, output=tmp_path, progress=False)
    assert state(model) == before
    base = [log_probability(model, *pair) for pair in zip(given, answers, strict=True)]
    gains = {}
    for layer in (1, 2):
        for head in range(4):
            with attach(model, ACT(heads=[(layer, head)], threshold=0.09, beta=0.2)):
                tried = [log_probability(model, *pair) for pair in zip(given, answers, strict=True)]
            gains[f"{layer}.{head}"] = sum(tried) / 3 - sum(base) / 3
    assert found.provenance["gains"] == pytest.approx(gains, abs=1e-6)
    assert found.provenance["without"] == pytest.approx(sum(base) / 3, abs=1e-6)
    best = sorted((key for key in gains if gains[key] > 0), key=lambda key: -gains[key])
    assert [f"{layer}.{head}" for layer, head, _ in found.heads] == best and "2.1" in best
    assert any(abs(gain) > 1e-4 for gain in gains.values())
    with attach(model, ACT(heads=HeadSet.from_pretrained(tmp_path))):
        steps(model, given[0], written=torch.zeros(1, 0).long())
    lines = (tmp_path / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:9])  # killed while it wrote
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    again = calibrate_act(model, examples, act=act, batch_size=3, output=tmp_path, progress=False)
    assert again == found and calls
    calls.clear()
    assert calibrate_act(model, examples, act=act, output=tmp_path, progress=False) == found and not calls
    middle = sum(sorted(gains.values())[3:5]) / 2
    half = calibrate_act(model, examples, act=act, margin=middle, output=tmp_path, progress=False)
    assert half.heads == found.heads[:4] and not calls
    hook.remove()
    with pytest.raises(AttnCtrlError, match="other settings"):
        calibrate_act(model, examples[:2], act=act, output=tmp_path, progress=False)


def test_calibrate_act_errors():
    model = tiny("llama")
    inputs = single("llama", model, 0, 3).inputs
    quiet = dict(progress=False)
    for examples, options, words in (
        ([], {}, "needs examples"),
        ([(inputs, "yes")], {}, "is text"),
        ([(inputs, [])], {}, "one prompt"),
        ([(inputs, 5)], {"act": ACT(beta=1)}, "neutral"),
        ([(inputs, 5)], {"margin": 9.0}, "none of 4 heads raises"),
        ([({**inputs, "attention_mask": inputs["attention_mask"] * 0}, 5)], {}, "padded on the right"),
    ):
        with pytest.raises(AttnCtrlError, match=words):
            calibrate_act(model, examples, **{"act": ACT(layers="1"), **options}, **quiet)
    with attach(model, ACT(layers="1")), pytest.raises(AttnCtrlError, match="detach them"):
        calibrate_act(model, [(inputs, 5)], act=ACT(layers="1"), **quiet)
    with pytest.raises(AttnCtrlError, match="returns no logits"):
        calibrate_act(model.model, [(inputs, 5)], **quiet)
    qwen = tiny("qwen3_vl")
    inputs = prompts("qwen3_vl", qwen, rows=1).inputs
    with pytest.raises(AttnCtrlError, match="does more between its layers"):
        calibrate_act(qwen, [(inputs, 5)], **quiet)


def induction_model():
    """Two layers: head 0.1 writes the token before into each place, head 1.2 looks for places whose token before is the present one and
    writes what stands there. Content lies in planes that rotary embeddings of this base hardly turn; the first plane tells distance."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = tf.LlamaForCausalLM(config).eval()
    code = torch.nn.functional.normalize(torch.randn(128, 30), dim=1)
    still = [i for i in range(32) if i not in (0, 16)]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight[:, :30], model.model.embed_tokens.weight[:, 95] = code, 1.0
        model.lm_head.weight[:, 60:90] = code
        first, second = (layer.self_attn for layer in model.model.layers)
        first.k_proj.weight[32, 95] = 15.0
        first.q_proj.weight[32, 95], first.q_proj.weight[48, 95] = (
            15 * f(torch.tensor(-1.0)) for f in (torch.cos, torch.sin)
        )
        for i in range(30):
            first.v_proj.weight[32 + i, i] = first.o_proj.weight[30 + i, 32 + i] = 48**-0.25
            second.q_proj.weight[64 + still[i], i] = second.k_proj.weight[64 + still[i], 30 + i] = 6.0
            second.v_proj.weight[64 + i, i] = second.o_proj.weight[60 + i, 64 + i] = 1.0
    return model


def test_retrieval_heads():
    model, words = induction_model(), tokenizer()
    hay = " ".join(f"w{i}" for i in range(40, 62))
    needles = [("w2 w3 w4 w5 w6 w7", "what is w2"), ("red w9 w8 w11 w10 w13", "in the sky red")]
    options = dict(needles=needles, lengths=(16, 20), depths=(0.2, 0.7), progress=False)
    found = detect_retrieval_heads(model, words, hay, **options)
    assert found.heads == ((1, 2, 1.0),) and found.provenance["found"] == found.provenance["runs"] == 8
    assert found.provenance["scores"]["1.2"] == pytest.approx(5 / 6)
    ids, (start, stop) = _hide(words, words.encode(hay, add_special_tokens=False), Needle(*needles[0]), 16, 0.5)
    assert words.decode(ids[start:stop]) == needles[0][0] and len(ids) == 1 + 16 + 6 + 3
    with attach(model, HeadScale(found, factor=0.0)):
        with pytest.raises(AttnCtrlError, match="attached to this model already"):
            detect_retrieval_heads(model, words, hay, **options)
    with torch.no_grad():  # the same head, taken out
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    with pytest.raises(AttnCtrlError, match="in none of 8 runs"):
        detect_retrieval_heads(model, words, hay, **options)
    with pytest.raises(AttnCtrlError, match="needs a text"):
        detect_retrieval_heads(model, words, "", **options)


def test_recall():
    assert _recall("one two two", "Two, and one!") == pytest.approx(2 / 3) and _recall("one", "") == 0
