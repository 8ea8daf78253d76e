"""Writes a folder that runs as a Hugging Face Space, with nothing but what `requirements.txt` installs: `make space`, or
`python apps/space/write.py FOLDER`."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ASSETS = ("icons-t2i", "models/icons-vlm", "heads")  # what the page runs
OURS = {"README.md", "app.py", "requirements.txt", ".gitattributes", "LICENSE", "NOTICE", "attnctrl"}
LFS = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def write(folder: Path) -> None:
    """Writes the folder, or what changed of one that was written before. Ends the program where it holds other things."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := sorted(there - OURS - {".git", "__pycache__"}):
        sys.exit(f"{folder} holds other things: {', '.join(others[:5])}\nHINT: a new folder, or the clone of a Space")
    pins = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = sorted(map(name_of, project["dependencies"] + project["optional-dependencies"]["demo"]))
    if unknown := [name for name in needed if name not in pins]:
        sys.exit(f"constraints.txt pins no version of {', '.join(unknown)}")
    shutil.rmtree(folder / "attnctrl", ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "attnctrl", folder / "attnctrl", ignore=unwanted)
    for name in ASSETS:
        if (ROOT / "assets" / name).is_dir():
            shutil.copytree(ROOT / "assets" / name, folder / "attnctrl" / "assets" / name)
    for path in (HERE / "app.py", ROOT / "LICENSE", ROOT / "NOTICE"):
        shutil.copy(path, folder)
    card = (HERE / "README.md").read_text(encoding="utf-8")
    card = re.sub(r"(?m)^sdk_version: .*$", f"sdk_version: {pins['gradio']}", card)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{name}=={pins[name]}\n" for name in needed), encoding="utf-8")
    (folder / ".gitattributes").write_text(LFS, encoding="utf-8")


def name_of(requirement: str) -> str:
    """Of a package, as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def pinned(constraints: str) -> dict[str, str]:
    """Versions by name."""
    lines = (line.partition("==") for line in constraints.splitlines() if "==" in line)
    return {name_of(name): version.strip() for name, _, version in lines}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python apps/space/write.py FOLDER")
    write(Path(sys.argv[1]))
