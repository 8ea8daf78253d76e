"""What a head set says about its heads: the scores that a head search (`attnctrl hunt`) leaves in its files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...heads import HeadSet


FIRST = "Gain of every head alone, in the first round of its search"
CHOSEN = "Gain of the round that chose a head"


def scores_of(heads: HeadSet, layers: Sequence[int], file: Path | None = None) -> tuple[list[list[Any]], str]:
    """([[layer, head, gain], …], what the gain is) of a model's heads; ([], "") where none is recorded.

    `result.json` has every head of every round, a head set's provenance the mean score after each round.

    Args:
        layers: heads of every layer.
        file: where the head set was read from.
    """
    found, about = _of_rows(heads.provenance.get("rows")), FIRST
    if not found and file is not None and file.suffix.lower() == ".json":
        with suppress(ValueError, AttributeError, RecursionError):  # a list, or text that `HeadSet` reads
            found = _of_rows(json.loads(file.read_text(encoding="utf-8")).get("rows"))
    if not found:
        found, about = _of_track(heads), CHOSEN
    there = [
        [layer, head, gain]
        for (layer, head), gain in found.items()
        if 0 <= layer < len(layers) and 0 <= head < layers[layer] and math.isfinite(gain)
    ]
    return (there, about) if there else ([], "")


def _of_rows(rows: Any) -> dict[tuple[int, int], float]:
    """Gains of the first round."""
    found = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("round", 1) == 1:
            where, gain = (row.get("layer"), row.get("head")), row.get("gain")
            if all(type(number) is int for number in where) and type(gain) in (int, float):
                found[where] = float(gain)
    return found


def _of_track(heads: HeadSet) -> dict[tuple[int, int], float]:
    """What the mean score rose by in the round that chose each head."""
    track = heads.provenance.get("scores")
    steps = [step for step in track if isinstance(step, dict)] if isinstance(track, list) else []
    known = [(step.get("heads"), step.get("score")) for step in steps]
    if any(type(count) is not int or type(score) not in (int, float) for count, score in known):
        return {}
    found = {}
    for (before, low), (count, high) in zip(known, known[1:]):
        for layer, head, _ in heads.heads[max(before, 0) : max(count, 0)]:
            if isinstance(layer, int):
                found[layer, head] = float(high - low)
    return found
