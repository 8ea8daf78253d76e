"""`SubjectLayout` on tiny pipelines with a random IP-Adapter, against dense attention of every picture in its place."""

import warnings

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import nn

import attnctrl as ac

from ..dense import DenseAttention, plain
from ..models import tiny_flux, tiny_sd3, tiny_sdxl, tiny_unet
from ..models.images import flux_call, sd3_call
from ..models.unets import sdxl_call, unet_call
from ..processors.tiny_pipelines import flux, ip_adapter_weights, random, sd, sd3_plain, sdxl
from .test_instances import instance_attention, regions
from .test_isolation import masks_of


LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0.25, 1, 1)
CROSSING = [(0, 0, 0.75, 1), (0.25, 0.25, 1, 0.75)]
WIDTH, TOKENS = 6, 4  # channels of a picture's embedding, tokens that UNets and FLUX make of it


def flux_weights(model, seed: int = 30) -> dict:
    """Of an IP-Adapter for the double blocks, as its file holds them."""
    found = {}
    for index in range(len(model.transformer_blocks)):
        for offset, name in enumerate(("to_k_ip", "to_v_ip")):
            found[f"{index}.{name}.weight"] = 0.3 * random(seed + 2 * index + offset, model.inner_dim, 16)
            found[f"{index}.{name}.bias"] = 0.1 * random(seed + 10 + index, model.inner_dim)
    image = {"proj.weight": random(7, TOKENS * 16, WIDTH), "proj.bias": torch.zeros(TOKENS * 16)}
    return {"image_proj": image | {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}, "ip_adapter": found}


def with_sd3_adapter(model, depth: int = 1):
    """An SD3 transformer with an adapter of 3 tokens per picture."""
    torch.manual_seed(3)
    size = model.config.attention_head_dim * model.config.num_attention_heads

    def processor():
        made = SD3IPAdapterJointAttnProcessor2_0(size, size, model.config.attention_head_dim, 16, scale=0.7)
        for parameter in made.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        return made

    model.set_attn_processor({name: processor() for name in model.attn_processors})
    model.image_proj = IPAdapterTimeImageProjection(
        embed_dim=WIDTH, output_dim=size, hidden_dim=16, depth=depth, heads=1, num_queries=3, timestep_in_dim=8
    )
    return model.eval()


class ReadEach(nn.Module):
    """SD3's reader of pictures, one picture after the other."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pictures, timestep):
        read = [self.inner(pictures[:, index], timestep) for index in range(pictures.shape[1])]
        return torch.cat([tokens for tokens, _ in read], 1), read[0][1]


def setup(name: str, pictures: int = 2, batch: int = 2):
    """(model, arguments of a call with random pictures, tokens per picture)."""
    embeds = random(8, batch, pictures, WIDTH)
    if name in ("unet", "sdxl"):
        model, inputs = (tiny_unet(), unet_call(batch)) if name == "unet" else (tiny_sdxl(), sdxl_call(batch))
        model._load_ip_adapter_weights([ip_adapter_weights(model)])
        added = {**inputs.get("added_cond_kwargs", {}), "image_embeds": [embeds]}
        return model, inputs | {"added_cond_kwargs": added}, TOKENS
    if name == "flux":
        model = tiny_flux()
        model._load_ip_adapter_weights([flux_weights(model)])
        return model, flux_call(batch) | {"joint_attention_kwargs": {"ip_adapter_image_embeds": [embeds]}}, TOKENS
    model = with_sd3_adapter(tiny_sd3(dual=name == "sd3.5"))
    embeds = random(8, batch, pictures, 5, WIDTH)
    return model, sd3_call(batch) | {"joint_attention_kwargs": {"ip_adapter_image_embeds": embeds}}, 3


def fresh(inputs: dict) -> dict:
    """The arguments with dictionaries of their own: FLUX and SD3 take entries out of them."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}


def in_places(boxes, tokens: int, joint: bool = False):
    """Dense formula: an adapter's attention, recognised by its number of keys, is that of each picture in its box, summed."""

    def attend(index, q, k, v):
        common = q.shape[2] if joint else 0
        if k.shape[2] != common + tokens * len(boxes):
            return plain(q, k, v)
        out = torch.zeros_like(q)
        for number, mask in enumerate(masks_of(boxes, round(q.shape[2] ** 0.5))):
            own = slice(common + number * tokens, common + (number + 1) * tokens)
            keys, values = (torch.cat([x[:, :, :common], x[:, :, own]], 2) for x in (k, v))
            out += plain(q, keys, values) * mask[:, None]
        return out

    return attend


NAMES = ("unet", "sdxl", "flux", "sd3", "sd3.5")


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_acts_in_its_place(name):
    model, inputs, tokens = setup(name)
    reader = getattr(model, "image_proj", None)
    with torch.no_grad():
        with ac.attach(model, ac.SubjectLayout([LEFT, RIGHT])) as session:
            got = model(**fresh(inputs))[0]
        assert "SubjectLayout" in session.report() and "acted" in session.report()
        if reader is not None:
            assert reader._compiled_call_impl is None
            model.image_proj = ReadEach(reader)
        whole = model(**fresh(inputs))[0]
        with DenseAttention(in_places([LEFT, RIGHT], tokens, joint=reader is not None)):
            wanted = model(**fresh(inputs))[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - whole).abs().max() > 1e-4


@pytest.mark.parametrize("name", ("unet", "flux", "sd3"))
def test_outside_its_place_a_picture_changes_nothing(name):
    """In the first attention with an adapter, bit for bit."""
    model, inputs, _ = setup(name)
    argument, key = (
        ("added_cond_kwargs", "image_embeds")
        if name == "unet"
        else ("joint_attention_kwargs", "ip_adapter_image_embeds")
    )
    path = next(
        path for path, module in model.named_modules() if hasattr(getattr(module, "processor", None), "to_k_ip")
    )
    seen = []

    def note(module, args, output):
        # FLUX hands the adapter's part out apart
        seen.append(output if isinstance(output, torch.Tensor) else output[2] if name == "flux" else output[0])

    handle = model.get_submodule(path).register_forward_hook(note)
    other = fresh(inputs)
    pictures = other[argument][key]
    first = (pictures if name == "sd3" else pictures[0]).clone()
    first[:, 0] += 1
    other[argument][key] = first if name == "sd3" else [first]
    with torch.no_grad(), ac.attach(model, ac.SubjectLayout([LEFT, RIGHT])):
        model(**fresh(inputs))
        before = seen[0]
        seen.clear()
        model(**other)
    handle.remove()
    mask = masks_of([LEFT], round(before.shape[1] ** 0.5))[0]
    assert torch.equal(before[:, ~mask], seen[0][:, ~mask])
    assert (before[:, mask] - seen[0][:, mask]).abs().amax(-1).min() > 0
    if name == "flux":
        outside = ~mask & ~masks_of([RIGHT], round(before.shape[1] ** 0.5))[0]
        assert (before[:, outside] == 0).all() and outside.any()


@pytest.mark.parametrize("overlap", ["priority", "mean", "sum"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_overlap_strength_and_feather_are_as_written(overlap, strength):
    places = [ac.Region("a", box=CROSSING[0], strength=0.5), ac.Region("b", box=CROSSING[1], feather=0.2)]
    control = ac.SubjectLayout(places, overlap=overlap, strength=strength)
    grid, common, tokens = (8, 8), 3, 5
    q, k, v = random(1, 2, 4, 66, 8), random(2, 2, 4, common + 2 * tokens, 8), random(3, 2, 4, common + 2 * tokens, 8)
    got = control.confine(q, k, v, grid=grid, subjects=range(2), pictures=2, common=common)
    inside = torch.stack([place.tokens(grid) for place in places]).double()
    soft = torch.stack([place.weights(grid) for place in places]).double()
    if overlap == "priority":
        soft[0] *= 1 - inside[1]
    elif overlap == "mean":
        soft = soft * soft.max(0).values / soft.sum(0).clamp(min=1e-9)
    share = torch.zeros(2, 66, dtype=torch.float64)
    share[:, :64] = soft * torch.tensor([[0.5], [1.0]])
    alone = [
        plain(q.double(), *(torch.cat([x[:, :, :common], x[:, :, at : at + tokens]], 2).double() for x in (k, v)))
        for at in (common, common + tokens)
    ]
    wanted = sum(one * weight[:, None] for one, weight in zip(alone, share))
    wanted = (1 - strength) * plain(q.double(), k.double(), v.double()) + strength * wanted
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    if strength == 1:
        assert (got[:, :, share.sum(0) == 0] == 0).all()


@pytest.mark.parametrize("name", ("unet", "flux"))
def test_neutral_and_scale_zero_are_bit_identical(name):
    model, inputs, _ = setup(name)
    with torch.no_grad():
        whole = model(**fresh(inputs))[0]
        for control in (ac.SubjectLayout(), ac.SubjectLayout([LEFT, RIGHT], strength=0)):
            with ac.attach(model, control):
                assert torch.equal(model(**fresh(inputs))[0], whole)
        with ac.attach(model, ac.SubjectLayout([LEFT, RIGHT])):
            assert not torch.equal(model(**fresh(inputs))[0], whole)
        assert torch.equal(model(**fresh(inputs))[0], whole)
        for processor in model.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.0]
        silent = model(**fresh(inputs))[0]
        with ac.attach(model, ac.SubjectLayout([LEFT, RIGHT])) as session:
            assert torch.equal(model(**fresh(inputs))[0], silent)
    assert ("scale is 0" in session.report()) == (name == "unet")  # FLUX multiplies by it


def test_layers_outside_keep_the_adapter_as_it_is():
    model, inputs, tokens = setup("flux")
    formula = in_places([LEFT, RIGHT], tokens)
    calls = []

    def second_alone(index, q, k, v):
        if k.shape[2] == 2 * tokens:
            calls.append(index)
        return formula(index, q, k, v) if len(calls) == 2 else plain(q, k, v)

    with torch.no_grad():
        with ac.attach(model, ac.SubjectLayout([LEFT, RIGHT], layers=1)):
            got = model(**fresh(inputs))[0]
        with DenseAttention(second_alone):
            wanted = model(**fresh(inputs))[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# -- pipelines: both halves of guidance --------------------------------------------------------------------------------------


def sd_run(adapters: int = 1, pictures: int = 2, make=sd):
    """A UNet pipeline with adapters and pictures; the negative half has zeros."""
    run = make()
    weights = [ip_adapter_weights(run.pipe.unet) for _ in range(adapters)]
    for number, one in enumerate(weights):
        one["ip_adapter"] = {name: value * (1 - 1.5 * number) for name, value in one["ip_adapter"].items()}
    run.pipe.unet._load_ip_adapter_weights(weights)
    run.pipe.set_ip_adapter_scale([0.8] * adapters)
    embeds = [
        torch.cat([torch.zeros(1, pictures, WIDTH), random(40 + number, 1, pictures, WIDTH)])
        for number in range(adapters)
    ]
    return run.where(ip_adapter_image_embeds=embeds)


def box_pixels(boxes, side: int = 64) -> torch.Tensor:
    """(1, boxes, side, side), as the masks of diffusers."""
    return torch.stack([mask.view(side, side) for mask in masks_of(boxes, side)])[None].float()


@pytest.mark.parametrize("make", [sd, sdxl])
def test_unet_pipelines_equal_the_masks_of_diffusers(make):
    run, boxes = sd_run(make=make), [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    wanted = run(cross_attention_kwargs={"ip_adapter_masks": [box_pixels(boxes)]})
    with ac.attach(run.pipe, ac.SubjectLayout(boxes)):
        got = run()
        with pytest.raises(ac.AttnCtrlError, match="ip_adapter_masks, and SubjectLayout places"):
            run(cross_attention_kwargs={"ip_adapter_masks": [box_pixels(boxes)]})
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert (got - run()).abs().max() > 1e-3


@pytest.mark.parametrize("scales", [[0.8, 0.5], [0.0, 0.5]])
def test_several_adapters_have_their_own_subjects(scales):
    """UNets leave out an adapter whose scale is 0."""
    run, boxes = sd_run(adapters=2, pictures=1), [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    run.pipe.set_ip_adapter_scale(scales)
    pixels = box_pixels(boxes)
    wanted = run(cross_attention_kwargs={"ip_adapter_masks": [pixels[:, :1], pixels[:, 1:]]})
    with ac.attach(run.pipe, ac.SubjectLayout(boxes)):
        got = run()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_the_window_opens_and_closes():
    run, control = sd_run(), ac.SubjectLayout([LEFT, RIGHT], start=0.3, stop=0.6)  # the second of three steps
    calls, plain_calls = [], []
    formula = in_places([LEFT, RIGHT], TOKENS)

    def middle(index, q, k, v):
        step = len(calls) // 7  # adapter calls of the UNet in a step
        if k.shape[2] == 2 * TOKENS:
            calls.append(index)
            return formula(index, q, k, v) if step == 1 else plain(q, k, v)
        plain_calls.append(index)
        return plain(q, k, v)

    with ac.attach(run.pipe, control):
        got = run()
    with DenseAttention(middle):
        wanted = run()
    assert len(calls) == 21
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_guidance_runs_its_weak_pass_under_the_layout():
    run, boxes = sd_run(), [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    guide = ac.SoftPAG(layers=[3], scale=2.0)
    with ac.attach(run.pipe, guide):
        wanted = run(cross_attention_kwargs={"ip_adapter_masks": [box_pixels(boxes)]})
    with ac.attach(run.pipe, guide, ac.SubjectLayout(boxes)):
        got = run()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def flux_run(cfg: bool = True):
    run = flux(cfg=cfg)
    run.pipe.transformer._load_ip_adapter_weights([flux_weights(run.pipe.transformer)])
    more = {"negative_ip_adapter_image_embeds": [random(9, 1, 1, WIDTH)]}  # one for all, as the pipeline's own zeros
    return run.where(ip_adapter_image_embeds=[random(8, 1, 2, WIDTH)], **more)


def test_flux_with_guidance_and_one_negative_picture():
    run = flux_run()
    formula = in_places([LEFT, RIGHT], TOKENS)

    def attend(index, q, k, v):
        if k.shape[2] == TOKENS:  # the unconditional call
            mask = torch.stack([*masks_of([LEFT, RIGHT], round(q.shape[2] ** 0.5))]).any(0)
            return plain(q, k, v) * mask[:, None]
        return formula(index, q, k, v)

    with ac.attach(run.pipe, ac.SubjectLayout([LEFT, RIGHT])):
        got = run()
    with DenseAttention(attend):
        wanted = run()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert (got - run()).abs().max() > 1e-3
    with ac.attach(run.pipe, ac.SubjectLayout([LEFT, RIGHT])):
        with pytest.raises(ac.AttnCtrlError, match="3 negative pictures for 2 subjects"):
            run.where(negative_ip_adapter_image_embeds=[random(9, 1, 3, WIDTH)])()


def test_flux_of_diffusers_takes_masks_and_ignores_them():
    run = flux_run(cfg=False)
    masks = {"ip_adapter_masks": [box_pixels([LEFT, RIGHT])]}
    assert torch.equal(run(joint_attention_kwargs=masks), run())
    with ac.attach(run.pipe, ac.SubjectLayout([LEFT, RIGHT])):
        with pytest.raises(ac.AttnCtrlError, match="joint_attention_kwargs has ip_adapter_masks"):
            run(joint_attention_kwargs=masks)


def test_sd3_reads_the_pictures_that_its_pipeline_encodes_side_by_side():
    """`prepare_ip_adapter_image_embeds` of several pictures gives one row each, which diffusers itself cannot read under guidance."""
    run = sd3_plain()
    with_sd3_adapter(run.pipe.transformer)
    negative, own = torch.zeros(2, 5, WIDTH), random(8, 2, 5, WIDTH)
    run = run.where(ip_adapter_image_embeds=torch.cat([negative, own]))
    with pytest.raises(RuntimeError):
        run()
    with ac.attach(run.pipe, ac.SubjectLayout([LEFT, RIGHT, LEFT], overlap="sum")):
        with pytest.raises(ac.AttnCtrlError, match="3 subjects, and the call brings 2 pictures"):
            run()
    with ac.attach(run.pipe, ac.SubjectLayout([LEFT, RIGHT])):
        got = run()
    run.pipe.transformer.image_proj = ReadEach(run.pipe.transformer.image_proj)
    run = run.where(ip_adapter_image_embeds=torch.stack([negative, own]))
    with DenseAttention(in_places([LEFT, RIGHT], 3, joint=True)):
        wanted = run()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("control", [ac.SoftPAG(layers=[0], scale=1e-6), ac.Isolation([LEFT, RIGHT])])
def test_sd3_hears_of_its_adapter_under_any_control(control):
    """Its pipeline drops the picture unless it finds the processors of an adapter; so a session shows those, with their scales."""
    run = sd3_plain()
    with_sd3_adapter(run.pipe.transformer)
    run.pipe.encode_image = lambda image, device: random(8, 1, 5, WIDTH)
    run, other = run.where(ip_adapter_image="a picture"), run.where(ip_adapter_image=None)
    without, whole = other(), run()
    with ac.attach(run.pipe, control):
        placed = run()
        assert (placed - other()).abs().max() > 1e-3
        if isinstance(control, ac.SoftPAG):
            torch.testing.assert_close(placed, whole, rtol=1e-3, atol=1e-3)
        run.pipe.set_ip_adapter_scale(0.0)
        silent = run()
    assert (silent - placed).abs().max() > 1e-3
    assert all(
        processor.scale == 0
        for processor in run.pipe.transformer.attn_processors.values()
        if hasattr(processor, "scale")
    )
    assert torch.equal(run(), without)


@pytest.mark.parametrize("make", [sd_run, lambda: flux_run(cfg=False)], ids=["sd", "flux"])
def test_scales_set_in_a_session_are_the_adapters(make):
    run = make()
    layout = ac.SubjectLayout([LEFT, RIGHT])
    run.pipe.set_ip_adapter_scale(0.4)
    with ac.attach(run.pipe, layout):
        wanted = run()
    run.pipe.set_ip_adapter_scale(1.0)
    with ac.attach(run.pipe, layout):
        strong = run()
        run.pipe.set_ip_adapter_scale(0.4)
        assert torch.equal(run(), wanted)
    assert not torch.equal(strong, wanted)
    assert "get_processor" not in vars(next(m for m in run.model.modules() if hasattr(m, "get_processor")))


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_joint_attention_keeps_its_regions_beside_it(name):
    """With region prompts in the sequence, the adapter's own call is still the one of each picture in its place."""
    model, inputs, tokens = setup(name)
    texts = ac.RegionalPrompts(regions([LEFT, RIGHT]), base_weight=0.2)
    with torch.no_grad():
        with ac.attach(model, texts, ac.SubjectLayout([LEFT, RIGHT])):
            got = model(**fresh(inputs))[0]
        if name == "sd3":
            model.image_proj = ReadEach(model.image_proj)
        with ac.attach(model, texts):
            whole = model(**fresh(inputs))[0]
            with DenseAttention(in_places([LEFT, RIGHT], tokens, joint=name == "sd3")):
                wanted = model(**fresh(inputs))[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - whole).abs().max() > 1e-4


def test_text_can_be_bound_to_regions_beside_it():
    """`RegionalPrompts` edits the attention to the text, `SubjectLayout` the adapter's."""
    model, inputs, tokens = setup("unet")
    boxes = [(0, 0, 0.5, 1), (0.5, 0.25, 1, 1)]
    couple = ac.RegionalPrompts.preset("attention_couple", regions(boxes))
    text = inputs["encoder_hidden_states"]
    captions = [region.prompt_embeds.expand(len(text), -1, -1) for region in couple.regions]
    to_text, to_pictures = instance_attention(boxes, 1.0), in_places([LEFT, RIGHT], tokens)

    def attend(index, q, k, v):
        return (to_pictures if k.shape[2] == 2 * tokens else to_text)(index, q, k, v)

    with torch.no_grad():
        with ac.attach(model, couple, ac.SubjectLayout([LEFT, RIGHT])):
            got = model(**fresh(inputs))[0]
        with DenseAttention(attend):
            wanted = model(**fresh(inputs) | {"encoder_hidden_states": torch.cat([text, *captions], 1)})[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# -- what is refused -------------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    for arguments, match in (
        ({"subjects": "a@0,0,1,1"}, "is no list of subjects\nHINT: SubjectLayout"),
        ({"subjects": ac.Region("a", box=LEFT)}, "is no list of subjects"),
        ({"subjects": [LEFT], "overlap": "union"}, "overlap='union' is not one of priority, mean, sum"),
        ({"subjects": [LEFT], "strength": 1.5}, "strength=1.5 is not between"),
        ({"subjects": [[LEFT, RIGHT]]}, "subject 1 has 2 places"),
        ({"subjects": [(0, 0, 2, 1)]}, "reaches outside 0-1"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=match):
            ac.SubjectLayout(**arguments)


def test_models_without_adapter_and_calls_without_pictures_are_refused():
    with pytest.raises(ac.AttnCtrlError, match="UNet2DConditionModel has none\nHINT: pipe.load_ip_adapter"):
        ac.attach(tiny_unet(), ac.SubjectLayout([LEFT]))
    model, inputs, _ = setup("flux")
    with pytest.raises(ac.AttnCtrlError, match="no IP-Adapter is in layers '2:'\nHINT: it is in 0, 1"):
        ac.attach(model, ac.SubjectLayout([LEFT], layers="2:"))
    with pytest.raises(ac.AttnCtrlError, match="two SubjectLayouts"):
        ac.attach(model, ac.SubjectLayout([LEFT]), ac.SubjectLayout([RIGHT]))
    with torch.no_grad(), ac.attach(model, ac.SubjectLayout([LEFT, RIGHT, LEFT])):
        with pytest.raises(
            ac.AttnCtrlError, match="3 subjects, and the call brings 2 pictures\nHINT: one picture per subject"
        ):
            model(**fresh(inputs))
        with pytest.raises(ac.AttnCtrlError, match="3 subjects, and the call brings no pictures"):
            model(**fresh(inputs) | {"joint_attention_kwargs": None})
        few = {"ip_adapter_image_embeds": [random(8, 1, 3, WIDTH)]}
        with pytest.raises(ac.AttnCtrlError, match="have 1 rows, and the batch has 2"):
            model(**fresh(inputs) | {"joint_attention_kwargs": few})


def test_places_that_vanish_are_refused():
    model, inputs, _ = setup("flux")
    for subjects, match in (
        ([LEFT, (0, 0, 0.05, 0.05)], "covers no token of the 4 x 4 grid"),
        ([LEFT, (0, 0, 1, 1)], "subject 1 lies wholly under later subjects"),
    ):
        with (
            torch.no_grad(),
            ac.attach(model, ac.SubjectLayout(subjects)),
            pytest.raises(ac.AttnCtrlError, match=match),
        ):
            model(**fresh(inputs))
    model, inputs, _ = setup("unet")
    with torch.no_grad(), ac.attach(model, ac.SubjectLayout([LEFT, (0.5, 0, 0.625, 0.125)])):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model(**fresh(inputs))
    assert any("keeps one there" in str(one.message) for one in told)
