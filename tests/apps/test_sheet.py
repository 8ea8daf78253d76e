import numpy as np
import pytest
from PIL import Image, ImageColor

from attnctrl.apps.sheet import PALETTE, contact_sheet
from attnctrl.regions import Region


def pictures(count: int, size=(128, 128), value: int = 200) -> list[Image.Image]:
    return [Image.new("RGB", size, (value, value, value)) for _ in range(count)]


def mask() -> np.ndarray:
    inside = np.zeros((20, 20), dtype=np.float32)
    inside[5:15, 5:15] = 1
    return inside


def count(sheet: Image.Image, color: str) -> int:
    return int((np.asarray(sheet) == ImageColor.getrgb(color)).all(-1).sum())


@pytest.mark.parametrize("seeds, size", [([0], (16, 16)), ([3, 4, 5], (128, 64)), ([0, 1], (1024, 1024))])
def test_every_picture_is_there(seeds, size):
    plain, controlled = pictures(len(seeds), size, 10), pictures(len(seeds), size, 20)
    sheet = np.asarray(contact_sheet(plain, controlled, seeds, [], "a cat", "24 steps")).astype(int)
    longer = 256 if max(size) < 256 else 512
    area = longer * longer * min(size) // max(size) * len(seeds)
    assert (sheet == 10).all(-1).sum() == area and (sheet == 20).all(-1).sum() == area
    assert (
        np.argwhere((sheet == 10).all(-1))[-1][0] < np.argwhere((sheet == 20).all(-1))[0][0]
    )  # without control above


def test_regions_are_drawn_in_their_colors():
    regions = [
        Region("a cat", box=(0, 0, 0.5, 1)),
        Region("рыжий кот", mask=mask()),
        Region("x" * 300, box=(0.9, 0.9, 1, 1)),
    ]
    sheet = contact_sheet(pictures(1), pictures(1), [0], regions, "赤い猫 " + "x" * 400, "24 steps " * 60)
    assert all(count(sheet, color) > 500 for color in PALETTE[:3])
    assert count(sheet, PALETTE[3]) == 0
    assert sheet.width < 700
