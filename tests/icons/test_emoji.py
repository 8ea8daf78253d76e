"""Emoji scenes are tested on pictures drawn here, laid out as the two npm packages lay theirs out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from attnctrl import AttnCtrlError
from attnctrl.icons.emoji import BACKGROUNDS, CANVAS, HELD_OUT, NOUNS, PARTNERS, STYLES, EmojiWorld, other_emoji


MORE = [
    ("gorilla", "1F98D", "Animals & Nature", "animal-mammal"),
    ("fox_face", "1F98A", "Animals & Nature", "animal-mammal"),
    ("tiger2", "1F42F", "Animals & Nature", "animal-mammal"),  # a held-out noun, drawn otherwise
    ("minibus", "1F690", "Travel & Places", "transport-ground"),  # has one in its name
    ("dog", "1F436", "Animals & Nature", "animal-mammal"),  # has a noun's name
    ("clock1", "1F550", "Travel & Places", "time"),
    ("smile", "1F604", "Smileys & Emotion", "face-smiling"),
    ("moose", "1FACE", "Animals & Nature", "animal-mammal"),  # Fluent does not draw it
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every noun an ellipse of its own colour that touches no border of its picture, red in Fluent, green in Noto."""
    root = tmp_path_factory.mktemp("emoji")
    for style, (name, side) in {"fluent": ("fluent/package", 256), "noto": ("google/package", 64)}.items():
        for index, code in enumerate([*NOUNS.values(), *(entry[1].lower() for entry in MORE[:-1])]):
            art = Image.new("RGBA", (side, side))
            color = (255, index, 0, 255) if style == "fluent" else (0, 255, index, 255)
            ImageDraw.Draw(art).ellipse((side // 4, side // 8, side // 2, side * 7 // 8), fill=color)
            file = root / name / STYLES[style].format(code)
            file.parent.mkdir(parents=True, exist_ok=True)
            art.save(file, lossless=True)
    keys = ("short_name", "unified", "category", "subcategory")
    table = [dict(zip(keys, entry)) | {"sort_order": i} for i, entry in enumerate(MORE)]
    (root / "google/package/emoji.json").write_text(json.dumps(table), encoding="utf-8")
    return root


@pytest.mark.parametrize("style", STYLES)
def test_scenes_show_what_they_tell(folder, style):
    world = EmojiWorld(style, folder)
    rng = np.random.default_rng(0)
    for index in range(60):
        scene = world.scene(rng)
        assert 1 <= len(scene.objects) <= 4 and scene.background in BACKGROUNDS
        picture = np.asarray(scene.render()).astype(int)
        assert picture.shape == (CANVAS, CANVAS, 3)
        plain, covered = np.ones((CANVAS, CANVAS), bool), np.zeros((CANVAS, CANVAS), int)
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 and x1 <= CANVAS and 0 <= y0 and y1 <= CANVAS and x1 - x0 == y1 - y0 >= 48
            plain[y0:y1, x0:x1] = False
            covered[y0:y1, x0:x1] += 1
            number = list(NOUNS).index(item.noun)
            wanted = (255, number, 0) if style == "fluent" else (0, 255, number)
            assert np.abs(picture[(y0 + y1) // 2, (x0 + x1) // 2] - wanted).max() <= 2
            rows = np.flatnonzero(np.abs(picture[y0:y1, x0:x1] - wanted).max(-1).min(1) <= 2)
            assert rows[0] <= 4 and rows[-1] >= y1 - y0 - 5  # the drawing fills its box
        assert covered.max() == 1
        assert np.abs(picture[plain] - BACKGROUNDS[scene.background]).max() <= 255 * abs(scene.shade) + 1


def test_held_out_nouns_appear_only_when_named(folder):
    world = EmojiWorld("fluent", folder)
    assert 0.15 <= len(HELD_OUT) / len(NOUNS) <= 0.25 and set(NOUNS) > HELD_OUT
    rng = np.random.default_rng(1)
    scenes = [world.scene(rng) for _ in range(200)]
    assert not {item.noun for scene in scenes for item in scene.objects} & HELD_OUT
    asked = " ".join(f"{q.text} {q.answer}" for scene in scenes for q in world.questions(scene, rng))
    assert not set(world.mentions(asked)) & HELD_OUT
    scene = world.scene(rng, objects=2, nouns=sorted(HELD_OUT))
    assert {item.noun for item in scene.objects} <= HELD_OUT


def test_partners_come_together_and_are_never_held_out(folder):
    world = EmojiWorld("fluent", folder)
    assert set(PARTNERS) == set(NOUNS) - HELD_OUT
    assert not {noun for usual in PARTNERS.values() for noun in usual} - set(PARTNERS)
    rng = np.random.default_rng(2)

    def share(prior: float) -> float:
        pairs = [[item.noun for item in world.scene(rng, objects=2, prior=prior).objects] for _ in range(300)]
        return float(np.mean([second in PARTNERS[first] for first, second in pairs]))

    assert share(0.7) > 0.6 and share(0.0) < 0.15


def test_questions_follow_from_the_scene(folder):
    world = EmojiWorld("fluent", folder)
    rng = np.random.default_rng(3)
    for _ in range(40):
        scene = world.scene(rng)
        held = [item.noun for item in scene.objects]
        asked = world.questions(scene, rng)
        assert {"presence", "count", "caption", "color"} <= {q.kind for q in asked}
        for question in asked:
            if question.kind == "presence":
                assert question.answer.startswith("Yes" if question.noun in held else "No")
            elif question.kind == "color":
                assert question.answer == scene.background and "background" in question.text
            elif question.kind == "caption":
                assert sorted(world.mentions(question.answer)) == sorted(held)
                assert question.answer.endswith(f"on a {scene.background} background")
    assert {q.kind for q in world.questions(scene, rng, ("presence",))} == {"presence"}


def test_same_seed_same_scene(folder):
    world = EmojiWorld("noto", folder)
    first, again = (world.scene(np.random.default_rng(4)) for _ in range(2))
    assert first == again and first.render().tobytes() == again.render().tobytes()


def test_other_emoji_share_no_name_with_the_nouns(folder):
    found = other_emoji(folder)
    assert found == {"gorilla": "1f98d", "fox": "1f98a"}
    world = EmojiWorld("fluent", folder, found)
    scene = world.scene(np.random.default_rng(5), objects=1)
    assert scene.objects[0].noun in found and scene.render().size == (CANVAS, CANVAS)


def test_bad_input(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("ATTNCTRL_EMOJI", raising=False)
    with pytest.raises(AttnCtrlError, match="no emoji style 'apple'\nHINT: styles are fluent, noto"):
        EmojiWorld("apple", folder)
    with pytest.raises(AttnCtrlError, match="not part of attnctrl\nHINT: npm pack @lobehub/fluent-emoji-3d@1.1.0"):
        EmojiWorld("fluent")
    monkeypatch.setenv("ATTNCTRL_EMOJI", str(tmp_path))
    with pytest.raises(AttnCtrlError, match="holds no noto emoji.*\nHINT: npm pack"):
        EmojiWorld("noto")
    with pytest.raises(AttnCtrlError, match="has no noun 'unicorn'"):
        EmojiWorld("fluent", folder).scene(np.random.default_rng(0), nouns=["unicorn"])
    with pytest.raises(AttnCtrlError, match="1 to 4 objects, not 5"):
        EmojiWorld("fluent", folder).scene(np.random.default_rng(0), objects=5)
