import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from attnctrl import PAI, PASTA, VAR, AttnCtrlError, RecordAttention, attach
from attnctrl.apps.ask import seen
from attnctrl.icons.models import builtin_vlms
from attnctrl.icons.questions import IconWorld
from attnctrl.pipelines import GroundedVLM
from attnctrl.processors.maps import heat_map

from ..language.folders import save_llama, save_llava
from ..language.test_language import state


ASKED = "what is in the picture"


@pytest.fixture(scope="module")
def loaded(vlm):
    return AutoModelForImageTextToText.from_pretrained(vlm).eval(), AutoProcessor.from_pretrained(vlm)


def by_hand(loaded, picture, *controls, new=6):
    """(answer, mean attention over the image), by `attach` and `generate`."""
    model, processor = loaded
    text = processor.apply_chat_template(chat(picture), add_generation_prompt=True)
    inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
    with attach(model, *controls, RecordAttention()) as session:
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        count = out.shape[1] - inputs["input_ids"].shape[1]
        values = sum(session.attention_values(i) for i in range(count)) / count
        assert session.written == count
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, values


def chat(picture):
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": ASKED}]
    return [{"role": "user", "content": content}]


# -- attnctrl ask --------------------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_generate(attnctrl, vlm, picture, loaded, tmp_path):
    short = ("--model", vlm, "--max-new-tokens", 6, "--device", "cpu")
    plain, _ = by_hand(loaded, picture)
    edited, values = by_hand(loaded, picture, PAI(alpha=4.0), PASTA((0, 1), alpha=0.1))
    assert plain != edited and len(plain.split()) == 6
    code, out, err = attnctrl("ask", picture, *ASKED.split(), *short)
    assert (code, out) == (0, f"{plain}\n"), err
    controls = ("--control", "PAI(alpha=4.0)", "--control", "PASTA(spans=(0, 1), alpha=0.1)")
    maps = ("--show-attention", tmp_path / "looked.png", "--report")
    code, out, err = attnctrl("ask", picture, ASKED, *short, *controls, *maps)
    assert code == 0 and out == f"{edited}\n" and "PAI: 2 layers, acted 12 times" in err
    middle = Image.open(picture).convert("RGB").crop((10, 0, 30, 20))  # what the processor cuts out of 40 x 20
    with Image.open(tmp_path / "looked.png") as looked:
        wanted = np.asarray(heat_map(values, middle)).astype(int)
        assert looked.size == (20, 20) and np.abs(np.asarray(looked).astype(int) - wanted).max() <= 2
    code, out, _ = attnctrl("ask", picture, ASKED, *short, *controls, *maps[:2], "--compare")
    assert out.splitlines() == [f"without control: {plain}", f"with PAI, PASTA: {edited}"]
    with Image.open(tmp_path / "looked.png") as both:
        assert both.size == (40, 20)
        assert np.abs(np.asarray(both)[:, 20:].astype(int) - wanted).max() <= 2


@pytest.mark.skipif("icons-vlm" not in builtin_vlms(), reason="the built-in model is not there")
def test_the_built_in_model_needs_no_name(attnctrl, tmp_path):
    world, rng = IconWorld(), np.random.default_rng(5)
    scene = world.scene(rng, objects=1)
    question = world.questions(scene, rng, ["color"])[0]
    scene.render().save(tmp_path / "scene.png")
    code, out, err = attnctrl("ask", tmp_path / "scene.png", question.text)
    assert code == 0 and question.right(out), out + err


def test_ask_refuses(attnctrl, vlm, picture, tmp_path, monkeypatch):
    (tmp_path / "no.png").write_text("no picture")
    llama, bare = save_llama(tmp_path / "llama"), save_llava(tmp_path / "bare", template=None)
    (tmp_path / "empty").mkdir()

    def refusal(*arguments):
        code, out, err = attnctrl("ask", *arguments)
        assert code == 2 and out == ""
        return err

    named = ("--model", vlm)
    with monkeypatch.context() as nothing:
        nothing.setattr("attnctrl.icons.models.asset_folders", lambda: ())
        assert "no built-in vision-language model 'builtin:icons-vlm'" in refusal(picture, ASKED)
    assert "no built-in vision-language model 'builtin:none'" in refusal(picture, ASKED, "--model", "builtin:none")
    assert "none.png' does not exist" in refusal(tmp_path / "none.png", ASKED, *named)
    assert "cannot be read as a picture" in refusal(tmp_path / "no.png", ASKED, *named)
    assert "is a llama, which reads no images" in refusal(picture, ASKED, "--model", llama)
    assert "has no chat template" in refusal(picture, ASKED, "--model", bare)
    assert "it has no config.json" in refusal(picture, ASKED, "--model", tmp_path / "empty")
    assert "there is no question" in refusal(picture, " ", *named)
    assert "--compare needs a control" in refusal(picture, ASKED, *named, "--compare")
    assert "there is no control 'Pai'" in refusal(picture, ASKED, *named, "--control", "Pai")
    assert "is for diffusion models" in refusal(picture, ASKED, *named, "--control", "SkipLayers(layers=1)")
    assert "is no picture file" in refusal(picture, ASKED, *named, "--show-attention", tmp_path / "a.txt")
    assert "does not exist" in refusal(picture, ASKED, *named, "--show-attention", tmp_path / "no" / "a.png")
    for limit in (500, 300):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert "is too large" in refusal(picture, ASKED, *named)


def test_seen():
    class Processor:
        do_center_crop = do_resize = True
        size, crop_size = {"shortest_edge": 20}, {"height": 10, "width": 10}

    image = Image.new("RGB", (80, 40))
    assert seen(Processor, image).size == (20, 20)
    Processor.size = {"height": 20, "width": 20}
    assert seen(Processor, image).size == (40, 20)
    Processor.do_resize = False
    assert seen(Processor, image).size == (10, 10)
    Processor.do_center_crop = False
    assert seen(Processor, image) is image


# -- GroundedVLM ---------------------------------------------------------------------------------------------------------


def test_grounded_vlm_is_called_as_the_pipeline(vlm, picture, loaded):
    grounded = GroundedVLM.from_pretrained(vlm, [PAI(alpha=4.0)], device="cpu", dtype=torch.float32)
    plain = pipeline("image-text-to-text", model=vlm, device="cpu")
    options = {"generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
    written = {"images": str(picture), "text": f"<image> {ASKED} answer"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in ({"text": chat(picture)}, written, {"text": [chat(picture), chat(picture)], "batch_size": 2}):
            wanted = plain(**call, **options)
            assert grounded(**call, **options, controls=()) == wanted
            assert grounded(**call, **options) != wanted
    edited, values = by_hand(loaded, picture, PAI(alpha=4.0))
    one = RecordAttention()
    before = state(grounded.model)
    found = grounded(text=chat(picture), **options, return_full_text=False, controls=[PAI(alpha=4.0), one])
    assert found[0]["generated_text"].strip() == edited and state(grounded.model) == before
    looked = sum(grounded.session.attention_values(i) for i in range(6)) / 6  # also after the call
    torch.testing.assert_close(looked, values)
    assert "PAI: 2 layers, acted 12 times" in grounded.report() and grounded.tokenizer is grounded.pipe.tokenizer
    lazy = grounded((chat(picture) for _ in range(2)), **options, return_full_text=False)
    assert [answer["generated_text"].strip() for [answer] in lazy] == [edited] * 2
    grounded(text=chat(picture), **options, controls=VAR(dims=[7], tau=5.0))
    assert grounded.session.sink_values().shape == (2, 2)


def test_grounded_vlm_refuses(vlm, picture):
    with pytest.raises(AttnCtrlError, match="wraps an image-text-to-text pipeline"):
        GroundedVLM("a name")
    with pytest.raises(AttnCtrlError, match="no sink dimensions are known"):
        GroundedVLM.from_pretrained(vlm, VAR(), device="cpu")
    with pytest.raises(AttnCtrlError, match="exclude each other"):
        GroundedVLM.from_pretrained(vlm, device="cpu", device_map="auto")
    grounded = GroundedVLM.from_pretrained(vlm, device="cpu")
    with pytest.raises(AttnCtrlError, match="not been called yet"):
        grounded.report()
    with pytest.raises(AttnCtrlError, match="no image token in the prompt"):
        grounded(text="what is in the picture", controls=PAI())
    assert "generate" not in vars(grounded.model)


# -- attnctrl inspect ------------------------------------------------------------------------------------------------------


def test_inspect_finds_built_in_language_models(attnctrl, vlm, tmp_path, monkeypatch):
    shutil.copytree(vlm, tmp_path / "models" / "little")
    monkeypatch.setattr("attnctrl.icons.models.asset_folders", lambda: (tmp_path,))
    code, out, err = attnctrl("inspect", "builtin:little")
    assert code == 0 and out.startswith("builtin:little: LlavaForConditionalGeneration"), err
    code, _, err = attnctrl("inspect", "builtin:less")
    assert code == 2 and "there is no built-in model 'less'" in err and "builtin:little" in err


def test_inspect_language_models(attnctrl, vlm, tmp_path):
    code, out, err = attnctrl("inspect", vlm)
    assert code == 0, err
    lines = out.splitlines()
    assert "LlavaForConditionalGeneration, family LLaVA, 4 layers, hidden size 32" in lines[0]
    assert lines[1] == "image tokens: 120" and lines[4].split() == [
        "0",
        "model.language_model.layers.0.self_attn",
        "4",
    ]
    assert "  PAI: yes, at up to 2 layers" in lines and "  PASTA: yes, at up to 4 layers" in lines
    assert "  PINE: yes, at up to 4 layers" in lines and "  ConcentricCausal: yes, at up to 4 layers" in lines
    assert any(line.startswith("  VAR: no: VAR: no sink dimensions are known") for line in lines)
    assert not any("SoftPAG" in line for line in lines)
    code, out, _ = attnctrl("inspect", save_llama(tmp_path / "llama"))
    assert "image tokens: none, text only" in out and "  PAI: no: PAI works on image tokens" in out
    assert "  PINE: yes, at up to 4 layers" in out
    assert "  ACT: yes, at up to 4 layers" in out


def test_inspect_sinks(attnctrl, vlm, picture, tmp_path):
    code, out, err = attnctrl("inspect", vlm, "--sinks", "--tau", 5, "--image", picture)
    assert code == 0, err
    assert "sink dimensions 7 (" in out and out.splitlines()[-1] == "  VAR(dims=(7,), tau=5)"
    llama = save_llama(tmp_path / "llama")
    code, _, err = attnctrl("inspect", llama, "--sinks")
    assert code == 2 and "no sink dimension found" in err
    code, _, err = attnctrl("inspect", llama, "--sinks", "--image", picture)
    assert code == 2 and "reads no images" in err
    code, _, err = attnctrl("inspect", vlm, "--tau", 5)
    assert code == 2 and "--tau belongs to --sinks" in err
