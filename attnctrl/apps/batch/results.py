"""The results of a run: which pictures exist, one line of JSON each, written so that a kill at any moment loses nothing.

A picture is written under another name, moved to its own, and only then appended to the results; a line that a kill cut short is
dropped by the next run. Lines begin with what that run needs, in a fixed order, so that 100,000 of them are read without a JSON
parser. Several processes (`accelerate launch`) write a file each, which the last one to finish merges.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout

from ...errors import AttnCtrlError


if TYPE_CHECKING:
    from .remote import Address

RESULTS = "results.jsonl"
_HEAD = re.compile(
    rb'\{"id": "([^"\\]*)", "image": (\d+), "images": (\d+), "row": "(\w+)", "group": "(\w+)", "fingerprint": "(\w+)", '
    rb'"file": "([^"\\]*)", '
)
FIELDS = ("id", "image", "images", "row", "group", "fingerprint", "file")


@dataclass(slots=True)
class Made:
    """What exists of one request. `files`: its pictures by their number."""

    id: str
    images: int
    group: str
    fingerprint: str
    files: dict[int, str] = field(default_factory=dict)


@dataclass
class Done:
    """What exists already, by the mark of the row that asked for it and by id."""

    by_row: dict[str, Made] = field(default_factory=dict)
    by_id: dict[str, Made] = field(default_factory=dict)

    def add(self, head: tuple) -> bool:
        """False when the picture is known already."""
        name, image, images, row, group, fingerprint, file = head
        made = self.by_id.get(name)
        if made is None:
            made = self.by_id[name] = Made(name, images, group, fingerprint)
        self.by_row[row] = made
        if image in made.files:
            return False
        made.files[image] = file
        return True


class Results:
    """The results in an output folder, held by one process; a context manager.

    Args:
        rank, world: the number of this process and how many there are.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1):
        self.folder, self.rank, self.world = folder, rank, world
        self.suffix = f".rank{rank}" if world > 1 else ""
        self.path = folder / f"results{self.suffix}.jsonl"
        self.failed = folder / f"failed{self.suffix}.jsonl"
        self.rejected = folder / "rejected.jsonl"
        self._temporary = folder / f".writing{self.suffix}.tmp"
        self._held = ExitStack()

    def __enter__(self) -> Results:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._root = self.folder.resolve()
        try:
            with ExitStack() as held:
                held.enter_context(_lock(self.path))
                _drop_torn_line(self.path)
                self.done = self._merge() if self.world == 1 else self._read()[0]
                self._held = held.pop_all()
        except Timeout:
            raise AttnCtrlError(
                f"another run is writing to {str(self.folder)!r}\nHINT: wait for it, or another --output"
            ) from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._temporary.unlink(missing_ok=True)
        self._held.close()
        if self.world > 1:
            try:
                with _lock(self.folder / RESULTS):
                    self._merge()
            except Timeout:
                pass  # another process still writes; the last one merges

    def _read(self) -> tuple[Done, bool]:
        """What exists, and whether every line says something new about a picture that is there."""
        done, there, clean = Done(), _files_below(self.folder), True
        for path in _parts(self.folder):
            for line in _lines(path):
                head = read_head(line, path)
                clean = head[-1] in there and done.add(head) and clean
        return done, clean

    def _merge(self) -> Done:
        """Makes all parts one file, without pictures that are gone or written twice. Raises Timeout while a part is being written."""
        others = [path for path in _parts(self.folder) if path.name != RESULTS]
        with ExitStack() as held:
            for path in others:
                held.enter_context(_lock(path))
            done, clean = self._read()
            if clean and not others:
                return done
            kept, there = Done(), _files_below(self.folder)
            with self._temporary.open("wb") as file:
                for path in _parts(self.folder):
                    for line in _lines(path):
                        head = read_head(line, path)
                        if head[-1] in there and kept.add(head):
                            file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._temporary, self.folder / RESULTS)
            for path in others:
                path.unlink()
        return done

    def commit(self, made: Sequence[tuple[dict[str, Any], bytes]]) -> None:
        """Writes pictures, then their lines. Every line's facts begin as `head` makes them."""
        for facts, data in made:
            self._write_picture(facts["file"], data)
        self._append(self.path, (facts for facts, _ in made))
        for facts, _ in made:
            self.done.add(tuple(facts[name] for name in FIELDS))

    def _write_picture(self, name: str, data: bytes) -> None:
        target = self.folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.parent.resolve().is_relative_to(self._root):
                raise AttnCtrlError(f"{str(target)!r} lies outside of the output folder, behind a link")
            with self._temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._temporary, target)
        except OSError as error:
            raise AttnCtrlError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error

    def fail(self, facts: Iterable[dict[str, Any]]) -> None:
        self._append(self.failed, facts)

    def reject(self, facts: Iterable[dict[str, Any]]) -> None:
        """Keeps the rows that are left out, in place of those of earlier runs."""
        data = b"".join(map(as_line, facts))
        if data:
            self._temporary.write_bytes(data)
            os.replace(self._temporary, self.rejected)
        else:
            self.rejected.unlink(missing_ok=True)

    def forget_failures(self) -> None:
        """Failures are those of the last run: the next one tries again."""
        self.failed.unlink(missing_ok=True)

    @property
    def written(self) -> Path:
        """The file of all results, or of this process while others write."""
        return self.folder / (RESULTS if (self.folder / RESULTS).is_file() else self.path.name)

    def open(self, name: str) -> BinaryIO:
        return (self.folder / name).open("rb")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file that gets its name when it is written."""
        temporary = self.folder / f"{name}.tmp"
        yield temporary
        os.replace(temporary, self.folder / name)

    def _append(self, path: Path, facts: Iterable[dict[str, Any]]) -> None:
        data = b"".join(map(as_line, facts))
        try:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise AttnCtrlError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def head(name: str, image: int, images: int, row: str, group: str, fingerprint: str, file: str) -> dict[str, Any]:
    """What a result's line begins with."""
    return dict(zip(FIELDS, (name, image, images, row, group, fingerprint, file)))


def as_line(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_head(line: bytes, path: Path | Address) -> tuple:
    """What `head` wrote. `path`: where the line stands, for the error."""
    if match := _HEAD.match(line):
        name, image, images, row, group, fingerprint, file = match.groups()
        return (
            name.decode(),
            int(image),
            int(images),
            row.decode(),
            group.decode(),
            fingerprint.decode(),
            file.decode(),
        )
    try:
        facts = json.loads(line)
        return tuple(facts[name] for name in FIELDS)
    except (ValueError, KeyError, TypeError):
        raise AttnCtrlError(
            f"{str(path)!r} has a line that is no result: {line[:60]!r}\nHINT: remove the line, or another --output"
        ) from None


def _parts(folder: Path) -> list[Path]:
    """`results.jsonl` first, then those of several processes."""
    return [path for path in (folder / RESULTS, *sorted(folder.glob("results.rank*.jsonl"))) if path.is_file()]


def _lines(path: Path) -> Iterable[bytes]:
    """Whole lines; one that is being written, or that a kill cut short, has no end."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _drop_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size = keep = file.seek(0, os.SEEK_END)
        while keep:
            start = max(0, keep - 65_536)
            file.seek(start)
            block = file.read(keep - start)
            if b"\n" in block:
                keep = start + block.rindex(b"\n") + 1
                break
            keep = start
        if keep < size:
            file.truncate(keep)


def _files_below(folder: Path) -> set[str]:
    found, waiting = set(), [""]
    while waiting:
        at = waiting.pop()
        with os.scandir(folder / at) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{at}{entry.name}/")
                else:
                    found.add(f"{at}{entry.name}")
    return found


def _lock(path: Path) -> FileLock:
    """Held until it is released or the process dies. Raises Timeout at once when another process holds it."""
    return FileLock(path.with_name(f".{path.stem}.lock"), timeout=0)
