"""`attnctrl demo`: the toolkit in a browser."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, Backend, Device, Dtype, Lora, Model, Offload, Revision, Variant


def demo(
    model: Model = "builtin:icons-t2i",
    dtype: Dtype = None,
    device: Device = None,
    variant: Variant = None,
    revision: Revision = None,
    lora: Lora = None,
    attention_backend: Backend = None,
    cpu_offload: Offload = False,
    vlm: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The vision-language model of the tab Ask: a built-in one, a local folder or a hub id; none for no such tab.",
            show_default="builtin:icons-vlm",
            rich_help_panel=MODEL,
        ),
    ] = None,
    allow_model_choice: Annotated[
        bool, typer.Option("--allow-model-choice", help="Visitors may load other models.", rich_help_panel=MODEL)
    ] = False,
    host: Annotated[
        str, typer.Option(help="Who can reach it: 127.0.0.1 is this machine alone, 0.0.0.0 anybody.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(show_default="the first free one from 7860 on")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page.")] = False,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Serve the endpoints as tools of the Model Context Protocol too.")
    ] = False,
) -> None:
    """Open the toolkit in a browser: draw boxes, choose heads, run files of requests, ask about pictures. Needs the extra `demo`."""
    from ..demo.serve import pick_vlm, serve
    from ..generate import Job

    job = Job(
        prompt="of the page",
        model=model,
        dtype=dtype,
        device=device,
        variant=variant,
        revision=revision,
        lora=lora,
        attention_backend=attention_backend,
        cpu_offload=cpu_offload,
        output=Path(tempfile.gettempdir()),
    )
    serve(job, host, port, allow_model_choice, mcp, browser, vlm=pick_vlm(vlm))
