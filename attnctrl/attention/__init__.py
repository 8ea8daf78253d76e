"""The engine: attention under a plan, around fused kernels. It knows tensors, nothing of models."""

from attnctrl.attention.dispatch import attend, merge
from attnctrl.attention.engine import group_attend, group_masses, run, run_rows
from attnctrl.attention.groups import Tokens, as_tokens, signatures, union
from attnctrl.attention.kernels import KERNEL_LOG, Call, available_kernels, reasons, record_kernels
from attnctrl.attention.oracle import dense
from attnctrl.attention.plan import KeyGroup, Lerp, NegativeText, Peers, Plan, Segment, Watch, with_mask


__all__ = [
    "KERNEL_LOG",
    "Call",
    "KeyGroup",
    "Lerp",
    "NegativeText",
    "Peers",
    "Plan",
    "Segment",
    "Tokens",
    "Watch",
    "as_tokens",
    "attend",
    "available_kernels",
    "dense",
    "group_attend",
    "group_masses",
    "merge",
    "reasons",
    "record_kernels",
    "run",
    "run_rows",
    "signatures",
    "union",
    "with_mask",
]
