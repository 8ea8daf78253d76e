"""Skipped layers: guidance away from a pass that leaves out some blocks, or their attention.

Skip layer guidance (SLG) of Stable Diffusion 3.5; Hyung et al., "Spatiotemporal Skip Guidance for Enhanced Video Diffusion
Sampling" (STG), 2024, arXiv 2411.18664.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..attention import Lerp
from ..errors import AttnCtrlError
from ..schedule import parse_layers
from ..sites import Block, Site, Tokens
from .base import Control, Edit, Moment, Streams


Parts = Literal["block", "attention"]
Branch = Literal["cond", "uncond"]


@dataclass(frozen=True, eq=False)
class SkipLayers(Control):
    """Some blocks let their input through, h_out = h_in, or their attention lets each token see itself alone, A = I.

        branch "cond"      final = uncond + g·(cond − uncond) + scale·(cond − skipped)     one more pass
        branch "uncond"    final = skipped uncond + g·(cond − skipped uncond)              no more passes

    Args:
        layers: layer numbers as `parse_layers` reads them, e.g. 7, "7,8,9", "mid". A block that returns other streams than it
            takes, like the last one of SD3, cannot be skipped.
        parts: "block" (SLG; STG's residual skip) or "attention" (STG's attention skip: every head, all rows).
        branch: which pass skips. With "uncond" the pipeline's own guidance scale g is the strength, and `scale` is not used.
        scale: w, always +w·(cond − skipped); SD3.5-medium was published with layers 7, 8, 9 at 2.5 and `start=0.01, stop=0.2`.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high), the noise levels at which the control acts besides; None for all. See `Schedule`.
        weight: `weight(fraction, sigma) -> float` multiplies the scale at every step.
    """

    layers: str | int | Iterable[int]
    parts: Parts = "block"
    branch: Branch = "cond"
    scale: float = 2.8
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None
    weight: Callable[[float, float | None], float] | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.layers is None or self.layers == "all":
            wrong.append("layers names some layers; without any block there is no model left")
        if self.parts not in get_args(Parts):
            wrong.append(f"parts={self.parts!r} is neither 'block' nor 'attention'")
        if self.branch not in get_args(Branch):
            wrong.append(f"branch={self.branch!r} is neither 'cond' nor 'uncond'")
        if self.branch == "uncond" and self.weight is not None:
            wrong.append("weight multiplies a scale, and branch='uncond' has none")
        if wrong:
            raise AttnCtrlError("SkipLayers: " + "; ".join(wrong) + "\nHINT: SkipLayers('7,8,9', stop=0.2)")
        if not isinstance(self.layers, (str, int)):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @property
    def guides(self) -> bool:
        return self.branch == "cond"

    @property
    def skips(self) -> bool:
        return self.parts == "block"

    @property
    def neutral(self) -> bool:
        return self.guides and self.scale == 0

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        if self.parts != "attention":
            return {}
        primary = [site for site in sites if site.primary]
        layers = parse_layers(self.layers, len({site.layer for site in primary}))
        found = {s.path: torch.ones(s.heads) for s in primary if s.layer in layers and s.kind != "cross"}
        if not found:
            raise AttnCtrlError(
                f"SkipLayers: layers {self.layers!r} have cross-attention alone, which has no own token to see"
            )
        return found

    def touches_blocks(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        if self.parts != "block":
            return ()
        layers = parse_layers(self.layers, len(blocks))
        chosen = [block for block in blocks if block.layer in layers]
        wrong = [reason for block in chosen for reason in _why_not(block)]
        if wrong:
            able = [str(block.layer) for block in blocks if not _why_not(block)]
            raise AttnCtrlError(
                f"SkipLayers: a skipped block hands its input on, but {'; '.join(wrong)}\n"
                f"HINT: parts='attention', or layers that can be skipped: {', '.join(able) or 'none'}"
            )
        return tuple(block.path for block in chosen)

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        return Edit(lerps=(Lerp("identity", heads),))

    def edit_block(
        self, block: Block, streams: Streams, tokens: Tokens, moment: Moment, run: Callable[[Streams], Streams]
    ) -> Streams:
        return {name: streams[name] for name in block.gives}


def _why_not(block: Block) -> list[str]:
    """Why a block cannot be replaced by its input. Text that cross-attention only reads need not come out again."""
    takes, gives = {stream for stream, _ in block.takes}, set(block.gives)
    lost = sorted((takes - gives) & set(block.streams))
    return [f"{block.path} takes {name} and does not return it" for name in lost] + [
        f"{block.path} returns {name} without taking it" for name in sorted(gives - takes)
    ]
