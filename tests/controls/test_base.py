from dataclasses import dataclass
from typing import Any

import pytest

import attnctrl as ac
from attnctrl.controls import Control, LanguageControl
from attnctrl.controls.spec import control_types
from attnctrl.families import find_family

from ..models import tiny_sd3


KINDS = {name: kind for name, kind in control_types().items() if not issubclass(kind, LanguageControl)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_example_takes_every_layer(kind):
    model = tiny_sd3()
    family = find_family(model)
    sites, blocks = family.sites(model), family.blocks(model)
    control = kind.example(sites)
    touched = set(control.touches(sites)) | set(control.touches_blocks(blocks))
    assert type(control) is kind
    layers = {place.layer for place in (*sites, *blocks) if place.path in touched}
    touches = kind.touches is not Control.touches or kind.touches_blocks is not Control.touches_blocks
    assert layers == ({site.layer for site in sites} if touches else set())


def test_an_argument_without_example_is_named():
    @dataclass(frozen=True, eq=False)
    class Odd(Control):
        layers: Any
        colour: str

    with pytest.raises(ac.AttnCtrlError, match="Odd needs colour, for which there is no example"):
        Odd.example([])
