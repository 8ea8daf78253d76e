"""Rows of requests: reading, checking, the schema. Nothing here needs a model."""

import importlib.util
import json
import math
import random
import string

import pytest

from attnctrl.apps.batch.requests import check_values, published_schema, read_requests
from attnctrl.apps.batch.results import Done, Results, head
from attnctrl.apps.batch.schema import check, picture_controls
from attnctrl.errors import AttnCtrlError


PLAIN = {"id": "a", "prompt": "a red cat"}
LEFT = {"prompt": "a red cat", "box": [0, 0, 0.5, 1]}
FULL = {
    **PLAIN,
    "negative_prompt": "grey",
    "seed": 3,
    "num_images": 2,
    "height": 64,
    "width": 32,
    "steps": 5,
    "guidance_scale": 3,
    "max_sequence_length": 1,
    "regions": ["a blue car@0.5,0,1,1", LEFT],
    "controls": [
        {"control": "SoftPAG", "heads": "1.2", "scale": 2.0},
        {"name": "SmoothedEnergy", "layers": [1, 2], "sigma": "inf"},
        "HeadScale(heads=[(1, 2, 0.5)], factor=2.0)",
    ],
    "output_name": "cats/first",
}


def read(path, done=None, options=None, defaults=None, ending="png"):
    return read_requests(path, options or {}, defaults or {}, ending, done or Done())


@pytest.fixture
def rows(tmp_path):
    """Writes lines, JSON or raw, and reads them back: (entries, problems)."""

    def run(*lines, name="r.jsonl", **more):
        path = tmp_path / name
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(raw))
        return read(path, **more)

    return run


# -- what is read --------------------------------------------------------------------------------------------------------


def test_a_full_row():
    request, wrong = check_values(FULL)
    assert wrong == []
    regional, perturbed, smoothed, scaled = request.make_controls()
    assert [region.prompt for region in regional.regions] == ["a blue car", "a red cat"] and regional.stop == 0.3
    assert (str(perturbed.heads), perturbed.scale) == ("1.2", 2.0)
    assert smoothed.layers == (1, 2) and smoothed.sigma == math.inf
    assert scaled.heads.heads == ((1, 2, 0.5),) and scaled.factor == 2.0
    assert request.files("png") == ["cats/first-3.png", "cats/first-4.png"]
    assert check_values(PLAIN)[0].files("webp") == ["a.webp"]


def test_a_whole_request_needs_no_file(tmp_path):
    from PIL import Image

    Image.effect_noise((24, 16), 90).save(tmp_path / "mask.png")
    row = {**PLAIN, "regions": [f"a cat@{tmp_path / 'mask.png'}"], "controls": ["SmoothedEnergy(layers=1)"]}
    whole = check_values(row)[0].whole()
    pixels = check_values(row)[0].make_controls()[0].regions[0].pixels
    (tmp_path / "mask.png").unlink()
    regional, smoothed = whole.make_controls()
    assert regional.regions[0].pixels.equal(pixels) and regional.stop == 0.3
    assert smoothed.layers == 1 and smoothed.sigma == math.inf
    json.dumps(whole.settings())


def test_csv_and_tsv_say_the_same_as_json(tmp_path):
    import csv

    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in FULL.items()}
    second = {"id": "b", "prompt": "two\nlines, and a comma"}
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"r.{ending}").open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(texts), delimiter=delimiter)
            writer.writeheader()
            writer.writerows([texts, {}, second, {**second, "id": "c", "seed": "x"}])
        (first, other), (problem,) = read(tmp_path / f"r.{ending}")
        assert first.request == check_values(FULL)[0]
        assert other.request == check_values(second)[0]
        assert (first.row.line, other.row.line) == (2, 4)
        assert str(problem) == "line 6: seed is 'x', not a whole number from 0 to 9223372036854775807"


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "r.parquet"
    path.write_bytes(b"junk")
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(AttnCtrlError, match="needs pyarrow"):
            read(path)
        pytest.skip("pyarrow is not installed")
    import pyarrow
    import pyarrow.parquet

    with pytest.raises(AttnCtrlError, match="no parquet file"):
        read(path)
    rows = [{key: FULL[key] for key in FULL if key not in ("regions", "controls")}, {**PLAIN, "id": "b"}]
    rows[0]["controls"] = [
        {"control": "SoftPAG", "heads": "1.2", "scale": 2.0},
        {"control": "SkipLayers", "layers": "1"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    entries, problems = read(path)
    assert problems == [] and [entry.request for entry in entries] == [check_values(row)[0] for row in rows]


def test_defaults_and_blank_lines(rows):
    entries, problems = rows(
        b"\xef\xbb\xbf" + json.dumps(PLAIN).encode(), b"", b"  ", {**PLAIN, "id": 7, "steps": None}
    )
    assert problems == [] and [entry.row.line for entry in entries] == [1, 4]
    assert entries[1].id == "7" and entries[1].request.steps == 24
    entries, _ = rows(PLAIN, {**PLAIN, "id": "b", "steps": 9}, defaults={"steps": 3, "seed": 5})
    assert [(entry.request.steps, entry.request.seed) for entry in entries] == [(3, 5), (9, 5)]


def test_rows_that_are_made_together(rows):
    softpag = {"controls": ["SoftPAG(heads='1.2')"]}
    entries, _ = rows(
        PLAIN,
        {**PLAIN, "id": "b", "prompt": "a blue car", "seed": 9, "num_images": 3},
        {**PLAIN, "id": "c", "steps": 9},
        {**PLAIN, "id": "d", **softpag},
        {**PLAIN, "id": "e", "controls": [{"name": "SoftPAG", "heads": [[1, 2]]}]},
        {**PLAIN, "id": "f", "negative_prompt": "grey"},
    )
    groups = [entry.group for entry in entries]
    assert groups[0] == groups[1] and groups[3] == groups[4]
    assert len(set(groups)) == 4


def test_finished_rows_are_known_by_their_bytes_and_by_what_they_say(rows, tmp_path):
    entries, _ = rows({**PLAIN, "num_images": 2})
    done = Done()
    for number in (0, 1):
        entry = entries[0]
        done.add((entry.id, number, 2, entry.mark, entry.group, entry.fingerprint, f"a-{number}.png"))
    same, other = {**PLAIN, "num_images": 2}, dict(reversed(list({**PLAIN, "num_images": 2, "seed": 0}.items())))
    for row, read_again in ((same, False), (other, True)):
        (entry,), problems = rows(row, done=done)
        assert entry.finished and problems == [] and (entry.known is not None) == read_again
    for row, more in (
        ({**PLAIN, "num_images": 3}, {}),
        (same, {"options": {"model": "other"}}),
        (same, {"ending": "webp"}),
    ):
        entries, (problem,) = rows(row, done=done, **more)
        assert entries == [] and "was made in this folder already, from another request" in str(problem)


# -- the schema ----------------------------------------------------------------------------------------------------------


def test_the_schema_is_what_rows_are_checked_by():
    schema = published_schema()
    json.dumps(schema, allow_nan=False)
    wrong = []
    check(FULL, schema, "", wrong)
    assert wrong == []
    named = {}
    for choice in schema["properties"]["controls"]["items"]["anyOf"][1:]:
        word = "control" if "control" in choice["properties"] else "name"
        named.setdefault(word, {})[choice["properties"][word]["enum"][0]] = choice
    assert list(named["control"]) == list(named["name"]) == list(picture_controls())
    softpag = named["control"]["SoftPAG"]["properties"]
    assert softpag["target"] == {"enum": ["identity", "uniform", "mean_query"], "default": "identity"}
    assert softpag["strength"] == {"type": "number", "default": 1.0}
    assert named["control"]["SkipLayers"]["required"] == ["control", "layers"]
    for row in (
        {**FULL, "regions": [{"box": [0, 0, 1, 1]}]},
        {**FULL, "controls": [{"control": "SoftPAG", "scale": "x"}]},
    ):
        check(row, schema, "", wrong)
        assert wrong and check_values(row)[1]
        wrong.clear()


def test_schema_of_the_command_line(attnctrl):
    code, out, err = attnctrl("batch", "--schema")
    assert code == 0 and json.loads(out) == published_schema() and err == ""


# -- what is refused -----------------------------------------------------------------------------------------------------

BAD = {
    "no id": ({"prompt": "x"}, "id is missing"),
    "no prompt": ({"id": "a"}, "prompt is missing"),
    "empty prompt": ({"prompt": " "}, "prompt is empty"),
    "prompt of numbers": ({"prompt": 3}, "prompt is 3, not a text"),
    "unknown field": ({"promt": "x"}, "'promt' is not known; there are id, prompt"),
    "negative seed": ({"seed": -1}, "seed is -1, not a whole number from 0 to"),
    "broken seed": ({"seed": 1.5}, "seed is 1.5, not a whole number"),
    "seed and pictures": ({"seed": 2**63 - 1, "num_images": 2}, "more than 2^63"),
    "true pictures": ({"num_images": True}, "num_images is True, not a whole number"),
    "huge": ({"width": 10**9}, "width is 1000000000, not a whole number from 1 to 16384"),
    "very huge": ({"steps": 10**300}, "steps is a whole number of 997 bits"),
    "guidance": ({"guidance_scale": -1}, "guidance_scale is -1"),
    "idle negative prompt": ({"negative_prompt": "x", "guidance_scale": 1}, "does nothing with guidance_scale 1"),
    "text for controls": ({"controls": "SoftPAG"}, "controls is 'SoftPAG', not a list"),
    "no control": (
        {"controls": [{"control": "Nothing"}]},
        "controls[0] names 'Nothing', no control; there are ",
    ),
    "nameless control": ({"controls": [{"heads": "1.2"}]}, "controls[0] needs one of 'control' and 'name'"),
    "odd control": ({"controls": [3]}, "controls[0] is 3, not an object"),
    "unknown argument": ({"controls": [{"name": "SoftPAG", "head": "1.2"}]}, "'head' of controls[0] is not known"),
    "missing argument": ({"controls": [{"name": "SkipLayers"}]}, "layers of controls[0] is missing"),
    "type": ({"controls": [{"name": "SoftPAG", "strength": "x"}]}, "controls[0].strength is 'x', not a number"),
    "type in a list": ({"controls": [{"name": "SkipLayers", "layers": [1, "x"]}]}, "controls[0].layers[1] is 'x'"),
    "value": ({"controls": [{"name": "SoftPAG", "strength": 2}]}, "strength=2 is not between"),
    "option": ({"controls": [{"name": "SoftPAG", "target": "x"}]}, "target is 'x', not one of identity, uniform"),
    "function": ({"controls": [{"name": "SoftPAG", "weight": "x"}]}, "controls[0].weight is 'x', not null"),
    "heads": ({"controls": [{"name": "SoftPAG", "heads": "none"}]}, "cannot be read as heads"),
    "call": ({"controls": ["SoftPAG(heads="]}, "cannot be read"),
    "infinite call": ({"controls": ["SoftPAG(layers=1, scale=inf)"]}, "SoftPAG.scale is 'inf', not a number"),
    "two shapers": ({"regions": [LEFT], "controls": ["NormalizedAttention()"]}, "both decide who attends to whom"),
    "region without place": ({"regions": ["a cat"]}, "has no place"),
    "region without prompt": ({"regions": [{"box": [0, 0, 1, 1]}]}, "prompt of regions[0] is missing"),
    "box": ({"regions": [{"prompt": "x", "box": [0, 0, 1]}]}, "regions[0].box has 3 entries, not 4"),
    "box outside": ({"regions": [{"prompt": "x", "box": [0, 0, 9, 1]}]}, "reaches outside 0-1"),
    "mask": ({"regions": [{"prompt": "x", "mask": "none.png"}]}, "does not exist"),
    "mask text": ({"regions": [{"prompt": "x", "mask_png": "junk"}]}, "mask_png is no picture"),
    "surrogate": ({"prompt": "\ud800"}, "half of a surrogate pair"),
    "zero": ({"prompt": "a\0b"}, "prompt holds a zero character"),
    "several": ({"seed": -1, "steps": 0}, "seed is -1, not a whole number from 0 to 9223372036854775807; steps is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case):
    change, message = BAD[case]
    row = change if case.startswith("no ") and "controls" not in change else {**PLAIN, **change}
    _, wrong = check_values(row)
    assert message in "; ".join(wrong)


ESCAPES = (
    "/a",
    "../a",
    "a/../../b",
    "a/..",
    "..",
    ".",
    "",
    "a//b",
    "a/",
    "\\\\host\\a",
    "c:\\a",
    "c:a",
    ".a",
    "a/.b",
    "a ",
    "a.",
)
ESCAPES += ("nul", "a/CON.x", "a\nb", "a\0b", "x" * 300, "a/" * 20 + "b", "a.png", "a.JPG", "a?", "~/../a")


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_are_no_files_below_the_folder(name):
    for row in ({**PLAIN, "id": name}, {**PLAIN, "output_name": name}):
        assert check_values(row)[1] != []


RAW = {
    b"{": "no JSON",
    b'{"id": "a", "prompt": "x", "guidance_scale": NaN}': "holds NaN",
    b'{"id": "a", "prompt": "x", "guidance_scale": -Infinity}': "holds -Infinity",
    b'{"id": "a", "prompt": "x", "guidance_scale": 1e999}': "guidance_scale is inf",
    b'{"id": "a", "prompt": "x", "seed": ' + b"9" * 5000 + b"}": "too large",
    b'{"id": "a", "id": "b", "prompt": "x"}': "has 'id' twice",
    b"[1, 2]": "is a list of 2, not an object",
    b"null": "is None, not an object",
    b'{"id": "\xff", "prompt": "x"}': "no UTF-8 text",
    b'{"id": "a", "prompt": "x", "regions": ' + b"[" * 200_000: "nested too deeply",
}


def test_bad_lines_are_all_told_with_their_numbers(rows):
    entries, problems = rows(PLAIN, *RAW, {**PLAIN, "id": "z"})
    assert [entry.id for entry in entries] == ["a", "z"]
    assert [problem.row.line for problem in problems] == list(range(2, len(RAW) + 2))
    for problem, (raw, message) in zip(problems, RAW.items()):
        assert message in str(problem) and str(problem).startswith(f"line {problem.row.line}: "), raw[:50]


def test_names_that_are_taken(rows):
    _, problems = rows(
        {**PLAIN, "id": "a", "num_images": 2},
        {**PLAIN, "id": "b", "output_name": "A-1"},
        {**PLAIN, "id": "a"},
        {**PLAIN, "id": "c", "output_name": "d/e"},
        {**PLAIN, "id": "f", "output_name": "d/e.png/g"},
        {**PLAIN, "id": "h", "output_name": "D/E"},
    )
    said = [str(problem) for problem in problems]
    assert [line.split(":")[0] for line in said] == ["line 2", "line 3", "line 5", "line 6"]
    assert "of line 1" in said[0] and "id 'a' is that of line 1" in said[1] and "of line 4" in said[2]


def test_bad_files(tmp_path):
    for name, data, message in (
        ("r.txt", b"x", "of no known kind"),
        ("r.jsonl", b"", "hold no request"),
        ("r.csv", b"", "hold no request"),
        ("r.csv", b"id,promt\n", "column 'promt' is twice there or not known"),
        ("r.csv", b"id,prompt,id\n", "column 'id' is twice"),
        ("r.csv", b'id,prompt\na,"b\n', "no CSV"),
        ("r.csv", b"id,prompt\na,\xff\n", "no UTF-8"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AttnCtrlError, match=message):
            read(tmp_path / name)
    with pytest.raises(AttnCtrlError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "r.csv").write_bytes(b"id,prompt\na,b,c\n")
    assert "'cell 3' is not known" in str(read(tmp_path / "r.csv")[1][0])


# -- hostile rows --------------------------------------------------------------------------------------------------------

WORDS = (
    "",
    "a",
    "../../x",
    "/etc/passwd",
    "/dev/zero",
    "nan",
    "inf",
    "SoftPAG",
    "control",
    "\0",
    "\ud800",
    "1.2",
    "all",
    "é" * 500,
)
WORDS += (
    "SoftPAG(",
    "SoftPAG(heads=",
    "Region",
    "x@0,0,1,1",
    "x@nan,0,1,1",
    "x@",
    "@/dev/zero",
    "x@" + "y" * 5000,
    "every:0",
    "(" * 5000,
)
NUMBERS = (0, -1, 1, 2, 0.5, 2**63, -(2**70), 10**400, 1e308, 5e-324, 1e999, True, 3.0)


def junk(rng, depth=0):
    kind = rng.randrange(7 if depth < 4 else 4)
    if kind == 0:
        return rng.choice(WORDS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice((None, float("nan"), float("inf"), False))
    if kind == 3:
        return "".join(rng.choices(string.printable, k=rng.randrange(12)))
    if kind == 4:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = (
        *FULL,
        "control",
        "name",
        "heads",
        "layers",
        "scale",
        "box",
        "mask",
        "mask_png",
        "strength",
        "weight",
        *picture_controls(),
    )
    return {rng.choice(names): junk(rng, depth + 1) for _ in range(rng.randrange(5))}


def mutated(rng, value, at=0):
    """A copy with something inside replaced, dropped or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: mutated(rng, value[key], at + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(rng, value[index], at + 1), *value[index + 1 :]]
    return junk(rng)


def hostile_line(rng, number: int) -> bytes:
    kinds = list(picture_controls())
    if rng.random() < 0.2:
        value = junk(rng)
    else:
        layered = {
            **PLAIN,
            "controls": [{"control": rng.choice(kinds), "layers": "1", "heads": "1.2", "regions": [LEFT]}],
        }
        value = mutated(rng, {**rng.choice((FULL, layered, {**PLAIN, "regions": [LEFT]})), "id": f"row-{number}"})
    raw = json.dumps(value).encode()
    if rng.random() < 0.15:
        at = rng.randrange(len(raw))
        raw = raw[:at] + rng.choice((b"", b"\xff", b"\x00", b"}", b"[", b'"')) + raw[at + rng.randrange(3) :]
    return raw.replace(b"\n", b" ").replace(b"\r", b" ") or b"{"


def test_hostile_rows_get_a_clear_message_each(tmp_path):
    rng = random.Random(6)
    lines = [hostile_line(rng, number) for number in range(2000)]
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join(lines))
    entries, problems = read(path)
    assert len(entries) + len(problems) == sum(bool(line.strip()) for line in lines)
    assert len(problems) > 1000 and len(entries) > 20
    for problem in problems:
        said = str(problem)
        assert said.startswith(f"line {problem.row.line}: ") and len(said) > len(f"line {problem.row.line}: ") + 5
        assert "\n" not in said and "Traceback" not in said and len(said) < 4000
        said.encode()
    unexpected = [
        str(problem)
        for problem in problems
        if any(f" {name}Error: " in str(problem) for name in ("Type", "Key", "Attribute"))
    ]
    assert unexpected == []
    for entry in entries:  # what passed can be planned: it has files below the folder, and controls
        files = entry.request.files("png")
        assert len(files) == entry.images and not any(
            ".." in name.split("/") or name.startswith("/") for name in files
        )
        entry.request.make_controls()


# -- many finished rows --------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_finished_rows_are_skipped_at_once(tmp_path):
    import time

    path, output = tmp_path / "r.jsonl", tmp_path / "out"
    output.mkdir()
    count = 100_000
    path.write_text("\n".join(json.dumps({**PLAIN, "id": f"row-{n}", "seed": n}) for n in range(count)))
    entries, _ = read(path)
    facts = {"sha256": "0" * 64, "seconds": 1.0, "request": {"prompt": "x" * 500}}
    with (output / "results.jsonl").open("w") as file:
        for entry in entries:
            begins = head(entry.id, 0, 1, entry.mark, entry.group, entry.fingerprint, f"{entry.id}.png")
            file.write(json.dumps({**begins, **facts}) + "\n")
            (output / f"{entry.id}.png").touch()
    began = time.perf_counter()
    with Results(output) as results:
        entries, problems = read(path, done=results.done)
    seconds = time.perf_counter() - began
    print(f"{count} finished rows: {seconds:.3f} s")
    assert problems == [] and all(entry.finished and entry.known is None for entry in entries)
    assert seconds < 5  # of a machine that is busy otherwise; parsing them takes ten times as long
