import pytest
import torch

import attnctrl as ac
from attnctrl.icons.recipes.text import build_tokenizer

from ..dense import DenseAttention, plain, scores
from ..models import flux2_call, flux_call, sd3_call, tiny_flux, tiny_flux2, tiny_sd3, tiny_unet
from ..processors.tiny_pipelines import PIPELINES
from .test_reposition import with_references


TEXT, IMAGE = 5, 16  # in this order, reference pictures behind
TOKENS = (1, 3)
HEADS = 4  # of the denoiser; the VAE has one
FAMILIES = {"flux": (tiny_flux, flux_call), "flux2": (tiny_flux2, flux2_call)}


class Scoped(DenseAttention):
    """Dense attention in which image tokens outside a mask (B, IMAGE) and reference tokens do not see each other, and the mean of
    the image's attention to the keyword, over heads and calls, as `maps`."""

    def __init__(self, inside=None, layers=None, weak=False):
        super().__init__(lambda index, q, k, v: self.scope(q, k, v) if q.shape[1] == HEADS else plain(q, k, v))
        self.inside, self.layers, self.weak, self.maps, self.calls = inside, layers, weak, [], 0

    def scope(self, q, k, v):
        index, self.calls = self.calls, self.calls + 1
        if self.layers is not None and index not in self.layers:
            return plain(q, k, v)
        n = k.shape[2]
        pattern = scores(q, k).softmax(-1).mean(1)
        self.maps.append(pattern[:, TEXT : TEXT + IMAGE, list(TOKENS)].sum(-1))
        allowed = torch.ones(len(q), 1, n, n, dtype=torch.bool)
        if self.inside is not None:
            for row, mask in enumerate(self.inside):
                for i in range(IMAGE):
                    if not mask[i]:
                        allowed[row, 0, TEXT + i, TEXT + IMAGE :] = allowed[row, 0, TEXT + IMAGE :, TEXT + i] = False
        out = torch.stack([plain(q[i : i + 1], k[i : i + 1], v[i : i + 1], allowed[i])[0] for i in range(len(q))])
        if self.weak and index == 1:
            out[:, 2] = v[:, 2]
        return out

    def mask(self, threshold: float) -> torch.Tensor:
        found = []
        for a in torch.stack(self.maps).mean(0):
            found.append((a - a.min()) / (a.max() - a.min()) > threshold)
        return torch.stack(found)


def three_steps(call) -> list[dict]:
    """Calls of one picture: other latents, other timesteps."""
    steps = [with_references(call) for _ in range(3)]
    for step, inputs in enumerate(steps):
        inputs["hidden_states"][:, :IMAGE] = inputs["hidden_states"][:, :IMAGE].roll(step, 1)
        inputs["timestep"] = inputs["timestep"] - 0.2 * step
    return steps


@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["all", "some"])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_dense_masks_of_the_step_before(family, threshold, layers):
    build, call = FAMILIES[family]
    model, inside, steps = build(), None, three_steps(call)
    with torch.no_grad():
        with ac.attach(model, ac.KeywordScope(TOKENS, threshold, layers)) as session:
            pictures = []
            for step in (0, 1, 2, 0, 1, 2):
                session.set_step(step, 3)
                pictures.append(model(**steps[step])[0])
        for step, inputs in enumerate(steps):
            with Scoped(inside, layers) as dense:
                wanted = model(**inputs)[0]
            inside, before = dense.mask(threshold), model(**inputs)[0]
            assert bool(inside.any()) == (threshold < 1) and not inside.all()
            assert torch.equal(pictures[step], pictures[step + 3])
            torch.testing.assert_close(pictures[step], wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(pictures[step], before) == (step == 0)


def test_kontext_pipeline_scopes_both_halves_by_the_conditional_map():
    pipeline = PIPELINES["flux Kontext"]()

    class Both(Scoped):
        """Two forward passes of four calls a step, the conditional one first."""

        def scope(self, q, k, v):
            if self.calls % 8 == 0:
                self.inside = self.mask(0.5) if self.calls else None
                self.maps = []
            out = super().scope(q, k, v)
            self.maps = self.maps[:4]
            return out

    with Both() as dense:
        wanted = pipeline()
    assert dense.calls == 16
    with ac.attach(pipeline.pipe, ac.KeywordScope(TOKENS, 0.5)):
        got, again = pipeline(), pipeline()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(got, again)
    assert (got - pipeline()).abs().max() > 1e-4


def test_guidance_by_perturbed_heads_has_the_same_scope():
    model, (first, second, _) = tiny_flux(), three_steps(flux_call)
    with torch.no_grad():
        with Scoped() as dense:
            model(**first)
        inside = dense.mask(0.5)
        with Scoped(inside):
            cond = model(**second)[0]
        with Scoped(inside, weak=True):
            perturbed = model(**second)[0]
        with ac.attach(model, ac.KeywordScope(TOKENS, 0.5), ac.SoftPAG(heads="1.2", scale=3.0)) as session:
            for step, inputs in enumerate((first, second)):
                session.set_step(step, 2)
                got = model(**inputs)[0]
    torch.testing.assert_close(got, cond + 3 * (cond - perturbed), rtol=1e-3, atol=1e-4)


def test_off_is_bit_identical_and_a_window_starts_unscoped():
    model, steps = tiny_flux(), three_steps(flux_call)
    with torch.no_grad():
        before = [model(**inputs)[0] for inputs in steps]
        with ac.attach(model, ac.KeywordScope(TOKENS, 0.0)):
            assert all(torch.equal(model(**inputs)[0], out) for inputs, out in zip(steps, before))
        with ac.attach(model, ac.KeywordScope(TOKENS, start=0.3)) as session:
            for step, inputs in enumerate(steps):
                session.set_step(step, 3)
                assert torch.equal(model(**inputs)[0], before[step]) == (step < 2)


def test_flat_maps_scope_nothing():
    control = ac.KeywordScope(TOKENS)
    assert control._mask(torch.full((1, 4), 0.3)).all()
    assert control._mask(torch.tensor([[0.0, 0.1, 0.3, 1.0]])).tolist() == [[False, False, True, True]]


def test_keywords_are_found_in_the_prompt(tmp_path):
    tokenizer = build_tokenizer(tmp_path, captions=200)
    prompt = "a red cat and a blue dog"
    wanted = ac.SubjectMasks.in_prompt(["red cat"], prompt, tokenizer).phrases["red cat"]
    found = ac.KeywordScope.in_prompt("red cat", prompt, tokenizer, offset=2, threshold=0.4)
    assert found.tokens == tuple(2 + i for i in wanted) and found.threshold == 0.4


def test_mistakes_are_named():
    for given, message in (
        ({"tokens": ()}, "are no numbers of tokens\nHINT: KeywordScope.in_prompt"),
        ({"tokens": (-1, 2), "threshold": 2}, "no numbers of tokens; threshold=2"),
        ({"tokens": TOKENS, "start": 0.5, "stop": 0.5}, "holds no step"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=message):
            ac.KeywordScope(**given)
    for model, inputs, tokens, message in (
        (tiny_sd3(), sd3_call(), TOKENS, "carries no reference pictures"),
        (tiny_flux(), flux_call(), TOKENS, "carries no reference pictures"),
        (tiny_flux(), with_references(flux_call), (7,), "token 7, and the text has 5 tokens"),
    ):
        with torch.no_grad(), ac.attach(model, ac.KeywordScope(tokens)):
            with pytest.raises(ac.AttnCtrlError, match=message):
                model(**inputs)
    with pytest.raises(ac.AttnCtrlError, match="no attention of image, text and reference pictures together"):
        ac.attach(tiny_unet(), ac.KeywordScope(TOKENS))
