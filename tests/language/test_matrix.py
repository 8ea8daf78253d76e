"""Every control of language models on every family: see `matrix.py`."""

from pathlib import Path

import pytest
import transformers as tf

import attnctrl as ac
from attnctrl.controls import LanguageControl
from attnctrl.controls.spec import control_types
from attnctrl.families.language import FAMILIES

from . import dense as ref
from .matrix import NAMES, TRIALS, family_of, reason, section
from .models import prompts, tiny
from .test_language import assert_steps, reference, steps


def test_every_family_and_every_control_is_tried():
    assert {family_of(name) for name in NAMES} - {""} == {family.name for family in FAMILIES}
    kinds = {name for name, kind in control_types().items() if issubclass(kind, LanguageControl)}
    assert {trial.name for trial in TRIALS} == kinds | {"HeadScale"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_control_works_or_says_why_not(name, trial):
    why = reason(name, trial)
    if why is not None:
        assert len(why) > 30 and (trial.name in why or family_of(name) in why)


def test_glm4v_equals_dense():
    model = tiny("glm4v")
    prompt = prompts("glm4v", model)
    plain = steps(model, prompt)
    with ac.attach(model, ac.PAI(alpha=0.8, layers="1:")):
        found = steps(model, prompt)
    assert_steps(found, reference(model, prompt, ref.pai(prompt.image, 0.8, range(1, 4))), plain)


def test_branches_on_the_implementation_are_refused():
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    with pytest.raises(ac.AttnCtrlError, match="different things under different attention implementations"):
        ac.attach(model, ac.PASTA((0, 1)))


def test_the_page_is_what_was_run():
    page = Path(__file__).parents[2] / "docs" / "families.md"
    wanted = "\n" + section()
    assert page.read_text(encoding="utf-8").endswith(wanted), "python -m tests.language.matrix >> docs/families.md"
