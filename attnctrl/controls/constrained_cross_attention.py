"""Constrained cross-attention: only the image tokens inside a phrase's place see its words.

Wang et al., "PrimeComposer: Faster Progressively Combined Diffusion for Image Composition with Attention Steering", 2024, arXiv
2403.05053; the same rule for boxes is in Dahary et al. (Bounded Attention), 2024, arXiv 2403.16990.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import KeyGroup, Segment, as_tokens, signatures
from ..errors import AttnCtrlError
from ..regions import Region
from ..schedule import parse_layers
from ..sites import Site, Tokens
from .base import Edit
from .subject_masks import Placed, SubjectMasks, as_regions, phrase_tokens


@dataclass(frozen=True, eq=False)
class ConstrainedCrossAttention(Placed):
    """Image tokens outside a phrase's place do not see the tokens of the phrase, so that its look cannot spread to them.

        logit of image token i and text token t  +=  log(1 - strength)   where t belongs to phrases and i is in the place of none of them

    In cross-attention and in the image's rows of joint attention; text sees everything. Only conditional rows change. The end token
    and the padding of a prompt have read all phrases and stay visible, as published.

    Args:
        phrases: where each phrase belongs: a `Region`, a box (x0, y0, x1, y1) in fractions, a mask, or a list of these; or a
            `SubjectMasks`, whose phrases stay in the masks found for them, from the step on in which these are known. An empty
            mapping is neutral.
        tokens: numbers of each phrase's tokens in the text stream, which `in_prompt` finds; a `SubjectMasks` brings its own.
        layers: layer numbers as `parse_layers` reads them; None for all.
        strength: 0 (off) to 1 (not seen at all), times each region's own strength. It costs no second attention in between.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high) noise levels to which the window is restricted.

    A place that covers no token on a coarser level of a UNet keeps one there. Soft edges (`Region.feather`) are cut at one half.
    """

    phrases: Mapping[str, Any] | SubjectMasks = field(default_factory=dict)
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    layers: str | int | Iterable[int] | None = None
    strength: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None

    shapes = True
    places = "phrases"

    def __post_init__(self) -> None:
        wrong, found = [], isinstance(self.phrases, SubjectMasks)
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        if not isinstance(self.phrases, (Mapping, SubjectMasks)):
            wrong.append(f"phrases={self.phrases!r} is neither a mapping of phrases to places nor SubjectMasks")
        elif found and self.tokens:
            wrong.append("tokens are given, and SubjectMasks brings its own")
        elif not found:
            numbers = {str(name): tuple(sorted(set(these))) for name, these in self.tokens.items()}
            object.__setattr__(self, "tokens", numbers)
            wrong += [f"phrase {name!r} has no tokens" for name in self.phrases if not numbers.get(name)]
            wrong += [f"tokens of {name!r}, which has no place" for name in numbers if name not in self.phrases]
            wrong += [
                f"phrase {name!r} has token {these[0]}" for name, these in numbers.items() if these and these[0] < 0
            ]
        if wrong:
            hint = "HINT: ConstrainedCrossAttention.in_prompt({'red cat': (0, 0, 0.5, 1)}, prompt, pipe.tokenizer)"
            raise AttnCtrlError(f"ConstrainedCrossAttention: {'; '.join(wrong)}\n{hint}")
        if not found:
            places = {str(name): as_regions(place, str(name)) for name, place in self.phrases.items()}
            object.__setattr__(self, "phrases", places)
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @classmethod
    def in_prompt(
        cls, phrases: Mapping[str, Any], prompt: str, *tokenizers: Any, **options: Any
    ) -> ConstrainedCrossAttention:
        """For phrases as they stand in a prompt.

        Args:
            tokenizers: those whose tokens the text stream holds, each alone if its first token is the stream's, or with the number of
                that token: `pipe.tokenizer` (SD, SDXL), `pipe.tokenizer_2` (FLUX.1), and for SD3 both
                `pipe.tokenizer, (pipe.tokenizer_3, pipe.tokenizer_max_length)`.
            options: the other arguments of `ConstrainedCrossAttention`.
        """
        if not tokenizers:
            raise AttnCtrlError("ConstrainedCrossAttention.in_prompt needs a tokenizer\nHINT: pipe.tokenizer")
        parts = [part if isinstance(part, tuple) else (part, 0) for part in tokenizers]
        tokens = {
            phrase: [first + i for tokenizer, first in parts for i in phrase_tokens(phrase, prompt, tokenizer)]
            for phrase in phrases
        }
        return cls(phrases, tokens, **options)

    @property
    def neutral(self) -> bool:
        if self.strength == 0 or isinstance(self.phrases, SubjectMasks):
            return self.strength == 0
        return all(region.strength == 0 for parts in self.phrases.values() for region in parts)

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Attention of the image to the text in the chosen layers."""
        text = [site for site in sites if site.kind != "self"]
        if not text:
            raise AttnCtrlError("ConstrainedCrossAttention needs attention to a text; this model has none")
        layers = parse_layers(self.layers, len({site.layer for site in sites if site.primary}))
        found = {site.path: torch.ones(site.heads) for site in text if site.layer in layers}
        if not found:
            there = ", ".join(map(str, sorted({site.layer for site in text})))
            raise AttnCtrlError(
                f"ConstrainedCrossAttention: layers {self.layers!r} do not attend to the text\nHINT: {there} do"
            )
        return found

    def check_grid(self, grid: tuple[int, ...]) -> None:
        if not isinstance(self.phrases, SubjectMasks):
            for region in (region for parts in self.phrases.values() for region in parts):
                region.tokens(grid)

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        if not isinstance(self.phrases, SubjectMasks):
            return Edit(segments=tuple(self._segments(site, tokens, self.tokens, tuple(self.phrases.values()), None)))
        segments: list[Segment] = []
        for image, regions in enumerate(self.phrases.of_images()):
            places = [(region,) for region in regions]
            segments += self._segments(site, tokens, self.phrases.phrases, places, (image,))
        return Edit(segments=tuple(segments))

    def _segments(
        self,
        site: Site,
        tokens: Tokens,
        phrases: Mapping[str, Sequence[int]],
        places: Sequence[tuple[Region, ...]],
        rows: tuple[int, ...] | None,
    ) -> list[Segment]:
        """One segment for image tokens in the same places, and one for all rows that see everything."""
        text, count = tokens.span("text"), math.prod(tokens.grid)
        image = slice(0, count) if site.kind == "cross" else tokens.span("image")
        said = torch.zeros(len(places), text.stop - text.start, dtype=torch.bool)
        for row, (phrase, numbers) in zip(said, phrases.items(), strict=True):
            if numbers[-1] >= said.shape[1]:
                raise AttnCtrlError(
                    f"phrase {phrase!r} has token {numbers[-1]}, and the text has {said.shape[1]} tokens\n"
                    "HINT: the tokenizer whose tokens this model reads; a longer prompt is cut off"
                )
            row[list(numbers)] = True
        inside = torch.stack([torch.stack([r.tokens(tokens.grid, True) for r in parts]).any(0) for parts in places])
        shares = [self.strength * sum(r.strength for r in parts) / len(parts) for parts in places]
        outside = torch.log1p(-torch.tensor(shares, dtype=torch.float64))  # -inf hides
        found: list[Segment] = []
        free = torch.ones(count if site.kind == "cross" else tokens.length, dtype=torch.bool)
        for signature, group in signatures(inside):
            of_phrase = outside.clone()
            of_phrase[list(signature)] = 0.0
            bias = of_phrase[:, None].masked_fill(~said, -math.inf).amax(0).masked_fill(~said.any(0), 0.0)
            if not bias.any():
                continue
            seen = torch.ones(tokens.length, dtype=torch.bool)
            seen[text] = bias == 0
            weak = (value for value in bias.unique() if -math.inf < value < 0)
            keys = [KeyGroup(as_tokens(text.start + (bias == b).nonzero().flatten()), float(b)) for b in weak]
            keys += [KeyGroup(as_tokens(seen))] if seen.any() else []
            if not keys:
                raise AttnCtrlError(
                    "ConstrainedCrossAttention: every token of the text belongs to a phrase, and image tokens outside all places would "
                    "see none\nHINT: strength below 1, or phrases without the end of the prompt"
                )
            queries = torch.zeros_like(free)
            queries[image][group] = True
            free &= ~queries
            found.append(Segment(as_tokens(queries), tuple(keys), rows=rows))
        if free.any():
            found.append(Segment(as_tokens(free), (KeyGroup(slice(0, tokens.length)),), rows=rows))
        return found
