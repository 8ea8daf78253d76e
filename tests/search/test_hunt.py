import json

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.search import Objective
from attnctrl.search.hunt import _pool


PROMPTS = ["a red cat", "a blue car", "a green tree", "a black fish"]
CALL = {"max_sequence_length": 1, "output_type": "np"}
SETTINGS = {"steps": 2, "scale": 4.0, "call": CALL, "progress": False, "batch_size": 8}
PLANTED = ((1, 2), (2, 0))


class Planted:
    """The nearer a picture is to the one that known heads make of its prompt, the better; counts its pictures."""

    def __init__(self, pipe, heads, prompts=PROMPTS, seed=0):
        self.wanted, self.images = {}, 0
        for index, prompt in enumerate(prompts):
            with ac.attach(pipe, ac.SoftPAG(heads=heads, scale=SETTINGS["scale"])):
                generator = torch.Generator().manual_seed(seed + index)
                made = pipe(prompt, generator=generator, num_inference_steps=2, guidance_scale=0.0, **CALL)
            self.wanted[prompt] = made.images[0]

    def __call__(self, images, prompts):
        self.images += len(images)
        return torch.tensor([-float(np.abs(image - self.wanted[p]).mean()) for image, p in zip(images, prompts)])


def constant(images, prompts):
    return [0.25] * len(images)


@pytest.fixture(scope="module", autouse=True)
def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)


def hunt(pipe, objective, prompts=PROMPTS, **changes):
    return ac.hunt_heads(pipe, prompts, objective, **{"rounds": 1, "per_round": 1, **SETTINGS, **changes})


def places(heads: ac.HeadSet) -> list:
    return [head[:2] for head in heads.heads]


@pytest.mark.parametrize("head", PLANTED)
def test_a_planted_head_is_found(pipe, head):
    found = hunt(pipe, Planted(pipe, [head]))
    assert places(found) == [head]
    assert found.family == "sd3" and found.provenance["scores"][-1]["score"] == pytest.approx(0, abs=1e-5)
    assert found.provenance["scores"][0]["score"] < -1e-4


def test_planted_heads_are_found_one_a_round_and_together(pipe):
    objective = Planted(pipe, PLANTED)
    assert set(places(hunt(pipe, objective, rounds=2))) == set(PLANTED)
    scores = hunt(pipe, objective, rounds=2).provenance["scores"]
    assert [entry["heads"] for entry in scores] == [0, 1, 2]
    assert scores[0]["score"] < scores[1]["score"] < scores[2]["score"]


def test_halving_finds_the_same_head_with_fewer_pictures(pipe):
    full, halved = Planted(pipe, ["1.2"]), Planted(pipe, ["1.2"])
    assert places(hunt(pipe, full)) == places(hunt(pipe, halved, strategy="halving")) == [(1, 2)]
    # 12 heads and the plain picture of 4 prompts, and the found set; halved: 12 heads see 1 prompt, 6 another, 3 the other two
    assert full.images == 13 * 4 + 4
    assert halved.images == 12 + 6 + 3 * 2 + 4 + 4


def test_halving_never_drops_below_what_a_round_chooses(pipe):
    assert len(hunt(pipe, constant, strategy="halving", per_round=8)) == 8


def test_a_batch_scores_as_single_pictures_do(pipe, tmp_path):
    objective = Planted(pipe, PLANTED)
    tables = []
    for size in (1, 5):
        hunt(pipe, objective, rounds=2, batch_size=size, output=tmp_path / str(size))
        tables.append(json.loads((tmp_path / str(size) / "result.json").read_text()))
    one, many = tables
    assert one["heads"] == many["heads"] and one["images"] == many["images"]
    scores = [{(r["round"], r["layer"], r["head"]): r["score"] for r in table["rows"]} for table in tables]
    assert scores[0].keys() == scores[1].keys() and len(scores[0]) == 12 + 11
    assert all(scores[0][key] == pytest.approx(scores[1][key], abs=2e-6) for key in scores[0])


def test_whole_perturbed_passes_find_the_same_and_run_more_blocks(pipe, tmp_path):
    objective, tables = Planted(pipe, ["2.0"]), []
    for reuse in (True, False):
        hunt(pipe, objective, PROMPTS[:2], prefix_reuse=reuse, batch_size=1, output=tmp_path / str(reuse))
        tables.append(json.loads((tmp_path / str(reuse) / "result.json").read_text()))
    short, whole = tables
    assert short["heads"] == whole["heads"] == [[2, 0, 1.0]] and short["settings"] == whole["settings"]
    passes = whole["calls"]["perturbed passes"]
    assert short["calls"]["perturbed passes"] == passes == (12 + 1) * 2 * 2
    assert whole["calls"]["perturbed blocks"] == 3 * passes
    # four heads of each layer; the found head's own picture starts at layer 2 as well
    assert short["calls"]["perturbed blocks"] == (4 * 3 + 4 * 2 + 4 * 1 + 1) * 2 * 2


def test_a_killed_search_goes_on_where_it_was(pipe, tmp_path):
    whole, objective = Planted(pipe, PLANTED), Planted(pipe, PLANTED)
    hunt(pipe, Objective("planted", whole), rounds=2, output=tmp_path / "whole")

    def killed(images, prompts):
        if objective.images + len(images) > 40:
            raise KeyboardInterrupt
        return objective(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        hunt(pipe, Objective("planted", killed), rounds=2, output=tmp_path / "killed")
    assert objective.images == 40
    assert not (tmp_path / "killed" / "head_set.json").exists()
    hunt(pipe, Objective("planted", objective), rounds=2, output=tmp_path / "killed")
    assert objective.images == whole.images
    for name in ("head_set.json", "result.json", "result.md", "head_map.png", "scores.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    hunt(pipe, Objective("planted", objective), rounds=2, output=tmp_path / "killed")
    assert objective.images == whole.images


def test_a_torn_last_line_is_made_again(pipe, tmp_path):
    objective = Planted(pipe, ["1.2"])
    first = hunt(pipe, objective, output=tmp_path)
    before = objective.images
    lines = (tmp_path / "scores.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"calls"' not in line]
    (tmp_path / "scores.jsonl").write_bytes(b"".join(kept)[:-9])
    assert hunt(pipe, objective, output=tmp_path).heads == first.heads
    assert objective.images == before + 1
    (tmp_path / "scores.jsonl").write_bytes(b"no json\n" + b"".join(kept))
    with pytest.raises(ac.AttnCtrlError, match="damaged at byte 0"):
        hunt(pipe, objective, output=tmp_path)


def test_more_rounds_go_on(pipe, tmp_path):
    objective = Planted(pipe, PLANTED)
    first = hunt(pipe, objective, output=tmp_path)
    before = objective.images
    second = hunt(pipe, objective, rounds=2, output=tmp_path)
    assert second.heads[:1] == first.heads and len(second) == 2
    assert objective.images - before == 11 * 4 + 4  # the pictures of the first head alone are there


def test_ties_go_to_the_lower_layer_then_the_lower_head(pipe):
    assert places(hunt(pipe, constant, PROMPTS[:1], per_round=3, rounds=2)) == [(0, h) for h in range(4)] + [
        (1, 0),
        (1, 1),
    ]
    mixed = hunt(pipe, constant, PROMPTS[:1], pool="2.1,0.3,2.0,1.1", per_round=4)
    assert places(mixed) == [(0, 3), (1, 1), (2, 0), (2, 1)]


def test_min_layer_and_seeds(pipe):
    seen = []

    def spy(images, prompts):
        seen.extend(prompts)
        return [0.0] * len(images)

    found = hunt(pipe, spy, PROMPTS[:2], min_layer=1, per_round=8, seeds=[3, 4, 5])
    assert {layer for layer, _ in places(found)} == {1, 2}
    assert len(seen) == (8 + 1 + 1) * 2 * 3 and seen.count(PROMPTS[0]) == len(seen) // 2
    assert found.provenance["settings"]["pairs"] == [[p, s] for p in PROMPTS[:2] for s in (3, 4, 5)]


def test_candidates_share_their_noise_and_pictures_are_pil_by_default(pipe):
    kinds, plain = set(), []

    def spy(images, prompts):
        kinds.update(type(image) for image in images)
        plain.extend(np.asarray(image).astype(int) for image in images)
        return [0.0] * len(images)

    hunt(pipe, spy, PROMPTS[:1], pool="0.0", call={"max_sequence_length": 1}, scale=1e-6, batch_size=2)
    assert kinds == {Image.Image}
    assert len(plain) == 3 and all(np.abs(image - plain[0]).max() <= 1 for image in plain)


def test_guidance_during_the_search(pipe):
    own = Planted(pipe, ["1.2"])
    assert hunt(pipe, own).provenance["scores"] != hunt(pipe, own, guidance_scale=4.0).provenance["scores"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 3}, "arguments"),
        ({"prompts": PROMPTS[:3]}, "pairs"),
        ({"scale": 2.0, "strength": 0.5}, "scale 4.0 there, 2.0 now; strength 1.0 there, 0.5 now"),
        ({"target": "uniform"}, 'target "identity" there, "uniform" now'),
        ({"objective": lambda images, prompts: [0.0] * len(images)}, "objective"),
        ({"pool": "0.1,0.2"}, "pool"),
        ({"strategy": "halving"}, "strategy"),
    ],
)
def test_other_settings_in_the_same_folder_are_told(pipe, tmp_path, change, told):
    hunt(pipe, constant, pool="0.0", output=tmp_path)
    objective, prompts = change.get("objective", constant), change.get("prompts", PROMPTS)
    rest = {name: value for name, value in change.items() if name not in ("objective", "prompts")}
    with pytest.raises(ac.AttnCtrlError, match=f"other settings: .*{told}"):
        hunt(pipe, objective, prompts, **{"pool": "0.0", "output": tmp_path, **rest})


def test_scores_are_kept_exactly(pipe):
    for third in (
        lambda images, prompts: [1 / 3] * len(images),
        lambda images, prompts: np.full((len(images), 1), 1 / 3),
    ):
        assert hunt(pipe, third, PROMPTS[:1], pool="0.0").provenance["scores"][1]["score"] == 1 / 3


def test_other_weights_in_the_same_folder_are_told(pipe, tmp_path):
    hunt(pipe, constant, pool="0.0", output=tmp_path)
    parameter = pipe.transformer.proj_out.weight
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.mul_(1.01)
        with pytest.raises(ac.AttnCtrlError, match="weights"):
            hunt(pipe, constant, pool="0.0", output=tmp_path)
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    hunt(pipe, constant, pool="0.0", output=tmp_path)
    (tmp_path / "hunt.json").unlink()
    with pytest.raises(ac.AttnCtrlError, match="settings are lost"):
        hunt(pipe, constant, pool="0.0", output=tmp_path)


def test_what_is_written(pipe, tmp_path):
    objective = Planted(pipe, PLANTED)
    found = hunt(pipe, objective, rounds=2, output=tmp_path)
    assert ac.HeadSet.from_pretrained(tmp_path) == found
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["heads"] == [list(head) for head in found.heads] and result["images"] == objective.images
    assert [row["round"] for row in result["rows"] if row["chosen"]] == [1, 2]
    best = {
        number: max((r for r in result["rows"] if r["round"] == number), key=lambda r: r["score"]) for number in (1, 2)
    }
    assert [(row["layer"], row["head"]) for row in best.values()] == places(found)
    assert result["track"][1]["score"] == pytest.approx(best[1]["score"], abs=2e-6)
    assert best[1]["gain"] == pytest.approx(best[1]["score"] - result["track"][0]["score"], abs=1e-9)
    assert result["calls"]["passes"] >= result["images"] / 8 * 2 and result["calls"]["perturbed passes"] > 0
    table = (tmp_path / "result.md").read_text()
    assert f"`{found}`" in table and table.count("| yes |") == 2
    with Image.open(tmp_path / "head_map.png") as picture:
        assert picture.format == "PNG" and picture.height > 3 * 22
    assert not list(tmp_path.glob("*.tmp"))


def test_the_pipeline_is_left_as_it_was(pipe):
    processors = dict(pipe.transformer.attn_processors)

    def fails(images, prompts):
        raise RuntimeError("no score today")

    for objective in (constant, fails):
        try:
            hunt(pipe, objective, pool="1.1")
        except RuntimeError as error:
            assert str(error) == "no score today"
        assert pipe.transformer.attn_processors == processors and "forward" not in pipe.transformer.__dict__
        assert pipe._progress_bar_config == {"disable": True}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rounds": 0, "batch_size": 0}, "rounds 0 is less than 1; batch_size 0 is less than 1"),
        ({"rounds": 5, "per_round": 3}, "choose 15, the pool has 12"),
        ({"pool": "7.0"}, "layer 7 does not exist"),
        ({"pool": "0.1", "min_layer": 1}, "leaves no head"),
        ({"min_layer": 3}, "layers 0 to 2"),
        ({"scale": 0.0}, "perturbs nothing"),
        ({"strength": 1.5}, "strength=1.5"),
        ({"target": "other"}, "not one of identity"),
        ({"strategy": "random"}, "not one of full, halving"),
        ({"seeds": []}, "no seeds"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["a", " "]}, "a prompt is empty"),
        ({"call": {"generator": None}}, "sets these itself"),
        ({"call": {"image_size": 3}}, "takes no image_size"),
    ],
)
def test_refused_arguments(pipe, change, told):
    rest = {name: value for name, value in change.items() if name != "prompts"}
    with pytest.raises(ac.AttnCtrlError, match=told):
        hunt(pipe, constant, change.get("prompts", PROMPTS), **rest)


def test_a_bare_denoiser_is_refused(pipe):
    with pytest.raises(ac.AttnCtrlError, match="whole pipeline"):
        hunt(pipe.transformer, constant)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (lambda images, prompts: [0.0], "1 numbers for 8 pictures"),
        (lambda images, prompts: [float("nan")] * len(images), "nan for a picture of 'a red cat'"),
        (lambda images, prompts: "good", "returned str"),
        ("icons", "str, not a function"),
    ],
)
def test_bad_objectives(pipe, objective, told):
    with pytest.raises(ac.AttnCtrlError, match=told):
        hunt(pipe, objective)


def test_a_pool_may_name_sites_by_path(pipe):
    from attnctrl.families import SD3

    from ..models import tiny_sd3

    sites = SD3.sites(tiny_sd3(dual=True))
    pool = [("transformer_blocks.0.attn2", 1), (1, 0), ("transformer_blocks.0.attn", 3), (0, 3)]
    assert _pool(sites, pool, 0) == [(0, 3, 1.0), ("transformer_blocks.0.attn2", 1, 1.0), (1, 0, 1.0)]
