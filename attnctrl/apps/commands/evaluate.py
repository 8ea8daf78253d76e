"""`attnctrl evaluate`: how often a model is right about scenes whose truth is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import CONTROLS, FILES, MODEL, PICTURES, Device, Dtype, Revision


if TYPE_CHECKING:
    from ..evaluation import Evaluation

evaluate = typer.Typer(
    no_args_is_help=True,
    help="Measure a model on scenes whose truth is known: POPE and CHAIR for vision-language models, prompt fidelity for text to image.",
)
SCENES = "Scenes"

Vlm = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A vision-language model: built-in, a local folder or a hub id.",
        rich_help_panel=MODEL,
    ),
]
World = Annotated[
    str | None,
    typer.Option(
        help="icons, emoji, or emoji-noto, an art style that training never shows.",
        show_default="the one that the model was trained on",
        rich_help_panel=SCENES,
    ),
]
HeldOut = Annotated[
    bool,
    typer.Option("--held-out", help="Scenes of nouns that training never shows.", rich_help_panel=SCENES),
]
Prior = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="How often the second object is a usual companion of the first; 0.7 in training.",
        rich_help_panel=SCENES,
    ),
]
Noise = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Standard deviation of noise on the pictures, 1 being black to white: what is hard to see is guessed.",
        rich_help_panel=SCENES,
    ),
]
Control = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME(…)",
        help="Measure under a control too, 'PAI(alpha=0.5)'. Repeat it to combine several.",
        rich_help_panel=CONTROLS,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions asked at a time.", rich_help_panel=MODEL)]
Output = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the report there, markdown.", rich_help_panel=FILES)
]
Json = Annotated[bool, typer.Option("--json", help="Print the scores as JSON.", rich_help_panel=FILES)]


@evaluate.command(no_args_is_help=False)
def pope(
    model: Vlm = "builtin:icons-vlm",
    world: World = None,
    split: Annotated[
        str, typer.Option(help="all, random, popular or adversarial: which absent things are asked about.")
    ] = "all",
    questions: Annotated[int, typer.Option(min=2, help="Of each split; half of them are to be answered yes.")] = 600,
    held_out: HeldOut = False,
    prior: Prior = 0.0,
    noise: Noise = 0.0,
    control: Control = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    batch_size: BatchSize = 32,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Ask whether things are in pictures (POPE): accuracy, precision, recall, F1 and how often the answer is yes."""
    from ..evaluation import Evaluation

    asked = Evaluation(
        "pope",
        model,
        world,
        split=split,
        count=questions,
        held_out=held_out,
        prior=prior,
        noise=noise,
        controls=control or (),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        revision=revision,
        dtype=dtype,
        device=device,
        output=output,
        as_json=json,
        progress=sys.stderr.isatty(),
    )
    _run(asked)


@evaluate.command(no_args_is_help=False)
def chair(
    model: Vlm = "builtin:icons-vlm",
    world: World = None,
    captions: Annotated[int, typer.Option(min=1, help="One a picture.")] = 200,
    held_out: HeldOut = False,
    prior: Prior = 0.0,
    noise: Noise = 0.0,
    control: Control = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption.")] = 64,
    batch_size: BatchSize = 32,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Have pictures described (CHAIR): how many captions and mentions are of what is absent; recall, F1 and length."""
    from ..evaluation import Evaluation

    asked = Evaluation(
        "chair",
        model,
        world,
        count=captions,
        held_out=held_out,
        prior=prior,
        noise=noise,
        controls=control or (),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        revision=revision,
        dtype=dtype,
        device=device,
        output=output,
        as_json=json,
        progress=sys.stderr.isatty(),
    )
    _run(asked)


@evaluate.command(no_args_is_help=False)
def t2i(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A built-in model or a local folder.", rich_help_panel=MODEL)
    ] = "builtin:icons-t2i",
    prompts: Annotated[int, typer.Option(min=1, help="Pictures, a third of each kind.")] = 300,
    steps: Annotated[int, typer.Option(rich_help_panel=PICTURES)] = 24,
    guidance_scale: Annotated[float, typer.Option(rich_help_panel=PICTURES)] = 4.0,
    max_sequence_length: Annotated[
        int | None, typer.Option(help="T5 tokens.", show_default="the pipeline's", rich_help_panel=PICTURES)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=PICTURES)] = 16,
    seed: Annotated[int, typer.Option(help="Noise seed of the first picture.", rich_help_panel=PICTURES)] = 0,
    dtype: Dtype = None,
    device: Device = None,
    output: Annotated[Path, typer.Option(metavar="FILE", rich_help_panel=FILES)] = Path("quality.md"),
) -> None:
    """Draw prompts of the icon world and count what they asked for and what was drawn; writes a table and a sheet of pictures."""
    from ..._quiet import quiet_imports
    from ...loading import pick_device
    from ..loading import pick_dtype

    with quiet_imports():
        from ...evaluate.t2i import main
        from ...icons.models import resolve_model

    place = pick_device(device)
    given = {
        "model": resolve_model(model),
        "prompts": prompts,
        "steps": steps,
        "guidance-scale": guidance_scale,
        "max-sequence-length": max_sequence_length,
        "batch-size": batch_size,
        "seed": seed,
        "device": place,
        "dtype": pick_dtype(dtype, place),
        "output": output,
    }
    main([word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))])


def _run(asked: Evaluation) -> None:
    from ..evaluation import evaluate as run

    for text in run(asked):
        typer.echo(text)
