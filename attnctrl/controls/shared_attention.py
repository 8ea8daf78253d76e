"""Shared attention: the images of a batch also attend to each other, so that a subject looks the same in all of them.

Cao et al. (MasaCtrl), 2023, arXiv 2304.08465; Tewel et al. (ConsiStory), 2024, arXiv 2402.03286; Zhou et al. (StoryDiffusion), 2024,
arXiv 2405.01434.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..attention import KeyGroup, Peers, Segment, as_tokens
from ..attention.groups import Tokens as TokenSet
from ..errors import AttnCtrlError
from ..sites import Site, Tokens
from .base import Edit
from .subject_masks import Placed, SubjectMasks, as_regions
from .touched import image_sites


if TYPE_CHECKING:
    from .reposition import Reposition


@dataclass(frozen=True, eq=False)
class SharedAttention(Placed):
    """Image tokens also see keys and values of image tokens of the other images of the batch.

        out_b = attention(q_b, [k_b, k_a of the subject's tokens in every other image a], values likewise)

    Keys are gathered, nothing is masked. They keep the positions that they have in their own image. Conditional rows share with
    conditional rows and unconditional ones with unconditional ones; text stays with its image.

    Args:
        subjects: what an image lends: None for all of its tokens; a list with one entry per image, each a `Region`, a box, a mask
            or a list of these; or a `SubjectMasks`, from the step on in which its masks are known.
        reference: "batch": every image sees all others; "first": the others see the first image, which stays as it is.
        mode: "append" to the image's own tokens, or "replace" these (the text stays).
        layers: layer numbers as `parse_layers` reads them; None for all.
        strength: 0 (off) to 1; blends the shared and the image's own attention.
        bias: added to the logits of what is borrowed; below 0 weakens it.
        dropout: probability with which a token is not lent. Drawn once per image and layer from `seed`, the same in every step.
        start, stop: fractions of the steps, the first step included.
        sigma: (low, high) noise levels to which the window is restricted.
        seed: of the dropout.
        reposition: in UNets, a `Reposition` whose pictures are the images of the batch, counted from 0: what they lend stands in another
            place, as large as it is there.
    """

    subjects: Sequence[Any] | SubjectMasks | None = None
    reference: Literal["batch", "first"] = "batch"
    mode: Literal["append", "replace"] = "append"
    layers: str | int | Iterable[int] | None = None
    strength: float = 1.0
    bias: float = 0.0
    dropout: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    sigma: tuple[float, float] | None = None
    seed: int = 0
    reposition: Reposition | None = None

    shapes = True
    both = True

    def __post_init__(self) -> None:
        wrong = []
        if self.reference not in ("batch", "first"):
            wrong.append(f"reference={self.reference!r} is neither 'batch' nor 'first'")
        if self.mode not in ("append", "replace"):
            wrong.append(f"mode={self.mode!r} is neither 'append' nor 'replace'")
        if not 0 <= self.strength <= 1:
            wrong.append(f"strength={self.strength} is not between 0 (off) and 1 (full)")
        if not 0 <= self.dropout <= 1:
            wrong.append(f"dropout={self.dropout} is not between 0 and 1 (nothing is lent)")
        if not self.bias < math.inf:
            wrong.append(f"bias={self.bias} is no number below infinity")
        if isinstance(self.subjects, Sequence) and (isinstance(self.subjects, str) or not len(self.subjects)):
            wrong.append(f"subjects={self.subjects!r} is no list with an entry per image")
        if wrong:
            raise AttnCtrlError("SharedAttention: " + "; ".join(wrong))
        if self.subjects is not None and not isinstance(self.subjects, SubjectMasks):
            named = (as_regions(subject, f"subject of image {i}") for i, subject in enumerate(self.subjects))
            object.__setattr__(self, "subjects", tuple(named))
        if not isinstance(self.layers, (str, int, type(None))):
            object.__setattr__(self, "layers", tuple(self.layers))
        self.schedule

    @classmethod
    def masactrl(cls, **options: Any) -> SharedAttention:
        """Edits keep the look of the first image: its tokens replace their own, in the decoder of SD 1.5, from step 4 of 50 on."""
        return cls(**{"reference": "first", "mode": "replace", "layers": "10:", "start": 0.08} | options)

    @classmethod
    def consistory(cls, subjects: Sequence[Any] | SubjectMasks, **options: Any) -> SharedAttention:
        """One subject in several scenes: each image also sees half of the subject's tokens in the others, in the decoder of SDXL."""
        return cls(subjects, **{"dropout": 0.5, "layers": "34:"} | options)

    @classmethod
    def storydiffusion(cls, **options: Any) -> SharedAttention:
        """Consistent pictures of a story: each image also sees half of all tokens of the others, in the decoder of SDXL, from the
        second of 50 steps on."""
        return cls(**{"dropout": 0.5, "layers": "34:", "start": 0.02} | options)

    @property
    def neutral(self) -> bool:
        return self.strength == 0 or self.dropout == 1 or self.bias == -math.inf

    def touches(self, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
        """Attention among image tokens in the chosen layers."""
        return image_sites(self.name, sites, self.layers)

    def check_images(self, count: int) -> None:
        if count == 1:
            raise AttnCtrlError(
                "SharedAttention: there is one image, and no other to share with\nHINT: several prompts, or num_images_per_prompt=2"
            )

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        image, every, bias = tokens.span("image"), slice(0, tokens.length), self.bias
        if self.reposition is not None and not self.reposition.neutral:
            bias = bias + self.reposition.counts(tokens.grid).log()
        peers = Peers(
            self._lent(tokens, image),
            self.reference,
            bias,
            image if self.mode == "replace" else None,
            self.dropout,
            1000 * self.seed + site.layer,
        )
        segments = [Segment(image, (KeyGroup(every),), self.strength, peers)]
        own = torch.full((tokens.length,), 1.0)
        own[image] -= self.strength
        rest = own > 0
        if rest.any():
            weight = 1.0 if self.strength == 1 else own[rest]
            segments.append(Segment(as_tokens(rest), (KeyGroup(every),), weight))
        return Edit(segments=tuple(segments))

    def bystander(self, site: Site, tokens: Tokens) -> Edit:
        return self.edit(site, tokens, torch.ones(site.heads))

    def _lent(self, tokens: Tokens, image: slice) -> TokenSet | tuple[TokenSet, ...]:
        if self.subjects is None:
            return image
        images = self.subjects.of_images() if isinstance(self.subjects, SubjectMasks) else self.subjects
        inside = (torch.stack([region.tokens(tokens.grid) for region in regions]).any(0) for regions in images)
        return tuple(as_tokens(image.start + mask.nonzero().flatten()) for mask in inside)
