"""The icon world: an endless, seeded stream of captioned scenes whose truth is known.

A scene is a 128 x 128 picture of one to four coloured silhouettes on a patterned background. Every object has a noun, a
colour and a box; the boxes of a scene never overlap. Nouns and colours combine freely, so attribute leakage between
subjects can be counted; positions are known, so layout control can be scored; what is absent is known, so hallucination can.

Silhouettes are the solid icons of Font Awesome Free 6.6 (CC BY 4.0), read from the PyPI package ``fontawesomefree``, which
is needed to draw scenes (training, evaluation) and never to run the shipped models.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import AttnCtrlError


CANVAS = 128
GRID = 16
SIZES = {"small": 48, "big": 64}
MARGIN = 4

NOUNS = {
    "cat": "cat",
    "dog": "dog",
    "car": "car-side",
    "tree": "tree",
    "rocket": "rocket",
    "fish": "fish",
    "star": "star",
    "heart": "heart",
    "house": "house",
    "key": "key",
    "umbrella": "umbrella",
    "crown": "crown",
    "anchor": "anchor",
    "moon": "moon",
    "apple": "apple-whole",
    "plane": "plane",
}
COLORS = {
    "red": (220, 30, 40),
    "yellow": (245, 190, 0),
    "green": (20, 150, 60),
    "blue": (30, 80, 220),
    "purple": (140, 40, 170),
    "black": (20, 20, 25),
}
BACKGROUNDS = {"white": (252, 252, 252), "gray": (205, 208, 212), "beige": (245, 226, 196), "mint": (198, 236, 214)}
PATTERNS = ("plain", "striped", "dotted", "checkered")
RELATIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}


@functools.lru_cache
def _font_source() -> tuple[str, dict]:
    """Path of the solid icon font and the table of code points, from the ``fontawesomefree`` package."""
    try:
        root = importlib.resources.files("fontawesomefree")
    except ModuleNotFoundError:
        raise AttnCtrlError(
            "drawing icon scenes needs the package 'fontawesomefree', which is not installed\n"
            "HINT: pip install 'attnctrl[eval]'"
        ) from None
    found: dict[str, str] = {}
    stack = [root]
    while stack:
        for entry in stack.pop().iterdir():
            if entry.is_dir():
                stack.append(entry)
            elif entry.name in ("fa-solid-900.ttf", "icons.json"):
                found.setdefault(entry.name, str(entry))
    with open(found["icons.json"], encoding="utf-8") as handle:
        table = json.load(handle)
    return found["fa-solid-900.ttf"], table


@functools.lru_cache(maxsize=512)
def silhouette(noun: str, size: int) -> np.ndarray:
    """Coverage of a noun's icon in a square box, (size, size) float32 in 0-1, its longer side `size - 2 * MARGIN`."""
    if noun not in NOUNS:
        raise AttnCtrlError(f"unknown noun {noun!r}; the icon world has {', '.join(NOUNS)}")
    path, table = _font_source()
    glyph = chr(int(table[NOUNS[noun]]["unicode"], 16))
    scale = 4
    font = ImageFont.truetype(path, size * scale)
    left, top, right, bottom = font.getbbox(glyph)
    canvas = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(canvas).text((-left, -top), glyph, font=font, fill=255)
    canvas = canvas.crop(canvas.getbbox())
    ratio = (size - 2 * MARGIN) / max(canvas.size)
    width, height = (max(1, round(side * ratio)) for side in canvas.size)
    canvas = canvas.resize((width, height), Image.LANCZOS)
    out = Image.new("L", (size, size), 0)
    out.paste(canvas, ((size - width) // 2, (size - height) // 2))
    return np.asarray(out, dtype=np.float32) / 255.0


@dataclass(frozen=True)
class SceneObject:
    """One silhouette. `box` is (x0, y0, x1, y1) in pixels of the 128 x 128 canvas."""

    noun: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def size(self) -> int:
        return self.box[2] - self.box[0]

    @property
    def size_word(self) -> str:
        return min(SIZES, key=lambda word: abs(SIZES[word] - self.size))

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def mask(self) -> np.ndarray:
        """Coverage of the object on the canvas, (128, 128) float32 in 0-1."""
        out = np.zeros((CANVAS, CANVAS), dtype=np.float32)
        x0, y0, x1, y1 = self.box
        out[y0:y1, x0:x1] = silhouette(self.noun, self.size)
        return out


@dataclass(frozen=True)
class Scene:
    """A picture with its truth. Objects are ordered as the caption names them."""

    objects: tuple[SceneObject, ...]
    pattern: str = "plain"
    background: str = "white"
    seed: int | None = field(default=None, compare=False)

    def render(self) -> Image.Image:
        """The 128 x 128 RGB picture."""
        pixels = background_pixels(self.pattern, self.background).copy()
        for item in self.objects:
            x0, y0, x1, y1 = item.box
            alpha = silhouette(item.noun, item.size)[..., None]
            color = np.asarray(COLORS[item.color], dtype=np.float32)
            pixels[y0:y1, x0:x1] = pixels[y0:y1, x0:x1] * (1 - alpha) + color * alpha
        return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=64)
def background_pixels(pattern: str, background: str) -> np.ndarray:
    """(128, 128, 3) float32 background; every pattern has a period of 16 pixels."""
    light = np.asarray(BACKGROUNDS[background], dtype=np.float32)
    dark = light * 0.86
    y, x = np.mgrid[0:CANVAS, 0:CANVAS]
    if pattern == "plain":
        on = np.zeros((CANVAS, CANVAS))
    elif pattern == "striped":
        on = ((x // 8) % 2).astype(np.float64)
    elif pattern == "checkered":
        on = ((x // 8 + y // 8) % 2).astype(np.float64)
    elif pattern == "dotted":
        on = np.clip(4.0 - np.hypot((x % 16) - 7.5, (y % 16) - 7.5), 0, 1)
    else:
        raise AttnCtrlError(f"unknown pattern {pattern!r}; the icon world has {', '.join(PATTERNS)}")
    return (light + (dark - light) * on[..., None]).astype(np.float32)


def relation_between(first: SceneObject, second: SceneObject) -> str | None:
    """The unambiguous relation of `first` to `second`: disjoint along one axis and further apart there than along the other."""
    dx = first.center[0] - second.center[0]
    dy = first.center[1] - second.center[1]
    reach = (first.size + second.size) / 2
    if abs(dx) >= reach and abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= reach and abs(dy) > abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _place(rng: np.random.Generator, sizes: list[int]) -> list[tuple[int, int, int, int]] | None:
    taken = np.zeros((CANVAS // GRID, CANVAS // GRID), dtype=bool)
    boxes = []
    for size in sizes:
        cells = size // GRID
        free = [
            (row, column)
            for row in range(taken.shape[0] - cells + 1)
            for column in range(taken.shape[1] - cells + 1)
            if not taken[row : row + cells, column : column + cells].any()
        ]
        if not free:
            return None
        row, column = free[rng.integers(len(free))]
        taken[row : row + cells, column : column + cells] = True
        boxes.append((column * GRID, row * GRID, column * GRID + size, row * GRID + size))
    return boxes


def sample_scene(
    rng: np.random.Generator,
    objects: int | None = None,
    *,
    related: bool = False,
    distinct: bool = False,
    seed: int | None = None,
) -> Scene:
    """Draws one scene.

    Args:
        rng: source of randomness.
        objects: number of objects, 1-4; drawn from (0.35, 0.40, 0.15, 0.10) when None.
        related: resample positions until the first two objects stand in an unambiguous relation.
        distinct: all nouns different and all colours different (what evaluations ask for).
        seed: only recorded.
    """
    count = objects if objects is not None else int(rng.choice([1, 2, 3, 4], p=[0.35, 0.40, 0.15, 0.10]))
    if not 1 <= count <= 4:
        raise AttnCtrlError(f"a scene holds 1 to 4 objects, not {count}")
    nouns = rng.choice(list(NOUNS), size=count, replace=not distinct)
    colors = rng.choice(list(COLORS), size=count, replace=not distinct)
    while True:
        sizes = [SIZES["small"] if count > 2 or rng.random() < 0.6 else SIZES["big"] for _ in range(count)]
        boxes = _place(rng, sizes)
        if boxes is None:
            continue
        items = tuple(SceneObject(str(n), str(c), b) for n, c, b in zip(nouns, colors, boxes))
        if related and count > 1 and relation_between(items[0], items[1]) is None:
            continue
        break
    pattern = str(rng.choice(PATTERNS, p=[0.4, 0.2, 0.2, 0.2]))
    return Scene(items, pattern, str(rng.choice(list(BACKGROUNDS))), seed)


def scenes(seed: int = 0, **options) -> Iterator[Scene]:
    """An endless stream; scene i depends on (seed, i) alone, so a stream can be entered anywhere."""
    index = 0
    while True:
        yield sample_scene(np.random.default_rng((seed, index)), seed=index, **options)
        index += 1


def describe(item: SceneObject, size: bool = False, article: bool = True) -> str:
    """ "a red cat", "a big red cat", "red cat"."""
    words = ([item.size_word] if size else []) + [item.color, item.noun]
    return " ".join((["a"] if article else []) + words)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of several phrasings of a scene: a list of its objects or, for two objects, their relation; background optional."""
    sizes = rng.random() < 0.25
    phrases = [describe(item, size=sizes) for item in scene.objects]
    relation = relation_between(scene.objects[0], scene.objects[1]) if len(scene.objects) == 2 else None
    if relation is not None and rng.random() < 0.75:
        if relation in ("left of", "right of") and rng.random() < 0.3:
            relation = f"to the {relation}"
        text = f"{phrases[0]} {relation} {phrases[1]}"
    elif len(phrases) == 1:
        text = phrases[0]
        if rng.random() < 0.15:
            text = describe(scene.objects[0], size=sizes, article=False)
    else:
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
        if len(phrases) == 2 and rng.random() < 0.1:
            text = f"{phrases[0]}, {phrases[1]}"
    if len(phrases) < 4 and rng.random() < 0.15:
        text = str(rng.choice(["a picture of ", "an icon of ", "a drawing of "])) + text
    roll = rng.random()
    if roll < 0.4:
        text += f" on a {scene.pattern} {scene.background} background"
    elif roll < 0.5:
        text += f" on a {scene.pattern} background"
    elif roll < 0.6:
        text += f" on a {scene.background} background"
    return text
