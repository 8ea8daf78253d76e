"""Throughput of `attnctrl batch` against a plain diffusers loop over the same requests, on the embedded model.

All make the same pictures from the same seeds and write PNG files; the loop runs one request at a time, and again with batches of
our size. Checking rows, the metadata, hashes, the results file and its synchronisation to disk are on our side alone. Loading the model
is left out everywhere. All run in every round, the order alternates, and ratios are taken within a round. Under five minutes on one core.

    python -m benchmarks.batch [--requests 16] [--steps 12] [--batch-size 4] [--repeats 7] [--output benchmarks/results/batch.md]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from .common import notes


PROMPTS = ("a red cat", "a blue car", "a green tree", "a yellow fish and a purple house")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:icons-t2i")
    parser.add_argument("--device")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/batch.md"))
    asked = parser.parse_args()
    from attnctrl._quiet import quiet_imports

    with quiet_imports():
        import numpy as np
        import torch
        from PIL import Image

        from attnctrl.apps.batch import run as running
        from attnctrl.apps.generate import Job

    rows = [
        {
            "id": f"n{n:05d}",
            "prompt": PROMPTS[n % len(PROMPTS)],
            "seed": n,
            "steps": asked.steps,
            "max_sequence_length": 1,
        }
        for n in range(asked.requests)
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        job = Job(
            prompt="-", model=asked.model, device=asked.device, batch_size=asked.batch_size, output=root / "warm"
        )
        engine = running.Local(running.Batch(root / "requests.jsonl", job))
        running._engine = lambda batch: engine  # loaded once, outside of the clock
        pipeline = engine.worker.pipeline

        def ours(output: Path) -> float:
            began = time.perf_counter()
            job = Job(prompt="-", model=asked.model, device=asked.device, batch_size=asked.batch_size, output=output)
            list(running.run(running.Batch(root / "requests.jsonl", job)))
            return time.perf_counter() - began

        def plain(output: Path, size: int) -> float:
            pipeline.set_progress_bar_config(disable=True)
            output.mkdir()
            began = time.perf_counter()
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                images = pipeline(
                    [row["prompt"] for row in part],
                    num_inference_steps=asked.steps,
                    guidance_scale=4.0,
                    max_sequence_length=1,
                    generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in part],
                ).images
                for row, image in zip(part, images):
                    image.save(output / f"{row['id']}.png")
            return time.perf_counter() - began

        ways = {
            "attnctrl batch": ours,
            "loop, one request at a time": lambda output: plain(output, 1),
            f"loop, batches of {asked.batch_size}": lambda output: plain(output, asked.batch_size),
        }
        for number, way in enumerate(ways.values()):  # warm-up, and the check that all make the same pictures
            way(root / f"check-{number}")
        for row in rows:
            ours_, one, many = (np.asarray(Image.open(root / f"check-{way}" / f"{row['id']}.png")) for way in range(3))
            if not np.array_equal(ours_, many) or np.abs(ours_.astype(int) - one).max() > 1:
                raise SystemExit(f"{row['id']}: the pictures differ")
        kept: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(asked.repeats):
            for number, name in list(enumerate(ways))[:: 1 if turn % 2 == 0 else -1]:
                kept[name].append(ways[name](root / f"{number}-{turn}"))
    cells = []
    for name, times in kept.items():
        ratios = sorted(plain / own for plain, own in zip(times, kept["attnctrl batch"]))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
        cells.append(f"| {name} | {len(rows) / statistics.median(times):.2f} | {spread} |")
    lines = [
        "# Batch generation against a plain diffusers loop",
        "",
        notes(
            "benchmarks.batch",
            requests=f"{len(rows)} of one shape, {asked.steps} steps, batches of {asked.batch_size}, {pipeline.device}",
            rounds=f"{asked.repeats}, order alternating, ratios within a round",
        ),
        "",
        "Pictures are those of the loop with batches bit by bit, and of the other to one step of 255. Last column: throughput of",
        "`attnctrl batch` as a ratio to this way, median of the rounds (smallest-largest); above 1 it is faster.",
        "",
        "| way | images/s | attnctrl batch / this |",
        "|---|---|---|",
        *cells,
    ]
    print("\n".join(lines[-5:]))
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
