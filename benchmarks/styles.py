"""Style heads: which heads of the embedded model, perturbed, make objects bigger, edges sharper or the background's pattern stronger?

One search per objective on one set of prompts, without CFG; then the objective on other prompts against SoftPAG's strength, and a
strip of pictures.

    python -m benchmarks.styles [--search-prompts 6] [--prompts 40] [--output benchmarks/results/styles.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

import attnctrl as ac
from attnctrl.evaluate.intervals import paired_bootstrap
from attnctrl.evaluate.segment import colored_masks
from attnctrl.evaluate.t2i import pipeline_call, request
from attnctrl.icons.world import CANVAS
from attnctrl.search import Objective

from .common import load_pipeline, notes


START = 200_000  # prompts of the search; those of the measurement count from 150,000
MEASURED = 150_000


def _objects(image: Image.Image) -> np.ndarray:
    """Coverage by objects, (128, 128) in 0-1."""
    rgb = np.asarray(image.convert("RGB").resize((CANVAS, CANVAS)))
    return np.clip(sum((mask for _, mask in colored_masks(rgb)), np.zeros((CANVAS, CANVAS))), 0, 1)


def _light(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((CANVAS, CANVAS)), dtype=np.float64) / 255


def bigger_objects(images, prompts) -> list[float]:
    """Share of the picture that objects cover, in percent."""
    return [100 * float(_objects(image).mean()) for image in images]


def sharper_edges(images, prompts) -> list[float]:
    """Mean gradient of the lightness within 2 pixels of the objects' borders, in percent of black to white per pixel."""
    values = []
    for image in images:
        inside = _objects(image) > 0.5
        border = ndimage.binary_dilation(inside, iterations=2) & ~ndimage.binary_erosion(inside, iterations=2)
        slope = np.hypot(*np.gradient(_light(image)))
        values.append(100 * float(slope[border].mean()) if border.any() else 0.0)
    return values


def stronger_pattern(images, prompts) -> list[float]:
    """Standard deviation of the lightness of the background, in percent of black to white."""
    values = []
    for image in images:
        free = ndimage.binary_erosion(_objects(image) < 0.05, iterations=3)
        values.append(100 * float(_light(image)[free].std()) if free.sum() > 100 else 0.0)
    return values


OBJECTIVES = {
    "bigger objects": bigger_objects,
    "sharper edges": sharper_edges,
    "stronger pattern": stronger_pattern,
}


def draw(pipe, control, prompts: list[str], seeds: list[int], steps: int, batch_size: int) -> list[Image.Image]:
    call, images = pipeline_call(steps, 1.0, 1), []
    with ac.attach(pipe, control):
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            images += list(call(pipe, prompts[part], seeds[part]))
    return images


def strip(rows: list[list[Image.Image]], strengths: list[float], path: Path) -> None:
    """Prompts below each other, strengths beside each other."""
    tile, top = CANVAS + 4, 18
    out = Image.new("RGB", (tile * len(strengths), top + tile * len(rows)), "white")
    pen = ImageDraw.Draw(out)
    for column, strength in enumerate(strengths):
        pen.text((column * tile + 4, 3), f"strength {strength:g}", fill="black")
        for row, images in enumerate(rows):
            out.paste(images[column].convert("RGB").resize((CANVAS, CANVAS)), (column * tile, top + row * tile))
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.styles", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--search-prompts", type=int, default=6)
    parser.add_argument("--search-steps", type=int, default=10)
    parser.add_argument("--heads", type=int, default=3, help="heads of a set, found in one round")
    parser.add_argument("--prompts", type=int, default=40, help="of the measurement")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, default=Path("runs/styles"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/styles.md"))
    asked = parser.parse_args()
    pipe = load_pipeline(asked.model, asked.device, asked.dtype)
    searched = [request(START + index).prompt for index in range(asked.search_prompts)]
    unseen = [request(MEASURED + index).prompt for index in range(asked.prompts)]
    seeds = [MEASURED + index for index in range(asked.prompts)]
    body: list[str] = []
    for name in asked.objectives:
        short = name.replace(" ", "-")
        found = ac.hunt_heads(
            pipe,
            searched,
            Objective(name, OBJECTIVES[name]),
            seed=START,
            rounds=1,
            per_round=asked.heads,
            scale=asked.scale,
            steps=asked.search_steps,
            batch_size=asked.batch_size,
            output=asked.record / short,
            call={"max_sequence_length": 1},
        )
        pictures, scores = {}, {}
        for strength in asked.strengths:
            control = ac.SoftPAG(heads=found, strength=strength, scale=asked.scale)
            pictures[strength] = draw(pipe, control, unseen, seeds, asked.steps, asked.batch_size)
            scores[strength] = OBJECTIVES[name](pictures[strength], unseen)
        strip(
            [[pictures[u][row] for u in asked.strengths] for row in range(3)],
            asked.strengths,
            asked.pictures / f"style-{short}.png",
        )
        body += [
            f"## {name}: heads `{found}`",
            "",
            f"{OBJECTIVES[name].__doc__}",
            "",
            "| strength | mean | change | bootstrap 95 % |",
            "|---|---|---|---|",
        ]
        for strength in asked.strengths:
            mean = float(np.mean(scores[strength]))
            change, low, high = paired_bootstrap(scores[asked.strengths[0]], scores[strength])
            cells = ["", ""] if strength == asked.strengths[0] else [f"{change:+.2f}", f"{low:+.2f} - {high:+.2f}"]
            body.append(f"| {strength:g} | {mean:.2f} | {' | '.join(cells)} |")
        body += ["", f"![Three unseen prompts](../../docs/pictures/style-{short}.png)", ""]
        print("\n".join(body[-12:]), flush=True)
    facts = notes(
        "benchmarks.styles",
        search=f"{asked.search_prompts} prompts, every head, {asked.search_steps} steps, one round, no CFG",
        measured=f"{asked.prompts} other prompts, {asked.steps} steps, no CFG; strength {asked.strengths[0]:g} is the plain model",
        SoftPAG=f"scale {asked.scale:g}, target identity",
    )
    page = ["# Style heads of the embedded model", "", facts, "", *body]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
