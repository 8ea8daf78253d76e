"""Head search: does a hunted head set draw more of what prompts ask for than other ways of guidance, on prompts it has not seen?

Heads and the best layer are searched on prompts START, START + 1, … of the held-out stream, without CFG; measured is on prompts
0, 1, … of it, from the same noise for every way of guidance. Cost is counted in blocks of the denoiser run on one row (a CFG step
runs every block on two rows), prefix reuse included. Everything that was made is kept in the --record folder: a run goes on there.

    python -m benchmarks.hunt [--model builtin:icons-t2i] [--search-prompts 24] [--prompts 200] [--output benchmarks/results/hunt.md]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

import attnctrl as ac
from attnctrl.controls.spec import plain_value
from attnctrl.evaluate.icons import IconJudge
from attnctrl.evaluate.intervals import mcnemar, paired_bootstrap, percent
from attnctrl.evaluate.scoring import objects_right
from attnctrl.evaluate.t2i import evaluate, pipeline_call, request
from attnctrl.families import find_denoiser, find_family
from attnctrl.icons.world import CANVAS
from attnctrl.search import icon_judge
from attnctrl.search.record import mark_of_weights

from .common import counted, kept, load_pipeline, notes


START = 100_000  # prompts of the search; those of the measurement count from 0
SHOWN = 8  # pictures of every way on the sheet


@dataclass(frozen=True)
class Way:
    """A way of guidance; `base` is what it is compared to without heads, `rival` the hunted set beside it."""

    name: str
    controls: tuple[ac.Control, ...]
    guidance_scale: float
    steps: int
    base: str | None
    rival: str | None

    def at(self, steps: int, base: str | None, rival: str | None) -> Way:
        """The same with other steps."""
        return dataclasses.replace(self, name=f"{self.name}, {steps} steps", steps=steps, base=base, rival=rival)


@dataclass(frozen=True)
class Measured:
    right: list[bool]  # per picture
    objects: list[list[bool]]  # per picture and object asked for
    blocks: float  # rows x blocks a picture
    strip: Path

    @property
    def every_object(self) -> list[bool]:
        return [right for picture in self.objects for right in picture]

    @property
    def shares(self) -> list[float]:
        """Of the objects of every picture."""
        return [sum(picture) / len(picture) for picture in self.objects]


class Bench:
    """Measures ways of guidance, once each."""

    def __init__(self, pipe, asked: argparse.Namespace):
        self.pipe, self.asked, self.judge = pipe, asked, IconJudge()
        self.settings = {"weights": mark_of_weights(find_denoiser(pipe)[0]), "dtype": asked.dtype}

    def measure(self, way: Way) -> Measured:
        controls = [
            {"name": control.name}
            | {item.name: plain_value(getattr(control, item.name)) for item in dataclasses.fields(control)}
            for control in way.controls
        ]
        settings = self.settings | {
            "prompts": self.asked.prompts,
            "steps": way.steps,
            "guidance_scale": way.guidance_scale,
            "controls": controls,
        }
        path = self.asked.record / "ways" / f"{re.sub('[^a-z0-9]+', '-', way.name.lower()).strip('-')}.json"
        strip = path.with_suffix(".png")
        return Measured(**kept(path, settings, lambda: self._measure(way, strip)), strip=strip)

    def _measure(self, way: Way, strip: Path) -> dict:
        plain = pipeline_call(way.steps, way.guidance_scale, 1)

        def call(pipe, prompts, seeds):
            with ac.attach(pipe, *way.controls):
                return plain(pipe, prompts, seeds)

        asked = self.asked
        with counted(self.pipe) as rows:
            result = evaluate(
                self.pipe, prompts=asked.prompts, batch_size=asked.batch_size, call=call, judge=self.judge
            )
        images = result.images[:SHOWN]
        out = Image.new("RGB", (CANVAS * len(images), CANVAS))
        for column, image in enumerate(images):
            out.paste(image.convert("RGB").resize((CANVAS, CANVAS)), (column * CANVAS, 0))
        out.save(strip)
        pairs = zip(result.requests, result.detections)
        objects = [objects_right(read, item.scene) for item, read in pairs]
        return {"right": result.right, "objects": objects, "blocks": sum(rows) / asked.prompts}

    def layer_scores(self) -> list[float]:
        """Mean objective of the search prompts for each layer with all its heads perturbed, without CFG."""
        names = ("search_prompts", "search_steps", "scale", "strength")
        settings = self.settings | {name: getattr(self.asked, name) for name in names}
        return kept(self.asked.record / "layers.json", settings, self._layer_scores)

    def _layer_scores(self) -> list[float]:
        asked, model = self.asked, find_denoiser(self.pipe)[0]
        judge, call = icon_judge(), pipeline_call(asked.search_steps, 1.0, 1)
        wanted = [request(START + index).prompt for index in range(asked.search_prompts)]
        means = []
        for layer in tqdm(range(len(find_family(model).blocks(model))), desc="layers", mininterval=5):
            scores = []
            with ac.attach(self.pipe, ac.SoftPAG(layers=layer, scale=asked.scale, strength=asked.strength)):
                for first in range(0, len(wanted), asked.batch_size):
                    part = wanted[first : first + asked.batch_size]
                    images = call(self.pipe, part, [START + first + index for index in range(len(part))])
                    scores += judge(list(images), part)
            means.append(sum(scores) / len(scores))
        return means


def random_sets(pipe, size: int, count: int) -> list[ac.HeadSet]:
    model, _ = find_denoiser(pipe)
    every = [(s.layer, h) for s in find_family(model).sites(model) if s.primary for h in range(s.heads)]
    return [ac.HeadSet.parse(sorted(random.Random(number).sample(every, size))) for number in range(count)]


def sheet(rows: dict[str, Measured]) -> Image.Image:
    """The first pictures of every way of guidance."""
    tile, left = CANVAS + 4, 260
    out = Image.new("RGB", (left + CANVAS * SHOWN, tile * len(rows)), "white")
    draw = ImageDraw.Draw(out)
    for row, (name, measured) in enumerate(rows.items()):
        draw.text((6, row * tile + CANVAS // 2), name, fill="black")
        with Image.open(measured.strip) as strip:
            out.paste(strip, (left, row * tile))
    return out


def table(ways: Sequence[Way], rows: dict[str, Measured]) -> Iterator[str]:
    """One line per way of guidance. p: McNemar on pictures."""
    yield (
        "| guidance | pictures right | rate | Wilson 95 % | p, against no heads | p, against hunted | objects right | rate | Wilson 95 % | "
        "rows × blocks a picture |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for way in ways:
        measured = rows[way.name]
        right, objects = measured.right, measured.every_object
        p, against = (f"{mcnemar(rows[to].right, right):.2g}" if to else "" for to in (way.base, way.rival))
        yield (
            f"| {way.name} | {percent(sum(right), len(right))} | {p} | {against} | {percent(sum(objects), len(objects))} | "
            f"{measured.blocks:.0f} |"
        )


def sign_flips(gains: Sequence[float], draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p value that gains, one a prompt, have either sign alike: the share of random signs with a mean as far from 0."""
    gains = np.asarray(gains, dtype=float)
    signs = np.random.default_rng(seed).integers(0, 2, size=(draws, len(gains)), dtype=np.int8) * 2 - 1
    flipped = np.abs(signs @ gains)
    return (1 + int((flipped >= abs(gains.sum()) - 1e-9).sum())) / (1 + draws)


def against_random(label: str, hunted: Measured, others: Sequence[Measured]) -> Iterator[str]:
    """The hunted set against the random ones, all at once: on every prompt against their mean, and as one among them."""
    for name, read in (("pictures right", lambda m: m.right), ("objects right, mean of pictures", lambda m: m.shares)):
        mine, theirs = np.asarray(read(hunted), dtype=float), np.array([read(m) for m in others], dtype=float)
        means = theirs.mean(1)
        gain, low, high = paired_bootstrap(theirs.mean(0), mine)
        as_good = int((means >= mine.mean() - 1e-9).sum())
        yield (
            f"| {label} | {name} | {mine.mean():.1%} | {means.mean():.1%} ({means.min():.1%} - {means.max():.1%}) | "
            f"{100 * gain:+.1f} ({100 * low:+.1f} - {100 * high:+.1f}) | {sign_flips(mine - theirs.mean(0)):.2g} | "
            f"{as_good} of {len(means)}, p {(1 + as_good) / (1 + len(means)):.2g} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hunt", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument("--search-prompts", type=int, default=24)
    parser.add_argument("--search-steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-round", type=int, default=3)
    parser.add_argument("--strategy", default="halving", choices=("full", "halving"))
    parser.add_argument("--pool", help="heads that may be chosen; all if left out")
    parser.add_argument("--random-sets", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=200, help="pictures of every way of guidance")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="of CFG")
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, default=Path("runs/hunt"), help="folder; a run goes on there")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/hunt.md"))
    asked = parser.parse_args()
    if asked.random_sets < 1:
        parser.error("--random-sets: at least 1")
    pipe = load_pipeline(asked.model, asked.device, asked.dtype)
    bench = Bench(pipe, asked)
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
        output=asked.record / "search",
        call={"max_sequence_length": 1},
    )
    by_layer = bench.layer_scores()
    best = max(range(len(by_layer)), key=lambda layer: by_layer[layer])
    settings = {"scale": asked.scale, "strength": asked.strength}
    plain, cfg, hunted = "no guidance", f"CFG {asked.guidance_scale:g}", f"hunted, {len(found)} heads"
    randoms = {
        f"random {number + 1}, {len(found)} heads": ac.SoftPAG(heads=heads, **settings)
        for number, heads in enumerate(random_sets(pipe, len(found), asked.random_sets))
    }
    guided = {
        f"all heads of layer {best}": ac.SoftPAG(layers=best, **settings),
        hunted: ac.SoftPAG(heads=found, **settings),
    }
    ways = []
    for base, start, scale in ((plain, "", 1.0), (cfg, f"{cfg} + ", asked.guidance_scale)):
        rival = start + hunted
        ways.append(Way(base, (), scale, asked.steps, None, rival))
        for name, control in (guided | randoms).items():
            ways.append(
                Way(start + name, (control,), scale, asked.steps, base, None if start + name == rival else rival)
            )
    rows = {way.name: bench.measure(way) for way in tqdm(ways, desc="measuring", mininterval=5)}
    # fewer steps, so that every way runs as many rows x blocks as no guidance does
    by_name = {way.name: way for way in ways}
    fewer = {
        name: max(1, round(asked.steps * rows[plain].blocks / rows[name].blocks))
        for name in (cfg, hunted, f"{cfg} + {hunted}")
    }
    short = {name: f"{name}, {steps} steps" for name, steps in fewer.items()}
    equal = [dataclasses.replace(by_name[plain], rival=short[hunted])] + [
        by_name[name].at(steps, plain, None if name == hunted else short[hunted]) for name, steps in fewer.items()
    ]
    rows |= {way.name: bench.measure(way) for way in equal}
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
    compared = [
        f"| on top of | measure | hunted | mean of {asked.random_sets} random sets (range) | points more, bootstrap 95 % | "
        "p, signs flipped over prompts | random sets as good or better |",
        "|---|---|---|---|---|---|---|",
    ]
    for base, start in ((plain, ""), (cfg, f"{cfg} + ")):
        compared += against_random(base, rows[start + hunted], [rows[start + name] for name in randoms])
    body = ["## Hunted against random sets", "", *compared, "", "## Every way", "", *table(ways, rows), ""]
    body += ["## As many rows × blocks as no guidance", "", "p, against no heads: against no guidance.", ""]
    body += [*table(equal, rows), ""]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    picture = asked.output.with_name(asked.output.stem + "_sheet.png")
    shown = [way.name for way in (*ways, *equal[1:]) if not re.search(r"random (?!1,|2,)\d+,", way.name)]
    sheet({name: rows[name] for name in shown}).save(picture)
    page = ["# Head search on the embedded model", "", facts, "", *body, f"![The first pictures]({picture.name})", ""]
    asked.output.write_text("\n".join(page), encoding="utf-8")
    print("\n".join(body))


if __name__ == "__main__":
    main()
