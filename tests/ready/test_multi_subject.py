"""`MultiSubjectPipeline` against a `SubjectLayout` attached by hand to the same pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import attnctrl as ac
from attnctrl.pipelines import MultiSubjectPipeline

from ..controls.test_subject_layout import WIDTH, flux_weights, with_sd3_adapter
from ..models import tiny_sd3
from ..processors.tiny_pipelines import PIPELINES, flux, ip_adapter_weights, random, sd, sd3, stable_diffusion, texts


LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = SMALL | {"image_size": 16, "patch_size": 8}
CALL = {key: value for key, value in texts(prompts=1).items() if key != "seeds"}
CALL |= {"height": 16, "width": 16, "guidance_scale": 3.0, "output_type": "latent"}


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def eyes() -> dict:
    torch.manual_seed(5)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**EYES, projection_dim=WIDTH)).eval()
    return {"image_encoder": encoder, "feature_extractor": CLIPImageProcessor(size=16, crop_size=16)}


def sd_with_adapters(count: int = 1):
    pipe = stable_diffusion(**eyes())
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)] * count)
    return pipe


@pytest.fixture(scope="module")
def pipeline():
    return MultiSubjectPipeline(sd_with_adapters(), ip_adapter_scale=0.8)


def by_hand(pipe, *controls, pictures=None, **call):
    pictures = [[picture(1), picture(2)]] if pictures is None else pictures
    with ac.attach(pipe, *controls):
        return pipe(generator=seed(), **CALL | {"ip_adapter_image": pictures} | call).images


def test_pictures_in_their_places(pipeline, tmp_path):
    subjects = [(picture(1), LEFT), (picture(2), RIGHT)]
    output = pipeline(subjects=subjects, generator=seed(), **CALL)
    assert type(output) is StableDiffusionPipelineOutput
    expected = by_hand(pipeline.pipe, ac.SubjectLayout([LEFT, RIGHT]))
    assert torch.equal(output.images, expected)
    assert "SubjectLayout" in pipeline.report() and "acted" in pipeline.report()
    swapped = pipeline(subjects=[(picture(2), LEFT), (picture(1), RIGHT)], generator=seed(), **CALL).images
    assert (swapped - expected).abs().max() > 1e-3
    picture(1).save(tmp_path / "one.png")
    from_file = [(tmp_path / "one.png", ac.Region(box=LEFT)), (str(tmp_path / "one.png"), RIGHT)]
    images, *_ = pipeline(subjects=from_file, generator=seed(), return_dict=False, **CALL)
    assert torch.equal(
        images, by_hand(pipeline.pipe, ac.SubjectLayout([LEFT, RIGHT]), pictures=[[picture(1), picture(1)]])
    )


def test_settings_of_the_constructor_and_of_a_call(pipeline):
    crossing = [LEFT, (0.25, 0.25, 1, 1)]
    made = MultiSubjectPipeline(pipeline.pipe, strength=0.5, overlap="mean")
    subjects = [(picture(1), crossing[0]), (picture(2), crossing[1])]
    got = made(subjects=subjects, generator=seed(), **CALL).images
    assert torch.equal(got, by_hand(made.pipe, ac.SubjectLayout(crossing, strength=0.5, overlap="mean")))
    got = made(subjects=subjects, generator=seed(), overlap="sum", isolate=True, stop=0.5, **CALL).images
    controls = (
        ac.SubjectLayout(crossing, strength=0.5, overlap="sum", stop=0.5),
        ac.Isolation(crossing, overlap="union", stop=0.3),
    )
    assert torch.equal(got, by_hand(made.pipe, *controls))
    alone = made(subjects=subjects[:1], generator=seed(), isolate=True, **CALL).images  # from nobody
    layout = ac.SubjectLayout(crossing[:1], strength=0.5, overlap="mean")
    assert torch.equal(alone, by_hand(made.pipe, layout, pictures=[[picture(1)]]))


def test_descriptions_are_regional_prompts(pipeline):
    places = [
        ac.Region("a", box=LEFT, prompt_embeds=random(8, 1, 5, 16)),
        ac.Region("b", box=RIGHT, prompt_embeds=random(9, 1, 3, 16)),
    ]
    got = pipeline(
        subjects=[(picture(1), places[0]), (picture(2), places[1])],
        generator=seed(),
        base_weight=0.1,
        regions_stop=0.6,
        **CALL,
    ).images
    controls = ac.SubjectLayout(places), ac.RegionalPrompts(places, base_weight=0.1, isolate=False, stop=0.6)
    assert torch.equal(got, by_hand(pipeline.pipe, *controls))
    with pytest.raises(ac.AttnCtrlError, match="subject 2 has no description, and others have"):
        pipeline(subjects=[(picture(1), places[0]), (picture(2), RIGHT)], **CALL)


def test_as_many_adapters_as_subjects():
    made = MultiSubjectPipeline(sd_with_adapters(2), ip_adapter_scale=[0.9, 0.4])
    got = made(subjects=[(picture(1), LEFT), (picture(2), RIGHT)], generator=seed(), **CALL).images
    separate = [[picture(1)], [picture(2)]]
    assert torch.equal(got, by_hand(made.pipe, ac.SubjectLayout([LEFT, RIGHT]), pictures=separate))
    three = [(picture(1), LEFT), (picture(2), RIGHT), (picture(3), (0, 0, 1, 0.5))]
    with pytest.raises(ac.AttnCtrlError, match="3 subjects and 2 IP-Adapters, so it is open"):
        made(subjects=three, **CALL)
    mine = [[picture(1), picture(2)], [picture(3)]]
    layout = ac.SubjectLayout([place for _, place in three], overlap="mean")
    got = made(
        subjects=[place for _, place in three], ip_adapter_image=mine, overlap="mean", generator=seed(), **CALL
    ).images
    assert torch.equal(got, by_hand(made.pipe, layout, pictures=mine))


def test_flux_with_and_without_true_guidance():
    run = flux()
    run.pipe.register_modules(**eyes())
    run.pipe.transformer._load_ip_adapter_weights([flux_weights(run.pipe.transformer)])
    made = MultiSubjectPipeline(run.pipe)
    subjects = [(picture(1), LEFT), (picture(2), RIGHT)]
    call = {key: value for key, value in run.inputs.items() if key != "seeds"} | {"output_type": "latent"}
    for more in ({}, {"true_cfg_scale": 1.0}):
        got = made(subjects=subjects, generator=seed(), **call | more).images
        with ac.attach(run.pipe, ac.SubjectLayout([LEFT, RIGHT])):
            pictures = [[picture(1), picture(2)]]
            wanted = run.pipe(generator=seed(), ip_adapter_image=pictures, **call | more).images
        assert torch.equal(got, wanted)
    with pytest.raises(ac.AttnCtrlError, match="overlapp: neither an argument of FluxPipeline nor a setting"):
        made(subjects=subjects, overlapp="sum", **call)


def test_sd3_with_its_own_reader():
    torch.manual_seed(5)
    encoder = SiglipVisionModel(SiglipVisionConfig(**EYES | {"hidden_size": WIDTH})).eval()
    pipe = sd3(
        transformer=with_sd3_adapter(tiny_sd3()),
        image_encoder=encoder,
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
    )
    made = MultiSubjectPipeline(pipe)
    call = {key: value for key, value in texts(pooled=True).items() if key != "seeds"} | {"height": 16, "width": 16}
    subjects = [(picture(1), LEFT), (picture(2), RIGHT)]
    for guidance in (3.0, 1.0):
        more = call | {"guidance_scale": guidance, "output_type": "latent"}
        got = made(subjects=subjects, generator=[seed(0), seed(1)], **more).images
        own = pipe.encode_image([picture(1), picture(2)], "cpu")
        embeds = torch.stack([torch.zeros_like(own), own]) if guidance > 1 else own[None]
        with ac.attach(pipe, ac.SubjectLayout([LEFT, RIGHT])):
            wanted = pipe(generator=[seed(0), seed(1)], ip_adapter_image_embeds=embeds, **more).images
        assert torch.equal(got, wanted)


# -- files -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An SD3 IP-Adapter as a file, as `load_ip_adapter` takes it."""
    model = with_sd3_adapter(tiny_sd3(), depth=4)
    tensors = {f"image_proj.{name}": value for name, value in model.image_proj.state_dict().items()}
    for index, processor in enumerate(p for p in model.attn_processors.values() if hasattr(p, "to_k_ip")):
        tensors |= {f"ip_adapter.{index}.{name}": value for name, value in processor.state_dict().items()}
    folder = tmp_path_factory.mktemp("adapter")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter.safetensors")
    return {
        "pretrained_model_name_or_path_or_dict": str(folder),
        "weight_name": "adapter.safetensors",
        "image_encoder_folder": None,
    }


def test_the_adapter_is_loaded_and_loaded_again(model, adapter, tmp_path):
    guide = ac.SoftPAG(heads="1.1", scale=2.0)
    made = MultiSubjectPipeline.from_pretrained(
        model, guide, ip_adapter=adapter, ip_adapter_scale=0.6, overlap="mean", isolate=True
    )
    assert made.transformer.transformer_blocks[0].attn.processor.scale == 0.6
    places = [LEFT, (0.25, 0, 1, 1)]
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 1, "output_type": "np"}
    call |= {"ip_adapter_image_embeds": random(8, 4, 5, WIDTH)}
    got = made("a cat", places, generator=seed(), **call).images
    controls = guide, ac.SubjectLayout(places, overlap="mean"), ac.Isolation(places, overlap="union", stop=0.3)
    with ac.attach(made.pipe, *controls):
        assert np.array_equal(got, made.pipe("a cat", generator=seed(), **call).images)
    path = made.save_pretrained(tmp_path / "saved")
    assert json.loads(path.read_text())["settings"]["ip_adapter_scale"] == 0.6
    again = MultiSubjectPipeline.from_pretrained(tmp_path / "saved")
    assert again.settings == made.settings and again.controls[0].scale == 2.0
    assert np.array_equal(again("a cat", places, generator=seed(), **call).images, got)


def test_a_copy_without_its_adapter_is_not_saved(pipeline, tmp_path):
    with pytest.raises(ac.AttnCtrlError, match="does not hold the IP-Adapter .*\nHINT: .*ip_adapter="):
        pipeline.save_pretrained(tmp_path, copy_model=True)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_cannot_be_loaded_is_named(model, adapter):
    wrong = {**adapter, "weight_name": "other.safetensors"}
    with pytest.raises(ac.AttnCtrlError, match="the IP-Adapter '.*' cannot be loaded: .*other.safetensors"):
        MultiSubjectPipeline.from_pretrained(model, ip_adapter=wrong)


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subjects", "more", "match"),
    [
        ((), {}, "subjects=.* is no list of subjects\nHINT: subjects="),
        ("a@0,0,1,1", {}, "is no list of subjects"),
        ([LEFT], {}, "subject 1 is no pair of picture and place"),
        ([("nowhere.png", LEFT)], {}, "the picture of subject 1 cannot be read"),
        ([(None, [LEFT, RIGHT])], {}, "subject 1 has 2 places"),
        ([LEFT], {"ip_adapter_image_embeds": [random(1, 2, 2, WIDTH)]}, "1 subjects, and the call brings 2 pictures"),
        ([(picture(1), LEFT)], {"overlap": "union"}, "overlap='union' is not one of"),
        ([(picture(1), LEFT)], {"ip_adapter_scale": 0.5}, "ip_adapter_scale belongs .*\nHINT: .*set_ip_adapter_scale"),
    ],
)
def test_wrong_calls_are_named(pipeline, subjects, more, match):
    with pytest.raises(ac.AttnCtrlError, match=match):
        pipeline(subjects=subjects, **CALL | more)


def test_pipelines_without_adapter_or_encoder_are_refused():
    with pytest.raises(ac.AttnCtrlError, match="PixArtAlphaPipeline knows no IP-Adapters"):
        MultiSubjectPipeline(PIPELINES["pixart"]().pipe)
    pipe = sd().pipe
    made = MultiSubjectPipeline(pipe)
    with pytest.raises(ac.AttnCtrlError, match="no IP-Adapter is loaded\nHINT: pipeline.load_ip_adapter"):
        made(subjects=[(picture(1), LEFT)], **CALL)
    made.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    with pytest.raises(ac.AttnCtrlError, match="has no image encoder"):
        made(subjects=[(picture(1), LEFT)], **CALL)
    with pytest.raises(ac.AttnCtrlError, match="has no argument overlapp"):
        MultiSubjectPipeline(pipe, overlapp="sum")
    with pytest.raises(ac.AttnCtrlError, match="ip_adapter='name' is no mapping"):
        MultiSubjectPipeline(pipe, ip_adapter="name")
