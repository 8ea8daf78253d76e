"""Where image tokens lie in their image, per family. All facts are of transformers 5.23."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import AttnCtrlError
from .family import LanguageFamily


IMAGE_SIZES = ("image_grid_thw", "video_grid_thw", "image_sizes", "pixel_values_videos")
"""Arguments of a model's call that tell the sizes of its images, or that it has videos."""


class View(NamedTuple):
    """An image, or a tile of one, among the image tokens of a prompt: tokens start to start + rows·columns, row by row."""

    start: int
    rows: int
    columns: int


def image_views(
    family: LanguageFamily, config: Any, images: Tensor, row: int, given: Mapping[str, Tensor]
) -> tuple[list[View], int]:
    """The images of a prompt, and which of them is meant where nobody says.

    Args:
        config: of the whole model. images: (B, n) bool, image tokens of every prompt.
        row: of the batch. given: arguments of `IMAGE_SIZES`.

    Raises:
        AttnCtrlError: the family's grid is not known, or does not account for the tokens.
    """
    if family.grid not in GRIDS:
        raise AttnCtrlError(
            f"where the image tokens of {family.name} lie in the image is not known\n"
            f"HINT: LanguageFamily(grid=…) takes {', '.join(GRIDS)}"
        )
    if any(name in given for name in ("video_grid_thw", "pixel_values_videos")):
        raise AttnCtrlError(f"{family.name}: a video in the prompt; attention is mapped over images only")
    counts = [int(count) for count in images.sum(1)]
    return GRIDS[family.grid](family.name, config, images[row].cpu(), counts, row, given)


def _square(name, config, image, counts, row, given) -> tuple[list[View], int]:
    """Images one after another, each of side x side tokens."""
    side = _side(name, config)
    return _pieces(name, side, counts[row]), 0


def _tiles(name, config, image, counts, row, given) -> tuple[list[View], int]:
    """As square ones; an image that was cut up comes last, as a whole, behind its tiles."""
    return _square(name, config, image, counts, row, given)[0], -1


def _base(name, config, image, counts, row, given) -> tuple[list[View], int]:
    """Each run of image tokens begins with the whole image, side x side, and goes on with finer tiles."""
    side = _side(name, config)
    places = image.nonzero().flatten().tolist()
    starts = [i for i, at in enumerate(places) if i == 0 or places[i - 1] != at - 1]
    ends = [*starts[1:], len(places)]
    if any(end - start < side * side for start, end in zip(starts, ends, strict=True)):
        raise AttnCtrlError(f"{name}: fewer than {side} x {side} image tokens in a row")
    return [View(start, side, side) for start in starts], 0


def _patches(name, config, image, counts, row, given) -> tuple[list[View], int]:
    """Sizes in patches, of all images of the batch, as (frames, rows, columns)."""
    merge = config.vision_config.spatial_merge_size
    sizes = [(h // merge, w // merge) for _, h, w in _given(name, "image_grid_thw", given)]
    return _of_sizes(name, sizes, counts, row), 0


def _sizes(name, config, image, counts, row, given) -> tuple[list[View], int]:
    """Sizes in pixels, of all images of the batch, as (rows, columns)."""
    step = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return _of_sizes(name, [(h // step, w // step) for h, w in _given(name, "image_sizes", given)], counts, row), 0


GRIDS: dict[str, Callable[..., tuple[list[View], int]]] = {
    "square": _square,
    "tiles": _tiles,
    "base": _base,
    "patches": _patches,
    "sizes": _sizes,
}


def _side(name: str, config: Any) -> int:
    """Image tokens along a side of an image or a tile."""
    count = getattr(config, "mm_tokens_per_image", None)
    if count is None and config.model_type == "fast_vlm":
        count = config.image_seq_length
    if count is not None:
        if math.isqrt(count) ** 2 != count:
            raise AttnCtrlError(f"{name}: {count} tokens an image are no square")
        return math.isqrt(count)
    vision = config.vision_config
    size, patch = (x[0] if isinstance(x, Sequence) else x for x in (vision.image_size, vision.patch_size))
    side = size // patch // (getattr(config, "scale_factor", None) or 1)
    return round(side * (getattr(config, "downsample_ratio", None) or 1))


def _pieces(name: str, side: int, count: int) -> list[View]:
    if count % (side * side):
        raise AttnCtrlError(f"{name}: {count} image tokens are no number of images of {side} x {side}")
    return [View(start, side, side) for start in range(0, count, side * side)]


def _given(name: str, what: str, given: Mapping[str, Tensor]) -> list[list[int]]:
    if what not in given:
        raise AttnCtrlError(f"{name} was called without {what}, which tells the sizes of its images")
    return given[what].tolist()


def _of_sizes(name: str, sizes: list[tuple[int, int]], counts: list[int], row: int) -> list[View]:
    """The views of a prompt, from sizes of all images of the batch in the order of the prompts."""
    remaining, views = list(sizes), []
    for at, count in enumerate(counts):
        views, start = [], 0
        while start < count and remaining:
            rows, columns = remaining.pop(0)
            views.append(View(start, rows, columns))
            start += rows * columns
        if start != count:
            raise AttnCtrlError(
                f"{name}: the sizes {sizes} do not account for the {count} image tokens of prompt {at}"
            )
        if at == row:
            break
    return views
