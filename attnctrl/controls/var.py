"""Visual attention redistribution: what falls on sink tokens goes to the tokens of the image that say something.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", 2025, arXiv 2503.03321.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.blocks import exact
from ..attention.rows import Recycle, RowEdit, Tally, pieces
from ..errors import AttnCtrlError
from ..heads import HeadSet
from ..sites import Site
from .language import LanguageControl, Model, Prompt, check_strength, per_head


# (model type of the language model, hidden size, layers, largest vocabulary) -> dimensions of massive activations
SINK_DIMENSIONS = {
    ("llama", 4096, 32, 33_000): (1415, 2533),  # Llama 2 7B, Vicuna 7B, LLaVA 1.5 7B
    ("llama", 5120, 40, 33_000): (2100, 4743),  # Llama 2 13B, Vicuna 13B, LLaVA 1.5 13B
    ("qwen2_vl_text", 3584, 28, 200_000): (458, 2570),  # Qwen2-VL 7B
}


class _Sinks(NamedTuple):
    """Of one layer: sinks (B, n) bool, and whether any lies in an image."""

    sinks: Tensor
    in_image: bool


@dataclass(frozen=True, eq=False)
class VAR(LanguageControl):
    """Recycles attention of sink tokens in heads that look at the image.

    A token is a sink of a layer if a sink dimension of the hidden state x that enters it stands out: max_d |x_d| / RMS(x) > tau. Sinks are
    found once, while the prompt is read, in image and text; what is generated never becomes one. In the rows behind the last image, a
    head is image-centric where the mass m_V of the image is at least `min_image_mass` and its non-sink part at least
    `min_non_sink`·m_V. There, with S all sinks and F the image without them,

        p_j <- (1 − transfer)·p_j   in S,      p_j·(1 + transfer·m_S / m_F)   in F,      unchanged elsewhere

    A layer without a sink in the image edits nothing. The sum of each row stays.

    Paper and published code name the same numbers differently. The paper's ρ is the least non-sink share of the image (0.8; 0.5 for
    hallucination and 0.9 for vision-centric tasks) and its p = 0.6 the share that moves; the code's `rho` = 0.5 is the largest *sink*
    share, 1 − ρ, and its `p` = 0.6 the share that *stays*. Here `min_non_sink` is the paper's ρ and `transfer` the share that moves;
    the defaults are the paper's, `VAR.code()` has the code's.

    Args:
        dims: sink dimensions of the hidden state; None takes the published ones of known models, "any" every dimension (a superset of
            the sinks).
        tau: 20.
        min_non_sink: 0.8. min_image_mass: 0.2. transfer: 0.6; 0 is off.
        skip_last_layer: leave the last layer alone.
        layers: "2:", sinks are there from the third layer on.
        heads: restrict to these heads; their weights multiply the share that moves.
        strength: 0 (off) to 1, multiplies `transfer`.
    """

    dims: Sequence[int] | Literal["any"] | None = None
    tau: float = 20.0
    min_non_sink: float = 0.8
    min_image_mass: float = 0.2
    transfer: float = 0.6
    skip_last_layer: bool = True
    layers: str | int | Iterable[int] | None = "2:"
    heads: HeadSet | str | Iterable | None = None
    strength: float = 1.0

    watches = True
    per_layer = True

    def __post_init__(self) -> None:
        wrong = [] if self.tau > 0 else [f"tau={self.tau} is not above 0"]
        for name in ("min_non_sink", "min_image_mass", "transfer"):
            if not 0 <= getattr(self, name) <= 1:
                wrong.append(f"{name}={getattr(self, name)} is not between 0 and 1")
        if isinstance(self.dims, str):
            wrong += [] if self.dims == "any" else [f"dims={self.dims!r} is neither 'any' nor numbers"]
        elif self.dims is not None:
            object.__setattr__(self, "dims", tuple(self.dims))
            wrong += [] if self.dims else ["dims is empty"]
            wrong += [f"dimension {d!r} is no number from 0" for d in self.dims if not isinstance(d, int) or d < 0]
        check_strength("VAR", self.strength, wrong)
        object.__setattr__(self, "tally", Tally())  # of one attachment: `fit` makes a copy

    @classmethod
    def paper(cls, **changes: Any) -> VAR:
        """The numbers of the paper, general tasks; min_non_sink=0.5 for hallucination, 0.9 for vision-centric tasks."""
        return cls(**changes)

    @classmethod
    def code(cls, **changes: Any) -> VAR:
        """The numbers of the published code."""
        return cls(**{"min_non_sink": 0.5, "transfer": 0.4, "skip_last_layer": False, **changes})

    @property
    def neutral(self) -> bool:
        return self.transfer == 0 or self.strength == 0

    def fit(self, model: Model) -> VAR:
        super().fit(model)
        if self.dims not in (None, "any") and max(self.dims) >= model.hidden:
            raise AttnCtrlError(
                f"VAR: dimension {max(self.dims)} does not exist, {model.name} has hidden size {model.hidden}; these are another model's\n"
                "HINT: dims='any' needs no dimensions"
            )
        return replace(self, dims=known_sink_dimensions(model) if self.dims is None else self.dims)

    def default_layers(self, count: int) -> Any:
        return "2:"

    def touches(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        found = super().touches(sites)
        if self.skip_last_layer and sites:
            last = max(sites, key=lambda site: site.layer).path
            if list(found) == [last]:
                raise AttnCtrlError("VAR: only the last layer is left, and it is skipped\nHINT: skip_last_layer=False")
            found.pop(last, None)
        return found

    def watch(self, site: Site, prompt: Prompt, hidden: Tensor) -> None:
        sinks = torch.cat([self._stand_out(x) for x in pieces(hidden.detach(), 1)], 1)
        key, past = (self, site.layer), prompt.past
        before = prompt.notes[key].sinks[:, :past] if key in prompt.notes else sinks[:, :0]
        every = torch.cat([F.pad(before, (0, past - before.shape[1])), sinks], 1)
        prompt.notes[key] = _Sinks(every, bool((every & prompt.image.to(every.device)).any()))
        image = prompt.image[:, past : past + sinks.shape[1]].to(sinks.device)
        self.tally.add(watched=1.0, sinks=sinks.sum(), sinks_in_image=(sinks & image).sum())

    def _stand_out(self, hidden: Tensor) -> Tensor:
        """Where a sink dimension of (B, T, C) does, (B, T) bool."""
        x = hidden.to(exact(hidden))
        top = (x if self.dims == "any" else x[..., list(self.dims)]).abs().amax(-1)
        return top > self.tau * (x.square().mean(-1) + 1e-6).sqrt()

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        found = prompt.notes[(self, site.layer)]
        if not found.in_image:
            return ()
        offset = prompt.total - n_k  # of the first key, above 0 where a window slides
        key = (self, site.layer, "edit")
        recycle, heads = prompt.notes.get(key, (None, None)) if offset == 0 else (None, None)
        if recycle is None:
            heads, by = per_head(weights)
            share = self.transfer * self.strength
            recycle = Recycle(
                sinks=found.sinks[:, offset:],
                image=prompt.image[:, offset:].to(found.sinks.device),
                share=share if not isinstance(by, Tensor) else share * by[0, :, :, None],
                min_non_sink=self.min_non_sink,
                min_image_mass=self.min_image_mass,
                tally=self.tally,
            )
            if offset == 0:
                prompt.notes[key] = recycle, heads
        return (RowEdit(recycle, prompt.rows_after_image(), heads),)

    def says(self) -> tuple[str, ...]:
        if not self.tally["watched"]:
            return ()
        n, rows, edited = self.tally["watched"], self.tally["rows"], self.tally["edited"]
        lines = [
            f"VAR: {self.tally['sinks'] / n:.3g} sinks a layer, {self.tally['sinks_in_image'] / n:.3g} of them in the image",
            f"VAR: edited {edited:.0f} of {rows:.0f} rows of heads, moved {self.tally['moved'] / max(edited, 1):.3g} of each",
        ]
        return tuple(lines)


def known_sink_dimensions(model: Model) -> tuple[int, ...]:
    """The published sink dimensions of a model. Raises AttnCtrlError if there are none."""
    for (model_type, hidden, layers, vocabulary), dims in SINK_DIMENSIONS.items():
        same = (model_type, hidden, layers) == (model.model_type, model.hidden, model.layers)
        if same and model.vocabulary <= vocabulary:
            return dims
    raise AttnCtrlError(
        f"VAR: no sink dimensions are known for {model.name} ({model.model_type}, hidden size {model.hidden}, {model.layers} layers)\n"
        "HINT: find_sink_dims(model, prompts) looks for them; VAR(dims='any') takes every dimension"
    )
