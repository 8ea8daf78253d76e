import numpy as np
import pytest
from PIL import Image

from attnctrl.errors import AttnCtrlError
from attnctrl.evaluate.icons import Detection, IconJudge
from attnctrl.evaluate.scoring import extra, in_box, leaked, match, objects_right, relation_right
from attnctrl.evaluate.selfcheck import (
    IMPOSTORS,
    box_iou,
    clean,
    degraded,
    freely_placed,
    gridded,
    main,
    measure,
    rejected,
    true_box,
)
from attnctrl.icons import world
from attnctrl.icons.world import BACKGROUNDS, COLORS, NOUNS, PATTERNS, Scene, SceneObject, background_pixels


JUDGE = IconJudge()


def seen(noun: str, color: str, x: float = 64, y: float = 64, score: float = 0.9) -> Detection:
    return Detection(noun, color, (x - 20, y - 20, x + 20, y + 20), score)


# ---- the judge against scenes whose truth is known ----------------------------------------------------------------------


def test_clean_scenes_are_read_exactly():
    tally = measure(60, gridded, clean, JUDGE)
    assert tally.both == tally.wanted == tally.read
    assert np.mean(tally.ious) > 0.95 and min(tally.ious) > 0.8


@pytest.mark.parametrize("draw", [gridded, freely_placed])
def test_degraded_scenes_stay_above_the_bar(draw):
    tally = measure(40, draw, degraded, JUDGE)
    assert tally.both >= 0.96 * tally.wanted
    assert tally.both >= 0.96 * tally.read
    assert np.mean(tally.ious) > 0.9


def test_free_positions_and_sizes():
    tally = measure(40, freely_placed, clean, JUDGE)
    assert tally.both >= 0.98 * tally.wanted and tally.read == tally.wanted
    assert np.mean(tally.ious) > 0.95


@pytest.mark.parametrize("noun", NOUNS)
def test_every_noun_in_every_color(noun):
    for index, color in enumerate(COLORS):
        item = SceneObject(noun, color, (40, 32, 88, 80))
        scene = Scene((item,), PATTERNS[index % 4], list(BACKGROUNDS)[index % 4])
        (found,) = JUDGE.read(scene.render())
        assert (found.noun, found.color) == (noun, color)
        assert box_iou(true_box(item), found.box) > 0.9


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [("heart", "house", 8), ("cat", "cat", 8), ("star", "apple", 8), ("tree", "car", 7), ("crown", "fish", 9)],
)
@pytest.mark.parametrize("color", ["red", "black"])
def test_touching_objects_of_one_color_are_split(first, second, gap, color):
    """Boxes overlap by `gap`, the sum of both margins: the silhouettes touch."""
    items = (SceneObject(first, color, (8, 30, 56, 78)), SceneObject(second, color, (56 - gap, 26, 112 - gap, 82)))
    found = JUDGE.read(Scene(items, "dotted", "mint").render())
    assert sorted(item.noun for item in found) == sorted([first, second])
    for item in match(found, [(first, color), (second, color)]):
        assert item.both


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture_has_no_objects(pattern, background):
    assert JUDGE.read(Image.fromarray(background_pixels(pattern, background).astype(np.uint8))) == []


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_shapes_that_are_no_icon_get_no_noun(kind):
    assert rejected(kind, 12, JUDGE) >= 10


def test_an_object_in_no_palette_color_has_no_color():
    pixels = background_pixels("plain", "white").copy()
    pixels[40:88, 40:88] += world.silhouette("star", 48)[..., None] * (np.array([0, 200, 220]) - pixels[40:88, 40:88])
    (found,) = JUDGE.read(pixels.astype(np.uint8))
    assert (found.noun, found.color) == ("star", "?")


def test_sizes_and_kinds_of_input_agree():
    scene = Scene((SceneObject("key", "blue", (16, 16, 80, 80)),), "striped", "beige")
    image = scene.render()
    array = np.asarray(image)
    assert JUDGE.read(array) == JUDGE.read(image) == JUDGE.read(image.convert("RGBA"))
    assert JUDGE.read(array.astype(np.float32) / 255) == JUDGE.read(image)
    (large,) = JUDGE.read(image.resize((512, 512), Image.BICUBIC))
    assert (large.noun, large.color) == ("key", "blue")
    assert box_iou(large.box, true_box(scene.objects[0])) > 0.9
    assert JUDGE.read_many([image, array]) == [JUDGE.read(image)] * 2


@pytest.mark.parametrize("shape", [(128, 128), (2, 128, 128, 3), (3, 128, 128)])
def test_arrays_of_another_shape_are_refused(shape):
    with pytest.raises(AttnCtrlError, match="HINT:"):
        JUDGE.read(np.zeros(shape, dtype=np.uint8))


def test_the_self_check_writes_its_report(tmp_path, capsys):
    main(["--scenes", "2", "--output", str(tmp_path / "sub" / "judge.md")])
    text = (tmp_path / "sub" / "judge.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert "| clean | noun and colour found |" in text and "| ellipse | 2 / 2 |" in text


# ---- what was asked against what was read -------------------------------------------------------------------------------


def test_match_is_one_to_one_and_puts_exact_pairs_first():
    found = [seen("cat", "red"), seen("cat", "blue")]
    assert objects_right(found, [("cat", "blue"), ("cat", "red")]) == [True, True]
    assert objects_right(found[:1], [("cat", "red"), ("cat", "red")]) == [True, False]
    assert match([], [("cat", "red")])[0].detection is None
    assert match([seen("dog", "blue")], [("cat", "red")])[0].detection is None


def test_nouns_and_colors_are_also_counted_alone():
    wanted = [("cat", "red"), ("dog", "blue")]
    swapped = [seen("cat", "blue"), seen("dog", "red")]
    assert objects_right(swapped, wanted) == [False, False]
    assert objects_right(swapped, wanted, by="noun") == [True, True]
    assert objects_right(swapped, wanted, by="color") == [True, True]
    assert objects_right([seen("?", "red")], wanted, by="color") == [True, False]
    assert objects_right([seen("?", "red")], wanted, by="noun") == [False, False]


def test_a_scene_can_be_asked_for():
    scene = Scene((SceneObject("cat", "red", (0, 0, 48, 48)), SceneObject("dog", "blue", (64, 64, 112, 112))))
    assert objects_right(JUDGE.read(scene.render()), scene) == [True, True]
    assert extra(JUDGE.read(scene.render()), scene) == 0


@pytest.mark.parametrize(
    ("relation", "offset"), [("left of", (-1, 0)), ("right of", (1, 0)), ("above", (0, -1)), ("below", (0, 1))]
)
def test_relations_need_more_than_eight_pixels_on_their_axis(relation, offset):
    first, second = ("cat", "red"), ("dog", "blue")

    def holds(px: float, sideways: float = 0.0) -> bool:
        x, y = (64 + px * o + sideways * (o == 0) for o in offset)
        return relation_right([seen(*first, x, y), seen(*second)], first, relation, second)

    assert holds(9) and holds(40) and holds(9, sideways=40)
    assert not holds(8) and not holds(0) and not holds(-40)


def test_relation_needs_both_objects_in_their_colors():
    first, second = ("cat", "red"), ("dog", "blue")
    assert not relation_right([seen(*first, 20)], first, "left of", second)
    assert not relation_right([seen("cat", "blue", 20), seen("dog", "red", 100)], first, "left of", second)
    with pytest.raises(AttnCtrlError, match="HINT:"):
        relation_right([], first, "inside", second)


def test_in_box_asks_for_the_center():
    assert in_box(seen("cat", "red", 30, 40), (20, 30, 40, 50))
    assert not in_box(seen("cat", "red", 41, 40), (20, 30, 40, 50))


def test_leak_is_another_wanted_color_on_a_wanted_noun():
    wanted = [("cat", "red"), ("dog", "blue")]
    assert leaked([seen("cat", "red"), seen("dog", "blue")], wanted) == 0
    assert leaked([seen("cat", "blue"), seen("dog", "blue")], wanted) == 1
    assert leaked([seen("cat", "blue"), seen("dog", "red")], wanted) == 2
    assert leaked([seen("cat", "green"), seen("dog", "blue")], wanted) == 0  # wrong, but not the other's colour
    assert leaked([seen("cat", "blue"), seen("cat", "red")], wanted) == 0  # the red cat is there too
    assert leaked([seen("cat", "blue")], [("cat", "red"), ("cat", "blue")]) == 0


def test_extra_counts_what_is_no_wanted_noun():
    wanted = [("cat", "red"), ("dog", "blue")]
    assert extra([seen("cat", "blue"), seen("dog", "blue")], wanted) == 0
    assert extra([seen("cat", "red"), seen("cat", "red"), seen("?", "blue"), seen("key", "red")], wanted) == 3


def test_one_object_whose_hue_wobbles_stays_one():
    """A patch of another palette colour, as autoencoders leave them, neither splits an object nor hides it."""
    scene = Scene((SceneObject("crown", "red", (32, 32, 96, 96)),))
    pixels = np.asarray(scene.render()).copy()
    top = pixels[36:48, 60:68]
    top[top[..., 1] < 128] = COLORS["purple"]
    (found,) = JUDGE.read(pixels)
    assert (found.noun, found.color) == ("crown", "red")


@pytest.mark.parametrize(("first", "second"), [("blue", "purple"), ("red", "yellow"), ("black", "green")])
def test_touching_objects_of_two_colors_stay_two(first, second):
    items = (SceneObject("heart", first, (8, 30, 56, 78)), SceneObject("house", second, (48, 26, 104, 82)))
    assert objects_right(JUDGE.read(Scene(items).render()), [("heart", first), ("house", second)]) == [True, True]


def test_without_the_font_package_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    for cache in (world._font_source, world.silhouette):
        cache.cache_clear()
    monkeypatch.setattr(world.importlib.resources, "files", missing)
    with pytest.raises(AttnCtrlError, match="HINT: pip install"):
        world.silhouette("cat", 57)
    monkeypatch.undo()
    assert world.silhouette("cat", 57).shape == (57, 57)
