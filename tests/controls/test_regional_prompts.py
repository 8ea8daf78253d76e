import pytest
import torch

import attnctrl as ac

from ..dense import DenseAttention, plain
from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3


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


def dense_output(first_text: bool, masks: torch.Tensor, q, k, v, *, base_weight, isolate, overlap, active=True):
    """Two dense branches blended, from the table of the paper, written over token roles. Order of tokens: as the model sees them."""
    n_image = masks.shape[1]
    roles: list[tuple[str, int]] = []
    image = [("I", p) for p in range(n_image)]
    extra = [("T", r) for r in range(len(LENGTHS)) for _ in range(LENGTHS[r])]
    base = [("B", 0)] * TEXT
    roles = extra + base + image if first_text else image + base + extra
    n = len(roles)
    priority = masks.clone()
    for r in range(len(masks) - 1):
        priority[r] &= ~masks[r + 1 :].any(0)
    member = priority if overlap == "priority" else masks

    def allowed(kind: str, only: int | None = None) -> torch.Tensor:
        table = torch.zeros(n, n, dtype=torch.bool)
        for i, (a, x) in enumerate(roles):
            for j, (b, y) in enumerate(roles):
                if a == "B":
                    ok = b in "BI"
                elif a == "T":
                    ok = (b == "T" and x == y) or (b == "I" and bool(member[x, y]))
                elif kind == "base":
                    ok = b in "BI"
                else:
                    mine = [only] if only is not None else [r for r in range(len(masks)) if member[r, x]]
                    ok = (b == "T" and y in mine) or (b == "I" and (not isolate or any(member[r, y] for r in mine)))
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


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("boxes", [DISJOINT, COVERING, CROSSING], ids=["disjoint", "covering", "crossing"])
@pytest.mark.parametrize("overlap", ["union", "priority", "mean"])
@pytest.mark.parametrize(("base_weight", "isolate"), [(0.0, True), (0.3, True), (0.3, False)])
def test_equals_dense_masks(family, boxes, overlap, base_weight, isolate):
    model, inputs = (tiny_sd3(), sd3_call()) if family == "sd3" else (tiny_flux(), flux_call())
    control = make(boxes, base_weight=base_weight, isolate=isolate, overlap=overlap)
    masks = torch.stack([region.tokens((4, 4)) for region in control.regions])

    def formula(index, q, k, v):
        return dense_output(
            family == "flux", masks, q, k, v, base_weight=base_weight, isolate=isolate, overlap=overlap
        )

    longer = dict(inputs)
    extra = torch.cat([embeds(0), embeds(1)], 1).expand(2, -1, -1)
    text = inputs["encoder_hidden_states"]
    longer["encoder_hidden_states"] = torch.cat([extra, text] if family == "flux" else [text, extra], 1)
    if family == "flux":
        longer["txt_ids"] = torch.zeros(longer["encoder_hidden_states"].shape[1], 3)
    with torch.no_grad():
        with DenseAttention(formula):
            wanted = model(**longer)[0]
        with ac.attach(model, control):
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (got - model(**inputs)[0]).abs().max() > 1e-3


def test_other_layers_follow_the_base_prompt():
    model, inputs = tiny_sd3(), sd3_call()
    control = make(DISJOINT, base_weight=0.2, layers="1")
    masks = torch.stack([region.tokens((4, 4)) for region in control.regions])
    longer = dict(inputs)
    longer["encoder_hidden_states"] = torch.cat(
        [inputs["encoder_hidden_states"], torch.cat([embeds(0), embeds(1)], 1).expand(2, -1, -1)], 1
    )

    def formula(index, q, k, v):
        return dense_output(False, masks, q, k, v, base_weight=0.2, isolate=True, overlap="union", active=index == 1)

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
