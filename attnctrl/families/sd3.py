"""Stable Diffusion 3 and 3.5: image tokens first, text states without positions, [uncond, cond] in one batch.

SD3.5-medium has a second, image-only attention (`attn2`) in its first blocks; no layer number selects it, its path does. The last
block returns no text.
"""

from __future__ import annotations

from .family import Family, Stack
from .grids import of_patches


def _encode(pipeline, prompts, length, device):
    clip = pipeline.tokenizer_max_length
    embeds, *_ = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        device=device,
        do_classifier_free_guidance=False,
        max_sequence_length=max(1, length - clip),
    )
    return embeds[:, :length]


_GIVES = ("text", "image")

SD3 = Family(
    name="sd3",
    denoiser="SD3Transformer2DModel",
    component="transformer",
    stacks=(
        Stack("transformer_blocks", "attn", "joint", ("image", "text"), gives=_GIVES),
        Stack("transformer_blocks", "attn2", "self", ("image",), primary=False, gives=_GIVES),
    ),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="batched",
    grid=of_patches,
    encode=_encode,
    adapters=True,
    tokenizers=(("tokenizer", None), ("tokenizer_3", "tokenizer_max_length")),
)
