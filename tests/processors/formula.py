"""final = uncond + g (cond − uncond) + w (cond − perturbed): what a pipeline hands to its scheduler, against the parts by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import wraps

import torch

import attnctrl as ac

from .tiny_pipelines import Run


@dataclass
class Step:
    """The denoiser's calls, as the pipeline made them, and the prediction that the scheduler got."""

    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    prediction: torch.Tensor | None = None


def follow(run: Run, session: ac.Session, **changes) -> list[Step]:
    """Runs the pipeline under a session."""
    steps, now = [], Step()
    forward, scheduler = session._forward, run.pipe.scheduler
    step = scheduler.step

    def called(*args, **kwargs):
        now.calls.append((args, kwargs))
        return forward(*args, **kwargs)

    @wraps(step)
    def stepped(prediction, *args, **kwargs):
        nonlocal now
        now.prediction = prediction
        steps.append(now)
        now = Step()
        return step(prediction, *args, **kwargs)

    session._forward, scheduler.step = called, stepped
    try:
        assert run(**changes).isfinite().all()
    finally:
        session._forward = forward
        del scheduler.step
    return steps


def stacked(output) -> torch.Tensor:
    return torch.stack(output[0]) if isinstance(output[0], list) else output[0]


@torch.no_grad()
def by_hand(run: Run, step: Step, *controls, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """(guided, unperturbed) prediction of a step, from the bare denoiser, where every row counts as conditional."""
    parts, terms = [], []
    for args, kwargs in step.calls:
        plain = stacked(run.model(*args, **kwargs)).float()
        with ac.attach(run.model, *controls, **how):
            term = stacked(run.model(*args, **kwargs)).float() - plain
        if len(plain) == run.images:
            halves = ((plain, term),)
        else:
            halves = tuple(zip(plain.chunk(2), term.chunk(2)))
            halves = halves if run.cond_first else halves[::-1]
        parts += [half for half, _ in halves]
        terms += [half for _, half in halves]
    cond, delta = parts[0], terms[0]
    if len(parts) == 1:
        return run.last(cond + delta), run.last(cond)
    assert len(parts) == 2 and run.g is not None
    guided = run.combine(parts[1], cond, run.g)
    return run.last(run.rescale(guided + delta, cond)), run.last(run.rescale(guided, cond))


def check(run: Run, steps: list[Step], *controls, **how) -> None:
    assert steps
    for step in steps:
        guided, plain = (part[:, : step.prediction.shape[1]] for part in by_hand(run, step, *controls, **how))
        torch.testing.assert_close(step.prediction.float(), guided, rtol=1e-3, atol=2e-4)
        assert (guided - plain).abs().max() > 5e-3, "the control is too weak to be seen"
