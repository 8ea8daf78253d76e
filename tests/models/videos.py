"""Tiny transformers that make videos."""

from __future__ import annotations

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)

from .common import Noise, build, text_mask


def tiny_wan(picture: bool = False) -> WanTransformer3DModel:
    """With `picture`, as the image-to-video models of Wan 2.1."""
    return build(
        WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        image_dim=16 if picture else None,
        added_kv_proj_dim=24 if picture else None,
    )


def wan_call(
    batch: int = 2, frames: int = 2, height: int = 6, width: int = 8, text: int = 5, dtype=torch.float32
) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, frames, height, width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, text, 16),
        "return_dict": False,
    }


def tiny_hunyuan_video() -> HunyuanVideoTransformer3DModel:
    return build(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 2, 2),
    )


def hunyuan_video_call(
    batch: int = 2,
    frames: int = 2,
    height: int = 6,
    width: int = 8,
    text: int = 5,
    missing: int = 2,
    dtype=torch.float32,
) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, frames, height, width),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "encoder_hidden_states": noise(batch, text, 16),
        "encoder_attention_mask": text_mask(batch, text, missing),
        "pooled_projections": noise(batch, 12),
        "guidance": torch.full((batch,), 6000.0, dtype=dtype),
        "return_dict": False,
    }


def tiny_ltx() -> LTXVideoTransformer3DModel:
    return build(
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=3,
        caption_channels=16,
    )


def ltx_call(
    batch: int = 2,
    frames: int = 2,
    rows: int = 3,
    columns: int = 4,
    text: int = 5,
    missing: int = 2,
    dtype=torch.float32,
) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, frames * rows * columns, 8),
        "encoder_hidden_states": noise(batch, text, 16),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "encoder_attention_mask": text_mask(batch, text, missing),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def tiny_cogvideox(rotary: bool = True) -> CogVideoXTransformer3DModel:
    """As CogVideoX-5b; without `rotary` as CogVideoX-2b, which has a table of positions."""
    return build(
        CogVideoXTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=3,
        sample_width=8,
        sample_height=6,
        sample_frames=5,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=rotary,
    )


def cogvideox_call(
    batch: int = 2, frames: int = 2, height: int = 6, width: int = 8, text: int = 5, dtype=torch.float32
) -> dict:
    noise = Noise(dtype)
    angles = torch.linspace(0, 3, frames * (height // 2) * (width // 2))[:, None].expand(-1, 8)
    return {
        "hidden_states": noise(batch, frames, 4, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "timestep": torch.full((batch,), 500),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }


def tiny_mochi() -> MochiTransformer3DModel:
    return build(
        MochiTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=5,
    )


def mochi_call(
    batch: int = 2,
    frames: int = 2,
    height: int = 6,
    width: int = 8,
    text: int = 5,
    missing: int = 2,
    dtype=torch.float32,
) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, frames, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "encoder_attention_mask": text_mask(batch, text, missing).bool(),
        "return_dict": False,
    }
