"""Requests: the rows of a JSONL, CSV or parquet file, checked before anything is made."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ..._quiet import quiet_imports
from ...errors import AttnCtrlError
from ..generate import EARLY, describe, restore
from .schema import arguments_schema, check, controls_schema, field_schema, picture_controls, region_schema, short


if TYPE_CHECKING:
    from ...controls import Control
    from .results import Done

ENDINGS = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV", ".tsv": "CSV", ".parquet": "parquet"}
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
        _dump([describe(control) for control in controls])
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
    shapers = [control.name for control in controls if control.shapes and not control.neutral]
    if len(shapers) > 1:
        wrong.append(
            f"{' and '.join(shapers)} both decide who attends to whom; one control takes any number of regions"
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


def told(error: Exception) -> str:
    """An error in one line: what was wrong, and the hint if there is one."""
    lines = [" ".join(line.split())[:300] for line in str(error).splitlines() if line.strip()] or [""]
    hint = next((line.removeprefix("HINT: ") for line in lines[1:] if line.startswith("HINT: ")), None)
    text = lines[0] + (f" ({hint})" if hint else "")
    return text if isinstance(error, AttnCtrlError) else f"{type(error).__name__}: {text}"


# -- files ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """One row as the file has it. `raw` is its JSON; of a CSV file, the cells that are not empty."""

    line: int
    raw: bytes
    cells: bool = False

    def values(self) -> dict[str, Any]:
        values = parse_json(self.raw)
        return {name: _read_cell(name, cell) for name, cell in values.items()} if self.cells else values


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, by its ending. Raises AttnCtrlError for a file that has no rows or cannot be read."""
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise AttnCtrlError(f"requests {str(path)!r} are of no known kind\nHINT: {', '.join(ENDINGS)}")
    reader = {"JSON lines": _json_rows, "CSV": _csv_rows, "parquet": _parquet_rows}[kind]
    try:
        yield from reader(path)
    except OSError as error:
        raise AttnCtrlError(f"requests {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise AttnCtrlError(f"requests {str(path)!r} are no UTF-8 text: {error}") from None


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if line:
                yield Row(number, line)


def _csv_rows(path: Path) -> Iterator[Row]:
    known = list(row_schema()["properties"])
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            wrong = [name for name in header if name not in known or header.count(name) > 1]
            if wrong:
                what = ", ".join(dict.fromkeys(map(short, wrong)))
                raise AttnCtrlError(f"line 1: column {what} is twice there or not known\nHINT: {', '.join(known)}")
            before = reader.line_num
            before = reader.line_num
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                named = {name: cell for name, cell in zip(header, cells) if cell.strip()}
                named |= {f"cell {number}": cell for number, cell in enumerate(cells[len(header) :], len(header) + 1)}
                yield Row(line, json.dumps(named).encode(), cells=True)
        except csv.Error as error:
            raise AttnCtrlError(f"line {reader.line_num}: no CSV: {error}") from None


def _read_cell(name: str, cell: str) -> Any:
    """A cell of a CSV file by the type of its column; text that is no such value stays text, and the schema refuses it."""
    schema = row_schema()["properties"].get(name, {})
    kind = schema.get("type")
    if kind == "integer" and re.fullmatch(r"\s*[+-]?\d{1,30}\s*", cell):
        return int(cell)
    if kind == "number":
        try:
            return float(cell)
        except ValueError:
            return cell
    if kind == "array":
        return parse_json(cell.encode(), kind=(list, dict), name=name) if cell.lstrip()[:1] in ("[", "{") else [cell]
    return cell


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise AttnCtrlError(
            f"requests {str(path)!r}: reading parquet needs pyarrow\nHINT: pip install 'attnctrl[batch]', or a .jsonl file"
        ) from None
    import pyarrow

    path.open("rb").close()
    try:
        number = 0
        for part in parquet.ParquetFile(path).iter_batches():
            for values in part.to_pylist():
                number += 1
                yield Row(number, json.dumps(_without_nulls(values), default=str).encode())
    except pyarrow.ArrowException as error:
        raise AttnCtrlError(f"requests {str(path)!r} are no parquet file: {told(error)}") from None


def _without_nulls(value: Any) -> Any:
    """Columns of structs have every member of every row; those without a value go."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def parse_json(raw: bytes, kind: type | tuple[type, ...] = dict, name: str = "the row") -> Any:
    """Strict JSON: no NaN, no name twice in an object. Raises AttnCtrlError."""
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant, object_pairs_hook=_pairs)
    except UnicodeDecodeError as error:
        raise AttnCtrlError(f"{name} is no UTF-8 text, from byte {error.start} on") from None
    except json.JSONDecodeError as error:
        raise AttnCtrlError(f"{name} is no JSON: {error.msg} (character {error.pos + 1})") from None
    except AttnCtrlError as error:
        raise AttnCtrlError(f"{name} {error}") from None
    except ValueError:
        raise AttnCtrlError(f"{name} holds a number that is too large") from None
    except RecursionError:
        raise AttnCtrlError(f"{name} is nested too deeply") from None
    if not isinstance(value, kind):
        raise AttnCtrlError(f"{name} is {short(value)}, not an object")
    return [value] if isinstance(value, dict) and kind is not dict else value


def _no_constant(text: str) -> Any:
    raise AttnCtrlError(f"holds {text}, which is no JSON number")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise AttnCtrlError(f"has {short(next(n for n in names if names.count(n) > 1))} twice in one object")
    return made


# -- all of a file -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Entry:
    """A row that is right. `have`: its pictures that exist already, by their number."""

    row: Row
    mark: str
    id: str
    images: int
    group: str
    fingerprint: str
    have: frozenset[int]
    defaults: dict[str, Any]
    known: Request | None = None

    @property
    def finished(self) -> bool:
        return len(self.have) == self.images

    @property
    def request(self) -> Request:
        """Finished rows are read only where a batch needs them again."""
        if self.known is None:
            self.known = check_values({**self.defaults, **_given(self.row.values())})[0]
        return self.known


@dataclass(frozen=True)
class Problem:
    """A row that is wrong, with every reason."""

    row: Row
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"line {self.row.line}: {'; '.join(self.reasons)}"


def read_requests(
    path: Path, options: dict[str, Any], defaults: dict[str, Any], ending: str, done: Done
) -> tuple[list[Entry], list[Problem]]:
    """Every row of a file, right or wrong. Rows whose pictures all exist are recognised by their bytes and not read.

    Args:
        options: what else decides about pictures, such as the model.
        defaults: values for what a row leaves out.
        ending: of the pictures' files.
    """
    key = hashlib.blake2b(_dump([options, defaults, ending]), digest_size=32).digest()
    names = _Names()
    entries: list[Entry] = []
    problems: list[Problem] = []
    for row in read_rows(path):
        mark = hashlib.blake2b(row.raw, digest_size=10, key=key).hexdigest()
        made = done.by_row.get(mark)
        if made is not None and len(made.files) == made.images:
            entry = Entry(
                row, mark, made.id, made.images, made.group, made.fingerprint, frozenset(made.files), defaults
            )
            files: Iterable[str] = made.files.values()
            wrong: list[str] = []
        else:
            entry, files, wrong = _read_entry(row, mark, options, defaults, ending, done)
        wrong = wrong or names.take(entry.id, files, row.line)
        if wrong:
            problems.append(Problem(row, tuple(wrong)))
        else:
            entries.append(entry)
    if not entries and not problems:
        raise AttnCtrlError(f"requests {str(path)!r} hold no request")
    return entries, problems


def _read_entry(
    row: Row, mark: str, options: dict[str, Any], defaults: dict[str, Any], ending: str, done: Done
) -> tuple[Entry | None, list[str], list[str]]:
    """(entry, its files, what is wrong with it)."""
    try:
        request, wrong = check_values({**defaults, **_given(row.values())})
    except AttnCtrlError as error:
        return None, [], [told(error)]
    if wrong:
        return None, [], wrong
    settings = request.settings()
    fingerprint = digest([options, ending, settings])
    single = {
        name: settings[name] for name in settings if name not in ("prompt", "negative_prompt", "seed", "num_images")
    }
    group = digest([single, request.negative_prompt is None])
    have: frozenset[int] = frozenset()
    made = done.by_id.get(request.id)
    if made is not None:
        if made.fingerprint != fingerprint:
            reason = "was made in this folder already, from another request or with other settings"
            return None, [], [f"id {short(request.id)} {reason}; another id or --output"]
        have = frozenset(made.files)
    entry = Entry(row, mark, request.id, request.num_images, group, fingerprint, have, defaults, request)
    return entry, request.files(ending), []


class _Names:
    """Ids and files that are taken; file names as a file system that ignores case sees them."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.files: dict[str, int] = {}
        self.folders: dict[str, int] = {}

    def take(self, name: str, files: Iterable[str], line: int) -> list[str]:
        if name in self.ids:
            return [f"id {short(name)} is that of line {self.ids[name]} too"]
        files, folders = [file.casefold() for file in files], []
        for file in files:
            if file in self.files or file in self.folders:
                return [f"its file {short(file)} is also that of line {self.files.get(file) or self.folders[file]}"]
            if "/" in file:
                folders += [file[:at] for at in range(len(file)) if file[at] == "/"]
        for folder in folders:
            if folder in self.files:
                return [f"its folder {short(folder)} is a file of line {self.files[folder]}"]
        self.ids[name] = line
        for file in files:
            self.files[file] = line
        for folder in folders:
            self.folders[folder] = line
        return []


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def digest(value: Any) -> str:
    return hashlib.blake2b(_dump(value), digest_size=10).hexdigest()
