"""Plans whose batch rows differ: rows with segments of their own, and rows that borrow keys and values of other rows.

Such a plan is cut into parts of neighbouring rows with the same segments and the same lenders; a part is an ordinary plan over

    [own keys, lent keys of row a, lent keys of row b, ...]

which are gathered, so that memory grows with the number of keys and nothing is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnctrl.attention import groups
from attnctrl.attention.blocks import Inputs
from attnctrl.attention.groups import Spans, Tokens, take
from attnctrl.attention.plan import KeyGroup, Lerp, Peers, Plan, Segment
from attnctrl.errors import AttnCtrlError


@dataclass(frozen=True, eq=False)
class RowPart:
    """Neighbouring rows of a plan with the same keys: their plan, and what they borrow, (row, tokens) in order."""

    rows: slice
    loans: tuple[tuple[int, Tokens], ...]
    plan: Plan

    def of(self, inputs: Inputs) -> Inputs:
        """The part's rows, with lent keys behind their own."""
        if inputs.causal:
            raise AttnCtrlError("causal attention does not go with keys of other rows, or segments for some rows")
        some = replace(inputs.rows(self.rows), own=inputs.k.shape[2])
        bias = inputs.key_bias
        if bias is not None:
            bias = self._lengthened(bias if bias.shape[0] > 1 else bias.expand(inputs.q.shape[0], -1, -1))
        k, v = self._lengthened(inputs.k), self._lengthened(inputs.v)
        return replace(some, k=k, v=v, key_bias=bias, mask=None if bias is None else bias[:, :, None])

    def _lengthened(self, x: Tensor) -> Tensor:
        """x (B, H, n_k, ...) of these rows, and what they borrow."""
        own = x[self.rows]
        lent = [take(x[row : row + 1], tokens, 2).expand(len(own), *[-1] * (x.ndim - 1)) for row, tokens in self.loans]
        return torch.cat([own, *lent], 2) if lent else own


def parts_of(plan: Plan, batch: int, n_q: int, n_k: int, device: torch.device) -> tuple[RowPart, ...]:
    """The parts of a plan in the order of its rows, from its cache where they have been asked before."""
    key = ("rows", batch, n_q, n_k, str(device))
    if key not in plan.programs:
        kinds: list[tuple[tuple, int, int]] = []
        for row in range(batch):
            kind = tuple(
                (i, segment.peers.sources(row, batch) if segment.peers is not None else ())
                for i, segment in enumerate(plan.segments)
                if segment.rows is None or row in segment.rows
            )
            if kinds and kinds[-1][0] == kind:
                kinds[-1] = (kind, kinds[-1][1], row + 1)
            else:
                kinds.append((kind, row, row + 1))
        plan.programs[key] = tuple(_part(plan, kind, slice(a, b), n_q, n_k, device) for kind, a, b in kinds)
    return plan.programs[key]


def _part(plan: Plan, kind: Sequence[tuple[int, tuple[int, ...]]], rows: slice, n_q: int, n_k: int, device) -> RowPart:
    loans: list[tuple[int, Tokens]] = []
    lent: dict[Peers, Spans] = {}  # where the keys stand
    segments, at = [], n_k
    for number, sources in kind:
        segment = plan.segments[number]
        peers = segment.peers
        if peers is not None and peers not in lent:
            start = at
            for row in sources:
                if these := peers.lent(row, n_k):
                    loans.append((row, groups.tokens_of(these, device)))
                    at += groups.count(these)
            lent[peers] = ((start, at),) if at > start else ()
        borrowed = lent[peers] if peers is not None else ()
        without = groups.spans(peers.instead, n_k) if borrowed and peers.instead is not None else ()
        keys = [_own(group, without, rows, n_k, device) for group in segment.keys]
        if borrowed:
            bias = peers.bias
            if isinstance(bias, Tensor):
                bias = torch.cat([peers.added(row, n_k) for row in sources])
            keys.append(KeyGroup(groups.tokens_of(borrowed), bias))
        segments.append(Segment(groups.tokens_of(groups.spans(segment.queries, n_q), device), keys, segment.weight))
    lerps = []
    for lerp in plan.lerps:
        if isinstance(lerp, Lerp):
            region = lerp.region
            if region is not None:
                region = groups.tokens_of(groups.spans(region, n_q), device)
            lerps.append(replace(lerp, strength=_of_rows(lerp.strength, rows, 2), region=region))
    scale = None if plan.head_scale is None else _of_rows(plan.head_scale, rows, 2)
    return RowPart(rows, tuple(loans), Plan(tuple(segments), tuple(lerps), scale))


def _own(group: KeyGroup, without: Spans, rows: slice, n_k: int, device) -> KeyGroup:
    """A group of own keys, closed at the last of them, without some."""
    these, bias = groups.spans(group.tokens, n_k), group.bias
    rest = groups.minus(these, without)
    if isinstance(bias, Tensor):
        bias = _of_rows(bias, rows, 3)
        if rest != these and bias.ndim and bias.shape[-1] != 1:
            bias = take(bias, groups.tokens_of(groups.positions(rest, these)), -1)
    return KeyGroup(groups.tokens_of(rest, device), bias, group.scale)


def _of_rows(x: Tensor, rows: slice, ndim: int) -> Tensor:
    """The rows of a tensor with one entry per row, a view."""
    return x[rows] if x.ndim == ndim and x.shape[0] > 1 else x
