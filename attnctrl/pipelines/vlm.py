"""`GroundedVLM`: answers about images under controls, called as transformers' image-text-to-text pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ImageTextToTextPipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .._quiet import quiet_imports
from ..controls import Control
from ..errors import AttnCtrlError
from ..icons.models import resolve_vlm as resolve_language_model
from ..loading import one_line, pick_device
from ..processors import LanguageSession


HINT = "HINT: a hub id such as llava-hf/llava-1.5-7b-hf, or a folder written by model.save_pretrained and processor.save_pretrained"


class GroundedVLM:
    """A vision-language model that answers under controls.

    It is called as `transformers.ImageTextToTextPipeline`, with a chat, or with images and a prompt that is written out, and returns
    what that returns; `controls=` of a call stands in place of the object's own. What it does not know itself is asked of the wrapped
    pipeline (`.model`, `.processor`, `.tokenizer`). A generator of inputs is answered whole, not one by one.

    Args:
        pipe: a transformers image-text-to-text pipeline.
        controls: controls in force in every call.

    Raises:
        AttnCtrlError: the model's family is not known, or a control does not fit it.
    """

    def __init__(self, pipe: ImageTextToTextPipeline, controls: Control | Sequence[Control] = ()):
        if not isinstance(pipe, ImageTextToTextPipeline):
            raise AttnCtrlError(
                f"GroundedVLM wraps an image-text-to-text pipeline of transformers, not a {type(pipe).__name__}\n"
                "HINT: GroundedVLM.from_pretrained(name), or GroundedVLM(pipeline('image-text-to-text', model=…, processor=…))"
            )
        self.pipe = pipe
        self.controls = _several(controls)
        self.session: LanguageSession | None = None
        LanguageSession(pipe.model, *self.controls)  # refuses what no call could work with

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        controls: Control | Sequence[Control] = (),
        *,
        revision: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> GroundedVLM:
        """Loads a model with its processor.

        Args:
            model: a built-in model, a hub id, or a folder that holds both. revision: on the hub.
            device: "cpu", "cuda:1", …; None takes the best. Not together with device_map.
            options: for the model's `from_pretrained`, such as dtype, device_map and attn_implementation.

        Raises:
            AttnCtrlError: no such model, a model that takes no images, no processor.
        """
        folder = resolve_language_model(model)
        if device is not None and "device_map" in options:
            raise AttnCtrlError("device and device_map exclude each other\nHINT: leave out device")
        place = None if "device_map" in options else pick_device(device)
        with quiet_imports(), one_line(f"model {folder!r} cannot be loaded", folder):
            config = AutoConfig.from_pretrained(folder, revision=revision)
            if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
                raise AttnCtrlError(f"model {folder!r} is a {config.model_type}, which reads no images\n{HINT}")
            processor = AutoProcessor.from_pretrained(folder, revision=revision)
            if getattr(processor, "image_processor", None) is None:
                raise AttnCtrlError(
                    f"model {folder!r} has no processor of images, only a {type(processor).__name__}\n{HINT}"
                )
            loaded = AutoModelForImageTextToText.from_pretrained(folder, revision=revision, **options)
            pipe = ImageTextToTextPipeline(model=loaded.eval(), processor=processor, device=place)
        return cls(pipe, controls)

    def __getattr__(self, name: str) -> Any:
        if name in ("pipe", "controls", "session") or name.startswith("__"):
            raise AttributeError(f"GroundedVLM has no attribute {name!r}")
        return getattr(self.pipe, name)

    def __repr__(self) -> str:
        return f"GroundedVLM({', '.join([type(self.model).__name__, *(control.name for control in self.controls)])})"

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        controls: Control | Sequence[Control] | None = None,
        **options: Any,
    ) -> Any:
        """Answers; arguments and result are those of `transformers.ImageTextToTextPipeline.__call__`.

        `session` is that of the last call: with `RecordAttention` among the controls, `session.attention_map(token, image)` shows where
        the model looked.

        Raises:
            AttnCtrlError: a chat for a model without a chat template, or a control that cannot act.
        """
        chat = images if text is None else text
        first = chat[0] if isinstance(chat, (list, tuple)) and chat else None
        said = isinstance(first, (list, tuple)) or (isinstance(first, dict) and "role" in first)
        if said and getattr(self.pipe.processor, "chat_template", None) is None:
            raise AttnCtrlError(
                f"{getattr(self.model.config, '_name_or_path', '') or type(self.model).__name__} has no chat template\n"
                "HINT: write the prompt out, images=… and text='… <image> …', as the model's card says"
            )
        chosen = self.controls if controls is None else _several(controls)
        with LanguageSession(self.pipe.model, *chosen) as self.session:
            found = self.pipe(images, text, **options)
            return found if isinstance(found, (list, dict)) else list(found)

    def report(self) -> str:
        """What the controls did in the last call."""
        if self.session is None:
            raise AttnCtrlError("GroundedVLM has not been called yet, so there is nothing to report")
        return self.session.report()


def _several(controls: Control | Sequence[Control]) -> tuple[Control, ...]:
    return (controls,) if isinstance(controls, Control) else tuple(controls)
