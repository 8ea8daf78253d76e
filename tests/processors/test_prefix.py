"""Prefix reuse: a perturbed pass that starts at its first perturbed block is the whole perturbed pass, bit for bit."""

import pytest
import torch
import torch._dynamo.testing

import attnctrl as ac

from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3


def counted(model, paths):
    """Counts how often the forward of each module runs."""
    counts = dict.fromkeys(paths, 0)
    modules = dict(model.named_modules())

    def hook(path):
        return lambda *_: counts.__setitem__(path, counts[path] + 1)

    handles = [modules[path].register_forward_hook(hook(path)) for path in paths]
    return counts, lambda: [handle.remove() for handle in handles]


@pytest.mark.parametrize(
    "build, call, first, paths",
    [
        (lambda: tiny_sd3(layers=5), sd3_call, 3, [f"transformer_blocks.{i}" for i in range(5)]),
        (lambda: tiny_sd3(dual=True, layers=4), sd3_call, 2, [f"transformer_blocks.{i}" for i in range(4)]),
        (
            tiny_flux,
            flux_call,
            3,
            [
                "transformer_blocks.0",
                "transformer_blocks.1",
                "single_transformer_blocks.0",
                "single_transformer_blocks.1",
            ],
        ),
        (tiny_flux, flux_call, 1, ["transformer_blocks.0", "transformer_blocks.1"]),
    ],
)
def test_reuse_is_bit_identical_and_runs_only_the_rest(build, call, first, paths):
    model, inputs = build(), call()
    control = ac.SoftPAG(layers=[first], strength=0.7)
    with torch.no_grad():
        with ac.attach(model, control, prefix_reuse=False):
            whole = model(**inputs)[0]
        with ac.attach(model, control) as session:
            counts, stop = counted(model, paths)
            reused = model(**inputs)[0]
            stop()
        plain = model(**inputs)[0]
    assert torch.equal(whole, reused) and not torch.equal(whole, plain)
    assert list(counts.values()) == [1] * min(first, len(paths)) + [2] * max(0, len(paths) - first)
    blocks = len(session.blocks)
    assert session.calls["perturbed blocks"] == blocks - first
    assert f"ran {blocks - first} of {blocks} blocks" in session.report()


def test_several_guiding_controls_start_each_at_their_own_block():
    model, inputs = tiny_sd3(layers=5), sd3_call()
    controls = (ac.SoftPAG(layers=[1], scale=2), ac.SoftPAG(layers=[4], scale=1.5, target="uniform"))
    with torch.no_grad():
        with ac.attach(model, *controls, prefix_reuse=False):
            whole = model(**inputs)[0]
        with ac.attach(model, *controls) as session:
            reused = model(**inputs)[0]
    assert torch.equal(whole, reused)
    assert session.calls["perturbed blocks"] == 4 + 1


def test_only_the_last_output_before_the_perturbed_block_is_kept_and_freed():
    model, inputs = tiny_sd3(layers=5), sd3_call()
    with ac.attach(model, ac.SoftPAG(layers=[3])) as session, torch.no_grad():
        seen = []
        inner = session._resume
        session._resume = lambda weak, plain, control: (seen.append(sorted(plain.kept)), inner(weak, plain, control))
        model(**inputs)
        assert seen == [["transformer_blocks.2"]]
        assert session._pass is None


def test_outputs_changed_in_place_switch_reuse_off():
    model, inputs = tiny_sd3(layers=4), sd3_call()

    control = ac.SoftPAG(layers=[3])
    block = model.transformer_blocks[3]
    plain_forward = block.forward

    def forward(hidden_states, **kwargs):
        hidden_states.mul_(1.5)
        return plain_forward(hidden_states, **kwargs)

    block.forward = forward
    with torch.no_grad():
        with ac.attach(model, control, prefix_reuse=False):
            whole = model(**inputs)[0]
        with ac.attach(model, control) as session:
            reused = model(**inputs)[0]
    assert torch.equal(whole, reused)
    assert "no prefix reuse" in session.report()


def test_inference_mode_keeps_copies():
    model, inputs = tiny_sd3(layers=4), sd3_call()
    control = ac.SoftPAG(layers=[3])
    with torch.inference_mode():
        with ac.attach(model, control, prefix_reuse=False):
            whole = model(**inputs)[0]
        with ac.attach(model, control) as session:
            assert torch.equal(model(**inputs)[0], whole)
    assert session.calls["perturbed blocks"] == 1


def test_block_caches_are_refused():
    from diffusers import FirstBlockCacheConfig

    model, inputs = tiny_flux(), flux_call()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with (
        ac.attach(model, ac.SoftPAG(layers=[1])),
        pytest.raises(ac.AttnCtrlError, match="disable_cache"),
        torch.no_grad(),
    ):
        model(**inputs)


def test_regions_and_guidance_share_the_prefix():
    model, inputs = tiny_sd3(layers=4), sd3_call()
    left = ac.Region("left", box=(0, 0, 0.5, 1), prompt_embeds=torch.randn(1, 5, 16))
    controls = (ac.RegionalPrompts([left]), ac.SoftPAG(layers=[3]))
    with torch.no_grad():
        with ac.attach(model, *controls, prefix_reuse=False):
            whole = model(**inputs)[0]
        with ac.attach(model, *controls) as session:
            assert torch.equal(model(**inputs)[0], whole)
    assert session.calls["perturbed blocks"] == 1


def test_blocks_compiled_by_region_do_not_recompile_from_step_to_step():
    model, inputs = tiny_sd3(layers=4), sd3_call()
    control = ac.SoftPAG(layers=[2], strength=0.5, weight=lambda fraction, sigma: 1 + fraction)
    with torch.no_grad(), ac.attach(model, control) as session:
        session.set_step(0, 4)
        eager = model(**inputs)[0]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.transformer_blocks:
        block.compile(backend=counter)
    with torch.no_grad(), ac.attach(model, control) as session:
        counts = []
        for step in range(4):
            session.set_step(step, 4)
            out = model(**inputs)[0]
            counts.append(counter.frame_count)
            if step == 0:
                torch.testing.assert_close(out, eager)
    assert counts[0] > 0 and counts[1:] == [counts[1]] * 3, counts
