import json

import pytest
import torch

from attnctrl.errors import AttnCtrlError
from attnctrl.families import SD3
from attnctrl.heads import HeadSet

from .models import tiny_sd3


WANTED = ((3, 5, 1.0), (4, 2, 1.0))


@pytest.mark.parametrize(
    "text",
    [
        "3.5,4.2",
        "L3H5 L4H2",
        "3.5; 4.2",
        "3,5\n4,2",
        "(3, 5)\n(4, 2)\n",
        [(3, 5), (4, 2)],
        [[3, 5], "4.2"],
        ["L3H5", "4.2"],
    ],
)
def test_spellings_agree(text):
    assert HeadSet.parse(text).heads == WANTED


def test_weights_and_repeats():
    assert HeadSet.parse("3.5:0.5,3.5:0.25").heads == ((3, 5, 0.25),)
    assert HeadSet.parse([(3, 5, 0.5)]).heads == ((3, 5, 0.5),)


def test_files(tmp_path):
    path = tmp_path / "set.json"
    HeadSet.parse("3.5,4.2:0.5").save(path)
    record = json.loads(path.read_text())
    assert record["format_version"] == 1 and record["attnctrl_version"]
    assert HeadSet.parse(path).heads == ((3, 5, 1.0), (4, 2, 0.5))
    text = tmp_path / "heads.txt"
    text.write_text("3,5\n4,2  # a comment\n")
    assert HeadSet.parse(str(text)).heads == WANTED
    bare = tmp_path / "list.json"
    bare.write_text("[[3, 5], [4, 2, 1.0]]")
    assert HeadSet.parse(bare).heads == WANTED


@pytest.mark.parametrize(
    "text", ["", "head five", "3", "3.x", [(3,)], [(3, 5, "much")], [(True, True, True, True)], [], "3.5 and 4.2"]
)
def test_unreadable(text):
    with pytest.raises(AttnCtrlError):
        HeadSet.parse(text)


def test_bad_files(tmp_path):
    with pytest.raises(AttnCtrlError, match="does not exist"):
        HeadSet.parse("nowhere/heads.json")
    path = tmp_path / "set.json"
    path.write_text("{not json")
    with pytest.raises(AttnCtrlError, match="not valid JSON"):
        HeadSet.parse(path)
    path.write_text('{"format_version": 99, "heads": [[0, 0]]}')
    with pytest.raises(AttnCtrlError, match="format_version 99"):
        HeadSet.parse(path)


def test_resolve():
    sites = SD3.sites(tiny_sd3(dual=True))
    weights = HeadSet.parse([(1, 2, 0.5), ("transformer_blocks.0.attn2", 3)]).resolve(sites)
    assert torch.equal(weights["transformer_blocks.1.attn"], torch.tensor([0, 0, 0.5, 0]))
    assert torch.equal(weights["transformer_blocks.0.attn2"], torch.tensor([0, 0, 0, 1.0]))


def test_resolve_lists_every_mistake_and_what_exists():
    with pytest.raises(AttnCtrlError) as error:
        HeadSet.parse("7.0,1.9,1.1").resolve(SD3.sites(tiny_sd3()))
    message = str(error.value)
    assert "layer 7" in message and "head 9 of layer 1" in message and "layers 0 to 2 with 4 heads" in message
