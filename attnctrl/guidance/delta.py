"""The guidance term, and where it is added: pure functions, testable without a model."""

from __future__ import annotations

import torch


def guidance_delta(cond: torch.Tensor, perturbed: torch.Tensor, scale: float) -> torch.Tensor:
    """scale·(cond − perturbed) in float32."""
    return scale * (cond.float() - perturbed.float())


def add_to_all(prediction: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Adds a delta of n rows to a prediction of m·n rows [row r belongs to sample r mod n].

    Pipelines combine the halves with coefficients that sum to 1, so the same delta in every half comes out once, whatever
    the CFG scale. The delta may have fewer channels than the prediction (learned variances stay untouched).
    """
    repeats = prediction.shape[0] // delta.shape[0]
    delta = delta.repeat(repeats, *[1] * (delta.ndim - 1))
    out = prediction.clone()
    channels = delta.shape[1] if prediction.ndim == 4 else prediction.shape[1]
    out[:, :channels] = (prediction[:, :channels].float() + delta).to(prediction.dtype)
    return out
