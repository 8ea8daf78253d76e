"""While a model writes: its logits against those of the same text without the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..errors import AttnCtrlError
from .text_only import _without_image


if TYPE_CHECKING:
    from ..controls.language import LanguageControl
    from .language import LanguageSession


class Contrast(LogitsProcessor):
    """The step of one `generate` for controls that contrast: reads the prompt without its image tokens, then each token that is written,
    with a cache of its own and without edits."""

    def __init__(self, session: LanguageSession, controls: list[LanguageControl]):
        self.session, self.controls = session, controls
        self._cache: Any = None
        self._mask: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V): logits, or log-probabilities."""
        if self._mask is None:
            prompt = self.session._generating.prompt
            if prompt.ids is None or bool((prompt.ids < 0).any()):
                raise AttnCtrlError(
                    "the text without its image is unknown: the cache holds an answer, or the prompt was given as embeddings\n"
                    "HINT: generate from input_ids of the whole chat"
                )
            found = _without_image(prompt, None)
            ids, self._mask = found["input_ids"], found["attention_mask"]
        else:
            ids, self._mask = input_ids[:, -1:], torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        places = (self._mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        model, base = self.session.model, self.session.language.base
        kept = vars(base).get("rope_deltas")  # some models keep the offset of the last prompt's positions
        with self.session._asides.run("text"):
            output = model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=places,
                past_key_values=self._cache,
                use_cache=True,
            )
        if kept is not None:
            base.rope_deltas = kept
        self._cache = output.past_key_values
        wide = scores if scores.dtype == torch.float64 else scores.float()
        found, alone = wide.log_softmax(-1), output.logits[:, -1].to(wide).log_softmax(-1)
        for control in self.controls:
            found = control.contrast(found, alone)
        return found


def with_contrast(session: LanguageSession, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments of `generate` with the step, where a control contrasts."""
    controls = [fitted for fitted in session._spoken.values() if fitted.contrasts]
    if not controls:
        return args, kwargs
    if session._generating.beams:
        raise AttnCtrlError(
            f"{', '.join(control.name for control in controls)}: beam search exchanges rows, which the text without image cannot follow\n"
            "HINT: num_beams=1, or gamma=None"
        )
    given = args[2] if len(args) > 2 else kwargs.get("logits_processor")
    steps = LogitsProcessorList([Contrast(session, controls), *(given or ())])
    if len(args) > 2:
        return (*args[:2], steps, *args[3:]), kwargs
    return args, {**kwargs, "logits_processor": steps}
