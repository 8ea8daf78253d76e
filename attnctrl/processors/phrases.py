"""Phrases of a prompt, looked up with the tokenizers of the pipeline that will read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..controls import Control, RegionalPrompts
from ..controls.regional_prompts import located
from ..errors import AttnCtrlError
from ..families import find_denoiser, find_family
from ..regions import Region


def has_phrases(regions: Iterable[Region]) -> bool:
    """Whether a region is a phrase whose tokens are not known yet."""
    return any(region.of_prompt and region.numbers is None for region in regions)


def find_phrases(regions: Sequence[Region], prompt: str | None, pipe: Any) -> tuple[Region, ...]:
    """The regions with the tokens of their phrases. Raises for a phrase that the prompt does not hold, and for a family whose words
    cannot be told from its tokens."""
    if not has_phrases(regions):
        return tuple(regions)
    if not isinstance(prompt, str):
        raise AttnCtrlError(
            "phrases are looked up in the prompt, and there is none\nHINT: Region.phrase(…, numbers=…)"
        )
    family = find_family(find_denoiser(pipe)[0])
    tokenizers = family.tokenizers_of(pipe)
    if not tokenizers:
        raise AttnCtrlError(
            f"which token of {family.name} belongs to which word is not known\n"
            "HINT: RegionalPrompts.in_prompt(regions, prompt, tokenizer), or regions with prompts of their own"
        )
    return located(regions, prompt, tokenizers)


def with_phrases(controls: Iterable[Control], prompt: str | None, pipe: Any) -> list[Control]:
    """The controls, phrases of their regions looked up in the prompt."""
    return [
        replace(control, regions=find_phrases(control.regions, prompt, pipe))
        if isinstance(control, RegionalPrompts) and has_phrases(control.regions)
        else control
        for control in controls
    ]
