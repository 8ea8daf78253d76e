"""Which heads, with which weight: `HeadSet`.

Text import of HeadHunter's `layer,head` lines follows "Where and How to Perturb" (2025, arXiv 2506.10978).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .errors import AttnCtrlError
from .sites import Site


FORMAT_VERSION = 1
_DOTTED = re.compile(r"[Ll]?(\d+)(?:\.|[Hh])(\d+)(?::([0-9.]+))?")
_PAIR = re.compile(r"\(?\s*(\d+)\s*,\s*(\d+)\s*\)?")


@dataclass(frozen=True)
class HeadSet:
    """Heads as (layer, head, weight). `layer` is a site's running number or its module path; `weight` multiplies the strength.

    `HeadSet.parse` reads ``"3.5"``, ``"L3H5"``, ``"3.5,4.2:0.7"``, pairs ``[(3, 5), (4, 2)]``, a head-set JSON file, or a text
    file with HeadHunter's ``layer,head`` lines.
    """

    heads: tuple[tuple[int | str, int, float], ...]
    family: str | None = None
    base_model: str | None = None
    revision: str | None = None
    objective: str | None = None
    provenance: dict = field(default_factory=dict, hash=False)

    def __len__(self) -> int:
        return len(self.heads)

    @classmethod
    def parse(cls, value: HeadSet | str | os.PathLike | Iterable | dict) -> HeadSet:
        """Reads any of the written forms. Raises AttnCtrlError that names the form it could not read."""
        if isinstance(value, HeadSet):
            return value
        if isinstance(value, dict):
            return cls._from_json(value, "the mapping")
        if isinstance(value, (str, os.PathLike)):
            return cls._from_text(os.fspath(value))
        return cls(_merge(_entry(item) for item in value))

    @classmethod
    def _from_text(cls, text: str) -> HeadSet:
        source = f"heads {text!r}"
        looks_like_file = "/" in text or "\\" in text or Path(text).suffix.lower() in (".json", ".txt", ".csv")
        if looks_like_file:
            path = Path(text)
            if not path.is_file():
                raise AttnCtrlError(f"head-set file {text!r} does not exist")
            try:
                text = path.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise AttnCtrlError(f"head-set file {str(path)!r} cannot be read: {error}") from None
            source = f"head-set file {str(path)!r}"
            if text.startswith(("{", "[")):
                try:
                    loaded = json.loads(text)
                except json.JSONDecodeError as error:
                    raise AttnCtrlError(f"{source} is not valid JSON: {error}") from None
                return cls._from_json(loaded, source) if isinstance(loaded, dict) else cls.parse(loaded)
        words = [word for word in re.split(r"[\s,;]+", text) if word]
        matches = [_DOTTED.fullmatch(word) for word in words]
        if words and all(matches):
            return cls(_merge((int(m[1]), int(m[2]), float(m[3]) if m[3] else 1.0) for m in matches if m))
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        pairs = [_PAIR.fullmatch(line) for line in lines if line]
        if pairs and all(pairs):
            return cls(_merge((int(m[1]), int(m[2]), 1.0) for m in pairs if m))
        raise AttnCtrlError(
            f"{source} cannot be read as heads\nHINT: '3.5' or 'L3H5' is head 5 of layer 3; several: '3.5,4.2'; weighted: '3.5:0.7'; "
            "or a file with JSON or with lines 'layer,head'"
        )

    @classmethod
    def _from_json(cls, data: dict, source: str) -> HeadSet:
        version = data.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise AttnCtrlError(f"{source} has format_version {version!r}; this attnctrl reads up to {FORMAT_VERSION}")
        if not isinstance(data.get("heads"), list):
            raise AttnCtrlError(f"{source} has no list 'heads' of [layer, head] or [layer, head, weight]")
        known = {name: data.get(name) for name in ("family", "base_model", "revision", "objective")}
        return cls(_merge(_entry(item) for item in data["heads"]), **known, provenance=data.get("provenance") or {})

    def save(self, path: str | os.PathLike) -> None:
        """Writes the head set as JSON (atomic)."""
        from . import __version__

        record = {"format_version": FORMAT_VERSION, "attnctrl_version": __version__, **asdict(self)}
        temporary = Path(os.fspath(path) + ".tmp")
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def resolve(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Weights per site path, (H,) float32. Raises with what exists when a layer or a head does not."""
        by_layer = {site.layer: site for site in sites if site.primary}
        by_path = {site.path: site for site in sites}
        out: dict[str, torch.Tensor] = {}
        wrong = []
        for layer, head, weight in self.heads:
            site = by_layer.get(layer) if isinstance(layer, int) else by_path.get(layer)
            if site is None:
                wrong.append(f"layer {layer!r} does not exist")
            elif not 0 <= head < site.heads:
                wrong.append(f"head {head} of layer {layer} does not exist: it has heads 0 to {site.heads - 1}")
            else:
                out.setdefault(site.path, torch.zeros(site.heads))[head] = weight
        if wrong:
            layers = sorted(by_layer)
            second = [site.path for site in sites if not site.primary]
            exists = (
                f"the model has layers {layers[0]} to {layers[-1]} with {by_layer[layers[0]].heads} heads"
                if layers
                else "no layers"
            )
            if second:
                exists += f", and by path {second[0]} … {second[-1]}"
            raise AttnCtrlError("; ".join(wrong) + f"\nHINT: {exists}")
        return out

    def __str__(self) -> str:
        return ",".join(
            f"{layer}.{head}" + ("" if weight == 1 else f":{weight:g}") for layer, head, weight in self.heads
        )


def _entry(item) -> tuple[int | str, int, float]:
    if isinstance(item, str):
        match = _DOTTED.fullmatch(item.strip())
        if match:
            return int(match[1]), int(match[2]), float(match[3]) if match[3] else 1.0
    elif isinstance(item, Sequence) and len(item) in (2, 3):
        layer, head = item[0], item[1]
        weight = item[2] if len(item) == 3 else 1.0
        numeric = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if isinstance(layer, (int, str)) and isinstance(head, int) and not isinstance(head, bool) and numeric:
            return layer, head, float(weight)
    raise AttnCtrlError(f"{item!r} is not a head\nHINT: (layer, head), (layer, head, weight), '3.5' or 'L3H5'")


def _merge(entries: Iterable[tuple[int | str, int, float]]) -> tuple[tuple[int | str, int, float], ...]:
    table = {(layer, head): weight for layer, head, weight in entries}
    if not table:
        raise AttnCtrlError(
            "an empty head set selects nothing\nHINT: leave `heads` out to select every head of `layers`"
        )
    return tuple((layer, head, weight) for (layer, head), weight in table.items())
