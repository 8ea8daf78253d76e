"""Starts the server of `attnctrl demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..._quiet import quiet_imports
from ...errors import AttnCtrlError
from ...icons.models import PREFIX, builtin_vlms
from ..generate import Job


VLM = "icons-vlm"


def pick_vlm(asked: str | None) -> str | None:
    """What answers questions: the shipped model, where it is there, unless another one is asked for; None for "none"."""
    if asked is None:
        return PREFIX + VLM if VLM in builtin_vlms() else None
    return None if asked == "none" else asked


def serve(
    job: Job,
    host: str = "127.0.0.1",
    port: int | None = None,
    may_choose: bool = False,
    mcp: bool = False,
    browser: bool = False,
    wait: bool = True,
    vlm: str | None = None,
):
    """Serves the page until it is interrupted; without `wait` returns (the running blocks, their studio) at once.

    Args:
        job: model, device and the like; what it draws is not used.
        port: None takes the first free one from 7860 on.
        may_choose: visitors may load other models.
        mcp: endpoints are tools of the Model Context Protocol as well.
        vlm: a vision-language model, built in, a hub id or a folder, for the tab Ask; None for no such tab.
    """
    if importlib.util.find_spec("gradio") is None:
        raise AttnCtrlError("the demo needs gradio, which is not installed\nHINT: pip install 'attnctrl[demo]'")
    if mcp and importlib.util.find_spec("mcp") is None:
        raise AttnCtrlError("--mcp needs the package mcp, which is not installed\nHINT: pip install 'mcp<2'")
    with quiet_imports():
        import gradio as gr

        from .limits import UPLOAD, guard_pillow
        from .page import Page
        from .studio import Studio

    guard_pillow()
    studio = Studio(job, may_choose, vlm)
    try:
        blocks = Page(studio).build()
        blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            inbrowser=browser,
            share=False,
            show_error=True,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=mcp,
            max_file_size=UPLOAD,
            footer_links=["api", "settings"],
            theme=gr.themes.Default(
                primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
            quiet=True,
        )
        if mcp and getattr(blocks, "mcp_error", None):  # gradio keeps it to itself
            blocks.close()
            raise AttnCtrlError(f"--mcp: {blocks.mcp_error}\nHINT: pip install 'mcp<2'")
        print(f"attnctrl demo: {blocks.local_url}", flush=True)
        if not wait:
            return blocks, studio
        _ = studio.model, vlm and studio.vlm  # raises what went wrong while they were loaded
        blocks.block_thread()
    except OSError as error:
        studio.close()
        raise AttnCtrlError(f"the demo cannot be served at {host}:{port}: {error}\nHINT: another --port") from None
    except BaseException:
        studio.close()
        raise
    studio.close()
