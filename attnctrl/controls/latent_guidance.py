"""Latent guidance: gradients of attention maps move the latents, so that no subject is forgotten and each is in its place.

The losses are in `map_losses.py`: Chefer et al. (Attend-and-Excite), 2023, arXiv 2301.13826; Xie et al. (BoxDiff), 2023, arXiv
2307.10816; Dahary et al. (Bounded Attention), 2024, arXiv 2403.16990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..attention import as_tokens
from ..attention.watch import Measure
from ..errors import AttnCtrlError
from ..sites import Site, Tokens
from .base import Control, Edit, Moment
from .map_losses import attend_and_excite, bounded, boxdiff, nearest_grid, phrase_maps
from .subject_masks import as_regions, phrase_tokens
from .touched import image_sites, text_sites


Loss = Literal["attend_and_excite", "boxdiff", "bounded"]
Grid = tuple[int, int]
REFINED = {0.0: 0.95, 0.2: 0.5, 0.4: 0.2}
PUBLISHED: dict[str, dict[str, Any]] = {
    "attend_and_excite": {"scale": 20.0, "stop": 0.5, "iterations": 20, "until": REFINED},
    "boxdiff": {"scale": 20.0, "stop": 0.5, "iterations": 20, "until": REFINED},
    "bounded": {"scale": 18.0, "stop": 0.3, "iterations": 5, "until": 0.2},
}
CROSS, SELF = 1.5, 0.5  # how Bounded Attention weighs attention to words and among image tokens


@dataclass
class _Record:
    """What a gradient pass has measured: (grid, words or phrases (B, N, n), places (B, N, S)) by site; and what came of it."""

    maps: dict[str, list[Any]] = field(default_factory=dict)
    open: bool = False
    needed: frozenset[str] | None = None
    done: int | None = None  # the step that was guided last
    losses: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class LatentGuidance(Control):
    """Before a step, the latents go down the gradient of what attention to the prompt's phrases shows: z <- z - eta grad loss(z).

    The denoiser runs on the conditional rows up to the last attention that counts, and back. That takes the memory of a training step
    without weights' gradients: all activations of these blocks. `enable_gradient_checkpointing()` of the denoiser keeps one block's
    instead, for one more forward pass. The attention itself needs no N x N: a column per word, a log-sum-exp per place.
    The scheduler gets the changed latents with its own step, in any pipeline. It needs a pipeline, and weights that pass gradients on.

    | loss | goes down when |
    |---|---|
    | attend_and_excite | the most neglected phrase is somewhere in the picture |
    | boxdiff | each phrase is in its place, as wide and high as it, and nowhere else |
    | bounded | attention to a phrase's words, and to its place, comes from its place and not from the background |

    With `attend_and_excite` and `boxdiff` every step of the window makes one update, some of them several before it (`until`); with `bounded`,
    as many as it takes. Maps are means over heads and over the layers whose grid is nearest to 16 x 16 tokens (`bounded`: over all
    chosen layers). In joint attention probabilities are those among the text. A phrase of several words counts by their sum.

    Args:
        phrases: where each phrase belongs: a `Region`, a box (x0, y0, x1, y1) in fractions, a mask, or a list of these; None with
            `attend_and_excite`, which knows no places. An empty mapping is neutral.
        tokens: numbers of each phrase's tokens in the text stream, which `in_prompt` finds; the same in all images of a call. `bounded`
            counts the end of the prompt as one of them.
        loss: one of the table.
        words: the tokens that compete for a place, in `attend_and_excite` and `boxdiff`; None for all but the first.
        layers: layer numbers as `parse_layers` reads them; None for all.
        scale: eta of the first step. 0 is neutral. Here and in `stop`, `iterations` and `until`, None is what was published for Stable
            Diffusion: 20 (`bounded`: 18), 0.5 (0.3), 20 (5), {0: 0.95, 0.2: 0.5, 0.4: 0.2} (0.2).
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high) noise levels to which the window is restricted.
        weight: (fraction, sigma) -> factor of the scale; None for sqrt(1 - i / 2(n - 1)) in step i of n, and with `bounded` from 1 to 5/18
            over the window.
        iterations: updates that a step makes at most because of `until`.
        until: the loss that ends the updates of a step: in every step, or by the fraction from which on one step repeats them.
        normalize: divides the gradient of every image by its root mean square, so that `scale` is the size of an update.

    `losses` holds what was measured: (step, the loss of every image) before each update. A ControlNet has seen the latents before.
    """

    phrases: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    loss: Loss = "attend_and_excite"
    words: Sequence[int] | None = None
    layers: str | int | Iterable[int] | None = None
    scale: float | None = None
    start: float = 0.0
    stop: float | None = None
    sigma: tuple[float, float] | None = None
    weight: Callable[[float, float | None], float] | None = None
    iterations: int | None = None
    until: float | Mapping[float, float] | None = None
    normalize: bool = False
    _record: _Record = field(default_factory=_Record, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise AttnCtrlError(f"LatentGuidance: loss={self.loss!r} is none of {', '.join(get_args(Loss))}")
        for name, value in PUBLISHED[self.loss].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        tokens = {str(name): tuple(sorted(set(these))) for name, these in self.tokens.items()}
        object.__setattr__(self, "tokens", tokens)
        wrong = [f"phrase {name!r} has no tokens" for name in self.phrases if not tokens.get(name)]
        wrong += [f"tokens of {name!r}, which is no phrase" for name in tokens if name not in self.phrases]
        wrong += [f"phrase {name!r} has token {these[0]}" for name, these in tokens.items() if these and these[0] < 0]
        placed = self.loss != "attend_and_excite"
        for name, place in self.phrases.items():
            if placed != (place is not None):
                wrong.append(
                    f"phrase {name!r} has {'no' if placed else 'a'} place, and {self.loss} {'needs one' if placed else 'knows none'}"
                )
        if self.words is not None:
            object.__setattr__(self, "words", tuple(sorted(set(self.words))))
            lost = [name for name, these in tokens.items() if not set(these) <= set(self.words)]
            wrong += [f"words lack tokens of {name!r}" for name in lost if self.loss != "bounded"]
        if not 0 <= self.scale < math.inf:
            wrong.append(f"scale={self.scale} is not 0 (off) or above")
        if self.iterations < 1:
            wrong.append(f"iterations={self.iterations} is below 1")
        if isinstance(self.until, Mapping):
            object.__setattr__(self, "until", {float(key): float(value) for key, value in self.until.items()})
        if wrong:
            hint = (
                "HINT: LatentGuidance.in_prompt({'red cat': (0, 0, 0.5, 1)}, prompt, pipe.tokenizer, loss='boxdiff')"
            )
            raise AttnCtrlError(f"LatentGuidance: {'; '.join(wrong)}\n{hint}")
        places = {str(name): None if at is None else as_regions(at, str(name)) for name, at in self.phrases.items()}
        object.__setattr__(self, "phrases", places)
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @classmethod
    def in_prompt(
        cls, phrases: Mapping[str, Any] | Iterable[str], prompt: str, *tokenizers: Any, **options: Any
    ) -> LatentGuidance:
        """For phrases as they stand in a prompt, whose words compete with each other.

        Args:
            phrases: with their places, or without (`attend_and_excite`).
            tokenizers: those whose tokens the text stream holds, each alone if its first token is the stream's, or with the number of
                that token: `pipe.tokenizer` (SD, SDXL), `pipe.tokenizer_2` (FLUX.1), and for SD3 both
                `pipe.tokenizer, (pipe.tokenizer_3, pipe.tokenizer_max_length)`.
            options: the other arguments of `LatentGuidance`.
        """
        if not tokenizers:
            raise AttnCtrlError("LatentGuidance.in_prompt needs a tokenizer\nHINT: pipe.tokenizer")
        phrases = phrases if isinstance(phrases, Mapping) else dict.fromkeys(phrases)
        parts = [part if isinstance(part, tuple) else (part, 0) for part in tokenizers]
        tokens: dict[str, list[int]] = {phrase: [] for phrase in phrases}
        words: list[int] = []
        for tokenizer, first in parts:
            read = tokenizer(prompt, truncation=True, return_special_tokens_mask=True)["special_tokens_mask"]
            words += [first + i for i, special in enumerate(read) if not special]
            for phrase, found in tokens.items():
                found += [first + i for i in phrase_tokens(phrase, prompt, tokenizer)]
                found += [first + len(read) - 1] if options.get("loss") == "bounded" else []
        return cls(phrases, tokens, **{"words": words} | options)

    @classmethod
    def example(cls, sites: Sequence[Site]) -> LatentGuidance:
        return cls({"subject": None}, {"subject": (1,)})

    @property
    def neutral(self) -> bool:
        return self.scale == 0 or not self.phrases

    @property
    def losses(self) -> list[tuple[int, tuple[float, ...]]]:
        return self._record.losses

    @property
    def needed(self) -> frozenset[str] | None:
        """The sites whose maps count, when that is known."""
        return self._record.needed

    def touches(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Attention of the image to the text; with `bounded` also among image tokens."""
        found = text_sites(self.name, sites, self.layers)
        primary = [site for site in sites if site.primary]
        return found if self.loss != "bounded" else found | image_sites(self.name, primary, self.layers)

    def check_grid(self, grid: tuple[int, ...]) -> None:
        if len(grid) != 2:
            raise AttnCtrlError("LatentGuidance guides single images, not videos")
        for regions in self.phrases.values():
            for region in regions or ():
                region.tokens(grid)

    def begin(self, moment: Moment) -> None:
        record = self._record
        if moment.first:
            record.losses.clear()
            record.done = record.needed = None

    # -- what a gradient pass measures -----------------------------------------------------------------------------------------

    def edit(self, site: Site, tokens: Tokens, heads: Tensor) -> Edit:
        text, image, see = tokens.span("text"), tokens.span("image"), partial(self._see, site.path, tokens.grid)
        found = []
        if text is not None:
            rows = slice(0, None) if image is None else image
            keys = [
                as_tokens(text.start + number for number in numbers) for numbers in self._sets(text.stop - text.start)
            ]
            found.append(Measure(rows, tuple(keys), partial(see, 1), text))
        if image is not None and self.loss == "bounded":
            keys = [as_tokens(image.start + place.nonzero().flatten()) for place in self._places(tokens.grid)]
            found.append(Measure(image, tuple(keys), partial(see, 2), image))
        return Edit(lerps=tuple(found))

    def _sets(self, count: int) -> list[tuple[int, ...]]:
        """Token numbers whose probabilities are measured together: each word alone, or with `bounded` the phrases."""
        for phrase, numbers in self.tokens.items():
            if numbers[-1] >= count:
                raise AttnCtrlError(
                    f"phrase {phrase!r} has token {numbers[-1]}, and the text has {count} tokens\n"
                    "HINT: the tokenizer whose tokens this model reads; a longer prompt is cut off"
                )
        if self.loss == "bounded":
            return [self.tokens[phrase] for phrase in self.phrases]
        words = range(1, count) if self.words is None else self.words
        return [(number,) for number in words if number < count]

    def _places(self, grid: tuple[int, ...]) -> Tensor:
        """(S, rows * columns) bool."""
        places = [[region.tokens(grid, keep=True) for region in regions] for regions in self.phrases.values()]
        return torch.stack([torch.stack(parts).any(0) for parts in places])

    def _see(self, path: str, grid: tuple[int, ...], slot: int, mass: Tensor) -> None:
        if not self._record.open:  # recomputed on the way back
            return
        rows, columns = grid
        while rows * columns > mass.shape[1]:  # deeper levels of a UNet
            rows, columns = -(-rows // 2), -(-columns // 2)
        self._record.maps.setdefault(path, [(rows, columns), None, None])[slot] = mass

    def measured(self, run: Callable[[], Any]) -> Tensor:
        """The loss of every image, (B,), from what `run` lets the control see."""
        record = self._record
        record.maps.clear()
        record.open = True
        try:
            run()
        finally:
            record.open = False
        maps = dict(record.maps)
        record.maps.clear()
        if self.loss == "bounded":
            return self._bounded(list(maps.values()))
        best = nearest_grid([grid for grid, *_ in maps.values()])
        record.needed = frozenset(path for path, (grid, *_) in maps.items() if grid == best)
        words = torch.stack([maps[path][1] for path in sorted(record.needed)]).mean(0)
        numbers = range(1, words.shape[-1] + 1) if self.words is None else self.words
        column = {number: i for i, number in enumerate(numbers)}
        phrases = phrase_maps(words, [[column[n] for n in self.tokens[phrase]] for phrase in self.phrases], best)
        if self.loss == "attend_and_excite":
            return attend_and_excite(phrases)
        return boxdiff(phrases, self._places(best).unflatten(-1, best).to(phrases.device))

    def _bounded(self, maps: list[list[Any]]) -> Tensor:
        total: Tensor | float = 0.0
        for slot, share in ((1, CROSS), (2, SELF)):
            seen = [(entry[0], entry[slot]) for entry in maps if entry[slot] is not None]
            inside = [self._places(grid).to(mass.device) for grid, mass in seen]
            if any(bool(places.any(0).all()) for places in inside):
                raise AttnCtrlError(
                    "LatentGuidance: loss='bounded' weighs places against the background, and here they cover all of it\n"
                    "HINT: smaller places, or loss='boxdiff'"
                )
            total = total + share * bounded([mass for _, mass in seen], inside)
        return total

    # -- how far -----------------------------------------------------------------------------------------------------------------

    def due(self, moment: Moment) -> bool:
        """Whether a step is still to be guided; second-order schedulers come again within it."""
        record = self._record
        if record.done == moment.step or self.step_size(moment) == 0:
            return False
        record.done = moment.step
        return True

    def step_size(self, moment: Moment) -> float:
        """eta."""
        if self.weight is not None:
            return self.scale * self.weight(moment.fraction, moment.sigma)
        step, steps = moment.step, moment.steps
        if self.loss == "bounded":
            first, last = math.ceil(self.start * steps - 1e-6), math.ceil(self.stop * steps - 1e-6) - 1
            return self.scale * (1 - 13 / 18 * (step - first) / max(1, last - first))
        return self.scale * math.sqrt(1 - step / (2 * max(1, steps - 1)))

    def target(self, moment: Moment) -> float | None:
        """The loss that ends repeated updates of a step; None where there is one update."""
        if not isinstance(self.until, Mapping):
            return self.until
        at = {math.ceil(fraction * moment.steps - 1e-6): value for fraction, value in sorted(self.until.items())}
        return at.get(moment.step)

    def descend(self, latents: Tensor, moment: Moment, measure: Callable[[Tensor], tuple[Tensor, Callable]]) -> Tensor:
        """The latents (B, ...) after the updates of a step.

        Args:
            measure: latents -> the loss of every image (B,), and what returns the gradient of their sum.
        """
        target, once = self.target(moment), isinstance(self.until, Mapping)
        left = 0 if target is None else self.iterations
        while left or once:
            losses, gradient = measure(latents)
            self.losses.append((moment.step, tuple(losses.tolist())))
            chosen = losses > target if left else None
            if chosen is not None and chosen.any():
                left -= 1
            elif once:
                chosen, left, once = torch.ones_like(losses, dtype=torch.bool), 0, False
            else:
                break
            change = gradient()
            lead = (-1, *[1] * (change.ndim - 1))
            if self.normalize:
                size = change.flatten(1).square().mean(1).sqrt().view(lead)
                change = change / size.clamp_min(torch.finfo(size.dtype).tiny)
            latents = latents - self.step_size(moment) * change * chosen.view(lead)
        return latents
