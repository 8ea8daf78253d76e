"""A requests file of the page: checked as `attnctrl batch` does, drawn picture by picture, handed back as one zip."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from ...errors import AttnCtrlError
from ..batch.requests import Entry, read_requests
from ..batch.results import Done
from ..batch.rows import ENDINGS, read_rows
from ..batch.schema import told
from .limits import ROWS, check_upload, too_much, unsafe_parts
from .progress import Step, Stopped
from .studio import Picture, Studio


def read_file(path: str, defaults: dict[str, Any]) -> tuple[list[Entry], list[str]]:
    """(rows that are right, what is wrong with the others: one line each)."""
    file = check_upload(path, tuple(ENDINGS))
    try:
        wrong = []
        for count, row in enumerate(read_rows(file), 1):
            if count > ROWS:
                raise AttnCtrlError(f"{file.name!r} has more than {ROWS} rows\nHINT: attnctrl batch draws any number")
            try:
                wrong += [f"line {row.line}: {reason}" for reason in unsafe_parts(row.values())]
            except AttnCtrlError:
                continue  # told below, with the other rows
        if wrong:
            return [], wrong
        entries, problems = read_requests(file, {}, defaults, "png", Done())
    except AttnCtrlError as error:
        raise AttnCtrlError(str(error).replace(str(file), file.name)) from None
    wrong = [str(problem) for problem in problems]
    wrong += [f"line {entry.row.line}: {reason}" for entry in entries for reason in too_much(entry.request)]
    count = sum(entry.images for entry in entries)
    if count > ROWS:
        wrong.append(f"{count} pictures are more than this page draws, {ROWS}; attnctrl batch draws any number")
    return entries, wrong


def draw_file(
    studio: Studio, entries: Sequence[Entry], folder: Path, stop: Event, archive: Path
) -> Iterator[tuple[int, Step | Picture | str]]:
    """(pictures done, what happened): a step, a picture, or the error of one. What was made until Stop stands in the archive."""
    lines, done = [], 0
    with zipfile.ZipFile(archive, "w") as target:
        try:
            for entry in entries:
                request = entry.request
                for number, name in enumerate(request.files("png")):
                    one = dataclasses.replace(request, seed=request.seed + number, num_images=1)
                    line = {"id": request.id, "image": number, "file": name}
                    try:
                        for event in studio.draw([(request.id, one)], folder, stop):
                            if isinstance(event, Picture):
                                done += 1
                                target.write(event.file, name)
                                lines.append({**line, "request": event.facts})
                            yield done, event
                    except Stopped:
                        raise
                    except Exception as error:  # one request that fails does not end the others
                        done += 1
                        lines.append({**line, "error": told(error)})
                        yield done, f"{request.id}: {told(error)}"
        finally:
            target.writestr("results.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
