"""What the measurements on the embedded model share: the pipeline, counted blocks, kept results, the machine's description."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """Counts what goes through the blocks of the denoiser: one number, of rows, per call of a block that is really run."""
    import torch

    from attnctrl.families import find_denoiser, find_family

    model, _ = find_denoiser(pipe)
    rows: list[int] = []

    def count(module, args, kwargs) -> None:
        rows.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape[0])

    hooks = [
        model.get_submodule(block.path).register_forward_pre_hook(count, with_kwargs=True)
        for block in find_family(model).blocks(model)
    ]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def kept(path: Path, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What `make` returns, as JSON; read from `path` if it was made with the same settings before, else made and written there."""
    from attnctrl.search.record import write_atomic

    settings = json.loads(json.dumps(settings))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["settings"] == settings:
            return before["result"]
    path.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(json.dumps(make()))
    write_atomic(path, json.dumps({"settings": settings, "result": result}) + "\n")
    return result


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
