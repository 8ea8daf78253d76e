"""Files of requests: the rows of JSONL, CSV and parquet files, as they stand there."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import AttnCtrlError
from .request import row_schema
from .schema import short, told


ENDINGS = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV", ".tsv": "CSV", ".parquet": "parquet"}


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
    """The rows of a file, by its ending. Raises AttnCtrlError for a file that cannot be read."""
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
    kind = row_schema()["properties"].get(name, {}).get("type")
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
