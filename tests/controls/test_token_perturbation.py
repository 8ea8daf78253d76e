import pytest
import torch

import attnctrl as ac
from attnctrl.controls import Moment
from attnctrl.sites import Block, lay_out


BOTH = (("image", "hidden_states"), ("text", "encoder_hidden_states"))
JOINT = ("text", "image")
DOUBLE = tuple(Block(f"blocks.{i}", i, BOTH, ("text", "image"), JOINT) for i in range(12))
SINGLE = Block("single.0", 0, (("sequence", "hidden_states"),), ("sequence",), JOINT)
CROSS = Block("unet.0", 0, BOTH, ("image",), ("image",))
TOKENS = lay_out(JOINT, {"image": 40, "text": 9}, (5, 8), regions=(6,))  # region:0, text, image


def numbered(length: int, rows: int = 3) -> torch.Tensor:
    """(rows, length, 1): every token holds its number, plus 1000 per row."""
    return (torch.arange(length)[None] + 1000 * torch.arange(rows)[:, None])[..., None].float()


def order_of(stream: torch.Tensor) -> list[int]:
    """The order of the tokens, which must be the same in every row."""
    found = stream[..., 0].long() % 1000
    assert (found == found[0]).all()
    return found[0].tolist()


def shuffled(control, block, given, step=0, tokens=TOKENS):
    seen = {}

    def run(streams):
        seen.update(streams)
        return {name: streams[name] + 0.5 for name in block.gives}

    out = control.edit_block(block, given, tokens, Moment(step), run)
    assert all(torch.equal(out[name], seen[name] + 0.5) for name in block.gives), "what the block gives is not undone"
    return {name: order_of(value) for name, value in seen.items()}


def test_image_tokens_are_permuted_and_text_is_not():
    control = ac.TokenPerturbation("3")
    assert control.guides and control.touches_blocks(DOUBLE) == ("blocks.3",)
    given = {"image": numbered(40), "text": numbered(15)}
    found = shuffled(control, DOUBLE[3], given)
    assert sorted(found["image"]) == list(range(40)) != found["image"]
    assert found["text"] == list(range(15))
    assert order_of(given["image"]) == list(range(40)), "the streams that came in are not written to"


def test_a_sequence_is_permuted_in_its_image_span():
    found = shuffled(ac.TokenPerturbation("0"), SINGLE, {"sequence": numbered(55)})["sequence"]
    assert found[:15] == list(range(15))
    assert sorted(found[15:]) == list(range(15, 55)) != found[15:]


@pytest.mark.parametrize("block, given", [(DOUBLE[0], {"text": 15, "image": 40}), (SINGLE, {"sequence": 55})])
def test_region_all_permutes_every_prompt_among_itself(block, given):
    found = shuffled(ac.TokenPerturbation("0", region="all"), block, {n: numbered(m) for n, m in given.items()})
    text = found.get("text") or found["sequence"][:15]
    assert sorted(text[:6]) == list(range(6)) and sorted(text[6:]) == list(range(6, 15))
    assert text != list(range(15))


def test_text_that_a_block_only_reads_keeps_its_order():
    tokens = lay_out(("image",), {"image": 40}, (5, 8))
    given = {"image": numbered(40), "text": numbered(9)}
    found = shuffled(ac.TokenPerturbation("0", region="all"), CROSS, given, tokens=tokens)
    assert found["text"] == list(range(9)) and found["image"] != list(range(40))


def test_seed_step_and_block_decide_and_nothing_else():
    given = {"image": numbered(40), "text": numbered(15)}
    state = torch.get_rng_state()

    def image(seed=0, block=DOUBLE[3], step=0, rows=3):
        given["image"] = numbered(40, rows)
        return tuple(shuffled(ac.TokenPerturbation("0", seed=seed), block, given, step)["image"])

    first = image()
    torch.manual_seed(5)
    other = torch.get_rng_state()
    assert image() == first == image(rows=1)
    assert torch.equal(torch.get_rng_state(), other)
    torch.set_rng_state(state)
    assert len({first, image(seed=1), image(block=DOUBLE[4]), image(step=1), image(step=None)}) == 5


def test_every_order_is_likely():
    """Uniform: over many steps each token comes to each place about equally often."""
    tokens = lay_out(JOINT, {"image": 4, "text": 1}, (2, 2))
    counts = torch.zeros(4, 4)
    control, given = ac.TokenPerturbation("0"), {"image": numbered(4, 1), "text": numbered(1, 1)}
    for step in range(2000):
        counts[torch.arange(4), shuffled(control, DOUBLE[0], given, step, tokens)["image"]] += 1
    assert ((counts / 2000 - 0.25).abs() < 0.05).all()


def test_a_layout_of_another_length_is_refused():
    with pytest.raises(ac.AttnCtrlError, match="39 tokens"):
        shuffled(ac.TokenPerturbation("0"), DOUBLE[0], {"image": numbered(39), "text": numbered(15)})


def test_neutral_and_refused_arguments():
    assert ac.TokenPerturbation("0", scale=0.0).neutral and not ac.TokenPerturbation("0").neutral
    with pytest.raises(ac.AttnCtrlError) as caught:
        ac.TokenPerturbation("0", region="text", seed=0.5)
    assert "region='text'" in str(caught.value) and "seed=0.5" in str(caught.value)
    with pytest.raises(ac.AttnCtrlError, match="0 to 11"):
        ac.TokenPerturbation("12").touches_blocks(DOUBLE)
    with pytest.raises(ac.AttnCtrlError):
        ac.TokenPerturbation("0", start=0.9, stop=0.1)


def test_a_block_without_positions_is_equivariant():
    """P7: block(pi h) = pi block(h) for a real UNet block, so the order is all that the shuffle changes there."""
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    block = BasicTransformerBlock(8, 2, 4, cross_attention_dim=6).double().eval()
    tokens = lay_out(("image",), {"image": 12}, (3, 4))
    given = {"image": torch.randn(2, 12, 8).double(), "text": torch.randn(2, 5, 6).double()}
    seen = {}

    def run(streams):
        seen.update(streams)
        return {"image": block(streams["image"], encoder_hidden_states=streams["text"])}

    out = ac.TokenPerturbation("0").edit_block(CROSS, given, tokens, Moment(4), run)["image"]
    order = (seen["image"][:, :, None] == given["image"][:, None]).all(-1).double().argmax(-1)[0]
    assert sorted(order.tolist()) == list(range(12)) != order.tolist()
    torch.testing.assert_close(out, run(given)["image"][:, order])
