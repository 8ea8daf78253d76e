"""Keyword scope: a reference picture is seen only where the picture shows its keyword.

Zhou et al., "Rethinking Multi-Condition DiTs: Eliminating Redundant Attention via Position-Alignment and Keyword-Scoping", 2026, arXiv
2602.06850. The paper leaves heads, layers and the norm of the map open; here it is the mean over heads and layers, brought to 0-1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..attention import KeyGroup, Segment, Watch, as_tokens
from ..errors import AttnCtrlError
from ..schedule import parse_layers
from ..sites import Site, Tokens
from .base import Control, Edit, Moment
from .subject_masks import FLAT, phrase_tokens


@dataclass
class _Record:
    """Sum of the running step's maps (images, N) and the sites that gave them; the mask of the step before, (images, N) bool, and who
    sees whom under it."""

    total: torch.Tensor | None = None
    seen: set[str] = field(default_factory=set)
    inside: torch.Tensor | None = None
    segments: dict[Tokens, tuple[Segment, ...]] = field(default_factory=dict)
    revision: int = 0


@dataclass(frozen=True, eq=False)
class KeywordScope(Control):
    """Image tokens that do not show the keyword and the tokens of reference pictures do not see each other.

        a_i = probability that image token i gives to the keyword, a mean over heads and layers of the step before
        i is inside where (a_i - min a) / (max a - min a) > threshold

    In the first step of the window, and where the map is flat, all tokens are inside. Text sees everything. Both halves of
    classifier-free guidance follow the conditional rows' map. Models are trained to see their references everywhere: on one that was not
    trained with a scope this is an approximation. The map takes one fused call more per layer, so that no time is saved.

    Args:
        tokens: numbers of the keyword's tokens in the text stream; `in_prompt` finds them.
        threshold: 0 (off) to 1 (reference pictures are not seen after the first step).
        layers: layers that are scoped and whose maps count, as `parse_layers` reads them; None for all.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high) noise levels to which the window is restricted.
    """

    tokens: Sequence[int]
    threshold: float = 0.2
    layers: str | int | Iterable[int] | None = None
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None
    _record: _Record = field(default_factory=_Record, init=False, repr=False)

    shapes = True
    both = True

    def __post_init__(self) -> None:
        wrong, tokens = [], tuple(sorted(set(self.tokens)))
        if not tokens or tokens[0] < 0:
            wrong.append(f"tokens={self.tokens!r} are no numbers of tokens")
        if not 0 <= self.threshold <= 1:
            wrong.append(f"threshold={self.threshold} is not between 0 (off) and 1")
        if wrong:
            hint = "HINT: KeywordScope.in_prompt('red cat', prompt, pipe.tokenizer_2)"
            raise AttnCtrlError(f"KeywordScope: {'; '.join(wrong)}\n{hint}")
        object.__setattr__(self, "tokens", tokens)
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @classmethod
    def in_prompt(cls, keyword: str, prompt: str, tokenizer: Any, offset: int = 0, **options: Any) -> KeywordScope:
        """For a keyword as it stands in a prompt.

        Args:
            tokenizer: the one whose tokens the text stream starts with, `pipe.tokenizer_2` for FLUX.1.
            offset: number of the first of its tokens in the text stream.
            options: the other arguments of `KeywordScope`.
        """
        return cls([offset + i for i in phrase_tokens(keyword, prompt, tokenizer)], **options)

    @classmethod
    def example(cls, sites: Sequence[Site]) -> KeywordScope:
        return cls((0,))

    @property
    def revision(self) -> int:
        return self._record.revision

    @property
    def neutral(self) -> bool:
        return self.threshold == 0

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Joint attention in the chosen layers."""
        layers = parse_layers(self.layers, len({site.layer for site in sites if site.primary}))
        joint = [site for site in sites if site.kind == "joint" and site.primary and site.layer in layers]
        if not joint:
            raise AttnCtrlError(
                f"KeywordScope: no attention of image, text and reference pictures together is in layers {self.layers!r}"
            )
        return {site.path: torch.ones(site.heads) for site in joint}

    def begin(self, moment: Moment) -> None:
        record, total = self._record, None if moment.first else self._record.total
        if moment.first or total is not None:
            record.inside = None if total is None else self._mask(total).cpu()
            record.total = None
            record.segments.clear()
            record.revision += 1
        record.seen.clear()

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        text, image = tokens.span("text"), tokens.span("image")
        if self.tokens[-1] >= text.stop - text.start:
            raise AttnCtrlError(
                f"the keyword has token {self.tokens[-1]}, and the text has {text.stop - text.start} tokens\n"
                "HINT: the tokenizer whose tokens this model reads; a longer prompt is cut off"
            )
        keyword = as_tokens(text.start + number for number in self.tokens)
        watch = Watch(image, (keyword,), partial(self._see, site.path))
        return Edit(segments=self._in_scope(tokens), lerps=(watch,))

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        return Edit(segments=self._in_scope(tokens))

    def _in_scope(self, tokens: Tokens) -> tuple[Segment, ...]:
        known = self._record.segments
        if tokens not in known:
            known[tokens] = self._segments(tokens)
        return known[tokens]

    def _segments(self, tokens: Tokens) -> tuple[Segment, ...]:
        image, reference = tokens.span("image"), tokens.span("reference")
        if reference is None:
            raise AttnCtrlError(
                "KeywordScope: this call carries no reference pictures\nHINT: FluxKontextPipeline(image=…), Flux2Pipeline(image=[…])"
            )
        if self._record.inside is None:
            return ()
        found = []
        for row, inside in enumerate(self._record.inside):
            outside = torch.zeros(tokens.length, dtype=torch.bool)
            outside[image] = ~inside
            lent = torch.zeros_like(outside)
            lent[reference] = True
            for queries, keys in ((outside, ~lent), (lent, ~outside), (~outside & ~lent, torch.ones_like(lent))):
                if queries.any():
                    found.append(Segment(as_tokens(queries), (KeyGroup(as_tokens(keys)),), rows=(row,)))
        return tuple(found)

    def _see(self, path: str, mass: torch.Tensor) -> None:
        record = self._record
        if path not in record.seen:  # else of a perturbed pass, which follows the plain one
            record.seen.add(path)
            seen = mass[..., 0]  # stays on its device: a step waits for it once, not every layer
            record.total = seen if record.total is None else record.total + seen.to(record.total.device)

    def _mask(self, total: torch.Tensor) -> torch.Tensor:
        low, high = total.amin(1, keepdim=True), total.amax(1, keepdim=True)
        return (high - low <= FLAT * high) | (total - low > self.threshold * (high - low))
