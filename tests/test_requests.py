"""Controls become JSON and come back as the same controls."""

import json

import pytest
import torch

import attnctrl as ac
from attnctrl.requests import describe, restore

from .test_import import loaded_after


def halves() -> list[torch.Tensor]:
    masks = torch.zeros(2, 8, 8)
    masks[0, :, :4], masks[1, 2:, 4:] = 1, 1
    return list(masks)


CONTROLS = {
    "boxes": lambda: ac.Isolation([(0, 0, 0.5, 1), (0.5, 0.25, 1, 1)], background="isolated", strength=0.7),
    "masks": lambda: ac.Isolation(halves()),
    "a list per subject": lambda: ac.Isolation([[(0, 0, 0.5, 0.5), halves()[1]], "right@0.5,0,1,1"], sigma=(0.2, 0.8)),
    "an entry per image": lambda: ac.SharedAttention.consistory([(0, 0, 0.5, 1), halves()[1]], bias=-1.0),
    "whole images": lambda: ac.SharedAttention(bias=float("-inf")),
    "phrases": lambda: ac.SubjectMasks({"red cat": [2, 3], "dog": [5]}, layers=[1], threshold=0.4),
    "places of phrases": lambda: ac.ConstrainedCrossAttention(
        {"red cat": (0, 0, 0.5, 1), "dog": [halves()[1], (0.5, 0, 1, 0.5)]}, {"red cat": [2, 3], "dog": [5]}
    ),
    "targets": lambda: ac.Reposition(targets=["there@0.5,0,1,1"]),
    "regions": lambda: ac.RegionalPrompts([ac.Region("a cat", mask=halves()[0], feather=0.05), "a dog@0.5,0,1,1"]),
    "heads": lambda: ac.SoftPAG(heads="3.5:0.5,4.2", scale=2.0),
    "infinite width": lambda: ac.SmoothedEnergy(layers=[1], sigma=float("inf")),
}


def tokens(value):
    """An argument with its regions as tokens of an 8 x 8 grid, which can be compared."""
    if isinstance(value, ac.Region):
        return value.prompt, value.strength, value.tokens((8, 8)).tolist()
    if isinstance(value, dict):
        return {name: tokens(item) for name, item in value.items()}
    return [tokens(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("make", CONTROLS.values(), ids=CONTROLS)
def test_controls_survive_json(make):
    control = make()
    facts = json.loads(json.dumps(describe(control), allow_nan=False))
    back = restore(facts)
    assert type(back) is type(control)
    names = [name for name, item in control.__dataclass_fields__.items() if item.init]
    assert set(facts) == {"control", *names}
    for name in names:
        assert tokens(getattr(back, name)) == tokens(getattr(control, name)), name
    assert describe(back) == describe(control)


def test_a_mask_that_is_no_picture_is_told():
    facts = describe(ac.Isolation(halves()))
    facts["subjects"][1][0]["mask_png"] = "AAAA"
    with pytest.raises(ac.AttnCtrlError, match="'subject 1': mask_png is no picture"):
        restore(facts)


def test_nothing_heavy_is_imported_with_requests():
    assert loaded_after("import attnctrl.requests, attnctrl.loading, attnctrl.apps.generate") == "loaded: []"
