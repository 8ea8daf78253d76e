"""The controls, one file per method."""

from .base import Control, Edit, Moment
from .head_scale import HeadScale
from .language import LanguageControl
from .normalized_attention import NormalizedAttention
from .pai import PAI
from .pasta import PASTA
from .regional_prompts import RegionalPrompts
from .skip_layers import SkipLayers
from .smoothed_energy import SmoothedEnergy
from .softpag import SoftPAG
from .token_perturbation import TokenPerturbation
from .vaf import VAF
from .var import VAR


__all__ = [
    "PAI",
    "PASTA",
    "VAF",
    "VAR",
    "Control",
    "Edit",
    "HeadScale",
    "LanguageControl",
    "Moment",
    "NormalizedAttention",
    "RegionalPrompts",
    "SkipLayers",
    "SmoothedEnergy",
    "SoftPAG",
    "TokenPerturbation",
]
