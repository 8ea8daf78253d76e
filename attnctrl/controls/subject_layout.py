"""SubjectLayout: every picture of an IP-Adapter acts in the place of its subject.

Yu et al., "AnyMS: Bottom-up Attention Decoupling for Layout-guided and Training-free Multi-subject Customization", 2025, arXiv
2512.23537. Text and image attention stay apart, as IP-Adapters have them (Ye et al., 2023, arXiv 2308.06721): with the queries Q_j of the
image tokens in the place of subject j, the adapter's keys K_j and values V_j of its picture, and the adapter's own scale

    out = attention(Q, K_text, V_text) + scale · Z        Z[place of j] = attention(Q_j, K_j, V_j)        Z = 0 outside all places

The paper starts Z from "the global query"; here nothing is added outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from ..attention import as_tokens, attend
from ..errors import AttnCtrlError
from ..schedule import parse_layers
from ..sites import Site
from .base import Control
from .subject_masks import as_regions


Overlap = Literal["priority", "mean", "sum"]


@dataclass(frozen=True, eq=False)
class SubjectLayout(Control):
    """Confines each picture of the pipeline's own IP-Adapter to the image tokens of its subject's place.

        pipe.load_ip_adapter(…)
        with ac.attach(pipe, ac.SubjectLayout([(0, 0.2, 0.5, 1), (0.5, 0.2, 1, 1)])):
            pipe("a cat and a dog on a beach", ip_adapter_image=[[cat, dog]])

    Attention to the text is untouched, both halves of classifier-free guidance are edited, and each place costs one small attention
    call without a mask. Outside its window, and in other layers than `layers`, the adapter acts on the whole picture as ever.

    Args:
        subjects: where they are, one entry per picture of the call, those of the first adapter first: each a `Region`, a box
            (x0, y0, x1, y1) in fractions, a mask, or a text that `Region.parse` reads. A region's own strength scales what its picture
            adds, and `feather` fades it out towards the edge. An empty list is neutral.
        overlap: image tokens in several places see the picture of the last one ("priority"), or get the average ("mean") or the
            sum ("sum", as the masks of diffusers) of what each picture gives alone.
        strength: 0 (off) to 1; blends the confined adapter and the adapter as it is.
        layers: layer numbers as `parse_layers` reads them, in UNets those of the blocks; None for all that have the adapter.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high) noise levels to which the window is restricted.

    A place that covers no token on a coarser level of a UNet keeps one there, with a warning.
    """

    subjects: Sequence[Any] = ()
    overlap: Overlap = "priority"
    strength: float = 1.0
    layers: str | int | Iterable[int] | None = None
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None

    both = True

    def __post_init__(self) -> None:
        wrong = []
        if isinstance(self.subjects, str) or not isinstance(self.subjects, Sequence):
            wrong.append(f"subjects={self.subjects!r} is no list of subjects")
        if self.overlap not in get_args(Overlap):
            wrong.append(f"overlap={self.overlap!r} is not one of {', '.join(get_args(Overlap))}")
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        if wrong:
            hint = "HINT: SubjectLayout([(0, 0, 0.5, 1), (0.5, 0, 1, 1)]), one place per picture"
            raise AttnCtrlError(f"SubjectLayout: {'; '.join(wrong)}\n{hint}")
        found = [as_regions(subject, f"subject {number}") for number, subject in enumerate(self.subjects, 1)]
        for number, parts in enumerate(found, 1):
            if len(parts) > 1:
                raise AttnCtrlError(
                    f"SubjectLayout: subject {number} has {len(parts)} places, and its picture goes to one\n"
                    "HINT: one mask of them all, Region(mask=…)"
                )
        object.__setattr__(self, "subjects", tuple(parts[0] for parts in found))
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @classmethod
    def example(cls, sites: Sequence[Site]) -> SubjectLayout:
        return cls([(0, 0, 1, 1)])

    @property
    def neutral(self) -> bool:
        return not self.subjects or self.strength == 0

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """All sites of the chosen layers; the session keeps those that an IP-Adapter attends at."""
        layers = parse_layers(self.layers, len({site.layer for site in sites if site.primary}))
        return {site.path: torch.ones(site.heads) for site in sites if site.layer in layers}

    def check_grid(self, grid: tuple[int, ...]) -> None:
        self.shares(grid)

    def shares(self, grid: tuple[int, ...], keep: bool = False) -> torch.Tensor:
        """How much of its picture each place gets at every image token, (S, tokens) float32 in 0-1, after the overlap policy.

        Raises for a place without tokens, or one that lies wholly under later ones; with `keep` there may be such places.
        """
        own = torch.stack([region.tokens(grid, keep) for region in self.subjects])
        soft = torch.stack([region.weights(grid, keep) for region in self.subjects])
        if self.overlap == "priority":
            for index in range(len(own) - 1):
                own[index] &= ~own[index + 1 :].any(0)
            hidden = [number for number, tokens in enumerate(own, 1) if not tokens.any()]
            if hidden and not keep:
                raise AttnCtrlError(
                    f"SubjectLayout: subject {hidden[0]} lies wholly under later subjects\nHINT: another order, or overlap='mean'"
                )
            soft = soft * own
        elif self.overlap == "mean":
            soft = soft * soft.max(0).values / soft.sum(0).clamp(min=1e-12)
        return soft * torch.tensor([region.strength for region in self.subjects])[:, None]

    @cached_property
    def _known(self) -> dict[tuple, list[tuple[slice | torch.Tensor, torch.Tensor | None]]]:
        return {}

    def _rows(
        self, grid: tuple[int, ...], device: torch.device
    ) -> list[tuple[slice | torch.Tensor, torch.Tensor | None]]:
        """(image tokens, their shares (n, 1), or None where all are 1) of every subject."""
        if (grid, device) not in self._known:
            found = []
            for share in self.shares(grid, keep=True):
                inside = share > 0
                even = bool((share[inside] == 1).all())
                tokens = as_tokens(inside) if inside.any() else slice(0, 0)
                tokens = tokens.to(device) if isinstance(tokens, torch.Tensor) else tokens
                found.append((tokens, None if even else share[inside, None].to(device)))
            self._known[grid, device] = found
        return self._known[grid, device]

    def confine(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        grid: tuple[int, ...],
        subjects: range,
        pictures: int,
        common: int = 0,
        scale: float | None = None,
    ) -> torch.Tensor:
        """An adapter's attention with every picture in its place, (B, H, n_q, D); 0 outside all places.

        Args:
            q: (B, H, n_q, D), the image tokens of the grid first.
            k, v: (B, H, n_k, D), `common` keys that every place sees (SD3: those of the image) and then as many for each picture.
            subjects: numbers of the subjects whose pictures these are; a single picture is every subject's.
            scale: of the logits; 1 / sqrt(D) if None.
        """
        length = (k.shape[2] - common) // pictures
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # laid out as SDPA does
        rows = self._rows(grid, q.device)
        for index, number in enumerate(subjects):
            tokens, share = rows[number]
            queries = q[:, :, tokens]
            if not queries.shape[2]:
                continue
            first = common + (index if pictures > 1 else 0) * length
            keys, values = (
                torch.cat([x[:, :, :common], x[:, :, first : first + length]], 2)
                if common
                else x[:, :, first : first + length]
                for x in (k, v)
            )
            part = attend(queries, keys, values, scale=scale, need_lse=False)[0]
            out[:, :, tokens] += part if share is None else part * share.to(part.dtype)
        if self.strength == 1:
            return out
        whole = attend(q, k, v, scale=scale, need_lse=False)[0]
        return out.mul_(self.strength).add_(whole, alpha=1 - self.strength)
