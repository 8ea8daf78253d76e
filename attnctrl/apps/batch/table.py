"""All results of a run as one parquet file, made from results.jsonl, which stays the record that a resumed run reads."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AttnCtrlError
from .results import RESULTS


if TYPE_CHECKING:
    from .remote import Address, RemoteResults
    from .results import Results

TABLE = "results.parquet"
COLUMNS = {
    "id": "string",
    "image": "int64",
    "images": "int64",
    "file": "string",
    "seed": "int64",
    "sha256": "string",
    "seconds": "float64",
    "prompt": "string",
    "width": "int64",
    "height": "int64",
    "request": "string",
}
PART = 10_000  # rows of a row group
_SOURCE = b"attnctrl.results.sha256"


def need_pyarrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise AttnCtrlError(
            "--format parquet needs pyarrow, which is not installed\nHINT: pip install 'attnctrl[batch]'"
        )


def write_table(results: Results | RemoteResults) -> Path | Address:
    """Writes results.parquet, one row a picture in the order of results.jsonl, unless it holds just these. The request is JSON."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    with results.open(RESULTS) as file:
        data = file.read()
    mark = hashlib.sha256(data).hexdigest().encode()
    if _mark_of(results) != mark:
        schema = pa.schema([(name, kind) for name, kind in COLUMNS.items()], metadata={_SOURCE: mark})
        with results.writing(TABLE) as path, parquet.ParquetWriter(path, schema) as writer:
            for part in _parts(data.splitlines()):
                writer.write_table(pa.Table.from_pylist(part, schema))
    return results.folder / TABLE


def _parts(lines: list[bytes]) -> Iterator[list[dict[str, Any]]]:
    for first in range(0, len(lines), PART):
        rows = []
        for facts in map(json.loads, lines[first : first + PART]):
            request = facts["request"]
            shown = {name: request[name] for name in ("prompt", "width", "height")}
            rows.append({**facts, **shown, "request": json.dumps(request, ensure_ascii=False)})
        yield rows


def _mark_of(results: Results | RemoteResults) -> bytes | None:
    """Of the results that the table was made from; None where there is none that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with results.open(TABLE) as file:
            return (parquet.read_schema(file).metadata or {}).get(_SOURCE)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
