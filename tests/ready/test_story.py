"""`StoryPipeline` against `SharedAttention` and `SubjectMasks` attached by hand."""

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.pipelines import StoryPipeline

from ..processors.test_pipelines import flux_pipe
from ..processors.tiny_pipelines import PIPELINES


CAST = {"hero": "a red cat", "friend": "the blue car"}
SCENES = ["{hero} on a striped background", "a big {hero} left of {friend}", "{friend} and {hero}"]
PROMPTS = ["a red cat on a striped background", "a big a red cat left of the blue car", "the blue car and a red cat"]
PHRASES = [["red cat"], ["red cat", "blue car"], ["blue car", "red cat"]]
CALL = {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 1, "output_type": "np"}
BOXES = [(0, 0, 0.5, 1), [(0, 0, 1, 0.5), (0.5, 0.5, 1, 1)], (0.25, 0.25, 1, 1)]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="module")
def pipeline(model):
    made = StoryPipeline.from_pretrained(model, find=0.5)
    made.set_progress_bar_config(disable=True)
    return made


def by_hand(pipe, subjects, **options) -> np.ndarray:
    with ac.attach(pipe, ac.SharedAttention(subjects, **options)):
        return pipe(PROMPTS, generator=seeds(0, 1, 2), **CALL).images


def test_given_subjects(pipeline):
    output = pipeline(CAST, SCENES, subjects=BOXES, generator=seeds(0, 1, 2), dropout=0.25, **CALL)
    assert output.images.shape == (3, 16, 16, 3)
    assert np.array_equal(output.images, by_hand(pipeline.pipe, BOXES, dropout=0.25))
    assert "SharedAttention" in pipeline.report()
    plain = pipeline.pipe(PROMPTS, generator=seeds(0, 1, 2), **CALL).images
    assert not np.array_equal(output.images, plain)
    off = pipeline(CAST, SCENES, subjects=BOXES, generator=seeds(0, 1, 2), strength=0.0, **CALL).images
    assert np.array_equal(off, plain)


def test_found_subjects(pipeline):
    images = pipeline(CAST, SCENES, generator=seeds(0, 1, 2), **CALL).images
    expected = []
    for seed, (prompt, phrases) in enumerate(zip(PROMPTS, PHRASES)):
        finder = ac.SubjectMasks.in_prompt(phrases, prompt, pipeline.tokenizer, stop=0.5)
        with ac.attach(pipeline.pipe, finder):
            pipeline.pipe(prompt, generator=seeds(seed), **CALL)  # all steps
        expected.append(finder.regions())
    for found, wanted in zip(pipeline.found, expected, strict=True):
        assert [region.prompt for region in found] == [region.prompt for region in wanted]
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(found, wanted))
    assert np.array_equal(images, by_hand(pipeline.pipe, expected))
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in seeds(0, 1, 2)])
    more = {"latents": noise, "negative_prompt": ["", "", ""], **CALL}
    assert np.array_equal(pipeline(CAST, SCENES, **more).images, images)


def test_one_generator_gives_a_seed_to_every_scene(pipeline):
    call = {"exclusive": False, **CALL}
    first, second = (pipeline(CAST, SCENES, generator=seeds(5)[0], **call).images for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, pipeline(CAST, SCENES, generator=seeds(6)[0], **call).images)


def test_saved_settings(pipeline, model, tmp_path):
    made = StoryPipeline.from_pretrained(model, ac.SkipLayers("1", scale=1.5), find=0.25, reference="first", blur=0.0)
    made.save_pretrained(tmp_path)
    again = StoryPipeline.from_pretrained(tmp_path)
    assert again.settings == {"find": 0.25, "reference": "first", "blur": 0.0}
    call = {"subjects": BOXES, **CALL}
    expected = made(CAST, SCENES, generator=seeds(0, 1, 2), **call).images
    assert np.array_equal(again(CAST, SCENES, generator=seeds(0, 1, 2), **call).images, expected)
    with pytest.raises(ac.AttnCtrlError, match="holds a StoryPipeline\nHINT: ac.pipelines.StoryPipeline"):
        ac.pipelines.RegionalPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("cast", "scenes", "more", "match"),
    [
        (CAST, ["{hero} alone"], {}, "at least two scenes"),
        (CAST, "{hero} alone", {}, "at least two scenes"),
        (
            CAST,
            ["{hero}", "a dog"],
            {},
            "scene 2, 'a dog', names nobody of the cast\nHINT: the cast is {hero}, {friend}",
        ),
        (CAST, ["{hero}", "{dog}"], {}, "scene 2, '{dog}', names {dog}, who is not in the cast"),
        (CAST, ["{hero}", "{hero"], {}, "scene 2, '{hero': "),
        ({"hero": " "}, ["{hero}", "{hero}"], {}, "'hero' of the cast has no description"),
        (CAST, ["{hero}", "{hero}"], {"subjects": [BOXES[0]]}, "subjects have 1 entries for 2 scenes"),
        (CAST, ["{hero}", "{hero}"], {"generator": seeds(1)}, "generator has 1 entries for 2 scenes"),
        (CAST, ["{hero}", "{hero}"], {"num_images_per_prompt": 2}, "a scene is one picture"),
        (CAST, ["{hero}", "{hero}"], {"reference": "last"}, "reference='last' is neither"),
        (CAST, ["{hero}", "{hero}"], {"threshold": 2.0}, "threshold=2.0 is not between 0 and 1"),
        (CAST, ["{hero}", "{hero}"], {"threshold": 0.9, "blur": 0, "lend": 1}, "lend: neither an argument"),
    ],
)
def test_what_is_refused(pipeline, cast, scenes, more, match):
    with pytest.raises(ac.AttnCtrlError, match=match):
        pipeline(cast, scenes, **{**CALL, **more})


def test_a_cast_that_is_nowhere_is_named(model):
    made = StoryPipeline.from_pretrained(model, blur=0.0)
    for block in made.transformer.transformer_blocks:  # every image token looks everywhere alike
        for parameter in block.attn.to_q.parameters():
            parameter.data.zero_()
    where = "scene 1 of 2, 'a red cat': SubjectMasks found 'red cat' nowhere in image 0\nHINT: a later find"
    with pytest.raises(ac.AttnCtrlError, match=where):
        made(CAST, ["{hero}", "{hero} x"], **CALL)


def test_words_that_cannot_be_told_are_refused():
    made = StoryPipeline(PIPELINES["pixart"]().pipe)
    with pytest.raises(
        ac.AttnCtrlError, match="scene 1 of 2, 'a red cat x': which token .* of pixart .*\nHINT: subjects="
    ):
        made(CAST, ["{hero} x", "{hero} y"])
    with pytest.raises(ac.AttnCtrlError, match="both decide who attends to whom"):
        StoryPipeline(flux_pipe(), ac.RegionalPrompts(["a cat@0,0,0.5,1"]))
