"""Controls that place tokens anew and say who sees whom (PINE, ConcentricCausal): which one a session has, and where it can be exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..attention.row_engine import Mask
from ..attention.rows import RowEdit
from ..controls.base import Control
from ..controls.language import LanguageControl, Prompt
from ..errors import AttnCtrlError


def find_arranging(fitted: Mapping[Control, Control], decoder: nn.Module) -> tuple[Any, nn.Module] | None:
    """(the control that arranges tokens, the module of the language model that rotates by position), or None.

    Raises AttnCtrlError for two of them, and beside one that does not share its rows for any that edits rows.
    """
    spoken = {control: one for control, one in fitted.items() if isinstance(one, LanguageControl)}
    found = [(control, one) for control, one in spoken.items() if one.arranges]
    if not found:
        return None
    first, chosen = found[0]
    others = [
        control.name
        for control, one in spoken.items()
        if control is not first
        and (one.arranges or not (chosen.shares_rows or type(one).row_edits is LanguageControl.row_edits))
    ]
    if others:
        raise AttnCtrlError(f"{first.name} and {', '.join(others)} edit the same rows\nHINT: attach one of them")
    return chosen, chosen.find_rotation(decoder)


def check_arranged(
    now: Prompt, q: Tensor, n_k: int, seen: Mask, edits: Sequence[RowEdit], softcap: float | None
) -> None:
    """Raises where tokens cannot be arranged exactly: q (B, H, T, D) sees n_k keys under a mask, with edits of rows beside."""
    if seen.pairs is not None or not (seen.causal or q.shape[2] == 1) or n_k < now.total or softcap:
        raise AttnCtrlError("tokens can be placed anew under plain causal masks only, without window or softcap")
    behind = [0 if at is None else max(at - now.past, 0) for at in now.after_image]
    for edit in edits if any(behind) else ():
        if edit.start is None or any(start < end for start, end in zip(edit.start, behind, strict=True)):
            raise AttnCtrlError(
                "another control edits rows of the image, which are arranged\nHINT: attach one of them"
            )
