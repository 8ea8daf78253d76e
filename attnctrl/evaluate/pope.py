"""POPE: does a model say of what is absent that it is there?

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", 2023, arXiv 2305.10355. Up to three nouns of each
picture are asked about, and after each of them one that is absent: drawn freely ("random"), the one that training shows most often
("popular"), or the one that training shows most often together with the noun just asked about ("adversarial").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import AttnCtrlError
from .rates import Rate, ratio, resampled, share


SPLITS = ("random", "popular", "adversarial")
PER_SCENE = 3


@dataclass(frozen=True)
class Habits:
    """In how many scenes of a stream each noun is, and each noun beside each other one."""

    seen: Mapping[str, int]
    beside: Mapping[str, Mapping[str, int]]

    @classmethod
    def count(cls, scenes: Iterable[Iterable[str]]) -> Habits:
        """Of the nouns of scenes."""
        seen: Counter = Counter()
        beside: dict[str, Counter] = {}
        for nouns in scenes:
            here = sorted(set(nouns))
            seen.update(here)
            for noun in here:
                beside.setdefault(noun, Counter()).update(other for other in here if other != noun)
        return cls(seen, beside)


@dataclass(frozen=True)
class Probe:
    """Whether `noun` is in scene number `scene`, and whether it is."""

    scene: int
    noun: str
    present: bool


def probes(
    scenes: Sequence[Sequence[str]], split: str, nouns: Sequence[str], habits: Habits, seed: int = 0
) -> list[Probe]:
    """The questions of one split: a noun of the scene, then one that is absent, and so on.

    Args:
        scenes: the nouns of each scene. nouns: those that may be asked about as absent.
        habits: of the training scenes. seed: of what is drawn freely.

    Raises:
        AttnCtrlError: a split that does not exist.
    """
    if split not in SPLITS:
        raise AttnCtrlError(f"POPE has no split {split!r}\nHINT: {', '.join(SPLITS)}")
    found = []
    for number, held in enumerate(scenes):
        rng = np.random.default_rng((seed, number))
        free = [noun for noun in nouns if noun not in held]
        for noun in list(dict.fromkeys(held))[:PER_SCENE]:
            if not free:
                break
            absent = _absent(split, noun, free, habits, rng)
            free.remove(absent)
            found += [Probe(number, noun, True), Probe(number, absent, False)]
    return found


def _absent(split: str, noun: str, free: Sequence[str], habits: Habits, rng: np.random.Generator) -> str:
    drawn = free[rng.integers(len(free))]
    if split == "random":
        return drawn
    counts = habits.seen if split == "popular" else habits.beside.get(noun, {})
    best = max(free, key=lambda other: counts.get(other, 0))
    return best if counts.get(best, 0) else drawn


@dataclass(frozen=True)
class PopeScores:
    """The measures of some answers, "yes" being positive.

    `f1` is bootstrapped over scenes, the others are shares of questions with Wilson intervals.
    """

    questions: int
    accuracy: Rate
    precision: Rate
    recall: Rate
    f1: Rate
    yes: Rate


def pope_scores(asked: Sequence[Probe], said: Sequence[bool]) -> PopeScores:
    """Scores of answers (True is yes) to probes."""
    if len(asked) != len(said) or not asked:
        raise AttnCtrlError(f"{len(said)} answers to {len(asked)} questions\nHINT: one answer per question, in order")
    numbers = {scene: row for row, scene in enumerate(dict.fromkeys(probe.scene for probe in asked))}
    counts = np.zeros((len(numbers), 4), dtype=np.int64)  # true yes, false yes, true no, false no
    for probe, yes in zip(asked, said, strict=True):
        kind = (0 if probe.present else 1) if yes else (3 if probe.present else 2)
        counts[numbers[probe.scene], kind] += 1
    hit, false, correct, missed = (int(n) for n in counts.sum(0))
    return PopeScores(
        len(asked),
        share(hit + correct, len(asked)),
        share(hit, hit + false),
        share(hit, hit + missed),
        resampled(counts, lambda n: ratio(2 * n[..., 0], 2 * n[..., 0] + n[..., 1] + n[..., 3])),
        share(hit + false, len(asked)),
    )
