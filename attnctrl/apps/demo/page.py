"""The page of `attnctrl demo`: Compose, Heads, Batch and Ask, and the same as endpoints for `gradio_client` and MCP."""

from __future__ import annotations

import html
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import AttnCtrlError
from ...heads import PRESET, HeadSet
from ..batch.request import Request
from ..batch.rows import ENDINGS
from ..generate import EARLY
from . import parts
from .ask import Ask, explained
from .code import as_cli, as_python
from .files import draw_file, read_file
from .forms import Field, read_form, summary
from .forms import controls as control_forms
from .limits import STEPS, admit, check_upload, picture_request
from .parts import DEVICE, OWN, WAITING, in_page, say
from .scores import scores_of
from .studio import Picture, Step, Stopped, Studio


REGIONAL = "RegionalPrompts"
PRESETS = {(REGIONAL, "stop"): EARLY}
KEPT = 24  # pictures of a session's gallery
STRENGTHS = "0, 0.25, 0.5, 0.75, 1"
SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "width", "height")
SIDES = (Field("width", "whole", None), Field("height", "whole", None))


class Page:
    """The components of one page and what they do."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.forms = control_forms()
        self.widgets: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, gr.Accordion] = {}
        self.stops: list[tuple[gr.Button, gr.HTML]] = []

    # -- layout --------------------------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="attnctrl", analytics_enabled=False, delete_cache=(600, 6 * 3600)) as blocks:
            self.title = gr.Markdown("# attnctrl", elem_id="title")
            if self.studio.may_choose:
                self._model_choice()
            self._settings()
            with gr.Tabs():
                with gr.Tab("Compose"):
                    self._compose()
                with gr.Tab("Heads"):
                    self._heads()
                with gr.Tab("Batch"):
                    self._batch()
                self.asking = None
                if self.studio.vlm_name is not None:
                    with gr.Tab("Ask"):
                        self.asking = Ask(self.studio)
            self._endpoints()
            self._connect(blocks)
        return blocks.queue(max_size=64, default_concurrency_limit=1)

    def _model_choice(self) -> None:
        with gr.Row(equal_height=True):
            self.model_name = gr.Textbox(
                self.studio.model.job.model,
                label="Model",
                info="A built-in model or a hub id; for every visitor",
                scale=4,
            )
            self.model_load = gr.Button("Load", scale=1, min_width=100)

    def _settings(self) -> None:
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
        self.settings = [prompt, negative, seed, steps, guidance, width, height]

    def _form(self, name: str) -> None:
        presets = {field: value for (control, field), value in PRESETS.items() if control == name}
        self.widgets[name] = parts.form(self.forms[name], presets)

    def _results(self, tab: str) -> dict[str, Any]:
        """Status, buttons and the places of pictures."""
        made: dict[str, Any] = {}
        with gr.Row():
            made["run"] = gr.Button("Draw", variant="primary", min_width=120, elem_id=f"{tab}-draw")
            made["stop"] = gr.Button("Stop", min_width=100, elem_id=f"{tab}-stop")
        made["status"] = parts.status(elem_id=f"{tab}-status")
        made["picture"] = gr.Image(
            label="Picture",
            interactive=False,
            height=420,
            format="webp",
            buttons=["download", "fullscreen"],
            elem_id=f"{tab}-picture",
        )
        made["slider"] = gr.ImageSlider(
            label="Without control | with control",
            interactive=False,
            visible=False,
            max_height=560,
            elem_id=f"{tab}-slider",
        )
        self.stops.append((made["stop"], made["status"]))
        return made

    def _compose(self) -> None:
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
                        gr.Markdown(summary(_kind(name)))
                        self._form(name)
                    self.groups[name] = group
            with gr.Column(min_width=300):
                self.made = self._results("compose")
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

    def _heads(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                presets = list(HeadSet.presets())
                self.preset = gr.Dropdown(
                    presets, value=None, label="Preset", visible=bool(presets), elem_id="head-preset"
                )
                self.grid = parts.head_grid()
                self.strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", elem_id="strength")
                self.scale = gr.Slider(-10, 20, 3, step=0.5, label="Scale", elem_id="scale")
                target = next(field for field in self.forms["SoftPAG"] if field.name == "target")
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
                self.head_made = self._results("heads")
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

    def _batch(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("One request a row; what a row leaves out is taken from Settings.")
                self.file = gr.File(label="Requests", file_types=list(ENDINGS), height=140, elem_id="requests")
                self.problems = gr.Textbox(
                    label="Checked", lines=4, max_lines=16, interactive=False, elem_id="problems"
                )
            with gr.Column(min_width=300):
                with gr.Row():
                    self.batch_run = gr.Button("Draw all", variant="primary", min_width=120, elem_id="draw-all")
                    batch_stop = gr.Button("Stop", min_width=100)
                self.batch_status = parts.status(elem_id="batch-status")
                self.archive = gr.DownloadButton("Download results", interactive=False, elem_id="archive")
                self.batch_gallery = gr.Gallery(
                    label="Pictures",
                    columns=4,
                    fit_columns=False,
                    height="auto",
                    interactive=False,
                    object_fit="contain",
                    elem_id="batch-gallery",
                )
        self.stops.append((batch_stop, self.batch_status))

    # -- events --------------------------------------------------------------------------------------------------------------

    def _connect(self, blocks: gr.Blocks) -> None:
        every = [widget for name in self.forms for widget in self.widgets[name].values()]
        size = self.settings[-2:]
        blocks.load(self.arrive, None, [self.title, self.canvas, self.grid], show_progress="hidden", **OWN)
        blocks.unload(self.leave)
        for side in size:
            side.blur(
                in_page(self.reshape), [self.canvas, *size], self.canvas, show_progress="hidden", queue=False, **OWN
            )
        parts.show_chosen(self.picker, self.groups)
        run = self.made["run"].click(
            in_page(self.compose, self.made["status"]),
            [self.shelf, self.canvas, self.compare, self.attend, self.picker, *self.settings, *every],
            [*self._places(self.made), self.attended, self.maps, self.cli, self.python, self.shelf, self.gallery],
            show_progress="hidden",
            **DEVICE,
            **OWN,
        )
        heads = [self.grid, self.scale, self.target]
        pair = self.head_made["run"].click(
            in_page(self.perturb, self.head_made["status"]),
            [*heads, self.strength, *self.settings],
            self._places(self.head_made),
            show_progress="hidden",
            **DEVICE,
            **OWN,
        )
        strip = self.strip.click(
            in_page(self.draw_strip, self.head_made["status"]),
            [*heads, self.strengths, *self.settings],
            [self.head_made["status"], self.strip_gallery],
            show_progress="hidden",
            **DEVICE,
            **OWN,
        )
        batch = self.batch_run.click(
            in_page(self.draw_batch, self.batch_status),
            [self.file, *self.settings],
            [self.batch_status, self.batch_gallery, self.archive],
            show_progress="hidden",
            concurrency_id="batch",
            concurrency_limit=1,
            **OWN,
        )
        working = [run, pair, strip, batch]
        if self.asking is not None:
            working.append(self.asking.connect())
            self.stops.append((self.asking.stop, self.asking.status))
        for button, place in self.stops:
            button.click(self.halt, None, place, cancels=working, queue=False, show_progress="hidden", **OWN)
        self.open.upload(
            in_page(self.open_picture),
            self.open,
            [*self.settings, self.canvas, self.picker, *every, self.made["status"]],
            **OWN,
        )
        self.grid.change(in_page(self.save_heads), self.grid, self.save, show_progress="hidden", queue=False, **OWN)
        self.load.upload(in_page(self.load_heads), self.load, self.grid, **OWN)
        self.preset.input(in_page(self.take_preset), self.preset, self.grid, **OWN)
        softpag = self.widgets["SoftPAG"]
        self.use.click(
            in_page(self.use_heads),
            [*heads, self.strength, self.picker],
            [
                self.picker,
                *(softpag[name] for name in ("heads", "scale", "target", "strength")),
                self.head_made["status"],
            ],
            **OWN,
        )
        self.file.change(in_page(self.check_file), [self.file, *self.settings], self.problems, **OWN)
        if self.studio.may_choose:
            self.model_load.click(in_page(self.choose), self.model_name, [self.title, self.canvas, self.grid], **OWN)

    @staticmethod
    def _places(made: dict[str, Any]) -> list[Any]:
        return [made["status"], made["picture"], made["slider"]]

    def arrive(self) -> tuple[Any, ...]:
        """The page as the model wants it."""
        try:
            model = self.studio.model
        except Exception as error:
            return (
                f"# attnctrl\nThe model cannot be loaded: {html.escape(str(error).splitlines()[0])}",
                gr.skip(),
                gr.skip(),
            )
        asked = f" · questions to {self.studio.vlm_name}" if self.studio.vlm_name else ""
        title = f"# attnctrl\n{html.escape(model.job.model)} · {len(model.layers)} layers{html.escape(asked)}"
        return (
            title,
            {**parts.EMPTY, "ratio": model.size[0] / model.size[1]},
            {"layers": list(model.layers), "heads": []},
        )

    def choose(self, name: str) -> tuple[Any, ...]:
        self.studio.choose(name)
        return self.arrive()

    def leave(self, request: gr.Request) -> None:
        self.studio.forget(request.session_hash)

    def halt(self, request: gr.Request) -> dict[str, Any]:
        self.studio.stop(request.session_hash)
        return say("Stopped")

    def reshape(self, value: Any, *texts: str) -> Any:
        sides = [side.read(text) or own for side, text, own in zip(SIDES, texts, self.studio.model.size)]
        return {**value, "ratio": max(0.25, min(4.0, sides[0] / sides[1]))}

    def request(self, settings: Sequence[Any], controls: Sequence[dict[str, Any]]) -> Request:
        """A request from the page's settings. Raises AttnCtrlError."""
        return admit({**self.given(settings), "controls": list(controls)})

    @staticmethod
    def given(settings: Sequence[Any]) -> dict[str, Any]:
        given = {
            **dict(zip(SETTINGS, settings)),
            **{side.name: side.read(text) for side, text in zip(SIDES, settings[-2:])},
        }
        return {name: value for name, value in given.items() if value not in (None, "")}

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
        asked = self.request(settings, controls)
        job, made = self.studio.job(asked), asked.make_controls()
        python = as_python(job, made, self.studio.model.made, self.studio.model.absent)
        yield {
            self.cli: as_cli(job, made),
            self.python: python,
            self.made["status"]: say(WAITING),
            self.attended: gr.Accordion(visible=False),
        }
        self.studio.refuse(asked)
        twin = self.request(settings, ()) if compare and controls else None
        for update, pictures in self.watch(self.made, asked, twin, request, attend):
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

    def perturb(
        self, request: gr.Request, grid: Any, scale: float, target: str, strength: float, *settings: Any
    ) -> Iterator[dict]:
        asked = self.request(settings, [self.softpag(grid, scale, target, strength)])
        self.studio.refuse(asked)
        for update, _ in self.watch(self.head_made, asked, self.request(settings, ()), request):
            yield update

    def watch(
        self, made: dict[str, Any], asked: Request, twin: Request | None, request: gr.Request, maps: bool = False
    ) -> Iterator[tuple[dict, list[Picture]]]:
        """Updates while a picture and its twin without control form; with the last one come the pictures."""
        visitor = self.studio.visitor(request.session_hash)
        stop = visitor.begin()
        tasks = [("with control" if asked.controls else "without control", asked)]
        tasks += [("without control", twin)] if twin else []
        pictures: list[Picture] = []
        status, picture, slider = self._places(made)
        yield (
            {
                status: say(WAITING),
                picture: gr.Image(visible=True),
                slider: gr.ImageSlider(visible=False),
            },
            [],
        )
        try:
            for event in self.studio.draw(tasks, visitor.folder, stop, previews=True, maps=maps):
                if isinstance(event, Picture):
                    pictures.append(event)
                    if event is pictures[0]:
                        yield {picture: str(event.file)}, []
                    continue
                update = {status: _progress(event, len(pictures), len(tasks))}
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
            (f"strength {number:g}", self.request(settings, [self.softpag(grid, scale, target, number)]))
            for number in numbers
        ]
        self.studio.refuse(tasks[-1][1])
        visitor = self.studio.visitor(request.session_hash)
        status, strip = self.head_made["status"], []
        yield {status: say(WAITING), self.strip_gallery: []}
        try:
            for event in self.studio.draw(tasks, visitor.folder, visitor.begin()):
                if isinstance(event, Picture):
                    strip.append((str(event.file), event.title.removeprefix("strength ")))
                    yield {self.strip_gallery: list(strip)}
                else:
                    yield {status: _progress(event, len(strip), len(tasks))}
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

    def open_picture(self, path: str) -> tuple[Any, ...]:
        facts = picture_request(path)
        if facts.get("contact_sheet"):
            raise AttnCtrlError("that is a contact sheet\nHINT: one of its pictures")
        found = {name: facts.get(name) for name in SETTINGS}
        controls = {item["control"]: item for item in facts.get("controls", ())}
        if unknown := [name for name in controls if name not in self.forms]:
            raise AttnCtrlError(f"the picture has controls without a form here: {', '.join(unknown)}")
        self.studio.refuse(self.request(list(found.values()), list(controls.values())))
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
        settings = ["" if value is None else value for value in list(found.values())[:-2]]
        settings += [
            str(found[side.name]) if found[side.name] != own else ""
            for side, own in zip(SIDES, self.studio.model.size)
        ]
        picked = [name for name in controls if name in self.groups]
        return (*settings, canvas, picked, *fields, say(f"Opened {Path(path).name}"))

    def defaults(self, settings: Sequence[Any]) -> dict[str, Any]:
        """What rows of a requests file leave out. The model's own size stays the model's."""
        return {name: value for name, value in self.given(settings).items() if name != "prompt"}

    def check_file(self, path: str | None, *settings: Any) -> str:
        if path is None:
            return ""
        entries, wrong = read_file(path, self.defaults(settings))
        if wrong:
            more = [f"… and {len(wrong) - 50} more"] * (len(wrong) > 50)
            return "\n".join([f"{len(wrong)} problems; nothing is drawn", *wrong[:50], *more])
        return f"{len(entries)} requests, {sum(entry.images for entry in entries)} pictures"

    def draw_batch(self, request: gr.Request, path: str | None, *settings: Any) -> Iterator[dict]:
        if path is None:
            raise AttnCtrlError("there is no file of requests\nHINT: drop one on the left")
        entries, wrong = read_file(path, self.defaults(settings))
        if wrong:
            raise AttnCtrlError(f"{len(wrong)} problems; nothing is drawn\nHINT: they are listed under Checked")
        visitor = self.studio.visitor(request.session_hash)
        total = sum(entry.images for entry in entries)
        archive = Path(tempfile.mkdtemp(dir=visitor.folder)) / "attnctrl-results.zip"
        shown, failed, end = [], 0, "Done"
        yield {
            self.batch_status: say(WAITING, 0, total),
            self.batch_gallery: [],
            self.archive: gr.DownloadButton(interactive=False),
        }
        try:
            for done, event in draw_file(self.studio, entries, visitor.folder, visitor.begin(), archive):
                if isinstance(event, Picture):
                    shown = [(str(event.file), event.title), *shown][:KEPT]
                    yield {self.batch_gallery: shown, self.batch_status: say(f"{done} of {total}", done, total)}
                elif isinstance(event, str):
                    failed += 1
                    gr.Warning(html.escape(event[:500], quote=False))
        except Stopped:
            end = "Stopped"
        said = f"{end}, {failed} failed" if failed else end
        yield {self.batch_status: say(said), self.archive: gr.DownloadButton(value=str(archive), interactive=True)}

    # -- endpoints -----------------------------------------------------------------------------------------------------------

    def _endpoints(self) -> None:
        """The same work for `gradio_client` and MCP; hidden components give the arguments their types."""
        with gr.Column(visible=False):
            prompt, negative = gr.Textbox(label="prompt"), gr.Textbox("", label="negative_prompt")
            regions = gr.JSON([], label="regions")
            controls = gr.JSON([], label="controls")
            seed = gr.Number(0, precision=0, label="seed")
            steps = gr.Number(24, precision=0, label="steps")
            guidance = gr.Number(4.0, label="guidance_scale")
            picture = gr.Image(type="filepath", format="png", label="picture")
            facts = gr.JSON(label="model")
            asked = [prompt, regions, controls, negative, seed, steps, guidance]
            gr.Button().click(in_page(self.generate), asked, picture, api_name="generate", **DEVICE)
            gr.Button().click(in_page(self.describe), None, facts, api_name="model")
            if self.asking is not None:
                self.asking.endpoint()

    def generate(
        self,
        prompt: str,
        regions: list,
        controls: list,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance_scale: float,
        request: gr.Request,
    ) -> str:
        """Draws one picture, with regions and any control. The PNG carries its whole request.

        Args:
            prompt: what to draw.
            regions: prompts of places, each "a red cat@0,0,0.5,1" (left, top, right, bottom) or {"prompt": …, "box": [0, 0, 0.5, 1]}.
            controls: more controls, each "SoftPAG(heads='3.5', scale=2.0)" or {"control": "SoftPAG", "heads": "3.5"}.
            negative_prompt: what to keep away from.
            seed: of the noise.
            steps: denoising steps.
            guidance_scale: classifier-free guidance; 1 is none.
        """
        values = {
            "prompt": prompt,
            "regions": regions,
            "controls": controls,
            "negative_prompt": negative_prompt or None,
            "seed": seed,
            "steps": steps,
            "guidance_scale": guidance_scale,
        }
        visitor = self.studio.visitor(request.session_hash)
        asked = admit({name: value for name, value in values.items() if value is not None})
        *_, picture = self.studio.draw([("api", asked)], visitor.folder, visitor.begin())
        return str(picture.file)

    def describe(self) -> dict[str, Any]:
        """The loaded model: its name, the heads of every layer, and the controls with their arguments; and what answers questions."""
        model = self.studio.model
        found = {"model": model.job.model, "heads": list(model.layers), "controls": explained(self.forms)}
        return found if self.asking is None else {**found, "ask": self.asking.describe()}


def _chosen(grid: Any) -> list:
    """The heads of the grid's value. A text is not read: it could name a file."""
    heads = grid.get("heads") if isinstance(grid, dict) else None
    return heads if isinstance(heads, list) else []


def _kind(name: str) -> type:
    from ..batch.schema import picture_controls

    return picture_controls()[name]


def _progress(step: Step, made: int, pictures: int) -> dict[str, Any]:
    text = f"{step.title}, step {step.done} of {step.total}" if step.done else f"{step.title}: starting"
    return say(text[:1].upper() + text[1:], made * step.total + step.done, pictures * step.total)
