import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from attnctrl import HeadSet


FAST = ("--steps", "2", "--max-sequence-length", "1", "--rounds", "1", "--pool", "0.1,1.2,2.3", "--batch-size", "4")


@pytest.fixture
def hunt(attnctrl, model, tmp_path):
    """Runs `hunt` into a folder of its own; returns (exit code, stdout, stderr)."""

    def run(*arguments, folder="out"):
        return attnctrl("hunt", "--model", model, "--output", tmp_path / folder, *FAST, *arguments)

    return run


def test_a_search_writes_its_results(hunt, attnctrl, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a blue car\n\na green tree above a red cat\n")
    code, out, err = hunt("--prompt", "a red cat", "--prompts", tmp_path / "prompts.txt", "--per-round", "2")
    assert code == 0, err
    files = [Path(line) for line in out.splitlines()]
    assert [path.name for path in files] == ["head_set.json", "head_map.png", "result.md", "result.json"]
    assert all(path.is_file() for path in files)
    heads = HeadSet.from_pretrained(tmp_path / "out")
    assert len(heads) == 2 and heads.family == "sd3" and heads.objective == "icons"
    result = json.loads(files[3].read_text())
    assert result["images"] == (3 + 1) * 3 + 3
    assert [prompt for prompt, _ in result["settings"]["pairs"]] == [
        "a red cat",
        "a blue car",
        "a green tree above a red cat",
    ]
    with Image.open(files[1]) as picture:
        picture.verify()
    lines = (tmp_path / "out" / "scores.jsonl").read_bytes()
    again = hunt("--prompt", "a red cat", "--prompts", tmp_path / "prompts.txt", "--per-round", "2")
    assert again[:2] == (0, out) and (tmp_path / "out" / "scores.jsonl").read_bytes() == lines
    made = attnctrl(
        "generate", "a cat", "--model", model, "--steps", "2", "--heads", tmp_path / "out", "--output", tmp_path
    )
    assert made[0] == 0, made[2]


def test_a_function_and_halving(hunt, tmp_path, monkeypatch):
    (tmp_path / "taste_of_the_cli.py").write_text(
        "def red(images, prompts):\n    return [im.getpixel((0, 0))[0] for im in images]\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, err = hunt(
        "--prompt",
        "any words",
        "--seeds",
        "0,1,2,3",
        "--objective",
        "taste_of_the_cli:red",
        "--strategy",
        "halving",
        "--per-round",
        "1",
    )
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["settings"]["objective"] == "taste_of_the_cli:red" and result["images"] == 3 + 2 + 2 * 1 + 4 + 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "there is no prompt"),
        (("--prompts", "nowhere.txt"), "cannot be read"),
        (("--prompt", "a photo of my dog"), "cannot read what"),
        (("--prompt", "a red cat", "--objective", "beauty"), "objective 'beauty' is not known"),
        (("--prompt", "a red cat", "--seeds", "one"), "are no numbers"),
        (("--prompt", "a red cat", "--per-round", "4"), "choose 4, the pool has 3"),
        (("--prompt", "a red cat", "--steps", "0"), "--steps 0 is less than 1"),
        (("--prompt", "a red cat", "--target", "none"), "target='none'"),
    ],
)
def test_errors_are_one_line(hunt, arguments, told):
    code, out, err = hunt(*arguments)
    lines = [line for line in err.splitlines() if line]
    assert code == 2 and out == "" and told in lines[0] and lines[0].startswith("attnctrl: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("HINT: "))


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from attnctrl.apps.cli import main; assert main(['hunt', '--help']) == 0; "
        "assert not {'torch', 'diffusers', 'numpy', 'PIL.ImageDraw'} & set(sys.modules)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--per-round" in result.stdout and time.perf_counter() - start < 10
