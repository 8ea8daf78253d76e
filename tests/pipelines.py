"""A tiny `StableDiffusion3Pipeline` with random weights, saved as users save theirs."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from attnctrl.icons.recipes.text import LENGTH, build_tokenizer

from .models import tiny_sd3


def tiny_sd3_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """16 x 16 pictures by default, 3 layers of 4 heads, no third text encoder. The tokenizer's files are written to `folder`."""
    tokenizer = build_tokenizer(folder, captions=200)
    torch.manual_seed(0)
    # 8 + 8 text channels and 6 + 6 pooled ones are what `tiny_sd3` takes
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    return StableDiffusion3Pipeline(
        transformer=tiny_sd3(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.eval(),
        text_encoder=CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def save_tiny_sd3(folder: Path) -> Path:
    """Saves the tiny pipeline to `folder` and returns it."""
    tiny_sd3_pipeline(folder / "tokenizer-source").save_pretrained(folder / "model")
    return folder / "model"
