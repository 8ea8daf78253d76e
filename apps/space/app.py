"""A Hugging Face Space with the demo on the built-in models."""

import os
import tempfile
from pathlib import Path

from attnctrl.apps.demo.serve import pick_vlm, serve
from attnctrl.apps.generate import Job


if __name__ == "__main__":
    job = Job(
        prompt="of the page", model=os.environ.get("MODEL", "builtin:icons-t2i"), output=Path(tempfile.gettempdir())
    )
    serve(
        job,
        host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)),
        vlm=pick_vlm(os.environ.get("VLM")),
    )
