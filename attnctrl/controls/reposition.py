"""Reposition: subjects of reference pictures take the positions of the place where they shall stand.

He et al., "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention", 2024, arXiv
2411.19261; for models with rotary positions it is a change of coordinates, as in Tan et al. (OminiControl), 2024, arXiv 2411.15098.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AttnCtrlError
from ..regions import Region
from .base import Control
from .subject_masks import as_regions


Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Reposition(Control):
    """Tokens of a reference picture get the rotary positions of another place, and so guide the image there.

    In models whose reference pictures stand in the sequence with positions of their own (FLUX.1 Kontext, FLUX.2), the bounding box
    (x0, y0, x1, y1) of a source is laid over that of its target. A token in row y and column x of the source gets, with all
    coordinates as fractions of their picture,

        y' = t_y0 + (y - s_y0) (t_y1 - t_y0) / (s_y1 - s_y0)      x' likewise

    which also stretches it. Positions need not be whole numbers; no token is resampled, and tokens outside the source stay. Every
    layer and both halves of classifier-free guidance see the new positions, at no cost.

    Keys of UNets have no positions. There `SharedAttention(..., reposition=Reposition(...))` lends the tokens of an image of the batch as if
    its features had been cut out and brought to the size of the target: see `counts`.

    Args:
        targets: where in the image each source lands: a `Region`, a box (x0, y0, x1, y1) in fractions, or a mask, of which the bounding
            box counts. An empty list is neutral.
        sources: what lands there: a `Region`, a box or a mask on its reference picture, of which just these tokens move; None for the whole
            picture, also as an entry. Of sources that share tokens, the last one takes them.
        pictures: the number, from 0, of the reference picture of each source; None for one each, in order.
        strength: 0 (off) to 1; in between, tokens go a part of the way.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high) noise levels to which the window is restricted.
    """

    targets: Sequence[Any] = ()
    sources: Sequence[Any] | None = None
    pictures: Sequence[int] | None = None
    strength: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None

    both = True
    moves = True

    def __post_init__(self) -> None:
        wrong, count = [], 0
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        given = {name: getattr(self, name) for name in ("targets", "sources") if getattr(self, name) is not None}
        lone = [name for name, places in given.items() if isinstance(places, (str, Region)) or _is_box(places)]
        wrong += [f"{name}={given[name]!r} is one place, not a list" for name in lone]
        if not lone:
            count = len(self.targets)
            wrong += [
                f"{len(items)} {name} for {count} targets"
                for name, items in (("sources", self.sources), ("pictures", self.pictures))
                if items is not None and len(items) != count
            ]
        if any(number < 0 for number in self.pictures or ()):
            wrong.append(f"pictures={self.pictures!r} count from 0")
        if wrong:
            raise AttnCtrlError(
                f"Reposition: {'; '.join(wrong)}\nHINT: Reposition([(0.5, 0, 1, 1)]), a box per source"
            )
        targets = tuple(as_regions(place, f"target {i}") for i, place in enumerate(self.targets))
        whole = (0.0, 0.0, 1.0, 1.0)
        places = [whole if place is None else place for place in self.sources or [None] * count]
        sources = tuple(as_regions(place, f"source {i}") for i, place in enumerate(places))
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "pictures", tuple(range(count) if self.pictures is None else self.pictures))
        self.schedule

    @property
    def neutral(self) -> bool:
        return self.strength == 0 or not self.targets

    def counts(self, grid: tuple[int, int]) -> torch.Tensor:
        """How many tokens of the target each token of a picture becomes if the box of the source is resized to that of the target, by
        nearest neighbours: (pictures, rows * columns) float32, 1 outside all sources. Attention over such repeated keys and values
        is attention over each of them once, with the log of its count added to its logit.
        """
        rows, columns = grid
        found = torch.ones(max(self.pictures) + 1, rows, columns)
        for target, source, number in zip(self.targets, self.sources, self.pictures, strict=True):
            onto, inside = (
                torch.stack([region.tokens(grid, keep=True) for region in place]).any(0).view(rows, columns)
                for place in (target, source)
            )
            down, across = (_repeats(inside.any(axis), onto.any(axis)) for axis in (1, 0))
            repeats = torch.outer(down, across)
            if not repeats[inside].any():
                raise AttnCtrlError(
                    f"Reposition: {target[0].prompt!r} is so small on the {rows} x {columns} grid that no token of the source is left\n"
                    "HINT: a larger target, or layers with finer grids"
                )
            found[number][inside] = (1 - self.strength + self.strength * repeats)[inside]
        return found.flatten(1)

    def edit_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions (N, n) in float32, with those of the sources moved."""
        (_, grid), *references = _pictures(positions.double().cpu())
        if max(self.pictures) >= len(references):
            raise AttnCtrlError(
                f"Reposition moves reference picture {max(self.pictures)}, and this call carries {len(references)}\n"
                "HINT: they count from 0; FluxKontextPipeline(image=…), Flux2Pipeline(image=[…])"
            )
        moved = positions.to(torch.float32, copy=True)
        for target, source, number in zip(self.targets, self.sources, self.pictures, strict=True):
            span, (rows, columns) = references[number]
            inside = torch.stack([region.tokens((rows, columns)) for region in source]).any(0)
            (left, top, right, bottom), onto = _bounds(source), _bounds(target)
            index = inside.nonzero().flatten()
            y = (index.div(columns, rounding_mode="floor").double() + 0.5) / rows
            x = (index.remainder(columns).double() + 0.5) / columns
            y = grid[0] * (onto[1] + (y - top) * (onto[3] - onto[1]) / (bottom - top)) - 0.5
            x = grid[1] * (onto[0] + (x - left) * (onto[2] - onto[0]) / (right - left)) - 0.5
            before = positions[span.start + index.to(positions.device), 1:3].double().cpu()
            after = torch.lerp(before, torch.stack([y, x], 1), self.strength).round(decimals=6)
            moved[span.start + index.to(moved.device), 1:3] = after.to(moved)
        return moved


def _pictures(positions: torch.Tensor) -> list[tuple[slice, tuple[int, int]]]:
    """The tokens and the grid (rows, columns) of the image and of every reference picture, which differ in their frame."""
    frames, sizes = positions[:, 0].unique_consecutive(return_counts=True)
    found, start = [], 0
    for frame, size in zip(frames.tolist(), sizes.tolist(), strict=True):
        ids = positions[start : start + size, 1:3]
        rows, columns = (int(side) + 1 for side in ids.amax(0) - ids.amin(0))
        if rows * columns != size:
            raise AttnCtrlError(
                f"the positions of frame {frame:g} span {rows} x {columns} tokens but there are {size}"
            )
        found.append((slice(start, start + size), (rows, columns)))
        start += size
    return found


def _bounds(place: tuple[Region, ...]) -> Box:
    """The bounding box of regions in fractions; of a mask, of its pixels from one half on."""
    boxes = []
    for region in place:
        if region.box is not None:
            boxes.append(region.box)
            continue
        height, width = region.pixels.shape
        bright = region.pixels >= 0.5
        y, x = (bright.any(axis).nonzero().flatten() for axis in (1, 0))
        if not len(y):
            raise AttnCtrlError(f"the mask of {region.prompt!r} is nowhere brighter than one half")
        boxes.append((int(x[0]) / width, int(y[0]) / height, (int(x[-1]) + 1) / width, (int(y[-1]) + 1) / height))
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _repeats(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How often tokens along an axis, (n,), are picked when the span of the source is resized to that of the target; 0 outside it."""
    (first, last), (top, bottom) = (side.nonzero().flatten()[[0, -1]].tolist() for side in (source, target))
    size, onto = last + 1 - first, bottom + 1 - top
    picked = first + torch.arange(onto) * size // onto
    return torch.bincount(picked, minlength=len(source)).float()


def _is_box(place: Any) -> bool:
    return (
        isinstance(place, (list, tuple)) and len(place) > 0 and all(isinstance(side, (int, float)) for side in place)
    )
