"""Where the guiders of diffusers 0.42 go wrong: other layers than asked for, unequal lengths, unknown processors, other backends."""

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

import attnctrl as ac

from ..dense import DenseAttention, plain
from ..models import (
    flux_call,
    qwen_image_call,
    sd3_call,
    tiny_flux,
    tiny_qwen_image,
    tiny_sd3,
    tiny_unet,
    tiny_wan,
    unet_call,
    wan_call,
)


@torch.no_grad()
def under(model, call, *controls):
    with ac.attach(model, *controls) as session:
        return model(**call)[0], session


@pytest.mark.parametrize(
    "make",
    [
        ac.SoftPAG,
        ac.SkipLayers,
        ac.TokenPerturbation,
        ac.SmoothedEnergy,
        lambda layers: ac.SkipLayers(layers, "attention"),
    ],
)
def test_layer_1_is_never_layer_10(make):
    model, found = tiny_sd3(layers=12), []
    for layers in (1, "1", [1], (1,), range(1, 2)):
        control = make(layers=layers)
        out, session = under(model, sd3_call(), control)
        (path,) = session.hits[control]
        assert path.startswith("transformer_blocks.1.") or path == "transformer_blocks.1"
        found.append(out)
    assert all(torch.equal(out, found[0]) for out in found)


def test_queries_and_keys_of_different_length():
    """Uniform attention over the text in the third cross-attention of a UNet, 16 queries and 5 keys."""
    model, call = tiny_unet(), unet_call()
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    lengths = []

    def formula(index, q, k, v):
        out = plain(q, k, v)
        lengths.append((q.shape[2], k.shape[2]))
        if k.shape[2] == 5 and sum(n_k == 5 for _, n_k in lengths) == 3:
            assert q.shape[2] == 16
            out[:, 1] = v[:, 1].mean(1, keepdim=True)
        return out

    with torch.no_grad():
        cond = model(**call)[0]
        with DenseAttention(formula):
            weak = model(**call)[0]
    got, _ = under(model, call, ac.SoftPAG(heads=[(path, 1)], target="uniform", scale=2.0))
    torch.testing.assert_close(got, cond + 2 * (cond - weak), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(weak, cond, atol=1e-4)


class Own(JointAttnProcessor2_0):
    """A processor that no registry knows."""


def test_processors_of_any_class():
    model, call, control = tiny_sd3(), sd3_call(), ac.SoftPAG(layers=1)
    wanted, _ = under(model, call, control)
    model.set_attn_processor(Own())
    got, _ = under(model, call, control)
    assert torch.equal(got, wanted)
    assert all(type(processor) is Own for processor in model.attn_processors.values())


@pytest.mark.parametrize(
    "build, call",
    [(tiny_qwen_image, lambda: qwen_image_call(missing=0)), (tiny_flux, flux_call), (tiny_wan, wan_call)],
)
def test_other_backends_do_not_switch_the_control_off(build, call):
    control = ac.SoftPAG(layers=1, scale=2.0)
    model = build()
    wanted, _ = under(model, call(), control)
    try:  # the backend of one model becomes that of all
        model.set_attention_backend("flex")
        with torch.no_grad():
            cond = model(**call())[0]
        got, _ = under(model, call(), control)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if isinstance(error, ac.AttnCtrlError):
            raise
        pytest.skip(f"FlexAttention does not run here: {error}")
    finally:
        model.set_attention_backend("native")
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert (got - cond).abs().max() > 1e-3


def test_saved_processors_are_not_emptied():
    model = tiny_unet()
    saved = dict(model.attn_processors)
    with ac.attach(model, ac.SoftPAG(layers=[1, 2])):
        assert len(model.attn_processors) == len(saved)
    assert model.attn_processors == saved
    model.set_attn_processor(dict(saved))  # it empties what it is given
    assert len(saved) == len(model.attn_processors)
