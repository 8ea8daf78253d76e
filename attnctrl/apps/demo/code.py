"""A request as Python and as a command line that make the same picture."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...icons.models import PREFIX
from ..generate import Job, describe


if TYPE_CHECKING:
    from ...controls import Control

_INFINITY = 'float("inf")'
_FLAGS = {
    "base_weight": "--base-weight",
    "overlap": "--overlap",
    "background": "--background",
    "trim_text": "--trim-text",
    "start": "--region-start",
    "stop": "--region-stop",
}
_OPTIONS = (
    ("model", "builtin:icons-t2i"),
    ("negative_prompt", None),
    ("seed", 0),
    ("steps", 24),
    ("guidance_scale", 4.0),
    ("height", None),
    ("width", None),
    ("max_sequence_length", None),
    ("dtype", None),
    ("device", None),
    ("variant", None),
    ("revision", None),
    ("lora", None),
    ("attention_backend", None),
)


def as_cli(job: Job, controls: Sequence[Control]) -> str:
    """`attnctrl generate …`, one option a line; before it, commands that write the masks it reads."""
    files = {_mask_file(text): text for control in controls for text in _masks(control)}
    writing = [f"echo {text} | base64 -d > {file}\n" for file, text in files.items()]
    words = [["attnctrl", "generate", job.prompt]] if not job.prompt.startswith("-") else [["attnctrl", "generate"]]
    for control in controls:
        given = _given(control, _region_of_file)
        if control.name == "RegionalPrompts" and given.keys() <= {"regions", "isolate", *_FLAGS}:
            words += [_option("--region", text) for text in given.pop("regions", ())]
            words += [["--no-isolate"]] if given.pop("isolate", True) is False else []
            given.setdefault("stop", control.stop)  # the command line has another default
            words += [_option(_FLAGS[name], value) for name, value in given.items()]
        else:
            words.append(_option("--control", f"{control.name}({_arguments(given, 'inf')})"))
    for name, default in _OPTIONS:
        if getattr(job, name) not in (default, ""):
            words.append(_option("--" + name.replace("_", "-"), getattr(job, name)))
    words += [["--cpu-offload"]] * job.cpu_offload
    words += [["--", job.prompt]] * job.prompt.startswith("-")
    return "".join(writing) + " \\\n    ".join(shlex.join(part) for part in words)


def as_python(job: Job, controls: Sequence[Control], made: dict[str, Any], absent: dict[str, None]) -> str:
    """A script with diffusers and attnctrl.

    Args:
        made: what `load_pipeline` said of the pipeline.
        absent: parts that the pipeline was saved without.
    """
    folder = f"builtin_path({job.model.removeprefix(PREFIX)!r})" if job.model.startswith(PREFIX) else repr(job.model)
    loading = {"variant": job.variant, "revision": job.revision}
    options = [f"dtype=torch.{made['dtype']}", *(f"{key}={value!r}" for key, value in loading.items() if value)]
    masked = any(map(_masks, controls))
    lines = ["import base64", "import io", ""] * masked
    lines += ["import torch", f"from diffusers import {made['pipeline']}", *["from PIL import Image"] * masked]
    lines += ["", "import attnctrl as ac"]
    lines += ["from attnctrl.icons.models import builtin_path"] * job.model.startswith(PREFIX)
    lines += [
        "",
        f"pipe = {made['pipeline']}.from_pretrained({folder}, {', '.join([*options, *(f'{name}=None' for name in absent)])})",
    ]
    if job.cpu_offload:
        lines.append("pipe.enable_model_cpu_offload()")
    elif made["device"] != "cpu":
        lines.append(f"pipe.to({job.device or made['device']!r})")
    lines += [f"pipe.load_lora_weights({job.lora!r})"] * bool(job.lora)
    lines += [f"pipe.transformer.set_attention_backend({job.attention_backend!r})"] * bool(job.attention_backend)
    opening = "    return Image.open(io.BytesIO(base64.b64decode(text)))"
    lines += ["", "", "def mask(text):", opening, "", ""] * masked
    call = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        "height": job.height,
        "width": job.width,
        "max_sequence_length": job.max_sequence_length,
    }
    arguments = [f"{name}={value!r}" for name, value in call.items() if value is not None]
    arguments.append(f'generator=torch.Generator("cpu").manual_seed({job.seed})')
    indent = "    " if controls else ""
    if controls:
        texts = [
            f"    ac.{control.name}({_arguments(_given(control, _region_in_code), _INFINITY)}),"
            for control in controls
        ]
        lines += ["controls = [", *texts, "]", "with ac.attach(pipe, *controls):"]
    lines += [f"{indent}image = pipe(", *(f"{indent}    {text}," for text in arguments), f"{indent}).images[0]"]
    return "\n".join([*lines, 'image.save("picture.png")', ""])


class _Code(str):
    """Stands in a script as it is."""

    __repr__ = str.__str__


def _given(control: Control, region: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """The arguments that differ from their defaults; heads as texts, regions as `region` writes them."""
    facts = describe(control)
    given = {}
    for name, field in control.__dataclass_fields__.items():
        value = getattr(control, name)
        if name == "regions":
            given[name] = list(map(region, facts["regions"]))
        elif name == "heads" and value is not None:
            given[name] = str(value)
        elif value != field.default:
            given[name] = value if isinstance(value, float) else facts[name]
    return given


def _region_of_file(facts: dict[str, Any]) -> str:
    place = ",".join(map(repr, facts["box"])) if facts.get("box") else _mask_file(facts["mask_png"])
    return f"{facts['prompt']}@{place}"


def _region_in_code(facts: dict[str, Any]) -> str:
    if facts.get("box"):
        return _region_of_file(facts)
    return _Code(f"ac.Region({facts['prompt']!r}, mask=mask({facts['mask_png']!r}))")


def _masks(control: Control) -> list[str]:
    """The painted masks of a control's regions, as base64."""
    return [item["mask_png"] for item in describe(control).get("regions", ()) if item.get("mask_png")]


def _mask_file(text: str) -> str:
    return f"mask-{hashlib.sha256(text.encode()).hexdigest()[:8]}.png"


def _arguments(given: dict[str, Any], infinity: str) -> str:
    return ", ".join(
        f"{name}={infinity if isinstance(value, float) and math.isinf(value) else repr(value)}"
        for name, value in given.items()
    )


def _option(flag: str, value: Any) -> list[str]:
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
