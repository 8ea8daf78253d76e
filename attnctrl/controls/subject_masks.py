"""Where the subjects of a prompt are, found by attention while the picture is made.

Image tokens that show a word attend to it: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022, arXiv
2208.01626; masks from such maps as in Tewel et al. (ConsiStory), 2024, arXiv 2402.03286, with Otsu's threshold (1979).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..attention import Watch, as_tokens
from ..attention.smoothing import blur, kernel_width
from ..errors import AttnCtrlError
from ..regions import Region
from ..schedule import Schedule
from ..sites import Site, Tokens
from .base import Control, Edit, Moment
from .touched import text_sites


FLAT = 1e-4  # a map that varies by less than this share of its maximum shows nothing but rounding


@dataclass
class _Record:
    """What was seen of a picture: sums of maps by grid, {(rows, columns): (sum (B, S, rows, columns), number)}."""

    sums: dict[tuple[int, int], tuple[torch.Tensor, int]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)  # sites, in the running step
    regions: list[tuple[Region, ...]] | None = None  # handed out
    revision: int = 0


@dataclass(frozen=True, eq=False)
class SubjectMasks(Control):
    """Finds a mask for each of some phrases of the prompt. It changes nothing in the picture.

    In the steps of its window it records how much probability every image token gives to the tokens of a phrase, averaged over heads,
    layers and steps. The map of a phrase is blurred, brought to 0-1 and cut by Otsu's threshold; a token that several phrases
    claim goes to the one whose map is highest there, and specks are dropped. Every image of a batch has its own masks.

    Other controls use its masks from `stop` on. The next picture (or batch) begins anew:

        masks = ac.SubjectMasks.in_prompt(["red cat", "dog"], prompt, pipe.tokenizer)
        with ac.attach(pipe, masks, ac.Isolation(masks)):
            pipe(prompt)

    Args:
        phrases: name of each subject and the numbers of its tokens in the text stream; `in_prompt` finds them.
        layers: layers that are watched, as `parse_layers` reads them; None for all. Their texts decide, in UNets `attn2`.
        start, stop: fractions of the steps. The window has to end before the last step if other controls are to use the masks.
        blur: width (sigma) of the Gaussian, in image tokens; 0 for none.
        threshold: what belongs to the subject, a value in 0-1 of its map; None for Otsu's.
        speck: connected parts smaller than this share of the largest are dropped.
        exclusive: tokens that several phrases claim go to one of them.
    """

    phrases: Mapping[str, Sequence[int]]
    layers: str | int | Iterable[int] | None = None
    start: float = 0.0
    stop: float = 0.3
    blur: float = 0.7
    threshold: float | None = None
    speck: float = 0.2
    exclusive: bool = True
    _record: _Record = field(default_factory=_Record, init=False, repr=False)

    def __post_init__(self) -> None:
        wrong = []
        if not isinstance(self.phrases, Mapping) or not self.phrases:
            wrong.append(f"phrases={self.phrases!r} is no mapping of phrases to token numbers")
        else:
            found = {str(name): tuple(sorted(set(tokens))) for name, tokens in self.phrases.items()}
            object.__setattr__(self, "phrases", found)
            wrong += [f"phrase {name!r} has no tokens" for name, tokens in found.items() if not tokens]
            wrong += [f"phrase {name!r} has token {min(t)}" for name, t in found.items() if t and min(t) < 0]
        if not 0 <= self.blur < math.inf:
            wrong.append(f"blur={self.blur} is not a width in tokens")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            wrong.append(f"threshold={self.threshold} is not between 0 and 1")
        if not 0 <= self.speck <= 1:
            wrong.append(f"speck={self.speck} is not between 0 and 1")
        if wrong:
            hint = "HINT: SubjectMasks.in_prompt(['red cat', 'dog'], prompt, pipe.tokenizer)"
            raise AttnCtrlError(f"SubjectMasks: {'; '.join(wrong)}\n{hint}")
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @classmethod
    def in_prompt(
        cls, phrases: Iterable[str], prompt: str, tokenizer: Any, offset: int = 0, **options: Any
    ) -> SubjectMasks:
        """For phrases as they stand in a prompt.

        Args:
            tokenizer: the one whose tokens the text stream starts with: `pipe.tokenizer` (SD, SDXL, SD3), `pipe.tokenizer_2` (FLUX.1).
            offset: number of the first of its tokens in the text stream; for the T5 part of SD3 that is `pipe.tokenizer_max_length`.
            options: the other arguments of `SubjectMasks`.
        """
        found = {phrase: phrase_tokens(phrase, prompt, tokenizer) for phrase in phrases}
        return cls({phrase: [offset + i for i in tokens] for phrase, tokens in found.items()}, **options)

    @classmethod
    def example(cls, sites: Sequence[Site]) -> SubjectMasks:
        return cls({"subject": (0,)})

    @property
    def revision(self) -> int:
        return self._record.revision

    def after(self, start: float, stop: float, sigma: tuple[float, float] | None) -> Schedule:
        """The window of a control that uses the masks: it opens when they are known."""
        if max(start, self.stop) >= stop:
            raise AttnCtrlError(
                f"masks are found until {self.stop:g} of the steps, and the window {start:g}-{stop:g} ends before\n"
                f"HINT: SubjectMasks(…, stop={stop / 2:g})"
            )
        return Schedule(max(start, self.stop), stop, sigma)

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        return text_sites(self.name, sites, self.layers)

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        if len(tokens.grid) != 2:
            raise AttnCtrlError("SubjectMasks finds masks of single images, not of videos")
        text = tokens.span("text")
        for phrase, numbers in self.phrases.items():
            if numbers[-1] >= text.stop - text.start:
                raise AttnCtrlError(
                    f"phrase {phrase!r} has token {numbers[-1]}, and the text has {text.stop - text.start} tokens\n"
                    "HINT: the tokenizer whose tokens this model reads; a longer prompt is cut off"
                )
        image = slice(0, None) if site.kind == "cross" else tokens.span("image")
        keys = tuple(as_tokens(text.start + number for number in numbers) for numbers in self.phrases.values())
        return Edit(lerps=(Watch(image, keys, partial(self._see, site.path, tokens.grid)),))

    def begin(self, moment: Moment) -> None:
        if moment.first:
            self.clear()
        self._record.seen.clear()

    def _see(self, path: str, grid: tuple[int, int], mass: torch.Tensor) -> None:
        record = self._record
        if (
            path in record.seen
        ):  # by the plain pass of the step; this one is a perturbed pass, or a weak one of the pipeline's
            return
        record.seen.add(path)
        rows, columns = grid
        while rows * columns > mass.shape[1]:  # deeper levels of a UNet
            rows, columns = -(-rows // 2), -(-columns // 2)
        maps = mass.transpose(1, 2).unflatten(-1, (rows, columns)).cpu()
        total, count = record.sums.get((rows, columns), (torch.zeros_like(maps), 0))
        if total.shape != maps.shape:
            raise AttnCtrlError("the batch has changed between two steps that SubjectMasks recorded")
        record.sums[rows, columns] = (total + maps, count + 1)

    def clear(self) -> None:
        """Forgets what was found."""
        self._record.sums.clear()
        self._record.regions = None
        self._record.revision += 1

    def maps(self) -> torch.Tensor:
        """Mean probability that image tokens give to each phrase, (images, subjects, rows, columns), on the finest grid seen."""
        sums = self._record.sums
        if not sums:
            raise AttnCtrlError(
                "SubjectMasks has recorded nothing yet\nHINT: attach(pipe, masks, …) and run it, at least the steps of its window"
            )
        finest = max(sums, key=math.prod)
        total = sum(
            F.interpolate(value, finest, mode="bilinear", align_corners=False) if grid != finest else value
            for grid, (value, _) in sums.items()
        )
        return total / sum(count for _, count in sums.values())

    def masks(self) -> torch.Tensor:
        """The tokens of each subject, (images, subjects, rows, columns) bool; empty where a map is the same everywhere."""
        maps = self.maps()
        grid = tuple(maps.shape[-2:])
        if self.blur and any(kernel_width(n, self.blur) > 1 for n in grid):
            maps = blur(maps.flatten(2)[..., None], grid, self.blur).view_as(maps)
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        flat = high - low <= FLAT * high
        maps = (maps - low).masked_fill(flat, 0.0) / (high - low).masked_fill(flat, 1.0)
        cut = [otsu(one.flatten()) if self.threshold is None else self.threshold for one in maps.flatten(0, 1)]
        masks = maps > torch.tensor(cut, dtype=maps.dtype).view(*maps.shape[:2], 1, 1)
        if self.exclusive:
            best = maps.masked_fill(~masks, -1.0).argmax(1, keepdim=True)
            masks &= torch.arange(masks.shape[1])[:, None, None] == best
        return torch.stack([without_specks(one, self.speck) for one in masks.flatten(0, 1)]).view_as(masks)

    def regions(self, image: int = 0) -> tuple[Region, ...]:
        """The masks of an image as `Region`s named by their phrases. Raises for a phrase that was found nowhere."""
        return self._regions(self.masks()[image], image)

    def of_images(self) -> list[tuple[Region, ...]]:
        """The regions of every image, for controls that use them; from now on the masks stay as they are."""
        if self._record.regions is None:
            self._record.regions = [self._regions(masks, image) for image, masks in enumerate(self.masks())]
        return self._record.regions

    def _regions(self, masks: torch.Tensor, image: int) -> tuple[Region, ...]:
        lost = [name for name, mask in zip(self.phrases, masks, strict=True) if not mask.any()]
        if lost:
            raise AttnCtrlError(
                f"SubjectMasks found {lost[0]!r} nowhere in image {image}\n"
                "HINT: a later stop, other layers, exclusive=False, or masks of your own"
            )
        return tuple(
            Region(name, mask=mask.float(), downsample="max") for name, mask in zip(self.phrases, masks, strict=True)
        )


def phrase_places(phrase: str, prompt: str) -> list[tuple[int, int]]:
    """Where a phrase stands in a prompt, as characters from and to (whole words, any case). Raises if it does not."""
    places = [
        match.span() for match in re.finditer(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", prompt, re.IGNORECASE)
    ]
    if not phrase.strip() or not places:
        raise AttnCtrlError(
            f"the phrase {phrase!r} is not in the prompt {prompt!r}\nHINT: write it as the prompt does"
        )
    return places


def phrase_tokens(phrase: str, prompt: str, tokenizer: Any, occurrence: int | None = None) -> tuple[int, ...]:
    """Numbers of the tokens of a phrase, at every place where it stands in a prompt, or at one of them, counted from 1. Raises if it
    does not stand there."""
    places = phrase_places(phrase, prompt)
    if occurrence is not None:
        places = places[occurrence - 1 : occurrence]
    if not getattr(tokenizer, "is_fast", False):
        raise AttnCtrlError(
            f"{type(tokenizer).__name__} does not tell which token stands where\n"
            "HINT: SubjectMasks({phrase: numbers of its tokens})"
        )
    spans = tokenizer(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    found = tuple(i for i, (a, b) in enumerate(spans) if any(a < stop and start < b for start, stop in places))
    limit = tokenizer.model_max_length
    if found and found[-1] >= limit:
        raise AttnCtrlError(
            f"the phrase {phrase!r} is token {found[-1]} of the prompt, of which {limit} tokens are read\nHINT: a shorter prompt"
        )
    return found


class Placed(Control):
    """A control whose places are given, or are found by a `SubjectMasks` and then rule from the step on in which they are known."""

    places = "subjects"  # the argument that holds them

    @property
    def _found(self) -> SubjectMasks | None:
        given = getattr(self, self.places)
        return given if isinstance(given, SubjectMasks) else None

    @property
    def revision(self) -> int:
        return self._found.revision if self._found is not None else 0

    @property
    def schedule(self) -> Schedule:
        window = (self.start, self.stop, self.sigma)
        return self._found.after(*window) if self._found is not None else Schedule(*window)


def as_regions(subject: Any, name: str) -> tuple[Region, ...]:
    """A subject as regions: a `Region`, a box (x0, y0, x1, y1), a mask (file, image, array or tensor), a text that `Region.parse`
    reads, or a list of these."""
    if isinstance(subject, Region):
        return (subject,)
    if isinstance(subject, (list, tuple)):
        if len(subject) == 4 and all(isinstance(side, (int, float)) for side in subject):
            return (Region(name, box=tuple(subject)),)
        if not subject:
            raise AttnCtrlError(f"{name} is empty\nHINT: a Region, a box (x0, y0, x1, y1) or a mask")
        return tuple(region for item in subject for region in as_regions(item, name))
    if isinstance(subject, str) and "@" in subject:
        return (Region.parse(subject),)
    return (Region(name, mask=subject),)


def otsu(values: torch.Tensor) -> float:
    """The threshold that parts values (N,) into two classes of greatest variance between them; the largest value if all are equal."""
    x = values.double().sort().values
    n = torch.arange(1, len(x), dtype=torch.float64)
    below = x.cumsum(0)[:-1]
    between = n * (len(x) - n) * (below / n - (x.sum() - below) / (len(x) - n)).square()
    between = between.masked_fill(x[1:] <= x[:-1], -1.0)  # equal values are not parted
    if not len(n) or float(between.max()) < 0:
        return float(x[-1])
    best = int(between.argmax())
    return float((x[best] + x[best + 1]) / 2)


def without_specks(mask: torch.Tensor, share: float) -> torch.Tensor:
    """A mask (rows, columns) without the connected parts (over edges) that are smaller than a share of the largest."""
    n = mask.numel()
    label = torch.arange(1, n + 1, dtype=torch.float32).view_as(mask) * mask
    while True:  # the largest number of a part spreads through it
        padded = F.pad(label, (1, 1, 1, 1))
        sides = (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1])
        spread = torch.stack([label, *sides]).amax(0) * mask
        if torch.equal(spread, label):
            break
        label = spread
    sizes = torch.bincount(label.long().flatten(), minlength=n + 1)
    sizes[0] = 0
    return mask & (sizes >= share * sizes.max())[label.long()]
