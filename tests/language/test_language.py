import json
import threading

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnctrl import AttnCtrlError, HeadScale, attach
from attnctrl.controls.pai import PAI
from attnctrl.controls.pasta import PASTA, find_span
from attnctrl.controls.softpag import SoftPAG
from attnctrl.controls.vaf import VAF
from attnctrl.controls.var import VAR
from attnctrl.families.language import find_language
from attnctrl.processors.sinks import find_sink_dims

from ..models import tiny_sd3
from . import dense as ref
from .models import BUILDERS, IMAGE, prompts, tiny


WRITTEN = torch.tensor([[5, 9, 17], [11, 40, 3]])
VLMS = [name for name in BUILDERS if name not in ("llama", "vipllava")]
CLOSE = dict(rtol=0, atol=1e-5)  # norms of these models run in float32
ALL = range(4)


def steps(model, prompt, tracker=None, cache=None, written=WRITTEN):
    """Logits of the prompt and of three given tokens after it, each (B, T, V)."""
    inputs = dict(prompt.inputs)
    mask, types = inputs["attention_mask"], inputs.pop("token_type_ids", None)
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    found = []
    with torch.no_grad():
        for step in range(written.shape[1] + 1):
            if step:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                inputs = {"input_ids": written[: len(mask), step - 1 : step], "attention_mask": mask}
                types = None if types is None else torch.ones_like(inputs["input_ids"])
                if {"image_grid_thw", "video_grid_thw"} & set(prompt.inputs):
                    inputs["position_ids"] = (mask.sum(1)[None, :, None] - 1).expand(3, -1, -1)
            if tracker is not None:
                tracker.total = prompt.length + step
            extra = {} if types is None else {"token_type_ids": types}
            found.append(model(**inputs, **extra, past_key_values=cache, use_cache=True).logits)
    return found


def reference(model, prompt, edit, **more):
    with ref.dense(find_language(model).decoder, edit) as tracker:
        return steps(model, prompt, tracker, **more)


def assert_steps(found, wanted, plain=None):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[:, -4:], other[:, -4:], **CLOSE)
    if plain is not None:  # the control does something in every step
        assert all((one[:, -1] - other[:, -1]).abs().max() > 1e-3 for one, other in zip(found, plain, strict=True))


def state(model):
    return (
        {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "generate" in model.__dict__,
    )


@pytest.mark.parametrize("name", VLMS)
def test_families_equal_dense(name):
    """PAI and VAF together, prefill and decode, left padding and grouped heads; nothing is left behind."""
    model = tiny(name)
    prompt = prompts(name, model)
    assert prompt.image.any(1).all()
    plain = steps(model, prompt)
    before = state(model)  # transformers leaves hooks of its own at the first call
    with attach(model, PAI(alpha=0.8, layers="1:"), PASTA((0, 2), alpha=0.3)) as session:
        inside = state(model)
        found = steps(model, prompt)
    vision = [key for key in inside[0] if "vision" in key and inside[0][key] != before[0][key]]
    assert not vision and inside != before
    outside = prompt.valid.clone()
    for row in range(2):
        outside[row, prompt.valid[row].nonzero()[:2]] = False
    amplify, emphasise = ref.pai(prompt.image, 0.8, range(1, 4)), ref.pasta(outside, 0.3, ALL)

    def both(layer, s, mask, q_at, k_at):
        everything = torch.ones_like(mask)
        amplify(layer, s, everything, q_at, k_at)  # edits s in place
        return emphasise(layer, s, mask, q_at, k_at)

    assert_steps(found, reference(model, prompt, both), plain)
    assert "acted 16 times" in session.report() and state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(steps(model, prompt), plain, strict=True))


CONTROLS = {
    "PAI in one head": lambda p: (PAI(alpha=0.9, heads="2.1,3.0"), None),
    "VAF": lambda p: (VAF(image=1.6, system=0.5, layers="1:3"), ref.vaf(p.image, p.valid, 1.6, 0.5, (1, 2))),
    "VAF at half": lambda p: (
        VAF(image=1.6, system=0.5, layers="1:3", strength=0.5),
        ref.vaf(p.image, p.valid, 1.3, 0.75, (1, 2)),
    ),
    "PASTA on all": lambda p: (
        PASTA([(1, 3), (2, 4)], alpha=0.05, include_generated=True),
        ref.pasta(_but(p, 1, 4), 0.05, ALL, beyond=True),
    ),
    "PASTA in heads": lambda p: (
        PASTA([[(1, 3)], [(0, 2)]], heads="1.1,1.3,2.0", alpha=0.05, mode="scale", layers="1"),
        ref.pasta(~_but(p, (1, 0), (3, 2)), 0.05, (1,), heads=[1, 3]),
    ),
}


def _but(prompt, start, stop):
    """Every position but start:stop of the tokens without padding, (B, n)."""
    out = torch.ones_like(prompt.valid)
    for row in range(len(out)):
        a, b = (x if isinstance(x, int) else x[row] for x in (start, stop))
        out[row, prompt.valid[row].nonzero()[a:b]] = False
    return out


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("which", CONTROLS)
def test_control_equals_dense(which, images):
    model = tiny("llava")
    prompt = prompts("llava", model, images=images)
    control, edit = CONTROLS[which](prompt)
    if edit is None:
        one, other = ref.pai(prompt.image, 0.9, (2,), [1]), ref.pai(prompt.image, 0.9, (3,), [0])

        def edit(layer, *rest):
            return (one if layer == 2 else other)(layer, *rest)

    plain = steps(model, prompt)
    with attach(model, control):
        found = steps(model, prompt)
    assert_steps(found, reference(model, prompt, edit), plain)


@pytest.mark.parametrize("padding", ["left", "none"])
def test_var_equals_dense(padding):
    model = tiny("llava")
    prompt = prompts("llava", model, pad=2 if padding == "left" else 0)
    settings = dict(dims=[1, 4, 9], tau=2.3, min_non_sink=0.45, min_image_mass=0.3, transfer=0.7)
    with attach(model, VAR(**settings, layers="1:")) as session:
        found = steps(model, prompt)
    hidden, tally = {}, {}

    def watch(layer):
        def hook(module, args):
            if args[0].shape[1] > 1:
                hidden[layer] = args[0]

        return hook

    layers = model.model.language_model.layers
    hooks = [layers[i].register_forward_pre_hook(watch(i)) for i in ALL]
    edit = ref.var(prompt.image, hidden, **settings, layers=(1, 2), tally=tally)
    assert_steps(found, reference(model, prompt, edit), None)
    for hook in hooks:
        hook.remove()
    assert 0 < tally["edited"] < tally["asked"]
    control = next(iter(session._fitted.values()))
    assert control.tally["edited"] == tally["edited"] and "sinks a layer" in session.report()
    with attach(model, VAR(**{**settings, "tau": 1e9})):
        assert all(torch.allclose(a, b) for a, b in zip(steps(model, prompt), steps_plain(prompt), strict=True))


def steps_plain(prompt):
    return steps(tiny("llava"), prompt)


def test_find_sink_dims(tmp_path):
    model = tiny("llava")
    run = [prompts("llava", model, rows=1, seed=seed).inputs for seed in (3, 4)]
    with pytest.raises(AttnCtrlError, match="no sink dimension found"):
        find_sink_dims(model, run, tau=5.0)
    with torch.no_grad():  # the first token stands out in dimension 7, and one image token of the projector does
        model.model.language_model.embed_tokens.weight[1, 7] = 60.0
    found = find_sink_dims(model, run, tau=5.0)
    assert found.dims == (7,) and found.evidence["first"] == 1.0 and found.evidence["image"] == 0
    assert "sink dimensions 7 (" in found.report() and "VAR(dims=(7,), tau=5)" in found.report()
    found.save(tmp_path / "sinks.json")
    assert json.loads((tmp_path / "sinks.json").read_text())["dims"] == [7]

    def plant(module, args, output):
        output[:, 2, 7] += 60.0
        return output

    hook = model.model.multi_modal_projector.register_forward_hook(plant)
    long = [prompts("llava", model, rows=1, seed=seed, images=1).inputs for seed in (3, 4)]
    with pytest.raises(AttnCtrlError, match="of all tokens"):
        find_sink_dims(model, long, tau=5.0)
    for inputs in long:  # 40 more tokens: the two sinks are a small part now
        more = torch.arange(20, 60)[None]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found = find_sink_dims(model, long, tau=5.0)
    hook.remove()
    assert found.dims == (7,) and found.evidence["image"] == 2 and found.evidence["attended"] is not None


def test_text_only_models():
    model = tiny("llama")
    prompt = prompts("llama", model)
    plain = steps(model, prompt)
    with attach(model, PASTA((1, 3), alpha=0.1)):
        found = steps(model, prompt)
    assert_steps(found, reference(model, prompt, ref.pasta(_but(prompt, 1, 3) & prompt.valid, 0.1, ALL)), plain)
    with pytest.raises(AttnCtrlError, match="names no image_token_id"):
        attach(model, PAI())


def test_unknown_families_follow_the_interface():
    """A class without a table, found by its language model and its image token."""
    model = tiny("vipllava")
    prompt = prompts("vipllava", model)
    plain = steps(model, prompt)
    with attach(model, PAI(alpha=0.8, layers="1:")) as session:
        found = steps(model, prompt)
    assert_steps(found, reference(model, prompt, ref.pai(prompt.image, 0.8, range(1, 4))), plain)
    assert "VipLlavaForConditionalGeneration" in session.report()
    vars(model.config)["image_token_index"] = None
    with pytest.raises(AttnCtrlError, match="names no image_token_id"):
        attach(model, PAI())
    vars(model.config)["model_type"] = "gpt2"
    with pytest.raises(AttnCtrlError, match="cannot be controlled"):
        attach(model, PAI())


def test_diffusion_models_refuse_language_controls():
    with pytest.raises(AttnCtrlError, match="is for language models"):
        attach(tiny_sd3(), PAI())


def test_the_users_implementation_stays_the_kernel():
    """Of layers and rows without an edit; with a control everywhere it is not called."""
    asked = []

    def mine(module, *args, **kwargs):
        asked.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("mine", mine)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = tiny("llava", torch.float32)
    model.model.language_model.set_attn_implementation("mine")
    prompt = prompts("llava", model)
    with attach(model, PAI(layers="1,2")):
        steps(model, prompt, written=WRITTEN[:, :1])
    assert asked == [0, 1, 2, 3, 0, 3] and model.model.language_model.config._attn_implementation == "mine"
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(AttnCtrlError, match="flex_attention"):
        attach(model, PAI())
    assert model.model.language_model.config._attn_implementation == "flex_attention"


def test_head_scale():
    model = tiny("llama")
    prompt = prompts("llama", model)
    with attach(model, HeadScale("1.2", factor=0.0)):
        found = steps(model, prompt)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
    assert_steps(found, steps(model, prompt))


def test_half_precision_and_eager_agree():
    """In bfloat16 the edited rows are as far from float64 as the model itself is; eager keeps its own kernel."""
    exact = tiny("llava")
    prompt = prompts("llava", exact)
    controls = (PAI(alpha=0.5, layers="1:"), VAF(layers="1:3"), PASTA((0, 2), alpha=0.5))
    with attach(exact, *controls):
        wanted = steps(exact, prompt)
    eager = tiny("llava")
    eager.set_attn_implementation("eager")
    with attach(eager, *controls):
        assert_steps(steps(eager, prompt), wanted)
    assert eager.model.language_model.config._attn_implementation == "eager"
    half = tiny("llava", torch.bfloat16)
    prompt = prompts("llava", half)
    own = max(
        (a - b).abs().max() for a, b in zip(steps(half, prompt), steps(exact, prompts("llava", exact)), strict=True)
    )
    with attach(half, *controls):
        error = max((a - b).abs().max() for a, b in zip(steps(half, prompt), wanted, strict=True))
    assert error < 3 * own


@pytest.mark.parametrize(
    "control",
    [PAI(alpha=0), PAI(strength=0), VAF(1, 1), VAF(strength=0), PASTA((0, 1), alpha=1), VAR("any", transfer=0)],
    ids=repr,
)
def test_neutral_is_nothing(control):
    model = tiny("llava", torch.float32)
    before = state(model)
    with attach(model, control) as session:
        assert state(model) == before and "neutral" in session.report()


def test_untouched_rows_and_heads_are_bit_identical():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    plain = steps(model, prompt)[0]
    with attach(model, PAI(alpha=2.0)):
        found = steps(model, prompt)[0]
    assert torch.equal(found[:, :-1], plain[:, :-1]) and not torch.equal(found[:, -1], plain[:, -1])
    outs = []
    hook = model.model.language_model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: outs.append(args[0].unflatten(-1, (4, 8)))
    )
    steps(model, prompt)
    with attach(model, PAI(alpha=2.0, heads="1.2", layers=None), PASTA((0, 2), heads="1.2", alpha=0.2)):
        steps(model, prompt)
    hook.remove()
    for before, after in zip(outs[:4], outs[4:], strict=True):
        assert torch.equal(before[:, :, [0, 1, 3]], after[:, :, [0, 1, 3]])
        assert not torch.equal(before[:, :, 2], after[:, :, 2])


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "paligemma"])
def test_generate_with_and_without_cache(name):
    model = tiny(name, torch.float32)
    prompt = prompts(name, model)
    controls = (PAI(alpha=0.7), VAF(1.5, 0.5, layers="1:3"), PASTA((0, 2), alpha=0.2))
    controls += (VAR("any", tau=2.0, min_non_sink=0.2, min_image_mass=0.05),)
    run = dict(**prompt.inputs, max_new_tokens=6, do_sample=False)
    plain = model.generate(**run)
    with attach(model, *controls) as session:
        cached = model.generate(**run)
        if name == "paligemma":  # its rules for generated tokens differ without a cache, also without controls
            return
        assert torch.equal(cached, model.generate(**run, use_cache=False))
        if name in ("llava", "gemma3"):
            assert torch.equal(cached, model.generate(**run, cache_implementation="static"))
        if name == "llava":
            beams = model.generate(**run, num_beams=3)
            assert torch.equal(beams, model.generate(**run, num_beams=3, use_cache=False))
            with pytest.raises(AttnCtrlError, match="assisted"):
                model.generate(**run, prompt_lookup_num_tokens=2)
    assert "calls that write" in session.report()
    assert torch.equal(plain, model.generate(**run))
    assert not torch.equal(plain, cached)


def test_static_cache_and_second_prompt():
    model = tiny("llava")
    controls = (VAF(1.5, 0.5, layers="1:3"), VAR("any", tau=2.0, min_non_sink=0.2, min_image_mass=0.05))
    for pad in (0, 2):
        prompt = prompts("llava", model, pad=pad)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
        with attach(model, *controls):
            assert_steps(steps(model, prompt, cache=cache), steps(model, prompt))
    cut = prompt.length - 3
    first = {**prompt.inputs, **{key: prompt.inputs[key][:, :cut] for key in ("input_ids", "attention_mask")}}
    with attach(model, *controls), torch.no_grad():
        whole = steps(model, prompt)[0]
        cache = DynamicCache()
        model(**first, past_key_values=cache)
        rest = model(
            input_ids=prompt.inputs["input_ids"][:, cut:],
            attention_mask=prompt.inputs["attention_mask"],
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(rest, whole[:, cut:], **CLOSE)


def test_padding_changes_nothing():
    """A prompt padded in a batch answers as it does alone."""
    model = tiny("llava")
    prompt = prompts("llava", model)
    controls = (PAI(), VAF(1.5, 0.5, layers="1:3"), PASTA((1, 3), alpha=0.2), VAR("any", tau=2.0, min_non_sink=0.1))
    alone = {key: value[1:] for key, value in prompt.inputs.items()}
    alone.update({key: alone[key][:, 2:] for key in ("input_ids", "attention_mask")})
    with attach(model, *controls), torch.no_grad():
        together = model(**prompt.inputs).logits[1, 2:]
        torch.testing.assert_close(model(**alone).logits[0], together, **CLOSE)


def test_right_padding():
    """A call without generation: the last row is the last one that is no padding."""
    model = tiny("llava")
    prompt = prompts("llava", model, pad=0)
    inputs = {**prompt.inputs, "input_ids": torch.cat([prompt.inputs["input_ids"], torch.zeros(2, 3).long()], 1)}
    inputs["input_ids"][0, -3:] = 7
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, -3:] = 0
    with attach(model, PAI(alpha=0.9), PASTA((1, 3), alpha=0.2)), torch.no_grad():
        padded = model(**inputs).logits[1, -4]
        alone = model(**{key: value[1:] for key, value in prompt.inputs.items()}).logits[0, -1]
    torch.testing.assert_close(padded, alone, **CLOSE)


class Characters:
    def decode(self, ids):
        return "".join(map(chr, ids))


def test_words_and_beams():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    ids = prompt.inputs["input_ids"]
    for row, words in enumerate(("abab", "cabd")):
        ids[row, -4:] = torch.tensor([ord(letter) for letter in words])
    with attach(model, PASTA("ab", alpha=0.05, tokenizer=Characters())):
        found = steps(model, prompt)
    n = prompt.valid.sum(1).tolist()
    with attach(model, PASTA([[(n[0] - 4, n[0])], [(n[1] - 3, n[1] - 1)]], alpha=0.05)):
        assert all(torch.equal(a, b) for a, b in zip(found, steps(model, prompt), strict=True))
        beams = model.generate(**prompt.inputs, num_beams=2, num_return_sequences=2, max_new_tokens=4)
    with attach(model, PASTA("ab", alpha=0.05, tokenizer=Characters())):
        run = dict(num_beams=2, num_return_sequences=2, max_new_tokens=4)
        assert torch.equal(beams, model.generate(**prompt.inputs, **run))
    with attach(model, PASTA("abab", alpha=0.05, tokenizer=Characters())):
        with pytest.raises(AttnCtrlError, match="'abab' are not in the prompt"):
            steps(model, prompt)


@pytest.mark.slow
def test_compiled_models():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    controls = (PAI(alpha=0.9), VAR("any", tau=2.0, min_non_sink=0.2, min_image_mass=0.05))
    with attach(model, *controls):
        wanted = steps(model, prompt, written=WRITTEN[:, :1])
    compiled = torch.compile(model, backend="eager")
    with attach(compiled, *controls):
        found = steps(compiled, prompt, written=WRITTEN[:, :1])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_models_in_threads_do_not_mix():
    """Two models that share one config object, attached and run at the same time."""
    torch.manual_seed(0)
    first = tiny("llava", torch.float32)
    second = type(first)(first.config)
    second.load_state_dict(first.state_dict())
    second = second.eval()
    prompt = prompts("llava", first)
    controls = (PAI(alpha=0.9), PASTA((0, 2), alpha=0.1))
    wanted = []
    for model, control in zip((first, second), controls, strict=True):
        with attach(model, control):
            wanted.append(steps(model, prompt))
    found = [None, None]
    barrier = threading.Barrier(2)

    def work(i, model, control):
        for _ in range(3):
            barrier.wait()
            with attach(model, control):
                found[i] = steps(model, prompt)

    threads = [
        threading.Thread(target=work, args=(i, m, c)) for i, (m, c) in enumerate(zip((first, second), controls))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        torch.equal(a, b) for one, two in zip(found, wanted, strict=True) for a, b in zip(one, two, strict=True)
    )
    one, two = attach(first, controls[0]), attach(second, controls[1])
    one.detach()
    assert all(torch.equal(a, b) for a, b in zip(steps(second, prompt), wanted[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(steps(first, prompt), steps_of(first, prompt), strict=True))
    two.detach()
    assert first.model.language_model.config._attn_implementation == "sdpa"


def steps_of(model, prompt):
    """The same weights in a model of its own."""
    fresh = tiny("llava", torch.float32)
    fresh.load_state_dict(model.state_dict())
    return steps(fresh, prompt)


def test_leaves_no_trace_after_errors():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    steps(model, prompt)  # transformers leaves hooks of its own at the first call
    before = state(model)
    with pytest.raises(RuntimeError), attach(model, PAI()):
        raise RuntimeError
    assert state(model) == before
    session = attach(model, PAI())
    with pytest.raises(AttnCtrlError, match="attached to this model already"):
        attach(model, VAF())
    bad = {**prompt.inputs, "pixel_values": prompt.inputs["pixel_values"][:1]}
    with pytest.raises(Exception, match="do not match"):
        model(**bad)
    assert len(steps(model, prompt)) == 4
    session.detach()
    session.detach()
    assert state(model) == before


def test_errors_name_what_is_wrong():
    model = tiny("llava", torch.float32)
    prompt = prompts("llava", model)
    text = {key: prompt.inputs[key].clamp(max=IMAGE - 1) for key in ("input_ids", "attention_mask")}
    with attach(model, PAI()), pytest.raises(AttnCtrlError, match="no image token in the prompt"):
        model(**text)
    for make, words in (
        (lambda: PAI(layers="9"), "0 to 3"),
        (lambda: PAI(heads="9.1"), "layer 9 does not exist"),
        (lambda: PAI(heads="1.7"), "heads 0 to 3"),
        (lambda: VAR(dims=[4000]), "hidden size 32"),
        (lambda: VAR(), "no sink dimensions are known"),
        (lambda: SoftPAG(heads="1.1"), "SoftPAG"),
        (lambda: HeadScale("1.1", scale=2.0), "HeadScale"),
    ):
        with pytest.raises(AttnCtrlError, match=words):
            attach(model, make())
    for make in (
        lambda: PASTA("words"),
        lambda: PASTA([]),
        lambda: VAF(image=0),
        lambda: VAR(tau=0),
        lambda: PAI(strength=2),
    ):
        with pytest.raises(AttnCtrlError):
            make()
    with attach(model, PASTA((50, 60))), pytest.raises(AttnCtrlError, match="does not lie in prompt 0"):
        model(**prompt.inputs)
    with (
        attach(model, PASTA([[(0, 1)]] * 3)),
        pytest.raises(AttnCtrlError, match="3 prompts, the batch has 2"),
    ):
        model(**prompt.inputs)
    with attach(model, PAI()), pytest.raises(AttnCtrlError, match="was called past"):
        model.model.language_model(input_ids=text["input_ids"])
    cache = model(**prompt.inputs, use_cache=True).past_key_values
    with attach(model, PAI()), pytest.raises(AttnCtrlError, match="before the session was attached"):
        model(input_ids=WRITTEN[:, :1], past_key_values=cache)
    with attach(model, PAI()):
        model.set_attn_implementation("sdpa")
        with pytest.raises(AttnCtrlError, match="did not take effect"):
            model(**prompt.inputs)


class Letters:
    """A tokenizer of UTF-8 bytes in pairs: words begin inside tokens, characters are split over them."""

    def decode(self, ids):
        return b"".join(bytes(divmod(i, 256)) for i in ids).replace(b"\0", b"").decode("utf-8", "replace")

    def encode(self, text):
        raw = text.encode()
        raw += b"\0" * (len(raw) % 2)
        return [raw[i] * 256 + raw[i + 1] for i in range(0, len(raw), 2)]


def test_find_span():
    letters = Letters()
    ids = letters.encode("the cat, the chat; die Größe über dem cat")
    for words in ("cat", "the", "Größe", "ü", "the chat; die"):
        found = find_span(letters, ids, words)
        whole = letters.decode(ids)
        assert len(found) == whole.count(words)
        for start, stop in found:
            assert words in letters.decode(ids[start:stop])
            assert words not in letters.decode(ids[start + 1 : stop]) and words not in letters.decode(
                ids[start : stop - 1]
            )
    with pytest.raises(AttnCtrlError, match="not in the prompt"):
        find_span(letters, ids, "dog")
