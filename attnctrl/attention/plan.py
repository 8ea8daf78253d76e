"""What happens in one attention call, as plain frozen values.

A ``Plan`` says who attends to whom (segments of query tokens x groups of key tokens, each with a log-bias), which
heads are blended toward a target (lerps), and what scales the heads. It knows nothing of how that is computed:
``engine.run`` computes it around fused attention, ``oracle.dense`` with explicit N x N matrices. Values are never
written to after construction; to change a strength make a new plan, or keep a tensor and name its ``heads`` (see
``Lerp``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from attnctrl.attention.groups import size_text
from attnctrl.attention.masks import FORBIDS, additive, as_mask, with_mask
from attnctrl.attention.relations import KeyGroup, Peers, Segment, wrong_segments
from attnctrl.attention.targets import Lerp, Mode, NegativeText, Norm, Target, Watch, wrong_heads
from attnctrl.errors import AttnCtrlError


__all__ = [
    "FORBIDS",
    "KeyGroup",
    "Lerp",
    "Mode",
    "NegativeText",
    "Norm",
    "Peers",
    "Plan",
    "Segment",
    "Target",
    "Watch",
    "additive",
    "as_mask",
    "with_mask",
]


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
            *dict.fromkeys(wrong_segments(self.segments, n_q, n_k, heads, self._batch(batch))),
            *self._wrong_lerps(n_q, n_k, heads, batch),
        ]
        if self.negative is not None:
            wrong += self.negative.why_not(n_q, n_k)
            wrong += ["segments and a negative text exclude each other"] if self.segments else []
        if self.head_scale is not None:
            wrong += wrong_heads("head_scale", self.head_scale, heads, self._batch(batch))
        if wrong:
            listed = "".join(f"\n  - {reason}" for reason in wrong)
            raise AttnCtrlError(
                f"the plan does not fit {n_q} query and {n_k} key tokens:{listed}\nHINT: {self.describe()}"
            )

    def describe(self) -> str:
        """One line for people."""
        parts = []
        if self.segments:
            sizes = [size_text(segment.queries) for segment in self.segments]
            shown = " + ".join(sizes[:6]) + (" + ..." if len(sizes) > 6 else "")
            peers = ", some with keys of other rows" if any(segment.peers for segment in self.segments) else ""
            parts.append(f"{len(sizes)} segment{'s' if len(sizes) > 1 else ''} ({shown} query tokens){peers}")
        if self.negative is not None:
            n = self.negative
            parts.append(f"negative text, scale {n.scale:g}, tau {n.tau:g}, alpha {n.alpha:g}, {n.norm}")
        for lerp in self.lerps:
            if lerp.heads:
                parts.append(lerp.describe())
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

    def _wrong_lerps(self, n_q: int, n_k: int, heads: int | None, batch: int | None) -> Iterable[str]:
        for watch in self.watches:
            yield from watch.why_not(n_q, n_k)
        for number, lerp in enumerate(self.lerps):
            if isinstance(lerp, Lerp):
                yield from lerp.why_not(f"lerp {number} ({lerp.target})", n_q, n_k, heads, self._batch(batch))
