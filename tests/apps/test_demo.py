"""The demo without its page: forms, limits, code that makes the same picture, the studio and requests files."""

import io
import json
import shlex
import struct
import zipfile
import zlib
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from attnctrl.apps.batch.pictures import encode, read_request
from attnctrl.apps.batch.schema import arguments_schema, picture_controls
from attnctrl.apps.cli import main
from attnctrl.apps.demo import limits
from attnctrl.apps.demo.code import as_cli, as_python
from attnctrl.apps.demo.files import draw_file, read_file
from attnctrl.apps.demo.forms import controls, read_form, summary
from attnctrl.apps.demo.limits import admit, picture_request
from attnctrl.apps.demo.studio import Picture, Step, Stopped, Studio
from attnctrl.apps.generate import Job
from attnctrl.errors import AttnCtrlError


PROMPT = "a red cat and a blue car"
REGIONS = [{"prompt": "a red cat", "box": [0, 0, 0.5, 1]}, {"prompt": 'a "blue" car\'s', "box": [0.5, 0, 1, 1]}]


@pytest.fixture(scope="module")
def studio(model):
    made = Studio(Job(prompt="of the page", model=model))
    yield made
    made.close()


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def draw(studio, asked, stop=None) -> list:
    visitor = studio.visitor("test")
    return list(studio.draw([("picture", asked)], visitor.folder, stop or visitor.begin()))


# -- forms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", controls())
def test_form_has_every_argument_that_json_can_hold(name):
    properties = arguments_schema(picture_controls()[name])["properties"]
    expected = {key for key, part in properties.items() if part != {"type": "null"}} - {"regions"}
    assert {field.name for field in controls()[name]} == expected
    assert summary(picture_controls()[name]).endswith(".")


@pytest.mark.parametrize("name", controls())
def test_untouched_form_leaves_everything_out(name):
    form = controls()[name]
    values = {field.name: field.default for field in form}
    needed = [field.name for field in form if field.needed]
    if needed:
        with pytest.raises(AttnCtrlError, match=f"{name} needs {needed[0]}"):
            read_form(name, values)
    else:
        assert read_form(name, values) == {"control": name}


def test_form_kinds_follow_from_the_dataclass():
    softpag = {field.name: field for field in controls()["SoftPAG"]}
    assert softpag["strength"].kind == "fraction" and softpag["strength"].default == 1.0
    assert softpag["scale"].kind == "number"
    assert softpag["target"].kind == "choice" and "uniform" in softpag["target"].choices
    assert softpag["heads"].kind == "text"
    assert softpag["start"].about == softpag["stop"].about == "fractions of the steps, the first step included."
    regional = {field.name: field.kind for field in controls()["RegionalPrompts"]}
    assert (regional["isolate"], regional["trim_text"]) == ("switch", "whole")


@pytest.mark.parametrize(
    "name, typed, arguments",
    [
        (
            "SoftPAG",
            {"heads": " 1.2, 0.3:0.5 ", "scale": 2.5, "strength": 1.0},
            {"heads": "1.2, 0.3:0.5", "scale": 2.5},
        ),
        ("SkipLayers", {"layers": "1", "sigma": "0.1, 0.9"}, {"layers": "1", "sigma": [0.1, 0.9]}),
        ("SmoothedEnergy", {"sigma": "inf", "layers": ""}, {}),
        ("SmoothedEnergy", {"sigma": "2.5"}, {"sigma": 2.5}),
        ("RegionalPrompts", {"isolate": False, "trim_text": 4.0}, {"isolate": False, "trim_text": 4}),
        ("RegionalPrompts", {"trim_text": "4"}, {"trim_text": 4}),
        ("TokenPerturbation", {"layers": "1", "seed": 7}, {"layers": "1", "seed": 7}),
    ],
)
def test_filled_forms_become_arguments_and_back(name, typed, arguments):
    assert read_form(name, typed) == {"control": name, **arguments}
    for field in controls()[name]:
        assert field.read(field.show(arguments.get(field.name))) == arguments.get(field.name)


def test_text_that_is_no_number_is_named():
    with pytest.raises(AttnCtrlError, match="sigma: 'low' is no number"):
        read_form("SkipLayers", {"layers": "1", "sigma": "low, 1"})


def test_heads_of_a_picture_are_shown_as_they_are_typed():
    heads = next(field for field in controls()["SoftPAG"] if field.name == "heads")
    assert heads.show([[1, 2, 1.0], [0, 3, 0.5]]) == "1.2,0.3:0.5"


# -- limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"controls": [{"control": "SoftPAG", "heads": "{file}"}]},
        {"controls": ["SoftPAG(heads='{file}')"]},
        {"controls": [{"control": "RegionalPrompts", "regions": ["a cat@{file}"]}]},
        {"controls": ["RegionalPrompts(regions=['a cat@{file}'])"]},
        {"controls": [{"control": "Isolation", "subjects": [[0, 0, 0.5, 1], ["{file}"]]}]},
        {"controls": ["Isolation(subjects=['{file}', (0, 0, 1, 1)])"]},
        {"regions": ["a cat@{file}"]},
        {"regions": [{"prompt": "a cat", "mask": "{file}"}]},
    ],
)
@pytest.mark.parametrize("name", ["heads.json", "heads.txt", "mask.png"])
def test_files_named_by_a_request_are_not_opened(values, name, tmp_path, monkeypatch):
    file = tmp_path / name
    file.write_text('{"heads": [[1, 2]]}')
    monkeypatch.chdir(tmp_path)
    for path in (str(file), name):
        asked = json.loads(json.dumps({"prompt": PROMPT, **values}).replace("{file}", path))
        with pytest.raises(AttnCtrlError, match="files are not read here|names a mask file"):
            admit(asked)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"steps": 100_000}, "steps"),
        ({"steps": limits.STEPS + 1}, "more than this page makes"),
        ({"width": 16_000, "height": 16_000}, "pixels are more"),
        ({"regions": ["a cat@0,0,0.5,1"] * (limits.REGIONS + 1)}, "regions are more"),
        ({"controls": [{"control": "SoftPAG", "heads": "1.2", "scale": "much"}]}, "SoftPAG.scale is 'much'"),
        ({"prompt": " "}, "prompt is empty"),
    ],
)
def test_what_the_page_does_not_make_is_refused(values, said):
    with pytest.raises(AttnCtrlError, match=said):
        admit({"prompt": PROMPT, **values})


def test_request_with_everything_is_admitted():
    asked = admit({"prompt": PROMPT, "regions": REGIONS, "controls": ["SoftPAG(heads='1.2,0.3:0.5')"], "steps": 4})
    assert [control.name for control in asked.make_controls()] == ["RegionalPrompts", "SoftPAG"]


def bomb(side: int) -> bytes:
    """A small PNG file that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("bomb.png", bomb(60_000), "has more than 16777216 pixels"),
        ("large.png", bomb(5_000), "has more than 16777216 pixels"),
        ("text.png", b"no picture at all", "no picture"),
        ("script.svg", b"<svg/>", "of no kind that is read here"),
        ("jpeg.png", None, "no picture"),
    ],
    ids=["bomb", "large", "text", "svg", "jpeg"],
)
def test_bad_uploads_are_refused(name, data, said, tmp_path):
    if data is None:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
        data = buffer.getvalue()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(AttnCtrlError, match=said) as error:
        picture_request(str(tmp_path / name))
    assert str(tmp_path) not in str(error.value)


def test_picture_without_a_request_is_told_by_its_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(AttnCtrlError, match="carries no attnctrl request") as error:
        picture_request(str(tmp_path / "plain.png"))
    assert str(tmp_path) not in str(error.value)


def test_files_that_are_too_large_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "UPLOAD", 10)
    (tmp_path / "picture.png").write_bytes(encode(Image.new("RGB", (8, 8)), "png", {"prompt": PROMPT}))
    with pytest.raises(AttnCtrlError, match="bytes"):
        picture_request(str(tmp_path / "picture.png"))


# -- code ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": PROMPT},
        {"prompt": '-a cat\'s "$HOME"', "negative_prompt": "grey", "seed": 5, "guidance_scale": 2.5, "width": 24},
        {
            "prompt": PROMPT,
            "controls": [{"control": "RegionalPrompts", "regions": REGIONS, "base_weight": 0.1, "stop": 0.6}],
        },
        {"prompt": PROMPT, "controls": [{"control": "RegionalPrompts", "regions": REGIONS, "isolate": False}]},
        {
            "prompt": PROMPT,
            "controls": [
                {"control": "RegionalPrompts", "regions": REGIONS, "layers": "0:2", "strength": 0.5},
                {"control": "SoftPAG", "heads": "1.2,0.3:0.5", "scale": 2.0, "region": "image"},
                {"control": "SmoothedEnergy", "layers": "1", "sigma": 2.5},
            ],
        },
    ],
    ids=["plain", "quotes", "regions", "open regions", "everything"],
)
def test_code_makes_the_same_picture(values, studio, tmp_path, monkeypatch):
    asked = admit({"steps": 3, **values})
    picture = draw(studio, asked)[-1]
    job, made = studio.job(asked), asked.make_controls()

    words = shlex.split(as_cli(job, made).replace("\\\n", " "))
    assert words[0] == "attnctrl"
    assert main([words[1], "--output", str(tmp_path / "cli"), *words[2:]]) == 0
    (file,) = (tmp_path / "cli").iterdir()
    assert np.array_equal(pixels(Image.open(file)), pixels(picture.image))

    monkeypatch.chdir(tmp_path)
    exec(as_python(job, made, studio.model.made, studio.model.absent), {})
    assert np.array_equal(pixels(Image.open("picture.png")), pixels(picture.image))


# -- studio --------------------------------------------------------------------------------------------------------------


def test_pictures_come_with_their_steps_and_carry_their_request(studio):
    asked = admit({"prompt": PROMPT, "steps": 3, "seed": 9, "regions": REGIONS})
    *steps, picture = draw(studio, asked)
    assert [(step.done, step.total) for step in steps if isinstance(step, Step)] == [(n, 3) for n in range(4)]
    assert isinstance(picture, Picture)
    facts = read_request(picture.file)
    assert facts["seed"] == 9 and [region["box"] for region in facts["controls"][0]["regions"]] == [
        region["box"] for region in REGIONS
    ]
    with Image.open(picture.file) as image:
        assert np.array_equal(pixels(image), pixels(picture.image))


def test_watching_and_stopping_do_not_change_later_pictures(studio):
    asked = admit({"prompt": PROMPT, "steps": 4, "seed": 3, "regions": REGIONS})
    first = draw(studio, asked)[-1]
    stop = Event()
    with pytest.raises(Stopped):
        for event in studio.draw([("picture", asked)], studio.visitor("test").folder, stop):
            if event.done == 2:
                stop.set()
    processors = studio.model.pipeline.transformer.attn_processors.values()
    assert not any(type(processor).__name__ == "ControlledAttnProcessor" for processor in processors)
    assert np.array_equal(pixels(draw(studio, asked)[-1].image), pixels(first.image))


def test_stopped_before_its_turn_makes_nothing(studio):
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        draw(studio, admit({"prompt": PROMPT, "steps": 2}), stop)


def test_previews_are_pictures_of_what_forms(studio, monkeypatch):
    monkeypatch.setattr("attnctrl.apps.demo.studio.EVERY", 0.0)
    visitor = studio.visitor("test")
    asked = [("picture", admit({"prompt": PROMPT, "steps": 4}))]
    *steps, picture = studio.draw(asked, visitor.folder, visitor.begin(), previews=True)
    previews = [step.preview for step in steps if step.preview is not None]
    assert len(previews) == 3
    assert all(preview.size == (16, 16) for preview in previews)
    assert np.array_equal(pixels(picture.image), pixels(draw(studio, asked[0][1])[-1].image))


def test_heads_that_do_not_exist_are_told_before_the_run(studio):
    with pytest.raises(AttnCtrlError, match="head 99 of layer 1 does not exist"):
        studio.refuse(admit({"prompt": PROMPT, "controls": ["SoftPAG(heads='1.99')"]}))


def test_visitors_have_their_own_files_and_leave_none(studio):
    folder = studio.visitor("somebody").folder
    stop = studio.visitor("somebody").begin()
    assert folder.is_dir() and folder != studio.visitor("else").folder
    studio.forget("somebody")
    assert stop.is_set() and not folder.exists()
    studio.forget("else")


def test_model_is_fixed_unless_choice_is_allowed(model, studio, tmp_path):
    with pytest.raises(AttnCtrlError, match="--allow-model-choice"):
        studio.choose("builtin:icons-t2i")
    free = Studio(Job(prompt="of the page", model=model), may_choose=True)
    try:
        with pytest.raises(AttnCtrlError, match="folders are not opened"):
            free.choose(model)
        with pytest.raises(AttnCtrlError, match="no built-in model"):
            free.choose("builtin:none")
        assert free.model.job.model == model
    finally:
        free.close()


# -- requests files ------------------------------------------------------------------------------------------------------


def write(path: Path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_file_is_drawn_into_one_archive(studio, tmp_path):
    rows = [
        {"id": "one", "prompt": PROMPT, "regions": ["a red cat@0,0,0.5,1"]},
        {"id": "two", "prompt": "a green tree", "seed": 4, "num_images": 2, "output_name": "trees/green"},
        {"id": "wrong", "prompt": "a car", "controls": ["SoftPAG(heads='1.99')"]},
    ]
    entries, wrong = read_file(write(tmp_path / "requests.jsonl", rows), {"steps": 2})
    assert wrong == []
    visitor = studio.visitor("file")
    events = list(draw_file(studio, entries, visitor.folder, visitor.begin(), tmp_path / "results.zip"))
    assert [done for done, event in events if not isinstance(event, Step)] == [1, 2, 3, 4]
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        names = ["one.png", "trees/green-4.png", "trees/green-5.png"]
        assert sorted(archive.namelist()) == sorted([*names, "results.jsonl"])
        lines = [json.loads(line) for line in archive.read("results.jsonl").splitlines()]
        assert [line.get("file") for line in lines] == [*names, "wrong.png"]
        assert "head 99" in lines[3]["error"]
        (tmp_path / "second.png").write_bytes(archive.read("trees/green-5.png"))
    assert read_request(tmp_path / "second.png")["seed"] == 5


def test_stopped_file_keeps_what_was_made(studio, tmp_path):
    entries, _ = read_file(write(tmp_path / "r.jsonl", [{"id": n, "prompt": PROMPT} for n in range(5)]), {"steps": 1})
    visitor = studio.visitor("file")
    with pytest.raises(Stopped):
        for _, event in draw_file(studio, entries, visitor.folder, visitor.begin(), tmp_path / "results.zip"):
            if isinstance(event, Picture):
                visitor.stop.set()
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert sorted(archive.namelist()) == ["0.png", "results.jsonl"]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"id": "a", "prompt": "a cat", "regions": ["a cat@/etc/passwd"]}, "line 2: .*files are not read here"),
        ({"id": "../a", "prompt": "a cat"}, "line 2: .*leaves the output folder"),
        ({"id": "a", "prompt": "a cat", "steps": 9999}, "line 2: .*steps are more"),
        ({"id": "a", "prompt": "a cat", "num_images": 900}, "pictures are more"),
        ({"id": "a", "prompt": 3}, "line 2: prompt is 3"),
    ],
)
def test_rows_that_are_wrong_are_told_with_their_line(row, said, tmp_path):
    import re

    _, wrong = read_file(write(tmp_path / "r.jsonl", [{"id": "first", "prompt": "a cat"}, row]), {})
    assert re.search(said, "\n".join(wrong))


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rows.exe").write_text("{}")
    with pytest.raises(AttnCtrlError, match="of no kind that is read here"):
        read_file(str(tmp_path / "rows.exe"), {})


# -- starting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "package, arguments, hint", [("gradio", (), "attnctrl[demo]"), ("mcp", ("--mcp",), "gradio[mcp]")]
)
def test_missing_package_is_told_with_what_installs_it(package, arguments, hint, attnctrl, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    code, _, err = attnctrl("demo", *arguments)
    assert code == 2 and f"{package}, which is not installed" in err and f"pip install '{hint}'" in err
