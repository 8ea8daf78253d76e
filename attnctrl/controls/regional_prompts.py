"""Regional prompting: every region has its own prompt, and no mask tensor exists.

Chen et al., "Training-free Regional Prompting for Diffusion Transformers", 2024, arXiv 2411.02395. The region prompts are
encoded apart and appended to the text stream; with [T_0, T_1 … T_R, I] and image tokens I_r of region r

    regional   I_r ↔ T_r, I_r ↔ I_r (or all of I with `isolate=False`)      weight 1 − base_weight
    base       I   ↔ T_0, I   ↔ I                                           weight base_weight
    text       T_0 ↔ T_0, I        T_r ↔ T_r, I_r

Both plans share q, k and v of the image, so their outputs are blended before the output projection: one sequence equals the
two streams of the paper's code. Models that attend to the text apart (UNets, PixArt, Wan, …) split the table: I_r → T_r blended
with I → T_0 in cross-attention (attention couple), I_r ↔ I_r blended with I ↔ I in self-attention. What is neither text nor
image (registers, padding) is seen by all and follows the base prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from ..attention import KeyGroup, Segment, as_tokens, signatures
from ..errors import AttnCtrlError
from ..regions import Region
from ..schedule import parse_layers
from ..sites import Site, Tokens
from .base import Control, Edit


Overlap = Literal["union", "priority", "mean"]
PRESETS: dict[str, dict[str, Any]] = {
    "instantx": {"base_weight": 0.3, "stop": 5 / 24},
    "attention_couple": {"base_weight": 0.0, "isolate": False, "overlap": "mean"},
    "bounded": {"base_weight": 0.0, "hub": True},
}


@dataclass(frozen=True, eq=False)
class RegionalPrompts(Control):
    """One prompt per region.

    Args:
        regions: `Region`s, or texts that `Region.parse` reads; later ones lie above earlier ones. An empty list is neutral.
        base_weight: share of the base prompt in the regions' image tokens, 0-1 (β of the paper).
        strength: 0 (off) to 1: the regional share is strength·(1 − base_weight), times each region's own strength.
        isolate: image tokens of a region see only their own region; False lets them see the whole picture.
        hub: with `isolate`, regions also see the image tokens that no region covers, and these see all: regions hear of each other
            through the background alone.
        overlap: what tokens in several regions see: "union" of their regions; "priority", the last region only; "mean", one
            attention per region, averaged.
        background: what uncovered tokens follow: "base" (the base prompt and the whole picture), "error", or a prompt of its own.
        layers: layers in which image tokens follow the regions; the base prompt rules the others.
        trim_text: keep only the first n text tokens of every region prompt; None keeps what the pipeline encodes.
        start, stop: fractions of the steps; outside them the model runs on the base prompt alone, without the extra tokens. The
            paper recommends the first 5 to 10 of 24 steps (`stop` 0.2 to 0.4): isolated to the end, regions tear the picture apart.
        sigma: (low, high), the noise levels at which the control acts besides; None for all. See `Schedule`.

    On the soft edge of a region (`Region.feather`) its share falls to 0. A region that covers no token on a coarser level of a UNet
    keeps one there.
    """

    regions: Sequence[Region | str] = ()
    base_weight: float = 0.3
    strength: float = 1.0
    isolate: bool = True
    hub: bool = False
    overlap: Overlap = "union"
    background: str = "base"
    layers: str | int | Iterable[int] | None = None
    trim_text: int | None = None
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None

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
        if self.hub and not self.isolate:
            wrong.append("hub=True softens isolate=True, and isolate is False")
        if wrong:
            raise AttnCtrlError("RegionalPrompts: " + "; ".join(wrong))
        self.schedule

    @classmethod
    def preset(cls, name: str, regions: Sequence[Region | str], **overrides: Any) -> RegionalPrompts:
        """The settings of a known tool or paper, with changes.

        "instantx": arXiv 2411.02395 as published for FLUX, the first 5 of 24 steps. "attention_couple": region prompts in the
        attention to the text alone, overlaps averaged. "bounded": the masks of Bounded Attention, arXiv 2403.16990, regions apart but
        for the background, without its guidance.
        """
        if name not in PRESETS:
            raise AttnCtrlError(f"RegionalPrompts has no preset {name!r}\nHINT: {', '.join(PRESETS)}")
        return cls(regions, **{**PRESETS[name], **overrides})

    @classmethod
    def example(cls, sites: Sequence[Site]) -> RegionalPrompts:
        return cls([Region("region", box=(0, 0, 1, 1))])

    @property
    def neutral(self) -> bool:
        return (
            not self.regions
            or self.strength == 0
            or self.base_weight == 1
            or all(r.strength == 0 for r in self.regions)
        )

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """All sites with text: the appended prompts must be kept apart in every layer, also where `layers` switches regions off.

        Image-only sites (UNets, the second attention of SD3.5) are touched where they would carry one region into another.
        """
        text = [site for site in sites if site.kind != "self"]
        alone = [site for site in sites if site.kind == "self" and site.streams == ("image",)]
        if not text:
            raise AttnCtrlError("RegionalPrompts needs attention to a text; this model has none")
        if self.isolate and not alone and all(site.kind == "cross" for site in text):
            raise AttnCtrlError(
                "RegionalPrompts: image tokens of this model do not attend to each other in a way that isolates regions (linear "
                "attention)\nHINT: isolate=False sets region prompts in its cross-attention"
            )
        chosen = set(parse_layers(self.layers, len({site.layer for site in text})))
        apart = [site for site in alone if site.layer in chosen and self.isolate]
        return {site.path: torch.full((site.heads,), float(site.layer in chosen)) for site in (*text, *apart)}

    def regions_in_use(self) -> tuple[Region, ...]:
        if self.background in ("base", "error"):
            return self.regions
        return (*self.regions, Region(self.background, box=(0, 0, 1, 1)))

    def masks(self, grid: tuple[int, ...]) -> torch.Tensor:
        """Image tokens of every region in use after the overlap and background policies, (R, rows * columns) bool. Raises for a region
        without tokens and for a background that breaks its policy."""
        return self._shares(grid, keep=False)[0]

    def check_grid(self, grid: tuple[int, ...]) -> None:
        self._shares(grid, keep=False)

    @cached_property
    def _known(self) -> dict[tuple, tuple[torch.Tensor, torch.Tensor]]:
        return {}

    def _shares(self, grid: tuple[int, ...], keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of every region in use, (R, n) bool, and how far each follows it, (R, n) float32. With `keep` a region may lose all
        its tokens but one, or hide under others."""
        if (grid, keep) not in self._known:
            self._known[grid, keep] = self._find_shares(grid, keep)
        return self._known[grid, keep]

    def _find_shares(self, grid: tuple[int, ...], keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.stack([region.tokens(grid, keep) for region in self.regions])
        soft = torch.stack([region.weights(grid, keep) for region in self.regions])
        free = ~own.any(0)
        if self.background == "error" and free.any() and not keep:
            raise AttnCtrlError(
                f"RegionalPrompts: {int(free.sum())} of {free.numel()} image tokens are in no region\n"
                "HINT: background='base', or a prompt for what is uncovered"
            )
        if self.overlap == "priority":
            for index in range(len(own) - 1):
                own[index] &= ~own[index + 1 :].any(0)
            empty = [self.regions[i].prompt for i in range(len(own)) if not own[i].any()]
            if empty and not keep:
                raise AttnCtrlError(
                    f"RegionalPrompts: region {empty[0]!r} lies wholly under later regions\nHINT: overlap='union' or 'mean'"
                )
        if self.background not in ("base", "error"):
            if not free.any() and not keep:
                raise AttnCtrlError(
                    f"RegionalPrompts: the background {self.background!r} is wholly covered by regions"
                )
            own, soft = torch.cat([own, free[None]]), torch.cat([soft, free[None].float()])
        return own, soft * own

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        image, joint = tokens.span("image"), site.kind == "joint"
        masks, soft = self._shares(tokens.grid, keep=True)
        spans = [tokens.span(f"region:{i}") for i in range(len(self.regions_in_use()))]
        texts = [[span] if span is not None else [] for span in spans]  # an image-only site has no text
        rows_of_text = texts if joint else [[] for _ in texts]
        named = {"image", *(f"region:{i}" for i in range(len(spans)))}
        base = [slice(start, stop) for name, start, stop in tokens.streams if name not in named]
        common = [slice(start, stop) for name, start, stop in tokens.streams if name not in {*named, "text"}]
        strengths = torch.tensor([region.strength for region in self.regions_in_use()], dtype=torch.float64)
        strengths = strengths * self.strength * (1 - self.base_weight) * float(heads[0])
        soft = soft.double()
        numbers = torch.arange(masks.shape[1])
        free = ~masks[: len(self.regions)].any(0)
        at = image.start if image is not None else 0
        segments: list[Segment] = []
        regional = torch.zeros(numbers.numel(), dtype=torch.float64)

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
            pictured = [seen + at] if site.kind != "cross" else []
            key_index = torch.cat([*pictured, *(torch.arange(s.start, s.stop) for s in keys)]).sort().values
            even = 1.0 if bool((weight == 1).all()) else weight.float()
            segments.append(Segment(queries, (KeyGroup(key_index),), even))

        def seen_by(signature: Sequence[int]) -> torch.Tensor:
            """The image tokens that those in some regions see."""
            if not self.isolate or (self.hub and max(signature) >= len(self.regions)):
                return numbers
            mine = masks[list(signature)].any(0)
            return numbers[mine | free] if self.hub else numbers[mine]

        alone: set[int] = set()  # regions whose image and text rows see the same keys: one call for both
        if self.overlap == "mean":
            total, top = soft.sum(0).clamp(min=1e-12), soft.max(0).values
            for index, mask in enumerate(masks):
                rows, seen = numbers[mask], seen_by((index,))
                share = (strengths[index] * soft[index] * top / total)[rows]
                regional[rows] += share
                joined = seen.numel() == rows.numel()
                alone |= {index} if joined else set()
                add(rows, share, [*texts[index], *common], seen, rows_of_text[index] if joined else ())
        else:
            for signature, rows in signatures(masks):
                if not signature:
                    continue
                rows, mine, seen = numbers[rows], list(signature), seen_by(signature)
                share = strengths[mine].mean() * soft[mine][:, rows].max(0).values
                regional[rows] += share
                joined = len(mine) == 1 and seen.numel() == int(masks[mine[0]].sum())
                alone |= {mine[0]} if joined else set()
                keys = [span for i in mine for span in texts[i]]
                add(rows, share, [*keys, *common], seen, rows_of_text[mine[0]] if joined else ())
        for index, mask in enumerate(masks):
            if index not in alone:
                add(numbers[:0], regional[:0], [*texts[index], *common], numbers[mask], rows_of_text[index])
        rest = (1 - regional).masked_fill(regional > 1 - 1e-9, 0)  # thirds do not sum to 1
        add(numbers, rest, base, numbers, base if joint else ())
        return Edit(segments=tuple(segments))

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        """Unconditional rows: everything but the appended prompts sees each other, each appended prompt only itself."""
        own = [tokens.span(f"region:{index}") for index in range(len(self.regions_in_use()))]
        if own[0] is None:
            return Edit()
        rest = torch.ones(tokens.length, dtype=torch.bool)
        for span in own:
            rest[span] = False
        plain = KeyGroup(as_tokens(rest))
        if site.kind == "cross":
            return Edit(segments=(Segment(slice(0, None), (plain,)),))
        return Edit(segments=(Segment(plain.tokens, (plain,)), *(Segment(span, (KeyGroup(span),)) for span in own)))

    def density(self, grid: tuple[int, int], text: int) -> float:
        """Share of the plain attention's pairs that the regional part computes (base blend apart), for prompts of `text` tokens."""
        masks = self.masks(grid)
        sizes = masks.sum(1).double()
        background = float((~masks[: len(self.regions)].any(0)).sum()) if self.hub else 0.0
        keys = sizes + background + text if self.isolate else torch.full_like(sizes, float(math.prod(grid) + text))
        return float((sizes + text).mul(keys).sum() / (math.prod(grid) + text) ** 2)
