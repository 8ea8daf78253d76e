"""Run a plan on q, k, v around fused attention; no path allocates memory that grows with n_q x n_k.

    segments     maskless attention of gathered rows over gathered keys, merged by LSE only where key groups differ by bias
    lerps        on the chosen heads only, before the output projection (``lerps.py``)
    head scale   last

Everything is (B, H, N, D). A plain plan is exactly torch's ``scaled_dot_product_attention``, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctrl.attention.blocks import Inputs, add_weighted, attend_block, exact
from attnctrl.attention.dispatch import attend
from attnctrl.attention.groups import Tokens, put, take
from attnctrl.attention.kernels import count_kernel
from attnctrl.attention.lerps import apply_lerp
from attnctrl.attention.plan import KeyGroup, Plan
from attnctrl.attention.program import Program, resolve
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
) -> Tensor:
    """One attention call under a plan.

    Args:
        q: (B, H, n_q, D). k: (B, H_kv, n_k, D), v: (B, H_kv, n_k, D_v); H a multiple of H_kv.
        plan: not checked here; ``plan.check(n_q, n_k)`` once finds every mistake.
        causal: bottom-right aligned, also for the plain call.
        kernel: a kernel by name, for every call (``kernels.KERNELS``); it runs or raises.

    Returns:
        (B, H, n_q, D_v). It may be a view of v (identity on every head).
    """
    return run_rows(q, k, v, (plan,), scale=scale, causal=causal, kernel=kernel)


def run_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    *,
    scale: float | None = None,
    causal: bool = False,
    kernel: str | None = None,
) -> Tensor:
    """One attention call whose batch rows follow different plans; rows in no plan are plain. Arguments as in ``run``."""
    inputs = Inputs(q, k, v, scale, causal, kernel)
    plans = [plan for plan in plans if not plan.is_plain]
    if len(plans) == 0:
        return _plain(inputs)
    if len(plans) == 1 and plans[0].rows is None:
        return _finish(inputs, plans[0], None)
    edited = _rows(plans, q.shape[0])

    # Rows whose attention is the model's own share one call; so does the untouched rest.
    own = [row for plan, rows in zip(plans, edited, strict=True) if not _shares(inputs, plan) for row in rows]
    shared = [row for row in range(q.shape[0]) if row not in own]
    out = None
    if len(shared):
        tokens = _row_tokens(shared, q.device)
        common = _plain(inputs.rows(tokens))
        out = common if len(shared) == q.shape[0] else put(_empty(inputs), tokens, common, 0)
        if out is common and out.requires_grad:
            out = out.clone()
    else:
        out = _empty(inputs)
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


def _plain(inputs: Inputs) -> Tensor:
    """The call that the model would have made."""
    q, k, v = inputs.q, inputs.k, inputs.v
    n_q, n_k = q.shape[2], k.shape[2]
    if inputs.kernel is not None or (inputs.causal and n_q != n_k and n_q > 1):
        named = {"scale": inputs.scale, "causal": inputs.causal, "kernel": inputs.kernel}
        return attend(q, k, v, need_lse=False, **named)[0]
    count_kernel("sdpa")
    causal = inputs.causal and n_q > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=inputs.scale, is_causal=causal, enable_gqa=grouped)


def _shares(inputs: Inputs, plan: Plan) -> bool:
    """The plan only edits the output of plain attention."""
    return len(plan.segments) == 0 and not _v_only(inputs, plan)


def _v_only(inputs: Inputs, plan: Plan) -> bool:
    """Identity on every head at strength 1: neither q nor k matters."""
    last = next((lerp for lerp in reversed(plan.lerps) if len(lerp.heads)), None)
    wanted = last is not None and last.target == "identity" and last.full and last.region is None
    return wanted and inputs.q.shape[2] == inputs.k.shape[2] and len(last.heads) == inputs.q.shape[1]


def _finish(inputs: Inputs, plan: Plan, out: Tensor | None) -> Tensor:
    """The plan's rows; ``out`` is their plain attention where it has been computed, and is written to."""
    if _v_only(inputs, plan):
        out = inputs.v_of_heads(range(inputs.q.shape[1]))
        return out if plan.head_scale is None else _scaled(out, plan.head_scale)
    program = resolve(plan, inputs.q.shape[2], inputs.k.shape[2], inputs.causal, inputs.q.device)
    if out is None:
        out = _plain(inputs) if program.plain else _segments(inputs, program)
        if len(plan.lerps) and out.requires_grad:
            out = out.clone()
    for number, lerp in enumerate(plan.lerps):
        if len(lerp.heads):
            out = apply_lerp(inputs, program, number, lerp, out)
    return out if plan.head_scale is None else _scaled(out, plan.head_scale)


def _scaled(out: Tensor, head_scale: Tensor) -> Tensor:
    scale = head_scale.to(out.device, out.dtype)
    return out * (scale[None] if scale.ndim == 1 else scale)[..., None, None]


def _segments(inputs: Inputs, program: Program) -> Tensor:
    if not all(len(block.bundles) for block in program.blocks):
        raise AttnCtrlError("a segment leaves its rows without a key\nHINT: Plan.check names it")
    if len(program.blocks) == 1 and program.blocks[0].every_row and not program.weighted:
        return attend_block(inputs, program.blocks[0], need_lse=False)[0]
    if not program.weighted:
        out = _empty(inputs)
        for block in program.blocks:
            put(out, block.queries, attend_block(inputs, block, need_lse=False)[0])
        return out
    total = torch.zeros_like(_empty(inputs), dtype=exact(inputs.q))
    for block in program.blocks:
        part = attend_block(inputs, block, need_lse=False)[0]
        add_weighted(total, block.queries, part, block.weight)
    return total.to(inputs.q.dtype)


def _empty(inputs: Inputs) -> Tensor:
    """(B, H, n_q, D_v), laid out (B, n_q, H, D_v) as the output projection wants it."""
    (batch, heads, n_q, _), dim = inputs.q.shape, inputs.v.shape[3]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (inputs.q, inputs.k, inputs.v)):
        return inputs.q.new_empty(batch, heads, n_q, dim)  # autograd refuses to write to a view after a view of it
    return inputs.q.new_empty(batch, n_q, heads, dim).transpose(1, 2)


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
