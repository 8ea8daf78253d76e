from contextlib import nullcontext

import pytest
import torch

import attnctrl as ac

from ..dense import DenseAttention, plain, scores
from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3
from ..pipelines import tiny_sd3_pipeline


FAMILIES = {
    "sd3": (tiny_sd3, sd3_call, slice(0, 16)),
    "sd3.5": (lambda: tiny_sd3(dual=True), sd3_call, slice(0, 16)),
    "sd3-unnormed": (lambda: tiny_sd3(qk_norm=None), sd3_call, slice(0, 16)),
    "flux": (tiny_flux, flux_call, slice(5, 21)),
}


def target_map(target: str, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The weak attention matrix T, (B, H, N, N)."""
    n = q.shape[2]
    if target == "identity":
        return torch.eye(n, dtype=q.dtype).expand(*q.shape[:2], n, n)
    if target == "uniform":
        return torch.full((*q.shape[:2], n, n), 1 / n, dtype=q.dtype)
    return scores(q.mean(2, keepdim=True), k).softmax(-1).expand(-1, -1, n, -1)


def image_map(target: str, mode: str, q: torch.Tensor, k: torch.Tensor, image: slice) -> torch.Tensor:
    """T for image rows only; the other rows keep plain attention."""
    logits = scores(q, k)
    full = logits.softmax(-1)
    out = full.clone()
    rows = torch.arange(q.shape[2])[image]
    if target == "mean_query":
        out[:, :, rows] = scores(q[:, :, image].mean(2, keepdim=True), k).softmax(-1).expand(-1, -1, len(rows), -1)
        return out
    if target == "identity" and mode == "mask":
        keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        keep[image, image] = torch.eye(len(rows), dtype=torch.bool)
        masked = logits.masked_fill(~keep, float("-inf")).softmax(-1)
        out[:, :, rows] = masked[:, :, rows]
        return out
    mass = full[:, :, rows][..., image].sum(-1, keepdim=True)
    inner = (
        torch.eye(len(rows), dtype=q.dtype)
        if target == "identity"
        else torch.full((len(rows), len(rows)), 1 / len(rows), dtype=q.dtype)
    )
    block = full[:, :, rows].clone()
    block[..., image] = mass * inner
    out[:, :, rows] = block
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("target", "region", "mode"),
    [
        ("identity", "all", "mask"),
        ("uniform", "all", "mask"),
        ("mean_query", "all", "mask"),
        ("identity", "image", "mask"),
        ("identity", "image", "mass"),
        ("uniform", "image", "mass"),
        ("mean_query", "image", "mask"),
    ],
)
def test_equals_explicit_maps(family, target, region, mode):
    build, call, image = FAMILIES[family]
    model, inputs = build(), call()
    strength, scale = 0.6, 2.0
    control = ac.SoftPAG(
        heads=[(1, 0), (1, 3, 0.5), (2, 2)], strength=strength, scale=scale, target=target, region=region, mode=mode
    )
    weights = {1: torch.tensor([1.0, 0, 0, 0.5]) * strength, 2: torch.tensor([0, 0, 1.0, 0]) * strength}
    sites = [site for site in ac.attach(model).sites]
    # attention calls run block by block, the second attention of SD3.5 after the first
    order = sorted(sites, key=lambda s: (s.layer, s.path.endswith("attn2")))

    def formula(index, q, k, v):
        site = order[index]
        if not site.primary or site.layer not in weights:
            return plain(q, k, v)
        u = weights[site.layer].double()[None, :, None, None]
        pattern = scores(q, k).softmax(-1)
        weak = target_map(target, q, k) if region == "all" else image_map(target, mode, q, k, image)
        return ((1 - u) * pattern + u * weak) @ v

    with torch.no_grad():
        cond = model(**inputs)[0]
        with DenseAttention(formula) as mode_:
            weak = model(**inputs)[0]
        assert mode_.index == len(order)
        with ac.attach(model, control):
            got = model(**inputs)[0]
    torch.testing.assert_close(got, cond + scale * (cond - weak), rtol=1e-4, atol=2e-5)
    assert (cond - weak).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("neutral", [{"strength": 0.0}, {"scale": 0.0}, {"heads": "1.2:0"}])
def test_neutral_is_bit_identical_and_not_attached(family, neutral):
    build, call, _ = FAMILIES[family]
    model, inputs = build(), call()
    with torch.no_grad():
        before = model(**inputs)[0]
        with ac.attach(model, ac.SoftPAG(**{"heads": "1.2", **neutral})) as session:
            assert torch.equal(model(**inputs)[0], before)
            assert "neutral" in session.report()


def test_heads_one_by_one_are_the_layer():
    model, inputs = tiny_sd3(), sd3_call()
    with torch.no_grad():
        with ac.attach(model, ac.SoftPAG(layers="1", strength=0.7)):
            layer = model(**inputs)[0]
        with ac.attach(model, ac.SoftPAG(heads=[(1, h) for h in range(4)], strength=0.7)):
            heads = model(**inputs)[0]
    assert torch.equal(layer, heads)


def test_text_rows_are_untouched_by_the_image_region():
    model, inputs = tiny_sd3(), sd3_call()
    states = {}
    handle = model.transformer_blocks[1].attn.register_forward_hook(
        lambda m, a, out: states.setdefault("text", []).append(out[1])
    )
    with torch.no_grad(), ac.attach(model, ac.SoftPAG(layers="1", region="image")):
        model(**inputs)
    handle.remove()
    plain_text, perturbed_text = states["text"]
    assert torch.equal(plain_text, perturbed_text)


def test_batch_equals_single_runs():
    model = tiny_sd3()
    both = sd3_call(batch=2)
    control = ac.SoftPAG(heads="0.1,2.3", strength=0.5)
    with torch.no_grad(), ac.attach(model, control):
        together = model(**both)[0]
        for row in range(2):
            one = {
                name: value[row : row + 1] if isinstance(value, torch.Tensor) else value
                for name, value in both.items()
            }
            torch.testing.assert_close(model(**one)[0], together[row : row + 1], rtol=1e-4, atol=1e-5)


def test_weight_multiplies_the_scale():
    model, inputs = tiny_sd3(), sd3_call()
    with torch.no_grad():
        with ac.attach(model, ac.SoftPAG(heads="1.1", scale=1.5)):
            direct = model(**inputs)[0]
        with ac.attach(model, ac.SoftPAG(heads="1.1", scale=3.0, weight=lambda fraction, sigma: 0.5)):
            scheduled = model(**inputs)[0]
    assert torch.equal(direct, scheduled)


def test_several_guidances_add_up():
    model, inputs = tiny_sd3(), sd3_call()
    first, second = ac.SoftPAG(heads="1.1", scale=1.0), ac.SoftPAG(heads="2.0", scale=2.0, target="uniform")
    with torch.no_grad():
        plain_out = model(**inputs)[0]
        deltas = []
        for control in (first, second):
            with ac.attach(model, control):
                deltas.append(model(**inputs)[0] - plain_out)
        with ac.attach(model, first, second):
            both = model(**inputs)[0]
    torch.testing.assert_close(both, plain_out + deltas[0] + deltas[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": 1.5},
        {"strength": -0.1},
        {"target": "argmin"},
        {"region": "text"},
        {"mode": "soft"},
        {"start": 0.5, "stop": 0.2},
    ],
)
def test_refused_arguments(wrong):
    with pytest.raises(ac.AttnCtrlError):
        ac.SoftPAG(heads="0.0", **wrong)


@pytest.mark.parametrize(
    "control",
    [
        lambda: ac.SoftPAG(heads="9.0"),
        lambda: ac.SoftPAG(heads="0.7"),
        lambda: ac.SoftPAG(layers="5"),
        lambda: ac.SoftPAG(heads="9.0", strength=0),
    ],
)
def test_no_match_lists_what_exists(control):
    with pytest.raises(ac.AttnCtrlError, match=r"0 to [23]"):
        ac.attach(tiny_sd3(), control())


def test_float64_and_bfloat16_run():
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny_sd3().to(dtype)
        with torch.no_grad(), ac.attach(model, ac.SoftPAG(heads="1.1", region="image")):
            assert model(**sd3_call(dtype=dtype))[0].isfinite().all()


SETS = ["0.1,2.3", None, "1.2:0.5", "2.3"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    made = tiny_sd3_pipeline(tmp_path_factory.mktemp("tokenizer"))
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe, rows, heads, guidance_scale: float) -> torch.Tensor:
    """Latents of some of four prompts with the noise of their numbers."""
    prompts = ["a red cat", "a blue car", "a green tree", "a black fish"]
    with ac.attach(pipe, ac.SoftPAG(heads=heads, strength=0.8)) if heads is not None else nullcontext():
        return pipe(
            [prompts[row] for row in rows],
            generator=[torch.Generator().manual_seed(row) for row in rows],
            num_inference_steps=3,
            guidance_scale=guidance_scale,
            max_sequence_length=1,
            output_type="latent",
        ).images


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
def test_every_image_of_a_batch_has_its_own_heads(pipe, guidance_scale):
    together = latents(pipe, range(4), ac.HeadBatch(SETS), guidance_scale)
    for row, heads in enumerate(SETS):
        alone = latents(pipe, [row], heads, guidance_scale)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-4)
        if heads is not None:
            assert (together[row] - latents(pipe, [row], None, guidance_scale)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("images", [1, 2, 4])
def test_a_batch_of_another_size_is_told(pipe, images):
    with pytest.raises(ac.AttnCtrlError, match=rf"(?s)SoftPAG.*\b3\b.*\b{images}\b"):
        latents(pipe, range(images), ac.HeadBatch(["0.1", None, "2.3"]), 4.0)


def test_batches_of_sets_are_checked_and_may_be_neutral(pipe):
    assert ac.SoftPAG(heads=ac.HeadBatch([None, "0.1:0"])).neutral
    assert not ac.SoftPAG(heads=ac.HeadBatch([None, "0.1"])).neutral
    assert torch.equal(latents(pipe, [0, 1], ac.HeadBatch([None, None]), 4.0), latents(pipe, [0, 1], None, 4.0))
    with pytest.raises(ac.AttnCtrlError, match="leaves 0-1"):
        ac.SoftPAG(heads=ac.HeadBatch([None, "0.1:2"]))
    with pytest.raises(ac.AttnCtrlError, match="layer 9"):
        ac.attach(pipe, ac.SoftPAG(heads=ac.HeadBatch([None, "9.0"])))
    kept = ac.SoftPAG(heads=ac.HeadBatch(["0.1", "2.3"]), layers="2").touches(ac.attach(pipe).sites)
    assert {path: weight.tolist() for path, weight in kept.items()} == {
        "transformer_blocks.2.attn": [[0, 0, 0, 0], [0, 0, 0, 1]]
    }
