import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from attnctrl.errors import AttnCtrlError
from attnctrl.evaluate import t2i
from attnctrl.evaluate.t2i import KINDS, evaluate, pipeline_call, request, write
from attnctrl.icons.world import COLORS, NOUNS, Scene, SceneObject, relation_between


def truth(pipe, prompts, seeds):
    """A perfect generator: looks the scene up by its noise seed."""
    scenes = [request(seed).scene for seed in seeds]
    assert [request(seed).prompt for seed in seeds] == prompts
    return [scene.render() for scene in scenes]


def swapped(pipe, prompts, seeds):
    """Draws every object in the colour of the other; a lone object in the next colour."""
    pictures = []
    for seed in seeds:
        items = request(seed).scene.objects
        colors = [item.color for item in items[::-1]]
        if len(items) == 1:
            colors = [list(COLORS)[(list(COLORS).index(colors[0]) + 1) % len(COLORS)]]
        pictures.append(Scene(tuple(SceneObject(i.noun, c, i.box) for i, c in zip(items, colors))).render())
    return pictures


def moved(pipe, prompts, seeds):
    """Right objects with exchanged places."""
    pictures = []
    for seed in seeds:
        items = request(seed).scene.objects
        boxes = [item.box for item in items[::-1]]
        pictures.append(Scene(tuple(SceneObject(i.noun, i.color, b) for i, b in zip(items, boxes))).render())
    return pictures


def rows(result):
    return {(kind, label): (count, total) for kind, label, count, total in result.rows()}


def test_requests_are_distinct_held_out_and_repeatable():
    for index in range(60):
        asked = request(index)
        assert asked == request(index) and asked.kind == KINDS[index % 3] and asked.seed == index
        items = asked.scene.objects
        assert len({item.noun for item in items}) == len({item.color for item in items}) == len(items)
        assert asked.relation == (relation_between(*items) if index % 3 == 2 else None)
        for item in items:
            assert item.noun in NOUNS and f"a {item.color} {item.noun}" in asked.prompt
    assert request(2).relation in request(2).prompt
    assert request(4, seed=100).seed == 104


def test_a_perfect_generator_scores_everything():
    result = evaluate(None, prompts=30, batch_size=7, call=truth)
    assert all(result.right)
    for (kind, label), (count, total) in rows(result).items():
        assert count == (0 if label.startswith(("leaked", "extra")) else total), (kind, label)
    assert rows(result)["two objects", "object: noun"] == (20, 20)


def test_swapped_colors_are_wrong_and_counted_as_leaks():
    result = evaluate(None, prompts=12, call=swapped)
    table = rows(result)
    assert not any(result.right)
    for kind in KINDS[1:]:
        assert table[kind, "object: noun"] == table[kind, "object: colour"] == (8, 8)
        assert table[kind, "object: noun and colour"] == (0, 8)
        assert table[kind, "leaked: object in the other's colour"] == (8, 8)
        assert table[kind, "extra: picture with something not asked"] == (0, 4)
    assert table["one object", "object: noun"] == (4, 4) and table["one object", "object: colour"] == (0, 4)


def test_exchanged_places_break_only_the_relation():
    table = rows(evaluate(None, prompts=12, call=moved))
    assert table["two objects", "picture: both objects"] == (4, 4)
    assert table["two objects, relation", "picture: both objects"] == (4, 4)
    assert table["two objects, relation", "picture: both and the relation"] == (0, 4)
    assert table["all", "picture: everything asked"] == (8, 12)


def test_blank_pictures_score_nothing():
    result = evaluate(
        None, prompts=6, call=lambda pipe, prompts, seeds: [Image.new("RGB", (128, 128), "white")] * len(seeds)
    )
    assert not any(count for _, _, count, _ in result.rows())


def test_the_report_and_the_sheet_are_written(tmp_path):
    result = evaluate(None, prompts=35, call=truth)
    sheet = write(result, tmp_path / "deep" / "quality.md", title="Prompt fidelity", notes={"steps": "24"})
    text = (tmp_path / "deep" / "quality.md").read_text(encoding="utf-8")
    assert "- steps: 24" in text and "| all | picture: everything asked | 35 / 35 | 100.0 % |" in text
    assert f"({sheet.name})" in text and len(result.images) == 32
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (4 * 166, 8 * 136, 3)
    assert tuple(pixels[2, 60]) == (0x1A, 0x96, 0x41)


def test_a_call_must_return_one_image_per_prompt():
    with pytest.raises(AttnCtrlError, match="HINT:"):
        evaluate(None, prompts=4, call=lambda pipe, prompts, seeds: truth(pipe, prompts, seeds)[:-1])
    with pytest.raises(AttnCtrlError, match="HINT:"):
        evaluate(None, prompts=0, call=truth)


def test_the_default_call_gives_each_image_its_own_cpu_generator():
    seen = {}

    def pipe(prompts, **options):
        seen.update(options)
        return SimpleNamespace(images=truth(None, prompts, [g.initial_seed() for g in options["generator"]]))

    assert all(evaluate(pipe, prompts=3, steps=5, guidance_scale=3.5).right)
    assert seen["num_inference_steps"] == 5 and seen["guidance_scale"] == 3.5 and "max_sequence_length" not in seen
    assert [g.device.type for g in seen["generator"]] == ["cpu"] * 3
    pipeline_call(max_sequence_length=64)(pipe, [request(0).prompt], [0])
    assert seen["max_sequence_length"] == 64


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(AttnCtrlError, match="HINT:"):
        t2i.main(["--model", str(tmp_path)])


def test_the_command_writes_no_absolute_path(tmp_path, monkeypatch):
    monkeypatch.setattr(t2i, "load", lambda model, device, dtype: None)
    monkeypatch.setattr(t2i, "pipeline_call", lambda *options: truth)
    monkeypatch.setattr(sys, "argv", ["t2i"])
    t2i.main(["--model", str(tmp_path / "tiny"), "--prompts", "6", "--output", str(tmp_path / "quality.md")])
    text = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "t2i --model tiny --prompts 6 --output quality.md" in text
    assert str(tmp_path) not in text and "100.0 %" in text
