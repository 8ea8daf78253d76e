import pytest
import torch

import attnctrl as ac
from attnctrl.attention import Plan, run
from attnctrl.controls import Moment
from attnctrl.sites import Block, Site, lay_out


BOTH = (("image", "hidden_states"), ("text", "encoder_hidden_states"))
JOINT = ("image", "text")
TEXT_FIRST = tuple(Block(f"blocks.{i}", i, BOTH, ("text", "image"), JOINT) for i in range(12))
IMAGE_FIRST = tuple(Block(f"blocks.{i}", i, BOTH, ("image", "text"), JOINT) for i in range(12))
UNET = tuple(Block(f"blocks.{i}", i, BOTH, ("image",), ("image",)) for i in range(4))
SITES = tuple(Site(f"blocks.{i}.attn", i, "joint", 3, JOINT) for i in range(12))
TOKENS = lay_out(JOINT, {"image": 6, "text": 3}, (2, 3))


def streams(*names):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 6 if name == "image" else 3, 4, generator=generator) for name in names}


@pytest.mark.parametrize("blocks", [TEXT_FIRST, IMAGE_FIRST])
def test_a_skipped_block_hands_its_input_on(blocks):
    control = ac.SkipLayers("1,10")
    assert control.touches_blocks(blocks) == ("blocks.1", "blocks.10")
    assert control.touches(SITES) == {}
    given = streams("image", "text")

    def run_block(_):
        raise AssertionError("a skipped block does not run")

    out = control.edit_block(blocks[1], given, TOKENS, Moment(), run_block)
    assert tuple(out) == blocks[1].gives
    assert all(out[name] is given[name] for name in out)


def test_layers_are_exact():
    assert ac.SkipLayers(1).touches_blocks(TEXT_FIRST) == ("blocks.1",)
    assert ac.SkipLayers([7, 8, 9]).touches_blocks(TEXT_FIRST) == ("blocks.7", "blocks.8", "blocks.9")
    assert ac.SkipLayers(-1).touches_blocks(TEXT_FIRST) == ("blocks.11",)
    with pytest.raises(ac.AttnCtrlError, match="0 to 11"):
        ac.SkipLayers("12").touches_blocks(TEXT_FIRST)


def test_text_that_cross_attention_reads_need_not_come_out():
    control = ac.SkipLayers(2)
    assert control.touches_blocks(UNET) == ("blocks.2",)
    given = streams("image", "text")
    assert list(control.edit_block(UNET[2], given, TOKENS, Moment(), lambda s: s)) == ["image"]


def test_a_block_that_drops_or_makes_a_stream_is_refused():
    last = Block("blocks.3", 3, BOTH, ("image",), JOINT)
    first = Block("blocks.0", 0, (("image", "hidden_states"),), ("image", "text"), JOINT)
    blocks = (first, *TEXT_FIRST[1:3], last)
    with pytest.raises(ac.AttnCtrlError) as caught:
        ac.SkipLayers("0,2,3").touches_blocks(blocks)
    message = str(caught.value)
    for part in ("blocks.3 takes text and does not return it", "blocks.0 returns text without taking it", "1, 2"):
        assert part in message
    assert ac.SkipLayers("1,2").touches_blocks(blocks) == ("blocks.1", "blocks.2")


def test_blocks_of_one_sequence():
    block = Block("single.0", 0, (("sequence", "hidden_states"),), ("sequence",), ("text", "image"))
    given = {"sequence": torch.randn(2, 9, 4)}
    assert ac.SkipLayers(0).touches_blocks((block,)) == ("single.0",)
    out = ac.SkipLayers(0).edit_block(block, given, TOKENS, Moment(), lambda s: s)
    assert out["sequence"] is given["sequence"]


def test_skipped_attention_is_the_values():
    control = ac.SkipLayers("1,10", parts="attention")
    assert control.touches_blocks(TEXT_FIRST) == ()
    found = control.touches(SITES)
    assert list(found) == ["blocks.1.attn", "blocks.10.attn"]
    edit = control.edit(SITES[1], TOKENS, found["blocks.1.attn"])
    q, k, v = (torch.randn(2, 3, 9, 4) for _ in range(3))
    assert torch.equal(run(q, k, v, Plan(edit.segments, edit.lerps)), v)


def test_skipped_attention_is_self_attention():
    sites = [
        *(Site(f"b.{i}.attn1", i, "self", 2, ("image",)) for i in range(4)),
        *(Site(f"b.{i}.attn2", i, "cross", 2, ("image",), primary=False) for i in range(4)),
    ]
    assert list(ac.SkipLayers("3", parts="attention").touches(sites)) == ["b.3.attn1"]
    cross = [Site("b.0.attn", 0, "cross", 2, ("image",))]
    with pytest.raises(ac.AttnCtrlError, match="cross-attention alone"):
        ac.SkipLayers("0", parts="attention").touches(cross)


def test_branches():
    assert ac.SkipLayers(1).guides and ac.SkipLayers(1).branch == "cond"
    uncond = ac.SkipLayers(1, branch="uncond", scale=0.0)
    assert not uncond.guides and uncond.branch == "uncond" and not uncond.neutral
    assert ac.SkipLayers(1, scale=0.0).neutral and not ac.SkipLayers(1).neutral
    assert ac.SkipLayers(1, start=0.01, stop=0.2).schedule.stop == 0.2


def test_refused_arguments_are_named_together():
    with pytest.raises(ac.AttnCtrlError) as caught:
        ac.SkipLayers(None, parts="mlp", branch="both")
    for part in ("layers", "parts='mlp'", "branch='both'", "HINT"):
        assert part in str(caught.value)
    with pytest.raises(ac.AttnCtrlError, match="weight"):
        ac.SkipLayers(1, branch="uncond", weight=lambda fraction, sigma: 1.0)
    with pytest.raises(ac.AttnCtrlError, match="not before stop"):
        ac.SkipLayers(1, start=0.5, stop=0.5)
