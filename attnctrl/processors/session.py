"""`attach` and `Session`: controls enter a model, and leave it without a trace."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import Plan, record_kernels
from ..controls.base import Control
from ..errors import AttnCtrlError
from ..families import Family, find_denoiser, find_family
from ..guidance import add_to_all, guidance_delta
from ..heads import HeadSet
from ..sites import Site, Tokens, lay_out
from .diffusers import ControlledAttnProcessor


_ATTACHED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # denoiser -> its sessions, innermost last
_LOCK = threading.Lock()


@dataclass
class _Pass:
    """What is in force while the denoiser runs once."""

    active: tuple[Control, ...]
    cond: tuple[int, ...]
    batch: int
    lengths: dict[str, int]
    grid: tuple[int, int]
    regions: tuple[int, ...]
    seen: set[str] = field(default_factory=set)


class Session:
    """Controls attached to one denoiser. Use it as a context manager, or call `detach`.

    On a pipeline the conditional rows are told from the unconditional ones and the number of the step is read from the
    scheduler. On a bare denoiser every row counts as conditional, guidance is added to the output, and controls with a window need
    `set_step`.
    """

    def __init__(self, target: Any, *controls: Control):
        model, pipeline = find_denoiser(target)
        self.family: Family = find_family(model)
        self.model, self.pipeline = model, pipeline
        wrong = [repr(control) for control in controls if not isinstance(control, Control)]
        if wrong:
            raise AttnCtrlError(f"not a control: {', '.join(wrong)}\nHINT: attach(pipe, ac.SoftPAG(heads='3.5'), …)")
        self.sites = self.family.sites(model)
        self.controls = tuple(controls)
        self.records: list = []
        self._strengths: dict[Control, dict[str, torch.Tensor]] = {}
        for control in controls:  # also neutral ones: a wrong head is wrong at strength 0 too
            self._check_family(control)
            touched = control.touches(self.sites)
            if not control.neutral:
                if not touched:
                    raise AttnCtrlError(f"{control.name} matches no attention site of {self.family.name}")
                self._strengths[control] = touched
        shapers = [control.name for control in self._strengths if not control.guides]
        if len(shapers) > 1:
            raise AttnCtrlError(
                f"{' and '.join(shapers)} both decide who attends to whom; give all regions to one of them"
            )
        self.calls = Counter()
        self.kernels: Counter = Counter()
        self.hits: dict[Control, Counter] = {control: Counter() for control in controls}
        self._pass: _Pass | None = None
        self._plans: dict[tuple, list[Plan]] = {}
        self._texts: dict[tuple, torch.Tensor] = {}
        self._step: tuple[int, int] | None = None
        self._pending: tuple[weakref.ref, weakref.ref, torch.Tensor | None] | None = None
        self._processors: dict[str, tuple[Any, Any]] = {}
        self._attached = False

    def _check_family(self, control: Control) -> None:
        heads = getattr(control, "heads", None)
        if isinstance(heads, HeadSet) and heads.family not in (None, self.family.name):
            raise AttnCtrlError(
                f"{control.name}: the head set was found on family {heads.family!r}, this model is {self.family.name!r}"
            )

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def attach(self) -> Session:
        if self._attached:
            raise AttnCtrlError("this session is attached already")
        modules = dict(self.model.named_modules())
        by_path = {site.path: site for site in self.sites}
        paths = sorted({path for touched in self._strengths.values() for path in touched})
        with _LOCK:
            stack = _ATTACHED.setdefault(self.model, [])
            busy = [name for session in stack if session._strengths for name in session.names()]
            if busy and self._strengths:
                raise AttnCtrlError(
                    f"{', '.join(busy)} is attached to this model already\nHINT: attach all controls together: attach(pipe, first, second)"
                )
            stack.append(self)
            for path in paths:
                module = modules[path]
                controlled = ControlledAttnProcessor(module.processor, by_path[path], self)
                self._processors[path] = (module, module.processor)
                module.processor = controlled
            if paths:
                self._saved_forward = self.model.__dict__.get("forward")
                self._inner = self.model.forward
                self.model.forward = self._forward
            self._attached = True
        return self

    def detach(self) -> None:
        """Restores every processor and the denoiser's forward. Calling it twice is harmless."""
        with _LOCK:
            if not self._attached:
                return
            for module, processor in self._processors.values():
                module.processor = processor
            if self._processors:
                if self._saved_forward is None:
                    self.model.__dict__.pop("forward", None)
                else:
                    self.model.forward = self._saved_forward
            self._processors.clear()
            _ATTACHED[self.model].remove(self)
            self._attached = False
            self._pass = self._pending = None
            self._plans.clear()
            self._texts.clear()

    def __enter__(self) -> Session:
        return self if self._attached else self.attach()

    def __exit__(self, *exc) -> None:
        self.detach()

    def names(self) -> list[str]:
        return [control.name for control in self._strengths]

    def set_step(self, index: int, steps: int) -> None:
        """For a bare denoiser: the next call is step `index` (from 0) of `steps`."""
        if not 0 <= index < steps:
            raise AttnCtrlError(f"step {index} of {steps}: steps count from 0")
        self._step = (index, steps)

    # -- one call of the denoiser ----------------------------------------------------------------------------------------

    def _forward(self, *args, **kwargs):
        bound = self.family.bind(self._inner, args, kwargs)
        fraction, sigma = self._when(bound)
        active = tuple(c for c in self._strengths if c.schedule.active(fraction, sigma))
        if self._repeats(bound):
            return self._second_call(bound, active)
        shapers = tuple(control for control in active if not control.guides)
        guides = () if bound.get("skip_layers") is not None else tuple(control for control in active if control.guides)
        batch = bound[self.family.image].shape[0]
        cond = self._cond_rows(bound, batch)
        call, regions = self._with_regions(bound, shapers)
        output = self._run(call, bound, shapers, cond, batch, regions)
        self.calls["passes"] += 1
        if guides:
            scales = {
                c: c.scale * (c.schedule.weight(fraction or 0.0, sigma) if c.schedule.weight else 1.0) for c in guides
            }
            rows = slice(cond[0], cond[-1] + 1)
            few = self.family.select_rows(call, rows, batch)
            prediction = _sample(output)
            delta = 0
            for control in guides:
                weak = self._run(few, bound, (*shapers, control), tuple(range(len(cond))), len(cond), regions)
                delta = delta + guidance_delta(prediction[rows], _sample(weak), scales[control])
                self.calls["perturbed passes"] += 1
            output = _replace(output, add_to_all(prediction, delta))
            if self.pipeline is not None and self.family.cfg == "separate":
                self._pending = (*self._pending[:2], delta)
        return output

    def _second_call(self, bound: dict, active: tuple[Control, ...]):
        """The unconditional call of a step whose conditional call came before: plain, plus the same guidance."""
        (*_, delta), self._pending = self._pending, None
        self.calls["passes"] += 1
        output = self._inner(**bound)
        return output if delta is None else _replace(output, add_to_all(_sample(output), delta))

    def _repeats(self, bound: dict) -> bool:
        """True in the second call of a step, recognised by the very same latent tensor within the same run."""
        if self.pipeline is None or self.family.cfg != "separate":
            return False
        latents, run = bound[self.family.image], self.pipeline.scheduler.timesteps
        if self._pending is not None and self._pending[0]() is latents and self._pending[1]() is run:
            return True
        self._pending = (weakref.ref(latents), weakref.ref(run), None)
        return False

    def _cond_rows(self, bound: dict, batch: int) -> tuple[int, ...]:
        split = self.pipeline is not None and self.family.cfg == "batched"
        if split and not hasattr(self.pipeline, "do_classifier_free_guidance"):
            raise AttnCtrlError(
                f"{type(self.pipeline).__name__} does not tell whether it guides with CFG (do_classifier_free_guidance), so the "
                "conditional rows cannot be told apart\nHINT: attach to its denoiser alone to control every row"
            )
        split = split and bool(self.pipeline.do_classifier_free_guidance)
        if not split or bound.get("skip_layers") is not None:
            return tuple(range(batch))
        if batch % 2:
            raise AttnCtrlError(
                f"the pipeline guides with CFG but calls its denoiser with {batch} rows, which are not two halves"
            )
        return tuple(range(batch // 2, batch))

    def _when(self, bound: dict) -> tuple[float | None, float | None]:
        """(fraction of the steps, sigma) of this call, as far as they can be known."""
        if self.pipeline is None:
            return (self._step[0] / self._step[1], None) if self._step is not None else (None, None)
        scheduler = self.pipeline.scheduler
        begin = getattr(scheduler, "begin_index", None) or 0
        index = getattr(scheduler, "step_index", None)
        if index is None:
            if not hasattr(scheduler, "step_index"):
                distance = (scheduler.timesteps.float() - bound["timestep"].flatten()[0].float().cpu()).abs()
                index = int(distance.argmin())
            else:
                index = begin
        count = max(1, len(scheduler.timesteps) - begin)
        for control in self._strengths:
            if control.schedule.covers(count) == 0:
                window = f"{control.schedule.start:g}-{control.schedule.stop:g}"
                raise AttnCtrlError(
                    f"{control.name}: the window {window} holds none of the {count} steps\nHINT: step i has the fraction i/{count}"
                )
        sigmas = getattr(scheduler, "sigmas", None)
        sigma = float(sigmas[index]) if sigmas is not None and index < len(sigmas) else None
        return (index - begin) / count, sigma

    def _with_regions(self, bound: dict, shapers: tuple[Control, ...]) -> tuple[dict, tuple[int, ...]]:
        """The call with region prompts appended to its text, and their lengths."""
        regions = [region for control in shapers for region in control.regions_in_use()]
        if not regions:
            return bound, ()
        text = bound[self.family.text]
        trims = [control.trim_text for control in shapers for _ in control.regions_in_use()]
        key = (text.shape[1], text.dtype, text.device)
        if key not in self._texts:
            self._texts[key] = [self._encode(r, text).to(text)[:, :trim] for r, trim in zip(regions, trims)]
        states = self._texts[key]
        return self.family.add_text(bound, torch.cat(states, dim=1)), tuple(state.shape[1] for state in states)

    def _encode(self, region, text: torch.Tensor) -> torch.Tensor:
        if region.prompt_embeds is not None:
            embeds = region.prompt_embeds
            if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[-1] != text.shape[-1]:
                raise AttnCtrlError(
                    f"region {region.prompt!r}: prompt_embeds is {tuple(embeds.shape)}, the model takes (1, T, {text.shape[-1]})"
                )
            return embeds
        if self.pipeline is None:
            raise AttnCtrlError(
                f"region {region.prompt!r}: a bare denoiser has no text encoder\nHINT: attach to the pipeline, or give Region(prompt_embeds=…)"
            )
        with torch.no_grad():
            return self.family.encode(self.pipeline, [region.prompt], text.shape[1], text.device)

    def _run(self, call, bound, active, cond, batch, regions):
        """One pass of the denoiser with controls in force on the conditional rows."""
        # some models take entries out of the dictionaries they are given, and there may be another pass
        call = {name: dict(value) if isinstance(value, dict) else value for name, value in call.items()}
        if not active:
            return self._inner(**call)
        lengths = {"text": bound[self.family.text].shape[1]}
        needs_grid = any(control.regions_in_use() for control in active)
        grid = (
            self.family.grid(bound, self.model)
            if needs_grid or self.family.cfg == "batched"
            else (1, bound[self.family.image].shape[1])
        )
        lengths["image"] = grid[0] * grid[1]
        self._pass = _Pass(active, cond, batch, lengths, grid, regions)
        try:
            with record_kernels() as used:
                output = self._inner(**call)
            self.kernels.update(used)
            self._check_effect(self._pass)
        finally:
            self._pass = None
        return output

    def _check_effect(self, done: _Pass) -> None:
        for control in done.active:
            missed = set(self._strengths[control]) - done.seen
            if missed:
                raise AttnCtrlError(
                    f"{control.name} did not take effect at {len(missed)} of {len(self._strengths[control])} sites, e.g. {min(missed)}: "
                    "the model did not run them through its attention processor"
                )

    # -- what processors ask ---------------------------------------------------------------------------------------------

    def plans_for(self, site: Site) -> tuple[list[Plan], int]:
        """The plans in force at a site and the length of its sequence; no plans outside a controlled pass."""
        now = self._pass
        if now is None:
            return [], 0
        tokens = lay_out(site.streams, now.lengths, now.grid, now.regions if "text" in site.streams else ())
        controls = tuple(control for control in now.active if site.path in self._strengths[control])
        key = (site.path, controls, tokens, now.cond, now.batch)
        if key not in self._plans:
            self._plans[key] = self._plan(site, tokens, controls, now)
        return self._plans[key], tokens.length

    def _plan(self, site: Site, tokens: Tokens, controls: tuple[Control, ...], now: _Pass) -> list[Plan]:
        edits = [control.edit(site, tokens, self._strengths[control][site.path]) for control in controls]
        segments = tuple(segment for edit in edits for segment in edit.segments)
        lerps = tuple(lerp for edit in edits for lerp in edit.lerps)
        everyone = len(now.cond) == now.batch
        plans = [Plan(segments=segments, lerps=lerps, rows=None if everyone else now.cond)]
        others = tuple(row for row in range(now.batch) if row not in now.cond)
        aside = tuple(s for control in controls for s in control.bystander(site, tokens).segments)
        if others and aside:
            plans.append(Plan(segments=aside, rows=others))
        plans = [plan for plan in plans if not plan.is_plain]
        for plan in plans:
            try:
                plan.check(tokens.length, tokens.length, site.heads, now.batch)
            except AttnCtrlError as error:
                names = ", ".join(control.name for control in controls)
                raise AttnCtrlError(f"{names} on {self.family.name}, {site.path}: {error}") from None
        return plans

    def mark(self, site: Site) -> None:
        """A site ran under its plans."""
        self._pass.seen.add(site.path)
        for control in self._pass.active:
            if site.path in self._strengths[control]:
                self.hits[control][site.path] += 1

    # -- what people ask -----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """What was attached where, how often it acted, and which kernels ran."""
        lines = [f"{self.family.name}: {type(self.model).__name__}, {len(self.sites)} attention sites"]
        for control in self.controls:
            if control not in self._strengths:
                lines.append(f"  {control.name}: neutral, not attached")
                continue
            hits = self.hits[control]
            sites = len(self._strengths[control])
            acted = f"acted {sum(hits.values())} times" if hits else "has not acted yet"
            lines.append(f"  {control.name}: {sites} sites, {acted}")
        if self.calls:
            lines.append("  denoiser: " + ", ".join(f"{count} {name}" for name, count in self.calls.items()))
        if self.kernels:
            lines.append("  kernels: " + ", ".join(f"{name} × {count}" for name, count in self.kernels.most_common()))
        return "\n".join(lines)


def attach(target: Any, *controls: Control) -> Session:
    """Attaches controls to a pipeline or a denoiser; detach with the session's `detach`, or use it in a `with` statement.

    Args:
        target: a diffusers pipeline, or its denoiser alone.
        controls: any set of controls; neutral ones (strength 0, no regions) are not attached and cost nothing.

    Raises:
        AttnCtrlError: unknown family, layer or head, no match, or two controls that exclude each other.
    """
    return Session(target, *controls).attach()


def _sample(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def _replace(output, sample: torch.Tensor):
    if isinstance(output, tuple):
        return (sample, *output[1:])
    output.sample = sample
    return output
