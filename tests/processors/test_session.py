import inspect
import threading
from functools import partial

import pytest
import torch
from torch import nn

import attnctrl as ac

from ..dense import DenseAttention, plain
from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3


def state_of(model) -> dict:
    """Everything that attaching may change."""
    return {
        "forward": model.__dict__.get("forward"),
        "processors": {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
    }


def same(a: dict, b: dict) -> bool:
    return (
        a["forward"] is b["forward"]
        and a["hooks"] == b["hooks"]
        and all(a["processors"][n] is b["processors"][n] for n in a["processors"])
    )


@pytest.mark.parametrize("build", [tiny_sd3, lambda: tiny_sd3(dual=True), tiny_flux])
def test_leaves_no_trace(build):
    model = build()
    before = state_of(model)
    with ac.attach(model, ac.SoftPAG(layers="1:")):
        assert not same(before, state_of(model))
    assert same(before, state_of(model))
    with pytest.raises(RuntimeError), ac.attach(model, ac.SoftPAG(heads="1.1")):
        raise RuntimeError
    assert same(before, state_of(model))
    session = ac.attach(model, ac.SoftPAG(heads="1.1"))
    session.detach()
    session.detach()
    assert same(before, state_of(model))


def test_failed_attach_leaves_no_trace():
    model = tiny_sd3()
    before = state_of(model)
    with pytest.raises(ac.AttnCtrlError):
        ac.attach(model, ac.SoftPAG(heads="1.1"), ac.SoftPAG(heads="8.8"))
    assert same(before, state_of(model))


def test_error_inside_a_pass_leaves_the_model_usable():
    model, inputs = tiny_sd3(), sd3_call()
    with torch.no_grad():
        before = model(**inputs)[0]
        with ac.attach(model, ac.SoftPAG(heads="1.1")), pytest.raises(RuntimeError):
            model(**{**inputs, "pooled_projections": torch.zeros(2, 99)})
        assert torch.equal(model(**inputs)[0], before)


def test_second_session_with_controls_is_refused_and_a_neutral_one_is_not():
    model = tiny_sd3()
    with ac.attach(model, ac.SoftPAG(heads="1.1")):
        with pytest.raises(ac.AttnCtrlError, match="attached to this model already"):
            ac.attach(model, ac.SoftPAG(heads="1.2"))
        with ac.attach(model, ac.SoftPAG(heads="1.2", strength=0)):
            pass
    with ac.attach(model, ac.SoftPAG(heads="1.2")):
        pass


def test_threads_with_separate_models():
    inputs = sd3_call()
    wanted = {}
    for head in range(4):
        model = tiny_sd3()
        with torch.no_grad(), ac.attach(model, ac.SoftPAG(heads=[(1, head)])):
            wanted[head] = model(**inputs)[0]
    got = {}

    def work(head):
        model = tiny_sd3_built[head]
        with torch.no_grad(), ac.attach(model, ac.SoftPAG(heads=[(1, head)])):
            got[head] = model(**inputs)[0]

    tiny_sd3_built = [tiny_sd3() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(head,)) for head in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(got[head], wanted[head], atol=1e-6) for head in range(4))


def test_unknown_family_says_what_to_write():
    with pytest.raises(ac.AttnCtrlError, match="SD3Transformer2DModel.*\n.*block stacks"):
        ac.attach(nn.Linear(2, 2), ac.SoftPAG(heads="0.0"))
    with pytest.raises(ac.AttnCtrlError, match="neither a denoiser nor a pipeline"):
        ac.attach(object(), ac.SoftPAG(heads="0.0"))


def test_not_a_control():
    with pytest.raises(ac.AttnCtrlError, match="not a control"):
        ac.attach(tiny_sd3(), "SoftPAG")


def test_head_set_of_another_family_is_refused():
    heads = ac.HeadSet(((1, 1, 1.0),), family="flux")
    with pytest.raises(ac.AttnCtrlError, match="found on family 'flux', this model is 'sd3'"):
        ac.attach(tiny_sd3(), ac.SoftPAG(heads=heads))


def test_dictionaries_that_a_model_empties_reach_every_pass():
    model, inputs = tiny_sd3(), sd3_call()
    seen = []
    inner = model.forward

    def greedy(*args, **kwargs):
        seen.append(kwargs["joint_attention_kwargs"].pop("extra"))
        return inner(*args, **kwargs)

    greedy.__signature__ = inspect.signature(inner)
    model.forward = greedy
    with torch.no_grad(), ac.attach(model, ac.SoftPAG(heads="1.1")):
        model(**inputs, joint_attention_kwargs={"extra": 1})
    assert seen == [1, 1] and model.forward is greedy


def test_two_region_controls_are_refused():
    regions = [ac.Region("a", box=(0, 0, 1, 1))]
    with pytest.raises(ac.AttnCtrlError, match="who attends to whom"):
        ac.attach(tiny_sd3(), ac.RegionalPrompts(regions), ac.RegionalPrompts(regions))


def test_controls_that_cannot_act_are_loud():
    class Silent:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states, encoder_hidden_states

    model = tiny_sd3()
    model.transformer_blocks[1].attn.processor = Silent()
    with (
        torch.no_grad(),
        ac.attach(model, ac.SoftPAG(heads="1.1")),
        pytest.raises(ac.AttnCtrlError, match="could not act"),
    ):
        model(**sd3_call())


@pytest.mark.parametrize("target", ["identity", "uniform"])
def test_the_models_own_padding_mask_stays_in_force(target):
    model, inputs = tiny_flux(), flux_call()
    mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    mask[1, ..., 3:5] = False  # padded text
    inputs["joint_attention_kwargs"] = {"attention_mask": mask}

    def formula(index, q, k, v, perturbed):
        out = plain(q, k, v, mask)
        if perturbed and index == 1:
            mean = (v * mask.transpose(-1, -2)).sum(2, keepdim=True) / mask.sum(-1, keepdim=True)
            out[:, 1] = torch.lerp(
                out[:, 1], v[:, 1] if target == "identity" else mean[:, 1].expand_as(out[:, 1]), 0.7
            )
        return out

    with torch.no_grad():
        with DenseAttention(partial(formula, perturbed=False)):
            cond = model(**inputs)[0]
        with DenseAttention(partial(formula, perturbed=True)):
            weak = model(**inputs)[0]
        with ac.attach(model, ac.SoftPAG(heads="1.1", target=target, strength=0.7, scale=2.0)):
            guided = model(**inputs)[0]
    torch.testing.assert_close(guided, cond + 2 * (cond - weak), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(guided, cond, atol=1e-3)


def test_window_on_a_bare_denoiser():
    model, inputs = tiny_sd3(), sd3_call()
    with torch.no_grad(), ac.attach(model, ac.SoftPAG(heads="1.1", stop=0.5)) as session:
        with pytest.raises(ac.AttnCtrlError, match="set_step"):
            model(**inputs)
        session.set_step(0, 4)
        first = model(**inputs)[0]
        session.set_step(2, 4)
        last = model(**inputs)[0]
    with torch.no_grad():
        assert torch.equal(last, model(**inputs)[0]) and not torch.equal(first, last)


@pytest.mark.parametrize("build,call", [(tiny_sd3, sd3_call), (tiny_flux, flux_call)])
def test_return_dict_and_positional_arguments(build, call):
    model, inputs = build(), call()
    inputs.pop("return_dict")
    with torch.no_grad(), ac.attach(model, ac.SoftPAG(heads="1.1")):
        by_name = model(**inputs).sample
        positional = model(
            inputs.pop("hidden_states"), inputs.pop("encoder_hidden_states"), **inputs, return_dict=False
        )[0]
    assert torch.equal(by_name, positional)


def test_report_says_what_happened():
    model = tiny_sd3()
    with torch.no_grad(), ac.attach(model, ac.SoftPAG(heads="1.1"), ac.SoftPAG(heads="0.0", scale=0)) as session:
        assert "has not acted yet" in session.report()
        model(**sd3_call())
        text = session.report()
    assert (
        "acted 1 times" in text
        and "neutral, not attached" in text
        and "1 perturbed passes" in text
        and "kernels: " in text
    )


def test_other_attention_backends_keep_working():
    model, inputs = tiny_flux(), flux_call()
    with torch.no_grad():
        with ac.attach(model, ac.SoftPAG(heads="1.1")):
            wanted = model(**inputs)[0]
        model.set_attention_backend("_native_math")
        with ac.attach(model, ac.SoftPAG(heads="1.1")):
            got = model(**inputs)[0]
        backends = {str(m.processor._attention_backend) for m in model.modules() if hasattr(m, "processor")}
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        with ac.attach(model, ac.SoftPAG(heads="1.1")):
            model.set_attention_backend("native")
        after = {str(m.processor._attention_backend) for m in model.modules() if hasattr(m, "processor")}
    assert all(name.lower().endswith("_native_math") for name in backends)
    assert all(name.lower().endswith(".native") for name in after)
