"""What happens in one attention call, as plain frozen values.

A ``Plan`` says who attends to whom (segments of query tokens x groups of key tokens, each with a log-bias), which
heads are blended toward a target (lerps), and what scales the heads. It knows nothing of how that is computed:
``engine.run`` computes it around fused attention, ``oracle.dense`` with explicit N x N matrices. Values are never
written to after construction; to change a strength make a new plan, or keep a tensor and name its ``heads`` (see
``Lerp``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attnctrl.attention.groups import Spans, Tokens, as_tokens, count, join, overlap, spans
from attnctrl.attention.smoothing import kernel_width
from attnctrl.errors import AttnCtrlError


Target = Literal["identity", "uniform", "mean_query", "argmax", "smoothed"]
Mode = Literal["mask", "mass"]
Norm = Literal["l2", "l1"]
FORBIDS = -5e3  # models write "may not attend" as -inf, as the dtype's minimum or as -10000, which bfloat16 rounds


@dataclass(frozen=True, eq=False)
class KeyGroup:
    """Key tokens and what is added to their logits.

    ``bias`` is a number (-inf forbids the group), or a tensor: per key (n,) or (B|1, H|1, n), -inf allowed per key; or
    with a last dimension of 1 (or no dimension) one bias for the whole group, e.g. per sample (B, 1, 1). A tensor bias
    is rounded to the dtype of q where the kernel demands that.
    """

    tokens: Tokens
    bias: float | Tensor = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _sorted_tokens(self.tokens))

    @cached_property
    def alone(self) -> Plan:
        """Every row attends to this group and nothing else."""
        return Plan((Segment(slice(0, None), (self,)),))

    @property
    def forbidden(self) -> bool:
        return not isinstance(self.bias, Tensor) and self.bias == -math.inf


@dataclass(frozen=True, eq=False)
class Peers:
    """Keys and values of other batch rows, which a segment's queries see behind their own keys.

    Rows are those that the plan is for, counted from 0; none borrows from itself, and borrowed keys stay as their row made them
    (with its positions). Attention is not causal then.

    Args:
        tokens: key tokens that a row lends: one set for all rows, or one per row.
        reference: "batch", every row borrows from all others; "first", the others borrow from the first row.
        bias: added to the logits of borrowed keys.
        instead: own key tokens that a row with borrowed keys does not see.
        dropout: probability with which a token is not lent, drawn once per row from ``seed``.
    """

    tokens: Tokens | tuple[Tokens, ...]
    reference: Literal["batch", "first"] = "batch"
    bias: float = 0.0
    instead: Tokens | None = None
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.reference not in ("batch", "first"):
            wrong.append(f"reference {self.reference!r} is neither 'batch' nor 'first'")
        if not self.bias < math.inf:
            wrong.append(f"bias {self.bias} is not a number below infinity")
        if not 0 <= self.dropout <= 1:
            wrong.append(f"dropout {self.dropout} is not between 0 and 1")
        if wrong:
            raise AttnCtrlError("; ".join(wrong))
        tokens = self.tokens
        several = isinstance(tokens, (tuple, list))
        sets = tuple(map(_sorted_tokens, tokens)) if several else _sorted_tokens(tokens)
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

    def why_not(self, n_k: int, batch: int | None) -> Iterable[str]:
        """Why it does not fit a call of this size."""
        if batch == 1:
            yield "a batch of one row has no other rows to borrow keys from"
        sets = self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)
        if isinstance(self.tokens, tuple) and batch not in (None, len(sets)):
            yield f"lent tokens of {len(sets)} rows for a batch of {batch}"
        for tokens in sets:
            yield from _wrong_range("lent keys", spans(tokens, n_k), n_k)
        if self.instead is not None:
            yield from _wrong_range("keys to do without", spans(self.instead, n_k), n_k)


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
        object.__setattr__(self, "queries", _sorted_tokens(self.queries))
        object.__setattr__(self, "keys", tuple(self.keys))


@dataclass(frozen=True, eq=False)
class Lerp:
    """Blend heads toward a target, before the output projection: ``out_h <- lerp(out_h, target_h, strength_h)``.

    | target | the row becomes |
    |---|---|
    | identity | its own value, v_i (GQA: of its key head) |
    | uniform | the mean of v over the keys it may attend to |
    | mean_query | attention of q̄, the mean query of all rows (of the region), over the keys it may attend to |
    | argmax | v of its largest logit |
    | smoothed | attention of its query blurred over the image ``grid`` with ``sigma`` tokens, over the keys it may attend to |

    For "smoothed" the rows of the region, else of the whole sequence, are the grid: (rows, columns), or
    (frames, rows, columns) with every frame blurred apart. ``sigma`` infinity is "mean_query"; a sigma whose kernel is
    one token wide blurs nothing and touches no head.

    ``region`` (image tokens of a joint sequence, n_q == n_k) edits only these query rows and perturbs only these keys;
    the attention to the rest R of the keys stays:

        identity, mode "mask"      w_i v_i + (1 - w_i) o_i^R,   w_i = sigmoid(s_ii - lse_i^R)     logits of the others -inf
        identity, mode "mass"      m_i v_i + (1 - m_i) o_i^R,   m_i = the row's mass on the region
        uniform, argmax            m_i t_i + (1 - m_i) o_i^R,   t_i over the region's keys         always by mass; mode is not read
        mean_query                 q̄ over the region's rows, all keys
        smoothed                   all keys

    ``strength`` is (H,) or (B, H), 0 = off, 1 = full; a head with strength 0 is not touched. Which heads are touched
    at all is read from the values at construction, so keep strengths on the CPU (no synchronisation; they are tiny).
    Name ``heads`` yourself to keep a tensor whose values change in place, or to build the value inside a compiled
    function: then nothing is read.
    """

    target: Target
    strength: Tensor
    region: Tokens | None = None
    mode: Mode = "mask"
    heads: tuple[int, ...] | None = None
    sigma: float = math.inf
    grid: tuple[int, ...] | None = None
    full: bool = field(init=False, default=False)  # every head of every row has strength 1, known at construction
    everywhere: bool = field(init=False, default=False)  # no row has strength 0 in these heads, known at construction

    def __post_init__(self) -> None:
        wrong = []
        if self.target not in get_args(Target):
            wrong.append(f"target {self.target!r} is not one of {', '.join(get_args(Target))}")
        if self.mode not in get_args(Mode):
            wrong.append(f"mode {self.mode!r} is not one of {', '.join(get_args(Mode))}")
        if not isinstance(self.strength, Tensor) or self.strength.ndim not in (1, 2):
            found = tuple(self.strength.shape) if isinstance(self.strength, Tensor) else repr(self.strength)
            wrong.append(f"strength is a tensor (H,) or (B, H), got {found}")
        wrong += self._wrong_smoothing()
        if wrong:
            raise AttnCtrlError("; ".join(wrong))
        if self.target == "smoothed" and self.sigma == math.inf:
            object.__setattr__(self, "target", "mean_query")
        if self.region is not None:
            object.__setattr__(self, "region", _sorted_tokens(self.region))
        if self.heads is None:
            values = self.strength.detach().cpu().reshape(-1, self.strength.shape[-1])
            object.__setattr__(self, "heads", tuple((values != 0).any(0).nonzero().flatten().tolist()))
            object.__setattr__(self, "everywhere", bool((values[:, list(self.heads)] != 0).all()))
            object.__setattr__(self, "full", bool((values == 1).all()) and values.numel() > 0)
        else:
            object.__setattr__(self, "heads", tuple(sorted(set(self.heads))))
        if self.target == "smoothed" and all(kernel_width(n, self.sigma) == 1 for n in self.grid[-2:]):
            for name, value in (("heads", ()), ("full", False), ("everywhere", False)):
                object.__setattr__(self, name, value)

    @property
    def of_queries(self) -> bool:
        """The target is attention of other queries: any keys will do, and a region is one of rows."""
        return self.target in ("mean_query", "smoothed")

    def _wrong_smoothing(self) -> Iterable[str]:
        if self.target != "smoothed":
            if self.sigma != math.inf:
                yield f"sigma {self.sigma} belongs to target 'smoothed', not {self.target!r}"
            return
        if not self.sigma > 0:
            yield f"sigma {self.sigma} is not above 0"
        if self.grid is None and self.sigma != math.inf:
            yield "target 'smoothed' needs the grid, (rows, columns) or (frames, rows, columns)"
        if self.grid is not None and (len(self.grid) not in (2, 3) or any(n < 1 for n in self.grid)):
            yield f"grid {self.grid} is not (rows, columns) or (frames, rows, columns)"


@dataclass(frozen=True, eq=False)
class Watch:
    """Stands among the lerps of a plan and edits nothing: ``see`` gets the probability that ``queries`` give to sets of keys.

    ``see((B, n, sets))`` is called once per run, with the mean over heads in float32 (float64), for the rows that the plan is for.
    It is plain attention under the model's mask, whatever the plan makes of it.
    """

    queries: Tokens
    keys: tuple[Tokens, ...]
    see: Callable[[Tensor], None]
    heads: ClassVar[tuple[int, ...]] = ()  # that it touches
    region: ClassVar[None] = None


@dataclass(frozen=True, eq=False)
class NegativeText:
    """Attention pushed away from a negative text: NAG, normalized attention guidance, arXiv 2505.21179, eqs. 7-10.

    With Z+ and Z- the attention output of an image row, all heads together, given the positive or the negative text,

        Z~ = s Z+ - (s - 1) Z-,   r = |Z~| / |Z+|,   Z^ = Z~ min(r, tau) / r,   row = alpha Z^ + (1 - alpha) Z+

    The norm runs over all H * D_v channels of a row. ``scale`` 1 or ``alpha`` 0 is Z+.

    Args:
        image: query tokens of the image. In a joint sequence (n_q == n_k) there are other rows: those of the negative text
            see all but the positive text, the rest all but the negative. If every query is image, this is
            cross-attention.
        positive, negative: key tokens of the prompt and of the negative prompt. Image rows share all other keys.
        scale: s. tau: bound of the norm's growth. alpha: share of the guided output, 0 to 1.
        norm: "l2" or "l1".

    Lerps come after it; what their rows may attend to is what they may with the positive text.
    """

    image: Tokens
    positive: Tokens
    negative: Tokens
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        wrong = []
        if not math.isfinite(self.scale):
            wrong.append(f"scale {self.scale} is not finite")
        if not 0 < self.tau < math.inf:
            wrong.append(f"tau {self.tau} is not above 0 and finite")
        if not 0 <= self.alpha <= 1:
            wrong.append(f"alpha {self.alpha} is not between 0 and 1")
        if self.norm not in get_args(Norm):
            wrong.append(f"norm {self.norm!r} is not one of {', '.join(get_args(Norm))}")
        if wrong:
            raise AttnCtrlError("; ".join(wrong))
        for name in ("image", "positive", "negative"):
            object.__setattr__(self, name, _sorted_tokens(getattr(self, name)))

    def why_not(self, n_q: int, n_k: int) -> Iterable[str]:
        """Why it does not fit a call of this size."""
        image, positive, negative = spans(self.image, n_q), spans(self.positive, n_k), spans(self.negative, n_k)
        for name, these, n in (("image", image, n_q), ("positive", positive, n_k), ("negative", negative, n_k)):
            yield from _wrong_range(f"negative text: {name}", these, n)
            if not these:
                yield f"negative text: {name} is empty"
        if overlap(positive, negative):
            yield f"negative text: {count(overlap(positive, negative))} keys are positive and negative"
        if image == ((0, n_q),):
            return
        text = join(positive, negative)
        if n_q != n_k:
            yield f"negative text: image is {count(image)} of {n_q} queries; in cross-attention it is all of them"
        elif overlap(image, text):
            yield f"negative text: {count(overlap(image, text))} tokens are image and text"


@dataclass(frozen=True, eq=False)
class Plan:
    """One attention call: segments or a negative text (neither = plain attention), then lerps in order, then the head
    scale (H,) or (B, H). All of it under the model's own ``mask``, see ``with_mask``.
    """

    segments: tuple[Segment, ...] = ()
    lerps: tuple[Lerp | Watch, ...] = ()
    head_scale: Tensor | None = None
    rows: tuple[int, ...] | None = None  # batch rows the plan is for; None = all
    negative: NegativeText | None = None
    mask: Tensor | None = None  # (B|1, H|1, 1|n_q, n_k), as the model passes it
    key_bias: Tensor | None = None  # (B|1, H|1, n_k), what it adds to each key's logit; None where it tells rows apart
    programs: dict = field(init=False, default_factory=dict, repr=False)  # program.resolve's, by length

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        object.__setattr__(self, "lerps", tuple(self.lerps))
        if self.rows is not None:
            object.__setattr__(self, "rows", tuple(self.rows))

    @property
    def is_plain(self) -> bool:
        """Nothing is edited: the model's own attention call."""
        whole = len(self.segments) == 0 and self.negative is None and self.mask is None and not self.watches
        return whole and self.head_scale is None and all(len(lerp.heads) == 0 for lerp in self.lerps)

    @property
    def watches(self) -> tuple[Watch, ...]:
        return tuple(lerp for lerp in self.lerps if isinstance(lerp, Watch))

    @property
    def by_row(self) -> bool:
        """Rows have keys of other rows, or segments of their own."""
        return any(segment.peers is not None or segment.rows is not None for segment in self.segments)

    def on(self, *rows: int) -> Plan:
        """The same plan for these batch rows."""
        if self.mask is not None:
            raise AttnCtrlError(
                "the rows of a plan are chosen before its mask\nHINT: with_mask(plan.on(...), mask, ...)"
            )
        return replace(self, rows=rows)

    def check(self, n_q: int, n_k: int, heads: int | None = None, batch: int | None = None) -> None:
        """Raise AttnCtrlError with every reason why the plan does not fit; reads tensors, so call it once, not per
        step.
        """
        wrong = [
            *self._wrong_rows(batch),
            *dict.fromkeys(self._wrong_segments(n_q, n_k, heads, self._batch(batch))),
            *self._wrong_lerps(n_q, n_k, heads, batch),
        ]
        if self.negative is not None:
            wrong += self.negative.why_not(n_q, n_k)
            wrong += ["segments and a negative text exclude each other"] if self.segments else []
        if self.head_scale is not None:
            wrong += _wrong_heads("head_scale", self.head_scale, heads, self._batch(batch))
        if wrong:
            listed = "".join(f"\n  - {reason}" for reason in wrong)
            raise AttnCtrlError(
                f"the plan does not fit {n_q} query and {n_k} key tokens:{listed}\nHINT: {self.describe()}"
            )

    def describe(self) -> str:
        """One line for people."""
        parts = []
        if self.segments:
            sizes = [_size(segment.queries) for segment in self.segments]
            shown = " + ".join(sizes[:6]) + (" + ..." if len(sizes) > 6 else "")
            peers = ", some with keys of other rows" if any(segment.peers for segment in self.segments) else ""
            parts.append(f"{len(sizes)} segment{'s' if len(sizes) > 1 else ''} ({shown} query tokens){peers}")
        if self.negative is not None:
            n = self.negative
            parts.append(f"negative text, scale {n.scale:g}, tau {n.tau:g}, alpha {n.alpha:g}, {n.norm}")
        for lerp in self.lerps:
            if lerp.heads:
                low, high = float(lerp.strength.min()), float(lerp.strength.max())
                strength = f"{high:g}" if low in (high, 0.0) else f"{low:g}..{high:g}"
                mode = "" if lerp.of_queries else f", {lerp.mode}"
                where = "" if lerp.region is None else f", {_size(lerp.region)} region tokens{mode}"
                target = f"smoothed (sigma {lerp.sigma:g})" if lerp.target == "smoothed" else lerp.target
                parts.append(f"{target} {strength} on heads {','.join(map(str, lerp.heads))}{where}")
        if self.head_scale is not None:
            parts.append("head scale")
        if self.mask is not None:
            parts.append("under a mask" if self.key_bias is None else "under a key mask")
        rows = "" if self.rows is None else f" (rows {','.join(map(str, self.rows))})"
        return ("; ".join(parts) or "plain attention") + rows

    def _batch(self, batch: int | None) -> int | None:
        return len(self.rows) if self.rows is not None else batch

    def _wrong_rows(self, batch: int | None) -> Iterable[str]:
        if self.rows is None:
            return
        if len(set(self.rows)) != len(self.rows) or not self.rows:
            yield f"rows {self.rows} are empty or repeat"
        if any(row < 0 or (batch is not None and row >= batch) for row in self.rows):
            yield f"rows {self.rows} are not all in a batch of {batch if batch is not None else 'any size'}"

    def _wrong_segments(self, n_q: int, n_k: int, heads: int | None, batch: int | None) -> Iterable[str]:
        numbered = list(enumerate(self.segments))
        named = [row for segment in self.segments for row in segment.rows or ()]
        if named and (min(named) < 0 or max(named) >= (batch or math.inf)):
            yield f"segments for rows {min(named)}..{max(named)} of a batch of {batch}"
        for _, segment in numbered:
            if segment.peers is not None:
                yield from segment.peers.why_not(n_k, batch)
        for row in range(batch or max(named) + 1) if named else (None,):
            here = [(i, segment) for i, segment in numbered if segment.rows is None or row in segment.rows]
            yield from self._wrong_row(here, n_q, n_k, heads)

    def _wrong_row(self, numbered: list[tuple[int, Segment]], n_q: int, n_k: int, heads: int | None) -> Iterable[str]:
        if not self.segments:
            return
        total = torch.zeros(n_q, dtype=torch.float64)
        for number, segment in numbered:
            name = f"segment {number}"
            rows = spans(segment.queries, n_q)
            yield from _wrong_range(f"{name}: queries", rows, n_q)
            index = torch.cat([torch.arange(a, b) for a, b in rows] or [torch.arange(0)])
            weight = torch.as_tensor(segment.weight, dtype=torch.float64).detach().cpu()
            if weight.ndim and weight.shape != (len(index),):
                yield f"{name}: weight {tuple(weight.shape)} for {len(index)} query tokens"
            elif weight.isnan().any() or (weight < 0).any():
                yield f"{name}: a weight is negative or NaN"
            else:
                inside = (index >= 0) & (index < n_q)
                total.index_add_(0, index[inside], weight.expand(len(index))[inside])
            yield from self._wrong_keys(name, segment, n_k, heads)
        bare = int((total == 0).sum())
        if bare:
            yield f"{bare} of {n_q} query tokens are in no segment, the first is {int((total == 0).nonzero()[0])}"
        uneven = (total != 0) & ((total - 1).abs() > 1e-5)
        if uneven.any():
            first = int(uneven.nonzero()[0])
            yield f"the weights of {int(uneven.sum())} query tokens do not sum to 1, token {first}: {float(total[first]):.6g}"

    def _wrong_keys(self, name: str, segment: Segment, n_k: int, heads: int | None) -> Iterable[str]:
        seen: Spans = ()
        open_keys = False
        for number, group in enumerate(segment.keys):
            group_name = f"{name}, key group {number}"
            these = spans(group.tokens, n_k)
            yield from _wrong_range(group_name, these, n_k)
            if overlap(seen, these):
                yield f"{group_name} repeats {count(overlap(seen, these))} keys of an earlier group"
            seen = join(seen, these)
            if isinstance(group.bias, Tensor):
                bias = group.bias.detach()
                if bias.ndim not in (0, 1, 3) or (bias.ndim and bias.shape[-1] not in (1, count(these))):
                    yield f"{group_name}: bias {tuple(bias.shape)} for {count(these)} keys; (n,) or (B|1, H|1, n)"
                elif bias.ndim == 3 and heads is not None and bias.shape[1] not in (1, heads):
                    yield f"{group_name}: bias {tuple(bias.shape)} for {heads} heads"
                elif bias.isnan().any() or (bias == math.inf).any():
                    yield f"{group_name}: bias holds NaN or +inf"
                else:
                    alive = (
                        (bias > -math.inf).reshape(-1, bias.shape[-1]) if bias.ndim else (bias > -math.inf)[None, None]
                    )
                    open_keys |= bool(alive.any(-1).all()) and count(these) > 0
            elif math.isnan(group.bias) or group.bias == math.inf:
                yield f"{group_name}: bias {group.bias}"
            else:
                open_keys |= not group.forbidden and count(these) > 0
        if not open_keys:
            several = sum(not group.forbidden for group in segment.keys) > 1
            if not several or not seen:
                yield f"{name} leaves its rows without a key"

    def _wrong_lerps(self, n_q: int, n_k: int, heads: int | None, batch: int | None) -> Iterable[str]:
        for watch in self.watches:
            yield from _wrong_range("watch: queries", spans(watch.queries, n_q), n_q)
            for tokens in watch.keys:
                yield from _wrong_range("watch: keys", spans(tokens, n_k), n_k)
        for number, lerp in enumerate(self.lerps):
            if isinstance(lerp, Watch):
                continue
            name = f"lerp {number} ({lerp.target})"
            yield from _wrong_heads(f"{name}: strength", lerp.strength, heads, self._batch(batch))
            if not bool(lerp.strength.isfinite().all()):
                yield f"{name}: a strength is not finite"
            if lerp.heads and heads is not None and lerp.heads[-1] >= heads:
                yield f"{name}: head {lerp.heads[-1]} of {heads}"
            if n_q != n_k and (lerp.target == "identity" or (lerp.region is not None and not lerp.of_queries)):
                yield f"{name}{'' if lerp.region is None else ' with a region'} needs as many queries as keys"
            if lerp.region is not None:
                region = spans(lerp.region, n_q)
                yield from _wrong_range(f"{name}: region", region, n_q)
                if not region:
                    yield f"{name}: the region is empty"
            if lerp.target == "smoothed":
                rows = n_q if lerp.region is None else count(spans(lerp.region, n_q))
                if rows != math.prod(lerp.grid):
                    yield f"{name}: a grid of {' x '.join(map(str, lerp.grid))} for {rows} rows"


def with_mask(plan: Plan, mask: Tensor, n_q: int, n_k: int) -> Plan:
    """The plan under the mask that a model passes itself.

    A mask that treats all rows alike (padded keys) is a bias per key: segments, regions, negative text and every
    target stay exact. So is one that also hides everything from padded rows; these come out as if they saw the open
    keys. One that tells other rows apart goes with lerps alone: mean_query and smoothed, and for the whole sequence
    identity and uniform (the mean over the keys allowed to the row).

    Args:
        mask: bool, True = may attend, or what is added to the logits; any shape that broadcasts to (B, H, n_q, n_k),
            with B the plan's rows. Whether rows are alike is read from the values unless the mask has one row (or
            stride 0), so keep the result for all calls with this mask. The plan's programs are shared.

    Raises AttnCtrlError if the mask does not fit, or tells rows apart and the plan cannot follow.
    """
    if plan.mask is not None:
        raise AttnCtrlError("the plan already has a mask\nHINT: with_mask(plan without a mask, mask, ...)")
    mask = as_mask(mask, n_q, n_k)
    if plan.rows is not None and mask.shape[0] not in (1, len(plan.rows)):
        raise AttnCtrlError(
            f"a mask of {mask.shape[0]} batch rows for a plan of {len(plan.rows)}\nHINT: mask[list(plan.rows)]"
        )
    keys = _of_keys(mask)
    if keys is None:
        wrong = ["segments"] if plan.segments else []
        wrong += ["a negative text"] if plan.negative is not None else []
        active = [lerp for lerp in plan.lerps if lerp.heads]
        wrong += [f"{lerp.target} in a region" for lerp in active if lerp.region is not None and not lerp.of_queries]
        wrong += ["target argmax"] if any(lerp.target == "argmax" for lerp in active) else []
        if wrong:
            raise AttnCtrlError(
                f"the model masks pairs of tokens ({' x '.join(map(str, mask.shape))}), and the plan has {', '.join(wrong)}\n"
                "HINT: under such a mask lerps to mean_query and smoothed work, and to identity and uniform without a region"
            )
    masked = replace(plan, mask=mask, key_bias=None if keys is None else additive(keys)[:, :, 0])
    object.__setattr__(masked, "programs", plan.programs)
    return masked


def as_mask(mask: Tensor, n_q: int, n_k: int) -> Tensor:
    """The mask as (B|1, H|1, 1|n_q, n_k)."""
    full = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)) if mask.ndim <= 4 else mask
    fits = full.ndim == 4 and full.shape[2] in (1, n_q) and full.shape[3] in (1, n_k)
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise AttnCtrlError(
            f"a mask is bool or float and broadcasts to (B, H, {n_q}, {n_k}), got {tuple(mask.shape)} {mask.dtype}"
        )
    return full.expand(-1, -1, -1, n_k)


def _of_keys(mask: Tensor) -> Tensor | None:
    """The mask as (B|1, H|1, 1, n_k) if all rows are alike, but for those that may attend to nothing."""
    first = mask[:, :, :1]
    if mask.shape[2] == 1 or mask.stride(2) == 0 or bool((mask == first).all()):
        return first
    if mask.dtype != torch.bool:
        forbidden = mask <= FORBIDS
        if not bool(((mask == 0) | forbidden).all()):
            return None
        mask = ~forbidden
    keys = mask.any(2, keepdim=True)
    return keys if bool((mask == keys & mask.any(3, keepdim=True)).all()) else None


def additive(mask: Tensor) -> Tensor:
    """What a mask adds to the logits, -inf where it forbids."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    return mask.masked_fill(mask <= FORBIDS, -math.inf)


def _sorted_tokens(tokens: Tokens) -> Tokens:
    """Weights and biases follow the order of the tokens, so nothing may be sorted in silence."""
    if isinstance(tokens, Tensor) and tokens.dtype != torch.bool and bool((tokens.flatten().diff() <= 0).any()):
        raise AttnCtrlError("an index tensor is sorted and without duplicates\nHINT: as_tokens(index) makes it so")
    return as_tokens(tokens)


def _wrong_range(name: str, these: Spans, n: int) -> Iterable[str]:
    if these and (these[0][0] < 0 or these[-1][1] > n):
        yield f"{name}: tokens {these[0][0]}..{these[-1][1] - 1} reach outside 0..{n - 1}"


def _wrong_heads(name: str, value: Tensor, heads: int | None, batch: int | None) -> Iterable[str]:
    if value.ndim not in (1, 2) or (heads is not None and value.shape[-1] != heads):
        yield f"{name} is {tuple(value.shape)}, not ({heads if heads is not None else 'H'},) or (B, {heads or 'H'})"
    elif value.ndim == 2 and batch is not None and value.shape[0] not in (1, batch):
        yield f"{name} is {tuple(value.shape)} for {batch} rows"


def _size(tokens: Tokens) -> str:
    if isinstance(tokens, Tensor):
        return str(len(tokens))
    if tokens.stop is None or tokens.stop < 0 or (tokens.start or 0) < 0:
        return f"{tokens.start or 0}:{'' if tokens.stop is None else tokens.stop}"
    return str(max(0, tokens.stop - (tokens.start or 0)))
