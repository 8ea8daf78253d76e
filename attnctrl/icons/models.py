"""Finds models by the names that users write: ``builtin:icons-t2i``, a folder, or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import AttnCtrlError


PREFIX = "builtin:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = Path(__file__).resolve().parents[1]


def asset_folders() -> tuple[Path, ...]:
    """Where shipped models may lie: in an installed wheel inside the package, in a checkout beside it."""
    return (_PACKAGE / "assets", _PACKAGE.parent / "assets")


def builtin_models() -> dict[str, Path]:
    """The shipped models that are there, by name."""
    found: dict[str, Path] = {}
    for folder in asset_folders():
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if (path / "model_index.json").is_file():
                    found.setdefault(path.name, path)
    return found


def builtin_path(name: str) -> Path:
    """Folder of a shipped model. Raises with the names that exist."""
    models = builtin_models()
    if name not in models:
        known = ", ".join(PREFIX + other for other in models) or "none in this installation"
        raise AttnCtrlError(f"there is no built-in model {name!r}\nHINT: built-in models: {known}")
    return models[name]


def resolve_model(model: str | os.PathLike) -> str:
    """What `from_pretrained` takes: a built-in model's folder, a local folder that holds a pipeline, or a hub id as it is."""
    text = os.fspath(model).strip()
    if text.startswith(PREFIX):
        return str(builtin_path(text.removeprefix(PREFIX)))
    path = Path(text).expanduser()
    if text and path.is_dir():
        if not (path / "model_index.json").is_file():
            raise AttnCtrlError(
                f"model folder {text!r} holds no pipeline: it has no model_index.json\nHINT: a folder written by pipeline.save_pretrained"
            )
        return str(path)
    if text and path.exists():
        raise AttnCtrlError(
            f"model {text!r} is a file, not a folder\nHINT: a folder written by pipeline.save_pretrained, or a hub id"
        )
    if not _HUB_ID.fullmatch(text):
        names = ", ".join(PREFIX + name for name in builtin_models())
        raise AttnCtrlError(
            f"model {text!r} is no folder that exists, and no hub id\nHINT: a folder, 'owner/name', or a built-in model"
            + (f": {names}" if names else "")
        )
    return text
