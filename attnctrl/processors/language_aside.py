"""What a `LanguageSession` runs beside the pass that it edits: a prompt read once without edits, and its text without the image."""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..controls.base import Control
from ..controls.language import Prompt
from ..sites import Site
from .text_only import TextOnly


if TYPE_CHECKING:
    from .language import LanguageSession


class Asides:
    """The passes of one session, and what they leave for the edited one.

    `running` is "preview" while a prompt is read without edits, "text" while its text is read alone, else "".
    """

    def __init__(self, session: LanguageSession):
        self.session = session
        self.running = ""
        self.read: Prompt | None = None  # by the preview
        self._carried: dict[Any, Any] = {}  # notes of a preview, for the prompt that it was a preview of
        self._text: TextOnly | None = None
        self._with_image: Tensor | None = None

    @contextmanager
    def run(self, what: str):
        """Inside, `running` is `what`, and nothing is recorded for gradients."""
        before, self.running = self.running, what
        try:
            with torch.no_grad():
                yield
        finally:
            self.running = before

    @torch.compiler.disable
    def preview(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook before the model: runs a new prompt without edits, before the edited pass."""
        names = list(inspect.signature(module.forward).parameters)
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        cache, writing = bound.get("past_key_values"), self.session._generating
        known = (cache is not None and cache.get_seq_length() > 0) or (
            writing is not None and writing.prompt is not None
        )
        if self.running or known:
            return
        bound["past_key_values"] = copy.deepcopy(cache)
        with self.run("preview"):
            logits = getattr(module(**bound), "logits", None)
        prompt, self.read = self.read, None
        if logits is not None:
            at = prompt.last if logits.shape[1] == prompt.length else [-1] * prompt.batch
            logits = logits[torch.arange(prompt.batch), at]
        for fitted in self.session._spoken.values():
            if fitted.previews:
                fitted.previewed(prompt, logits)
        self._carried = prompt.lasting()

    def carry_over(self, now: Prompt) -> None:
        """Hands a new prompt the notes of its preview."""
        now.notes.update(self._carried)
        self._carried = {}

    def begin(self, module: nn.Module, now: Prompt, types: Tensor | None) -> None:
        """Reads the text of a new prompt alone, where a control compares.

        Args:
            module: what is called with token ids. types: token_type_ids (B, n) of the call, if there were any.
        """
        if any(fitted.compares for fitted in self.session._spoken.values()):
            stack = self.session.sites[0].path.rpartition(".")[0].rpartition(".")[0]
            with self.run("text"):
                self._text = TextOnly(module, list(self.session.model.get_submodule(stack)), now, types)

    def end(self) -> None:
        """The call is over: text that was read alone belongs to no other."""
        self._text = self._with_image = None

    def compare(self, site: Site, now: Prompt, out: Tensor) -> None:
        """Shows comparing controls the heads of a site, out (B, H, T, D), beside those of the text alone."""
        if self._text is None or not self._comparing(site):
            return
        self._with_image = out[torch.arange(now.batch), :, now.row_of_last()].detach()
        with self.run("text"):
            self._text.run_through(self.session.model.get_submodule(site.path.rpartition(".")[0]))
        self._with_image = None

    def _comparing(self, site: Site) -> list[Control]:
        weights = self.session._weights
        return [c for c, fitted in self.session._spoken.items() if fitted.compares and site.path in weights[c]]

    def attend(self, site: Site, inner, *args, **kwargs):
        """An attention call of the text alone: only comparing controls act, and they compare first."""
        out = inner(*args, **kwargs)[0].transpose(1, 2)
        if self._with_image is not None:
            for control in self._comparing(site):
                fitted, weights = self.session._fitted[control], self.session._weights[control][site.path]
                fitted.compare(site, self.session._now, self._with_image, out[:, :, -1])
                out = times(out, fitted.head_scale(site, self.session._now, weights))
        return out.transpose(1, 2).contiguous(), None


def times(out: Tensor, factor: Tensor | None) -> Tensor:
    """(B, H, T, D) times (B|1, H)."""
    return out if factor is None else out * factor.to(out.device, out.dtype)[:, :, None, None]
