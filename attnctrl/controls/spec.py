"""Controls as text and as plain values: ``SkipLayers(layers='2:4', scale=2.5)`` from a command line, a mapping from a request."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import AttnCtrlError
from ..heads import HeadBatch, HeadSet
from ..regions import Region
from .base import Control


def control_types() -> dict[str, type[Control]]:
    """Every control by its name."""
    from .. import controls

    found = (getattr(controls, name) for name in controls.__all__)
    return {
        kind.__name__: kind
        for kind in found
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and issubclass(kind, Control)
    }


def make_control(name: str, arguments: Mapping[str, Any]) -> Control:
    """The control of a name with some arguments. Raises with the names that exist."""
    kinds = control_types()
    if name not in kinds:
        raise AttnCtrlError(f"there is no control {name!r}\nHINT: {', '.join(kinds)}")
    fields = {field.name: field for field in dataclasses.fields(kinds[name])}
    unknown = [key for key in arguments if key not in fields]
    missing = [
        key
        for key, field in fields.items()
        if key not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        reasons = [f"has no argument {', '.join(unknown)}"] * bool(unknown) + [f"needs {', '.join(missing)}"] * bool(
            missing
        )
        raise AttnCtrlError(f"{name} {' and '.join(reasons)}\nHINT: {name}({', '.join(fields)})")
    try:
        return kinds[name](**arguments)
    except AttnCtrlError:
        raise
    except (TypeError, ValueError) as error:
        raise AttnCtrlError(f"{name}: {error}") from None


def parse_control(text: str) -> Control:
    """Reads ``Name(argument=value, …)``, with values as Python writes them: numbers, texts, lists, True, None."""
    hint = "HINT: SkipLayers(layers='2:4', scale=2.5)"
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise AttnCtrlError(f"control {text!r} cannot be read\n{hint}") from None
    if isinstance(call, ast.Name):
        return make_control(call.id, {})
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise AttnCtrlError(f"control {text!r} is no Name(argument=value, …)\n{hint}")
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise AttnCtrlError(f"control {text!r}: arguments are given by name\n{hint}")
    arguments = {}
    for keyword in call.keywords:
        try:
            arguments[keyword.arg] = _value(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError):
            raise AttnCtrlError(f"control {text!r}: {keyword.arg} is no plain value\n{hint}") from None
    return make_control(call.func.id, arguments)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    return ast.literal_eval(node)


def plain_value(value: Any) -> Any:
    """An argument of a control as JSON can hold it."""
    if isinstance(value, HeadSet):
        return [list(head) for head in value.heads]
    if isinstance(value, HeadBatch):
        return [None if heads is None else plain_value(heads) for heads in value.sets]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if callable(value) and not isinstance(value, Region):
        return repr(value)
    return list(value) if isinstance(value, tuple) else value
