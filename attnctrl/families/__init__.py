"""The tables of model families; only this package and `processors/` know a model's class names."""

from __future__ import annotations

from torch import nn

from ..errors import AttnCtrlError
from .auraflow import AURAFLOW
from .cogview import COGVIDEOX, COGVIEW4
from .family import Family, Stack
from .flux import CHROMA, FLUX, FLUX2
from .hidream import HIDREAM
from .hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO
from .ltx import LTX
from .lumina2 import LUMINA2
from .mochi import MOCHI
from .pixart import PIXART, SANA
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .unet import UNET
from .wan import WAN
from .z_image import Z_IMAGE


FAMILIES = (
    SD3,
    FLUX,
    FLUX2,
    CHROMA,
    UNET,
    PIXART,
    SANA,
    QWEN_IMAGE,
    Z_IMAGE,
    LUMINA2,
    HUNYUAN_IMAGE,
    COGVIEW4,
    AURAFLOW,
    HIDREAM,
    WAN,
    HUNYUAN_VIDEO,
    LTX,
    COGVIDEOX,
    MOCHI,
)
__all__ = ["FAMILIES", "FLUX", "SD3", "Family", "Stack", "find_denoiser", "find_family"]


def find_family(model: nn.Module) -> Family:
    """The table of a denoiser, by its class name or a base class's."""
    names = [cls.__name__ for cls in type(model).__mro__]
    for family in FAMILIES:
        if family.denoiser in names:
            return family
    known = ", ".join(f"{family.denoiser} ({family.name})" for family in FAMILIES)
    raise AttnCtrlError(
        f"no family table for {names[0]}; known: {known}\n"
        "HINT: a Family (attnctrl/families/family.py) names the class, its block stacks with the attention module and the order of "
        "token streams in each, the arguments with latents and text, how CFG rows arrive, the image grid and how prompts are encoded"
    )


def find_denoiser(target) -> tuple[nn.Module, object | None]:
    """(denoiser, pipeline): a bare denoiser comes back alone, a pipeline's is its `transformer` or `unet`; a compiled one is
    unwrapped."""
    if isinstance(target, nn.Module):
        return getattr(target, "_orig_mod", target), None
    for name in ("transformer", "unet"):
        model = getattr(target, name, None)
        if isinstance(model, nn.Module):
            return getattr(model, "_orig_mod", model), target
    raise AttnCtrlError(f"{type(target).__name__} is neither a denoiser nor a pipeline with a `transformer` or `unet`")
