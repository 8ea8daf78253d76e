"""Tiny transformers that make images."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

from .common import Noise, build, position_ids, text_mask


def tiny_sd3(
    dual: bool = False, qk_norm: str | None = "rms_norm", layers: int = 3, heads: int = 4
) -> SD3Transformer2DModel:
    return build(
        SD3Transformer2DModel,
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


def sd3_call(batch: int = 2, height: int = 8, width: int = 8, text: int = 5, dtype=torch.float32) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "pooled_projections": noise(batch, 12),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "return_dict": False,
    }


def tiny_flux(guidance: bool = False) -> FluxTransformer2DModel:
    return build(
        FluxTransformer2DModel,
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


def flux_call(batch: int = 2, rows: int = 4, columns: int = 4, text: int = 5, dtype=torch.float32) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, rows * columns, 8),
        "encoder_hidden_states": noise(batch, text, 16),
        "pooled_projections": noise(batch, 12),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "img_ids": position_ids(rows, columns).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "return_dict": False,
    }


def tiny_flux2() -> Flux2Transformer2DModel:
    return build(
        Flux2Transformer2DModel,
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(2, 2, 2, 2),
    )


def flux2_call(batch: int = 2, rows: int = 4, columns: int = 4, text: int = 5, dtype=torch.float32) -> dict:
    noise = Noise(dtype)
    numbers = torch.cat([torch.zeros(text, 3, dtype=torch.int64), torch.arange(text)[:, None]], dim=1)
    return {
        "hidden_states": noise(batch, rows * columns, 8),
        "encoder_hidden_states": noise(batch, text, 16),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": position_ids(rows, columns, extra=1).expand(batch, -1, -1),
        "txt_ids": numbers.expand(batch, -1, -1),
        "return_dict": False,
    }


def tiny_chroma() -> ChromaTransformer2DModel:
    return build(
        ChromaTransformer2DModel,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


def chroma_call(
    batch: int = 2, rows: int = 4, columns: int = 4, text: int = 5, missing: int = 2, dtype=torch.float32
) -> dict:
    noise = Noise(dtype)
    mask = torch.cat([text_mask(batch, text, missing), torch.ones(batch, rows * columns, dtype=torch.int64)], dim=1)
    return {
        "hidden_states": noise(batch, rows * columns, 8),
        "encoder_hidden_states": noise(batch, text, 16),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "img_ids": position_ids(rows, columns).to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "attention_mask": mask.to(dtype),
        "return_dict": False,
    }


def tiny_qwen_image() -> QwenImageTransformer2DModel:
    return build(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_image_call(
    batch: int = 2, rows: int = 4, columns: int = 4, text: int = 5, missing: int = 2, dtype=torch.float32
) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, rows * columns, 16),
        "encoder_hidden_states": noise(batch, text, 16),
        "encoder_hidden_states_mask": text_mask(batch, text, missing) if missing else None,
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "img_shapes": [[(1, rows, columns)]] * batch,
        "return_dict": False,
    }


def tiny_z_image() -> ZImageTransformer2DModel:
    return build(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )


def z_image_call(
    batch: int = 2, height: int = 8, width: int = 8, text: int = 40, missing: int = 30, dtype=torch.float32
) -> dict:
    """The prompt of the last row has `missing` tokens less."""
    noise = Noise(dtype)
    return {
        "x": [noise(4, 1, height, width) for _ in range(batch)],
        "t": torch.full((batch,), 0.5, dtype=dtype),
        "cap_feats": [noise(text - missing * (row == batch - 1), 16) for row in range(batch)],
        "return_dict": False,
    }


def tiny_pixart() -> PixArtTransformer2DModel:
    return build(
        PixArtTransformer2DModel,
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=16,
    )


def pixart_call(
    batch: int = 2, height: int = 8, width: int = 8, text: int = 5, missing: int = 2, dtype=torch.float32
) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "encoder_attention_mask": text_mask(batch, text, missing),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def tiny_sana() -> SanaTransformer2DModel:
    return build(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=4,
    )


def sana_call(
    batch: int = 2, height: int = 4, width: int = 4, text: int = 5, missing: int = 2, dtype=torch.float32
) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "encoder_attention_mask": text_mask(batch, text, missing),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }


def tiny_lumina2() -> Lumina2Transformer2DModel:
    return build(
        Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=16,
    )


def lumina2_call(
    batch: int = 2, height: int = 8, width: int = 8, text: int = 5, missing: int = 2, dtype=torch.float32
) -> dict:
    """Every row has `missing` tokens of padding at the end of its prompt."""
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "encoder_attention_mask": text_mask(1, text, missing).expand(batch, -1),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "return_dict": False,
    }


def tiny_hunyuan_image() -> HunyuanImageTransformer2DModel:
    return build(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        rope_axes_dim=(4, 4),
    )


def hunyuan_image_call(
    batch: int = 2, height: int = 4, width: int = 4, text: int = 5, missing: int = 2, dtype=torch.float32
) -> dict:
    """The last row has no glyph prompt."""
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "encoder_attention_mask": text_mask(batch, text, missing),
        "encoder_hidden_states_2": noise(batch, 3, 12),
        "encoder_attention_mask_2": text_mask(batch, 3, 3 if missing else 0),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "return_dict": False,
    }


def tiny_cogview4() -> CogView4Transformer2DModel:
    return build(
        CogView4Transformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )


def cogview4_call(batch: int = 2, height: int = 8, width: int = 8, text: int = 5, dtype=torch.float32) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "timestep": torch.full((batch,), 500),
        "original_size": torch.tensor([[64.0, 64.0]] * batch),
        "target_size": torch.tensor([[64.0, 64.0]] * batch),
        "crop_coords": torch.zeros(batch, 2),
        "return_dict": False,
    }


def tiny_auraflow() -> AuraFlowTransformer2DModel:
    return build(
        AuraFlowTransformer2DModel,
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )


def auraflow_call(batch: int = 2, height: int = 8, width: int = 8, text: int = 5, dtype=torch.float32) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "encoder_hidden_states": noise(batch, text, 16),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "return_dict": False,
    }


def tiny_hidream() -> HiDreamImageTransformer2DModel:
    return build(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[16, 12],
        text_emb_dim=12,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(10, 10),
        llama_layers=[0, 1, 2, 2],
    )


def hidream_call(batch: int = 2, height: int = 8, width: int = 8, text: int = 5, dtype=torch.float32) -> dict:
    noise = Noise(dtype)
    return {
        "hidden_states": noise(batch, 4, height, width),
        "timesteps": torch.full((batch,), 500),
        "encoder_hidden_states_t5": noise(batch, text, 16),
        "encoder_hidden_states_llama3": noise(3, batch, text + 1, 12),
        "pooled_embeds": noise(batch, 12),
        "return_dict": False,
    }
