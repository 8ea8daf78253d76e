"""The controls, one file per method."""

from .base import Control, Edit, Moment
from .head_scale import HeadScale
from .normalized_attention import NormalizedAttention
from .regional_prompts import RegionalPrompts
from .skip_layers import SkipLayers
from .smoothed_energy import SmoothedEnergy
from .softpag import SoftPAG
from .token_perturbation import TokenPerturbation


__all__ = [
    "Control",
    "Edit",
    "HeadScale",
    "Moment",
    "NormalizedAttention",
    "RegionalPrompts",
    "SkipLayers",
    "SmoothedEnergy",
    "SoftPAG",
    "TokenPerturbation",
]
