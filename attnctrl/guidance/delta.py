"""The guidance term, and where it is added: pure functions, testable without a model.

final = uncond + g·(cond − uncond) + scale·(cond − perturbed). Pipelines compute the first two terms from what the denoiser
returns, so the third is added to that.
"""

from __future__ import annotations

import torch

from ..errors import AttnCtrlError


def guidance_delta(cond: torch.Tensor, perturbed: torch.Tensor, scale: float) -> torch.Tensor:
    """scale·(cond − perturbed) in float32."""
    return scale * (cond.float() - perturbed.float())


def follow_change(prediction: torch.Tensor, delta: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """A delta for what a pipeline has made of a prediction before it guides.

    Pipelines turn its sign (Z-Image), drop an axis of length 1, or keep the first tokens (Flux.2 with reference images), and
    the delta has to go along.

    Raises:
        AttnCtrlError: the pipeline did something else, such as a change to x0-prediction.
    """
    part = prediction[:, : changed.shape[1]]
    if part.numel() == changed.numel():
        part = part.reshape(changed.shape).to(changed.dtype)
        for sign in (1, -1):
            if torch.equal(sign * part, changed):
                return sign * (
                    delta if delta.shape == changed.shape else delta[:, : part.shape[1]].reshape(changed.shape)
                )
    raise AttnCtrlError(
        f"the pipeline changes the denoiser's prediction {tuple(prediction.shape)} to {tuple(changed.shape)} before its guider sees it, "
        "and the guidance term cannot follow\nHINT: attach the controls to the denoiser without a guider"
    )


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
