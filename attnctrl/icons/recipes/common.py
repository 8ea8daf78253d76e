"""What the recipes share: device and precision, resumable checkpoints, the learning-rate curve."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch


def pick_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products on either kind of device; the weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16)


def warmup_cosine(step: int, steps: int, warmup: int = 50, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, cosine decay to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def save_checkpoint(path: Path, state: dict) -> None:
    """Atomic: a killed run leaves the previous checkpoint whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict | None:
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
