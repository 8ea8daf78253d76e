"""The tab Batch of the page: a file of requests, checked, drawn, and handed back as one archive."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import AttnCtrlError
from ..batch.rows import ENDINGS
from . import parts
from .drawing import KEPT, Settings
from .files import draw_file, read_file
from .parts import OWN, WAITING, in_page, say
from .progress import Stopped
from .studio import Picture, Studio


class Batch:
    """The components of the tab and what they do."""

    def __init__(self, studio: Studio, settings: Settings):
        self.studio, self.settings = studio, settings
        with gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("One request a row; what a row leaves out is taken from Settings.")
                self.file = gr.File(label="Requests", file_types=list(ENDINGS), height=140, elem_id="requests")
                self.problems = gr.Textbox(
                    label="Checked", lines=4, max_lines=16, interactive=False, elem_id="problems"
                )
            with gr.Column(min_width=300):
                with gr.Row():
                    self.run = gr.Button("Draw all", variant="primary", min_width=120, elem_id="draw-all")
                    self.stop = gr.Button("Stop", min_width=100)
                self.status = parts.status(elem_id="batch-status")
                self.archive = gr.DownloadButton("Download results", interactive=False, elem_id="archive")
                self.gallery = gr.Gallery(
                    label="Pictures",
                    columns=4,
                    fit_columns=False,
                    height="auto",
                    interactive=False,
                    object_fit="contain",
                    elem_id="batch-gallery",
                )

    def connect(self) -> list[Any]:
        """Connects the components; returns the events that Stop ends."""
        asked = [self.file, *self.settings.widgets]
        self.file.change(in_page(self.check_file), asked, self.problems, **OWN)
        run = self.run.click(
            in_page(self.draw_batch, self.status),
            asked,
            [self.status, self.gallery, self.archive],
            show_progress="hidden",
            concurrency_id="batch",
            concurrency_limit=1,
            **OWN,
        )
        return [run]

    def defaults(self, settings: Sequence[Any]) -> dict[str, Any]:
        """What rows of a requests file leave out. The model's own size stays the model's."""
        return {name: value for name, value in self.settings.given(settings).items() if name != "prompt"}

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
            self.status: say(WAITING, 0, total),
            self.gallery: [],
            self.archive: gr.DownloadButton(interactive=False),
        }
        try:
            for done, event in draw_file(self.studio, entries, visitor.folder, visitor.begin(), archive):
                if isinstance(event, Picture):
                    shown = [(str(event.file), event.title), *shown][:KEPT]
                    yield {self.gallery: shown, self.status: say(f"{done} of {total}", done, total)}
                elif isinstance(event, str):
                    failed += 1
                    gr.Warning(html.escape(event[:500], quote=False))
        except Stopped:
            end = "Stopped"
        said = f"{end}, {failed} failed" if failed else end
        yield {self.status: say(said), self.archive: gr.DownloadButton(value=str(archive), interactive=True)}
