"""`attnctrl ask`: a question about a picture, answered by a vision-language model under controls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from .._quiet import quiet_imports
from ..errors import AttnCtrlError
from ..loading import pick_device, quiet_loading
from .loading import pick_dtype


if TYPE_CHECKING:
    from ..controls import Control
    from ..pipelines.vlm import GroundedVLM


@dataclass(frozen=True)
class Question:
    """What `attnctrl ask` was asked.

    Args:
        model: built in, hub id or folder. controls: as `--control` writes them.
        show_attention: picture of where the model looked, the mean over the tokens of its answer; beside it, with `compare`, without
            the controls.
        compare: answer without the controls too.
        report: say what the controls did.
    """

    image: Path
    text: str
    model: str
    controls: Sequence[str] = ()
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_new_tokens: int = 128
    show_attention: Path | None = None
    compare: bool = False
    report: bool = False


def ask(question: Question) -> Iterator[tuple[str, bool]]:
    """Lines, each with whether it belongs to the answer; all that can be wrong without the model is said before it is loaded."""
    text = question.text.strip()
    if not text:
        raise AttnCtrlError('there is no question\nHINT: attnctrl ask picture.jpg "What is in the picture?"')
    if question.compare and not question.controls:
        raise AttnCtrlError("--compare needs a control\nHINT: --control 'PAI(alpha=0.5)'")
    if question.show_attention is not None:
        _check_target(question.show_attention)
    image = open_image(question.image)
    with quiet_imports():
        from ..controls import RecordAttention
        from ..controls.spec import parse_control
        from ..pipelines.vlm import GroundedVLM
    controls = [parse_control(item) for item in question.controls]
    with quiet_loading():
        vlm = _load(GroundedVLM, question)
        recording = [RecordAttention()] * (question.show_attention is not None)
        extra = [c for c in recording if not any(isinstance(own, RecordAttention) for own in controls)]
        maps: list[Image.Image] = []
        for chosen in ([], controls) if question.compare else (controls,):
            answer = _answer(vlm, image, text, [*chosen, *(recording if chosen is not controls else extra)], question)
            name = f"with {', '.join(control.name for control in controls)}" if chosen else "without control"
            yield (f"{name}: {answer}" if question.compare else answer), True
            if recording:
                maps.append(_looked(vlm, image))
        if question.show_attention is not None:
            _side_by_side(maps).save(question.show_attention)
            yield f"attention: {question.show_attention}", False
        if question.report:
            yield vlm.report(), False


def _load(kind: type[GroundedVLM], question: Question) -> GroundedVLM:
    import torch

    device = pick_device(question.device)
    dtype = getattr(torch, pick_dtype(question.dtype, device))
    return kind.from_pretrained(question.model, revision=question.revision, device=str(device), dtype=dtype)


def _answer(vlm: GroundedVLM, image: Image.Image, text: str, controls: list[Control], question: Question) -> str:
    """What the model says, its most likely token each time."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": question.max_new_tokens}
    found = vlm(
        text=[{"role": "user", "content": content}],
        controls=controls,
        return_full_text=False,
        generate_kwargs=options,
    )
    return found[0]["generated_text"].strip()


def _looked(vlm: GroundedVLM, image: Image.Image) -> Image.Image:
    """The picture as the model saw it, under the mean attention of the tokens of its answer."""
    import torch

    from ..processors.maps import heat_map

    session = vlm.session
    values = torch.stack([session.attention_values(token) for token in range(session.written)])
    return heat_map(values.mean(0), seen(vlm.processor.image_processor, image))


def seen(processor: Any, image: Image.Image) -> Image.Image:
    """The part of a picture that an image processor leaves, at the picture's own resolution: processors of CLIP cut out the middle."""
    crop = getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False) or crop is None:
        return image
    size = processor.size if getattr(processor, "do_resize", False) else {}
    short = size.get("shortest_edge")
    if size and short is None:  # stretched to a size of its own first
        across, down = image.width / size["width"], image.height / size["height"]
    else:
        across = down = min(image.size) / short if short else 1.0
    width, height = min(image.width, crop["width"] * across), min(image.height, crop["height"] * down)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i * picture.width, 0))
    return whole


def _check_target(path: Path) -> None:
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise AttnCtrlError(
            f"--show-attention {path} is no picture file\nHINT: a name that ends in .png, .jpg or .webp"
        )
    if not path.parent.is_dir():
        raise AttnCtrlError(f"--show-attention {path}: folder {str(path.parent)!r} does not exist")


def open_image(path: Path) -> Image.Image:
    """A picture file as RGB, upright. Raises AttnCtrlError: not there, no picture, or more pixels than Pillow holds for safe."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise AttnCtrlError(f"image {str(path)!r} does not exist") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise AttnCtrlError(f"image {str(path)!r} is too large: {error}\nHINT: no more than {limit}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise AttnCtrlError(f"image {str(path)!r} cannot be read as a picture: {error}") from None
