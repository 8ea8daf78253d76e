"""AuraFlow: eight learned register tokens, then text, then image; no mask and no positions on the text. [uncond, cond] in one
batch. Joint blocks are layers 0…, single blocks follow on the joined sequence. What the joint blocks call text begins with the
register tokens."""

from __future__ import annotations

import math

from .family import Family, Stack
from .grids import of_patches


def _lengths(bound, model):
    return {
        "register": model.register_tokens.shape[1],
        "text": bound["encoder_hidden_states"].shape[1],
        "image": math.prod(of_patches(bound, model)),
    }


def _encode(pipeline, prompts, length, device):
    embeds, *_ = pipeline.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=False, device=device, max_sequence_length=length
    )
    return embeds


_STREAMS = ("register", "text", "image")

AURAFLOW = Family(
    name="auraflow",
    denoiser="AuraFlowTransformer2DModel",
    component="transformer",
    stacks=(
        Stack("joint_transformer_blocks", "attn", "joint", _STREAMS, gives=("text", "image")),
        Stack(
            "single_transformer_blocks",
            "attn",
            "joint",
            _STREAMS,
            takes=(("sequence", "hidden_states"),),
            gives=("sequence",),
        ),
    ),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="batched",
    grid=of_patches,
    encode=_encode,
    lengths=_lengths,
)
