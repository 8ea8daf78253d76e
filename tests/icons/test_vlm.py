import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from attnctrl.errors import AttnCtrlError
from attnctrl.icons import models, train
from attnctrl.icons.models import builtin_path, builtin_vlms, resolve_vlm
from attnctrl.icons.questions import IconWorld, plural
from attnctrl.icons.recipes import vlm
from attnctrl.icons.world import COLORS, NOUNS, Scene, SceneObject
from attnctrl.pipelines import GroundedVLM


@pytest.fixture(scope="module")
def tokenizer():
    return vlm.build_tokenizer()


def chat(picture, text):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def test_words_are_single_tokens(tokenizer):
    for word in (*NOUNS, *map(plural, NOUNS), *COLORS, "background", "many"):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1
    assert tokenizer.decode(tokenizer("A zebra, naïvely?")["input_ids"]) == "A zebra, naïvely?"


def test_sequences_teach_what_they_say(tokenizer):
    batch = vlm.Batches(tokenizer).draw(np.random.default_rng(0), 6, chats=0.5)
    assert {question.kind for _, question, _, _ in batch.spans} == set(vlm.KINDS)
    taught = torch.full_like(batch.labels, -100)
    for row, question, first, end in batch.spans:
        assert tokenizer.decode(batch.labels[row, first:end]) == question.answer + vlm.END
        asked = tokenizer.decode(batch.ids[row, :first]).removesuffix("<|end|><|assistant|>")
        assert asked.endswith((question.text, question.text.lower().rstrip("?.")))
        taught[row, first:end] = batch.ids[row, first:end]
    assert torch.equal(taught, batch.labels)


def test_image_tokens_name_what_is_under_them(tokenizer):
    names = vlm.name_rows(tokenizer)
    assert [tokenizer.decode(rows[[1, -1]]) for rows in names] == [
        " dog background",
        " dogs background",
        " yellow background",
    ]
    table = F.one_hot(torch.arange(len(tokenizer))).float() * 4
    pair = Scene((SceneObject("dog", "red", (0, 0, 48, 48)), SceneObject("fish", "blue", (64, 64, 112, 112))))
    truth = vlm.pictures([pair])["truth"]
    right = sum(table[rows[truth[..., i]]] for rows, i in zip(names, (0, 0, 1)))
    told, swapped = vlm.naming_loss(table, names, right, truth), vlm.naming_loss(table, names, right.flip(1), truth)
    assert told < 1e-3 and swapped > 5


@pytest.mark.parametrize("chats", [0.0, 1.0])
def test_training_sees_what_the_model_sees(tokenizer, chats):
    """Each question of a packed sequence gets the logits that the model's own `forward` gives its prompt from the chat template."""
    torch.manual_seed(0)
    model, processor = vlm.build(tokenizer).eval(), vlm.build_processor(tokenizer)
    batches, rng = vlm.Batches(tokenizer), np.random.default_rng(1)
    batch = batches.draw(rng, 1, chats=chats)
    assert len(batch.spans) > 4
    pixels = ((batch.pixels[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    messages = []
    with torch.no_grad():
        features = vlm.look(model, batch.pixels)[2]
        logits = model.lm_head(vlm.read(model, features, batch.ids, batch.positions, batch.mask, batches.image))[0]
        start = len(batches.prefix)
        for _, question, first, end in batch.spans:
            opening, said = "<|user|>" if chats and messages else "", "<|end|><|assistant|>"
            text = tokenizer.decode(batch.ids[0, start:first]).removeprefix(opening).removesuffix(said)
            messages = [*messages, {"role": "user", "content": text} if messages else chat(pixels, text)[0]]
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            own = model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[first - 1], own, rtol=1e-3, atol=1e-4)
            messages = [*messages, {"role": "assistant", "content": question.answer}] if chats else []
            start = end


def test_learns_resumes_and_exports(tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(vlm, "build_tokenizer", lambda: tokenizer)
    run, to = tmp_path / "run", tmp_path / "assets" / "models" / "mine"
    options = ["--batch-size", "2", "--tower-share", "0.3", "--save-every", "1"]
    train.main(["vlm", "--output", str(run), *options, "--steps", "4", "--measure-every", "4"])
    said = capsys.readouterr().out
    assert "step 0  tower" in said and "step 3  answers" in said and "presence" in said
    state = torch.load(run / "vlm.pt", weights_only=True)
    assert state["step"] == 4 and state["joint"] == 1
    train.main(["vlm", "--output", str(run), *options, "--steps", "5", "--measure-every", "0"])
    state = torch.load(run / "vlm.pt", weights_only=True)
    assert state["step"] == 5 and state["joint"] == 1 and "step 0" not in capsys.readouterr().out

    train.main(["export-vlm", "--output", str(run), "--to", str(to), "--scenes", "2"])
    table = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if "/" in line and line[0] == "|"]
    assert [kind.strip() for kind, _ in table] == list(vlm.KINDS) and table[0][1].strip().endswith(" / 4")
    files = load_file(to / "model.safetensors")
    assert {weight.dtype for weight in files.values()} == {torch.float16}
    model, processor = AutoModelForImageTextToText.from_pretrained(to), AutoProcessor.from_pretrained(to)
    assert model.dtype == torch.float32 and model.lm_head.weight is model.get_input_embeddings().weight
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["model"][name].half().float()), name
    assert len(AutoTokenizer.from_pretrained(to)) == len(tokenizer)
    picture = IconWorld().scene(np.random.default_rng(0)).render()
    inputs = processor.apply_chat_template(
        chat(picture, "What color is the cat?"),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
    assert torch.allclose(
        inputs["pixel_values"][0, :, 5, 7], torch.tensor(picture.getpixel((7, 5))) / 127.5 - 1, atol=1e-5
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3

    monkeypatch.setattr(models, "_PACKAGE", tmp_path / "attnctrl")
    assert list(builtin_vlms()) == ["mine"] and builtin_path("mine").name == "mine"
    answerer = GroundedVLM.from_pretrained("builtin:mine")
    found = answerer(text=chat(picture, "Is there a cat?"), max_new_tokens=2, return_full_text=False)
    assert isinstance(found[0]["generated_text"], str)


def test_export_needs_a_run(tmp_path):
    with pytest.raises(AttnCtrlError, match="no vlm.pt with its tokenizer\nHINT: run the recipe vlm"):
        vlm.export(tmp_path, tmp_path / "to")


def test_resolves_names(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_PACKAGE", tmp_path / "attnctrl")
    folder = tmp_path / "assets" / "models" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert builtin_vlms() == {}  # without weights it is no model
    with pytest.raises(AttnCtrlError, match=r"'builtin:small'\nHINT: a built-in model \("):
        resolve_vlm("builtin:small")
    (folder / "model.safetensors").touch()
    assert resolve_vlm("builtin:small") == str(folder) == resolve_vlm(folder)
    assert resolve_vlm("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    with pytest.raises(AttnCtrlError, match="is a vision-language model, not a pipeline"):
        models.resolve_model("builtin:small")
    with pytest.raises(AttnCtrlError, match="is a vision-language model, not an open_clip model"):
        models.resolve_open_clip("builtin:small")
    for model, message in ((" ", "has to be named"), (tmp_path, "has no config.json|it has no config.json")):
        with pytest.raises(AttnCtrlError, match=message):
            resolve_vlm(model)


@pytest.mark.skipif("icons-vlm" not in builtin_vlms(), reason="the built-in model is not there")
def test_builtin_answers():
    """Presence and color of scenes that nobody saw, nouns drawn freely."""
    world, answerer = IconWorld(), GroundedVLM.from_pretrained("builtin:icons-vlm", device="cpu")
    asked = []
    for i in range(20):
        rng = np.random.default_rng((77, i))
        scene = world.scene(rng, prior=0.0)
        questions = world.questions(scene, rng, ["presence", "color"])
        asked += [(scene.render(), question) for question in (questions[0], questions[-1])]
    found = answerer(
        text=[chat(picture, question.text) for picture, question in asked],
        batch_size=len(asked),
        return_full_text=False,
        generate_kwargs={"do_sample": False, "max_new_tokens": 12},
    )
    right = [question.right(one[0]["generated_text"]) for (_, question), one in zip(asked, found)]
    assert len(right) == 40 and sum(right) >= 32
