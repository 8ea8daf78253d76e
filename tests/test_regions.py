import numpy as np
import pytest
import torch
from PIL import Image

from attnctrl.errors import AttnCtrlError
from attnctrl.regions import Region


def test_box_to_tokens_on_any_grid():
    left = Region("a", box=(0, 0, 0.5, 1))
    for rows, columns in ((4, 4), (6, 10), (3, 2)):
        tokens = left.tokens((rows, columns)).reshape(rows, columns)
        assert tokens[:, : columns // 2].all() and not tokens[:, columns // 2 :].any()


def test_box_covering_half_a_token_takes_it_and_less_does_not():
    assert Region("a", box=(0, 0, 0.375, 1)).tokens((4, 4)).reshape(4, 4)[0].tolist() == [True, True, False, False]
    assert Region("a", box=(0, 0, 0.36, 1)).tokens((4, 4)).reshape(4, 4)[0].tolist() == [True, False, False, False]


def test_mask_equals_box(tmp_path):
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[:32, 16:48] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path)
    box = Region("a", box=(0.25, 0, 0.75, 0.5)).tokens((8, 8))
    for mask in (path, str(path), Image.fromarray(pixels), pixels, pixels > 0, torch.from_numpy(pixels / 255.0)):
        assert torch.equal(Region("a", mask=mask).tokens((8, 8)), box)


def test_feather_rises_linearly_from_the_edge_and_spares_the_border_of_the_picture():
    grid, centres = (4, 40), (torch.arange(40) + 0.5) / 40
    soft = Region("a", box=(0, 0, 0.5, 1), feather=0.2).weights(grid).reshape(grid)
    expected = ((0.5 - centres) / 0.2).clamp(0, 1)
    torch.testing.assert_close(soft, expected.expand(grid))
    assert torch.equal(
        Region("a", box=(0, 0, 0.5, 1)).weights(grid), Region("a", box=(0, 0, 0.5, 1)).tokens(grid).float()
    )


def test_feather_of_a_mask_equals_that_of_the_box():
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[:32, 16:48] = 255
    box = Region("a", box=(0.25, 0, 0.75, 0.5), feather=0.1)
    for grid in ((8, 8), (16, 12), (5, 7), (2, 8, 8)):
        soft = box.weights(grid)
        torch.testing.assert_close(Region("a", mask=pixels, feather=0.1).weights(grid), soft)
        assert soft.max() <= 1 and not soft[~box.tokens(grid)].any()
    frames = box.weights((2, 8, 8)).reshape(2, 64)
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[0], box.weights((8, 8)))


def test_feather_wider_than_the_region_is_loud():
    with pytest.raises(AttnCtrlError, match="region 'a': a feather of 0.4 leaves nothing"):
        Region("a", box=(0.4, 0.4, 0.6, 0.6), feather=0.4).weights((16, 16))
    with pytest.raises(AttnCtrlError, match="feather 0.7 is not between"):
        Region("a", box=(0, 0, 1, 1), feather=0.7)


def test_kept_token_is_the_most_covered():
    small = Region("a", box=(0.3, 0.3, 0.35, 0.35), feather=0.01)
    with pytest.warns(UserWarning, match="region 'a' covers no token of the 4 x 4 grid"):
        assert small.tokens((4, 4), keep=True).nonzero().flatten().tolist() == [5]
        assert small.weights((4, 4), keep=True).sum() == 1


def test_parse(tmp_path):
    assert Region.parse("a cat @ home@0,0,0.5,1").prompt == "a cat @ home"
    assert Region.parse("a red cat@0.1,0.2,0.5,1").box == (0.1, 0.2, 0.5, 1.0)
    Image.new("L", (8, 8), 255).save(tmp_path / "m.png")
    assert Region.parse(f"a@{tmp_path / 'm.png'}").tokens((4, 4)).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red cat", "has no place"),
        ("a@0,0,2,1", "outside 0-1"),
        ("a@0.5,0,0.5,1", "is empty"),
        ("a@0,0,1", "four numbers"),
        ("a@nowhere.png", "does not exist"),
        ("a@-0.1,0,1,1", "outside 0-1"),
        ("a@nan,0,1,1", "outside 0-1"),
    ],
)
def test_refused(text, said):
    with pytest.raises(AttnCtrlError, match=said):
        Region.parse(text)


def test_unreadable_and_empty_masks(tmp_path):
    path = tmp_path / "m.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(AttnCtrlError, match="cannot be read as an image"):
        Region("a", mask=path)
    with pytest.raises(AttnCtrlError, match="mask is empty"):
        Region("a", mask=np.zeros((4, 4)))
    with pytest.raises(AttnCtrlError, match="either a box or a mask"):
        Region("a")


def test_small_regions_are_loud_or_kept_by_max():
    with pytest.raises(AttnCtrlError, match="covers no token"):
        Region("a", box=(0.3, 0.3, 0.35, 0.35)).tokens((4, 4))
    assert Region("a", box=(0.3, 0.3, 0.35, 0.35), downsample="max").tokens((4, 4)).sum() == 1
