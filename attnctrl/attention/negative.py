"""Attention pushed away from a negative text.

Chen et al., Normalized Attention Guidance, 2025, arXiv 2505.21179. Both texts share the image's keys, so image rows
attend to these once; each text adds one small call, merged by LSE. ``plan.NegativeText`` has the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctrl.attention.blocks import Inputs, attend_block, empty_out, exact
from attnctrl.attention.dispatch import merge
from attnctrl.attention.groups import put
from attnctrl.attention.plan import NegativeText
from attnctrl.attention.program import Program, Sides


def attend_negative(inputs: Inputs, program: Program, negative: NegativeText) -> Tensor:
    """The output of every row, (B, H, n_q, D_v)."""
    sides = program.sides
    out = empty_out(inputs)
    for block in sides.others:
        put(out, block.queries, attend_block(inputs, block, need_lse=False)[0])
    rows = normalized(*_both(inputs, sides), negative)
    return put(out, sides.shared.queries, rows.to(out.dtype))


def normalized(positive: Tensor, negative: Tensor, how: NegativeText) -> Tensor:
    """alpha Z^ + (1 - alpha) Z+ from Z+ and Z-, all (B, H, n, D_v); a row where Z+ is zero stays zero."""
    away = how.scale * positive - (how.scale - 1) * negative
    order = 2 if how.norm == "l2" else 1
    before, after = (torch.linalg.vector_norm(z, order, dim=(1, 3), keepdim=True) for z in (positive, away))
    bound = (how.tau * before / after.clamp_min(torch.finfo(after.dtype).tiny)).clamp_max(1)
    return torch.lerp(positive, away * bound, how.alpha)


def _both(inputs: Inputs, sides: Sides) -> tuple[Tensor, Tensor]:
    """Z+ and Z- of the image rows in float32 (float64)."""
    wide = exact(inputs.q)
    texts = (sides.positive, sides.negative)
    if sides.shared.vector.size == 0:
        positive, negative = (attend_block(inputs, block, need_lse=False)[0].to(wide) for block in texts)
        return positive, negative
    out, lse = attend_block(inputs, sides.shared, need_lse=True)
    out = out.to(wide)
    found = []
    for block in texts:
        text, text_lse = attend_block(inputs, block, need_lse=True)
        found.append(merge([out, text], [lse, text_lse])[0])
    return found[0], found[1]
