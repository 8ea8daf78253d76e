"""The kernels: each declares facts and refuses with reasons, so that nobody falls back in silence.

Layouts are (B, H, N, D) and LSE (B, H, N), float32 (float64 for float64 input). Kernels only ever see equal head
counts and, where causal, square calls: ``dispatch.attend`` folds grouped heads and splits the rest.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctrl.attention.tiled import tiled_attention
from attnctrl.errors import AttnCtrlError


KERNEL_LOG: ContextVar[Counter | None] = ContextVar("KERNEL_LOG", default=None)
HALF = frozenset({torch.float16, torch.bfloat16})
FLOAT = HALF | {torch.float32}
ALL = FLOAT | {torch.float64}


@dataclass(frozen=True)
class Call:
    """The facts of one call that decide which kernel can run it."""

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    n_q: int
    n_k: int
    dim: int
    dim_v: int
    gqa: int = 1  # query heads per key head
    causal: bool = False
    key_bias: bool = False
    bias_grad: bool = False
    limits: bool = False
    need_lse: bool = True
    need_grad: bool = False


class Kernel:
    """What every kernel declares; ``run`` gets equal head counts and, if causal, equal lengths."""

    name: str
    devices: frozenset[str] | None = None  # None = any
    dtypes: frozenset[torch.dtype] = ALL
    returns_lse = True
    lse_gradient = False  # gradients through the LSE are right
    key_bias = True
    causal_bias = False
    unequal_dims = False

    @classmethod
    def reasons(cls, call: Call) -> list[str]:
        """Why this kernel cannot do the call; empty = it can."""
        why = []
        if cls.devices is not None and call.device not in cls.devices:
            why.append(f"runs on {', '.join(sorted(cls.devices))}, not {call.device}")
        if call.dtype not in cls.dtypes:
            why.append(f"does not take {str(call.dtype).removeprefix('torch.')}")
        if call.dim != call.dim_v and not cls.unequal_dims:
            why.append(f"needs equal head sizes, got {call.dim} for q, k and {call.dim_v} for v")
        if call.need_lse and not cls.returns_lse:
            why.append("does not return the LSE")
        if call.need_lse and call.need_grad and cls.returns_lse and not cls.lse_gradient:
            why.append("has no gradient through the LSE")
        if call.key_bias and not cls.key_bias:
            why.append("takes no key bias without an N x N tensor")
        if call.key_bias and call.causal and cls.key_bias and not cls.causal_bias:
            why.append("does not combine causal and key bias")
        if call.bias_grad and cls is not Math:
            why.append("has no gradient for the key bias without an N x N tensor")
        if call.limits and cls is not Math:
            why.append("takes no key limit per row")
        return why

    @staticmethod
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None, need_lse: bool):
        raise NotImplementedError


class Sdpa(Kernel):
    """torch's own choice, where no LSE is needed."""

    name = "sdpa"
    returns_lse = False

    @classmethod
    def reasons(cls, call: Call) -> list[str]:
        why = super().reasons(call)
        if call.device != "cpu" and call.key_bias and call.dtype == torch.float64:
            why.append("would materialise an N x N matrix for float64 with a key bias")
        return why

    @staticmethod
    def run(q, k, v, scale, causal, bias, need_lse):
        if bias is not None and q.device.type != "cpu":
            bias = _aligned(bias.to(q.dtype), q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale), None


class CpuFlash(Kernel):
    """aten's flash attention for CPU."""

    name = "cpu_flash"
    devices = frozenset({"cpu"})
    causal_bias = True

    @staticmethod
    def run(q, k, v, scale, causal, bias, need_lse):
        mask = None if bias is None else bias.expand(q.shape[0], bias.shape[1], 1, k.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse if bias is None else _dead_rows(lse, bias, causal)


class Xformers(Kernel):
    """xformers' ``memory_efficient_attention_forward_requires_grad``, by whichever of its operators takes the inputs."""

    name = "xformers"
    devices = frozenset({"cuda"})
    dtypes = FLOAT
    key_bias = False

    @classmethod
    def reasons(cls, call: Call) -> list[str]:
        why = super().reasons(call)
        if call.need_grad and not call.need_lse:
            why.append("is used without gradients only")
        if torch.compiler.is_compiling():
            why.append("breaks the graph under torch.compile")
        if not why:
            fmha = _fmha()
            why += [fmha] if isinstance(fmha, str) else _xformers_operator(fmha, call)[1]
        return why

    @staticmethod
    def run(q, k, v, scale, causal, bias, need_lse):
        fmha = _fmha()
        operator, _ = _xformers_operator(fmha, facts(q, k, v, causal=causal, need_lse=need_lse))
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_bias=fmha.attn_bias.LowerTriangularMask() if causal else None,
            scale=scale,
            op=operator,
        )
        return out.transpose(1, 2), lse[..., : q.shape[2]]


class Flash(Kernel):
    """aten's flash attention for CUDA; head sizes are padded to a multiple of 8."""

    name = "flash"
    devices = frozenset({"cuda"})
    dtypes = HALF
    key_bias = False

    @classmethod
    def reasons(cls, call: Call) -> list[str]:
        why = super().reasons(call)
        if call.dim > 256:
            why.append(f"head size {call.dim} is above 256")
        if not why and not torch.cuda.is_available():
            why.append("finds no CUDA device")
        elif not why and torch.cuda.get_device_capability() < (8, 0):
            why.append("needs compute capability 8.0")
        return why

    @staticmethod
    def run(q, k, v, scale, causal, bias, need_lse):
        dim = q.shape[-1]
        if dim % 8:
            q, k, v = (F.pad(x, (0, 8 - dim % 8)) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
        return out[..., :dim], lse[..., : q.shape[2]]


class Efficient(Kernel):
    """aten's memory-efficient attention for CUDA; its LSE is padded to a multiple of 32."""

    name = "efficient"
    devices = frozenset({"cuda"})
    dtypes = FLOAT
    causal_bias = True
    unequal_dims = True

    @classmethod
    def reasons(cls, call: Call) -> list[str]:
        why = super().reasons(call)
        step = 4 if call.dtype == torch.float32 else 8
        if call.dim % step or call.dim_v % step:
            why.append(f"head sizes {call.dim}, {call.dim_v} are not multiples of {step}")
        return why

    @staticmethod
    def run(q, k, v, scale, causal, bias, need_lse):
        mask = None if bias is None else _aligned(bias.to(q.dtype), q)
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, need_lse, 0.0, causal, scale=scale
        )[:2]
        if not need_lse:
            return out, None
        lse = lse[..., : q.shape[2]]
        return out, lse if bias is None else _dead_rows(lse, bias, causal)


class Math(Kernel):
    """Explicit softmax in tiles of bounded size, float32 (float64) throughout; differentiable everywhere. Always can."""

    name = "math"
    lse_gradient = True
    causal_bias = True
    unequal_dims = True

    @staticmethod
    def run(q, k, v, scale, causal, bias, need_lse, limits=None):
        if causal:
            limits = torch.arange(1, q.shape[2] + 1, device=q.device)
        return tiled_attention(q, k, v, scale, bias, limits)


KERNELS: dict[str, type[Kernel]] = {kind.name: kind for kind in (Sdpa, CpuFlash, Xformers, Flash, Efficient, Math)}


def reasons(call: Call) -> dict[str, list[str]]:
    """For every kernel why it cannot run the call; an empty list means that it can."""
    return {name: kind.reasons(call) for name, kind in KERNELS.items()}


def available_kernels(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 8,
    tokens: int = 256,
    dim: int = 64,
    need_lse: bool = True,
    causal: bool = False,
    key_bias: bool = False,
) -> list[str]:
    """Names of the kernels that run such a call, first choice first."""
    call = Call(device, dtype, 1, heads, tokens, tokens, dim, dim, causal=causal, key_bias=key_bias, need_lse=need_lse)
    return [kind.name for kind in order(call) if not kind.reasons(call)]


def order(call: Call) -> tuple[type[Kernel], ...]:
    if not call.need_lse:
        return (Sdpa, Efficient, Math) if call.dim == call.dim_v or call.device != "cpu" else (Math,)
    return (CpuFlash, Math) if call.device == "cpu" else (Xformers, Flash, Efficient, Math)


def choose(call: Call, name: str | None) -> type[Kernel]:
    if name is None:
        return next(kind for kind in order(call) if not kind.reasons(call))
    why = KERNELS[name].reasons(call)
    if why:
        others = [kind.name for kind in order(call) if not kind.reasons(call)]
        listed = "".join(f"\n  - {reason}" for reason in why)
        raise AttnCtrlError(f"kernel {name!r} cannot run {call}:{listed}\nHINT: these can: {', '.join(others)}")
    return KERNELS[name]


def facts(q, k, v, *, causal, bias=None, limits=None, need_lse) -> Call:
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    bias_grad = bias is not None and torch.is_grad_enabled() and bias.requires_grad
    return Call(
        q.device.type,
        q.dtype,
        *(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]),
        gqa=q.shape[1] // k.shape[1],
        causal=causal,
        key_bias=bias is not None,
        bias_grad=bias_grad,
        limits=limits is not None,
        need_lse=need_lse,
        need_grad=grad or bias_grad,
    )


@contextmanager
def record_kernels() -> Iterator[Counter]:
    """Count which kernel runs how often inside the block (not inside compiled code)."""
    log: Counter = Counter()
    token = KERNEL_LOG.set(log)
    try:
        yield log
    finally:
        KERNEL_LOG.reset(token)


def count_kernel(name: str) -> None:
    """For calls that do not go through ``attend``."""
    if not torch.compiler.is_compiling() and (log := KERNEL_LOG.get()) is not None:
        log[name] += 1


def _dead_rows(lse: Tensor, bias: Tensor, causal: bool) -> Tensor:
    """Fused kernels report lse = 0 for a row whose keys are all forbidden; it is -inf."""
    dead = bias == -math.inf
    dead = dead.cummin(-1).values if causal else dead.all(-1, keepdim=True)
    return lse.masked_fill(dead.squeeze(2), -math.inf)


def _aligned(bias: Tensor, q: Tensor) -> Tensor:
    """(B|1, H|1, 1, n) -> a stride-0 view (B, H, n_q, n) whose storage is padded to 16 keys, as CUDA kernels want it."""
    n = bias.shape[-1]
    bias = F.pad(bias, (0, -n % 16))[..., :n]
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], n)


@lru_cache(maxsize=1)
def _fmha() -> ModuleType | str:
    """xformers.ops.fmha, or why there is none. Importable is not usable: operators are asked one by one."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("xformers.ops.fmha")
    except Exception as error:  # whatever a broken binary raises
        return f"xformers cannot be imported: {type(error).__name__}: {error}"
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=256)
def _xformers_operator(fmha: ModuleType, call: Call) -> tuple[type | None, list[str]]:
    """The first forward operator that takes the call and returns an LSE, else what each one says."""
    why = []
    try:
        shape = (call.batch, call.n_q, call.heads, call.dim)
        key = (call.batch, call.n_k, call.heads, call.dim)
        q, k = (torch.empty(s, dtype=call.dtype, device="meta") for s in (shape, key))
        bias = fmha.attn_bias.LowerTriangularMask() if call.causal else None
        inputs = fmha.Inputs(q, k, k, attn_bias=bias)
        for operator in fmha.ALL_FW_OPS:
            said = [] if operator.is_available() else ["is not available"]
            said += [text for text in operator.not_supported_reasons(inputs) if not text.startswith("device=")]
            if not said:
                return operator, []
            why.append(f"{operator.NAME}: {'; '.join(said)}")
    except Exception as error:
        why.append(f"xformers failed: {type(error).__name__}: {error}")
    return None, why
