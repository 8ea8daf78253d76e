"""Emphasis on spans of a prompt.

Zhang et al., "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs", 2023, arXiv 2311.02262.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention.rows import Bias, RowEdit
from ..errors import AttnCtrlError
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Prompt, check_strength, find_span, per_head, scaled


@dataclass(frozen=True, eq=False)
class PASTA(LanguageControl):
    """Multiplies the probability of chosen tokens by alpha and normalises each row again, in all rows:

        p_j <- alpha^(strength·c_j)·p_j / C

    With mode "emphasize" c_j = 1 for all tokens of the prompt outside the spans (the paper's way, so alpha < 1 raises the spans); with
    "scale" c_j = 1 inside the spans. Several spans count as their union, once. Works on text-only models too.

    Args:
        spans: words of the prompt ("the red cat": every occurrence; needs `tokenizer`), token ranges (start, stop) of the prompt
            without its padding, or a list of both. A list of such lists gives one to each prompt of the batch.
        heads: heads found for the task (the paper profiles them); their weights multiply the strength. None takes all of `layers`.
        alpha: 0.01 in the paper; 0.9 to 0.95 with all heads in a follow-up. 1 is off.
        mode: "emphasize" or "scale".
        layers: None for all.
        strength: 0 (off) to 1.
        include_generated: count what the model writes among the tokens outside, for "emphasize"; the authors' code does not.
        tokenizer: reads words; only its `decode` is used.
    """

    spans: Any
    heads: HeadSet | str | Iterable | None = None
    alpha: float = 0.01
    mode: Literal["emphasize", "scale"] = "emphasize"
    layers: str | int | Iterable[int] | None = None
    strength: float = 1.0
    include_generated: bool = False
    tokenizer: Any = None

    needs_image = False

    def __post_init__(self) -> None:
        wrong = [] if 0 < self.alpha < math.inf else [f"alpha={self.alpha} is not a finite number above 0"]
        if self.mode not in ("emphasize", "scale"):
            wrong.append(f"mode={self.mode!r} is neither 'emphasize' nor 'scale'")
        if self.mode == "scale" and self.include_generated:
            wrong.append("include_generated belongs to mode 'emphasize'")
        found = self._lists()
        if not found or not all(found):
            wrong.append("spans are empty")
        flat = [span for one in found for span in one]
        wrong += [f"{span!r} is no span" for span in flat if not isinstance(span, str) and not _is_range(span)]
        if any(isinstance(span, str) for span in flat) and self.tokenizer is None:
            wrong.append("spans of words need tokenizer=")
        check_strength("PASTA", self.strength, wrong)

    @property
    def neutral(self) -> bool:
        return self.alpha == 1 or self.strength == 0

    def _lists(self) -> list[list]:
        """Spans per prompt; a single list is for all of them."""
        if isinstance(self.spans, str) or _is_range(self.spans):
            return [[self.spans]]
        if not isinstance(self.spans, Sequence):
            raise AttnCtrlError(f"PASTA: spans={self.spans!r}\nHINT: spans='a red cat', (5, 9) or [(5, 9), (12, 14)]")
        nested = [
            one for one in self.spans if isinstance(one, Sequence) and not isinstance(one, str) and not _is_range(one)
        ]
        if nested and len(nested) < len(self.spans):
            raise AttnCtrlError("PASTA: spans mixes lists per prompt with spans for all\nHINT: one list per prompt")
        return [list(one) for one in self.spans] if nested else [list(self.spans)]

    def read(self, prompt: Prompt) -> None:
        lists = self._lists()
        prompts = prompt.batch // prompt.copies
        if len(lists) == 1:
            lists = lists * prompts
        if len(lists) != prompts:
            raise AttnCtrlError(f"PASTA has spans for {len(lists)} prompts, the batch has {prompts}")
        mask = torch.zeros_like(prompt.valid, device="cpu")
        valid = prompt.valid.cpu()
        for row in range(prompt.batch):
            places = valid[row].nonzero().flatten()
            for span in lists[row // prompt.copies]:
                for start, stop in self._ranges(span, prompt, row, places):
                    mask[row, places[start:stop]] = True
        prompt.notes[self] = mask.to(prompt.valid.device)

    def _ranges(self, span: Any, prompt: Prompt, row: int, places: Tensor) -> list[tuple[int, int]]:
        """Token ranges among the prompt's tokens without padding."""
        if isinstance(span, str):
            if prompt.ids is None:
                raise AttnCtrlError("PASTA finds words in input_ids, and the model was called with embeddings")
            return find_span(self.tokenizer, prompt.ids[row].cpu()[places].tolist(), span)
        start, stop = span
        if not 0 <= start < stop <= len(places):
            raise AttnCtrlError(
                f"PASTA: span ({start}, {stop}) does not lie in prompt {row} of {len(places)} tokens\nHINT: 0 <= start < stop"
            )
        return [(start, stop)]

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        heads, by = per_head(weights)
        spans = prompt.notes[self]
        if self.mode == "scale":
            chosen = prompt.keys(spans, n_k)
        else:
            outside = ~spans if self.include_generated else ~spans & ~prompt.whole.generated
            chosen = prompt.keys(outside, n_k, beyond=self.include_generated)
        bias = chosen.float() * (math.log(self.alpha) * self.strength)
        return (RowEdit(Bias(scaled(bias, by)), None, heads),)


def _is_range(span: Any) -> bool:
    whole = isinstance(span, (tuple, list)) and len(span) == 2
    return whole and all(isinstance(end, int) and not isinstance(end, bool) for end in span)
