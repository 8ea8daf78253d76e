"""What every control is: a frozen dataclass that turns a site into edits of one attention call, or edits whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..attention import Lerp, NegativeText, Segment
from ..schedule import Schedule
from ..sites import Block, Site, Tokens


if TYPE_CHECKING:
    from ..regions import Region


Streams = dict[str, torch.Tensor]
WINDOW = ("start", "stop", "sigma", "weight")


@dataclass(frozen=True, eq=False)
class Edit:
    """What one control does to one attention call: segments (who attends to whom), a negative text, lerps of heads, and a scale
    per head, (H,) or (B, H)."""

    segments: tuple[Segment, ...] = ()
    lerps: tuple[Lerp, ...] = ()
    head_scale: torch.Tensor | None = None
    negative: NegativeText | None = None


@dataclass(frozen=True)
class Moment:
    """When a pass runs: the step (from 0) of `steps`, its fraction of the steps and its sigma; None where it is not known."""

    step: int | None = None
    steps: int | None = None
    fraction: float | None = None
    sigma: float | None = None


class Control:
    """Base of the controls. Subclasses are frozen dataclasses.

    A control with `guides = True` edits the perturbed pass and has a `scale`; any other edits rows of the denoiser's own pass: the
    conditional ones, or with `branch = "uncond"` the others.
    """

    guides: bool = False
    branch: Literal["cond", "uncond"] = "cond"
    shapes: bool = False
    """True when the control decides who attends to whom (segments); two of those exclude each other."""
    skips: bool = False
    """True when the blocks that the control edits do not run."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def schedule(self) -> Schedule:
        """When the control acts, from its arguments `start`, `stop`, `sigma` and `weight`, those that it has."""
        return Schedule(**{name: getattr(self, name) for name in WINDOW if hasattr(self, name)})

    @property
    def neutral(self) -> bool:
        """True when the control edits nothing at all; it is then not attached."""
        return False

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Sites that the control edits: path -> strength per head, (H,), or (B, H) for one head set per image of the batch.
        Raises when it matches none."""
        return {}

    def touches_blocks(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Paths of the blocks that the control edits as a whole. Raises when it matches none."""
        return ()

    def regions_in_use(self) -> tuple[Region, ...]:
        """Regions whose prompts are encoded and appended to the text."""
        return ()

    def check_grid(self, grid: tuple[int, ...]) -> None:
        """Raises if the control cannot work on the image tokens of the model's first block; coarser blocks may lose a region."""

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        """The edit at a site for rows that the control is for."""
        return Edit()

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        """The edit for the other rows of the batch, which keeps them as if the control were absent."""
        return Edit()

    def edit_block(
        self, block: Block, streams: Streams, tokens: Tokens, moment: Moment, run: Callable[[Streams], Streams]
    ) -> Streams:
        """Stands in for a block that `touches_blocks` named.

        Args:
            streams: what goes in, each (B, N, C), as named by `block.takes`; only rows that the control is for count.
            tokens: the layout of the block's attention.
            run: calls the block itself with other streams and returns what it gives.

        Returns:
            what comes out, as named by `block.gives`.
        """
        return run(streams)
