"""Loads a pipeline for the command line: quietly, and with one line when it cannot."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .._quiet import quiet_imports
from ..errors import AttnCtrlError


if TYPE_CHECKING:
    import torch

    from .generate import Job

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}


def load_pipeline(job: Job) -> tuple[Any, dict[str, Any]]:
    """(pipeline on its device, what a request says of it)."""
    with quiet_imports():
        import torch
        from diffusers import DiffusionPipeline

    device = pick_device(job.device)
    dtype = pick_dtype(job.dtype, device)
    if job.cpu_offload and device.type == "cpu":
        raise AttnCtrlError(
            "--cpu-offload moves parts between a GPU and the CPU, and there is no GPU here\nHINT: leave it out"
        )
    check_backend(job.attention_backend)
    with quiet_imports(), quiet_loading(), one_line(f"model {job.model!r} cannot be loaded", job.folder):
        absent = absent_parts(DiffusionPipeline.load_config(job.folder, revision=job.revision))
        pipeline = DiffusionPipeline.from_pretrained(
            job.folder, dtype=getattr(torch, dtype), variant=job.variant, revision=job.revision, **absent
        )
        if job.cpu_offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
    if job.lora is not None:
        with quiet_imports(), quiet_loading(), one_line(f"LoRA {job.lora!r} cannot be loaded", job.lora):
            pipeline.load_lora_weights(job.lora)
    if job.attention_backend is not None:
        with quiet_imports(), quiet_loading(), one_line(f"attention backend {job.attention_backend!r} cannot be used"):
            denoiser(pipeline).set_attention_backend(job.attention_backend)
    made = {
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__.removesuffix("Scheduler"),
        "dtype": dtype,
        "device": device.type,
    }
    return pipeline, made


def absent_parts(index: dict[str, Any]) -> dict[str, None]:
    """Parts that a pipeline was saved without, such as the T5 encoder of SD3, as `from_pretrained` wants to hear of them.

    diffusers (0.42) writes them to model_index.json as null, and then refuses to load the folder unless told ``part=None``.
    """
    return {
        name: None
        for name, entry in index.items()
        if isinstance(entry, (list, tuple)) and tuple(entry) == (None, None)
    }


def denoiser(pipeline: Any) -> Any:
    from ..families import find_denoiser

    return find_denoiser(pipeline)[0]


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is. Raises when it does not exist."""
    import torch

    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, there in usable.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise AttnCtrlError(f"--device {name!r} is no device\nHINT: cpu, cuda, cuda:1 or mps") from None
    there = usable.get(device.type, True)
    if there and device.type == "cuda" and device.index is not None:
        there = device.index < torch.cuda.device_count()
    if not there:
        have = ", ".join(kind for kind, is_there in usable.items() if is_there)
        raise AttnCtrlError(f"--device {name} is not available here\nHINT: available: {have}")
    return device


def pick_dtype(name: str | None, device: torch.device) -> str:
    """The name asked for; by default bfloat16 on CUDA, float32 elsewhere."""
    if name is None:
        return "bfloat16" if device.type == "cuda" else "float32"
    if name.lower() not in DTYPES:
        raise AttnCtrlError(f"--dtype {name!r} is not known\nHINT: {', '.join(dict.fromkeys(DTYPES.values()))}")
    return DTYPES[name.lower()]


def check_backend(name: str | None) -> None:
    if name is None:
        return
    with quiet_imports():
        from diffusers.models.attention_dispatch import AttentionBackendName

    known = [item.value for item in AttentionBackendName]
    if name.lower() not in known:
        raise AttnCtrlError(f"--attention-backend {name!r} is not known to diffusers\nHINT: {', '.join(known)}")


@contextmanager
def one_line(what: str, source: str = ".") -> Iterator[None]:
    """Whatever goes wrong inside becomes one AttnCtrlError; libraries raise anything from OSError to AttributeError here.

    A `source` that is no local file or folder is a hub id: what may be wrong with those stands in the hint.
    """
    hint = (
        ""
        if os.path.exists(source)
        else "\nHINT: no local folder; a hub id needs the hub to be reachable, a gated one `hf auth login`"
    )
    try:
        yield
    except AttnCtrlError:
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise AttnCtrlError(f"{what}: {message[:300]}{'…' if len(message) > 300 else ''}{hint}") from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars of loading where nobody watches, and no advice that is none of the user's business."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = (diffusers_logging, transformers_logging)
    hub = logging.getLogger("huggingface_hub")  # tells every retry of a request; the error tells the outcome
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    saved = [(module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in modules]
    for module in modules:
        module.set_verbosity_error()
        if not sys.stderr.isatty():
            module.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        for module, level, bars in saved:
            module.set_verbosity(level)
            if bars:
                module.enable_progress_bar()
