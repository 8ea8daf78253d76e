"""Ready compositions of controls, with `from_pretrained`: a pipeline to call instead of a session to attach."""

from .base import ControlledPipeline
from .regional import RegionalPipeline
from .story import StoryPipeline
from .vlm import GroundedVLM


__all__ = ["ControlledPipeline", "GroundedVLM", "RegionalPipeline", "StoryPipeline"]
