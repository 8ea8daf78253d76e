"""SoftPAG's strength: pictures of the same noise from off to full, how far they move, and what the judge reads in them.

python -m benchmarks.strength [--heads 3.1,4.2,4.5] [--prompts 60] [--output benchmarks/results/strength.md]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

import attnctrl as ac
from attnctrl.evaluate.icons import IconJudge
from attnctrl.evaluate.intervals import mcnemar, percent
from attnctrl.evaluate.t2i import evaluate, pipeline_call

from .common import load_pipeline, notes
from .styles import strip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strength", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument("--heads", default="3.1,4.2,4.5")
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1])
    parser.add_argument("--prompts", type=int, default=60, help="of the measurement")
    parser.add_argument("--rows", type=int, default=4, help="prompts on the strip")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="of CFG; 1 is none")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/strength.png"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/strength.md"))
    asked = parser.parse_args()
    strengths = sorted({0.0, *asked.strengths})
    pipe, judge = load_pipeline(asked.model, asked.device, asked.dtype), IconJudge()
    plain_call = pipeline_call(asked.steps, asked.guidance_scale, 1)
    pictures, results = {}, {}
    for strength in strengths:
        images = pictures[strength] = []

        def call(pipe, prompts, seeds):
            made = plain_call(pipe, prompts, seeds)
            images.extend(made)
            return made

        with ac.attach(pipe, ac.SoftPAG(heads=asked.heads, strength=strength, scale=asked.scale)):
            results[strength] = evaluate(
                pipe, prompts=asked.prompts, batch_size=asked.batch_size, call=call, judge=judge
            )
    rows = [[pictures[strength][row] for strength in strengths] for row in range(min(asked.rows, asked.prompts))]
    strip(rows, strengths, asked.picture)
    lines = [
        "| strength | mean absolute difference to strength 0, of 255 | right | rate | Wilson 95 % | McNemar p against strength 0 |",
        "|---|---|---|---|---|---|",
    ]
    pixels = {
        strength: np.stack([np.asarray(image, dtype=np.float32) for image in pictures[strength]])
        for strength in strengths
    }
    moved = [float(np.abs(pixels[strength] - pixels[0.0]).mean()) for strength in strengths]
    for strength, distance in zip(strengths, moved):
        right = results[strength].right
        p = f"{mcnemar(results[0.0].right, right):.2g}" if strength else ""
        lines.append(f"| {strength:g} | {distance:.2f} | {percent(sum(right), len(right))} | {p} |")
    facts = notes(
        "benchmarks.strength",
        SoftPAG=f"heads `{asked.heads}`, scale {asked.scale:g}, target identity",
        measured=f"{asked.prompts} held-out prompts, {asked.steps} steps, CFG {asked.guidance_scale:g} (1 is none), the same noise",
        **{"the difference grows with every strength": "yes" if moved == sorted(moved) else "no"},
    )
    where = Path(os.path.relpath(asked.picture, asked.output.parent)).as_posix()
    page = ["# Strength of SoftPAG", "", facts, "", *lines, "", f"![The first prompts against strength]({where})", ""]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(page), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
