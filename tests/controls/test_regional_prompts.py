import itertools
import warnings

import diffusers
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import attnctrl as ac
from attnctrl.attention import Plan, run
from attnctrl.families import find_family
from attnctrl.icons.recipes.text import LENGTH, build_tokenizer
from attnctrl.sites import Site, Tokens

from ..dense import DenseAttention, plain, scores
from ..models import (
    TINY,
    auraflow_call,
    flux_call,
    sd3_call,
    sdxl_call,
    tiny_auraflow,
    tiny_flux,
    tiny_sd3,
    tiny_sdxl,
    tiny_unet,
    unet_call,
)
from ..processors.tiny_pipelines import PIPELINES, assemble, tiny_vae


TEXT = 5
LENGTHS = (6, 3)


def embeds(index: int) -> torch.Tensor:
    return torch.randn(1, LENGTHS[index], 16, generator=torch.Generator().manual_seed(10 + index))


def make(boxes, **options) -> ac.RegionalPrompts:
    regions = [ac.Region("ab"[i], box=box, prompt_embeds=embeds(i)) for i, box in enumerate(boxes)]
    return ac.RegionalPrompts(regions, **options)


DISJOINT = [(0, 0, 0.5, 1), (0.5, 0.25, 1, 1)]
COVERING = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
CROSSING = [(0, 0, 0.75, 1), (0.25, 0.25, 1, 0.75)]


JOINT = {"sd3": (tiny_sd3, sd3_call), "flux": (tiny_flux, flux_call), "auraflow": (tiny_auraflow, auraflow_call)}


def dense_output(family, masks, q, k, v, *, base_weight, isolate, overlap, active=True, hub=False):
    """Two dense branches blended, from the table of the paper, written over token roles. Order of tokens: as the model sees them."""
    n_image = masks.shape[1]
    image = [("I", p) for p in range(n_image)]
    extra = [("T", r) for r in range(len(LENGTHS)) for _ in range(LENGTHS[r])]
    base = [("B", 0)] * (8 if family == "hunyuan_image" else TEXT)  # with three tokens of glyphs
    registers = [("R", 0)] * 8
    orders = {"sd3": image + base + extra, "flux": extra + base + image, "auraflow": registers + base + extra + image}
    roles: list[tuple[str, int]] = orders.get(family, orders["sd3"])
    n = len(roles)
    priority = masks.clone()
    for r in range(len(masks) - 1):
        priority[r] &= ~masks[r + 1 :].any(0)
    member = priority if overlap == "priority" else masks

    def allowed(kind: str, only: int | None = None) -> torch.Tensor:
        table = torch.zeros(n, n, dtype=torch.bool)
        for i, (a, x) in enumerate(roles):
            for j, (b, y) in enumerate(roles):
                if a in "BR" or (a == "I" and kind == "base"):
                    ok = b in "BIR"
                elif a == "T":
                    ok = b == "R" or (b == "T" and x == y) or (b == "I" and bool(member[x, y]))
                else:
                    mine = [only] if only is not None else [r for r in range(len(masks)) if member[r, x]]
                    seen = b == "I" and (not isolate or any(member[r, y] for r in mine))
                    ok = b == "R" or (b == "T" and y in mine) or seen or (b == "I" and hub and not masks[:, y].any())
                table[i, j] = ok
        return table

    out = plain(q, k, v, allowed("base"))
    is_image = torch.tensor([a == "I" for a, _ in roles])
    covered = torch.zeros(n, dtype=torch.bool)
    covered[is_image] = member.any(0)
    if not active:
        return out
    if overlap == "mean":
        regional, count = torch.zeros_like(out), torch.zeros(n, dtype=torch.float64)
        for r in range(len(masks)):
            rows = torch.zeros(n, dtype=torch.bool)
            rows[is_image] = member[r]
            table = allowed("regional", r)
            table[~rows] = True
            regional[:, :, rows] += plain(q, k, v, table)[:, :, rows]
            count += rows
        regional = regional / count.clamp(min=1)[None, None, :, None]
    else:
        table = allowed("regional")
        table[~covered & is_image] = True
        regional = plain(q, k, v, table)
    share = (1 - base_weight) * covered.double()[None, None, :, None]
    return share * regional + (1 - share) * out


def with_texts(inputs: dict, family: str) -> dict:
    """The call with the region prompts where the model expects them."""
    extra = torch.cat([embeds(0), embeds(1)], 1).expand(2, -1, -1)
    text = inputs["encoder_hidden_states"]
    longer = {**inputs, "encoder_hidden_states": torch.cat([extra, text] if family == "flux" else [text, extra], 1)}
    if "txt_ids" in inputs:
        longer["txt_ids"] = torch.zeros(longer["encoder_hidden_states"].shape[1], 3)
    if "encoder_attention_mask" in inputs:
        longer["encoder_attention_mask"] = F.pad(inputs["encoder_attention_mask"], (0, sum(LENGTHS)), value=1)
    return longer


def check_joint(family, boxes, *, base_weight, isolate=True, overlap="union", hub=False):
    build, call = JOINT[family]
    model, inputs = build(), call()
    control = make(boxes, base_weight=base_weight, isolate=isolate, overlap=overlap, hub=hub)
    masks = torch.stack([region.tokens((4, 4)) for region in control.regions])

    def formula(index, q, k, v):
        return dense_output(family, masks, q, k, v, base_weight=base_weight, isolate=isolate, overlap=overlap, hub=hub)

    with torch.no_grad():
        with DenseAttention(formula):
            wanted = model(**with_texts(inputs, family))[0]
        with ac.attach(model, control):
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (got - model(**inputs)[0]).abs().max() > 5e-4


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("boxes", [DISJOINT, COVERING, CROSSING], ids=["disjoint", "covering", "crossing"])
@pytest.mark.parametrize("overlap", ["union", "priority", "mean"])
@pytest.mark.parametrize(("base_weight", "isolate"), [(0.0, True), (0.3, True), (0.3, False)])
def test_equals_dense_masks(family, boxes, overlap, base_weight, isolate):
    check_joint(family, boxes, base_weight=base_weight, isolate=isolate, overlap=overlap)


@pytest.mark.parametrize(("boxes", "overlap", "isolate"), [(DISJOINT, "union", True), (CROSSING, "mean", False)])
def test_registers_are_seen_by_all(boxes, overlap, isolate):
    check_joint("auraflow", boxes, base_weight=0.0, isolate=isolate, overlap=overlap)


@pytest.mark.parametrize("name", ["hunyuan_image", "hunyuan_video"])
def test_refined_texts_equal_dense_masks(name):
    """Each prompt passes the token refiner alone; padding that all prompts have is cut off."""
    model, call = TINY[name][0](), TINY[name][1]
    inputs, control = call(missing=0), make(CROSSING, base_weight=0.1)
    grid = find_family(model).tokens(inputs, model)[1]
    masks = torch.stack([region.tokens(grid) for region in control.regions])
    padded = {**inputs, "encoder_hidden_states": F.pad(inputs["encoder_hidden_states"], (0, 0, 0, 2), value=7.0)}
    padded["encoder_attention_mask"] = F.pad(inputs["encoder_attention_mask"], (0, 2))
    prompts = [inputs["encoder_hidden_states"], *(embeds(i).expand(2, -1, -1) for i in range(2))]
    with torch.no_grad():
        before = model(**padded)[0]
        refined = [
            model.context_embedder(text, inputs["timestep"], torch.ones(2, text.shape[1], dtype=torch.bool))
            for text in prompts
        ]
        with ac.attach(model, control):
            got, from_padded = model(**inputs)[0], model(**padded)[0]
            with pytest.raises(ac.AttnCtrlError, match="3 to 5 tokens.*\nHINT: one prompt"):
                model(**call(missing=2))
        assert torch.equal(model(**padded)[0], before)

        def formula(index, q, k, v):
            return dense_output(name, masks, q, k, v, base_weight=0.1, isolate=True, overlap="union")

        model.context_embedder.forward = lambda *args: torch.cat(refined, 1)
        with DenseAttention(formula):
            wanted = model(**with_texts(inputs, name))[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(from_padded, wanted, rtol=1e-4, atol=1e-5)
    assert (got - before).abs().max() > 5e-4


@pytest.mark.parametrize(("boxes", "overlap"), [(DISJOINT, "union"), (CROSSING, "mean"), (CROSSING, "priority")])
def test_a_hub_shares_the_background(boxes, overlap):
    check_joint("sd3", boxes, base_weight=0.3, overlap=overlap, hub=True)


# -- models that attend to the text apart ------------------------------------------------------------------------------


class DenseCalls(TorchFunctionMode):
    """Replaces every attention call by `formula(q, k, v, mask)`, all in float64; the mask is what is added to the logits."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
        q, k, v = (named[name] for name in ("query", "key", "value"))
        mask = named.get("attn_mask")
        return self.formula(q.double(), k.double(), v.double(), 0 if mask is None else mask.double()).to(q.dtype)


def split_output(control, grids, q, k, v, mask, *, active=True):
    """Attention couple and isolated self-attention, from which prompts and places every image token may see."""
    base_weight, overlap = control.base_weight, control.overlap
    member = torch.stack([region.tokens(grids[q.shape[2]], keep=True) for region in control.regions])
    soft = torch.stack([region.weights(grids[q.shape[2]], keep=True) for region in control.regions]).double()
    if overlap == "priority":
        member[0] &= ~member[1]
    owner = torch.tensor([-1] * TEXT + [r for r in range(len(LENGTHS)) for _ in range(LENGTHS[r])])
    cross = k.shape[2] == len(owner)
    assert cross or k.shape[2] == q.shape[2]

    def attend(allowed):
        logits = (scores(q, k) + mask).masked_fill(~allowed, -torch.inf)
        return logits.softmax(-1).nan_to_num() @ v

    def regional(own):
        """Rows p of regions own[:, p]."""
        if cross:
            return attend(torch.stack([own[r] for r in owner.clamp(min=0)], 1) & (owner >= 0))
        together = (own[:, :, None] & member[:, None, :]).any(0)
        return attend(together | own.any(0)[:, None] if not control.isolate else together)

    out = attend(owner == -1) if cross else attend(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))
    if not active or not (cross or control.isolate):
        return out
    soft = soft * member
    top = soft.max(0).values[:, None]
    if overlap == "mean":
        parts = [soft[r][:, None] * regional(member * (torch.arange(len(member)) == r)[:, None]) for r in range(2)]
        steered = sum(parts) / soft.sum(0).clamp(min=1e-9)[:, None]
    else:
        steered = regional(member)
    share = control.strength * (1 - base_weight) * top
    return share * steered + (1 - share) * out


SPLIT = {name: TINY[name] for name in ("unet", "pixart", "wan", "ltx", "sana")} | {"sdxl": (tiny_sdxl, sdxl_call)}


def check_split(name, control):
    build, call = SPLIT[name]
    model, inputs = build(), call()
    grids = {16: (4, 4), 64: (8, 8), 24: (2, 3, 4)}
    assert (grid := find_family(model).tokens(inputs, model)[1]) == grids[torch.tensor(grid).prod().item()]
    with torch.no_grad():
        with DenseCalls(lambda *call: split_output(control, grids, *call)):
            wanted = model(**with_texts(inputs, name))[0]
        with ac.attach(model, control):
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (got - model(**inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("boxes", [DISJOINT, COVERING, CROSSING], ids=["disjoint", "covering", "crossing"])
@pytest.mark.parametrize("overlap", ["union", "priority", "mean"])
@pytest.mark.parametrize(("base_weight", "isolate"), [(0.0, True), (0.3, True), (0.3, False)])
def test_unet_equals_dense_masks(boxes, overlap, base_weight, isolate):
    check_split("unet", make(boxes, base_weight=base_weight, isolate=isolate, overlap=overlap))


@pytest.mark.parametrize("name", [name for name in SPLIT if name != "unet"])
@pytest.mark.parametrize(("boxes", "overlap"), [(DISJOINT, "union"), (CROSSING, "mean")])
def test_cross_attention_equals_dense_masks(name, boxes, overlap):
    check_split(name, make(boxes, base_weight=0.3, isolate=name != "sana", overlap=overlap))


@pytest.mark.parametrize("overlap", ["union", "priority", "mean"])
def test_soft_edges_equal_dense_weights(overlap):
    regions = [
        ac.Region("ab"[i], box=box, prompt_embeds=embeds(i), feather=0.2, strength=1.0)
        for i, box in enumerate(CROSSING)
    ]
    check_split("unet", ac.RegionalPrompts(regions, base_weight=0.1, overlap=overlap))


def test_other_layers_of_a_unet_follow_the_base_prompt():
    model, inputs = tiny_unet(), unet_call()
    control = make(DISJOINT, base_weight=0.2, layers="1")
    calls = []

    def formula(*call):
        calls.append(call)
        return split_output(control, {64: (8, 8), 16: (4, 4)}, *call, active=len(calls) in (3, 4))

    with torch.no_grad(), DenseCalls(formula):
        wanted = model(**with_texts(inputs, "unet"))[0]
    with torch.no_grad(), ac.attach(model, control):
        torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPLIT)
def test_one_region_everywhere_is_that_prompt_alone_in_cross_attention(name):
    build, call = SPLIT[name]
    model, inputs = build(), call()
    with torch.no_grad():
        with ac.attach(model, make([(0, 0, 1, 1)], base_weight=0, isolate=name != "sana")):
            got = model(**inputs)[0]
        alone = {**inputs, "encoder_hidden_states": embeds(0).expand(2, -1, -1)}
        if "encoder_attention_mask" in inputs:
            alone["encoder_attention_mask"] = torch.ones(2, LENGTHS[0], dtype=torch.int64)
        wanted = model(**alone)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_region_that_a_coarser_level_loses_keeps_one_token_there():
    model, inputs = tiny_unet(), unet_call()
    small = [(0.25, 0.25, 0.375, 0.375), (0.5, 0.25, 1, 1)]
    control = make(small)
    with pytest.warns(UserWarning, match="region 'a' covers no token of the 4 x 4 grid of a coarser level"):
        check_split("unet", control)
    tiny = make([(0.26, 0.26, 0.3, 0.3)])
    with (
        torch.no_grad(),
        ac.attach(model, tiny),
        pytest.raises(ac.AttnCtrlError, match="region 'a' covers no token of the 8 x 8 grid"),
    ):
        model(**inputs)


def test_linear_attention_cannot_isolate():
    model = TINY["sana"][0]()
    with pytest.raises(ac.AttnCtrlError, match="linear.*\nHINT: isolate=False"):
        ac.attach(model, make(DISJOINT))


CFG = ("sd", "sd ControlNet", "sd IP-Adapter", "sdxl", "pixart", "sana", "ltx", "wan", "auraflow", "hunyuan image")


@pytest.mark.parametrize("name", CFG)
def test_unconditional_rows_are_as_without_regions(name):
    """The first prediction of a run with classifier-free guidance, with regions and without."""
    run = PIPELINES[name]()
    if name == "hunyuan image":  # prompts of one length
        run = run.where(prompt_embeds_mask=torch.ones(2, 5, dtype=torch.int64))
    found = []
    handle = run.model.register_forward_hook(lambda m, a, out: found.append(out[0].clone()))
    firsts, parts = [], set(run.model.state_dict())
    for controls in ((), (make(COVERING, isolate=name != "sana"),)):
        found.clear()
        with ac.attach(run.pipe, *controls):
            run()
        firsts.append(found[:2] if name in ("wan", "hunyuan image") else found[0].chunk(2)[::-1])
    handle.remove()
    assert set(run.model.state_dict()) == parts
    (cond, uncond), (other_cond, other_uncond) = firsts
    torch.testing.assert_close(other_uncond, uncond, rtol=1e-4, atol=1e-5)
    assert (other_cond - cond).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_without_guidance_every_row_follows_the_regions(name):
    run = PIPELINES[name]().where(guidance_scale=1.0)
    before = run()
    with ac.attach(run.pipe, make(COVERING), ac.SoftPAG(layers=[1], scale=1.0)) as session:
        after = run()
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before))
    assert session.calls["perturbed passes"] == run.inputs["num_inference_steps"]


def clip(cls, tokenizer, width: int, projection: int):
    torch.manual_seed(width)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **ends,
    )
    return cls(config).eval()


def test_prompts_are_encoded_as_stable_diffusion_does(tmp_path):
    """A region everywhere without base weight is the prompt itself, through one text encoder or the two of SDXL."""
    tokenizer = build_tokenizer(tmp_path, captions=50)
    sd = assemble(
        diffusers.StableDiffusionPipeline,
        unet=tiny_unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        vae=tiny_vae(),
        requires_safety_checker=False,
        tokenizer=tokenizer,
        text_encoder=clip(CLIPTextModel, tokenizer, 16, 8),
    )
    xl = assemble(
        diffusers.StableDiffusionXLPipeline,
        unet=tiny_sdxl(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        vae=tiny_vae(),
        add_watermarker=False,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=clip(CLIPTextModel, tokenizer, 8, 8),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 8, 12),
    )
    control = ac.RegionalPrompts(["a blue fish@0,0,1,1"], base_weight=0)
    for pipe in (sd, xl):
        options = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
        seed = lambda: {"generator": torch.Generator().manual_seed(1)}  # noqa: E731
        alone = {"prompt": "a blue fish"}
        if pipe is xl:  # the pooled text is the base prompt's
            parts = [
                pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=True, negative_prompt="")
                for prompt in ("a red cat", "a blue fish")
            ]
            names = (
                "prompt_embeds",
                "negative_prompt_embeds",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            )
            alone = dict(zip(names, (parts[1][0], *parts[0][1:])))
        wanted = pipe(**alone, **options, **seed()).images
        with ac.attach(pipe, control):
            got = pipe("a red cat", negative_prompt="", **options, **seed()).images
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
        assert (pipe("a red cat", **options, **seed()).images - wanted).abs().max() > 1e-3


def split_places(side: int) -> list[ac.Region]:
    cells = [(x / side, y / side) for y in range(side) for x in range(side)]
    return [ac.Region(f"cell {i}", box=(x, y, x + 1 / side, y + 1 / side)) for i, (x, y) in enumerate(cells)]


@pytest.mark.parametrize("kind", ["joint", "cross", "self"])
def test_sixty_four_regions_of_one_token(kind):
    """Each image token sees its own prompt and itself; each prompt sees itself and its token."""
    side, length = 8, 2
    image, texts = [("image", side**2)], [("text", 3), *((f"region:{i}", length) for i in range(side**2))]
    streams = {"joint": image + texts, "cross": texts, "self": image}[kind]
    ends = list(itertools.accumulate(n for _, n in streams))
    tokens = Tokens(tuple((s, e - n, e) for (s, n), e in zip(streams, ends)), (side, side))
    site = Site("attn", 0, kind, 2, ("image", "text"))
    edit = ac.RegionalPrompts(split_places(side), base_weight=0).edit(site, tokens, torch.ones(2))
    roles = [(s.split(":")[0], int(s[7:]) if ":" in s else i) for s, n in streams for i in range(n)]
    rows = [("image", i) for i in range(side**2)] if kind == "cross" else roles

    def sees(a, b):
        (one, i), (other, j) = a, b
        return other in ("image", "text") if one == "text" else other != "text" and i == j

    allowed = torch.tensor([[sees(a, b) for b in roles] for a in rows])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, len(n), 8, generator=generator, dtype=torch.float64) for n in (rows, roles, roles))
    Plan(edit.segments).check(len(rows), len(roles), heads=2)
    torch.testing.assert_close(run(q, k, v, Plan(edit.segments)), plain(q, k, v, allowed))


def test_a_mask_of_one_pixel():
    mask = torch.zeros(16, 16)
    mask[5, 9] = 1
    model, inputs = tiny_sd3(), sd3_call()
    for downsample, said in (("area", "region 'dot' covers no token of the 4 x 4 grid"), ("max", None)):
        region = ac.Region("dot", mask=mask, downsample=downsample, prompt_embeds=embeds(0))
        with torch.no_grad(), ac.attach(model, ac.RegionalPrompts([region])):
            if said:
                with pytest.raises(ac.AttnCtrlError, match=said):
                    model(**inputs)
            else:
                assert region.tokens((4, 4)).nonzero().flatten().tolist() == [6]
                assert model(**inputs)[0].isfinite().all()


def test_masks_of_other_proportions_are_named():
    model = tiny_sd3()
    square = ac.RegionalPrompts([ac.Region("square", mask=torch.ones(32, 32), prompt_embeds=embeds(0))])
    with torch.no_grad(), ac.attach(model, square):
        with pytest.warns(UserWarning, match="region 'square': a mask of 32 x 32 is stretched over .* 8 x 4 tokens"):
            model(**sd3_call(height=8, width=16))
    wide = ac.RegionalPrompts([ac.Region("wide", mask=torch.ones(31, 66), prompt_embeds=embeds(0))])
    with torch.no_grad(), ac.attach(model, wide), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**sd3_call(height=8, width=16))
    with pytest.raises(ac.AttnCtrlError, match=r"region 'rgb': a mask is \(H, W\), got \(8, 8, 3\)"):
        ac.Region("rgb", mask=torch.zeros(8, 8, 3))


def test_sites_apart_take_two_controls():
    """Isolation in self-attention and phrases in cross-attention share no site of a UNet, and all of SD3's."""
    boxes = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    phrases = ac.ConstrainedCrossAttention({"a": boxes[0]}, {"a": (1, 2)})
    model, inputs = tiny_unet(), unet_call()

    def formula(index, q, k, v):
        grid = {64: (8, 8), 16: (4, 4)}[q.shape[2]]
        left, right = (ac.Region("", box=box).tokens(grid) for box in boxes)
        if k.shape[2] == q.shape[2]:
            return plain(q, k, v, ~(left[:, None] & right) & ~(right[:, None] & left))
        said = torch.zeros(k.shape[2], dtype=torch.bool)
        said[1:3] = True
        return plain(q, k, v, left[:, None] | ~said)

    with torch.no_grad(), DenseAttention(formula):
        wanted = model(**inputs)[0]
    with torch.no_grad(), ac.attach(model, ac.Isolation(boxes), phrases):
        torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ac.AttnCtrlError, match="Isolation and ConstrainedCrossAttention both decide .* at 2 sites"):
        ac.attach(tiny_sd3(layers=2), ac.Isolation(boxes), phrases)
    late = ac.ConstrainedCrossAttention({"a": boxes[0]}, {"a": (1, 2)}, layers="1")
    with torch.no_grad(), ac.attach(model := tiny_sd3(layers=2), ac.Isolation(boxes, layers="0"), late) as session:
        model(**sd3_call())
        assert all(session.hits[control] for control in session.controls)


def test_presets():
    regions = make(DISJOINT).regions
    for name in ("instantx", "attention_couple", "bounded", "omost"):
        assert isinstance(ac.RegionalPrompts.preset(name, regions), ac.RegionalPrompts)
    published = ac.RegionalPrompts.preset("instantx", regions)
    assert published.schedule.covers(24) == 5 and published.isolate
    couple = ac.RegionalPrompts.preset("attention_couple", regions, base_weight=0.4)
    assert couple.overlap == "mean" and couple.base_weight == 0.4
    unet = find_family(tiny_unet()).sites(tiny_unet())
    assert {site.kind for site in unet if site.path in couple.touches(unet)} == {"cross"}
    with pytest.raises(ac.AttnCtrlError, match="no preset 'other'\nHINT: instantx"):
        ac.RegionalPrompts.preset("other", regions)


def test_noise_levels_limit_the_window():
    model, inputs = tiny_sd3(), sd3_call()
    with torch.no_grad():
        before = model(**inputs)[0]
        with ac.attach(model, make(DISJOINT, sigma=(0.5, 1.0))) as session:
            session.set_step(1, 4, sigma=0.4)
            assert torch.equal(model(**inputs)[0], before)
            session.set_step(0, 4, sigma=0.8)
            assert not torch.equal(model(**inputs)[0], before)


def test_other_layers_follow_the_base_prompt():
    model, inputs = tiny_sd3(), sd3_call()
    control = make(DISJOINT, base_weight=0.2, layers="1")
    masks = torch.stack([region.tokens((4, 4)) for region in control.regions])
    longer = dict(inputs)
    longer["encoder_hidden_states"] = torch.cat(
        [inputs["encoder_hidden_states"], torch.cat([embeds(0), embeds(1)], 1).expand(2, -1, -1)], 1
    )

    def formula(index, q, k, v):
        return dense_output("sd3", masks, q, k, v, base_weight=0.2, isolate=True, overlap="union", active=index == 1)

    with torch.no_grad(), DenseAttention(formula):
        wanted = model(**longer)[0]
    with torch.no_grad(), ac.attach(model, control):
        torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neutral", [{"strength": 0}, {"base_weight": 1}, {"regions": ()}])
def test_neutral_is_bit_identical(neutral):
    model, inputs = tiny_sd3(), sd3_call()
    control = ac.RegionalPrompts(**{"regions": make(DISJOINT).regions, **neutral})
    with torch.no_grad():
        before = model(**inputs)[0]
        with ac.attach(model, control):
            assert torch.equal(model(**inputs)[0], before)


def test_one_region_everywhere_is_that_prompt_alone():
    """With base weight 0 and one full region the picture follows the region's prompt, as if it were the base prompt."""
    model, inputs = tiny_sd3(), sd3_call(text=LENGTHS[0])
    with torch.no_grad():
        with ac.attach(model, make([(0, 0, 1, 1)], base_weight=0)):
            got = model(**inputs)[0]
        wanted = model(**{**inputs, "encoder_hidden_states": embeds(0).expand(2, -1, -1)})[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_isolated_regions_do_not_hear_each_other_within_a_block():
    model, inputs = tiny_sd3(layers=2), sd3_call()
    outs = []
    for seed in (1, 2):
        other = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(seed))
        regions = [
            ac.Region("a", box=COVERING[0], prompt_embeds=embeds(0)),
            ac.Region("b", box=COVERING[1], prompt_embeds=other),
        ]
        caught = []
        handle = model.transformer_blocks[0].register_forward_hook(
            lambda m, a, out, caught=caught: caught.append(out[1])
        )
        with torch.no_grad(), ac.attach(model, ac.RegionalPrompts(regions, base_weight=0)):
            model(**inputs)
        handle.remove()
        outs.append(caught[0].reshape(2, 4, 4, -1))
    assert torch.equal(outs[0][:, :, :2], outs[1][:, :, :2])
    assert not torch.allclose(outs[0][:, :, 2:], outs[1][:, :, 2:])


def test_second_attention_of_sd35_is_isolated_too():
    model, inputs = tiny_sd3(dual=True), sd3_call()
    with ac.attach(model, make(COVERING)) as session:
        assert any(path.endswith("attn2") for path in session._strengths[session.controls[0]])
        with torch.no_grad():
            model(**inputs)
    with ac.attach(model, make(COVERING, isolate=False)) as session:
        assert not any(path.endswith("attn2") for path in session._strengths[session.controls[0]])


def test_background_policies():
    model = tiny_sd3()
    with (
        torch.no_grad(),
        ac.attach(model, make(DISJOINT, background="error")),
        pytest.raises(ac.AttnCtrlError, match="in no region"),
    ):
        model(**sd3_call())
    with pytest.raises(ac.AttnCtrlError, match="wholly covered"):
        make(COVERING, background="a meadow").masks((4, 4))
    assert make(DISJOINT, background="a meadow").masks((4, 4)).sum(0).eq(1).all()


def test_hidden_region_is_loud():
    with pytest.raises(ac.AttnCtrlError, match="wholly under"):
        make([(0, 0, 0.5, 0.5), (0, 0, 1, 1)], overlap="priority").masks((4, 4))


def test_non_square_and_odd_grids():
    for height, width in ((8, 16), (6, 10), (14, 6)):
        model, inputs = tiny_sd3(), sd3_call(height=height, width=width)
        with torch.no_grad(), ac.attach(model, make(CROSSING, overlap="mean")):
            assert model(**inputs)[0].shape == inputs["hidden_states"].shape


def test_changed_grid_and_regions_are_per_call():
    model = tiny_sd3()
    with torch.no_grad(), ac.attach(model, make(DISJOINT)):
        small = model(**sd3_call())[0]
        model(**sd3_call(height=12, width=12))
        assert torch.equal(model(**sd3_call())[0], small)


def test_density_matches_the_table_of_the_specification():
    boxes = [(i / 4, 0, (i + 1) / 4, 1) for i in range(4)]
    control = ac.RegionalPrompts([ac.Region(str(i), box=box) for i, box in enumerate(boxes)])
    assert control.density((64, 64), 512) == pytest.approx(4 * (1024 + 512) ** 2 / 4608**2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_weight": 2},
        {"strength": -1},
        {"overlap": "xor"},
        {"trim_text": 0},
        {"start": 1.0, "stop": 0.5},
        {"regions": ["no place"]},
        {"background": " "},
        {"sigma": (1.0, 0.0)},
        {"hub": True, "isolate": False},
    ],
)
def test_refused_arguments(wrong):
    with pytest.raises(ac.AttnCtrlError):
        ac.RegionalPrompts(**{"regions": make(DISJOINT).regions, **wrong})


def test_bare_denoiser_needs_embeds():
    model = tiny_sd3()
    with (
        torch.no_grad(),
        ac.attach(model, ac.RegionalPrompts(["a cat@0,0,0.5,1"])),
        pytest.raises(ac.AttnCtrlError, match="prompt_embeds"),
    ):
        model(**sd3_call())
