"""How often the icon judge itself is wrong: on real scenes whose truth is known, and on shapes that are no icon.

Run as `python -m attnctrl.evaluate.icons [--scenes 500] [--output FILE.md]`.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ..icons.world import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    NOUNS,
    PATTERNS,
    Scene,
    SceneObject,
    background_pixels,
    sample_scene,
    silhouette,
)
from .icons import Detection, IconJudge
from .intervals import percent
from .scoring import HELD_OUT, match, objects_right


def clean(scene: Scene, rng: np.random.Generator) -> Image.Image:
    return scene.render()


def degraded(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """What an imperfect generator does: wavy outline (0.6 px), blur (0.6-1.0 px), hue turned up to 8 degrees, noise, JPEG."""
    pixels = np.asarray(scene.render(), dtype=np.float32)
    shift = ndimage.gaussian_filter(rng.standard_normal((2, CANVAS, CANVAS)), (0, 3, 3), mode="wrap")
    grid = np.mgrid[0:CANVAS, 0:CANVAS] + 0.6 * shift / shift.std()
    sigma = rng.uniform(0.6, 1.0)
    pixels = np.stack(
        [
            ndimage.gaussian_filter(ndimage.map_coordinates(pixels[..., c], grid, order=1, mode="nearest"), sigma)
            for c in range(3)
        ],
        axis=-1,
    )
    hsv = np.asarray(Image.fromarray(pixels.astype(np.uint8)).convert("HSV"), dtype=np.int32).copy()
    hsv[..., 0] = (hsv[..., 0] + round(rng.uniform(-8, 8) * 256 / 360)) % 256
    pixels = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"), dtype=np.float32)
    pixels = pixels * rng.uniform(0.94, 1.06) + rng.normal(0, 5, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=70)
    return Image.open(buffer).convert("RGB")


def gridded(rng: np.random.Generator) -> Scene:
    return sample_scene(rng)


def freely_placed(rng: np.random.Generator) -> Scene:
    """One to three objects of 36-72 px anywhere on the canvas; boxes may touch, not overlap."""
    count = int(rng.integers(1, 4))
    while True:
        items: list[SceneObject] = []
        for _ in range(count):
            size = int(rng.integers(36, 73 if count < 3 else 57))
            x, y = (int(v) for v in rng.integers(0, CANVAS - size + 1, size=2))
            box = (x, y, x + size, y + size)
            if all(_apart(box, item.box) for item in items):
                items.append(SceneObject(str(rng.choice(list(NOUNS))), str(rng.choice(list(COLORS))), box))
        if len(items) == count:
            return Scene(tuple(items), str(rng.choice(PATTERNS)), str(rng.choice(list(BACKGROUNDS))))


def touching(rng: np.random.Generator) -> Scene:
    """Two objects of one colour, 40-64 px, side by side or one above the other, pushed together until they just touch."""
    color = str(rng.choice(list(COLORS)))
    one, two = (str(noun) for noun in rng.choice(list(NOUNS), size=2))
    sizes = [int(v) for v in rng.integers(40, 65, size=2)]
    offset = int(rng.integers(0, 17))
    across = rng.random() < 0.5
    spots = [(0, 20, sizes[0], 20 + sizes[0])]
    first = SceneObject(one, color, _turned(spots[0], across))
    for start in range(sizes[0], 0, -1):
        spot = (start, 20 + offset, start + sizes[1], 20 + offset + sizes[1])
        second = SceneObject(two, color, _turned(spot, across))
        if np.minimum(first.mask(), second.mask()).max() > 0.5:
            break
    return Scene((first, second), str(rng.choice(PATTERNS)), str(rng.choice(list(BACKGROUNDS))))


def _turned(box: tuple[int, int, int, int], across: bool) -> tuple[int, int, int, int]:
    return box if across else (box[1], box[0], box[3], box[2])


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def true_box(item: SceneObject) -> tuple[int, int, int, int]:
    """Tight box of the silhouette itself, px."""
    rows, columns = np.where(item.mask().max(1) > 0.5)[0], np.where(item.mask().max(0) > 0.5)[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(0.0, width) * max(0.0, height)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


@dataclass
class Tally:
    """Counts over scenes; `ious` of the boxes of right objects, `scores` their template IoU."""

    wanted: int = 0
    read: int = 0
    noun: int = 0
    color: int = 0
    both: int = 0
    pictures: int = 0
    exact: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.ious: list[float] = []
        self.scores: list[float] = []

    def add(self, scene: Scene, detections: list[Detection]) -> None:
        pairs = match(detections, scene)
        right = sum(pair.both for pair in pairs)
        self.wanted += len(pairs)
        self.read += len(detections)
        self.noun += sum(objects_right(detections, scene, by="noun"))
        self.color += sum(objects_right(detections, scene, by="color"))
        self.both += right
        self.pictures += 1
        self.exact += right == len(pairs) == len(detections)
        for item, pair in zip(scene.objects, pairs):
            if pair.both:
                self.ious.append(box_iou(true_box(item), pair.detection.box))
                self.scores.append(pair.detection.score)


def measure(
    count: int,
    draw: Callable[[np.random.Generator], Scene],
    render: Callable[[Scene, np.random.Generator], Image.Image],
    judge: IconJudge | None = None,
) -> Tally:
    """The judge on `count` held-out scenes; picture i depends on (HELD_OUT, i) alone."""
    judge, tally = judge or IconJudge(), Tally()
    for index in range(count):
        rng = np.random.default_rng((HELD_OUT, index))
        scene = draw(rng)
        image = render(scene, rng)
        start = time.perf_counter()
        detections = judge.read(image)
        tally.seconds += time.perf_counter() - start
        tally.add(scene, detections)
    return tally


# ---- shapes that are no icon -----------------------------------------------------------------------------------------


def _ellipse(rng: np.random.Generator, size: int) -> np.ndarray:
    image = Image.new("L", (4 * size, 4 * size))
    width, height = (4 * size * rng.uniform(0.55, 1.0, size=2)).astype(int)
    ImageDraw.Draw(image).ellipse((0, 0, width, height), fill=255)
    image = image.rotate(rng.uniform(0, 180), center=(width // 2, height // 2))
    return np.asarray(image.resize((size, size), Image.BOX), dtype=np.float32) / 255


def _blob(rng: np.random.Generator, size: int) -> np.ndarray:
    """A closed curve with a few random harmonics."""
    angle = np.linspace(0, 2 * np.pi, 200)
    radius = 1 + sum(rng.uniform(0, 0.5 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 7))
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    points = (points - points.min(0)) / (points.max(0) - points.min(0)).max() * (4 * size - 1)
    image = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(image).polygon([tuple(p) for p in points], fill=255)
    return np.asarray(image.resize((size, size), Image.BOX), dtype=np.float32) / 255


def _rectangle(rng: np.random.Generator, size: int) -> np.ndarray:
    out = np.zeros((size, size), dtype=np.float32)
    width, height = (size * rng.uniform(0.5, 1.0, size=2)).astype(int)
    out[:height, :width] = 1
    return out


def _half(rng: np.random.Generator, size: int) -> np.ndarray:
    shape = silhouette(str(rng.choice(list(NOUNS))), size).copy()
    half = (slice(None, size // 2), slice(size // 2, None))[rng.integers(2)]
    shape[(half, slice(None)) if rng.random() < 0.5 else (slice(None), half)] = 0
    return shape


def _spliced(rng: np.random.Generator, size: int) -> np.ndarray:
    """One noun's left or upper half with another's right or lower half."""
    first, second = (silhouette(str(noun), size) for noun in rng.choice(list(NOUNS), size=2, replace=False))
    shape = first.copy()
    if rng.random() < 0.5:
        shape[size // 2 :] = second[size // 2 :]
    else:
        shape[:, size // 2 :] = second[:, size // 2 :]
    return shape


def _overlaid(rng: np.random.Generator, size: int) -> np.ndarray:
    first, second = (silhouette(str(noun), size) for noun in rng.choice(list(NOUNS), size=2, replace=False))
    return np.maximum(first, second)


IMPOSTORS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "ellipse": _ellipse,
    "rectangle": _rectangle,
    "random blob": _blob,
    "half a silhouette": _half,
    "two silhouettes spliced": _spliced,
    "two silhouettes overlaid": _overlaid,
}


def impostor(kind: str, rng: np.random.Generator) -> Image.Image:
    """One wrong shape of 40-64 px, in a palette colour, on a random background."""
    size = int(rng.integers(40, 65))
    alpha = IMPOSTORS[kind](rng, size)[..., None]
    pixels = background_pixels(str(rng.choice(PATTERNS)), str(rng.choice(list(BACKGROUNDS)))).copy()
    x, y = rng.integers(0, CANVAS - size + 1, size=2)
    color = np.array(COLORS[str(rng.choice(list(COLORS)))], dtype=np.float32)
    pixels[y : y + size, x : x + size] += alpha * (color - pixels[y : y + size, x : x + size])
    return Image.fromarray((pixels + 0.5).astype(np.uint8))


def rejected(kind: str, count: int, judge: IconJudge | None = None) -> int:
    """How many of `count` wrong shapes the judge gives no noun at all."""
    judge = judge or IconJudge()
    pictures = (impostor(kind, np.random.default_rng((HELD_OUT, index))) for index in range(count))
    return sum(all(item.noun == "?" for item in judge.read(picture)) for picture in pictures)


def report(count: int) -> str:
    """Markdown of all checks."""
    sets = {
        "clean": (gridded, clean),
        "degraded": (gridded, degraded),
        "free 36-72 px": (freely_placed, clean),
        "free, degraded": (freely_placed, degraded),
        "touching, one colour": (touching, clean),
        "touching, degraded": (touching, degraded),
    }
    lines = [
        "# The icon judge's own error",
        "",
        f"`python -m attnctrl.evaluate.icons --scenes {count}`: held-out seeds ({HELD_OUT}, i), Wilson 95 % intervals.",
        "",
        "| scenes | measure | right | rate | 95 % |",
        "|---|---|---|---|---|",
    ]
    notes = []
    IconJudge().read(clean(gridded(np.random.default_rng(0)), np.random.default_rng(0)))  # caches, outside the clock
    for name, (draw, render) in sets.items():
        tally = measure(count, draw, render)
        for label, right, total in (
            ("noun and colour found", tally.both, tally.wanted),
            ("noun found", tally.noun, tally.wanted),
            ("colour found", tally.color, tally.wanted),
            ("precision", tally.both, tally.read),
            ("whole picture exact", tally.exact, tally.pictures),
        ):
            lines.append(f"| {name} | {label} | {percent(right, total)} |")
        notes.append(
            f"- {name}: mean box IoU {np.mean(tally.ious):.3f}, template IoU median {np.median(tally.scores):.3f} and 1st "
            f"percentile {np.quantile(tally.scores, 0.01):.3f}, {tally.pictures / tally.seconds:.0f} pictures a second."
        )
    lines += ["", *notes, "", "Shapes that are no icon, one a picture; right = no noun given:", ""]
    lines += ["| shape | right | rate | 95 % |", "|---|---|---|---|"]
    wrong = max(2, count // 2)
    lines += [f"| {kind} | {percent(rejected(kind, wrong), wrong)} |" for kind in IMPOSTORS]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m attnctrl.evaluate.icons", description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=500, help="scenes per set (default 500)")
    parser.add_argument("--output", type=Path, help="also write the markdown here")
    options = parser.parse_args(argv)
    text = report(options.scenes)
    print(text, end="")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
