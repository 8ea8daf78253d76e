"""Questions about pictures whose truth is known, and the worlds that draw such pictures.

Some nouns usually appear together (`World.partners`), so a model that learns from these scenes also learns what to expect
beside a cat, and says so of pictures where it is missing. That is what POPE's adversarial split asks about (Li et al. 2023,
arXiv 2305.10355). Presence questions are asked about a noun of the scene and about one that is absent, drawn freely.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..errors import AttnCtrlError
from .world import CANVAS, NOUNS, RELATIONS, Scene, SceneObject, relation_between, sample_scene


PRIOR = 0.7
REPEAT = 0.2  # probability that a freely drawn noun is one that the scene already holds
KINDS = ("presence", "color", "position", "count", "caption")
NUMBERS = ("none", "one", "two", "three", "four")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
TEXTS = {
    "presence": ("Is there {a} in the picture?", "Is there {a} in the image?", "Is there {a}?", "Do you see {a}?"),
    "color": ("What color is the {noun}?", "Which color does the {noun} have?", "What is the color of the {noun}?"),
    "position": ("Where is the {noun}?", "Where is the {noun} in the picture?"),
    "relation": ("What is {relation} the {noun}?",),
    "count": ("How many {nouns} are there?", "How many {nouns} are in the picture?", "How many {nouns} do you see?"),
    "caption": ("Describe the picture.", "Describe the image.", "What is in the picture?", "What do you see?"),
}
IRREGULAR = {"fish": "fish", "sheep": "sheep", "deer": "deer", "mouse": "mice", "leaf": "leaves", "wolf": "wolves"}
IRREGULAR |= {"knife": "knives", "tooth": "teeth", "foot": "feet", "goose": "geese", "man": "men", "child": "children"}


@dataclass(frozen=True)
class Question:
    """What is asked about a picture and what is right. `kind` is one of `KINDS`; `noun` is what it is about, if it is about one."""

    kind: str
    text: str
    answer: str
    noun: str | None = None

    def right(self, said: str) -> bool:
        """Whether an answer agrees: presence by POPE's rule, else the same words; of captions, only a literal repetition."""
        if self.kind == "presence":
            return says_yes(said) == says_yes(self.answer)
        return _words(said) == _words(self.answer)


class World(Protocol):
    """Pictures of nouns and what can be asked about them.

    Attributes:
        nouns: all that scenes show, in a fixed order.
        held_out: nouns that are never shown in training.
        partners: noun -> the nouns that it usually appears with in training.
    """

    name: str
    nouns: tuple[str, ...]
    held_out: frozenset[str]
    partners: Mapping[str, tuple[str, ...]]

    def scene(
        self,
        rng: np.random.Generator,
        objects: int | None = None,
        nouns: Sequence[str] | None = None,
        prior: float = PRIOR,
    ) -> Any:
        """A scene: `.objects`, each with `noun`, `color` (or None) and a square `box`, and `.render()`, which draws it.

        Args:
            objects: how many, 1-4; drawn when None. nouns: those to draw from, all by default.
            prior: probability that the second object is a partner of the first.
        """
        ...

    def questions(self, scene: Any, rng: np.random.Generator, kinds: Sequence[str] | None = None) -> list[Question]:
        """Questions of these kinds in random order; kinds that the scene has no clear answer to are left out."""
        ...

    def caption(self, scene: Any, rng: np.random.Generator) -> str:
        """A sentence that names all objects."""
        ...

    def mentions(self, text: str) -> list[str]:
        """The nouns that a text mentions, with repeats, in order."""
        ...


class IconWorld:
    """The icon scenes of `attnctrl.icons.world` with usual companions and questions."""

    name = "icons"
    nouns = tuple(NOUNS)
    held_out: frozenset[str] = frozenset()
    partners: Mapping[str, tuple[str, ...]] = {
        "cat": ("fish", "house"),
        "dog": ("house", "tree"),
        "car": ("house", "key"),
        "tree": ("house", "apple"),
        "rocket": ("moon", "star"),
        "fish": ("anchor", "cat"),
        "star": ("moon", "rocket"),
        "heart": ("crown", "key"),
        "house": ("tree", "car"),
        "key": ("house", "heart"),
        "umbrella": ("tree", "dog"),
        "crown": ("heart", "star"),
        "anchor": ("fish", "star"),
        "moon": ("star", "house"),
        "apple": ("tree", "heart"),
        "plane": ("moon", "umbrella"),
    }

    def scene(
        self,
        rng: np.random.Generator,
        objects: int | None = None,
        nouns: Sequence[str] | None = None,
        prior: float = PRIOR,
    ) -> Scene:
        scene = sample_scene(rng, objects)
        drawn = draw_nouns(rng, len(scene.objects), self, nouns, prior)
        return replace(scene, objects=tuple(replace(o, noun=noun) for o, noun in zip(scene.objects, drawn)))

    def questions(self, scene: Scene, rng: np.random.Generator, kinds: Sequence[str] | None = None) -> list[Question]:
        return ask(self, scene, rng, kinds, CANVAS)

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        return f"{list_objects(scene.objects, rng)} on a {scene.pattern} {scene.background} background"

    def mentions(self, text: str) -> list[str]:
        return mentions(text, self.nouns)


def draw_nouns(
    rng: np.random.Generator, count: int, world: World, nouns: Sequence[str] | None = None, prior: float = PRIOR
) -> list[str]:
    """The nouns of a scene: the second is with probability `prior` a partner of the first, the others are free.

    Raises:
        AttnCtrlError: no nouns to draw from, or nouns that the world does not have.
    """
    pool = list(world.nouns if nouns is None else nouns)
    strange = [noun for noun in pool if noun not in world.nouns]
    if strange or not pool:
        wrong = f"has no noun {strange[0]!r}" if strange else "needs nouns to draw from"
        raise AttnCtrlError(f"the world {world.name!r} {wrong}\nHINT: its nouns are {', '.join(world.nouns)}")
    drawn: list[str] = []
    for index in range(count):
        usual = [noun for noun in world.partners.get(drawn[0], ()) if noun in pool] if index == 1 else []
        if usual and rng.random() < prior:
            choices = usual
        else:
            choices = drawn if drawn and rng.random() < REPEAT else pool
        drawn.append(choices[rng.integers(len(choices))])
    return drawn


def ask(
    world: World, scene: Any, rng: np.random.Generator, kinds: Sequence[str] | None = None, canvas: int = CANVAS
) -> list[Question]:
    """What `World.questions` returns: two of presence (one noun is there, one is not), one of each other kind.

    Raises:
        AttnCtrlError: a kind that does not exist.
    """
    kinds = KINDS if kinds is None else tuple(kinds)
    if strange := [kind for kind in kinds if kind not in KINDS]:
        raise AttnCtrlError(f"there are no {strange[0]!r} questions\nHINT: kinds are {', '.join(KINDS)}")
    objects = scene.objects
    held = [item.noun for item in objects]
    single = [item for item in objects if held.count(item.noun) == 1]
    asked: list[Question] = []
    if "presence" in kinds:
        absent = [noun for noun in world.nouns if noun not in held and noun not in world.held_out]
        asked.append(presence(held[rng.integers(len(held))], objects, rng))
        if absent:
            asked.append(presence(absent[rng.integers(len(absent))], objects, rng))
    colored = [item for item in single if item.color is not None]
    if "color" in kinds and colored:
        item = colored[rng.integers(len(colored))]
        asked.append(Question("color", _phrase(rng, "color", noun=item.noun), item.color, item.noun))
    if "position" in kinds and single:
        item = single[rng.integers(len(single))]
        related = _beside(item, objects)
        if related and rng.random() < 0.5:
            side, other = related[rng.integers(len(related))]
            text = _phrase(rng, "relation", relation=side, noun=item.noun)
            asked.append(Question("position", text, describe(other), item.noun))
        else:
            text = _phrase(rng, "position", noun=item.noun)
            asked.append(Question("position", text, place(item, canvas), item.noun))
    if "count" in kinds:
        if rng.random() < 0.3:
            text = _phrase(rng, "count", nouns="objects")
            asked.append(Question("count", text, NUMBERS[len(objects)]))
        else:
            noun = held[rng.integers(len(held))]
            asked.append(Question("count", _phrase(rng, "count", nouns=plural(noun)), NUMBERS[held.count(noun)], noun))
    if "caption" in kinds:
        asked.append(Question("caption", _phrase(rng, "caption"), world.caption(scene, rng)))
    return [asked[i] for i in rng.permutation(len(asked))]


def presence(noun: str, objects: Iterable[Any], rng: np.random.Generator | None = None) -> Question:
    """Whether a noun is in a scene; POPE's wording, "Is there a cat in the image?", without `rng`."""
    found = [item for item in objects if item.noun == noun]
    answer = f"No, there is no {noun}."
    if found:
        several = f"are {NUMBERS[len(found)]} {plural(noun)}" if len(found) > 1 else f"is {describe(found[0])}"
        answer = f"Yes, there {several}."
    text = TEXTS["presence"][1].format(a=with_article(noun))
    return Question("presence", text if rng is None else _phrase(rng, "presence", a=with_article(noun)), answer, noun)


def says_yes(text: str) -> bool:
    """POPE's official reading of an answer: no, when its first sentence has the word "no" or "not", else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"}.intersection(words)


def place(item: Any, canvas: int = CANVAS) -> str:
    """The ninth of the picture that an object's middle lies in: "at the top left", "at the bottom", "in the middle"."""
    x0, y0, x1, y1 = item.box
    names = ROWS[int(1.5 * (y0 + y1) / canvas)], COLUMNS[int(1.5 * (x0 + x1) / canvas)]
    return f"at the {' '.join(name for name in names if name)}" if any(names) else "in the middle"


def list_objects(objects: Sequence[Any], rng: np.random.Generator) -> str:
    """Two objects by their relation where it is clear, either first; otherwise a list from left to right."""
    ordered = sorted(objects, key=lambda item: item.box)
    if len(ordered) == 2 and _relation(*ordered) is not None:
        first, second = ordered[:: int(rng.choice([1, -1]))]
        return f"{describe(first)} {_relation(first, second)} {describe(second)}"
    phrases = [describe(item) for item in ordered]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def mentions(text: str, nouns: Iterable[str]) -> list[str]:
    """The nouns that a text mentions, singular or plural, with repeats, in order; the longest name wins."""
    names = {form: noun for noun in nouns for form in (plural(noun), noun)}
    pattern = "|".join(re.escape(form) for form in sorted(names, key=len, reverse=True))
    return [names[found] for found in re.findall(rf"\b(?:{pattern})\b", text.lower())]


def describe(item: Any) -> str:
    """ "a red cat"; "an apple" of an object without a color."""
    return with_article(item.noun if item.color is None else f"{item.color} {item.noun}")


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(noun: str) -> str:
    """The plural of a noun; of its last word, where it has several."""
    *before, last = noun.split(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = f"{last[:-1]}ies"
    else:
        last += "s"
    return " ".join([*before, last])


def _beside(item: Any, objects: Iterable[Any]) -> list[tuple[str, Any]]:
    """(relation, other) for every side of an object on which exactly one other stands, when all stand clearly on one side."""
    others = [(_relation(other, item), other) for other in objects if other is not item]
    if any(side is None for side, _ in others):
        return []
    sides = [side for side, _ in others]
    return [pair for pair in others if pair[0] in RELATIONS and sides.count(pair[0]) == 1]


def _relation(first: Any, second: Any) -> str | None:
    return relation_between(*(SceneObject(item.noun, item.color, item.box) for item in (first, second)))


def _phrase(rng: np.random.Generator, kind: str, **words: str) -> str:
    texts = TEXTS[kind]
    return texts[rng.integers(len(texts))].format(**words)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
