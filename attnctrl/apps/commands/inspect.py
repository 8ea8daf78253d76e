"""`attnctrl inspect`: what a model carries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import AttnCtrlError


def inspect(
    model: Annotated[str, typer.Argument(help="A built-in model, a local folder or a hub id.")],
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    sinks: Annotated[
        bool,
        typer.Option(
            "--sinks",
            help="Measure which dimensions mark attention sinks, for VAR. Language models; loads the weights.",
        ),
    ] = False,
    image: Annotated[
        list[Path] | None, typer.Option(help="With --sinks: a picture to measure on, beside texts. Repeat it.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="With --sinks: what stands out, in multiples of the RMS.", show_default="20")
    ] = None,
) -> None:
    """Show a model's attention sites and the controls that it carries, without loading weights; with --sinks, its sink dimensions."""
    from ..inspection_language import inspect_language, inspect_sinks, is_language_model

    if sinks:
        typer.echo(inspect_sinks(model, revision, image or (), 20.0 if tau is None else tau))
        return
    if image or tau is not None:
        raise AttnCtrlError(
            f"{'--image' if image else '--tau'} belongs to --sinks\nHINT: attnctrl inspect MODEL --sinks"
        )
    if is_language_model(model, revision):
        typer.echo(inspect_language(model, revision))
        return
    from ..inspection import inspect_model

    typer.echo(inspect_model(model, revision))
