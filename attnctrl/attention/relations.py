"""Who attends to whom, as plain frozen values: segments of query tokens x groups of key tokens, and keys of other batch rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from attnctrl.attention.groups import (
    Spans,
    Tokens,
    as_tokens,
    count,
    join,
    overlap,
    sorted_tokens,
    spans,
    take,
    tokens_of,
    wrong_range,
)
from attnctrl.errors import AttnCtrlError


if TYPE_CHECKING:
    from attnctrl.attention.plan import Plan


@dataclass(frozen=True, eq=False)
class KeyGroup:
    """Key tokens and what is added to their logits.

    ``bias`` is a number (-inf forbids the group), or a tensor: per key (n,) or (B|1, H|1, n), -inf allowed per key; or
    with a last dimension of 1 (or no dimension) one bias for the whole group, e.g. per sample (B, 1, 1). A tensor bias
    is rounded to the dtype of q where the kernel demands that. ``scale`` multiplies the logits before any bias and mask.
    """

    tokens: Tokens
    bias: float | Tensor = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", sorted_tokens(self.tokens))

    @cached_property
    def alone(self) -> Plan:
        """Every row attends to this group and nothing else."""
        from attnctrl.attention.plan import Plan

        return Plan((Segment(slice(0, None), (self,)),))

    @property
    def forbidden(self) -> bool:
        return not isinstance(self.bias, Tensor) and self.bias == -math.inf

    def why_not(self, name: str, n_k: int, heads: int | None) -> Iterable[str]:
        """What is wrong with it in a call of this size."""
        these, bias = spans(self.tokens, n_k), self.bias
        yield from wrong_range(name, these, n_k)
        if not 0 < self.scale < math.inf:
            yield f"{name}: scale {self.scale} is not above 0 and finite"
        if not isinstance(bias, Tensor):
            if math.isnan(bias) or bias == math.inf:
                yield f"{name}: bias {bias}"
        elif bias.ndim not in (0, 1, 3) or (bias.ndim and bias.shape[-1] not in (1, count(these))):
            yield f"{name}: bias {tuple(bias.shape)} for {count(these)} keys; (n,) or (B|1, H|1, n)"
        elif bias.ndim == 3 and heads is not None and bias.shape[1] not in (1, heads):
            yield f"{name}: bias {tuple(bias.shape)} for {heads} heads"
        elif bias.isnan().any() or (bias == math.inf).any():
            yield f"{name}: bias holds NaN or +inf"

    def opens(self, n_k: int) -> bool:
        """Whether every row and head has a key in it."""
        if not isinstance(self.bias, Tensor):
            return not self.forbidden and count(spans(self.tokens, n_k)) > 0
        alive = self.bias.detach() > -math.inf
        alive = alive.reshape(-1, alive.shape[-1]) if alive.ndim else alive[None, None]
        return bool(alive.any(-1).all()) and count(spans(self.tokens, n_k)) > 0


@dataclass(frozen=True, eq=False)
class Peers:
    """Keys and values of other batch rows, which a segment's queries see behind their own keys.

    Rows are those that the plan is for, counted from 0; none borrows from itself, and borrowed keys stay as their row made them
    (with its positions). Attention is not causal then.

    Args:
        tokens: key tokens that a row lends: one set for all rows, or one per row.
        reference: "batch", every row borrows from all others; "first", the others borrow from the first row.
        bias: added to the logits of borrowed keys: a number, or per lending row and key (R, n_k), -inf allowed; rows from R on have none.
        instead: own key tokens that a row with borrowed keys does not see.
        dropout: probability with which a token is not lent, drawn once per row from ``seed``.
    """

    tokens: Tokens | tuple[Tokens, ...]
    reference: Literal["batch", "first"] = "batch"
    bias: float | Tensor = 0.0
    instead: Tokens | None = None
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.reference not in ("batch", "first"):
            wrong.append(f"reference {self.reference!r} is neither 'batch' nor 'first'")
        if isinstance(self.bias, Tensor):
            if self.bias.ndim != 2 or not bool((self.bias < math.inf).all()):
                wrong.append(f"bias {tuple(self.bias.shape)} is not (rows, keys) of numbers below infinity")
        elif not self.bias < math.inf:
            wrong.append(f"bias {self.bias} is not a number below infinity")
        if not 0 <= self.dropout <= 1:
            wrong.append(f"dropout {self.dropout} is not between 0 and 1")
        if wrong:
            raise AttnCtrlError("; ".join(wrong))
        tokens = self.tokens
        several = isinstance(tokens, (tuple, list))
        sets = tuple(map(sorted_tokens, tokens)) if several else sorted_tokens(tokens)
        object.__setattr__(self, "tokens", sets)

    def sources(self, row: int, batch: int) -> tuple[int, ...]:
        """Rows that lend to ``row``."""
        if self.reference == "first":
            return (0,) if row else ()
        return tuple(other for other in range(batch) if other != row)

    def lent(self, row: int, n_k: int) -> Spans:
        """Key tokens that ``row`` lends."""
        these = spans(self.tokens[row] if isinstance(self.tokens, tuple) else self.tokens, n_k)
        if self.dropout == 0:
            return these
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + row) % 2**63)
        kept = torch.rand(n_k, generator=generator) >= self.dropout
        return overlap(these, spans(as_tokens(kept)))

    def added(self, row: int, n_k: int) -> float | Tensor:
        """What is added to the logits of the keys that ``row`` lends, in their order."""
        if not isinstance(self.bias, Tensor):
            return self.bias
        bias = self.bias[row] if row < len(self.bias) else self.bias.new_zeros(n_k)
        return take(bias, tokens_of(self.lent(row, n_k)), 0)

    def why_not(self, n_k: int, batch: int | None) -> Iterable[str]:
        """Why it does not fit a call of this size."""
        if isinstance(self.bias, Tensor) and (self.bias.shape[1] != n_k or len(self.bias) > (batch or math.inf)):
            yield f"a bias {tuple(self.bias.shape)} of lent keys for {batch} rows and {n_k} keys"
        if batch == 1:
            yield "a batch of one row has no other rows to borrow keys from"
        sets = self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)
        if isinstance(self.tokens, tuple) and batch not in (None, len(sets)):
            yield f"lent tokens of {len(sets)} rows for a batch of {batch}"
        for tokens in sets:
            yield from wrong_range("lent keys", spans(tokens, n_k), n_k)
        if self.instead is not None:
            yield from wrong_range("keys to do without", spans(self.instead, n_k), n_k)


@dataclass(frozen=True, eq=False)
class Segment:
    """Query tokens that share their key groups. A query token may be in several: out[q] = sum_s weight_s(q) * attention_s(q).

    ``weight`` is a number or one per query token, (n_q,) in the order of the tokens; the weights of a token sum to 1. ``peers``
    adds keys of other batch rows. ``rows`` are the batch rows it is for, counted among those of the plan; None = all.
    """

    queries: Tokens
    keys: tuple[KeyGroup, ...]
    weight: float | Tensor = 1.0
    peers: Peers | None = None
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", sorted_tokens(self.queries))
        object.__setattr__(self, "keys", tuple(self.keys))

    def why_not(self, name: str, n_k: int, heads: int | None) -> Iterable[str]:
        """What is wrong with its keys in a call of this size."""
        seen: Spans = ()
        sound = True
        for number, group in enumerate(self.keys):
            group_name = f"{name}, key group {number}"
            wrong = list(group.why_not(group_name, n_k, heads))
            yield from wrong
            sound &= not wrong
            these = spans(group.tokens, n_k)
            if overlap(seen, these):
                yield f"{group_name} repeats {count(overlap(seen, these))} keys of an earlier group"
            seen = join(seen, these)
        if sound and not any(group.opens(n_k) for group in self.keys):
            several = sum(not group.forbidden for group in self.keys) > 1
            if not several or not seen:
                yield f"{name} leaves its rows without a key"


def wrong_segments(
    segments: Sequence[Segment], n_q: int, n_k: int, heads: int | None, batch: int | None
) -> Iterable[str]:
    """Why segments do not fit a call of this size: every query token needs weights that sum to 1, and a key."""
    numbered = list(enumerate(segments))
    named = [row for segment in segments for row in segment.rows or ()]
    if named and (min(named) < 0 or max(named) >= (batch or math.inf)):
        yield f"segments for rows {min(named)}..{max(named)} of a batch of {batch}"
    for segment in segments:
        if segment.peers is not None:
            yield from segment.peers.why_not(n_k, batch)
    for row in range(batch or max(named) + 1) if named else (None,):
        here = [(i, segment) for i, segment in numbered if segment.rows is None or row in segment.rows]
        if numbered:
            yield from _wrong_row(here, n_q, n_k, heads)


def _wrong_row(numbered: Sequence[tuple[int, Segment]], n_q: int, n_k: int, heads: int | None) -> Iterable[str]:
    total = torch.zeros(n_q, dtype=torch.float64)
    for number, segment in numbered:
        name = f"segment {number}"
        rows = spans(segment.queries, n_q)
        yield from wrong_range(f"{name}: queries", rows, n_q)
        index = torch.cat([torch.arange(a, b) for a, b in rows] or [torch.arange(0)])
        weight = torch.as_tensor(segment.weight, dtype=torch.float64).detach().cpu()
        if weight.ndim and weight.shape != (len(index),):
            yield f"{name}: weight {tuple(weight.shape)} for {len(index)} query tokens"
        elif weight.isnan().any() or (weight < 0).any():
            yield f"{name}: a weight is negative or NaN"
        else:
            inside = (index >= 0) & (index < n_q)
            total.index_add_(0, index[inside], weight.expand(len(index))[inside])
        yield from segment.why_not(name, n_k, heads)
    bare = int((total == 0).sum())
    if bare:
        yield f"{bare} of {n_q} query tokens are in no segment, the first is {int((total == 0).nonzero()[0])}"
    uneven = (total != 0) & ((total - 1).abs() > 1e-5)
    if uneven.any():
        first = int(uneven.nonzero()[0])
        yield f"the weights of {int(uneven.sum())} query tokens do not sum to 1, token {first}: {float(total[first]):.6g}"
