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


def builtin_scorers() -> dict[str, Path]:
    """The shipped open_clip models that are there, by name."""
    found: dict[str, Path] = {}
    for folder in asset_folders():
        for path in sorted((folder / "open_clip").glob("*/open_clip_config.json")):
            found.setdefault(path.parent.name, path.parent)
    return found


def builtin_path(name: str) -> Path:
    """Folder of a shipped model, pipeline or open_clip. Raises with the names that exist."""
    models = builtin_models() | builtin_scorers()
    if name not in models:
        known = ", ".join(PREFIX + other for other in models) or "none in this installation"
        raise AttnCtrlError(f"there is no built-in model {name!r}\nHINT: built-in models: {known}")
    return models[name]


def resolve_model(model: str | os.PathLike) -> str:
    """What `from_pretrained` takes: a built-in model's folder, a local folder that holds a pipeline, or a hub id as it is."""
    text = os.fspath(model).strip()
    if text.startswith(PREFIX):
        folder = builtin_path(text.removeprefix(PREFIX))
        if not (folder / "model_index.json").is_file():
            raise AttnCtrlError(
                f"{text!r} is an open_clip model that scores pictures, not a pipeline\n"
                f"HINT: built-in pipelines: {', '.join(PREFIX + name for name in builtin_models()) or 'none in this installation'}"
            )
        return str(folder)
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


def resolve_open_clip(model: str | os.PathLike) -> str:
    """What open_clip's `create_model_and_transforms` and `get_tokenizer` take: ``local-dir:FOLDER`` for a built-in model or a folder
    with an open_clip_config.json, any other name as it is."""
    text = os.fspath(model).strip()
    if text.startswith(PREFIX):
        folder, known = builtin_path(text.removeprefix(PREFIX)), builtin_scorers()
        if folder not in known.values():
            names = ", ".join(PREFIX + name for name in known) or "none in this installation"
            raise AttnCtrlError(
                f"{text!r} is a pipeline, not an open_clip model\nHINT: built-in open_clip models: {names}"
            )
        return f"local-dir:{folder}"
    path = Path(text).expanduser()
    return f"local-dir:{path}" if text and (path / "open_clip_config.json").is_file() else text
