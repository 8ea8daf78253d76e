import pytest
import torch

import attnctrl as ac

from ..dense import DenseAttention, plain, scores
from ..models import (
    chroma_call,
    flux2_call,
    flux_call,
    tiny_chroma,
    tiny_flux,
    tiny_flux2,
    tiny_sd3,
    tiny_unet,
    unet_call,
)
from ..models.common import Noise, position_ids
from ..processors.tiny_pipelines import PIPELINES


FAMILIES = {"flux": (tiny_flux, flux_call), "flux2": (tiny_flux2, flux2_call), "chroma": (tiny_chroma, chroma_call)}
GRIDS = ((2, 3), (4, 2))  # of two reference pictures behind an image of 4 x 4


def with_references(call, batch: int = 2) -> dict:
    """A call that carries reference pictures as editing pipelines pass them: their tokens and positions behind the image's."""
    inputs, noise = call(batch), Noise()
    for number, (rows, columns) in enumerate(GRIDS, 1):
        tokens = noise(batch, rows * columns, 8)
        ids = position_ids(rows, columns, inputs["img_ids"].shape[-1] - 3).to(inputs["img_ids"])
        ids[:, 0] = 10 * number
        ids = ids.expand(*inputs["img_ids"].shape[:-2], -1, -1)
        inputs["hidden_states"] = torch.cat([inputs["hidden_states"], tokens], 1)
        inputs["img_ids"] = torch.cat([inputs["img_ids"], ids], -2)
        if "attention_mask" in inputs:
            more = inputs["attention_mask"].new_ones(batch, rows * columns)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], more], 1)
    return inputs


def by_hand(ids: torch.Tensor, moves) -> torch.Tensor:
    """Positions token by token: moves are (picture, source box, target box) in tokens, (row, column, rows, columns) each."""
    moved = ids.float().clone()
    for picture, (y0, x0, h, w), (t0, l0, th, tw) in moves:
        for i, (frame, y, x) in enumerate(ids.reshape(-1, ids.shape[-1])[: ids.shape[-2], :3].tolist()):
            if frame == 10 * (picture + 1) and y0 <= y < y0 + h and x0 <= x < x0 + w:
                moved[..., i, 1] = t0 + (y + 0.5 - y0) * th / h - 0.5
                moved[..., i, 2] = l0 + (x + 0.5 - x0) * tw / w - 0.5
    return moved


WHOLE = {"targets": [(0.5, 0, 1, 1)]}, [(0, (0, 0, 2, 3), (0, 2, 4, 2))]
SECOND = {"targets": [(0, 0.5, 0.5, 1)], "pictures": [1]}, [(1, (0, 0, 4, 2), (2, 0, 2, 2))]
PART = (
    {"targets": [(0.25, 0.25, 0.75, 0.5), (0.5, 0.5, 1, 1)], "sources": [(0, 0, 2 / 3, 1), (0, 0.5, 1, 1)]},
    [(0, (0, 0, 2, 2), (1, 1, 1, 2)), (1, (2, 0, 2, 2), (2, 2, 2, 2))],
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options, moves", [WHOLE, SECOND, PART], ids=["whole", "second", "parts"])
def test_equals_positions_moved_by_hand(family, options, moves):
    build, call = FAMILIES[family]
    model, inputs = build(), with_references(call)
    with torch.no_grad():
        before = model(**inputs)[0]
        wanted = model(**{**inputs, "img_ids": by_hand(inputs["img_ids"], moves)})[0]
        ids = inputs["img_ids"].clone()
        with ac.attach(model, ac.Reposition(**options)) as session:
            got = model(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert (wanted - before).abs().max() > 1e-4
        assert torch.equal(model(**inputs)[0], before) and torch.equal(inputs["img_ids"], ids)
    assert "Reposition: 1 table of positions, acted 1 times" in session.report()


@pytest.mark.parametrize(
    "neutral",
    [{"strength": 0}, {"targets": ()}, {"targets": [(0, 0, 0.75, 0.5), (0, 0, 0.5, 1)]}],
    ids=["strength", "none", "same place"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_is_bit_identical(neutral, family):
    build, call = FAMILIES[family]
    model, inputs = build(), with_references(call)
    with torch.no_grad():
        before = model(**inputs)[0]
        with ac.attach(model, ac.Reposition(**{"targets": [(0.5, 0, 1, 1)], **neutral})):
            assert torch.equal(model(**inputs)[0], before)


def test_steps_strength_and_masks():
    model, inputs = tiny_flux(), with_references(flux_call, 1)
    ids = inputs["img_ids"]
    half = ids + 0.5 * (by_hand(ids, PART[1]) - ids)
    left, right = torch.zeros(6, 9), torch.zeros(8, 8)
    left[:, :6], right[2:4, 2:6] = 1, 1  # the first source and target of PART
    options = PART[0] | {"sources": [left, PART[0]["sources"][1]], "targets": [right, PART[0]["targets"][1]]}
    with torch.no_grad():
        before, wanted = model(**inputs)[0], model(**{**inputs, "img_ids": half})[0]
        with ac.attach(model, ac.Reposition(**options, strength=0.5, start=0.25, stop=0.75)) as session:
            for step, inside in enumerate((False, True, True, False)):
                session.set_step(step, 4)
                out = model(**inputs)[0]
                if inside:
                    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(out, before)


def test_only_tokens_of_the_mask_move_and_later_sources_win():
    ids = with_references(flux_call)["img_ids"]
    corner = torch.eye(3)[:2]  # two of the six tokens
    control = ac.Reposition([(0.5, 0.5, 1, 1), (0, 0, 0.25, 0.25)], [corner, (0, 0, 1 / 3, 0.5)], [0, 0])
    moved = control.edit_positions(ids)
    changed = (moved != ids).any(1).nonzero().flatten()
    assert changed.tolist() == [20]  # token (0, 0) of the picture lands on (0, 0)
    assert moved[20].tolist() == [10, 2 + 1.5 * 2 / 2 - 0.5, 2 + 1.5 * 2 / 2 - 0.5]


def test_half_precision_keeps_fractions():
    ids = position_ids(64, 64).to(torch.bfloat16)
    reference = ids.clone()
    reference[:, 0] = 1
    moved = ac.Reposition([(0, 0, 0.3, 0.3)]).edit_positions(torch.cat([ids, reference]))
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved[-1, 1:], torch.full((2,), 0.3 * 63.5 - 0.5))


class Moved:
    """A denoiser's call with moved positions, in both halves of guidance."""

    def __init__(self, model, move):
        self.handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "img_ids": move(kwargs["img_ids"])}), with_kwargs=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.handle.remove()


def shifted(ids: torch.Tensor) -> torch.Tensor:
    """The reference picture, as large as the image of 4 x 4, in its right half."""
    moved = ids.float().clone()
    moved[ids[:, 0] != 0, 2] = 2 + (ids[ids[:, 0] != 0, 2] + 0.5) / 2 - 0.5
    return moved


@pytest.mark.parametrize("guided", [True, False], ids=["true CFG", "distilled"])
def test_kontext_pipeline_moves_its_picture_in_both_halves(guided):
    pipeline = PIPELINES["flux Kontext"]().where(true_cfg_scale=3.0 if guided else 1.0)
    with Moved(pipeline.model, shifted):
        wanted = pipeline()
    with ac.attach(pipeline.pipe, ac.Reposition([(0.5, 0, 1, 1)])) as session:
        got = pipeline()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - pipeline()).abs().max() > 1e-4
    assert sum(session.hits[session.controls[0]].values()) == (4 if guided else 2)


def test_guidance_by_perturbed_heads_and_isolation_see_the_same_positions():
    model, inputs = tiny_flux(), with_references(flux_call)
    others = (ac.SoftPAG(heads="1.2", scale=3.0), ac.Isolation([(0, 0, 0.5, 1), (0.5, 0, 1, 1)]))
    with torch.no_grad():
        with ac.attach(model, *others):
            wanted = model(**{**inputs, "img_ids": by_hand(inputs["img_ids"], WHOLE[1])})[0]
        with ac.attach(model, ac.Reposition(**WHOLE[0]), *others):
            torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-5)


def square(box, side: int) -> tuple[slice, slice]:
    """The tokens of a box, rows and columns."""
    x0, y0, x1, y1 = (round(edge * side) for edge in box)
    return slice(y0, y1), slice(x0, x1)


SOURCE, TARGET, OTHER = (0, 0, 0.5, 1), (0.25, 0.5, 1, 1), (0.5, 0.5, 1, 1)
HOLES = torch.ones(8, 8)
HOLES[2:4], HOLES[:, 4:] = 0, 0  # a mask inside the source


def resampled(source, target, mask=None, reference="first", lends="all", strength=1.0):
    """Dense attention in which keys and values of a reference are cut out at `source` and resized to `target`, before they are lent."""

    def attend(index, q, k, v):
        n = k.shape[2]
        side = round(n**0.5)
        if side * side != n:
            return plain(q, k, v)
        shape = torch.zeros(side, side)
        shape[square(source, side)] = 1
        if mask is not None:
            shape = torch.nn.functional.avg_pool2d(mask[None], 8 // side)[0] >= 0.5
        size = torch.zeros(side, side)[square(target, side)].shape

        def moved(x):  # (H, N, D) of a row -> (H, tokens of the target, D)
            cut = x.unflatten(1, (side, side))[:, square(source, side)[0], square(source, side)[1]]
            return torch.nn.functional.interpolate(cut.movedim(-1, 1), size, mode="nearest").flatten(2).transpose(1, 2)

        kept = moved(shape.flatten()[None, :, None].double())[0, :, 0] > 0.5
        stays = ~shape.flatten().bool() if lends == "all" else torch.zeros(n, dtype=torch.bool)
        out = plain(q, k, v)
        for row in range(1, len(q)):
            keys, values, weights = [k[row]], [v[row]], [torch.ones(n)]
            parts = (moved(k[0])[:, kept], moved(v[0])[:, kept], strength), (k[0][:, stays], v[0][:, stays], 1.0)
            if strength < 1:
                own = shape.flatten().bool()
                parts = *parts, (k[0][:, own], v[0][:, own], 1 - strength)
            for key, value, weight in parts:
                keys.append(key), values.append(value), weights.append(torch.full((key.shape[1],), weight))
            logits = scores(q[row], torch.cat(keys, 1)) + torch.cat(weights).double().log()
            out[row] = logits.softmax(-1) @ torch.cat(values, 1)
        return out

    return attend


@pytest.mark.parametrize(
    "sources, mask, more",
    [(None, None, {}), ([SOURCE], None, {}), ([HOLES], HOLES, {}), ([SOURCE], None, {"strength": 0.6})],
    ids=["whole", "box", "mask", "strength"],
)
@pytest.mark.parametrize("target", [TARGET, OTHER], ids=["larger", "smaller"])
def test_unets_see_references_as_if_their_features_had_been_resampled(sources, mask, more, target):
    model, inputs = tiny_unet(), unet_call(batch=3)
    box = (0, 0, 1, 1) if sources is None else SOURCE
    control = ac.SharedAttention(reference="first", reposition=ac.Reposition([target], sources, **more))
    with torch.no_grad():
        with DenseAttention(resampled(box, target, mask, **more)):
            wanted = model(**inputs)[0]
        with ac.attach(model, control):
            got = model(**inputs)[0]
        with ac.attach(model, ac.SharedAttention(reference="first")):
            unmoved = model(**inputs)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - unmoved).abs().max() > 1e-4


def test_unets_lend_subjects_alone_and_the_same_place_changes_nothing():
    model, inputs = tiny_unet(), unet_call(batch=2)
    subjects = [SOURCE, OTHER]
    options = {"reference": "first", "subjects": subjects}
    with torch.no_grad():
        with DenseAttention(resampled(SOURCE, TARGET, lends="subject")):
            wanted = model(**inputs)[0]
        with ac.attach(model, ac.SharedAttention(**options, reposition=ac.Reposition([TARGET], [SOURCE]))):
            torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-5)
        with ac.attach(model, ac.SharedAttention(subjects)):
            unmoved = model(**inputs)[0]
        same = ac.Reposition(subjects, subjects)
        with ac.attach(model, ac.SharedAttention(subjects, reposition=same)):
            torch.testing.assert_close(model(**inputs)[0], unmoved, rtol=1e-5, atol=1e-6)
        for neutral in (ac.Reposition([TARGET], strength=0), ac.Reposition()):
            with ac.attach(model, ac.SharedAttention(subjects, reposition=neutral)):
                assert torch.equal(model(**inputs)[0], unmoved)


def test_counts_are_those_of_nearest_neighbours():
    control = ac.Reposition([(0, 0, 1, 0.25), (0.5, 0.5, 1, 1)], [(0, 0, 0.5, 1), (0.75, 0.75, 1, 1)], [1, 1])
    counts = control.counts((4, 4)).view(2, 4, 4)
    assert torch.equal(counts[0], torch.ones(4, 4))
    assert counts[1].tolist() == [[2, 2, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 4]]
    lone = torch.zeros(8, 8)
    lone[7, 1] = lone[3, 7] = 1
    with pytest.raises(ac.AttnCtrlError, match="so small on the 8 x 8 grid that no token of the source is left\nHINT"):
        ac.Reposition([(0, 0, 0.125, 0.125)], [lone]).counts((8, 8))


def test_mistakes_are_named():
    place = (0.5, 0, 1, 1)
    for given, message in (
        ({"targets": place}, "targets=.*is one place, not a list"),
        ({"targets": "a@0,0,1,1"}, "is one place, not a list"),
        ({"targets": [place], "sources": []}, "0 sources for 1 targets"),
        ({"targets": [place], "pictures": [0, 1], "strength": 2}, "strength=2.*2 pictures for 1 targets"),
        ({"targets": [place], "pictures": [-1]}, "count from 0"),
        ({"targets": [(0.5, 0, 0.5, 1)]}, "target 0"),
        ({"targets": [place], "start": 0.5, "stop": 0.5}, "holds no step"),
    ):
        with pytest.raises(ac.AttnCtrlError, match=message):
            ac.Reposition(**given)
    for inputs, options, message in (
        (flux_call(), {}, "reference picture 0, and this call carries 0"),
        (with_references(flux_call), {"pictures": [2]}, "reference picture 2, and this call carries 2"),
        (with_references(flux_call), {"sources": [(0, 0, 0.1, 0.1)]}, "'source 0' covers no token of the 2 x 3 grid"),
        (with_references(flux_call), {"sources": [torch.full((2, 2), 0.4)]}, "'source 0' covers no token"),
    ):
        with torch.no_grad(), ac.attach(tiny_flux(), ac.Reposition([place], **options)) as session:
            with pytest.raises(ac.AttnCtrlError, match=message):
                session.model(**inputs)
    with pytest.raises(ac.AttnCtrlError, match="rotary positions, which sd3 does not take"):
        ac.attach(tiny_sd3(), ac.Reposition([place]))
    with pytest.raises(
        ac.AttnCtrlError, match="rotary positions, which unet does not take.*\nHINT.*in UNets, SharedAttention"
    ):
        ac.attach(tiny_unet(), ac.Reposition([place]))
    shared = ac.SharedAttention(reposition=ac.Reposition([place], pictures=[3]))
    with pytest.raises(
        ac.AttnCtrlError, match="is for UNets, whose keys have no positions, and those of sd3 have\nHINT"
    ):
        ac.attach(tiny_sd3(), shared)
    with torch.no_grad(), ac.attach(tiny_unet(), shared) as session:
        with pytest.raises(ac.AttnCtrlError, match=r"a bias \(4, 64\) of lent keys for 2 rows and 64 keys"):
            session.model(**unet_call())
    with pytest.raises(ac.AttnCtrlError, match="both move reference pictures"):
        ac.attach(tiny_flux(), ac.Reposition([place]), ac.Reposition([place]))
