"""`attnctrl evaluate pope|chair`: what a vision-language model says of what is not there, under controls or not."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._quiet import quiet_imports
from ..errors import AttnCtrlError
from ..loading import pick_device, quiet_loading
from .loading import pick_dtype


if TYPE_CHECKING:
    from ..controls import Control
    from ..evaluate.rates import Rate
    from ..evaluate.vlm import Answer, ChairTest, PopeTest

PLAIN = "no control"


@dataclass(frozen=True)
class Evaluation:
    """What `attnctrl evaluate pope` or `chair` was asked.

    Args:
        measure: "pope" or "chair". world: None goes by the model's name. split: of POPE, or "all".
        count: questions of each split, or captions. held_out: scenes of nouns that training never shows.
        prior: probability that the second object of a scene is a usual companion of the first.
        noise: standard deviation of noise on the pictures, 1 being black to white.
        controls: as `--control` writes them; with some, the model is measured without them too.
        output: file of the report, markdown.
    """

    measure: str
    model: str
    world: str | None = None
    split: str = "all"
    count: int = 600
    held_out: bool = False
    prior: float = 0.0
    noise: float = 0.0
    controls: Sequence[str] = ()
    max_new_tokens: int | None = None
    batch_size: int = 32
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    output: Path | None = None
    as_json: bool = False
    progress: bool = False


def default_world(model: str) -> str:
    """The world that a model was trained on, by its name."""
    return "emoji" if "smol-vlm" in Path(model.removeprefix("builtin:")).name else "icons"


def evaluate(asked: Evaluation) -> Iterator[str]:
    """What goes to stdout: the tables, or JSON. What can be wrong without the model is said before it is loaded."""
    with quiet_imports():
        import torch

        from ..controls.spec import parse_control
        from ..evaluate.vlm import CHAIR_HEAD, POPE_HEAD, chair_row, difference, pope_rows
        from ..pipelines.vlm import GroundedVLM
    if asked.output is not None and not asked.output.parent.is_dir():
        raise AttnCtrlError(f"--output {asked.output}: folder {str(asked.output.parent)!r} does not exist")
    controls = [parse_control(item) for item in asked.controls]
    test = _test(asked)
    with quiet_loading():
        device = pick_device(asked.device)
        dtype = pick_dtype(asked.dtype, device)
        vlm = GroundedVLM.from_pretrained(
            asked.model, revision=asked.revision, device=str(device), dtype=getattr(torch, dtype)
        )
    options: dict[str, Any] = {"batch_size": asked.batch_size, "progress": asked.progress}
    if asked.max_new_tokens is not None:
        options["max_new_tokens"] = asked.max_new_tokens
    settings: dict[str, list[Control]] = {PLAIN: []}
    if controls:
        settings[" + ".join(asked.controls)] = controls
    pope = asked.measure == "pope"
    lines, results, before = [POPE_HEAD if pope else CHAIR_HEAD], [], None
    below: list[str] = []
    for name, chosen in settings.items():
        start = time.perf_counter()
        answers, report = test.run(vlm, chosen, **options)
        seconds = time.perf_counter() - start
        lines += pope_rows(name, test, answers) if pope else [chair_row(name, test, answers)]
        results.append({"controls": list(asked.controls) if chosen else [], **_plain(test, answers, pope)})
        right = test.right(answers)
        if chosen:
            what = "questions answered right" if pope else "captions without anything absent"
            below += [f"{what}, against {PLAIN}: {difference(before, right)} (McNemar)", "", "```", report, "```"]
        before = right
        below += [f"{name}: {1000 * seconds / len(answers):.0f} ms {'a question' if pope else 'a caption'}"]
    facts = _facts(asked, test, str(device), dtype)
    if asked.output is not None:
        page = [f"# {asked.measure.upper()} of {Path(asked.model).name}", ""]
        page += [f"- {key}: {value}" for key, value in facts.items()]
        asked.output.write_text("\n".join([*page, "", *lines, "", *below, ""]), encoding="utf-8")
    if asked.as_json:
        yield json.dumps({**facts, "results": results}, indent=2)
    else:
        yield "\n".join([*lines, "", *below])


def _test(asked: Evaluation) -> PopeTest | ChairTest:
    from ..evaluate.pope import SPLITS
    from ..evaluate.vlm import ChairTest, PopeTest, world_named

    if asked.split != "all" and asked.split not in SPLITS:
        raise AttnCtrlError(f"POPE has no split {asked.split!r}\nHINT: all, {', '.join(SPLITS)}")
    world = world_named(asked.world or default_world(asked.model))
    more = {"held_out": asked.held_out, "prior": asked.prior, "noise": asked.noise}
    if asked.measure == "chair":
        return ChairTest.make(world, asked.count, **more)
    every = ("random",) if asked.held_out else SPLITS
    return PopeTest.make(world, asked.count, every if asked.split == "all" else (asked.split,), **more)


def _facts(asked: Evaluation, test: PopeTest | ChairTest, device: str, dtype: str) -> dict[str, str]:
    scenes = test.scenes
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    return {
        "model": Path(asked.model).name if Path(asked.model).is_absolute() else asked.model,
        "world": f"{scenes.world.name}, {'held-out nouns' if asked.held_out else 'nouns of training'}",
        "scenes": f"stream {scenes.stream}, prior {asked.prior:g}, noise {asked.noise:g}",
        "device": f"{device}, {dtype}",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def _plain(test: Any, answers: Sequence[Answer], pope: bool) -> dict[str, Any]:
    """Scores as JSON holds them: [value, low, high]."""

    def rates(scores: Any) -> dict[str, Any]:
        found: dict[str, int | Rate] = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
        return {name: value if isinstance(value, int) else value.plain() for name, value in found.items()}

    scores = test.scores(answers)
    return {"splits": {name: rates(part) for name, part in scores.items()}} if pope else rates(scores)
