from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from attnctrl.errors import AttnCtrlError
from attnctrl.icons.questions import (
    KINDS,
    NUMBERS,
    IconWorld,
    Question,
    draw_nouns,
    mentions,
    place,
    plural,
    presence,
    says_yes,
)
from attnctrl.icons.world import COLORS, RELATIONS, Scene, SceneObject


WORLD = IconWorld()


@pytest.fixture(scope="module")
def asked():
    """(scene, question) pairs of 300 scenes."""
    rng = np.random.default_rng(0)
    scenes = [WORLD.scene(rng) for _ in range(300)]
    return [(scene, question) for scene in scenes for question in WORLD.questions(scene, rng)]


def of_kind(asked, kind):
    found = [(scene, question) for scene, question in asked if question.kind == kind]
    assert len(found) > 100
    return found


def test_presence_is_balanced_and_true(asked):
    answers = Counter()
    for scene, question in of_kind(asked, "presence"):
        there = [item for item in scene.objects if item.noun == question.noun]
        assert says_yes(question.answer) == bool(there)
        if len(there) == 1:
            assert f"a {there[0].color} {question.noun}" in question.answer
        elif there:
            assert f"{NUMBERS[len(there)]} {plural(question.noun)}" in question.answer
        answers[bool(there)] += 1
    assert answers[True] == answers[False] == 300


def test_colors_are_of_single_objects(asked):
    for scene, question in of_kind(asked, "color"):
        assert [item.color for item in scene.objects if item.noun == question.noun] == [question.answer]


def test_positions_and_neighbours(asked):
    sides = Counter()
    for scene, question in of_kind(asked, "position"):
        (item,) = [item for item in scene.objects if item.noun == question.noun]
        x, y = (side / 128 for side in item.center)
        if question.text.startswith("Where"):
            assert ("left" in question.answer, "right" in question.answer) == (x < 1 / 3, x > 2 / 3)
            assert ("top" in question.answer, "bottom" in question.answer) == (y < 1 / 3, y > 2 / 3)
            sides["where"] += 1
            continue
        side = next(side for side in RELATIONS if f" {side} the {item.noun}?" in question.text)
        dx, dy = RELATIONS[side]
        there = [
            f"a {other.color} {other.noun}"
            for other in scene.objects
            if other is not item
            and dx * (other.center[0] - item.center[0]) + dy * (other.center[1] - item.center[1]) > 47
        ]
        assert question.answer in there
        sides[side] += 1
    assert set(sides) == {"where", *RELATIONS}


def test_counts(asked):
    seen = Counter()
    for scene, question in of_kind(asked, "count"):
        nouns = [item.noun for item in scene.objects]
        assert question.answer == NUMBERS[nouns.count(question.noun) if question.noun else len(nouns)]
        assert (plural(question.noun) if question.noun else "objects") in question.text
        seen[question.noun is None, question.answer] += 1
    assert {answer for whole, answer in seen if whole} == set(NUMBERS[1:]) and seen[False, "two"] > 3


def test_captions_name_every_object(asked):
    for scene, question in of_kind(asked, "caption"):
        assert sorted(WORLD.mentions(question.answer)) == sorted(item.noun for item in scene.objects)
        words = question.answer.split()
        for color in COLORS:
            assert words.count(color) == sum(item.color == color for item in scene.objects)
        assert question.answer.endswith(f"on a {scene.pattern} {scene.background} background")


def test_caption_relations_are_true():
    rng, seen = np.random.default_rng(1), Counter()
    for _ in range(100):
        scene = WORLD.scene(rng, 2)
        text = WORLD.caption(scene, rng)
        side = next((side for side in RELATIONS if f" {side} " in text), None)
        if side is None or scene.objects[0].noun == scene.objects[1].noun:
            continue
        first, second = sorted(scene.objects, key=lambda item: text.index(item.noun))
        dx, dy = RELATIONS[side]
        assert dx * (first.center[0] - second.center[0]) + dy * (first.center[1] - second.center[1]) > 47
        seen[side] += 1
    assert set(seen) == set(RELATIONS)


def test_kinds_are_chosen():
    rng = np.random.default_rng(2)
    for kind in KINDS:
        asked = WORLD.questions(WORLD.scene(rng, 1), rng, [kind])
        assert [question.kind for question in asked] == [kind] * (2 if kind == "presence" else 1)
    with pytest.raises(AttnCtrlError, match="no 'colour' questions\nHINT: kinds are presence, color"):
        WORLD.questions(WORLD.scene(rng), rng, ["colour"])


def test_same_nouns_have_no_single_color_or_place():
    pair = Scene((SceneObject("cat", "red", (0, 0, 48, 48)), SceneObject("cat", "blue", (64, 64, 112, 112))))
    rng = np.random.default_rng(0)
    assert {question.kind for question in WORLD.questions(pair, rng)} == {"presence", "count", "caption"}
    assert presence("cat", pair.objects).answer == "Yes, there are two cats."
    assert presence("apple", pair.objects) == Question(
        "presence", "Is there an apple in the image?", "No, there is no apple.", "apple"
    )


def test_objects_without_colors():
    bare = SimpleNamespace(objects=(SimpleNamespace(noun="apple", color=None, box=(40, 40, 88, 88)),))
    assert presence("apple", bare.objects).answer == "Yes, there is an apple."
    assert place(bare.objects[0]) == "in the middle"


@pytest.mark.parametrize(("prior", "low", "high"), [(0.0, 0.05, 0.22), (0.7, 0.65, 0.83), (1.0, 1.0, 1.0)])
def test_usual_companions(prior, low, high):
    rng = np.random.default_rng(3)
    pairs = [draw_nouns(rng, 2, WORLD, prior=prior) for _ in range(500)]
    assert low <= np.mean([second in WORLD.partners[first] for first, second in pairs]) <= high
    assert {first for first, _ in pairs} == set(WORLD.nouns)


def test_nouns_to_draw_from():
    rng = np.random.default_rng(4)
    for objects in (1, 4):
        scene = WORLD.scene(rng, objects, nouns=["cat", "fish"])
        assert len(scene.objects) == objects and {item.noun for item in scene.objects} <= {"cat", "fish"}
    with pytest.raises(AttnCtrlError, match="'icons' has no noun 'zebra'\nHINT: its nouns are cat, dog"):
        WORLD.scene(rng, nouns=["cat", "zebra"])
    with pytest.raises(AttnCtrlError, match="needs nouns"):
        WORLD.scene(rng, nouns=[])


def test_partners_are_nouns():
    assert set(WORLD.partners) == set(WORLD.nouns)
    assert all(set(usual) <= set(WORLD.nouns) - {noun} for noun, usual in WORLD.partners.items())


@pytest.mark.parametrize(
    ("text", "yes"),
    [("Yes, a cat. No dog.", True), ("No, there is none.", False), ("There is not.", False), ("a notable cat", True)],
)
def test_pope_reads_the_first_sentence(text, yes):
    assert says_yes(text) is yes


def test_right_answers():
    assert Question("color", "", "red").right(" Red.") and not Question("color", "", "red").right("dark red")
    assert Question("presence", "", "Yes, there is a red cat.").right("yes")
    assert not Question("presence", "", "No, there is no cat.").right("Yes, there is a cat.")


def test_mentions_and_plurals():
    text = "Two fish, a Star and stars by the fire trucks and a fire, a catfish"
    assert mentions(text, ["fish", "star", "fire", "fire truck", "cat"]) == [
        *("fish", "star", "star", "fire truck", "fire")
    ]
    assert [plural(noun) for noun in ("fox", "cherry", "key", "bus", "mouse", "fish", "fire engine")] == [
        *("foxes", "cherries", "keys", "buses", "mice", "fish", "fire engines")
    ]
