"""`HeadGuidance` in the guider's contract and in a modular pipeline; each case is one that diffusers' own guiders get wrong."""

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)

import attnctrl as ac
from attnctrl.guidance import HeadGuidance

from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3
from ..pipelines import tiny_sd3_pipeline


def denoise(guider, model, cond: dict, uncond: dict, step: int = 0, steps: int = 4):
    """One step as the modular pipelines' denoising loop runs it."""
    varying = [name for name, value in cond.items() if not torch.equal(value, uncond[name])]
    guider.set_state(step=step, num_inference_steps=steps, timestep=cond["timestep"][0])
    batches = guider.prepare_inputs({name: (cond[name], uncond[name]) for name in varying})
    for batch in batches:
        guider.prepare_models(model)
        inputs = {**cond, **{name: getattr(batch, name) for name in varying}}
        batch.noise_pred = model(**inputs, return_dict=False)[0]
        guider.cleanup_models(model)
    return guider(batches)


def conditions(call):
    cond = {name: value for name, value in call().items() if name != "return_dict"}
    return cond, {**cond, "encoder_hidden_states": cond["encoder_hidden_states"].flip(-1)}


def delta_of(model, cond, *controls, **how):
    with torch.no_grad():
        plain = model(**cond, return_dict=False)[0]
        with ac.attach(model, *controls, **how):
            return model(**cond, return_dict=False)[0] - plain


@pytest.mark.parametrize("build, call", [(tiny_sd3, sd3_call), (tiny_flux, flux_call)])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: ClassifierFreeGuidance(guidance_scale=3.0),
        lambda: ClassifierFreeGuidance(guidance_scale=1.0),
        lambda: ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.7),
        lambda: ClassifierFreeGuidance(guidance_scale=3.0, use_original_formulation=True),
        lambda: AdaptiveProjectedGuidance(guidance_scale=4.0),
        lambda: ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=0),
    ],
)
def test_adds_the_term_to_any_guiders_prediction(build, call, inner):
    model, (cond, uncond) = build(), conditions(call)
    control = ac.SoftPAG(heads="1.2,1.3", strength=0.8, scale=2.5)
    with torch.no_grad():
        plain = denoise(inner(), model, cond, uncond).pred
        guided = denoise(HeadGuidance(control, guider=inner()), model, cond, uncond).pred
    torch.testing.assert_close(guided, plain + delta_of(model, cond, control))
    assert not torch.equal(guided, plain)


def test_first_step_is_guided_and_windows_hold():
    model, (cond, uncond) = tiny_sd3(), conditions(sd3_call)
    guider = HeadGuidance(ac.SoftPAG(layers=[1], stop=0.5), guider=ClassifierFreeGuidance(guidance_scale=2.0))
    plain = ClassifierFreeGuidance(guidance_scale=2.0)
    with torch.no_grad():
        same = [
            torch.equal(
                denoise(guider, model, cond, uncond, step).pred, denoise(plain, model, cond, uncond, step).pred
            )
            for step in range(4)
        ]
    assert same == [False, False, True, True]
    assert "2 perturbed passes" in guider.report()


def test_leaves_the_model_alone_between_calls_and_when_disabled():
    model, (cond, uncond) = tiny_sd3(), conditions(sd3_call)
    processors = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    guider = HeadGuidance(ac.SoftPAG(layers=[1]), guider=ClassifierFreeGuidance(guidance_scale=2.0))
    with torch.no_grad():
        denoise(guider, model, cond, uncond)
        now = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
        assert all(now[name] is processors[name] for name in processors) and "forward" not in model.__dict__
        guider.disable()
        assert torch.equal(denoise(guider, model, cond, uncond).pred, model(**cond, return_dict=False)[0])


def test_copy_with_another_scale():
    control = ac.SoftPAG(layers=[1])
    copy = HeadGuidance(control, guider=ClassifierFreeGuidance(guidance_scale=2.0)).new(guidance_scale=5.0)
    assert copy.controls == (control,) and copy.guider.guidance_scale == 5.0


def test_guiders_without_a_conditional_first_prediction_are_refused():
    inner = ClassifierFreeGuidance()
    inner._input_predictions = ["pred_uncond", "pred_cond"]
    with pytest.raises(ac.AttnCtrlError, match="first prediction"):
        HeadGuidance(ac.SoftPAG(layers=[1]), guider=inner)
    assert AutoGuidance._input_predictions[0] == "pred_cond"


def test_modular_pipeline_equals_the_classic_one(tmp_path):
    from diffusers.modular_pipelines import StableDiffusion3AutoBlocks

    classic = tiny_sd3_pipeline(tmp_path)
    control = ac.SoftPAG(heads="1.2", strength=0.8, scale=2.0)
    # without a negative prompt the modular pipeline has no unconditional prediction
    arguments = {
        "negative_prompt": "a blue car",
        "num_inference_steps": 3,
        "height": 16,
        "width": 16,
        "output_type": "pt",
    }
    with ac.attach(classic, control):
        expected = classic(
            "a red cat",
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=4,
            **arguments,
        ).images
    modular = StableDiffusion3AutoBlocks().init_pipeline()
    parts = {
        name: part
        for name, part in classic.components.items()
        if name in modular._component_specs and part is not None
    }
    modular.update_components(**parts, guider=HeadGuidance(control, guider=ClassifierFreeGuidance(guidance_scale=3.0)))
    images = modular(
        prompt="a red cat",
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=4,
        **arguments,
        output="images",
    )
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)


def test_controls_may_share_a_pass():
    model, (cond, uncond) = tiny_sd3(), conditions(sd3_call)
    controls = ac.SoftPAG(heads="1.2", scale=2.5), ac.SmoothedEnergy(layers=0, scale=2.5)
    with torch.no_grad():
        plain = denoise(ClassifierFreeGuidance(guidance_scale=3.0), model, cond, uncond).pred
        guider = HeadGuidance(*controls, combine="joint", guider=ClassifierFreeGuidance()).new(guidance_scale=3.0)
        guided = denoise(guider, model, cond, uncond).pred
    torch.testing.assert_close(guided, plain + delta_of(model, cond, *controls, combine="joint"), rtol=1e-4, atol=1e-5)
    assert "1 perturbed passes" in guider.report()
    assert not torch.allclose(guided, plain + delta_of(model, cond, *controls), atol=1e-3)


def test_noise_levels_are_not_known_to_guiders():
    model, (cond, uncond) = tiny_sd3(), conditions(sd3_call)
    with torch.no_grad(), pytest.raises(ac.AttnCtrlError, match="needs the noise level"):
        denoise(HeadGuidance(ac.SoftPAG(heads="1.2", sigma=(0.2, 0.8))), model, cond, uncond)
