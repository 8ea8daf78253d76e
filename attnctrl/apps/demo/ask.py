"""The tab Ask of the page: a picture, a question, the answer with and without controls, and where the model looked for each word."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ...controls.spec import control_types
from ...errors import AttnCtrlError
from . import parts
from .answers import Answer, admit_controls, admit_question, picture, shown
from .forms import explained, language_controls, read_form, summary
from .limits import PICTURES, QUESTION, TOKENS, picture_upload
from .parts import DEVICE, OWN, WAITING, in_page, say
from .progress import Stopped
from .studio import Studio


USUAL = 64  # tokens of the longest answer


class Ask:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.forms = language_controls()
        self.widgets: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, gr.Accordion] = {}
        with gr.Row():
            with gr.Column(min_width=300):
                self.file = gr.File(label="Picture", file_types=list(PICTURES), height=140, elem_id="ask-picture")
                self.question = gr.Textbox(
                    "What is in the picture?", label="Question", max_lines=4, max_length=QUESTION, elem_id="question"
                )
                self.tokens = gr.Slider(
                    1, TOKENS, USUAL, step=1, label="Longest answer, in tokens", elem_id="ask-tokens"
                )
                self.compare = gr.Checkbox(True, label="Also answer without control")
                self.picker = gr.Dropdown(
                    list(self.forms), value=[], multiselect=True, label="Controls", elem_id="ask-picker"
                )
                for name, form in self.forms.items():
                    with gr.Accordion(name, visible=False) as self.groups[name]:
                        gr.Markdown(html.escape(summary(control_types()[name]), quote=False))
                        self.widgets[name] = parts.form(form)
            with gr.Column(min_width=300):
                with gr.Row():
                    self.run = gr.Button("Ask", variant="primary", min_width=120, elem_id="ask-run")
                    self.stop = gr.Button("Stop", min_width=100, elem_id="ask-stop")
                self.status = parts.status(elem_id="ask-status")
                self.answers = parts.answers()

    def connect(self) -> list[Any]:
        """Connects the components; returns the events that Stop ends."""
        every = [widget for name in self.forms for widget in self.widgets[name].values()]
        self.file.change(in_page(self.look), self.file, self.answers, show_progress="hidden", **OWN)
        parts.show_chosen(self.picker, self.groups)
        run = gr.on(
            [self.run.click, self.question.submit],
            in_page(self.answer, self.status),
            [self.file, self.question, self.tokens, self.compare, self.picker, *every],
            [self.status, self.answers],
            show_progress="hidden",
            **DEVICE,
            **OWN,
        )
        return [run]

    def endpoint(self) -> None:
        """The same for `gradio_client` and MCP; hidden components give the arguments their types."""
        file = gr.File(label="picture")
        question, controls = gr.Textbox(label="question"), parts.listed("controls")
        tokens = gr.Number(USUAL, precision=0, label="max_new_tokens")
        attention = gr.Checkbox(False, label="attention")
        answer = gr.JSON(label="answer")
        gr.Button().click(
            in_page(self.ask), [file, question, controls, tokens, attention], answer, api_name="ask", **DEVICE
        )

    @staticmethod
    def look(path: str | None) -> dict[str, Any]:
        return {} if path is None else picture(picture_upload(path))

    def answer(
        self,
        request: gr.Request,
        path: str | None,
        question: str,
        tokens: int,
        compare: bool,
        names: list[str],
        *values: Any,
    ) -> Iterator[dict]:
        visitor = self.studio.visitor(request.session_hash)
        stop = visitor.begin()
        yield {self.status: say(WAITING)}
        image = picture_upload(self.needed(path))
        question, tokens = admit_question(question, tokens)
        controls = admit_controls(self.chosen(names, values), self.studio.vlm.tokenizer)
        tasks = [(f"With {', '.join(control.name for control in controls)}", controls)] * bool(controls)
        tasks += [("Without control", [])] * (compare or not controls)
        answers: list[Answer] = []
        try:
            for event in self.studio.ask(tasks, image, question, tokens, stop):
                if isinstance(event, Answer):
                    answers.insert(0, event)  # the one without control stands first
                    yield {self.answers: shown(self.studio.vlm, image, answers)}
                else:
                    text = f"{event.title}: {event.text[-200:] or 'reading'}"
                    yield {self.status: say(text, len(answers) * tokens + event.done, len(tasks) * tokens)}
        except Stopped:
            yield {self.status: say("Stopped")}
            return
        yield {self.status: say("Done")}

    def chosen(self, names: list[str], values: tuple[Any, ...]) -> list[dict[str, Any]]:
        """The chosen controls with what their forms hold. `values`: of all forms."""
        rest = iter(values)
        filled = {name: {field: next(rest) for field in self.widgets[name]} for name in self.forms}
        return [read_form(name, filled[name], self.forms[name]) for name in names]

    @staticmethod
    def needed(path: str | None) -> str:
        if path is None:
            raise AttnCtrlError("there is no picture\nHINT: drop one above the question")
        return path

    def ask(
        self, picture: str, question: str, controls: list, max_new_tokens: int, attention: bool, request: gr.Request
    ) -> dict[str, Any]:
        """Answers a question about a picture, under controls of a vision-language model's attention.

        Args:
            picture: a PNG, JPEG or WebP file.
            question: what to ask.
            controls: each "PAI(alpha=0.5)" or {"control": "PAI", "alpha": 0.5}; those that read words of the prompt as the latter.
            max_new_tokens: of the longest answer.
            attention: also return, for each word, the attention to the picture while it was written, rows of columns of image tokens.
        """
        image = picture_upload(self.needed(picture))
        question, tokens = admit_question(question, max_new_tokens)
        made = admit_controls(controls or [], self.studio.vlm.tokenizer)
        stop = self.studio.visitor(request.session_hash).begin()
        *_, answer = self.studio.ask([("api", made)], image, question, tokens, stop)
        found: dict[str, Any] = {"answer": answer.text.strip(), "words": [word.strip() for word in answer.words]}
        if attention:
            known = not isinstance(answer.looked, str)
            found["attention"] = [values.tolist() for values in answer.looked] if known else answer.looked
        if answer.sinks is not None:
            found["sinks"] = answer.sinks.tolist()
        return found

    def describe(self) -> dict[str, Any]:
        """The model that answers, and the controls with their arguments."""
        return {"model": self.studio.vlm_name, "controls": explained(self.forms)}
