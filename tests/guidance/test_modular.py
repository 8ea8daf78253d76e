"""`HeadGuidance` in the denoising loops of modular pipelines: what reaches the scheduler is the formula."""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

import attnctrl as ac
from attnctrl.guidance import HeadGuidance, follow_change

from .. import models
from ..models.common import position_ids
from ..processors.formula import Step, by_hand
from ..processors.tiny_pipelines import Run, flow, match_norm, random, texts


CONTROL = ac.SoftPAG(layers="1:", scale=5.0)


def embeds(**more) -> dict:
    return {key: value for key, value in texts(**more).items() if key not in ("seeds", "num_inference_steps")}


def sdxl():
    fields = embeds(pooled=True)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    fields |= {"add_time_ids": ids, "negative_add_time_ids": ids}
    inputs = {"latents": random(9, 2, 4, 8, 8), "denoiser_input_fields": fields}
    return models.tiny_sdxl(), inputs, {"scheduler": diffusers.EulerDiscreteScheduler()}


def qwen_image():
    fields = {key.replace("attention_mask", "embeds_mask"): value for key, value in embeds(mask=True).items()}
    shapes = [[(1, 4, 4)]] * 2
    inputs = {"latents": random(9, 2, 16, 16), "denoiser_input_fields": fields | {"img_shapes": shapes}}
    return models.tiny_qwen_image(), inputs | {"img_shapes": shapes}, {"rescale": match_norm}


def wan():
    inputs = {"latents": random(9, 2, 4, 2, 6, 8), "dtype": torch.float32}
    return models.tiny_wan(), inputs | embeds(), {}


def flux2_klein():
    numbers = torch.cat([torch.zeros(5, 3, dtype=torch.int64), torch.arange(5)[:, None]], dim=1).expand(2, -1, -1)
    places = position_ids(4, 4, extra=1).expand(2, -1, -1)
    inputs = {"latents": random(9, 2, 16, 8), "latent_ids": places, "txt_ids": numbers, "negative_txt_ids": numbers}
    return models.tiny_flux2(), inputs | embeds(), {}


def flux2_klein_edit():
    """With reference tokens behind the latents, which the pipeline cuts off before its guider."""
    model, inputs, more = flux2_klein()
    places = position_ids(2, 2, extra=1).expand(2, -1, -1).clone()
    places[..., 0] = 10
    return model, inputs | {"image_latents": random(11, 2, 4, 8), "image_latent_ids": places}, more


def ltx():
    inputs = {"latents": random(9, 2, 24, 8), "height": 96, "width": 128, "num_frames": 9, "dtype": torch.float32}
    return models.tiny_ltx(), inputs | embeds(mask=True) | {"rope_interpolation_scale": (8 / 25, 32, 32)}, {}


def z_image():
    inputs = {
        "latents": random(9, 2, 4, 8, 8),
        "dtype": torch.float32,
        "prompt_embeds": [random(1, 40, 16), random(2, 10, 16)],
        "negative_prompt_embeds": [random(3, 7, 16), random(4, 9, 16)],
    }
    return models.tiny_z_image(), inputs, {"last": lambda prediction: -prediction.squeeze(2)}


def stable_diffusion_3():
    inputs = {"latents": random(9, 2, 4, 8, 8)}
    return models.tiny_sd3(), inputs | embeds(pooled=True), {}


LOOPS = {
    "stable_diffusion_xl.denoise:StableDiffusionXLDenoiseStep": sdxl,
    "qwenimage.denoise:QwenImageDenoiseStep": qwen_image,
    "wan.denoise:WanDenoiseStep": wan,
    "flux2.denoise:Flux2KleinBaseDenoiseStep": flux2_klein,
    "flux2.denoise:Flux2KleinBaseDenoiseStep, edit": flux2_klein_edit,
    "ltx.denoise:LTXDenoiseStep": ltx,
    "z_image.denoise:ZImageDenoiseStep": z_image,
    "stable_diffusion_3.denoise:StableDiffusion3DenoiseStep": stable_diffusion_3,
}


@pytest.mark.parametrize("name", LOOPS)
def test_modular_loops_hand_the_formula_to_the_scheduler(name):
    where, block = name.split(",")[0].split(":")
    model, inputs, more = LOOPS[name]()
    scheduler = more.pop("scheduler", None) or flow()
    scheduler.set_timesteps(3)
    guider = HeadGuidance(CONTROL, guider=ClassifierFreeGuidance(guidance_scale=3.0))
    pipe = getattr(import_module(f"diffusers.modular_pipelines.{where}"), block)().init_pipeline()
    kind = "unet" if "XL" in block else "transformer"
    pipe.update_components(**{kind: model, "scheduler": scheduler, "guider": guider})
    pipe.set_progress_bar_config(disable=True)

    steps, now, step = [], Step(), scheduler.step

    def called(module, args, kwargs):
        now.calls.append((args, kwargs))

    @wraps(step)
    def stepped(prediction, *args, **kwargs):
        nonlocal now
        now.prediction = prediction
        steps.append(now)
        now = Step()
        return step(prediction, *args, **kwargs)

    scheduler.step = stepped
    handle = model.register_forward_pre_hook(called, with_kwargs=True)
    latents = pipe(**inputs, timesteps=scheduler.timesteps, num_inference_steps=3, output="latents")
    handle.remove()
    assert latents.isfinite().all() and len(steps) == 3 and "3 perturbed passes" in guider.report()

    run = Run(SimpleNamespace(transformer=model), {"seeds": range(2)}, **more)
    tokens = slice(inputs["latents"].shape[1])
    for step in steps:
        assert len(step.calls) == 3  # conditional, perturbed, unconditional
        guided, plain = by_hand(run, Step([step.calls[0], step.calls[2]]), CONTROL)
        torch.testing.assert_close(step.prediction, guided[:, tokens], rtol=1e-3, atol=2e-4)
        assert (guided - plain).abs().max() > 5e-3


def test_two_experts_in_turn():
    """Wan 2.2 calls one model in the noisy steps and another in the rest, here with one guider for both."""
    first, second = models.tiny_wan(), models.tiny_wan()
    call = {key: value for key, value in models.wan_call().items() if key != "return_dict"}
    guider = HeadGuidance(CONTROL, guider=ClassifierFreeGuidance(guidance_scale=1.0))
    found = []
    for index, model in enumerate((first, second, first)):
        guider.set_state(step=index, num_inference_steps=3, timestep=call["timestep"][0])
        (batch,) = guider.prepare_inputs({"encoder_hidden_states": (call["encoder_hidden_states"], None)})
        guider.prepare_models(model)
        with torch.no_grad():
            batch.noise_pred = model(**call, return_dict=False)[0]
        guider.cleanup_models(model)
        found.append(guider([batch]).pred)
    with torch.no_grad(), ac.attach(first, CONTROL):
        wanted = first(**call, return_dict=False)[0]
    for prediction in found:
        torch.testing.assert_close(prediction, wanted)


def test_a_prediction_changed_beyond_recognition_is_refused():
    raw, delta = random(1, 2, 4, 3), random(2, 2, 4, 3)
    assert torch.equal(follow_change(raw, delta, raw), delta)
    assert torch.equal(follow_change(raw, delta, -raw[:, :2]), -delta[:, :2])
    for changed in (raw + 1, raw[..., :2]):
        with pytest.raises(ac.AttnCtrlError, match="before its guider sees it"):
            follow_change(raw, delta, changed)
