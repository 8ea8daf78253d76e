"""The controls, one file per method."""

from .act import ACT
from .adaptvis import AdaptVis
from .base import Control, Edit, Moment
from .gift import GIFT
from .head_scale import HeadScale
from .isolation import Isolation
from .language import LanguageControl
from .normalized_attention import NormalizedAttention
from .pai import PAI
from .paint import PAINT
from .pasta import PASTA
from .record_attention import RecordAttention
from .regional_prompts import RegionalPrompts
from .shared_attention import SharedAttention
from .skip_layers import SkipLayers
from .smoothed_energy import SmoothedEnergy
from .softpag import SoftPAG
from .spin import SPIN
from .subject_masks import SubjectMasks
from .token_perturbation import TokenPerturbation
from .vaf import VAF
from .var import VAR
from .vhr import VHR


__all__ = [
    "ACT",
    "GIFT",
    "PAI",
    "PAINT",
    "PASTA",
    "SPIN",
    "VAF",
    "VAR",
    "VHR",
    "AdaptVis",
    "Control",
    "Edit",
    "HeadScale",
    "Isolation",
    "LanguageControl",
    "Moment",
    "NormalizedAttention",
    "RecordAttention",
    "RegionalPrompts",
    "SharedAttention",
    "SkipLayers",
    "SmoothedEnergy",
    "SoftPAG",
    "SubjectMasks",
    "TokenPerturbation",
]
