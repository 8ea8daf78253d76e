"""Makes the pictures of `docs/gallery.md` by running its code blocks, in order and in one namespace.

A block that leaves a variable `pictures`, name to picture or to a list of pictures, gives the picture of its section: one row a name.

    python -m benchmarks.gallery [--only soft-pag isolation]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont


PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
TILE, GAP, LABEL = 256, 8, 26
_PIECE = re.compile(
    r"^#{2,3} (?P<title>[^\n]+)$|^```python\n(?P<code>.*?)^```$|^!\[[^\n]*\]\((?P<picture>[^\n]+)\)$", re.M | re.S
)


def sections(text: str) -> Iterator[tuple[str, str, Path | None]]:
    """(title, code, picture) of every block of the page; the picture is the first one behind it."""
    title, code = "", ""
    for piece in _PIECE.finditer(text):
        if piece["title"]:
            if code:
                yield title, code, None
            title, code = piece["title"], ""
        elif piece["code"]:
            code = piece["code"]
        elif code:
            yield title, code, Path(piece["picture"])
            code = ""
    if code:
        yield title, code, None


def rows(pictures: Mapping[str, Image.Image | Sequence[Image.Image]]) -> Image.Image:
    """Single pictures side by side with their names above; lists one below the other, a row a name."""
    if all(isinstance(one, Image.Image) for one in pictures.values()):
        lines = [[(name, one) for name, one in pictures.items()]]
    else:
        lines = [[(name if not i else "", one) for i, one in enumerate(many)] for name, many in pictures.items()]
    wide, high = max(map(len, lines)) * (TILE + GAP) - GAP, len(lines) * (TILE + LABEL + GAP) - GAP
    out = Image.new("RGB", (wide, high), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(16)
    for row, line in enumerate(lines):
        for column, (name, picture) in enumerate(line):
            x, y = column * (TILE + GAP), row * (TILE + LABEL + GAP)
            pen.text((x, y + 3), name, fill="black", font=font)
            out.paste(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y + LABEL))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", help="names of pictures, without .png; other blocks are not run but the first of all"
    )
    asked = parser.parse_args()
    known: dict[str, Any] = {"Image": Image}
    blocks = list(sections(PAGE.read_text(encoding="utf-8")))
    if unknown := set(asked.only or ()) - {target.stem for _, _, target in blocks if target}:
        parser.error(f"no such picture: {', '.join(sorted(unknown))}")
    for title, code, target in blocks:
        if target and asked.only and target.stem not in asked.only:
            continue
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), known)
        if target is not None:
            file = PAGE.parent / target
            file.parent.mkdir(parents=True, exist_ok=True)
            rows(known["pictures"]).save(file, optimize=True)
            print(f"{title}: {file.relative_to(PAGE.parents[1])}", flush=True)


if __name__ == "__main__":
    main()
