"""The demo in a browser: Chromium, driven by Playwright, on the built-in model; and many clients at once."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnctrl.apps.batch.pictures import read_request
from attnctrl.apps.metadata import mask_from_text
from attnctrl.heads import HeadSet
from attnctrl.icons.models import builtin_models

from .conftest import WAIT, bomb, serving


gradio_client = pytest.importorskip("gradio_client", reason="the demo needs gradio")
MODEL = "icons-t2i"
pytestmark = pytest.mark.skipif(MODEL not in builtin_models(), reason="the built-in model is not there")


@pytest.fixture(scope="module")
def server():
    """(address, studio) of a running demo."""
    with serving(f"builtin:{MODEL}") as running:
        yield running


@pytest.fixture
def page(server, browser):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        yield arrive(context.new_page(), server[0])


def arrive(page, address):
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    page.get_by_text("8 layers").wait_for(timeout=WAIT)
    return page


def drag(page, start, end):
    """Drags on the canvas between two points, in fractions."""
    page.locator("#canvas .stage").scroll_into_view_if_needed()
    area = page.locator("#canvas .stage").bounding_box()
    points = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=4)
    page.mouse.up()


def shown(page, place):
    """Alpha of the painted mask on the canvas, at a place in fractions."""
    return page.evaluate(
        """([x, y]) => {
            const node = document.querySelector('#canvas .paint canvas');
            return node.getContext('2d').getImageData(x * node.width, y * node.height, 1, 1).data[3];
        }""",
        place,
    )


def frame(page):
    """(left, top, right, bottom) of the mask on the canvas, in fractions of it."""
    return page.evaluate(
        """() => {
            const whole = document.querySelector('#canvas .paint').getBoundingClientRect();
            const part = document.querySelector('#canvas .paint .frame').getBoundingClientRect();
            const x = (side) => (side - whole.left) / whole.width, y = (side) => (side - whole.top) / whole.height;
            return [x(part.left), y(part.top), x(part.right), y(part.bottom)];
        }"""
    )


def settings(page, **values):
    """Types numbers into the page's settings."""
    page.get_by_role("button", name="Settings", exact=False).first.click()
    for name, value in values.items():
        field = page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")


def until(page, tab, text):
    try:
        page.wait_for_function(
            "([id, text]) => document.querySelector(id).innerText.includes(text)",
            arg=[f"#{tab}-status", text],
            timeout=WAIT,
        )
    except Exception as error:  # playwright's, which is imported where a browser is there
        told = page.locator(f"#{tab}-status").inner_text()
        raise AssertionError(f"{text!r} never came; the page says {told!r}, errors {page.errors}") from error


def pictures(page, place, folder):
    """(request, picture) of every picture in a place of the page. Their files go to a folder."""
    page.locator(f"{place} img").first.wait_for(timeout=WAIT)
    found = []
    for source in dict.fromkeys(image.get_attribute("src") for image in page.locator(f"{place} img").all()):
        file = folder / f"{place[1:]}-{len(found)}{Path(source).suffix}"
        file.write_bytes(page.request.get(source).body())
        found.append((read_request(file), Image.open(file)))
    return found


def test_boxes_drawn_with_the_mouse_become_regions(page, tmp_path):
    from attnctrl.evaluate.icons import IconJudge, in_box

    drag(page, (0.02, 0.1), (0.48, 0.9))
    page.keyboard.type("a red cat")
    drag(page, (0.52, 0.1), (0.98, 0.9))
    page.keyboard.type("a blue car")
    drag(page, (0.75, 0.5), (0.77, 0.55))  # moves the second box
    settings(page, steps=12, seed=1)
    page.locator("#compose-draw").click()
    until(page, "compose", "Done")
    (plain, _), (controlled, picture) = pictures(page, "#compose-slider", tmp_path)
    assert plain["controls"] == [] and plain["seed"] == controlled["seed"] == 1
    (control,) = controlled["controls"]
    assert [region["prompt"] for region in control["regions"]] == ["a red cat", "a blue car"]
    assert control["stop"] == 0.3
    boxes = [region["box"] for region in control["regions"]]
    assert np.allclose(boxes, [(0.02, 0.1, 0.48, 0.9), (0.54, 0.15, 1.0, 0.95)], atol=0.02)
    halves = {("cat", "red"): (0, 0, 64, 128), ("car", "blue"): (64, 0, 128, 128)}
    read = [(found.noun, found.color, found) for found in IconJudge().read(picture)]
    assert any(in_box(found, halves[noun, color]) for noun, color, found in read if (noun, color) in halves), read
    assert len(pictures(page, "#gallery", tmp_path)) >= 2

    page.locator("#prompt textarea").fill("something else")
    page.get_by_test_id("Open a picture of attnctrl-upload-button").set_input_files(tmp_path / "compose-slider-1.png")
    until(page, "compose", "Opened compose-slider-1.png")
    assert page.locator("#prompt textarea").input_value() == "a red cat and a blue car"
    assert page.get_by_label("Prompt of box 2").input_value() == "a blue car"

    undo = page.locator("#canvas").get_by_role("button", name="Undo")
    undo.click()  # the move
    undo.click()  # the second prompt
    assert page.get_by_label("Prompt of box 2").input_value() == ""
    page.locator("#canvas .box").nth(0).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Delete")
    assert page.locator("#canvas .box").count() == 1
    page.locator("#compose-draw").click()
    page.get_by_text("Box 1 has no prompt").first.wait_for(timeout=WAIT)
    assert page.errors == []


def test_masks_are_painted_with_the_mouse(page, tmp_path):
    canvas = page.locator("#canvas")
    tool = canvas.get_by_role("toolbar").get_by_role("button")
    drag(page, (0.6, 0.1), (0.98, 0.9))
    page.keyboard.type("a blue car")
    tool.filter(has_text="Brush").click()
    canvas.get_by_label("Size of the brush").fill("30")
    for row in (0.2, 0.45, 0.7, 0.9):
        drag(page, (0.15, row), (0.35, row))
    assert canvas.locator(".paint").count() == 1  # four strokes of one mask
    page.get_by_label("Prompt of mask 2").fill("a red cat")
    tool.filter(has_text="Eraser").click()
    drag(page, (0.02, 0.9), (0.45, 0.9))
    assert shown(page, (0.25, 0.2)) == 255 and shown(page, (0.25, 0.9)) == 0
    canvas.get_by_role("button", name="Undo").click()
    page.wait_for_function(
        """() => {
            const node = document.querySelector('#canvas .paint canvas');
            return node.getContext('2d').getImageData(node.width * 0.25, node.height * 0.9, 1, 1).data[3] == 255;
        }"""
    )
    settings(page, steps=8, seed=2)
    page.locator("#compose-draw").click()
    until(page, "compose", "Done")
    (_, _), (asked, picture) = pictures(page, "#compose-slider", tmp_path)
    box, mask = asked["controls"][0]["regions"]
    assert box["prompt"] == "a blue car" and mask["prompt"] == "a red cat" and mask.get("box") is None
    inside = np.asarray(mask_from_text(mask["mask_png"])) > 127
    assert inside.shape == (256, 256) and 0.2 < inside.mean() < 0.5 and not inside[:, 140:].any()

    buttons = page.locator("#attention .legend button")
    buttons.first.wait_for(timeout=WAIT)
    assert buttons.count() == 2 and "a red cat" in buttons.nth(1).inner_text()
    assert page.locator("#attention .map:visible").count() == 2
    buttons.nth(0).click()
    assert page.locator("#attention .map:visible").count() == 1
    assert buttons.nth(0).get_attribute("aria-pressed") == "false"

    canvas.get_by_role("button", name="Clear").click()
    page.get_by_test_id("Open a picture of attnctrl-upload-button").set_input_files(tmp_path / "compose-slider-1.png")
    until(page, "compose", "Opened compose-slider-1.png")
    page.wait_for_function("document.querySelector('#canvas .paint canvas')?.width == 256")
    page.wait_for_timeout(300)
    assert shown(page, (0.25, 0.45)) == 255 and shown(page, (0.8, 0.45)) == 0
    tool.filter(has_text="Box").click()
    drag(page, (0.25, 0.45), (0.25, 0.45))  # a click on the mask chooses it
    assert canvas.locator(".row.chosen").get_by_label("Prompt of mask 2").count() == 1
    drag(page, (0.25, 0.45), (0.75, 0.45))  # and a drag moves it
    assert shown(page, (0.75, 0.45)) == 255 and shown(page, (0.25, 0.45)) == 0
    canvas.get_by_role("button", name="Undo").click()
    page.wait_for_timeout(300)
    assert shown(page, (0.75, 0.45)) == 0 and shown(page, (0.25, 0.45)) == 255

    left, top, right, bottom = frame(page)
    drag(page, (right - 0.005, top + 0.005), (0.98, top))  # its corner resizes it
    assert np.allclose(frame(page), (left, top, 0.98, bottom), atol=0.02) and shown(page, (0.75, 0.45)) == 255
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowLeft")
    assert np.allclose(frame(page), (left, top - 1 / 64, 0.98 - 1 / 64, bottom - 1 / 64), atol=0.02)
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    page.wait_for_timeout(300)
    assert np.allclose(frame(page), (left, top, right, bottom), atol=0.01) and shown(page, (0.75, 0.45)) == 0
    canvas.locator(".paint .frame").focus()
    page.keyboard.press("Delete")
    assert canvas.locator(".paint").count() == 0 and canvas.locator(".box").count() == 1
    assert page.errors == []


def test_sizes_that_are_no_numbers_are_told(page):
    page.get_by_role("button", name="Settings", exact=False).first.click()
    page.get_by_label("Width").fill("wide")
    page.get_by_label("Width").press("Tab")
    page.get_by_text("width: 'wide' is no number").first.wait_for(timeout=WAIT)
    page.get_by_label("Width").fill("256")
    page.get_by_label("Width").press("Tab")
    page.wait_for_function("document.querySelector('#canvas .stage').style.aspectRatio.startsWith('2')", timeout=WAIT)
    assert page.errors == []


def test_heads_are_chosen_and_drawn(page, tmp_path):
    page.get_by_role("tab", name="Heads").click()
    page.locator('#heads [data-key="4.1"]').click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert page.locator('#heads .head[aria-pressed="true"]').count() == 2
    settings(page, steps=2)
    page.locator("#strengths input, #strengths textarea").first.fill("0, 1")
    page.locator("#draw-strip").click()
    until(page, "heads", "Done")
    facts = [request["controls"][0] for request, _ in pictures(page, "#strip", tmp_path)]
    assert {(control["strength"], str(control["heads"])) for control in facts} == {
        (strength, "[[4, 1, 1.0], [4, 2, 1.0]]") for strength in (0, 1)
    }
    with page.expect_download() as download:
        page.locator("#save-heads").click()
    download.value.save_as(tmp_path / "head_set.json")
    assert str(HeadSet.parse(tmp_path / "head_set.json")) == "4.1,4.2"
    (tmp_path / "own.json").write_text(json.dumps({"heads": [[0, 0], [2, 3, 0.5]]}))
    page.get_by_test_id("Load head set-upload-button").set_input_files(tmp_path / "own.json")
    page.get_by_text("2 chosen: 0.0, 2.3").wait_for(timeout=WAIT)
    assert page.locator("#heads .scale").is_hidden()
    rows = [{"round": 1, "layer": 0, "head": 0, "gain": 0.02}, {"round": 1, "layer": 2, "head": 3, "gain": -0.04}]
    (tmp_path / "result.json").write_text(json.dumps({"heads": [[0, 0], [2, 3, 0.5]], "rows": rows}))
    page.get_by_test_id("Load head set-upload-button").set_input_files(tmp_path / "result.json")
    page.locator('#heads .worse[data-key="2.3"]').wait_for(timeout=WAIT)
    assert page.locator('#heads .better[data-key="0.0"]').get_attribute("title") == "0.0: +0.02"
    assert "-0.04" in page.locator("#heads .scale").inner_text()
    page.locator('#heads [data-key="0.0"]').click()  # scores stay when heads change
    page.locator('#heads [data-key="0.0"]').click()
    assert page.locator("#heads .better").count() == 1
    page.get_by_role("button", name="Use in Compose").click()
    until(page, "heads", "SoftPAG in Compose")
    page.get_by_role("tab", name="Compose").click()
    page.wait_for_function("[...document.querySelectorAll('input, textarea')].some(n => n.value == '0.0,2.3:0.5')")
    assert page.errors == []


def test_long_work_is_stopped(page):
    settings(page, steps=150)
    page.locator("#compose-draw").click()
    until(page, "compose", "step")
    page.locator("#compose-stop").click()
    until(page, "compose", "Stopped")
    began = time.monotonic()
    page.locator("#steps input[type=number]").fill("1")
    page.locator("#steps input[type=number]").press("Tab")
    page.locator("#compose-draw").click()
    until(page, "compose", "Done")
    assert time.monotonic() - began < 15  # the long picture does not hold the model


def test_bad_uploads_are_told_in_the_page(page, tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(60_000))
    page.get_by_test_id("Open a picture of attnctrl-upload-button").set_input_files(tmp_path / "bomb.png")
    page.get_by_text(re.compile("bomb.png' has more than")).first.wait_for(timeout=WAIT)
    page.get_by_role("tab", name="Batch").click()
    (tmp_path / "rows.jsonl").write_text('{"id": "../a", "prompt": "a cat"}\n{"id": "b"}\n')
    page.locator("#requests input").set_input_files(tmp_path / "rows.jsonl")
    page.wait_for_function("document.querySelector('#problems textarea').value.includes('line 2')", timeout=WAIT)
    assert "leaves the output folder" in page.locator("#problems textarea").input_value()
    assert page.errors == []


def test_requests_file_comes_back_as_archive(page, tmp_path):
    page.get_by_role("tab", name="Batch").click()
    rows = [{"id": "a", "prompt": "a red cat", "steps": 1}, {"id": "b", "prompt": "a blue car", "steps": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page.locator("#requests input").set_input_files(tmp_path / "rows.jsonl")
    page.wait_for_function(
        "document.querySelector('#problems textarea').value == '2 requests, 2 pictures'", timeout=WAIT
    )
    page.locator("#draw-all").click()
    until(page, "batch", "Done")
    with page.expect_download() as download:
        page.locator("#archive").click()
    shutil.unpack_archive(download.value.path(), tmp_path / "out", format="zip")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "results.jsonl"]
    assert read_request(tmp_path / "out" / "b.png")["prompt"] == "a blue car"


def test_phone_needs_no_sideways_scrolling(server, browser):
    with browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True) as context:
        page = arrive(context.new_page(), server[0])
        for tab in ("Compose", "Heads", "Batch"):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        page.get_by_role("tab", name="Compose").click()
        page.locator("#canvas").get_by_role("button", name="Brush").tap()
        page.locator("#canvas .stage").scroll_into_view_if_needed()
        area, fingers = page.locator("#canvas .stage").bounding_box(), context.new_cdp_session(page)
        for kind, place in (("touchStart", 0.3), ("touchMove", 0.5), ("touchMove", 0.7), ("touchEnd", None)):
            at = place and {"x": area["x"] + place * area["width"], "y": area["y"] + place * area["height"]}
            fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [at] if at else []})
        page.get_by_label("Prompt of mask 1").wait_for(timeout=WAIT)
        assert shown(page, (0.5, 0.5)) == 255 and shown(page, (0.9, 0.1)) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.errors == []


def test_fifty_parallel_clients_get_the_pictures_of_their_own_seeds(server):
    """The queue holds 64: all fifty are answered, each with what it asked for."""
    address, studio = server

    def ask(seed):
        client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
        return client.predict(prompt="a red cat", seed=seed, steps=1, guidance_scale=1, api_name="/generate")

    with ThreadPoolExecutor(50) as pool:
        files = list(pool.map(ask, range(50)))
    assert [read_request(file)["seed"] for file in files] == list(range(50))
    arrays = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    assert np.array_equal(arrays[5], np.asarray(Image.open(ask(5)).convert("RGB")))
    assert len({array.tobytes() for array in arrays}) == 50


def test_client_gets_an_error_it_can_read(server):
    client = gradio_client.Client(server[0], verbose=False)
    with pytest.raises(Exception, match="has no box of four numbers; files are not read here"):
        client.predict(prompt="a cat", regions=["a cat@/etc/passwd"], api_name="/generate")
    assert client.predict(api_name="/model")["heads"] == [8] * 8
