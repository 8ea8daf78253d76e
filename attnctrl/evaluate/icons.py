"""A judge for icon-world pictures: which nouns, in which colours, where.

It shares nothing with the generator but the font: pixels are named by the nearest palette colour in CIE Lab, grouped into
one soft mask per coloured blob, and each mask is compared with all 16 silhouettes scaled to its box. A mask that no
silhouette explains may be several touching objects of one colour: templates of many sizes are then slid over it (FFT
correlation), picked greedily and refined, and accepted only if together they explain the mask. What stays unexplained is
reported with the noun "?", so a shapeless blob counts as wrong instead of vanishing.

`python -m attnctrl.evaluate.icons` measures the judge's own error; `attnctrl.evaluate.scoring` compares with what was asked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from ..errors import AttnCtrlError
from ..icons.world import CANVAS, NOUNS, silhouette
from .scoring import in_box, leaked, match, objects_right, relation_right
from .segment import SPECK, UNKNOWN, colored_masks


__all__ = ["Detection", "IconJudge", "in_box", "leaked", "match", "objects_right", "relation_right"]

SIDE = 40  # px: templates and masks are compared at (SIDE, SIDE)
PAD = 8  # px around the canvas, so that boxes may reach over its edge
STRETCH = 1.25  # largest ratio between the aspect of a mask and that of its noun
MIN_IOU = 0.72  # accepted as a noun: IoU with its template ...
DENT_PX, MAX_DENT = 7, 0.55  # ... and no place where the mask is another shape: a chimera of two nouns fails here
MARGIN = 0.05  # ... and this much more IoU than any featureless shape reaches
SOFTNESS = (0.0, 1.0, 1.6)  # px: blur of the templates; the best one counts, so a soft outline costs little
LONG_SIDES = (24, 80)  # px: a silhouette's longer side
MAX_OVERLAP = 0.3  # of the smaller box, between two objects of one blob
MIN_PART = 0.5  # least local IoU of a sliding template
SLIDE = 96  # half-resolution px: correlation canvas; it wraps around only where no template may lie
SLIDE_SIDES = tuple(range(14, 36, 2))  # half-resolution px

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object as read. `box` is (x0, y0, x1, y1), tight around the silhouette, in px of the 128 x 128 canvas.

    `noun` and `color` are "?" when nothing fits; `score` is the IoU with the best template, whether accepted or not.
    """

    noun: str
    color: str
    box: Box
    score: float

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class _Fit:
    noun: int
    box: Box  # in padded px
    iou: float
    dent: float  # largest mean difference to the template in any DENT_PX square
    blob: float  # IoU with the best featureless shape

    @property
    def good(self) -> bool:
        return self.iou >= MIN_IOU and self.dent <= MAX_DENT and self.iou >= self.blob + MARGIN


class IconJudge:
    """Reads pictures. Deterministic; holds no state but cached templates."""

    def read(self, image: Image.Image | np.ndarray) -> list[Detection]:
        """Objects of one picture, best score first. Arrays are (H, W, 3), uint8 or float in 0-1; any size."""
        found = []
        for color, mask in colored_masks(_pixels(image)):
            for fit in _explain(np.pad(mask, PAD)):
                noun = list(NOUNS)[fit.noun] if fit.good else UNKNOWN
                found.append(Detection(noun, color, tuple(round(v - PAD, 2) for v in fit.box), round(fit.iou, 4)))
        return sorted(found, key=lambda item: -item.score)

    def read_many(self, images: Iterable[Image.Image | np.ndarray]) -> list[list[Detection]]:
        return [self.read(image) for image in images]


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """(128, 128, 3) uint8."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise AttnCtrlError(
                f"the judge reads (height, width, 3) arrays, not {image.shape}\nHINT: pass one RGB picture, or read_many([...])"
            )
        if image.dtype != np.uint8:
            image = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (CANVAS, CANVAS):
        image = image.resize((CANVAS, CANVAS), Image.LANCZOS)
    return np.asarray(image)


# ---- shape -----------------------------------------------------------------------------------------------------------


def _tight(noun: str, size: int) -> np.ndarray:
    """A silhouette cropped to its own extent, float32 in 0-1; longer side about `size - 8` px."""
    image = silhouette(noun, size)
    rows, columns = np.where(image.max(1) > 0.5)[0], np.where(image.max(0) > 0.5)[0]
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@functools.lru_cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """(16, L, SIDE, SIDE) silhouettes stretched to a square, at L blurs, and (16,) width / height."""
    shapes, aspects = [], []
    for noun in NOUNS:
        shape = np.asarray(Image.fromarray(_tight(noun, 56)).resize((SIDE, SIDE), Image.BILINEAR))
        sharp = _tight(noun, 256)
        shapes.append(_softened(shape))
        aspects.append(sharp.shape[1] / sharp.shape[0])
    return np.stack(shapes), np.array(aspects)


def _softened(shape: np.ndarray) -> np.ndarray:
    """(L, SIDE, SIDE): blurs reach past the box, as they do in a picture."""
    return np.stack([ndimage.gaussian_filter(shape, sigma, mode="constant") for sigma in SOFTNESS])


@functools.lru_cache
def _featureless() -> np.ndarray:
    """(K, SIDE, SIDE) shapes that are nothing: tilted ellipses, from slim to round, and the full box."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) * 2 - 1
    shapes = [np.ones((SIDE, SIDE))]
    for tilt in (-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8):
        radius = np.sqrt((x * x - 2 * tilt * x * y + y * y) / (1 - tilt * tilt))
        shapes.append(np.clip((1 - radius) * SIDE / 2 + 0.5, 0, 1))
    return np.stack(shapes).astype(np.float32)


def _bounds(mask: np.ndarray) -> Box | None:
    rows, columns = np.where(mask.max(1) > 0.5)[0], np.where(mask.max(0) > 0.5)[0]
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _compare(image: Image.Image, total: float, box: Box, shapes: np.ndarray) -> np.ndarray:
    """Soft IoU of a mask with (..., SIDE, SIDE) shapes put in `box`; what lies outside the box counts against them."""
    crop = np.asarray(image.resize((SIDE, SIDE), Image.BILINEAR, box=box))
    inter = np.minimum(crop, shapes).sum((-2, -1))
    pixel = (box[2] - box[0]) * (box[3] - box[1]) / SIDE**2
    spilled = max(0.0, total / pixel - float(crop.sum()))
    return inter / (shapes.sum((-2, -1)) + crop.sum() - inter + spilled)


def _fits_aspect(box: Box) -> np.ndarray:
    ratio = (box[2] - box[0]) / (box[3] - box[1])
    return np.abs(np.log(ratio / _templates()[1])) <= np.log(STRETCH)


def _fit(mask: np.ndarray, box: Box | None = None) -> _Fit | None:
    """The best noun for one padded mask (H, W) and its box, refined side by side to half a pixel; None for an empty mask."""
    box = box or _bounds(mask)
    if box is None:
        return None
    image, total = Image.fromarray(mask), float(mask.sum())
    height, width = mask.shape
    scores = _compare(image, total, box, _templates()[0]).max(1)
    ranked = np.argsort(-np.where(_fits_aspect(box), scores, scores - 1))[:3]
    shapes = _templates()[0][ranked]
    best = (float(scores[ranked[0]]) if _fits_aspect(box)[ranked[0]] else 0.0, int(ranked[0]), box)
    for step in (2.0, 1.0, 0.5):
        for moves in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (0, 1, 0, 1)):
            for sign in (-step, step):
                trial = tuple(side + sign * move for side, move in zip(best[2], moves))
                inside = trial[0] >= 0 and trial[1] >= 0 and trial[2] <= width and trial[3] <= height
                if not inside or trial[2] - trial[0] < 8 or trial[3] - trial[1] < 8:
                    continue
                scores = np.where(_fits_aspect(trial)[ranked], _compare(image, total, trial, shapes).max(1), 0)
                if scores.max() > best[0]:
                    best = (float(scores.max()), int(ranked[scores.argmax()]), trial)
    iou, noun, box = best
    shapes, crop = _templates()[0][noun], np.asarray(image.resize((SIDE, SIDE), Image.BILINEAR, box=box))
    shape = shapes[np.minimum(crop, shapes).sum((1, 2)).argmax()]
    dent = float(ndimage.uniform_filter(np.abs(crop - shape), DENT_PX, mode="constant").max())
    blob = float(_compare(image, total, _bounds(mask) or box, _featureless()).max())
    long_side = max(box[2] - box[0], box[3] - box[1])
    return _Fit(noun, box, iou if LONG_SIDES[0] <= long_side <= LONG_SIDES[1] else 0.0, dent, blob)


def _explain(mask: np.ndarray) -> list[_Fit]:
    """One blob as one object, or as several touching ones, or as one unknown."""
    whole = _fit(mask)
    if whole is None:
        return []
    if whole.good and whole.iou > 0.85:
        return [whole]
    parts = _separate(mask) or _slide(mask)
    if len(parts) > 1 and all(part.good for part in parts) and not _overlap(parts):
        if _joint_iou(mask, parts) > max(MIN_IOU, whole.iou + 0.02):
            return parts
    return [whole]


def _overlap(parts: list[_Fit]) -> bool:
    """Do two boxes share more than MAX_OVERLAP of the smaller one? Objects may touch, not cover each other."""
    for index, one in enumerate(parts):
        for two in parts[:index]:
            a, b = np.array(one.box), np.array(two.box)
            shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
            if shared > MAX_OVERLAP * min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()):
                return True
    return False


def _separate(mask: np.ndarray) -> list[_Fit]:
    """One fit per connected piece, if every piece is a good object by itself."""
    pieces, count = ndimage.label(mask > 0.5, np.ones((3, 3)))
    if count < 2:
        return []
    row, column = ndimage.distance_transform_edt(pieces == 0, return_distances=False, return_indices=True)
    owner = pieces[row, column]
    parts = [mask * (owner == index) for index in range(1, count + 1)]
    fits = [_fit(part) for part in parts if part.sum() >= SPECK]
    return [fit for fit in fits if fit] if all(fit and fit.good for fit in fits) else []


def _draw(noun: int, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """A template put in a box (rounded to whole px) on an empty canvas."""
    x0, y0, x1, y1 = (round(v) for v in box)
    out = Image.new("F", shape[::-1], 0.0)
    image = Image.fromarray(_tight(list(NOUNS)[noun], 128))
    out.paste(image.resize((max(1, x1 - x0), max(1, y1 - y0)), Image.BOX), (x0, y0))
    return np.asarray(out)


def _joint_iou(mask: np.ndarray, parts: list[_Fit]) -> float:
    union = np.max([_draw(part.noun, part.box, mask.shape) for part in parts], axis=0)
    return float(np.minimum(mask, union).sum() / np.maximum(mask, union).sum())


@functools.lru_cache
def _bank() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
    """Half-resolution templates of every noun and size: spectra (K, SLIDE, F), spectra of their dilated windows, areas (K,),
    forbidden corners (K, SLIDE, SLIDE), and (noun, width, height) per template."""
    images, windows, keys = [], [], []
    for noun, aspect in enumerate(_templates()[1]):
        source = Image.fromarray(_tight(list(NOUNS)[noun], 128))
        for side in SLIDE_SIDES:
            width, height = (max(1, round(v)) for v in (side * min(1, aspect), side / max(1, aspect)))
            canvas = np.zeros((SLIDE, SLIDE), dtype=np.float32)
            canvas[2 : 2 + height, 2 : 2 + width] = np.asarray(source.resize((width, height), Image.BOX))
            images.append(canvas)
            windows.append(ndimage.binary_dilation(canvas > 0.3, np.ones((3, 3))).astype(np.float32))
            keys.append((noun, width, height))
    spectra = [np.conj(fft.rfft2(np.stack(stack))) for stack in (images, windows)]
    y, x = (np.mgrid[0:SLIDE, 0:SLIDE] + 2) % SLIDE
    side = CANVAS // 2 + PAD
    outside = np.stack([(x + width > side) | (y + height > side) for _, width, height in keys])
    return *spectra, np.stack(images).sum((1, 2)), outside, keys


def _slide(mask: np.ndarray) -> list[_Fit]:
    """Up to four objects in one blob: the best sliding template, remove, again; then each refined without the others."""
    height, width = mask.shape
    half = mask.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    spectra, windows, areas, outside, keys = _bank()
    rest = np.zeros((SLIDE, SLIDE), dtype=np.float32)
    rest[: half.shape[0], : half.shape[1]] = half
    total = rest.sum()
    found: list[tuple[int, Box]] = []
    while len(found) < 4 and rest.sum() > 0.15 * total:
        spectrum = fft.rfft2(rest)
        inter = fft.irfft2(spectra * spectrum, s=rest.shape)
        seen = fft.irfft2(windows * spectrum, s=rest.shape)
        score = np.where(outside, 0, inter / (areas[:, None, None] + seen - inter))
        which, row, column = np.unravel_index(score.argmax(), score.shape)
        if score[which, row, column] < MIN_PART:
            break
        noun, w, h = keys[which]
        x, y = ((column + 2) % SLIDE, (row + 2) % SLIDE)
        box = (2.0 * x, 2.0 * y, 2.0 * (x + w), 2.0 * (y + h))
        found.append((noun, box))
        taken = ndimage.maximum_filter(_draw(noun, box, mask.shape), 3)
        taken = taken.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
        rest[: half.shape[0], : half.shape[1]] *= 1 - taken
    fits = [_Fit(noun, box, 0.0, 0.0, 0.0) for noun, box in found]
    for _ in range(2):
        drawn = [ndimage.maximum_filter(_draw(fit.noun, fit.box, mask.shape), 3) for fit in fits]
        for index, fit in enumerate(fits):
            others = np.max([d for i, d in enumerate(drawn) if i != index], axis=0) if len(fits) > 1 else 0
            fits[index] = _fit((mask * (1 - others)).astype(np.float32), fit.box) or fit
    return fits


if __name__ == "__main__":
    from .selfcheck import main

    main()
