"""The contact sheet of `attnctrl generate --compare`: seeds in columns, without control above, with control below."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont


if TYPE_CHECKING:
    from ..regions import Region

# Told apart by lightness as well as by hue, and none of them a plain red, green or blue that a subject may have.
PALETTE = ("#d81b8c", "#0b7a75", "#e07a00", "#5b3fd0", "#7a8b00", "#00796b", "#ad1457", "#4e342e")
INK, SOFT, LINE, PAPER = "#16181d", "#5d636f", "#d5d8de", "#ffffff"
PAD, GAP = 24, 10
SMALLEST, LARGEST = 256, 512  # pixels of a tile's longer side
# Fonts that know more than Latin letters, as systems install them; Pillow's own comes last and first for Latin text.
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "msgothic.ttc",
    "arial.ttf",
)
ROWS = ("without control", "with control")


def contact_sheet(
    plain: Sequence[Image.Image],
    controlled: Sequence[Image.Image],
    seeds: Sequence[int],
    regions: Sequence[Region],
    prompt: str,
    settings: str,
) -> Image.Image:
    """Both rows of pictures with the regions' outlines, the prompt above, the settings below."""
    tile_size = _tile_size(plain[0].size)
    columns, (width, height) = len(seeds), tile_size
    inner = max(columns * (width + GAP) - GAP, 2 * SMALLEST)
    title = _wrap(prompt, _font(20, prompt), inner)
    notes = _wrap(settings, _font(13, settings), inner)
    label, line, note_line = 26, 28, 19
    top = PAD + len(title) * line + 4
    legend = _legend_rows(regions, inner)
    under = top + 22 + 2 * (label + height) + GAP
    bottom = under + 12 + len(legend) * 24 + len(notes) * note_line + PAD
    sheet = Image.new("RGB", (inner + 2 * PAD, bottom), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, text in enumerate(title):
        draw.text((PAD, PAD - 4 + index * line), text, font=_font(20, prompt), fill=INK)
    for column, seed in enumerate(seeds):
        centre = PAD + column * (width + GAP) + width / 2
        draw.text((centre, top + 4), f"seed {seed}", font=_font(13), fill=SOFT, anchor="ma")
    for row, (name, pictures) in enumerate(zip(ROWS, (plain, controlled))):
        y = top + 22 + row * (label + height + (GAP if row else 0))
        draw.text((PAD, y + 4), name, font=_font(15), fill=INK)
        draw.line((PAD + draw.textlength(name, font=_font(15)) + 10, y + 14, PAD + inner, y + 14), fill=LINE)
        for column, picture in enumerate(pictures):
            x = PAD + column * (width + GAP)
            sheet.paste(_tile(picture, tile_size, regions), (x, y + label))
            draw.rectangle((x - 1, y + label - 1, x + width, y + label + height), outline=LINE)
    y = under + 12
    for items in legend:
        x = PAD
        for index, text, wide in items:
            draw.rounded_rectangle((x, y + 3, x + 14, y + 17), radius=3, fill=_color(index))
            draw.text((x + 20, y + 2), text, font=_font(13, text), fill=INK)
            x += wide
        y += 24
    for index, text in enumerate(notes):
        draw.text((PAD, y + index * note_line), text, font=_font(13, settings), fill=SOFT)
    return sheet


def _tile_size(size: tuple[int, int]) -> tuple[int, int]:
    longer = max(size)
    if longer < SMALLEST:
        factor = -(-SMALLEST // longer)
        return size[0] * factor, size[1] * factor
    if longer > LARGEST:
        return round(size[0] * LARGEST / longer), round(size[1] * LARGEST / longer)
    return size


def _tile(picture: Image.Image, size: tuple[int, int], regions: Sequence[Region]) -> Image.Image:
    """The picture at the size of a tile, enlarged by whole pixels, with every region's outline and name."""
    picture = picture.convert("RGB")
    tile = picture.resize(size, Image.NEAREST if size[0] > picture.width else Image.LANCZOS)
    draw = ImageDraw.Draw(tile)
    corners = []
    for index, region in enumerate(regions):
        corners.append(_outline(tile, draw, region, _color(index)))
    taken: list[tuple[float, float, float, float]] = []
    for index, (region, corner) in enumerate(zip(regions, corners)):
        _chip(draw, corner, region.prompt, _color(index), size, taken)
    return tile


def _outline(tile: Image.Image, draw: ImageDraw.ImageDraw, region: Region, color: str) -> tuple[int, int, int]:
    """Draws a region and returns (left, bottom, width) of the room for its name."""
    width, height = tile.size
    if region.box is not None:
        x0, y0, x1, y1 = (round(side * length) for side, length in zip(region.box, (width, height, width, height)))
        box = (x0 + 2, y0 + 2, max(x1 - 3, x0 + 3), max(y1 - 3, y0 + 3))
        draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=PAPER, width=4)
        draw.rectangle(box, outline=color, width=2)
        return box[0], box[3], box[2] - box[0]
    inside = _mask(region, tile.size)
    halo = inside.filter(ImageFilter.MaxFilter(3)), inside.filter(ImageFilter.MinFilter(7))
    edge = inside, inside.filter(ImageFilter.MinFilter(5))
    for (outer, inner), paint in ((halo, PAPER), (edge, color)):
        ring = np.asarray(outer) & ~np.asarray(inner)
        tile.paste(paint, mask=Image.fromarray(ring))
    left, _, right, bottom = inside.getbbox() or (0, 0, width, height)
    return left, bottom - 3, right - left


def _mask(region: Region, size: tuple[int, int]) -> Image.Image:
    pixels = Image.fromarray(region.pixels.mul(255).round().byte().numpy())
    return pixels.resize(size, Image.BILINEAR).point(lambda value: 255 * (value >= 128))


def _chip(
    draw: ImageDraw.ImageDraw, room: tuple[int, int, int], text: str, color: str, size: tuple[int, int], taken: list
) -> None:
    """The region's name on its colour, inside the region at the bottom left, above names that are there already."""
    font = _font(12, text)
    left, bottom, width = room
    widest = min(max(width, 60), size[0] - left)
    text = _shorten(text, font, widest - 10)
    x1, y0 = left + font.getlength(text) + 9, bottom - 18
    while any(left < t[2] and t[0] < x1 and y0 < t[3] and t[1] < y0 + 18 for t in taken) and y0 > 18:
        y0 -= 19
    taken.append((left, y0, x1, y0 + 18))
    draw.rectangle((left, y0, x1, y0 + 18), fill=color)
    draw.text((left + 5, y0 + 9), text, font=font, fill=PAPER, anchor="lm")


def _legend_rows(regions: Sequence[Region], inner: int) -> list[list[tuple[int, str, float]]]:
    """Regions with their full prompts, broken into rows that fit."""
    rows: list[list[tuple[int, str, float]]] = []
    used = 0.0
    for index, region in enumerate(regions):
        where = ", ".join(f"{side:g}" for side in region.box) if region.box is not None else "mask"
        text = _shorten(f"{region.prompt}  ({where})", _font(13, region.prompt), inner - 20)
        wide = 20 + _font(13, text).getlength(text) + 22
        if not rows or used + wide - 22 > inner:
            rows.append([])
            used = 0.0
        rows[-1].append((index, text, wide))
        used += wide
    return rows


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines that fit; breaks between words, inside a word only where one is longer than a line or has no spaces."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Pillow's own font, which looks the same everywhere; another one for letters that it lacks, where there is one."""
    return _load_font(size, latin=all(ord(letter) < 0x250 or letter in "…·–’“”" for letter in text))


@functools.lru_cache
def _load_font(size: int, latin: bool) -> ImageFont.FreeTypeFont:
    for name in () if latin else FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
