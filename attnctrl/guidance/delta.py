"""The guidance term, and where it is added: pure functions, testable without a model.

final = uncond + g·(cond − uncond) + scale·(cond − perturbed). Pipelines compute the first two terms from what the denoiser
returns, so the third is added to that.
"""

from __future__ import annotations

import torch


def guidance_delta(cond: torch.Tensor, perturbed: torch.Tensor, scale: float) -> torch.Tensor:
    """scale·(cond − perturbed) in float32."""
    return scale * (cond.float() - perturbed.float())


def add_to_all(prediction: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Adds a delta of n rows to a prediction of m·n rows [row r belongs to sample r mod n].

    Pipelines combine the parts with coefficients that sum to 1, so the same delta in every part comes out once, whatever
    the CFG scale. The delta may have fewer channels (dimension 1) than the prediction: learned variances stay untouched.
    """
    return add_to_rows(prediction, delta.repeat(prediction.shape[0] // delta.shape[0], *[1] * (delta.ndim - 1)))


def add_to_rows(prediction: torch.Tensor, delta: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """Adds a delta to some rows of a prediction."""
    out = prediction.clone()
    part = out[rows][:, : delta.shape[1]]
    part.copy_(part.float() + delta)
    return out
