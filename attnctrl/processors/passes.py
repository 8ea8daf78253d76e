"""One run of the denoiser with controls in force: which plans act at a site, which blocks are edited, kept or left out."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import nn

from ..attention import Plan, record_kernels, with_mask
from ..attention.plan import Watch
from ..attention.watch import Measure, check_watches
from ..controls.base import Control, Moment
from ..errors import AttnCtrlError
from ..families import Family
from ..families.family import pick_rows
from ..sites import Block, Site, Tokens, lay_out
from .gates import Gate, Kept


class Enough(Exception):
    """A pass that only measures has seen all that it was for."""


@dataclass
class Pass:
    """What is in force while the denoiser runs once."""

    active: tuple[Control, ...]
    cond: tuple[int, ...]
    batch: int
    lengths: dict[str, int | None]
    grid: tuple[int, ...]
    regions: tuple[int, ...]
    moment: Moment
    keep: frozenset[str] = frozenset()  # units whose output is kept
    rows: slice = field(default_factory=lambda: slice(None))  # and for which rows
    reuse: int = 0  # units before this one are not run
    kept: dict[str, Kept] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)  # blocks that did not run, and should not have
    measures: bool = False  # for gradients: of what looks, only that which they go through does
    wanted: frozenset[str] = frozenset()  # sites after which the pass ends

    def rows_of(self, control: Control) -> tuple[int, ...]:
        """Rows of this pass that a control is for."""
        if control.both:
            return tuple(range(self.batch))
        if control.branch == "cond":
            return self.cond
        return tuple(row for row in range(self.batch) if row not in self.cond)


class Passes:
    """What a session does while its denoiser runs. The session says which pass is in force; gates and processors ask it."""

    model: nn.Module
    family: Family
    blocks: list[Block]
    prefix_reuse: bool
    kernels: Counter
    hits: dict[Control, Counter]
    _strengths: dict[Control, dict[str, torch.Tensor]]  # strengths per head of the sites that a control touches
    _edited: dict[Control, frozenset[str]]  # blocks that it edits as a whole
    _units: list[str]  # what runs one after the other
    _first: dict[Control, int]  # the first unit that a guiding control's pass has to run
    _by_path: dict[str, Block]
    _chain: bool  # only the last output before the first perturbed unit matters
    _pass: Pass | None
    _plans: dict[tuple, list[Plan]]
    _revisions: tuple[int, ...]  # of the controls, when these plans were made
    _masked: dict[tuple, tuple[torch.Tensor, list[Plan]]]
    notes: list[str]

    def _begin(self, moment: Moment) -> None:
        """Tells the controls that a step begins, and drops the plans if what they hold has changed."""
        for control in self._strengths:
            control.begin(moment)
        revisions = tuple(control.revision for control in self._strengths)
        if revisions != self._revisions:
            self._plans.clear()
            self._revisions = revisions

    def _new_pass(self, bound, active, cond, batch, regions, moment) -> Pass:
        bound = self.family.trim(bound) if regions else bound
        lengths, grid = self.family.tokens(bound, self.model) if active else ({}, ())
        if lengths.get("reference") and (names := [control.name for control in active if control.regions_in_use()]):
            raise AttnCtrlError(
                f"{', '.join(names)}: this call carries reference images, whose tokens regions cannot place yet"
            )
        for control in active:
            control.check_grid(grid)
        return Pass(active, cond, batch, lengths, grid, regions, moment)

    def _run(self, call: dict, now: Pass):
        """The denoiser, with a pass in force."""
        with self._refined_apart(now):
            return self._run_whole(self._moved(call, now), now)

    def _moved(self, call: dict, now: Pass) -> dict:
        """The call with the positions that controls want."""
        name = self.family.image_ids
        for control in (control for control in now.active if control.moves):
            ids = call[name]
            moved = control.edit_positions(ids[0] if ids.ndim == 3 else ids)
            call = {**call, name: moved.expand(len(ids), -1, -1) if ids.ndim == 3 else moved}
            self.hits[control][name] += 1
        return call

    @contextmanager
    def _refined_apart(self, now: Pass):
        """Where a model's text tokens attend to each other before the blocks, each appended prompt does so alone."""
        path = self.family.refiner
        if path is None or not any(now.regions):
            yield
            return

        def through(gate: Gate, args: tuple, kwargs: dict):
            values = [*args, *kwargs.values()]
            whole = values[0].shape[1]
            sizes = (whole - sum(now.regions), *filter(None, now.regions))
            of_text = [isinstance(v, torch.Tensor) and v.ndim > 1 and v.shape[1] == whole for v in values]
            parts = [v.split(sizes, dim=1) if text else [v] * len(sizes) for v, text in zip(values, of_text)]
            calls = [(part[: len(args)], dict(zip(kwargs, part[len(args) :]))) for part in zip(*parts)]
            return torch.cat([gate.inner(*call) for call in calls], dim=1)

        gate = Gate(path, self.model.get_submodule(path), through)
        try:
            yield
        finally:
            gate.remove()

    def _run_whole(self, call: dict, now: Pass):
        # some models take entries out of the dictionaries they are given, and there may be another pass
        call = {name: dict(value) if isinstance(value, dict) else value for name, value in call.items()}
        if not now.active and not now.keep:
            return self.model._call_impl(**call)
        with self._in_force(now):
            output = self.model._call_impl(**call)
            self._check_effect(now)
        return output

    @contextmanager
    def _in_force(self, now: Pass):
        self._pass = now
        try:
            with record_kernels() as used:
                yield
            self.kernels.update(used)
        finally:
            self._pass = None
            self._masked.clear()

    def _check_cache(self) -> None:
        if getattr(self.model, "is_cache_enabled", False):
            raise AttnCtrlError(
                f"{type(self.model).__name__} caches blocks between steps (enable_cache), and a perturbed pass would mix with that cache\n"
                "HINT: disable_cache() before attaching a control that guides"
            )

    def _first_of(self, group: tuple[Control, ...]) -> int:
        """The first unit that the perturbed pass of some controls has to run."""
        return min(self._first[control] for control in group)

    def _to_keep(self, groups: list[tuple[Control, ...]]) -> frozenset[str]:
        """Units whose output the perturbed passes will need."""
        if not self.prefix_reuse or self.model.training:
            return frozenset()
        firsts = [self._first_of(group) for group in groups]
        if self._chain:
            return frozenset(self._units[first - 1] for first in firsts if first)
        return frozenset(self._units[: max(firsts)])

    def _resume(self, weak: Pass, plain: Pass, first: int) -> None:
        """Lets a perturbed pass begin at its first perturbed unit, from what the plain pass kept."""
        if not plain.keep or first == 0:
            return
        needed = self._units[first - 1 : first] if self._chain else self._units[:first]
        if all(path in plain.kept and plain.kept[path].intact for path in needed):
            weak.reuse, weak.kept = first, plain.kept
            weak.left_out.update(self._units[:first])
        else:
            self._note("no prefix reuse: the model changes the outputs of its blocks in place, or does not call them")

    def _through(self, gate: Gate, args: tuple, kwargs: dict):
        """What the call of a gated module returns."""
        now = self._pass
        if now is None:
            return gate.inner(args, kwargs)
        if now.reuse and gate.path in self._units and self._units.index(gate.path) < now.reuse:
            if gate.path in now.kept:
                return now.kept[gate.path].value
            block = self._by_path[gate.path]
            return gate.pack(block, gate.streams(block, args, kwargs))
        edits = [control for control in now.active if gate.path in self._edited[control]]
        output = self._edit_block(gate, now, edits, args, kwargs) if edits else gate.inner(args, kwargs)
        if gate.path in now.keep:
            now.kept[gate.path] = Kept(pick_rows(output, now.rows, now.batch))
        return output

    def _edit_block(self, gate: Gate, now: Pass, edits: list[Control], args: tuple, kwargs: dict):
        """The block under the controls that edit it, innermost first."""
        block = self._by_path[gate.path]
        before = gate.streams(block, args, kwargs)
        ran = []

        def run(streams):
            ran.append(True)
            return gate.run(block, streams, args, kwargs)

        for control in edits:
            run = self._edited_run(control, block, now, before, run)
        out = run(before)
        if not ran:
            now.left_out.add(block.path)
        return gate.pack(block, out)

    def _edited_run(self, control: Control, block, now: Pass, before: dict, inner):
        rows = now.rows_of(control)

        def run(streams):
            if not rows:
                return inner(streams)
            out = control.edit_block(block, streams, self._tokens_of(block, before, now), now.moment, inner)
            if len(rows) < now.batch:  # the other rows as the block itself makes them
                plain, index = inner(streams), torch.tensor(rows)
                for name, value in plain.items():
                    value = value.clone()
                    value[index] = out[name][index]
                    plain[name] = value
                out = plain
            now.seen.add(block.path)
            self.hits[control][block.path] += 1
            return out

        return run

    def _tokens_of(self, block, streams: dict, now: Pass) -> Tokens:
        """The layout of a block's attention, with the lengths that the block really gets where the family cannot tell."""
        known = {name: value.shape[1] for name, value in streams.items() if now.lengths.get(name) is None}
        return self._lay_out(block.streams, {**now.lengths, **known}, now)

    def _lay_out(self, streams: tuple[str, ...], lengths: dict[str, int | None], now: Pass) -> Tokens:
        if lengths.get("reference") and "image" in streams:
            behind = streams.index("image") + 1
            streams = (*streams[:behind], "reference", *streams[behind:])
        missing = [stream for stream in streams if lengths.get(stream) is None]
        if missing:
            raise AttnCtrlError(f"the number of {' and '.join(missing)} tokens differs between the rows of this batch")
        return lay_out(streams, lengths, self._grid(lengths, now), now.regions if "text" in streams else ())

    def _grid(self, lengths: dict[str, int | None], now: Pass) -> tuple[int, ...]:
        """The grid of a site, coarser than that of the first block on the further levels of a UNet."""
        coarse = now.lengths.get("image") is None and len(now.grid) == 2
        return _coarser(now.grid, lengths["image"]) if coarse else now.grid

    def _check_effect(self, done: Pass) -> None:
        for control in done.active:
            if not done.rows_of(control):
                continue
            expected = {*self._strengths[control], *self._edited[control]}
            expected = {path for path in expected if not inside(path, done.left_out) or path in self._edited[control]}
            missed = expected - done.seen
            if missed:
                raise AttnCtrlError(
                    f"{control.name} did not take effect at {len(missed)} of {len(expected)} sites, e.g. {min(missed)}: "
                    "the model did not run them through its attention processor"
                )

    # -- what processors ask -----------------------------------------------------------------------------------------------

    def controls_site(self, site: Site) -> bool:
        """Whether a control of the running pass touches a site."""
        return self._pass is not None and any(site.path in self._strengths[control] for control in self._pass.active)

    def expects(self, site: Site) -> str:
        lengths = self._pass.lengths
        return " + ".join(str(lengths.get(stream, "?")) for stream in site.streams)

    def plans_for(self, site: Site, shape: torch.Size, n_k: int, mask: torch.Tensor | None) -> list[Plan] | None:
        """Plans for an attention call at a site; None when the call is not the site's own, by its length.

        Args:
            shape: of the queries, (B, H, n_q, D).
        """
        now, n_q = self._pass, shape[2]
        controls = tuple(control for control in now.active if site.path in self._strengths[control])
        if shape[0] != now.batch:
            with self._named(controls, site):
                raise AttnCtrlError(
                    f"the model attends to {shape[0]} rows at a time here, of a batch of {now.batch}, so its rows cannot be told apart"
                )
        if site.kind == "cross":
            text = now.lengths.get("text") or n_k - sum(now.regions)
            ends = list(accumulate((text, *now.regions)))
            names = ("text", *(f"region:{i}" for i in range(len(now.regions))))
            with self._named(controls, site):
                grid = self._grid({"image": n_q}, now) if any(c.shapes for c in controls) else now.grid
            tokens = Tokens(tuple(zip(names, (0, *ends), ends)), grid)
            fits = tokens.length == n_k
        else:
            known = {"image": n_q} if site.streams == ("image",) and now.lengths.get("image") is None else {}
            with self._named(controls, site):
                tokens = self._lay_out(site.streams, {**now.lengths, **known}, now)
            fits = tokens.length == n_q == n_k
        if not fits:
            return None
        key = (site.path, controls, tokens, now.cond, now.batch, n_q, now.measures)
        if key not in self._plans:
            self._plans[key] = self._plan(site, tokens, controls, now, n_q, n_k)
        if mask is None or not self._plans[key]:
            return self._plans[key]
        under = (id(mask), key)
        if under not in self._masked:
            with self._named(controls, site):
                masked = [with_mask(plan, pick_mask(mask, plan), n_q, n_k) for plan in self._plans[key]]
                for plan in masked:
                    check_watches(plan)
            self._masked[under] = (mask, masked)
        return self._masked[under][1]

    @contextmanager
    def _named(self, controls, site: Site):
        """Errors of the engine, with the controls and the site that they are about."""
        try:
            yield
        except AttnCtrlError as error:
            names = ", ".join(control.name for control in controls)
            raise AttnCtrlError(f"{names} on {self.family.name}, {site.path}: {error}") from None

    def _plan(self, site: Site, tokens: Tokens, controls, now: Pass, n_q: int, n_k: int) -> list[Plan]:
        plans = []
        for branch in ("cond", "uncond"):
            mine = [control for control in controls if control.branch == branch]
            others = [control for control in controls if control.branch != branch]
            rows = tuple(row for row in range(now.batch) if (row in now.cond) == (branch == "cond"))
            if not rows:
                continue
            edits = [control.edit(site, tokens, self._strengths[control][site.path]) for control in mine]
            edits += [control.beside(site, tokens, self._strengths[control][site.path]) for control in others]
            scales = [edit.head_scale for edit in edits if edit.head_scale is not None]
            negatives = [edit.negative for edit in edits if edit.negative is not None]
            plan = Plan(
                segments=tuple(segment for edit in edits for segment in edit.segments),
                lerps=tuple(lerp for edit in edits for lerp in edit.lerps if not now.measures or _measured(lerp)),
                head_scale=torch.stack(scales).prod(0) if scales else None,
                negative=negatives[0] if negatives else None,
                rows=None if len(rows) == now.batch else rows,
            )
            if not plan.is_plain:
                plans.append(plan)
        with self._named(controls, site):
            for plan in plans:
                plan.check(n_q, n_k, site.heads, now.batch)
        return plans

    def mark(self, site: Site) -> None:
        """A site ran under its plans."""
        self._pass.seen.add(site.path)
        for control in self._pass.active:
            if site.path in self._strengths[control]:
                self.hits[control][site.path] += 1
        if self._pass.wanted and self._pass.wanted <= self._pass.seen:
            raise Enough

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _measured(lerp) -> bool:
    return isinstance(lerp, Measure) or not isinstance(lerp, Watch)


def inside(path: str, paths: set[str]) -> bool:
    """Whether a module is one of `paths` or lies in one."""
    return any(path == other or path.startswith(f"{other}.") for other in paths)


def _coarser(grid: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The grid of `length` tokens among the halvings of a grid, as the levels of a UNet make them."""
    rows, columns = grid
    while rows * columns > length and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != length:
        raise AttnCtrlError(f"no halving of a grid of {grid[0]} x {grid[1]} has {length} image tokens")
    return rows, columns


def pick_mask(mask: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The rows of an attention mask that a plan is for."""
    if plan.rows is None or mask.ndim < 3 or mask.shape[0] == 1:
        return mask
    return mask[list(plan.rows)]
