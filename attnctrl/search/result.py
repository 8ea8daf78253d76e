"""What a head search found: the table of every head in every round, a map of layers and heads, and the head set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..heads import FILE_NAME, HeadSet
from ..sites import Site
from .record import write_atomic


Where = tuple[int | str, int]
INK, SOFT, PAPER, ABSENT = "#16181d", "#5d636f", "#ffffff", "#e6e8ec"
# from worse through equal to better than without the head
SCALE = ((33, 78, 153), (128, 170, 216), (246, 246, 244), (238, 160, 112), (166, 30, 36))


@dataclass(frozen=True)
class Row:
    """A head in a round: mean score on top of the heads chosen before, what it gains over those alone on the same pictures, and the
    number of its pictures."""

    round: int
    layer: int | str
    head: int
    score: float
    gain: float
    images: int
    chosen: bool


@dataclass(frozen=True)
class Step:
    """Mean score of the heads chosen after a round; round 0 is before the first."""

    round: int
    heads: tuple[tuple[int | str, int, float], ...]
    score: float


@dataclass(frozen=True)
class Result:
    heads: HeadSet
    sites: list[Site]
    rows: list[Row]
    track: list[Step]
    images: int
    calls: dict[str, int]
    settings: dict[str, Any]

    def write(self, folder: Path) -> None:
        """head_set.json, result.json, result.md and head_map.png."""
        write_atomic(folder / "result.json", json.dumps(self.as_dict(), indent=2) + "\n")
        write_atomic(folder / "result.md", self.markdown())
        picture = folder / "head_map.png.tmp"
        self.picture().save(picture, format="PNG")
        picture.replace(folder / "head_map.png")
        self.heads.save(folder / FILE_NAME)

    def as_dict(self) -> dict[str, Any]:
        return {
            "heads": [list(head) for head in self.heads.heads],
            "track": [asdict(step) for step in self.track],
            "images": self.images,
            "calls": self.calls,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
        }

    def markdown(self) -> str:
        told = self.settings
        pairs = told["pairs"]
        facts = {
            "model": f"{told['model']} ({told['family']})",
            "objective": told["objective"],
            "pictures a head": f"{len(pairs)} ({len({prompt for prompt, _ in pairs})} prompts)",
            "perturbation": f"{told['target']}, strength {told['strength']:g}, scale {told['scale']:g}",
            "pipeline": ", ".join(f"{name} {value}" for name, value in told["arguments"].items()),
            "pool": f"{len(told['pool'])} heads",
            "strategy": told["strategy"],
            "pictures made": self.images,
            "cost": self.cost(),
            "weights": told["weights"],
        }
        lines = ["# Head search", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
        lines += [f"Chosen: `{self.heads}`", "", "| round | added | mean score | gain |", "|---|---|---|---|"]
        first = self.track[0].score
        for before, step in zip((None, *self.track), self.track):
            new = step.heads[len(before.heads) if before else 0 :]
            added = ", ".join(f"{layer}.{head}" for layer, head, _ in new) or "none"
            lines.append(f"| {step.round} | {added} | {step.score:.4f} | {step.score - first:+.4f} |")
        lines += ["", "![Gain of every head in the first round](head_map.png)", ""]
        lines += ["Every head on top of those chosen before; gain over those alone on the same pictures.", ""]
        lines += ["| round | head | mean score | gain | pictures | chosen |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.round} | {row.layer}.{row.head} | {row.score:.4f} | {row.gain:+.4f} | {row.images} | {'yes' if row.chosen else ''} |"
            for row in self.rows
        ]
        return "\n".join(lines) + "\n"

    def cost(self) -> str:
        """How often the denoiser and its blocks ran."""
        return ", ".join(f"{count} {name}" for name, count in self.calls.items()) or "not counted"

    def picture(self) -> Image.Image:
        """The gains of the first round as a map, chosen heads framed with the number of their round."""
        gains = {(row.layer, row.head): row.gain for row in self.rows if row.round == 1}
        chosen = {(row.layer, row.head): row.round for row in self.rows if row.chosen}
        used = {layer for layer, _ in gains}
        sites = [site for site in self.sites if site.primary or site.path in used]
        layers = {(site.layer if site.primary else site.path): site.heads for site in sites}
        name = f"{self.settings['model']}, {self.settings['objective']}"
        return head_map(gains, layers, chosen, f"Gain of single heads: {name}")


def head_map(
    gains: Mapping[Where, float], layers: Mapping[int | str, int], chosen: Mapping[Where, int], title: str
) -> Image.Image:
    """Layers x heads, from blue (worse) through white to red (better); heads without a gain are grey.

    Args:
        gains: by (layer, head).
        layers: rows from top to bottom, layer -> number of heads.
        chosen: (layer, head) -> round in which it was chosen.
    """
    cell, left, top, right = 22, 62, 62, 96
    for layer in layers:
        left = max(left, 20 + int(_font(11).getlength(str(layer))))
    columns, height = max(layers.values()), max(len(layers), 6) * cell
    inner = max(columns * cell, 180)
    short = _fit(title, left + inner + right - 24)
    out = Image.new("RGB", (left + inner + right, top + height + 46), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text((12, 12), short, font=_font(14), fill=INK)
    bound = max((abs(gain) for gain in gains.values()), default=0.0) or 1.0
    step = 1 if columns <= 32 else 4
    for head in range(0, columns, step):
        draw.text((left + (head + 0.5) * cell, top - 6), str(head), font=_font(11), fill=SOFT, anchor="mb")
    for row, (layer, heads) in enumerate(layers.items()):
        y = top + row * cell
        draw.text((left - 8, y + cell / 2), str(layer), font=_font(11), fill=SOFT, anchor="rm")
        for head in range(heads):
            x = left + head * cell
            gain = gains.get((layer, head))
            fill = ABSENT if gain is None else _color(gain / bound)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=fill)
            if (layer, head) in chosen:
                draw.rectangle((x - 1, y - 1, x + cell - 1, y + cell - 1), outline=INK, width=2)
                ink = PAPER if gain is not None and abs(gain) > 0.7 * bound else INK
                number = str(chosen[layer, head])
                draw.text((x + cell / 2 - 1, y + cell / 2), number, font=_font(11), fill=ink, anchor="mm")
    bar = left + inner + 20
    for line in range(height):
        draw.line((bar, top + line, bar + 14, top + line), fill=_color(1 - 2 * line / (height - 1)))
    for value, y in ((bound, top), (0.0, top + height / 2), (-bound, top + height - 1)):
        draw.text((bar + 20, y), f"{value:+.3g}" if value else "0", font=_font(11), fill=SOFT, anchor="lm")
    note = "layers down, heads across; framed: chosen, with the round" if chosen else "layers down, heads across"
    draw.text((12, top + height + 14), note, font=_font(11), fill=SOFT)
    return out


def _color(value: float) -> tuple[int, int, int]:
    """A colour for -1 … 1."""
    at = (min(max(value, -1.0), 1.0) + 1) / 2 * (len(SCALE) - 1)
    stops: Sequence[int] = range(len(SCALE))
    return tuple(int(round(float(np.interp(at, stops, [color[i] for color in SCALE])))) for i in range(3))


def _fit(text: str, width: float) -> str:
    """The text, cut with an ellipsis where it is too long."""
    if _font(14).getlength(text) <= width:
        return text
    while text and _font(14).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
