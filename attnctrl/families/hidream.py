"""HiDream: image first, then three texts: T5 ("text"), the last chosen layer of Llama ("text:llama") and, new in every block, one
more layer of Llama ("text:layer"). [uncond, cond] in one batch; the Llama states are (layers, B, T, C).

Pictures that are not square are filled up to the largest sequence with the stream "padding", whose keys the model sets to zero.
What a double block calls text is all three; it drops the third of what comes back.
"""

from __future__ import annotations

import math

from .family import Family, Stack


def _grid(bound, model):
    if bound["hidden_states"].ndim == 3:
        rows, columns = (int(size) for size in bound["img_sizes"][0])
        return rows, columns
    height, width = bound["hidden_states"].shape[-2:]
    return height // model.config.patch_size, width // model.config.patch_size


def _lengths(bound, model):
    latents, (rows, columns) = bound["hidden_states"], _grid(bound, model)
    if latents.ndim == 3:
        tokens = latents.shape[1]
    else:
        tokens = rows * columns if latents.shape[-2] == latents.shape[-1] else model.max_seq
    llama = bound["encoder_hidden_states_llama3"].shape[-2]
    return {
        "image": math.prod((rows, columns)),
        "padding": tokens - rows * columns,
        "text": bound["encoder_hidden_states_t5"].shape[1],
        "text:llama": llama,
        "text:layer": llama,
    }


_STREAMS = ("image", "padding", "text", "text:llama", "text:layer")

HIDREAM = Family(
    name="hidream",
    denoiser="HiDreamImageTransformer2DModel",
    component="transformer",
    stacks=(
        Stack("double_stream_blocks.*.block", "attn1", "joint", _STREAMS, gives=("image", "text")),
        Stack(
            "single_stream_blocks.*.block",
            "attn1",
            "joint",
            _STREAMS,
            takes=(("sequence", "hidden_states"),),
            gives=("sequence",),
        ),
    ),
    image="hidden_states",
    text="encoder_hidden_states_t5",
    cfg="batched",
    grid=_grid,
    lengths=_lengths,
    row_dims=(("encoder_hidden_states_llama3", 1),),
    refuses=(
        ("RegionalPrompts", "HiDream has three texts, two of them from Llama, to which none can be appended yet"),
    ),
)
