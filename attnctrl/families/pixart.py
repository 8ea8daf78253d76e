"""PixArt-alpha, PixArt-Sigma and Sana: image tokens with cross-attention to masked text, [uncond, cond] in one batch.

`attn1` is the layer that numbers select, `attn2`, from the image to the text, goes by its path. In Sana `attn1` is linear: its
keys and values are summed before any query comes, so there is neither a softmax nor a row to edit, and numbers select `attn2`.
"""

from __future__ import annotations

from .family import Family, Stack
from .grids import of_patches


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
    refuses=tuple(
        (control, _LINEAR)
        for control in ("SoftPAG", "SmoothedEnergy", "RegionalPrompts", "Isolation", "Reposition", "SharedAttention")
    ),
)
