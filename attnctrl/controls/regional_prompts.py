"""Regional prompting for joint attention: every region has its own prompt, and no mask tensor exists.

Chen et al., "Training-free Regional Prompting for Diffusion Transformers", 2024, arXiv 2411.02395. The region prompts are
encoded apart and appended to the text stream; with [T_0, T_1 … T_R, I] and image tokens I_r of region r

    regional   I_r ↔ T_r, I_r ↔ I_r (or all of I with `isolate=False`)      weight 1 − base_weight
    base       I   ↔ T_0, I   ↔ I                                           weight base_weight
    text       T_0 ↔ T_0, I        T_r ↔ T_r, I_r

Both plans share q, k and v of the image, so their outputs are blended before the output projection: one sequence equals the
two streams of the paper's code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..attention import KeyGroup, Segment, signatures
from ..errors import AttnCtrlError
from ..regions import Region
from ..schedule import parse_layers
from ..sites import Site, Tokens
from .base import Control, Edit


Overlap = Literal["union", "priority", "mean"]


@dataclass(frozen=True, eq=False)
class RegionalPrompts(Control):
    """One prompt per region.

    Args:
        regions: `Region`s, or texts that `Region.parse` reads; later ones lie above earlier ones. An empty list is neutral.
        base_weight: share of the base prompt in the regions' image tokens, 0-1 (β of the paper).
        strength: 0 (off) to 1: the regional share is strength·(1 − base_weight), times each region's own strength.
        isolate: image tokens of a region see only their own region; False lets them see the whole picture.
        overlap: what tokens in several regions see: "union" of their regions; "priority", the last region only; "mean", one
            attention per region, averaged.
        background: what uncovered tokens follow: "base" (the base prompt and the whole picture), "error", or a prompt of its own.
        layers: layers in which image tokens follow the regions; the base prompt rules the others.
        trim_text: keep only the first n text tokens of every region prompt; None keeps what the pipeline encodes.
        start, stop: fractions of the steps; outside them the model runs on the base prompt alone, without the extra tokens. The
            paper recommends the first 5 to 10 of 24 steps (`stop` 0.2 to 0.4): isolated to the end, regions tear the picture apart.
    """

    regions: Sequence[Region | str] = ()
    base_weight: float = 0.3
    strength: float = 1.0
    isolate: bool = True
    overlap: Overlap = "union"
    background: str = "base"
    layers: str | int | Iterable[int] | None = None
    trim_text: int | None = None
    start: float = 0.0
    stop: float = 1.0

    shapes = True

    def __post_init__(self) -> None:
        regions = tuple(Region.parse(item) if isinstance(item, str) else item for item in self.regions)
        object.__setattr__(self, "regions", regions)
        wrong = []
        if not 0 <= self.base_weight <= 1:
            wrong.append(f"base_weight={self.base_weight} is not between 0 and 1")
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        if self.overlap not in get_args(Overlap):
            wrong.append(f"overlap={self.overlap!r} is not one of {', '.join(get_args(Overlap))}")
        if self.trim_text is not None and self.trim_text < 1:
            wrong.append(f"trim_text={self.trim_text} leaves no text")
        if not self.background.strip():
            wrong.append("background is empty; it is 'base', 'error' or a prompt")
        if wrong:
            raise AttnCtrlError("RegionalPrompts: " + "; ".join(wrong))
        self.schedule

    @property
    def neutral(self) -> bool:
        return (
            not self.regions
            or self.strength == 0
            or self.base_weight == 1
            or all(r.strength == 0 for r in self.regions)
        )

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """All joint sites: the appended prompts must be kept apart in every layer, also where `layers` switches regions off.

        Image-only sites (the second attention of SD3.5) are touched where they would carry one region into another.
        """
        joint = [site for site in sites if site.kind == "joint"]
        if not joint:
            raise AttnCtrlError("RegionalPrompts needs joint attention sites; this model has none")
        chosen = set(parse_layers(self.layers, len(joint)))
        second = [site for site in sites if site.streams == ("image",) and site.layer in chosen and self.isolate]
        return {site.path: torch.full((site.heads,), float(site.layer in chosen)) for site in (*joint, *second)}

    def regions_in_use(self) -> tuple[Region, ...]:
        if self.background in ("base", "error"):
            return self.regions
        return (*self.regions, Region(self.background, box=(0, 0, 1, 1)))

    def masks(self, grid: tuple[int, int]) -> torch.Tensor:
        """Image tokens of every region in use after the overlap and background policies, (R, rows * columns) bool."""
        own = torch.stack([region.tokens(grid) for region in self.regions])
        free = ~own.any(0)
        if self.background == "error" and free.any():
            raise AttnCtrlError(
                f"RegionalPrompts: {int(free.sum())} of {free.numel()} image tokens are in no region\n"
                "HINT: background='base', or a prompt for what is uncovered"
            )
        if self.overlap == "priority":
            for index in range(len(own) - 1):
                own[index] &= ~own[index + 1 :].any(0)
            empty = [self.regions[i].prompt for i in range(len(own)) if not own[i].any()]
            if empty:
                raise AttnCtrlError(
                    f"RegionalPrompts: region {empty[0]!r} lies wholly under later regions\nHINT: overlap='union' or 'mean'"
                )
        if self.background not in ("base", "error"):
            if not free.any():
                raise AttnCtrlError(
                    f"RegionalPrompts: the background {self.background!r} is wholly covered by regions"
                )
            own = torch.cat([own, free[None]])
        return own

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        image, base = tokens.span("image"), tokens.span("text")
        spans = [tokens.span(f"region:{i}") for i in range(len(self.regions_in_use()))]
        texts = [[span] if span is not None else [] for span in spans]  # an image-only site has no text
        base = [base] if base is not None else []
        masks = self.masks(tokens.grid)
        shares = torch.tensor([region.strength for region in self.regions_in_use()], dtype=torch.float64)
        shares = shares * self.strength * (1 - self.base_weight) * float(heads[0])
        everything, at = torch.arange(image.start, image.stop), image.start
        segments: list[Segment] = []
        regional = torch.zeros(everything.numel(), dtype=torch.float64)

        def add(
            rows: torch.Tensor,
            share: torch.Tensor,
            keys: Sequence[slice],
            seen: torch.Tensor,
            text_rows: Sequence[slice] = (),
        ) -> None:
            """Image tokens `rows` with weights `share`, and the text rows that see exactly the same keys (weight 1)."""
            keep = share > 0
            queries = torch.cat([rows[keep] + at, *(torch.arange(s.start, s.stop) for s in text_rows)])
            if not queries.numel():
                return
            text_count = queries.numel() - int(keep.sum())
            weight = torch.cat([share[keep], torch.ones(text_count, dtype=torch.float64)])
            order = queries.argsort()
            queries, weight = queries[order], weight[order]
            key_index = torch.cat([seen + at, *(torch.arange(s.start, s.stop) for s in keys)]).sort().values
            even = 1.0 if bool((weight == 1).all()) else weight.float()
            segments.append(Segment(queries, (KeyGroup(key_index),), even))

        numbers = torch.arange(everything.numel())
        if self.overlap == "mean":
            total = masks.double().sum(0).clamp(min=1)
            for index, mask in enumerate(masks):
                rows = numbers[mask]
                share = shares[index] / total[rows]
                regional[rows] += share
                add(rows, share, texts[index], rows if self.isolate else numbers, texts[index] if self.isolate else ())
        else:
            alone: set[int] = set()
            for signature, rows in signatures(masks):
                if not signature:
                    continue
                rows = numbers[rows]
                seen = numbers[masks[list(signature)].any(0)] if self.isolate else numbers
                share = shares[list(signature)].mean().expand(rows.numel())
                regional[rows] += share
                # a region that overlaps no other sees what its own text sees: one call for both
                joined = len(signature) == 1 and seen.numel() == int(masks[signature[0]].sum()) and self.isolate
                alone |= {signature[0]} if joined else set()
                add(
                    rows,
                    share,
                    [span for i in signature for span in texts[i]],
                    seen,
                    texts[signature[0]] if joined else (),
                )
        for index, mask in enumerate(masks):
            if not self.isolate or (self.overlap != "mean" and index not in alone):
                add(numbers[:0], regional[:0], texts[index], numbers[mask], texts[index])
        add(numbers, 1 - regional, base, numbers, base)
        return Edit(segments=tuple(segments))

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        """Unconditional rows: base text and image see each other, each appended prompt only itself."""
        image, base = tokens.span("image"), tokens.span("text")
        if base is None:
            return Edit()
        low, high = min(image.start, base.start), max(image.stop, base.stop)
        together = slice(low, high)
        segments = [Segment(together, (KeyGroup(together),))]
        for index in range(len(self.regions_in_use())):
            own = tokens.span(f"region:{index}")
            segments.append(Segment(own, (KeyGroup(own),)))
        if high - low != (image.stop - image.start) + (base.stop - base.start):
            raise AttnCtrlError("image and base text are not neighbours in this layout")
        return Edit(segments=tuple(segments))

    def density(self, grid: tuple[int, int], text: int) -> float:
        """Share of the plain attention's pairs that the regional part computes (base blend apart), for prompts of `text` tokens."""
        masks = self.masks(grid)
        sizes = masks.sum(1).double()
        keys = sizes + text if self.isolate else torch.full_like(sizes, float(math.prod(grid) + text))
        return float((sizes + text).mul(keys).sum() / (math.prod(grid) + text) ** 2)
