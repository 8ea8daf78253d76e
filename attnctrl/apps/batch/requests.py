"""Requests: the rows of a file, checked before anything is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AttnCtrlError
from .request import Request, check_values, dump, published_schema
from .rows import ENDINGS, Row, read_rows
from .schema import short, told


if TYPE_CHECKING:
    from .results import Done

__all__ = [
    "ENDINGS",
    "Entry",
    "Problem",
    "Request",
    "Row",
    "check_values",
    "digest",
    "published_schema",
    "read_requests",
    "read_rows",
    "told",
]


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
    key = hashlib.blake2b(dump([options, defaults, ending]), digest_size=32).digest()
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
    phrases = any(region.get("of_prompt") for one in settings["controls"] for region in one.get("regions") or ())
    group = digest([single, request.negative_prompt is None, *([request.prompt] if phrases else [])])
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


def digest(value: Any) -> str:
    return hashlib.blake2b(dump(value), digest_size=10).hexdigest()
