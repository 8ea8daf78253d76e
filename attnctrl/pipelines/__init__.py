"""Ready compositions of controls, with `from_pretrained`: a pipeline to call instead of a session to attach."""

from .base import ControlledPipeline
from .multi_subject import MultiSubjectPipeline
from .regional import RegionalPipeline
from .story import StoryPipeline
from .vlm import GroundedVLM


__all__ = ["ControlledPipeline", "GroundedVLM", "MultiSubjectPipeline", "RegionalPipeline", "StoryPipeline"]
