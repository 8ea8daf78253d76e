"""Pictures of any format with their request: PNG as `..metadata` writes it, lossless WebP with the request in its EXIF data.

In WebP the JSON stands in the tag ImageDescription, and the line of AUTOMATIC1111's web interface in UserComment, where that program
looks for it.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ...errors import AttnCtrlError
from .. import metadata


FORMATS = ("png", "webp")
_DESCRIPTION, _EXIF, _COMMENT = 0x010E, 0x8769, 0x9286


def encode(image: Image.Image, ending: str, request: dict[str, Any]) -> bytes:
    """The bytes of a picture's file."""
    text, line = {"format_version": metadata.FORMAT_VERSION, **request}, metadata.parameters_line(request)
    buffer = io.BytesIO()
    if ending == "webp":
        exif = Image.Exif()
        exif[_DESCRIPTION] = json.dumps({"attnctrl": text})  # ASCII, as the tag wants it
        exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + line.encode("utf-16-be")
        image.save(buffer, format="WEBP", lossless=True, exif=exif)
    else:
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", line)
        chunks.add_itxt("attnctrl", json.dumps(text, ensure_ascii=False))
        image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_picture(image: Image.Image, path: Path, request: dict[str, Any]) -> Path:
    """Writes a picture in the format of its ending, whole or not at all. The folder is made if it is missing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(encode(image, path.suffix[1:], request))
        os.replace(temporary, path)
    except OSError as error:
        raise AttnCtrlError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_request(path: str | os.PathLike) -> dict[str, Any]:
    """The request that a picture was made from. Raises AttnCtrlError when the file is no picture or carries none."""
    try:
        with Image.open(path) as image:
            text = image.getexif().get(_DESCRIPTION) if image.format == "WEBP" else None
        found = json.loads(text)["attnctrl"] if text is not None else None
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        KeyError,
        TypeError,
        Image.DecompressionBombError,
    ):
        found = None
    if found is None:
        return metadata.read_request(path)
    version = found.get("format_version") if isinstance(found, dict) else None
    if not isinstance(version, int) or version > metadata.FORMAT_VERSION:
        raise AttnCtrlError(
            f"picture {os.fspath(path)!r} carries a request of format {version!r}; this attnctrl reads up to {metadata.FORMAT_VERSION}"
        )
    return found
