"""Where a model looked while it wrote a token: its attention to the image, as it was used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.rows import Pattern, RowEdit
from ..errors import AttnCtrlError
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Model, Prompt


@dataclass(eq=False)
class Record:
    """What was recorded since the last prompt: by position of the row, then by path of the site."""

    prompt: Prompt | None = None
    rows: dict[int, dict[str, Pattern]] = field(default_factory=dict)

    def values(self, position: int, row: int, wanted: dict[str, Tensor]) -> Tensor:
        """Probability of each image token of a prompt, (n,) float32: the mean over the heads that are wanted and recorded, by weight."""
        count = int(self.prompt.image[row].sum())
        total, weight = torch.zeros(count), 0.0
        for path, pattern in self.rows[position].items():
            by = wanted.get(path)
            if by is not None:
                by = by if pattern.heads is None else by[list(pattern.heads)]
                seen = torch.einsum("h,hk->k", by, pattern.of(row)[:, 0].cpu().float())
                total += F.pad(seen, (count - len(seen), 0))  # the first ones are what a sliding window leaves behind
                weight += float(by.sum())
        if weight <= 0:
            raise AttnCtrlError("none of these heads was recorded\nHINT: RecordAttention() records all of them")
        return total / weight


@dataclass(frozen=True, eq=False)
class RecordAttention(LanguageControl):
    """Records the row of every token that is written, after all other controls, over the image; changes nothing.

    `session.attention_map(token, image)` shows it. One row of a layer is computed beside the model's kernel, never a whole map. What is
    kept on the device: 4 bytes per layer, head, image token and written token, until the next prompt is read.

    Args:
        layers: None for all. heads: None for all of them; their weights are those of the mean.
    """

    layers: str | int | Iterable[int] | None = None
    heads: HeadSet | str | Iterable | None = None

    per_layer = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "record", Record())  # of one attachment: `fit` makes a copy

    def fit(self, model: Model) -> RecordAttention:
        super().fit(model)
        return replace(self)

    def read(self, prompt: Prompt) -> None:
        super().read(prompt)
        self.record.prompt = prompt
        self.record.rows.clear()

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        rows = prompt.row_of_last() if prompt.reads else (prompt.length - 1,) * prompt.batch
        chosen = tuple(weights.nonzero().flatten().tolist())
        pattern = Pattern(tuple((at,) for at in rows), prompt.image_keys(n_k), chosen)
        self.record.rows.setdefault(prompt.total, {})[site.path] = pattern
        return (pattern.edit(),)

    def says(self) -> tuple[str, ...]:
        return (f"RecordAttention: {len(self.record.rows)} tokens since the last prompt",) * bool(self.record.rows)
