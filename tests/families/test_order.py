"""The order of token streams and of a block's outputs, read off the values: what changes with the text, what with the latents."""

import inspect

import pytest
import torch
from torch import nn

from attnctrl.families import FAMILIES, find_family
from attnctrl.sites import lay_out

from ..models import (
    TINY,
    cogvideox_call,
    flux_call,
    qwen_image_call,
    sd3_call,
    sdxl_call,
    tiny_cogvideox,
    tiny_flux,
    tiny_qwen_image,
    tiny_sd3,
    tiny_sdxl,
)
from ..models.recorder import record


BUILD = TINY | {
    "sd3.5": (lambda: tiny_sd3(dual=True), sd3_call),
    "sdxl": (tiny_sdxl, sdxl_call),
    "cogvideox-2b": (lambda: tiny_cogvideox(rotary=False), lambda: cogvideox_call() | {"image_rotary_emb": None}),
}
NAMES = sorted(BUILD)
MORE_TEXT = {"hunyuan_image": ("encoder_hidden_states_2",), "hidream": ("encoder_hidden_states_llama3",)}
# streams that are neither text nor latents, and what they follow before the first block
FOLLOWS = {("z_image", "padding"): "image", ("auraflow", "register"): None, ("hidream", "padding"): None}


def fresh(value):
    """Other noise in the same shapes."""
    if isinstance(value, list):
        return [fresh(item) for item in value]
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=value.dtype)


def changed_rows(a: torch.Tensor, b: torch.Tensor) -> set[int]:
    """Rows of v (B, H, N, D) that differ in any batch row."""
    return set((a != b).any(-1).any(1).any(0).nonzero().flatten().tolist())


def belongs(name: str, stream: str) -> str | None:
    stream = stream.split(":")[0]
    return FOLLOWS.get((name, stream), stream)


@pytest.mark.parametrize("name", NAMES)
def test_streams_stand_where_the_table_says(name):
    build, make = BUILD[name]
    model = build()
    family = find_family(model)
    if name == "mochi":  # pooled text modulates the video too; without it, only what is attended to tells them apart
        nn.init.zeros_(model.time_embed.pooler.to_out.weight)
    base = make(missing=0) if name == "mochi" else make()
    texts = {key: fresh(base[key]) for key in (family.text, *MORE_TEXT.get(name, ()))}
    latents = {family.image: fresh(base[family.image])}

    sites = [site for site in family.sites(model) if site.layer == 0]
    calls = [dict(record(model, sites, base | change)) for change in ({}, texts, latents)]
    lengths, grid = family.tokens(base, model)
    for site in sites:
        plain, other_text, other_latents = (found[site.path].v for found in calls)
        by_text, by_latents = changed_rows(plain, other_text), changed_rows(plain, other_latents)
        if site.kind == "cross":
            assert by_text == set(range(lengths["text"])) and not by_latents
            continue
        known = lengths | {"image": lengths["image"] or grid[0] * grid[1]}
        tokens = lay_out(site.streams, known, grid)
        assert plain.shape[2] == tokens.length
        expected = {"text": set(), "image": set(), None: set()}
        for stream, start, stop in tokens.streams:
            expected[belongs(name, stream)] |= set(range(start, stop))
        assert by_text == expected["text"] and by_latents == expected["image"]


APPENDED = {
    "sd3": BUILD["sd3"],
    "flux": BUILD["flux"],
    "flux2": BUILD["flux2"],
    "qwen_image": (tiny_qwen_image, lambda: qwen_image_call(missing=0)),
    "cogview4": BUILD["cogview4"],
    "auraflow": BUILD["auraflow"],
    "cogvideox": BUILD["cogvideox"],
}


def test_every_joint_family_takes_or_refuses_appended_prompts():
    joint = [family for family in FAMILIES if any(stack.kind == "joint" for stack in family.stacks)]
    assert set(APPENDED) == {family.name for family in joint if family.encode is not None and family.refiner is None}
    assert all("RegionalPrompts" in dict(family.refuses) for family in joint if family.encode is None)


@pytest.mark.parametrize("name", APPENDED)
def test_appended_prompts_stand_where_the_layout_says(name):
    build, make = APPENDED[name]
    model, call = build(), make()
    family = find_family(model)
    extra = torch.randn(1, 3, call[family.text].shape[-1], generator=torch.Generator().manual_seed(3))
    lengths, grid = family.tokens(call, model)
    site = family.sites(model)[0]
    tokens = lay_out(site.streams, lengths, grid, regions=(1, 2))
    longer, other = family.add_text(call, extra.split([1, 2], 1)), extra.clone()
    other[:, 1:] = fresh(other[:, 1:])
    plain, changed = (
        dict(record(model, [site], with_regions))[site.path].v
        for with_regions in (longer, family.add_text(call, other.split([1, 2], 1)))
    )
    span = tokens.span("region:1")
    assert plain.shape[2] == tokens.length
    assert changed_rows(plain, changed) == set(range(span.start, span.stop))
    without = dict(record(model, [site], call))[site.path].v
    alone = lay_out(site.streams, lengths, grid)
    for stream, _, _ in alone.streams:
        assert torch.equal(plain[:, :, tokens.span(stream)], without[:, :, alone.span(stream)])


def test_single_blocks_of_flux_have_text_first():
    """Changing one text token changes exactly that row of the joined sequence in the first single block."""
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


def skipped(block, module):
    """A forward that hands its inputs through, in the order of `block.gives`."""
    signature, arguments = inspect.signature(module.forward), dict(block.takes)

    def forward(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        out = tuple(given[arguments[stream]] for stream in block.gives)
        return out if len(out) > 1 else out[0]

    return forward


def run(model, make):
    with torch.no_grad():
        out = model(**make())[0]
    return torch.stack(out) if isinstance(out, list) else out


def without(model, path, make):
    """The output of the model without a block: deleted from its list."""
    owner, index = path.rsplit(".", 1)
    parent, name = model.get_submodule(owner.rpartition(".")[0]), owner.rpartition(".")[2]
    kept = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(block for i, block in enumerate(kept) if i != int(index)))
    try:
        return run(model, make)
    finally:
        setattr(parent, name, kept)


def zeroed(model, path, make):
    """The output of the model with a block whose parameters are all zero, so that it adds nothing to its inputs."""
    module = model.get_submodule(path)
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    try:
        return run(model, make)
    finally:
        module.load_state_dict(saved)


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_block_is_a_block_that_is_not_there(name):
    build, make = BUILD[name]
    model = build()
    family = find_family(model)
    plain = run(model, make)
    # in these two, the place in the list also chooses the block's modulation or its text
    reference = zeroed if name in ("chroma", "hidream") else without
    for block in family.blocks(model):
        module = model.get_submodule(block.path)
        module.forward = skipped(block, module)
        try:
            got = run(model, make)
        finally:
            del module.forward
        assert torch.equal(got, reference(model, block.path, make)), block.path
        assert not torch.equal(got, plain), block.path
    assert torch.equal(run(model, make), plain)
