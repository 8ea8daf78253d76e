"""`Region`: a part of the picture with its own prompt, as a box in fractions or a mask, turned into tokens at any grid."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

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
        feather: width of the soft edge inside the region, 0-0.5 as a fraction of the picture's width and height: over it the
            region's share rises from 0 to full. Edges on the border of the picture stay hard.
        negative_prompt: what the region's part of the unconditional prediction follows, also an empty text; None leaves that to the
            negative prompt of the whole picture. Read with classifier-free guidance alone.
        negative_prompt_embeds: (1, T, D) text states instead of encoding it.
        of_prompt: `prompt` is a phrase of the picture's prompt rather than a prompt of its own. See `Region.phrase`.
        occurrence: which of the places where the phrase stands, from 1; None if it stands there once.
        numbers: of the phrase's tokens in the text that the model reads; None until they are looked up.
    """

    prompt: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: Any = None
    prompt_embeds: torch.Tensor | None = None
    strength: float = 1.0
    downsample: Literal["area", "max"] = "area"
    feather: float = 0.0
    negative_prompt: str | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    of_prompt: bool = False
    occurrence: int | None = None
    numbers: tuple[int, ...] | None = None
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
        if not 0 <= self.feather <= 0.5:
            raise AttnCtrlError(
                f"{name}: feather {self.feather} is not between 0 and 0.5\nHINT: a fraction of the picture, e.g. 0.05"
            )
        self._check_phrase(name)

    def _check_phrase(self, name: str) -> None:
        if not self.of_prompt:
            if self.occurrence is not None or self.numbers is not None:
                raise AttnCtrlError(
                    f"{name}: occurrence and numbers are those of a phrase\nHINT: Region.phrase({self.prompt!r}, box=…)"
                )
            return
        if not self.prompt.strip():
            raise AttnCtrlError("a region's phrase is empty\nHINT: Region.phrase('a red cat', box=(0, 0, 0.5, 1))")
        if self.prompt_embeds is not None:
            raise AttnCtrlError(f"{name} is a phrase of the picture's prompt and has prompt_embeds of its own")
        if self.occurrence is not None and self.occurrence < 1:
            raise AttnCtrlError(f"{name}: occurrence {self.occurrence}, and the places of a phrase count from 1")
        if self.numbers is not None:
            numbers = tuple(sorted({int(number) for number in self.numbers}))
            if not numbers or numbers[0] < 0:
                raise AttnCtrlError(f"{name}: numbers {self.numbers} are no tokens of a text")
            object.__setattr__(self, "numbers", numbers)

    @classmethod
    def phrase(
        cls,
        text: str,
        box: tuple[float, float, float, float] | None = None,
        *,
        occurrence: int | None = None,
        numbers: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Region:
        """A phrase of the picture's own prompt and where it belongs; nothing more is encoded.

        `RegionalPipeline` and `RegionalPrompts.in_prompt` look up its tokens. Where it stands several times in the prompt, `occurrence`
        says which one is meant. `options` are other arguments of `Region`.
        """
        return cls(text, box, of_prompt=True, occurrence=occurrence, numbers=numbers, **options)

    @property
    def encoded(self) -> bool:
        """It has text that is encoded apart from the picture's prompt."""
        return not self.of_prompt or self.has_negative

    @property
    def has_negative(self) -> bool:
        """It has a negative prompt of its own."""
        return self.negative_prompt is not None or self.negative_prompt_embeds is not None

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

    def check_sides(self, grid: tuple[int, ...]) -> None:
        """Warns where a mask has other proportions than the picture: it is stretched over it."""
        if self._pixels is None:
            return
        (height, width), (rows, columns) = self._pixels.shape, grid[-2:]
        slack = 0.05 + 0.5 / min(rows, columns, height, width)  # of rounding to whole tokens and pixels
        if not 1 / (1 + slack) <= (width * rows) / (height * columns) <= 1 + slack:
            warnings.warn(
                f"region {self.prompt!r}: a mask of {width} x {height} is stretched over a picture of {columns} x {rows} tokens"
            )

    def coverage(self, grid: tuple[int, int]) -> torch.Tensor:
        """How much of every token the region covers, (rows, columns) float32 in 0-1."""
        return self._within(*(_cells(count, 0.0) for count in grid))

    def tokens(self, grid: tuple[int, ...], keep: bool = False) -> torch.Tensor:
        """The region's tokens, (rows * columns,) bool, or (frames * rows * columns,) on the grid of a video: the same place in every
        frame. Raises when it covers none; with `keep`, for the coarser levels of a UNet, it warns and takes the token that the
        region covers most."""
        *frames, rows, columns = grid
        covered = self.coverage((rows, columns)).flatten()
        inside = covered > 1e-6 if self.downsample == "max" else covered >= 0.5 - 1e-5
        if not inside.any():
            lost = f"region {self.prompt!r} covers no token of the {rows} x {columns} grid"
            if not keep:
                raise AttnCtrlError(
                    f"{lost}\nHINT: enlarge it, or use Region(…, downsample='max') to take every token that it touches"
                )
            warnings.warn(f"{lost} of a coarser level, and keeps one there")
            inside[covered.argmax()] = True
        return inside.repeat(*frames or (1,))

    def weights(self, grid: tuple[int, ...], keep: bool = False) -> torch.Tensor:
        """The region's share of every token, 1 inside and 0 outside, rising over `feather`; (rows * columns,) float32, or as long
        as `tokens`. Linear across a straight edge: twice the covered share of the window of +-feather around a token, minus 1.
        """
        *frames, rows, columns = grid
        inside = self.tokens(grid, keep).float()
        if self.feather == 0:
            return inside
        near = self._within(_cells(rows, self.feather), _cells(columns, self.feather))
        soft = inside * (2 * near.flatten() - 1).clamp(min=0).repeat(*frames or (1,))
        if soft.any() or keep:
            return soft if soft.any() else inside
        raise AttnCtrlError(
            f"region {self.prompt!r}: a feather of {self.feather:g} leaves nothing of it\n"
            "HINT: at most half of its width and height"
        )

    def _within(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """How much of every window lies in the region, (R, C) float32; windows are (R, 2) and (C, 2), from and to in 0-1."""
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            down, across = (torch.tensor([side], dtype=torch.float64) for side in ((y0, y1), (x0, x1)))
            return (_shares(rows, down) @ _shares(columns, across).T).float()
        height, width = self._pixels.shape
        down, across = _shares(rows, _cells(height, 0.0)), _shares(columns, _cells(width, 0.0))
        return down.float() @ self._pixels @ across.float().T

    def describe(self) -> str:
        return f"{self.prompt!r} at {_numbers(self.box) if self.box is not None else 'a mask'}"


def _cells(count: int, reach: float) -> torch.Tensor:
    """(count, 2) from and to of equal cells in 0-1; with a reach, of the windows of +-reach around their centres."""
    edges = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    if reach == 0:
        return torch.stack([edges[:-1], edges[1:]], dim=1)
    centres = (edges[:-1] + edges[1:]) / 2
    return torch.stack([centres - reach, centres + reach], dim=1).clamp(0, 1)


def _shares(windows: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """The share of every window that lies in every part, (W, P) float64."""
    low = torch.maximum(windows[:, None, 0], parts[None, :, 0])
    high = torch.minimum(windows[:, None, 1], parts[None, :, 1])
    return (high - low).clamp(min=0) / (windows[:, 1] - windows[:, 0])[:, None]


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
