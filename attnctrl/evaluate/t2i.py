"""How often a text-to-image pipeline of the icon world draws what its prompt asks for.

Prompt i is drawn from the held-out stream (999, i), kinds in turn: one object, two objects, two objects in a relation; the
two nouns and the two colours of a prompt differ. Pictures are read by `attnctrl.evaluate.icons.IconJudge`.

    python -m attnctrl.evaluate.t2i --model PATH [--prompts 300] [--steps 24] [--guidance-scale 4] [--output FILE.md]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from ..errors import AttnCtrlError
from ..icons.world import Scene, describe, relation_between, sample_scene
from .icons import Detection, IconJudge
from .intervals import percent
from .scoring import HELD_OUT, extra, leaked, objects_right, relation_right, wanted_of


KINDS = ("one object", "two objects", "two objects, relation")
SHEET = 32  # pictures on the contact sheet
COLUMNS = 8

Call = Callable[[Any, list[str], list[int]], Sequence[Image.Image]]


@dataclass(frozen=True)
class Request:
    """One prompt; `scene` is one picture that would satisfy it, `relation` holds between its first two objects."""

    kind: str
    prompt: str
    scene: Scene
    relation: str | None
    seed: int


def request(index: int, seed: int = 0) -> Request:
    """Held-out prompt `index`; its picture's noise comes from `seed + index`."""
    kind = KINDS[index % len(KINDS)]
    rng = np.random.default_rng((HELD_OUT, index))
    related = kind == KINDS[2]
    scene = sample_scene(rng, 1 if kind == KINDS[0] else 2, related=related, distinct=True)
    relation = relation_between(*scene.objects) if related else None
    joint = f" {relation} " if relation else " and "
    return Request(kind, joint.join(describe(item) for item in scene.objects), scene, relation, seed + index)


@dataclass
class Result:
    """What was read in every picture. `images` keeps the first SHEET pictures."""

    requests: list[Request]
    detections: list[list[Detection]]
    images: list[Image.Image] = field(default_factory=list, repr=False)
    seconds: float = 0.0

    @property
    def right(self) -> list[bool]:
        """Per picture: all objects with noun and colour, and the relation if one was asked. Pairs up for `mcnemar`."""
        return [_fulfilled(asked, read) for asked, read in zip(self.requests, self.detections)]

    def rows(self) -> list[tuple[str, str, int, int]]:
        """(kind, measure, right, total); rows named "leaked" and "extra" count failures."""
        rows = []
        for kind in KINDS:
            pairs = [(a, d) for a, d in zip(self.requests, self.detections) if a.kind == kind]
            if not pairs:
                continue
            count, objects = len(pairs), sum(len(asked.scene.objects) for asked, _ in pairs)
            for by, label in (
                ("both", "object: noun and colour"),
                ("noun", "object: noun"),
                ("color", "object: colour"),
            ):
                right = sum(sum(objects_right(read, asked.scene, by=by)) for asked, read in pairs)
                rows.append((kind, label, right, objects))
            if kind != KINDS[0]:
                both = sum(all(objects_right(read, asked.scene)) for asked, read in pairs)
                rows.append((kind, "picture: both objects", both, count))
            if kind == KINDS[2]:
                rows.append((kind, "picture: both and the relation", sum(_fulfilled(*pair) for pair in pairs), count))
            if kind != KINDS[0]:
                rows.append(
                    (kind, "leaked: object in the other's colour", sum(leaked(r, a.scene) for a, r in pairs), objects)
                )
            surplus = sum(extra(read, asked.scene) > 0 for asked, read in pairs)
            rows.append((kind, "extra: picture with something not asked", surplus, count))
        rows.append(("all", "picture: everything asked", sum(self.right), len(self.right)))
        return rows

    def table(self) -> str:
        lines = ["| prompts | measure | count | rate | Wilson 95 % |", "|---|---|---|---|---|"]
        return "\n".join(
            lines + [f"| {kind} | {label} | {percent(n, total)} |" for kind, label, n, total in self.rows()]
        )

    def sheet(self) -> Image.Image:
        """The first pictures, prompt below; green frame = everything asked is there, red = not."""
        tile, text, gap = 128, 30, 4
        cell = (tile + 2 * gap, tile + 2 * gap + text)
        rows = -(-len(self.images) // COLUMNS)
        out = Image.new("RGB", (COLUMNS * cell[0], rows * cell[1]), "white")
        draw, font = ImageDraw.Draw(out), ImageFont.load_default(9)
        for index, (image, asked, right) in enumerate(zip(self.images, self.requests, self.right)):
            x, y = index % COLUMNS * cell[0], index // COLUMNS * cell[1]
            draw.rectangle(
                (x + 1, y + 1, x + cell[0] - 2, y + tile + 2 * gap - 2), fill="#1a9641" if right else "#d7191c"
            )
            out.paste(image.convert("RGB").resize((tile, tile), Image.LANCZOS), (x + gap, y + gap))
            draw.multiline_text(
                (x + gap, y + tile + 2 * gap), _wrap(asked.prompt, 26), fill="black", font=font, spacing=1
            )
        return out


def _fulfilled(asked: Request, read: list[Detection]) -> bool:
    if asked.relation is None:
        return all(objects_right(read, asked.scene))
    first, second = wanted_of(asked.scene)
    return relation_right(read, first, asked.relation, second)


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def pipeline_call(steps: int = 24, guidance_scale: float = 4.0, max_sequence_length: int | None = None) -> Call:
    """The ordinary way to ask a diffusers pipeline: one CPU generator per image."""

    def call(pipe: Any, prompts: list[str], seeds: list[int]) -> Sequence[Image.Image]:
        import torch

        more = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return pipe(
            prompts, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, **more
        ).images

    return call


def evaluate(
    pipe: Any,
    *,
    prompts: int = 300,
    steps: int = 24,
    guidance_scale: float = 4.0,
    max_sequence_length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    call: Call | None = None,
    judge: IconJudge | None = None,
    progress: bool = False,
) -> Result:
    """Generates and judges held-out prompts 0 ... `prompts - 1`.

    Args:
        pipe: handed to `call`; a diffusers text-to-image pipeline unless `call` says otherwise.
        prompts: number of pictures, a third of each kind.
        steps, guidance_scale, max_sequence_length: for the default `call` only.
        batch_size: pictures per call.
        seed: noise seed of prompt 0; prompt i uses `seed + i`.
        call: `call(pipe, prompts, seeds) -> images`, to generate in another way, e.g. inside a control.
        judge: reads the pictures.
        progress: draw a bar.
    """
    if prompts < 1 or batch_size < 1:
        raise AttnCtrlError(
            f"asked for {prompts} prompts in batches of {batch_size}\nHINT: evaluate(pipe, prompts=300, batch_size=16)"
        )
    call = call or pipeline_call(steps, guidance_scale, max_sequence_length)
    judge = judge or IconJudge()
    result, start = Result([request(index, seed) for index in range(prompts)], []), time.perf_counter()
    for first in tqdm(range(0, prompts, batch_size), disable=not progress):
        asked = result.requests[first : first + batch_size]
        images = list(call(pipe, [item.prompt for item in asked], [item.seed for item in asked]))
        if len(images) != len(asked):
            raise AttnCtrlError(
                f"call returned {len(images)} images for {len(asked)} prompts\nHINT: return one image per prompt, in order"
            )
        result.detections += judge.read_many(images)
        result.images += images[: SHEET - len(result.images)]
    result.seconds = time.perf_counter() - start
    return result


def write(result: Result, output: Path, *, title: str, notes: dict[str, str]) -> Path:
    """Writes the markdown and, beside it, the contact sheet; returns the sheet's path."""
    sheet = output.with_name(f"{output.stem}_sheet.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    result.sheet().save(sheet)
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in notes.items()), "", result.table(), ""]
    lines += [f"![First {len(result.images)} pictures; green frame: everything asked is there]({sheet.name})", ""]
    output.write_text("\n".join(lines), encoding="utf-8")
    return sheet


def load(model: Path, device: str, dtype: str) -> Any:
    """The saved pipeline, on its device, without its own progress bar."""
    if not (model / "model_index.json").is_file():
        raise AttnCtrlError(
            f"no diffusers pipeline at {model}: model_index.json is not there\nHINT: pipe.save_pretrained(path), then --model path"
        )
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m attnctrl.evaluate.t2i", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", type=Path, required=True, help="folder of a saved StableDiffusion3Pipeline")
    parser.add_argument("--prompts", type=int, default=300, help="pictures, a third of each kind (default 300)")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--max-sequence-length", type=int, help="T5 tokens; the pipeline's default if left out")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="noise seed of the first picture; CPU generators")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quality.md"))
    options = parser.parse_args(argv)
    pipe = load(options.model, options.device, options.dtype)
    result = evaluate(
        pipe,
        prompts=options.prompts,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        max_sequence_length=options.max_sequence_length,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=True,
    )
    words = [
        Path(word).name if Path(word).is_absolute() else word for word in (sys.argv[1:] if argv is None else argv)
    ]
    packages = ("torch", "diffusers", "transformers", "numpy", "scipy", "pillow", "fontawesomefree")
    notes = {
        "command": f"`python -m attnctrl.evaluate.t2i {shlex.join(words)}`",
        "steps": str(options.steps),
        "guidance scale": f"{options.guidance_scale:g}",
        "max sequence length": str(options.max_sequence_length or "the pipeline's default"),
        "prompts": f"{options.prompts} held-out ({HELD_OUT}, i), noise seeds {options.seed} + i on the CPU",
        "device": f"{options.device}, {options.dtype}",
        "time": f"{result.seconds / options.prompts:.2f} s a picture, judging included",
        "versions": ", ".join(
            [f"Python {platform.python_version()}"] + [f"{p} {importlib.metadata.version(p)}" for p in packages]
        ),
    }
    sheet = write(result, options.output, title=f"Prompt fidelity of {options.model.resolve().name}", notes=notes)
    print(result.table())
    print(f"written: {options.output}, {sheet}")


if __name__ == "__main__":
    main()
