import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attnctrl import __version__
from attnctrl.apps.metadata import mask_from_text, read_request


FAST = ("--steps", "3", "--max-sequence-length", "1")
LEFT, RIGHT = "a red cat@0,0,0.5,1", "a blue car@0.5,0,1,1"


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def generate(attnctrl, model, tmp_path):
    """Runs `generate` into a folder of its own and returns the written files by name."""

    def run(*arguments, folder="out") -> dict[str, Path]:
        code, out, err = attnctrl(
            "generate", "a red cat", "--model", model, *FAST, "--output", tmp_path / folder, "--name", "p", *arguments
        )
        assert code == 0, err
        written = [Path(line) for line in out.splitlines()]
        assert sorted(written) == sorted((tmp_path / folder).iterdir())
        return {path.name: path for path in written}

    return run


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_same_command_same_pixels(generate):
    controls = ("--region", LEFT, "--heads", "1.2", "--num-images", "2")
    first, second = generate(*controls, folder="1"), generate(*controls, folder="2")
    assert list(first) == ["p-0.png", "p-1.png"]
    assert all(np.array_equal(pixels(first[name]), pixels(second[name])) for name in first)
    assert not np.array_equal(pixels(first["p-0.png"]), pixels(first["p-1.png"]))


@pytest.mark.parametrize("controls", [(), ("--heads", "1.2,2.0"), ("--region", LEFT, "--region", RIGHT)])
def test_a_seed_does_not_depend_on_the_batch(generate, controls):
    together = generate("--num-images", "3", "--batch-size", "3", *controls, folder="1")
    by_two = generate("--num-images", "3", "--batch-size", "2", *controls, folder="2")
    alone = generate("--seed", "2", *controls, folder="3")
    for name in together:
        assert np.abs(pixels(together[name]) - pixels(by_two[name])).max() <= 1
    assert np.abs(pixels(together["p-2.png"]) - pixels(alone["p-2.png"])).max() <= 1


def test_every_control_changes_pixels(generate):
    variants = {
        "plain": (),
        "heads": ("--heads", "1.2"),
        "weaker": ("--heads", "1.2:0.5", "--strength", "0.5"),
        "scale": ("--heads", "1.2", "--scale", "1"),
        "layers": ("--layers", "0:2"),
        "uniform": ("--layers", "0:2", "--target", "uniform"),
        "image": ("--layers", "0:2", "--perturb-region", "image"),
        "late": ("--layers", "0:2", "--start", "0.5"),
        "region": ("--region", LEFT),
        "base": ("--region", LEFT, "--base-weight", "0"),
        "open": ("--region", LEFT, "--base-weight", "0", "--no-isolate"),
        "backed": ("--region", LEFT, "--background", "a green tree"),
        "early": ("--region", LEFT, "--region-stop", "0.5"),
        "trimmed": ("--region", LEFT, "--trim-text", "1"),
        "both": ("--region", LEFT, "--heads", "1.2"),
    }
    seen = {
        name: pixels(generate(*arguments, folder=name)["p-0.png"]).tobytes() for name, arguments in variants.items()
    }
    twins = [(a, b) for a in seen for b in seen if a < b and seen[a] == seen[b]]
    assert not twins


def test_neutral_controls_change_nothing(generate):
    plain = pixels(generate(folder="1")["p-0.png"])
    for number, arguments in enumerate(
        (
            ("--heads", "1.2", "--strength", "0"),
            ("--layers", "all", "--scale", "0"),
            ("--region", LEFT, "--base-weight", "1"),
        )
    ):
        assert np.array_equal(plain, pixels(generate(*arguments, folder=f"n{number}")["p-0.png"]))


def test_compare(generate, model):
    files = generate("--region", LEFT, "--region", RIGHT, "--heads", "1.2", "--num-images", "2", "--compare")
    assert list(files) == ["p-0.png", "p-0-plain.png", "p-1.png", "p-1-plain.png", "p-compare.png"]
    assert not np.array_equal(pixels(files["p-0.png"]), pixels(files["p-0-plain.png"]))
    sheet, request = pixels(files["p-compare.png"]), read_request(files["p-compare.png"])
    assert sheet.shape[0] > 2 * 256 and sheet.shape[1] > 2 * 256
    assert request["contact_sheet"] and request["seeds"] == [0, 1] and len(request["controls"]) == 2
    assert read_request(files["p-0-plain.png"])["controls"] == []

    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    for seed in (0, 1):
        plain = pipeline(
            "a red cat",
            num_inference_steps=3,
            guidance_scale=4.0,
            max_sequence_length=1,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        assert np.array_equal(np.asarray(plain), pixels(files[f"p-{seed}-plain.png"]))


def test_the_request_is_in_the_picture(generate, attnctrl, tmp_path, model):
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = generate(
        *("--region", LEFT, "--region", f"a blue car@{tmp_path / 'mask.png'}", "--overlap", "mean"),
        *("--heads", "1.2:0.5", "--scale", "2", "--stop", "0.5", "--seed", "5", "--height", "16", "--width", "24"),
        *("--negative-prompt", "зелёное", "--guidance-scale", "3"),
    )
    code, out, _ = attnctrl("show", files["p-5.png"])
    request = json.loads(out)
    assert code == 0 and request == read_request(files["p-5.png"])
    assert (request["prompt"], request["negative_prompt"], request["model"]) == ("a red cat", "зелёное", model)
    assert (request["seed"], request["steps"], request["guidance_scale"]) == (5, 3, 3.0)
    assert (request["width"], request["height"], request["max_sequence_length"]) == (24, 16, 1)
    assert request["generator_device"] == "cpu" and request["versions"]["attnctrl"] == __version__
    regional, perturbed = request["controls"]
    assert regional["overlap"] == "mean" and regional["regions"][0]["box"] == [0.0, 0.0, 0.5, 1.0]
    assert regional["regions"][1]["mask"] == "mask.png"  # no folder of this machine
    assert np.array_equal(np.asarray(mask_from_text(regional["regions"][1]["mask_png"])), mask)
    assert perturbed["heads"] == [[1, 2, 0.5]] and (perturbed["scale"], perturbed["stop"]) == (2.0, 0.5)


def test_isolated_subjects_are_in_the_picture(generate, attnctrl, tmp_path):
    control = "Isolation(subjects=[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], background='isolated')"
    files = generate("--control", control, "--compare")
    made = files["p-0.png"]
    assert not np.array_equal(pixels(made), pixels(files["p-0-plain.png"]))
    (told,) = read_request(made)["controls"]
    assert [[region["box"] for region in one] for one in told["subjects"]] == [[[0, 0, 0.5, 1]], [[0.5, 0, 1, 1]]]
    with Image.open(made) as image:
        assert "subjects=subject 0@0,0,0.5,1; subject 1@0.5,0,1,1" in image.text["parameters"]
    code, out, err = attnctrl("generate", "--from", made, "--output", tmp_path / "again")
    assert code == 0, err
    assert np.array_equal(pixels(out.strip()), pixels(made))


def test_other_settings_get_other_names(attnctrl, model, tmp_path):
    lines = []
    for arguments in ((), ("--heads", "1.2"), ("--heads", "1.2")):
        _, out, _ = attnctrl("generate", "A red", "cat!", "--model", model, *FAST, "--output", tmp_path, *arguments)
        lines += out.splitlines()
    names = [Path(line).name for line in lines]
    assert names[0] != names[1] == names[2]
    assert all(name.startswith("a-red-cat-") and name.endswith("-0.png") for name in names)


def test_report_and_progress(attnctrl, model, tmp_path):
    code, out, err = attnctrl(
        "generate",
        "a cat",
        "--model",
        model,
        *FAST,
        "--output",
        tmp_path,
        "--heads",
        "1.2",
        "--report",
        "--region",
        LEFT,
    )
    assert code == 0 and len(out.splitlines()) == 1
    assert "SoftPAG: 1 sites, acted 3 times" in err and "3/3" in err
    assert "Loading" not in err and "arning" not in err


# -- what is refused -----------------------------------------------------------------------------------------------------

BAD = {
    "empty prompt": ((" ",), "the prompt is empty"),
    "zero steps": (("x", "--steps", "0"), "--steps 0 is less than 1"),
    "words for steps": (("x", "--steps", "many"), "--steps"),
    "no pictures": (("x", "--num-images", "0"), "--num-images 0"),
    "no batch": (("x", "--batch-size", "-1"), "--batch-size -1"),
    "negative seed": (("x", "--seed", "-1"), "--seed -1"),
    "large seed": (("x", "--seed", str(2**63)), "--seed"),
    "guidance": (("x", "--guidance-scale", "nan"), "--guidance-scale nan"),
    "idle negative prompt": (
        ("x", "--negative-prompt", "y", "--guidance-scale", "1"),
        "--negative-prompt does nothing",
    ),
    "odd height": (("x", "--height", "15"), "divisible"),
    "folder as name": (("x", "--name", "a/b"), "--name 'a/b'"),
    "box outside": (("x", "--region", "cat@0,0,1.5,1"), "reaches outside 0-1"),
    "empty box": (("x", "--region", "cat@0.5,0,0.5,1"), "is empty"),
    "three sides": (("x", "--region", "cat@0,0,1"), "four numbers"),
    "no place": (("x", "--region", "cat"), "has no place"),
    "no region prompt": (("x", "--region", "@0,0,1,1"), "has no prompt"),
    "tiny box": (("x", "--region", "cat@0,0,0.01,0.01"), "covers no token"),
    "missing mask": (("x", "--region", "cat@none.png"), "does not exist"),
    "unreadable mask": (("x", "--region", f"cat@{__file__}"), "cannot be read as an image"),
    "overlap": (("x", "--region", LEFT, "--overlap", "both"), "overlap='both'"),
    "base weight": (("x", "--region", LEFT, "--base-weight", "2"), "base_weight=2"),
    "uncovered": (("x", "--region", LEFT, "--background", "error"), "are in no region"),
    "region window": (("x", "--region", LEFT, "--region-start", "1"), "is not before"),
    "regional option alone": (
        ("x", "--base-weight", "0.5", "--no-isolate"),
        "--base-weight, --no-isolate needs a region",
    ),
    "unknown layer": (("x", "--heads", "9.0"), "layer 9 does not exist"),
    "unknown head": (("x", "--heads", "1.7"), "head 7 of layer 1 does not exist"),
    "no layers": (("x", "--layers", "7"), "matches none of the 3 layers"),
    "unreadable heads": (("x", "--heads", "all of them"), "cannot be read as heads"),
    "missing head set": (("x", "--heads", "none.json"), "does not exist"),
    "strength": (("x", "--heads", "1.2", "--strength", "2"), "strength=2"),
    "target": (("x", "--heads", "1.2", "--target", "noise"), "target='noise'"),
    "scale": (("x", "--heads", "1.2", "--scale", "inf"), "--scale inf"),
    "strength alone": (("x", "--strength", "1"), "--strength needs the heads"),
    "target alone": (("x", "--perturb-region", "image", "--scale", "1"), "--scale, --perturb-region needs the heads"),
    "nothing to compare": (("x", "--compare"), "--compare has nothing to compare"),
    "dtype": (("x", "--dtype", "int8"), "--dtype 'int8'"),
    "device": (("x", "--device", "toaster"), "--device 'toaster'"),
    "backend": (("x", "--attention-backend", "abacus"), "--attention-backend 'abacus'"),
    "LoRA": (("x", "--lora", "none/none.safetensors"), "LoRA 'none/none.safetensors' cannot be loaded"),
    "unknown option": (("x", "--frobnicate"), "--frobnicate"),
    "unknown built-in": (("x", "--model", "builtin:none"), "no built-in model 'none'"),
    "missing model": (("x", "--model", "./none/at/all"), "no folder that exists"),
    "no pipeline": (("x", "--model", str(Path(__file__).parent)), "no model_index.json"),
    "file as model": (("x", "--model", __file__), "is a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(attnctrl, model, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, message = BAD[case]
    code, out, err = attnctrl("generate", "--model", model, *FAST, "--output", "out/deep", *arguments)
    assert code == 2 and out == ""
    said = [line for line in err.splitlines() if line.strip() and "it/s]" not in line]  # an empty bar may stand above
    assert said[0].startswith("attnctrl: ") and message in said[0]
    assert len(said) == 1 or (len(said) == 2 and said[1].startswith("HINT:"))
    assert not list(tmp_path.iterdir())


def test_output_is_a_file(attnctrl, model, tmp_path):
    (tmp_path / "out").write_text("precious")
    for folder in ("out", "out/deep"):
        code, _, err = attnctrl("generate", "x", "--model", model, "--output", tmp_path / folder)
        assert code == 2 and "a file" in err and len(err.splitlines()) == 1
    (tmp_path / "p-0.png").mkdir()
    code, _, err = attnctrl("generate", "x", "--model", model, *FAST, "--output", tmp_path, "--name", "p")
    assert code == 2 and "is a folder" in err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "p-0.png"]
    assert (tmp_path / "out").read_text() == "precious"


def test_a_broken_model_is_one_line(attnctrl, model, tmp_path):
    index = json.loads((Path(model) / "model_index.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    for change in ({"_class_name": "NoSuchPipeline"}, {}, None):
        (broken / "model_index.json").write_text("{" if change is None else json.dumps({**index, **change}))
        code, _, err = attnctrl("generate", "x", "--model", broken, "--output", tmp_path / "out")
        assert code == 2 and len(err.splitlines()) == 1 and "cannot be loaded: " in err
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(attnctrl, model):
    code, _, err = attnctrl("generate", "x", "--steps", "0", "--debug")
    assert code == 2 and "Traceback" in err and "attnctrl: --steps 0 is less than 1" in err


def test_a_prompt_that_looks_like_an_option(attnctrl, model, tmp_path):
    code, out, err = attnctrl("generate", "--model", model, *FAST, "--output", tmp_path, "--", "--debug")
    assert code == 0, err
    assert read_request(out.strip())["prompt"] == "--debug"


# -- the other commands -------------------------------------------------------------------------------------------------


def test_inspect(attnctrl, model):
    code, out, _ = attnctrl("inspect", model)
    lines = out.splitlines()
    assert code == 0 and "family sd3" in lines[0]
    assert lines[2].split() == ["layer", "path", "kind", "heads", "streams"]
    assert lines[4].split() == ["1", "transformer_blocks.1.attn", "joint", "4", "image", "+", "text"]
    for name in ("SoftPAG", "RegionalPrompts", "Isolation", "SharedAttention", "SubjectMasks"):
        assert f"  {name}: yes, at up to 3 places" in lines
    assert attnctrl("inspect", "./none/at/all")[0] == 2


def test_show_refuses(attnctrl, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    code, out, err = attnctrl("show", tmp_path / "a.png")
    assert code == 2 and out == "" and "carries no attnctrl request" in err


def test_version_and_module():
    result = subprocess.run([sys.executable, "-m", "attnctrl", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"attnctrl {__version__}\n", "")


def test_unknown_command(attnctrl):
    code, _, err = attnctrl("paint")
    assert code == 2 and err == "attnctrl: No such command 'paint'.\n"
