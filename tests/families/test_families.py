"""The tables against the models: sites, heads, and the order of token streams read off the value projections."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnctrl.errors import AttnCtrlError
from attnctrl.families import FLUX, SD3, find_denoiser, find_family
from attnctrl.sites import lay_out

from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3


class Values(TorchFunctionMode):
    """Keeps v of every attention call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[2] if len(args) > 2 else kwargs["value"])
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("build", "call", "family"),
    [(tiny_sd3, sd3_call, SD3), (lambda: tiny_sd3(dual=True), sd3_call, SD3), (tiny_flux, flux_call, FLUX)],
    ids=["sd3", "sd3.5", "flux"],
)
def test_stream_order_is_what_the_model_does(build, call, family):
    model = build()
    assert find_family(model) is family
    modules, outputs, handles = dict(model.named_modules()), {}, []
    for site in family.sites(model):
        module = modules[site.path]
        for name in ("to_v", "add_v_proj"):
            if getattr(module, name, None) is not None:
                key = (site.path, name)
                handles.append(
                    getattr(module, name).register_forward_hook(lambda m, a, out, key=key: outputs.update({key: out}))
                )
    with torch.no_grad(), Values() as mode:
        model(**call())
    for handle in handles:
        handle.remove()
    order = sorted(family.sites(model), key=lambda s: (s.layer, s.path.endswith("attn2")))
    assert len(order) == len(mode.seen)
    for site, v in zip(order, mode.seen):
        assert v.shape[1] == site.heads
        tokens = lay_out(site.streams, {"image": 16, "text": 5}, (4, 4))
        assert v.shape[2] == tokens.length
        flat = v.transpose(1, 2).flatten(2)
        image = outputs[site.path, "to_v"]
        if image.shape[1] == tokens.length:  # a block on the joined sequence: its input's order is the text's place
            continue
        assert torch.equal(flat[:, tokens.span("image")], image)
        if "text" in site.streams:
            assert torch.equal(flat[:, tokens.span("text")], outputs[site.path, "add_v_proj"])


def test_single_blocks_of_flux_have_text_first():
    """Changing one text token changes the value of exactly that row of the joined sequence in the first single block."""
    model, inputs = tiny_flux(), flux_call()
    caught = []
    handle = model.single_transformer_blocks[0].norm.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    for block in model.transformer_blocks:  # no mixing before the single blocks
        block.forward = lambda hidden_states, encoder_hidden_states, **kwargs: (encoder_hidden_states, hidden_states)
    with torch.no_grad():
        model(**inputs)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].clone()
        inputs["encoder_hidden_states"][:, 2] += 1
        model(**inputs)
    handle.remove()
    changed = (caught[0] - caught[1]).abs().amax((0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [2]


def test_layers_run_through_all_primary_stacks():
    assert [site.layer for site in FLUX.sites(tiny_flux())] == [0, 1, 2, 3]
    sites = SD3.sites(tiny_sd3(dual=True))
    assert [site.layer for site in sites if site.primary] == [0, 1, 2]
    assert [(site.path, site.layer) for site in sites if not site.primary] == [
        ("transformer_blocks.0.attn2", 0),
        ("transformer_blocks.1.attn2", 1),
    ]


def test_layout_keeps_base_text_and_image_together():
    for streams in (("image", "text"), ("text", "image")):
        tokens = lay_out(streams, {"image": 16, "text": 5}, (4, 4), regions=(3, 2))
        spans = sorted([tokens.span("image"), tokens.span("text")], key=lambda s: s.start)
        assert spans[0].stop == spans[1].start and tokens.length == 26


def test_grids():
    model = tiny_sd3()
    assert SD3.grid(sd3_call(height=8, width=12), model) == (4, 6)
    assert FLUX.grid(flux_call(rows=3, columns=5), tiny_flux()) == (3, 5)
    reference = flux_call()
    reference["img_ids"][:, 0] = 1
    with pytest.raises(AttnCtrlError, match="Kontext"):
        FLUX.grid(reference, tiny_flux())


def test_find_denoiser():
    class Pipe:
        transformer = tiny_sd3()

    pipe = Pipe()
    assert find_denoiser(pipe) == (pipe.transformer, pipe)
    assert find_denoiser(pipe.transformer) == (pipe.transformer, None)
