"""`attnctrl generate`: pictures from a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import AttnCtrlError
from .options import (
    CONTROLS,
    FILES,
    HEADS,
    PICTURES,
    REGIONS,
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
    flags,
    tell,
)


if TYPE_CHECKING:
    from ...controls import Control


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
    from ..generate import Job, remake, run

    if source is not None:
        given = {name: value for name, value in context.params.items() if _was_given(context, name)}
        beside = {name: given.pop(name) for name in ("device", "cpu_offload", "output", "name") if name in given}
        others = [name for name in given if name not in ("source", "report")]
        if others:
            what = ", ".join("PROMPT" if name == "prompt" else flags([name]) for name in others)
            raise AttnCtrlError(f"--from takes the whole request from the picture\nHINT: leave out {what}")
        tell(remake(source, beside, report), messages=True)
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
    tell(run(job, controls), report)


def _was_given(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name not in ("DEFAULT", "DEFAULT_MAP")


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
    from ..generate import EARLY

    spelled = {"region": "perturb-region"}
    if perturbing and heads is None and layers is None:
        raise AttnCtrlError(
            f"{flags(spelled.get(name, name) for name in perturbing)} needs the heads to perturb\nHINT: --heads 3.5,4.2 or --layers mid"
        )
    if regional and not regions:
        spelled = {"isolate": "no-isolate", "start": "region-start", "stop": "region-stop"}
        raise AttnCtrlError(
            f"{flags(spelled.get(name, name) for name in regional)} needs a region\nHINT: --region 'a red cat@0,0,0.5,1'"
        )
    if regions and "isolate" not in regional and regional.get("start", 0) < EARLY:
        regional.setdefault("stop", EARLY)
    if not math.isfinite(perturbing.get("scale", 0)):
        raise AttnCtrlError(f"--scale {perturbing['scale']} is not a number")
    if heads is None and layers is None and not regions and not others:
        return []
    from ..._quiet import quiet_imports

    with quiet_imports():
        from ...controls import RegionalPrompts, SoftPAG
        from ...controls.spec import parse_control

    controls: list[Control] = []
    if regions:
        controls.append(RegionalPrompts(list(regions), **regional))
        if any(not region.prompt.strip() for region in controls[0].regions):
            raise AttnCtrlError("a region has no prompt\nHINT: --region 'a red cat@0,0,0.5,1'")
    if heads is not None or layers is not None:
        controls.append(SoftPAG(heads=heads, layers=layers, **perturbing))
    return controls + [parse_control(text) for text in others]
