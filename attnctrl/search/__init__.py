"""Search for the heads whose perturbation serves an objective."""

from .hunt import hunt_heads
from .objectives import Objective, aesthetic_score, icon_judge, objective_by_name, open_clip_score, torchmetrics_score


__all__ = [
    "Objective",
    "aesthetic_score",
    "hunt_heads",
    "icon_judge",
    "objective_by_name",
    "open_clip_score",
    "torchmetrics_score",
]
