"""Noise levels as a window: a control acts at the steps whose sigma is in its range, whatever the scheduler."""

import pytest
import torch

import attnctrl as ac

from ..models import sd3_call, tiny_sd3
from .tiny_pipelines import sd, sd3_plain, sd_img2img


STEPS = 4
RUNS = {
    "flow": lambda: sd3_plain().where(num_inference_steps=STEPS),
    "euler": lambda: sd("EulerDiscreteScheduler", num_inference_steps=STEPS),
    "ddim": lambda: sd("DDIMScheduler", num_inference_steps=STEPS),
}


def levels(pipe) -> list[float]:
    """Noise levels of the steps that were run last."""
    scheduler = pipe.scheduler
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas[:-1].tolist()
    kept = scheduler.alphas_cumprod[scheduler.timesteps]
    return ((1 - kept) / kept).sqrt().tolist()


def middle(sigmas: list[float]) -> tuple[float, float]:
    """A range that holds steps 1 and 2 of 4."""
    return (sigmas[2] + sigmas[3]) / 2, (sigmas[0] + sigmas[1]) / 2


CONTROLS = {
    "SoftPAG": lambda **window: ac.SoftPAG(layers=1, scale=5.0, **window),
    "SkipLayers": lambda **window: ac.SkipLayers([1], scale=5.0, **window),
    "TokenPerturbation": lambda **window: ac.TokenPerturbation([1], scale=5.0, **window),
    "HeadScale": lambda **window: ac.HeadScale("1.1", factor=-4.0, **window),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_range_of_noise_levels_is_the_window_of_its_steps(name, control):
    run, build = RUNS[name](), CONTROLS[control]
    plain, sigmas = run(), levels(run.pipe)
    assert len(sigmas) == STEPS and sigmas == sorted(sigmas, reverse=True)
    with ac.attach(run.pipe, build(sigma=middle(sigmas))) as session:
        got = run()
    assert session.calls["perturbed passes"] == (2 if build().guides else 0)
    with ac.attach(run.pipe, build(start=0.25, stop=0.75)):
        assert torch.equal(run(), got)
    assert not torch.equal(got, plain)


def test_smoothed_energy_has_a_width_and_a_range():
    run = RUNS["flow"]()
    run()
    control = ac.SmoothedEnergy(layers=1, sigma=1.0, sigma_range=middle(levels(run.pipe)), scale=5.0)
    with ac.attach(run.pipe, control) as session:
        run()
    assert session.calls["perturbed passes"] == 2


def test_second_order_schedulers_tell_the_level_of_every_evaluation():
    run, seen = sd("HeunDiscreteScheduler", num_inference_steps=STEPS), []
    run()
    sigmas = run.pipe.scheduler.sigmas.tolist()  # of evaluations: step 0, its end, step 1, …
    assert sigmas[1] == sigmas[2]
    low, high = sigmas[3] * 0.99, sigmas[1] * 1.01
    control = ac.SoftPAG(
        layers=1, sigma=(low, high), weight=lambda fraction, sigma: seen.append((fraction, sigma)) or 1.0
    )
    with ac.attach(run.pipe, control) as session:
        run()
    assert session.calls["perturbed passes"] == 4
    assert [fraction for fraction, _ in seen] == [0.0, 0.25, 0.25, 0.5]
    assert [sigma for _, sigma in seen] == pytest.approx([sigmas[1], sigmas[2], sigmas[3], sigmas[4]])


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_a_run_that_begins_in_the_middle_has_the_levels_of_its_own_steps(scheduler):
    run = sd_img2img(scheduler).where(num_inference_steps=8)  # runs the last 4
    run()
    sigmas = levels(run.pipe)
    assert len(sigmas) == 8
    with ac.attach(run.pipe, ac.SoftPAG(layers=1, sigma=(sigmas[5] * 0.99, sigmas[4] * 1.01))) as session:
        run()
    assert session.calls["perturbed passes"] == 2
    with (
        ac.attach(run.pipe, ac.SoftPAG(layers=1, sigma=(sigmas[3] * 0.99, float("inf")))),
        pytest.raises(ac.AttnCtrlError, match="holds none of the 4 steps"),
    ):
        run()


def test_a_range_without_any_step_is_loud():
    run = RUNS["ddim"]()
    with (
        ac.attach(run.pipe, ac.SoftPAG(layers=1, sigma=(1e6, 1e7))),
        pytest.raises(ac.AttnCtrlError, match="sigma 1e.06-1e.07 holds none of the 4 steps\nHINT.*noise levels are"),
    ):
        run()


def test_a_bare_denoiser_must_be_told_the_noise_level():
    model, inputs = tiny_sd3(), sd3_call()
    with torch.no_grad(), ac.attach(model, ac.SoftPAG(heads="1.1", sigma=(0.2, 0.8))) as session:
        for tell in (lambda: None, lambda: session.set_step(1, 4)):
            tell()
            with pytest.raises(ac.AttnCtrlError, match="needs the noise level.*\nHINT.*set_step"):
                model(**inputs)
        outputs = []
        for sigma in (0.5, 0.9):
            session.set_step(1, 4, sigma=sigma)
            outputs.append(model(**inputs)[0])
    with torch.no_grad():
        plain = model(**inputs)[0]
    assert torch.equal(outputs[1], plain) and not torch.equal(outputs[0], plain)
