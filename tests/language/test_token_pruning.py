"""TokenPruning against dense float64 attention with the pruned columns masked out."""

import pytest
import torch
import transformers as tf
from PIL import Image
from transformers import DynamicCache, StaticCache

from attnctrl import (
    ACT,
    GIFT,
    PAI,
    PAINT,
    PASTA,
    SPIN,
    VAF,
    VAR,
    VHR,
    AdaptVis,
    AttnCtrlError,
    HeadScale,
    RecordAttention,
    TokenPruning,
    attach,
)
from attnctrl.controls.token_pruning import exponential_trend, padded_patches
from attnctrl.families.language import find_language
from attnctrl.processors.language_prior import fit_position_prior

from . import dense as ref
from .folders import save_llava
from .models import BUILDERS, FINE, IMAGE, TEXT, Prompts, awake, prompts, tiny
from .test_image_controls import plain_patterns
from .test_language import CLOSE, WRITTEN, assert_steps, reference, steps


REFUSED = ("qwen3_vl", "gemma3")
PRUNED = [name for name in BUILDERS if name not in (*REFUSED, "llama")]


def without(gone, layer, inner=lambda layer, s, mask, *at: ref.softmax(s, mask)):
    """An edit that hides the columns `gone` (B, n) from `layer` on."""

    def edit(at_layer, s, mask, q_at, k_at):
        mask = mask.expand(len(gone), -1, -1, -1)
        if at_layer >= layer:
            mask = mask & ~ref.known(gone, k_at)[:, None, None]
        return inner(at_layer, s, mask, q_at, k_at)

    return edit


def least(patterns, prompt, layer, keep):
    """(B, n) bool: all but the `keep` image tokens of each row with the largest mean over heads in the last row of the layer before."""
    gone = torch.zeros_like(prompt.image)
    for b, p in enumerate(patterns[layer - 1]):
        score = {at: sum(float(head[-1, at]) for head in p) for at in prompt.image[b].nonzero().flatten().tolist()}
        for at in sorted(score, key=score.get)[: len(score) - keep]:
            gone[b, at] = True
    return gone


@pytest.mark.parametrize("name", PRUNED)
def test_families_equal_dense(name):
    """Prefill and decode with left padding, where rows keep different tokens; each layer's cache holds what it should."""
    model = tiny(name)
    prompt = prompts(name, model)
    count = int(prompt.image[0].sum())
    gone = least(plain_patterns(model, prompt), prompt, 2, count // 2)
    plain, cache = steps(model, prompt), DynamicCache(config=model.config.get_text_config())
    with attach(model, TokenPruning(layer=2, keep=count // 2)) as session:
        found = steps(model, prompt, cache=cache)
    wanted = reference(model, prompt, without(gone, 2))
    assert_steps(found, wanted, plain)
    stays = prompt.valid & ~gone
    torch.testing.assert_close(found[0][stays], wanted[0][stays], **CLOSE)
    assert found[0].shape == plain[0].shape
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [prompt.length + 3] * 2 + [int(stays.sum(1).max()) + 3] * 2
    assert f"kept {count // 2} of {count} image tokens a prompt from layer 2 on" in session.report()
    assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))


@pytest.mark.parametrize("pad", [0, 2])
def test_caches_and_eager(pad):
    model = tiny("llava")
    prompt = prompts("llava", model, pad=pad, images=2)
    controls = (TokenPruning(layer=1, keep=3), PAI(alpha=0.8, layers="0:"))
    with attach(model, *controls):
        found = steps(model, prompt)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
        assert_steps(steps(model, prompt, cache=cache), found)
    eager = tiny("llava")
    eager.set_attn_implementation("eager")
    with attach(eager, *controls):
        assert_steps(steps(eager, prompt), found)


def test_beside_other_controls():
    """They see what is left of the prompt: PAI, PASTA, VAR and a head that is off, in layers before and behind."""
    model = tiny("llava")
    prompt = prompts("llava", model, images=2)
    settings = dict(dims=[1, 4, 9], tau=2.3, min_non_sink=0.45, min_image_mass=0.2, transfer=0.7)
    gone = least(plain_patterns(model, prompt), prompt, 1, 5)
    keeps = prompt.image & ~gone
    spans = torch.zeros_like(prompt.valid)
    for row in range(2):
        spans[row, prompt.valid[row].nonzero()[:2]] = True
    hidden, tally = {}, {}

    def watch(layer):
        def hook(module, args):
            if args[0].shape[1] > 1:
                hidden[layer] = args[0]

        return hook

    amplify, emphasise = ref.pai(keeps, 0.8, (1, 2, 3)), ref.pasta(~spans, 0.3, (2,))
    recycle = ref.var(keeps, hidden, **settings, layers=(3,), tally=tally)

    def inner(layer, s, mask, q_at, k_at):
        amplify(layer, s, mask, q_at, k_at)
        p = (recycle if layer == 3 else emphasise)(layer, s, mask, q_at, k_at)
        if layer == 3:
            p[:, 1] = 0
        return p

    controls = (PAI(alpha=0.8, layers="1:"), PASTA((0, 2), alpha=0.3, layers="2"))
    controls += (VAR(**settings, layers="3", skip_last_layer=False), HeadScale("3.1", factor=0.0))
    plain = steps(model, prompt)
    with attach(model, *controls, TokenPruning(layer=1, keep=5)):
        found = steps(model, prompt)
    layers = find_language(model).decoder.layers
    hooks = [layers[i].register_forward_pre_hook(watch(i)) for i in range(4)]
    wanted = reference(model, prompt, without(gone, 1, inner))
    for hook in hooks:
        hook.remove()
    assert_steps(found, wanted, plain)
    assert tally["edited"] > 0


def test_more_prompt():
    """Another image behind a pruned prompt, which prunes its own, and text behind both."""
    model = tiny("llava")
    prompt = prompts("llava", model, rows=1, images=2)
    ids, cuts = prompt.inputs["input_ids"], (0, 8, 14, prompt.length)
    assert [int((ids[:, a:b] == IMAGE).sum()) for a, b in zip(cuts, cuts[1:], strict=False)] == [4, 4, 0]
    found, cache = [], DynamicCache()
    with attach(model, TokenPruning(layer=2, keep=2)), torch.no_grad():
        for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            extra = {"pixel_values": prompt.inputs["pixel_values"][i][None]} if i < 2 else {}
            found.append(model(input_ids=ids[:, start:stop], past_key_values=cache, **extra).logits)
    assert [layer.keys.shape[2] for layer in cache.layers] == [prompt.length] * 2 + [prompt.length - 4] * 2
    gone = torch.zeros_like(prompt.image)
    patterns = {}

    def edit(layer, s, mask, q_at, k_at):  # tokens that leave are seen by none that stay
        hide = ref.known(gone, k_at)[:, None, None] & torch.tensor(layer >= 2)
        patterns[layer] = ref.softmax(s, mask & ~hide)
        return patterns[layer]

    for start, stop in ((0, 8), (8, 14)):
        reference(model, prompt, edit, written=WRITTEN[:, :0])
        places = [at for at in prompt.image[0].nonzero().flatten().tolist() if start <= at < stop]
        for at in sorted(places, key=lambda at: float(patterns[1][0, :, stop - 1, at].sum()))[:2]:
            gone[0, at] = True
    assert int(gone.sum()) == 4
    wanted = reference(model, prompt, edit, written=WRITTEN[:, :0])[0]
    together = torch.cat(found, 1)
    torch.testing.assert_close(together[~gone], wanted[~gone], **CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma"])
def test_generate(name):
    model = tiny(name, torch.float32)
    prompt = prompts(name, model)
    run = dict(**prompt.inputs, max_new_tokens=5, do_sample=False)
    plain = model.generate(**run)
    with attach(model, TokenPruning(layer=1, keep=1), PAI(alpha=0.7)):
        found = model.generate(**run)
        if name != "paligemma":  # its rules for generated tokens differ without a cache, also without controls
            assert torch.equal(found, model.generate(**run, use_cache=False)) and not torch.equal(found, plain)
        if name == "llava":
            assert torch.equal(found, model.generate(**run, cache_implementation="static"))
            beams = dict(num_beams=2, num_return_sequences=2)
            assert torch.equal(model.generate(**run, **beams), model.generate(**run, **beams, use_cache=False))
    assert torch.equal(plain, model.generate(**run))


def test_among_everything():
    """Controls with a memory of their own, at layers before and behind: all caches agree, and padding changes nothing."""
    model = tiny("llava")
    prompt = prompts("llava", model, images=2)
    controls = (AdaptVis(threshold=0.01), ACT(threshold=0.1, layers="1:"), SPIN(keep=0.5), VHR(layers="1:"))
    controls += (PAINT(layers="1:"), VAF(1.5, 0.5, layers="1:3"), PAI(gamma=1.5))
    run = dict(max_new_tokens=5, do_sample=False)
    with attach(model, *controls, TokenPruning(layer=2, keep=3)) as session:
        found = model.generate(**prompt.inputs, **run)
        assert torch.equal(found, model.generate(**prompt.inputs, **run, use_cache=False))
        assert torch.equal(found, model.generate(**prompt.inputs, **run, cache_implementation="static"))
        wanted = [one[1:] for one in steps(model, prompt)]
        alone = {key: value[1:] for key, value in prompt.inputs.items()} | {
            "pixel_values": prompt.inputs["pixel_values"][2:]
        }
        alone.update({key: alone[key][:, 2:] for key in ("input_ids", "attention_mask")})
        again = steps(model, Prompts(alone), written=WRITTEN[1:])
        for one, other in zip(again, wanted, strict=True):
            torch.testing.assert_close(one[:, -4:], other[:, -4:], **CLOSE)
    assert "kept 3 of 8" in session.report()


def test_neutral_is_nothing():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    plain = steps(model, prompt)
    with attach(model, TokenPruning(keep=1.0)) as session:
        assert "neutral" in session.report()
    for keep in (4, 128):  # attached, with nothing to prune
        with attach(model, TokenPruning(keep=keep)):
            assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))


def fine_llava():
    torch.manual_seed(0)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**FINE), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE
    )
    return awake(tf.LlavaForConditionalGeneration(config)).double()


def test_scores_without_trend_and_padding():
    """Bands of padding never stay, and what stays follows the score over its trend."""
    model = fine_llava()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    pixels[0, :, :3] = pixels[0, :, 13:] = 0.25  # the upper and the lower row of patches, three of four lines
    ids = torch.tensor([[1, 7, *[IMAGE] * 16, 9, 11, 12]] * 2)
    prompt = Prompts({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    score = plain_patterns(model, prompt)[1][:, :, -1][:, :, prompt.image[0]].mean(1)
    table = (1.0, 3.0)
    x = torch.linspace(0, 1, 16).double()
    real = torch.ones(2, 16, dtype=torch.bool)
    real[0, :4] = real[0, 12:] = False
    fits = []
    for row in range(2):
        a, b = x[real[row]], score[row][real[row]].log()
        slope = torch.linalg.lstsq(torch.stack([a, torch.ones_like(a)], 1), b[:, None]).solution[0, 0]
        fits.append((slope * x).exp())
        torch.testing.assert_close(exponential_trend(score[row], real[row]), fits[-1])
    trends = {None: torch.ones(2, 16), "position": torch.stack(fits), table: (1 + 2 * x).expand(2, -1)}
    kept = {}
    for debias, trend in trends.items():
        for pad in (True, False):
            wanted = score / trend * (real if pad else 1)
            with attach(model, TokenPruning(keep=6, debias=debias, pad=pad)) as session:
                steps(model, prompt, written=WRITTEN[:, :0])
                now = session.last_prompt
            view = next(value for key, value in now.notes.items() if key[1] == "kept")
            for row in range(2):
                places = [at - 2 for at in view.index[row].tolist() if 2 <= at < 18]
                assert places == sorted(wanted[row].argsort(descending=True)[:6].tolist())
                kept[debias, pad, row] = places
    assert kept[None, True, 0] != kept[None, False, 0] and kept[None, True, 1] == kept[None, False, 1]
    assert len({tuple(kept[debias, True, 1]) for debias in trends}) > 1
    with attach(model, TokenPruning(keep=12)) as session:  # no more than what is real
        steps(model, prompt, written=WRITTEN[:, :0])
        assert "kept 10 of 16" in session.report()


def test_padded_patches():
    picture = torch.rand(4, 3, 24, 24)
    picture[0, :, :7] = picture[0, :, -8:] = 0.5  # rows
    picture[1, :, :, :3] = picture[1, :, :, -3:] = 0.5  # columns, half of a patch and no more
    picture[2] = 0.5  # nothing but a plain picture
    picture[3, :, :7] = 0.5  # a plain sky
    found = padded_patches(picture, 4)
    assert found[0].all(1).tolist() == [True, False, False, True] and found[0].sum() == 8
    assert not found[1:].any()
    picture[1, :, :, :4] = picture[1, :, :, -4:] = 0.5
    assert padded_patches(picture, 4)[1].all(0).tolist() == [True, False, False, True]


def test_position_prior(tmp_path):
    """A planted trend is found, and dividing by it flattens the score."""
    folder = save_llava(tmp_path / "llava")
    model, processor = (
        tf.LlavaForConditionalGeneration.from_pretrained(folder),
        tf.AutoProcessor.from_pretrained(folder),
    )
    images = [Image.effect_noise((16, 16), 80).convert("RGB") for _ in range(3)]
    table = fit_position_prior(model.eval(), processor, images, layer=2, points=4)
    assert len(table) == 4 and abs(sum(table) / 4 - 1) < 1e-6 and min(table) > 0
    seen = []
    for image in images:
        for words in ("Describe the image.", "What is in the picture?"):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            one = Prompts(dict(processor(images=[image], text=[text], return_tensors="pt")))
            p = plain_patterns(model, one)[1][0, :, -1][:, one.image[0]].mean(0)
            seen.append(p / p.mean())
    torch.testing.assert_close(torch.tensor(table), torch.stack(seen).mean(0).float(), rtol=1e-4, atol=1e-5)
    assert TokenPruning(debias=table).debias == table
    with pytest.raises(AttnCtrlError, match="needs images"):
        fit_position_prior(model, processor, [])
    processor.chat_template = processor.image_token = None
    with pytest.raises(AttnCtrlError, match="neither a chat template"):
        fit_position_prior(model, processor, images)


def test_errors_name_what_is_wrong():
    for wrong in (dict(layer=0), dict(keep=0), dict(keep=1.5), dict(debias="exp"), dict(debias=(1.0, 0.0))):
        with pytest.raises(AttnCtrlError, match="TokenPruning"):
            TokenPruning(**wrong)
    model = tiny("llava", torch.float32)
    with pytest.raises(AttnCtrlError, match="layers 0 to 3"):
        attach(model, TokenPruning(layer=4))
    with pytest.raises(AttnCtrlError, match="two of it; GIFT acts .* whole questions"):
        attach(model, TokenPruning(), TokenPruning(layer=3), GIFT())
    with pytest.raises(AttnCtrlError, match="names no image_token_id"):
        attach(tiny("llama", torch.float32), TokenPruning())
    for name, words in (("qwen3_vl", "do more than"), ("gemma3", "sliding window")):
        with pytest.raises(AttnCtrlError, match=words):
            attach(tiny(name, torch.float32), TokenPruning())
    prompt = prompts("llava", model)
    with attach(model, TokenPruning(keep=2), RecordAttention(layers="1")) as session:
        steps(model, prompt)
        assert session.attention_values(2).shape == (2, 2)
