"""A plan resolved for one length: which rows meet which keys, in which blocks.

``resolve`` is plain Python on spans (``groups.py``) and cached on the plan, so a plan used in every layer and step
pays once. Key groups of equal bias become one *bundle*: a maskless attention call. A causal bundle is cut into full
and triangular pieces; only if scattered tokens would give too many, it becomes one tiled call with a key limit per
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnctrl.attention import groups
from attnctrl.attention.groups import Piece, Spans, Tokens
from attnctrl.attention.plan import KeyGroup, NegativeText, Plan, Segment
from attnctrl.errors import AttnCtrlError


MAX_PIECES = 12  # more pieces than this cost more than one tiled call


@dataclass(frozen=True, eq=False)
class Part:
    """A key group inside a bundle: its bias, of which only the entries ``chosen`` belong to these keys (None = all)."""

    bias: float | Tensor
    keys: int
    chosen: Tokens | None = None
    scale: float = 1.0

    def vector(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The bias of each key: (n,) or (B|1, H|1, n)."""
        if not isinstance(self.bias, Tensor):
            return torch.full((self.keys,), self.bias, device=device, dtype=dtype)
        bias = self.bias.to(device, dtype)
        if bias.ndim == 0 or bias.shape[-1] == 1:
            return bias.expand(*bias.shape[:-1], self.keys)
        return bias if self.chosen is None else groups.take(bias, self.chosen, -1)


@dataclass(frozen=True, eq=False)
class Bundle:
    """Keys of one attention call. ``bias`` is constant over them and added to the LSE, unless ``parts`` give one per
    key. ``scale`` multiplies the logits: one number, or one per key (n,).
    """

    keys: Tokens
    size: int
    bias: float | Tensor = 0.0
    scale: float | Tensor = 1.0
    parts: tuple[Part, ...] = ()
    order: Tensor | None = None  # sorts the parts' keys
    pieces: tuple[Piece, ...] | None = None  # causal
    limits: Tensor | None = None  # causal, too many pieces

    def key_bias(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """(1|B, 1|H, n), in the order of the keys; None without a bias per key."""
        if len(self.parts) == 0:
            return None
        vectors = [part.vector(device, dtype) for part in self.parts]
        lead = torch.broadcast_shapes((1, 1), *(vector.shape[:-1] for vector in vectors))
        bias = torch.cat([vector.expand(*lead, vector.shape[-1]) for vector in vectors], -1)
        return bias if self.order is None else bias.index_select(-1, self.order.to(device))


@dataclass(frozen=True, eq=False)
class Block:
    """A segment: its rows, its bundles, and for each lerp the rows and keys inside and outside that lerp's region."""

    queries: Tokens
    rows: int
    every_row: bool
    every_key: bool
    bundles: tuple[Bundle, ...]
    vector: Bundle  # all keys in one bundle, with a bias per key unless it is the same everywhere
    weight: float | Tensor
    regions: tuple[Region | None, ...] = ()


@dataclass(frozen=True, eq=False)
class Region:
    """What a lerp with a region needs of a block: these of its rows, ``inside`` and ``outside`` the region's keys."""

    queries: Tokens
    rows: int
    chosen: Tokens  # where these rows stand in the block, for weights
    whole: Block
    inside: Block
    outside: Block


@dataclass(frozen=True, eq=False)
class Sides:
    """What a negative text needs: image rows over the keys that both texts share, over either text, and the text rows."""

    shared: Block
    positive: Block
    negative: Block
    others: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Program:
    blocks: tuple[Block, ...]
    plain: bool  # one block of every row and key without bias
    weighted: bool  # some row is in several blocks
    sides: Sides | None = None  # the blocks are then those of the positive text


def resolve(plan: Plan, n_q: int, n_k: int, causal: bool, device: torch.device) -> Program:
    """The program of a plan, from its cache where it has been asked before."""
    key = (n_q, n_k, causal, str(device))
    found = plan.programs.get(key)
    if found is None:
        found = _resolve(plan, n_q, n_k, causal, device)
        if not torch.compiler.is_compiling():
            plan.programs[key] = found
    return found


def _resolve(plan: Plan, n_q: int, n_k: int, causal: bool, device: torch.device) -> Program:
    segments, sides = plan.segments, None
    maker = _Maker(n_q, n_k, causal, device)
    if plan.negative is not None:
        segments, sides = maker.negative(plan.negative)
    elif len(segments) == 0:
        segments = (Segment(slice(0, n_q), (KeyGroup(slice(0, n_k)),)),)
    blocks = []
    for segment in segments:
        rows = groups.spans(segment.queries, n_q)
        _in_range("query", rows, n_q)
        for group in segment.keys:
            _in_range("key", groups.spans(group.tokens, n_k), n_k)
        regions = tuple(
            None if lerp.region is None or len(lerp.heads) == 0 else maker.region(segment, rows, lerp.region)
            for lerp in plan.lerps
        )
        blocks.append(maker.block(rows, segment, groups.spans(slice(0, n_k)), regions))
    covered = groups.count(groups.join(*(groups.spans(segment.queries, n_q) for segment in segments)))
    if covered < n_q:
        raise AttnCtrlError(
            f"the segments hold {covered} of {n_q} query tokens\nHINT: Plan.check names the missing ones"
        )
    first = blocks[0]
    plain = (
        len(blocks) == 1
        and first.every_row
        and first.every_key
        and len(first.vector.parts) == 0
        and _is_one(first.vector.scale)
        and _is_one(first.weight)
    )
    weighted = sum(block.rows for block in blocks) > n_q or not all(_is_one(block.weight) for block in blocks)
    return Program(tuple(blocks), plain, weighted, sides)


def _in_range(kind: str, these: Spans, n: int) -> None:
    if these and (these[0][0] < 0 or these[-1][1] > n):
        raise AttnCtrlError(f"{kind} tokens {these[0][0]}..{these[-1][1] - 1} of a plan reach outside 0..{n - 1}")


def _is_one(x: float | Tensor) -> bool:
    return not isinstance(x, Tensor) and x == 1


@dataclass(frozen=True)
class _Maker:
    n_q: int
    n_k: int
    causal: bool
    device: torch.device

    def region(self, segment: Segment, rows: Spans, region: Tokens) -> Region:
        here = groups.overlap(rows, groups.spans(region, self.n_q))
        keys = groups.spans(region, self.n_k)
        return Region(
            groups.tokens_of(here, self.device),
            groups.count(here),
            groups.tokens_of(groups.positions(here, rows), self.device),
            self.block(here, segment, ((0, self.n_k),)),
            self.block(here, segment, keys),
            self.block(here, segment, groups.minus(((0, self.n_k),), keys)),
        )

    def negative(self, negative: NegativeText) -> tuple[tuple[Segment, ...], Sides]:
        """The segments with the positive text in force, and what the negative text needs besides."""
        wrong = list(negative.why_not(self.n_q, self.n_k))
        if wrong:
            raise AttnCtrlError("; ".join(wrong))
        image, every = groups.spans(negative.image, self.n_q), ((0, self.n_k),)
        positive, against = groups.spans(negative.positive, self.n_k), groups.spans(negative.negative, self.n_k)
        views = [groups.minus(every, text) for text in (against, positive)]
        joint = image != ((0, self.n_q),)
        everything = Segment(slice(0, self.n_q), (KeyGroup(slice(0, self.n_k)),))
        shared = groups.overlap(*views)
        others = ((groups.minus(views[0], image), views[0]), (against, views[1])) if joint else ()
        sides = Sides(
            *(self.block(image, everything, keys) for keys in (shared, positive, against)),
            tuple(self.block(these, everything, keys) for these, keys in others if these),
        )
        rows = (views[0], against) if joint else (image,)
        segments = tuple(
            Segment(groups.tokens_of(these), (KeyGroup(groups.tokens_of(keys)),))
            for these, keys in zip(rows, views, strict=False)
        )
        return segments, sides

    def block(self, rows: Spans, segment: Segment, allowed: Spans, regions: tuple[Region | None, ...] = ()) -> Block:
        """The rows' attention over those keys of the segment that are ``allowed``."""
        parts = []
        for group in segment.keys:
            whole = groups.spans(group.tokens, self.n_k)
            these = groups.overlap(whole, allowed)
            if these and not group.forbidden:
                chosen = None if these == whole else groups.tokens_of(groups.positions(these, whole), self.device)
                parts.append((these, Part(group.bias, groups.count(these), chosen, group.scale)))
        every = groups.join(*(these for these, _ in parts))
        per_key = any(_per_key(part) for _, part in parts)
        biased = any(isinstance(part.bias, Tensor) or part.bias != 0 for _, part in parts)
        vector = self._bundle(rows, parts, biased=biased)
        if per_key:
            bundles: tuple[Bundle, ...] = (vector,)
        else:
            bundles = tuple(self._bundle(rows, alike, alike[0][1].bias) for alike in _by_bias(parts))
        return Block(
            queries=groups.tokens_of(rows, self.device),
            rows=groups.count(rows),
            every_row=rows == ((0, self.n_q),),
            every_key=every == ((0, self.n_k),),
            bundles=bundles,
            vector=vector,
            weight=segment.weight,
            regions=regions,
        )

    def _bundle(
        self, rows: Spans, parts: Sequence[tuple[Spans, Part]], bias: float | Tensor = 0.0, biased: bool = False
    ) -> Bundle:
        """One call over the keys of the parts, with a bias per key if ``biased``."""
        keys = groups.join(*(these for these, _ in parts))
        pieces, limits = self._causal(rows, keys) if self.causal else (None, None)
        return Bundle(
            groups.tokens_of(keys, self.device),
            groups.count(keys),
            bias,
            self._scale(parts, keys),
            tuple(part for _, part in parts) if biased else (),
            _order([these for these, _ in parts], self.device) if biased else None,
            pieces,
            limits,
        )

    def _scale(self, parts: Sequence[tuple[Spans, Part]], keys: Spans) -> float | Tensor:
        """What multiplies the logits of the keys: a number if it is the same for all."""
        if len({part.scale for _, part in parts}) <= 1:
            return parts[0][1].scale if parts else 1.0
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        scale = torch.ones(self.n_k, device=self.device, dtype=exact)
        for these, part in parts:
            groups.put(scale, groups.tokens_of(these, self.device), scale.new_full((part.keys,), part.scale), 0)
        return groups.take(scale, groups.tokens_of(keys, self.device), 0)

    def _causal(self, rows: Spans, keys: Spans) -> tuple[tuple[Piece, ...] | None, Tensor | None]:
        pieces = groups.staircase(rows, keys, self.n_k - self.n_q)
        if len(pieces) <= MAX_PIECES:
            return pieces, None
        steps = [
            torch.arange(p.keys - (p.stop - p.start) + 1, p.keys + 1)
            if p.causal
            else torch.full((p.stop - p.start,), p.keys)
            for p in pieces
        ]
        return None, torch.cat(steps).to(self.device)


def _per_key(part: Part) -> bool:
    return isinstance(part.bias, Tensor) and part.bias.ndim > 0 and part.bias.shape[-1] != 1


def _by_bias(parts: Sequence[tuple[Spans, Part]]) -> list[list[tuple[Spans, Part]]]:
    """Parts of equal bias together; tensors are equal if they are the same object."""
    found: list[list[tuple[Spans, Part]]] = []
    for these, part in parts:
        for alike in found:
            bias = alike[0][1].bias
            numbers = not isinstance(bias, Tensor) and not isinstance(part.bias, Tensor)
            if bias is part.bias or (numbers and bias == part.bias):
                alike.append((these, part))
                break
        else:
            found.append([(these, part)])
    return found


def _order(sets: Sequence[Spans], device: torch.device) -> Tensor | None:
    """The permutation that sorts the keys of several groups; None if they follow each other already."""
    runs = [run for these in sets for run in these]
    if all(left[1] <= right[0] for left, right in zip(runs, runs[1:], strict=False)):
        return None
    starts, at = [], 0
    for a, b in runs:
        starts.append((a, at, b - a))
        at += b - a
    return torch.cat([torch.arange(start, start + n, device=device) for _, start, n in sorted(starts)])
