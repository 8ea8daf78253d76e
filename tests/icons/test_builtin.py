"""The shipped text-to-image model: it loads as any other, is what it says, and follows its prompts and its regions."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import attnctrl as ac
from attnctrl.evaluate.icons import IconJudge
from attnctrl.icons.models import builtin_path
from attnctrl.icons.world import COLORS


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusion3Pipeline.from_pretrained(builtin_path("icons-t2i"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, steps=12, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(
        prompts, num_inference_steps=steps, guidance_scale=4.0, generator=generators, max_sequence_length=1, **options
    ).images


def test_is_what_it_says(pipe):
    folder = builtin_path("icons-t2i")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 60e6
    assert (folder / "README.md").is_file()
    config = pipe.transformer.config
    assert config.num_layers >= 8 and config.num_attention_heads >= 8 and config.qk_norm == "rms_norm"
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.float32}
    assert pipe("a red cat", num_inference_steps=1).images[0].size == (128, 128)


def test_the_third_encoder_says_nothing(pipe):
    with torch.no_grad():
        states = pipe.text_encoder_3(
            pipe.tokenizer_3("a red cat", padding="max_length", max_length=5, return_tensors="pt").input_ids
        )[0]
    assert states.shape == (1, 5, 256) and (states == 0).all()


def test_colours_follow_the_prompt(pipe):
    """A floor far below the measured quality, so that broken weights are noticed."""
    images = draw(pipe, [f"a {color} heart on a plain white background" for color in COLORS])
    read = IconJudge().read_many(images)
    right = sum(any(item.color == color for item in found) for color, found in zip(COLORS, read))
    assert right >= 4, read


def test_regions_place_their_colours(pipe):
    """Most of the red lies left and most of the blue right, and the other way round with the boxes exchanged."""
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    for red, blue, sign in ((left, right, -1), (right, left, 1)):
        regions = [ac.Region("a red heart", box=red), ac.Region("a blue star", box=blue)]
        control = ac.RegionalPrompts(regions, stop=0.3)  # as the command line does; isolated to the end, pictures tear
        with ac.attach(pipe, control):
            images = draw(pipe, ["a red heart and a blue star"] * 3)
        pixels = torch.stack(
            [torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)) for image in images]
        )
        excess = pixels[..., 0] - pixels[..., 2]
        x = torch.linspace(-1, 1, 128)
        red_mass, blue_mass = (excess - 60).clamp(min=0), (-excess - 60).clamp(min=0)
        centre = [(mass * x).sum() / mass.sum().clamp(min=1) for mass in (red_mass, blue_mass)]
        assert sign * (centre[0] - centre[1]) > 0.3


def test_softpag_acts_and_leaves(pipe):
    prompt = ["a green tree"]
    before = draw(pipe, prompt, steps=4, output_type="pt")
    with ac.attach(pipe, ac.SoftPAG(layers="4", strength=0.5, scale=2.0)):
        assert (draw(pipe, prompt, steps=4, output_type="pt") - before).abs().max() > 0.01
    assert torch.equal(draw(pipe, prompt, steps=4, output_type="pt"), before)
