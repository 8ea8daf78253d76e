"""HeadHunter: greedy search for the attention heads whose perturbation serves an objective.

Ahn, Kang et al., "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models", 2025,
arXiv 2506.10978, Algorithm 1. Successive halving: Jamieson, Talwalkar, 2016, arXiv 1502.07943.
"""

from __future__ import annotations

import inspect
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm.auto import tqdm

from ..controls.softpag import SoftPAG, Target
from ..errors import AttnCtrlError
from ..families import find_denoiser, find_family
from ..heads import HeadBatch, HeadSet
from ..processors import attach
from ..sites import Site
from .objectives import Score, name_of
from .record import Key, Record, as_json, fingerprint, mark_of_weights
from .result import Result, Row, Step


Strategy = Literal["full", "halving"]
Head = tuple[int | str, int, float]
Scored = tuple[list[float], dict[str, int]]  # one score a picture; how often the denoiser ran
OWN = ("prompt", "generator", "num_inference_steps", "num_images_per_prompt", "guidance_scale")


@dataclass(frozen=True)
class Batch:
    """Pictures that are made and scored together: one a pair (prompt, noise seed), with its own heads perturbed."""

    pairs: tuple[tuple[str, int], ...]
    heads: tuple[tuple[Head, ...], ...]
    softpag: dict[str, Any]
    arguments: dict[str, Any]
    prefix_reuse: bool


Workers = Callable[[Sequence[Batch]], Iterator[Scored]]


def hunt_heads(
    pipe: Any,
    prompts: Sequence[str],
    objective: Score,
    *,
    seeds: Iterable[int] | None = None,
    rounds: int = 5,
    per_round: int = 3,
    pool: HeadSet | str | Iterable | None = None,
    scale: float = 3.0,
    strength: float = 1.0,
    target: Target = "identity",
    steps: int = 20,
    guidance_scale: float | None = None,
    min_layer: int | None = None,
    batch_size: int = 8,
    strategy: Strategy = "full",
    prefix_reuse: bool = True,
    output: str | os.PathLike | None = None,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
    workers: Workers | None = None,
) -> HeadSet:
    """Finds heads for `SoftPAG`, `per_round` a round: every head of the pool is perturbed on top of those chosen before, and the
    heads whose pictures score best on average join them. Ties go to the lower layer, then the lower head.

    Every candidate makes the same pictures: the same prompts from the same noise. Candidates share batches (`HeadBatch`). Beside
    them each round also makes the pictures of the heads chosen before alone, and at the end those of the whole set.

    Args:
        pipe: a diffusers text-to-image pipeline.
        objective: `objective(images, prompts)` -> one number per picture, more is better; see `attnctrl.search`.
        seeds: every prompt is drawn with each of these noise seeds; None for one picture a prompt, prompt i with `seed + i`.
        pool: heads that may be chosen, as `HeadSet.parse` reads them; None for every head of every layer.
        scale, strength, target: as in `SoftPAG`. The paper searches with strength 1 and lowers it afterwards.
        guidance_scale: None for no classifier-free guidance during the search, as in the paper.
        min_layer: leaves out the layers before; perturbed passes then reuse at least so many blocks of the plain pass.
        batch_size: pictures at a time. Another one may continue a search.
        strategy: "full", or "halving": a round starts with a quarter of the prompt-seed pairs (in an order drawn from `seed`), goes
            on with the better half of the heads to half of them, and with the better half of those to all; never fewer than
            `per_round` heads. That is about half of the pictures. Fewer than two pairs cannot be halved.
        prefix_reuse: as in `attach`; False runs every block of every perturbed pass.
        output: folder for the scores, as they come, and the results: head_set.json, result.json, result.md, head_map.png. The same
            call goes on where it was stopped, also with more rounds; other settings are refused.
        seed: see `seeds` and `strategy`.
        call: more arguments of the pipeline, such as height, width, max_sequence_length.
        progress: draw a bar.
        workers: makes and scores batches in place of `pipe`, by `score_batch` in other processes for example, and yields what each gave in
            their order. None for `pipe`, one batch after another.

    Returns:
        The heads in the order in which they were chosen; scores, settings and versions are in its `provenance`.
    """
    hunt = _set_up(
        pipe,
        list(prompts) if not isinstance(prompts, str) else [prompts],
        objective,
        None if seeds is None else list(seeds),
        rounds,
        per_round,
        pool,
        min_layer,
        {"scale": scale, "strength": strength, "target": target},
        steps,
        guidance_scale,
        batch_size,
        strategy,
        prefix_reuse,
        seed,
        dict(call or {}),
        workers,
    )
    folder = None if output is None else Path(output)
    with closing(Record(folder, hunt.settings())) as record:
        result = hunt.run(record, progress)
    if folder is not None:
        result.write(folder)
    return result.heads


@dataclass(frozen=True)
class _Hunt:
    """A checked search."""

    pipe: Any
    family: str
    model: torch.nn.Module
    sites: list[Site]
    prompts: list[str]
    pairs: list[tuple[str, int]]
    objective: Score
    rounds: int
    per_round: int
    pool: tuple[Head, ...]
    softpag: dict[str, Any]
    arguments: dict[str, Any]
    batch_size: int
    strategy: Strategy
    prefix_reuse: bool
    seed: int
    workers: Workers | None

    def settings(self) -> dict[str, Any]:
        """Everything that decides a score. Rounds are not in it, because more of them change none of those before."""
        return {
            "pipeline": type(self.pipe).__name__,
            "family": self.family,
            "model": model_name(self.pipe),
            "weights": mark_of_weights(self.model),
            "scheduler": [type(self.pipe.scheduler).__name__, fingerprint(as_json(dict(self.pipe.scheduler.config)))],
            "objective": name_of(self.objective),
            "pairs": [list(pair) for pair in self.pairs],
            "per_round": self.per_round,
            "pool": [list(head) for head in self.pool],
            **self.softpag,
            "arguments": as_json(self.arguments),
            "strategy": self.strategy,
            "seed": self.seed,
        }

    def stages(self) -> list[int]:
        """How many pairs the candidates of a round have seen after each stage."""
        count = len(self.pairs)
        shares = (4, 2, 1) if self.strategy == "halving" else (1,)
        return sorted({math.ceil(count / share) for share in shares})

    def images(self) -> int:
        """Pictures of the whole search."""
        total = len(self.pairs) * (self.rounds + 1)
        for number in range(self.rounds):
            alive, seen = len(self.pool) - number * self.per_round, 0
            for count in self.stages():
                total, seen = total + alive * (count - seen), count
                alive = max(self.per_round, math.ceil(alive / 2))
        return total

    def run(self, record: Record, progress: bool) -> Result:
        order = list(range(len(self.pairs)))
        if self.strategy == "halving":
            random.Random(self.seed).shuffle(order)
        chosen: list[Head] = []
        rows: list[Row] = []
        track: list[Step] = []
        done = len(record.scores)
        with tqdm(total=max(self.images(), done), initial=done, unit="picture", disable=not progress) as bar:
            for number in range(1, self.rounds + 1):
                bar.set_description(f"round {number} of {self.rounds}")
                alive = [head for head in self.pool if head not in chosen]
                for count in self.stages():
                    self._measure(record, bar, number, chosen, [None, *alive], order[:count])
                    ranked = sorted(
                        alive, key=lambda head: (-_mean(record, number, head, order[:count]), self._at(head))
                    )
                    alive = sorted(ranked[: max(self.per_round, math.ceil(len(ranked) / 2))], key=self._at)
                best = ranked[: self.per_round]
                rows += self._rows(record, number, chosen, best)
                track.append(Step(number - 1, tuple(chosen), _mean(record, number, None, order)))
                chosen += best
            self._measure(record, bar, self.rounds + 1, chosen, [None], order)
            track.append(Step(self.rounds, tuple(chosen), _mean(record, self.rounds + 1, None, order)))
        images = sum(
            number <= self.rounds or (number == self.rounds + 1 and head is None) for number, head, _ in record.scores
        )
        settings = self.settings()
        heads = self._head_set(chosen, track, images, settings)
        return Result(heads, self.sites, rows, track, images, dict(record.calls), settings)

    def _at(self, head: Head) -> int:
        return self.pool.index(head)

    def _measure(
        self, record: Record, bar: tqdm, number: int, chosen: list[Head], heads: list[Head | None], pairs: list[int]
    ) -> None:
        """Scores every head on every pair, as far as that is not done yet."""
        todo = [(head, pair) for head in heads for pair in pairs if (number, _key(head), pair) not in record.scores]
        parts = [todo[first : first + self.batch_size] for first in range(0, len(todo), self.batch_size)]
        batches = [self._batch(chosen, part) for part in parts]
        made = self.workers(batches) if self.workers else (score_batch(self.pipe, self.objective, b) for b in batches)
        for part, (scores, calls) in zip(parts, made):
            keys: list[Key] = [(number, _key(head), pair) for head, pair in part]
            record.add(dict(zip(keys, scores)), calls)
            bar.update(len(part))

    def _batch(self, chosen: list[Head], part: list[tuple[Head | None, int]]) -> Batch:
        return Batch(
            tuple(self.pairs[pair] for _, pair in part),
            tuple((*chosen, head) if head is not None else tuple(chosen) for head, _ in part),
            self.softpag,
            self.arguments,
            self.prefix_reuse,
        )

    def _rows(self, record: Record, number: int, before: list[Head], best: list[Head]) -> list[Row]:
        """What every head of a round reached, best first; those that saw fewer pairs come after those that saw more."""
        rows = []
        for head in self.pool:
            if head in before:
                continue
            seen = [pair for pair in range(len(self.pairs)) if (number, _key(head), pair) in record.scores]
            score, plain = _mean(record, number, head, seen), _mean(record, number, None, seen)
            rows.append(Row(number, *_key(head), score, score - plain, len(seen), head in best))
        return sorted(rows, key=lambda row: (-row.images, -row.score))

    def _head_set(self, chosen: list[Head], track: list[Step], images: int, settings: dict[str, Any]) -> HeadSet:
        return HeadSet(
            tuple(chosen),
            family=self.family,
            base_model=settings["model"],
            objective=settings["objective"],
            provenance={
                "method": "greedy head search, arXiv 2506.10978",
                "rounds": self.rounds,
                "scores": [{"heads": len(step.heads), "score": step.score} for step in track],
                "images": images,
                "settings": {name: value for name, value in settings.items() if name != "pool"},
                "versions": _versions(),
            },
        )


def score_batch(pipe: Any, objective: Score, batch: Batch) -> Scored:
    """Makes the pictures of a batch and scores them."""
    sets = tuple(HeadSet(heads) if heads else None for heads in batch.heads)
    generators = [torch.Generator("cpu").manual_seed(noise) for _, noise in batch.pairs]
    prompts = [prompt for prompt, _ in batch.pairs]
    control = SoftPAG(heads=HeadBatch(sets), **batch.softpag)
    with _no_bar(pipe), attach(pipe, control, prefix_reuse=batch.prefix_reuse) as session:
        made = pipe(prompts, generator=generators, **batch.arguments)
    images = getattr(made, "images", None)
    if images is None or len(images) != len(prompts):
        raise AttnCtrlError(
            f"{type(pipe).__name__} returned {'no' if images is None else len(images)} pictures for {len(prompts)} prompts"
        )
    images = list(images)
    calls = {name: int(count) for name, count in session.calls.items()}
    return _checked(objective, objective(images, prompts), prompts), calls


def _checked(objective: Score, scores: Any, prompts: list[str]) -> list[float]:
    """One finite float per picture."""
    name = name_of(objective)
    try:
        scores = scores.detach().cpu() if isinstance(scores, torch.Tensor) else scores
        values = torch.as_tensor(scores, dtype=torch.float64).reshape(-1).tolist()
    except (TypeError, ValueError, RuntimeError):
        raise AttnCtrlError(f"objective {name} returned {type(scores).__name__}, not one number per picture") from None
    if len(values) != len(prompts):
        raise AttnCtrlError(f"objective {name} returned {len(values)} numbers for {len(prompts)} pictures")
    for value, prompt in zip(values, prompts):
        if not math.isfinite(value):
            raise AttnCtrlError(f"objective {name} returned {value} for a picture of {prompt!r}")
    return values


def _set_up(
    pipe,
    prompts,
    objective,
    seeds,
    rounds,
    per_round,
    pool,
    min_layer,
    softpag,
    steps,
    guidance_scale,
    batch_size,
    strategy,
    prefix_reuse,
    seed,
    call,
    workers,
) -> _Hunt:
    """Checks everything that can be checked before the first picture; tells all that is wrong with the numbers at once."""
    model, pipeline = find_denoiser(pipe)
    if pipeline is None:
        raise AttnCtrlError(
            f"{type(pipe).__name__} makes no pictures\nHINT: hunt_heads(pipe, …) takes the whole pipeline"
        )
    family = find_family(model)
    sites = family.sites(model)
    wrong = [
        f"{name} {value} is less than 1"
        for name, value in (("rounds", rounds), ("per_round", per_round), ("steps", steps), ("batch_size", batch_size))
        if value < 1
    ]
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        wrong.append("there is no prompt" if not prompts else "a prompt is empty")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        wrong.append("there are no seeds" if not seeds else "a seed is given twice")
    if len(set(prompts)) < len(prompts) and seeds is not None:
        wrong.append("a prompt is given twice")
    if strategy not in get_args(Strategy):
        wrong.append(f"strategy {strategy!r} is not one of {', '.join(get_args(Strategy))}")
    if not callable(objective):
        wrong.append(f"the objective is {type(objective).__name__}, not a function of images and prompts")
    if wrong:
        raise AttnCtrlError("; ".join(wrong))
    known = inspect.signature(pipe.__call__).parameters
    arguments = {"num_inference_steps": steps, **_without_cfg(known, guidance_scale), **call}
    ours = [name for name in OWN if name in call]
    if ours:
        raise AttnCtrlError(
            f"call={{{', '.join(map(repr, ours))}: …}}: the search sets these itself\nHINT: its own arguments"
        )
    unknown = [name for name in ("prompt", "generator", *arguments) if name not in known]
    if unknown:
        raise AttnCtrlError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    heads = _pool(sites, pool, min_layer or 0)
    control = SoftPAG(heads=HeadSet(tuple(heads)), **softpag)
    if control.neutral:
        raise AttnCtrlError("scale 0 or strength 0 perturbs nothing: every head would score the same")
    control.touches(sites)
    if rounds * per_round > len(heads):
        raise AttnCtrlError(
            f"{rounds} rounds of {per_round} heads choose {rounds * per_round}, the pool has {len(heads)}\nHINT: fewer rounds"
        )
    pairs = (
        [(p, s) for p in prompts for s in seeds]
        if seeds is not None
        else [(p, seed + i) for i, p in enumerate(prompts)]
    )
    return _Hunt(
        pipe,
        family.name,
        model,
        sites,
        prompts,
        pairs,
        objective,
        rounds,
        per_round,
        tuple(heads),
        softpag,
        arguments,
        batch_size,
        strategy,
        prefix_reuse,
        seed,
        workers,
    )


def _pool(sites: list[Site], pool: Any, min_layer: int) -> list[Head]:
    """Candidates in the order of layers and heads."""
    at = {(site.layer if site.primary else site.path): (site.layer, index) for index, site in enumerate(sites)}
    if pool is None:
        heads = [(site.layer, head, 1.0) for site in sites if site.primary for head in range(site.heads)]
    else:
        given = HeadSet.parse(pool)
        given.resolve(sites)
        named = {site.path: site.layer for site in sites if site.primary}
        heads = [
            (*key, w) for key, w in {(named.get(layer, layer), head): w for layer, head, w in given.heads}.items()
        ]
    kept = [head for head in heads if at[head[0]][0] >= min_layer]
    if not kept:
        last = max(site.layer for site in sites)
        raise AttnCtrlError(
            f"min_layer {min_layer} leaves no head of the pool\nHINT: the model has layers 0 to {last}"
        )
    return sorted(kept, key=lambda head: (at[head[0]], head[1]))


def _without_cfg(known: Mapping[str, Any], guidance_scale: float | None) -> dict[str, float]:
    """The argument that sets guidance. Scale 0 is none in every pipeline; where a distilled one goes by that name, it stays."""
    if guidance_scale is not None:
        return {"guidance_scale": guidance_scale}
    if "true_cfg_scale" in known:
        return {"true_cfg_scale": 1.0}
    return {"guidance_scale": 0.0} if "guidance_scale" in known else {}


def _key(head: Head | None) -> tuple[int | str, int] | None:
    return None if head is None else head[:2]


def _mean(record: Record, number: int, head: Head | None, pairs: Sequence[int]) -> float:
    return math.fsum(record.scores[number, _key(head), pair] for pair in pairs) / len(pairs)


def model_name(pipe: Any) -> str:
    """The name that a pipeline was loaded by; of local folders only the last part, "builtin:…" for shipped models."""
    from ..icons.models import PREFIX, builtin_models

    text = getattr(pipe, "name_or_path", None) or type(pipe).__name__
    if not os.path.isdir(text):
        return text
    path = Path(text).resolve()
    return next((PREFIX + name for name, folder in builtin_models().items() if folder.resolve() == path), path.name)


def _versions() -> dict[str, str]:
    from .. import __version__

    found = {"attnctrl": __version__}
    for name in ("torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _no_bar(pipe: Any) -> Iterator[None]:
    """The pipeline's own bar of steps off for a while."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
