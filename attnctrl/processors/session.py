"""`attach` and `Session`: controls enter a model, and leave it without a trace."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from ..attention import Plan
from ..controls.base import Control, Moment
from ..controls.language import LanguageControl
from ..controls.latent_guidance import LatentGuidance
from ..controls.subject_layout import SubjectLayout
from ..errors import AttnCtrlError
from ..families import Family, find_denoiser, find_family
from ..families.family import running
from ..guidance import add_to_all, add_to_rows, conditional_rows, guidance_delta
from ..sites import Site
from .adapters import AdapterCalls, Adapters
from .diffusers import ControlledAttnProcessor
from .gates import Gate
from .latents import Latents
from .moments import moment_of
from .passes import Pass, Passes, inside
from .region_texts import RegionTexts


if TYPE_CHECKING:
    from .language import LanguageSession


Combine = Literal["separate", "joint"]

_ATTACHED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # denoiser -> its sessions, innermost last
_LOCK = threading.Lock()


class Session(Passes):
    """Controls attached to one denoiser. Use it as a context manager, or call `detach`.

    On a pipeline the conditional rows are told from the unconditional ones and the number of the step is read from the
    scheduler. On a bare denoiser every row counts as conditional, guidance is added to the output, and controls with a window need
    `set_step`.

    Args:
        combine: several guiding controls add up their terms scale·(cond − perturbed), each of a pass of its own ("separate"), or all
            perturb one pass with the scale that they share ("joint").
        prefix_reuse: a perturbed pass starts from the outputs that the plain pass left before the first perturbed block. Exact; switched
            off by itself, and reported, where the model writes to them.
        pipeline: the pipeline that runs a bare denoiser, for those with two.
        withhold: leave the prediction plain and put it into `withheld` with the guidance term of each call instead.
    """

    def __init__(
        self,
        target: Any,
        *controls: Control,
        combine: Combine = "separate",
        prefix_reuse: bool = True,
        withhold: bool = False,
        pipeline: Any = None,
    ):
        if combine not in get_args(Combine):
            raise AttnCtrlError(
                f"combine={combine!r} is neither 'separate' (a perturbed pass per control) nor 'joint' (one for all)"
            )
        model, found = find_denoiser(target)
        self.family: Family = find_family(model)
        if getattr(found, "transformer_2", None) is not None:
            raise AttnCtrlError(
                f"{type(found).__name__} has two denoisers, `transformer` and `transformer_2`, and a session controls one\n"
                "HINT: two sessions, attach(pipe.transformer, …, pipeline=pipe) and attach(pipe.transformer_2, …, pipeline=pipe)"
            )
        self.model, self.pipeline = model, found if pipeline is None else pipeline
        wrong = [repr(control) for control in controls if not isinstance(control, Control)]
        if wrong:
            raise AttnCtrlError(f"not a control: {', '.join(wrong)}\nHINT: attach(pipe, ac.SoftPAG(heads='3.5'), …)")
        self.sites = self.family.sites(model)
        self.blocks = self.family.blocks(model)
        self.controls = tuple(controls)
        self.combine, self.prefix_reuse, self.withhold = combine, prefix_reuse, withhold
        self.withheld: tuple[torch.Tensor, torch.Tensor] | None = None  # (prediction, guidance term)
        self.records: list = []
        self._strengths: dict[Control, dict[str, torch.Tensor]] = {}
        self._edited: dict[Control, frozenset[str]] = {}
        self._adapters: Adapters | None = None
        self._latents = Latents(self)
        for control in controls:  # also neutral ones: a wrong head is wrong at strength 0 too
            self._check_family(control)
            self._latents.check(control)
            touched, edited = control.touches(self.sites), control.touches_blocks(self.blocks)
            if not control.neutral:
                if isinstance(control, SubjectLayout):
                    if self._adapters is not None:
                        raise AttnCtrlError("two SubjectLayouts place the same pictures; give all subjects to one")
                    self._adapters = Adapters(control, model, touched, self.sites)
                    touched = self._adapters.touched
                if not touched and not edited and not control.moves:
                    raise AttnCtrlError(f"{control.name} matches no attention site of {self.family.name}")
                self._strengths[control], self._edited[control] = touched, frozenset(edited)
        self._check_apart()
        if combine == "joint":
            self._check_joint([control for control in controls if control.guides])
        self._units = self.family.run_order(model)
        self._first = {control: self._first_unit(control) for control in self._strengths if control.guides}
        self._by_path = {block.path: block for block in self.blocks}
        chain = all(set(block.gives) <= {stream for stream, _ in block.takes} for block in self.blocks)
        self._chain = chain and not self.family.skips  # only the last output before the first perturbed unit matters
        self.calls = Counter()
        self.kernels: Counter = Counter()
        self.notes: list[str] = []
        self.hits: dict[Control, Counter] = {control: Counter() for control in controls}
        self._pass: Pass | None = None
        self._plans: dict[tuple, list[Plan]] = {}
        self._revisions: tuple[int, ...] = ()
        self._masked: dict[tuple, tuple[torch.Tensor, list[Plan]]] = {}
        self._texts = RegionTexts(self)
        self._step: tuple[int, int, float | None] | None = None
        self._new_picture = True  # with the next step that `set_step` told
        self._last: tuple[weakref.ref, int] | None = None  # timesteps of the pipeline's run, and the step
        self._context: str | None = None
        self._pending: tuple[weakref.ref, weakref.ref, torch.Tensor | None] | None = None
        self._processors: dict[str, tuple[Any, Any, ControlledAttnProcessor]] = {}
        self._gates: list[Gate] = []
        self._attached = False

    def _check_family(self, control: Control) -> None:
        if isinstance(control, LanguageControl):
            raise AttnCtrlError(
                f"{control.name} is for language models, and {type(self.model).__name__} is a denoiser"
            )
        found = getattr(getattr(control, "heads", None), "family", None)
        if found not in (None, self.family.name):
            raise AttnCtrlError(
                f"{control.name}: the head set was found on family {found!r}, this model is {self.family.name!r}"
            )
        reasons = dict(self.family.refuses)
        if reason := reasons.get(control.name, reasons.get("*")):
            raise AttnCtrlError(f"{control.name} cannot work on {self.family.name}: {reason}")
        if control.moves and self.family.image_ids is None:
            raise AttnCtrlError(
                f"{control.name} moves rotary positions, which {self.family.name} does not take as an argument\n"
                "HINT: FLUX.1 Kontext, FLUX.2 and Chroma do; in UNets, SharedAttention(…, reposition=Reposition(…))"
            )
        if getattr(control, "reposition", None) is not None and self.family.name != "unet":
            raise AttnCtrlError(
                f"{control.name}(reposition=…) is for UNets, whose keys have no positions, and those of {self.family.name} have\n"
                "HINT: where reference pictures are a part of the sequence (FLUX.1 Kontext, FLUX.2, Chroma), attach Reposition itself"
            )
        if self.family.encode is None and any(region.encoded for region in control.regions_in_use()):
            raise AttnCtrlError(
                f"{control.name} appends prompts to the text, which the family table of {self.family.name} does not know how to do"
            )

    def _check_apart(self) -> None:
        """Raises for controls that decide the same thing: who attends to whom at a site, or where tokens are."""
        for one, other in combinations(self._strengths, 2):
            shared = self._strengths[one].keys() & self._strengths[other].keys()
            if one.shapes and other.shapes and shared:
                raise AttnCtrlError(
                    f"{one.name} and {other.name} both decide who attends to whom at {len(shared)} sites, e.g. {min(shared)}\n"
                    "HINT: give all regions to one of them, or layers that they do not share"
                )
            if one.moves and other.moves:
                raise AttnCtrlError(
                    f"{one.name} and {other.name} both move reference pictures; give all regions to one of them"
                )

    def _check_joint(self, guides: list[Control]) -> None:
        """Raises unless one pass with one scale in one window can hold the edits of all guiding controls."""
        reasons = []
        if len({control.scale for control in guides}) > 1:
            reasons.append("their scales are " + ", ".join(f"{c.name} {c.scale:g}" for c in guides))
        windows = [control.schedule for control in guides]
        if any(window != windows[0] for window in windows[1:]):
            told = [f"{c.name} {w}{', weight' if w.weight is not None else ''}" for c, w in zip(guides, windows)]
            reasons.append("their windows are " + ", ".join(told))
        acting = [control for control in guides if not control.neutral]
        for pair in combinations(acting, 2):
            for one, other in (pair, pair[::-1]):
                lost = [p for p in (*self._strengths[other], *self._edited[other]) if inside(p, self._edited[one])]
                if one.skips and lost:
                    reasons.append(f"{one.name} leaves out a block that {other.name} edits ({lost[0]})")
                    break
        if reasons:
            raise AttnCtrlError(
                f"combine='joint' puts {' and '.join(c.name for c in guides)} into one perturbed pass, but {'; '.join(reasons)}\n"
                "HINT: the same scale, start, stop, sigma and weight, other layers than the skipped ones, or combine='separate'"
            )

    def _first_unit(self, control: Control) -> int:
        """The first unit that a control's pass has to run."""
        paths = (*self._strengths[control], *self._edited[control])

        def unit(path: str) -> int:
            inside = [i for i, name in enumerate(self._units) if path == name or path.startswith(f"{name}.")]
            return inside[0] if inside else 0

        return min(unit(path) for path in paths)

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def attach(self) -> Session:
        if self._attached:
            raise AttnCtrlError("this session is attached already")
        modules = dict(self.model.named_modules())
        by_path = {site.path: site for site in self.sites}
        paths = sorted({path for touched in self._strengths.values() for path in touched})
        gated = {path for edited in self._edited.values() for path in edited}
        if self.prefix_reuse and self._first:
            gated.update(self._units[: max(self._first.values())])
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
                own = module.processor
                controlled = ControlledAttnProcessor(own, by_path[path], self)
                self._processors[path] = (module, own, controlled)
                if isinstance(own, nn.Module):  # an IP-Adapter's; it stays a part of the model, so that `.to` moves it
                    module._modules["_own_processor"] = module._modules.pop("processor")
                    module.get_processor = partial(_own, own)  # diffusers asks for the adapter and its scale
                module.processor = controlled
            self._gates = [Gate(path, modules[path], self._through) for path in sorted(gated)]
            self._gates += self._adapters.gates() if self._adapters is not None else []
            if self._strengths:  # a gate, as offloading takes `forward` away and puts it back at the end of every run
                self._gates.append(Gate("", self.model, lambda gate, args, kwargs: self._forward(*args, **kwargs)))
                if hasattr(self.model, "cache_context"):
                    self._had_context = self.model.__dict__.get("cache_context")
                    self._inner_context = self.model.cache_context
                    self.model.cache_context = self._cache_context
            self._attached = True
        return self

    def detach(self) -> None:
        """Restores every processor and block; what has taken the place of a session's own part since stays. Calling it twice is
        harmless."""
        with _LOCK:
            if not self._attached:
                return
            for module, processor, controlled in self._processors.values():
                module._modules.pop("_own_processor", None)
                module.__dict__.pop("get_processor", None)
                if module.processor is controlled:
                    del module.processor
                    module.processor = processor
            for gate in self._gates:
                gate.remove()
            if self._strengths and self.model.__dict__.get("cache_context") == self._cache_context:
                del self.model.cache_context
                if self._had_context is not None:
                    self.model.cache_context = self._had_context
            self._processors.clear()
            self._gates.clear()
            _ATTACHED[self.model].remove(self)
            self._attached = False
            self._latents.forget()
            self._pass = self._pending = self._last = None
            self._new_picture = True
            self._plans.clear()
            self._masked.clear()
            self._texts.clear()

    def __enter__(self) -> Session:
        return self if self._attached else self.attach()

    def __exit__(self, *exc) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        return self._attached

    def names(self) -> list[str]:
        return [control.name for control in self._strengths]

    def set_step(self, index: int, steps: int, sigma: float | None = None) -> None:
        """For a bare denoiser: the next call is step `index` (from 0) of `steps`, at noise level `sigma`."""
        if not 0 <= index < steps:
            raise AttnCtrlError(f"step {index} of {steps}: steps count from 0")
        if self._step is None or steps != self._step[1] or index < self._step[0] or steps == 1:
            self._new_picture = True
        self._step = (index, steps, sigma)

    # -- one call of the denoiser ----------------------------------------------------------------------------------------

    @contextmanager
    def _cache_context(self, name: str, *args, **kwargs):
        """The denoiser's own context, with its name noted: pipelines call it "cond" and "uncond"."""
        self._context = name
        try:
            with self._inner_context(name, *args, **kwargs):
                yield
        finally:
            self._context = None

    @torch.compiler.disable
    def _forward(self, *args, **kwargs):
        self.withheld = None
        bound = self.family.bind(self.model.forward, args, kwargs)
        moment = self._when(bound)
        active = tuple(c for c in self._strengths if c.schedule.active(moment.fraction, moment.sigma))
        batch, repeats = self.family.rows(bound), self._repeats(bound)
        if self._adapters is not None:
            bound = self._adapters.read(bound, batch, repeats)
        own_pass = bound.get("skip_layers") is not None  # a weak pass of the pipeline's own
        bound = self._latents.in_force(bound, moment, repeats or own_pass)
        if repeats:
            return self._second_call(bound, active, batch, moment)
        if not own_pass:
            self._begin(moment)
        mains = tuple(c for c in active if not c.guides and not isinstance(c, LatentGuidance))
        weights = {} if own_pass else {c: self._weight(c, moment) for c in active if c.guides}
        guides = tuple(control for control, weight in weights.items() if weight != 0)
        batched = self.pipeline is not None and self.family.cfg != "separate" and not own_pass
        cfg = batched and self.family.cfg_on(self.pipeline)
        if cfg:
            self._check_parts(batch)
        cond = conditional_rows(batch, cfg, self.family.cfg == "batched, cond first")
        rows = slice(cond[0], cond[-1] + 1)
        self._check_images((*mains, *guides), len(cond))
        if not own_pass:
            bound = self._latents.guided(bound, active, mains, cond, batch, moment)
        call, regions = self._with_regions(bound, mains, cond)
        now = self._new_pass(bound, mains, cond, batch, regions, moment)
        if own_pass:
            now.left_out.update(block.path for block in self.blocks if block.layer in bound["skip_layers"])
        groups = [guides] if guides and self.combine == "joint" else [(control,) for control in guides]
        if groups:
            self._check_cache()
            now.keep, now.rows = self._to_keep(groups), rows
        output = self._run(call, now)
        self.calls["passes"] += 1
        self.calls["blocks"] += len(self.blocks)
        if not groups:
            return output
        few = self.family.select_rows(call, rows, batch)
        prediction, delta = _sample(output), 0
        for group in groups:
            weak = self._new_pass(bound, (*mains, *group), tuple(range(len(cond))), len(cond), regions, moment)
            self._resume(weak, now, self._first_of(group))
            perturbed = _sample(self._run(few, weak))
            delta = delta + guidance_delta(prediction[rows], perturbed, weights[group[0]])
            self.calls["perturbed passes"] += 1
            skipped = set(self._units[: weak.reuse])
            self.calls["perturbed blocks"] += sum(not inside(block.path, skipped) for block in self.blocks)
        delta = delta[:, : self._channels(prediction)]
        if self.withhold:
            self.withheld = prediction, delta
            return output
        return _replace(output, self._place(prediction, delta, cond, cfg))

    def _check_parts(self, batch: int) -> None:
        """Two parts for classifier-free guidance, or the rows cannot be told apart."""
        latents = running(self.pipeline, "latents", None)
        if latents is not None and batch != 2 * len(latents):
            raise AttnCtrlError(
                f"{type(self.pipeline).__name__} calls its denoiser with {batch} rows for {len(latents)} images, and only the two parts of "
                "classifier-free guidance are known\nHINT: the pipeline without guidance of its own, e.g. StableDiffusionPipeline"
            )

    def _check_images(self, controls: tuple[Control, ...], images: int) -> None:
        for control in controls:
            strength = next(iter(self._strengths[control].values()), None)
            if strength is not None and strength.ndim == 2 and strength.shape[0] != images:
                raise AttnCtrlError(
                    f"{control.name} has head sets for {strength.shape[0]} images, this batch has {images}\nHINT: one set per image"
                )
            control.check_images(images)

    def _place(self, prediction: torch.Tensor, delta: torch.Tensor, cond: tuple[int, ...], cfg: bool) -> torch.Tensor:
        """The prediction with the guidance term where the pipeline's arithmetic brings it out unchanged.

        A pipeline that rescales the guided prediction to the conditional one must not see a changed conditional part: then
        delta / (1 − g) goes to the unconditional part alone.
        """
        family, pipeline = self.family, self.pipeline
        separate = pipeline is not None and family.cfg == "separate"
        if separate:
            self._pending = (*self._pending[:2], delta)
        rescales = pipeline is not None and family.renormalizes is not None and family.renormalizes(pipeline)
        if not rescales or not (cfg or (separate and family.cfg_on(pipeline))):
            return add_to_all(prediction, delta)
        weight = family.uncond_weight(pipeline)
        if abs(weight) < 1e-6:
            raise AttnCtrlError(
                f"{type(pipeline).__name__} rescales its prediction and gives the unconditional one no weight, which leaves no place for "
                "the guidance term\nHINT: switch the rescaling off, or use another guidance_scale"
            )
        self._note(
            "guidance is added to the unconditional prediction alone, as the pipeline rescales to the conditional one"
        )
        if separate:
            self._pending = (*self._pending[:2], delta / weight)
            return prediction
        uncond = slice(len(cond), None) if cond[0] == 0 else slice(0, cond[0])
        return add_to_rows(prediction, delta / weight, uncond)

    def _second_call(self, bound: dict, active: tuple[Control, ...], batch: int, moment: Moment):
        """The unconditional call of a step whose conditional call came before: the same guidance, and controls for such rows."""
        (*_, delta), self._pending = self._pending, None
        self.calls["passes"] += 1
        self.calls["blocks"] += len(self.blocks)
        mains = tuple(control for control in active if control.branch == "uncond" or control.both)
        call, regions = self._with_regions(bound, mains, ())
        now = self._new_pass(bound, mains, (), batch, regions, moment)
        output = self._run(call, now)
        return output if delta is None else _replace(output, add_to_all(_sample(output), delta))

    def _repeats(self, bound: dict) -> bool:
        """True in the second call of a step: by the name that the pipeline gives its calls, or by the very same latent tensor
        within the same run."""
        if self.pipeline is None or self.family.cfg != "separate":
            return False
        latents, run = bound[self.family.image], self.pipeline.scheduler.timesteps
        latents = latents[0] if isinstance(latents, (list, tuple)) else latents
        same = self._pending is not None and self._pending[0]() is latents and self._pending[1]() is run
        if self._pending is not None and (same or self._context == "uncond"):
            return True
        self._pending = (weakref.ref(latents), weakref.ref(run), None)
        return False

    def _weight(self, control: Control, moment: Moment) -> float:
        shape = control.schedule.weight
        return control.scale * (shape(moment.fraction or 0.0, moment.sigma) if shape else 1.0)

    def _channels(self, prediction: torch.Tensor) -> int:
        """Channels that predict the latents; models with a learned variance return twice as many."""
        config = self.model.config
        latent, out = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
        learned = latent is not None and out == 2 * latent and prediction.shape[1] == out
        return latent if learned else prediction.shape[1]

    def _when(self, bound: dict) -> Moment:
        """The moment of this call, as far as it can be known. Raises for a window that holds none of the steps."""
        if self.pipeline is None:
            if self._step is None:
                return Moment()
            index, steps, sigma = self._step
            first, self._new_picture = self._new_picture, False
            return Moment(index, steps, index / steps, sigma, first)
        moment, sigmas = moment_of(self.pipeline, bound)
        run, (known, last) = self.pipeline.scheduler.timesteps, self._last or (None, 0)
        first = known is None or known() is not run or moment.step < last
        self._last = (weakref.ref(run), moment.step)
        for control in self._strengths:
            if control.schedule.covers(moment.steps, sigmas) == 0:
                levels = f", the noise levels are {sigmas[0]:.3g} to {sigmas[-1]:.3g}" if sigmas else ""
                raise AttnCtrlError(
                    f"{control.name}: the window {control.schedule} holds none of the {moment.steps} steps\n"
                    f"HINT: step i has the fraction i/{moment.steps}{levels}"
                )
        return replace(moment, first=first)

    def _with_regions(
        self, bound: dict, mains: tuple[Control, ...], cond: tuple[int, ...] | None = None
    ) -> tuple[dict, tuple[int, ...]]:
        """The call with region prompts appended to its text, and their lengths; `cond` are its conditional rows, None for all."""
        return self._texts.add(bound, mains, cond)

    def adapter_calls(self, site: Site, inner: Any) -> AdapterCalls | None:
        """What catches the calls of an IP-Adapter at a site of the running pass, if a control wants them."""
        found = self._adapters
        if found is None or found.control not in self._pass.active or site.path not in found.touched:
            return None
        return found.calls(site, inner, lambda length: self._grid({"image": length}, self._pass))

    # -- what people ask -----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """What was attached where, how often it acted, and which kernels ran."""
        lines = [f"{self.family.name}: {type(self.model).__name__}, {len(self.sites)} attention sites"]
        for control in self.controls:
            if control not in self._strengths:
                lines.append(f"  {control.name}: neutral, not attached")
                continue
            hits = self.hits[control]
            sites, edited = len(self._strengths[control]), len(self._edited[control])
            places = ((sites, "sites"), (edited, "blocks"), (int(control.moves), "table of positions"))
            where = ", ".join(f"{count} {name}" for count, name in places if count)
            acted = f"acted {sum(hits.values())} times" if hits else "has not acted yet"
            lines.append(f"  {control.name}: {where}, {acted}")
        guides = [control for control in self._strengths if control.guides]
        if self.combine == "joint" and len(guides) > 1:
            lines.append(
                f"  joint: {' and '.join(c.name for c in guides)} in one perturbed pass, scale {guides[0].scale:g}"
            )
        if self.calls:
            lines.append("  denoiser: " + ", ".join(f"{count} {name}" for name, count in self.calls.items()))
        if passes := self.calls["perturbed passes"]:
            ran, whole = self.calls["perturbed blocks"] / passes, len(self.blocks)
            lines.append(
                f"  prefix reuse: a perturbed pass ran {ran:g} of {whole} blocks, {1 - ran / whole:.0%} saved"
            )
        lines += [f"  note: {note}" for note in self.notes]
        if self.kernels:
            lines.append("  kernels: " + ", ".join(f"{name} × {count}" for name, count in self.kernels.most_common()))
        return "\n".join(lines)


def attach(
    target: Any,
    *controls: Control,
    combine: Combine = "separate",
    prefix_reuse: bool = True,
    pipeline: Any = None,
) -> Session | LanguageSession:
    """Attaches controls to a pipeline, a denoiser or a language model; detach with the session's `detach`, or use it in a `with`
    statement.

    Args:
        target: a diffusers pipeline, its denoiser alone, or a transformers model that generates text (from images or not).
        controls: any set of controls; neutral ones (strength 0, no regions) are not attached and cost nothing.
        combine: several guiding controls add up their terms scale·(cond − perturbed), each of a pass of its own ("separate"), or all
            perturb one pass with the scale and the window that they share ("joint"). Language models have no such passes.
        prefix_reuse: perturbed passes start at their first perturbed block, from what the plain pass computed; exact.
        pipeline: the pipeline that runs `target`, where a pipeline has two denoisers (Wan 2.2) and each gets a session.

    Raises:
        AttnCtrlError: unknown family, layer or head, no match, or two controls that exclude each other.
    """
    model = getattr(target, "_orig_mod", target)
    if any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        from .language import LanguageSession

        return LanguageSession(target, *controls).attach()
    return Session(target, *controls, combine=combine, prefix_reuse=prefix_reuse, pipeline=pipeline).attach()


def _own(processor: nn.Module, *args, **kwargs) -> nn.Module:
    """Stands in for the `get_processor` of an attention module whose own processor carries an IP-Adapter."""
    return processor


def _sample(output) -> torch.Tensor:
    sample = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(sample)) if isinstance(sample, (list, tuple)) else sample


def _replace(output, sample: torch.Tensor):
    before = output[0] if isinstance(output, tuple) else output.sample
    value = list(sample.unbind()) if isinstance(before, (list, tuple)) else sample
    if isinstance(output, tuple):
        return (value, *output[1:])
    output.sample = value
    return output
