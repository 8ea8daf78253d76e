"""What attention maps should be: the losses of latent guidance, from their equations.

Attend-and-Excite: Chefer et al., 2023, arXiv 2301.13826. BoxDiff: Xie et al., 2023, arXiv 2307.10816. Bounded Attention: Dahary et al.,
2024, arXiv 2403.16990. Every loss is (B,): images do not mix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.smoothing import blur


SHARPNESS, SIGMA = 100.0, 0.5  # of the softmax over words, and of the Gaussian over tokens
SHARE, REACH = 0.2, 1  # BoxDiff's P and L


def phrase_maps(words: Tensor, phrases: Sequence[Sequence[int]], grid: tuple[int, int]) -> Tensor:
    """How much every place shows each phrase and no other word, smoothed: (B, S, rows, columns) in 0-1.

        a = softmax over words of 100 words,   map_s = sum of a over the words of phrase s, blurred (3 x 3, sigma 0.5, reflected)

    Args:
        words: (B, N, W) attention of image tokens to words.
        phrases: the columns of each phrase.
    """
    a = (SHARPNESS * words).softmax(-1)
    maps = torch.stack([a[..., list(columns)].sum(-1) for columns in phrases], 1)
    return blur(maps[..., None], grid, SIGMA)[..., 0].unflatten(-1, grid)


def attend_and_excite(maps: Tensor) -> Tensor:
    """max_s (1 - max_p map_s(p)): the most neglected phrase shall be somewhere."""
    return (1 - maps.amax((2, 3))).amax(1)


def boxdiff(maps: Tensor, inside: Tensor) -> Tensor:
    """sum_s [1 - mean of the top k inside] + [mean of the top k outside] + how far the map's edges are from those of the place.

    k is a fifth of the tokens inside or outside, at least 1. The edges are mean |max-projection - projection of the place| over columns
    and rows within one token of the place's first and last.

    Args:
        inside: (S, rows, columns) bool.
    """
    total = maps.new_zeros(len(maps))
    for one, place in zip(maps.unbind(1), inside, strict=True):
        flat, here = one.flatten(1), place.flatten()
        total = total + 1 - _top(flat[:, here])
        if not here.all():
            total = total + _top(flat[:, ~here])
        for axis in (1, 0):  # columns, then rows
            edge = place.any(1 - axis)
            number = torch.arange(len(edge), device=edge.device)
            ends = edge.nonzero()[[0, -1]]
            near = ((number - ends).abs() <= REACH).any(0)
            projected = one.amax(2 - axis)
            total = total + (projected - edge.to(one)).abs()[:, near].mean(1)
    return total


def _top(values: Tensor) -> Tensor:
    """The mean of the largest fifth of values (B, n)."""
    return values.topk(max(1, int(SHARE * values.shape[1])), dim=1).values.mean(1)


def bounded(masses: Sequence[Tensor], inside: Sequence[Tensor]) -> Tensor:
    """sum_s (1 - IoU_s)^2 with IoU_s = F / (F + S B): F and B are the attention to what belongs to subject s from tokens inside its place
    and from tokens outside all places, S the number of subjects. The mean of IoU_s over layers counts.

    Args:
        masses: per layer (B, N, S). inside: per layer (S, N) bool.
    """
    found = []
    for mass, places in zip(masses, inside, strict=True):
        mass, free = mass.transpose(1, 2), ~places.any(0)
        within, beside = (mass * places).sum(-1), (mass * free).sum(-1)
        found.append(within / (within + len(places) * beside))
    return (1 - torch.stack(found).mean(0)).square().sum(1)


def nearest_grid(grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid nearest to the 16 x 16 tokens at which UNets show what is where, as published."""
    return min(grids, key=lambda grid: (abs(math.log(math.prod(grid) / 256)), grid))
