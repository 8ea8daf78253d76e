"""Answers that do not depend on the order of marked parts of the prompt: documents, candidates, images with their captions.

Wang et al., "Eliminating Position Bias of Language Models: A Mechanistic Approach", 2024, arXiv 2407.01100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, merge
from ..errors import AttnCtrlError
from .language import LanguageControl, Model, Prompt
from .pasta import find_span


ROTATED_HALVES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
)  # rotary embedding of whole heads, first half with second
UNCHANGING = ("default", "linear", "llama3", "yarn")  # kinds of it whose frequencies do not depend on the length


@dataclass(frozen=True, eq=False)
class PINE(LanguageControl):
    """Lets neighbouring segments of the prompt see each other as if each of them came last, in all layers and heads.

    All segments end where the text behind them begins. What a row sees of them is ordered by importance, the most important nearest:
    with shift_j the length of the segments nearer than j, its tokens count as shift_j positions farther away. Rotary embeddings are
    relative, so the query is turned instead of the keys, and the parts are merged by their log-sum-exp:

        out = Σ_g softmax_g(lse_g) o_g,   (o_j, lse_j) = attention(R(shift_j) q, k_j, v_j),   prefix and own tokens plain and causal

    Importance of segment j for a row of a head: the probability of j among the segments when q and k are not rotated, by its length.
    Rows behind the segments, written ones too, order for themselves; the rows of a segment order the others together, by the sum
    over its rows, behind the segment itself. A prompt with one segment stays as it is. Takes no edits of rows beside it: HeadScale and
    VHR only.

    Args:
        segments: token ranges (start, stop) of the prompt without its padding, or their texts (needs `tokenizer`), which follow each other
            without a gap; or a list of those per prompt of a batch.
        tokenizer: reads texts; only its `decode` is used.
    """

    segments: Sequence
    tokenizer: Any = None

    needs_image: ClassVar[bool] = False
    arranges: ClassVar[bool] = True
    """True: the session asks `positions` and `arrange` instead of `row_edits`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nearest", {})  # of one attachment: `fit` makes a copy
        wrong = []
        if isinstance(self.segments, str) or not isinstance(self.segments, Sequence) or not self.segments:
            raise AttnCtrlError(f"PINE: segments={self.segments!r}\nHINT: segments=[(5, 20), (20, 41)]")
        for segment in (one for each in self._lists() for one in each):
            if isinstance(segment, str):
                wrong += ["segments as text need tokenizer="] * (self.tokenizer is None)
            elif not _is_range(segment):
                wrong.append(f"{segment!r} is no segment")
        if wrong:
            raise AttnCtrlError(f"PINE: {'; '.join(dict.fromkeys(wrong))}\nHINT: segments=[(5, 20), (20, 41)]")

    def _lists(self) -> list[list]:
        """Segments per prompt; a single list is for all of them."""
        nested = [isinstance(one, (list, tuple)) and not _is_range(one) for one in self.segments]
        if any(nested) and not all(nested):
            raise AttnCtrlError(
                "PINE: segments mixes lists per prompt with segments for all\nHINT: one list per prompt"
            )
        return [list(one) for one in self.segments] if all(nested) else [list(self.segments)]

    def fit(self, model: Model) -> PINE:
        super().fit(model)
        if model.model_type not in ROTATED_HALVES:
            raise AttnCtrlError(
                f"PINE has to know how {model.name} ({model.model_type}) rotates queries and keys\nHINT: known: {', '.join(ROTATED_HALVES)}"
            )
        return replace(self)

    def find_rotation(self, decoder: nn.Module) -> nn.Module:
        """The module that makes rotary embeddings; its frequencies are kept. Raises where they are not what PINE knows."""
        rotary = getattr(decoder, "rotary_emb", None)
        kind = getattr(rotary, "rope_type", None)
        sections = (getattr(decoder.config, "rope_parameters", None) or {}).get("mrope_section")
        if kind not in UNCHANGING or sections is not None or not isinstance(getattr(rotary, "inv_freq", None), Tensor):
            found = "in sections" if sections is not None else repr(kind)
            raise AttnCtrlError(f"PINE cannot turn the rotary embedding of {type(decoder).__name__} ({found}) back")
        object.__setattr__(self, "_rotary", rotary)
        return rotary

    def read(self, prompt: Prompt) -> None:
        valid = prompt.valid.cpu()
        prompt.notes[self, "padded"] = [not bool(row.all()) for row in valid]
        if (self, "segments") in prompt.notes:  # more of a prompt
            return
        lists, prompts = self._lists(), prompt.batch // prompt.copies
        lists = lists * prompts if len(lists) == 1 else lists
        if len(lists) != prompts:
            raise AttnCtrlError(f"PINE has segments for {len(lists)} prompts, the batch has {prompts}")
        found = []
        for row in range(prompt.batch):
            places = valid[row].nonzero().flatten().tolist()
            ranges = [self._range(one, prompt, row, places) for one in lists[row // prompt.copies]]
            ranges.sort()
            for (_, stop), (start, _) in zip(ranges, ranges[1:], strict=False):
                if start != stop:
                    raise AttnCtrlError(
                        f"PINE: segments of prompt {row} end at token {stop} and go on at {start}\n"
                        "HINT: what stands between two segments belongs to one of them"
                    )
            found.append([(places[start], places[stop - 1] + 1) for start, stop in ranges])
        prompt.notes[self, "segments"] = found

    def _range(self, segment: Any, prompt: Prompt, row: int, places: list[int]) -> tuple[int, int]:
        """A segment as a range of the prompt's tokens without padding."""
        if isinstance(segment, str):
            if prompt.ids is None:
                raise AttnCtrlError("PINE finds texts in input_ids, and the model was called with embeddings")
            ranges = find_span(self.tokenizer, prompt.ids[row].cpu()[places].tolist(), segment)
            if len(ranges) > 1:
                raise AttnCtrlError(
                    f"PINE: {segment!r} stands in prompt {row} {len(ranges)} times\nHINT: segments as token ranges"
                )
            return ranges[0]
        start, stop = segment
        if not 0 <= start < stop <= len(places):
            raise AttnCtrlError(
                f"PINE: segment ({start}, {stop}) does not lie in prompt {row} of {len(places)} tokens"
            )
        return start, stop

    def positions(self, prompt: Prompt, given: Tensor) -> Tensor:
        """Positions (B, T) of the running call's tokens, from those that the model gives them, (B|1, T): every segment ends where the
        last one does."""
        new = given.expand(prompt.batch, -1).clone()
        for row, spans in enumerate(prompt.notes[self, "segments"]):
            for start, stop in spans:
                new[row, max(start - prompt.past, 0) : max(stop - prompt.past, 0)] += spans[-1][1] - stop
        known = prompt.notes.get((self, "positions"), new)[:, : prompt.past]
        prompt.notes[self, "positions"] = torch.cat([known, new], 1)
        return new

    def arrange(
        self, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor, scale: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        """Attention (B, H, T, D_v) of a call under a causal mask: q (B, H, T, D), k and v (B, H_kv, n, D) of all positions so far.

        plain: the model's own attention; called where there are rows before the segments.
        """
        found, past, length = prompt.notes[self, "segments"], prompt.past, q.shape[2]
        if q.shape[3] != 2 * self._rotary.inv_freq.numel():
            raise AttnCtrlError(
                f"heads of {q.shape[3]} are rotated in {2 * self._rotary.inv_freq.numel()} dimensions only"
            )
        for spans in found:
            first, end = spans[0][0], spans[-1][1]
            if past < end and not (past <= first and end <= past + length):
                raise AttnCtrlError(
                    "the segments have to be read in one call of the model\nHINT: no prefill in chunks"
                )
        whole = all(len(spans) > 1 and spans[0][0] <= past for spans in found)
        out = q.new_empty(*q.shape[:3], v.shape[3]) if whole else plain().clone()
        for row, spans in enumerate(found):
            if len(spans) > 1:
                one = slice(row, row + 1)
                seen = None
                if prompt.notes[self, "padded"][row]:
                    valid = prompt.valid[row]
                    seen = F.pad(valid, (0, k.shape[2] - valid.shape[0]), value=True)
                at = prompt.notes[self, "positions"][row]
                self._arrange_one(q[one], k[one], v[one], scale, spans, at, past, seen, out[one])
        return out

    def _arrange_one(self, q, k, v, scale, spans, at: Tensor, past: int, seen: Tensor | None, out: Tensor) -> None:
        """Writes the rows of one prompt from its first segment on. at: (n,) positions. seen: (n,) keys that are no padding."""
        (first, _), (_, end) = spans[0], spans[-1]
        bias = None if seen is None else torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)
        lengths = torch.tensor([stop - start for start, stop in spans], device=q.device)

        def part(queries: Tensor, keys: slice, causal: bool = False) -> tuple[Tensor, Tensor]:
            more = {"causal": causal, "key_bias": None if bias is None else bias[keys]}
            return attend(queries, k[:, :, keys], v[:, :, keys], scale=scale, **more)

        start = max(first - past, 0)
        bare = self._turn(q[:, :, start:], -at[past + start : past + q.shape[2]])
        keys = self._turn(k[:, :, first:end], -at[first:end])
        by = scale / self._rotary.attention_scaling**2
        unrotated = torch.stack(
            [attend(bare, keys[:, :, a - first : b - first], v[:, :, a:b], scale=by)[1][0] for a, b in spans]
        )  # (segments, H, rows from start)

        def write(rows: slice, others: list[int], shifts: Tensor, own: slice) -> None:
            queries = q[:, :, rows]
            parts = [part(queries, slice(0, first)), part(queries, own, causal=True)]
            for j, shift in zip(others, shifts, strict=True):
                parts.append(part(self._turn(queries, shift), slice(*spans[j])))
            out[:, :, rows] = merge([o for o, _ in parts], [lse for _, lse in parts])[0]

        for i, (a, b) in enumerate(spans if past < end else ()):
            others = [j for j in range(len(spans)) if j != i]
            share = unrotated[others][:, :, a - past - start : b - past - start].softmax(0).sum(2, keepdim=True)
            write(slice(a - past, b - past), others, _shifts(share, lengths[others]) + lengths[i], slice(a, b))
        behind = slice(max(end - past, 0), q.shape[2])
        if behind.start < behind.stop:
            shifts = _shifts(unrotated[:, :, behind.start - start :].softmax(0), lengths)
            for j in range(len(spans)):
                self.nearest[j] = self.nearest.get(j, 0) + (shifts[j] == 0).sum()
            write(behind, list(range(len(spans))), shifts, slice(end, k.shape[2]))

    def _turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x (1, H, n, D) turned by positions (n,) or (H, n|1), as the model's rotary embedding turns it."""
        angle = by[..., None].float() * self._rotary.inv_freq.to(x.device, torch.float32)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        one, two = x.to(wide).chunk(2, -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)

    def says(self) -> tuple[str, ...]:
        total = sum(float(count) for count in self.nearest.values())
        if not total:
            return ()
        shares = ", ".join(f"{float(count) / total:.0%}" for _, count in sorted(self.nearest.items()))
        return (f"PINE: rows of heads behind the segments that had each of them nearest: {shares}",)


def _shifts(probability: Tensor, lengths: Tensor) -> Tensor:
    """For probabilities (segments, H, rows): how many tokens of more important segments lie nearer, likewise."""
    importance = probability / lengths[:, None, None]
    order = importance.argsort(dim=0, descending=True, stable=True)
    ahead = lengths[order]
    return torch.empty_like(ahead).scatter_(0, order, ahead.cumsum(0) - ahead)


def _is_range(segment: Any) -> bool:
    whole = isinstance(segment, (tuple, list)) and len(segment) == 2
    return whole and all(isinstance(end, int) and not isinstance(end, bool) for end in segment)
