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

A region can also be a phrase of the base prompt (`Region.phrase`), which appends nothing: with U the base prompt outside all such phrases
and T_r the tokens of phrase r, regional is I_r ↔ T_r, I_r → U, T_r → U, both rows with weight 1 − base_weight.

Rows of the unconditional prediction follow the negative prompts of regions by the same table. Regions without one are no regions there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from ..errors import AttnCtrlError
from ..regions import Region
from ..schedule import parse_layers
from ..sites import Site, Tokens
from .base import Control, Edit
from .region_table import Table, Text
from .subject_masks import phrase_places, phrase_tokens


Overlap = Literal["union", "priority", "mean"]
PRESETS: dict[str, dict[str, Any]] = {
    "instantx": {"base_weight": 0.3, "stop": 5 / 24},
    "attention_couple": {"base_weight": 0.0, "isolate": False, "overlap": "mean"},
    "bounded": {"base_weight": 0.0, "hub": True},
    "omost": {"base_weight": 0.0, "isolate": False, "with_base": True, "area_scale": True},
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
        with_base: a region's image tokens also see the base prompt's tokens beside its own, in one softmax.
        area_scale: multiply the logits of a region's text by the picture's area over the region's (Omost), which makes small regions bold.
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
    with_base: bool = False
    area_scale: bool = False
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
        said: dict[int, str] = {}
        for region in regions:
            shared = next((said[number] for number in region.numbers or () if number in said), None)
            if shared is not None:
                wrong.append(f"phrases {shared!r} and {region.prompt!r} share tokens")
            said |= dict.fromkeys(region.numbers or (), region.prompt)
        if wrong:
            raise AttnCtrlError("RegionalPrompts: " + "; ".join(wrong))
        self.schedule

    @classmethod
    def preset(cls, name: str, regions: Sequence[Region | str], **overrides: Any) -> RegionalPrompts:
        """The settings of a known tool or paper, with changes.

        "instantx": arXiv 2411.02395 as published for FLUX, the first 5 of 24 steps. "attention_couple": region prompts in the
        attention to the text alone, overlaps averaged. "bounded": the masks of Bounded Attention, arXiv 2403.16990, regions apart but
        for the background, without its guidance. "omost": captions of a canvas, all in one softmax with the base prompt, small ones
        scaled up (lllyasviel/Omost).
        """
        if name not in PRESETS:
            raise AttnCtrlError(f"RegionalPrompts has no preset {name!r}\nHINT: {', '.join(PRESETS)}")
        return cls(regions, **{**PRESETS[name], **overrides})

    @classmethod
    def in_prompt(
        cls, regions: Sequence[Region | str], prompt: str, *tokenizers: Any, **options: Any
    ) -> RegionalPrompts:
        """With the phrases among the regions (`Region.phrase`) looked up in a prompt.

        Args:
            tokenizers: those whose tokens the text stream holds, each alone if its first token is the stream's, or with the number of
                that token: `pipe.tokenizer` (SD, SDXL), `pipe.tokenizer_2` (FLUX.1), and for SD3 both
                `pipe.tokenizer, (pipe.tokenizer_3, pipe.tokenizer_max_length)`.
            options: the other arguments of `RegionalPrompts`.
        """
        if not tokenizers:
            raise AttnCtrlError("RegionalPrompts.in_prompt needs a tokenizer\nHINT: pipe.tokenizer")
        return cls(located(regions, prompt, tokenizers), **options)

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

    @property
    def both(self) -> bool:
        """Unconditional rows are edited too, where a region has a negative prompt."""
        return any(region.has_negative for region in self.regions)

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """All sites with text: the appended prompts must be kept apart in every layer, also where `layers` switches regions off.

        Image-only sites (UNets, the second attention of SD3.5) are touched where they would carry one region into another.
        """
        unknown = [region.prompt for region in self.regions if region.of_prompt and region.numbers is None]
        if unknown:
            raise AttnCtrlError(
                f"RegionalPrompts: the tokens of the phrase {unknown[0]!r} are not looked up yet\n"
                "HINT: RegionalPrompts.in_prompt(regions, prompt, pipe.tokenizer); RegionalPipeline does it by itself"
            )
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
        if (grid, False) not in self._known:
            for region in self.regions:
                region.check_sides(grid)
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
        return self._edit(site, tokens, float(heads[0]), negative=False)

    def beside(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        """Unconditional rows follow the regions that have a negative prompt; all else of them is as without regions."""
        return self._edit(site, tokens, float(heads[0]), negative=True)

    def _edit(self, site: Site, tokens: Tokens, active: float, negative: bool) -> Edit:
        regions = self.regions_in_use()
        takes_part = torch.tensor([region.has_negative or not negative for region in regions])
        appended = any(name.startswith("region:") for name, *_ in tokens.streams)
        if not appended and not (active and bool(takes_part.any())):
            return Edit()
        masks, soft = self._shares(tokens.grid, keep=True)
        strengths = torch.tensor([region.strength for region in regions], dtype=torch.float64)
        table = Table(
            site=site,
            tokens=tokens,
            masks=masks,
            soft=soft.double(),
            shares=strengths * takes_part * self.strength * (1 - self.base_weight) * active,
            texts=self._negative_texts(tokens, masks) if negative else self._texts(tokens, masks),
            free=~masks[: len(self.regions)].any(0),
            isolate=self.isolate,
            hub=self.hub,
            everywhere=len(self.regions),
            mean=self.overlap == "mean",
            with_base=self.with_base,
        )
        return Edit(segments=table.segments())

    def _texts(self, tokens: Tokens, masks: torch.Tensor) -> list[Text | None]:
        """The prompt or phrase of every region."""
        base, found = tokens.span("text"), []
        for index, region in enumerate(self.regions_in_use()):
            place, scale = tokens.span(f"region:{index}"), self._logit_scale(masks[index])
            if not region.of_prompt:
                found.append(Text(_numbers_of(place), scale=scale))
            elif base is None:
                found.append(Text(_numbers_of(None), of_base=True))
            elif region.numbers[-1] >= base.stop - base.start:
                raise AttnCtrlError(
                    f"phrase {region.prompt!r} has token {region.numbers[-1]}, and the text has {base.stop - base.start} tokens\n"
                    "HINT: the tokenizer whose tokens this model reads; a longer prompt is cut off"
                )
            else:
                found.append(Text(base.start + torch.tensor(region.numbers), of_base=True, scale=scale))
        return found

    def _negative_texts(self, tokens: Tokens, masks: torch.Tensor) -> list[Text | None]:
        """The negative prompts of the regions that have one. They stand where their region's prompt does in conditional rows, or behind
        all prompts."""
        regions = self.regions_in_use()
        behind, found = len(regions), []
        for index, region in enumerate(regions):
            if not region.has_negative:
                found.append(None)
                continue
            places = [tokens.span(f"region:{number}") for number in (behind, index)]
            place = next((place for place in places if place is not None and place.stop > place.start), None)
            found.append(Text(_numbers_of(place), scale=self._logit_scale(masks[index])))
            behind += 1
        return found

    def _logit_scale(self, mask: torch.Tensor) -> float:
        return mask.numel() / max(1, int(mask.sum())) if self.area_scale else 1.0

    def density(self, grid: tuple[int, int], text: int) -> float:
        """Share of the plain attention's pairs that the regional part computes (base blend apart), for prompts of `text` tokens."""
        masks = self.masks(grid)
        sizes = masks.sum(1).double()
        background = float((~masks[: len(self.regions)].any(0)).sum()) if self.hub else 0.0
        keys = sizes + background + text if self.isolate else torch.full_like(sizes, float(math.prod(grid) + text))
        return float((sizes + text).mul(keys).sum() / (math.prod(grid) + text) ** 2)


def located(regions: Sequence[Region | str], prompt: str, tokenizers: Sequence[Any]) -> tuple[Region, ...]:
    """The regions with the tokens of their phrases looked up in the prompt; `tokenizers` as in `RegionalPrompts.in_prompt`.
    Raises for a phrase that is not in the prompt, or several times without `occurrence`."""
    found = []
    for region in regions:
        region = Region.parse(region) if isinstance(region, str) else region
        if region.of_prompt and region.numbers is None:
            count, occurrence = len(phrase_places(region.prompt, prompt)), region.occurrence
            if occurrence is None and count > 1:
                raise AttnCtrlError(
                    f"the phrase {region.prompt!r} stands {count} times in the prompt {prompt!r}\n"
                    f"HINT: Region.phrase({region.prompt!r}, …, occurrence=1) means the first"
                )
            if occurrence is not None and occurrence > count:
                raise AttnCtrlError(
                    f"the phrase {region.prompt!r} has no occurrence {occurrence} in the prompt {prompt!r}\nHINT: it stands there {count} times"
                )
            parts = [part if isinstance(part, tuple) else (part, 0) for part in tokenizers]
            numbers = [
                first + i for one, first in parts for i in phrase_tokens(region.prompt, prompt, one, occurrence)
            ]
            region = replace(region, numbers=tuple(numbers))
        found.append(region)
    return tuple(found)


def _numbers_of(place: slice | None) -> torch.Tensor:
    return torch.arange(0) if place is None else torch.arange(place.start, place.stop)
