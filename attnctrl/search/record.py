"""What a head search has measured: scores of single pictures, in memory and, given a folder, on disk as they come.

`hunt.json` holds the settings that decide a score and their fingerprint, `scores.jsonl` one line per picture. A search that was
killed reads both and goes on behind its last picture.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import AttnCtrlError


Key = tuple[int, tuple[int | str, int] | None, int]
"""(round, (layer, head) on top of the heads chosen before, or None for those alone, number of the prompt-seed pair)."""


class Record:
    """Scores by `Key`, and how often the denoiser ran."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]):
        self.scores: dict[Key, float] = {}
        self.calls: Counter = Counter()
        self._file = None
        if folder is None:
            return
        path, lines = folder / "hunt.json", folder / "scores.jsonl"
        settings = json.loads(json.dumps(settings))
        if path.exists():
            self._compare(path, settings)
        elif lines.exists():
            raise AttnCtrlError(f"{str(lines)!r} has scores whose settings are lost\nHINT: another output folder")
        folder.mkdir(parents=True, exist_ok=True)
        if lines.exists():
            self._read(lines)
        write_atomic(path, json.dumps({"fingerprint": fingerprint(settings), "settings": settings}, indent=2) + "\n")
        self._file = lines.open("ab")

    def _compare(self, path: Path, settings: dict[str, Any]) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError) as error:
            raise AttnCtrlError(f"{str(path)!r} cannot be read: {error}\nHINT: another output folder") from error
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if names:
            told = "; ".join(
                f"{name} {_brief(before.get(name))} there, {_brief(settings.get(name))} now" for name in names
            )
            raise AttnCtrlError(
                f"{str(path.parent)!r} holds a search with other settings: {told}\nHINT: another output folder, or the same settings"
            )

    def _read(self, path: Path) -> None:
        """Takes in every whole line and cuts a torn last one off."""
        good = 0
        content = path.read_bytes()
        for line in content.splitlines(keepends=True):
            try:
                item = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                item = None
            if item is None:
                break
            if "calls" in item:
                self.calls.update(item["calls"])
            else:
                head = tuple(item["head"]) if item["head"] is not None else None
                self.scores[item["round"], head, item["pair"]] = item["score"]
            good += len(line)
        if b"\n" in content[good:]:
            raise AttnCtrlError(
                f"{str(path)!r} is damaged at byte {good}\nHINT: cut the file there, or another output folder"
            )
        if good < len(content):
            os.truncate(path, good)

    def add(self, scores: Mapping[Key, float], calls: Mapping[str, int]) -> None:
        """Keeps the scores of one batch; they are on disk when this returns."""
        self.scores.update(scores)
        self.calls.update(calls)
        if self._file is not None:
            lines = [
                {"round": number, "head": head, "pair": pair, "score": score}
                for (number, head, pair), score in scores.items()
            ]
            self._file.write("".join(json.dumps(line) + "\n" for line in [*lines, {"calls": dict(calls)}]).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def as_json(value: Any) -> Any:
    """Settings as JSON: tensors as a mark of their bytes, functions by name."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def mark_of_weights(model: torch.nn.Module) -> str:
    """A mark of the parameters, from 16 elements of each: another checkpoint, dtype or merged LoRA gets another one."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if not value.is_meta and value.numel():
            few = value.detach().reshape(-1)[:: max(1, value.numel() // 16)][:16]
            digest.update(few.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_atomic(path: Path, text: str) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
