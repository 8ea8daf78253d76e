"""Gaze shift guidance: the parts of the image that the question looked at, word by word, are amplified while the answer is written.

Qi et al., "Capturing Gaze Shifts for Guidance", 2025, arXiv 2510.22067.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention.rows import FAR, PATTERN, Edits, Pattern, RowEdit, Tally
from ..errors import AttnCtrlError
from ..schedule import parse_layers
from ..sites import Site
from .language import LanguageControl, Model, Prompt, check_strength, find_span


# (model type of the language model, hidden size, layers) -> saliency layer, edited layers, alpha
PUBLISHED = {
    ("llama", 4096, 32): (11, "12:23", 5.0),  # LLaVA 1.5 7B
    ("llama", 5120, 40): (10, "14:21", 5.0),  # LLaVA 1.5 13B
    ("qwen2_vl_text", 3584, 28): (14, "5:19", 4.0),  # Qwen2-VL 7B
}


@dataclass(frozen=True, eq=False)
class GIFT(LanguageControl):
    """Amplifies what the question looked at, in the last row of the prompt and every row that is generated.

    Saliency, once per prompt, at one layer: the rise of attention from token to token, D_hij = max(A_hij − A_h,i−1,j, 0) for the words
    i of the question and the tokens j of the image, averaged over words and the half of the heads with the largest sum, clamped to
    three standard deviations around its mean and scaled to S_j in [0, 1].

    Amplification, with m_V and m_Q the mass of the image and of the question, T_V and T_Q the half of the heads with most of each:

        p_hj <- p_hj·exp(strength·alpha·S_j)   in the image, h in T_V
        p_hj <- r·p_hj                         in the question, h in T_Q
        r = mass of the image in T_V, amplified / before

    and each row is normalised. Saliency that is the same everywhere, or a question without words, edits nothing.

    Args:
        alpha: None takes the published value of known models (5; 4 for Qwen2-VL 7B), and 5 for others. 0 is off.
        saliency_layer: None takes the published one of known models, for others the layer with the largest rise in sum (the paper's
            criterion). Where it does not lie before all of `layers`, the prompt is first read once without edits.
        layers: None takes the published ones of known models, and layers 12 to 22 of 32 in others, in proportion.
        words: words of the question that count: texts (every occurrence behind the last image; needs `tokenizer`) or token ranges
            (start, stop) of the prompt without its padding. The paper takes nouns, verbs, adjectives, adverbs and numbers; None takes
            all tokens behind the last image.
        strength: 0 (off) to 1, multiplies alpha.
        tokenizer: reads words; only its `decode` is used.
    """

    alpha: float | None = None
    saliency_layer: int | None = None
    layers: str | int | Iterable[int] | None = None
    words: Sequence[str | tuple[int, int]] | None = None
    strength: float = 1.0
    tokenizer: Any = None

    per_layer = True

    def __post_init__(self) -> None:
        wrong = []
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha >= 0):
            wrong.append(f"alpha={self.alpha} is not a finite number from 0")
        if isinstance(self.words, str):
            object.__setattr__(self, "words", (self.words,))
        for word in self.words or ():
            if isinstance(word, str):
                wrong += ["words as text need tokenizer="] * (self.tokenizer is None)
            elif not (len(word) == 2 and all(isinstance(end, int) for end in word) and 0 <= word[0] < word[1]):
                wrong.append(f"{word!r} is no token range (start, stop)")
        check_strength("GIFT", self.strength, wrong)
        object.__setattr__(self, "tally", Tally())  # of one attachment: `fit` makes a copy
        object.__setattr__(self, "previews", False)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 or self.strength == 0

    def fit(self, model: Model) -> GIFT:
        super().fit(model)
        count = model.layers
        saliency, layers, alpha = PUBLISHED.get(
            (model.model_type, model.hidden, count),
            (None, range(round(count * 12 / 32), max(round(count * 23 / 32), round(count * 12 / 32) + 1)), 5.0),
        )
        saliency = saliency if self.saliency_layer is None else self.saliency_layer
        layers = layers if self.layers is None else self.layers
        if saliency is not None:
            (saliency,) = parse_layers(saliency, count)
        found = replace(
            self,
            alpha=alpha if self.alpha is None else self.alpha,
            saliency_layer=saliency,
            layers=parse_layers(layers, count),
        )
        object.__setattr__(found, "previews", saliency is None or min(found.layers) <= saliency)
        return found

    def touches(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        found = super().touches(sites)
        if isinstance(self.layers, tuple):  # fitted
            looks = [site for site in sites if self.saliency_layer in (None, site.layer)]
            found |= {site.path: torch.ones(site.heads) for site in looks}
        return found

    def read(self, prompt: Prompt) -> None:
        super().read(prompt)
        at = torch.arange(prompt.image.shape[1], device=prompt.image.device)
        after = torch.tensor([FAR if end is None else end for end in prompt.after_image], device=at.device)
        question = (at >= after.clamp_min(prompt.past)[:, None]) & prompt.valid
        words = question if self.words is None else question & self._words(prompt)
        prompt.notes[(self, "question")] = question
        prompt.notes[(self, "words")] = [row.nonzero().flatten().tolist() for row in words]
        if not prompt.notes.get((self, "kept")):
            prompt.notes.pop((self, "saliency"), None)
            prompt.notes[(self, "looks")] = {}

    def _words(self, prompt: Prompt) -> Tensor:
        """(B, n) bool: tokens of the words."""
        mask, valid, ids = torch.zeros_like(prompt.valid, device="cpu"), prompt.valid.cpu(), prompt.ids.cpu()
        for row, places in enumerate(line.nonzero().flatten() for line in valid):
            for word in self.words:
                spans = find_span(self.tokenizer, ids[row][places].tolist(), word) if isinstance(word, str) else [word]
                for start, stop in spans:
                    if stop > len(places):
                        raise AttnCtrlError(
                            f"GIFT: words ({start}, {stop}) do not lie in prompt {row} of {len(places)} tokens"
                        )
                    mask[row, places[start:stop]] = True
        return mask.to(prompt.valid.device)

    # -- saliency ------------------------------------------------------------------------------------------------------------

    def preview_edits(self, site: Site, prompt: Prompt, n_k: int) -> tuple[RowEdit, ...]:
        """Looks at the words, and at the tokens before them, over the image."""
        if self.saliency_layer not in (None, site.layer):
            return ()
        words = prompt.notes[(self, "words")]
        rows = [[at - prompt.past for at in line if at > prompt.past] for line in words]
        every = tuple(tuple(sorted({at for i in line for at in (i - 1, i)})) for line in rows)
        pattern = Pattern(every, prompt.image_keys(n_k))
        prompt.notes[(self, "looks")][site.layer] = rows, pattern
        return (pattern.edit(),)

    def previewed(self, prompt: Prompt, logits: Tensor | None) -> None:
        self._saliency(prompt)
        prompt.notes[(self, "kept")] = True
        prompt.notes[(self, "looks")] = {}

    def _saliency(self, prompt: Prompt) -> tuple[Tensor, tuple[bool, ...]]:
        """S (B, n) over the positions of the prompt, and which prompts it edits; measured once."""
        key = (self, "saliency")
        if key not in prompt.notes:
            total = torch.zeros(prompt.image.shape, dtype=torch.float64, device=prompt.image.device)
            for row, places in enumerate(prompt.places):
                most = -1.0
                for rows, pattern in prompt.notes[(self, "looks")].values():
                    seen = places[len(places) - len(pattern.keys[row]) :]
                    if rows[row] and len(seen):
                        rise = _rise(pattern.of(row), pattern.rows[row], rows[row])
                        size = float(rise.sum()) if self.saliency_layer is None else 0.0
                        if size > most:
                            total[row] = 0
                            total[row, seen] = _salient(rise).to(total)
                            most = size
            edits = tuple(total.any(1).tolist())
            prompt.notes[key] = total, edits
            self.tally.add(prompts=len(edits), empty=edits.count(False))
        return prompt.notes[key]

    # -- amplification -------------------------------------------------------------------------------------------------------

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        measured = self.previews or not prompt.reads
        edits = () if measured else self.preview_edits(site, prompt, n_k)
        if site.layer not in self.layers:
            return edits
        saliency, some = self._saliency(prompt)
        rows = prompt.rows_that_answer_from_images()
        key, whole = (self, site.layer, "gaze"), n_k == prompt.total  # a window slides over the image
        gaze = prompt.notes.get(key) if whole else None
        if gaze is None:
            masks = [prompt.keys(x, n_k) for x in (prompt.image, prompt.notes[(self, "question")])]
            more = torch.expm1(self.alpha * self.strength * prompt.keys(saliency, n_k))
            gaze = _Gaze(torch.stack([*(x.to(more) for x in masks), more])[:, :, None, None])
            if whole:
                prompt.notes[key] = gaze
        return (*edits, RowEdit(gaze, tuple(row if looked else FAR for row, looked in zip(rows, some, strict=True))))

    def says(self) -> tuple[str, ...]:
        n, empty = self.tally["prompts"], self.tally["empty"]
        lines = (f"GIFT: measured what {n:.0f} questions looked at",) * bool(n)
        return lines + (f"GIFT: {empty:.0f} of them looked nowhere, which edits nothing",) * bool(empty)


def _rise(pattern: Tensor, rows: Sequence[int], words: Sequence[int]) -> Tensor:
    """(H, words, K): how much more attention each word pays than the token before it."""
    at = {row: i for i, row in enumerate(rows)}
    now, before = ([at[word - back] for word in words] for back in (0, 1))
    return (pattern[:, now] - pattern[:, before]).clamp_min(0)


def _salient(rise: Tensor) -> Tensor:
    """Saliency (K,) in [0, 1] from the rise (H, words, K); zeros where it is the same everywhere."""
    heads = rise.sum((1, 2)).topk(max(1, len(rise) // 2)).indices
    mean = rise[heads].mean((0, 1))
    if len(mean) > 1:
        middle, spread = mean.mean(), 3 * mean.std()
        mean = mean.clamp(middle - spread, middle + spread)
    low, high = mean.min(), mean.max()
    return (mean - low) / (high - low) if bool(high > low) else torch.zeros_like(mean)


@dataclass(frozen=True, eq=False)
class _Gaze(Edits):
    """``sets`` (3, B, 1, 1, n), for the first n keys: 1 in the image, 1 in the question, and what a key's factor is above 1."""

    sets: Tensor
    stage: ClassVar[int] = PATTERN

    def __call__(self, p: Tensor) -> Tensor:
        n = self.sets.shape[-1]
        parts = p[..., :n] * self.sets_like(p)
        seen, asked, grown = parts.sum(-1)  # (B, H, r)
        lookers, askers = _top_half(seen), _top_half(asked)
        before = (seen * lookers).sum(1, keepdim=True)
        ratio = (grown * lookers).sum(1, keepdim=True) / torch.where(before > 0, before, 1.0)  # above 1
        new = p.clone()
        new[..., :n].addcmul_(parts[2], lookers[..., None]).addcmul_(parts[1], (ratio * askers)[..., None])
        total = new.sum(-1, keepdim=True)
        return new.div_(torch.where(total > 0, total, 1.0))


def _top_half(mass: Tensor) -> Tensor:
    """1 for the half of the heads with most mass, (B, H, r)."""
    heads = mass.topk(max(1, mass.shape[1] // 2), 1).indices
    return torch.zeros_like(mass).scatter_(1, heads, 1.0)
