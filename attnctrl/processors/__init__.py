"""How controls enter a model."""

from .diffusers import ControlledAttnProcessor
from .session import Session, attach, detached


__all__ = ["ControlledAttnProcessor", "Session", "attach", "detached"]
