"""Image grids that several families read in the same way."""

from __future__ import annotations

from ..errors import AttnCtrlError


def of_patches(bound, model) -> tuple[int, int]:
    """Grid of square patches of `hidden_states`, (B, C, height, width)."""
    height, width = bound["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return height // patch, width // patch


def of_ids(bound, model) -> tuple[int, int]:
    """Grid from position ids `img_ids`, (N, n) or (B, N, n), whose first three columns are frame, row and column."""
    ids = bound["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    if bool((ids[:, 0] != 0).any()):
        raise AttnCtrlError(
            "this call carries reference images (FLUX.1 Kontext, FLUX.2 editing), whose tokens regions cannot place yet"
        )
    rows, columns = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    if rows * columns != ids.shape[0]:
        raise AttnCtrlError(f"image ids span {rows} x {columns} tokens but there are {ids.shape[0]}")
    return rows, columns
