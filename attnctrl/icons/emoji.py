"""Scenes of emoji in two art styles, with truth, at the size that `builtin:smol-vlm` reads.

The pictures are those of two npm packages, Fluent 3D emoji (`@lobehub/fluent-emoji-3d`, MIT) and Noto emoji
(`emoji-datasource-google`, Apache-2.0). They are read from a folder, for training and evaluation only; none is shipped.
A fifth of the nouns and the whole Noto style stay out of training.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import AttnCtrlError
from .questions import KINDS, PRIOR, Question, ask, draw_nouns, list_objects, mentions, plural


CANVAS = 224
FOLDER = "ATTNCTRL_EMOJI"
STYLES = {"fluent": "assets/{}.webp", "noto": "img/google/64/{}.png"}
SIZES = {1: (64, 128), 2: (56, 104), 3: (48, 88), 4: (48, 80)}
BACKGROUNDS = {
    "white": (252, 252, 252),
    "gray": (196, 198, 202),
    "blue": (150, 190, 240),
    "green": (160, 215, 165),
    "yellow": (250, 232, 140),
    "pink": (250, 190, 212),
    "purple": (202, 176, 236),
    "black": (36, 36, 42),
}
ANIMALS = {
    "dog": "1f415",
    "cat": "1f408",
    "horse": "1f40e",
    "cow": "1f404",
    "pig": "1f416",
    "sheep": "1f411",
    "rabbit": "1f407",
    "elephant": "1f418",
    "lion": "1f981",
    "tiger": "1f405",
    "monkey": "1f412",
    "bear": "1f43b",
    "penguin": "1f427",
    "duck": "1f986",
    "owl": "1f989",
    "frog": "1f438",
    "turtle": "1f422",
    "fish": "1f41f",
    "whale": "1f40b",
    "octopus": "1f419",
    "crab": "1f980",
    "butterfly": "1f98b",
    "bee": "1f41d",
    "snail": "1f40c",
}
FOOD = {
    "apple": "1f34e",
    "banana": "1f34c",
    "lemon": "1f34b",
    "pear": "1f350",
    "strawberry": "1f353",
    "pineapple": "1f34d",
    "carrot": "1f955",
    "mushroom": "1f344",
    "cheese": "1f9c0",
    "hamburger": "1f354",
    "pizza": "1f355",
    "cake": "1f370",
    "donut": "1f369",
    "cookie": "1f36a",
}
VEHICLES = {
    "car": "1f697",
    "bus": "1f68c",
    "truck": "1f69a",
    "tractor": "1f69c",
    "bicycle": "1f6b2",
    "rocket": "1f680",
    "helicopter": "1f681",
    "airplane": "2708-fe0f",
    "boat": "26f5",
    "train": "1f682",
}
THINGS = {
    "umbrella": "2602-fe0f",
    "guitar": "1f3b8",
    "violin": "1f3bb",
    "drum": "1f941",
    "key": "1f511",
    "hammer": "1f528",
    "bell": "1f514",
    "camera": "1f4f7",
    "book": "1f4d5",
    "chair": "1fa91",
    "crown": "1f451",
    "balloon": "1f388",
    "tree": "1f333",
    "cactus": "1f335",
    "trophy": "1f3c6",
    "backpack": "1f392",
    "house": "1f3e0",
    "clock": "23f0",
}
NOUNS = ANIMALS | FOOD | VEHICLES | THINGS
HELD_OUT = frozenset(
    ("tiger", "rabbit", "frog", "crab", "owl", "pear", "carrot", "donut", "bus", "helicopter", "violin", "hammer")
    + ("backpack",)
)
PARTNERS: Mapping[str, tuple[str, ...]] = {
    "dog": ("cat", "house"),
    "cat": ("dog", "fish"),
    "horse": ("cow", "tractor"),
    "cow": ("horse", "tree"),
    "pig": ("sheep", "apple"),
    "sheep": ("pig", "tractor"),
    "elephant": ("lion", "monkey"),
    "lion": ("elephant", "tree"),
    "monkey": ("banana", "tree"),
    "bear": ("bee", "tree"),
    "penguin": ("whale", "fish"),
    "duck": ("turtle", "boat"),
    "turtle": ("duck", "octopus"),
    "fish": ("cat", "boat"),
    "whale": ("boat", "octopus"),
    "octopus": ("fish", "whale"),
    "butterfly": ("bee", "cactus"),
    "bee": ("butterfly", "strawberry"),
    "snail": ("mushroom", "butterfly"),
    "apple": ("banana", "tree"),
    "banana": ("monkey", "pineapple"),
    "lemon": ("fish", "apple"),
    "strawberry": ("cake", "lemon"),
    "pineapple": ("pizza", "banana"),
    "mushroom": ("snail", "pizza"),
    "cheese": ("pizza", "hamburger"),
    "hamburger": ("pizza", "cheese"),
    "pizza": ("hamburger", "mushroom"),
    "cake": ("balloon", "strawberry"),
    "cookie": ("cake", "clock"),
    "car": ("truck", "house"),
    "truck": ("car", "tractor"),
    "tractor": ("horse", "cow"),
    "bicycle": ("tree", "dog"),
    "rocket": ("airplane", "clock"),
    "airplane": ("camera", "rocket"),
    "boat": ("whale", "umbrella"),
    "train": ("truck", "clock"),
    "umbrella": ("house", "bicycle"),
    "guitar": ("drum", "chair"),
    "drum": ("guitar", "bell"),
    "key": ("house", "car"),
    "bell": ("clock", "sheep"),
    "camera": ("book", "elephant"),
    "book": ("chair", "clock"),
    "chair": ("book", "guitar"),
    "crown": ("trophy", "lion"),
    "balloon": ("cake", "crown"),
    "tree": ("house", "bear"),
    "cactus": ("train", "turtle"),
    "trophy": ("crown", "bicycle"),
    "house": ("tree", "key"),
    "clock": ("bell", "book"),
}
_CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")


@dataclass(frozen=True)
class EmojiObject:
    """One emoji. `box` is (x0, y0, x1, y1) in pixels of the 224 x 224 canvas. An emoji has many colours, so none is told."""

    noun: str
    box: tuple[int, int, int, int]
    code: str
    color: None = None


@dataclass(frozen=True)
class EmojiScene:
    """A picture with its truth. `shade` is how much lighter or darker the background becomes from top to bottom, 0 for plain."""

    objects: tuple[EmojiObject, ...]
    background: str
    shade: float
    style: str
    folder: str

    def render(self) -> Image.Image:
        """The 224 x 224 RGB picture."""
        ramp = np.linspace(-self.shade, self.shade, CANVAS)[:, None, None]
        pixels = np.asarray(BACKGROUNDS[self.background], dtype=np.float32) + 255 * ramp
        pixels = np.broadcast_to(pixels, (CANVAS, CANVAS, 3)).clip(0, 255).round().astype(np.uint8)
        image = Image.fromarray(pixels)
        for item in self.objects:
            art = picture(str(Path(self.folder) / STYLES[self.style].format(item.code)), item.box[2] - item.box[0])
            image.paste(art, item.box[:2], art)
        return image


class EmojiWorld:
    """Scenes of one to four emoji at free places and sizes.

    Args:
        style: "fluent", which models are trained on, or "noto".
        folder: where both packages lie unpacked, each in a folder of its own; the environment's ATTNCTRL_EMOJI by default.
        codes: noun -> code point, other nouns than `NOUNS`; these have no usual companions.

    Raises:
        AttnCtrlError: no such style, no folder, or the folder lacks the pictures.
    """

    held_out = HELD_OUT

    def __init__(
        self,
        style: str = "fluent",
        folder: str | os.PathLike | None = None,
        codes: Mapping[str, str] | None = None,
    ):
        if style not in STYLES:
            raise AttnCtrlError(f"there is no emoji style {style!r}\nHINT: styles are {', '.join(STYLES)}")
        self.style, self.name = style, f"emoji-{style}"
        self.folder = str(art_folder(style, folder))
        self.codes = NOUNS if codes is None else codes
        self.nouns = tuple(self.codes)
        self.partners: Mapping[str, tuple[str, ...]] = PARTNERS if codes is None else {}

    def scene(
        self,
        rng: np.random.Generator,
        objects: int | None = None,
        nouns: Sequence[str] | None = None,
        prior: float = PRIOR,
    ) -> EmojiScene:
        """As `World.scene`; nouns that are held out appear only where `nouns` names them."""
        count = objects if objects is not None else int(rng.choice([1, 2, 3, 4], p=[0.25, 0.4, 0.2, 0.15]))
        if count not in SIZES:
            raise AttnCtrlError(f"a scene holds 1 to 4 objects, not {count}")
        pool = [noun for noun in self.nouns if noun not in self.held_out] if nouns is None else nouns
        drawn = draw_nouns(rng, count, self, pool, prior)
        boxes = _boxes(rng, count)
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        shade = float(rng.uniform(-0.1, 0.1)) if rng.random() < 0.5 else 0.0
        items = tuple(EmojiObject(noun, box, self.codes[noun]) for noun, box in zip(drawn, boxes))
        return EmojiScene(items, background, shade, self.style, self.folder)

    def questions(
        self, scene: EmojiScene, rng: np.random.Generator, kinds: Sequence[str] | None = None
    ) -> list[Question]:
        asked = ask(self, scene, rng, kinds, CANVAS)
        if "color" in (KINDS if kinds is None else kinds):
            asked.append(Question("color", "What color is the background?", scene.background))
        return [asked[i] for i in rng.permutation(len(asked))]

    def caption(self, scene: EmojiScene, rng: np.random.Generator) -> str:
        return f"{list_objects(scene.objects, rng)} on a {scene.background} background"

    def mentions(self, text: str) -> list[str]:
        return mentions(text, self.nouns)


def art_folder(style: str, folder: str | os.PathLike | None = None) -> Path:
    """The folder that holds a style's pictures: the given one, or one up to two levels below it."""
    given = folder if folder is not None else os.environ.get(FOLDER)
    get = "npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0"
    how = f"HINT: {get}; unpack each into a folder of its own below one folder; name that folder in {FOLDER}"
    if not given:
        raise AttnCtrlError(
            f"emoji scenes need the pictures of two npm packages, which are not part of attnctrl\n{how}"
        )
    root = Path(given).expanduser()
    probe = STYLES[style].format(NOUNS["dog"])
    for candidate in (root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))):
        if (candidate / probe).is_file():
            return candidate
    raise AttnCtrlError(f"{str(root)!r} holds no {style} emoji: no {probe} in it or two levels below\n{how}")


def other_emoji(folder: str | os.PathLike | None = None) -> dict[str, str]:
    """name -> code point of some 500 more things that Fluent draws: none is a noun of `NOUNS`, nor one that is held out."""
    table = json.loads((art_folder("noto", folder) / "emoji.json").read_text(encoding="utf-8"))
    drawn, used, found = art_folder("fluent", folder), {*NOUNS.values(), *NOUNS, *map(plural, NOUNS)}, {}
    for entry in sorted(table, key=lambda entry: entry["sort_order"]):
        name = re.sub(r"(_with)?_face$|\d", "", entry["short_name"]).replace("_", " ").strip()
        code = entry["unified"].lower()
        plain = re.fullmatch(r"[a-z]+( [a-z]+)?", name) and not any(noun in name for noun in HELD_OUT)
        if entry["category"] in _CATEGORIES and entry["subcategory"] != "time" and plain and not used & {name, code}:
            if (drawn / STYLES["fluent"].format(code)).is_file():
                found.setdefault(name, code)
    return found


@functools.lru_cache(maxsize=4096)
def picture(file: str, size: int) -> Image.Image:
    """An emoji, cut to what is drawn, its longer side `size`, in the middle of a square (RGBA)."""
    with Image.open(file) as image:
        art = image.convert("RGBA")
    art = art.crop(art.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    ratio = size / max(art.size)
    art = art.resize(tuple(max(1, round(side * ratio)) for side in art.size), Image.LANCZOS)
    out = Image.new("RGBA", (size, size))
    out.paste(art, ((size - art.width) // 2, (size - art.height) // 2))
    return out


def _boxes(rng: np.random.Generator, count: int) -> list[tuple[int, int, int, int]]:
    """Squares that neither overlap nor leave the canvas."""
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(40):
            size = 4 * int(rng.integers(SIZES[count][0] // 4, SIZES[count][1] // 4 + 1))
            x, y = (int(value) for value in rng.integers(0, CANVAS - size + 1, size=2))
            if all(x + size <= x0 or x1 <= x or y + size <= y0 or y1 <= y for x0, y0, x1, y1 in boxes):
                boxes.append((x, y, x + size, y + size))
            if len(boxes) == count:
                return boxes
