"""What the page may ask for: sizes, numbers, masks that are small, and nothing that names a file."""

from __future__ import annotations

import ast
import base64
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ...errors import AttnCtrlError
from ..batch.pictures import read_request
from ..batch.request import Request, check_values
from ..batch.schema import short


UPLOAD = 16 * 2**20  # bytes of a file
PIXELS = 4096 * 4096  # of an uploaded picture
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # endings of a picture to ask about
SIDE = 1536  # pixels of its longer side
QUESTION = 4000  # characters
TOKENS = 512  # of an answer
MASK = 2**20  # bytes of a painted mask
MASK_SIDE = 1024  # its pixels
DRAWN_PIXELS = 2048 * 2048  # of a picture that is made
STEPS = 150
REGIONS = 24
ROWS = 500  # rows and pictures of a requests file
_HEADS = re.compile(r"[\s\dLlHh.,:;]*")  # what `HeadSet.parse` takes for a file has a slash or an ending


def guard_pillow() -> None:
    """Pictures that would unpack to more than PIXELS are refused wherever Pillow opens one. For the whole process."""
    Image.MAX_IMAGE_PIXELS = PIXELS // 2  # Pillow raises at twice the limit


def admit(values: dict[str, Any]) -> Request:
    """A request from the page. Raises AttnCtrlError with everything that is wrong with it."""
    wrong = list(unsafe_parts(values))
    request = None
    if not wrong:
        request, wrong = check_values({"id": "picture", **values})
    wrong = wrong or list(too_much(request))
    if wrong:
        raise AttnCtrlError("; ".join(_by_name(reason, values) for reason in wrong))
    return request


def unsafe_parts(values: dict[str, Any]) -> Iterator[str]:
    """Parts of a request that would make the server open a file, or unpack a picture that is no small mask."""
    yield from _unsafe_parts(values)
    controls = values.get("controls")
    for item in controls if isinstance(controls, list) else ():
        item = _arguments(item) if isinstance(item, str) else item
        if isinstance(item, dict):
            yield from _unsafe_parts(item)


def _unsafe_parts(values: dict[str, Any]) -> Iterator[str]:
    heads, regions = values.get("heads"), values.get("regions")
    if isinstance(heads, dict) or (isinstance(heads, str) and not _HEADS.fullmatch(heads)):
        yield f"heads {short(heads)} are not written as 3.5,4.2; files are not read here"
    if any(_texts(values.get("subjects"))):
        yield "subjects are not written as boxes; files are not read here"
    for region in regions if isinstance(regions, (list, tuple)) else [regions] if isinstance(regions, str) else ():
        if isinstance(region, str) and not _is_box(region.rpartition("@")[2]):
            yield f"region {short(region)} has no box of four numbers; files are not read here"
        elif isinstance(region, dict) and region.get("mask") is not None and region.get("mask_png") is None:
            yield f"region {short(region.get('prompt'))} names a mask file; mask_png holds a mask itself"
        elif isinstance(region, dict) and region.get("mask_png") is not None and not _is_mask(region["mask_png"]):
            yield (
                f"region {short(region.get('prompt'))} has a mask_png that is no PNG of at most {MASK_SIDE} x {MASK_SIDE} "
                f"pixels and {MASK} bytes in base64"
            )


def _is_mask(text: Any) -> bool:
    """Whether a text is base64 of a small PNG, by its first bytes; nothing is unpacked."""
    if not isinstance(text, str) or len(text) > MASK * 4 // 3:
        return False
    try:
        data = base64.b64decode(text[:64], validate=True)
    except ValueError:
        return False
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return False
    return max(struct.unpack(">II", data[16:24])) <= MASK_SIDE


def _texts(value: Any) -> Iterator[str]:
    """Every text in lists and objects of any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _is_box(text: str) -> bool:
    try:
        return len([float(side) for side in text.split(",")]) == 4
    except ValueError:
        return False


def _arguments(text: str) -> dict[str, Any]:
    """What of a control written as Python may name files; what is not read here, `parse_control` refuses as well."""
    found = {}
    try:
        keywords = getattr(ast.parse(text.strip(), mode="eval").body, "keywords", ())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return found
    for item in keywords:
        if item.arg in ("heads", "regions", "subjects"):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError):
                found[item.arg] = ast.literal_eval(item.value)
    return found


def too_much(request: Request) -> Iterator[str]:
    """Limits that a request exceeds."""
    side = request.height or 0, request.width or 0
    if side[0] * side[1] > DRAWN_PIXELS or max(side) > 4096:
        yield f"{side[1]} x {side[0]} pixels are more than this page makes, {DRAWN_PIXELS}"
    if request.steps > STEPS:
        yield f"{request.steps} steps are more than this page makes, {STEPS}"
    regions = sum(len(control.regions_in_use()) for control in request.make_controls())
    if regions > REGIONS:
        yield f"{regions} regions are more than this page draws, {REGIONS}"


def check_upload(path: str, endings: tuple[str, ...]) -> Path:
    """An uploaded file by its ending and size. Raises AttnCtrlError."""
    file = Path(path)
    if file.suffix.lower() not in endings:
        raise AttnCtrlError(f"{file.name!r} is of no kind that is read here\nHINT: {', '.join(endings)}")
    if file.stat().st_size > UPLOAD:
        raise AttnCtrlError(f"{file.name!r} has {file.stat().st_size} bytes\nHINT: at most {UPLOAD}")
    return file


def picture_request(path: str) -> dict[str, Any]:
    """The request that an uploaded picture carries."""
    file = _check_picture(path, {".png": "PNG", ".webp": "WEBP"}, "a PNG or WebP picture of attnctrl")
    try:
        return read_request(file)
    except AttnCtrlError as error:
        raise AttnCtrlError(str(error).replace(str(file), file.name)) from None


def picture_upload(path: str) -> Image.Image:
    """An uploaded picture as RGB, upright, its longer side at most SIDE pixels. Raises AttnCtrlError."""
    file = _check_picture(path, PICTURES, "a PNG, JPEG or WebP picture")
    try:
        with Image.open(file, formats=tuple(set(PICTURES.values()))) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        reason = str(error).replace(str(file), file.name)
        raise AttnCtrlError(f"{file.name!r} cannot be read as a picture: {reason}\nHINT: upload it again") from None
    upright.thumbnail((SIDE, SIDE))
    return upright


def _check_picture(path: str, formats: dict[str, str], hint: str) -> Path:
    """An uploaded picture of some formats. Its pixels are counted before they are unpacked."""
    file = check_upload(path, tuple(formats))
    try:
        with Image.open(file, formats=tuple(set(formats.values()))) as image:
            large = image.width * image.height > PIXELS
    except Image.DecompressionBombError:
        large = True
    except (OSError, ValueError, SyntaxError):
        raise AttnCtrlError(f"{file.name!r} is no picture\nHINT: {hint}") from None
    if large:
        raise AttnCtrlError(f"{file.name!r} has more than {PIXELS} pixels\nHINT: a smaller picture")
    return file


def _by_name(reason: str, values: dict[str, Any]) -> str:
    """``controls[1].scale`` as ``SoftPAG.scale``."""
    controls = values.get("controls")

    def name(match: re.Match) -> str:
        item = controls[int(match[1])]
        return item.get("control", match[0]) if isinstance(item, dict) else match[0]

    return re.sub(r"controls\[(\d+)\]", name, reason) if isinstance(controls, list) else reason
