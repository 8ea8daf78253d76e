"""A prompt without its image tokens, run layer by layer beside the prompt itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..controls.language import Prompt


class TextOnly:
    """Stands before the first layer of a language model; `run_through` takes it on.

    The text is read once through the whole model, so that every layer's mask and positions are the model's own, and then again, layer
    by layer. Positions close up where the image was.

    Args:
        base: what is called with token ids.
        layers: the stack of the language model, in order.
        types: token_type_ids (B, n) of the call, if there were any.
    """

    def __init__(self, base: nn.Module, layers: Sequence[nn.Module], prompt: Prompt, types: Tensor | None = None):
        self.layers, self.done = list(layers), 0
        self.hidden: Tensor | None = None
        self._calls: list[tuple[tuple, dict]] = []

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.hidden = hidden if self.hidden is None else self.hidden
            self._calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        try:
            base(**_without_image(prompt, types), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def run_through(self, layer: nn.Module) -> None:
        """Runs up to and with a layer."""
        last = self.layers.index(layer)
        while self.done <= last:
            args, kwargs = self._calls[self.done]
            out = self.layers[self.done](self.hidden, *args, **kwargs)
            self.hidden = out[0] if isinstance(out, tuple) else out
            self.done += 1


def _without_image(prompt: Prompt, types: Tensor | None) -> dict[str, Tensor]:
    """Arguments of a call that reads the text alone, padded on the left."""
    kept = prompt.valid & ~prompt.image
    order = kept.int().argsort(dim=1, stable=True)[:, -int(kept.sum(1).max()) :]  # what is kept last, in its order
    mask = kept.gather(1, order)
    ids = prompt.ids.gather(1, order)
    some = ids[:, -1:].expand_as(ids)  # padding must not be an image token
    found = {"input_ids": torch.where(mask, ids, some), "attention_mask": mask.long()}
    if types is not None:
        found["token_type_ids"] = types.gather(1, order)
    return found
