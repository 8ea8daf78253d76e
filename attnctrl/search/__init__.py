"""Search for the heads whose perturbation serves an objective."""

from .hunt import hunt_heads
from .objectives import Objective, icon_judge, objective_by_name, open_clip_score, torchmetrics_score


__all__ = ["Objective", "hunt_heads", "icon_judge", "objective_by_name", "open_clip_score", "torchmetrics_score"]
