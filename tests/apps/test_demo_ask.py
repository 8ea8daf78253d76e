"""The tab Ask of the demo: forms of language controls, answers and where they looked, uploads; and in Chromium, with a tiny LLaVA."""

import base64
import io
from threading import Event, Thread

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attnctrl import PAI, VAR, AttnCtrlError
from attnctrl.apps.demo.answers import RING, Answer, Writing, admit_controls, admit_question, shown, words_of
from attnctrl.apps.demo.forms import language_controls, read_form
from attnctrl.apps.demo.limits import SIDE, admit, picture_upload
from attnctrl.apps.demo.progress import Stopped
from attnctrl.apps.demo.studio import Studio
from attnctrl.apps.generate import Job
from attnctrl.controls import HeadScale, LanguageControl
from attnctrl.controls.spec import control_types

from .conftest import WAIT, bomb, serving
from .test_ask import ASKED, by_hand


@pytest.fixture(scope="module")
def server(model, vlm):
    """(address, studio) of a running demo that answers questions."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    with serving(model, vlm=vlm) as running:
        yield running


@pytest.fixture(scope="module")
def studio(server):
    return server[1]


def answer(studio, picture, *controls, tokens=6) -> Answer:
    *before, last = studio.ask([("title", controls)], picture_upload(str(picture)), ASKED, tokens, Event())
    assert before and all(isinstance(event, Writing) for event in before)
    return last


# -- forms ---------------------------------------------------------------------------------------------------------------


def test_every_language_control_has_a_form():
    language = {name for name, kind in control_types().items() if issubclass(kind, (LanguageControl, HeadScale))}
    assert set(language_controls()) == language - {"RecordAttention"}
    kinds = {(name, field.name): field.kind for name, form in language_controls().items() for field in form}
    assert kinds["PASTA", "spans"] == kinds["GIFT", "words"] == kinds["VAR", "dims"] == "list"
    assert kinds["PAI", "strength"] == "fraction" and kinds["PAI", "alpha"] == "number"
    assert ("PASTA", "tokenizer") not in kinds and ("HeadScale", "start") not in kinds


@pytest.mark.parametrize(
    "name, typed, arguments",
    [
        ("VAR", {"dims": "7, 12", "tau": 5}, {"dims": [7, 12], "tau": 5}),
        ("VAR", {"dims": "any", "layers": " 1: "}, {"dims": "any", "layers": "1:"}),
        ("PASTA", {"spans": "the red, old car; 2:5 ;"}, {"spans": ["the red, old car", (2, 5)]}),
        ("GIFT", {"alpha": "4", "words": "car"}, {"alpha": 4.0, "words": ["car"]}),
        ("PAI", {"alpha": 0.2}, {}),
    ],
)
def test_filled_forms_become_controls(name, typed, arguments, studio):
    read = read_form(name, typed, language_controls()[name])
    assert read == {"control": name, **arguments}
    (control,) = admit_controls([read], studio.vlm.tokenizer)
    assert control.name == name


def test_controls_of_clients_are_checked(studio):
    tokenizer = studio.vlm.tokenizer
    first, second = admit_controls(["PAI(alpha=0.5)", {"control": "PASTA", "spans": ["the car"]}], tokenizer)
    assert first.alpha == 0.5 and second.tokenizer is tokenizer
    for items, said in (
        ("PAI", "no list"),
        ([7], "has no name"),
        (["Pai"], "there is no control 'Pai'"),
        (["RecordAttention"], "RecordAttention: not for questions"),
        (["SkipLayers(layers=1)"], "SkipLayers: not for questions"),
        ([{"control": "PAI", "alpha": "much"}], "PAI: alpha is 'much', not a number"),
        ([{"control": "PAI", "beta": 1}], "'beta' is not known"),
        ([{"control": "ACT", "heads": "/etc/heads.json"}], "files are not read here"),
        (["ACT(heads='/etc/heads.json')"], "files are not read here"),
    ):
        with pytest.raises(AttnCtrlError, match=said):
            admit_controls(items, tokenizer)


@pytest.mark.parametrize(
    "text, tokens, said",
    [
        (" ", 6, "there is no question"),
        ("a" * 4001, 6, "has 4001 characters"),
        ("what", 0, "max_new_tokens=0"),
        ("what", 513, "HINT: 1 to 512"),
        ("what", None, "max_new_tokens=None"),
    ],
)
def test_questions_are_checked(text, tokens, said):
    with pytest.raises(AttnCtrlError, match=said):
        admit_question(text, tokens)


# -- uploads -------------------------------------------------------------------------------------------------------------


def test_pictures_are_read_upright_and_made_smaller(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # taken with the camera on its side
    Image.new("CMYK", (3000, 1000)).save(tmp_path / "photo.JPG", format="JPEG", exif=exif)
    found = picture_upload(str(tmp_path / "photo.JPG"))
    assert found.mode == "RGB" and found.size == (SIDE // 3, SIDE)


def test_bad_pictures_are_refused(tmp_path):
    gif, torn = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, format="GIF")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(torn, format="PNG")
    for name, data, said in (
        ("bomb.png", bomb(60_000), "has more than 16777216 pixels"),
        ("large.png", bomb(5_000), "has more than 16777216 pixels"),
        ("text.jpg", b"no picture", "is no picture"),
        ("gif.png", gif.getvalue(), "is no picture"),
        ("torn.png", torn.getvalue()[:4000], "cannot be read as a picture"),
        ("script.svg", b"<svg/>", "of no kind that is read here"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AttnCtrlError, match=said) as error:
            picture_upload(str(tmp_path / name))
        assert str(tmp_path) not in str(error.value)


# -- answers -------------------------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_generate(studio, picture):
    loaded = studio.vlm.model, studio.vlm.processor
    plain, values = by_hand(loaded, picture)
    found = answer(studio, picture)
    assert found.text.strip() == plain and [word.strip() for word in found.words] == plain.split()
    assert len(found.looked) == 6 and found.sinks is None and found.said == ""
    torch.testing.assert_close(torch.stack(found.looked).mean(0), values)
    edited, _ = by_hand(loaded, picture, PAI(alpha=4.0))
    found = answer(studio, picture, PAI(alpha=4.0))
    assert found.text.strip() == edited != plain and "PAI: 2 layers, acted 12 times" in found.said


def test_sinks_are_marked_where_a_control_looks_for_them(studio, picture):
    found = answer(studio, picture, VAR(dims="any", tau=1.5))
    assert found.sinks.shape == (2, 2) and found.sinks.max() > 0
    image = picture_upload(str(picture))
    value = shown(studio.vlm, image, [found])
    (row,) = value["answers"]
    assert decoded(value["picture"]).size == (20, 20)  # what the processor cuts out of 40 x 20
    marks = np.asarray(decoded(row["sinks"]["png"]))[..., 3].reshape(2, RING, 2, RING).max((1, 3))  # a ring each
    assert np.array_equal(marks > 0, (found.sinks > 0).numpy())
    assert row["sinks"]["about"].startswith(f"{int((found.sinks > 0).sum())} of 4 image tokens")
    for word, values in zip(row["words"], found.looked, strict=True):
        heat = np.asarray(decoded(word["png"]))
        assert heat.shape == (2, 2, 4)
        assert np.allclose(heat[..., 3], (values / values.max()).numpy() * 0.85 * 255, atol=1)
        assert f"{float(values.max()):.1%}" in word["about"]


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_answer_is_written_where_attention_cannot_be_recorded(studio, picture, monkeypatch):
    plain = answer(studio, picture)

    def refuse(*given):
        raise AttnCtrlError("the model tells no rows\nHINT: none")

    monkeypatch.setattr("attnctrl.controls.RecordAttention.row_edits", refuse)
    found = answer(studio, picture)
    assert found.words == plain.words and found.looked.endswith("the model tells no rows")
    (row,) = shown(studio.vlm, picture_upload(str(picture)), [found])["answers"]
    assert "the model tells no rows" in row["note"] and not any("png" in word for word in row["words"])


def test_stopped_answer_leaves_the_model_as_it_was(studio, picture):
    plain, stop = answer(studio, picture), Event()
    with pytest.raises(Stopped):
        for event in studio.ask([("title", [PAI()])], picture_upload(str(picture)), ASKED, 400, stop):
            assert isinstance(event, Writing)
            if event.done:
                stop.set()
    assert "generate" not in vars(studio.vlm.model)
    assert answer(studio, picture).words == plain.words


def test_questions_and_pictures_take_turns(studio, picture):
    order, begun, visitor = [], Event(), studio.visitor("test")

    def ask_twice():
        for event in studio.ask([("title", [])] * 2, picture_upload(str(picture)), ASKED, 100, Event()):
            begun.set()
            if isinstance(event, Answer):
                order.append("answer")

    asking = Thread(target=ask_twice)
    asking.start()
    assert begun.wait(60)
    list(studio.draw([("picture", admit({"prompt": "a cat", "steps": 1}))], visitor.folder, visitor.begin()))
    order.append("picture")
    asking.join()
    assert order == ["answer", "picture", "answer"]


def test_there_is_no_model_without_the_option(model):
    made = Studio(Job(prompt="of the page", model=model, device="cpu"))
    with pytest.raises(AttnCtrlError, match="attnctrl demo --vlm MODEL"):
        _ = made.vlm
    made.close()


def test_words_are_whole_and_know_their_tokens():
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(["</s>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>")
    text = "Der süße Kater,\n\n 猫です"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    found = words_of(tokenizer, [*ids, tokenizer.eos_token_id])
    assert [word for word, _ in found] == ["Der", " süße", " Kater,", "\n\n 猫", "で", "す"]
    assert [number for _, numbers in found for number in numbers] == list(range(len(ids)))
    assert len(found[1][1]) == len(" süße".encode())


# -- the page ------------------------------------------------------------------------------------------------------------


def until(page, text):
    page.wait_for_function(
        "text => document.querySelector('#ask-status').innerText.includes(text)", arg=text, timeout=WAIT
    )


def arrive(page, address):
    page.goto(address)
    page.get_by_text("3 layers").wait_for(timeout=WAIT)
    page.get_by_role("tab", name="Ask").click()


def choose(page, tokens):
    field = page.locator("#ask-tokens input[type=number]")
    field.fill(str(tokens))
    field.press("Tab")


def test_questions_are_asked_in_the_page(server, picture, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    arrive(page, server[0])
    page.locator("#ask-run").click()
    until(page, "there is no picture")
    (tmp_path / "bomb.png").write_bytes(bomb(60_000))
    page.locator("#ask-picture input").set_input_files(tmp_path / "bomb.png")
    page.get_by_text("bomb.png' has more than").first.wait_for(timeout=WAIT)

    arrive(page, server[0])
    page.locator("#ask-picture input").set_input_files(picture)
    page.locator("#answers img.below").wait_for(timeout=WAIT)
    page.locator("#question textarea").fill(ASKED)
    choose(page, 6)
    page.locator("#ask-picker input").fill("VAR")
    page.locator("#ask-picker input").press("Enter")
    page.get_by_label("Dims").fill("any")
    page.get_by_label("Tau").fill("1.5")
    page.get_by_label("Tau").press("Tab")
    page.locator("#ask-run").click()
    until(page, "Done")
    assert page.locator("#answers h3").all_inner_texts() == ["Without control", "With VAR"]
    plain, controlled = page.locator("#answers .answer").all()
    words = plain.locator(".words button")
    wanted = answer(server[1], picture)
    assert words.all_inner_texts() == [word.strip() for word in wanted.words]
    assert plain.locator(".map").is_hidden() and plain.locator(".mark").count() == 0
    words.nth(2).click()
    layer = plain.locator(".map")
    layer.wait_for(timeout=WAIT)
    assert layer.evaluate("node => [node.naturalWidth, node.naturalHeight]") == [2, 2]
    areas = layer.bounding_box(), plain.locator(".below").bounding_box()
    assert areas[0]["width"] == pytest.approx(areas[1]["width"], abs=2)
    assert f"{float(wanted.looked[2].max()):.1%}" in plain.locator(".note").inner_text()
    assert words.nth(2).get_attribute("aria-pressed") == "true"
    words.nth(3).focus()
    page.keyboard.press("Enter")
    assert plain.locator('.words [aria-pressed="true"]').all_inner_texts() == [words.nth(3).inner_text()]
    words.nth(3).click()
    assert layer.is_hidden()
    assert controlled.locator(".sinks").is_visible() and "image tokens" in controlled.locator(".mark").inner_text()
    controlled.locator(".mark").click()
    assert controlled.locator(".sinks").is_hidden()
    assert "VAR" in controlled.locator("pre").text_content()

    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    choose(page, 512)
    page.locator("#ask-run").click()
    until(page, "With VAR: ")
    page.locator("#ask-stop").click()
    until(page, "Stopped")
    assert errors == []
    page.close()


def test_questions_are_an_endpoint(server, picture):
    gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio")
    client = gradio_client.Client(server[0], verbose=False)
    asked = {"picture": gradio_client.handle_file(picture), "question": ASKED, "max_new_tokens": 6}
    found = client.predict(**asked, controls=["VAR(dims='any', tau=1.5)"], attention=True, api_name="/ask")
    wanted = answer(server[1], picture, VAR(dims="any", tau=1.5))
    assert found["answer"] == wanted.text.strip() and found["words"] == [word.strip() for word in wanted.words]
    assert np.allclose(found["attention"], torch.stack(wanted.looked)) and found["sinks"] == wanted.sinks.tolist()
    assert set(client.predict(**asked, api_name="/ask")) == {"answer", "words"}
    with pytest.raises(Exception, match="files are not read here"):
        client.predict(**asked, controls=["ACT(heads='heads.json')"], api_name="/ask")
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    types = {
        (name, given["parameter_name"]): given["type"].get("type", "a file")
        for name in named
        for given in named[name]["parameters"]
    }
    assert set(named) == {"/generate", "/model", "/ask"} and all(isinstance(kind, str) for kind in types.values())
    assert types["/generate", "regions"] == types["/ask", "controls"] == "array"
    told = client.predict(api_name="/model")["ask"]
    assert told["model"] == server[1].vlm_name and "min_non_sink" in told["controls"]["VAR"]
