"""`attnctrl hunt`: search for heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    FILES,
    HEADS,
    PICTURES,
    Backend,
    BatchSize,
    Device,
    Dtype,
    Height,
    Lora,
    Model,
    Offload,
    Revision,
    Steps,
    TextTokens,
    Variant,
    Width,
    Workers,
)


SEARCH = "Search"


def hunt(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What candidates draw. Repeat it.", rich_help_panel=SEARCH)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one a line.", rich_help_panel=SEARCH)
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="What pictures are scored by: icons (built-in models), open_clip:MODEL:PRETRAINED, torchmetrics:METRIC:MODEL, or "
            "package.module:function, called as f(images, prompts).",
            rich_help_panel=SEARCH,
        ),
    ] = "icons",
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,…",
            help="Noise seeds; every prompt is drawn with each.",
            show_default="one picture a prompt, prompt i with SEED + i",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(rich_help_panel=SEARCH)] = 5,
    per_round: Annotated[int, typer.Option(help="Heads chosen in a round.", rich_help_panel=SEARCH)] = 3,
    pool: Annotated[
        str | None,
        typer.Option(
            help="Heads that may be chosen: '3.5,4.2' or a head-set file.", show_default="all", rich_help_panel=SEARCH
        ),
    ] = None,
    min_layer: Annotated[
        int | None, typer.Option(help="Leave out the layers before.", show_default="0", rich_help_panel=SEARCH)
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="full: every head on every prompt; halving: worse heads drop out after a quarter and a half of them.",
            rich_help_panel=SEARCH,
        ),
    ] = "full",
    scale: Annotated[float, typer.Option(help="Weight of the guidance.", rich_help_panel=HEADS)] = 3.0,
    strength: Annotated[
        float, typer.Option(help="How far heads are moved to the target, 0-1.", rich_help_panel=HEADS)
    ] = 1.0,
    target: Annotated[str, typer.Option(help="identity, uniform or mean_query.", rich_help_panel=HEADS)] = "identity",
    engine: Annotated[
        str, typer.Option(help="local: this process; ray: candidates are scored by workers of a Ray cluster.")
    ] = "local",
    workers: Workers = None,
    model: Model = "builtin:icons-t2i",
    dtype: Dtype = None,
    device: Device = None,
    variant: Variant = None,
    revision: Revision = None,
    lora: Lora = None,
    attention_backend: Backend = None,
    cpu_offload: Offload = False,
    seed: Annotated[
        int, typer.Option(help="See --seeds; also the order of prompts in halving.", rich_help_panel=PICTURES)
    ] = 0,
    steps: Steps = 20,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance during the search.", show_default="none", rich_help_panel=PICTURES
        ),
    ] = None,
    height: Height = None,
    width: Width = None,
    batch_size: BatchSize = 8,
    max_sequence_length: TextTokens = None,
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder of scores and results. The same command goes on where it was stopped.",
            rich_help_panel=FILES,
        ),
    ] = Path("hunt"),
) -> None:
    """Search for the heads whose perturbation serves an objective (HeadHunter).

    The written files are printed, one a line: the head set for `generate --heads`, a map, and every head's score.
    """
    from ..hunt import Search, run_search

    search = Search(
        prompts=tuple(prompt or ()),
        file=prompts,
        objective=objective,
        seeds=seeds,
        model=model,
        dtype=dtype,
        device=device,
        variant=variant,
        revision=revision,
        lora=lora,
        attention_backend=attention_backend,
        cpu_offload=cpu_offload,
        output=output,
        engine=engine,
        workers=workers,
        options={
            "rounds": rounds,
            "per_round": per_round,
            "pool": pool,
            "min_layer": min_layer,
            "strategy": strategy,
            "scale": scale,
            "strength": strength,
            "target": target,
            "seed": seed,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "batch_size": batch_size,
        },
        call={"height": height, "width": width, "max_sequence_length": max_sequence_length},
    )
    for path in run_search(search):
        typer.echo(path)
