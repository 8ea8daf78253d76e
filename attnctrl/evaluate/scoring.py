"""What a picture was asked to show against what the judge read in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..errors import AttnCtrlError
from ..icons.world import RELATIONS, Scene


if TYPE_CHECKING:
    from .icons import Detection

Wanted = tuple[str, str]
By = Literal["both", "noun", "color"]

HELD_OUT = 999  # first word of every evaluation seed; training never uses it
RELATION_PX = 8.0
_WEIGHTS = {"both": (100.0, 10.0, 1.0), "noun": (101.0, 100.0, 0.1), "color": (101.0, 0.1, 100.0)}


@dataclass(frozen=True)
class Match:
    """One wanted object and the detection given to it; None when nothing shares its noun or its colour."""

    wanted: Wanted
    detection: Detection | None

    @property
    def noun(self) -> bool:
        return self.detection is not None and self.detection.noun == self.wanted[0]

    @property
    def color(self) -> bool:
        return self.detection is not None and self.detection.color == self.wanted[1]

    @property
    def both(self) -> bool:
        return self.noun and self.color


def wanted_of(scene: Scene | Sequence[Wanted]) -> list[Wanted]:
    """(noun, colour) of every object asked for."""
    return [(item.noun, item.color) for item in scene.objects] if isinstance(scene, Scene) else list(scene)


def match(detections: Sequence[Detection], wanted: Scene | Sequence[Wanted], *, by: By = "both") -> list[Match]:
    """One-to-one assignment, in the order of `wanted`.

    `by="both"` finds the most objects with noun and colour right, then the most nouns, then colours; "noun" and "color"
    put that part first. Ties go to the higher score.
    """
    wanted = wanted_of(wanted)
    full, noun, color = _WEIGHTS[by]
    gain = np.zeros((len(wanted), len(detections)))
    for row, (want_noun, want_color) in enumerate(wanted):
        for column, item in enumerate(detections):
            same = (item.noun == want_noun, item.color == want_color)
            gain[row, column] = {(True, True): full, (True, False): noun, (False, True): color}.get(same, 0)
            gain[row, column] += 0.01 * item.score * any(same)
    given = {int(r): detections[c] for r, c in zip(*linear_sum_assignment(gain, maximize=True)) if gain[r, c] > 0}
    return [Match(want, given.get(row)) for row, want in enumerate(wanted)]


def objects_right(detections: Sequence[Detection], wanted: Scene | Sequence[Wanted], *, by: By = "both") -> list[bool]:
    """Per wanted object: is it there with the right noun and colour (or only noun, or only colour), one-to-one."""
    return [getattr(item, by) for item in match(detections, wanted, by=by)]


def relation_right(detections: Sequence[Detection], first: Wanted, relation: str, second: Wanted) -> bool:
    """Both objects are there, and `first` lies on the named side of `second`: centres more than 8 px apart on that axis."""
    if relation not in RELATIONS:
        raise AttnCtrlError(f"unknown relation {relation!r}\nHINT: use one of {', '.join(RELATIONS)}")
    pair = match(detections, [first, second])
    if not all(item.both for item in pair):
        return False
    one, two = (np.array(item.detection.center) for item in pair)
    return float((one - two) @ np.array(RELATIONS[relation])) > RELATION_PX


def in_box(detection: Detection, box_pixels: tuple[float, float, float, float]) -> bool:
    """The centre lies inside (x0, y0, x1, y1), px of the 128 x 128 canvas."""
    x, y = detection.center
    return box_pixels[0] <= x <= box_pixels[2] and box_pixels[1] <= y <= box_pixels[3]


def leaked(detections: Sequence[Detection], wanted: Scene | Sequence[Wanted]) -> int:
    """How many wanted nouns are present but wear, instead of their own, another wanted object's colour."""
    wanted = wanted_of(wanted)
    return sum(
        item.noun and not item.color and item.detection.color in {color for _, color in wanted}
        for item in match(detections, wanted, by="noun")
    )


def extra(detections: Sequence[Detection], wanted: Scene | Sequence[Wanted]) -> int:
    """How many detections are no wanted noun: other nouns, surplus copies, unknown blobs. Colours do not matter here."""
    return len(detections) - sum(objects_right(detections, wanted, by="noun"))
