"""LTX-Video: packed video tokens, (B, N, C), with cross-attention to masked text, [uncond, cond] in one batch. `attn1` is the layer
that numbers select; `attn2`, from the video to the text, goes by its path."""

from __future__ import annotations

import math

from ..errors import AttnCtrlError
from .family import Family, Stack, without_padding


def _grid(bound, model):
    """From `num_frames`, `height` and `width` in tokens, or from `video_coords`, (B, 3, N)."""
    tokens, coordinates = bound["hidden_states"].shape[1], bound.get("video_coords")
    if coordinates is None:
        grid = tuple(int(bound[name]) for name in ("num_frames", "height", "width"))
    else:
        grid = tuple(axis.unique().numel() for axis in coordinates[0])
    if math.prod(grid) != tokens:
        frames, rows, columns = grid
        raise AttnCtrlError(
            f"the video spans {frames} x {rows} x {columns} tokens but there are {tokens}: this call carries conditioning frames, "
            "whose tokens regions cannot place yet"
        )
    return grid


def _encode(pipeline, prompts, length, device):
    states, mask, *_ = pipeline.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return without_padding(states, mask)


def _rescales(pipeline):
    return bool(getattr(pipeline, "guidance_rescale", 0))


LTX = Family(
    name="ltx",
    denoiser="LTXVideoTransformer3DModel",
    component="transformer",
    stacks=(
        Stack("transformer_blocks", "attn1", "self", ("image",)),
        Stack("transformer_blocks", "attn2", "cross", ("image",), primary=False),
    ),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="batched",
    grid=_grid,
    encode=_encode,
    text_mask="encoder_attention_mask",
    unbatched=("rope_interpolation_scale",),
    renormalizes=_rescales,
)
