"""The controls, one file per method."""

from .act import ACT
from .adaptvis import AdaptVis
from .base import Control, Edit, Moment
from .concentric_causal import ConcentricCausal
from .constrained_cross_attention import ConstrainedCrossAttention
from .gift import GIFT
from .head_scale import HeadScale
from .isolation import Isolation
from .keyword_scope import KeywordScope
from .language import LanguageControl
from .latent_guidance import LatentGuidance
from .normalized_attention import NormalizedAttention
from .pai import PAI
from .paint import PAINT
from .pasta import PASTA
from .pine import PINE
from .record_attention import RecordAttention
from .regional_prompts import RegionalPrompts
from .reposition import Reposition
from .shared_attention import SharedAttention
from .skip_layers import SkipLayers
from .smoothed_energy import SmoothedEnergy
from .softpag import SoftPAG
from .spin import SPIN
from .subject_layout import SubjectLayout
from .subject_masks import SubjectMasks
from .token_perturbation import TokenPerturbation
from .token_pruning import TokenPruning
from .vaf import VAF
from .var import VAR
from .vhr import VHR


__all__ = [
    "ACT",
    "GIFT",
    "PAI",
    "PAINT",
    "PASTA",
    "PINE",
    "SPIN",
    "VAF",
    "VAR",
    "VHR",
    "AdaptVis",
    "ConcentricCausal",
    "ConstrainedCrossAttention",
    "Control",
    "Edit",
    "HeadScale",
    "Isolation",
    "KeywordScope",
    "LanguageControl",
    "LatentGuidance",
    "Moment",
    "NormalizedAttention",
    "RecordAttention",
    "RegionalPrompts",
    "Reposition",
    "SharedAttention",
    "SkipLayers",
    "SmoothedEnergy",
    "SoftPAG",
    "SubjectLayout",
    "SubjectMasks",
    "TokenPerturbation",
    "TokenPruning",
]
