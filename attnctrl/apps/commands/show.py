"""`attnctrl show`: the request of a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def show(image: Annotated[Path, typer.Argument(help="A picture of `attnctrl generate` or `batch`.")]) -> None:
    """Print the request that a picture was made from, as JSON."""
    from ..batch.pictures import read_request

    typer.echo(json.dumps(read_request(image), indent=2, ensure_ascii=False))
