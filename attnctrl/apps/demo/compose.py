"""The tab Compose of the page: boxes and masks with prompts, any control, the picture beside its twin, where each region attended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import AttnCtrlError
from ..batch.schema import picture_controls
from ..generate import EARLY
from . import parts
from .code import as_cli, as_python
from .drawing import KEPT, SETTINGS, Results, Settings
from .forms import controls as control_forms
from .forms import read_form, summary
from .limits import picture_request
from .parts import DEVICE, OWN, WAITING, in_page, say
from .studio import Picture, Studio


REGIONAL = "RegionalPrompts"
PRESETS = {(REGIONAL, "stop"): EARLY}


class Compose:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, settings: Settings):
        self.studio, self.settings = studio, settings
        self.forms = control_forms()
        self.widgets: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, gr.Accordion] = {}
        with gr.Row():
            with gr.Column(min_width=300):
                self.canvas = parts.canvas()
                self.open = gr.UploadButton(
                    "Open a picture of attnctrl", file_types=[".png", ".webp"], size="sm", elem_id="open-picture"
                )
                self.compare = gr.Checkbox(True, label="Also draw it without control")
                self.attend = gr.Checkbox(True, label="Show where each region attended")
                with gr.Accordion("Regions", open=False):
                    self._form(REGIONAL)
                others = [name for name in self.forms if name != REGIONAL]
                self.picker = gr.Dropdown(others, value=[], multiselect=True, label="More controls", elem_id="picker")
                for name in others:
                    with gr.Accordion(name, visible=False) as group:
                        gr.Markdown(summary(picture_controls()[name]))
                        self._form(name)
                    self.groups[name] = group
            with gr.Column(min_width=300):
                self.made = Results("compose")
                with gr.Accordion("Where each region attended", visible=False) as self.attended:
                    self.maps = parts.attention_maps()
                with gr.Accordion("Code", open=False):
                    self.cli = gr.Code(
                        label="Command line", elem_id="cli", language="shell", interactive=False, wrap_lines=True
                    )
                    self.python = gr.Code(label="Python", language="python", interactive=False, wrap_lines=True)
        self.shelf = gr.State([])
        self.gallery = gr.Gallery(
            label="This session",
            columns=4,
            fit_columns=False,
            height="auto",
            interactive=False,
            object_fit="contain",
            visible=False,
            elem_id="gallery",
        )
        self.stop, self.status = self.made.stop, self.made.status

    def _form(self, name: str) -> None:
        presets = {field: value for (control, field), value in PRESETS.items() if control == name}
        self.widgets[name] = parts.form(self.forms[name], presets)

    def connect(self) -> list[Any]:
        """Connects the components; returns the events that Stop ends."""
        every = [widget for name in self.forms for widget in self.widgets[name].values()]
        for side in self.settings.sides:
            side.blur(
                in_page(self.reshape), [self.canvas, *self.settings.sides], self.canvas, show_progress="hidden", **OWN
            )
        parts.show_chosen(self.picker, self.groups)
        self.open.upload(
            in_page(self.open_picture),
            self.open,
            [*self.settings.widgets, self.canvas, self.picker, *every, self.status],
            **OWN,
        )
        run = self.made.run.click(
            in_page(self.compose, self.status),
            [self.shelf, self.canvas, self.compare, self.attend, self.picker, *self.settings.widgets, *every],
            [*self.made.places, self.attended, self.maps, self.cli, self.python, self.shelf, self.gallery],
            show_progress="hidden",
            **DEVICE,
            **OWN,
        )
        return [run]

    def reshape(self, value: Any, *texts: str) -> Any:
        return {**value, "ratio": self.settings.ratio(texts)}

    def compose(
        self,
        request: gr.Request,
        shelf: list,
        canvas: Any,
        compare: bool,
        attend: bool,
        names: list[str],
        *values: Any,
    ) -> Iterator[dict]:
        settings, rest = values[: len(SETTINGS)], iter(values[len(SETTINGS) :])
        filled = {name: {field: next(rest) for field in self.widgets[name]} for name in self.forms}
        regions = parts.boxes_of(canvas)
        controls = [{**read_form(REGIONAL, filled[REGIONAL]), "regions": regions}] if regions else []
        controls += [read_form(name, filled[name]) for name in names if name in self.groups]
        asked = self.settings.request(settings, controls)
        job, made = self.studio.job(asked), asked.make_controls()
        python = as_python(job, made, self.studio.model.made, self.studio.model.absent)
        yield {
            self.cli: as_cli(job, made),
            self.python: python,
            self.status: say(WAITING),
            self.attended: gr.Accordion(visible=False),
        }
        self.studio.refuse(asked)
        twin = self.settings.request(settings, ()) if compare and controls else None
        for update, pictures in self.made.watch(self.studio, asked, twin, request, attend):
            if pictures and pictures[0].maps is not None:
                maps = self.attention(pictures[0], made, canvas)
                update |= {self.maps: maps, self.attended: gr.Accordion(visible=True)}
            if pictures:
                shelf = [*((str(p.file), f"seed {p.facts['seed']} · {p.title}") for p in pictures), *shelf][:KEPT]
                update |= {self.shelf: shelf, self.gallery: gr.Gallery(shelf, visible=True)}
            yield update

    @staticmethod
    def attention(picture: Picture, controls: Sequence[Any], canvas: Any) -> dict[str, Any]:
        """What the page shows of where a picture attended."""
        from .attention import overlay, ruling

        if isinstance(picture.maps, str):
            return {"note": f"The attention could not be recorded: {picture.maps}"}
        shown = [(str(box.get("name") or box["prompt"]), str(box.get("color"))) for box in canvas["boxes"]]
        return overlay(picture.image, picture.maps, ruling(controls), shown)

    def open_picture(self, path: str) -> tuple[Any, ...]:
        facts = picture_request(path)
        if facts.get("contact_sheet"):
            raise AttnCtrlError("that is a contact sheet\nHINT: one of its pictures")
        found = {name: facts.get(name) for name in SETTINGS}
        controls = {item["control"]: item for item in facts.get("controls", ())}
        if unknown := [name for name in controls if name not in self.forms]:
            raise AttnCtrlError(f"the picture has controls without a form here: {', '.join(unknown)}")
        self.studio.refuse(self.settings.request(list(found.values()), list(controls.values())))
        regional = controls.get(REGIONAL, {})
        width, height = found["width"], found["height"]
        canvas = {"ratio": width / height, "boxes": parts.boxes_from(regional.get("regions", ()))}
        fields = [
            field.show(controls[name].get(field.name))
            if name in controls
            else PRESETS.get((name, field.name), field.default)
            for name, form in self.forms.items()
            for field in sorted(form, key=lambda field: not field.needed)
        ]
        picked = [name for name in controls if name in self.groups]
        return (*self.settings.shown(found), canvas, picked, *fields, say(f"Opened {Path(path).name}"))
