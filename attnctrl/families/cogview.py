"""CogView4 and CogVideoX: text first, one set of projections for both, text without positions and without a mask.

CogView4 is called twice a step, the conditional prompt first. CogVideoX takes [uncond, cond] in one batch, its latents as
(B, frames, C, height, width); the variants without rotary positions have a table of positions for a fixed text length.
"""

from __future__ import annotations

from ..errors import AttnCtrlError
from .family import Family, Stack
from .grids import of_patches


def _encode(pipeline, prompts, length, device):
    embeds, _ = pipeline.encode_prompt(prompt=prompts, do_classifier_free_guidance=False, device=device)
    return embeds


def _encode_video(pipeline, prompts, length, device):
    if not pipeline.transformer.config.use_rotary_positional_embeddings:
        raise AttnCtrlError(
            f"this CogVideoX has a table of positions for {pipeline.transformer.config.max_text_seq_length} text tokens, so no prompts "
            "can be appended\nHINT: the variants with rotary positions (CogVideoX-5b, CogVideoX 1.5) take them"
        )
    embeds, _ = pipeline.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return embeds


def _video_grid(bound, model):
    frames, _, height, width = bound["hidden_states"].shape[-4:]
    patch = model.config.patch_size
    return frames // (model.config.patch_size_t or 1), height // patch, width // patch


_STACKS = (Stack("transformer_blocks", "attn1", "joint", ("text", "image"), gives=("image", "text")),)

COGVIEW4 = Family(
    name="cogview4",
    denoiser="CogView4Transformer2DModel",
    component="transformer",
    stacks=_STACKS,
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=of_patches,
    encode=_encode,
    unbatched=("image_rotary_emb",),
)

COGVIDEOX = Family(
    name="cogvideox",
    denoiser="CogVideoXTransformer3DModel",
    component="transformer",
    stacks=_STACKS,
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="batched",
    grid=_video_grid,
    encode=_encode_video,
    unbatched=("image_rotary_emb", "ofs"),
)
