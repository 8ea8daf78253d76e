"""`attnctrl ask`: a question about a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import CONTROLS, MODEL, Device, Dtype, Revision


def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.")],
    question: Annotated[list[str], typer.Argument(metavar="QUESTION", help="Several words are joined.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A vision-language model: a built-in one, a local folder or a hub id.",
            rich_help_panel=MODEL,
        ),
    ] = "builtin:icons-vlm",
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME(…)",
            help="A control by its Python name, 'PAI(alpha=0.5)'. Repeat it. `attnctrl inspect` lists which a model carries.",
            rich_help_panel=CONTROLS,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer without the controls too.", rich_help_panel=CONTROLS)
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Say what the controls did.", rich_help_panel=CONTROLS)
    ] = False,
    show_attention: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a picture of where the model looked, the mean over the tokens of its answer; with --compare the one without the "
            "controls stands on the left. The largest value of each is white.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
) -> None:
    """Ask a vision-language model about a picture. The answer is printed, the most likely token each time."""
    from ..ask import Question
    from ..ask import ask as run_ask

    asked = Question(
        image,
        " ".join(question),
        model,
        control or (),
        revision=revision,
        dtype=dtype,
        device=device,
        max_new_tokens=max_new_tokens,
        show_attention=show_attention,
        compare=compare,
        report=report,
    )
    for line, answers in run_ask(asked):
        typer.echo(line, err=not answers)
