"""Attention sites that several controls choose in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..errors import AttnCtrlError
from ..schedule import parse_layers
from ..sites import Site


Layers = str | int | Iterable[int] | None


def image_sites(name: str, sites: Sequence[Site], layers: Layers) -> dict[str, torch.Tensor]:
    """Attention among image tokens: all of it in the chosen layers, also the second attention of SD3.5. Raises if there is none."""
    chosen = _chosen(sites, layers)
    found = {
        site.path: torch.ones(site.heads)
        for site in sites
        if "image" in site.streams and site.kind != "cross" and site.layer in chosen
    }
    if not found:
        raise AttnCtrlError(f"{name}: no attention among image tokens is in layers {layers!r}")
    return found


def text_sites(name: str, sites: Sequence[Site], layers: Layers) -> dict[str, torch.Tensor]:
    """Attention of the image to the text in the chosen layers. Raises if there is none."""
    text = [site for site in sites if site.kind == "cross" or (site.kind == "joint" and site.primary)]
    if not text:
        raise AttnCtrlError(f"{name} needs attention to a text; this model has none")
    chosen = _chosen(sites, layers)
    found = {site.path: torch.ones(site.heads) for site in text if site.layer in chosen}
    if not found:
        there = ", ".join(map(str, sorted({site.layer for site in text})))
        raise AttnCtrlError(f"{name}: layers {layers!r} do not attend to the text\nHINT: {there} do")
    return found


def _chosen(sites: Sequence[Site], layers: Layers) -> tuple[int, ...]:
    return parse_layers(layers, len({site.layer for site in sites if site.primary}))
