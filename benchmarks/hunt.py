"""Head search: does a hunted head set draw more of what prompts ask for than other ways of guidance, on prompts it has not seen?

Heads and the best layer are searched on prompts START, START + 1, … of the held-out stream, without CFG; measured is on prompts
0, 1, … of it, from the same noise for every way of guidance. Cost is counted in blocks of the denoiser run on one row (a CFG step
runs every block on two rows), prefix reuse included.

    python -m benchmarks.hunt [--model builtin:icons-t2i] [--search-prompts 24] [--prompts 300] [--output benchmarks/results/hunt.md]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

import attnctrl as ac
from attnctrl.evaluate.intervals import mcnemar, percent
from attnctrl.evaluate.scoring import objects_right
from attnctrl.evaluate.t2i import Result, evaluate, pipeline_call, request
from attnctrl.families import find_denoiser, find_family
from attnctrl.icons.world import CANVAS
from attnctrl.search import icon_judge

from .common import load_pipeline, notes


START = 100_000  # prompts of the search; those of the measurement count from 0


@dataclass
class Measured:
    result: Result
    blocks: float  # rows x blocks a picture

    def objects(self) -> list[bool]:
        pairs = zip(self.result.requests, self.result.detections)
        return [right for asked, read in pairs for right in objects_right(read, asked.scene)]


@contextmanager
def counted(pipe) -> Iterator[list[int]]:
    """Counts the rows that go through every block of the denoiser: one number per call of a block."""
    model, _ = find_denoiser(pipe)
    rows: list[int] = []

    def count(module, args, kwargs) -> None:
        rows.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape[0])

    hooks = [
        model.get_submodule(block.path).register_forward_pre_hook(count, with_kwargs=True)
        for block in find_family(model).blocks(model)
    ]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def measure(pipe, controls: Sequence[ac.Control], guidance_scale: float, asked: argparse.Namespace) -> Measured:
    plain = pipeline_call(asked.steps, guidance_scale, 1)

    def call(pipe, prompts, seeds):
        with ac.attach(pipe, *controls):
            return plain(pipe, prompts, seeds)

    with counted(pipe) as rows:
        result = evaluate(pipe, prompts=asked.prompts, batch_size=asked.batch_size, call=call)
    return Measured(result, sum(rows) / asked.prompts)


def layer_scores(pipe, asked: argparse.Namespace) -> list[float]:
    """Mean objective of the search prompts for each layer with all its heads perturbed, without CFG."""
    judge, count = icon_judge(), len(find_family(find_denoiser(pipe)[0]).blocks(find_denoiser(pipe)[0]))
    call = pipeline_call(asked.search_steps, 1.0, 1)
    wanted = [request(START + index) for index in range(asked.search_prompts)]
    means = []
    for layer in tqdm(range(count), desc="layers", mininterval=5):
        scores = []
        for first in range(0, len(wanted), asked.batch_size):
            part = wanted[first : first + asked.batch_size]
            with ac.attach(pipe, ac.SoftPAG(layers=layer, scale=asked.scale, strength=asked.strength)):
                images = call(pipe, [item.prompt for item in part], [START + first + i for i in range(len(part))])
            scores += judge(list(images), [item.prompt for item in part])
        means.append(sum(scores) / len(scores))
    return means


def random_sets(pipe, size: int, count: int) -> list[ac.HeadSet]:
    model, _ = find_denoiser(pipe)
    every = [(s.layer, h) for s in find_family(model).sites(model) if s.primary for h in range(s.heads)]
    return [ac.HeadSet.parse(sorted(random.Random(number).sample(every, size))) for number in range(count)]


def sheet(rows: dict[str, Measured], count: int = 8) -> Image.Image:
    """The first pictures of every way of guidance."""
    tile, left = CANVAS + 4, 230
    out = Image.new("RGB", (left + tile * count, tile * len(rows)), "white")
    draw = ImageDraw.Draw(out)
    for row, (name, measured) in enumerate(rows.items()):
        draw.text((6, row * tile + CANVAS // 2), name, fill="black")
        for column, image in enumerate(measured.result.images[:count]):
            out.paste(image.convert("RGB").resize((CANVAS, CANVAS)), (left + column * tile, row * tile))
    return out


def table(rows: dict[str, Measured], plain: str, cfg: str, hunted: str) -> list[str]:
    """One line per way of guidance. p: McNemar on pictures, against the same without heads, and against the hunted set beside it."""
    lines = [
        "| guidance | pictures right | rate | Wilson 95 % | p, against no heads | p, against hunted | objects right | rate | Wilson 95 % | "
        "rows × blocks a picture |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in rows.items():
        right, objects = measured.result.right, measured.objects()
        beside = name.startswith(f"{cfg} + ")
        base, best = (cfg, f"{cfg} + {hunted}") if beside or name == cfg else (plain, hunted)
        p = "" if name == base else f"{mcnemar(rows[base].result.right, right):.2g}"
        against = "" if name == best else f"{mcnemar(rows[best].result.right, right):.2g}"
        lines.append(
            f"| {name} | {percent(sum(right), len(right))} | {p} | {against} | {percent(sum(objects), len(objects))} | {measured.blocks:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hunt", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument("--search-prompts", type=int, default=24)
    parser.add_argument("--search-steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-round", type=int, default=3)
    parser.add_argument("--strategy", default="halving", choices=("full", "halving"))
    parser.add_argument("--pool", help="heads that may be chosen; all if left out")
    parser.add_argument("--random-sets", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=300, help="pictures of every way of guidance")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="of CFG")
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, default=Path("runs/hunt"), help="folder of the search; goes on there")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/hunt.md"))
    asked = parser.parse_args()
    pipe = load_pipeline(asked.model, asked.device, asked.dtype)
    found = ac.hunt_heads(
        pipe,
        [request(START + index).prompt for index in range(asked.search_prompts)],
        icon_judge(),
        seed=START,
        rounds=asked.rounds,
        per_round=asked.per_round,
        pool=asked.pool,
        scale=asked.scale,
        strength=asked.strength,
        steps=asked.search_steps,
        batch_size=asked.batch_size,
        strategy=asked.strategy,
        output=asked.record,
        call={"max_sequence_length": 1},
    )
    by_layer = layer_scores(pipe, asked)
    best = max(range(len(by_layer)), key=lambda layer: by_layer[layer])
    settings = {"scale": asked.scale, "strength": asked.strength}
    hunted = f"hunted, {len(found)} heads"
    ways = {
        f"all heads of layer {best}": ac.SoftPAG(layers=best, **settings),
        hunted: ac.SoftPAG(heads=found, **settings),
    }
    for number, heads in enumerate(random_sets(pipe, len(found), asked.random_sets)):
        ways[f"random {number + 1}, {len(found)} heads"] = ac.SoftPAG(heads=heads, **settings)
    plain, cfg = "no guidance", f"CFG {asked.guidance_scale:g}"
    plans = [(plain, (), 1.0), (cfg, (), asked.guidance_scale)]
    plans += [(name, (control,), 1.0) for name, control in ways.items()]
    plans += [(f"{cfg} + {name}", (control,), asked.guidance_scale) for name, control in ways.items()]
    rows = {}
    for name, controls, guidance_scale in tqdm(plans, desc="measuring", mininterval=5):
        rows[name] = measure(pipe, controls, guidance_scale, asked)
    track = ", ".join(f"{entry['score']:.3f} with {entry['heads']} heads" for entry in found.provenance["scores"])
    facts = notes(
        "benchmarks.hunt",
        **{
            "hunted heads": f"`{found}`",
            "search": f"{asked.search_prompts} prompts, {asked.search_steps} steps, {asked.strategy}, "
            f"{found.provenance['images']} pictures; mean objective {track}",
            "layers on the search prompts": ", ".join(f"{layer}: {score:.3f}" for layer, score in enumerate(by_layer)),
            "measured": f"{asked.prompts} other prompts, {asked.steps} steps",
            "SoftPAG": f"scale {asked.scale:g}, strength {asked.strength:g}, target identity",
        },
    )
    lines = ["# Head search on the embedded model", "", facts, "", *table(rows, plain, cfg, hunted), ""]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    picture = asked.output.with_name(asked.output.stem + "_sheet.png")
    sheet(rows).save(picture)
    lines += [f"![The first pictures of every way]({picture.name})", ""]
    asked.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines[4:-2]))


if __name__ == "__main__":
    main()
