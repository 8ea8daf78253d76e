"""Loads a pipeline for the command line: quietly, and with one line when it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._quiet import quiet_imports
from ..errors import AttnCtrlError
from ..loading import absent_parts, one_line, pick_device, quiet_loading


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


def denoiser(pipeline: Any) -> Any:
    from ..families import find_denoiser

    return find_denoiser(pipeline)[0]


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
