import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from attnctrl.errors import AttnCtrlError
from attnctrl.icons import train
from attnctrl.icons.recipes import clip, denoiser, text, vae
from attnctrl.icons.world import NOUNS, Scene, SceneObject, caption, sample_scene


@pytest.mark.parametrize("count", [1, 7, 256])
def test_zero_tokens_equal_one_with_a_log_bias(count):
    """What training relies on: n all-zero text tokens act as one token whose key carries log n, through every block."""
    torch.manual_seed(0)
    model = denoiser.build().eval()
    generator = torch.Generator().manual_seed(1)
    noisy, words = torch.randn(1, 8, 16, 16, generator=generator), torch.randn(1, 6, 256, generator=generator)
    rest = {
        "pooled_projections": torch.randn(1, 256, generator=generator),
        "timestep": torch.tensor([300.0]),
        "return_dict": False,
    }
    bias = torch.zeros(1, 1, 1, 64 + 6 + 1)
    bias[..., -1] = math.log(count)
    with torch.no_grad():
        long = model(noisy, torch.cat([words, torch.zeros(1, count, 256)], 1), **rest)[0]
        with denoiser._PaddingWeight(bias):
            short = model(noisy, torch.cat([words, torch.zeros(1, 1, 256)], 1), **rest)[0]
        with denoiser._PaddingWeight(bias * 0):
            unweighted = model(noisy, torch.cat([words, torch.zeros(1, 1, 256)], 1), **rest)[0]
    torch.testing.assert_close(short, long, rtol=1e-3, atol=1e-4)
    assert count == 1 or (unweighted - long).abs().max() > 1e-3


def test_folded_normalisation_is_exact():
    torch.manual_seed(0)
    model = vae.build().eval()
    pixels = vae.batch(np.random.default_rng(0), 2, 128)
    with torch.no_grad():
        before = model.decode(model.encode(pixels).latent_dist.mode()).sample
        vae.normalise_latents(model, scenes=32)
        latents = torch.cat([model.encode(vae.batch(np.random.default_rng((7,)), 32, 128)).latent_dist.mode()])
        after = model.decode(model.encode(pixels).latent_dist.mode()).sample
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 0.3 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_token_truth_marks_the_objects():
    scene = sample_scene(np.random.default_rng(3), 2, distinct=True)
    truth = denoiser.token_truth(scene).reshape(8, 8, 7)
    cells = sum((item.size // 16) ** 2 for item in scene.objects)
    assert (truth[..., 1] < 6).sum() == cells == (truth[..., 2] < 25).sum()
    under = truth[..., 0] < len(NOUNS)
    assert (truth[under][:, 5:] == truth[under][:, :2]).all(), "the nearest object of a token under one is that one"
    middle = (np.arange(8) + 0.5) * 16
    away = [np.hypot(middle[None] - x, middle[:, None] - y) for x, y in (item.center for item in scene.objects)]
    first = truth[..., 5] == list(NOUNS).index(scene.objects[0].noun)
    assert ((away[0] < away[1]) == first)[away[0] != away[1]].all()


def test_schedule_warms_up_holds_and_decays():
    values = [denoiser.schedule(step, (step + 1) / 1000) for step in range(1000)]
    assert values[0] == 0.01 and values[100] == values[598] == 1.0 and values[-1] == 0.02


def test_every_word_of_the_world_is_one_token(tmp_path):
    tokenizer = text.build_tokenizer(tmp_path)
    from attnctrl.icons.world import BACKGROUNDS, COLORS, NOUNS, PATTERNS, SIZES

    for word in [*NOUNS, *COLORS, *BACKGROUNDS, *PATTERNS, *SIZES, "left", "above", "background"]:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    again = tokenizer.decode(tokenizer("a turquoise zeppelin, é").input_ids, skip_special_tokens=True)
    assert again.replace(" ", "") == "aturquoisezeppelin,é"


def test_the_whole_recipe_runs_resumes_and_loads(tmp_path):
    """Every command, a few steps each, ends in a folder that a stock pipeline loads."""
    run, to = tmp_path / "run", tmp_path / "pipeline"
    small = ["--batch-size", "2", "--device", "cpu"]
    with pytest.raises(SystemExit, match="lacks vae"):
        train.main(["export", "--output", str(run), "--to", str(to)])
    train.main(["text", "--output", str(run), "--steps", "2", *small])
    for steps in ("1", "2"):
        train.main(
            [
                "vae",
                "--output",
                str(run),
                "--steps",
                steps,
                "--crop-steps",
                "9",
                "--no-compile",
                "--save-every",
                "1",
                "--final-scenes",
                "64",
                *small,
            ]
        )
    for steps in ("1", "2"):
        train.main(
            [
                "denoiser",
                "--output",
                str(run),
                "--steps",
                steps,
                "--pool",
                "200",
                "--save-every",
                "1",
                "--sample-every",
                "0",
                *small,
            ]
        )
    assert torch.load(run / "denoiser.pt", weights_only=True)["step"] == 2
    train.main(["export", "--output", str(run), "--to", str(to)])
    pictures = []
    for parts in ({}, {"text_encoder_3": None, "tokenizer_3": None}):
        pipe = StableDiffusion3Pipeline.from_pretrained(to, **parts)
        pipe.set_progress_bar_config(disable=True)
        for length in (1, 2, 9):
            options = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
            pictures.append(pipe("a red cat", max_sequence_length=length, **options).images)
    assert pictures[0].shape == (1, 128, 128, 3)
    assert all(np.array_equal(a, b) for a, b in zip(pictures[:3], pictures[3:]))


def test_missing_parts_are_loud(tmp_path):
    from attnctrl.icons.recipes.export import export

    with pytest.raises(AttnCtrlError, match="lacks vae, tokenizer, text_encoder, denoiser.pt"):
        export(tmp_path, tmp_path / "to")


def test_captions_fit_their_scenes_and_not_the_changed_ones():
    rng = np.random.default_rng(1)
    seen = set()
    for index in range(400):
        scene = sample_scene(rng, related=index % 2 == 0)
        text = caption(scene, rng)
        assert clip.Statement.parse(text).may_fit(scene), text
        for change in clip.CHANGES:
            if (other := clip.changed(scene, change, rng)) is None:
                continue
            seen.add(change)
            assert other != scene and len(other.objects) in (len(scene.objects), len(scene.objects) - 1)
            full, before = clip.truth(other), clip.truth(scene)
            named, moved = set(before.objects), None not in (full.relation, before.relation)
            told = sorted(full.objects) != sorted(before.objects) or (full.pattern, full.background) != (
                before.pattern,
                before.background,
            )
            told = told or (moved and full.relation != before.relation and len(named) == 2)
            assert told or change in ("places", "exchanged colours")
            assert not (told and full.may_fit(scene)), (change, scene, other)
            assert not np.array_equal(np.asarray(other.render()), np.asarray(scene.render())) or change == "places"
    assert seen == set(clip.CHANGES)


def test_what_captions_say():
    cat, dog = SceneObject("cat", "red", (0, 0, 48, 48)), SceneObject("dog", "blue", (64, 0, 128, 64))
    scene = Scene((cat, dog), "striped", "mint")
    fits = [
        "a red cat left of a blue dog",
        "a blue dog to the right of a red cat on a striped background",
        "a picture of a small red cat and a big blue dog on a mint background",
        "a blue dog, a red cat on a striped mint background",
    ]
    unfit = [
        "a red cat",
        "a red dog left of a blue cat",
        "a red cat right of a blue dog",
        "a red cat above a blue dog",
        "a big red cat and a big blue dog",
        "a red cat and a blue dog on a plain background",
        "a red cat, a blue dog and a red cat",
    ]
    assert [text for text in fits + unfit if clip.Statement.parse(text).may_fit(scene)] == fits
    said, truth = clip.Statement.parse(fits[0]), clip.truth(scene)
    assert said.facts().sum() == 2 and truth.facts().sum() == 4 and (said.facts() <= truth.facts()).all()
    left, right, nothing = [0, 0], [1, 3], [16, 6]  # cat, red; dog, blue
    assert said.sides().tolist() == truth.sides().tolist() == [left, right, nothing, nothing]
    assert clip.Statement.parse("a blue dog right of a red cat").sides().tolist() == said.sides().tolist()
    assert clip.Statement.parse("a blue dog above a red cat").sides().tolist() == [nothing, nothing, right, left]


def test_lessons_of_tokens():
    cat, dog = SceneObject("cat", "red", (0, 0, 48, 48)), SceneObject("dog", "blue", (64, 0, 128, 64))
    tokens = torch.tensor([[9, 3, 5, 4, 9, 9], [9, 3, 9, 9, 9, 9]])
    texts = ["a red cat left of a blue dog", "a red cat"]
    found = clip.lessons([Scene((cat, dog)), Scene((cat,))], texts, tokens, torch.tensor([3, 4]))
    assert found["order"].tolist() == [[-100, 0, -100, 1, -100, -100], [-100, 0, -100, -100, -100, -100]]
    beside = found["beside"].view(2, 8, 8)
    assert (beside[0, :3, :3] == 0).all() and (beside[0, :4, 4:] == 1).all() and (beside >= 0).sum() == 9 + 16
    assert found["tokens"].shape == (2, 64, 5) and len(found["facts"]) == len(found["sides"]) == 4


@pytest.mark.parametrize("family", [1, 4])
def test_no_caption_of_a_batch_fits_a_second_scene(family):
    scenes, texts = clip.draw(np.random.default_rng(5), 48, family)
    fits = [[clip.Statement.parse(text).may_fit(scene) for scene in scenes] for text in texts]
    assert np.array_equal(fits, np.eye(48, dtype=bool))
    again = clip.draw(np.random.default_rng(5), 48, family)
    assert again == (scenes, texts)


TINY = {"batch_size": 4, "width": 32, "layers": 1, "device": "cpu"}


def test_an_interrupted_image_text_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    text.build_tokenizer(tmp_path / "whole" / "tokenizer", captions=200)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    clip.train(tmp_path / "whole", steps=4, **TINY)

    def save_and_stop(path, state, save=clip.save_checkpoint):
        save(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clip, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            clip.train(tmp_path / "parts", steps=4, save_every=2, **TINY)
    halfway = torch.load(tmp_path / "parts" / "clip.pt", weights_only=True)
    clip.train(tmp_path / "parts", steps=4, **TINY)
    whole, parts = (torch.load(tmp_path / name / "clip.pt", weights_only=True) for name in ("whole", "parts"))
    assert (halfway["step"], whole["step"], parts["step"]) == (2, 4, 4)
    for name, weight in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], weight, msg=name)
    assert not torch.equal(halfway["model"]["visual.proj"], whole["model"]["visual.proj"])
    with pytest.raises(AttnCtrlError, match="other sizes"):
        clip.train(tmp_path / "parts", steps=5, **{**TINY, "width": 64})


def test_the_image_text_recipe_ends_in_a_folder_that_open_clip_loads(tmp_path, capsys):
    run, to = tmp_path / "run", tmp_path / "model"
    with pytest.raises(SystemExit, match="lacks clip.pt"):
        train.main(["export-clip", "--output", str(run), "--to", str(to)])
    options = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    train.main(["clip", "--output", str(run), "--steps", "500", "--minutes", "0.001", *options])
    assert torch.load(run / "clip.pt", weights_only=True)["step"] < 500
    train.main(["export-clip", "--output", str(run), "--to", str(to), "--batches", "1"])
    assert "| independent scenes, image to text |" in capsys.readouterr().out
    scorer = clip.Scorer(f"local-dir:{to}")
    state = torch.load(run / "clip.pt", weights_only=True)["model"]
    for name, weight in scorer.model.state_dict().items():
        assert torch.equal(weight, state[name].half().float()), name


def test_denoiser_starts_from_a_saved_pipeline(tmp_path):
    from diffusers import SD3Transformer2DModel

    from attnctrl.icons.models import builtin_path

    shipped = builtin_path("icons-t2i")
    denoiser.train(tmp_path, tmp_path, steps=0, pool=2, sample_every=0, start_from=str(shipped))
    made, known = (
        SD3Transformer2DModel.from_pretrained(folder / "transformer").state_dict()
        for folder in (tmp_path / "pipeline", shipped)
    )
    assert all(torch.equal(made[name], known[name]) for name in known)
    assert (tmp_path / "vae" / "config.json").is_file() and (tmp_path / "tokenizer").is_dir()
