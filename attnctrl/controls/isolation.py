"""Isolation: subjects of one picture do not attend to each other.

He et al., "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention", 2024, arXiv
2411.19261; the same rule for boxes is in Dahary et al. (Bounded Attention), 2024, arXiv 2403.16990.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..attention import KeyGroup, Segment, as_tokens, signatures
from ..errors import AttnCtrlError
from ..regions import Region
from ..sites import Site, Tokens
from .base import Edit
from .subject_masks import Placed, SubjectMasks, as_regions
from .touched import image_sites


@dataclass(frozen=True, eq=False)
class Isolation(Placed):
    """Image tokens of one subject do not see those of another, so that looks do not leak between them.

    Text and whatever else is in the sequence sees everything and is seen by all. Only attention among image tokens changes:
    self-attention, and the image part of joint attention. Both halves of classifier-free guidance are edited.
    Every group of tokens that see the same is one attention call without a mask, so it costs less than plain attention.

    Args:
        subjects: where they are: each a `Region`, a box (x0, y0, x1, y1) in fractions, a mask, or a list of these; or a
            `SubjectMasks`, whose masks are used from the step on in which they are known. An empty list is neutral.
        background: "free": uncovered tokens see everything and are seen by all; "isolated": they keep to themselves.
        overlap: a token in several subjects belongs to all of them ("union") or to the last one ("priority").
        layers: layer numbers as `parse_layers` reads them; None for all. Hard isolation in every layer and step tears pictures apart.
        strength: 0 (off) to 1; blends isolated and plain attention, times each region's own strength.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high) noise levels to which the window is restricted.
    """

    subjects: Sequence[Any] | SubjectMasks = ()
    background: Literal["free", "isolated"] = "free"
    overlap: Literal["union", "priority"] = "union"
    layers: str | int | Iterable[int] | None = None
    strength: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None

    shapes = True
    both = True

    def __post_init__(self) -> None:
        wrong = []
        if self.background not in ("free", "isolated"):
            wrong.append(f"background={self.background!r} is neither 'free' nor 'isolated'")
        if self.overlap not in ("union", "priority"):
            wrong.append(f"overlap={self.overlap!r} is neither 'union' nor 'priority'")
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        count = 0
        if isinstance(self.subjects, SubjectMasks):
            count = len(self.subjects.phrases)
        elif isinstance(self.subjects, (str, Region)):
            wrong.append(f"subjects={self.subjects!r} is one subject, not a list")
        else:
            count = len(self.subjects)
        if count == 1 and self.background == "free":
            wrong.append("one subject has no other to be isolated from; background='isolated' parts it from the rest")
        if wrong:
            raise AttnCtrlError("Isolation: " + "; ".join(wrong))
        if not isinstance(self.subjects, SubjectMasks):
            named = (as_regions(subject, f"subject {i}") for i, subject in enumerate(self.subjects))
            object.__setattr__(self, "subjects", tuple(named))
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @property
    def neutral(self) -> bool:
        if self.strength == 0 or isinstance(self.subjects, SubjectMasks):
            return self.strength == 0
        return all(region.strength == 0 for parts in self.subjects for region in parts)

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Attention among image tokens: all of it in the chosen layers, also the second attention of SD3.5."""
        return image_sites(self.name, sites, self.layers)

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        if not isinstance(self.subjects, SubjectMasks):
            return Edit(segments=tuple(self._segments(tokens, self.subjects, None)))
        images = self.subjects.of_images()
        found = (self._segments(tokens, [(one,) for one in regions], (i,)) for i, regions in enumerate(images))
        return Edit(segments=tuple(segment for segments in found for segment in segments))

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        return self.edit(site, tokens, torch.ones(site.heads))

    def masks(self, subjects: Sequence[tuple[Region, ...]], grid: tuple[int, ...]) -> torch.Tensor:
        """Image tokens of every subject after the overlap policy, (S, tokens) bool."""
        own = torch.stack([torch.stack([region.tokens(grid) for region in parts]).any(0) for parts in subjects])
        if self.overlap == "priority":
            for index in range(len(own) - 1):
                own[index] &= ~own[index + 1 :].any(0)
                if not own[index].any():
                    raise AttnCtrlError(
                        f"Isolation: {subjects[index][0].prompt!r} lies wholly under later subjects\nHINT: overlap='union'"
                    )
        return own

    def _segments(
        self, tokens: Tokens, subjects: Sequence[tuple[Region, ...]], rows: tuple[int, ...] | None
    ) -> list[Segment]:
        image = tokens.span("image")
        own = self.masks(subjects, tokens.grid)
        free = ~own.any(0)
        strengths = torch.tensor([sum(r.strength for r in parts) / len(parts) for parts in subjects]).double()
        found: list[Segment] = []
        plain = torch.ones(tokens.length, dtype=torch.float64)
        for signature, group in signatures(own):
            seen = own[list(signature)].any(0) if signature else free
            if self.background == "free":
                seen = seen | free if signature else torch.ones_like(free)
            share = self.strength * (float(strengths[list(signature)].mean()) if signature else 1.0)
            if share == 0 or bool(seen.all()):
                continue
            queries, keys = torch.zeros(tokens.length, dtype=torch.bool), torch.ones(tokens.length, dtype=torch.bool)
            queries[image][group], keys[image] = True, seen
            plain[queries] -= share
            found.append(Segment(as_tokens(queries), (KeyGroup(as_tokens(keys)),), share, rows=rows))
        rest = plain > 1e-9
        if rest.any():
            weight = 1.0 if bool((plain[rest] == 1).all()) else plain[rest].float()
            found.append(Segment(as_tokens(rest), (KeyGroup(slice(0, tokens.length)),), weight, rows=rows))
        return found
