"""Wan 2.1 and 2.2: video tokens with cross-attention to text, which is padded with zeros and not masked. Two calls a step, the
conditional one first. `attn1` is the layer that numbers select; `attn2`, from the video to the text, goes by its path.

The image-to-video models of Wan 2.1 attend in `attn2` also to the encoded picture, in a call of its own, and know the text as the
last 512 tokens. Region prompts keep their padding, as the model was trained with it (`trim_text` cuts it). Wan 2.2 runs the first
steps on `transformer`, the others on `transformer_2`.
"""

from __future__ import annotations

from ..errors import AttnCtrlError
from .family import Family, Stack


def _grid(bound, model):
    sizes = bound["hidden_states"].shape[-3:]
    return tuple(size // patch for size, patch in zip(sizes, model.config.patch_size))


def _encode(pipeline, prompts, length, device):
    if pipeline.transformer.config.added_kv_proj_dim is not None:
        raise AttnCtrlError("this Wan takes a picture and exactly 512 text tokens, so no prompts can be appended")
    embeds, _ = pipeline.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return embeds


WAN = Family(
    name="wan",
    denoiser="WanTransformer3DModel",
    component="transformer",
    stacks=(
        Stack("blocks", "attn1", "self", ("image",)),
        Stack("blocks", "attn2", "cross", ("image",), primary=False),
    ),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=_grid,
    encode=_encode,
)
