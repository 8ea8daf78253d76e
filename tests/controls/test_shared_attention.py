import pytest
import torch

import attnctrl as ac

from ..dense import DenseAttention, plain, scores
from ..models import flux_call, sd3_call, tiny_flux, tiny_sd3, tiny_unet, unet_call
from ..processors.tiny_pipelines import PIPELINES


TEXT = 5
BOXES = [(0, 0, 0.5, 1), (0.5, 0, 1, 0.5), (0, 0.5, 1, 1)]
FAMILIES = {"sd3": (tiny_sd3, sd3_call), "flux": (tiny_flux, flux_call), "unet": (tiny_unet, unet_call)}


def inside(box, side: int) -> torch.Tensor:
    mask = torch.zeros(side, side, dtype=torch.bool)
    x0, y0, x1, y1 = (round(edge * side) for edge in box)
    mask[y0:y1, x0:x1] = True
    return mask.flatten()


def formula(
    boxes=None, reference="batch", mode="append", strength=1.0, bias=0.0, parts=1, text_first=False, layers=None
):
    """Dense attention of every row over the keys of all rows of its part of the batch, side by side."""

    def attend(index, q, k, v):
        own = plain(q, k, v)
        batch, n = len(q) // parts, k.shape[2]
        if n == TEXT or (layers is not None and index not in layers):
            return own
        image = n if round(n**0.5) ** 2 == n else n - TEXT
        at = TEXT if text_first and image < n else 0
        span = torch.arange(at, at + image)
        out = own.clone()
        for row in range(len(q)):
            part, number = divmod(row, batch)
            if reference == "first" and number == 0:
                continue
            rows = range(part * batch, part * batch + batch)
            logits = []
            for other in rows:
                s = scores(q[row][:, span], k[other])
                hidden = torch.ones(n, dtype=torch.bool)
                if other == row:
                    hidden[:] = False
                    hidden[span] = mode == "replace"
                elif reference == "batch" or other == rows[0]:
                    lent = torch.ones(image, dtype=torch.bool)
                    if boxes is not None:
                        lent = inside(boxes[other - rows[0]], round(image**0.5))
                    hidden[span] = ~lent
                    s = s + bias
                logits.append(s.masked_fill(hidden, float("-inf")))
            shared = torch.cat(logits, -1).softmax(-1) @ torch.cat([v[other] for other in rows], 1)
            out[row][:, span] = torch.lerp(own[row][:, span], shared, strength)
        return out

    return attend


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reference", ["batch", "first"])
@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize(
    "boxes, more", [(None, {}), (BOXES, {"strength": 0.6, "bias": -0.5})], ids=["all", "subjects"]
)
def test_equals_dense_attention_over_the_batch(family, reference, mode, boxes, more):
    build, call = FAMILIES[family]
    model, inputs = build(), call(batch=3)
    options = {"reference": reference, "mode": mode, **more}
    with torch.no_grad():
        with DenseAttention(formula(boxes, **options, text_first=family == "flux")):
            wanted = model(**inputs)[0]
        with ac.attach(model, ac.SharedAttention(boxes, **options)):
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (got - model(**inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name, parts", [("sd", 2), ("sd3", 2), ("flux", 1), ("flux, true CFG", 1)])
def test_pipelines_share_within_each_half_of_guidance(name, parts):
    pipeline = PIPELINES[name]()
    boxes = BOXES[: pipeline.images]
    with DenseAttention(formula(boxes, parts=parts, text_first=name.startswith("flux"))):
        wanted = pipeline()
    with ac.attach(pipeline.pipe, ac.SharedAttention(boxes)):
        got = pipeline()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert (got - pipeline()).abs().max() > 1e-3


@pytest.mark.parametrize("neutral", [{"strength": 0}, {"dropout": 1}, {"bias": float("-inf")}])
@pytest.mark.parametrize("family", ["sd3", "unet"])
def test_neutral_is_bit_identical(neutral, family):
    build, call = FAMILIES[family]
    model, inputs = build(), call()
    with torch.no_grad():
        before = model(**inputs)[0]
        with ac.attach(model, ac.SharedAttention(**neutral)):
            assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_one_image_stay_that_image(family):
    """Appended copies weigh like the own tokens, so they change nothing where there is no text beside them to lose weight."""
    build, call = FAMILIES[family]
    model, inputs = build(), call(batch=1)
    copies = {
        key: value.expand(3, *value.shape[1:]) if torch.is_tensor(value) and value.ndim and "ids" not in key else value
        for key, value in inputs.items()
    }
    cases = [("first", "replace")]
    if family == "unet":
        cases += [("first", "append"), ("batch", "append"), ("batch", "replace")]
    with torch.no_grad():
        alone = model(**inputs)[0]
        for reference, mode in cases:
            with ac.attach(model, ac.SharedAttention(reference=reference, mode=mode)):
                got = model(**copies)[0]
            torch.testing.assert_close(got, alone.expand_as(got), rtol=1e-4, atol=1e-5)


def test_order_of_the_batch_does_not_matter_and_the_first_image_can_stay():
    model, inputs = tiny_sd3(), sd3_call(batch=3)
    order = [2, 0, 1]
    turned = {key: value[order] if torch.is_tensor(value) else value for key, value in inputs.items()}
    with torch.no_grad():
        with ac.attach(model, ac.SharedAttention(BOXES)):
            straight = model(**inputs)[0]
        with ac.attach(model, ac.SharedAttention([BOXES[i] for i in order])):
            torch.testing.assert_close(model(**turned)[0], straight[order], rtol=1e-4, atol=1e-5)
        alone = model(**{key: value[:1] if torch.is_tensor(value) else value for key, value in inputs.items()})[0]
        with ac.attach(model, ac.SharedAttention.masactrl(layers="1:", start=0.0)):
            edited = model(**inputs)[0]
    torch.testing.assert_close(edited[:1], alone, rtol=1e-5, atol=1e-6)


def test_dropout_repeats_with_its_seed():
    model, inputs = tiny_sd3(), sd3_call(batch=3)

    def out(**options):
        with torch.no_grad(), ac.attach(model, ac.SharedAttention(**options)):
            return model(**inputs)[0]

    first = out(dropout=0.5)
    assert torch.equal(out(dropout=0.5), first)
    assert not torch.allclose(out(dropout=0.5, seed=1), first, atol=1e-4)
    assert not torch.allclose(out(), first, atol=1e-4)


def test_layers_steps_and_guidance():
    model, inputs = tiny_sd3(), sd3_call(batch=2)
    shared = formula(layers=[1])

    def weak(index, q, k, v):
        out = shared(index, q, k, v)
        if index == 1:
            out[:, 2] = v[:, 2]
        return out

    with torch.no_grad():
        before = model(**inputs)[0]
        with DenseAttention(shared):
            wanted = model(**inputs)[0]
        with DenseAttention(weak):
            perturbed = model(**inputs)[0]
        with ac.attach(model, ac.SharedAttention(layers=1, start=0.5)) as session:
            session.set_step(0, 2)
            assert torch.equal(model(**inputs)[0], before)
            session.set_step(1, 2)
            torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-5)
        with ac.attach(model, ac.SharedAttention(layers=1), ac.SoftPAG(heads="1.2", scale=3.0)):
            got = model(**inputs)[0]
    torch.testing.assert_close(got, wanted + 3 * (wanted - perturbed), rtol=1e-3, atol=1e-4)


def test_presets_are_the_methods_of_the_table():
    masactrl = ac.SharedAttention.masactrl()
    assert (masactrl.reference, masactrl.mode, masactrl.layers) == ("first", "replace", "10:")
    assert masactrl.schedule.covers(50) == 46
    consistory = ac.SharedAttention.consistory(BOXES, seed=3)
    assert (consistory.reference, consistory.mode, consistory.dropout, consistory.seed) == ("batch", "append", 0.5, 3)
    story = ac.SharedAttention.storydiffusion()
    assert story.subjects is None and story.dropout == 0.5 and story.schedule.covers(50) == 49


def test_mistakes_are_named():
    model = tiny_sd3()
    for control, batch, message in (
        (ac.SharedAttention(), 1, "SharedAttention: there is one image.*\nHINT: several prompts"),
        (ac.SharedAttention(BOXES), 2, "lent tokens of 3 rows for a batch of 2"),
        (ac.SharedAttention([BOXES[0], (0, 0, 0.1, 0.1)]), 2, "'subject of image 1' covers no token"),
    ):
        with torch.no_grad(), ac.attach(model, control), pytest.raises(ac.AttnCtrlError, match=message):
            model(**sd3_call(batch=batch))
    with pytest.raises(ac.AttnCtrlError) as caught:
        ac.SharedAttention((), "last", "add", strength=-1, dropout=2, bias=float("inf"))
    for part in ("reference='last'", "mode='add'", "strength=-1", "dropout=2", "bias=inf", "subjects=()"):
        assert part in str(caught.value)
    with pytest.raises(ac.AttnCtrlError, match="0 to 2"):
        ac.attach(model, ac.SharedAttention.masactrl())
