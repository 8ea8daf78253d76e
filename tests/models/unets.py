"""Tiny UNets with cross-attention."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from .common import Noise, build


def tiny_unet() -> UNet2DConditionModel:
    """As in Stable Diffusion 1: attention at both resolutions. 7 transformer blocks of 2 heads."""
    return build(
        UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )


def unet_call(batch: int = 2, height: int = 8, width: int = 8, text: int = 5, dtype=torch.float32) -> dict:
    noise = Noise(dtype)
    return {
        "sample": noise(batch, 4, height, width),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(batch, text, 16),
        "return_dict": False,
    }


def tiny_sdxl() -> UNet2DConditionModel:
    """As in SDXL: no attention at the first resolution, two transformer blocks in a row at the second. 8 blocks."""
    return build(
        UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    )


def sdxl_call(batch: int = 2, height: int = 8, width: int = 8, text: int = 5, dtype=torch.float32) -> dict:
    added = {"text_embeds": Noise(dtype)(batch, 12), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * batch)}
    return unet_call(batch, height, width, text, dtype) | {"added_cond_kwargs": added}
