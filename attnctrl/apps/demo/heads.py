"""The tab Heads of the page: the layers × heads grid with scores, a picture beside its twin, strips over strengths, head sets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import AttnCtrlError
from ...heads import PRESET, HeadSet
from . import parts
from .compose import Compose
from .drawing import Results, Settings, progress
from .limits import check_upload
from .parts import DEVICE, OWN, WAITING, in_page, say
from .progress import Stopped
from .scores import scores_of
from .studio import Picture, Studio


STRENGTHS = "0, 0.25, 0.5, 0.75, 1"


class Heads:
    """The components of the tab and what they do. Chosen heads can go to the tab Compose."""

    def __init__(self, studio: Studio, settings: Settings, compose: Compose):
        self.studio, self.settings, self.compose = studio, settings, compose
        with gr.Row():
            with gr.Column(min_width=300):
                presets = list(HeadSet.presets())
                self.preset = gr.Dropdown(
                    presets, value=None, label="Preset", visible=bool(presets), elem_id="head-preset"
                )
                self.grid = parts.head_grid()
                self.strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", elem_id="strength")
                self.scale = gr.Slider(-10, 20, 3, step=0.5, label="Scale", elem_id="scale")
                target = next(field for field in compose.forms["SoftPAG"] if field.name == "target")
                self.target = gr.Dropdown(
                    list(target.choices), value=target.default, label="Target", info=target.about
                )
                with gr.Row():
                    self.save = gr.DownloadButton("Save head set", size="sm", interactive=False, elem_id="save-heads")
                    self.load = gr.UploadButton(
                        "Load head set", file_types=[".json", ".txt", ".csv"], size="sm", elem_id="load-heads"
                    )
                    self.use = gr.Button("Use in Compose", size="sm")
            with gr.Column(min_width=300):
                self.made = Results("heads")
                with gr.Row(equal_height=True):
                    self.strengths = gr.Textbox(
                        STRENGTHS, label="Strengths of a strip", scale=3, max_length=100, elem_id="strengths"
                    )
                    self.strip = gr.Button("Draw strip", min_width=120, elem_id="draw-strip")
                self.strip_gallery = gr.Gallery(
                    label="Strip",
                    columns=5,
                    fit_columns=False,
                    height="auto",
                    interactive=False,
                    object_fit="contain",
                    elem_id="strip",
                )
        self.stop, self.status = self.made.stop, self.made.status

    def connect(self) -> list[Any]:
        """Connects the components; returns the events that Stop ends."""
        heads, settings = [self.grid, self.scale, self.target], self.settings.widgets
        pair = self.made.run.click(
            in_page(self.perturb, self.status),
            [*heads, self.strength, *settings],
            self.made.places,
            show_progress="hidden",
            **DEVICE,
            **OWN,
        )
        strip = self.strip.click(
            in_page(self.draw_strip, self.status),
            [*heads, self.strengths, *settings],
            [self.status, self.strip_gallery],
            show_progress="hidden",
            **DEVICE,
            **OWN,
        )
        self.grid.change(in_page(self.save_heads), self.grid, self.save, show_progress="hidden", **OWN)
        self.load.upload(in_page(self.load_heads), self.load, self.grid, **OWN)
        self.preset.input(in_page(self.take_preset), self.preset, self.grid, **OWN)
        picker, softpag = self.compose.picker, self.compose.widgets["SoftPAG"]
        self.use.click(
            in_page(self.use_heads),
            [*heads, self.strength, picker],
            [picker, *(softpag[name] for name in ("heads", "scale", "target", "strength")), self.status],
            **OWN,
        )
        return [pair, strip]

    def perturb(
        self, request: gr.Request, grid: Any, scale: float, target: str, strength: float, *settings: Any
    ) -> Iterator[dict]:
        asked = self.settings.request(settings, [self.softpag(grid, scale, target, strength)])
        self.studio.refuse(asked)
        for update, _ in self.made.watch(self.studio, asked, self.settings.request(settings, ()), request):
            yield update

    def draw_strip(
        self, request: gr.Request, grid: Any, scale: float, target: str, strengths: str, *settings: Any
    ) -> Iterator[dict]:
        try:
            numbers = [float(word) for word in strengths.split(",")]
        except ValueError:
            raise AttnCtrlError(f"strengths {strengths[:40]!r} are no numbers\nHINT: {STRENGTHS}") from None
        if len(numbers) > 12:
            raise AttnCtrlError(f"{len(numbers)} strengths are too many for a strip\nHINT: at most 12")
        tasks = [
            (f"strength {number:g}", self.settings.request(settings, [self.softpag(grid, scale, target, number)]))
            for number in numbers
        ]
        self.studio.refuse(tasks[-1][1])
        visitor = self.studio.visitor(request.session_hash)
        status, strip = self.status, []
        yield {status: say(WAITING), self.strip_gallery: []}
        try:
            for event in self.studio.draw(tasks, visitor.folder, visitor.begin()):
                if isinstance(event, Picture):
                    strip.append((str(event.file), event.title.removeprefix("strength ")))
                    yield {self.strip_gallery: list(strip)}
                else:
                    yield {status: progress(event, len(strip), len(tasks))}
        except Stopped:
            yield {status: say("Stopped")}
            return
        yield {status: say("Done")}

    def softpag(self, grid: Any, scale: float, target: str, strength: float) -> dict[str, Any]:
        heads = _chosen(grid)
        if not heads:
            raise AttnCtrlError("no head is chosen\nHINT: click some in the grid")
        return {"control": "SoftPAG", "heads": heads, "strength": strength, "scale": scale, "target": target}

    def save_heads(self, grid: Any, request: gr.Request) -> Any:
        heads = _chosen(grid)
        if not heads:
            return gr.DownloadButton(value=None, interactive=False)
        chosen = HeadSet(HeadSet.parse(heads).heads, base_model=self.studio.model.job.model)
        folder = tempfile.mkdtemp(dir=self.studio.visitor(request.session_hash).folder)
        chosen.save(Path(folder) / "head_set.json")
        return gr.DownloadButton(value=str(Path(folder) / "head_set.json"), interactive=True)

    def load_heads(self, path: str) -> dict[str, Any]:
        file = check_upload(path, (".json", ".txt", ".csv"))
        try:
            heads = HeadSet.parse(file)
        except AttnCtrlError as error:
            raise AttnCtrlError(str(error).replace(str(file), file.name)) from None
        return self.shown_heads(heads, file)

    def take_preset(self, name: str | None) -> dict[str, Any]:
        if name not in HeadSet.presets():
            raise AttnCtrlError(f"there is no head preset {str(name)[:40]!r}\nHINT: one of the list")
        return self.shown_heads(HeadSet.parse(PRESET + name))

    def shown_heads(self, heads: HeadSet, file: Path | None = None) -> dict[str, Any]:
        """The grid with a head set chosen, and with its scores. Raises AttnCtrlError for heads that the model does not have."""
        layers = self.studio.model.layers
        unknown = [
            f"{layer}.{head}"
            for layer, head, _ in heads.heads
            if not isinstance(layer, int) or not 0 <= layer < len(layers) or not 0 <= head < layers[layer]
        ]
        if unknown:
            raise AttnCtrlError(
                f"the model has no heads {', '.join(unknown[:8])}\nHINT: it has layers 0 to {len(layers) - 1}"
            )
        scores, about = scores_of(heads, layers, file)
        chosen = [list(head) for head in heads.heads]
        return {"layers": list(layers), "heads": chosen, "scores": scores, "about": about}

    def use_heads(self, grid: Any, scale: float, target: str, strength: float, names: list[str]) -> tuple[Any, ...]:
        control = self.softpag(grid, scale, target, strength)
        text = str(HeadSet.parse(control["heads"]))
        names = names if "SoftPAG" in names else [*names, "SoftPAG"]
        return names, text, scale, target, strength, say("SoftPAG in Compose has these heads")


def _chosen(grid: Any) -> list:
    """The heads of the grid's value. A text is not read: it could name a file."""
    heads = grid.get("heads") if isinstance(grid, dict) else None
    return heads if isinstance(heads, list) else []
