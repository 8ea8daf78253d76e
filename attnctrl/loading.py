"""What loading any model takes: its device, the parts that it was saved without, silence, and one line when it fails."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import AttnCtrlError


if TYPE_CHECKING:
    import torch


def absent_parts(index: dict[str, Any]) -> dict[str, None]:
    """Parts that a pipeline was saved without, such as the T5 encoder of SD3, as `from_pretrained` wants to hear of them.

    diffusers (0.42) writes them to model_index.json as null, and then refuses to load the folder unless told ``part=None``.
    """
    return {
        name: None
        for name, entry in index.items()
        if isinstance(entry, (list, tuple)) and tuple(entry) == (None, None)
    }


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is. Raises when it does not exist."""
    import torch

    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, there in usable.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise AttnCtrlError(f"--device {name!r} is no device\nHINT: cpu, cuda, cuda:1 or mps") from None
    there = usable.get(device.type, True)
    if there and device.type == "cuda" and device.index is not None:
        there = device.index < torch.cuda.device_count()
    if not there:
        have = ", ".join(kind for kind, is_there in usable.items() if is_there)
        raise AttnCtrlError(f"--device {name} is not available here\nHINT: available: {have}")
    return device


@contextmanager
def one_line(what: str, source: str = ".") -> Iterator[None]:
    """Whatever goes wrong inside becomes one AttnCtrlError; libraries raise anything from OSError to AttributeError here.

    A `source` that is no local file or folder is a hub id: what may be wrong with those stands in the hint.
    """
    hint = (
        ""
        if os.path.exists(source)
        else "\nHINT: no local folder; a hub id needs the hub to be reachable, a gated one `hf auth login`"
    )
    try:
        yield
    except AttnCtrlError:
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise AttnCtrlError(f"{what}: {message[:300]}{'…' if len(message) > 300 else ''}{hint}") from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars of loading where nobody watches, and no advice that is none of the user's business."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = (diffusers_logging, transformers_logging)
    hub = logging.getLogger("huggingface_hub")  # tells every retry of a request; the error tells the outcome
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    saved = [(module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in modules]
    for module in modules:
        module.set_verbosity_error()
        if not sys.stderr.isatty():
            module.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        for module, level, bars in saved:
            module.set_verbosity(level)
            if bars:
                module.enable_progress_bar()
