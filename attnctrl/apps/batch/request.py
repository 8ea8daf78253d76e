"""One request: what it may say, what it asks for, and everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_type_hints

from ..._quiet import quiet_imports
from ...requests import EARLY, describe, restore
from .schema import (
    arguments_schema,
    check,
    controls_schema,
    field_schema,
    picture_controls,
    region_schema,
    short,
    told,
)


if TYPE_CHECKING:
    from ...controls import Control

AMONG_IMAGES = ("Isolation", "SharedAttention")  # controls of attention among image tokens alone
_MAX_SEED = 2**63 - 1
_PICTURES = (".png", ".webp", ".jpg", ".jpeg")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}  # of Windows


def _field(default: Any, description: str, **limits: Any) -> Any:
    metadata = {"description": description, **limits}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Request:
    """Pictures of one prompt under one set of controls. `regions` and `controls` are kept as they were written."""

    id: str | int = _field(dataclasses.MISSING, "unique in the file; names the pictures unless output_name does")
    prompt: str = _field(dataclasses.MISSING, "what to draw", minLength=1, maxLength=20_000)
    negative_prompt: str | None = _field(None, "what to keep away from", maxLength=20_000)
    seed: int = _field(0, "picture i has seed + i", minimum=0, maximum=_MAX_SEED)
    num_images: int = _field(1, "pictures of this request", minimum=1, maximum=10_000)
    height: int | None = _field(None, "in pixels; the model's when left out", minimum=1, maximum=16_384)
    width: int | None = _field(None, "in pixels; the model's when left out", minimum=1, maximum=16_384)
    steps: int = _field(24, "denoising steps", minimum=1, maximum=10_000)
    guidance_scale: float = _field(4.0, "classifier-free guidance; 1 is none", minimum=0, maximum=1000)
    max_sequence_length: int | None = _field(None, "text tokens of the long encoder", minimum=1, maximum=16_384)
    regions: list | None = _field(None, f"prompts of places; RegionalPrompts(regions, stop={EARLY})")
    controls: list | None = _field(None, "controls by name with their arguments")
    output_name: str | None = _field(None, "file without ending, below the output folder; folders may stand before it")

    def make_controls(self) -> list[Control]:
        controls = []
        if self.regions:
            controls.append(restore({"control": "RegionalPrompts", "regions": self.regions, "stop": EARLY}))
        return controls + [_make_control(item) for item in self.controls or ()]

    def job_arguments(self) -> dict[str, Any]:
        """The arguments of `Job` that a request decides, seed apart."""
        names = ("prompt", "negative_prompt", "height", "width", "steps", "guidance_scale", "max_sequence_length")
        return {name: getattr(self, name) for name in names}

    def settings(self) -> dict[str, Any]:
        """What decides about the pictures, with every control in full."""
        controls = [describe(control) for control in self.make_controls()]
        return {**self.job_arguments(), "seed": self.seed, "num_images": self.num_images, "controls": controls}

    def whole(self) -> Request:
        """The same request without a file behind it: masks and heads stand in it."""
        controls = [describe(control) for control in self.make_controls()]
        return dataclasses.replace(self, regions=None, controls=controls or None)

    def files(self, ending: str) -> list[str]:
        """The pictures' files below the output folder."""
        name = self.output_name or str(self.id)
        numbers = [""] if self.num_images == 1 else [f"-{self.seed + index}" for index in range(self.num_images)]
        return [f"{name}{number}.{ending}" for number in numbers]


@functools.cache
def row_schema() -> dict[str, Any]:
    """The schema of a row, what stands inside `regions` and `controls` apart."""
    hints = get_type_hints(Request)
    properties, needed = {}, []
    for item in dataclasses.fields(Request):
        schema = field_schema(hints[item.name])
        choices = [one for one in schema.get("anyOf", [schema]) if one != {"type": "null"}]
        limits = dict(item.metadata)
        about = limits.pop("description")
        choices = [{**one, **limits} for one in choices]
        properties[item.name] = {"description": about, **(choices[0] if len(choices) == 1 else {"anyOf": choices})}
        if item.default is dataclasses.MISSING:
            needed.append(item.name)
        elif item.default is not None:
            properties[item.name]["default"] = item.default
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def published_schema() -> dict[str, Any]:
    """The whole JSON Schema of a row."""
    with quiet_imports():
        schema = json.loads(json.dumps(row_schema()))
        schema["properties"]["regions"]["items"] = region_schema()
        schema["properties"]["controls"]["items"] = controls_schema()["items"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A request of attnctrl batch",
        **schema,
    }


def check_values(values: dict[str, Any]) -> tuple[Request | None, list[str]]:
    """(request, everything that is wrong with it). Never raises; None stands for a value that was left out."""
    wrong: list[str] = []
    values = check({key: value for key, value in values.items() if value is not None}, row_schema(), "", wrong)
    if wrong:
        return None, wrong
    request = Request(**{**values, "id": str(values["id"])})
    return request, _problems(request)


def _problems(request: Request) -> list[str]:
    wrong = []
    try:
        json.dumps([getattr(request, name) for name in Request.__dataclass_fields__], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return ["half of a surrogate pair stands in a text"]
    for name in ("prompt", "negative_prompt"):
        if "\0" in (getattr(request, name) or ""):
            wrong.append(f"{name} holds a zero character")
    if not request.prompt.strip():
        wrong.append("prompt is empty")
    if request.negative_prompt and request.guidance_scale <= 1:
        wrong.append(
            f"negative_prompt does nothing with guidance_scale {request.guidance_scale:g}: it needs more than 1"
        )
    if request.seed > _MAX_SEED - request.num_images:
        wrong.append("seed plus num_images is more than 2^63")
    named = "output_name" if request.output_name is not None else "id"
    if reason := _bad_name(getattr(request, named)):
        wrong.append(f"{named} {short(getattr(request, named))} {reason}")
    if request.regions or request.controls:
        wrong += _control_problems(request)
    return wrong


def _bad_name(name: str) -> str | None:
    """Why a name cannot be a file below the output folder."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or ".." in parts:
        return "leaves the output folder"
    if name.lower().endswith(_PICTURES):
        return "has an ending; --image-format decides it"
    for part in parts:
        if not part.strip(" .") or part != part.strip(" ") or part.startswith(".") or part.endswith("."):
            return "has a part that is empty, or that starts or ends with a dot or a space"
        if re.search(r'[\x00-\x1f\x7f:*?"<>|]', part):
            return "has a character that file names cannot have"
        if part.split(".")[0].lower() in _DEVICES:
            return "is the name of a device"
        if len(part.encode()) > 200 or len(parts) > 8:
            return "is too long"
    return None


def _control_problems(request: Request) -> list[str]:
    """What is wrong with regions and controls, as far as it can be told without a model."""
    with quiet_imports():
        known = controls_known()
    wrong: list[str] = []
    check(request.regions or [], {"type": "array", "items": known["region"]}, "regions", wrong)
    for index, item in enumerate(request.controls or ()):
        _check_control(item, f"controls[{index}]", known, wrong)
    if wrong:
        return wrong
    try:
        controls = request.make_controls()
        dump([describe(control) for control in controls])
    except Exception as error:  # a control may raise anything on what no schema forbids
        return [told(error)]
    for control, item in zip(controls[::-1], (request.controls or [])[::-1]):
        if control.name not in known:
            wrong.append(f"{control.name} is for language models")
        elif isinstance(item, str):  # Python's values are more than JSON's
            facts = {
                key: value for key, value in describe(control).items() if key not in ("control", "regions", "heads")
            }
            check(facts, {**known[control.name], "required": []}, control.name, wrong)
    shapers = [control for control in controls if control.shapes and not control.neutral]
    for one, other in itertools.combinations(shapers, 2):
        parted = (one.name in AMONG_IMAGES) != (other.name in AMONG_IMAGES)  # as UNets part self- and cross-attention
        if not parted and getattr(one, "layers", None) is None and getattr(other, "layers", None) is None:
            wrong.append(
                f"{one.name} and {other.name} both decide who attends to whom; one control takes any number of regions"
            )
    return wrong


@functools.cache
def controls_known() -> dict[str, dict[str, Any]]:
    """The arguments of every control, and "region"."""
    return {"region": region_schema(), **{name: arguments_schema(kind) for name, kind in picture_controls().items()}}


def _check_control(item: Any, at: str, known: dict[str, Any], wrong: list[str]) -> None:
    if isinstance(item, str):
        return
    if not isinstance(item, dict):
        wrong.append(f"{at} is {short(item)}, not an object or a text such as \"SoftPAG(heads='3.5')\"")
        return
    names = [item[word] for word in ("control", "name") if word in item]
    exist = ", ".join(name for name in known if name != "region")
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in known or names[0] == "region":
        found = f"names {short(names[0])}, no control" if len(names) == 1 else "needs one of 'control' and 'name'"
        wrong.append(f"{at} {found}; there are {exist}")
        return
    check({key: value for key, value in item.items() if key not in ("control", "name")}, known[names[0]], at, wrong)


def _make_control(item: dict[str, Any] | str) -> Control:
    if isinstance(item, str):
        with quiet_imports():
            from ...controls.spec import parse_control
        return parse_control(item)
    name = item.get("control", item.get("name"))
    return restore({"control": name, **{key: value for key, value in item.items() if key not in ("control", "name")}})


def dump(value: Any) -> bytes:
    """JSON that is the same for the same value."""
    return json.dumps(value, sort_keys=True).encode()
