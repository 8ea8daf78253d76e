"""Which positions a model looks at whatever the image shows: the trend that `TokenPruning(debias=…)` takes out of its scores.

After "Attention Debiasing for Token Pruning in Vision Language Models", 2025, arXiv 2508.17807, which fits one curve per benchmark; here
the trend is measured on neutral prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.rows import Pattern, RowEdit
from ..controls.language import LanguageControl, Prompt
from ..controls.token_pruning import look_at_images
from ..errors import AttnCtrlError
from ..sites import Site
from .language import LanguageSession


@dataclass(frozen=True, eq=False)
class _Look(LanguageControl):
    """Looks at the last row of each prompt over its image tokens, in one layer."""

    layers: int
    looks: list[Pattern] = field(default_factory=list)

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        self.looks.append(look_at_images(prompt, n_k))
        return (self.looks[-1].edit(),)


def fit_position_prior(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    *,
    layer: int = 2,
    prompts: Sequence[str] = ("Describe the image.", "What is in the picture?"),
    points: int = 24,
) -> tuple[float, ...]:
    """The trend over image tokens of the score that `TokenPruning(layer=layer)` uses: a table for its `debias`.

    Each image is read with each prompt. A score is brought to the mean 1 and averaged into `points` parts of the image's tokens, first
    to last; the mean over images and prompts is the table. What single images show averages out: take twenty or more that are not
    those of a benchmark, with their objects in different places.

    Args:
        model, processor: a vision-language model of transformers and its processor.
        images: pictures, as the processor takes them.
        prompts: neutral questions, without the image's placeholder.

    Raises:
        AttnCtrlError: no images, or a processor that cannot write a prompt with an image.
    """
    look = _Look(layer - 1)
    with LanguageSession(model, look), torch.no_grad():
        for image in images:
            for prompt in prompts:
                inputs = processor(images=[image], text=[_written(processor, prompt)], return_tensors="pt")
                model(**inputs.to(model.device, model.dtype))
    if not look.looks:
        raise AttnCtrlError("fit_position_prior needs images and prompts\nHINT: a list of pictures")
    total = torch.zeros(points, dtype=torch.float64)
    for one in look.looks:
        score = one.of(0)[:, 0].mean(0).double().cpu()
        total += F.adaptive_avg_pool1d((score / score.mean())[None], points)[0]
    return tuple((total / len(look.looks)).tolist())


def _written(processor: Any, prompt: str) -> str:
    """A prompt with one image, as the model's chat template writes it."""
    if getattr(processor, "chat_template", None) is not None:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    token = getattr(processor, "image_token", None)
    if token is None:
        raise AttnCtrlError(
            f"{type(processor).__name__} has neither a chat template nor an image token\nHINT: the model's own processor"
        )
    return f"{token}\n{prompt}"
