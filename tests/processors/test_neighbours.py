"""Controls beside what people switch on in their pipelines: LoRA, offloading, compilation, FreeU, fused projections, slicing."""

import pytest
import torch
import torch._dynamo.testing

import attnctrl as ac

from .formula import check, follow
from .tiny_pipelines import PIPELINES, flux, ip_adapter_weights, sd, sd3_plain


CONTROL = ac.SoftPAG(layers="1:", scale=5.0)
LATE = ac.SoftPAG(layers=[2], scale=5.0)


def processors(model) -> dict:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def lora(*targets: str):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


@pytest.mark.parametrize("make", [sd, sd3_plain, flux])
def test_lora_loaded_fused_and_unfused_under_a_session(make):
    run = make()
    name = "unet" if hasattr(run.pipe, "unet") else "transformer"
    plain = run()
    with ac.attach(run.pipe, CONTROL) as session:
        guided = run()
        run.model.add_adapter(lora("to_q", "to_v"))
        loaded = run()
        steps = follow(run, session)
    check(run, steps, CONTROL)
    assert (loaded - guided).abs().max() > 1e-2
    with ac.attach(run.pipe, CONTROL) as session:
        run.pipe.fuse_lora(components=[name])
        torch.testing.assert_close(run(), loaded, rtol=1e-3, atol=1e-3)
        steps = follow(run, session)
        run.pipe.unfuse_lora(components=[name])
        torch.testing.assert_close(run(), loaded, rtol=1e-3, atol=1e-3)
        run.model.disable_adapters()
        torch.testing.assert_close(run(), guided, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [sd, sd3_plain, flux])
@pytest.mark.parametrize("first", ["offload", "attach"])
def test_model_offloading_does_not_end_a_session_after_one_run(make, first):
    """Pipelines take the hooks of offloading away and put them back at the end of every run."""
    pytest.importorskip("accelerate")
    run = make()
    plain = run()
    with ac.attach(run.pipe, LATE):
        wanted = run()
    if first == "offload":
        run.pipe.enable_model_cpu_offload(device="cpu")
    with ac.attach(run.pipe, LATE) as session:
        if first == "attach":
            run.pipe.enable_model_cpu_offload(device="cpu")
        assert hasattr(run.model, "_hf_hook")
        for _ in range(3):
            assert torch.equal(run(), wanted)
        assert session.calls["perturbed passes"] == 3 * run.inputs["num_inference_steps"]
        assert session.calls["perturbed blocks"] < session.calls["perturbed passes"] * len(session.blocks)
        assert hasattr(run.model, "_hf_hook")
    assert torch.equal(run(), plain) and hasattr(run.model, "_hf_hook")


@pytest.mark.parametrize("make", [sd, flux])
def test_hooks_on_every_module_stay(make):
    """Sequential offloading, and the group offloading of diffusers, hook every layer or block."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    run = make()
    with ac.attach(run.pipe, LATE):
        wanted = run()
    for module in run.model.modules():
        add_hook_to_module(module, Counting())
    with ac.attach(run.pipe, LATE):
        assert torch.equal(run(), wanted) and Counting.calls
    remove_hook_from_module(run.model, recurse=True)
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    cpu = torch.device("cpu")
    run.model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    with ac.attach(run.pipe, LATE):
        assert torch.equal(run(), wanted)


@pytest.mark.parametrize("make", [PIPELINES["flux"], PIPELINES["qwen"], PIPELINES["wan"]])
def test_regional_compilation_does_not_recompile_from_step_to_step(make):
    run = make().where(num_inference_steps=4)
    with ac.attach(run.pipe, LATE):
        wanted = run()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run.model.compile_repeated_blocks(backend=counter, fullgraph=False)
    frames = []
    with ac.attach(run.pipe, LATE) as session:
        got = run(callback_on_step_end=lambda pipe, i, t, kwargs: frames.append(counter.frame_count) or {})
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert frames[0] > 0 and frames[1:] == [frames[1]] * 3, frames
    assert session.calls["perturbed blocks"] < session.calls["perturbed passes"] * len(session.blocks)


@pytest.mark.parametrize("way", ["torch.compile", "compile"])
def test_a_wholly_compiled_denoiser_runs_under_controls(way):
    run = sd3_plain()
    with ac.attach(run.pipe, LATE):
        wanted = run()
    torch._dynamo.reset()
    if way == "compile":
        run.pipe.transformer.compile(backend="eager")
    else:
        run.pipe.transformer = torch.compile(run.pipe.transformer, backend="eager")
    with ac.attach(run.pipe, LATE) as session:
        torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-4)
    assert session.calls["perturbed passes"] == 2


def test_free_u_writes_to_block_outputs_and_reuse_notices():
    run = sd()
    last = ac.SoftPAG(layers=[6], scale=5.0)  # in the last up block
    run.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    with ac.attach(run.pipe, last, prefix_reuse=False):
        whole = run()
    with ac.attach(run.pipe, last) as session:
        steps = follow(run, session)
        assert torch.equal(run(), whole)
    check(run, steps, last)


@pytest.mark.parametrize("make", [sd, sd3_plain, flux])
def test_fused_projections(make):
    """The model's processors change their class, or their way through it."""
    run = make()
    plain = run()
    with ac.attach(run.pipe, CONTROL):
        guided = run()
    run.model.fuse_qkv_projections()
    with ac.attach(run.pipe, CONTROL) as session:
        fused = run()
        steps = follow(run, session)
    check(run, steps, CONTROL)
    if make is not sd3_plain:  # diffusers' fused processor of SD3 leaves out the norms of q and k
        torch.testing.assert_close(fused, guided, rtol=1e-3, atol=1e-3)
    run.model.unfuse_qkv_projections()
    torch.testing.assert_close(run(), plain, rtol=1e-3, atol=1e-3)


def test_attention_without_fused_kernels_is_refused_with_a_way_out():
    run = sd()
    run.pipe.enable_attention_slicing(1)
    with (
        ac.attach(run.pipe, CONTROL),
        pytest.raises(ac.AttnCtrlError, match="SlicedAttnProcessor never called.*\nHINT"),
    ):
        run()


def test_processors_exchanged_under_a_session_are_loud_and_stay():
    run = sd()
    session = ac.attach(run.pipe, CONTROL)
    run.pipe.enable_attention_slicing(1)
    with pytest.raises(ac.AttnCtrlError, match="did not take effect"):
        run()
    session.detach()
    assert {type(p).__name__ for p in processors(run.model).values()} == {"SlicedAttnProcessor"}
    assert run().isfinite().all()


def test_ip_adapters_are_loaded_before_attaching():
    run = sd()
    with ac.attach(run.pipe, CONTROL), pytest.raises(ac.AttnCtrlError, match="exchanged.*\nHINT: detach"):
        run.pipe.unet._load_ip_adapter_weights([ip_adapter_weights(run.pipe.unet)])


def test_interrupted_runs_leave_no_half_step():
    """A run that ends between the two calls of a step does not confuse the next one."""
    run = PIPELINES["qwen"]()
    with ac.attach(run.pipe, CONTROL) as session:
        wanted = run()
        calls = []

        def stop(module, args, kwargs):
            calls.append(len(calls))
            if len(calls) == 3:  # conditional, perturbed, then the unconditional one
                raise KeyboardInterrupt

        handle = run.model.register_forward_pre_hook(stop, with_kwargs=True)
        with pytest.raises(KeyboardInterrupt):
            run()
        handle.remove()
        assert torch.equal(run(), wanted) and session.attached


def test_repeated_sessions_in_one_process():
    run = sd3_plain()
    before, plain = processors(run.model), run()
    wanted = []
    for round_ in range(2):
        for layer in range(3):
            with ac.attach(run.pipe, ac.SoftPAG(layers=layer, scale=5.0)):
                got = run()
            if round_ == 0:
                wanted.append(got)
            assert torch.equal(got, wanted[layer]) and not torch.equal(got, plain)
    assert processors(run.model) == before and torch.equal(run(), plain)
