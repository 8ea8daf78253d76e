"""UNets with cross-attention: Stable Diffusion 1 and 2, SDXL, Kolors and their kin. [uncond, cond] in one batch.

Every transformer block attends first to the image (`attn1`, the layer that numbers select), then from the image to the text
(`attn2`, by path). Layers run through the down, mid and up blocks. The number of image tokens differs between blocks; the grid is
the one of the first block that attends.
"""

from __future__ import annotations

from ..errors import AttnCtrlError
from .family import Family, Stack


def _grid(bound, model):
    height, width = bound["sample"].shape[-2:]
    for block in model.down_blocks:
        if any(hasattr(inner, "transformer_blocks") for inner in getattr(block, "attentions", None) or ()):
            break
        if getattr(block, "downsamplers", None) is not None:  # a convolution of stride 2, which rounds up
            height, width = -(-height // 2), -(-width // 2)
    return height, width


def _lengths(bound, model):
    return {"image": None, "text": bound["encoder_hidden_states"].shape[1]}


def _encode(pipeline, prompts, length, device):
    if getattr(pipeline.unet.config, "addition_embed_type", None) == "text":
        raise AttnCtrlError("this UNet also pools its text (DeepFloyd IF), so no prompts can be appended")
    embeds, *_ = pipeline.encode_prompt(
        prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return embeds


def _rescales(pipeline):
    return bool(getattr(pipeline, "guidance_rescale", 0))


_PLACES = ("down_blocks.*", "mid_block", "up_blocks.*")

UNET = Family(
    name="unet",
    denoiser="UNet2DConditionModel",
    component="unet",
    stacks=tuple(
        Stack(f"{place}.attentions.*.transformer_blocks", attention, kind, ("image",), primary=kind == "self")
        for place in _PLACES
        for attention, kind in (("attn1", "self"), ("attn2", "cross"))
    ),
    image="sample",
    text="encoder_hidden_states",
    cfg="batched",
    grid=_grid,
    encode=_encode,
    adapters=True,
    tokenizers=(("tokenizer", None),),
    text_mask="encoder_attention_mask",
    lengths=_lengths,
    units=("down_blocks", "mid_block", "up_blocks"),
    skips=True,
    renormalizes=_rescales,
)
