"""Every control of language models on every family, tried on tiny random models of the real classes.

    python -m tests.language.matrix

prints the second section of `docs/families.md`, which `test_matrix.py` compares with the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

import attnctrl as ac
from attnctrl.controls import Control
from attnctrl.families.language import FAMILIES, REFUSED, find_language

from .models import BUILDERS, PARTIAL, prompts, tiny
from .test_language import WRITTEN, steps


HEADER = """## Vision-language models

Which control works on which family of language models. Written by `python -m tests.language.matrix`, which runs every control on a tiny
random model of each real class, on two prompts, one of them padded on the left: the prompt and two decode steps. Switched off, a control
must leave all logits bit for bit; on, it must act and change those of each prompt's last token in all three calls; and detaching must
restore the model. RecordAttention must change nothing and show where the model looked. ConcentricCausal cannot be switched off. A dash
refuses with the reason below the table.

Models without a family are in no table: they are taken as they are, because their configuration says what has to be known. Text-only
models are among them.
"""


@dataclass(frozen=True, eq=False)
class Trial:
    """A control, and how to switch it off without taking it away; `neutral` None where it cannot be."""

    control: Control
    neutral: dict | None
    changes: bool = True  # the logits, when it is on

    @property
    def name(self) -> str:
        return self.control.name


OFF = {"strength": 0.0}
TRIALS = (
    Trial(ac.PAI(alpha=0.8, layers="1:"), OFF),
    Trial(ac.VAF(image=1.6, system=0.5, layers="1:3"), OFF),
    Trial(ac.PASTA((0, 2), alpha=0.3), OFF),
    Trial(ac.VAR("any", tau=2.0, min_non_sink=0.0, min_image_mass=0.0, layers="1:"), OFF),
    Trial(ac.VHR(layers="1:"), OFF),
    Trial(ac.GIFT(layers="1:"), OFF),
    Trial(ac.SPIN(keep=0.5), OFF),
    Trial(ac.AdaptVis(), OFF),
    Trial(ac.ACT(), OFF),
    Trial(ac.PAINT(), OFF),
    Trial(ac.PINE([(1, 2), (2, 4)]), {"segments": [(1, 2)]}),
    Trial(ac.ConcentricCausal(), None),
    Trial(ac.TokenPruning(keep=2), {"keep": 1.0}),
    Trial(ac.HeadScale([(2, 1)]), OFF),
    Trial(ac.RecordAttention(), {}, changes=False),
)
NAMES = (*BUILDERS, *PARTIAL)


def logits(model, prompt) -> list[torch.Tensor]:
    """Of the prompt and of two tokens after it."""
    return steps(model, prompt, written=WRITTEN[:, :2])


@cache
def case(name: str) -> tuple:
    """A model, its prompts and its own logits."""
    model = tiny(name, torch.float32)
    prompt = prompts(name, model)
    return model, prompt, logits(model, prompt)


@cache
def reason(name: str, trial: Trial) -> str | None:
    """None when the control works on the tiny model, else the reason of the refusal. Anything else raises."""
    model, prompt, before = case(name)

    def unchanged() -> bool:
        return all(torch.equal(one, other) for one, other in zip(logits(model, prompt), before, strict=True))

    try:
        if trial.neutral is not None:
            with ac.attach(model, replace(trial.control, **trial.neutral)):
                assert unchanged(), "off is not bit-identical"
        with ac.attach(model, trial.control) as session:
            if trial.changes:
                after = logits(model, prompt)
            else:
                assert unchanged(), "what only looks changes something"
                shown = [session.attention_values(token, row=row) for token in range(3) for row in range(2)]
    except ac.AttnCtrlError as error:
        return str(error).splitlines()[0]
    finally:
        assert unchanged(), "detaching does not restore the model"
    assert session.hits[trial.control], "the control never acted"
    if trial.changes:
        assert all(one.isfinite().all() for one in after)
        changed = [(one[:, -1] != other[:, -1]).any(1) for one, other in zip(after, before, strict=True)]
        assert all(rows.all() for rows in changed), f"the control left rows as they were: {changed}"
    else:
        assert all(bool((one >= 0).all()) and 0 < float(one.sum()) < 1 + 1e-5 for one in shown)
    return None


def family_of(name: str) -> str:
    """As the table calls it; "" where there is none."""
    found = find_language(case(name)[0]).family
    return found.name if found in FAMILIES else ""


def refusals() -> list[str]:
    """A line per reason: which controls it refuses on which models."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in NAMES:
        model = case(name)[0]
        label = family_of(name) or type(model).__name__
        for trial in TRIALS:
            if (why := reason(name, trial)) is not None:
                why = why.replace(label, "the model").replace(trial.name, "the control")
                found.setdefault(why, {}).setdefault(label, []).append(trial.name)
    lines = []
    for why, by_model in found.items():
        together: dict[tuple[str, ...], list[str]] = {}
        for label, names in by_model.items():
            together.setdefault(tuple(names), []).append(label)
        lines += [f"- {', '.join(names)} on {', '.join(labels)}: {why}" for names, labels in together.items()]
    for why in dict.fromkeys(REFUSED.values()):
        types = ", ".join(f"`{model_type}`" for model_type in REFUSED if REFUSED[model_type] == why)
        lines.append(f"- every control on models of type {types}: {why}")
    return lines


def section() -> str:
    """The Markdown section."""
    lines = [HEADER, "| family | class | " + " | ".join(trial.name for trial in TRIALS) + " |"]
    lines.append("|---|---|" + "---|" * len(TRIALS))
    for name in sorted(NAMES, key=lambda name: (not family_of(name), family_of(name).lower())):
        cells = " | ".join("yes" if reason(name, trial) is None else "–" for trial in TRIALS)
        lines.append(f"| {family_of(name)} | `{type(case(name)[0]).__name__}` | {cells} |")
    return "\n".join([*lines, "", "Refusals:", "", *refusals()]) + "\n"


if __name__ == "__main__":
    print("\n" + section(), end="")
