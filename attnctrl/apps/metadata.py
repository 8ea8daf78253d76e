"""What a picture remembers of its making, in two PNG text chunks: one writer, one reader.

``attnctrl`` holds the request as JSON, with everything that is needed to make the picture again. ``parameters`` holds the same
for people and for tools that read the line of AUTOMATIC1111's web interface.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..errors import AttnCtrlError
from ..requests import mask_from_text as mask_from_text
from ..requests import mask_to_text as mask_to_text


FORMAT_VERSION = 1
_WORDS = {
    "steps": "Steps",
    "scheduler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
}


def parameters_line(request: dict[str, Any]) -> str:
    """The request as AUTOMATIC1111 writes it: prompt, negative prompt, then ``Steps: 24, Sampler: …`` on one line."""
    lines = [request.get("prompt", "")]
    if request.get("negative_prompt"):
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    width, height = request.get("width"), request.get("height")
    values = {**request, "size": f"{width}x{height}" if width and height else None}
    facts = [f"{word}: {_quoted(values[name])}" for name, word in _WORDS.items() if values.get(name) is not None]
    facts += [f"{control['control']}: {_quoted(_summary(control))}" for control in request.get("controls", ())]
    if version := request.get("versions", {}).get("attnctrl"):
        facts.append(f"Version: attnctrl {version}")
    return "\n".join([*lines, ", ".join(facts)])


def save_image(image: Image.Image, path: str | os.PathLike, request: dict[str, Any]) -> Path:
    """Writes a PNG with its request, whole or not at all. The folder is made if it is missing."""
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", parameters_line(request))
    # iTXt is UTF-8; not compressed, because readers refuse texts that inflate beyond a megabyte (masks are in here)
    chunks.add_itxt("attnctrl", json.dumps({"format_version": FORMAT_VERSION, **request}, ensure_ascii=False))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, format="PNG", pnginfo=chunks)
        os.replace(temporary, path)
    except OSError as error:
        raise AttnCtrlError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_request(path: str | os.PathLike) -> dict[str, Any]:
    """The request that a picture was made from. Raises AttnCtrlError when the file is no picture or carries none."""
    name = repr(os.fspath(path))
    try:
        with Image.open(path) as image:
            image.load()  # text may also stand behind the pixels
            text = getattr(image, "text", {}).get("attnctrl")
    except FileNotFoundError:
        raise AttnCtrlError(f"picture {name} does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AttnCtrlError(f"{name} cannot be read as a picture: {error}") from None
    if text is None:
        raise AttnCtrlError(
            f"picture {name} carries no attnctrl request\nHINT: PNG files of `attnctrl generate` do; editors often drop it"
        )
    try:
        request = json.loads(text)
    except json.JSONDecodeError as error:
        raise AttnCtrlError(f"picture {name} carries a request that is not valid JSON: {error}") from None
    version = request.get("format_version") if isinstance(request, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise AttnCtrlError(
            f"picture {name} carries a request of format {version!r}; this attnctrl reads up to {FORMAT_VERSION}"
        )
    return request


def places_text(places: Any, between: str = "; ") -> str:
    """Regions as requests hold them, or lists of them, in short: ``a cat@0,0,0.5,1; a dog@mask.png``."""
    if isinstance(places, dict):
        where = ",".join(f"{side:g}" for side in places["box"]) if places.get("box") else places.get("mask")
        return f"{places['prompt']}@{where}"
    return between.join(places_text(item, " + ") for item in places)


def _quoted(value: Any) -> str:
    """Values with separators are written as JSON strings, as AUTOMATIC1111 does."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _summary(control: dict[str, Any]) -> str:
    """A control's arguments in short: masks by name, heads as they are written on the command line."""
    parts = []
    for name, value in control.items():
        if name == "control" or value is None:
            continue
        if name in ("regions", "subjects"):
            value = places_text(value)
        elif name == "heads" and isinstance(value, list):
            value = " ".join(
                f"{layer}.{head}" + ("" if weight == 1 else f":{weight:g}") for layer, head, weight in value
            )
        parts.append(f"{name}={value}")
    return ", ".join(parts)
