"""HunyuanImage 2.1 and HunyuanVideo: image or video first, then text, whose padding is masked in every layer. Double blocks are
layers 0…, single blocks follow; the token refiner's are not layers. Two calls a step where there is classifier-free guidance, the
conditional one first.

The text of HunyuanImage is the glyph prompt and the prompt together, real tokens in front, so the border between them differs from
row to row: both are one stream. Appended prompts bring no glyphs. Its pipeline guides through a guider, by default one that projects (APG).
"""

from __future__ import annotations

import math

from .family import Family, Stack, running, without_padding


_STREAMS = ("image", "text")
_STACKS = (
    Stack("transformer_blocks", "attn", "joint", _STREAMS, gives=_STREAMS),
    Stack("single_transformer_blocks", "attn", "joint", _STREAMS, gives=_STREAMS),
)
_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
_GLYPHS = ("encoder_hidden_states_2", "encoder_attention_mask_2")


def _image_grid(bound, model):
    sizes = bound["hidden_states"].shape[2:]
    return tuple(size // patch for size, patch in zip(sizes, model.config.patch_size))


def _image_lengths(bound, model):
    glyphs = bound.get("encoder_hidden_states_2")
    text = bound["encoder_hidden_states"].shape[1]
    if glyphs is not None and model.context_embedder_2 is not None:
        text += glyphs.shape[1]
    return {"image": math.prod(_image_grid(bound, model)), "text": text}


def _encode_image(pipeline, prompts, length, device):
    states, mask, *_ = pipeline.encode_prompt(prompt=prompts, device=device)
    return without_padding(states, mask)


def _encode_video(pipeline, prompts, length, device):
    template = running(pipeline, "prompt_template", None)
    states, _, mask = pipeline.encode_prompt(
        prompt=prompts,
        device=device,
        max_sequence_length=length,
        **({} if template is None else {"prompt_template": template}),
    )
    return without_padding(states, mask)


def _projects(pipeline):
    for name in ("guider", "ocr_guider"):
        guider = getattr(pipeline, name, None)
        if guider is not None and getattr(guider, "_enabled", True):
            if "Projected" in type(guider).__name__ or getattr(guider, "guidance_rescale", 0):
                return True
    return False


def _video_grid(bound, model):
    frames, height, width = bound["hidden_states"].shape[-3:]
    patch = model.config.patch_size
    return frames // model.config.patch_size_t, height // patch, width // patch


HUNYUAN_IMAGE = Family(
    name="hunyuan_image",
    denoiser="HunyuanImageTransformer2DModel",
    component="transformer",
    stacks=_STACKS,
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=_image_grid,
    lengths=_image_lengths,
    encode=_encode_image,
    text_mask="encoder_attention_mask",
    trims=(_TEXT, _GLYPHS),
    refiner="context_embedder",
    renormalizes=_projects,
)

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    denoiser="HunyuanVideoTransformer3DModel",
    component="transformer",
    stacks=_STACKS,
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=_video_grid,
    encode=_encode_video,
    text_mask="encoder_attention_mask",
    trims=(_TEXT,),
    refiner="context_embedder",
)
