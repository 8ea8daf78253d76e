"""Heads that copy: which heads look at the words of a long text that the model is repeating.

Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, arXiv 2404.15574.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attention.rows import LOOK, Edits, RowEdit
from ..controls.language import LanguageControl, Prompt, find_span
from ..errors import AttnCtrlError
from ..heads import HeadSet
from ..processors.language import LanguageSession
from ..sites import Site


class Needle(NamedTuple):
    """A sentence that stands nowhere else, and the question that it answers."""

    text: str
    question: str


NEEDLES = (
    Needle(
        "Marta bakes her plum cake with black pepper, two figs and a spoon of cold coffee.",
        "What does Marta bake her plum cake with?",
    ),
    Needle(
        "The lighthouse keeper of Orsund paints the stairs green every third winter before the storms.",
        "What does the lighthouse keeper of Orsund do every third winter?",
    ),
    Needle(
        "To wake the old robot, hum a low note, knock twice and turn the brass key to the left.",
        "How does one wake the old robot?",
    ),
)


@dataclass(eq=False)
class _Top(Edits):
    """Which key the last row of each head attends to most, (B, H)."""

    at: Tensor | None = None
    stage: ClassVar[int] = LOOK

    def see(self, p: Tensor, rows: range) -> None:
        self.at = p[:, :, -1].argmax(-1).cpu()


@dataclass(frozen=True, eq=False)
class _Watch(LanguageControl):
    """Keeps, for each call, the top key of each layer, and where its first key stands."""

    layers: Any = None
    tops: list[dict[int, tuple[_Top, int]]] = field(default_factory=list)

    needs_image = False
    per_layer = True

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        if not self.tops or site.layer in self.tops[-1]:
            self.tops.append({})
        top = _Top()
        self.tops[-1][site.layer] = top, prompt.total - n_k
        return (RowEdit(top, (prompt.length - 1,) * prompt.batch),)


def detect_retrieval_heads(
    model: Any,
    tokenizer: Any,
    haystack: str | Sequence[str],
    *,
    needles: Iterable[Needle | tuple[str, str]] = NEEDLES,
    lengths: Sequence[int] = (1000, 2000, 4000),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    threshold: float = 0.1,
    layers: Any = None,
    progress: bool = True,
) -> HeadSet:
    """Finds retrieval heads: a sentence is hidden in a long text and asked for, and a head scores 1 / (tokens of the sentence) whenever
    the key it attends to most is that of the very token that is written, inside the sentence.

    A head's score is its mean over the runs in which the model did repeat the sentence: more than half of its words are in the answer.
    One explicit row a layer is computed, never a whole map. `HeadScale(found, factor=0.0)` shows what the model does without them.

    Args:
        model, tokenizer: a language model of transformers; a chat template is used where there is one.
        haystack: one text or several, long enough for `lengths`; repeated where it is not.
        needles: (sentence, question) pairs.
        lengths: tokens of the text. depths: where the sentence stands in it, as fractions.
        threshold: mean score from which a head counts; 0.1 in the paper.
        layers: None for all.
        progress: draw a bar.

    Returns:
        Heads by score, the highest first, with weight 1; the scores above 0 and the runs are in its `provenance`.

    Raises:
        AttnCtrlError: the model found no needle, or no head reaches the threshold.
    """
    texts = [haystack] if isinstance(haystack, str) else list(haystack)
    words = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    runs = [(Needle(*needle), length, depth) for needle in needles for length in lengths for depth in depths]
    if not runs or not all(words):
        raise AttnCtrlError(
            "detect_retrieval_heads needs a text, needles, lengths and depths\nHINT: haystack='a long text …'"
        )
    watch, scores, found = _Watch(layers), Counter(), 0
    with LanguageSession(model, watch) as session, tqdm(runs, desc="retrieval heads", disable=not progress) as bar:
        heads = {site.layer: site.heads for site in session.sites}
        for number, (needle, length, depth) in enumerate(bar):
            ids, (start, stop) = _hide(tokenizer, words[number % len(words)], needle, length, depth)
            watch.tops.clear()
            given = torch.tensor([ids], device=model.device)
            with torch.no_grad():
                every = model.generate(
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=stop - start + 16,
                    do_sample=False,
                )
            answer = every[0, len(ids) :].tolist()
            if _recall(needle.text, tokenizer.decode(answer, skip_special_tokens=True)) <= 0.5:
                continue
            found += 1
            for token, tops in zip(answer, watch.tops, strict=True):
                for layer, (top, offset) in tops.items():
                    for head, at in enumerate((top.at[0] + offset).tolist()):
                        if start <= at < stop and ids[at] == token:
                            scores[layer, head] += 1 / (stop - start)
    if not found:
        raise AttnCtrlError(
            f"detect_retrieval_heads: the model repeated the hidden sentence in none of {len(runs)} runs\n"
            "HINT: shorter lengths, or needles and a prompt that the model answers"
        )
    mean = {head: score / found for head, score in scores.items()}
    best = sorted((head for head, score in mean.items() if score >= threshold), key=lambda head: (-mean[head], head))
    if not best:
        raise AttnCtrlError(
            f"detect_retrieval_heads: the highest score of {sum(heads.values())} heads is {max(mean.values(), default=0):.3g}, "
            f"the threshold {threshold:g}\nHINT: threshold="
        )
    return HeadSet(
        tuple((layer, head, 1.0) for layer, head in best),
        family=session.family.name,
        base_model=getattr(model.config, "_name_or_path", "") or None,
        objective="retrieval score",
        provenance={
            "search": "retrieval heads",
            "runs": len(runs),
            "found": found,
            "lengths": list(lengths),
            "depths": list(depths),
            "threshold": threshold,
            "scores": {f"{layer}.{head}": mean[layer, head] for layer, head in sorted(mean)},
        },
    )


def _hide(
    tokenizer: Any, words: Sequence[int], needle: Needle, length: int, depth: float
) -> tuple[list[int], tuple[int, int]]:
    """Ids of a prompt with the sentence at a depth of a text of `length` tokens, and the tokens (start, stop) of the sentence."""
    hay = [words[i % len(words)] for i in range(length)]
    cut = round(min(max(depth, 0.0), 1.0) * length)
    text = f"{tokenizer.decode(hay[:cut])} {needle.text} {tokenizer.decode(hay[cut:])}"
    asked = f"{text}\n\n{needle.question}"
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": asked}]
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(asked, add_special_tokens=False)
    else:
        ids = tokenizer.encode(asked)
    before, behind = asked.split(needle.text, 1)
    first = len(tokenizer.encode(before)) - 8  # near enough: tokens may join what stands before
    last = len(ids) - len(tokenizer.encode(behind, add_special_tokens=False)) + 8
    first = max(first, 0)
    start, stop = find_span(tokenizer, ids[first:last], needle.text)[0]
    return ids, (first + start, first + stop)


def _recall(wanted: str, said: str) -> float:
    """Share of the words of a text that are said (ROUGE-1 recall)."""
    wanted, said = (Counter(re.findall(r"\w+", text.lower())) for text in (wanted, said))
    return sum((wanted & said).values()) / max(1, sum(wanted.values()))
