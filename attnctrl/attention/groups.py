"""Token groups: sets of tokens, their algebra, and the membership signatures of overlapping regions.

A group is a ``slice`` where its tokens are a run and a sorted index tensor where they are not: a run costs a view,
scattered tokens one gather. All set algebra happens on *spans*, sorted tuples of half-open ``(start, stop)``, in plain
Python and once per plan; nothing here ever sees a query or a key.

    tokens   0 1 2 3 4 5 6 7 8 9
    group      # # #     #   # #        spans ((1, 4), (6, 7), (8, 10))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnctrl.errors import AttnCtrlError


Tokens = slice | Tensor
Spans = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """Query rows ``start:stop`` see the first ``keys`` keys; with ``causal`` the last row does, each earlier one a
    key less.
    """

    start: int
    stop: int
    keys: int
    causal: bool


def as_tokens(index: Tokens | Iterable[int]) -> Tokens:
    """The cheapest form of a token set: a slice where it is a run, else a sorted (n,) int64 tensor without duplicates.

    Takes a slice (kept, also an open one such as ``slice(64, None)``), a range, integers, an index tensor, or a bool
    mask (N,).
    """
    if isinstance(index, slice):
        if index.step not in (None, 1):
            raise AttnCtrlError(f"a token slice has step 1, got {index}\nHINT: pass range(...) instead")
        return index
    if isinstance(index, Tensor):
        if index.ndim != 1:
            raise AttnCtrlError(f"a token set is one-dimensional, got a tensor of shape {tuple(index.shape)}")
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        elif index.is_floating_point() or index.is_complex():
            raise AttnCtrlError(f"token indices are integers, got {index.dtype}")
    else:
        index = torch.tensor(sorted(index), dtype=torch.int64)
    index = index.to(torch.int64).unique(sorted=True)
    if len(index) == 0:
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index):
        return slice(first, last + 1)
    return index


def spans(tokens: Tokens, n: int | None = None) -> Spans:
    """The runs of a token set in a sequence of ``n`` tokens. Only an open or negative slice needs ``n``."""
    if isinstance(tokens, slice):
        if n is None:
            start, stop = tokens.start or 0, tokens.stop
            if stop is None or start < 0 or stop < 0:
                raise AttnCtrlError(f"{tokens} is open: its tokens depend on the length\nHINT: pass n=")
        else:
            start, stop = _ends(tokens, n)
            if tokens.stop is not None and tokens.stop > n:
                stop = tokens.stop  # out of range stays out of range: Plan.check reports it
            if tokens.start is not None and tokens.start > n:
                start = tokens.start
        return ((start, stop),) if stop > start else ()
    return runs(tokens.tolist())


def runs(index: Sequence[int]) -> Spans:
    """The runs of sorted integers: [1, 2, 3, 6] -> ((1, 4), (6, 7))."""
    found: list[tuple[int, int]] = []
    for i in index:
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return tuple(found)


def tokens_of(these: Spans, device: torch.device | str | None = None) -> Tokens:
    """The inverse of ``spans``; an index tensor lies on ``device``."""
    if not these:
        return slice(0, 0)
    if len(these) == 1:
        return slice(*these[0])
    return torch.cat([torch.arange(a, b, device=device) for a, b in these])


def count(these: Spans) -> int:
    return sum(b - a for a, b in these)


def join(*sets: Spans) -> Spans:
    """Union; touching runs become one."""
    found: list[tuple[int, int]] = []
    for a, b in sorted(run for these in sets for run in these):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(b, found[-1][1]))
        else:
            found.append((a, b))
    return tuple(found)


def overlap(left: Spans, right: Spans) -> Spans:
    """Intersection."""
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        a, b = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if a < b:
            found.append((a, b))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def minus(left: Spans, right: Spans) -> Spans:
    """The tokens of ``left`` that are not in ``right``."""
    if not left:
        return ()
    gaps, at = [], left[0][0]
    for a, b in right:
        if a > at:
            gaps.append((at, a))
        at = max(at, b)
    gaps.append((at, max(at, left[-1][1])))
    return overlap(left, tuple(gap for gap in gaps if gap[0] < gap[1]))


def positions(these: Spans, inside: Spans) -> Spans:
    """Where the tokens ``these``, a subset of ``inside``, stand when ``inside`` is gathered."""
    found, base, j = [], 0, 0
    for a, b in inside:
        while j < len(these) and these[j][0] < b:
            found.append((base + these[j][0] - a, base + these[j][1] - a))
            j += 1
        base += b - a
    return join(tuple(found))


def union(*sets: Tokens, n: int | None = None) -> Tokens:
    """Tokens that are in any of the sets; touching groups become one slice."""
    if not sets:
        return slice(0, 0)
    device = next((tokens.device for tokens in sets if isinstance(tokens, Tensor)), None)
    return tokens_of(join(*(spans(tokens, n) for tokens in sets)), device)


def signatures(masks: Tensor) -> list[tuple[tuple[int, ...], Tokens]]:
    """Tokens grouped by the regions they are in.

    Args:
        masks: (R, N) bool, the tokens of each region.

    Returns:
        One ``(signature, tokens)`` per occurring signature, in the order of their first tokens; a signature names the
        regions, ``()`` is the background. The groups are disjoint and cover all N tokens.
    """
    if masks.ndim != 2 or masks.dtype != torch.bool:
        raise AttnCtrlError(f"masks are (R, N) bool, got {tuple(masks.shape)} {masks.dtype}")
    if masks.shape[0] == 0:
        return [((), slice(0, masks.shape[1]))]
    kinds, of_token = masks.cpu().T.unique(dim=0, return_inverse=True)
    found = []
    for kind in range(len(kinds)):
        index = (of_token == kind).nonzero().flatten()
        signature = tuple(kinds[kind].nonzero().flatten().tolist())
        found.append((int(index[0]), signature, as_tokens(index.to(masks.device))))
    return [(signature, tokens) for _, signature, tokens in sorted(found, key=lambda item: item[0])]


def staircase(queries: Spans, keys: Spans, offset: int) -> tuple[Piece, ...]:
    """How causal attention of some rows over some keys falls into blocks that are full or triangular.

    Query token i stands at key position ``i + offset`` and sees no later key. In gathered order that is a staircase,
    and its runs are plain or causal (bottom-right aligned) attention, so that no mask is needed:

        keys      a a . . b b
        row 1     x                    causal  \\
        row 2     x x                          / one piece of 2 rows
        row 3, 4  x x                  full, 2 keys
        row 5     x x     x            causal, 4 keys in the last row
        row 6     x x     x x

    Scattered rows over scattered keys may give many pieces; the caller decides when that is too many.
    """
    steps: list[Piece] = []
    row = 0
    for start, stop in queries:
        for a, b, before, inside in _cuts(start + offset, stop + offset, keys):
            rows = b - a
            steps.append(Piece(row, row + rows, before + rows if inside else before, inside))
            row += rows
    merged: list[Piece] = []
    for step in steps:
        last = merged[-1] if merged else None
        if last and last.causal and step.causal and step.keys - (step.stop - step.start) == last.keys:
            merged[-1] = Piece(last.start, step.stop, step.keys, True)
        elif last and not last.causal and not step.causal and step.keys == last.keys:
            merged[-1] = Piece(last.start, step.stop, step.keys, False)
        else:
            merged.append(step)
    return tuple(Piece(*p[:3], p.causal and p.stop - p.start > 1) for p in merged)


def _cuts(start: int, stop: int, keys: Spans) -> Iterable[tuple[int, int, int, bool]]:
    """Cut the positions start:stop at the borders of the keys: (from, to, keys before, inside a run of keys?)."""
    before, at = 0, start
    for a, b in keys:
        if at >= stop:
            return
        if at < a:
            to = min(a, stop)
            yield at, to, before, False
            at = to
        if at < min(b, stop):
            to = min(b, stop)
            yield at, to, before + at - a, True
            at = to
        before += b - a
    if at < stop:
        yield at, stop, before, False


def take(x: Tensor, tokens: Tokens, dim: int = 2) -> Tensor:
    """The given tokens of x, a view for a slice; by default x is (B, H, N, D)."""
    if isinstance(tokens, slice):
        start, stop = _ends(tokens, x.shape[dim])
        return x if (start, stop) == (0, x.shape[dim]) else x.narrow(dim, start, max(0, stop - start))
    if dim == 2 and _tokens_first(x):  # whole tokens are copied at once: 1.4 times as fast
        return x.transpose(1, 2).index_select(1, tokens.to(x.device)).transpose(1, 2)
    return x.index_select(dim, tokens.to(x.device))


def put(out: Tensor, tokens: Tokens, value: Tensor, dim: int = 2) -> Tensor:
    """Write ``value`` at the given tokens of ``out``, in place."""
    if isinstance(tokens, slice):
        start, stop = _ends(tokens, out.shape[dim])
        out.narrow(dim, start, max(0, stop - start)).copy_(value)
    elif dim == 2 and _tokens_first(out):
        out.transpose(1, 2).index_copy_(1, tokens.to(out.device), value.transpose(1, 2))
    else:
        out.index_copy_(dim, tokens.to(out.device), value)
    return out


def sorted_tokens(tokens: Tokens) -> Tokens:
    """Weights and biases follow the order of the tokens, so nothing may be sorted in silence."""
    if isinstance(tokens, Tensor) and tokens.dtype != torch.bool and bool((tokens.flatten().diff() <= 0).any()):
        raise AttnCtrlError("an index tensor is sorted and without duplicates\nHINT: as_tokens(index) makes it so")
    return as_tokens(tokens)


def wrong_range(name: str, these: Spans, n: int) -> Iterable[str]:
    if these and (these[0][0] < 0 or these[-1][1] > n):
        yield f"{name}: tokens {these[0][0]}..{these[-1][1] - 1} reach outside 0..{n - 1}"


def size_text(tokens: Tokens) -> str:
    if isinstance(tokens, Tensor):
        return str(len(tokens))
    if tokens.stop is None or tokens.stop < 0 or (tokens.start or 0) < 0:
        return f"{tokens.start or 0}:{'' if tokens.stop is None else tokens.stop}"
    return str(max(0, tokens.stop - (tokens.start or 0)))


def _ends(tokens: slice, n: int) -> tuple[int, int]:
    """`slice.indices` of a step of 1; torch 2.10 cannot trace the builtin."""
    ends = (tokens.start or 0, n if tokens.stop is None else tokens.stop)
    start, stop = (max(0, end + n) if end < 0 else min(end, n) for end in ends)
    return start, stop


def _tokens_first(x: Tensor) -> bool:
    """(B, H, N, D) that lies in memory as (B, N, H, D), as projections give it."""
    return x.ndim == 4 and x.stride(2) > x.stride(1) >= x.shape[3]
