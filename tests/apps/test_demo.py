"""The demo without its page: forms, limits, code that makes the same picture, the studio and requests files."""

import base64
import io
import json
import shlex
import subprocess
import zipfile
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from attnctrl.apps.batch.pictures import encode, read_request
from attnctrl.apps.batch.schema import arguments_schema, picture_controls
from attnctrl.apps.cli import main
from attnctrl.apps.demo import attention, limits
from attnctrl.apps.demo.code import as_cli, as_python
from attnctrl.apps.demo.files import draw_file, read_file
from attnctrl.apps.demo.forms import controls, read_form, summary
from attnctrl.apps.demo.limits import admit, picture_request
from attnctrl.apps.demo.parts import boxes_from, boxes_of
from attnctrl.apps.demo.progress import Step, Stopped, Watch
from attnctrl.apps.demo.scores import CHOSEN, FIRST, scores_of
from attnctrl.apps.demo.studio import Picture, Studio
from attnctrl.apps.generate import Job
from attnctrl.apps.metadata import mask_to_text
from attnctrl.controls import RegionalPrompts
from attnctrl.errors import AttnCtrlError
from attnctrl.heads import HeadSet

from .conftest import bomb


PROMPT = "a red cat and a blue car"
REGIONS = [{"prompt": "a red cat", "box": [0, 0, 0.5, 1]}, {"prompt": 'a "blue" car\'s', "box": [0.5, 0, 1, 1]}]


def painted(size=(16, 16), inside=(0, 0, 8, 16)) -> str:
    """A mask as the canvas saves it."""
    mask = Image.new("L", size)
    mask.paste(255, inside)
    return mask_to_text(mask)


MASK = {"prompt": "a red cat", "mask_png": painted()}


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


@pytest.mark.parametrize(
    "mask",
    [
        7,
        "not base64",
        base64.b64encode(b"<svg/>" * 20).decode(),
        painted((1025, 8)),
        painted() + "A" * (limits.MASK * 4 // 3),
    ],
    ids=["number", "text", "svg", "pixels", "bytes"],
)
@pytest.mark.parametrize("place", ["regions", "control", "text"])
def test_masks_that_are_no_small_png_are_refused(mask, place):
    region = {"prompt": "a cat", "mask_png": mask}
    asked = {
        "regions": {"regions": [region]},
        "control": {"controls": [{"control": "RegionalPrompts", "regions": [region]}]},
        "text": {"controls": [f"RegionalPrompts(regions=[{region!r}])"]},
    }[place]
    with pytest.raises(AttnCtrlError, match="no PNG of at most 1024 x 1024 pixels"):
        admit({"prompt": PROMPT, **asked})


def test_canvas_holds_boxes_and_masks():
    canvas = [{"name": "left", "color": "#123456", **MASK}, {"name": "", "color": "#654321", **REGIONS[1]}]
    canvas[0]["mask"] = canvas[0].pop("mask_png")
    regions = boxes_of({"boxes": canvas})
    assert regions == [MASK, REGIONS[1]]
    assert [(box["prompt"], box.get("box"), box.get("mask")) for box in boxes_from(regions)] == [
        ("a red cat", None, MASK["mask_png"]),
        (REGIONS[1]["prompt"], REGIONS[1]["box"], None),
    ]
    with pytest.raises(AttnCtrlError, match="Mask 1 has no prompt"):
        boxes_of({"boxes": [{"name": "", "prompt": " ", "mask": MASK["mask_png"]}]})
    with pytest.raises(AttnCtrlError, match="a feather of its own"):
        boxes_from([{**REGIONS[0], "feather": 0.1}])


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
        {"prompt": PROMPT, "controls": [{"control": "RegionalPrompts", "regions": [MASK, REGIONS[1]], "stop": 1.0}]},
        {"prompt": PROMPT, "controls": [{"control": "RegionalPrompts", "regions": [MASK], "layers": "1"}]},
        {
            "prompt": PROMPT,
            "controls": [
                {"control": "RegionalPrompts", "regions": REGIONS, "layers": "0:2", "strength": 0.5},
                {"control": "SoftPAG", "heads": "1.2,0.3:0.5", "scale": 2.0, "region": "image"},
                {"control": "SmoothedEnergy", "layers": "1", "sigma": 2.5},
            ],
        },
    ],
    ids=["plain", "quotes", "regions", "open regions", "masks", "mask and layers", "everything"],
)
def test_code_makes_the_same_picture(values, studio, tmp_path, monkeypatch):
    asked = admit({"steps": 3, **values})
    picture = draw(studio, asked)[-1]
    job, made = studio.job(asked), asked.make_controls()

    monkeypatch.chdir(tmp_path)
    *writing, command = as_cli(job, made).replace("\\\n", " ").splitlines()
    subprocess.run(["sh", "-e"], input="\n".join(writing), text=True, check=True)
    words = shlex.split(command)
    assert words[0] == "attnctrl"
    assert main([words[1], "--output", str(tmp_path / "cli"), *words[2:]]) == 0
    (file,) = (tmp_path / "cli").iterdir()
    assert np.array_equal(pixels(Image.open(file)), pixels(picture.image))

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
    monkeypatch.setattr("attnctrl.apps.demo.progress.EVERY", 0.0)
    visitor = studio.visitor("test")
    asked = [("picture", admit({"prompt": PROMPT, "steps": 4}))]
    *steps, picture = studio.draw(asked, visitor.folder, visitor.begin(), previews=True)
    previews = [step.preview for step in steps if step.preview is not None]
    assert len(previews) == 3
    assert all(preview.size == (16, 16) for preview in previews)
    assert np.array_equal(pixels(picture.image), pixels(draw(studio, asked[0][1])[-1].image))


def test_packed_latents_are_unpacked_by_the_pipeline(studio, monkeypatch):
    """FLUX hands its latents over in packed form, SD3 does not: the same latents give the same preview."""
    monkeypatch.setattr("attnctrl.apps.demo.progress.EVERY", 0.0)
    vae, parts = (
        studio.model.pipeline.vae,
        dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    scheduler = studio.model.pipeline.scheduler
    flux = FluxPipeline(scheduler=scheduler, vae=vae, transformer=None, **parts)
    latents = torch.randn(1, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    packed = flux._pack_latents(latents, 1, 4, 16, 8)
    assert packed.shape == (1, 32, 16)

    def preview(pipeline, given, size=(16, 32)) -> Step:
        told = []
        Watch("picture", 4, Event(), told.append, size)(pipeline, 1, None, {"latents": given})
        return told[0]

    wanted = preview(studio.model.pipeline, latents)
    assert wanted.preview.size == (16, 32) and wanted.note == ""
    assert np.array_equal(pixels(preview(flux, packed).preview), pixels(wanted.preview))
    assert preview(flux, packed, size=(16, 48)).note == "FluxPipeline draws at another size than 16 x 48"
    assert "packs latents in a way of its own" in preview(studio.model.pipeline, packed).note
    assert "are not those of one picture" in preview(flux, latents[None]).note
    assert preview(flux, packed, size=None) == Step("picture", 2, 4)


def attended(studio, regions, **options) -> Picture:
    controls = [{"control": "RegionalPrompts", "regions": regions, "stop": 0.5, **options}]
    asked = admit({"prompt": PROMPT, "steps": 4, "controls": controls})
    visitor = studio.visitor("test")
    return list(studio.draw([("picture", asked)], visitor.folder, visitor.begin(), maps=True))[-1]


def test_attention_to_regions_is_recorded_without_changing_the_picture(studio):
    regions = [MASK, REGIONS[1]]
    picture = attended(studio, regions)
    controls = [{"control": "RegionalPrompts", "regions": regions, "stop": 0.5}]
    plain = draw(studio, admit({"prompt": PROMPT, "steps": 4, "controls": controls}))[-1]
    assert plain.maps is None and np.array_equal(pixels(picture.image), pixels(plain.image))
    assert picture.facts["controls"] == plain.facts["controls"]
    assert len(picture.maps) == 2 and bool(((picture.maps > 0) & (picture.maps < 1)).all())
    assert not torch.equal(picture.maps[0], picture.maps[1])
    one = attended(studio, regions, layers="1")
    assert one.maps.shape == picture.maps.shape and not torch.equal(one.maps, picture.maps)


def test_only_the_words_of_a_region_count_where_its_tokens_are_known(studio, monkeypatch):
    words = attended(studio, REGIONS).maps
    monkeypatch.setattr(attention, "TOKENIZERS", {})
    whole = attended(studio, REGIONS).maps
    assert bool((words < whole).all())


def test_picture_is_made_where_attention_cannot_be_recorded(studio, monkeypatch):
    plain = attended(studio, REGIONS)

    def refuse(*given):
        raise AttnCtrlError("the model masks pairs of tokens")

    monkeypatch.setattr(attention.RegionMaps, "edit", refuse)
    picture = attended(studio, REGIONS)
    assert "the model masks pairs of tokens" in picture.maps
    assert np.array_equal(pixels(picture.image), pixels(plain.image))


def test_maps_are_laid_over_the_picture():
    maps = torch.zeros(3, 4, 4)
    maps[0, :, :2], maps[1, 0, 3] = 0.5, 0.25
    maps[0, :, 2:] = 0.1
    regional = RegionalPrompts(["cat@0,0,0.5,1", "car@0.5,0,1,1"], background="grass", stop=0.3)
    shown = attention.overlay(
        Image.new("RGB", (1000, 500)), maps, regional, [("left", "#ff0000"), ("right", "no colour")]
    )
    assert [row["name"] for row in shown["maps"]] == ["left", "right", "grass"]
    assert shown["maps"][0]["about"] == "up to 50%, 5.0 × as much inside as outside"
    images = [Image.open(io.BytesIO(base64.b64decode(row["png"]))) for row in shown["maps"]]
    assert images[0].size == (4, 4) and images[0].getpixel((0, 0)) == (255, 0, 0, 255)
    assert images[0].getpixel((3, 0))[3] == 0 and images[1].getpixel((3, 0))[3] == 255
    assert images[2].getchannel("A").getextrema() == (0, 0)  # equal everywhere: nothing to show
    assert "0% to 30% of the steps" in shown["note"]
    assert Image.open(io.BytesIO(base64.b64decode(shown["picture"]))).size == (768, 384)


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


# -- scores of heads -----------------------------------------------------------------------------------------------------


def test_scores_of_a_search_are_those_of_its_first_round(tmp_path):
    rows = [
        {"round": 1, "layer": 0, "head": 0, "gain": 0.25},
        {"round": 1, "layer": 1, "head": 3, "gain": -0.5},
        {"round": 1, "layer": 9, "head": 0, "gain": 1.0},  # of another model
        {"round": 1, "layer": "attn2", "head": 0, "gain": 1.0},
        {"round": 1, "layer": 0, "head": 1, "gain": None},
        {"round": 2, "layer": 0, "head": 0, "gain": 9.0},
    ]
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"heads": [[0, 0]], "rows": rows}))
    expected = ([[0, 0, 0.25], [1, 3, -0.5]], FIRST)
    assert scores_of(HeadSet.parse(file), [4, 4], file) == expected
    assert scores_of(HeadSet(((0, 0, 1.0),), provenance={"rows": rows}), [4, 4]) == expected


def test_scores_of_a_head_set_are_what_its_rounds_gained(tmp_path):
    track = [{"heads": 0, "score": 0.5}, {"heads": 2, "score": 0.75}, {"heads": 3, "score": 0.625}]
    heads = HeadSet(((1, 2, 1.0), (0, 3, 1.0), (0, 0, 0.5)), provenance={"scores": track})
    assert scores_of(heads, [4, 4]) == ([[1, 2, 0.25], [0, 3, 0.25], [0, 0, -0.125]], CHOSEN)
    heads.save(tmp_path / "head_set.json")
    assert scores_of(HeadSet.parse(tmp_path / "head_set.json"), [4, 4]) == scores_of(heads, [4, 4])


@pytest.mark.parametrize(
    "provenance",
    [{}, {"scores": "high"}, {"scores": [1, 2]}, {"scores": [{"heads": "1", "score": 2}]}, {"rows": [[0]]}],
)
def test_head_sets_without_scores_have_none(provenance):
    assert scores_of(HeadSet(((0, 0, 1.0),), provenance=provenance), [4]) == ([], "")


def test_presets_are_taken_by_name_alone(studio, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs gradio")
    from attnctrl.apps.demo.page import Page

    folder = tmp_path / "heads" / "sharp"
    folder.mkdir(parents=True)
    heads = HeadSet(
        ((1, 2, 1.0), (0, 3, 0.5)), provenance={"scores": [{"heads": 0, "score": 0}, {"heads": 2, "score": 1}]}
    )
    heads.save(folder / "head_set.json")
    monkeypatch.setattr("attnctrl.icons.models.asset_folders", lambda: (tmp_path,))
    page = Page(studio)
    page.build()
    assert page.heads.take_preset("sharp") == {
        "layers": [4, 4, 4],
        "heads": [[1, 2, 1.0], [0, 3, 0.5]],
        "scores": [[1, 2, 1.0], [0, 3, 1.0]],
        "about": CHOSEN,
    }
    for name in ("blunt", str(folder), "../sharp", None):
        with pytest.raises(AttnCtrlError, match="there is no head preset"):
            page.heads.take_preset(name)


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


def test_shipped_model_answers_where_it_is_there(attnctrl, model, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("attnctrl.apps.demo.serve.serve", lambda *given, vlm: started.append(vlm))
    monkeypatch.setattr("attnctrl.icons.models.asset_folders", lambda: (tmp_path,))
    folder = tmp_path / "models" / "icons-vlm"
    assert attnctrl("demo", "--model", model)[0] == 0
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    for arguments in ((), ("--vlm", "none"), ("--vlm", "somebody/model")):
        assert attnctrl("demo", "--model", model, *arguments)[0] == 0
    assert started == [None, "builtin:icons-vlm", None, "somebody/model"]


@pytest.mark.parametrize("package, arguments, hint", [("gradio", (), "attnctrl[demo]"), ("mcp", ("--mcp",), "mcp<2")])
def test_missing_package_is_told_with_what_installs_it(package, arguments, hint, attnctrl, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    code, _, err = attnctrl("demo", *arguments)
    assert code == 2 and f"{package}, which is not installed" in err and f"pip install '{hint}'" in err
