"""Dense references: the model's own attention calls, recomputed with explicit matrices in float64."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class DenseAttention(TorchFunctionMode):
    """Replaces the i-th attention call of a forward pass by `formula(i, q, k, v)` with q, k, v (B, H, N, D) in float64."""

    def __init__(self, formula):
        super().__init__()
        self.formula, self.index = formula, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args)) | kwargs
        q, k, v = (named[name] for name in ("query", "key", "value"))
        out = self.formula(self.index, q.double(), k.double(), v.double())
        self.index += 1
        return out.to(q.dtype)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    logits = scores(q, k)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1) @ v
