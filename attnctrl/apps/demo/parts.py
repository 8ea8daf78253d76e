"""The page's own parts: a canvas for boxes and masks, a grid of heads, maps over a picture, answers, a line that says what is
going on; each `gr.HTML` with a script beside this file. Their values are plain data that the scripts write with textContent, never as HTML."""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import AttnCtrlError
from ..sheet import PALETTE
from .forms import Field


HERE = Path(__file__).parent
WRITTEN = {"heads": "3.5, 4.2:0.7 (layer.head:weight)", "layers": "3, 2:6, every:2, mid or all"}
EMPTY = {"ratio": 1.0, "boxes": []}
WAITING = "Waiting for its turn"
DEVICE = {"concurrency_id": "device", "concurrency_limit": 1}
OWN = {"api_visibility": "private"}


def part(name: str, value: Any, **options: Any) -> gr.HTML:
    script, style = ((HERE / f"{name}.{ending}").read_text(encoding="utf-8") for ending in ("js", "css"))
    return gr.HTML(value, html_template="", css_template=style, js_on_load=script, apply_default_css=False, **options)


def canvas() -> gr.HTML:
    """Value: {"ratio": width / height, "boxes": [{"name", "prompt", "color", "box": [left, top, right, bottom]}]}, fractions; painted ones
    have "mask", a PNG in base64, instead of "box"."""
    return part("canvas", EMPTY, palette=list(PALETTE), elem_id="canvas")


def attention_maps() -> gr.HTML:
    """Value: what `attention.overlay` returns, or {"note": text} alone."""
    return part("attention", {}, elem_id="attention")


def answers() -> gr.HTML:
    """Value: what `answers.shown` returns."""
    return part("answers", {}, elem_id="answers")


def head_grid() -> gr.HTML:
    """Value: {"layers": [heads of layer 0, …], "heads": [[layer, head, weight], …], "scores": [[layer, head, score], …], "about": text}."""
    return part("heads", {"layers": [], "heads": []}, elem_id="heads")


def status(**options: Any) -> gr.HTML:
    """Value: what `say` returns."""
    return part("status", say(""), **options)


def say(text: str, done: int = 0, total: int = 0) -> dict[str, Any]:
    return {"text": text, "done": done, "total": total}


def listed(label: str) -> gr.JSON:
    """A list of texts and objects as an argument of an endpoint. gradio's own type of it is none that JSON Schema knows, so that MCP
    refuses every call."""
    made = gr.JSON([], label=label)
    entries = {"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": True}]}
    made.api_info = lambda: {"type": "array", "items": entries}
    return made


def in_page(function: Callable, status: gr.HTML | None = None) -> Callable:
    """Errors of a handler as messages of the page, one line and the hint; those of a generator stay in its `status` too."""

    def text_of(error: Exception) -> str:
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return name + str(error).replace("\nHINT: ", ". Hint: ")[:2000]

    def shown(error: Exception) -> gr.Error:
        return gr.Error(html.escape(text_of(error), quote=False), print_exception=not isinstance(error, AttnCtrlError))

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def handler(*values: Any) -> Iterator[Any]:
            try:
                yield from function(*values)
            except gr.Error:
                raise
            except Exception as error:
                yield {status: say(text_of(error))}
                raise shown(error) from None

    else:

        @functools.wraps(function)
        def handler(*values: Any) -> Any:
            try:
                return function(*values)
            except gr.Error:
                raise
            except Exception as error:
                raise shown(error) from None

    return handler


def boxes_of(value: Any) -> list[dict[str, Any]]:
    """The canvas's boxes and masks as regions of a request. Raises AttnCtrlError for one without a prompt."""
    boxes = value.get("boxes") if isinstance(value, dict) else None
    if not isinstance(boxes, list) or not all(isinstance(box, dict) for box in boxes):
        raise AttnCtrlError("the canvas holds no list of boxes\nHINT: reload the page")
    for number, box in enumerate(boxes, 1):
        if not str(box.get("prompt") or "").strip():
            kind = "Mask" if box.get("mask") else "Box"
            raise AttnCtrlError(
                f"{box.get('name') or f'{kind} {number}'} has no prompt\nHINT: say what it shows, or delete it"
            )
    return [{"prompt": str(box["prompt"]).strip(), **_place(box)} for box in boxes]


def _place(box: dict[str, Any]) -> dict[str, Any]:
    return {"mask_png": box["mask"]} if box.get("mask") else {"box": box.get("box")}


def boxes_from(regions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Regions of a request as boxes and masks of the canvas. Raises AttnCtrlError for what it cannot hold."""
    boxes = []
    for number, region in enumerate(regions):
        usual = {"strength": 1, "downsample": "area", "feather": 0}
        if other := [name for name, value in usual.items() if region.get(name, value) != value]:
            raise AttnCtrlError(
                f"the picture has a region with a {' and a '.join(other)} of its own, which the canvas cannot hold\n"
                "HINT: attnctrl generate --from PICTURE makes it again"
            )
        box = region.get("box")
        boxes.append(
            {
                "name": "",
                "prompt": region["prompt"],
                "color": PALETTE[number % len(PALETTE)],
                **({"mask": region.get("mask_png")} if box is None else {"box": list(box)}),
            }
        )
    return boxes


def form(fields: Sequence[Field], presets: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The widgets of a control's form by name, in two columns, required ones first. `presets`: other start values than the defaults."""
    widgets = {}
    with gr.Row():
        for field in sorted(fields, key=lambda field: not field.needed):
            with gr.Column(min_width=240):
                widgets[field.name] = widget(field, (presets or {}).get(field.name))
    return widgets


def show_chosen(picker: gr.Dropdown, groups: Mapping[str, gr.Accordion]) -> None:
    """Opens the forms of the controls that are picked, and no others."""
    picker.change(
        lambda names: [gr.Accordion(visible=name in names) for name in groups],
        picker,
        list(groups.values()),
        show_progress="hidden",
        queue=False,
        **OWN,
    )


def widget(field: Field, preset: Any = None) -> Any:
    """The component of a form's field. `preset`: another start value than the control's default."""
    value = field.default if preset is None else preset
    label = field.name.replace("_", " ").capitalize() + (" *" if field.needed else "")
    about = field.brief
    if field.kind == "switch":
        return gr.Checkbox(value, label=label, info=about)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=value, label=label, info=about)
    if field.kind == "fraction":
        return gr.Slider(0, 1, value, step=0.05, label=label, info=about)
    if field.kind in ("whole", "number") and isinstance(value, (int, float)):
        return gr.Number(value, precision=0 if field.kind == "whole" else None, label=label, info=about)
    written = WRITTEN.get(field.name)
    listed = ("7, 12" if field.choices else "the red car; 5:20") if field.kind == "list" else None
    return gr.Textbox(
        str(value or ""), label=label, info=None if written else about, placeholder=written or listed, max_length=2000
    )
