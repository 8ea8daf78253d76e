"""Every control on every family, tried on tiny random models of the real classes.

    python -m tests.families.matrix > docs/families.md && python -m tests.language.matrix >> docs/families.md

write the page, its second table from `tests/language/matrix.py`; `test_matrix.py` compares the first with the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import attnctrl as ac
from attnctrl.controls import Control
from attnctrl.families import FAMILIES, Family, find_family
from attnctrl.processors import Session
from attnctrl.processors.region_texts import RegionTexts
from attnctrl.sites import Block, Site

from ..models import TINY


HEADER = """# Families and controls

Which control works on which model family. Written by `python -m tests.families.matrix`, which runs every control on a tiny random model of
each real class: switched off it must leave the prediction bit for bit, on it must act and change it, and detaching must restore the model.
SubjectMasks must act and change nothing.
That SoftPAG changes the named head alone is tested apart, against a dense computation of the attention call. A dash refuses with the reason
below the table.

NormalizedAttention and RegionalPrompts append prompts to the text; on HunyuanImage and HunyuanVideo all prompts of a call must then have
the same length.

`attnctrl inspect MODEL` says the same for one model, with its layers and heads.
"""


class FixedTexts(RegionTexts):
    """Texts of regions as fixed noise of the model's text shape, for denoisers without an encoder."""

    def _encode(self, name, prompt, embeds, text):
        generator = torch.Generator().manual_seed(len(prompt) + 11)
        return torch.randn(1, text.shape[1], text.shape[-1], generator=generator)


class PromptSession(Session):
    """A session on a bare denoiser that knows the prompts of regions."""

    def __init__(self, model, *controls):
        super().__init__(model, *controls)
        self._texts = FixedTexts(self)


@dataclass(frozen=True)
class Trial:
    """A control made for a model, and how to switch it off without taking it away."""

    name: str
    make: Callable[[list[Site], list[Block]], Control]
    neutral: dict
    changes: bool = True  # the prediction, when it is on


def last(sites: list[Site]) -> int:
    return max(site.layer for site in sites if site.primary)


def middle(sites: list[Site]) -> int:
    return last(sites) // 2


TRIALS = (
    Trial("SoftPAG", lambda s, b: ac.SoftPAG(heads=[(middle(s), 1)], strength=0.6, scale=2.0), {"strength": 0.0}),
    Trial(
        "SoftPAG, uniform",
        lambda s, b: ac.SoftPAG(layers=[middle(s)], target="uniform", strength=0.6),
        {"strength": 0.0},
    ),
    Trial(
        "SoftPAG, mean query",
        lambda s, b: ac.SoftPAG(heads=[(middle(s), 0)], target="mean_query", strength=0.6),
        {"strength": 0.0},
    ),
    Trial(
        "SoftPAG, image only",
        lambda s, b: ac.SoftPAG(heads=[(middle(s), 1)], region="image", strength=0.6),
        {"scale": 0.0},
    ),
    Trial("SmoothedEnergy", lambda s, b: ac.SmoothedEnergy(layers=[middle(s)]), {"scale": 0.0}),
    Trial("SmoothedEnergy, finite", lambda s, b: ac.SmoothedEnergy(layers=[middle(s)], sigma=1.0), {"scale": 0.0}),
    Trial("SkipLayers", lambda s, b: ac.SkipLayers(layers=[middle(s)]), {"scale": 0.0}),
    Trial("SkipLayers, attention", lambda s, b: ac.SkipLayers(layers=[middle(s)], parts="attention"), {"scale": 0.0}),
    Trial("TokenPerturbation", lambda s, b: ac.TokenPerturbation(layers=[middle(s)]), {"scale": 0.0}),
    Trial("HeadScale", lambda s, b: ac.HeadScale(heads=[(middle(s), 1)]), {"strength": 0.0}),
    Trial("NormalizedAttention", lambda s, b: ac.NormalizedAttention("a bad picture"), {"scale": 1.0}),
    Trial(
        "RegionalPrompts",
        lambda s, b: ac.RegionalPrompts(
            [ac.Region("left", box=(0, 0, 0.5, 1)), ac.Region("right", box=(0.5, 0, 1, 1))]
        ),
        {"strength": 0.0},
    ),
    Trial(
        "RegionalPrompts, not isolated",
        lambda s, b: ac.RegionalPrompts([ac.Region("left", box=(0, 0, 0.5, 1))], isolate=False),
        {"strength": 0.0},
    ),
    Trial(
        "Isolation",
        lambda s, b: ac.Isolation([(0, 0, 0.5, 1), (0.5, 0, 1, 1)]),
        {"strength": 0.0},
    ),
    Trial("SharedAttention", lambda s, b: ac.SharedAttention(layers=[middle(s)]), {"strength": 0.0}),
    Trial(
        "ConstrainedCrossAttention",
        lambda s, b: ac.ConstrainedCrossAttention({"subject": (0, 0, 0.5, 1)}, {"subject": [1]}),
        {"strength": 0.0},
    ),
    Trial("SubjectMasks", lambda s, b: ac.SubjectMasks({"subject": [0]}, stop=1.0), {}, changes=False),
)


def outputs(output) -> torch.Tensor:
    sample = output[0]
    return torch.stack(list(sample)) if isinstance(sample, (list, tuple)) else sample


def reason(family: Family, trial: Trial) -> str | None:
    """None when the control works on the family's tiny model, else the reason of the refusal. Anything else raises."""
    build, call = TINY[family.name]
    appends = trial.name.startswith(("NormalizedAttention", "RegionalPrompts"))
    one_length = appends and family.trims  # behind prompts of one length alone
    model, inputs = build(), call(missing=0) if one_length else call()
    sites, blocks = family.sites(model), family.blocks(model)
    with torch.no_grad():
        before = outputs(model(**inputs))
        try:
            control = trial.make(sites, blocks)
            with PromptSession(model, replace(control, **trial.neutral)):
                assert torch.equal(outputs(model(**inputs)), before), "neutral is not bit-identical"
            with PromptSession(model, control) as session:
                after = outputs(model(**inputs))
            assert session.hits[control], "the control never acted"
        except ac.AttnCtrlError as error:
            return str(error).splitlines()[0]
        finally:
            assert torch.equal(outputs(model(**inputs)), before), "detaching does not restore the model"
    assert after.isfinite().all()
    assert torch.equal(after, before) != trial.changes, f"the control changed {'nothing' if trial.changes else 'it'}"
    return None


def table() -> str:
    """The Markdown page."""
    families = sorted(FAMILIES, key=lambda family: family.name)
    lines = [HEADER, "| family | denoiser | " + " | ".join(trial.name for trial in TRIALS) + " |"]
    lines.append("|---|---|" + "---|" * len(TRIALS))
    notes: dict[str, list[str]] = {}
    for family in families:
        cells = []
        for trial in TRIALS:
            why = reason(family, trial)
            cells.append("yes" if why is None else "–")
            if why is not None:
                notes.setdefault(f"{family.name}: {why}", []).append(trial.name)
        lines.append(f"| {family.name} | `{family.denoiser}` | " + " | ".join(cells) + " |")
    lines += ["", "Refusals:", ""]
    lines += [f"- {', '.join(names)} on {note}" for note, names in notes.items()]
    return "\n".join(lines) + "\n"


def family_of(name: str) -> Family:
    return find_family(TINY[name][0]())


if __name__ == "__main__":
    print(table(), end="")
