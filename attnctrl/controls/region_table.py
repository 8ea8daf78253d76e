"""Who sees whom under `RegionalPrompts`: the table of one attention call, as segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..attention import KeyGroup, Segment, as_tokens, signatures
from ..sites import Site, Tokens


@dataclass(frozen=True, eq=False)
class Text:
    """The text of a region at a site: its tokens, (n,), none at a site without text.

    `of_base`: they are a phrase of the base prompt, whose rows follow the region as far as its image tokens do. Other texts stand
    beside the base prompt, and their rows see themselves and the region alone. `scale` multiplies the logits that image tokens give them.
    """

    tokens: torch.Tensor
    of_base: bool = False
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Table:
    """The segments of a call.

    Args:
        masks: image tokens of every region after the overlap policy, (R, n) bool.
        soft: how far each follows the region, (R, n) float64.
        shares: of the regional part at full softness, (R,) float64.
        texts: one per region; None for a region that takes no part.
        free: image tokens in no region, (n,) bool.
        isolate, hub: as in `RegionalPrompts`; `everywhere` is the first region of `masks` that sees the whole picture as a hub does.
        mean: overlapping regions are averaged; else they are joined.
        with_base: image tokens also see the base prompt in the regional part.
    """

    site: Site
    tokens: Tokens
    masks: torch.Tensor
    soft: torch.Tensor
    shares: torch.Tensor
    texts: Sequence[Text | None]
    free: torch.Tensor
    isolate: bool
    hub: bool
    everywhere: int
    mean: bool
    with_base: bool

    def segments(self) -> tuple[Segment, ...]:
        found: list[Segment] = []
        regional = torch.zeros(len(self.free), dtype=torch.float64)
        done: set[int] = set()  # regions whose text rows share the call of their image rows
        for mine, rows, share in self._groups():
            regional[rows] += share
            seen, here = self._seen_by(mine), share > 0
            alone = len(mine) == 1 and self._joins(mine[0], seen)
            done |= {mine[0]} if alone else set()
            text = self._text_rows(mine[0]) if alone else self._nothing
            queries = torch.cat([rows[here] + self._at, text])
            weight = torch.cat([share[here], self._text_weight(mine[0], text)])
            found += self._segment(queries, weight, [*self._said_in(mine), *self._pictured(seen)])
        for index, text in enumerate(self.texts):
            if text is not None and index not in done:
                rows = self._text_rows(index)
                keys = [text.tokens, self._others, self._unsaid if text.of_base else self._nothing]
                keys += [self._numbers[self.masks[index]] + self._at]
                found += self._segment(rows, self._text_weight(index, rows), [(k, 1.0) for k in keys])
        rest = (1 - regional).masked_fill(regional > 1 - 1e-9, 0)  # thirds do not sum to 1
        follows = torch.ones(self.tokens.length, dtype=torch.float64)
        for index, text in enumerate(self.texts):
            if text is not None and text.of_base:
                follows[text.tokens] = 1 - self.shares[index]
        rows = self._base if self._joint else self._nothing
        queries, weight = torch.cat([self._numbers + self._at, rows]), torch.cat([rest, follows[rows]])
        found += self._segment(queries, weight, [(self._base, 1.0), *self._pictured(self._numbers)])
        return (*found, *self._unused())

    def _groups(self) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Regions, the image tokens that follow exactly these, and how far; without those that follow them not at all."""
        if self.mean:
            total, top = self.soft.sum(0).clamp(min=1e-12), self.soft.max(0).values
            whole = self.shares[:, None] * self.soft * top / total
            groups = [([i], self._numbers[mask], whole[i][mask]) for i, mask in enumerate(self.masks)]
        else:
            takes_part = torch.tensor([text is not None for text in self.texts])
            groups = []
            for signature, rows in signatures(self.masks & takes_part[:, None]):
                if mine := list(signature):
                    rows = self._numbers[rows]
                    share = self.shares[mine].mean() * self.soft[mine][:, rows].max(0).values
                    groups.append((mine, rows, share))
        yield from (group for group in groups if bool((group[2] > 0).any()))

    def _seen_by(self, mine: list[int]) -> torch.Tensor:
        """The image tokens that those in some regions see."""
        if not self.isolate or (self.hub and max(mine) >= self.everywhere):
            return self._numbers
        own = self.masks[mine].any(0)
        return self._numbers[own | self.free] if self.hub else self._numbers[own]

    def _said_in(self, mine: list[int]) -> list[tuple[torch.Tensor, float]]:
        """The text tokens that those in some regions see, with the scale of their logits."""
        own = [self.texts[i] for i in mine]
        base = self.with_base or any(text.of_base for text in own)
        shared = torch.cat([self._others, self._unsaid if base else self._nothing])
        return [*((text.tokens, text.scale) for text in own), (shared, 1.0)]

    def _joins(self, index: int, seen: torch.Tensor) -> bool:
        """Whether a region's image and text rows see the same keys alike."""
        text = self.texts[index]
        same = len(seen) == int(self.masks[index].sum()) and (text.of_base or not self.with_base)
        return self._joint and same and text.scale == 1

    def _text_rows(self, index: int) -> torch.Tensor:
        return self.texts[index].tokens if self._joint else self._nothing

    def _text_weight(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        share = self.shares[index] if self.texts[index].of_base else 1.0
        return torch.ones(len(rows), dtype=torch.float64) * share

    def _pictured(self, seen: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        return [] if self.site.kind == "cross" else [(seen + self._at, 1.0)]

    def _segment(
        self, queries: torch.Tensor, weight: torch.Tensor, keys: Sequence[tuple[torch.Tensor, float]]
    ) -> list[Segment]:
        """One segment of the queries that have a weight; keys of equal scale are one group."""
        queries, weight = queries[weight > 0], weight[weight > 0]
        if not len(queries):
            return []
        order = queries.argsort()
        weight = weight[order]
        even = 1.0 if bool((weight == 1).all()) else weight.float()
        scales = dict.fromkeys(scale for tokens, scale in keys if len(tokens))
        groups = [KeyGroup(as_tokens(torch.cat([t for t, s in keys if s == scale])), scale=scale) for scale in scales]
        return [Segment(queries[order], groups, even)]

    def _unused(self) -> list[Segment]:
        """Appended prompts that no row of this branch reads keep to themselves."""
        used = {int(text.tokens[0]) for text in self.texts if text is not None and len(text.tokens)}
        spans = [slice(a, b) for name, a, b in self.tokens.streams if name.startswith("region:") and b > a]
        return [Segment(s, (KeyGroup(s),)) for s in spans if self._joint and s.start not in used]

    @property
    def _joint(self) -> bool:
        return self.site.kind == "joint"

    @cached_property
    def _at(self) -> int:
        image = self.tokens.span("image")
        return 0 if image is None else image.start

    @cached_property
    def _numbers(self) -> torch.Tensor:
        return torch.arange(len(self.free))

    @cached_property
    def _nothing(self) -> torch.Tensor:
        return torch.arange(0)

    def _streams(self, wanted) -> torch.Tensor:
        return torch.cat([self._nothing, *(torch.arange(a, b) for name, a, b in self.tokens.streams if wanted(name))])

    @cached_property
    def _base(self) -> torch.Tensor:
        """The base prompt, and what is neither text nor image."""
        return self._streams(lambda name: name != "image" and not name.startswith("region:"))

    @cached_property
    def _others(self) -> torch.Tensor:
        """What is neither text nor image."""
        return self._streams(lambda name: name not in ("image", "text") and not name.startswith("region:"))

    @cached_property
    def _unsaid(self) -> torch.Tensor:
        """The base prompt without the phrases that belong to regions."""
        text = self._streams(lambda name: name == "text")
        said = [t.tokens for t in self.texts if t is not None and t.of_base]
        return text[~torch.isin(text, torch.cat(said))] if said else text
