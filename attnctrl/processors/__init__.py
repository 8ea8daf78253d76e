"""How controls enter a model."""

from .diffusers import ControlledAttnProcessor
from .session import Session, attach


__all__ = ["ControlledAttnProcessor", "Session", "attach"]
