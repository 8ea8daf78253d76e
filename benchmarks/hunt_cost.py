"""What a head search costs: batches, prefix reuse and halving against the plain algorithm, every candidate alone and in full.

The plain one draws every head of the pool with every prompt, one picture at a time, with whole perturbed passes (HeadHunter, arXiv
2506.10978, Algorithm 1). Cost is counted, not computed: rows that go through a block of the denoiser, over all blocks that run.

    python -m benchmarks.hunt_cost [--prompts 12] [--steps 12] [--rounds 1] [--pool HEADS] [--output benchmarks/results/hunt_cost.md]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attnctrl as ac
from attnctrl.evaluate.t2i import request
from attnctrl.search import Objective, icon_judge

from .common import counted, load_pipeline, notes


START = 300_000  # of the held-out prompts


@dataclass
class Meter:
    """The icon judge, which writes down the cost of every batch that it is given: a search that was killed goes on with its count, at
    most one batch too high (the table's pictures tell)."""

    path: Path
    rows: list[int]
    judge: Objective = field(default_factory=icon_judge)
    since: float = field(default_factory=time.perf_counter)

    def __call__(self, images, prompts) -> list[float]:
        scores = self.judge(images, prompts)
        now = time.perf_counter()
        line = {"pictures": len(images), "blocks": sum(self.rows), "seconds": now - self.since}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.rows.clear()
        self.since = now
        return scores

    def total(self) -> dict[str, float]:
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return {name: sum(line[name] for line in lines) for name in lines[0]}


def search(pipe: Any, name: str, asked: argparse.Namespace, **how: Any) -> tuple[ac.HeadSet, dict[str, float]]:
    """The chosen heads, and what the search cost: pictures, rows x blocks, seconds."""
    folder = asked.record / name
    folder.mkdir(parents=True, exist_ok=True)
    with counted(pipe) as rows:
        meter = Meter(folder / "cost.jsonl", rows)
        heads = ac.hunt_heads(
            pipe,
            [request(START + index).prompt for index in range(asked.prompts)],
            Objective("icons", meter),
            seed=START,
            rounds=asked.rounds,
            per_round=asked.per_round,
            pool=asked.pool,
            scale=asked.scale,
            strength=asked.strength,
            steps=asked.steps,
            output=folder,
            call={"max_sequence_length": 1},
            **how,
        )
    return heads, meter.total()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hunt_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--per-round", type=int, default=3)
    parser.add_argument("--pool", help="heads that may be chosen; all if left out")
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16, help="of the search with batches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, default=Path("runs/hunt_cost"), help="folder; a run goes on there")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/hunt_cost.md"))
    asked = parser.parse_args()
    pipe = load_pipeline(asked.model, asked.device, asked.dtype)
    ways = {
        "plain: one picture at a time, whole passes, all prompts": {"prefix_reuse": False, "batch_size": 1},
        f"batches of {asked.batch_size}, prefix reuse": {"batch_size": asked.batch_size},
        f"batches of {asked.batch_size}, prefix reuse, halving": {
            "batch_size": asked.batch_size,
            "strategy": "halving",
        },
    }
    found = {name: search(pipe, f"way-{number}", asked, **how) for number, (name, how) in enumerate(ways.items())}
    plain, (plain_heads, whole) = next(iter(found.items()))
    wanted = {head[:2] for head in plain_heads.heads}
    lines = [
        "| search | pictures | rows × blocks | of plain | seconds | of plain | heads as plain | their mean score | chosen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (heads, cost) in found.items():
        same = len(wanted & {head[:2] for head in heads.heads})
        shares = [f"{cost[key] / whole[key]:.2f}" if name != plain else "1" for key in ("blocks", "seconds")]
        score = heads.provenance["scores"][-1]["score"]
        lines.append(
            f"| {name} | {cost['pictures']} | {cost['blocks']} | {shares[0]} | {cost['seconds']:.0f} | {shares[1]} | "
            f"{same} of {len(wanted)} | {score:.3f} | `{heads}` |"
        )
    facts = notes(
        "benchmarks.hunt_cost",
        pool=f"`{asked.pool}`" if asked.pool else "every head of every layer",
        search=f"{asked.prompts} prompts, {asked.steps} steps, {asked.rounds} rounds of {asked.per_round} heads, no CFG, "
        f"objective icons (without perturbation {plain_heads.provenance['scores'][0]['score']:.3f})",
        SoftPAG=f"scale {asked.scale:g}, strength {asked.strength:g}, target identity",
    )
    page = ["# Cost of a head search", "", facts, "", *lines, ""]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(page), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
