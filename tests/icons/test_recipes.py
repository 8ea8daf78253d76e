import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from attnctrl.errors import AttnCtrlError
from attnctrl.icons import train
from attnctrl.icons.recipes import denoiser, text, vae
from attnctrl.icons.world import sample_scene


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
    scene = sample_scene(np.random.default_rng(3), 2)
    truth = denoiser.token_truth(scene).reshape(8, 8, 5)
    cells = sum((item.size // 16) ** 2 for item in scene.objects)
    assert (truth[..., 1] < 6).sum() == cells == (truth[..., 2] < 25).sum()


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
