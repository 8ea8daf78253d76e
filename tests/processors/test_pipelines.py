"""Controls in whole pipelines: the formula of guidance, step windows, CFG rows."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline

import attnctrl as ac

from ..models import tiny_flux, tiny_sd3


STEPS = 4
CONTROL = {"heads": "1.1,2.3", "strength": 0.7, "scale": 2.0}


def tiny_vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, layers_per_block=1, **blocks
    ).eval()


def sd3_pipe(**options) -> StableDiffusion3Pipeline:
    empty = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    pipe = StableDiffusion3Pipeline(
        transformer=tiny_sd3(**options), scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(4), **empty
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipe(guidance: bool = False) -> FluxPipeline:
    empty = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FluxPipeline(
        transformer=tiny_flux(guidance), scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(2), **empty
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sd3_inputs(batch: int = 2, guidance_scale: float = 3.0) -> dict:
    return {
        "prompt_embeds": random(1, batch, 5, 16),
        "pooled_prompt_embeds": random(2, batch, 12),
        "negative_prompt_embeds": random(3, batch, 5, 16),
        "negative_pooled_prompt_embeds": random(4, batch, 12),
        "latents": random(5, batch, 4, 8, 8),
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
        "output_type": "latent",
    }


def flux_inputs(batch: int = 2, true_cfg_scale: float = 1.0) -> dict:
    more = {"negative_prompt_embeds": random(3, batch, 5, 16), "negative_pooled_prompt_embeds": random(4, batch, 12)}
    return {
        "prompt_embeds": random(1, batch, 5, 16),
        "pooled_prompt_embeds": random(2, batch, 12),
        "latents": random(5, batch, 16, 8),
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
        "true_cfg_scale": true_cfg_scale,
        "output_type": "latent",
        **(more if true_cfg_scale > 1 else {}),
    }


def delta_of(model, control: ac.SoftPAG, call: dict, cond: torch.Tensor) -> torch.Tensor:
    """scale·(cond − perturbed), from the bare denoiser, whose guided output is cond + delta."""
    with ac.attach(model, control):
        return model(**call)[0] - cond


@torch.no_grad()
def sd3_by_hand(pipe, inputs: dict, control: ac.SoftPAG, steps: range) -> torch.Tensor:
    model, scheduler = copy.deepcopy(pipe.transformer), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    latents, g = inputs["latents"], inputs["guidance_scale"]
    for i, t in enumerate(scheduler.timesteps):

        def call(prefix: str, latents=latents, t=t) -> dict:
            embeds, pooled = inputs[f"{prefix}prompt_embeds"], inputs[f"{prefix}pooled_prompt_embeds"]
            return {
                "hidden_states": latents,
                "encoder_hidden_states": embeds,
                "pooled_projections": pooled,
                "timestep": t.expand(len(latents)),
                "return_dict": False,
            }

        cond = model(**call(""))[0]
        prediction = cond
        if g > 1:
            uncond = model(**call("negative_"))[0]
            prediction = uncond + g * (cond - uncond)
        if i in steps:
            prediction = prediction + delta_of(model, control, call(""), cond)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_sd3_yields_the_formula(guidance_scale, batch):
    pipe, inputs = sd3_pipe(), sd3_inputs(batch, guidance_scale)
    with ac.attach(pipe, ac.SoftPAG(**CONTROL)):
        got = pipe(**inputs).images
        again = pipe(**inputs).images
    wanted = sd3_by_hand(pipe, inputs, ac.SoftPAG(**CONTROL), range(STEPS))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(got, again)
    assert (got - pipe(**inputs).images).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("start", "stop", "steps"), [(0.0, 0.25, range(1)), (0.75, 1.0, range(3, 4)), (0.25, 0.75, range(1, 3))]
)
def test_windows_include_their_first_step(start, stop, steps):
    pipe, inputs = sd3_pipe(), sd3_inputs()
    with ac.attach(pipe, ac.SoftPAG(**CONTROL, start=start, stop=stop)) as session:
        got = pipe(**inputs).images
    assert session.calls["perturbed passes"] == len(steps)
    torch.testing.assert_close(got, sd3_by_hand(pipe, inputs, ac.SoftPAG(**CONTROL), steps), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("neutral", [ac.SoftPAG(heads="1.1", strength=0), ac.RegionalPrompts()])
def test_neutral_pipeline_is_bit_identical(neutral):
    for pipe, inputs in ((sd3_pipe(), sd3_inputs()), (flux_pipe(), flux_inputs())):
        before = pipe(**inputs).images
        with ac.attach(pipe, neutral):
            assert torch.equal(pipe(**inputs).images, before)
        with ac.attach(pipe, ac.SoftPAG(heads="1.1")):
            pipe(**inputs)
        assert torch.equal(pipe(**inputs).images, before)


def test_a_window_without_a_step_is_loud():
    pipe, inputs = sd3_pipe(), sd3_inputs()
    with (
        ac.attach(pipe, ac.SoftPAG(**CONTROL, start=0.01, stop=0.2)),
        pytest.raises(ac.AttnCtrlError, match="none of the 4 steps"),
    ):
        pipe(**inputs)


def flux_call(inputs: dict, latents: torch.Tensor, t: torch.Tensor, prefix: str, guidance) -> dict:
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    return {
        "hidden_states": latents,
        "encoder_hidden_states": inputs[f"{prefix}prompt_embeds"],
        "pooled_projections": inputs[f"{prefix}pooled_prompt_embeds"],
        "timestep": t.expand(len(latents)) / 1000,
        "guidance": guidance,
        "img_ids": torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


@pytest.mark.parametrize(("distilled", "true_cfg_scale"), [(False, 1.0), (True, 1.0), (False, 3.0)])
def test_flux_yields_the_formula(distilled, true_cfg_scale):
    """One call a step with embedded or no guidance; two calls, the conditional one first, under true CFG."""
    pipe, inputs = flux_pipe(distilled), flux_inputs(true_cfg_scale=true_cfg_scale)
    control = ac.SoftPAG(**CONTROL)
    with ac.attach(pipe, control) as session:
        got = pipe(**inputs).images
    assert session.calls["perturbed passes"] == STEPS
    model, scheduler, latents = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.scheduler), inputs["latents"]
    scheduler._step_index = None
    guidance = torch.full((2,), 3.5) if distilled else None
    with torch.no_grad():
        for t in scheduler.timesteps:
            call = flux_call(inputs, latents, t, "", guidance)
            cond = model(**call)[0]
            prediction = cond
            if true_cfg_scale > 1:
                uncond = model(**flux_call(inputs, latents, t, "negative_", guidance))[0]
                prediction = uncond + true_cfg_scale * (cond - uncond)
            prediction = prediction + delta_of(model, control, call, cond)
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    torch.testing.assert_close(got, latents, rtol=1e-3, atol=1e-4)


def test_one_step_runs_with_the_same_latents_are_told_apart():
    """Without true CFG every call is conditional, also when the next run starts from the very same tensor."""
    pipe, inputs = flux_pipe(), {**flux_inputs(), "num_inference_steps": 1}
    with ac.attach(pipe, ac.SoftPAG(**CONTROL)) as session:
        first, second = pipe(**inputs).images, pipe(**inputs).images
    assert torch.equal(first, second) and session.calls["perturbed passes"] == 2


def regions(**options) -> ac.RegionalPrompts:
    left = ac.Region("a", box=(0, 0, 0.5, 1), prompt_embeds=random(7, 1, 6, 16))
    right = ac.Region("b", box=(0.5, 0, 1, 1), prompt_embeds=random(8, 1, 3, 16))
    return ac.RegionalPrompts([left, right], **options)


@pytest.mark.parametrize("dual", [False, True])
def test_unconditional_rows_ignore_the_regions(dual):
    pipe, inputs = sd3_pipe(dual=dual), {**sd3_inputs(), "num_inference_steps": 1}
    rows = []
    with ac.attach(pipe, regions()):
        model = pipe.transformer
        controlled = model.forward

        def spy(*args, **kwargs):
            out = controlled(*args, **kwargs)
            rows.append(out[0].clone())
            return out

        model.forward = spy
        pipe(**inputs)
        model.forward = controlled
    call = {
        "hidden_states": torch.cat([inputs["latents"]] * 2),
        "timestep": torch.full((4,), 1000.0),
        "return_dict": False,
    }
    call["encoder_hidden_states"] = torch.cat([inputs["negative_prompt_embeds"], inputs["prompt_embeds"]])
    call["pooled_projections"] = torch.cat([inputs["negative_pooled_prompt_embeds"], inputs["pooled_prompt_embeds"]])
    with torch.no_grad():
        plain = pipe.transformer(**call)[0]
    torch.testing.assert_close(rows[0][:2], plain[:2], rtol=1e-4, atol=1e-5)
    assert (rows[0][2:] - plain[2:]).abs().max() > 1e-3


@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_flux_regions_spare_the_unconditional_call(true_cfg_scale):
    pipe, inputs = flux_pipe(), flux_inputs(true_cfg_scale=true_cfg_scale)
    lengths = []
    handle = pipe.transformer.context_embedder.register_forward_pre_hook(
        lambda m, args: lengths.append(args[0].shape[1])
    )
    with ac.attach(pipe, regions(stop=0.5)):
        got = pipe(**inputs).images
    handle.remove()
    cond, rest = [5 + 6 + 3] * 2, [5] * 2
    assert lengths == (cond + rest if true_cfg_scale == 1 else [14, 5, 14, 5, 5, 5, 5, 5])
    assert (got - pipe(**inputs).images).abs().max() > 1e-3


def test_both_controls_together():
    pipe, inputs = sd3_pipe(), sd3_inputs()
    with ac.attach(pipe, regions(stop=0.5), ac.SoftPAG(**CONTROL, start=0.25)) as session:
        both = pipe(**inputs).images
    assert session.calls["perturbed passes"] == 3 and both.isfinite().all()
    with ac.attach(pipe, regions(stop=0.5)):
        alone = pipe(**inputs).images
    assert (both - alone).abs().max() > 1e-3


def test_skip_layer_calls_of_the_pipeline_pass_through():
    pipe, inputs = sd3_pipe(), sd3_inputs()
    inputs |= {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": -0.01}
    with ac.attach(pipe, ac.SoftPAG(heads="2.3")) as session:
        pipe(**inputs)
    assert session.calls["perturbed passes"] == STEPS and session.calls["passes"] == 2 * STEPS


def test_lora_and_offloading_hooks_stay(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe, inputs = sd3_pipe(), sd3_inputs()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with_lora = pipe(**inputs).images
    with ac.attach(pipe, ac.SoftPAG(**CONTROL)):
        got = pipe(**inputs).images
    torch.testing.assert_close(
        got, sd3_by_hand(pipe, inputs, ac.SoftPAG(**CONTROL), range(STEPS)), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(pipe(**inputs).images, with_lora)
