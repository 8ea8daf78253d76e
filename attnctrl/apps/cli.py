"""The command line. Only light modules are imported here, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import AttnCtrlError


if TYPE_CHECKING:
    from ..controls import Control

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Control attention in diffusion models.")

REGIONS, HEADS, MODEL, PICTURES, FILES = "Regions", "Perturbed heads (SoftPAG)", "Model", "Pictures", "Files"
CONTROLS = "Any control"
SEARCH = "Search"
LEFT_OUT = "Of rows that leave it out."


# options that several commands share
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


def _version(value: bool) -> None:
    if value:
        typer.echo(f"attnctrl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")
    ] = False,
) -> None:
    pass


@app.command(no_args_is_help=True)
def generate(
    context: typer.Context,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw. Several words are joined.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="IMAGE",
            help="Make a picture again from the request that it carries, bit by bit the same on the same machine. Beside it only "
            "--device, --cpu-offload, --output, --name and --report.",
            rich_help_panel=FILES,
        ),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT@PLACE",
            help="A part of the picture with a prompt of its own, 'a red cat@0,0,0.5,1' (left, top, right, bottom as fractions) or "
            "'a red cat@mask.png' (bright is inside). Repeat it; later ones lie above earlier ones.",
            rich_help_panel=REGIONS,
        ),
    ] = None,
    base_weight: Annotated[
        float | None,
        typer.Option(
            help="Share of the whole prompt inside regions, 0-1.", show_default="0.3", rich_help_panel=REGIONS
        ),
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(
            help="Where regions overlap: union, priority or mean.", show_default="union", rich_help_panel=REGIONS
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            help="What is in no region: base (the whole prompt), error, or a prompt.",
            show_default="base",
            rich_help_panel=REGIONS,
        ),
    ] = None,
    no_isolate: Annotated[
        bool, typer.Option("--no-isolate", help="Regions see the whole picture.", rich_help_panel=REGIONS)
    ] = False,
    trim_text: Annotated[
        int | None, typer.Option(help="Keep the first n text tokens of a region's prompt.", rich_help_panel=REGIONS)
    ] = None,
    region_start: Annotated[
        float | None,
        typer.Option(help="Regions act from this fraction of the steps.", show_default="0", rich_help_panel=REGIONS),
    ] = None,
    region_stop: Annotated[
        float | None,
        typer.Option(
            help="Regions act before this fraction of the steps; isolated to the end they tear the picture apart.",
            show_default="0.3, or 1 with --no-isolate or a later --region-start",
            rich_help_panel=REGIONS,
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Heads to perturb: '3.5,4.2' (layer.head), '3.5:0.7' (weighted), or a head-set file.",
            rich_help_panel=HEADS,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to perturb: '3', '2:6', 'every:2', 'mid' or 'all'.", rich_help_panel=HEADS),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How far heads are moved to the target, 0-1.", show_default="1", rich_help_panel=HEADS),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Weight of the guidance, beside --guidance-scale.", show_default="3", rich_help_panel=HEADS),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="identity, uniform or mean_query.", show_default="identity", rich_help_panel=HEADS),
    ] = None,
    perturb_region: Annotated[
        str | None,
        typer.Option(help="Rows that are perturbed: all or image.", show_default="all", rich_help_panel=HEADS),
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(help="Perturb from this fraction of the steps.", show_default="0", rich_help_panel=HEADS),
    ] = None,
    stop: Annotated[
        float | None,
        typer.Option(help="Perturb before this fraction of the steps.", show_default="1", rich_help_panel=HEADS),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME(…)",
            help="Any control by its Python name, 'SkipLayers(layers=4, scale=2.0)'. Repeat it. `attnctrl inspect` lists which a model "
            "carries.",
            rich_help_panel=CONTROLS,
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
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to keep away from.", rich_help_panel=PICTURES)
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Picture i has seed SEED + i and a CPU generator of its own, so its noise is the same on every device and with "
            "every --batch-size. diffusers-cli makes its generator on the device: its pictures of a seed differ.",
            rich_help_panel=PICTURES,
        ),
    ] = 0,
    steps: Steps = 24,
    guidance_scale: Annotated[
        float, typer.Option(help="Classifier-free guidance; 1 is none.", rich_help_panel=PICTURES)
    ] = 4.0,
    height: Height = None,
    width: Width = None,
    num_images: Annotated[int, typer.Option(rich_help_panel=PICTURES)] = 1,
    batch_size: BatchSize = 1,
    max_sequence_length: TextTokens = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the pictures.", rich_help_panel=FILES)] = Path(
        "outputs"
    ),
    name: Annotated[
        str | None,
        typer.Option(
            help="Pictures are NAME-SEED.png; existing ones are replaced.",
            show_default="from prompt and settings",
            rich_help_panel=FILES,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also make the pictures without control, and a contact sheet of both.",
            rich_help_panel=FILES,
        ),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Say what the controls did.", rich_help_panel=FILES)
    ] = False,
) -> None:
    """Make pictures, with regions, with perturbed heads, with both, or plain.

    The written files are printed, one a line. Pictures carry their request: see `attnctrl show`.
    """
    from .generate import Job, remake, run

    if source is not None:
        given = {name: value for name, value in context.params.items() if _was_given(context, name)}
        beside = {name: given.pop(name) for name in ("device", "cpu_offload", "output", "name") if name in given}
        others = [name for name in given if name not in ("source", "report")]
        if others:
            what = ", ".join("PROMPT" if name == "prompt" else _flags([name]) for name in others)
            raise AttnCtrlError(f"--from takes the whole request from the picture\nHINT: leave out {what}")
        _tell(remake(source, beside, report), messages=True)
        return
    job = Job(
        prompt=" ".join(prompt or ()),
        negative_prompt=negative_prompt,
        model=model,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        num_images=num_images,
        batch_size=batch_size,
        max_sequence_length=max_sequence_length,
        dtype=dtype,
        device=device,
        variant=variant,
        revision=revision,
        attention_backend=attention_backend,
        cpu_offload=cpu_offload,
        lora=lora,
        output=output,
        name=name,
        compare=compare,
    )
    regional = {
        "base_weight": base_weight,
        "overlap": overlap,
        "background": background,
        "isolate": False if no_isolate else None,
        "trim_text": trim_text,
        "start": region_start,
        "stop": region_stop,
    }
    perturbing = {
        "strength": strength,
        "scale": scale,
        "target": target,
        "region": perturb_region,
        "start": start,
        "stop": stop,
    }
    controls = build_controls(region or (), regional, heads, layers, perturbing, control or ())
    _tell(run(job, controls), report)


def _tell(made: Iterable[Any], messages: bool) -> None:
    """Files, as paths or addresses, on stdout; messages, which are texts, on stderr."""
    for item in made:
        if not isinstance(item, str):
            typer.echo(item)
        elif messages:
            typer.echo(item, err=True)


def _was_given(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name not in ("DEFAULT", "DEFAULT_MAP")


@app.command(no_args_is_help=True)
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
        from .batch.requests import published_schema

        typer.echo(json.dumps(published_schema(), indent=2, ensure_ascii=False))
        return
    if requests is None:
        raise AttnCtrlError("there is no file of requests\nHINT: attnctrl batch requests.jsonl --output DIR")
    from .batch.remote import Address
    from .batch.run import Batch, BatchFailed, run
    from .generate import Job

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
        _tell(run(asked), messages=True)
    except BatchFailed as error:
        typer.echo(f"attnctrl: {error}", err=True)
        raise typer.Exit(1) from None


@app.command(no_args_is_help=True)
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
    from .hunt import Search, run_search

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


@app.command()
def demo(
    model: Model = "builtin:icons-t2i",
    dtype: Dtype = None,
    device: Device = None,
    variant: Variant = None,
    revision: Revision = None,
    lora: Lora = None,
    attention_backend: Backend = None,
    cpu_offload: Offload = False,
    vlm: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A vision-language model, a local folder or a hub id: the page gets a tab for questions about pictures.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    allow_model_choice: Annotated[
        bool, typer.Option("--allow-model-choice", help="Visitors may load other models.", rich_help_panel=MODEL)
    ] = False,
    host: Annotated[
        str, typer.Option(help="Who can reach it: 127.0.0.1 is this machine alone, 0.0.0.0 anybody.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(show_default="the first free one from 7860 on")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page.")] = False,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Serve the endpoints as tools of the Model Context Protocol too.")
    ] = False,
) -> None:
    """Open the toolkit in a browser: draw boxes, choose heads, run files of requests, ask about pictures. Needs `pip install 'attnctrl[demo]'`."""
    from .demo.serve import serve
    from .generate import Job

    job = Job(
        prompt="of the page",
        model=model,
        dtype=dtype,
        device=device,
        variant=variant,
        revision=revision,
        lora=lora,
        attention_backend=attention_backend,
        cpu_offload=cpu_offload,
        output=Path(tempfile.gettempdir()),
    )
    serve(job, host, port, allow_model_choice, mcp, browser, vlm=vlm)


@app.command(no_args_is_help=True)
def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.")],
    question: Annotated[list[str], typer.Argument(metavar="QUESTION", help="Several words are joined.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A vision-language model: a local folder or a hub id.", rich_help_panel=MODEL
        ),
    ] = "",
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
    from .ask import Question
    from .ask import ask as run_ask

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


@app.command(no_args_is_help=True)
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
    from .inspection_language import inspect_language, inspect_sinks, is_language_model

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
    from .inspection import inspect_model

    typer.echo(inspect_model(model, revision))


@app.command(no_args_is_help=True)
def show(image: Annotated[Path, typer.Argument(help="A picture of `attnctrl generate` or `batch`.")]) -> None:
    """Print the request that a picture was made from, as JSON."""
    from .batch.pictures import read_request

    typer.echo(json.dumps(read_request(image), indent=2, ensure_ascii=False))


def build_controls(
    regions: Sequence[str],
    regional: dict[str, Any],
    heads: str | None,
    layers: str | None,
    perturbing: dict[str, Any],
    others: Sequence[str] = (),
) -> list[Control]:
    """The controls that the options ask for. Options without the one that switches their control on are refused."""
    regional = {name: value for name, value in regional.items() if value is not None}
    perturbing = {name: value for name, value in perturbing.items() if value is not None}
    from .generate import EARLY

    flags = {"region": "perturb-region"}
    if perturbing and heads is None and layers is None:
        raise AttnCtrlError(
            f"{_flags(flags.get(name, name) for name in perturbing)} needs the heads to perturb\nHINT: --heads 3.5,4.2 or --layers mid"
        )
    if regional and not regions:
        flags = {"isolate": "no-isolate", "start": "region-start", "stop": "region-stop"}
        raise AttnCtrlError(
            f"{_flags(flags.get(name, name) for name in regional)} needs a region\nHINT: --region 'a red cat@0,0,0.5,1'"
        )
    if regions and "isolate" not in regional and regional.get("start", 0) < EARLY:
        regional.setdefault("stop", EARLY)
    if not math.isfinite(perturbing.get("scale", 0)):
        raise AttnCtrlError(f"--scale {perturbing['scale']} is not a number")
    if heads is None and layers is None and not regions and not others:
        return []
    from .._quiet import quiet_imports

    with quiet_imports():
        from ..controls import RegionalPrompts, SoftPAG
        from ..controls.spec import parse_control

    controls: list[Control] = []
    if regions:
        controls.append(RegionalPrompts(list(regions), **regional))
        if any(not region.prompt.strip() for region in controls[0].regions):
            raise AttnCtrlError("a region has no prompt\nHINT: --region 'a red cat@0,0,0.5,1'")
    if heads is not None or layers is not None:
        controls.append(SoftPAG(heads=heads, layers=layers, **perturbing))
    return controls + [parse_control(text) for text in others]


def _flags(names) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for what the user can mend, 1 for anything else, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [item for item in arguments[:end] if item != "--debug"] + arguments[end:]
    try:
        code = app(arguments, prog_name="attnctrl", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130, debug)
    except (
        typer.TyperException,
        ValueError,
    ) as error:  # AttnCtrlError is a ValueError, and so is what pipelines say of arguments
        if str(error) == "" and not isinstance(error, AttnCtrlError):
            return 2
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        return _fail(text, 2, debug)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error}", 1, debug)


def _fail(text: str, code: int, debug: bool) -> int:
    """One line on stderr, and one more where the error says what mends it."""
    if debug:
        traceback.print_exc()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    hint = next((line for line in lines if line.startswith("HINT:")), None)
    print(f"attnctrl: {lines[0] if lines else 'failed'}", file=sys.stderr)
    if hint is not None and hint != lines[0]:
        print(hint, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
