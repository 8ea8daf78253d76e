"""From pixels to one soft mask per coloured blob: the first half of the icon judge.

Pixels are named by the nearest palette colour in CIE Lab. Pixels that are clearly object seed the blobs; each blob then takes
the soft edge around it, its coverage read as a mix of the blob's own measured colour and a background tone. What is neither
background nor near a palette colour becomes a blob of colour "?".
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage

from ..icons.world import BACKGROUNDS, CANVAS, COLORS


UNKNOWN = "?"
CORE = 0.6  # least coverage of a pixel that may seed a blob
FAINT = 0.4  # least coverage of a pixel that joins two seeds, for thin strokes
STRANGE = 30.0  # Lab distance from every background tone that makes a pixel an object of some colour
FOREGROUND = 45.0  # Lab distance from every background tone of what no longer is a soft edge
REACH = 4  # px: soft edge around a seed
LINK = 3  # px: half the widest gap inside one object (the leaf of the apple)
ALIKE = 30.0  # Lab distance below which neighbouring blobs are one object (blue and purple are 35 apart)
PATCH, PATCH_ALIKE = 0.2, 60.0  # a neighbour with less than this share of the area may differ by that much
STAIN = 0.1  # a neighbour with less than this share is a stain on the blob, whatever its colour
SPECK = 40.0  # px of mask area: less is dirt, not an object
COLOR_REJECT = 45.0  # Lab distance of a blob's own colour to its palette colour
BALL = np.ones((3, 3), dtype=bool)


@functools.lru_cache
def _linear_light() -> np.ndarray:
    """(256,) sRGB code value to linear light."""
    value = np.arange(256, dtype=np.float32) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of (..., 3) uint8 sRGB."""
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
        dtype=np.float32,
    )
    xyz = _linear_light()[rgb] @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@functools.lru_cache
def _anchors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lab of the 6 object colours (6, 3) and of the 8 background tones (8, 3), light and dark in turn; RGB of the tones."""
    tones = np.array([np.array(tone) * shade for tone in BACKGROUNDS.values() for shade in (1, 0.86)])
    colors = np.array(list(COLORS.values()), dtype=np.uint8)
    return _lab(colors), _lab((tones + 0.5).astype(np.uint8)), tones.astype(np.float32)


def _distance(lab: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(..., K) Euclidean Lab distances (Delta E 1976) to K anchors."""
    return np.sqrt(((lab[..., None, :] - anchors) ** 2).sum(-1))


def colored_masks(rgb: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Colour name and soft mask (128, 128) in 0-1 of every blob in (128, 128, 3) uint8.

    Pieces of one colour nearer than 2 LINK are one blob.
    """
    colors, tones, tone_rgb = _anchors()
    lab = _lab(rgb)
    to_color, to_tone = _distance(lab, colors), _distance(lab, tones)
    label, nearest_tone, strange = to_color.argmin(-1), to_tone.argmin(-1), to_tone.min(-1)
    cover = strange / (strange + to_color.min(-1))
    core = cover > CORE
    group = np.zeros((CANVAS, CANVAS), dtype=np.int64)
    for index in np.unique(label[core]):
        _seed(group, core & (label == index), (label == index) & (cover > FAINT))
    stray = strange > STRANGE
    if group.any():
        stray &= ndimage.distance_transform_edt(group == 0) > REACH
    core |= _seed(group, stray, stray)
    if not group.any():
        return []
    core |= strange > FOREGROUND
    _adopt(group, core)
    _merge_similar(group, lab)
    count = int(group.max())
    distance, (row, column) = ndimage.distance_transform_edt(group == 0, return_indices=True)
    owner = np.where(distance <= REACH, group[row, column], 0)

    outside = ~core & (distance > 2)
    background = np.bincount(nearest_tone[outside] // 2, minlength=4).argmax() if outside.any() else 0
    tone_pair = tone_rgb[2 * background : 2 * background + 2]
    masks = []
    for index, window in enumerate(ndimage.find_objects(owner, count), start=1):
        pixels, here = rgb[window].astype(np.float32), owner[window] == index
        inner = group[window] == index
        own = np.median(pixels[inner & (cover[window] >= np.median(cover[window][inner]))], axis=0)
        mask = np.zeros((CANVAS, CANVAS), dtype=np.float32)
        mask[window] = np.where(here, _coverage(pixels, own, tone_pair), 0)
        if mask.sum() < SPECK:
            continue
        gaps = _distance(_lab((own + 0.5).astype(np.uint8)), colors)
        masks.append((list(COLORS)[gaps.argmin()] if gaps.min() <= COLOR_REJECT else UNKNOWN, mask))
    return masks


def _seed(group: np.ndarray, core: np.ndarray, bridge: np.ndarray) -> np.ndarray:
    """Numbers the blobs of `core` on in `group`, in place; pieces are one blob when near or joined by `bridge`.

    Returns the pixels numbered: pieces without any 2 x 2 square are specks and left out.
    """
    solid = ndimage.binary_opening(core, structure=np.ones((2, 2)))
    if solid.any():
        solid = ndimage.binary_propagation(solid, BALL, mask=core)
        joined, _ = ndimage.label(ndimage.binary_dilation(solid, BALL, iterations=LINK) | bridge, BALL)
        group[solid] = np.unique(joined[solid], return_inverse=True)[1] + group.max() + 1
    return solid


def _adopt(group: np.ndarray, core: np.ndarray) -> None:
    """Gives every leftover patch of `core` that touches a blob to the one it touches most, in place."""
    patches, _ = ndimage.label(core & (group == 0), BALL)
    for index, window in enumerate(ndimage.find_objects(patches), start=1):
        window = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in window)
        patch = patches[window] == index
        touched = group[window][ndimage.binary_dilation(patch, BALL)]
        if touched.any():
            group[window][patch] = np.bincount(touched[touched > 0]).argmax()


def _merge_similar(group: np.ndarray, lab: np.ndarray) -> None:
    """Joins neighbouring blobs of similar own colour, in place: one object whose hue wobbles across a palette border.

    A small patch beside a large blob may differ more than two halves may, a stain by anything. Numbers stay consecutive.
    """
    total = int(group.max())
    area = np.bincount(group.ravel(), minlength=total + 1)
    own = np.array([np.median(lab[group == index], axis=0) for index in range(1, total + 1)])
    into = np.arange(total + 1)
    for one in range(1, total + 1):
        reach = ndimage.binary_dilation(group == one, BALL, iterations=LINK)
        for two in np.unique(group[reach]):
            small, large = sorted((area[one], area[two]))
            limit = PATCH_ALIKE if small < PATCH * large else ALIKE
            limit = np.inf if small < max(SPECK, STAIN * large) else limit
            if two > 0 and two != one and np.linalg.norm(own[one - 1] - own[two - 1]) < limit:
                into[into == into[two]] = into[one]
    group[:] = np.unique(into, return_inverse=True)[1][group]


def _coverage(rgb: np.ndarray, color: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """(H, W) share of `color` in each pixel, seen as a mix of it with whichever of the two background tones fits best."""
    best, share = None, None
    for tone in tones:
        axis = color - tone
        alpha = np.clip((rgb - tone) @ axis / (axis @ axis), 0, 1)
        error = ((rgb - tone - alpha[..., None] * axis) ** 2).sum(-1)
        share = alpha if best is None else np.where(error < best, alpha, share)
        best = error if best is None else np.minimum(best, error)
    return np.where(share < 0.2, 0, share)
