"""When a call of a denoiser happens, read from its pipeline."""

from __future__ import annotations

from typing import Any

import torch

from ..controls.base import Moment
from ..families.family import running


def moment_of(pipeline: Any, bound: dict[str, Any]) -> tuple[Moment, list[float] | None]:
    """The moment of a call with the arguments `bound`, as far as the pipeline's scheduler tells it, and the noise level of every step
    of the run. Steps count from where the run begins, which may be in the middle of the schedule, and a step of a second-order
    scheduler is one step."""
    scheduler = pipeline.scheduler
    grid, run = scheduler.timesteps, running(pipeline, "timesteps", scheduler.timesteps)
    begin, index = getattr(scheduler, "begin_index", None), getattr(scheduler, "step_index", None)
    if begin is None:  # the run may begin in the middle, as from a picture
        begin = _nearest(grid, run[0]) if run is not grid else 0
    if index is None:  # before the first step, or never told
        now = running(pipeline, "t", bound.get("timestep"))
        index = begin if hasattr(scheduler, "step_index") else _nearest(grid, now)
    order = getattr(scheduler, "order", 1)  # evaluations a step; the last step of Heun has one
    count = max(1, -(-(len(grid) - begin if run is grid else len(run)) // order))
    step = (index - begin) // order
    sigmas = _sigmas(scheduler)
    if sigmas is None:
        return Moment(step, count, step / count), None
    sigma = sigmas[index] if index < len(sigmas) else None
    return Moment(step, count, step / count, sigma), sigmas[begin::order][:count]


def _sigmas(scheduler: Any) -> list[float] | None:
    """Noise levels of the scheduler's timesteps: its own `sigmas`, or sqrt((1 - a) / a) of the cumulated alphas."""
    sigmas = getattr(scheduler, "sigmas", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if sigmas is None and alphas is not None and not scheduler.timesteps.is_floating_point():
        kept = alphas[scheduler.timesteps.to(alphas.device)]
        sigmas = ((1 - kept) / kept).sqrt()
    return None if sigmas is None else torch.as_tensor(sigmas).tolist()


def _nearest(timesteps: torch.Tensor, timestep: Any) -> int:
    """The first index of a timestep."""
    timestep = torch.as_tensor(timestep).flatten()[0]
    return int((timesteps.float() - timestep.float().to(timesteps.device)).abs().argmin())
