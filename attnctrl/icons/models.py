"""Finds models by the names that users write: ``builtin:icons-t2i``, a folder, or a hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import AttnCtrlError
from ..fetch import MODELS as FETCHED
from ..fetch import fetched


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


def builtin_vlms() -> dict[str, Path]:
    """The shipped vision-language models that are there, by name: folders of transformers with their processor."""
    found: dict[str, Path] = {}
    for folder in asset_folders():
        for path in sorted((folder / "models").glob("*/config.json")):
            if (path.parent / "model.safetensors").is_file():
                found.setdefault(path.parent.name, path.parent)
    return found


def builtin_path(name: str) -> Path:
    """Folder of a shipped model: pipeline, open_clip or vision-language. Raises with the names that exist."""
    models = builtin_models() | builtin_scorers() | builtin_vlms()
    if name not in models:
        raise AttnCtrlError(f"there is no built-in model {name!r}\nHINT: built-in models: {_names(models)}")
    return models[name]


def resolve_model(model: str | os.PathLike) -> str:
    """What `from_pretrained` takes: a built-in model's folder, a local folder that holds a pipeline, or a hub id as it is."""
    text = os.fspath(model).strip()
    if text.startswith(PREFIX):
        folder = builtin_path(text.removeprefix(PREFIX))
        if not (folder / "model_index.json").is_file():
            raise AttnCtrlError(
                f"{text!r} is {_kind(folder)}, not a pipeline\nHINT: built-in pipelines: {_names(builtin_models())}"
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
            raise AttnCtrlError(
                f"{text!r} is {_kind(folder)}, not an open_clip model\nHINT: built-in open_clip models: {_names(known)}"
            )
        return f"local-dir:{folder}"
    path = Path(text).expanduser()
    return f"local-dir:{path}" if text and (path / "open_clip_config.json").is_file() else text


def resolve_vlm(model: str | os.PathLike) -> str:
    """What transformers' `from_pretrained` takes: a built-in model's folder, a local folder with a config.json, or a hub id as it is."""
    text = os.fspath(model).strip()
    known = builtin_vlms()
    hint = f"HINT: a built-in model ({_names([*known, *FETCHED])}), a hub id such as llava-hf/llava-1.5-7b-hf, or a folder written by save_pretrained"
    if not text:
        raise AttnCtrlError(f"a language model has to be named\n{hint}")
    if text.startswith(PREFIX):
        if text.removeprefix(PREFIX) in FETCHED:
            return str(fetched(text.removeprefix(PREFIX)))
        if text.removeprefix(PREFIX) not in known:
            raise AttnCtrlError(f"there is no built-in vision-language model {text!r}\n{hint}")
        return str(known[text.removeprefix(PREFIX)])
    path = Path(text).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        wrong = "is a file" if path.is_file() else "holds no model of transformers: it has no config.json"
        if (path / "model_index.json").is_file():
            wrong = "holds a diffusion pipeline, not a language model"
        raise AttnCtrlError(f"model {text!r} {wrong}\n{hint}")
    return str(path) if path.exists() else text


def _kind(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return "a pipeline"
    return (
        "a vision-language model" if (folder / "config.json").is_file() else "an open_clip model that scores pictures"
    )


def _names(models: Iterable[str]) -> str:
    return ", ".join(PREFIX + name for name in models) or "none in this installation"
