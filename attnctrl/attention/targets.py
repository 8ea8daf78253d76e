"""What becomes of an attention output, as plain frozen values: heads blended toward a target, or rows pushed away from a negative
text; and what only looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from torch import Tensor

from attnctrl.attention.groups import Tokens, count, join, overlap, size_text, sorted_tokens, spans, wrong_range
from attnctrl.attention.smoothing import kernel_width
from attnctrl.errors import AttnCtrlError


Target = Literal["identity", "uniform", "mean_query", "argmax", "smoothed"]
Mode = Literal["mask", "mass"]
Norm = Literal["l2", "l1"]


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
            object.__setattr__(self, "region", sorted_tokens(self.region))
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

    def why_not(self, name: str, n_q: int, n_k: int, heads: int | None, batch: int | None) -> Iterable[str]:
        """Why it does not fit a call of this size."""
        yield from wrong_heads(f"{name}: strength", self.strength, heads, batch)
        if not bool(self.strength.isfinite().all()):
            yield f"{name}: a strength is not finite"
        if self.heads and heads is not None and self.heads[-1] >= heads:
            yield f"{name}: head {self.heads[-1]} of {heads}"
        if n_q != n_k and (self.target == "identity" or (self.region is not None and not self.of_queries)):
            yield f"{name}{'' if self.region is None else ' with a region'} needs as many queries as keys"
        if self.region is not None:
            region = spans(self.region, n_q)
            yield from wrong_range(f"{name}: region", region, n_q)
            if not region:
                yield f"{name}: the region is empty"
        if self.target == "smoothed":
            rows = n_q if self.region is None else count(spans(self.region, n_q))
            if rows != math.prod(self.grid):
                yield f"{name}: a grid of {' x '.join(map(str, self.grid))} for {rows} rows"

    def describe(self) -> str:
        """In words, for a lerp that touches heads."""
        low, high = float(self.strength.min()), float(self.strength.max())
        strength = f"{high:g}" if low in (high, 0.0) else f"{low:g}..{high:g}"
        mode = "" if self.of_queries else f", {self.mode}"
        where = "" if self.region is None else f", {size_text(self.region)} region tokens{mode}"
        target = f"smoothed (sigma {self.sigma:g})" if self.target == "smoothed" else self.target
        return f"{target} {strength} on heads {','.join(map(str, self.heads))}{where}"

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

    def why_not(self, n_q: int, n_k: int) -> Iterable[str]:
        """Why it does not fit a call of this size."""
        yield from wrong_range("watch: queries", spans(self.queries, n_q), n_q)
        for tokens in self.keys:
            yield from wrong_range("watch: keys", spans(tokens, n_k), n_k)


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
            object.__setattr__(self, name, sorted_tokens(getattr(self, name)))

    def why_not(self, n_q: int, n_k: int) -> Iterable[str]:
        """Why it does not fit a call of this size."""
        image, positive, negative = spans(self.image, n_q), spans(self.positive, n_k), spans(self.negative, n_k)
        for name, these, n in (("image", image, n_q), ("positive", positive, n_k), ("negative", negative, n_k)):
            yield from wrong_range(f"negative text: {name}", these, n)
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


def wrong_heads(name: str, value: Tensor, heads: int | None, batch: int | None) -> Iterable[str]:
    if value.ndim not in (1, 2) or (heads is not None and value.shape[-1] != heads):
        yield f"{name} is {tuple(value.shape)}, not ({heads if heads is not None else 'H'},) or (B, {heads or 'H'})"
    elif value.ndim == 2 and batch is not None and value.shape[0] not in (1, batch):
        yield f"{name} is {tuple(value.shape)} for {batch} rows"
