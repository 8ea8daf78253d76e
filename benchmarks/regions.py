"""Regions on the embedded model, read by the icon judge: layout, binding and causal leakage.

layout   Case i asks for 2, 3 or 4 objects with different nouns and colours in random disjoint boxes on the 16-pixel grid, each
         a region. An object is right when one of its noun and colour has its centre in its box. Beside it the same prompts and
         noise without control, with latents guided into the boxes (Bounded Attention's loss) beside the regions, and one
         object of the case alone in its box: what the model reaches when nothing interferes.
binding  The cases with 3 objects again with regions that see the whole picture (isolate=False): how often an object wears
         another's colour, and how often a box holds one.
causal   The noun and colour of one region's prompt are exchanged, all else kept: how much the latents change inside that
         region's box, in the other box, and in the background, relative to their mean magnitude there.

Every part keeps its record and goes on from there; the sheet is made of the record's pictures.

    python -m benchmarks.regions [--cases 200] [--parts layout binding causal] [--record runs/regions]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

import attnctrl as ac
from attnctrl.evaluate.icons import Detection, IconJudge
from attnctrl.evaluate.intervals import mcnemar, paired_bootstrap, percent
from attnctrl.evaluate.scoring import HELD_OUT, Wanted, in_box, leaked, match
from attnctrl.icons.models import resolve_model
from attnctrl.icons.world import CANVAS, COLORS, GRID, NOUNS

from .common import load_pipeline, notes


SHOWN = 8  # pictures of each way on the sheet
TRIES = 512  # layouts drawn at a time
AREAS = ("its box", "the other box", "background")
PLAIN, REGIONS, OPEN = "no control", "regions", "regions, isolate=False"
BOTH = "regions and latent guidance"
BOUNDED = {
    "loss": "bounded",
    "scale": 0.12,
    "stop": 0.5,
    "iterations": 1,
    "normalize": True,
}  # chosen on 16 other cases
MEASURES = {
    "placed": "object: noun, colour and box",
    "painted": "object: its colour in its box",
    "both": "object: noun and colour",
    "noun": "object: noun",
    "all placed": "picture: all objects with noun, colour and box",
}
LEAKS = {
    "leaked": "picture: an object in another's colour",
    "stained": "object: another's colour in its box",
    "both": "object: noun and colour",
    "placed": "object: noun, colour and box",
}


@dataclass(frozen=True)
class Case:
    """Objects, (noun, colour), and their boxes in pixels; `seed` is that of the noise."""

    wanted: tuple[Wanted, ...]
    boxes: tuple[tuple[int, ...], ...]
    seed: int

    @property
    def prompt(self) -> str:
        texts = [f"a {color} {noun}" for noun, color in self.wanted]
        return " and ".join(part for part in (", ".join(texts[:-1]), texts[-1]) if part)

    @property
    def regions(self) -> list[str]:
        places = (",".join(f"{side / CANVAS:g}" for side in box) for box in self.boxes)
        return [f"a {color} {noun}@{place}" for (noun, color), place in zip(self.wanted, places)]

    def exchanged(self) -> Case:
        """The first object with another noun and colour, which no object of the case has."""
        rng = np.random.default_rng((HELD_OUT, 79, self.seed))
        noun = rng.choice([noun for noun in NOUNS if noun not in {noun for noun, _ in self.wanted}])
        color = rng.choice([color for color in COLORS if color not in {color for _, color in self.wanted}])
        return Case(((str(noun), str(color)), *self.wanted[1:]), self.boxes, self.seed)


def case(index: int, objects: int) -> Case:
    """Held-out case `index` with 2-4 objects. Boxes are 48 to 80 pixels a side for two objects, to 64 for more."""
    rng = np.random.default_rng((HELD_OUT, 78, objects, index))
    nouns = rng.choice(list(NOUNS), objects, replace=False)
    colors = rng.choice(list(COLORS), objects, replace=False)
    while True:
        sides = rng.integers(3, 6 if objects == 2 else 5, size=(TRIES, objects, 2))
        low = np.floor(rng.random(sides.shape) * (CANVAS // GRID - sides + 1)).astype(int)
        high = low + sides
        apart = ((high[:, :, None] <= low[:, None]) | (low[:, :, None] >= high[:, None])).any(-1)
        good = (apart | np.eye(objects, dtype=bool)).all((1, 2)).nonzero()[0]
        if len(good):
            boxes = np.concatenate([low, high], -1)[good[0]] * GRID
            return Case(
                tuple((str(noun), str(color)) for noun, color in zip(nouns, colors)),
                tuple(tuple(map(int, box)) for box in boxes),
                index,
            )


def alone(index: int, objects: int) -> Case:
    """One object of a case in its box, each in turn."""
    whole, which = case(index, objects), index % objects
    return Case((whole.wanted[which],), (whole.boxes[which],), index)


class Record:
    """What was measured in the cases of one part, by number, in a JSON file. A part with other settings is refused."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.cases = folder / f"{name}.json", settings, {}
        if self.path.is_file():
            facts = json.loads(self.path.read_text(encoding="utf-8"))
            if facts["settings"] != settings:
                other = [key for key in settings if facts["settings"].get(key) != settings[key]]
                raise SystemExit(
                    f"{self.path} was made with other settings ({', '.join(other)})\nHINT: another --record, or delete it"
                )
            self.cases = {int(index): found for index, found in facts["cases"].items()}

    def batches(self, count: int, size: int) -> Iterator[list[int]]:
        """Numbers of the cases that are missing; what was added in between is written."""
        missing = [index for index in range(count) if index not in self.cases]
        for first in tqdm(range(0, len(missing), size), desc=self.path.stem, mininterval=5):
            yield missing[first : first + size]
            self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"settings": self.settings, "cases": self.cases}), encoding="utf-8")
        os.replace(temporary, self.path)

    def picture(self, index: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{index}.png")

    def column(self, measure: str, count: int) -> list[Any]:
        """A measure in all cases, in order."""
        values = [self.cases[index][measure] for index in range(count)]
        return [one for value in values for one in value] if isinstance(values[0], list) else values


def judged(read: Sequence[Detection], item: Case) -> dict[str, Any]:
    """What a picture holds of what its case asked for: lists with one entry per object, or one value per picture."""
    found = match(read, item.wanted)
    colors = [color for _, color in item.wanted]
    inside = [{one.color for one in read if in_box(one, box)} for box in item.boxes]
    placed = [bool(one.both and in_box(one.detection, box)) for one, box in zip(found, item.boxes)]
    return {
        "noun": [bool(one.noun) for one in match(read, item.wanted, by="noun")],
        "both": [bool(one.both) for one in found],
        "placed": placed,
        "all placed": all(placed),
        "painted": [color in here for color, here in zip(colors, inside)],
        "leaked": leaked(read, item.wanted) > 0,
        "stained": [bool(here & set(colors) - {color}) for color, here in zip(colors, inside)],
    }


class Measurement:
    """Runs the ways of a measurement on one pipeline; `options` are the arguments of RegionalPrompts by way, None for no control."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.judge = asked, IconJudge()
        self.pipeline = ac.pipelines.RegionalPipeline(load_pipeline(asked.model, asked.device, asked.dtype))
        usual = {"base_weight": asked.base_weight, "stop": asked.stop}
        self.options = {
            PLAIN: None,
            REGIONS: usual,
            OPEN: {**usual, "isolate": False},
            BOTH: {**usual, "guidance": BOUNDED},
        }
        self.weights = weights_of(asked.model)

    def record(self, name: str, options: dict[str, Any] | None, guidance_scale: float) -> Record:
        asked = self.asked
        facts = {"weights": self.weights, "steps": asked.steps, "guidance scale": guidance_scale}
        return Record(asked.record, name, {**facts, "dtype": asked.dtype, "options": options})

    def call(self, cases: Sequence[Case], options: dict[str, Any] | None, guidance_scale: float, **more: Any) -> Any:
        """What the pipeline returns for each case: without control in one batch, with regions one after the other."""
        import torch

        if options is not None and "guidance" in options:  # its places belong to the whole call
            return [image for item in cases for image in self.guided(item, dict(options), guidance_scale)]
        regions = {} if options is None else {"regions": [item.regions for item in cases], **options}
        return self.pipeline(
            more.pop("prompts", [item.prompt for item in cases]),
            num_inference_steps=self.asked.steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(item.seed) for item in cases],
            max_sequence_length=1,
            **regions,
            **more,
        ).images

    def guided(self, item: Case, options: dict[str, Any], guidance_scale: float) -> list[Image.Image]:
        """One picture with its phrases pulled into their boxes, and with regions where `options` has arguments of theirs."""
        import torch

        boxes = {
            f"{color} {noun}": tuple(side / CANVAS for side in box)
            for (noun, color), box in zip(item.wanted, item.boxes)
        }
        pipe = self.pipeline.pipe
        controls = [ac.LatentGuidance.in_prompt(boxes, item.prompt, pipe.tokenizer, **options.pop("guidance"))]
        if options:
            controls.append(ac.RegionalPrompts(item.regions, **options))
        with ac.attach(pipe, *controls):
            return pipe(
                item.prompt,
                num_inference_steps=self.asked.steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator("cpu").manual_seed(item.seed),
                max_sequence_length=1,
            ).images

    def judge_all(self, name: str, way: str, make: Callable[[int], Case]) -> Record:
        """A way over all cases, by the judge."""
        scale = self.asked.guidance_scale
        record = self.record(f"{name}-{way}".replace(", ", "-").replace(" ", "-"), self.options[way], scale)
        for batch in record.batches(self.asked.cases, self.asked.batch_size):
            cases = [make(index) for index in batch]
            images = self.call(cases, self.options[way], scale)
            for index, item, image, read in zip(batch, cases, images, self.judge.read_many(images)):
                record.cases[index] = judged(read, item)
                if index < SHOWN:
                    record.path.parent.mkdir(parents=True, exist_ok=True)
                    image.convert("RGB").save(record.picture(index))
        return record

    def leakage(self, name: str, options: dict[str, Any], guidance_scale: float) -> Record:
        """Relative changes per area after the first step and at the end, when one region's prompt is exchanged."""
        record = self.record(f"causal-{name}", options, guidance_scale)
        for batch in record.batches(self.asked.cases, self.asked.batch_size // 2):
            originals = [case(index, 2) for index in batch]
            pairs = [item for one in originals for item in (one, one.exchanged())]
            first: list[np.ndarray] = []

            def keep(pipe, step, timestep, tensors):
                if step == 0:
                    first.append(tensors["latents"].float().cpu().numpy())
                return {}

            prompts = [one.prompt for one in originals for _ in range(2)]
            more = {"prompts": prompts, "output_type": "latent", "callback_on_step_end": keep}
            last = self.call(pairs, options, guidance_scale, **more)
            last = last.float().cpu().numpy()
            for number, (index, item) in enumerate(zip(batch, originals)):
                record.cases[index] = {
                    "first step": relative_change(first[2 * number][0], first[2 * number + 1][0], item),
                    "end": relative_change(last[2 * number], last[2 * number + 1], item),
                }
        return record


def relative_change(before: np.ndarray, after: np.ndarray, item: Case) -> list[float]:
    """Mean |difference| / mean |before| of latents (C, h, w) in each of AREAS."""
    side = CANVAS // before.shape[-1]
    masks = np.zeros((len(AREAS), *before.shape[1:]), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, item.boxes):
        mask[y0 // side : y1 // side, x0 // side : x1 // side] = True
    masks[2] = ~masks[:2].any(0)
    return [float(np.abs(after - before)[:, m].mean() / np.abs(before)[:, m].mean()) for m in masks]


def weights_of(model: str) -> str:
    """A mark of a local model's denoiser, so that no record outlives the weights it was made with; else the name."""
    files = sorted(Path(resolve_model(model), "transformer").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12] if files else model


def rate_rows(label: str, ways: dict[str, Record], measures: dict[str, str], count: int, against: str) -> list[str]:
    """Lines of a table: every measure of every way, with McNemar's p against one of them."""
    lines = []
    for measure, title in measures.items():
        for way, record in ways.items():
            if way.startswith("alone") and measure.startswith("all"):
                continue  # there is one object
            hits = record.column(measure, count)
            pairs = way != against and not way.startswith("alone")
            p = f"{mcnemar(ways[against].column(measure, count), hits):.2g}" if pairs else ""
            lines.append(f"| {label} | {title} | {way} | {percent(sum(hits), len(hits))} | {p} |")
    return lines


def change_row(label: str, when: str, record: Record, count: int) -> str:
    """Means of the relative changes with bootstrap intervals, and the share that reaches the other region."""
    values = np.array([record.cases[index][when] for index in range(count)])
    cells = []
    for column in values.T:
        mean, low, high = paired_bootstrap(np.zeros(count), column)
        cells.append(f"{mean:.4f} ({low:.4f} - {high:.4f})")
    inside, other, _ = values.mean(0)
    share = f"{other / inside:.3f}" if inside else "-"
    return f"| {label} | {when} | {' | '.join(cells)} | {share} |"


def sheet(rows: dict[str, tuple[Record, Callable[[int], Case]]], count: int) -> Image.Image:
    """The first pictures of every way, with the boxes in the wanted colours."""
    tile, left = CANVAS + 6, 170
    out = Image.new("RGB", (left + tile * count, tile * len(rows)), "white")
    draw = ImageDraw.Draw(out)
    for row, (name, (record, make)) in enumerate(rows.items()):
        draw.multiline_text((4, row * tile + CANVAS // 2 - 8), name.replace(": ", ":\n"), fill="black")
        for index in range(count):
            x, y = left + index * tile, row * tile
            with Image.open(record.picture(index)) as picture:
                out.paste(picture.resize((CANVAS, CANVAS)), (x, y))
            item = make(index)
            for (_, color), (x0, y0, x1, y1) in zip(item.wanted, item.boxes):
                draw.rectangle((x + x0, y + y0, x + x1 - 1, y + y1 - 1), outline=COLORS[color], width=2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="builtin:icons-t2i")
    parser.add_argument(
        "--parts", nargs="+", default=["layout", "binding", "causal"], choices=["layout", "binding", "causal"]
    )
    parser.add_argument(
        "--objects", type=int, nargs="+", default=[2, 3, 4], choices=[2, 3, 4], help="of the layout part"
    )
    parser.add_argument("--cases", type=int, default=200, help="of every part and way")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--base-weight", type=float, default=0.3)
    parser.add_argument("--stop", type=float, default=0.3)
    parser.add_argument(
        "--batch-size", type=int, default=40, help="cases between two writes of the record, one batch without control"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, default=Path("runs/regions"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/regions.md"))
    asked = parser.parse_args()
    if asked.cases < 1 or asked.batch_size < 2:
        parser.error("at least one case, and batches of at least two")
    run, count = Measurement(asked), asked.cases
    facts = {"cases": count, "steps": asked.steps, "guidance scale": asked.guidance_scale, "dtype": asked.dtype}
    settings = f"base_weight {asked.base_weight:g}, stop {asked.stop:g}, the objects' sentence as base prompt"
    lines = [
        "# Regions on the embedded model",
        "",
        notes("benchmarks.regions", **facts, regions=settings, weights=run.weights),
        "",
    ]
    head = ["| cases | measure | way | count | rate | Wilson 95 % | McNemar p |", "|---|---|---|---|---|---|---|"]
    shown: dict[str, tuple[Record, Callable[[int], Case]]] = {}

    def ways(objects: int, names: Sequence[str]) -> dict[str, Record]:
        found = {}
        make = partial(case, objects=objects)
        for way in names:
            found[way] = run.judge_all(f"{objects}-objects", way, make)
            shown[f"{objects} objects: {way}"] = found[way], make
        return found

    if "layout" in asked.parts:
        lines += ["## Layout", "", *head]
        for objects in asked.objects:
            records = ways(objects, (PLAIN, REGIONS, BOTH))
            for way in (BOTH,) if objects == 2 else ():  # what the model reaches where no other object is asked for
                records[f"alone, {way}"] = run.judge_all(
                    f"{objects}-objects-alone", way, partial(alone, objects=objects)
                )
            lines += rate_rows(f"{objects} objects", records, MEASURES, count, PLAIN)
        lines.append("")
    if "binding" in asked.parts:
        records = ways(3, (OPEN, REGIONS, BOTH, PLAIN))
        lines += ["## Binding", "", "p is against isolated regions.", "", *head]
        lines += [*rate_rows("3 objects", records, LEAKS, count, REGIONS), ""]
    if "causal" in asked.parts:
        scale, cut = asked.guidance_scale, {"base_weight": 0.0, "stop": 1.0}
        usual = f"base_weight {asked.base_weight:g}, stop {asked.stop:g}, guidance {scale:g}"
        causal = {
            "cut-off": (f"base_weight 0, stop 1, guidance {scale:g}", cut, scale),
            "regions": (usual, run.options[REGIONS], scale),
        }
        if scale != 1:
            causal["cut-off-no-guidance"] = ("base_weight 0, stop 1, guidance 1", cut, 1.0)
        lines += [
            "## Causal leakage",
            "",
            "Relative change of the latents when the first region's prompt is exchanged: mean and bootstrap 95 % interval. After the",
            "first step, the unconditional half of classifier-free guidance and the background, which see everything, carry it on.",
            "",
            f"| regions | when | {' | '.join(AREAS)} | other / its box |",
            "|---|---|---|---|---|---|",
        ]
        for name, (label, options, guidance) in causal.items():
            record = run.leakage(name, options, guidance)
            lines += [change_row(label, when, record, count) for when in ("first step", "end")]
        lines.append("")
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    if shown:
        picture = asked.output.with_name(f"{asked.output.stem}_sheet.png")
        sheet(dict(sorted(shown.items())), min(SHOWN, count)).save(picture)
        lines += [f"![The first cases; boxes in the wanted colours]({picture.name})", ""]
    asked.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
