"""Guidance from a perturbed pass."""

from typing import TYPE_CHECKING

from .delta import add_to_all, add_to_rows, follow_change, guidance_delta
from .rows import conditional_rows


if TYPE_CHECKING:
    from .guider import HeadGuidance

__all__ = ["HeadGuidance", "add_to_all", "add_to_rows", "conditional_rows", "follow_change", "guidance_delta"]


def __getattr__(name: str):
    if name == "HeadGuidance":  # needs diffusers, which nothing else here does
        from .guider import HeadGuidance

        return HeadGuidance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
