"""Whether a cast looks the same in all scenes of a story, with and without `StoryPipeline`, read by the icon judge.

Story i is about one noun, without a colour or a size, in eight scenes that differ in pattern and background. A scene shows its subject
when an object of the noun is in it. The story's look is the colour and size class that most of its scenes show; a scene keeps it when its
subject has both. What sharing may cost is counted beside it: scenes whose background is not what their prompt asks for, and how much the
subject's boxes overlap between two scenes of a story (1: it always stands at the same place).

    python -m benchmarks.story [--stories 25] [--record runs/story]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

import attnctrl as ac
from attnctrl.evaluate.icons import Detection, IconJudge
from attnctrl.evaluate.intervals import paired_bootstrap
from attnctrl.evaluate.scoring import HELD_OUT
from attnctrl.icons.world import BACKGROUNDS, CANVAS, NOUNS, PATTERNS, SIZES

from .common import kept, load_pipeline, notes
from .regions import weights_of


SCENES = 8
SHOWN = 4  # stories on the sheet
PLAIN, STORY, WHOLE = "no control", "StoryPipeline", "whole pictures shared"
MEASURES = {
    "shown": "scenes with the subject's noun",
    "color": "scenes with the noun in the story's colour",
    "look": "scenes with the noun in the story's colour and size",
    "background": "scenes with the background asked for",
    "overlap": "mean overlap (IoU) of the subject's boxes between two scenes",
}


@dataclass(frozen=True)
class Story:
    noun: str
    places: tuple[tuple[str, str], ...]  # (pattern, background) of every scene
    seed: int

    @property
    def scenes(self) -> list[str]:
        return [f"{{hero}} on a {pattern} {background} background" for pattern, background in self.places]


def story(index: int) -> Story:
    """Held-out story `index`."""
    rng = np.random.default_rng((HELD_OUT, 80, index))
    places = [(pattern, background) for pattern in PATTERNS for background in BACKGROUNDS]
    chosen = tuple(places[i] for i in rng.choice(len(places), SCENES, replace=False))
    return Story(list(NOUNS)[index % len(NOUNS)], chosen, index)


def background_of(image: Image.Image) -> str:
    """The background whose colour most pixels along the edge are nearest to, among its light and its dark shade."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    edge = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3)])
    shades = np.array([np.array(color) * shade for color in BACKGROUNDS.values() for shade in (1.0, 0.86)])
    nearest = np.square(edge[:, None] - shades).sum(-1).argmin(1) // 2
    return list(BACKGROUNDS)[np.bincount(nearest, minlength=len(BACKGROUNDS)).argmax()]


def look_of(found: Detection) -> tuple[str, str]:
    """(colour, size class) of an object; a silhouette's longer side is 8 pixels less than its box."""
    side = max(found.box[2] - found.box[0], found.box[3] - found.box[1]) + 8
    return found.color, min(SIZES, key=lambda word: abs(SIZES[word] - side))


def judged(asked: Story, read: Sequence[Sequence[Detection]], images: Sequence[Image.Image]) -> dict[str, float]:
    """Shares of the scenes of one story, by measure."""
    heroes = [next((one for one in objects if one.noun == asked.noun), None) for objects in read]
    looks = [look_of(one) if one else None for one in heroes]
    there = Counter(look for look in looks if look)
    colors = Counter(color for color, _ in filter(None, looks))
    overlaps = [overlap(a.box, b.box) for a, b in combinations(filter(None, heroes), 2)]
    right = [background_of(image) == background for image, (_, background) in zip(images, asked.places)]
    return {
        "shown": sum(look is not None for look in looks) / SCENES,
        "color": max(colors.values(), default=0) / SCENES,
        "look": max(there.values(), default=0) / SCENES,
        "background": sum(right) / SCENES,
        "overlap": float(np.mean(overlaps)) if overlaps else 0.0,
    }


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    shared = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    inter = shared[0] * shared[1]
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


class Measurement:
    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.judge, self.weights = asked, IconJudge(), weights_of(asked.model)
        settings = {"layers": asked.layers, "start": asked.start, "stop": asked.stop, "bias": asked.bias}
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.pipeline = ac.pipelines.StoryPipeline(load_pipeline(asked.model, asked.device, asked.dtype))

    def images(self, asked: Story, way: str) -> list[Image.Image]:
        import torch

        more: dict[str, Any] = {
            "num_inference_steps": self.asked.steps,
            "guidance_scale": self.asked.guidance_scale,
            "max_sequence_length": 1,
            "generator": [torch.Generator("cpu").manual_seed(1000 * asked.seed + i) for i in range(SCENES)],
        }
        hero = f"a {asked.noun}"
        if way == PLAIN:
            return self.pipeline.pipe([scene.format(hero=hero) for scene in asked.scenes], **more).images
        everywhere = {"subjects": [(0, 0, 1, 1)] * SCENES} if way == WHOLE else {}
        return self.pipeline({"hero": hero}, asked.scenes, **everywhere, **self.settings, **more).images

    def measure(self, way: str, index: int) -> dict[str, float]:
        """Kept per story; pictures of the first stories lie beside the record."""
        folder = self.asked.record / way.replace(" ", "-")
        settings = {
            "weights": self.weights,
            "steps": self.asked.steps,
            "guidance scale": self.asked.guidance_scale,
            "settings": {} if way == PLAIN else self.settings,
        }

        def make() -> dict[str, float]:
            asked = story(index)
            try:
                images = self.images(asked, way)
            except ac.AttnCtrlError as error:  # a scene in which the subject was not found: no pictures
                print(f"story {index}: {error}")
                return dict.fromkeys(MEASURES, 0.0)
            if index < SHOWN:
                folder.mkdir(parents=True, exist_ok=True)
                for number, image in enumerate(images):
                    image.convert("RGB").save(folder / f"{index}-{number}.png")
            return judged(asked, self.judge.read_many(images), images)

        return kept(folder / f"{index}.json", settings, make)

    def sheet(self, ways: Sequence[str], count: int) -> Image.Image:
        """The first stories, one row a way; a story that gave no pictures stays white."""
        tile, left = CANVAS + 6, 170
        out = Image.new("RGB", (left + tile * SCENES, tile * len(ways) * count), "white")
        draw = ImageDraw.Draw(out)
        for row, (index, way) in enumerate((index, way) for index in range(count) for way in ways):
            draw.multiline_text((4, row * tile + CANVAS // 2 - 8), f"a {story(index).noun}\n{way}", fill="black")
            for number in range(SCENES):
                path = self.asked.record / way.replace(" ", "-") / f"{index}-{number}.png"
                if path.is_file():
                    with Image.open(path) as picture:
                        out.paste(picture, (left + number * tile, row * tile))
        return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.story", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument("--stories", type=int, default=25, help=f"of {SCENES} scenes each")
    parser.add_argument("--ways", nargs="+", default=[PLAIN, STORY, WHOLE], choices=[PLAIN, STORY, WHOLE])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--layers")
    parser.add_argument("--start", type=float)
    parser.add_argument("--stop", type=float)
    parser.add_argument("--bias", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, default=Path("runs/story"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/story.md"))
    asked = parser.parse_args()
    if asked.stories < 1:
        parser.error("at least one story")
    run = Measurement(asked)
    results = {
        way: [run.measure(way, index) for index in tqdm(range(asked.stories), desc=way, mininterval=5)]
        for way in asked.ways
    }
    facts = {"stories": asked.stories, "scenes": asked.stories * SCENES, "steps": asked.steps}
    settings = ", ".join(f"{name} {value}" for name, value in run.settings.items()) or "defaults"
    lines = [
        "# Stories on the embedded model",
        "",
        notes(
            "benchmarks.story",
            **facts,
            **{"guidance scale": asked.guidance_scale},
            settings=settings,
            weights=run.weights,
        ),
        "",
        f"Means over stories of {SCENES} scenes; the difference to the first way with its bootstrap 95 % interval over stories.",
        "",
        "| measure | way | mean | difference |",
        "|---|---|---|---|",
    ]
    first = asked.ways[0]
    for measure, title in MEASURES.items():
        before = [one[measure] for one in results[first]]
        for way in asked.ways:
            values = [one[measure] for one in results[way]]
            mean, low, high = paired_bootstrap(before, values)
            cell = "" if way == first else f"{mean:+.3f} ({low:+.3f} - {high:+.3f})"
            lines.append(f"| {title} | {way} | {np.mean(values):.3f} | {cell} |")
    picture = asked.output.with_name(f"{asked.output.stem}_sheet.png")
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    run.sheet(asked.ways, min(SHOWN, asked.stories)).save(picture)
    lines += ["", f"![The first stories]({picture.name})", ""]
    asked.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
