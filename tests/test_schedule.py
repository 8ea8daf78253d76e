import pytest

from attnctrl.errors import AttnCtrlError
from attnctrl.schedule import Schedule, parse_layers


def test_first_and_last_step_are_included():
    assert [Schedule().active(i / 4) for i in range(4)] == [True] * 4
    assert [Schedule(0, 0.5).active(i / 4) for i in range(4)] == [True, True, False, False]
    assert [Schedule(0.5, 1).active(i / 4) for i in range(4)] == [False, False, True, True]


def test_fractions_written_in_decimal_hit_their_step():
    for n in (7, 10, 24, 30, 50):
        for i in range(n):
            assert Schedule(round(i / n, 9), 1.0).active(i / n)
            assert i == 0 or not Schedule(0.0, i / n).active(i / n)


def test_sigma_and_count():
    window = Schedule(sigma=(0.2, 0.8))
    assert [window.active(0.5, sigma) for sigma in (0.1, 0.2, 0.5, 0.8, 0.9)] == [False, True, True, True, False]
    assert not Schedule(0.5, 1.0, sigma=[0.2, 0.8]).active(0.25, 0.5), "both windows count"
    assert window.active(None, 0.5), "a range of noise levels alone needs no step"
    assert Schedule(0, 0.3).covers(10) == 3
    sigmas = (1.0, 0.75, 0.5, 0.25)
    assert window.covers(4, sigmas) == 3 and Schedule(0.5, 1.0, sigma=(0.5, 0.8)).covers(4, sigmas) == 1
    assert Schedule(sigma=(2.0, 3.0)).covers(4, sigmas) == 0 and Schedule(sigma=(2.0, 3.0)).covers(4) == 4
    assert str(Schedule(0, 0.5, sigma=(0.2, float("inf")))) == "0-0.5, sigma 0.2-inf"


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (0.6, 0.5), (-0.1, 1), (0, 1.1)])
def test_refused(bounds):
    with pytest.raises(AttnCtrlError):
        Schedule(*bounds)


@pytest.mark.parametrize(
    "sigma", [(0.8, 0.2), (-1, 1), (0.2,), 0.5, "0.2,0.8", (0.2, "0.8"), (float("nan"), 1), (True, 2)]
)
def test_refused_noise_levels(sigma):
    with pytest.raises(AttnCtrlError, match="sigma=.*is no range of noise levels.*\nHINT"):
        Schedule(sigma=sigma)


def test_unknown_step_is_loud():
    with pytest.raises(AttnCtrlError, match="set_step"):
        Schedule(0, 0.5).active(None)
    assert Schedule().active(None)
    for fraction in (None, 0.5):
        with pytest.raises(AttnCtrlError, match="window 0-1, sigma 0.2-0.8 needs the noise level.*\nHINT.*sigma="):
            Schedule(sigma=(0.2, 0.8)).active(fraction)
    assert not Schedule(0, 0.5, sigma=(0.2, 0.8)).active(0.5), "outside, whatever the noise level"


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (None, (0, 1, 2, 3, 4, 5)),
        ("all", (0, 1, 2, 3, 4, 5)),
        ("1", (1,)),
        (-1, (5,)),
        ("mid", (2, 3)),
        ("1:3", (1, 2)),
        ("4:", (4, 5)),
        ("every:2", (0, 2, 4)),
        ([0, 5], (0, 5)),
        ("0,2:4", (0, 2, 3)),
    ],
)
def test_layers(layers, found):
    assert parse_layers(layers, 6) == found


@pytest.mark.parametrize("layers", ["6", 6, "deep", "5:5", [0, 99], ""])
def test_layers_refused(layers):
    with pytest.raises(AttnCtrlError, match="0 to 5"):
        parse_layers(layers, 6)


def test_one_is_never_ten():
    assert parse_layers("1", 24) == (1,)
