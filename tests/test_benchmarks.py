"""What the measurements count and compare with."""

from itertools import product

import numpy as np
import pytest
import torch

import attnctrl as ac
from benchmarks.common import counted, kept
from benchmarks.hunt import sign_flips

from .models import sd3_call, tiny_sd3


def test_blocks_are_counted_as_they_run():
    model, inputs = tiny_sd3(layers=4), sd3_call()
    images = inputs["hidden_states"].shape[0]
    for control, perturbed in (
        (ac.SoftPAG(layers=[3]), 1),
        (ac.SkipLayers([1]), 2),
        (ac.SoftPAG(layers=[3], scale=0), 0),
    ):
        with counted(model) as rows, torch.no_grad(), ac.attach(model, control):
            model(**inputs)
        assert sum(rows) == images * (4 + perturbed)
        model(**inputs)
        assert sum(rows) == images * (4 + perturbed), "the count ends with the block"


def test_results_are_kept_for_their_settings(tmp_path):
    path, made = tmp_path / "deep" / "way.json", []

    def make():
        made.append(1)
        return {"right": [True, False], "number": len(made)}

    assert kept(path, {"steps": 4, "pair": (1, 2)}, make) == kept(path, {"steps": 4, "pair": (1, 2)}, make)
    assert len(made) == 1
    assert kept(path, {"steps": 5}, make)["number"] == 2 and kept(path, {"steps": 5}, make)["number"] == 2

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(path, {"steps": 6}, killed)
    assert kept(path, {"steps": 5}, make)["number"] == 2


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_sign_flips_are_the_exact_test_over_all_signs(shift):
    gains = np.random.default_rng(1).normal(shift, 1.0, 10)
    every = np.array(list(product((-1, 1), repeat=10))) @ gains
    exact = float((np.abs(every) >= abs(gains.sum()) - 1e-9).mean())
    assert sign_flips(gains) == pytest.approx(exact, abs=0.012)
    assert sign_flips(-gains) == pytest.approx(sign_flips(gains))


def test_no_gain_is_no_evidence_and_a_steady_one_is():
    assert sign_flips([0.0] * 5) == 1
    assert sign_flips([0.2] * 40) < 1e-3
