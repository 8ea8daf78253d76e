import numpy as np
import pytest

from attnctrl.errors import AttnCtrlError
from attnctrl.evaluate.intervals import Z95, mcnemar, paired_bootstrap, percent, wilson


@pytest.mark.parametrize(("right", "total"), [(1, 10), (5, 10), (97, 100), (499, 500), (300, 1000)])
def test_wilson_ends_solve_the_score_equation(right, total):
    """At both ends the observed rate lies exactly z standard errors away."""
    rate = right / total
    for end in wilson(right, total):
        assert abs(abs(rate - end) - Z95 * np.sqrt(end * (1 - end) / total)) < 1e-12


def test_wilson_known_value_and_limits():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, method 3
    assert wilson(0, 20)[0] == 0.0 and wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("right", "total"), [(-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(right, total):
    with pytest.raises(AttnCtrlError, match="HINT:"):
        wilson(right, total)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    first = [True] * 8 + [False] * 2 + [True] * 30
    second = [False] * 8 + [True] * 2 + [True] * 30
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(first, second) == mcnemar(second, first)
    assert mcnemar([True, False], [True, False]) == 1.0


def test_paired_bootstrap_covers_a_constant_gain_and_is_repeatable():
    first = np.random.default_rng(0).random(50)
    assert paired_bootstrap(first, first + 0.25) == pytest.approx((0.25, 0.25, 0.25))
    noisy = first + np.random.default_rng(1).normal(0.1, 0.2, 50)
    mean, low, high = paired_bootstrap(first, noisy)
    assert low < mean < high
    assert (mean, low, high) == paired_bootstrap(first, noisy)


def test_paired_measures_refuse_unequal_lists():
    for measure in (mcnemar, paired_bootstrap):
        with pytest.raises(AttnCtrlError, match="HINT:"):
            measure([1, 0], [1, 0, 1])


def test_percent_has_three_cells():
    assert percent(97, 100) == "97 / 100 | 97.0 % | 91.5 - 99.0"
    assert percent(0, 0) == "0 / 0 | - | 0.0 - 100.0"
