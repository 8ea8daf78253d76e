"""Attention over an image, from recorded rows: as values on the grid of image tokens and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..controls.language import Prompt
from ..controls.record_attention import RecordAttention
from ..controls.var import VAR
from ..errors import AttnCtrlError
from ..families.language import image_views


if TYPE_CHECKING:
    from .language import LanguageSession


def attention_values(
    session: LanguageSession, token: int, index: int | None, row: int, layers: Any, heads: Any
) -> Tensor:
    """`LanguageSession.attention_values`."""
    records = [fitted.record for fitted in session._fitted.values() if isinstance(fitted, RecordAttention)]
    if not records:
        raise AttnCtrlError(
            "no attention was recorded\nHINT: attach(model, ac.RecordAttention(), …), and generate inside"
        )
    record = records[0]
    if record.prompt is None or not record.rows:
        raise AttnCtrlError("no prompt has been read since RecordAttention was attached")
    if record.prompt.beams:
        raise AttnCtrlError(
            "beam search exchanges the rows of a batch, so a row of the result was not written by one row\nHINT: num_beams=1"
        )
    if not -len(record.rows) <= token < len(record.rows):
        raise AttnCtrlError(f"token {token} does not exist: {len(record.rows)} tokens were written after the prompt")
    _check_row(record.prompt, row)
    wanted = RecordAttention(layers=layers, heads=heads).touches(session.sites)
    values = record.values(list(record.rows)[token], row, wanted)
    return _on_grid(session, record.prompt, values, index, row)


def sink_values(session: LanguageSession, index: int | None, row: int, layers: Any) -> Tensor:
    """`LanguageSession.sink_values`."""
    prompt = session.last_prompt
    found = [fitted for fitted in session._fitted.values() if isinstance(fitted, VAR)]
    if not found or prompt is None:
        raise AttnCtrlError(
            "no sinks were looked for\nHINT: attach(model, ac.VAR(dims=…), …), and read a prompt inside"
        )
    _check_row(prompt, row)
    wanted = {
        site.layer for site in session.sites if site.path in RecordAttention(layers=layers).touches(session.sites)
    }
    marks = [prompt.notes[key].sinks[row] for layer in sorted(wanted) if (key := (found[0], layer)) in prompt.notes]
    if not marks:
        raise AttnCtrlError(f"VAR looked at none of layers={layers!r}")
    places = prompt.places[row].to(marks[0].device)
    return _on_grid(session, prompt, torch.stack([mark[places] for mark in marks]).float().mean(0).cpu(), index, row)


def _check_row(prompt: Prompt, row: int) -> None:
    if not 0 <= row < prompt.batch:
        raise AttnCtrlError(f"row {row} does not exist: the batch has rows 0 to {prompt.batch - 1}")


def _on_grid(session: LanguageSession, prompt: Prompt, values: Tensor, index: int | None, row: int) -> Tensor:
    """Values of a prompt's image tokens (n,) as those of one image, (rows, columns)."""
    each = prompt.copies
    images = prompt.image[::each]
    views, usual = image_views(session.family, session.model.config, images, row // each, prompt.given)
    index = usual if index is None else index
    if not -len(views) <= index < len(views):
        raise AttnCtrlError(f"image {index} does not exist: prompt {row} has {len(views)}")
    view = views[index]
    return values[view.start : view.start + view.rows * view.columns].reshape(view.rows, view.columns)


def heat_map(values: Tensor, image: Image.Image) -> Image.Image:
    """Values (rows, columns), not negative, as heat over a picture: from the picture itself, darkened, over red and yellow to white."""
    if not isinstance(image, Image.Image):
        raise AttnCtrlError(f"the image is a {type(image).__name__}\nHINT: PIL.Image.open(path)")
    size = (image.height, image.width)
    heat = F.interpolate(values[None, None].float().cpu(), size, mode="bilinear", align_corners=False)[0, 0]
    heat = heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)
    colour = (3 * heat[..., None] - torch.arange(3)).clamp(0, 1)
    raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(*size, 3)
    mixed = torch.lerp(raw / 255 * 0.6, colour, 0.85 * heat[..., None])
    return Image.fromarray((mixed * 255).round().to(torch.uint8).numpy())
