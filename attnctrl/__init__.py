"""attnctrl: control attention in diffusion models and vision-language models.

    import attnctrl as ac
    with ac.attach(pipe, ac.SoftPAG(heads="3.5,4.2", scale=3.0)):
        image = pipe("a red cat").images[0]

Public names are loaded when first used: `import attnctrl` alone imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_PUBLIC = {
    "ACT": "controls",
    "AdaptVis": "controls",
    "AttnCtrlError": "errors",
    "ConstrainedCrossAttention": "controls",
    "ConcentricCausal": "controls",
    "Control": "controls",
    "GIFT": "controls",
    "HeadBatch": "heads",
    "HeadScale": "controls",
    "HeadSet": "heads",
    "Isolation": "controls",
    "KeywordScope": "controls",
    "LanguageSession": "processors",
    "LatentGuidance": "controls",
    "NormalizedAttention": "controls",
    "PAI": "controls",
    "PAINT": "controls",
    "PASTA": "controls",
    "PINE": "controls",
    "RecordAttention": "controls",
    "Region": "regions",
    "RegionalPrompts": "controls",
    "Reposition": "controls",
    "SPIN": "controls",
    "Schedule": "schedule",
    "Session": "processors",
    "SharedAttention": "controls",
    "SkipLayers": "controls",
    "SmoothedEnergy": "controls",
    "SoftPAG": "controls",
    "SubjectLayout": "controls",
    "SubjectMasks": "controls",
    "TokenPerturbation": "controls",
    "TokenPruning": "controls",
    "VAF": "controls",
    "VAR": "controls",
    "VHR": "controls",
    "attach": "processors",
    "calibrate_act": "search.act",
    "detect_retrieval_heads": "search.retrieval",
    "find_sink_dims": "processors",
    "fit_position_prior": "processors.language_prior",
    "hunt_heads": "search",
}
_MODULES = ("pipelines",)
__all__ = ["__version__", *_PUBLIC, *_MODULES]

if TYPE_CHECKING:
    from . import pipelines as pipelines
    from .controls import ACT as ACT
    from .controls import GIFT as GIFT
    from .controls import PAI as PAI
    from .controls import PAINT as PAINT
    from .controls import PASTA as PASTA
    from .controls import PINE as PINE
    from .controls import SPIN as SPIN
    from .controls import VAF as VAF
    from .controls import VAR as VAR
    from .controls import VHR as VHR
    from .controls import AdaptVis as AdaptVis
    from .controls import ConcentricCausal as ConcentricCausal
    from .controls import ConstrainedCrossAttention as ConstrainedCrossAttention
    from .controls import Control as Control
    from .controls import HeadScale as HeadScale
    from .controls import Isolation as Isolation
    from .controls import KeywordScope as KeywordScope
    from .controls import LatentGuidance as LatentGuidance
    from .controls import NormalizedAttention as NormalizedAttention
    from .controls import RecordAttention as RecordAttention
    from .controls import RegionalPrompts as RegionalPrompts
    from .controls import Reposition as Reposition
    from .controls import SharedAttention as SharedAttention
    from .controls import SkipLayers as SkipLayers
    from .controls import SmoothedEnergy as SmoothedEnergy
    from .controls import SoftPAG as SoftPAG
    from .controls import SubjectLayout as SubjectLayout
    from .controls import SubjectMasks as SubjectMasks
    from .controls import TokenPerturbation as TokenPerturbation
    from .controls import TokenPruning as TokenPruning
    from .errors import AttnCtrlError as AttnCtrlError
    from .heads import HeadBatch as HeadBatch
    from .heads import HeadSet as HeadSet
    from .processors import LanguageSession as LanguageSession
    from .processors import Session as Session
    from .processors import attach as attach
    from .processors import find_sink_dims as find_sink_dims
    from .processors.language_prior import fit_position_prior as fit_position_prior
    from .regions import Region as Region
    from .schedule import Schedule as Schedule
    from .search import hunt_heads as hunt_heads
    from .search.act import calibrate_act as calibrate_act
    from .search.retrieval import detect_retrieval_heads as detect_retrieval_heads


def __getattr__(name: str):
    if name in __all__:
        from ._quiet import quiet_imports

        with quiet_imports():
            module = importlib.import_module(f".{_PUBLIC.get(name, name)}", __name__)
        value = module if name in _MODULES else getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'attnctrl' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
