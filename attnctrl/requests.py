"""Controls as JSON, as requests and saved pipelines hold them, and back.

Nothing heavy is imported with this module.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ._quiet import quiet_imports
from .errors import AttnCtrlError


if TYPE_CHECKING:
    from .controls import Control
    from .regions import Region

EARLY = 0.3  # share of the steps that isolated regions rule unless asked otherwise; the paper recommends 5 to 10 of 24


WITH_REGIONS = ("regions", "subjects", "phrases", "targets", "sources")  # arguments of controls that may hold regions


def describe(control: Control) -> dict[str, Any]:
    """A control with all its arguments as JSON. A region's mask is stored whole."""
    arguments = (name for name, item in control.__dataclass_fields__.items() if item.init)
    return {"control": control.name} | {name: _plain(getattr(control, name)) for name in arguments}


def restore(facts: Mapping[str, Any]) -> Control:
    """The control that `describe` described, or one that a request describes like that."""
    with quiet_imports():
        from .controls.spec import control_types, make_control

    arguments = {key: value for key, value in facts.items() if key != "control"}
    kind = control_types().get(facts["control"])
    for name, known in kind.__dataclass_fields__.items() if kind else ():
        if arguments.get(name) in ("inf", "-inf") and "float" in str(known.type):
            arguments[name] = float(arguments[name])
    for name in WITH_REGIONS:
        if isinstance(places := arguments.get(name), Mapping) and name == "phrases":
            arguments[name] = {phrase: _with_regions(place) for phrase, place in places.items()}
        elif places is not None:
            arguments[name] = _with_regions(places)
    return make_control(facts["control"], arguments)


def mask_to_text(mask: Image.Image) -> str:
    """A mask as base64 of an 8-bit PNG, so that a request is whole without the mask's file."""
    buffer = io.BytesIO()
    mask.convert("L").save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def mask_from_text(text: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return image.convert("L")


def _plain(value: Any) -> Any:
    """An argument as JSON can hold it, with the regions in it."""
    with quiet_imports():
        from .controls.spec import plain_value
        from .regions import Region

    if isinstance(value, Region):
        return _region(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) if isinstance(item, (Region, list, tuple)) else item for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return plain_value(value)


def _with_regions(value: Any) -> Any:
    """Lists of lists of regions, from their JSON."""
    if isinstance(value, Mapping):
        return _restore_region(value)
    return [_with_regions(item) for item in value] if isinstance(value, (list, tuple)) else value


def _restore_region(facts: Mapping[str, Any]) -> Region:
    from .regions import Region

    arguments = {key: value for key, value in facts.items() if key != "mask_png"}
    if facts.get("mask_png") is not None:
        try:
            arguments["mask"] = mask_from_text(facts["mask_png"])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise AttnCtrlError(f"region {facts.get('prompt')!r}: mask_png is no picture: {error}") from None
    return Region(**arguments)


def _region(region: Region) -> dict[str, Any]:
    facts: dict[str, Any] = {name: getattr(region, name) for name in ("prompt", "strength", "downsample", "feather")}
    if region.negative_prompt is not None:
        facts["negative_prompt"] = region.negative_prompt
    if region.of_prompt:
        numbers = None if region.numbers is None else list(region.numbers)
        facts |= {"of_prompt": True, "occurrence": region.occurrence, "numbers": numbers}
    if region.box is not None:
        return {**facts, "box": list(region.box)}
    name = Path(region.mask).name if isinstance(region.mask, (str, os.PathLike)) else "mask"
    pixels = region.pixels.mul(255).round().byte().numpy()
    return {**facts, "mask": name, "mask_png": mask_to_text(Image.fromarray(pixels))}
