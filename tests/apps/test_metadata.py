import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from attnctrl.apps.metadata import mask_from_text, mask_to_text, parameters_line, read_request, save_image
from attnctrl.errors import AttnCtrlError


REQUEST = {
    "prompt": "a red cat, and a blue car",
    "negative_prompt": "blur",
    "steps": 24,
    "scheduler": "FlowMatchEulerDiscrete",
    "guidance_scale": 4.0,
    "seed": 3,
    "width": 128,
    "height": 64,
    "model": "builtin:icons-t2i",
    "controls": [
        {"control": "SoftPAG", "heads": [[3, 5, 1.0], [4, 2, 0.5]], "layers": None, "scale": 3.0},
        {
            "control": "RegionalPrompts",
            "regions": [{"prompt": "a cat", "box": [0.0, 0.0, 0.5, 1.0]}, {"prompt": "a car", "mask": "m.png"}],
        },
    ],
    "versions": {"attnctrl": "0.1.0"},
}


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "prompt", ["a red cat", "рыжий кот", "赤い猫 🐈", "naïve “quotes”\nand a second line", "x" * 5000]
)
def test_round_trip(tmp_path, prompt):
    path = save_image(picture(), tmp_path / "new folder" / "a.png", {**REQUEST, "prompt": prompt})
    assert read_request(path) == {"format_version": 1, **REQUEST, "prompt": prompt}
    with Image.open(path) as image:
        assert image.text["parameters"].startswith(prompt)
        assert np.array_equal(np.asarray(image), np.asarray(picture()))


def test_parameters_line_is_what_other_tools_read():
    prompt, negative, facts = parameters_line(REQUEST).split("\n")
    assert prompt == REQUEST["prompt"]
    assert negative == "Negative prompt: blur"
    assert facts.startswith(
        'Steps: 24, Sampler: FlowMatchEulerDiscrete, CFG scale: 4, Seed: 3, Size: 128x64, Model: "builtin:icons-t2i", '
    )
    assert 'SoftPAG: "heads=3.5 4.2:0.5, scale=3.0"' in facts
    assert 'RegionalPrompts: "regions=a cat@0,0,0.5,1; a car@m.png"' in facts
    assert facts.endswith("Version: attnctrl 0.1.0")


def test_line_without_negative_prompt():
    assert "Negative" not in parameters_line({**REQUEST, "negative_prompt": None})


def test_name_decides_nothing_about_the_format(tmp_path):
    path = save_image(picture(), tmp_path / "a.jpg", REQUEST)
    with Image.open(path) as image:
        assert image.format == "PNG"


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = save_image(picture(), tmp_path / "a.png", REQUEST)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(AttnCtrlError, match="No space left"):
        save_image(picture(1), path, REQUEST)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.png"]


def test_a_large_mask_survives(tmp_path):
    """Readers refuse compressed texts that inflate beyond a megabyte; ours is not compressed."""
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200), dtype=np.uint8))
    path = save_image(picture(), tmp_path / "a.png", {**REQUEST, "mask_png": mask_to_text(mask)})
    back = mask_from_text(read_request(path)["mask_png"])
    assert np.array_equal(np.asarray(back), np.asarray(mask))


def with_chunk(path, text: str):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("attnctrl", text)
    picture().save(path, pnginfo=chunks)


def test_pictures_without_a_request(tmp_path):
    plain, text, broken, newer, listed = (
        tmp_path / name for name in ("plain.png", "a.txt", "broken.png", "newer.png", "list.png")
    )
    picture().save(plain)
    text.write_text("no picture")
    with_chunk(broken, "{")
    with_chunk(newer, json.dumps({"format_version": 99}))
    with_chunk(listed, "[]")
    picture().save(tmp_path / "a.jpg")
    for path, message in (
        (plain, "carries no attnctrl request"),
        (tmp_path / "a.jpg", "carries no attnctrl request"),
        (text, "cannot be read as a picture"),
        (tmp_path, "cannot be read as a picture"),
        (tmp_path / "none.png", "does not exist"),
        (broken, "not valid JSON"),
        (newer, "format 99"),
        (listed, "format None"),
    ):
        with pytest.raises(AttnCtrlError, match=message):
            read_request(path)
