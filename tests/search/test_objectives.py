import json

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.evaluate.t2i import request
from attnctrl.icons.world import Scene, SceneObject, caption, relation_between, sample_scene
from attnctrl.search import icon_judge, objective_by_name, open_clip_score, torchmetrics_score
from attnctrl.search.objectives import asked_of, name_of


def test_captions_are_read_as_they_were_written():
    for index in range(200):
        rng = np.random.default_rng((5, index))
        scene = sample_scene(rng)
        text = caption(scene, rng)
        objects, relation = asked_of(text)
        assert objects == [(item.noun, item.color) for item in scene.objects], text
        if relation is not None:
            assert relation == relation_between(*scene.objects), text
        assert (relation is not None) == any(word in text for word in ("left of", "right of", "above", "below"))


def test_the_evaluations_prompts_are_read():
    for index in range(30):
        asked = request(index)
        objects, relation = asked_of(asked.prompt)
        assert objects == [(item.noun, item.color) for item in asked.scene.objects] and relation == asked.relation


@pytest.mark.parametrize("text", ["a photo of my dog", "a red unicorn", "a pink cat", ""])
def test_other_prompts_are_told(text):
    with pytest.raises(ac.AttnCtrlError, match="captions like"):
        asked_of(text)


def test_icon_judge_counts_what_is_there():
    asked = [request(index) for index in (2, 1, 5)]
    pictures = [item.scene.render() for item in asked]
    judge = icon_judge()
    assert judge(pictures, [item.prompt for item in asked]) == [1.0, 1.0, 1.0]
    blank = Image.new("RGB", (128, 128), "white")
    assert judge([blank], [asked[0].prompt]) == [0.0]
    first = asked[0].scene.objects[0]
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[asked[0].relation]
    swapped = asked[0].prompt.replace(asked[0].relation, turned)
    assert judge([pictures[0]], [swapped]) == [pytest.approx(2 / 3)]
    assert judge([pictures[0]], [f"a {first.color} {first.noun}"]) == [1.0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(name, checkpoint) of a tiny open_clip model with random weights."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-for-tests.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-for-tests")
    torch.save(model.state_dict(), folder / "tiny.pt")
    return "tiny-for-tests", folder / "tiny.pt"


def test_open_clip(clip):
    import open_clip

    name, weights = clip
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 255, (48, 40, 3), dtype=np.uint8)) for _ in range(3)]
    prompts = ["a red cat", "a blue car", "a dog"]
    score = objective_by_name(f"open_clip:{name}:{weights}")
    assert score.name == f"open_clip:{name}:tiny.pt"
    got = score(pictures, prompts)
    model, _, prepare = open_clip.create_model_and_transforms(name, pretrained=str(weights))
    model.eval()
    tokens = open_clip.get_tokenizer(name)(prompts)
    with torch.no_grad():
        for index, picture in enumerate(pictures):
            seen = model.encode_image(prepare(picture)[None])
            cosine = torch.nn.functional.cosine_similarity(seen, model.encode_text(tokens[index : index + 1]))
            assert float(got[index]) == pytest.approx(100 * float(cosine), abs=1e-3)
    assert len({round(float(value), 3) for value in got}) == 3


@pytest.mark.parametrize("pretrained", [None, "no-such-tag", "/no/such/file.pt"])
def test_open_clip_without_weights_is_told(clip, pretrained):
    with pytest.raises(ac.AttnCtrlError, match="cannot be loaded"):
        open_clip_score(clip[0], pretrained)


def test_torchmetrics():
    class Redness:
        """A metric as torchmetrics calls it: accumulates until reset."""

        total = 0.0

        def __call__(self, image: torch.Tensor, text: str) -> torch.Tensor:
            assert image.shape == (3, 4, 6) and image.dtype == torch.uint8 and text == "p"
            self.total += float(image[0].float().mean())
            return torch.tensor(self.total)

        def reset(self) -> None:
            self.total = 0.0

    pictures = [Image.new("RGB", (6, 4), (value, 0, 0)) for value in (10, 30)]
    score = torchmetrics_score(Redness())
    assert score.name == "torchmetrics:Redness" and score(pictures, ["p", "p"]) == [10.0, 30.0]


def test_missing_packages_are_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.multimodal", None)
    with pytest.raises(ac.AttnCtrlError, match="needs torchmetrics.*\n.*pip install torchmetrics"):
        objective_by_name("torchmetrics:CLIPScore:openai/clip-vit-base-patch16")


def test_functions_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_taste_for_tests.py").write_text(
        "def size(images, prompts):\n    return [im.width for im in images]\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    score = objective_by_name("my_taste_for_tests:size")
    assert score.name == "my_taste_for_tests:size" and score([Image.new("RGB", (7, 5))], ["p"]) == [7]
    for text, told in (
        ("my_taste_for_tests:weight", "cannot be imported"),
        ("my_taste_for_tests:number", "no function but int"),
        ("no_such_module_here:f", "cannot be imported"),
        ("beauty", "not known"),
        ("open_clip:", "not known"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=told):
            objective_by_name(text)


def test_names():
    assert name_of(icon_judge()) == "icons"
    assert name_of(test_names) == f"{__name__}:test_names"
    assert name_of(np.random.RandomState(0)).endswith(":RandomState")


def test_built_in_scorer_prefers_the_picture_that_was_asked_for():
    pytest.importorskip("open_clip")
    score = objective_by_name("open_clip:builtin:icons-clip")
    assert score.name.startswith("open_clip:") and "icons-clip" in score.name
    cat, car = (
        Scene((SceneObject(noun, color, (32, 32, 64, 64)),)).render()
        for noun, color in (("cat", "red"), ("car", "blue"))
    )
    right = score([cat, car], ["a red cat", "a blue car"])
    wrong = score([car, cat], ["a red cat", "a blue car"])
    assert (torch.as_tensor(right) > torch.as_tensor(wrong) + 5).all()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_aesthetic_head_reads_the_picture_alone(clip, tmp_path, suffix):
    import open_clip
    from safetensors.torch import save_file

    name, weights = clip
    model, _, prepare = open_clip.create_model_and_transforms(name, pretrained=str(weights))
    images = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    seen = model.eval().encode_image(torch.stack([prepare(image) for image in images]), normalize=True).detach()
    first, last = torch.nn.Linear(seen.shape[1], 5), torch.nn.Linear(5, 1)
    layers = {
        f"layers.{at}.{kind}": getattr(one, kind).detach()
        for at, one in ((0, first), (10, last))
        for kind in ("weight", "bias")
    }
    path = tmp_path / f"head{suffix}"
    save_file(layers, path) if suffix == ".safetensors" else torch.save(layers, path)
    score = objective_by_name(f"aesthetic:{path}:{name}:{weights}")
    assert score.name == f"aesthetic:head{suffix}:{name}:tiny.pt"
    torch.testing.assert_close(score(images, ["a", "b"]), last(first(seen)).squeeze(-1).detach())
    for wrong, said in (({"weight": torch.ones(2, 8)}, "ends in one number"), ({"other": torch.ones(1)}, "no chain")):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ac.AttnCtrlError, match=said):
            objective_by_name(f"aesthetic:{tmp_path / 'wrong.pth'}:{name}:{weights}")
    torch.save({"weight": torch.ones(1, 3)}, tmp_path / "narrow.pth")
    with pytest.raises(ac.AttnCtrlError, match="embeddings of 3 numbers"):
        objective_by_name(f"aesthetic:{tmp_path / 'narrow.pth'}:{name}:{weights}")(images, ["a", "b"])
    with pytest.raises(ac.AttnCtrlError, match="cannot be read"):
        objective_by_name(f"aesthetic:{tmp_path / 'none.pth'}:{name}:{weights}")
