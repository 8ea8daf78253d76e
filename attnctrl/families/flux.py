"""FLUX.1, FLUX.2 and Chroma: text first, packed image tokens with rotary positions. Double blocks are layers 0…, single blocks
follow. Two calls a step where there is classifier-free guidance, the conditional one first.

FLUX.1 and FLUX.2-dev have guidance distilled into the model. Text ids are all zero in FLUX.1 and Chroma; FLUX.2 numbers its text
tokens. The single blocks of FLUX.1 join text and image inside and part them again, those of FLUX.2 and Chroma run on the joined
sequence. Chroma's pipeline masks padded text in every layer. Reference images (Kontext, FLUX.2 editing) follow the latents.
"""

from __future__ import annotations

from .family import Family, Stack
from .grids import of_ids, with_references


def _encode(pipeline, prompts, length, device):
    embeds, *_ = pipeline.encode_prompt(prompt=prompts, prompt_2=None, device=device, max_sequence_length=length)
    return embeds


def _encode_flux2(pipeline, prompts, length, device):
    embeds, _ = pipeline.encode_prompt(prompt=prompts, device=device, max_sequence_length=length)
    return embeds


_STREAMS = ("text", "image")
_DOUBLE = Stack("transformer_blocks", "attn", "joint", _STREAMS, gives=_STREAMS)
_JOINED = Stack(
    "single_transformer_blocks",
    "attn",
    "joint",
    _STREAMS,
    takes=(("sequence", "hidden_states"),),
    gives=("sequence",),
)

FLUX = Family(
    name="flux",
    denoiser="FluxTransformer2DModel",
    component="transformer",
    stacks=(_DOUBLE, Stack("single_transformer_blocks", "attn", "joint", _STREAMS, gives=_STREAMS)),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=of_ids,
    lengths=with_references(of_ids),
    encode=_encode,
    adapters=True,
    tokenizers=(("tokenizer_2", None),),
    text_ids="txt_ids",
    image_ids="img_ids",
    unbatched=("img_ids", "txt_ids"),
)

FLUX2 = Family(
    name="flux2",
    denoiser="Flux2Transformer2DModel",
    component="transformer",
    stacks=(_DOUBLE, _JOINED),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=of_ids,
    lengths=with_references(of_ids),
    encode=_encode_flux2,
    text_ids="txt_ids",
    image_ids="img_ids",
    unbatched=("img_ids", "txt_ids"),
    numbered_text=True,
)

CHROMA = Family(
    name="chroma",
    denoiser="ChromaTransformer2DModel",
    component="transformer",
    stacks=(_DOUBLE, _JOINED),
    image="hidden_states",
    text="encoder_hidden_states",
    cfg="separate",
    grid=of_ids,
    lengths=with_references(of_ids),
    text_ids="txt_ids",
    image_ids="img_ids",
    unbatched=("img_ids", "txt_ids"),
    refuses=(
        (
            "RegionalPrompts",
            "Chroma adds its mask of padded text to pairs of tokens as numbers, which regions cannot follow yet",
        ),
    ),
)
