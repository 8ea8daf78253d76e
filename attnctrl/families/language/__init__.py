"""The tables of language and vision-language models of transformers."""

from .family import FAMILIES, REFUSED, STREAMS, LanguageFamily, Model, class_token_attention, find_language
from .grids import IMAGE_SIZES, View, image_views


__all__ = [
    "FAMILIES",
    "IMAGE_SIZES",
    "REFUSED",
    "STREAMS",
    "LanguageFamily",
    "Model",
    "View",
    "class_token_attention",
    "find_language",
    "image_views",
]
