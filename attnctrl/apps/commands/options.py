"""Options that several commands share, and how commands talk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer


REGIONS, HEADS, MODEL, PICTURES, FILES = "Regions", "Perturbed heads (SoftPAG)", "Model", "Pictures", "Files"
CONTROLS = "Any control"

Model = Annotated[
    str, typer.Option("--model", "-m", help="A built-in model, a local folder or a hub id.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16.", show_default="bfloat16 on CUDA, else float32", rich_help_panel=MODEL
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or mps.", show_default="the best", rich_help_panel=MODEL)
]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.", rich_help_panel=MODEL)]
Revision = Annotated[str | None, typer.Option(help="Revision on the hub.", rich_help_panel=MODEL)]
Lora = Annotated[str | None, typer.Option(help="LoRA weights: a file, folder or hub id.", rich_help_panel=MODEL)]
Backend = Annotated[
    str | None,
    typer.Option(help="diffusers' attention backend where no control acts.", rich_help_panel=MODEL),
]
Offload = Annotated[
    bool, typer.Option("--cpu-offload", help="Keep parts that do not work on the CPU.", rich_help_panel=MODEL)
]
Steps = Annotated[int, typer.Option(rich_help_panel=PICTURES)]
Height = Annotated[int | None, typer.Option(show_default="the model's", rich_help_panel=PICTURES)]
Width = Annotated[int | None, typer.Option(show_default="the model's", rich_help_panel=PICTURES)]
BatchSize = Annotated[int, typer.Option(help="Pictures made at a time.", rich_help_panel=PICTURES)]
Workers = Annotated[int | None, typer.Option(help="Workers of --engine ray.", show_default="one a GPU, at least 1")]
TextTokens = Annotated[
    int | None,
    typer.Option(
        help="Text tokens of the long encoder; 1 is enough for built-in models.",
        show_default="the pipeline's",
        rich_help_panel=PICTURES,
    ),
]


def tell(made: Iterable[Any], messages: bool) -> None:
    """Files, as paths or addresses, on stdout; messages, which are texts, on stderr."""
    for item in made:
        if not isinstance(item, str):
            typer.echo(item)
        elif messages:
            typer.echo(item, err=True)


def flags(names: Iterable[str]) -> str:
    """Options by the names of their arguments: ``--batch-size, --seed``."""
    return ", ".join("--" + name.replace("_", "-") for name in names)
