"""combine="joint": all guiding controls perturb one pass, and its term is added once."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import attnctrl as ac

from ..dense import DenseAttention, plain
from ..models import sd3_call, tiny_sd3
from .formula import check, follow
from .tiny_pipelines import PIPELINES


CONTROLS = (ac.SoftPAG(heads="2.1", target="uniform", scale=5.0), ac.SkipLayers([1], scale=5.0))


@pytest.mark.parametrize("name", ["sd3", "flux, true CFG", "sdxl, rescale", "qwen"])
def test_the_formula_has_one_term(name):
    run, controls = PIPELINES[name](), CONTROLS
    if name.startswith("sdxl"):  # one block of a UNet does little
        controls = [replace(control, scale=100.0) for control in controls]
    with ac.attach(run.pipe, *controls, combine="joint") as session:
        steps = follow(run, session)
    assert session.calls["perturbed passes"] == len(steps)
    check(run, steps, *controls, combine="joint")


def test_equals_the_edits_by_hand_in_one_dense_pass():
    """Two edits of one head, in order, and a skipped block behind them."""
    model, inputs = tiny_sd3(layers=5), sd3_call()
    first = ac.SoftPAG(heads="2.1,2.3", strength=0.7, scale=2.0)
    second = ac.SoftPAG(heads="2.1", strength=0.4, target="uniform", scale=2.0)
    skip = ac.SkipLayers(3, scale=2.0)

    def formula(index, q, k, v, perturbed):
        out = plain(q, k, v)
        if perturbed and index == 2:
            out[:, [1, 3]] = torch.lerp(out[:, [1, 3]], v[:, [1, 3]], 0.7)
            out[:, 1] = torch.lerp(out[:, 1], v[:, 1].mean(1, keepdim=True).expand_as(v[:, 1]), 0.4)
        return out

    block = model.transformer_blocks[3]
    with torch.no_grad():
        with DenseAttention(partial(formula, perturbed=False)):
            cond = model(**inputs)[0]
        block.forward = lambda hidden_states, encoder_hidden_states, **rest: (encoder_hidden_states, hidden_states)
        with DenseAttention(partial(formula, perturbed=True)):
            weak = model(**inputs)[0]
        del block.forward
        with ac.attach(model, first, second, skip, combine="joint") as session:
            guided = model(**inputs)[0]
        with ac.attach(model, first, second, skip, combine="joint", prefix_reuse=False):
            assert torch.equal(model(**inputs)[0], guided)
        with ac.attach(model, first, second, skip):
            separate = model(**inputs)[0]
    torch.testing.assert_close(guided, cond + 2 * (cond - weak), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(guided, separate, atol=1e-3)
    assert session.calls["perturbed passes"] == 1 and session.calls["perturbed blocks"] == 3
    report = session.report()
    assert "joint: SoftPAG and SoftPAG and SkipLayers in one perturbed pass, scale 2" in report
    assert "1 perturbed passes" in report and "ran 3 of 5 blocks" in report


def test_one_control_is_the_same_either_way():
    model, inputs = tiny_sd3(), sd3_call()
    with torch.no_grad():
        outputs = []
        for how in ("separate", "joint"):
            with ac.attach(model, CONTROLS[0], ac.SoftPAG(heads="1.1", strength=0, scale=5.0), combine=how) as session:
                outputs.append(model(**inputs)[0])
            assert "joint:" not in session.report()
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "pair",
    [
        (ac.TokenPerturbation([1]), ac.SoftPAG(heads="1.2")),
        (ac.SkipLayers([1], "attention", scale=3.0), ac.SoftPAG(heads="1.2", target="uniform")),
        (ac.TokenPerturbation([1]), ac.TokenPerturbation([1, 2], seed=1)),
        (ac.HeadScale("1.2", scale=3.0), ac.SkipLayers([0], scale=3.0)),
    ],
    ids=["tokens and heads", "attention and heads", "tokens twice", "heads and another block"],
)
def test_edits_of_a_block_that_runs_combine(pair):
    model, inputs = tiny_sd3(), sd3_call()
    outputs = []
    with torch.no_grad():
        for controls in (pair, pair[:1], pair[1:]):
            with ac.attach(model, *controls, combine="joint") as session:
                session.set_step(0, 4)
                outputs.append(model(**inputs)[0])
            assert session.calls["perturbed passes"] == 1 and all(session.hits[control] for control in controls)
    both, first, second = outputs
    assert not torch.allclose(both, first, atol=1e-4) and not torch.allclose(both, second, atol=1e-4)


HEADS = ac.SoftPAG(heads="1.2", scale=3.0)


@pytest.mark.parametrize(
    "other, told",
    [
        (ac.SoftPAG(heads="2.2", scale=2.0), "scales are SoftPAG 3, SoftPAG 2"),
        (ac.SoftPAG(heads="2.2", scale=0.0), "scales are SoftPAG 3, SoftPAG 0"),
        (ac.SoftPAG(heads="2.2", stop=0.5), "windows are SoftPAG 0-1, SoftPAG 0-0.5"),
        (ac.SoftPAG(heads="2.2", sigma=(0, 0.5)), "windows are SoftPAG 0-1, SoftPAG 0-1, sigma 0-0.5"),
        (ac.SoftPAG(heads="2.2", weight=lambda fraction, sigma: 1.0), "windows are SoftPAG 0-1, SoftPAG 0-1, weight"),
        (
            ac.SkipLayers([1], scale=3.0),
            r"SkipLayers leaves out a block that SoftPAG edits \(transformer_blocks.1.attn\)",
        ),
    ],
)
def test_what_cannot_share_a_pass_is_refused(other, told):
    with pytest.raises(ac.AttnCtrlError, match=f"one perturbed pass, but .*{told}.*\nHINT"):
        ac.attach(tiny_sd3(), HEADS, other, combine="joint")
    with ac.attach(tiny_sd3(), HEADS, other):
        pass


def test_a_skipped_block_holds_no_other_edit():
    for other in (ac.SkipLayers([0, 1], scale=3.0), ac.TokenPerturbation([1])):
        for controls in ((ac.SkipLayers([1], scale=3.0), other), (other, ac.SkipLayers([1], scale=3.0))):
            with pytest.raises(ac.AttnCtrlError, match="leaves out a block that .* edits"):
                ac.attach(tiny_sd3(), *controls, combine="joint")


def test_other_words_are_refused():
    with pytest.raises(ac.AttnCtrlError, match="combine='both' is neither 'separate'.*nor 'joint'"):
        ac.attach(tiny_sd3(), HEADS, combine="both")
