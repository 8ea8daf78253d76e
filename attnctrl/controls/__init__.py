"""The controls, one file per method."""

from .base import Control, Edit
from .regional_prompts import RegionalPrompts
from .softpag import SoftPAG


__all__ = ["Control", "Edit", "RegionalPrompts", "SoftPAG"]
