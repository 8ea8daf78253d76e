"""FLUX.1: text first, packed image tokens with rotary positions, text ids all zero; guidance is distilled into the model,
true classifier-free guidance runs as two calls a step, the conditional one first. Double blocks are layers 0…, single blocks follow."""

from __future__ import annotations

from ..errors import AttnCtrlError
from .family import Family, Stack


def _grid(bound, model):
    ids = bound["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    if bool((ids[:, 0] != 0).any()):
        raise AttnCtrlError(
            "this call carries reference images (FLUX.1 Kontext), whose tokens regions cannot place yet"
        )
    rows, columns = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    if rows * columns != ids.shape[0]:
        raise AttnCtrlError(f"image ids span {rows} x {columns} tokens but there are {ids.shape[0]}")
    return rows, columns


def _encode(pipeline, prompts, length, device):
    embeds, *_ = pipeline.encode_prompt(prompt=prompts, prompt_2=None, device=device, max_sequence_length=length)
    return embeds


FLUX = Family(
    name="flux",
    denoiser="FluxTransformer2DModel",
    component="transformer",
    stacks=(
        Stack("transformer_blocks", "attn", "joint", ("text", "image")),
        Stack("single_transformer_blocks", "attn", "joint", ("text", "image")),
    ),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=_grid,
    encode=_encode,
    text_ids="txt_ids",
    unbatched=("img_ids", "txt_ids"),
)
