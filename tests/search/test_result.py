from PIL import ImageColor

from attnctrl.search.result import ABSENT, INK, SCALE, head_map


CELL, LEFT, TOP = 22, 62, 62


def middle(picture, layer: int, head: int) -> tuple:
    return picture.getpixel((LEFT + head * CELL + 4, TOP + layer * CELL + 4))


def test_a_map_shows_every_head_and_frames_the_chosen():
    gains = {(0, 0): 2.0, (0, 1): -2.0, (1, 3): 0.0}
    layers = {layer: 12 for layer in range(8)}
    picture = head_map(gains, layers, {(0, 0): 1}, "Gain of single heads")
    assert picture.size == (LEFT + 12 * CELL + 96, TOP + 8 * CELL + 46) and picture.mode == "RGB"
    assert (
        middle(picture, 0, 0) == SCALE[-1] and middle(picture, 0, 1) == SCALE[0] and middle(picture, 1, 3) == SCALE[2]
    )
    assert middle(picture, 5, 5) == ImageColor.getrgb(ABSENT)
    frame = ImageColor.getrgb(INK)
    assert picture.getpixel((LEFT, TOP)) == frame
    assert picture.getpixel((LEFT + 3 * CELL, TOP + CELL)) != frame
    bar = LEFT + 12 * CELL + 27
    assert picture.getpixel((bar, TOP)) == SCALE[-1] and picture.getpixel((bar, TOP + 8 * CELL - 1)) == SCALE[0]


def test_one_head_and_no_differences():
    picture = head_map({(0, 0): 0.0}, {0: 1}, {}, "a very long title " * 20)
    assert picture.width == LEFT + 180 + 96 and middle(picture, 0, 0) == SCALE[2]


def test_layers_by_path_make_room_for_their_names():
    layers = {0: 4, "transformer_blocks.0.attn2": 4}
    assert head_map({(0, 0): 1.0}, layers, {}, "t").width > head_map({(0, 0): 1.0}, {0: 4}, {}, "t").width
