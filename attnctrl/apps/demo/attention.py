"""Where a picture attended to the prompts of its regions, recorded in the picture's own run, and as maps over the picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageColor

from ...attention import Watch, as_tokens
from ...controls import Control, RegionalPrompts, SubjectMasks
from ...controls.base import Edit
from ...controls.subject_masks import FLAT, phrase_tokens
from ...errors import AttnCtrlError
from ...families import find_denoiser, find_family
from ...regions import Region
from ...sites import Site, Tokens
from ..sheet import PALETTE


WHOLE = tuple(range(4096))  # tokens beyond the end of a text do not count
TOKENIZERS = {"unet": "tokenizer", "sd3": "tokenizer", "flux": "tokenizer_2"}  # whose tokens a text begins with
SHOWN = 768  # pixels of the longer side of the picture below the maps


@dataclass(frozen=True, eq=False)
class RegionMaps(SubjectMasks):
    """Records how much probability image tokens give to the appended prompts of a `RegionalPrompts` beside it; changes nothing.

    `phrases` has the numbers of the tokens that count in each region's own prompt, in the order of the regions. As every watch it sees
    plain attention over all keys, also where the rule of the regions then withholds a prompt.
    """

    sigma: tuple[float, float] | None = None

    def edit(self, site: Site, tokens: Tokens, heads: torch.Tensor) -> Edit:
        if len(tokens.grid) != 2:
            raise AttnCtrlError("maps of regions are of single images, not of videos")
        spans = [tokens.span(f"region:{index}") for index in range(len(self.phrases))]
        if None in spans:
            return Edit()
        keys = [
            as_tokens(n for n in range(span.start, span.stop) if n - span.start in numbers)
            for span, numbers in zip(spans, map(set, self.phrases.values()))
        ]
        image = slice(0, None) if site.kind == "cross" else tokens.span("image")
        return Edit(lerps=(Watch(image, tuple(keys), partial(self._see, site.path, tokens.grid)),))


def ruling(controls: Sequence[Control]) -> RegionalPrompts | None:
    """The control that rules regions, if there is one."""
    return next((item for item in controls if isinstance(item, RegionalPrompts) and not item.neutral), None)


def region_maps(pipeline: Any, controls: Sequence[Control]) -> RegionMaps | None:
    """What records the attention to the regions of some controls; None where no region rules."""
    regional = ruling(controls)
    if regional is None:
        return None
    words = [_words(region, pipeline, regional.trim_text) for region in regional.regions_in_use()]
    window = {name: getattr(regional, name) for name in ("start", "stop", "sigma")}
    return RegionMaps({str(index): numbers for index, numbers in enumerate(words)}, **window)


def _words(region: Region, pipeline: Any, trim: int | None) -> tuple[int, ...]:
    """The tokens of a prompt's words, without those for its begin and end that draw attention of their own; all of them where the
    text's tokens are not known."""
    name = TOKENIZERS.get(find_family(find_denoiser(pipeline)[0]).name)
    try:
        found = phrase_tokens(region.prompt, region.prompt, getattr(pipeline, name or "", None))
    except AttnCtrlError:
        return WHOLE
    return tuple(number for number in found if trim is None or number < trim) or WHOLE


def overlay(
    picture: Image.Image, maps: torch.Tensor, regional: RegionalPrompts, shown: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """The value of `parts.attention_maps`.

    Args:
        maps: (regions, rows, columns).
        shown: name and colour of the first regions.
    """
    rows = []
    for index, (region, values) in enumerate(zip(regional.regions_in_use(), maps)):
        mask = region.tokens(tuple(values.shape), keep=True).view_as(values)
        name, color = shown[index] if index < len(shown) else (region.prompt, PALETTE[index % len(PALETTE)])
        there, elsewhere = (float(values[part].mean()) if part.any() else 0.0 for part in (mask, ~mask))
        ratio = f", {there / elsewhere:.1f} × as much inside as outside" if elsewhere > 0 else ""
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) / (high - low) if high - low > FLAT * high else torch.zeros_like(values)
        alpha = Image.fromarray(scaled.square().mul(255).byte().numpy())  # the strong parts stand out
        tinted = Image.new("RGB", alpha.size, _rgb(color, PALETTE[index % len(PALETTE)]))
        tinted.putalpha(alpha)
        rows.append({"name": name, "color": color, "png": as_text(tinted, "PNG"), "about": f"up to {high:.0%}{ratio}"})
    small = picture.convert("RGB")
    small.thumbnail((SHOWN, SHOWN))
    window = f"{regional.start:.0%} to {regional.stop:.0%} of the steps"
    note = (
        "How much each place of the picture attends to the words of a region's prompt: the mean over heads, layers and "
        f"{window}, in which the regions rule. It is measured before they do: outside of its region a prompt is then withheld."
    )
    return {"picture": as_text(small, "WEBP"), "maps": rows, "note": note}


def _rgb(color: str, preset: str) -> tuple[int, int, int]:
    try:
        return ImageColor.getrgb(color)[:3]
    except (ValueError, TypeError, AttributeError):
        return ImageColor.getrgb(preset)


def as_text(image: Image.Image, kind: str) -> str:
    """A picture file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
