"""What controls of language models share: the tokens of a prompt by role, and edits of the rows that answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.rows import FAR, RowEdit
from ..errors import AttnCtrlError
from ..families.language import STREAMS, Model
from ..heads import HeadSet
from ..schedule import parse_layers
from ..sites import Site
from .base import Control


@dataclass(eq=False)
class Prompt:
    """The tokens that a model has read, and the call that it is in.

    Roles go by position: `image` are the placeholders of image (and video) tokens, `generated` what the model wrote, all other
    tokens are text: "system" before the first image, "instruction" after the last one. Masks are (B, n) bool over the positions of
    the prompt, left padding included; what the model writes afterwards lies beyond n.

    Args:
        ids: (B, n), or None where the model was given embeddings. -1 stands for what the model wrote between two prompts.
        valid: (B, n), False for padding.
        past: positions before the running call. length: positions in it.
        reads: the running call holds prompt tokens that have not been read before.
        copies: rows per prompt that generation made (beams, samples); rows of one prompt follow each other.
        beams: generation exchanges these rows while it searches.
        given: what was given beside the tokens that tells the sizes of the images, one entry for all copies of a prompt.
        notes: what controls keep until there is more prompt; under keys (control, layer) also after that.
    """

    ids: Tensor | None
    valid: Tensor
    image: Tensor
    generated: Tensor
    past: int = 0
    length: int = 0
    reads: bool = True
    copies: int = 1
    beams: bool = False
    given: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)
    first_image: list[int | None] = field(init=False)
    after_image: list[int | None] = field(init=False)
    last: list[int] = field(init=False)
    places: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._measure()

    def _measure(self) -> None:
        """Reads positions from the device, once per prompt."""
        image, valid = self.image.cpu(), self.valid.cpu()
        places = [row.nonzero().flatten().tolist() for row in image]
        self.first_image = [row[0] if row else None for row in places]
        self.after_image = [row[-1] + 1 if row else None for row in places]
        self.last = [int(row.nonzero()[-1]) if bool(row.any()) else len(row) - 1 for row in valid]
        self.places = tuple(row.nonzero().flatten() for row in self.image)
        self.notes.clear()

    def extend(self, ids: Tensor | None, valid: Tensor, image: Tensor, past: int) -> None:
        """More prompt after `past` positions; what lies between was written by the model."""
        gap = past - self.image.shape[1]
        watched = self.lasting()
        if self.ids is None or ids is None:
            self.ids = None
        else:
            self.ids = torch.cat([F.pad(self.ids, (0, gap), value=-1), ids], 1)
        self.image = torch.cat([F.pad(self.image, (0, gap)), image], 1)
        fresh = torch.zeros_like(image)
        self.generated = torch.cat([F.pad(self.generated, (0, gap), value=True), fresh], 1)
        self.valid = valid
        self._measure()
        self.notes.update(watched)

    def lasting(self) -> dict[Any, Any]:
        """The notes that more prompt does not outdate."""
        return {key: value for key, value in self.notes.items() if isinstance(key, tuple) and len(key) == 2}

    @property
    def batch(self) -> int:
        return self.image.shape[0]

    @property
    def total(self) -> int:
        return self.past + self.length

    @property
    def whole(self) -> Prompt:
        """The prompt as it was given: itself, unless image tokens have left it."""
        return self

    @property
    def system(self) -> Tensor:
        """(B, n) bool: text before the first image; nothing where there is no image."""
        first = [0 if at is None else at for at in self.first_image]
        before = torch.arange(self.image.shape[1], device=self.image.device) < self.image.new_tensor(
            first, dtype=torch.int64
        ).unsqueeze(1)
        return before & self.valid

    def keys(self, mask: Tensor, n_k: int, beyond: bool = False) -> Tensor:
        """A mask of positions, (B, m), as a mask of the running call's keys, (B, n_k): the last n_k positions, `beyond` for those after m."""
        mask = F.pad(mask, (0, self.total - mask.shape[1]), value=beyond) if self.total > mask.shape[1] else mask
        return mask[:, self.total - n_k : self.total]

    def image_keys(self, n_k: int) -> tuple[Tensor, ...]:
        """Per batch row the numbers of the image tokens among the running call's keys; a sliding window leaves the first ones behind."""
        offset = self.total - n_k
        return self.places if offset <= 0 else tuple(at[at >= offset] - offset for at in self.places)

    def rows_after_image(self) -> tuple[int, ...]:
        """Per batch row the first query of the running call behind the last image; `length` where there is no image."""
        return tuple(self._row(at) for at in self.after_image)

    def rows_that_answer(self) -> tuple[int, ...]:
        """Per batch row the first query of the running call that is the prompt's last token or was written by the model."""
        return tuple(self._row(at) for at in self.last)

    def rows_that_answer_from_images(self) -> tuple[int, ...]:
        """As `rows_that_answer`, but FAR where there is no image."""
        rows = zip(self.rows_that_answer(), self.first_image, strict=True)
        return tuple(FAR if image is None else row for row, image in rows)

    def row_of_last(self) -> tuple[int, ...]:
        """Per batch row the query of the running call that is the prompt's last token; FAR where it is not among them."""
        return tuple(at - self.past if at >= self.past else FAR for at in self.last)

    def _row(self, position: int | None) -> int:
        return self.length if position is None else min(max(position - self.past, 0), self.length)


class LanguageControl(Control):
    """Base of the controls of language models: frozen dataclasses with `layers`, `heads` and `strength`."""

    needs_image: ClassVar[bool] = True
    watches: ClassVar[bool] = False
    """True when `watch` wants the hidden states that enter the layers it touches."""
    per_layer: ClassVar[bool] = False
    """True when edits differ between layers for another reason than head weights."""
    previews: bool = False
    """True when a new prompt is first to be read without any edit: `preview_edits`, then `previewed`."""
    tower_layers: ClassVar[tuple[int, ...]] = ()
    """Layers of the vision tower whose class token is watched: what it attends to, (images, patches) summed over heads, is kept in the
    prompt's notes under ("class token", layer), a list with one entry per call."""
    needs_pixels: bool = False
    """True when `prompt.given` is to hold the pictures that the model was given."""
    arranges: ClassVar[bool] = False
    """True when the control places tokens anew and says who sees whom: `find_rotation`, `positions` and `arrange`."""
    shares_rows: ClassVar[bool] = False
    """True when a control that arranges leaves the rows behind the images to others."""
    needs_views: ClassVar[bool] = False
    """True when `place` wants to know where each image's tokens lie."""
    contrasts: bool = False
    """True when `contrast` wants the log-probabilities of each token that `generate` writes, with the images and without them."""
    compares: ClassVar[bool] = False
    """True when `compare` wants the outputs of heads with the image and without it."""

    def fit(self, model: Model) -> LanguageControl:
        """The control with what it needs to know of the model, or an error why it does not fit; called once, before it touches any site."""
        if self.needs_image and not model.image_ids:
            raise AttnCtrlError(
                f"{self.name} works on image tokens, and {model.name} has none: its config names no image_token_id\n"
                "HINT: PASTA and HeadScale work on text alone"
            )
        return self

    def default_layers(self, count: int) -> Any:
        """What `layers=None` stands for in a model of `count` layers."""
        return None

    def touches(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Weight per head of every touched site: those of `heads`, or 1 in all heads of `layers`; with both, `heads` in `layers`."""
        sites = [site for site in sites if site.streams == STREAMS]
        if not sites:
            raise AttnCtrlError(
                f"{self.name} is for language models\nHINT: attach it to a transformers model that generates text"
            )
        heads, layers = getattr(self, "heads", None), getattr(self, "layers", None)
        found = None if heads is None else HeadSet.parse(heads).resolve(sites)
        if layers is None and found is None:
            layers = self.default_layers(len(sites))
        if layers is not None or found is None:
            numbers = [site.layer for site in sites]
            chosen = {numbers[i] for i in parse_layers(layers, len(numbers))}
            inside = {site.path: site for site in sites if site.layer in chosen}
            if found is None:
                found = {path: torch.ones(site.heads) for path, site in inside.items()}
            found = {path: weights for path, weights in found.items() if path in inside}
        if not found:
            raise AttnCtrlError(
                f"{self.name}: none of the heads lies in layers={layers!r}\nHINT: give heads or layers"
            )
        return found

    def read(self, prompt: Prompt) -> None:
        """A new prompt, or more of it. Raises when there is nothing in it to control."""
        if not self.needs_image:
            return
        if prompt.ids is None:
            raise AttnCtrlError(
                f"{self.name} finds image tokens by their ids, and the model was called with embeddings\nHINT: pass input_ids"
            )
        if all(at is None for at in prompt.first_image):
            raise AttnCtrlError(
                f"{self.name}: no image token in the prompt of {prompt.ids.shape[1]} tokens\n"
                "HINT: put the image into the chat template and pass its pixel_values; detach the session for text alone"
            )

    def watch(self, site: Site, prompt: Prompt, hidden: Tensor) -> None:
        """The hidden states (B, T, C) that enter a layer, while the prompt is read."""

    def row_edits(self, site: Site, prompt: Prompt, weights: Tensor, n_k: int) -> tuple[RowEdit, ...]:
        """Edits of the running call: `prompt.length` queries, the last `n_k` positions as keys. `weights` (H,) lie on the CPU."""
        return ()

    def head_scale(self, site: Site, prompt: Prompt, weights: Tensor) -> Tensor | None:
        """What multiplies the output of each head in all rows of the running call, (B|1, H); None for nothing."""
        return None

    def preview_edits(self, site: Site, prompt: Prompt, n_k: int) -> tuple[RowEdit, ...]:
        """Edits that only look, for the pass that comes before the edited one."""
        return ()

    def previewed(self, prompt: Prompt, logits: Tensor | None) -> None:
        """After that pass: `logits` (B, V) of the first answered token, None where the model returns none. What is to last goes into
        the prompt's notes under a key (control, …)."""

    def compare(self, site: Site, prompt: Prompt, image: Tensor, text: Tensor) -> None:
        """Outputs of a site's heads at the prompt's last token, (B, H, D): of the prompt, and of the prompt without its image tokens."""

    def contrast(self, image: Tensor, text: Tensor) -> Tensor:
        """Scores (B, V) of the next token from its log-probabilities, (B, V): of the edited pass, and of the text without images, unedited."""
        return image

    def says(self) -> tuple[str, ...]:
        """Lines for the session's report."""
        return ()


def per_head(weights: Tensor) -> tuple[tuple[int, ...] | None, Tensor | float]:
    """(heads that are edited, None for all; what multiplies their strength, (1, H, 1) or 1.0 for all alike)."""
    chosen = tuple(weights.nonzero().flatten().tolist())
    heads = None if len(chosen) == len(weights) else chosen
    return heads, 1.0 if bool((weights[list(chosen)] == 1).all()) else weights[None, :, None]


def scaled(values: Tensor, by: Tensor | float) -> Tensor:
    """(B, n_k) -> (B, H|1, n_k), times the weight of each head."""
    return values[:, None] * (by.to(values) if isinstance(by, Tensor) else by)


def find_span(tokenizer: Any, ids: Sequence[int], words: str) -> list[tuple[int, int]]:
    """Token ranges (start, stop) of every occurrence of `words` in `ids`, each as short as it can be.

    Works on the decoded text, so words may begin inside a token, and characters may be split over tokens. Ids below 0 match nothing.
    Raises AttnCtrlError if the words do not occur.
    """

    def holds(start: int, stop: int) -> bool:
        piece = list(ids[start:stop])
        return min(piece, default=0) >= 0 and words in tokenizer.decode(piece)

    width = 4 * len(words.encode()) + 8  # tokens that one occurrence may take, more than one for each byte
    found: list[tuple[int, int]] = []
    free = 0
    for stop in range(1, len(ids) + 1):
        start = max(free, stop - width)
        if words and holds(start, stop):
            while start + 1 < stop and holds(start + 1, stop):
                start += 1
            found.append((start, stop))
            free = stop
    if not found:
        raise AttnCtrlError(
            f"the words {words!r} are not in the prompt\nHINT: spelling and case are those of the text"
        )
    return found


def not_finite(control: Control, *names: str, above: float = -math.inf) -> list[str]:
    """What is wrong with arguments that have to be finite numbers above a bound."""
    bound = "" if above == -math.inf else f" above {above:g}"
    values = {name: getattr(control, name) for name in names}
    return [
        f"{name}={value} is not a finite number{bound}"
        for name, value in values.items()
        if not (math.isfinite(value) and value > above)
    ]


def check_strength(name: str, strength: float, wrong: Sequence[str] = ()) -> None:
    """Raises every reason why arguments are wrong."""
    found = [] if 0 <= strength <= 1 else [f"strength={strength} is not between 0 (off) and 1 (full)"]
    if found := [*found, *wrong]:
        raise AttnCtrlError(f"{name}: " + "; ".join(found))
