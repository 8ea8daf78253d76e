"""Lumina Image 2: text first, joined with the image before the stack. Two calls a step, the conditional one first; the pipeline
brings the guided prediction back to the norm of the conditional one unless it is called with `cfg_normalization=False`.

Rows are packed: the image follows the last real token of its own prompt, padding stands at the end and is masked. The refiner
blocks are not layers.
"""

from __future__ import annotations

from ..errors import AttnCtrlError
from .family import Family, Stack, running
from .grids import of_patches


def _lengths(bound, model):
    rows, columns = of_patches(bound, model)
    prompts = bound["encoder_attention_mask"].sum(1).int().tolist()
    if len(set(prompts)) > 1:
        raise AttnCtrlError(
            f"the prompts of this batch have {min(prompts)} to {max(prompts)} tokens, and Lumina2 starts each image behind its own "
            "prompt\nHINT: one prompt per call (num_images_per_prompt gives several pictures of it)"
        )
    return {"text": prompts[0], "image": rows * columns}


def _cfg_on(pipeline):
    truncated = running(pipeline, "do_classifier_free_truncation", False)
    return bool(running(pipeline, "do_classifier_free_guidance")) and not truncated


LUMINA2 = Family(
    name="lumina2",
    denoiser="Lumina2Transformer2DModel",
    component="transformer",
    stacks=(
        Stack(
            "layers",
            "attn",
            "joint",
            ("text", "image"),
            takes=(("sequence", "hidden_states"),),
            gives=("sequence",),
        ),
    ),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=of_patches,
    lengths=_lengths,
    cfg_on=_cfg_on,
    renormalizes=lambda pipeline: bool(running(pipeline, "cfg_normalization", True)),
    refuses=(
        (
            "RegionalPrompts",
            "Lumina2 counts the image's positions from the end of its text, which appended prompts move",
        ),
    ),
)
