"""How far a picture is, and what it looks like while it forms."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


EVERY = 0.3  # seconds between two previews
SMALL = 32  # latents of a preview: larger ones are averaged down before they are decoded
UNPACKING = ("latents", "height", "width", "vae_scale_factor")  # what FLUX, Chroma and their like unpack with


class Stopped(Exception):
    """Somebody pressed Stop."""


@dataclass(frozen=True)
class Step:
    """A step of the picture that forms. `preview` is None between two previews. `note`: why there is none at all."""

    title: str
    done: int
    total: int
    preview: Image.Image | None = None
    note: str = ""


class Watch:
    """diffusers' callback after a step: tells how far the picture is, shows it now and then, and ends it when Stop was pressed.

    Args:
        size: (width, height) of the picture; None for no previews.
    """

    def __init__(
        self, title: str, steps: int, stop: Event, tell: Callable[[Step], None], size: tuple[int, int] | None
    ):
        self.title, self.steps, self.stop, self.tell, self.size = title, steps, stop, tell, size
        self.before: tuple[Tensor, float] | None = None
        self.shown = time.monotonic()

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.stop.is_set():
            raise Stopped
        preview, note, latents = None, "", tensors.get("latents")
        if self.size is not None and latents is not None:
            clean = unpacked(pipeline, self._clean(pipeline, step, latents), self.size)
            if isinstance(clean, str):
                note = clean
            elif step + 1 < self.steps and time.monotonic() - self.shown >= EVERY:
                preview = decoded(pipeline, clean)
                self.shown = time.monotonic()
        self.tell(Step(self.title, step + 1, self.steps, preview, note))
        return {}

    def _clean(self, pipeline: Any, step: int, latents: Tensor) -> Tensor:
        """Where the last step points to, x − σ·dx/dσ, for Euler schedulers; what they are for others."""
        sigmas = getattr(pipeline.scheduler, "sigmas", None)
        if "Euler" not in type(pipeline.scheduler).__name__ or sigmas is None or step + 1 >= len(sigmas):
            return latents
        before, sigma = self.before, float(sigmas[step + 1])
        self.before = latents, sigma
        if before is None or before[1] == sigma:
            return latents
        return latents - sigma * (latents - before[0]) / (sigma - before[1])


def unpacked(pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor | str:
    """Latents as the VAE decodes them, (1, C, H, W), or why a preview is not known. Packed ones, (1, N, C), go through the pipeline's own
    function."""
    name, vae = type(pipeline).__name__, getattr(pipeline, "vae", None)
    if getattr(getattr(vae, "config", None), "scaling_factor", None) is None:
        return f"the VAE of {name} has no scaling factor"
    if latents.ndim == 3:
        unpack = getattr(pipeline, "_unpack_latents", None)
        if unpack is None or tuple(inspect.signature(unpack).parameters) != UNPACKING:
            return f"{name} packs latents in a way of its own"
        width, height = size
        try:
            latents = unpack(latents, height, width, pipeline.vae_scale_factor)
        except RuntimeError:
            return f"{name} draws at another size than {width} x {height}"
    if latents.ndim != 4 or latents.shape[1] != vae.config.latent_channels:
        return f"latents of {name} are not those of one picture"
    return latents


def decoded(pipeline: Any, latents: Tensor) -> Image.Image:
    """A small picture of latents, (1, C, H, W)."""
    config = pipeline.vae.config
    side = min(SMALL / max(latents.shape[-2:]), 1)
    latents = latents if side == 1 else F.interpolate(latents, scale_factor=side, mode="area")
    shift = getattr(config, "shift_factor", None) or 0
    with torch.no_grad():
        pixels = pipeline.vae.decode(
            latents.to(pipeline.vae.dtype) / config.scaling_factor + shift, return_dict=False
        )[0]
    return pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
