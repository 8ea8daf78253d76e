"""The tables of language and vision-language models of transformers."""

from .family import FAMILIES, REFUSED, STREAMS, LanguageFamily, Model, find_language


__all__ = ["FAMILIES", "REFUSED", "STREAMS", "LanguageFamily", "Model", "find_language"]
