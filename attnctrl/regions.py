"""`Region`: a part of the picture with its own prompt, as a box in fractions or a mask, turned into tokens at any grid."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from .errors import AttnCtrlError


@dataclass(frozen=True, eq=False)
class Region:
    """A prompt and where it belongs.

    Args:
        prompt: what the region shows. Also kept as the region's name in messages.
        box: (x0, y0, x1, y1) as fractions of width and height, 0-1, origin at the top left.
        mask: instead of a box: a file, a PIL image, an array or a tensor (H, W); bright is inside, any size.
        prompt_embeds: (1, T, D) text states instead of encoding `prompt`, for denoisers without a pipeline.
        strength: multiplies the control's strength for this region, 0-1.
        downsample: how a mask becomes tokens: "area" takes tokens covered to at least one half, "max" every token it touches.
    """

    prompt: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: Any = None
    prompt_embeds: torch.Tensor | None = None
    strength: float = 1.0
    downsample: Literal["area", "max"] = "area"
    _pixels: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        name = f"region {self.prompt!r}"
        if (self.box is None) == (self.mask is None):
            raise AttnCtrlError(
                f"{name} needs either a box or a mask\nHINT: Region({self.prompt!r}, box=(0, 0, 0.5, 1))"
            )
        if self.box is not None:
            box = tuple(float(side) for side in self.box)
            if len(box) != 4:
                raise AttnCtrlError(f"{name}: a box is (x0, y0, x1, y1), got {self.box}")
            x0, y0, x1, y1 = box
            if not all(0 <= side <= 1 for side in box):
                raise AttnCtrlError(
                    f"{name}: box {_numbers(box)} reaches outside 0-1\nHINT: fractions of width and height, not pixels"
                )
            if x0 >= x1 or y0 >= y1:
                raise AttnCtrlError(
                    f"{name}: box {_numbers(box)} is empty\nHINT: (x0, y0, x1, y1) with x0 < x1 and y0 < y1"
                )
            object.__setattr__(self, "box", box)
        else:
            object.__setattr__(self, "_pixels", _read_mask(self.mask, name))
        if not 0 <= self.strength <= 1:
            raise AttnCtrlError(f"{name}: strength {self.strength} is not between 0 and 1")

    @classmethod
    def parse(cls, text: str) -> Region:
        """``"a red cat@0,0,0.5,1"`` (box) or ``"a red cat@mask.png"`` (mask file)."""
        prompt, at, place = text.rpartition("@")
        if not at or not place.strip():
            raise AttnCtrlError(f"region {text!r} has no place\nHINT: 'a red cat@0,0,0.5,1' or 'a red cat@mask.png'")
        sides = place.split(",")
        try:
            box = tuple(float(side) for side in sides)
        except ValueError:
            return cls(prompt.strip(), mask=place.strip())
        if len(box) != 4:
            raise AttnCtrlError(f"region {text!r}: a box has four numbers x0,y0,x1,y1, not {len(box)}")
        return cls(prompt.strip(), box=box)

    @property
    def pixels(self) -> torch.Tensor | None:
        """The mask as it was given, (H, W) float32 in 0-1; None for a box."""
        return self._pixels

    def coverage(self, grid: tuple[int, int]) -> torch.Tensor:
        """How much of every token the region covers, (rows, columns) float32 in 0-1."""
        rows, columns = grid
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            return _overlap(y0, y1, rows)[:, None] * _overlap(x0, x1, columns)[None, :]
        return F.adaptive_avg_pool2d(self._pixels[None, None], grid)[0, 0]

    def tokens(self, grid: tuple[int, ...]) -> torch.Tensor:
        """The region's tokens, (rows * columns,) bool, or (frames * rows * columns,) on the grid of a video: the same place in every
        frame. Raises when it covers none."""
        *frames, rows, columns = grid
        covered = self.coverage((rows, columns)).flatten().repeat(*frames or (1,))
        inside = covered > 1e-6 if self.downsample == "max" else covered >= 0.5 - 1e-6
        if not inside.any():
            raise AttnCtrlError(
                f"region {self.prompt!r} covers no token of the {rows} x {columns} grid\n"
                "HINT: enlarge it, or use Region(…, downsample='max') to take every token that it touches"
            )
        return inside

    def describe(self) -> str:
        return f"{self.prompt!r} at {_numbers(self.box) if self.box is not None else 'a mask'}"


def _overlap(low: float, high: float, cells: int) -> torch.Tensor:
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    covered = torch.minimum(edges[1:], torch.tensor(high)) - torch.maximum(edges[:-1], torch.tensor(low))
    return (covered.clamp(min=0) * cells).float()


def _read_mask(mask: Any, name: str) -> torch.Tensor:
    """(H, W) float32 in 0-1."""
    from PIL import Image

    if isinstance(mask, (str, os.PathLike)):
        path = Path(mask)
        if not path.is_file():
            raise AttnCtrlError(f"{name}: mask file {str(path)!r} does not exist")
        try:
            with Image.open(path) as opened:
                opened.load()
                mask = (
                    opened.getchannel("A")
                    if opened.mode == "RGBA" and opened.getchannel("A").getextrema()[0] < 255
                    else opened.convert("L")
                )
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise AttnCtrlError(f"{name}: mask file {str(path)!r} cannot be read as an image: {error}") from None
    if isinstance(mask, Image.Image):
        pixels = torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)
    else:
        pixels = torch.as_tensor(mask).detach().cpu()
        scale = 255.0 if pixels.dtype == torch.uint8 and pixels.max() > 1 else 1.0
        pixels = pixels.float().squeeze() / scale
    if pixels.ndim != 2:
        raise AttnCtrlError(f"{name}: a mask is (H, W), got {tuple(pixels.shape)}")
    if not (pixels.isfinite().all() and 0 <= pixels.min() and pixels.max() <= 1):
        raise AttnCtrlError(f"{name}: mask values lie between 0 and 1 (or 0 and 255 as uint8)")
    if not (pixels > 0).any():
        raise AttnCtrlError(f"{name}: the mask is empty")
    return pixels


def _numbers(box) -> str:
    return "(" + ", ".join(f"{side:g}" for side in box) + ")"
