import itertools

import numpy as np
import pytest

from attnctrl.errors import AttnCtrlError
from attnctrl.icons import world


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_stream_is_seeded_and_can_be_entered_anywhere():
    first = list(itertools.islice(world.scenes(5), 6))
    assert first == list(itertools.islice(world.scenes(5), 6))
    assert first != list(itertools.islice(world.scenes(6), 6))
    assert first[4] == world.sample_scene(np.random.default_rng((5, 4)))


def test_boxes_lie_on_the_grid_and_never_overlap():
    for scene in itertools.islice(world.scenes(1), 200):
        boxes = [item.box for item in scene.objects]
        assert 1 <= len(boxes) <= 4
        assert all(side % world.GRID == 0 and 0 <= side <= world.CANVAS for box in boxes for side in box)
        assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))


def test_mask_and_picture_agree():
    for scene in itertools.islice(world.scenes(2), 20):
        pixels = np.asarray(scene.render()).astype(int)
        assert pixels.shape == (128, 128, 3)
        for item in scene.objects:
            inside = item.mask() > 0.99
            assert inside.sum() > 100
            assert np.abs(pixels[inside] - np.array(world.COLORS[item.color])).max() <= 3


def test_captions_name_every_object_in_order():
    rng = np.random.default_rng(0)
    for scene in itertools.islice(world.scenes(3), 300):
        text = world.caption(scene, rng)
        at = -1
        for item in scene.objects:
            found = text.find(f"{item.color} {item.noun}", at + 1)
            assert found > at, text
            at = found


def test_relations_are_true():
    rng = np.random.default_rng(0)
    seen = set()
    for index in range(300):
        scene = world.sample_scene(np.random.default_rng((9, index)), 2, related=True)
        relation = world.relation_between(*scene.objects)
        seen.add(relation)
        dx, dy = np.subtract(scene.objects[0].center, scene.objects[1].center)
        sign = world.RELATIONS[relation]
        assert dx * sign[0] + dy * sign[1] >= 48
        text = world.caption(scene, rng)
        assert not any(other in text for other in world.RELATIONS if other != relation)
    assert seen == set(world.RELATIONS)


def test_distinct_scenes_repeat_nothing():
    for index in range(50):
        scene = world.sample_scene(np.random.default_rng(index), 3, distinct=True)
        assert len({item.noun for item in scene.objects}) == len({item.color for item in scene.objects}) == 3


def test_unknown_words_are_loud():
    with pytest.raises(AttnCtrlError, match="unknown noun 'unicorn'"):
        world.silhouette("unicorn", 48)
    with pytest.raises(AttnCtrlError, match="unknown pattern"):
        world.background_pixels("tartan", "white")
    with pytest.raises(AttnCtrlError, match="1 to 4 objects"):
        world.sample_scene(np.random.default_rng(0), 5)
