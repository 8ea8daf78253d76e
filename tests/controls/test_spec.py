import math

import pytest

import attnctrl as ac
from attnctrl.controls.spec import control_types, make_control, parse_control, plain_value


def test_every_public_control_can_be_named():
    kinds = control_types()
    assert {"SoftPAG", "RegionalPrompts", "SkipLayers", "HeadScale"} <= set(kinds)
    assert all(kinds[name] is getattr(ac, name) for name in kinds) and "Control" not in kinds


@pytest.mark.parametrize(
    "text, name, expected",
    [
        ("SkipLayers(layers='2:4', scale=2.5)", "SkipLayers", {"layers": "2:4", "scale": 2.5}),
        ("SoftPAG", "SoftPAG", {"heads": None, "strength": 1.0}),
        (" SoftPAG(layers=[3, 4], target='uniform') ", "SoftPAG", {"layers": [3, 4], "target": "uniform"}),
        ("SmoothedEnergy(layers=2, sigma=inf)", "SmoothedEnergy", {"sigma": math.inf}),
        ("RegionalPrompts(regions=['a cat@0,0,1,1'], isolate=False)", "RegionalPrompts", {"isolate": False}),
    ],
)
def test_text_becomes_the_control(text, name, expected):
    control = parse_control(text)
    assert control.name == name
    assert all(getattr(control, key) == value for key, value in expected.items())


@pytest.mark.parametrize(
    "text, message",
    [
        ("SoftPIG()", "no control 'SoftPIG'"),
        ("SoftPAG(head='3.5')", "has no argument head"),
        ("SkipLayers()", "needs layers"),
        ("SoftPAG('3.5')", "by name"),
        ("SoftPAG(**{'heads': '3.5'})", "by name"),
        ("SoftPAG(heads=open('x'))", "no plain value"),
        ("__import__('os').system('true')", "no Name"),
        ("SoftPAG(heads='3.5'", "cannot be read"),
        ("", "cannot be read"),
        ("SoftPAG(strength=2)", "strength=2"),
        ("SoftPAG(strength='much')", "SoftPAG"),
    ],
)
def test_bad_text_says_what_is_wrong(text, message):
    with pytest.raises(ac.AttnCtrlError, match=message) as caught:
        parse_control(text)
    assert "\n" not in str(caught.value) or "HINT:" in str(caught.value)


def test_arguments_as_json():
    assert plain_value(make_control("SoftPAG", {"heads": "3.5:0.5"}).heads) == [[3, 5, 0.5]]
    assert plain_value(math.inf) == "inf" and plain_value((1, 2)) == [1, 2]
