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


@pytest.mark.parametrize("name", ["SoftPAG", "SkipLayers", "TokenPerturbation", "NormalizedAttention", "HeadScale"])
@pytest.mark.parametrize("written", ["(0.2,0.8)", "[0.2, 0.8]", "(0.2, inf)"])
def test_noise_levels_go_through_text_and_json(name, written):
    needed = {"SkipLayers": "layers=2, ", "TokenPerturbation": "layers=2, ", "HeadScale": "heads='1.2', "}.get(
        name, ""
    )
    control = parse_control(f"{name}({needed}sigma={written})")
    high = math.inf if "inf" in written else 0.8
    assert control.schedule.sigma == (0.2, high)
    arguments = {"sigma": plain_value(control.sigma)} | {
        k: getattr(control, k) for k in ("layers", "heads") if k in needed
    }
    assert make_control(name, arguments).schedule == control.schedule
    with pytest.raises(ac.AttnCtrlError, match="sigma=.*no range of noise levels"):
        parse_control(f"{name}({needed}sigma=0.5)")


def test_smoothed_energy_tells_its_width_from_noise_levels():
    control = parse_control("SmoothedEnergy(layers=2, sigma=2.0, sigma_range=(0.2, 0.8))")
    assert control.sigma == 2.0 and control.schedule.sigma == (0.2, 0.8)
    with pytest.raises(ac.AttnCtrlError, match="sigma_range"):
        parse_control("SmoothedEnergy(layers=2, sigma=(0.2, 0.8))")


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
