"""Does any control make a vision-language model say less of what is not there? POPE and CHAIR without control and under every control.

Every control is measured at its default and at its best setting. The best one is chosen from a small grid on scenes of another stream,
under noise (clean pictures are answered too well to tell settings apart), by the mean of POPE's accuracy and CHAIR's F1; the default
takes part. What cannot work on a model is listed with its error. Everything is kept under --record, so the command goes on where it
was stopped, and several models make one report.

    python -m benchmarks.vlm_answers [--model builtin:icons-vlm builtin:smol-vlm] [--parts own noise held-out style] [--tune 100]
        [--output benchmarks/results/vlm.md]
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from attnctrl._quiet import quiet_imports
from attnctrl.apps.evaluation import default_world
from attnctrl.controls.spec import parse_control
from attnctrl.errors import AttnCtrlError
from attnctrl.evaluate import vlm as measures
from attnctrl.evaluate.intervals import mcnemar
from attnctrl.evaluate.vlm import ALL, CHAIR_HEAD, POPE_HEAD, STREAMS, Answer, ChairTest, PopeTest
from attnctrl.loading import pick_device, quiet_loading

from .common import kept, notes


PLAIN = "no control"
# control -> (its default, None where it has none; other settings). {image}: token range of the picture; {sinks}: sink dimensions that
# `find_sink_dims` finds; {early}, {middle}, {late}: all heads of a third of the layers
SETTINGS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "ACT": ("ACT()", ("ACT(threshold=0.05)", "ACT(beta=0.7)", "ACT(alpha=5.0)")),
    "AdaptVis": (
        "AdaptVis()",
        ("AdaptVis(low=0.8, high=1.2)", "AdaptVis(low=1.2, high=1.2)", "AdaptVis(low=0.8, high=0.8)"),
    ),
    "ConcentricCausal": ("ConcentricCausal()", ()),
    "GIFT": ("GIFT()", ("GIFT(alpha=1.0)", "GIFT(alpha=2.0)", "GIFT(alpha=2.0, layers='1:')")),
    "HeadScale": (
        None,
        tuple(
            f"HeadScale({{{where}}}, factor={factor})"
            for where in ("early", "middle", "late")
            for factor in (0.8, 1.2)
        ),
    ),
    "PAI": ("PAI()", ("PAI(alpha=0.05)", "PAI(alpha=0.1)", "PAI(alpha=0.5)", "PAI(alpha=-0.1)")),
    "PAINT": (
        "PAINT()",
        ("PAINT(alpha=0.1, beta=0.1)", "PAINT(alpha=0.25, beta=0.15)", "PAINT(alpha=0.25, beta=0.0)"),
    ),
    "PASTA": (
        "PASTA(spans={image})",
        ("PASTA(spans={image}, alpha=0.3)", "PASTA(spans={image}, alpha=0.7)", "PASTA(spans={image}, alpha=0.9)"),
    ),
    "SPIN": ("SPIN()", ("SPIN(keep=0.9, factor=0.5)", "SPIN(keep=0.75, factor=0.5)", "SPIN(keep=0.75)")),
    "TokenPruning": (
        "TokenPruning()",
        ("TokenPruning(keep=0.75)", "TokenPruning(keep=0.5)", "TokenPruning(keep=0.25)"),
    ),
    "VAF": ("VAF()", ("VAF(image=1.05)", "VAF(image=1.3, system=0.9)", "VAF(image=1.15, system=1.0, layers='2:')")),
    "VAR": (
        "VAR()",
        (
            "VAR(dims={sinks})",
            "VAR(dims='any')",
            "VAR(dims='any', tau=8.0)",
            "VAR(dims='any', tau=8.0, min_non_sink=0.5, transfer=0.4, skip_last_layer=False)",
            "VAR(dims='any', tau=4.0, min_non_sink=0.5)",
        ),
    ),
    "VHR": ("VHR()", ("VHR(alpha=1.25)", "VHR(alpha=1.5)", "VHR(alpha=0.8)")),
}
LEFT_OUT = {
    "PINE": "orders several segments of a prompt; these prompts have one picture each, and one segment stays as it is",
    "RecordAttention": "changes nothing",
}
PARTS = {  # name -> (held-out nouns, noise on the pictures, heading)
    "own": (False, False, "Its own world"),
    "noise": (False, True, "Its own world under noise"),
    "held-out": (True, False, "Nouns that training never showed"),
    "style": (False, False, "An art style that training never showed"),
}
EMOJI = ("held-out", "style")  # parts that only the emoji world has


@dataclass
class Subject:
    """A model with what settings need to know of it."""

    name: str
    vlm: Any
    hash: str

    @classmethod
    def load(cls, name: str, device: str | None, dtype: str) -> Subject:
        with quiet_imports():
            import torch

            from attnctrl.pipelines.vlm import GroundedVLM, resolve_language_model
        folder = Path(resolve_language_model(name))
        found = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            found.update(path.read_bytes())
        with quiet_loading():
            vlm = GroundedVLM.from_pretrained(name, device=str(pick_device(device)), dtype=getattr(torch, dtype))
        shown = name if name.startswith("builtin:") else folder.name
        return cls(shown, vlm, found.hexdigest()[:16])

    @cached_property
    def _looked(self) -> Any:
        return measures.Scenes(measures.world_named("icons"), STREAMS["tuning"], 4)

    @cached_property
    def image(self) -> str:
        """Token range of the picture; the same in all prompts, since nothing but the question differs."""
        ids = measures.prepare(self.vlm, [self._looked.picture(0)], ["?"])["input_ids"][0]
        places = (ids == self.vlm.model.config.image_token_id).nonzero().flatten().tolist()
        return str((places[0], places[-1] + 1))

    @cached_property
    def sinks(self) -> str:
        from attnctrl.processors import find_sink_dims

        prompts = [measures.prepare(self.vlm, [self._looked.picture(i)], ["?"]) for i in range(4)]
        return str(list(find_sink_dims(self.vlm.model, prompts).dims))

    def _third(self, number: int) -> str:
        from attnctrl.processors import LanguageSession

        sites = LanguageSession(self.vlm.model).sites
        count = len(sites)
        part = sites[count * number // 3 : count * (number + 1) // 3]
        return f"heads='{','.join(f'{site.layer}.{head}' for site in part for head in range(site.heads))}'"

    def control(self, text: str) -> Any:
        """The control of a setting. Raises AttnCtrlError where there is none on this model."""
        thirds = {name: number for number, name in enumerate(("early", "middle", "late"))}

        def fill(match: re.Match) -> str:
            return self._third(thirds[match[1]]) if match[1] in thirds else getattr(self, match[1])

        return parse_control(re.sub(r"\{(\w+)\}", fill, text))


class Bench:
    """Keeps the answers of one model on one part."""

    def __init__(self, subject: Subject, pope: PopeTest, chair: ChairTest, folder: Path, asked: argparse.Namespace):
        self.subject, self.pope, self.chair, self.folder = subject, pope, chair, folder
        self.batch_size, self.caption_tokens = asked.batch_size, asked.caption_tokens
        self._found: dict[str, dict[str, Any]] = {}

    def answers(self, setting: str) -> dict[str, Any]:
        """{"pope": answers, "chair": answers, "report": …, "seconds": …} or {"error": …} of a setting; PLAIN for no control."""
        if setting not in self._found:
            self._found[setting] = self._kept(setting)
        return self._found[setting]

    def _kept(self, setting: str) -> dict[str, Any]:
        slug = re.sub(r"[^\w.=-]+", "_", setting).strip("_")
        settings = {
            "model": self.subject.hash,
            "dtype": str(self.subject.vlm.model.dtype),
            "setting": setting,
            "pope": [[p.scene, p.noun, p.present] for p in self.pope.asked],
            "captions": [self.chair.scenes.count, self.caption_tokens],
            "world": self.pope.scenes.world.name,
            "noise": self.pope.scenes.noise,
        }
        try:
            found = kept(self.folder / f"{slug}.json", settings, lambda: self._ask(setting))
        except AttnCtrlError as error:
            print(f"  {setting}: {str(error).splitlines()[0]}", flush=True)
            return {"error": str(error).splitlines()[0]}
        return {**found, **{name: [Answer(*pair) for pair in found[name]] for name in ("pope", "chair")}}

    def _ask(self, setting: str) -> dict[str, Any]:
        start = time.perf_counter()
        controls = [] if setting == PLAIN else [self.subject.control(setting)]
        pope, report = self.pope.run(self.subject.vlm, controls, batch_size=self.batch_size)
        chair, _ = self.chair.run(
            self.subject.vlm, controls, batch_size=self.batch_size, max_new_tokens=self.caption_tokens
        )
        seconds = time.perf_counter() - start
        print(f"  {setting}: {seconds:.0f} s", flush=True)
        pairs = {name: [[a.text, a.yes] for a in answers] for name, answers in (("pope", pope), ("chair", chair))}
        return {**pairs, "report": report, "seconds": seconds}

    def score(self, setting: str) -> float | None:
        """What settings are chosen by: the mean of POPE's accuracy over all questions and CHAIR's F1; None where there is an error."""
        found = self.answers(setting)
        if "error" in found:
            return None
        accuracy = self.pope.scores(found["pope"])[ALL].accuracy.value
        return (accuracy + self.chair.scores(found["chair"]).f1.value) / 2


def choose(tuning: Bench, controls: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """The best setting of each control, None where none works, and the lines of the tuning table."""
    best: dict[str, str | None] = {}
    plain = tuning.score(PLAIN)
    lines = [f"| – | {PLAIN} | {100 * plain:.1f} | |"]
    for name in controls:
        default, grid = SETTINGS[name]
        scores = {setting: tuning.score(setting) for setting in (*([default] if default else []), *grid)}
        works = {setting: score for setting, score in scores.items() if score is not None}
        best[name] = max(works, key=works.get) if works else None
        for setting, score in scores.items():
            cell = f"{100 * score:.1f}" if score is not None else tuning.answers(setting)["error"].replace("|", "/")
            marks = ["default"] * (setting == default) + ["best"] * (setting == best[name])
            lines.append(f"| {name} | `{setting}` | {cell} | {', '.join(marks)} |")
    return best, lines


def part_report(bench: Bench, best: dict[str, str | None], heading: str) -> tuple[list[str], list[str]]:
    """Lines of one part; and what is to stand below everything: every split of it."""
    plain = bench.answers(PLAIN)
    right = bench.pope.right(plain["pope"])
    honest = bench.chair.right(plain["chair"])
    rows, captions, failed, verdicts = [], [], [], []
    detail = list(measures.pope_rows(PLAIN, bench.pope, plain["pope"]))
    todo = [(PLAIN, PLAIN)]
    for name, chosen in best.items():
        default = SETTINGS[name][0]
        todo += [(f"{name}, default", default)] if default else []
        todo += [(f"{name}, best", chosen)] if chosen not in (None, default) else []
    same = {name for name, chosen in best.items() if chosen == SETTINGS[name][0]}
    for label, setting in todo:
        found = bench.answers(setting)
        name = label.split(",")[0]
        if "error" in found:
            failed.append(f"- `{setting}`: {found['error']}")
            continue
        shown = label + " and best" * (name in same)
        scores = bench.pope.scores(found["pope"])
        chances = (
            scores[ALL] if any(a.yes is None for a in found["pope"]) else bench.pope.scores(found["pope"], True)[ALL]
        )
        against, said = "", ""
        if setting != PLAIN:
            now, clean = bench.pope.right(found["pope"]), bench.chair.right(found["chair"])
            against, said = measures.difference(right, now), measures.difference(honest, clean)
            changed = sum(a.text != b.text for a, b in zip(found["pope"], plain["pope"]))
            against += f"; {changed} answers changed"
            verdicts += [
                (sum(now) - sum(right), mcnemar(right, now)),
                (sum(clean) - sum(honest), mcnemar(honest, clean)),
            ]
            detail += measures.pope_rows(shown, bench.pope, found["pope"])
        cells = [shown, "" if setting == PLAIN else f"`{setting}`"]
        cells += [scores[split].accuracy.percent() for split in bench.pope.splits]
        cells += [
            scores[ALL].f1.percent(),
            f"{100 * scores[ALL].yes.value:.1f}",
            f"{100 * chances.accuracy.value:.1f}",
            against,
        ]
        rows.append(f"| {' | '.join(cells)} |")
        captions.append(f"{measures.chair_row(shown, bench.chair, found['chair'])} {said} |")
    splits = list(bench.pope.splits)
    head = [
        "control",
        "setting",
        *(f"accuracy, {split}" for split in splits),
        "F1, all",
        "says yes",
        "by P(yes)",
        PLAIN,
    ]
    world = bench.pope.scenes
    lines = [
        f"### {heading}",
        "",
        f"World `{world.world.name}`, noise {world.noise:g}: {sum(len(p) for p in bench.pope.splits.values())} POPE questions"
        f" ({len(bench.pope.asked)} different ones), {bench.chair.scenes.count} captions. {_verdict(verdicts)}",
        "",
        f"| {' | '.join(head[:-1])} | against {head[-1]} (McNemar) |",
        "|" + "---|" * len(head),
        *rows,
        "",
        f"{CHAIR_HEAD.splitlines()[0]} captions without anything absent, against {PLAIN} (McNemar) |",
        f"{CHAIR_HEAD.splitlines()[1]}---|",
        *captions,
        "",
        *(["Not measured:", "", *failed, ""] if failed else []),
    ]
    return lines, [f"### {heading}", "", POPE_HEAD, *detail, ""]


def _verdict(found: list[tuple[int, float]]) -> str:
    """How many comparisons show a gain, how many a loss."""
    if not found:
        return ""
    level = 0.05 / len(found)
    better, worse = (sum(p < 0.05 and sign * gain > 0 for gain, p in found) for sign in (1, -1))
    strict = [sum(p < level and sign * gain > 0 for gain, p in found) for sign in (1, -1)]
    return (
        f"Of {len(found)} comparisons with {PLAIN}, {better} are gains and {worse} are losses at p < 0.05; "
        f"{strict[0]} and {strict[1]} of them remain after Bonferroni's correction."
    )


def report_model(name: str, asked: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Lines of one model, and its details."""
    try:
        subject = Subject.load(name, asked.device, asked.dtype)
    except AttnCtrlError as error:
        return [f"## {name}", "", f"Not measured: {str(error).splitlines()[0]}", ""], []
    print(subject.name, flush=True)
    folder = asked.record / subject.name.removeprefix("builtin:")
    own = default_world(name)
    world = measures.world_named(own)
    habits = measures.training_habits(world)

    def bench(part: str, pope: PopeTest, chair: ChairTest) -> Bench:
        return Bench(subject, pope, chair, folder / part, asked)

    tuning = bench(
        "tuning",
        PopeTest.make(world, asked.tune, habits=habits, noise=asked.noise, stream=STREAMS["tuning"]),
        ChairTest.make(world, max(asked.tune // 2, 1), noise=asked.noise, stream=STREAMS["tuning"] + 1),
    )
    best, tuned = choose(tuning, asked.controls)
    lines, details = [f"## {subject.name}", ""], [f"## {subject.name}, every split", ""]
    for part in asked.parts:
        held_out, noisy, heading = PARTS[part]
        if part in EMOJI and own != "emoji":
            continue
        there = measures.world_named("emoji-noto") if part == "style" else world
        splits = ("random",) if held_out else measures.SPLITS
        more = {"held_out": held_out, "noise": asked.noise if noisy else 0.0}
        pope = PopeTest.make(there, asked.questions, splits, habits=None if held_out else habits, **more)
        above, below = part_report(bench(part, pope, ChairTest.make(there, asked.captions, **more)), best, heading)
        lines, details = lines + above, details + below
    how = f"On {asked.tune} questions of each split and {max(asked.tune // 2, 1)} captions about scenes of another stream of its own"
    lines += ["### How the best settings were chosen", "", f"{how} world, noise {asked.noise:g}."]
    lines += ["", "| control | setting | (accuracy + F1) / 2, % | |", "|---|---|---|---|", *tuned, ""]
    return lines, details


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vlm_answers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", nargs="+", default=["builtin:icons-vlm", "builtin:smol-vlm"])
    parser.add_argument("--controls", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument(
        "--parts",
        nargs="+",
        default=list(PARTS),
        choices=list(PARTS),
        help="held-out and style are for models of the emoji world",
    )
    parser.add_argument("--questions", type=int, default=600, help="of each split")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--tune", type=int, default=100, help="questions of each split that settings are chosen on")
    parser.add_argument("--noise", type=float, default=0.4, help="of the noise part and of the tuning stream")
    parser.add_argument("--caption-tokens", type=int, default=64, help="longest caption")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, default=Path("runs/vlm_answers"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/vlm.md"))
    asked = parser.parse_args(arguments)
    page, below = [], []
    for name in asked.model:
        above, details = report_model(name, asked)
        page, below = page + above, below + details
    left_out = [f"- {name}: {why}" for name, why in LEFT_OUT.items()]
    lines = [
        "# What controls do to hallucination on the embedded vision-language models",
        "",
        notes("benchmarks.vlm_answers", dtype=asked.dtype, decoding="the most likely token each time, batches padded on the left"),
        "",
        "Percentages with 95 % intervals: Wilson's for shares, a bootstrap over pictures for F1, CHAIR_i, recall and words. POPE's answers are",
        "read by its official rule; \"by P(yes)\" is the accuracy of P(yes) > P(no) at the first token. Scenes have freely drawn nouns; absent",
        "nouns of the popular and adversarial splits follow what training shows. F1 of captions is that of 1 − CHAIR_i and recall.",
        "",
        *page,
        "## Left out",
        "",
        *left_out,
        "",
        *below,
    ]  # fmt: skip
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(lines), encoding="utf-8")
    print(f"written: {asked.output}")


if __name__ == "__main__":
    main()
