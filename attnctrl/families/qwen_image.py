"""Qwen-Image: text first, packed image tokens. Two calls a step, the conditional one first; the guided prediction is always
brought back to the norm of the conditional one. Text is masked only where the prompts of a batch differ in length. Reference images
(Qwen-Image-Edit) follow the latents."""

from __future__ import annotations

from ..errors import AttnCtrlError
from .family import Family, Stack, running
from .grids import with_references


def _grid(bound, model):
    shapes = bound["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    if len(shapes) > 1 and getattr(model.config, "use_layer3d_rope", False):
        raise AttnCtrlError("this call makes several layers (Qwen-Image-Layered), which regions cannot place yet")
    frames, rows, columns = shapes[0]
    return (rows, columns) if frames == 1 else (frames, rows, columns)


def _encode(pipeline, prompts, length, device):
    embeds, _ = pipeline.encode_prompt(prompt=prompts, device=device)
    return embeds


QWEN_IMAGE = Family(
    name="qwen_image",
    denoiser="QwenImageTransformer2DModel",
    component="transformer",
    stacks=(Stack("transformer_blocks", "attn", "joint", ("text", "image"), gives=("text", "image")),),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=_grid,
    lengths=with_references(_grid),
    encode=_encode,
    text_mask="encoder_hidden_states_mask",
    cfg_on=lambda pipeline: bool(running(pipeline, "do_true_cfg")),
    uncond_weight=lambda pipeline: 1 - float(running(pipeline, "true_cfg_scale")),
    renormalizes=lambda pipeline: True,
)
