"""The mask that a model passes itself, and plans under it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnctrl.errors import AttnCtrlError


if TYPE_CHECKING:
    from attnctrl.attention.plan import Plan


FORBIDS = -5e3  # models write "may not attend" as -inf, as the dtype's minimum or as -10000, which bfloat16 rounds


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
