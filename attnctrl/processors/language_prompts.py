"""Which prompt a call of a language model belongs to: a new one, more of one, or the one that is being answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..controls.language import Prompt
from ..errors import AttnCtrlError


@dataclass(eq=False)
class Generation:
    """A running `generate`: how many rows it makes of each prompt, the sizes of images that it was given, and its prompt once it is
    read."""

    copies: int
    beams: bool
    given: dict[str, Any] = field(default_factory=dict)
    prompt: Prompt | None = None


def find_prompt(
    ids: Tensor | None,
    embeds: Tensor | None,
    mask: Any,
    cache: Any,
    known: Mapping[Any, Prompt],
    writing: Generation | None,
    image_ids: tuple[int, ...],
) -> Prompt:
    """The prompt of a call, with `past`, `length` and `reads` set for it.

    Args:
        ids: (B, T), or None with embeds (B, T, C). mask: what the model was given as attention_mask.
        cache: past_key_values. known: prompts by the cache that they are in.

    Raises:
        AttnCtrlError: the cache holds what no session saw, or the batch has changed.
    """
    given = ids if ids is not None else embeds
    (batch, length), device = given.shape[:2], given.device
    past = int(cache.get_seq_length()) if cache is not None else 0
    if past == 0 and writing is not None and writing.prompt is not None and length > writing.prompt.image.shape[1]:
        now, reads = writing.prompt, False  # without a cache all of it is read again
    elif past == 0:
        now = Prompt(
            ids,
            _valid(mask, batch, length, device, None),
            _images(ids, given, image_ids),
            torch.zeros(batch, length, dtype=torch.bool, device=device),
        )
        now.copies = writing.copies if writing is not None and batch % writing.copies == 0 else 1
        now.beams, reads = writing is not None and writing.beams, True
    else:
        now = known.get(cache)
        if now is None or now.total != past:
            had = (
                "read before the session was attached"
                if now is None
                else f"changed: {past} positions, {now.total} were read"
            )
            raise AttnCtrlError(f"the prompt in this cache was {had}\nHINT: attach first, then read the prompt")
        reads = length > 1
        if reads:
            now.extend(ids, _valid(mask, batch, past + length, device, now), _images(ids, given, image_ids), past)
    if now.batch != batch:
        raise AttnCtrlError(f"the prompt had {now.batch} rows, this call has {batch}\nHINT: keep the batch as it is")
    now.past, now.length, now.reads = past, length, reads
    return now


def _images(ids: Tensor | None, given: Tensor, image_ids: tuple[int, ...]) -> Tensor:
    """(B, T) bool: tokens that stand for images."""
    image = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
    for token in image_ids if ids is not None else ():
        image = image | (ids == token)
    return image


def _valid(mask: Any, batch: int, total: int, device: torch.device, before: Prompt | None) -> Tensor:
    """Which positions are no padding, (B, total), from the mask that the model was given: (B, total), or prepared, 4-D."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= total:
        return mask[:, :total].to(device, torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen[:, 0, :, :total].any(1).expand(batch, -1).to(device)
    valid = torch.ones(batch, total, dtype=torch.bool, device=device)
    if before is not None:
        valid[:, : before.valid.shape[1]] = before.valid
    return valid
