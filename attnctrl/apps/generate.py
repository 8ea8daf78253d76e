"""The main job: pictures of one prompt under controls, with the same seeds without them beside, if asked.

Nothing heavy is imported with this module: what can be said about a request without a model is said before torch is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AttnCtrlError
from ..icons.models import resolve_model
from ..requests import EARLY as EARLY
from ..requests import describe
from ..requests import restore as restore
from .metadata import places_text, save_image


if TYPE_CHECKING:
    from PIL import Image

    from ..controls import Control

VERSIONED = ("torch", "diffusers", "transformers", "numpy", "pillow")
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Job:
    """One run of `attnctrl generate`, checked as far as it can be without a model."""

    prompt: str
    negative_prompt: str | None = None
    model: str = "builtin:icons-t2i"
    seed: int = 0
    steps: int = 24
    guidance_scale: float = 4.0
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    batch_size: int = 1
    max_sequence_length: int | None = None
    dtype: str | None = None
    device: str | None = None
    variant: str | None = None
    revision: str | None = None
    attention_backend: str | None = None
    cpu_offload: bool = False
    lora: str | None = None
    output: Path = Path("outputs")
    name: str | None = None
    compare: bool = False
    folder: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        wrong = []
        if not self.prompt.strip():
            wrong.append("the prompt is empty")
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name) or ""
            if text.encode("utf-8", "replace").decode("utf-8") != text or "\0" in text:
                wrong.append(f"the {name.replace('_', ' ')} is no valid text")
        for name, least in (
            ("steps", 1),
            ("num_images", 1),
            ("batch_size", 1),
            ("height", 1),
            ("width", 1),
            ("max_sequence_length", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                wrong.append(f"{_flag(name)} {value} is less than {least}")
        if not 0 <= self.seed <= _MAX_SEED - max(self.num_images, 0):
            wrong.append(f"--seed {self.seed} is not between 0 and 2^63 minus the number of pictures")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            wrong.append(f"--guidance-scale {self.guidance_scale} is not a number from 0 on")
        if self.negative_prompt and self.guidance_scale <= 1:
            wrong.append(
                f"--negative-prompt does nothing with --guidance-scale {self.guidance_scale:g}: it needs more than 1"
            )
        if self.name is not None and (
            not self.name.strip(" .") or re.search(r'[/\\\0:*?"<>|]', self.name) or len(self.name.encode()) > 200
        ):
            wrong.append(f"--name {self.name!r} is no file name without folder and ending")
        if wrong:
            raise AttnCtrlError("; ".join(wrong))
        check_output(self.output)
        object.__setattr__(self, "folder", resolve_model(self.model))

    @property
    def seeds(self) -> list[int]:
        return [self.seed + index for index in range(self.num_images)]

    def request(self, controls: Sequence[Control], made: dict[str, Any]) -> dict[str, Any]:
        """What is needed to make pictures again, seed and size apart. `made`: what only the loaded pipeline knew."""
        names = (
            "prompt",
            "negative_prompt",
            "model",
            "revision",
            "variant",
            "lora",
            "steps",
            "guidance_scale",
            "max_sequence_length",
        )
        return {
            **{name: getattr(self, name) for name in names},
            "attention_backend": self.attention_backend,
            **made,
            "controls": [describe(control) for control in controls],
            "generator_device": "cpu",
            "batch_size": self.batch_size,
            "versions": versions(),
        }

    def stem(self, request: dict[str, Any]) -> str:
        """`--name`, or the prompt with a mark of the settings: other settings never overwrite a picture, the same ones do."""
        if self.name is not None:
            return self.name
        words = re.sub(r"[^\w]+", "-", self.prompt.lower()).strip("-_")[:40].strip("-_") or "picture"
        settings = {key: value for key, value in request.items() if key not in ("versions", "batch_size")}
        mark = hashlib.sha256(json.dumps([settings, self.height, self.width], sort_keys=True).encode()).hexdigest()[:6]
        return f"{words}-{mark}"


def check_output(folder: Path) -> None:
    """Raises when the output folder cannot be made or written to; makes nothing."""
    at = folder
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir():
        what = "is a file" if at == folder else f"lies below {str(at)!r}, which is a file"
        raise AttnCtrlError(f"output folder {str(folder)!r} {what}")
    if not os.access(at, os.W_OK | os.X_OK):
        raise AttnCtrlError(f"output folder {str(folder)!r} cannot be written to")


def run(job: Job, controls: Sequence[Control]) -> Iterator[Path | str]:
    """Makes the pictures; yields every file as soon as it is written, and at last the session's report (a text)."""
    from .._quiet import quiet_imports

    with quiet_imports():
        from ..processors import Session
        from ..processors.phrases import with_phrases
        from .loading import load_pipeline

    if job.compare and not controls:
        raise AttnCtrlError(
            "--compare has nothing to compare: no control was asked for\nHINT: --heads, --layers, --region or --control"
        )
    pipeline, made = load_pipeline(job)
    arguments = call_arguments(job, pipeline)
    placed = with_phrases(controls, job.prompt, pipeline)
    session = Session(pipeline, *placed) if controls else None  # a head that does not exist is told here
    request = job.request(controls, made)
    stem = job.stem(request)
    ways = [("", session, request)]
    if job.compare:
        ways.append(("-plain", None, {**request, "controls": []}))
    check_targets(job, stem, ways)
    pictures: dict[str, list[Image.Image]] = {ending: [] for ending, *_ in ways}
    for seeds in _batches(job.seeds, job.batch_size):
        for ending, attached, asked in ways:
            with attached or nullcontext():
                images = sample(pipeline, arguments, seeds, _bar(ending, session, seeds, job))
            for index, (seed, image) in enumerate(zip(seeds, images)):
                facts = {**asked, **picture_facts(image, seed, index, len(seeds))}
                yield save_image(image, job.output / f"{stem}-{seed}{ending}.png", facts)
            pictures[ending] += images if job.compare else []
    if job.compare:
        yield write_sheet(job, stem, request, controls, pictures)
    if session is not None:
        yield session.report()


def remake(source: Path, given: dict[str, Any], report: bool = False) -> Iterator[Path | str]:
    """Makes a picture again from its request; yields its file, and messages: what differs here, and the session's report if asked.

    The picture gets its old place in a batch of the old size, filled up with copies: how matrix products round depends on the sizes
    of a batch, not on what its other rows hold. `given`: arguments of `Job` that replace those of the request.
    """
    from .._quiet import quiet_imports

    with quiet_imports():
        from ..processors import Session
        from ..processors.phrases import with_phrases
        from .loading import load_pipeline

    from .batch.pictures import read_request, save_picture

    request = read_request(source)
    try:
        job, controls, (index, size) = _read_again(request, given)
    except AttnCtrlError as error:
        raise AttnCtrlError(f"{str(source)!r} cannot be made again: {error}") from None
    here, there = versions(), request.get("versions")
    other = [f"{key} {there[key]}" for key in here if key in there and there[key] != here[key]]
    if other:
        yield f"made with {', '.join(other)}, which differs here: pixels may too"
    pipeline, made = load_pipeline(job)
    session = Session(pipeline, *with_phrases(controls, job.prompt, pipeline)) if controls else None
    asked = job.request(controls, made)
    ending = "webp" if source.suffix.lower() == ".webp" else "png"
    target = job.output / f"{job.stem(asked)}-{job.seed}.{ending}"
    with session or nullcontext():
        image = sample(pipeline, call_arguments(job, pipeline), [job.seed] * size, f"seed {job.seed}")[index]
    yield save_picture(image, target, {**asked, **picture_facts(image, job.seed, index, size)})
    if session is not None and report:
        yield session.report()


def _read_again(request: dict[str, Any], given: dict[str, Any]) -> tuple[Job, list[Control], tuple[int, int]]:
    """(job, controls, place in its batch) of a request that a picture carries. Raises for one that is not as `Job.request` writes it."""
    from .batch.requests import Request, check_values

    if request.get("contact_sheet"):
        raise AttnCtrlError("it is a contact sheet\nHINT: one of its pictures")
    shared = {
        name for name in Request.__dataclass_fields__ if name not in ("id", "output_name", "num_images", "regions")
    }
    values = {key: value for key, value in request.items() if key in shared and value is not None}
    row, wrong = check_values({**values, "id": "picture"})
    texts = ("model", "revision", "variant", "lora", "dtype", "device", "attention_backend")
    wrong += [f"{key} is no text" for key in texts if not isinstance(request.get(key), (str, type(None)))]
    place, there = request.get("batch", [0, 1]), request.get("versions")
    if not (
        isinstance(place, list) and len(place) == 2 and all(type(n) is int for n in place) and 0 <= place[0] < place[1]
    ):
        wrong.append("batch is no [place, size]")
    if request.get("model") is None or not isinstance(there, dict):
        wrong.append("it has no model or no versions")
    if wrong:
        raise AttnCtrlError("; ".join(wrong))
    options = {key: request[key] for key in texts if request.get(key) is not None}
    options = {"batch_size": place[1], **options, **row.job_arguments(), "seed": row.seed, **given}
    return Job(**options), row.make_controls(), tuple(place)


def picture_facts(image: Image.Image, seed: int, index: int, size: int) -> dict[str, Any]:
    """What a picture's request says beside the job's: its seed, its size, its place in a batch."""
    return {"seed": seed, "width": image.width, "height": image.height, "batch": [index, size]}


def write_sheet(
    job: Job, stem: str, request: dict[str, Any], controls: Sequence[Control], pictures: dict[str, list]
) -> Path:
    from .sheet import contact_sheet

    regions = [region for control in controls for region in control.regions_in_use()]
    sheet = contact_sheet(pictures["-plain"], pictures[""], job.seeds, regions, job.prompt, settings_text(request))
    size = pictures[""][0].size
    facts = {
        **request,
        "seed": job.seed,
        "seeds": job.seeds,
        "width": size[0],
        "height": size[1],
        "contact_sheet": True,
    }
    return save_image(sheet, job.output / f"{stem}-compare.png", facts)


def check_targets(job: Job, stem: str, ways: Sequence[tuple]) -> None:
    names = [f"{stem}-{seed}{ending}.png" for ending, *_ in ways for seed in job.seeds] + [f"{stem}-compare.png"]
    folders = [name for name in names if (job.output / name).is_dir()]
    if folders:
        raise AttnCtrlError(
            f"{str(job.output / folders[0])!r} is a folder; a picture would have to go there\nHINT: another --name"
        )


def call_arguments(job: Job, pipeline: Any) -> dict[str, Any]:
    """The pipeline's arguments. Raises for one that was asked for and that the pipeline does not have."""
    known = inspect.signature(pipeline.__call__).parameters
    name = type(pipeline).__name__
    wanted = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        "height": job.height,
        "width": job.width,
        "max_sequence_length": job.max_sequence_length,
    }
    arguments = {key: value for key, value in wanted.items() if value is not None}
    unknown = [key for key in ("generator", *arguments) if key not in known]
    if unknown:
        raise AttnCtrlError(
            f"{name} takes no {', '.join(unknown)}, so it cannot do this job\nHINT: a text-to-image pipeline"
        )
    if job.negative_prompt and "true_cfg_scale" in known:
        raise AttnCtrlError(
            f"{name} is guidance-distilled and ignores a negative prompt\nHINT: leave --negative-prompt out"
        )
    return arguments


def sample(pipeline: Any, arguments: dict[str, Any], seeds: Sequence[int], bar: str | None) -> list[Image.Image]:
    """One batch: a CPU generator of its own per picture, so that neither batch size nor device changes the initial noise.

    Args:
        arguments: those of `call_arguments`; a list of prompts has one for each seed.
        bar: title of the progress bar; None for no bar.
    """
    import torch

    pipeline.set_progress_bar_config(**({"disable": True} if bar is None else {"desc": bar}))
    texts = {name: arguments[name] for name in ("prompt", "negative_prompt") if name in arguments}
    texts = {name: text if isinstance(text, list) else [text] * len(seeds) for name, text in texts.items()}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    output = pipeline(**{**arguments, **texts}, generator=generators)
    images = getattr(output, "images", None)
    if not isinstance(images, list) or len(images) != len(seeds):
        raise AttnCtrlError(f"{type(pipeline).__name__} returned no pictures\nHINT: a text-to-image pipeline")
    return images


def settings_text(request: dict[str, Any]) -> str:
    """The settings in one sentence, for the contact sheet."""
    parts = [f"{request['model']}", f"{request['steps']} steps", f"guidance {request['guidance_scale']:g}"]
    for control in request["controls"]:
        if control["control"] == "SoftPAG":
            heads = " ".join(f"{layer}.{head}" for layer, head, _ in control["heads"] or ()) or "all"
            where = f"heads {heads}" + (f", layers {control['layers']}" if control["layers"] is not None else "")
            facts = f"{where}, {control['target']}, strength {control['strength']:g}, scale {control['scale']:g}"
        elif control["control"] == "RegionalPrompts":
            facts = f"base weight {control['base_weight']:g}, overlap {control['overlap']}" + (
                "" if control["isolate"] else ", not isolated"
            )
        else:
            hidden = ("control", "start", "stop")
            told = {k: v for k, v in control.items() if k not in hidden and v is not None}
            facts = ", ".join(f"{k} {places_text(v) if k == 'subjects' else _short(v)}" for k, v in told.items())
        window = (
            ""
            if (control.get("start", 0), control.get("stop", 1)) == (0, 1)
            else f", steps {control['start']:g}-{control['stop']:g}"
        )
        parts.append(f"{control['control']} ({facts}{window})")
    return "  ·  ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return (
            " ".join(
                ".".join(f"{part:g}" if isinstance(part, float) else str(part) for part in item[:2]) for item in value
            )
            if (value and isinstance(value[0], list))
            else " ".join(map(str, value))
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def versions() -> dict[str, str]:
    """Of what decides about pixels. Not to be changed by who asks."""
    from .. import __version__

    found = {"attnctrl": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _batches(seeds: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(seeds), size):
        yield seeds[first : first + size]


def _bar(ending: str, session: Any, seeds: Sequence[int], job: Job) -> str:
    """The progress bar's title: "with control, pictures 1-4 of 4"."""
    first, last = seeds[0] - job.seed + 1, seeds[-1] - job.seed + 1
    count = f"pictures {first}-{last}" if last > first else f"picture {first}"
    way = "without control, " if ending else "with control, " if session is not None and job.compare else ""
    return f"{way}{count} of {job.num_images}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
