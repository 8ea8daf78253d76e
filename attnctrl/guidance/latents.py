"""Latents that change in the middle of a step: how they reach the denoiser and the scheduler, and how their gradient is found.

A pipeline holds its latents, makes the denoiser's input of them, and gives them to `scheduler.step` with the prediction. So the changed
ones go into both: the input is rebuilt as the pipeline builds it, and the scheduler's next step gets them in the place of what it is
given. The pipeline's own tensor, which may be the user's, is never written to.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttnCtrlError
from ..families.family import running


HALF = 1024.0  # losses are multiplied by it where float16 would round small gradients to 0


class LatentUpdate:
    """Changed latents of one step of a pipeline.

    Args:
        given: the denoiser's input, (rows, ...) or a list of rows: the latents once for every part of guidance, scaled by the scheduler,
            with whatever the pipeline appends to dimension 1 (masked pictures, tokens of reference pictures).
        images: latents that there should be.

    Raises:
        AttnCtrlError: the pipeline makes its input in another way, or its scheduler's step takes no `sample`.
    """

    def __init__(self, pipeline: Any, given: Any, images: int, timestep: Any):
        self.name, self.scheduler = type(pipeline).__name__, pipeline.scheduler
        self.timestep = running(pipeline, "t", timestep)
        self.before = running(pipeline, "latents", None)
        found = tuple(self.before.shape) if isinstance(self.before, Tensor) else self.before
        if not isinstance(self.before, Tensor) or self.before.shape[0] != images:
            raise AttnCtrlError(f"{self.name} holds no latents of {images} images in its step: {found}")
        self.after = self.before
        rebuilt, whole = self._rebuilt(given, self.before), _stacked(given)
        if rebuilt is None or not torch.equal(_stacked(rebuilt), whole):
            raise AttnCtrlError(
                f"{self.name} makes the denoiser's input {tuple(whole.shape)} of its latents {found} in an unknown way, so changed latents "
                "cannot be carried to both"
            )
        self._signature = inspect.signature(self.scheduler.step)
        if "sample" not in self._signature.parameters:
            raise AttnCtrlError(f"the step of {type(self.scheduler).__name__} takes no `sample` that could be changed")
        self._own: Any = None
        self._step: Any = None

    @property
    def latents(self) -> Tensor:
        """In float32 (float64), for gradients."""
        return self.after.detach().to(torch.float64 if self.after.dtype == torch.float64 else torch.float32)

    @property
    def pending(self) -> bool:
        """The scheduler has not got them yet."""
        return self._step is not None

    def rebuilt(self, given: Any, latents: Tensor | None = None) -> Any:
        """A denoiser's input of this step, of any number of parts, as made of the changed latents or of others."""
        return self._rebuilt(given, self.after if latents is None else latents)

    def _rebuilt(self, given: Any, latents: Tensor) -> Any:
        whole, scale = _stacked(given), getattr(self.scheduler, "scale_model_input", None)
        part = (latents if scale is None else scale(latents, self.timestep)).to(whole.dtype)
        parts, odd = divmod(len(whole), len(latents))
        leading = whole[:, : part.shape[1]]
        if odd or leading.numel() != parts * part.numel():
            return None
        new = torch.cat([part] * parts).view(leading.shape)
        if whole.shape[1] > new.shape[1]:
            new = torch.cat([new, whole[:, new.shape[1] :]], 1)
        return list(new.unbind()) if isinstance(given, (list, tuple)) else new

    def change(self, latents: Tensor) -> None:
        """From now on these, and in the scheduler's next step."""
        self.after = latents.detach().to(self.before.dtype)
        if self.pending:
            return
        self._own, step = self.scheduler.__dict__.get("step"), self.scheduler.step

        @functools.wraps(step)
        def changed(*args, **kwargs):
            self.remove()
            bound = self._signature.bind(*args, **kwargs)
            sample = bound.arguments["sample"]
            if sample.shape != self.before.shape or not torch.equal(sample.to(self.before), self.before):
                raise AttnCtrlError(
                    f"{self.name} gives its scheduler other latents than its denoiser, and the change would get lost"
                )
            bound.arguments["sample"] = self.after.to(sample)
            return step(*bound.args, **bound.kwargs)

        self._step = self.scheduler.step = changed

    def remove(self) -> None:
        """Gives the scheduler its own step back."""
        if self.pending and self.scheduler.__dict__.get("step") is self._step:
            if self._own is None:
                del self.scheduler.step
            else:
                self.scheduler.step = self._own
        self._step = None


def _stacked(rows: Any) -> Tensor:
    return torch.stack(list(rows)) if isinstance(rows, (list, tuple)) else rows


@contextmanager
def gradients(model: nn.Module) -> Iterator[None]:
    """Gradients flow inside, but not to the model's parameters, whose inputs are then not kept."""
    if torch.is_inference_mode_enabled():
        raise AttnCtrlError("torch.inference_mode() forbids gradients, also inside\nHINT: torch.no_grad()")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False) if name in names else None
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in model.named_parameters():  # offloading exchanges them
            parameter.requires_grad_(True) if name in names else None


def gradient(losses: Tensor, latents: Tensor, model: nn.Module) -> Tensor:
    """Of the sum of losses (B,), for latents (B, ...). Raises where a model passes none on, or no finite one."""
    name = type(model).__name__
    hint = "HINT: weights in float32, bfloat16 or float16; not quantised ones, whose kernels have no gradients"
    if not losses.requires_grad:
        raise AttnCtrlError(f"no gradient reaches the latents through {name}\n{hint}")
    try:
        larger = HALF if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0
        (found,) = torch.autograd.grad(larger * losses.sum(), latents)
    except torch.OutOfMemoryError as error:
        error.add_note("HINT: enable_gradient_checkpointing() of the denoiser, or fewer and earlier layers")
        raise
    except RuntimeError as error:
        raise AttnCtrlError(f"{name} passes no gradient on: {error}\n{hint}") from error
    if not bool(found.isfinite().all()):
        raise AttnCtrlError(f"the gradient that {name} passes on is not finite\n{hint}")
    return found / larger
