"""Run a plan on q, k, v around fused attention; no path allocates memory that grows with n_q x n_k.

    watches      look at plain attention (``watch.py``)
    segments     maskless attention of gathered rows over gathered keys, merged by LSE only where key groups differ by bias; a few alike
                 batch rows at a time where these differ or borrow keys (``peers.py``)
    negative     image rows pushed away from a negative text (``negative.py``)
    lerps        on the chosen heads only, before the output projection (``lerps.py``)
    head scale   last

Everything is (B, H, N, D). A plain plan is exactly torch's ``scaled_dot_product_attention``, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnctrl.attention import groups
from attnctrl.attention.blocks import Inputs, add_weighted, attend_block, empty_out, exact, plain
from attnctrl.attention.dispatch import attend
from attnctrl.attention.groups import Tokens, put, take
from attnctrl.attention.lerps import apply_lerp
from attnctrl.attention.negative import attend_negative
from attnctrl.attention.peers import parts_of
from attnctrl.attention.plan import KeyGroup, Lerp, Plan, as_mask, with_mask
from attnctrl.attention.program import Program, resolve
from attnctrl.attention.watch import look
from attnctrl.errors import AttnCtrlError


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    causal: bool = False,
    kernel: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One attention call under a plan.

    Args:
        q: (B, H, n_q, D). k: (B, H_kv, n_k, D), v: (B, H_kv, n_k, D_v); H a multiple of H_kv.
        plan: not checked here; ``plan.check(n_q, n_k)`` once finds every mistake.
        causal: bottom-right aligned, also for the plain call.
        kernel: a kernel by name, for every call (``kernels.KERNELS``); it runs or raises.
        mask: what the model itself passes, broadcastable to (B, H, n_q, n_k) with B the whole batch: rows in no plan
            get exactly the model's call, plans without a mask of their own get it by ``with_mask``.

    Returns:
        (B, H, n_q, D_v). It may be a view of v (identity on every head).
    """
    return run_rows(q, k, v, (plan,), scale=scale, causal=causal, kernel=kernel, mask=mask)


def run_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    *,
    scale: float | None = None,
    causal: bool = False,
    kernel: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One attention call whose batch rows follow different plans; rows in no plan are plain. Arguments as in ``run``."""
    inputs = Inputs(q, k, v, scale, causal, kernel)
    plans = [plan for plan in plans if not plan.is_plain]
    if mask is not None:
        inputs = replace(inputs, mask=as_mask(mask, q.shape[2], k.shape[2]))
        plans = [plan if plan.mask is not None else _masked(inputs, plan) for plan in plans]
    if len(plans) == 0:
        return plain(_with_key_bias(inputs))
    if len(plans) == 1 and plans[0].rows is None:
        return _finish(inputs, plans[0], None)
    edited = _rows(plans, q.shape[0])
    if mask is None and any(plan.mask is not None for plan in plans) and sum(map(len, edited)) < q.shape[0]:
        raise AttnCtrlError("rows in no plan would lose the mask that the plans have\nHINT: run_rows(..., mask=mask)")

    # Rows whose attention is the model's own share one call; so does the untouched rest.
    own = [row for plan, rows in zip(plans, edited, strict=True) if not _shares(inputs, plan) for row in rows]
    shared = [row for row in range(q.shape[0]) if row not in own]
    out = None
    if len(shared):
        tokens = _row_tokens(shared, q.device)
        common = plain(_with_key_bias(inputs.rows(tokens)))
        out = common if len(shared) == q.shape[0] else put(empty_out(inputs), tokens, common, 0)
        if out is common and out.requires_grad:
            out = out.clone()
    else:
        out = empty_out(inputs)
    for plan, rows in zip(plans, edited, strict=True):
        tokens = _row_tokens(rows, q.device)
        start = take(out, tokens, 0) if _shares(inputs, plan) else None
        if start is not None and start.requires_grad:
            start = start.clone()
        done = _finish(inputs.rows(tokens), plan, start)
        if done is not start or not isinstance(tokens, slice) or done.requires_grad:
            put(out, tokens, done, 0)
    return out


def group_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Sequence[KeyGroup | Tokens],
    *,
    scale: float | None = None,
    causal: bool = False,
    kernel: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Attention of every row over each key group alone: G outs (B, H, n_q, D_v) and G LSEs (B, H, n_q), biases included.

    ``merge`` of both is plain attention over all the groups; a mass edit puts the outs together with other weights.
    """
    inputs = Inputs(q, k, v, scale, causal, kernel)
    outs, lses = [], []
    for group in keys:
        group = group if isinstance(group, KeyGroup) else KeyGroup(group)
        block = resolve(group.alone, q.shape[2], k.shape[2], causal, q.device).blocks[0]
        out, lse = attend_block(inputs, block, need_lse=True)
        outs.append(out)
        lses.append(lse)
    return outs, lses


def group_masses(
    q: Tensor,
    k: Tensor,
    keys: Sequence[KeyGroup | Tokens],
    *,
    scale: float | None = None,
    causal: bool = False,
    kernel: str | None = None,
) -> Tensor:
    """How the probability of each row divides over key groups, (B, H, n_q, G); over all given groups it sums to 1."""
    _, lses = group_attend(q, k, k, keys, scale=scale, causal=causal, kernel=kernel)
    stacked = torch.stack(lses, -1)
    top = stacked.amax(-1, keepdim=True)
    mass = (stacked - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = mass.sum(-1, keepdim=True)
    return mass / total.masked_fill(total == 0, 1.0)


def _masked(inputs: Inputs, plan: Plan) -> Plan:
    mask = inputs.mask
    if plan.rows is not None and mask.shape[0] > 1:
        mask = take(mask, _row_tokens(plan.rows, mask.device), 0)
    return with_mask(plan, mask, inputs.q.shape[2], inputs.k.shape[2])


def _with_key_bias(inputs: Inputs) -> Inputs:
    """For the plain call of rows without a plan: only a kernel by name needs the mask as a bias."""
    if inputs.mask is None or (inputs.kernel is None and not inputs.causal):
        return inputs
    return replace(inputs, key_bias=with_mask(Plan(), inputs.mask, inputs.q.shape[2], inputs.k.shape[2]).key_bias)


def _shares(inputs: Inputs, plan: Plan) -> bool:
    """The plan only edits the output of plain attention, and needs it."""
    if len(plan.segments) or plan.negative is not None or (plan.mask is not None and inputs.mask is None):
        return False
    return not _v_only(inputs, plan) and _replacing(inputs, plan) is None


def _v_only(inputs: Inputs, plan: Plan) -> bool:
    """Identity on every head at strength 1: neither q nor k matters."""
    last = next((lerp for lerp in reversed(plan.lerps) if len(lerp.heads)), None)
    wanted = last is not None and last.target == "identity" and last.full and last.region is None
    return wanted and inputs.q.shape[2] == inputs.k.shape[2] and len(last.heads) == inputs.q.shape[1]


def _replacing(inputs: Inputs, plan: Plan) -> Lerp | None:
    """The first lerp, if nothing of its rows' attention is left after it."""
    first = next((lerp for lerp in plan.lerps if len(lerp.heads)), None)
    if first is None or not first.full or len(first.heads) != inputs.q.shape[1]:
        return None
    if first.region is None:
        return first
    simple = len(plan.segments) == 0 and plan.negative is None and not inputs.causal
    simple = simple and (plan.mask is None or plan.key_bias is not None)
    return first if first.of_queries and simple else None


def _finish(inputs: Inputs, plan: Plan, out: Tensor | None) -> Tensor:
    """The plan's rows; ``out`` is their plain attention where it has been computed, and is written to."""
    if plan.mask is not None:
        inputs = replace(inputs, mask=plan.mask, key_bias=plan.key_bias)
    for watch in plan.watches:
        look(inputs, watch)
    if _v_only(inputs, plan):
        out = inputs.v_of_heads(range(inputs.q.shape[1]))
        return out if plan.head_scale is None else _scaled(out, plan.head_scale)
    if plan.by_row:
        batch, _, n_q, _ = inputs.q.shape
        parts = parts_of(plan, batch, n_q, inputs.k.shape[2], inputs.q.device)
        return torch.cat([_finish(part.of(inputs), part.plan, None) for part in parts])
    program = resolve(plan, inputs.q.shape[2], inputs.k.shape[2], inputs.causal, inputs.q.device)
    if out is None:
        replacing = _replacing(inputs, plan)
        if replacing is not None:
            out = _all_but(inputs, replacing)
        elif plan.negative is not None:
            out = attend_negative(inputs, program, plan.negative)
        else:
            out = plain(inputs) if program.plain else _segments(inputs, program)
        if len(plan.lerps) and out.requires_grad:
            out = out.clone()
    for number, lerp in enumerate(plan.lerps):
        if len(lerp.heads):
            out = apply_lerp(inputs, program, number, lerp, out)
    return out if plan.head_scale is None else _scaled(out, plan.head_scale)


def _all_but(inputs: Inputs, lerp: Lerp) -> Tensor:
    """Plain attention of the rows outside the lerp's region; its own rows are left unset."""
    out, n_q = empty_out(inputs), inputs.q.shape[2]
    if lerp.region is not None:
        rest = groups.tokens_of(groups.minus(((0, n_q),), groups.spans(lerp.region, n_q)), inputs.q.device)
        named = {"scale": inputs.scale, "kernel": inputs.kernel, "key_bias": inputs.key_bias}
        put(out, rest, attend(take(inputs.q, rest), inputs.k, inputs.v, need_lse=False, **named)[0])
    return out


def _scaled(out: Tensor, head_scale: Tensor) -> Tensor:
    scale = head_scale.to(out.device, out.dtype)
    return out * (scale[None] if scale.ndim == 1 else scale)[..., None, None]


def _segments(inputs: Inputs, program: Program) -> Tensor:
    if not all(len(block.bundles) for block in program.blocks):
        raise AttnCtrlError("a segment leaves its rows without a key\nHINT: Plan.check names it")
    if len(program.blocks) == 1 and program.blocks[0].every_row and not program.weighted:
        return attend_block(inputs, program.blocks[0], need_lse=False)[0]
    if not program.weighted:
        out = empty_out(inputs)
        for block in program.blocks:
            put(out, block.queries, attend_block(inputs, block, need_lse=False)[0])
        return out
    total = torch.zeros_like(empty_out(inputs), dtype=exact(inputs.q))
    for block in program.blocks:
        part = attend_block(inputs, block, need_lse=False)[0]
        add_weighted(total, block.queries, part, block.weight)
    return total.to(inputs.q.dtype)


def _rows(plans: Sequence[Plan], batch: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for plan in plans:
        rows = tuple(range(batch)) if plan.rows is None else plan.rows
        wrong = [row for row in rows if not 0 <= row < batch]
        taken = [row for row in rows if any(row in other for other in found)]
        if wrong or taken or len(set(rows)) != len(rows):
            raise AttnCtrlError(
                f"plans for rows {[p.rows for p in plans]} of a batch of {batch}: "
                f"{'rows ' + str(wrong) + ' do not exist' if wrong else 'a row has two plans'}"
                "\nHINT: put both edits into one plan"
            )
        found.append(rows)
    return found


def _row_tokens(rows: Sequence[int], device: torch.device) -> Tokens:
    """Batch rows in the order given: a slice where they follow each other."""
    if all(b == a + 1 for a, b in zip(rows, rows[1:], strict=False)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
