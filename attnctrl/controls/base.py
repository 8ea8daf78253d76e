"""What every control is: a frozen dataclass that turns a site into edits of one attention call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..attention import Lerp, Segment
from ..schedule import Schedule
from ..sites import Site, Tokens


if TYPE_CHECKING:
    from ..regions import Region


@dataclass(frozen=True, eq=False)
class Edit:
    """What one control does to one attention call: segments (who attends to whom) and lerps of heads."""

    segments: tuple[Segment, ...] = ()
    lerps: tuple[Lerp, ...] = ()


class Control:
    """Base of the controls. Subclasses are frozen dataclasses.

    A control with `guides = True` edits the perturbed pass and has a `scale`; any other edits the conditional rows themselves.
    """

    guides: bool = False

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def schedule(self) -> Schedule:
        return Schedule(getattr(self, "start", 0.0), getattr(self, "stop", 1.0))

    @property
    def neutral(self) -> bool:
        """True when the control edits nothing at all; it is then not attached."""
        return False

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Sites that the control edits: path -> strength per head, (H,). Raises when it matches none."""
        raise NotImplementedError

    def regions_in_use(self) -> tuple[Region, ...]:
        """Regions whose prompts are encoded and appended to the text."""
        return ()

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        """The edit at a site for rows that the control is for."""
        raise NotImplementedError

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        """The edit for the other rows of the batch (unconditional rows), which keeps them as if the control were absent."""
        return Edit()
