"""The shipped image-text model: open_clip loads it as any other, and it tells pictures of the icon world apart."""

import json

import open_clip
import pytest
import torch
from safetensors import safe_open

from attnctrl.errors import AttnCtrlError
from attnctrl.icons import models
from attnctrl.icons.models import builtin_path, builtin_scorers, resolve_model, resolve_open_clip
from attnctrl.icons.recipes.clip import CHANGES, Scorer, discrimination, retrieval
from attnctrl.icons.world import COLORS, NOUNS, Scene, SceneObject


@pytest.fixture(scope="module")
def folder():
    return builtin_path("icons-clip")


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer(f"local-dir:{folder}")


def test_open_clip_loads_it_as_any_other(folder):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red cat", "A  Red\ncat "])
    assert type(model) is open_clip.CLIP and {p.dtype for p in model.parameters()} == {torch.float32}
    assert ids.shape == (2, model.context_length) and torch.equal(ids[0], ids[1])
    picture = Scene((SceneObject("cat", "red", (32, 32, 80, 80)),)).render()
    assert preprocess(picture).shape == (3, 128, 128)
    with torch.no_grad():
        image, text, scale = model(preprocess(picture)[None], ids)
    torch.testing.assert_close(torch.cat([image, text]).norm(dim=-1), torch.ones(3))
    assert image.shape == (1, 192) and 1 < scale <= 100.1


def test_is_small_and_in_half_precision(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert {"README.md", "open_clip_config.json", "open_clip_model.safetensors"} <= {path.name for path in files}
    with safe_open(folder / "open_clip_model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}").tokenizer
    assert config["text_cfg"]["vocab_size"] == len(tokenizer)
    assert config["text_cfg"]["eos_id"] == tokenizer.eos_token_id


def test_what_follows_the_end_of_the_text_does_not_matter(scorer):
    end_token = scorer.tokenizer.tokenizer.eos_token_id
    ids = scorer.tokenizer(["a red cat above a blue dog", "a green key"])
    other = ids.clone()
    for row in other:
        end = int((row == end_token).nonzero()[0])
        row[end + 1 :] = torch.randint(end_token, (len(row) - end - 1,), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(other, ids)
    with torch.no_grad():
        torch.testing.assert_close(scorer.model.encode_text(other), scorer.model.encode_text(ids))


def test_finds_the_caption_of_held_out_scenes(scorer):
    """Floors far below the measured rates, so that broken weights, tokens or preprocessing are noticed."""
    found = retrieval(scorer, batches=2)
    assert len(found) == 4
    for name, (right, total) in found.items():
        assert total == 128 and right >= (0.95 if "independent" in name else 0.75) * total, (name, right)


def test_tells_near_copies_apart(scorer):
    """Every kind of change but "places": the model card says that relations are not learned."""
    found = discrimination(scorer, pairs=16)
    assert len(found) == len(CHANGES)
    for name, (right, total) in found.items():
        assert total == 32 and (name.endswith("places") or right >= 0.85 * total), (name, right)


def test_reads_the_colour(scorer):
    """Every noun in every colour, against the five captions of another colour."""
    scenes = [Scene((SceneObject(noun, color, (32, 48, 80, 96)),)) for noun in NOUNS for color in COLORS]
    scores = scorer([scene.render() for scene in scenes], [f"a {c} {n}" for n in NOUNS for c in COLORS])
    rows, colors = torch.arange(len(scenes)), torch.arange(len(COLORS))
    same_noun = scores[rows[:, None], (rows // len(COLORS) * len(COLORS))[:, None] + colors]
    assert (same_noun.argmax(1) == rows % len(COLORS)).float().mean() >= 0.95
    assert scores[rows, rows].mean() > scores.mean() + 0.2


def test_names_of_built_in_scorers(folder, tmp_path, monkeypatch):
    assert resolve_open_clip("builtin:icons-clip") == resolve_open_clip(folder) == f"local-dir:{folder}"
    assert resolve_open_clip("ViT-B-32") == "ViT-B-32" and resolve_open_clip("hf-hub:a/b") == "hf-hub:a/b"
    with pytest.raises(AttnCtrlError, match="is a pipeline, not an open_clip model\nHINT: .*builtin:icons-clip"):
        resolve_open_clip("builtin:icons-t2i")
    with pytest.raises(AttnCtrlError, match="not a pipeline\nHINT: built-in pipelines: builtin:icons-t2i"):
        resolve_model("builtin:icons-clip")
    with pytest.raises(AttnCtrlError, match="no built-in model 'none'\nHINT: .*builtin:icons-clip"):
        resolve_open_clip("builtin:none")
    monkeypatch.setattr(models, "_PACKAGE", tmp_path / "attnctrl")
    assert builtin_scorers() == {}
