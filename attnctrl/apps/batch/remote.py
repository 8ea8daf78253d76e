"""Results behind fsspec: s3://, gs://, az://, sftp://, memory://, file:// and whatever else has a file system there.

Object stores cannot append to a file, and whole objects alone appear at once. So the lines of a run go into parts, `results-….jsonl`: after
every batch a new part holds the lines since the last full one, and then its predecessor goes. A run that ends puts all parts together as
results.jsonl. Nothing is removed before what replaces it is there, and lines without an end do not count, so file systems on which
a kill leaves half a file lose nothing either. There is no lock: two runs with one address at the same time make the same pictures twice.
"""

from __future__ import annotations

import posixpath
import re
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import AttnCtrlError
from .results import FIELDS, RESULTS, Done, as_line, read_head


FULL = 256  # lines of a part
_PART = re.compile(r"results(-[\w-]+)?\.jsonl")


@dataclass(frozen=True)
class Address:
    """A folder or file behind fsspec, such as ``s3://bucket/pictures``."""

    text: str

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.text.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.text


class RemoteResults:
    """The results at an address; what `Results` is for a folder."""

    def __init__(self, folder: Address, rank: int = 0, world: int = 1):
        self.folder, self.world = folder, world
        suffix = f".rank{rank}" if world > 1 else ""
        self.failed, self.rejected = folder / f"failed{suffix}.jsonl", folder / "rejected.jsonl"
        self.written = folder / (RESULTS if world == 1 else "results-*.jsonl")
        self._run = f"results-{time.time_ns()}-{rank}-{uuid.uuid4().hex[:8]}"
        self._parts, self._part, self._lines = 0, None, []
        self._failures: list[bytes] = []
        self._folders: set[str] = set()

    def __enter__(self) -> RemoteResults:
        self._fs, self._root = _file_system(self.folder)
        with self._told():  # an address that cannot be written to is told before pictures are made
            self._put(f".{self._run}", b"attnctrl")
            self._remove(f".{self._run}")
            self.done = self._merge() if self.world == 1 else self._read()[0]
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if kind is None and self.world == 1:
            with self._told():
                self._merge()

    def _read(self) -> tuple[Done, list[bytes], list[str], bool]:
        """(what exists, its lines, the files with lines, whether results.jsonl is all there is and every line of it is needed)."""
        self._fs.invalidate_cache()
        there = {path[len(self._root) + 1 :] for path in self._fs.find(self._root)}
        parts = sorted(filter(_PART.fullmatch, there), key=lambda name: (name != RESULTS, name))
        done, kept, clean = Done(), [], parts in ([], [RESULTS])
        for part in parts:
            try:
                data = self._fs.cat_file(self._at(part))
            except FileNotFoundError:  # another process has just put a longer one in its place
                continue
            for line in data.splitlines(keepends=True):
                head = read_head(line, self.folder / part) if line.endswith(b"\n") else None
                if head is not None and head[-1] in there and done.add(head):
                    kept.append(line)
                else:
                    clean = False
        return done, kept, parts, clean

    def _merge(self) -> Done:
        """Makes all parts one file, without pictures that are gone or written twice."""
        done, kept, parts, clean = self._read()
        if not clean:
            data, whole = b"".join(kept), f"{self._run}-whole.jsonl"
            self._put(whole, data)  # holds the lines should the next be cut short
            self._put(RESULTS, data)
            for part in (*parts, whole):
                if part != RESULTS:
                    self._remove(part)
        return done

    def commit(self, made: Sequence[tuple[dict[str, Any], bytes]]) -> None:
        """Writes pictures, then their lines. Every line's facts begin as `head` makes them."""
        if not made:
            return
        with self._told():
            for facts, _ in made:
                self._make_folder(facts["file"])
            self._fs.pipe({self._at(facts["file"]): data for facts, data in made})
            self._lines += [as_line(facts) for facts, _ in made]
            part = f"{self._run}-{self._parts:06d}-{len(self._lines):06d}.jsonl"
            self._put(part, b"".join(self._lines))
            if self._part is not None:
                self._remove(self._part)
            self._part = part
            if len(self._lines) >= FULL:
                self._parts, self._part, self._lines = self._parts + 1, None, []
        for facts, _ in made:
            self.done.add(tuple(facts[name] for name in FIELDS))

    def fail(self, facts: Iterable[dict[str, Any]]) -> None:
        self._failures += map(as_line, facts)
        with self._told():
            self._put(_name(self.failed), b"".join(self._failures))

    def reject(self, facts: Iterable[dict[str, Any]]) -> None:
        """Keeps the rows that are left out, in place of those of earlier runs."""
        data = b"".join(map(as_line, facts))
        with self._told():
            self._put(_name(self.rejected), data) if data else self._remove(_name(self.rejected))

    def forget_failures(self) -> None:
        """Failures are those of the last run: the next one tries again."""
        with self._told():
            self._remove(_name(self.failed))

    def open(self, name: str) -> BinaryIO:
        return self._fs.open(self._at(name), "rb")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file on this machine that is put under its name when it is written."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            yield path
            with self._told():
                self._fs.put_file(str(path), self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put(self, name: str, data: bytes) -> None:
        self._make_folder(name)
        self._fs.pipe_file(self._at(name), data)

    def _make_folder(self, name: str) -> None:
        folder = posixpath.dirname(self._at(name))
        if folder and folder not in self._folders:
            self._fs.makedirs(folder, exist_ok=True)
            self._folders.add(folder)

    def _remove(self, name: str) -> None:
        try:
            self._fs.rm_file(self._at(name))
        except FileNotFoundError:
            pass

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except AttnCtrlError:
            raise
        except Exception as error:  # every file system has errors of its own
            text = " ".join(str(error).split())[:300]
            raise AttnCtrlError(
                f"output {str(self.folder)!r} cannot be used: {type(error).__name__}: {text}"
            ) from error


def _file_system(folder: Address) -> tuple[Any, str]:
    """(fsspec's file system, the folder in it)."""
    from fsspec.core import url_to_fs

    try:
        file_system, root = url_to_fs(str(folder))
    except ImportError as error:
        package = re.search(r"[Ii]nstall (\w+)", str(error))
        hint = f"\nHINT: pip install {package[1]}" if package else ""
        raise AttnCtrlError(f"output {str(folder)!r} needs another package: {error}{hint}") from None
    except Exception as error:  # an unknown protocol, no credentials, …
        hint = "\nHINT: a folder, or an address such as s3://bucket/folder or gs://bucket/folder"
        raise AttnCtrlError(f"output {str(folder)!r} cannot be used: {' '.join(str(error).split())}{hint}") from None
    return file_system, root.rstrip("/")


def _name(address: Address) -> str:
    return posixpath.basename(str(address))
