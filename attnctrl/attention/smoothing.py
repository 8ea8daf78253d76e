"""Queries blurred over the image grid: smoothed energy guidance, Hong, 2024, arXiv 2408.00760.

A Gaussian sampled at whole tokens and normalised, along rows and columns in turn. Its width is 6 sigma, made odd, and
at most one more than the axis; at the borders the image is reflected. Each axis is one small matrix, so nothing grows
with N x N.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnctrl.errors import AttnCtrlError


def kernel_width(n: int, sigma: float) -> int:
    """Taps of the Gaussian along an axis of n tokens, odd; 1 means that nothing is blurred."""
    width = math.ceil(6 * sigma)
    return min(width + 1 - width % 2, n + 1 - n % 2)


def blur_matrix(n: int, sigma: float, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """(n, n): row i holds what tokens of the axis weigh in the blurred token i. Rows sum to 1."""
    half = kernel_width(n, sigma) // 2
    offsets = torch.arange(-half, half + 1, device=device)
    weights = torch.exp(-0.5 * (offsets.to(dtype) / sigma) ** 2)
    weights = weights / weights.sum()
    source = (torch.arange(n, device=device)[:, None] + offsets).abs()
    source = (n - 1) - ((n - 1) - source).abs()
    return torch.zeros(n, n, device=device, dtype=dtype).scatter_add_(1, source, weights.expand(n, -1))


def blur(q: Tensor, grid: tuple[int, ...], sigma: float) -> Tensor:
    """q (B, H, N, D) blurred along the rows and columns of ``grid``, (rows, columns) or (frames, rows, columns); N is
    their product.
    """
    batch, heads, n, dim = q.shape
    rows, columns = grid[-2:]
    if math.prod(grid) != n:
        raise AttnCtrlError(f"a grid of {' x '.join(map(str, grid))} has {math.prod(grid)} tokens, got {n} queries")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    x = q.to(wide).reshape(-1, rows, columns, dim)
    if kernel_width(columns, sigma) > 1:
        x = blur_matrix(columns, sigma, q.device, wide) @ x
    if kernel_width(rows, sigma) > 1:
        x = blur_matrix(rows, sigma, q.device, wide) @ x.reshape(-1, rows, columns * dim)
    return x.reshape(batch, heads, n, dim).to(q.dtype)
