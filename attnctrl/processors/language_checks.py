"""What no session of a language model can work with: controls of other models, ways of generation that read ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..controls.base import Control
from ..controls.language import LanguageControl
from ..errors import AttnCtrlError
from ..families.language import LanguageFamily


def check_control(control: Control, family: LanguageFamily) -> None:
    """Raises why a control cannot work on a family."""
    found = getattr(getattr(control, "heads", None), "family", None)
    if found not in (None, family.name):
        raise AttnCtrlError(
            f"{control.name}: the head set was found on family {found!r}, this model is {family.name!r}"
        )
    reasons = dict(family.refuses)
    image = isinstance(control, LanguageControl) and control.needs_image
    if reason := reasons.get(control.name, reasons.get("image") if image else None):
        raise AttnCtrlError(f"{control.name} cannot work on {family.name}: {reason}")
    if isinstance(control, LanguageControl):
        return
    if control.guides or control.shapes or not hasattr(control, "heads") or control.name != "HeadScale":
        raise AttnCtrlError(
            f"{control.name} is for diffusion models\nHINT: on language models PAI, PASTA, VAR, VHR and the like, and HeadScale without scale"
        )
    if not control.schedule.everywhere:
        raise AttnCtrlError(f"{control.name}: a language model has no denoising steps, so start and stop mean nothing")


def refuse_assisted(names: Sequence[str], given: Mapping[str, Any], config: Any) -> None:
    """Raises where `generate` would read guessed tokens: its arguments and the generation config in force."""
    guesses = ("prompt_lookup_num_tokens", "assistant_early_exit")
    if given.get("assistant_model") is not None or any(
        given.get(name) or getattr(config, name, None) for name in guesses
    ):
        raise AttnCtrlError(
            f"{', '.join(names)}: assisted generation reads several guessed tokens a call, which would pass for prompt\n"
            "HINT: generate without assistant_model and prompt_lookup_num_tokens"
        )
