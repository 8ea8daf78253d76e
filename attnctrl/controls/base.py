"""What every control is: a frozen dataclass that turns a site into edits of one attention call, or edits whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..attention import Lerp, NegativeText, Segment, Watch
from ..errors import AttnCtrlError
from ..schedule import Schedule
from ..sites import Block, Site, Tokens


if TYPE_CHECKING:
    from ..regions import Region


Streams = dict[str, torch.Tensor]
WINDOW = ("start", "stop", "sigma", "weight")


@dataclass(frozen=True, eq=False)
class Edit:
    """What one control does to one attention call: segments (who attends to whom), a negative text, lerps of heads and what only
    looks, and a scale per head, (H,) or (B, H)."""

    segments: tuple[Segment, ...] = ()
    lerps: tuple[Lerp | Watch, ...] = ()
    head_scale: torch.Tensor | None = None
    negative: NegativeText | None = None


@dataclass(frozen=True)
class Moment:
    """When a pass runs: the step (from 0) of `steps`, its fraction of the steps and its sigma; None where it is not known. `first`
    is True in the first pass of a picture (or batch), as far as that can be told."""

    step: int | None = None
    steps: int | None = None
    fraction: float | None = None
    sigma: float | None = None
    first: bool = False


class Control:
    """Base of the controls. Subclasses are frozen dataclasses.

    A control with `guides = True` edits the perturbed pass and has a `scale`; any other edits rows of the denoiser's own pass: the
    conditional ones, with `branch = "uncond"` the others, or with `both` all of them.
    """

    guides: bool = False
    branch: Literal["cond", "uncond"] = "cond"
    both: bool = False
    """True when `bystander` edits the other rows too, also where these run in a call of their own."""
    shapes: bool = False
    """True when the control decides who attends to whom (segments); two of those exclude each other."""
    moves: bool = False
    """True when `edit_positions` moves tokens. Families whose positions are no argument of the denoiser refuse such a control."""
    skips: bool = False
    """True when the blocks that the control edits do not run."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def example(cls, sites: Sequence[Site]) -> Control:
        """The control at as many places of a model as it can have: every layer, or every head."""
        primary = [site for site in sites if site.primary]
        every: dict[str, Any] = {
            "layers": [site.layer for site in primary],
            "heads": [(site.layer, head) for site in primary for head in range(site.heads)],
        }
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        if unknown := [name for name in needed if name not in every]:
            raise AttnCtrlError(f"{cls.__name__} needs {', '.join(unknown)}, for which there is no example")
        return cls(**{name: every[name] for name in needed})

    @property
    def revision(self) -> int:
        """Grows when the control's edits become others than they were for the same site and tokens."""
        return 0

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

    def check_images(self, count: int) -> None:
        """Raises if the control cannot work on a batch of so many images."""

    def check_grid(self, grid: tuple[int, ...]) -> None:
        """Raises if the control cannot work on the image tokens of the model's first block; coarser blocks may lose a region."""

    def begin(self, moment: Moment) -> None:
        """The denoiser's own pass of a step begins, inside the control's window or not. Not called for perturbed passes, nor for
        the unconditional call of a step that has two."""

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        """The edit at a site for rows that the control is for."""
        return Edit()

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        """The edit for the other rows of the batch, which keeps them as if the control were absent."""
        return Edit()

    def beside(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        """The edit for the other rows: `bystander`, or what the control makes of them."""
        return self.bystander(site, tokens)

    def edit_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotary positions of the image's tokens and of those of reference pictures behind them, (N, n) with frame, row and column
        first. Called for every pass if `moves`."""
        return positions

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
