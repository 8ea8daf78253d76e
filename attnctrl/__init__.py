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
    "AttnCtrlError": "errors",
    "Control": "controls",
    "HeadBatch": "heads",
    "HeadScale": "controls",
    "HeadSet": "heads",
    "LanguageSession": "processors",
    "NormalizedAttention": "controls",
    "PAI": "controls",
    "PASTA": "controls",
    "Region": "regions",
    "RegionalPrompts": "controls",
    "Schedule": "schedule",
    "Session": "processors",
    "SkipLayers": "controls",
    "SmoothedEnergy": "controls",
    "SoftPAG": "controls",
    "TokenPerturbation": "controls",
    "VAF": "controls",
    "VAR": "controls",
    "attach": "processors",
    "find_sink_dims": "processors",
    "hunt_heads": "search",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .controls import PAI as PAI
    from .controls import PASTA as PASTA
    from .controls import VAF as VAF
    from .controls import VAR as VAR
    from .controls import Control as Control
    from .controls import HeadScale as HeadScale
    from .controls import NormalizedAttention as NormalizedAttention
    from .controls import RegionalPrompts as RegionalPrompts
    from .controls import SkipLayers as SkipLayers
    from .controls import SmoothedEnergy as SmoothedEnergy
    from .controls import SoftPAG as SoftPAG
    from .controls import TokenPerturbation as TokenPerturbation
    from .errors import AttnCtrlError as AttnCtrlError
    from .heads import HeadBatch as HeadBatch
    from .heads import HeadSet as HeadSet
    from .processors import LanguageSession as LanguageSession
    from .processors import Session as Session
    from .processors import attach as attach
    from .processors import find_sink_dims as find_sink_dims
    from .regions import Region as Region
    from .schedule import Schedule as Schedule
    from .search import hunt_heads as hunt_heads


def __getattr__(name: str):
    if name in _PUBLIC:
        from ._quiet import quiet_imports

        with quiet_imports():
            value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'attnctrl' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
