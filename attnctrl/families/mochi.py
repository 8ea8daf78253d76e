"""Mochi: video first, then text, [uncond, cond] in one batch. The last block drops its text.

There is one attention call per row of the batch, over the video and that row's real text tokens alone, so the text's length is
known for all calls only where all prompts have as many tokens.
"""

from __future__ import annotations

import math

from .family import Family, Stack


def _grid(bound, model):
    frames, height, width = bound["hidden_states"].shape[-3:]
    return frames, height // model.config.patch_size, width // model.config.patch_size


def _lengths(bound, model):
    prompts = set(bound["encoder_attention_mask"].bool().sum(1).tolist())
    return {"image": math.prod(_grid(bound, model)), "text": prompts.pop() if len(prompts) == 1 else None}


_PER_ROW = "Mochi attends once per row of the batch, over the real text tokens of that row alone"

MOCHI = Family(
    name="mochi",
    denoiser="MochiTransformer3DModel",
    component="transformer",
    stacks=(Stack("transformer_blocks", "attn1", "joint", ("image", "text"), gives=("image", "text")),),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="batched",
    grid=_grid,
    lengths=_lengths,
    refuses=tuple(
        (control, _PER_ROW)
        for control in (
            "SoftPAG",
            "SmoothedEnergy",
            "NormalizedAttention",
            "RegionalPrompts",
            "Isolation",
            "Reposition",
            "SharedAttention",
            "SubjectMasks",
            "SubjectLayout",
            "KeywordScope",
            "HeadScale",
        )
    ),
)
