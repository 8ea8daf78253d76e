"""`RegionalPipeline` against sessions attached by hand to the same pipeline."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from diffusers.pipelines.stable_diffusion_3 import StableDiffusion3PipelineOutput

import attnctrl as ac
from attnctrl.controls.subject_masks import phrase_tokens
from attnctrl.pipelines import RegionalPipeline

from ..processors.test_pipelines import flux_pipe


LEFT, RIGHT, TOP = "a red cat@0,0,0.5,1", "a blue car@0.5,0,1,1", "a green fish@0,0,1,0.5"
CALL = {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 1, "output_type": "np"}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="module")
def pipeline(model):
    made = RegionalPipeline.from_pretrained(model)
    made.set_progress_bar_config(disable=True)
    return made


def by_hand(pipe, prompt, regions, controls=(), call=CALL, seed=0, **settings) -> np.ndarray:
    """A picture of a session attached to the bare pipeline."""
    with ac.attach(pipe, *controls, ac.RegionalPrompts(regions, **settings)):
        return pipe(prompt, generator=seeds(seed), **call).images


def test_one_prompt(pipeline):
    output = pipeline("a cat and a car", [LEFT, RIGHT], generator=seeds(0), **CALL)
    assert type(output) is StableDiffusion3PipelineOutput
    expected = by_hand(pipeline.pipe, "a cat and a car", [LEFT, RIGHT], stop=0.3)
    assert np.array_equal(output.images, expected)
    plain = pipeline.pipe("a cat and a car", generator=seeds(0), **CALL).images
    assert not np.array_equal(output.images, plain)
    assert "RegionalPrompts" in pipeline.report()
    (images,) = pipeline("a cat and a car", [LEFT, RIGHT], generator=seeds(0), return_dict=False, **CALL)
    assert np.array_equal(images, expected)
    one = pipeline("a cat and a car", ac.Region("a red cat", box=(0, 0, 0.5, 1)), generator=seeds(0), **CALL).images
    assert np.array_equal(one, by_hand(pipeline.pipe, "a cat and a car", [LEFT], stop=0.3))


def test_without_regions_the_pipeline_is_untouched(pipeline):
    plain = pipeline.pipe("a cat", generator=seeds(0), **CALL).images
    assert np.array_equal(pipeline("a cat", generator=seeds(0), **CALL).images, plain)
    assert "neutral" in pipeline.report()


def test_settings_of_the_constructor_and_of_a_call(pipeline):
    made = RegionalPipeline(pipeline.pipe, base_weight=0.1, overlap="mean")
    regions = [LEFT, TOP]
    got = made("x", regions, generator=seeds(0), **CALL).images
    assert np.array_equal(got, by_hand(made.pipe, "x", regions, base_weight=0.1, overlap="mean", stop=0.3))
    got = made("x", regions, generator=seeds(0), base_weight=0.6, stop=0.8, **CALL).images
    assert np.array_equal(got, by_hand(made.pipe, "x", regions, base_weight=0.6, overlap="mean", stop=0.8))
    got = made("x", regions, generator=seeds(0), isolate=False, **CALL).images
    assert np.array_equal(
        got, by_hand(made.pipe, "x", regions, base_weight=0.1, overlap="mean", isolate=False, stop=1.0)
    )
    assert made.settings == {"base_weight": 0.1, "overlap": "mean"}


def test_other_controls_act_too(pipeline):
    guide = ac.SoftPAG(heads="1.1", scale=2.0)
    made = RegionalPipeline(pipeline.pipe, guide)
    got = made("x", [LEFT], generator=seeds(0), **CALL).images
    assert np.array_equal(got, by_hand(made.pipe, "x", [LEFT], [guide], stop=0.3))
    assert not np.array_equal(got, pipeline("x", [LEFT], generator=seeds(0), **CALL).images)


def test_prompts_with_regions_of_their_own(pipeline):
    prompts, regions = ["a cat", "a car", "a fish"], [[LEFT, RIGHT], None, [TOP]]
    negative = ["", "a dog", "a key"]
    more = {**CALL, "num_images_per_prompt": 2}
    together = pipeline(prompts, regions, negative_prompt=negative, generator=seeds(*range(6)), **more).images
    assert together.shape == (6, 16, 16, 3)
    for index, (prompt, places) in enumerate(zip(prompts, regions)):
        own = seeds(2 * index, 2 * index + 1)
        alone = pipeline(prompt, places or [], negative_prompt=negative[index], generator=own, **more).images
        assert np.array_equal(together[2 * index : 2 * index + 2], alone)
    latents = torch.randn(3, 4, 8, 8, generator=seeds(7)[0])
    given = pipeline(prompts, regions, latents=latents, **CALL).images
    assert np.array_equal(given[2:], pipeline("a fish", [TOP], latents=latents[2:], **CALL).images)


def test_one_generator_runs_through_all_prompts(pipeline):
    (one,), (two,) = seeds(3), seeds(3)
    together = pipeline(["a cat", "a car"], [[LEFT], [RIGHT]], generator=one, **CALL).images
    first = pipeline("a cat", [LEFT], generator=two, **CALL).images
    second = pipeline("a car", [RIGHT], generator=two, **CALL).images
    assert np.array_equal(together, np.concatenate([first, second]))


def test_shared_regions_are_one_batch(pipeline):
    prompts = ["a cat", "a car"]
    got = pipeline(prompts, [LEFT, RIGHT], generator=seeds(0, 1), **CALL).images
    with ac.attach(pipeline.pipe, ac.RegionalPrompts([LEFT, RIGHT], stop=0.3)):
        expected = pipeline.pipe(prompts, generator=seeds(0, 1), **CALL).images
    assert np.array_equal(got, expected)
    pictures = pipeline(prompts, [[LEFT], [LEFT]], generator=seeds(0, 1), **{**CALL, "output_type": "pil"}).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2


def test_negative_prompts_of_regions(pipeline):
    """In unconditional rows a region everywhere with the negative prompt of the picture is the picture's."""
    regions = [LEFT, ac.Region("a blue car", box=(0.5, 0, 1, 1), negative_prompt="a dog")]
    call = {**CALL, "negative_prompt": "a key"}
    got = pipeline("a cat", regions, generator=seeds(0), **call).images
    assert np.array_equal(got, by_hand(pipeline.pipe, "a cat", regions, call=call, stop=0.3))
    plain = pipeline("a cat", [LEFT, RIGHT], generator=seeds(0), **call).images
    assert not np.array_equal(got, plain)
    same = {"base_weight": 0.0, "stop": 1.0}
    everywhere = [ac.Region("a fish", box=(0, 0, 1, 1), negative_prompt=text) for text in ("a key", None)]
    one, other = (pipeline("a cat", [r], generator=seeds(0), **same, **call).images for r in everywhere)
    assert np.abs(one - other).max() < 1e-3


def test_phrases_of_the_prompt(pipeline):
    prompt, box = "a red cat and a blue car", (0, 0, 0.5, 1)
    got = pipeline(prompt, [ac.Region.phrase("red cat", box)], generator=seeds(0), **CALL).images
    tokens = phrase_tokens("red cat", prompt, pipeline.tokenizer)
    region = ac.Region.phrase("red cat", box, numbers=tokens)
    assert np.array_equal(got, by_hand(pipeline.pipe, prompt, [region], stop=0.3))
    assert not np.array_equal(got, pipeline(prompt, [], generator=seeds(0), **CALL).images)
    prompts = [prompt, "the sky over a red cat"]
    together = pipeline(prompts, [ac.Region.phrase("red cat", box)], generator=seeds(0, 1), **CALL).images
    assert np.array_equal(together[:1], got)
    second = pipeline(prompts[1], [ac.Region.phrase("red cat", box)], generator=seeds(1), **CALL).images
    assert np.array_equal(together[1:], second)
    for wrong, regions, match in (
        (["a dog", prompt], [ac.Region.phrase("red cat", box)], "prompt 1 of 2: the phrase 'red cat' is not in"),
        ("a cat, a cat", [ac.Region.phrase("cat", box)], "'cat' stands 2 times"),
        (None, [ac.Region.phrase("cat", box)], "looked up in the prompt, and there is none"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=match):
            pipeline(wrong, regions, **CALL)


def test_flux_with_embeddings():
    def random(seed, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    made = RegionalPipeline(flux_pipe(), stop=1.0)
    places = [ac.Region("a cat", box=(0, 0, 0.5, 1), prompt_embeds=random(9, 1, 4, 16))]
    inputs = {"prompt_embeds": random(1, 2, 5, 16), "pooled_prompt_embeds": random(2, 2, 12)}
    more = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    together = made(regions=[places, []], generator=seeds(0, 1), **inputs, **more).images
    for index, own in enumerate((places, [])):
        alone = {name: value[index : index + 1] for name, value in inputs.items()}
        assert torch.equal(
            together[index : index + 1], made(regions=own, generator=seeds(index), **alone, **more).images
        )
    plain = made.pipe(generator=seeds(0, 1), **inputs, **more).images
    assert not torch.equal(together[0], plain[0])


def test_image_to_image_keeps_its_strength(pipeline):
    made = RegionalPipeline(StableDiffusion3Img2ImgPipeline(**pipeline.components), stop=1.0, strength=0.5)
    made.set_progress_bar_config(disable=True)
    call = {**CALL, "image": torch.rand(1, 3, 16, 16, generator=seeds(5)[0]), "strength": 0.75}
    got = made("a cat", [LEFT], generator=seeds(0), **call).images
    assert np.array_equal(got, by_hand(made.pipe, "a cat", [LEFT], call=call, strength=0.5))


def test_it_passes_for_its_pipeline(pipeline):
    assert pipeline.to("cpu") is pipeline
    assert pipeline.transformer is pipeline.pipe.transformer
    before = pipeline.scheduler
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    try:
        assert pipeline.pipe.scheduler.config.shift == 3.0
        got = pipeline("x", [LEFT], generator=seeds(0), **CALL).images
        assert np.array_equal(got, by_hand(pipeline.pipe, "x", [LEFT], stop=0.3))
    finally:
        pipeline.scheduler = before
    with pytest.raises(
        AttributeError, match="neither RegionalPipeline nor StableDiffusion3Pipeline has an .* 'nothing'"
    ):
        pipeline.nothing


def test_steps_are_told_and_the_pipeline_is_left_clean_after_an_error(pipeline):
    before = {name: type(module) for name, module in pipeline.transformer.attn_processors.items()}

    def stop(pipe, step, timestep, tensors):
        assert pipe is pipeline.pipe
        assert {type(one).__name__ for one in pipe.transformer.attn_processors.values()} == {"ControlledAttnProcessor"}
        raise RuntimeError(f"stopped at {step}")

    with pytest.raises(RuntimeError, match="stopped at 0"):
        pipeline("x", [LEFT], callback_on_step_end=stop, **CALL)
    assert {name: type(module) for name, module in pipeline.transformer.attn_processors.items()} == before


# -- files -----------------------------------------------------------------------------------------------------------------


def test_a_reference_is_saved_and_loaded(model, tmp_path):
    guide = ac.SoftPAG(heads="1.1:0.5,2.0", scale=2.0, stop=0.5)
    made = RegionalPipeline.from_pretrained(model, guide, base_weight=0.2, trim_text=3)
    path = made.save_pretrained(tmp_path / "saved")
    assert [entry.name for entry in (tmp_path / "saved").iterdir()] == [path.name]
    again = RegionalPipeline.from_pretrained(tmp_path / "saved")
    assert again.settings == {"base_weight": 0.2, "trim_text": 3}
    expected = made("x", [LEFT], generator=seeds(0), **CALL).images
    assert np.array_equal(again("x", [LEFT], generator=seeds(0), **CALL).images, expected)
    other = RegionalPipeline.from_pretrained(tmp_path / "saved", controls=[], base_weight=0.4)
    assert other.controls == () and other.settings == {"base_weight": 0.4, "trim_text": 3}


def test_a_copy_needs_nothing_else(pipeline, tmp_path):
    made = RegionalPipeline(pipeline.pipe, [ac.SkipLayers("1", scale=1.5)], background="a dog")
    made.save_pretrained(tmp_path / "saved", copy_model=True)
    moved = shutil.move(tmp_path / "saved", tmp_path / "moved")
    again = RegionalPipeline.from_pretrained(moved)
    assert again.settings == {"background": "a dog"} and again.controls[0].scale == 1.5
    expected = made("x", [LEFT], generator=seeds(0), **CALL).images
    assert np.array_equal(again("x", [LEFT], generator=seeds(0), **CALL).images, expected)


def test_files_that_cannot_be(pipeline, model, tmp_path):
    with pytest.raises(ac.AttnCtrlError, match="not loaded by a model's name.*\nHINT: .*copy_model=True"):
        RegionalPipeline(pipeline.pipe).save_pretrained(tmp_path)
    weighted = RegionalPipeline.from_pretrained(model, ac.SoftPAG(heads="1.1", weight=lambda fraction, sigma: 1.0))
    with pytest.raises(ac.AttnCtrlError, match="SoftPAG cannot be saved: weight is a function"):
        weighted.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    path = RegionalPipeline.from_pretrained(model).save_pretrained(tmp_path)
    facts = json.loads(path.read_text())
    for wrong, match in (
        ({"pipeline": "OtherPipeline"}, "holds a OtherPipeline"),
        ({"format_version": 9}, "has format 9"),
        ({"settings": {"base_wait": 1}}, "has no argument base_wait"),
        ({"model": str(tmp_path / "gone")}, "no folder that exists"),
        ({"controls": "none"}, "is not as save_pretrained writes it"),
    ):
        path.write_text(json.dumps(facts | wrong))
        with pytest.raises(ac.AttnCtrlError, match=match):
            RegionalPipeline.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(ac.AttnCtrlError, match="is no JSON"):
        RegionalPipeline.from_pretrained(tmp_path)


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "regions", "match"),
    [
        ("x", ["a red cat"], "region 'a red cat' has no place"),
        ("x", [LEFT, "@0,0,1,1"], "region 2 has no prompt"),
        ("x", [LEFT, {"prompt": "a"}], "region 2 is {'prompt': 'a'}"),
        ("x", [LEFT, [RIGHT]], "regions mix lists with 'a red cat@0,0,0.5,1'"),
        ("x", [[LEFT], [RIGHT]], "2 lists of regions for one prompt"),
        (["x", "y"], [[LEFT], [RIGHT], []], "3 lists of regions for 2 prompts"),
        (["x", "y"], [[LEFT], ["@0,0,1,1"]], "region 1 of prompt 2 of 2 has no prompt"),
        (
            ["x", "y"],
            [[LEFT], ["a dot@0,0,0.01,0.01"]],
            "prompt 2 of 2: .*region 'a dot' covers no token of the 4 x 4",
        ),
    ],
)
def test_wrong_regions_are_named(pipeline, prompt, regions, match):
    with pytest.raises(ac.AttnCtrlError, match=match):
        pipeline(prompt, regions, **CALL)


def test_wrong_arguments_are_named(pipeline):
    with pytest.raises(
        ac.AttnCtrlError, match="base_wait: neither an argument of StableDiffusion3Pipeline nor a setting"
    ):
        pipeline("x", [LEFT], base_wait=0.2, **CALL)
    with pytest.raises(ac.AttnCtrlError, match="overlap='sum' is not one of"):
        pipeline("x", [LEFT], overlap="sum", **CALL)
    with pytest.raises(ac.AttnCtrlError, match="generator has 3 entries for 2 pictures"):
        pipeline(["x", "y"], [[LEFT], [RIGHT]], generator=seeds(1, 2, 3), **CALL)
    with pytest.raises(ac.AttnCtrlError, match="negative_prompt has 3 entries for 2 prompts"):
        pipeline(["x", "y"], [[LEFT], [RIGHT]], negative_prompt=["", "", ""], **CALL)
    with pytest.raises(ac.AttnCtrlError, match="has no argument base_wait"):
        RegionalPipeline(pipeline.pipe, base_wait=0.2)
    with pytest.raises(ac.AttnCtrlError, match="regions belong to the call"):
        RegionalPipeline(pipeline.pipe, regions=[LEFT])
    with pytest.raises(ac.AttnCtrlError, match="both decide who attends to whom"):
        RegionalPipeline(pipeline.pipe, ac.RegionalPrompts([LEFT]))
    with pytest.raises(ac.AttnCtrlError, match="wraps a diffusers pipeline, not a EulerDiscreteScheduler"):
        RegionalPipeline(EulerDiscreteScheduler())
    with pytest.raises(ac.AttnCtrlError, match="has not been called yet"):
        RegionalPipeline(pipeline.pipe).report()
