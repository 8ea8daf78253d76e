"""What the tabs share: the settings of a picture, and the place where one forms beside its twin without control."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from ..batch.request import Request
from . import parts
from .forms import Field
from .limits import STEPS, admit
from .parts import OWN, WAITING, say
from .progress import Step, Stopped
from .studio import Picture, Studio


SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "width", "height")
SIDES = (Field("width", "whole", None), Field("height", "whole", None))
KEPT = 24  # pictures of a gallery


class Settings:
    """The prompt and the numbers that every tab draws with."""

    def __init__(self, studio: Studio):
        self.studio = studio
        prompt = gr.Textbox(
            "a red cat and a blue car", label="Prompt", lines=1, max_lines=4, max_length=20_000, elem_id="prompt"
        )
        with gr.Accordion("Settings", open=False):
            negative = gr.Textbox("", label="Negative prompt", max_length=20_000, elem_id="negative")
            with gr.Row():
                steps = gr.Slider(1, STEPS, 24, step=1, label="Steps", min_width=200, elem_id="steps")
                guidance = gr.Slider(0, 20, 4, step=0.5, label="Guidance", min_width=200, elem_id="guidance")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
                width, height = (
                    gr.Textbox(label=side, placeholder="the model's", max_length=5, min_width=120)
                    for side in ("Width", "Height")
                )
            dice = gr.Button("Random seed", size="sm")
        dice.click(lambda: random.randrange(2**31), None, seed, queue=False, **OWN)
        self.widgets = [prompt, negative, seed, steps, guidance, width, height]
        self.sides = [width, height]

    @staticmethod
    def given(values: Sequence[Any]) -> dict[str, Any]:
        """What the widgets hold, by name; empty ones are left out."""
        given = {
            **dict(zip(SETTINGS, values)),
            **{side.name: side.read(text) for side, text in zip(SIDES, values[-2:])},
        }
        return {name: value for name, value in given.items() if value not in (None, "")}

    def request(self, values: Sequence[Any], controls: Sequence[dict[str, Any]]) -> Request:
        """A request from what the widgets hold. Raises AttnCtrlError."""
        return admit({**self.given(values), "controls": list(controls)})

    def shown(self, found: Mapping[str, Any]) -> list[Any]:
        """What the widgets hold for a request. The model's own size is left to the model."""
        sides = [
            str(found[side.name]) if found[side.name] != own else ""
            for side, own in zip(SIDES, self.studio.model.size)
        ]
        return ["" if found[name] is None else found[name] for name in SETTINGS[:-2]] + sides

    def ratio(self, texts: Sequence[str]) -> float:
        """Width to height, as far as the canvas shows it."""
        width, height = (side.read(text) or own for side, text, own in zip(SIDES, texts, self.studio.model.size))
        return max(0.25, min(4.0, width / height))


class Results:
    """Buttons, status and the places of pictures."""

    def __init__(self, tab: str):
        with gr.Row():
            self.run = gr.Button("Draw", variant="primary", min_width=120, elem_id=f"{tab}-draw")
            self.stop = gr.Button("Stop", min_width=100, elem_id=f"{tab}-stop")
        self.status = parts.status(elem_id=f"{tab}-status")
        self.picture = gr.Image(
            label="Picture",
            interactive=False,
            height=420,
            format="webp",
            buttons=["download", "fullscreen"],
            elem_id=f"{tab}-picture",
        )
        self.slider = gr.ImageSlider(
            label="Without control | with control",
            interactive=False,
            visible=False,
            max_height=560,
            elem_id=f"{tab}-slider",
        )
        self.places = [self.status, self.picture, self.slider]

    def watch(
        self, studio: Studio, asked: Request, twin: Request | None, request: gr.Request, maps: bool = False
    ) -> Iterator[tuple[dict, list[Picture]]]:
        """Updates while a picture and its twin without control form; with the last one come the pictures."""
        visitor = studio.visitor(request.session_hash)
        stop = visitor.begin()
        tasks = [("with control" if asked.controls else "without control", asked)]
        tasks += [("without control", twin)] if twin else []
        pictures: list[Picture] = []
        status, picture, slider = self.places
        yield (
            {
                status: say(WAITING),
                picture: gr.Image(visible=True),
                slider: gr.ImageSlider(visible=False),
            },
            [],
        )
        try:
            for event in studio.draw(tasks, visitor.folder, stop, previews=True, maps=maps):
                if isinstance(event, Picture):
                    pictures.append(event)
                    if event is pictures[0]:
                        yield {picture: str(event.file)}, []
                    continue
                update = {status: progress(event, len(pictures), len(tasks))}
                if event.preview is not None and not pictures:
                    update[picture] = event.preview
                yield update, []
        except Stopped:
            yield {status: say("Stopped")}, pictures
            return
        update = {status: say("Done")}
        if twin:
            files = str(pictures[1].file), str(pictures[0].file)
            update |= {picture: gr.Image(visible=False), slider: gr.ImageSlider(files, visible=True)}
        yield update, pictures


def progress(step: Step, made: int, pictures: int) -> dict[str, Any]:
    text = f"{step.title}, step {step.done} of {step.total}" if step.done else f"{step.title}: starting"
    text += f". No preview: {step.note}" if step.note else ""
    return say(text[:1].upper() + text[1:], made * step.total + step.done, pictures * step.total)
