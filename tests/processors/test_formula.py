"""The formula of guidance in real pipelines of many families: CFG in one call and in two, rescaled, truncated, with adapters."""

from dataclasses import replace

import diffusers
import pytest
import torch

import attnctrl as ac
from attnctrl.guidance import HeadGuidance

from .. import models
from .formula import check, follow
from .tiny_pipelines import PIPELINES, hunyuan_image, sd, sd_img2img, sdxl, stable_diffusion


CONTROL = ac.SoftPAG(layers="1:", scale=5.0)


SKIP = ac.SkipLayers([1], scale=5.0)
OTHER = {"sana": SKIP, "mochi": SKIP}  # they refuse SoftPAG


@pytest.mark.parametrize("name", PIPELINES)
def test_guidance_is_the_formula(name):
    run, control = PIPELINES[name](), OTHER.get(name, CONTROL)
    plain = run()
    with ac.attach(run.pipe, control) as session:
        steps = follow(run, session)
    assert session.calls["perturbed passes"] == len(steps) >= 2
    check(run, steps, control)
    assert torch.equal(run(), plain), "detaching does not restore the pipeline"


@pytest.mark.parametrize("name", ["sd ControlNet", "sdxl, rescale", "sd3", "flux, true CFG", "z-image", "qwen"])
@pytest.mark.parametrize(
    "controls",
    [
        (SKIP,),
        (ac.SkipLayers([1], "attention", scale=5.0),),
        (ac.SmoothedEnergy(layers=[1, 2], scale=8.0),),
        (ac.SoftPAG(heads="2.1", target="uniform", scale=5.0), SKIP),
    ],
    ids=["skip", "skip attention", "smoothed", "two"],
)
def test_other_guidance_and_several_at_once(name, controls):
    run = PIPELINES[name]()
    if name.startswith("sd") and name != "sd3":  # one block of a UNet does little
        controls = [replace(control, scale=100.0) for control in controls]
    with ac.attach(run.pipe, *controls) as session:
        steps = follow(run, session)
    assert session.calls["perturbed passes"] == len(steps) * len(controls)
    check(run, steps, *controls)


def test_ip_adapter_keeps_acting_in_both_passes():
    run = PIPELINES["sd IP-Adapter"]()
    kinds = {type(processor).__name__ for path, processor in run.model.attn_processors.items() if "attn2" in path}
    assert kinds == {"IPAdapterAttnProcessor2_0"}
    with ac.attach(run.pipe, CONTROL):
        guided = run()
        run.pipe.set_ip_adapter_scale(0.0)
        without = run()
    assert (guided - without).abs().max() > 1e-2


def test_rescaled_guidance_says_where_the_term_went_and_needs_a_place():
    run = sdxl(0.7)
    with ac.attach(run.pipe, CONTROL) as session:
        run()
        assert "unconditional prediction alone" in session.report()
    qwen = PIPELINES["qwen"]()
    with ac.attach(qwen.pipe, CONTROL) as session:
        qwen()
        assert "unconditional prediction alone" in session.report()
        with pytest.raises(ac.AttnCtrlError, match="no place for the guidance term\nHINT"):
            qwen.where(true_cfg_scale=1.0 + 1e-7)()


def test_projecting_guiders_are_refused_and_head_guidance_works_around_them():
    apg = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.0)
    run = hunyuan_image(apg)
    with ac.attach(run.pipe, CONTROL), pytest.raises(ac.AttnCtrlError, match="HeadGuidance"):
        run()
    plain = run()
    run.pipe.guider = HeadGuidance(CONTROL, guider=apg)
    guided = run()
    assert guided.isfinite().all() and (guided - plain).abs().max() > 1e-2
    assert "2 perturbed passes" in run.pipe.guider.report()


def test_head_guidance_and_attach_agree():
    run = hunyuan_image()
    with ac.attach(run.pipe, CONTROL):
        attached = run()
    run.pipe.guider = HeadGuidance(CONTROL, guider=run.pipe.guider)
    torch.testing.assert_close(run(), attached, rtol=1e-4, atol=1e-4)


def test_two_denoisers_take_a_session_each():
    """As Wan 2.2: one model for the noisy steps, one for the others."""
    run = PIPELINES["wan"]()
    pipe = diffusers.WanPipeline(
        **{**run.pipe.components, "transformer_2": models.tiny_wan(), "boundary_ratio": 0.7, "expand_timesteps": False}
    )
    pipe.set_progress_bar_config(disable=True)
    run = replace(run, pipe=pipe)
    with pytest.raises(ac.AttnCtrlError, match="two denoisers.*\nHINT.*pipeline=pipe"):
        ac.attach(pipe, CONTROL)
    with (
        ac.attach(pipe.transformer, CONTROL, pipeline=pipe) as first,
        ac.attach(pipe.transformer_2, CONTROL, pipeline=pipe) as second,
    ):
        got = run()
    passes = first.calls["perturbed passes"], second.calls["perturbed passes"]
    assert sum(passes) == 3 and all(passes)
    with ac.attach(run.model, CONTROL, pipeline=pipe) as first:
        (high, *_) = follow(run, first)
    assert passes[0] == 1
    check(run, [high], CONTROL)
    # the same weights twice are one model
    single = PIPELINES["wan"]()
    with ac.attach(single.pipe, CONTROL):
        torch.testing.assert_close(got, single(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "run, window, passes",
    [
        (lambda: sd(num_inference_steps=4), (0.0, 0.5), 2),
        (lambda: sd("DDIMScheduler", num_inference_steps=4), (0.5, 1.0), 2),
        (lambda: sd("HeunDiscreteScheduler", num_inference_steps=4), (0.0, 0.5), 4),  # two evaluations a step
        (lambda: sd("HeunDiscreteScheduler", num_inference_steps=4), (0.75, 1.0), 1),  # and one in the last
        (lambda: sd_img2img().where(num_inference_steps=8), (0.0, 0.5), 2),  # 4 of 8 steps are run
        (lambda: sd_img2img("DDIMScheduler").where(num_inference_steps=8), (0.0, 0.5), 2),
        (lambda: sd_img2img("HeunDiscreteScheduler").where(num_inference_steps=8), (0.0, 0.5), 4),
        (lambda: sdxl().where(num_inference_steps=5, denoising_end=0.8), (0.0, 0.5), 2),
    ],
)
def test_windows_are_fractions_of_the_steps_that_are_run(run, window, passes):
    run, (start, stop) = run(), window
    with ac.attach(run.pipe, ac.SoftPAG(layers=1, start=start, stop=stop)) as session:
        run()
    assert session.calls["perturbed passes"] == passes


def test_pipelines_with_a_third_part_are_refused():
    pipe = stable_diffusion(cls="StableDiffusionPAGPipeline", pag_applied_layers=["mid"])
    run = sd()
    with ac.attach(pipe, CONTROL), pytest.raises(ac.AttnCtrlError, match="6 rows for 2 images.*\nHINT"):
        pipe(**{k: v for k, v in run.inputs.items() if k != "seeds"}, pag_scale=1.0, output_type="latent")
