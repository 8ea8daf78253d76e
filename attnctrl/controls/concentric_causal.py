"""Image tokens placed in rings, so that none of them is far from the text behind the image.

Xing et al., "Mitigating Object Hallucination via Concentric Causal Attention", 2024, arXiv 2410.15926.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend
from ..errors import AttnCtrlError
from ..families.language import View
from .language import LanguageControl, Model, Prompt


@dataclass(frozen=True, eq=False)
class ConcentricCausal(LanguageControl):
    """Positions and visibility of image tokens by ring, from the border of the image (0) to its centre, in all layers.

    The tokens of ring k of an image of h x w tokens that begins at position p have position p + k, and the text goes on at
    p + ceil(min(h, w) / 2). A token of ring k sees what stands before its image and the rings 0 to k, all of its own one; text sees
    what it always sees.

        3 x 4 tokens   0 0 0 0      . = 1
                       0 . . 0
                       0 0 0 0

    For checkpoints that were trained with it, such as xing0047/cca-llava-1.5-7b; what it does to others nobody has measured. Models
    with rotary embeddings in sections (Qwen-VL) or without a causal mask over the image (Gemma 3, PaliGemma) are refused.
    """

    arranges: ClassVar[bool] = True
    needs_views: ClassVar[bool] = True
    shares_rows: ClassVar[bool] = True
    """Other controls may edit the rows behind the images."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", {})  # of one attachment: `fit` makes a copy

    def fit(self, model: Model) -> ConcentricCausal:
        super().fit(model)
        return replace(self)

    def find_rotation(self, decoder: nn.Module) -> nn.Module:
        """The module that makes rotary embeddings from positions."""
        rotary = getattr(decoder, "rotary_emb", None)
        if rotary is None or (getattr(decoder.config, "rope_parameters", None) or {}).get("mrope_section") is not None:
            raise AttnCtrlError(
                f"ConcentricCausal needs one position per token, and {type(decoder).__name__} has "
                + ("no rotary embedding" if rotary is None else "rotary embeddings in sections")
            )
        return rotary

    def place(self, prompt: Prompt, views: Sequence[Sequence[View]]) -> None:
        """Takes in where the images of each prompt of a batch lie."""
        shift = torch.zeros(prompt.image.shape, dtype=torch.int64)
        rings: list[list[tuple[int, Tensor]]] = []
        for row, images in enumerate(views):
            places, found = prompt.places[row].cpu(), []
            if sum(view.rows * view.columns for view in images) != len(places):
                raise AttnCtrlError(
                    f"ConcentricCausal: the {len(places)} image tokens of prompt {row} are more than whole images on one grid each"
                )
            for view in images:
                ring = rings_of(view.rows, view.columns).flatten()
                here = places[view.start : view.start + len(ring)]
                first, behind = int(here[0]), int(here[-1]) + 1
                if behind - first != len(ring):
                    raise AttnCtrlError(
                        f"ConcentricCausal: an image of prompt {row} has other tokens among its {view.rows} x {view.columns}"
                    )
                shift[row, first:behind] += ring - torch.arange(len(ring))
                shift[row, behind:] -= len(ring) - (min(view.rows, view.columns) + 1) // 2
                found.append((first, ring.to(prompt.image.device)))
                self.seen[view.rows, view.columns] = int(ring.max()) + 1
            rings.append(found)
        prompt.notes[self, "shift"] = shift.to(prompt.image.device)
        prompt.notes[self, "rings"] = rings

    def positions(self, prompt: Prompt, given: Tensor) -> Tensor:
        """Positions (B, T) of the running call's tokens, from those that the model gives them, (B|1, T)."""
        shift = prompt.notes[self, "shift"]
        more = max(prompt.total - shift.shape[1], 0)
        every = torch.cat([shift, shift[:, -1:].expand(-1, more)], 1)
        return given + every[:, prompt.past : prompt.total]

    def arrange(
        self, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor, scale: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        """Attention (B, H, T, D_v) of a call under a causal mask: q (B, H, T, D), k and v (B, H_kv, n, D) of all positions so far;
        `plain` attends as the model does."""
        out, length, own = plain(), q.shape[2], False
        for row, images in enumerate(prompt.notes[self, "rings"]):
            for first, ring in images:
                start, stop = first - prompt.past, first - prompt.past + len(ring)
                if stop <= 0 or start >= length:
                    continue
                if start < 0 or stop > length:
                    raise AttnCtrlError("an image has to be read in one call of the model\nHINT: no prefill in chunks")
                valid = F.pad(prompt.valid[row], (0, max(first - prompt.valid.shape[1], 0)), value=True)
                before = valid[:first].nonzero().flatten()
                one = slice(row, row + 1)
                out, own = (out if own else out.clone()), True
                for number in range(int(ring.max()) + 1):
                    rows = (ring == number).nonzero().flatten()
                    keys = torch.cat([before, first + (ring <= number).nonzero().flatten()])
                    out[one, :, start + rows] = attend(
                        q[one][:, :, start + rows], k[one][:, :, keys], v[one][:, :, keys], scale=scale, need_lse=False
                    )[0]
        return out

    def says(self) -> tuple[str, ...]:
        sizes = ", ".join(
            f"{rows} x {columns} tokens in {count} rings" for (rows, columns), count in self.seen.items()
        )
        return (
            f"ConcentricCausal: images of {sizes or 'no size yet'}",
            "ConcentricCausal: meant for checkpoints that were trained with it; whether this one was cannot be told from its files",
        )


def rings_of(rows: int, columns: int) -> Tensor:
    """(rows, columns): how many tokens lie between each one and the nearest border."""
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    return torch.minimum(torch.minimum(y, rows - 1 - y), torch.minimum(x, columns - 1 - x))
