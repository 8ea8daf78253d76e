"""How controls enter a model."""

from typing import TYPE_CHECKING

from .diffusers import ControlledAttnProcessor
from .session import Session, attach


if TYPE_CHECKING:
    from .language import LanguageSession
    from .sinks import find_sink_dims

__all__ = ["ControlledAttnProcessor", "LanguageSession", "Session", "attach", "find_sink_dims"]


def __getattr__(name: str):
    if name == "LanguageSession":  # these need transformers
        from .language import LanguageSession

        return LanguageSession
    if name == "find_sink_dims":
        from .sinks import find_sink_dims

        return find_sink_dims
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
