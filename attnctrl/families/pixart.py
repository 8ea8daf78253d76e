"""PixArt-alpha, PixArt-Sigma and Sana: image tokens with cross-attention to masked text, [uncond, cond] in one batch.

`attn1` is the layer that numbers select, `attn2`, from the image to the text, goes by its path. In Sana `attn1` is linear: its
keys and values are summed before any query comes, so there is neither a softmax nor a row to edit, and numbers select `attn2`.
Region prompts are appended without their padding; the mask grows with them.
"""

from __future__ import annotations

from .family import Family, Stack, running, without_padding
from .grids import of_patches


def _encode(pipeline, prompts, length, device, **options):
    states, mask, *_ = pipeline.encode_prompt(
        prompt=prompts,
        do_classifier_free_guidance=False,
        device=device,
        clean_caption=running(pipeline, "clean_caption", False),
        max_sequence_length=length,
        **options,
    )
    return without_padding(states, mask)


def _encode_sana(pipeline, prompts, length, device):
    instruction = running(pipeline, "complex_human_instruction", None)
    return _encode(pipeline, prompts, length, device, complex_human_instruction=instruction)


_LINEAR = "the self-attention of Sana is linear: it has no attention probabilities"

PIXART = Family(
    name="pixart",
    denoiser="PixArtTransformer2DModel",
    component="transformer",
    stacks=(
        Stack("transformer_blocks", "attn1", "self", ("image",)),
        Stack("transformer_blocks", "attn2", "cross", ("image",), primary=False),
    ),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="batched",
    grid=of_patches,
    encode=_encode,
    text_mask="encoder_attention_mask",
)

SANA = Family(
    name="sana",
    denoiser="SanaTransformer2DModel",
    component="transformer",
    stacks=(Stack("transformer_blocks", "attn2", "cross", ("image",)),),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="batched",
    grid=of_patches,
    encode=_encode_sana,
    text_mask="encoder_attention_mask",
    refuses=tuple(
        (control, _LINEAR) for control in ("SoftPAG", "SmoothedEnergy", "Isolation", "Reposition", "SharedAttention")
    ),
)
