"""Which heads, with which weight: `HeadSet`; one set per image of a batch: `HeadBatch`.

Text import of HeadHunter's `layer,head` lines follows "Where and How to Perturb" (2025, arXiv 2506.10978).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import AttnCtrlError
from .sites import Site


FORMAT_VERSION = 1
FILE_NAME = "head_set.json"
PRESET = "preset:"
_DOTTED = re.compile(r"[Ll]?(\d+)(?:\.|[Hh])(\d+)(?::([0-9.]+))?")
_PAIR = re.compile(r"\(?\s*(\d+)\s*,\s*(\d+)\s*\)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARD = """---
library_name: attnctrl
tags:
- attnctrl
- attention-heads{base_model}
---

# Attention heads of {family}

{count} heads{objective}: `{heads}`

```python
import attnctrl as ac

heads = ac.HeadSet.from_pretrained("{where}")
with ac.attach(pipe, ac.SoftPAG(heads=heads)):
    image = pipe(prompt).images[0]
```
"""


@dataclass(frozen=True)
class HeadSet:
    """Heads as (layer, head, weight). `layer` is a site's running number or its module path; `weight` multiplies the strength.

    `HeadSet.parse` reads ``"3.5"``, ``"L3H5"``, ``"3.5,4.2:0.7"``, pairs ``[(3, 5), (4, 2)]``, a head-set JSON file, a text file
    with HeadHunter's ``layer,head`` lines, or ``"preset:NAME"``, one of `HeadSet.presets`.
    """

    heads: tuple[tuple[int | str, int, float], ...]
    family: str | None = None
    base_model: str | None = None
    revision: str | None = None
    objective: str | None = None
    provenance: dict = field(default_factory=dict, hash=False)

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def weights(self) -> list[float]:
        return [weight for *_, weight in self.heads]

    @classmethod
    def presets(cls) -> dict[str, str]:
        """The head sets that come with the package: name -> what it is for."""
        return {name: cls._from_file(path)._description() for name, path in sorted(_preset_files().items())}

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
        if text.startswith(PRESET):
            name, files = text.removeprefix(PRESET), _preset_files()
            if name not in files:
                known = ", ".join(PRESET + other for other in sorted(files)) or "none in this installation"
                raise AttnCtrlError(f"there is no head preset {name!r}\nHINT: head presets: {known}")
            return cls._from_file(files[name])
        looks_like_file = "/" in text or "\\" in text or Path(text).suffix.lower() in (".json", ".txt", ".csv")
        return cls._from_file(Path(text)) if looks_like_file else cls._from_words(text, f"heads {text!r}")

    @classmethod
    def _from_file(cls, path: Path) -> HeadSet:
        """A JSON file, a text file, or a folder with head_set.json."""
        if path.is_dir():
            if not (path / FILE_NAME).is_file():
                raise AttnCtrlError(
                    f"folder {str(path)!r} holds no {FILE_NAME}\nHINT: HeadSet.save_pretrained writes it"
                )
            path = path / FILE_NAME
        source = f"head-set file {str(path)!r}"
        if not path.is_file():
            hub = _HUB_ID.fullmatch(str(path)) and not path.suffix
            hint = f"\nHINT: HeadSet.from_pretrained({str(path)!r}) asks the hub" if hub else ""
            raise AttnCtrlError(f"{source} does not exist{hint}")
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AttnCtrlError(f"{source} cannot be read: {error}") from None
        if not text.startswith(("{", "[")):
            return cls._from_words(text, source)
        try:
            loaded = json.loads(text)
        except json.JSONDecodeError as error:
            raise AttnCtrlError(f"{source} is not valid JSON: {error}") from None
        return cls._from_json(loaded, source) if isinstance(loaded, dict) else cls.parse(loaded)

    @classmethod
    def _from_words(cls, text: str, source: str) -> HeadSet:
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

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Writes head_set.json to a folder, and a model card (README.md) if there is none; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / FILE_NAME)
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(self._card(folder.name), encoding="utf-8")
        return folder

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, *, revision: str | None = None, **download: Any) -> HeadSet:
        """Reads a head-set file, a folder with head_set.json, or a repository of the Hugging Face Hub.

        Args:
            source: a path, or a hub id "owner/name".
            revision: branch, tag or commit on the hub.
            download: more arguments of `huggingface_hub.hf_hub_download`: token, cache_dir, local_files_only, …
        """
        name = os.fspath(source)
        if Path(name).exists():
            return cls._from_file(Path(name))
        if not _HUB_ID.fullmatch(name):
            raise AttnCtrlError(f"head set {name!r} is no file or folder that exists, and no hub id 'owner/name'")
        from huggingface_hub import hf_hub_download

        with _one_line(f"head set {name!r} cannot be read from the hub"):
            return cls._from_file(Path(hf_hub_download(name, FILE_NAME, revision=revision, **download)))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Head set of attnctrl",
        create_pr: bool = False,
    ) -> str:
        """Uploads head_set.json and a model card to a repository of the hub, made if it is missing; returns the commit's address."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder, _one_line(f"head set cannot be pushed to {repo_id!r}"):
            self.save(Path(folder) / FILE_NAME)
            api = HfApi(token=token, library_name="attnctrl")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not api.file_exists(repo_id, "README.md", revision=revision):
                (Path(folder) / "README.md").write_text(self._card(repo_id), encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            ).commit_url

    def _description(self) -> str:
        """`provenance["description"]`, or what the fields tell."""
        model, goal = self.base_model or self.family or "a model", f" for {self.objective}" if self.objective else ""
        return self.provenance.get("description") or f"{len(self)} heads of {model}{goal}"

    def _card(self, where: str) -> str:
        base = self.base_model if self.base_model and _HUB_ID.fullmatch(self.base_model) else None
        return _CARD.format(
            base_model=f"\nbase_model: {base}" if base else "",
            family=self.base_model or self.family or "a model",
            count=len(self),
            objective=f", chosen for `{self.objective}`" if self.objective else "",
            heads=self,
            where=where,
        )

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


@dataclass(frozen=True)
class HeadBatch:
    """One head set per image of a batch, in order; None for an image without any. What `HeadSet.parse` reads may stand for a set."""

    sets: tuple[HeadSet | None, ...]

    def __post_init__(self) -> None:
        sets = tuple(None if item is None else HeadSet.parse(item) for item in self.sets)
        if not sets:
            raise AttnCtrlError(
                "a head batch without images\nHINT: HeadBatch(['3.5', '4.2', None]) is for three images"
            )
        families = sorted({item.family for item in sets if item is not None and item.family is not None})
        if len(families) > 1:
            raise AttnCtrlError(f"a head batch of several families: {', '.join(families)}")
        object.__setattr__(self, "sets", sets)

    def __len__(self) -> int:
        return len(self.sets)

    @property
    def weights(self) -> list[float]:
        """Of every head of every set."""
        return [weight for item in self.sets if item is not None for weight in item.weights]

    @property
    def family(self) -> str | None:
        return next((item.family for item in self.sets if item is not None and item.family is not None), None)

    def resolve(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Weights per site path, (B, H) float32, of every site that some image uses. Raises as `HeadSet.resolve`."""
        rows = [{} if item is None else item.resolve(sites) for item in self.sets]
        out: dict[str, torch.Tensor] = {}
        for site in sites:
            if any(site.path in row for row in rows):
                none = torch.zeros(site.heads)
                out[site.path] = torch.stack([row.get(site.path, none) for row in rows])
        return out

    def __str__(self) -> str:
        return " | ".join("none" if item is None else str(item) for item in self.sets)


def _preset_files() -> dict[str, Path]:
    """The shipped head sets by name: heads/NAME/head_set.json in a folder of assets."""
    from .icons import models

    found: dict[str, Path] = {}
    for folder in models.asset_folders():
        for path in (folder / "heads").glob(f"*/{FILE_NAME}"):
            found.setdefault(path.parent.name, path)
    return found


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """The many errors of the hub's client and of its transport as one of ours."""
    try:
        yield
    except AttnCtrlError:
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise AttnCtrlError(f"{what}: {message[:300]}\nHINT: the name, the network, or `hf auth login`") from error


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
