"""Which rows of a denoiser's batch are conditional."""

from __future__ import annotations

from ..errors import AttnCtrlError


def conditional_rows(batch: int, cfg: bool, cond_first: bool = False) -> tuple[int, ...]:
    """Rows of the conditional half, or all without CFG."""
    if not cfg:
        return tuple(range(batch))
    if batch % 2:
        raise AttnCtrlError(
            f"the pipeline guides with CFG but calls its denoiser with {batch} rows, which are not two halves"
        )
    return tuple(range(batch // 2)) if cond_first else tuple(range(batch // 2, batch))
