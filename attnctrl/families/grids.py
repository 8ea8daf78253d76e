"""Image grids and lengths that several families read in the same way."""

from __future__ import annotations

import math

from ..errors import AttnCtrlError


def of_patches(bound, model) -> tuple[int, int]:
    """Grid of square patches of `hidden_states`, (B, C, height, width)."""
    height, width = bound["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return height // patch, width // patch


def of_ids(bound, model) -> tuple[int, int]:
    """Grid from position ids `img_ids`, (N, n) or (B, N, n), whose first three columns are frame, row and column. The latents are
    frame 0 and stand first; reference images (FLUX.1 Kontext, FLUX.2 editing) have other frames."""
    ids = bound["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    own = int((ids[:, 0] == 0).sum())
    if own == 0 or bool((ids[:own, 0] != 0).any()):
        raise AttnCtrlError(
            f"the first of {len(ids)} image ids are not those of frame 0, so the latents cannot be told"
        )
    rows, columns = int(ids[:own, 1].max()) + 1, int(ids[:own, 2].max()) + 1
    if rows * columns != own:
        raise AttnCtrlError(f"image ids span {rows} x {columns} tokens but there are {own}")
    return rows, columns


def with_references(grid):
    """`Family.lengths` where the tokens of reference images stand behind those of the latents."""

    def lengths(bound, model) -> dict[str, int]:
        image, found = math.prod(grid(bound, model)), bound["hidden_states"].shape[1]
        known = {"text": bound["encoder_hidden_states"].shape[1], "image": image}
        return known if found == image else known | {"reference": found - image}

    return lengths
