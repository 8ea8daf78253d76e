"""Tiny real model classes with random weights, and calls that fit them."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel


def tiny_sd3(
    dual: bool = False, qk_norm: str | None = "rms_norm", layers: int = 3, heads: int = 4
) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=16,
        caption_projection_dim=8 * heads,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        qk_norm=qk_norm,
        dual_attention_layers=(0, 1) if dual else (),
    )
    return _awake(model)


def tiny_flux(guidance: bool = False) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    return _awake(model)


def _awake(model):
    """Output layers start at zero in some families; give every parameter something to do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def sd3_call(batch: int = 2, height: int = 8, width: int = 8, text: int = 5, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 12, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "return_dict": False,
    }


def flux_call(batch: int = 2, rows: int = 4, columns: int = 4, text: int = 5, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(2)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, rows * columns, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 12, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "img_ids": torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "return_dict": False,
    }
