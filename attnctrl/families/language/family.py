"""What attnctrl has to be told about a language model: where it lies in the whole, and which tokens stand for images.

All facts are of transformers 5.23. A model that is in no table is taken as it is if it names its language model and its image token
the usual way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AttnCtrlError
from ...sites import Site


STREAMS = ("tokens",)  # of a site of a language model


@dataclass(frozen=True)
class Model:
    """What a control may know of the language model."""

    name: str
    model_type: str
    hidden: int
    layers: int
    vocabulary: int
    image_ids: tuple[int, ...]
    class_token: bool = False
    """The vision tower has a class token, and its other tokens are the image tokens, one by one."""
    grid: str = ""
    """How image tokens lie in their image, as in `LanguageFamily`."""


@dataclass(frozen=True)
class LanguageFamily:
    """How a family is built.

    Args:
        name: as reports write it. model_type: of its config.
        language: path of the language model inside the base model (``model.base_model``); "" is the base model itself.
        image_ids: names in the config of the tokens that stand for image or video features.
        grid: how image tokens lie in their image, a name of `grids.GRIDS`; "" where that is not known.
        refuses: reasons by control name, or under "image" for all controls of image tokens, why one cannot work.
        vision: model_type of the vision config, where several families share a `model_type`; the one without it comes last.
    """

    name: str
    model_type: str
    language: str = "language_model"
    image_ids: tuple[str, ...] = ("image_token_id",)
    grid: str = ""
    refuses: tuple[tuple[str, str], ...] = ()
    vision: str = ""


_VIDEO = ("image_token_id", "video_token_id")
FAMILIES = (
    LanguageFamily("Pixtral", "llava", grid="sizes", vision="pixtral"),
    LanguageFamily("LLaVA", "llava", grid="square"),
    LanguageFamily("LLaVA-NeXT", "llava_next", grid="base"),
    LanguageFamily("LLaVA-NeXT-Video", "llava_next_video", image_ids=_VIDEO, grid="base"),
    LanguageFamily("LLaVA-OneVision", "llava_onevision", image_ids=_VIDEO, grid="base"),
    LanguageFamily("Qwen2-VL", "qwen2_vl", image_ids=_VIDEO, grid="patches"),
    LanguageFamily("Qwen2.5-VL", "qwen2_5_vl", image_ids=_VIDEO, grid="patches"),
    LanguageFamily("Qwen3-VL", "qwen3_vl", image_ids=_VIDEO, grid="patches"),
    LanguageFamily("SmolVLM", "smolvlm", language="text_model", grid="tiles"),
    LanguageFamily("Idefics3", "idefics3", language="text_model", grid="tiles"),
    LanguageFamily("InternVL", "internvl", grid="tiles"),
    LanguageFamily("Gemma 3", "gemma3", grid="square"),
    LanguageFamily("PaliGemma", "paligemma", grid="square"),
    LanguageFamily("Mistral 3", "mistral3", grid="sizes"),
    LanguageFamily("FastVLM", "fast_vlm", grid="square"),
    LanguageFamily("Janus", "janus", grid="square"),
    LanguageFamily("GLM-4V", "glm4v", grid="patches"),
    LanguageFamily(
        "Mllama",
        "mllama",
        refuses=(("image", "its image tokens are keys of cross-attention layers, not of the sequence"),),
    ),
)
_BRANCHES = "its code does different things under different attention implementations"
REFUSED = {
    "dots3_note": _BRANCHES,
    "falcon": _BRANCHES,
    "gemma4": _BRANCHES,
    "gpt2": _BRANCHES,
    "minimax_m3_vl": _BRANCHES,
    "qwen2_5_omni": _BRANCHES,
}


@dataclass(frozen=True)
class Language:
    """A language model in place: the module that is called with token ids, the language model in it, and its attention sites."""

    family: LanguageFamily
    base: nn.Module
    decoder: nn.Module
    sites: tuple[Site, ...]
    facts: Model
    tower: tuple[nn.Module, ...] = ()
    """Attention of a vision tower with a class token, layer by layer."""


def find_language(model: nn.Module) -> Language:
    """The language model of a transformers model. Raises AttnCtrlError where there is none, or none that can be controlled."""
    kind = type(model).__name__
    config = model.config
    model_type = getattr(config, "model_type", "")
    for found in {model_type, getattr(config.get_text_config(), "model_type", "")} & set(REFUSED):
        raise AttnCtrlError(f"{kind} ({found}) cannot be controlled: {REFUSED[found]}")
    base = model.base_model
    seen_by = ("", getattr(getattr(config, "vision_config", None), "model_type", ""))
    family = next((one for one in FAMILIES if one.model_type == model_type and one.vision in seen_by), None)
    if family is None:
        text_only = not getattr(config, "sub_configs", None)
        ids = tuple(name for name in _VIDEO if isinstance(getattr(config, name, None), int))
        if not text_only and not ids:
            raise AttnCtrlError(
                f"{kind} is in no family table, and its config names no image_token_id\n"
                "HINT: LanguageFamily (attnctrl/families/language/family.py) names its language model and its image tokens; "
                f"known: {', '.join(family.name for family in FAMILIES)}"
            )
        family = LanguageFamily(kind, model_type, language="", image_ids=ids)
        decoder = base if text_only else model.get_decoder()
    else:
        decoder = getattr(base, family.language, None) if family.language else base
        if decoder is None:
            raise AttnCtrlError(
                f"{kind}: {type(base).__name__} has no {family.language!r}, where {family.name} keeps it"
            )
    prefix = next((f"{path}." if path else "" for path, module in model.named_modules() if module is decoder), "")
    sites = tuple(
        Site(f"{prefix}{path}", module.layer_idx, "self", _heads(module, decoder), STREAMS)
        for path, module in decoder.named_modules()
        if _is_self_attention(module)
    )
    if not sites:
        raise AttnCtrlError(
            f"{kind}: {type(decoder).__name__} has no attention that goes through transformers' attention interface\n"
            "HINT: its attention modules need layer_idx, scaling and a config, as in Llama"
        )
    ids = tuple(value for name in family.image_ids if isinstance(value := getattr(config, name, None), int))
    text = decoder.config
    whole = family.grid == "square" and getattr(config, "vision_feature_select_strategy", None) == "default"
    seen = getattr(base, "vision_tower", None) if whole else None
    tower = tuple(m for m in seen.modules() if type(m).__name__ == "CLIPAttention") if seen is not None else ()
    sizes = (text.hidden_size, len(sites), text.vocab_size)
    facts = Model(family.name, text.model_type, *sizes, ids, bool(tower), family.grid)
    return Language(family, base, decoder, sites, facts, tower)


def _is_self_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    routed = all(hasattr(module, attribute) for attribute in ("config", "scaling")) and isinstance(
        getattr(module, "layer_idx", None), int
    )
    return routed and "Attention" in name and "Cross" not in name


def _heads(module: Any, decoder: Any) -> int:
    for owner in (module, module.config, decoder.config):
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    raise AttnCtrlError(f"{type(module).__name__} names its number of heads nowhere")


def class_token_attention(module: nn.Module, hidden: Tensor) -> Tensor:
    """Of a CLIP attention module that is given hidden (N, 1 + patches, C): what its first token attends to, (N, patches), over heads."""
    heads = module.num_heads
    q, k = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (module.q_proj(hidden[:, :1]), module.k_proj(hidden))
    )
    q, k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
    return (q @ k.transpose(-1, -2) * module.scale).softmax(-1).sum(1)[:, 0, 1:]
