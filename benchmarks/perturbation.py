"""Perturbation guidance: the judge's accuracy without CFG, with CFG, with SoftPAG alone and with both, against strength.

Held-out prompts of `attnctrl.evaluate.t2i` (one object, two objects, two objects in a relation), the same noise everywhere.

    python -m benchmarks.perturbation [--layers 4] [--scale 2] [--prompts 120] [--output benchmarks/results/perturbation.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attnctrl.evaluate.icons import IconJudge
from attnctrl.evaluate.intervals import mcnemar, percent
from attnctrl.evaluate.t2i import evaluate, pipeline_call

from .common import load_pipeline, notes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perturbation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--heads")
    parser.add_argument("--layers")
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.25, 0.5, 1.0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/perturbation.md"))
    asked = parser.parse_args()
    import attnctrl as ac

    pipe, judge = load_pipeline(asked.model, asked.device, asked.dtype), IconJudge()
    results = {}
    for guidance, label in ((1.0, "no CFG"), (asked.guidance_scale, f"CFG {asked.guidance_scale:g}")):
        for strength in (0.0, *asked.strengths):
            control = ac.SoftPAG(heads=asked.heads, layers=asked.layers, strength=strength, scale=asked.scale)
            with ac.attach(pipe, control):
                call = pipeline_call(asked.steps, guidance, 1)
                results[label, strength] = evaluate(pipe, prompts=asked.prompts, call=call, judge=judge, progress=True)
            row = results[label, strength]
            print(label, strength, sum(row.right), len(row.right), f"{row.seconds:.0f} s", flush=True)
    where = f"heads {asked.heads}" if asked.heads else f"every head of layers {asked.layers or 'all'}"
    facts = notes(
        "benchmarks.perturbation",
        prompts=asked.prompts,
        steps=asked.steps,
        SoftPAG=f"{where}, scale {asked.scale:g}, target identity",
    )
    lines = [
        "# SoftPAG on the embedded model",
        "",
        facts,
        "",
        "Right: a picture that shows everything asked, noun, colour and relation.",
        "",
    ]
    lines += [
        "| CFG | SoftPAG strength | right | rate | Wilson 95 % | McNemar p against strength 0 |",
        "|---|---|---|---|---|---|",
    ]
    for (label, strength), result in results.items():
        p = "" if strength == 0 else f"{mcnemar(results[label, 0.0].right, result.right):.2g}"
        lines.append(f"| {label} | {strength:g} | {percent(sum(result.right), len(result.right))} | {p} |")
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[6:]))


if __name__ == "__main__":
    main()
