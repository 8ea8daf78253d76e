"""Every control on every family: see `matrix.py`."""

from pathlib import Path

import pytest
import torch

import attnctrl as ac
from attnctrl.attention import run_rows
from attnctrl.families import FAMILIES, find_family
from attnctrl.processors import Session, diffusers

from ..models import TINY
from .matrix import TRIALS, middle, outputs, reason, table


NAMES = sorted(family.name for family in FAMILIES)


def test_every_family_has_a_tiny_model():
    assert set(TINY) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_control_works_or_says_why_not(name, trial):
    why = reason(next(family for family in FAMILIES if family.name == name), trial)
    if why is not None:
        assert len(why) > 30 and (trial.name.split(",")[0] in why or name in why)


class Watch:
    """Collects what a session's engine got and returned at one site."""

    def __init__(self, monkeypatch, path):
        self.calls = []
        plans_for = Session.plans_for

        def noted(session, site, shape, n_k, mask):
            self.path, self.mask = site.path, mask
            return plans_for(session, site, shape, n_k, mask)

        def ran(q, k, v, plans, **kwargs):
            out = run_rows(q, k, v, plans, **kwargs)
            if self.path == path:
                self.calls.append((q, k, v, self.mask, out.clone(), kwargs))
            return out

        monkeypatch.setattr(Session, "plans_for", noted)
        monkeypatch.setattr(diffusers, "run_rows", ran)


def dense(q, k, v, mask, scale):
    """Plain attention with explicit matrices in float64, (B, H, N, D)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask if mask.ndim == 4 else mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1).nan_to_num() @ v, v


@pytest.mark.parametrize("name", NAMES)
def test_only_the_named_head_differs_at_its_site(name, monkeypatch):
    build, call = TINY[name]
    model, inputs = build(), call()
    family = find_family(model)
    sites = family.sites(model)
    layer, head, strength = middle(sites), 1, 0.6
    path = next(site.path for site in sites if site.primary and site.layer == layer)
    control = ac.SoftPAG(heads=[(layer, head)], strength=strength, scale=1.0)
    if "SoftPAG" in dict(family.refuses) or "*" in dict(family.refuses):
        pytest.skip(f"{name} refuses SoftPAG")
    watch = Watch(monkeypatch, path)
    with torch.no_grad(), ac.attach(model, control):
        model(**inputs)
    ((q, k, v, mask, out, kwargs),) = watch.calls
    plain, values = dense(q, k, v, mask, kwargs.get("scale"))
    expected = plain.clone()
    expected[:, head] = torch.lerp(plain[:, head], values[:, head], strength)
    live = torch.ones_like(out[..., :1], dtype=torch.bool)
    if mask is not None:  # rows that may attend to nothing are the model's own business
        full = mask if mask.ndim == 4 else mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        allowed = full if full.dtype == torch.bool else full > -1e4
        live &= allowed.any(-1, keepdim=True)
    torch.testing.assert_close((out * live).double(), expected * live, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(out[:, head].double(), plain[:, head], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_prefix_reuse_is_bit_identical(name):
    build, call = TINY[name]
    model, inputs = build(), call()
    family = find_family(model)
    if "SoftPAG" in dict(family.refuses) or "*" in dict(family.refuses):
        pytest.skip(f"{name} refuses SoftPAG")
    layer = max(site.layer for site in family.sites(model) if site.primary)
    control = ac.SoftPAG(layers=[layer], strength=0.6)
    with torch.no_grad():
        with ac.attach(model, control, prefix_reuse=False):
            whole = outputs(model(**inputs))
        with ac.attach(model, control) as session:
            reused = outputs(model(**inputs))
    assert torch.equal(whole, reused)
    assert session.calls["perturbed blocks"] < len(session.blocks), session.report()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_independent(name):
    """A control on a batch is the control on each of its rows."""
    build, call = TINY[name]
    model, inputs = build(), call()
    family = find_family(model)
    if "SoftPAG" in dict(family.refuses) or "*" in dict(family.refuses):
        pytest.skip(f"{name} refuses SoftPAG")
    control = ac.SoftPAG(layers=[middle(family.sites(model))], strength=0.6)
    with torch.no_grad(), ac.attach(model, control):
        both = outputs(model(**inputs))
        for row in range(2):
            one = family.select_rows(inputs, slice(row, row + 1), 2)
            torch.testing.assert_close(outputs(model(**one))[0], both[row], atol=1e-4, rtol=1e-4)


def test_the_page_is_what_was_run():
    page = Path(__file__).parents[2] / "docs" / "families.md"
    written = "python -m tests.families.matrix > docs/families.md && python -m tests.language.matrix >> docs/families.md"
    assert page.read_text(encoding="utf-8").startswith(table()), written
