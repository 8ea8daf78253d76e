"""The page of `attnctrl demo`: its tabs, and the same as endpoints for `gradio_client` and MCP."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from . import parts
from .ask import Ask
from .batch import Batch
from .compose import Compose
from .drawing import Settings
from .forms import explained
from .heads import Heads
from .limits import admit
from .parts import DEVICE, OWN, in_page, say
from .studio import Studio


class Page:
    """The tabs of one page. What they share is the model, the settings and Stop."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="attnctrl", analytics_enabled=False, delete_cache=(600, 6 * 3600)) as blocks:
            self.title = gr.Markdown("# attnctrl", elem_id="title")
            if self.studio.may_choose:
                self._model_choice()
            settings = Settings(self.studio)
            with gr.Tabs():
                with gr.Tab("Compose"):
                    self.compose = Compose(self.studio, settings)
                with gr.Tab("Heads"):
                    self.heads = Heads(self.studio, settings, self.compose)
                with gr.Tab("Batch"):
                    batch = Batch(self.studio, settings)
                self.asking = None
                if self.studio.vlm_name is not None:
                    with gr.Tab("Ask"):
                        self.asking = Ask(self.studio)
            self._endpoints()
            tabs = [self.compose, self.heads, batch, *([self.asking] if self.asking else ())]
            working = [event for tab in tabs for event in tab.connect()]
            for tab in tabs:
                tab.stop.click(
                    self.halt, None, tab.status, cancels=working, queue=False, show_progress="hidden", **OWN
                )
            fitted = [self.title, self.compose.canvas, self.heads.grid]
            blocks.load(self.arrive, None, fitted, show_progress="hidden", **OWN)
            blocks.unload(self.leave)
            if self.studio.may_choose:
                self.model_load.click(in_page(self.choose), self.model_name, fitted, **OWN)
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

    def _endpoints(self) -> None:
        """The same work for `gradio_client` and MCP; hidden components give the arguments their types."""
        with gr.Column(visible=False):
            prompt, negative = gr.Textbox(label="prompt"), gr.Textbox("", label="negative_prompt")
            regions, controls = parts.listed("regions"), parts.listed("controls")
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
        found = {"model": model.job.model, "heads": list(model.layers), "controls": explained(self.compose.forms)}
        return found if self.asking is None else {**found, "ask": self.asking.describe()}
