"""JSON Schema from the dataclasses of requests, regions and controls, and the check of a value against such a schema.

Only what those schemas need is known: type, enum, anyOf, items, minItems, maxItems, properties, required, additionalProperties,
minimum, maximum, minLength, maxLength.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...errors import AttnCtrlError


PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
WORDS = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}
HEADS = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}  # what HeadSet.parse reads


def field_schema(hint: Any) -> dict[str, Any] | None:
    """The schema of a type; None for what JSON cannot hold, such as a function or a tensor."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if getattr(hint, "__name__", None) == "HeadSet":  # by name: requests without controls are checked without torch
        return HEADS
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        parts = [field_schema(argument) for argument in arguments]
        flat = [one for part in parts if part is not None for one in part.get("anyOf", [part])]
        flat = [one for index, one in enumerate(flat) if one not in flat[:index]]
        return flat[0] if len(flat) == 1 else {"anyOf": flat} if flat else None
    if origin is tuple and Ellipsis not in arguments:
        return {
            "type": "array",
            "items": field_schema(arguments[0]),
            "minItems": len(arguments),
            "maxItems": len(arguments),
        }
    sequence = origin or hint
    if isinstance(sequence, type) and issubclass(sequence, collections.abc.Mapping):
        return {"type": "object"}
    if isinstance(sequence, type) and issubclass(sequence, collections.abc.Iterable):
        items = (field_schema(arguments[0]) if arguments else None) or {}
        return {"type": "array", **({"items": items} if items else {})}
    return None


def arguments_schema(kind: type) -> dict[str, Any]:
    """The arguments of a control's or region's dataclass."""
    from ...regions import Region

    properties, needed, controls = {}, [], {}
    if kind is not Region:
        from ...controls.spec import control_types

        controls = control_types()  # a control may take another, whose module it does not import
    hints = get_type_hints(kind, localns=controls)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        if kind is not Region and field.name == "regions":
            schema = {"type": "array", "items": region_schema()}
        else:
            schema = field_schema(hints[field.name])
        if schema is None:
            continue
        if isinstance(field.default, float) and math.isinf(field.default):
            schema = {"anyOf": [schema, {"enum": ["inf"]}]}
        properties[field.name] = dict(schema)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            needed.append(field.name)
        elif isinstance(field.default, (str, int, float)):
            infinite = isinstance(field.default, float) and math.isinf(field.default)
            properties[field.name]["default"] = str(field.default) if infinite else field.default
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def region_schema() -> dict[str, Any]:
    """``"a red cat@0,0,0.5,1"``, or an object with a box, a mask's file, or a mask's PNG in base64."""
    from ...regions import Region

    schema = arguments_schema(Region)
    schema["properties"]["mask"] = {"type": "string", "description": "file; bright is inside"}
    schema["properties"]["mask_png"] = {"type": "string", "description": "instead of the file, a PNG in base64"}
    schema["properties"]["prompt"] = {"type": "string", "minLength": 1}
    schema["required"] = ["prompt"]
    return {"anyOf": [{"type": "string", "description": "PROMPT@LEFT,TOP,RIGHT,BOTTOM or PROMPT@MASK.png"}, schema]}


def picture_controls() -> dict[str, type]:
    """The controls of denoisers, by name; those of language models draw nothing."""
    from ...controls import LanguageControl
    from ...controls.spec import control_types

    return {name: kind for name, kind in control_types().items() if not issubclass(kind, LanguageControl)}


def controls_schema() -> dict[str, Any]:
    """A list of ``"SoftPAG(heads='3.5')"`` or of ``{"control": "SoftPAG", "heads": "3.5"}``; ``name`` may stand for ``control``."""
    choices: list[dict[str, Any]] = [
        {"type": "string", "description": "as Python writes it: SoftPAG(heads='3.5', scale=2.0)"}
    ]
    for name, kind in picture_controls().items():
        schema = arguments_schema(kind)
        for word in ("control", "name"):
            properties = {word: {"enum": [name]}, **schema["properties"]}
            about = (kind.__doc__ or "").strip().splitlines()[0]
            choices.append(
                {**schema, "description": about, "properties": properties, "required": [word, *schema["required"]]}
            )
    return {"type": "array", "items": {"anyOf": choices}}


def check(value: Any, schema: dict[str, Any], at: str, wrong: list[str]) -> Any:
    """Adds to `wrong` what a value lacks; returns it with whole floats of integer fields as integers."""
    if "anyOf" in schema:
        return _check_any(value, schema["anyOf"], at, wrong)
    if "enum" in schema:
        if not any(value == choice and type(value) is type(choice) for choice in schema["enum"]):
            wrong.append(f"{at} is {short(value)}, not {wanted(schema)}")
        return value
    kind = schema.get("type")
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is not None and not _is(value, kind):
        wrong.append(f"{at} is {short(value)}, not {wanted(schema)}")
    elif kind in ("integer", "number"):
        _check_number(value, schema, at, wrong)
    elif kind == "string":
        if len(value) < schema.get("minLength", 0):
            wrong.append(f"{at} is empty")
        elif len(value) > schema.get("maxLength", math.inf):
            wrong.append(f"{at} has {len(value)} characters, more than {schema['maxLength']}")
    elif kind == "array":
        return _check_list(value, schema, at, wrong)
    elif kind == "object":
        return _check_object(value, schema, at, wrong)
    return value


def _check_any(value: Any, choices: list[dict[str, Any]], at: str, wrong: list[str]) -> Any:
    near: list[str] | None = None
    for choice in choices:
        found: list[str] = []
        checked = check(value, choice, at, found)
        if not found:
            return checked
        if near is None and _is(value, choice.get("type", "")):  # of the right type: what is wrong lies inside
            near = found
    wrong += near or [f"{at} is {short(value)}, not {' or '.join(dict.fromkeys(map(wanted, choices)))}"]
    return value


def _check_number(value: Any, schema: dict[str, Any], at: str, wrong: list[str]) -> None:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    try:
        fine = math.isfinite(value) and low <= value <= high
    except OverflowError:
        fine = False
    if not fine:
        wrong.append(f"{at} is {short(value)}, not {wanted(schema)}")


def _check_list(value: list, schema: dict[str, Any], at: str, wrong: list[str]) -> list:
    least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if not least <= len(value) <= most:
        wrong.append(f"{at} has {len(value)} entries, not {least if least == most else f'at least {least}'}")
        return value
    items = schema.get("items")
    return value if items is None else [check(item, items, f"{at}[{i}]", wrong) for i, item in enumerate(value)]


def _check_object(value: dict, schema: dict[str, Any], at: str, wrong: list[str]) -> dict:
    known = schema["properties"]
    missing = [name for name in schema.get("required", ()) if name not in value]
    unknown = [name for name in value if name not in known]
    inside = f" of {at}" if at else ""
    if missing:
        wrong.append(f"{', '.join(missing)}{inside} is missing")
    if unknown:
        wrong.append(f"{', '.join(map(short, unknown))}{inside} is not known; there are {', '.join(known)}")
    dot = f"{at}." if at else ""
    return {
        name: check(item, known[name], dot + name, wrong) if name in known else item for name, item in value.items()
    }


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    types_ = {"string": str, "integer": int, "number": (int, float), "null": type(None), "array": list, "object": dict}
    return kind in types_ and isinstance(value, types_[kind])


def wanted(schema: dict[str, Any]) -> str:
    """What a schema asks for, in words."""
    if "enum" in schema:
        return ("one of " if len(schema["enum"]) > 1 else "") + ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(wanted, schema["anyOf"])))
    low, high = schema.get("minimum"), schema.get("maximum")
    span = (
        f" from {low} to {high}"
        if low is not None and high is not None
        else f" from {low} on"
        if low is not None
        else ""
    )
    return WORDS.get(schema.get("type", ""), "a value") + span


def short(value: Any) -> str:
    """A value in at most 60 characters, on one line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, (list, dict)):
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"


def told(error: Exception) -> str:
    """An error in one line: what was wrong, and the hint if there is one."""
    lines = [" ".join(line.split())[:300] for line in str(error).splitlines() if line.strip()] or [""]
    hint = next((line.removeprefix("HINT: ") for line in lines[1:] if line.startswith("HINT: ")), None)
    text = lines[0] + (f" ({hint})" if hint else "")
    return text if isinstance(error, AttnCtrlError) else f"{type(error).__name__}: {text}"
