"""What the tiny models share."""

from __future__ import annotations

import torch


def awake(model):
    """Output layers start at zero in some families; give every parameter something to do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(cls, **config):
    """A model of class `cls` with the same random weights every time."""
    torch.manual_seed(0)
    return awake(cls(**config))


class Noise:
    """Normal noise, the same for every new instance."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.generator, self.dtype = torch.Generator().manual_seed(2), dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)


def text_mask(batch: int, text: int, missing: int = 2) -> torch.Tensor:
    """(B, T) int64: the last row has `missing` tokens of padding at its end, the others none."""
    mask = torch.ones(batch, text, dtype=torch.int64)
    if missing:
        mask[-1, text - missing :] = 0
    return mask


def position_ids(rows: int, columns: int, extra: int = 0) -> torch.Tensor:
    """(rows * columns, 3 + extra) ids of packed image tokens: frame 0, row, column, zeros."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    zero = torch.zeros_like(y)
    return torch.stack([zero, y, x, *[zero] * extra], -1).reshape(rows * columns, -1)
