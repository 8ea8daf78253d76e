"""An attention call of a model, described so that controls need not know the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Site:
    """One attention module.

    `path` is the module's name in the denoiser, `layer` the running number that heads are addressed by (``"3.5"`` is head 5 of
    layer 3). `streams` is the order of token streams along the sequence, e.g. ("image", "text") for SD3, ("text", "image")
    for FLUX. `primary` is False for sites that no layer number selects, such as the image-only second attention of SD3.5;
    they are addressed by path.
    """

    path: str
    layer: int
    kind: Literal["self", "cross", "joint"]
    heads: int
    streams: tuple[str, ...]
    primary: bool = True


@dataclass(frozen=True)
class Block:
    """One transformer block: its path, its layer number, and the token streams that go in and come out.

    `takes` maps streams to arguments of the block's `forward`, `gives` lists the streams that it returns, in order. A block of a
    model that concatenates text and image before it takes and gives the stream "sequence".
    """

    path: str
    layer: int
    takes: tuple[tuple[str, str], ...]
    gives: tuple[str, ...]
    streams: tuple[str, ...]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one call at one site: named streams in order, (name, start, stop), and the grid of the image: (rows, columns),
    or (frames, rows, columns) for video.

    Streams: "image", "text", "reference" (tokens of reference pictures, behind the image), others that a family names and, when a control appended prompts, "region:0", "region:1", …
    """

    streams: tuple[tuple[str, int, int], ...]
    grid: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.streams[-1][2]

    def span(self, name: str) -> slice | None:
        return next((slice(start, stop) for stream, start, stop in self.streams if stream == name), None)


def lay_out(
    streams: tuple[str, ...], lengths: dict[str, int], grid: tuple[int, ...], regions: tuple[int, ...] = ()
) -> Tokens:
    """Places the streams of a site. Region prompts stand before the base prompt, so that base and image stay neighbours where
    the text comes first, and behind it where the image comes first."""
    placed: list[tuple[str, int, int]] = []
    at = 0
    for name in streams:
        block = [(name, lengths[name])]
        if name == "text" and regions:
            extra = [(f"region:{i}", length) for i, length in enumerate(regions)]
            block = extra + block if streams[0] == "text" else block + extra
        for stream, length in block:
            placed.append((stream, at, at + length))
            at += length
    return Tokens(tuple(placed), grid)
