"""Forms of controls, made from their dataclasses: one field per argument, explained by the docstring. Knows nothing of the page."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ...controls.spec import control_types
from ...errors import AttnCtrlError
from ..batch.schema import arguments_schema, picture_controls


Kind = Literal["switch", "choice", "fraction", "number", "whole", "numbers", "list", "text"]
PICTURES_ONLY = ("scale", "start", "stop", "sigma")  # arguments that mean something in denoising steps alone


@dataclass(frozen=True)
class Field:
    """One argument of a control as a form asks for it.

    Args:
        kind: "fraction" is a number from 0 to 1, "numbers" a list such as ``0.1, 0.9``, "list" one of whole numbers ``7, 12`` or of words
            and ranges ``the red car; 5:20``; empty numbers and texts are left out. A number without a default, or with the default "inf",
            is typed as text.
        default: what the control takes when the argument is left out; None also where it has to be given.
        about: its explanation in the control's docstring.
        choices: of kind "choice", and words that stand for a whole list.
    """

    name: str
    kind: Kind
    default: Any
    about: str = ""
    choices: tuple[str, ...] = ()
    needed: bool = False

    @property
    def brief(self) -> str:
        """The first part of the explanation; nothing where that is a number alone, the default."""
        text = re.split(r"(?<=[.;])\s", self.about)[0].rstrip(";. ")
        return "" if re.fullmatch(r"[\d.]+", text) else text[:1].upper() + text[1:]

    def read(self, value: Any) -> Any:
        """What a widget holds as an argument; None where it is to be left out."""
        if isinstance(value, str):
            value = value.strip()
        if value is None or value == "" or value == self.default:
            return None
        if self.kind == "numbers":
            return [_number(part, self.name) for part in str(value).split(",")]
        if self.kind == "list":
            return value if value in self.choices else _entries(str(value))
        if self.kind == "number" and isinstance(value, str):
            return "inf" if value.lower() in ("inf", "infinity") else _number(value, self.name)
        if self.kind == "whole":
            number = _number(str(value), self.name)
            return int(number) if number.is_integer() else number
        return value

    def show(self, value: Any) -> Any:
        """An argument as its widget holds it."""
        if value is None:
            return self.default
        if self.kind == "numbers":
            return ", ".join(f"{part:g}" for part in value)
        if self.kind == "text" and isinstance(value, (list, tuple)):
            return _listed(value)
        if self.kind in ("number", "whole") and not isinstance(self.default, (int, float)):
            return f"{value:g}" if isinstance(value, float) else str(value)
        return str(value) if self.kind == "text" else value


@cache
def controls() -> dict[str, tuple[Field, ...]]:
    """The form of every control of pictures, by name. Those with an argument that can be neither typed nor drawn are left out."""
    forms = {name: fields(kind) for name, kind in picture_controls().items()}
    return {name: form for name, form in forms.items() if form is not None}


@cache
def language_controls() -> dict[str, tuple[Field, ...]]:
    """The form of every control of language models, by name. The tokenizer is the model's, and attention is recorded without being asked."""
    from ...controls import HeadScale, LanguageControl, RecordAttention

    forms = {}
    for name, kind in control_types().items():
        if issubclass(kind, (LanguageControl, HeadScale)) and kind is not RecordAttention:
            left_out = ("tokenizer", *(() if issubclass(kind, LanguageControl) else PICTURES_ONLY))
            forms[name] = fields(kind, left_out, lists=True)
    return {name: form for name, form in forms.items() if form is not None}


def fields(kind: type, left_out: Sequence[str] = ("regions",), lists: bool = False) -> tuple[Field, ...] | None:
    """The form of a control; None where an argument cannot be typed. Regions are drawn, and functions have no form.

    Args:
        lists: lists of whole numbers, words and ranges are typed.
    """
    schema, about = arguments_schema(kind), explanations(kind)
    form = tuple(
        _field(name, part, about.get(name, ""), name in schema["required"], lists)
        for name, part in schema["properties"].items()
        if name not in left_out and part != {"type": "null"}
    )
    return None if None in form else form


def summary(kind: type) -> str:
    """The first sentence of a control's docstring."""
    text = " ".join(inspect.getdoc(kind).split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text)[0]


def explanations(kind: type) -> dict[str, str]:
    """What the docstring says of every argument; ``start, stop:`` explains both."""
    _, _, arguments = (inspect.getdoc(kind) or "").partition("\nArgs:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + arguments.split("\n\n")[0]):
        names, colon, text = entry.partition(":")
        if colon:
            found |= {name.strip(): " ".join(text.split()).replace("`", "") for name in names.split(",")}
    return found


def explained(forms: Mapping[str, tuple[Field, ...]]) -> dict[str, dict[str, str]]:
    """What the arguments of controls mean."""
    return {name: {field.name: field.about for field in form} for name, form in forms.items()}


def read_form(name: str, values: Mapping[str, Any], form: Sequence[Field] | None = None) -> dict[str, Any]:
    """A filled form as a request's control. Raises AttnCtrlError for what cannot be read, and for what is missing.

    Args:
        form: None takes that of a control of pictures.
    """
    form = controls()[name] if form is None else form
    arguments = {field.name: field.read(values.get(field.name)) for field in form}
    missing = [field.name for field in form if field.needed and arguments[field.name] is None]
    if missing:
        raise AttnCtrlError(f"{name} needs {', '.join(missing)}\nHINT: fill it in, or take {name} off")
    return {"control": name, **{key: value for key, value in arguments.items() if value is not None}}


def _field(name: str, schema: dict[str, Any], about: str, needed: bool, lists: bool) -> Field | None:
    parts = schema.get("anyOf", [schema])
    types = {part.get("type") for part in parts} - {"null"}
    default, choices = schema.get("default"), ()
    if "enum" in schema:
        kind, choices = "choice", tuple(schema["enum"])
    elif types == {"boolean"}:
        kind = "switch"
    elif types == {"integer"}:
        kind = "whole"
    elif types & {"number"}:
        fraction = re.search(r"\b0-1\b|\b0 \(off|fractions? of the steps", about) and default is not None
        kind = "fraction" if fraction and 0 <= float(default) <= 1 else "number"
    elif any(part.get("items", {}).get("type") == "number" for part in parts):
        kind = "numbers"
    elif "string" in types:
        kind = "text"
    elif lists and types <= {"array", None}:
        kind, choices = "list", tuple(choice for part in parts for choice in part.get("enum", ()))
    else:
        return None
    return Field(name, kind, default, about, choices, needed)


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AttnCtrlError(
            f"{name}: {text.strip()[:40]!r} is no number\nHINT: 0.5, or 0.1, 0.9 where two are asked for"
        )
    return number


def _entries(text: str) -> list[int | str | tuple[int, int]]:
    """``7, 12`` as numbers; ``the red car; 5:20`` as words and a range."""
    if re.fullmatch(r"\d{1,9}(\s*,\s*\d{1,9})*", text):
        return [int(part) for part in text.split(",")]
    found = []
    for part in filter(None, map(str.strip, text.split(";"))):
        span = re.fullmatch(r"(\d{1,9})\s*:\s*(\d{1,9})", part)
        found.append((int(span[1]), int(span[2])) if span else part)
    return found


def _listed(value: list | tuple) -> str:
    """Heads as ``3.5,4.2:0.7``, other lists with commas between."""
    if value and isinstance(value[0], (list, tuple)):
        weights = ["" if head[2:] in ([1], [1.0], [], (1.0,), ()) else f":{head[2]:g}" for head in value]
        return ",".join(f"{head[0]}.{head[1]}{weight}" for head, weight in zip(value, weights))
    return ",".join(map(str, value))
