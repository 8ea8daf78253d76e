"""CHAIR: which of the things that a caption names are not in the picture?

Rohrbach et al., "Object Hallucination in Image Captioning", 2018, arXiv 1809.02156. CHAIR alone rewards captions that say little, so
recall, F1 and length stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import AttnCtrlError
from .rates import Rate, ratio, resampled, share


@dataclass(frozen=True)
class Caption:
    """What a caption mentions (nouns, with repeats), what its picture shows, and how many words it has."""

    mentioned: tuple[str, ...]
    present: frozenset[str]
    words: int

    @property
    def hallucinated(self) -> int:
        """Mentions of nouns that are not there."""
        return sum(noun not in self.present for noun in self.mentioned)


@dataclass(frozen=True)
class ChairScores:
    """`chair_s`: share of captions that name something absent (Wilson interval). `chair_i`: share of mentions that are of something
    absent. `recall`: share of the nouns of all pictures that their captions name. `f1`: of 1 - chair_i and recall. `words`: mean length.
    All but the first are bootstrapped over captions."""

    captions: int
    chair_s: Rate
    chair_i: Rate
    recall: Rate
    f1: Rate
    words: Rate


def chair_scores(captions: Sequence[Caption]) -> ChairScores:
    if not captions:
        raise AttnCtrlError("there are no captions to score\nHINT: attnctrl evaluate chair --captions 200")
    counts = np.array(
        [
            (len(c.mentioned), c.hallucinated, len(c.present), len(c.present & set(c.mentioned)), c.words, 1)
            for c in captions
        ]
    )

    def f1(n: np.ndarray) -> np.ndarray:
        precision, recall = ratio(n[..., 0] - n[..., 1], n[..., 0]), ratio(n[..., 3], n[..., 2])
        return ratio(2 * precision * recall, precision + recall)

    return ChairScores(
        len(captions),
        share(int((counts[:, 1] > 0).sum()), len(captions)),
        resampled(counts, lambda n: ratio(n[..., 1], n[..., 0])),
        resampled(counts, lambda n: ratio(n[..., 3], n[..., 2])),
        resampled(counts, f1),
        resampled(counts, lambda n: ratio(n[..., 4], n[..., 5])),
    )
