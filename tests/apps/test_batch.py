"""`attnctrl batch` on a tiny pipeline: what it makes, and what it does when something fails."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attnctrl.apps.batch import run as running
from attnctrl.apps.batch.pictures import encode, read_request
from attnctrl.apps.batch.results import Results
from attnctrl.errors import AttnCtrlError


FAST = ("--steps", "2", "--max-sequence-length", "1")
SOFTPAG = {"control": "SoftPAG", "heads": "1.2", "scale": 2.0}
REGIONS = ["a red cat@0,0,0.5,1", {"prompt": "a blue car", "box": [0.5, 0, 1, 1]}]
MIXED = [
    {"id": "plain", "prompt": "a red cat"},
    {"id": "three", "prompt": "a blue car", "seed": 4, "num_images": 3, "output_name": "cars/blue"},
    {"id": "heads", "prompt": "a red cat", "controls": [SOFTPAG]},
    {"id": "more", "prompt": "a green tree", "seed": 1, "controls": ["SoftPAG(heads='1.2', scale=2.0)"]},
    {"id": "regions", "prompt": "a red cat and a blue car", "regions": REGIONS},
    {"id": "negative", "prompt": "a red cat", "negative_prompt": "grey", "width": 24},
]


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path: Path, rows) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def batch(attnctrl, model, tmp_path):
    """Runs rows into a folder: (exit code, folder, messages)."""

    def run(rows, *arguments, folder="out"):
        requests = write(tmp_path / "requests.jsonl", rows) if isinstance(rows, list) else rows
        code, _, err = attnctrl("batch", requests, "--model", model, *FAST, "--output", tmp_path / folder, *arguments)
        assert "Traceback" not in err
        return code, tmp_path / folder, err

    return run


# -- what is made --------------------------------------------------------------------------------------------------------


def test_pictures_and_results(batch, attnctrl, model, tmp_path):
    code, out, err = batch(MIXED)
    assert code == 0, err
    made = {(line["id"], line["image"]): line for line in lines(out / "results.jsonl")}
    assert len(made) == len(lines(out / "results.jsonl")) == 8
    assert sorted(line["file"] for line in made.values()) == sorted(
        str(path.relative_to(out)) for path in out.rglob("*.png")
    )
    for (name, number), line in made.items():
        row = next(row for row in MIXED if row["id"] == name)
        data, request = (out / line["file"]).read_bytes(), read_request(out / line["file"])
        assert line["sha256"] == hashlib.sha256(data).hexdigest() and line["seconds"] > 0
        assert line["seed"] == request["seed"] == row.get("seed", 0) + number
        assert (line["request"]["prompt"], request["id"]) == (row["prompt"], name)
        assert request["model"] == model and "torch" in line["request"]["versions"]
    assert made["three", 2]["file"] == "cars/blue-6.png"
    assert not (out / "failed.jsonl").exists() and not list(out.glob("*.tmp"))

    options = {
        "plain": (),
        "heads": ("--heads", "1.2", "--scale", "2"),
        "negative": ("--negative-prompt", "grey", "--width", "24"),
    }
    options["regions"] = ("--region", REGIONS[0], "--region", "a blue car@0.5,0,1,1")
    for name, more in options.items():
        prompt = next(row["prompt"] for row in MIXED if row["id"] == name)
        code, single, err = attnctrl(
            "generate", prompt, "--model", model, *FAST, "--output", tmp_path / "single", *more
        )
        assert code == 0, err
        assert np.abs(pixels(single.strip()) - pixels(out / f"{name}.png")).max() <= 1
        own, its = read_request(single.strip()), read_request(out / f"{name}.png")
        assert {key: its[key] for key in own if key not in ("batch", "batch_size")} == {
            key: own[key] for key in own if key not in ("batch", "batch_size")
        }


def test_the_batch_size_changes_nothing(batch):
    rows = [*MIXED, *({"id": f"n{n}", "prompt": "a red cat", "seed": n} for n in range(5))]
    _, one, _ = batch(rows, "--batch-size", "1", folder="1")
    _, four, _ = batch(rows, "--batch-size", "4", folder="4")
    sizes = [line["request"]["batch"][1] for line in lines(four / "results.jsonl")]
    assert max(sizes) == 4 and {line["request"]["batch"][1] for line in lines(one / "results.jsonl")} == {1}
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.png"))
    assert names == sorted(str(path.relative_to(four)) for path in four.rglob("*.png")) and len(names) == 13
    assert max(np.abs(pixels(one / name) - pixels(four / name)).max() for name in names) <= 1


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_a_picture_is_made_again(batch, attnctrl, tmp_path, ending):
    rows = [{"id": f"n{n}", "prompt": "a red cat", "seed": n, "controls": [SOFTPAG]} for n in range(3)]
    Image.effect_noise((16, 16), 200).save(tmp_path / "mask.png")
    rows.append({"id": "masked", "prompt": "a red cat", "regions": [f"a blue car@{tmp_path / 'mask.png'}"]})
    code, out, err = batch(rows, "--image-format", ending)
    assert code == 0, err
    (tmp_path / "mask.png").unlink()
    for name in ("n2", "masked"):
        picture = out / f"{name}.{ending}"
        code, again, err = attnctrl("generate", "--from", picture, "--output", tmp_path / "again")
        assert code == 0, err
        again = Path(again.strip())
        assert np.array_equal(pixels(again), pixels(picture)) and again.suffix == f".{ending}"
        assert attnctrl("show", picture)[0] == 0
        before, after = read_request(picture), read_request(again)
        assert {key: before[key] for key in after if key not in ("batch_size", "controls")} == {
            key: after[key] for key in after if key not in ("batch_size", "controls")
        }


def test_phrases_are_looked_up_in_each_prompt(batch, attnctrl, tmp_path):
    place = {"prompt": "red cat", "box": [0, 0, 0.5, 1], "of_prompt": True}
    rows = [
        {"id": "first", "prompt": "a red cat and a tree", "regions": [place]},
        {"id": "second", "prompt": "a tree and a red cat", "regions": [place]},
        {"id": "without", "prompt": "a tree and a red cat"},
    ]
    code, out, err = batch(rows)
    assert code == 0, err
    assert len({line["group"] for line in lines(out / "results.jsonl")}) == 3
    assert (pixels(out / "second.png") != pixels(out / "without.png")).any()
    code, _, err = attnctrl("generate", "--from", out / "second.png", "--output", tmp_path / "again")
    assert code == 0, err
    again = next((tmp_path / "again").glob("*.png"))
    assert (pixels(again) == pixels(out / "second.png")).all()
    code, out, err = batch([{**rows[0], "id": "lost", "prompt": "a tree"}], folder="lost")
    assert code != 0 and "'red cat'" in err and not list(out.glob("*.png"))


def test_generate_from_a_picture_of_generate(attnctrl, model, tmp_path):
    arguments = (
        "--num-images",
        "3",
        "--batch-size",
        "2",
        "--heads",
        "1.2:0.5",
        "--control",
        "SmoothedEnergy(layers=1)",
    )
    code, out, err = attnctrl("generate", "a red cat", "--model", model, *FAST, "--output", tmp_path / "1", *arguments)
    assert code == 0, err
    for number, path in enumerate(out.splitlines()):
        assert read_request(path)["batch"] == [number % 2, 2 if number < 2 else 1]
        code, again, err = attnctrl("generate", "--from", path, "--output", tmp_path / "2", "--name", "again")
        assert code == 0, err
        assert np.array_equal(pixels(path), pixels(again.strip()))
    code, out, err = attnctrl("generate", "a cat", "--from", path, "--seed", "3")
    assert code == 2 and "--from takes the whole request" in err and "PROMPT" in err and "--seed" in err
    assert attnctrl("generate")[0] == 2


def test_pictures_that_cannot_be_made_again(attnctrl, tmp_path):
    image = Image.new("RGB", (16, 16))
    good = {"prompt": "a cat", "model": "builtin:icons-t2i", "versions": {}, "steps": 2, "seed": 0, "controls": []}
    for change, message in (
        ({"contact_sheet": True}, "it is a contact sheet"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"model": 3}, "model is no text"),
        ({"batch": [2, 1]}, "batch is no [place, size]"),
        ({"controls": [{"control": "Nothing"}]}, "names 'Nothing', no control"),
        ({"controls": [{"control": "SoftPAG", "weight": "<function f>"}]}, "weight is '<function f>', not null"),
        ({"model": "./none"}, "no folder that exists"),
    ):
        (tmp_path / "a.png").write_bytes(encode(image, "png", {**good, **change}))
        code, _, err = attnctrl("generate", "--from", tmp_path / "a.png", "--output", tmp_path / "out")
        assert code == 2 and message in err and "cannot be made again" in err
    (tmp_path / "b.webp").write_bytes(b"junk")
    assert attnctrl("generate", "--from", tmp_path / "b.webp")[0] == 2
    assert not (tmp_path / "out").exists()


def test_webp_keeps_pixels_and_request(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    request = {"prompt": "рыжий кот 🐈", "seed": 3, "controls": [], "mask_png": "x" * 100_000}
    path = tmp_path / "a.webp"
    path.write_bytes(encode(image, "webp", request))
    assert read_request(path) == {"format_version": 1, **request}
    assert np.array_equal(pixels(path), np.asarray(image))
    with Image.open(path) as opened:
        assert "рыжий кот" in opened.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
    image.save(path, lossless=True)
    with pytest.raises(AttnCtrlError, match="carries no attnctrl request"):
        read_request(path)


def test_shards(batch):
    rows = [{"id": f"n{n}", "prompt": "a red cat", "seed": n} for n in range(3)]
    code, out, _ = batch(rows, "--shard-size", "2")
    assert code == 0
    rows.append({"id": "n3", "prompt": "a red cat"})
    batch(rows, "--shard-size", "2")
    for number, shard in enumerate(sorted(out.glob("shard-*.tar"))):
        with tarfile.open(shard) as opened:
            members = {member.name: opened.extractfile(member).read() for member in opened}
        assert [Path(name).suffix for name in members] == [".png", ".json"] * 2
        for index in (2 * number, 2 * number + 1):
            line = json.loads(members[f"{index:08d}.json"])
            assert members[f"{index:08d}.png"] == (out / line["file"]).read_bytes()
    assert number == 1


def test_webdataset_is_a_format(batch):
    code, out, _ = batch([{"id": "one", "prompt": "a red cat"}], "--format", "webdataset")
    with tarfile.open(out / "shard-000000.tar") as opened:
        assert code == 0 and opened.getnames() == ["00000000.png", "00000000.json"]


@pytest.mark.parametrize("place", ["folder", "address"])
def test_parquet_table(batch, attnctrl, model, tmp_path, place):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the table needs pyarrow")
    at = tmp_path / "out" if place == "folder" else f"file://{tmp_path / 'out'}"
    table, rows = tmp_path / "out" / "results.parquet", [{"id": f"n{n}", "prompt": "a rød cat"} for n in range(2)]

    def run(rows):
        requests = write(tmp_path / "requests.jsonl", rows)
        code, said, err = attnctrl("batch", requests, "--model", model, *FAST, "--output", at, "--format", "parquet")
        assert code == 0, err
        assert said.split()[-1].endswith("results.parquet")

    def read():
        found = parquet.read_table(table).to_pylist()
        return [{**row, "request": json.loads(row["request"])} for row in found]

    run(rows)
    first, written = read(), table.stat().st_mtime_ns
    run(rows)
    assert table.stat().st_mtime_ns == written  # nothing new: not written again
    (tmp_path / "out" / "n0.png").unlink()
    run([*rows, {"id": "pair", "prompt": "a red cat", "seed": 2**62, "num_images": 2, "controls": [SOFTPAG]}])
    made, told = read(), lines(tmp_path / "out" / "results.jsonl")
    assert [row["id"] for row in first] == ["n0", "n1"] and len(made) == 4
    assert made == [
        {
            **{name: line[name] for name in ("id", "image", "images", "file", "seed", "sha256", "seconds", "request")},
            **{name: line["request"][name] for name in ("prompt", "width", "height")},
        }
        for line in told
    ]
    assert {row["seed"] for row in made} == {0, 2**62, 2**62 + 1}
    table.write_bytes(b"cut short")
    run(rows)
    assert read() == made


def test_parquet_without_pyarrow_is_told_before_the_run(batch, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pyarrow" else found(name, *a))
    code, out, err = batch([MIXED[0]], "--format", "parquet")
    assert code == 2 and "pip install 'attnctrl[batch]'" in err and not out.exists()


# -- what is refused, and what fails ---------------------------------------------------------------------------------------


def test_nothing_is_made_from_a_file_with_wrong_rows(batch, model):
    rows = [MIXED[0], {"id": "a"}, {"id": "b", "prompt": "x", "steps": 0}, {"id": "../c", "prompt": "x"}]
    code, out, err = batch(rows)
    said = err.splitlines()
    assert code == 2 and [line.split(":")[0] for line in said[:3]] == ["line 2", "line 3", "line 4"]
    assert said[3] == "attnctrl: 3 of 4 requests are wrong; nothing was made" and said[4].startswith(
        "HINT: --skip-invalid"
    )
    assert not list(out.glob("*.png")) and not (out / "results.jsonl").exists()

    code, out, err = batch(rows, "--skip-invalid")
    assert code == 0 and [path.name for path in out.rglob("*.png")] == ["plain.png"]
    rejected = lines(out / "rejected.jsonl")
    assert [line["line"] for line in rejected] == [2, 3, 4] and json.loads(rejected[1]["row"]) == rows[2]
    assert rejected[0]["errors"] == ["prompt is missing"]


def test_what_only_the_model_knows_is_told_before_anything_is_made(batch):
    rows = [MIXED[0], {"id": "a", "prompt": "x", "controls": ["SoftPAG(heads='1.9')"]}]
    rows.append({"id": "b", "prompt": "x", "controls": [{"name": "SkipLayers", "layers": [7]}]})
    code, out, err = batch(rows)
    assert code == 2 and "line 2: head 9 of layer 1 does not exist" in err and "line 3: layers=" in err
    assert not list(out.glob("*.png"))
    code, out, err = batch(rows, "--skip-invalid")
    assert code == 0 and [path.name for path in out.glob("*.png")] == ["plain.png"]
    assert [line["line"] for line in lines(out / "rejected.jsonl")] == [2, 3]


def test_a_failing_request_is_recorded_and_the_run_goes_on(batch):
    odd = {"id": "odd", "prompt": "x", "height": 15, "num_images": 2}
    rows = [odd, *MIXED[:2]]
    code, out, err = batch(rows)
    assert code == 1 and "2 pictures could not be made" in err
    failed = lines(out / "failed.jsonl")
    assert [(line["id"], line["image"], line["line"]) for line in failed] == [("odd", 0, 1), ("odd", 1, 1)]
    assert "divisible" in failed[0]["error"]
    assert len(lines(out / "results.jsonl")) == 4
    code, _, _ = batch(rows)  # tries again
    assert code == 1 and len(lines(out / "failed.jsonl")) == 2 and len(lines(out / "results.jsonl")) == 4
    code, _, _ = batch([{**odd, "height": 16}, *MIXED[:2]])
    assert code == 0 and len(lines(out / "results.jsonl")) == 6 and not (out / "failed.jsonl").exists()
    code, out, _ = batch([odd, MIXED[0]], "--fail-fast", folder="fast")
    assert code == 1 and not (out / "results.jsonl").exists() and len(lines(out / "failed.jsonl")) == 2


def test_one_request_of_a_batch_fails_alone(batch, monkeypatch):
    sample = running.sample

    def picky(pipeline, arguments, seeds, bar):
        if "poison" in arguments["prompt"]:
            raise RuntimeError("this prompt\nis poison")
        return sample(pipeline, arguments, seeds, bar)

    monkeypatch.setattr(running, "sample", picky)
    rows = [{"id": f"n{n}", "prompt": "poison" if n == 2 else "a red cat", "seed": n} for n in range(6)]
    code, out, _ = batch(rows)
    assert code == 1 and {path.stem for path in out.glob("*.png")} == {"n0", "n1", "n3", "n4", "n5"}
    assert [(line["id"], line["error"]) for line in lines(out / "failed.jsonl")] == [
        ("n2", "RuntimeError: this prompt is poison")
    ]


def test_out_of_memory_halves_the_batch(batch, monkeypatch):
    sample, calls = running.sample, []

    def small(pipeline, arguments, seeds, bar):
        calls.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return sample(pipeline, arguments, seeds, bar)

    rows = [{"id": f"n{n}", "prompt": "a red cat", "seed": n} for n in range(20)]
    monkeypatch.setattr(running, "sample", small)
    code, out, err = batch(rows, "--batch-size", "8")
    assert code == 0 and "out of memory with 8 pictures at a time: going on with 4" in err
    assert calls[:3] == [8, 4, 2] and calls.count(8) == calls.count(4) == 1 and sum(n for n in calls if n <= 2) == 20
    assert len(lines(out / "results.jsonl")) == 20
    monkeypatch.setattr(running, "sample", lambda *given: small(*given[:2], given[2] * 9, given[3]))
    code, out, _ = batch(rows[:2], "--batch-size", "2", folder="none")
    assert code == 1 and len(lines(out / "failed.jsonl")) == 2  # not even one fits


def test_a_row_that_was_made_from_another_request(batch):
    batch(MIXED[:1])
    code, out, err = batch([{**MIXED[0], "seed": 1}, MIXED[1]])
    assert code == 2 and "line 1: id 'plain' was made in this folder already" in err
    code, out, err = batch(MIXED[:1], "--steps", "3")
    assert code == 2 and "with other settings" in err


def test_what_is_there_is_not_made_again(batch, monkeypatch):
    code, out, _ = batch(MIXED)
    before = (out / "results.jsonl").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    monkeypatch.setattr(running, "Worker", None)  # nothing is loaded
    assert batch(MIXED)[0] == 0
    assert (out / "results.jsonl").read_bytes() == before
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    monkeypatch.undo()
    (out / "cars/blue-5.png").unlink()
    first = {line["file"]: line["sha256"] for line in lines(out / "results.jsonl")}
    assert batch(MIXED)[0] == 0
    again = lines(out / "results.jsonl")
    assert len(again) == 8 and {line["file"]: line["sha256"] for line in again} == first


def test_a_finished_run_imports_nothing_heavy(batch, model):
    _, out, _ = batch(MIXED[:2])
    code = "import sys; from attnctrl.apps.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    arguments = ("batch", out.parent / "requests.jsonl", "--model", model, *FAST, "--output", out)
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [str(out / "results.jsonl"), "False"]


def test_the_folder_is_held_and_cannot_be_left(batch, tmp_path):
    with Results(tmp_path / "out"):
        code, _, err = batch(MIXED[:1])
        assert code == 2 and "another run is writing" in err
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "cars").symlink_to(tmp_path / "elsewhere")
    code, _, err = batch(MIXED[1:2])
    assert code == 2 and "outside of the output folder" in err and not list((tmp_path / "elsewhere").iterdir())


def test_bad_options(attnctrl, model, tmp_path):
    requests = write(tmp_path / "r.jsonl", MIXED[:1])
    for arguments, message in (
        (("--image-format", "bmp"), "--image-format 'bmp'"),
        (("--engine", "steam"), "--engine 'steam'"),
        (("--workers", "2"), "--workers needs --engine ray"),
        (("--shard-size", "0"), "--shard-size 0"),
        (("--format", "arrow"), "--format 'arrow' is not one of jsonl, webdataset, parquet"),
        (("--batch-size", "0"), "--batch-size 0"),
        (("--steps", "0"), "steps is 0"),
        (("--model", "./none"), "no folder that exists"),
    ):
        code, _, err = attnctrl("batch", requests, "--model", model, "--output", tmp_path / "out", *arguments)
        assert code == 2 and message in err
    code, _, err = attnctrl("batch", "--model", model)
    assert code == 2 and "there is no file of requests" in err


# -- several processes -----------------------------------------------------------------------------------------------------


def test_processes_share_the_rows(batch, monkeypatch):
    rows = [{"id": f"n{n}", "prompt": "a red cat", "seed": n} for n in range(9)]
    _, alone, _ = batch(rows, "--batch-size", "2", folder="alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    with Results(alone.parent / "out", 1, 2):  # the other process still runs: nothing is merged
        monkeypatch.setenv("RANK", "0")
        assert batch(rows, "--batch-size", "2")[0] == 0
        shares.append({line["id"] for line in lines(alone.parent / "out/results.rank0.jsonl")})
    monkeypatch.setenv("RANK", "1")
    code, out, _ = batch(rows, "--batch-size", "2")
    made = lines(out / "results.jsonl")
    assert code == 0 and len(made) == 9 and shares[0] < {line["id"] for line in made}
    assert [path.name for path in out.glob("results*")] == ["results.jsonl"]
    assert {line["id"]: line["sha256"] for line in made} == {
        line["id"]: line["sha256"] for line in lines(alone / "results.jsonl")
    }
    monkeypatch.delenv("WORLD_SIZE")
    assert batch(rows, "--batch-size", "2")[0] == 0 and lines(out / "results.jsonl") == made


def test_parts_of_a_killed_run_are_taken_over(batch, monkeypatch):
    rows = [{"id": f"n{n}", "prompt": "a red cat", "seed": n} for n in range(4)]
    _, out, _ = batch(rows)
    (out / "results.jsonl").rename(out / "results.rank3.jsonl")
    with (out / "results.rank3.jsonl").open("ab") as file:
        file.write(b'{"id": "torn')
    assert batch(rows)[0] == 0
    assert len(lines(out / "results.jsonl")) == 4 and not list(out.glob("results.rank*"))
    with (out / "results.jsonl").open("ab") as file:
        file.write(b"junk\n")
    code, _, err = batch(rows)
    assert code == 2 and "has a line that is no result" in err
