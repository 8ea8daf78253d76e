"""WebDataset shards: tar files of pictures and their results."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .results import RESULTS


if TYPE_CHECKING:
    from .remote import Address, RemoteResults
    from .results import Results


def write_shards(results: Results | RemoteResults, size: int) -> Iterator[Path | Address]:
    """Shards of all results in their order: a picture and its line of results, under one running number."""
    with results.open(RESULTS) as file:
        lines = file.read().splitlines()
    for first in range(0, len(lines), size):
        name, part = f"shard-{first // size:06d}.tar", lines[first : first + size]
        if _members(results, name) != 2 * len(part):
            with results.writing(name) as path, tarfile.open(path, "w") as shard:
                for number, line in enumerate(part, first):
                    picture = json.loads(line)["file"]
                    with results.open(picture) as file:
                        _add(shard, f"{number:08d}{PurePosixPath(picture).suffix}", file.read())
                    _add(shard, f"{number:08d}.json", line)
        yield results.folder / name


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def _members(results: Results | RemoteResults, name: str) -> int:
    try:
        with results.open(name) as file, tarfile.open(fileobj=file) as shard:
            return len(shard.getnames())
    except (FileNotFoundError, tarfile.TarError):
        return 0
