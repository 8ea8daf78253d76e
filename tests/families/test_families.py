"""The tables against the models: sites, blocks, lengths and grids of every family, and what cannot be told."""

import inspect
from functools import cache
from types import SimpleNamespace
from unittest.mock import create_autospec

import diffusers
import pytest
import torch
from torch import nn

import attnctrl as ac
from attnctrl.errors import AttnCtrlError
from attnctrl.families import FAMILIES, FLUX, SD3, find_denoiser, find_family
from attnctrl.sites import lay_out

from ..models import (
    TINY,
    flux_call,
    hidream_call,
    ltx_call,
    lumina2_call,
    mochi_call,
    qwen_image_call,
    sd3_call,
    sdxl_call,
    tiny_flux,
    tiny_sd3,
    tiny_sdxl,
    tiny_wan,
    unet_call,
    z_image_call,
)
from ..models.common import position_ids
from ..models.recorder import record


FAMILY = {family.name: family for family in FAMILIES}
BUILD = TINY | {"sd3.5": (lambda: tiny_sd3(dual=True), sd3_call), "sdxl": (tiny_sdxl, sdxl_call)}
NAMES = sorted(BUILD)
model_of = cache(lambda name: BUILD[name][0]())  # noqa: E731


def case(name):
    """(family, model, call); models are shared between tests and left as they are."""
    model = model_of(name)
    return find_family(model), model, BUILD[name][1]()


def test_every_family_has_a_tiny_model():
    assert set(TINY) == set(FAMILY) and len(FAMILY) == len(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_sites_exist_and_are_numbered_as_they_run(name):
    family, model, call = case(name)
    assert family.name == {"sd3.5": "sd3", "sdxl": "unet"}.get(name, name)
    sites, modules = family.sites(model), dict(model.named_modules())
    by_path = {site.path: site for site in sites}
    assert len(by_path) == len(sites) > 0
    for site in sites:  # a controlled processor takes the place of this attribute
        assert callable(modules[site.path].processor)
    numbers = [site.layer for site in sites if site.primary]
    assert sorted(numbers) == list(range(len(family.blocks(model))))

    seen = [path for path, _ in record(model, sites, call)]
    assert set(seen) == set(by_path), "every site runs, through scaled_dot_product_attention"
    layers = [by_path[path].layer for path in seen]
    assert layers == sorted(layers)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_heads_and_grid_are_what_attention_sees(name):
    family, model, call = case(name)
    sites = {site.path: site for site in family.sites(model)}
    lengths, grid = family.tokens(call, model)
    rows = family.rows(call)
    for index, (path, seen) in enumerate(record(model, sites.values(), call)):
        site, batch = sites[path], seen.q.shape[0]
        assert seen.q.shape[1] == seen.v.shape[1] == site.heads
        assert batch == (1 if name == "mochi" else rows)
        if site.kind == "cross":
            assert seen.k.shape[2] == lengths["text"]
        else:
            assert seen.k.shape[2] == seen.q.shape[2]
        if name == "mochi":  # the last of two rows has two text tokens less
            assert seen.q.shape[2] == lengths["image"] + 5 - 2 * (index % 2)
        elif lengths["image"] is not None:
            assert seen.q.shape[2] == lay_out(site.streams, lengths, grid).length
        elif index == 0:
            assert seen.q.shape[2] == grid[0] * grid[1]
    if lengths["image"] is not None:
        assert lengths["image"] == torch.tensor(grid).prod()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_name_what_goes_in_and_what_comes_out(name):
    family, model, call = case(name)
    modules, blocks, lengths = dict(model.named_modules()), family.blocks(model), {}
    assert [block.layer for block in blocks] == list(range(len(blocks)))
    order = family.run_order(model)
    assert set(order) <= set(modules) and (family.units or order == [block.path for block in blocks])

    def keep(path):
        def hook(module, args, kwargs, output):
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            lengths[path] = given, output if isinstance(output, tuple) else (output,)

        return modules[path].register_forward_hook(hook, with_kwargs=True)

    handles = [keep(block.path) for block in blocks]
    with torch.no_grad():
        model(**call)
    for handle in handles:
        handle.remove()
    for block in blocks:
        given, output = lengths[block.path]
        arguments = dict(block.takes)
        assert len(output) == len(block.gives)
        for stream, tensor in zip(block.gives, output):
            if tensor is not None:  # the last block of SD3 drops its text
                assert tensor.shape == given[arguments[stream]].shape


def test_families_are_found_by_class_and_base_class():
    for name in TINY:
        assert find_family(model_of(name)) is FAMILY[name]

    class Tuned(type(model_of("wan"))):
        pass

    tuned = Tuned.__new__(Tuned)
    nn.Module.__init__(tuned)
    assert find_family(tuned).name == "wan"
    with pytest.raises(AttnCtrlError, match="no family table for Linear.*FluxTransformer2DModel.*\n.*HINT"):
        find_family(nn.Linear(1, 1))


def test_layers_run_through_all_primary_stacks():
    assert [site.layer for site in FLUX.sites(tiny_flux())] == [0, 1, 2, 3]
    sites = SD3.sites(tiny_sd3(dual=True))
    assert [site.layer for site in sites if site.primary] == [0, 1, 2]
    assert [(site.path, site.layer) for site in sites if not site.primary] == [
        ("transformer_blocks.0.attn2", 0),
        ("transformer_blocks.1.attn2", 1),
    ]
    unet = FAMILY["unet"].sites(model_of("unet"))
    cross = {site.path: site.layer for site in unet if site.kind == "cross"}
    for site in unet:
        if site.primary:  # both attentions of a block have its number
            assert cross[site.path.replace("attn1", "attn2")] == site.layer
    assert [site.path.split(".")[0] for site in unet if site.primary] == (
        ["down_blocks"] * 2 + ["mid_block"] + ["up_blocks"] * 4
    )
    assert FAMILY["unet"].run_order(model_of("unet")) == [
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    ]
    assert {site.path.split(".")[-1] for site in FAMILY["sana"].sites(model_of("sana")) if site.primary} == {"attn2"}


def test_layout_keeps_base_text_and_image_together():
    for streams in (("image", "text"), ("text", "image")):
        tokens = lay_out(streams, {"image": 16, "text": 5}, (4, 4), regions=(3, 2))
        spans = sorted([tokens.span("image"), tokens.span("text")], key=lambda s: s.start)
        assert spans[0].stop == spans[1].start and tokens.length == 26


def test_grids_have_rows_first():
    assert SD3.grid(sd3_call(height=8, width=12), model_of("sd3")) == (4, 6)
    assert FLUX.grid(flux_call(rows=3, columns=5), model_of("flux")) == (3, 5)
    assert FAMILY["qwen_image"].grid(qwen_image_call(rows=3, columns=5), model_of("qwen_image")) == (3, 5)
    assert FAMILY["z_image"].grid(z_image_call(height=4, width=6), model_of("z_image")) == (2, 3)
    for model, call, first in ((model_of("unet"), unet_call, (9, 13)), (model_of("sdxl"), sdxl_call, (5, 7))):
        assert FAMILY["unet"].grid(call(height=9, width=13), model) == first
    for name in ("wan", "hunyuan_video", "ltx", "cogvideox", "mochi"):
        assert FAMILY[name].grid(TINY[name][1](), model_of(name)) == (2, 3, 4)


def test_odd_sizes_of_unets_round_up_between_blocks():
    for name, call in (("unet", unet_call), ("sdxl", sdxl_call)):
        model, inputs = model_of(name), call(height=6, width=10)
        inputs["sample"] = inputs["sample"][..., :5, :7]
        rows, columns = FAMILY["unet"].grid(inputs, model)
        (_, seen), *_ = record(model, FAMILY["unet"].sites(model), inputs)
        assert seen.q.shape[2] == rows * columns


def with_reference(name: str) -> dict:
    """A call with the 2 x 3 tokens of another picture behind the 4 x 4 of the latents."""
    call = TINY[name][1]()
    noise = torch.randn(2, 6, call["hidden_states"].shape[-1], generator=torch.Generator().manual_seed(5))
    call["hidden_states"] = torch.cat([call["hidden_states"], noise], dim=1)
    if name == "qwen_image":
        return call | {"img_shapes": [[(1, 4, 4), (1, 2, 3)]] * 2}
    ids = position_ids(2, 3, extra=call["img_ids"].shape[-1] - 3)
    ids[:, 0] = 10
    ids = ids.expand(*call["img_ids"].shape[:-2], -1, -1)
    return call | {"img_ids": torch.cat([call["img_ids"], ids], dim=-2)}


class Noting(ac.SoftPAG):
    """Keeps the layouts that it saw."""

    def edit(self, site, tokens, heads):
        LAYOUTS.append(tokens)
        return super().edit(site, tokens, heads)


LAYOUTS: list = []


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_reference_pictures_stand_behind_the_latents(name):
    family, model, call = FAMILY[name], model_of(name), with_reference(name)
    lengths, grid = family.tokens(call, model)
    assert lengths == {"text": 5, "image": 16, "reference": 6} and grid == (4, 4)
    LAYOUTS.clear()
    found = []
    with torch.no_grad():
        plain = model(**call)[0]
        for region in ("all", "image"):
            with ac.attach(model, Noting(layers="1:", region=region, scale=4.0)):
                found.append(model(**call)[0])
    assert {tokens.streams for tokens in LAYOUTS} == {(("text", 0, 5), ("image", 5, 21), ("reference", 21, 27))}
    assert not torch.equal(found[0], found[1]) and not any(torch.equal(out, plain) for out in found)
    if family.encode is not None and name != "flux2":
        region = ac.Region("left", box=(0, 0, 0.5, 1), prompt_embeds=torch.ones(1, 3, 16))
        with (
            ac.attach(model, ac.RegionalPrompts([region])),
            pytest.raises(AttnCtrlError, match="RegionalPrompts: this call carries reference images"),
        ):
            model(**call)


def test_pictures_that_cannot_be_placed_are_refused():
    flux, flux2 = flux_call(), TINY["flux2"][1]()
    flux["img_ids"][:, 0] = 1
    flux2["img_ids"] = flux2["img_ids"].clone()
    flux2["img_ids"][:, 5:, 0] = 10
    z_image, ltx = z_image_call(), ltx_call()
    z_image["x"] = [[row] for row in z_image["x"]]
    ltx["hidden_states"] = ltx["hidden_states"].repeat(1, 2, 1)
    for name, call, words in (
        ("flux", flux, "cannot be told"),
        ("flux2", flux2, "ids span"),
        ("z_image", z_image, "reference images"),
        ("ltx", ltx, "conditioning frames"),
    ):
        with pytest.raises(AttnCtrlError, match=words):
            FAMILY[name].grid(call, model_of(name))


def test_packed_prompts_of_different_length_have_no_common_layout():
    call = lumina2_call()
    assert FAMILY["lumina2"].tokens(call, model_of("lumina2"))[0] == {"text": 3, "image": 16}
    call["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    with pytest.raises(AttnCtrlError, match="2 to 4 tokens.*\nHINT: one prompt per call"):
        FAMILY["lumina2"].tokens(call, model_of("lumina2"))
    assert FAMILY["mochi"].tokens(mochi_call(), model_of("mochi"))[0]["text"] is None
    assert FAMILY["mochi"].tokens(mochi_call(missing=0), model_of("mochi"))[0]["text"] == 5


def test_z_image_sizes_must_agree():
    call = z_image_call()
    call["x"][1] = call["x"][1][..., :4]
    with pytest.raises(AttnCtrlError, match="differ in size"):
        FAMILY["z_image"].grid(call, model_of("z_image"))


def test_hidream_fills_pictures_that_are_not_square():
    family, model = FAMILY["hidream"], model_of("hidream")
    call = hidream_call(height=4, width=8)
    lengths, grid = family.tokens(call, model)
    assert grid == (2, 4) and lengths["image"] == 8 and lengths["padding"] == model.max_seq - 8
    (_, seen), *_ = record(model, family.sites(model), call)
    assert seen.q.shape[2] == lay_out(family.stacks[0].streams, lengths, grid).length
    padding = lay_out(family.stacks[0].streams, lengths, grid).span("padding")
    assert (seen.k[:, :, padding] == 0).all() and (seen.k[:, :, : padding.start] != 0).any()


def test_wan_attends_to_a_picture_in_a_call_of_its_own():
    model, call = tiny_wan(picture=True), TINY["wan"][1](text=512)
    call["encoder_hidden_states_image"] = torch.ones(2, 257, 16)
    cross = [c for path, c in record(model, FAMILY["wan"].sites(model), call) if path == "blocks.0.attn2"]
    assert [c.k.shape[2] for c in cross] == [257, FAMILY["wan"].tokens(call, model)[0]["text"]]


def test_rescaled_guidance_is_known():
    for name in ("unet", "ltx"):
        assert FAMILY[name].renormalizes(SimpleNamespace(guidance_rescale=0.7))
        assert not FAMILY[name].renormalizes(SimpleNamespace(guidance_rescale=0.0))
    assert FAMILY["z_image"].renormalizes(SimpleNamespace(_cfg_normalization=True))
    assert not FAMILY["z_image"].renormalizes(SimpleNamespace(_cfg_normalization=False))
    hunyuan = FAMILY["hunyuan_image"].renormalizes
    assert hunyuan(SimpleNamespace(guider=diffusers.AdaptiveProjectedMixGuidance()))
    assert not hunyuan(SimpleNamespace(guider=diffusers.AdaptiveProjectedMixGuidance(enabled=False)))
    assert not hunyuan(SimpleNamespace(guider=diffusers.ClassifierFreeGuidance()))
    assert not hunyuan(SimpleNamespace(guider=None))


@pytest.mark.parametrize(
    ("name", "pipeline", "count"),
    [
        ("sd3", "StableDiffusion3Pipeline", 4),
        ("flux", "FluxPipeline", 3),
        ("flux2", "Flux2Pipeline", 2),
        ("flux2", "Flux2KleinPipeline", 2),
        ("unet", "StableDiffusionPipeline", 2),
        ("unet", "StableDiffusionXLPipeline", 4),
        ("qwen_image", "QwenImagePipeline", 2),
        ("cogview4", "CogView4Pipeline", 2),
        ("auraflow", "AuraFlowPipeline", 4),
        ("wan", "WanPipeline", 2),
        ("cogvideox", "CogVideoXPipeline", 2),
    ],
)
def test_prompts_are_encoded_with_arguments_that_pipelines_know(name, pipeline, count):
    """`create_autospec` refuses arguments that the real `encode_prompt` does not take."""
    fake = create_autospec(getattr(diffusers, pipeline), instance=True)
    fake.tokenizer_max_length = 3
    fake.transformer = SimpleNamespace(
        config=SimpleNamespace(use_rotary_positional_embeddings=True, added_kv_proj_dim=None, max_text_seq_length=5)
    )
    fake.unet = SimpleNamespace(config=SimpleNamespace(addition_embed_type="text_time"))
    states = torch.ones(1, 5, 16)
    fake.encode_prompt.return_value = (states, *[None] * (count - 1))
    assert torch.equal(FAMILY[name].encode(fake, ["a cat"], 5, torch.device("cpu")), states)
    assert fake.encode_prompt.call_args.kwargs["prompt"] == ["a cat"]


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("pixart", "PixArtAlphaPipeline"),
        ("sana", "SanaPipeline"),
        ("ltx", "LTXPipeline"),
        ("hunyuan_image", "HunyuanImagePipeline"),
        ("hunyuan_video", "HunyuanVideoPipeline"),
    ],
)
def test_masked_prompts_are_appended_without_their_padding(name, pipeline):
    fake = create_autospec(getattr(diffusers, pipeline), instance=True)
    states, mask = torch.randn(1, 5, 16), torch.tensor([[1, 1, 1, 0, 0]])
    fake.encode_prompt.return_value = (states, None, mask) if name == "hunyuan_video" else (states, mask, None, None)
    assert torch.equal(FAMILY[name].encode(fake, ["a cat"], 5, torch.device("cpu")), states[:, :3])
    assert fake.encode_prompt.call_args.kwargs.get("max_sequence_length", 5) == 5
    call = TINY[name][1](missing=0) if FAMILY[name].trims else TINY[name][1]()
    longer = FAMILY[name].add_text(call, [states[:, :3], states[:, :2]])
    text, appended = call["encoder_attention_mask"], longer["encoder_attention_mask"]
    assert torch.equal(appended[:, :5], text) and bool((appended[:, 5:] == 1).all()) and appended.shape[1] == 10


def test_prompts_that_cannot_be_appended_are_refused():
    pooled = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(addition_embed_type="text")))
    with pytest.raises(AttnCtrlError, match="pools its text"):
        FAMILY["unet"].encode(pooled, ["a"], 77, torch.device("cpu"))
    fixed = SimpleNamespace(config=SimpleNamespace(use_rotary_positional_embeddings=False, max_text_seq_length=226))
    with pytest.raises(AttnCtrlError, match="226 text tokens.*\nHINT"):
        FAMILY["cogvideox"].encode(SimpleNamespace(transformer=fixed), ["a"], 226, torch.device("cpu"))
    picture = SimpleNamespace(config=SimpleNamespace(added_kv_proj_dim=5120))
    with pytest.raises(AttnCtrlError, match="exactly 512 text tokens"):
        FAMILY["wan"].encode(SimpleNamespace(transformer=picture), ["a"], 512, torch.device("cpu"))


def test_find_denoiser():
    class Pipe:
        transformer = model_of("sd3")

    class Old:
        unet = model_of("unet")

    pipe, old = Pipe(), Old()
    assert find_denoiser(pipe) == (pipe.transformer, pipe)
    assert find_denoiser(old) == (old.unet, old)
    assert find_denoiser(pipe.transformer) == (pipe.transformer, None)
    with pytest.raises(AttnCtrlError, match="neither a denoiser nor a pipeline"):
        find_denoiser(object())
