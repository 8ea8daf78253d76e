"""Z-Image: image first, then text, joined before the stack; latents and prompts are lists with one tensor per row, [cond, uncond].

Image tokens and every prompt are filled up to a multiple of 32 with learned tokens. Those of the image are the stream "padding";
those of a prompt count as text. Rows with shorter prompts end in masked tokens. The refiner blocks are not layers.
"""

from __future__ import annotations

import math

from ..errors import AttnCtrlError
from .family import Family, Stack, running


_MULTIPLE = 32  # SEQ_MULTI_OF of diffusers


def _grid(bound, model):
    latents = bound["x"]
    if isinstance(latents[0], list):
        raise AttnCtrlError("this call carries reference images (Z-Image-Omni), whose tokens regions cannot place yet")
    sizes = {tuple(row.shape[1:]) for row in latents}
    if len(sizes) > 1:
        raise AttnCtrlError(f"the pictures of this batch differ in size: {sorted(sizes)}\nHINT: one size per call")
    frames, height, width = sizes.pop()
    patch, frame_patch = bound.get("patch_size", 2), bound.get("f_patch_size", 1)
    grid = (frames // frame_patch, height // patch, width // patch)
    return grid[1:] if grid[0] == 1 else grid


def _lengths(bound, model):
    image = math.prod(_grid(bound, model))
    longest = max(len(prompt) for prompt in bound["cap_feats"])
    return {"image": image, "padding": -image % _MULTIPLE, "text": longest + -longest % _MULTIPLE}


def _renormalizes(pipeline):
    return float(getattr(pipeline, "_cfg_normalization", None) or 0) > 0


Z_IMAGE = Family(
    name="z_image",
    denoiser="ZImageTransformer2DModel",
    component="transformer",
    stacks=(
        Stack(
            "layers",
            "attention",
            "joint",
            ("image", "padding", "text"),
            takes=(("sequence", "x"),),
            gives=("sequence",),
        ),
    ),
    image="x",
    text="cap_feats",
    cfg="batched, cond first",
    grid=_grid,
    lengths=_lengths,
    lists=("x", "cap_feats"),
    cfg_on=lambda pipeline: bool(running(pipeline, "apply_cfg")),
    uncond_weight=lambda pipeline: -float(running(pipeline, "current_guidance_scale")),  # cond + g (cond − uncond)
    renormalizes=_renormalizes,
    refuses=(
        (
            "RegionalPrompts",
            "Z-Image counts the image's positions from the end of its text, which appended prompts move",
        ),
    ),
)
