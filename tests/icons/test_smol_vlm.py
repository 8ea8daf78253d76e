"""The recipe on a tiny language model: exact branches, alignment, training that resumes, export that `attnctrl.assemble` reads."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from attnctrl import AttnCtrlError, assemble
from attnctrl.icons.questions import IconWorld, Question
from attnctrl.icons.recipes import smol_export, smol_vlm
from attnctrl.icons.recipes.smol_learner import Branches, Learner, loss_of

from ..test_fetch import tiny_llama, write_gguf
from .test_emoji import folder as emoji_folder  # noqa: F401


pytest.importorskip("fontawesomefree", reason="icon scenes need fontawesomefree: pip install 'attnctrl[eval]'")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny language model behind the real class, and its processor."""
    import timm

    file = tmp_path_factory.mktemp("parts") / "model.gguf"
    write_gguf(file, tiny_llama())
    torch.manual_seed(2)
    tower = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    return assemble.build_vlm(*assemble.load_language_model(file), tower)


@pytest.fixture
def model(parts):
    return copy.deepcopy(parts[0])


@pytest.fixture
def learner(model) -> Learner:
    """In float32, with a LoRA that does something."""
    torch.manual_seed(3)
    learner = Learner(model, rank=2)
    for weight in learner.language.parameters():
        weight.data = weight.data.float()
    for lora in learner.lora.values():
        torch.nn.init.normal_(lora.b, std=0.3)
    return learner


def asked() -> list[list[Question]]:
    world, rng = IconWorld(), np.random.default_rng(0)
    return [world.questions(world.scene(rng), rng)[:3] for _ in range(2)]


def test_branches_are_what_each_question_gives_alone(parts, learner, tmp_path):
    model, processor = copy.deepcopy(parts[0]), parts[1]
    torch.manual_seed(4)
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = model.model.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    questions = asked()
    batch = Branches(questions, processor.tokenizer)
    with torch.no_grad():
        logits, targets, owner = learner(features, batch)
    save = {name: value.clone() for name, value in learner.trained().items()}
    save_file(save, tmp_path / "adapter.safetensors")
    assemble.add_adapter(model, tmp_path / "adapter.safetensors")
    number = 0
    for scene, turns in enumerate(questions):
        for question in turns:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True) + f"{question.answer}<|im_end|>"
            ids = processor.tokenizer(text.replace("<image>", "<image>" * 49), return_tensors="pt")["input_ids"]
            answer = processor.tokenizer(f"{question.answer}<|im_end|>")["input_ids"]
            assert targets[owner == number].tolist() == answer == ids[0, -len(answer) :].tolist()
            with torch.no_grad():
                alone = model(input_ids=ids, pixel_values=pixels[scene : scene + 1]).logits[0, -len(answer) - 1 : -1]
            # the projector runs in bfloat16 in the learner
            torch.testing.assert_close(logits[owner == number], alone, atol=0.05 * float(alone.std()), rtol=0.05)
            number += 1
    assert number == len(batch.questions) == 6


def test_questions_do_not_see_each_other(parts, learner):
    tokenizer = parts[1].tokenizer
    (first, *_), _ = asked()
    features = torch.randn(1, 49, 1280)
    found = []
    for other in ("Yes, there is a red cat.", "No, there is no cat...."):
        batch = Branches([[Question("presence", "Is there a cat?", other), first]], tokenizer)
        with torch.no_grad():
            logits, _, owner = learner(features, batch)
        found.append(logits[owner == 1])
    torch.testing.assert_close(*found)  # not bit for bit: the other answer may change the sequence's length


def test_loss_weighs_questions_by_the_root_of_their_length():
    logits = torch.zeros(5, 3)
    logits[:4, 0] = 2.0
    targets, owner = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 1])
    long, short = F.cross_entropy(logits[:1], targets[:1]), F.cross_entropy(logits[4:], targets[4:])
    torch.testing.assert_close(loss_of(logits, targets, owner), (2 * long + short) / 3)


def test_cells_name_what_lies_under_them():
    world, rng = IconWorld(), np.random.default_rng(1)
    scenes = [("icons", world.scene(rng)) for _ in range(20)]
    words = smol_vlm.CellWords(scenes)
    for (_, scene), cells in zip(scenes, words.cells):
        told = {words.phrases[-1 - cell] for cell in cells if cell < 0}
        assert told == {f"{item.color} {item.noun}" for item in scene.objects}
        assert {words.phrases[cell] for cell in cells if cell >= 0} <= {scene.background}
        item = scene.objects[0]
        column, row = (int(7 * middle / 128) for middle in item.center)
        assert words.phrases[-1 - cells.reshape(7, 7)[row, column]] == f"{item.color} {item.noun}"


def test_alignment_brings_cells_to_the_embeddings_of_their_words(parts, model):
    torch.manual_seed(5)
    world, rng = IconWorld(), np.random.default_rng(2)
    scenes = [("icons", world.scene(rng, objects=1)) for _ in range(60)]
    words = smol_vlm.CellWords(scenes)
    targets = words.embeddings(model, parts[1])
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(targets.norm(dim=-1), table.norm(dim=-1).mean().expand(len(words.phrases)))
    codes = torch.randn(len(words.phrases), 1280)  # the tower, as it were, sees every phrase as a code of its own
    truth = torch.from_numpy(np.where(words.cells < 0, -1 - words.cells, words.cells))
    pool = smol_vlm.ScenePool.__new__(smol_vlm.ScenePool)
    pool.seed, pool.features = 0, codes[truth].half()
    smol_vlm.align(model.model.multi_modal_projector, pool, words, targets, steps=120, batch_size=16)
    with torch.no_grad():
        out = model.model.multi_modal_projector(codes)
    assert (F.normalize(out, dim=-1) @ F.normalize(targets, dim=-1).T).argmax(-1).eq(
        torch.arange(len(codes))
    ).float().mean() > 0.9


def test_trains_resumes_and_exports(parts, emoji_folder, tmp_path, monkeypatch):  # noqa: F811
    for module in (smol_vlm, smol_export):
        monkeypatch.setattr(module, "load_parts", lambda folder: (copy.deepcopy(parts[0]), parts[1]))
    monkeypatch.setattr(smol_vlm.Tests, "COUNT", 2)
    options = {"emoji": str(emoji_folder), "batch_size": 2, "rank": 2, "align_steps": 3, "pool": 6, "test_every": 0}
    run = tmp_path / "run"
    smol_vlm.train(tmp_path, run, steps=2, frozen_share=0.0, **options)
    first = torch.load(run / "smol-vlm.pt", weights_only=True)
    assert first["step"] == 2
    aligned = torch.load(run / "aligned.pt", weights_only=True)
    assert not torch.equal(first["trained"]["projector.linear_1.weight"], aligned["linear_1.weight"])
    report = json.loads((run / "smol-vlm.json").read_text(encoding="utf-8"))
    assert set(report) == {"icons", *smol_vlm.TESTS}
    assert all(0 <= right <= asked for kinds in report.values() for right, asked in kinds.values())
    assert sum(report["icons"]["presence"][1:]) == 4

    smol_vlm.train(tmp_path, run, steps=3, frozen_share=0.0, **options)
    second = torch.load(run / "smol-vlm.pt", weights_only=True)
    assert second["step"] == 3
    up = "lora.0.self_attn.q_proj.b"
    assert not torch.equal(first["trained"][up], second["trained"][up]) and second["trained"][up].abs().max() > 0

    smol_export.export(tmp_path, run, tmp_path / "to", emoji=str(emoji_folder))
    shipped = load_file(tmp_path / "to" / "adapter.safetensors")
    assert {value.dtype for value in shipped.values()} == {torch.float16} and set(shipped) == set(second["trained"])
    model = copy.deepcopy(parts[0])
    before = model.model.language_model.layers[1].self_attn.o_proj.weight.clone()
    assemble.add_adapter(model, tmp_path / "to" / "adapter.safetensors")
    added = shipped["lora.1.self_attn.o_proj.b"].float() @ shipped["lora.1.self_attn.o_proj.a"].float()
    assert torch.equal(model.model.language_model.layers[1].self_attn.o_proj.weight, before + added)
    with pytest.raises(AttnCtrlError, match="has no smol-vlm.pt\nHINT: .*train smol-vlm"):
        smol_export.export(tmp_path, tmp_path / "nothing", tmp_path / "to")
    card = (tmp_path / "to" / "README.md").read_text(encoding="utf-8")
    assert "| icons | presence |" in card and "find_sink_dims" in card and "3 steps of 8 scenes" in card


def test_right_answers_are_counted(parts, learner, emoji_folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(smol_vlm.Tests, "COUNT", 3)
    tests = smol_vlm.Tests(str(emoji_folder), parts[0], parts[1], seed=0)

    def knows(features, batch):
        """Says "Yes" to everything, and all other answers right."""
        _, targets, owner = learner(features, batch)
        said = F.one_hot(targets, 280).float()
        yes = parts[1].tokenizer("Yes")["input_ids"]
        for number, question in enumerate(batch.questions):
            if question.kind == "presence":
                said[owner == number] = F.one_hot(torch.tensor(yes[0]), 280).float()
        return said, targets, owner

    knows.projector = learner.projector
    for kinds in tests.run(knows).values():
        assert all(right == asked for kind, (right, asked) in kinds.items() if kind != "presence")
        assert kinds["presence"][0] * 2 == kinds["presence"][1] == 6  # one of two is there
