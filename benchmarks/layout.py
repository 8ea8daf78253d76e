"""Layout: how many subjects land in their box, with and without RegionalPrompts, on the embedded model.

Case i of the held-out stream asks for two objects with different nouns and colours in two random disjoint boxes. A subject is
right when an object of its noun and colour has its centre in its box. Prompts and noise are the same with and without control.

    python -m benchmarks.layout [--model builtin:icons-t2i] [--cases 120] [--output benchmarks/results/layout.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from attnctrl.evaluate.icons import IconJudge
from attnctrl.evaluate.intervals import mcnemar, percent
from attnctrl.evaluate.scoring import HELD_OUT, in_box, leaked, match
from attnctrl.icons.world import CANVAS, COLORS, GRID, NOUNS

from .common import load_pipeline, notes


@dataclass(frozen=True)
class Case:
    """Two subjects, (noun, colour), and their boxes in pixels."""

    wanted: tuple[tuple[str, str], ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    seed: int

    @property
    def prompt(self) -> str:
        return " and ".join(f"a {color} {noun}" for noun, color in self.wanted)

    def regions(self):
        from attnctrl import Region

        return [
            Region(f"a {color} {noun}", box=tuple(side / CANVAS for side in box))
            for (noun, color), box in zip(self.wanted, self.boxes)
        ]


def case(index: int, subjects: int = 2) -> Case:
    """Boxes are 48 to 80 pixels a side, on the token grid, disjoint."""
    rng = np.random.default_rng((HELD_OUT, 77, index))
    nouns = [str(n) for n in rng.choice(list(NOUNS), subjects, replace=False)]
    colors = [str(c) for c in rng.choice(list(COLORS), subjects, replace=False)]
    while True:
        boxes = []
        for _ in range(subjects):
            width, height = (int(side) * GRID for side in rng.integers(3, 6, size=2))
            x = int(rng.integers(0, (CANVAS - width) // GRID + 1)) * GRID
            y = int(rng.integers(0, (CANVAS - height) // GRID + 1)) * GRID
            boxes.append((x, y, x + width, y + height))
        if all(
            a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            for i, a in enumerate(boxes)
            for b in boxes[i + 1 :]
        ):
            return Case(tuple(zip(nouns, colors)), tuple(boxes), index)


def generate(
    pipe, cases: Sequence[Case], options: dict | None, steps: int, guidance_scale: float
) -> list[Image.Image]:
    """One picture a case; `options` are RegionalPrompts' arguments, None for no control."""
    import torch

    import attnctrl as ac

    images = []
    for item in tqdm(cases, desc="uncontrolled" if options is None else "regions", mininterval=5):
        controls = [] if options is None else [ac.RegionalPrompts(item.regions(), **options)]
        with ac.attach(pipe, *controls):
            generator = torch.Generator("cpu").manual_seed(item.seed)
            images += pipe(
                item.prompt,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generator,
                max_sequence_length=1,
            ).images
    return images


def score(cases: Sequence[Case], images: Sequence[Image.Image], judge: IconJudge) -> dict[str, list[bool]]:
    """Per subject: in its box with noun and colour; in its box with the colour; noun and colour anywhere; leaked (per case)."""
    out: dict[str, list[bool]] = {
        "noun, colour and box": [],
        "colour and box": [],
        "noun and colour": [],
        "leaked": [],
    }
    for item, read in zip(cases, judge.read_many(images)):
        found = match(read, item.wanted)
        for one, box in zip(found, item.boxes):
            out["noun, colour and box"].append(one.both and in_box(one.detection, box))
            out["colour and box"].append(any(d.color == one.wanted[1] and in_box(d, box) for d in read))
            out["noun and colour"].append(one.both)
        out["leaked"].append(leaked(read, item.wanted) > 0)
    return out


def sheet(cases: Sequence[Case], rows: dict[str, Sequence[Image.Image]], count: int = 10) -> Image.Image:
    """One row of pictures per variant with the boxes drawn in the wanted colours."""
    tile = CANVAS + 6
    out = Image.new("RGB", (tile * count + 110, tile * len(rows)), "white")
    draw = ImageDraw.Draw(out)
    for row, (name, images) in enumerate(rows.items()):
        draw.text((4, row * tile + CANVAS // 2), name, fill="black")
        for column, (item, image) in enumerate(zip(cases[:count], images)):
            x, y = 110 + column * tile, row * tile
            out.paste(image.resize((CANVAS, CANVAS)), (x, y))
            for (_, color), box in zip(item.wanted, item.boxes):
                draw.rectangle(
                    (x + box[0], y + box[1], x + box[2] - 1, y + box[3] - 1), outline=COLORS[color], width=2
                )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layout", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--base-weight", type=float, nargs="*", default=[0.3])
    parser.add_argument("--stop", type=float, default=1.0)
    parser.add_argument("--no-isolate", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/layout.md"))
    asked = parser.parse_args()
    pipe, judge = load_pipeline(asked.model, asked.device, asked.dtype), IconJudge()
    cases = [case(i) for i in range(asked.cases)]
    variants: dict[str, dict | None] = {"without control": None}
    for weight in asked.base_weight:
        name = (
            f"base_weight {weight:g}"
            + (", isolate=False" if asked.no_isolate else "")
            + (f", stop {asked.stop:g}" if asked.stop < 1 else "")
        )
        variants[name] = {"base_weight": weight, "stop": asked.stop, "isolate": not asked.no_isolate}
    pictures = {
        name: generate(pipe, cases, options, asked.steps, asked.guidance_scale) for name, options in variants.items()
    }
    scores = {name: score(cases, images, judge) for name, images in pictures.items()}
    lines = ["# Layout: two subjects in random disjoint boxes", ""]
    facts = notes(
        "benchmarks.layout", cases=asked.cases, steps=asked.steps, **{"guidance scale": asked.guidance_scale}
    )
    lines += [
        facts,
        "",
        "| variant | measure | count | rate | Wilson 95 % | McNemar p against no control |",
        "|---|---|---|---|---|---|",
    ]
    plain = scores["without control"]
    for name, values in scores.items():
        for measure, hits in values.items():
            p = "" if name == "without control" else f"{mcnemar(plain[measure], hits):.2g}"
            label = "cases with a noun in the other's colour" if measure == "leaked" else f"subjects: {measure}"
            lines.append(f"| {name} | {label} | {percent(sum(hits), len(hits))} | {p} |")
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    picture = asked.output.with_name(asked.output.stem + "_sheet.png")
    sheet(cases, pictures).save(picture)
    lines += ["", f"![The first cases; boxes in the wanted colours]({picture.name})", ""]
    asked.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines[4:-3]))


if __name__ == "__main__":
    main()
