"""Image tokens that the answer hardly looks at leave the sequence early, so that the layers behind have less to do.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models" (FastV),
2024, arXiv 2403.06764; scores without position trend and padding after "Attention Debiasing for Token Pruning in Vision Language
Models", 2025, arXiv 2508.17807.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.rows import FAR, Pattern, RowEdit, Tally
from ..errors import AttnCtrlError
from ..sites import Site
from .language import LanguageControl, Model, Prompt


@dataclass(frozen=True, eq=False)
class TokenPruning(LanguageControl):
    """Keeps some image tokens of a prompt from a layer on; the others leave the sequence, and the caches of these layers never hold them.

    The score of an image token is what the last row of the prompt attends to it in the layer before, the mean over heads, after all
    other edits. Kept tokens keep their positions. Hidden states and logits at pruned positions are those of the layer where they left.
    Each call that reads images prunes the tokens of its own; what was pruned stays so while the answer is written.

    Published priors were fitted on the benchmarks that they are measured on; a table of `fit_position_prior` comes from the model and
    neutral prompts. Say which one you used.

    Args:
        layer: the first layer without the others, 2 in the paper; 1 to the last one.
        keep: image tokens of a prompt that stay: a count, or as a float their share. 1.0 is off.
        debias: None; "position" divides the scores by the exponential trend over positions that fits the prompt's own scores best; a
            table of trend values over the image tokens from first to last, such as `fit_position_prior` returns, divides by these.
        pad: tokens of padding never stay: plain bands along two opposite sides of a square picture. Only where image tokens are
            square pictures (LLaVA, FastVLM, PaliGemma).
    """

    layer: int = 2
    keep: int | float = 128
    debias: Literal["position"] | Sequence[float] | None = None
    pad: bool = True

    def __post_init__(self) -> None:
        wrong = []
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            wrong.append(f"layer={self.layer!r} is no layer behind the first one, whose attention is the score")
        share = isinstance(self.keep, float)
        if isinstance(self.keep, bool) or not (0 < self.keep <= 1 if share else self.keep >= 1):
            wrong.append(f"keep={self.keep!r} is neither a count from 1 nor a share above 0 and up to 1.0")
        if isinstance(self.debias, str) or self.debias is None:
            wrong += [f"debias={self.debias!r} is not None, 'position' or a table"] * (
                self.debias not in (None, "position")
            )
        else:
            table = tuple(float(value) for value in self.debias)
            object.__setattr__(self, "debias", table)
            if len(table) < 2 or not all(math.isfinite(value) and value > 0 for value in table):
                wrong.append("debias is no table of two or more finite numbers above 0")
        if wrong:
            raise AttnCtrlError(f"TokenPruning: {'; '.join(wrong)}\nHINT: TokenPruning(layer=2, keep=128)")
        object.__setattr__(self, "tally", Tally())  # of one attachment: `fit` makes a copy

    @property
    def neutral(self) -> bool:
        return isinstance(self.keep, float) and self.keep == 1

    def fit(self, model: Model) -> TokenPruning:
        super().fit(model)
        if self.layer >= model.layers:
            raise AttnCtrlError(
                f"TokenPruning: layer {self.layer} does not exist, {model.name} has layers 0 to {model.layers - 1}"
            )
        found = replace(self)
        object.__setattr__(found, "needs_pixels", self.pad and model.grid == "square")
        return found

    def touches(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The layer whose attention is the score."""
        every = super().touches(sites)
        return {site.path: every[site.path] for site in sites if site.layer == self.layer - 1}

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        if not prompt.reads:
            return ()
        look = prompt.notes[(self, "look")] = look_at_images(prompt, n_k)
        return (look.edit(),)

    def pruned(self, prompt: Prompt) -> Tensor:
        """(B, length) bool: tokens of the running call, which has read the prompt up to `layer`, that leave. Copies of a prompt agree."""
        look = prompt.notes.pop((self, "look"))
        leave = torch.zeros(prompt.batch, prompt.length, dtype=torch.bool, device=prompt.image.device)
        padding = self._padding(prompt)
        for row in range(0, prompt.batch, prompt.copies):
            if not look.parts or not look.parts[row]:
                continue
            places = prompt.places[row][prompt.places[row] >= prompt.past] - prompt.past
            score = look.of(row)[:, 0].mean(0)
            real = torch.ones_like(score, dtype=torch.bool) if padding is None else ~padding[row][places]
            score = self._without_trend(score, real).masked_fill(~real, 0.0)
            count = max(1, round(self.keep * len(score))) if isinstance(self.keep, float) else self.keep
            order = score.argsort(descending=True, stable=True)[min(count, max(1, int(real.sum()))) :]
            leave[row : row + prompt.copies, places[order]] = True
            self.tally.add(prompts=1.0, tokens=float(len(score)), kept=float(len(score) - len(order)))
        return leave

    def _without_trend(self, score: Tensor, real: Tensor) -> Tensor:
        if self.debias is None:
            return score
        if self.debias == "position":
            return score / exponential_trend(score, real)
        table = torch.tensor(self.debias, dtype=score.dtype, device=score.device)
        return score / F.interpolate(table[None, None], len(score), mode="linear", align_corners=True)[0, 0]

    def _padding(self, prompt: Prompt) -> Tensor | None:
        """(B, length) bool: image tokens of the running call that show padding."""
        pixels = prompt.given.get("pixel_values") if self.needs_pixels else None
        image = prompt.image[:: prompt.copies]
        if pixels is None or pixels.ndim != 4 or int(image.sum()) % len(pixels):
            return None
        side = math.isqrt(int(image.sum()) // len(pixels))
        if side * side * len(pixels) != int(image.sum()):
            return None
        image = image[:, prompt.past :]
        found = torch.zeros_like(image)
        here = pixels[len(pixels) - int(image.sum()) // side**2 :]
        found[image] = padded_patches(here, side).flatten().to(image.device)
        return found.repeat_interleave(prompt.copies, 0)

    def says(self) -> tuple[str, ...]:
        n = self.tally["prompts"]
        if not n:
            return ()
        kept, tokens = self.tally["kept"] / n, self.tally["tokens"] / n
        return (f"TokenPruning: kept {kept:.4g} of {tokens:.4g} image tokens a prompt from layer {self.layer} on",)


def look_at_images(prompt: Prompt, n_k: int) -> Pattern:
    """What keeps the last row of each prompt over the image tokens of the running call; only the first copy of a prompt is looked at."""
    past = prompt.past - (prompt.total - n_k)
    keys = tuple(at[at >= past] for at in prompt.image_keys(n_k))
    rows = [
        (at,) if at != FAR and row % prompt.copies == 0 and len(keys[row]) else ()
        for row, at in enumerate(prompt.row_of_last())
    ]
    return Pattern(tuple(rows), keys)


def exponential_trend(score: Tensor, real: Tensor) -> Tensor:
    """exp(a·x) over positions x in [0, 1], with the a that fits log(score) (n,) best in squares, where a token is `real`."""
    x = torch.linspace(0, 1, len(score), dtype=score.dtype, device=score.device)
    used = real & (score > 0)
    if int(used.sum()) < 2:
        return torch.ones_like(score)
    at, log = x[used] - x[used].mean(), score[used].log()
    return (x * (at * log).sum() / at.square().sum()).exp()


def padded_patches(pixels: Tensor, side: int) -> Tensor:
    """Which patches are padding for more than half, (N, side, side) bool, in pictures (N, C, S, S) that were padded to a square: plain bands
    of one colour along two opposite sides, as wide as each other up to two pixels."""
    found = torch.zeros(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
    for axis in (0, 1):
        lines = pixels.movedim(2 + axis, 1).flatten(2)  # (N, S, C·S): rows, then columns
        step = pixels.shape[2 + axis] / side
        colour = pixels[:, :, :1, :1].expand_as(pixels).movedim(2 + axis, 1).flatten(2)
        plain = ((lines - colour).abs() <= 1e-2).all(-1).int()
        head, tail = plain.cumprod(1).sum(1), plain.flip(1).cumprod(1).sum(1)
        bands = (head > 0) & (tail > 0) & ((head - tail).abs() <= 2) & (head < plain.shape[1])
        middle = (torch.arange(side, device=pixels.device) + 0.5) * step
        out = (middle < head[:, None]) | (middle > plain.shape[1] - tail[:, None])  # half of a patch lies in a band
        out = out & bands[:, None]
        found |= out[:, :, None] if axis == 0 else out[:, None]
    return found
