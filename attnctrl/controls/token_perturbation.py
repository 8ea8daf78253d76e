"""Token perturbation: guidance away from a pass whose image tokens are shuffled before some blocks.

Rajabi et al., "Token Perturbation Guidance for Diffusion Models", 2025, arXiv 2506.10036.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import AttnCtrlError
from ..schedule import parse_layers
from ..sites import Block, Tokens
from .base import Control, Moment, Streams


@dataclass(frozen=True, eq=False)
class TokenPerturbation(Control):
    """Guidance away from a pass in which every chosen block gets its tokens in another order.

    final = uncond + g·(cond − uncond) + scale·(cond − perturbed). In the perturbed pass h ← h[π] before each chosen block, π a
    new uniform permutation per block and step, the same for all rows of the batch, and not undone. Nothing is drawn from
    torch's global generators.

    In a UNet, whose blocks know no positions, block(πh) = π block(h), so only the surrounding residual tells the order; the
    paper shuffles SDXL's ten-block stage of the down path. With rotary or added positions (transformers) a token also meets
    the wrong position inside the block.

    Args:
        layers: layer numbers as `parse_layers` reads them.
        region: "image" shuffles image tokens among each other; "all" also the tokens of every prompt.
        scale: w, always +w·(cond − perturbed).
        seed: of the permutations. Step and block are mixed in; where the step is not known (a bare denoiser without
            `set_step`) a block has the same permutation in every call.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high), the noise levels at which the control acts besides; None for all. See `Schedule`.
        weight: `weight(fraction, sigma) -> float` multiplies the scale at every step.
    """

    layers: str | int | Iterable[int]
    region: Literal["all", "image"] = "image"
    scale: float = 3.0
    seed: int = 0
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None
    weight: Callable[[float, float | None], float] | None = None

    guides = True

    def __post_init__(self) -> None:
        wrong = []
        if self.region not in ("all", "image"):
            wrong.append(f"region={self.region!r} is neither 'all' nor 'image'")
        if not isinstance(self.seed, int):
            wrong.append(f"seed={self.seed!r} is not an integer")
        if wrong:
            raise AttnCtrlError("TokenPerturbation: " + "; ".join(wrong))
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @property
    def neutral(self) -> bool:
        return self.scale == 0

    def touches_blocks(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        layers = parse_layers(self.layers, len(blocks))
        return tuple(block.path for block in blocks if block.layer in layers)

    def edit_block(
        self, block: Block, streams: Streams, tokens: Tokens, moment: Moment, run: Callable[[Streams], Streams]
    ) -> Streams:
        """The block on shuffled streams; text that the block only reads keeps its order."""
        key = hashlib.sha256(f"{self.seed}/{moment.step}/{block.path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        moved = dict(streams)
        for name in block.gives:
            if name not in streams or (self.region == "image" and name not in ("image", "sequence")):
                continue
            order = torch.arange(streams[name].shape[1])
            for span in self._spans(name, tokens, len(order)):
                order[span] = order[span][torch.randperm(span.stop - span.start, generator=generator)]
            moved[name] = streams[name].index_select(1, order.to(streams[name].device))
        return run(moved)

    def _spans(self, stream: str, tokens: Tokens, length: int) -> list[slice]:
        """Runs of tokens of a stream that are shuffled, each among itself."""
        inside = [
            place for place in tokens.streams if stream == "sequence" or (place[0] == "image") == (stream == "image")
        ]
        at = min((start for _, start, _ in inside), default=0)
        if sum(stop - start for _, start, stop in inside) != length:
            raise AttnCtrlError(
                f"TokenPerturbation: stream {stream} has {length} tokens, its layout {tokens.streams} says otherwise"
            )
        wanted = [place for place in inside if self.region == "all" or place[0] == "image"]
        return [slice(start - at, stop - at) for _, start, stop in wanted]
