"""What the measurements on the embedded model share: the pipeline, the machine's description, interval cells."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Any


def load_pipeline(model: str, device: str, dtype: str) -> Any:
    """A saved or built-in `StableDiffusion3Pipeline` without progress bars."""
    from attnctrl._quiet import quiet_imports
    from attnctrl.icons.models import resolve_model

    with quiet_imports():
        import torch
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(resolve_model(model), torch_dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def notes(module: str, **facts: object) -> str:
    """The command, the settings and the machine, as a markdown list."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    lines = {"command": f"`python -m {module} {shlex.join(words)}`".replace(" `", "`"), **facts}
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers")
    )
    lines["machine"] = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {packages}"
    lines["date"] = datetime.date.today().isoformat()
    return "\n".join(f"- {key}: {value}" for key, value in lines.items())
