"""Tiny real model classes with random weights, and calls that fit them: `TINY[family name]` is (build, call)."""

from __future__ import annotations

from . import images, unets, videos
from .images import *  # noqa: F403
from .unets import *  # noqa: F403
from .videos import *  # noqa: F403


TINY = {
    name.removeprefix("tiny_"): (build, vars(module)[f"{name.removeprefix('tiny_')}_call"])
    for module in (images, unets, videos)
    for name, build in vars(module).items()
    if name.startswith("tiny_") and name != "tiny_sdxl"
}
