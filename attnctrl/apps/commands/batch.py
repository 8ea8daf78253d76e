"""`attnctrl batch`: pictures from a file of requests."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ...errors import AttnCtrlError
from .options import (
    FILES,
    PICTURES,
    Backend,
    Device,
    Dtype,
    Lora,
    Model,
    Offload,
    Revision,
    Variant,
    Workers,
    tell,
)


LEFT_OUT = "Of rows that leave it out."


def batch(
    requests: Annotated[
        Path | None,
        typer.Argument(metavar="REQUESTS", help="A .jsonl, .csv, .tsv or .parquet file, one request a row."),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder of pictures and results, or its address: s3://…, gs://… The same command goes on where it was stopped.",
            rich_help_panel=FILES,
        ),
    ] = "batch",
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a row, and stop.")] = False,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave wrong rows out; they are written to rejected.jsonl.")
    ] = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Stop at the first picture that cannot be made.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(help="local: this process (`accelerate launch` runs several); ray: workers of a Ray cluster."),
    ] = "local",
    workers: Workers = None,
    image_format: Annotated[str, typer.Option(help="png, or webp (lossless).", rich_help_panel=FILES)] = "png",
    record_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="Beside results.jsonl: parquet, results.parquet; webdataset, tar shards (--shard-size, 1000).",
            rich_help_panel=FILES,
        ),
    ] = "jsonl",
    shard_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Also write tar shards of N pictures and their results (WebDataset).",
            rich_help_panel=FILES,
        ),
    ] = None,
    model: Model = "builtin:icons-t2i",
    dtype: Dtype = None,
    device: Device = None,
    variant: Variant = None,
    revision: Revision = None,
    lora: Lora = None,
    attention_backend: Backend = None,
    cpu_offload: Offload = False,
    batch_size: Annotated[
        int,
        typer.Option(help="Pictures of one shape and one set of controls made at a time.", rich_help_panel=PICTURES),
    ] = 4,
    negative_prompt: Annotated[str | None, typer.Option(help=LEFT_OUT, rich_help_panel=PICTURES)] = None,
    seed: Annotated[int | None, typer.Option(help=LEFT_OUT, show_default="0", rich_help_panel=PICTURES)] = None,
    steps: Annotated[int | None, typer.Option(help=LEFT_OUT, show_default="24", rich_help_panel=PICTURES)] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help=LEFT_OUT, show_default="4", rich_help_panel=PICTURES)
    ] = None,
    height: Annotated[
        int | None, typer.Option(help=LEFT_OUT, show_default="the model's", rich_help_panel=PICTURES)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help=LEFT_OUT, show_default="the model's", rich_help_panel=PICTURES)
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(help=LEFT_OUT, show_default="the pipeline's", rich_help_panel=PICTURES)
    ] = None,
) -> None:
    """Make the pictures of a file of requests. Stopped at any moment, the same command goes on.

    Every row is checked first, and nothing is made from a file with wrong ones. Results are in results.jsonl, one line a picture,
    failures in failed.jsonl; the exit code is 1 when a picture could not be made.
    """
    if schema:
        from ..batch.requests import published_schema

        typer.echo(json.dumps(published_schema(), indent=2, ensure_ascii=False))
        return
    if requests is None:
        raise AttnCtrlError("there is no file of requests\nHINT: attnctrl batch requests.jsonl --output DIR")
    from ..batch.remote import Address
    from ..batch.run import Batch, BatchFailed, run
    from ..generate import Job

    address = Address(output) if "://" in output else None
    job = Job(
        prompt="of the requests",
        model=model,
        dtype=dtype,
        device=device,
        variant=variant,
        revision=revision,
        lora=lora,
        attention_backend=attention_backend,
        cpu_offload=cpu_offload,
        batch_size=batch_size,
        output=Path(tempfile.gettempdir() if address else output),
    )
    defaults = {
        "negative_prompt": negative_prompt,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "max_sequence_length": max_sequence_length,
    }
    asked = Batch(
        requests,
        job,
        {name: value for name, value in defaults.items() if value is not None},
        address,
        image_format=image_format.lower(),
        format=record_format.lower(),
        shard_size=shard_size,
        skip_invalid=skip_invalid,
        fail_fast=fail_fast,
        engine=engine,
        workers=workers,
    )
    try:
        tell(run(asked), messages=True)
    except BatchFailed as error:
        typer.echo(f"attnctrl: {error}", err=True)
        raise typer.Exit(1) from None
