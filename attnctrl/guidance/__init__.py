"""Guidance from a perturbed pass."""

from .delta import add_to_all, guidance_delta


__all__ = ["add_to_all", "guidance_delta"]
