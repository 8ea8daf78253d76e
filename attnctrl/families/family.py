"""What attnctrl has to be told about a model family: one frozen table each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..sites import Site


@dataclass(frozen=True)
class Stack:
    """A list of blocks and the attention module inside each.

    `streams` is the order of token streams along the sequence of that attention call.
    """

    blocks: str
    attention: str
    kind: Literal["self", "cross", "joint"]
    streams: tuple[str, ...]
    primary: bool = True


@dataclass(frozen=True)
class Family:
    """How a family's denoiser is built and called. Names of arguments are those of its `forward`.

    Args:
        name: as reports and head sets write it.
        denoiser: class name of the denoiser.
        component: the pipeline attribute that holds it.
        stacks: block stacks in the order in which layers are numbered.
        image: argument with the latents. text: argument with the text states, (B, T, C).
        cfg: "batched": one call with the rows [uncond, cond]; "separate": two calls a step, the conditional one first.
        grid: (bound arguments, model) -> (rows, columns) of image tokens.
        encode: (pipeline, prompts, text length, device) -> (R, T, C) text states of region prompts.
        text_ids: argument with one row of position ids per text token, (T, n), when text has ids.
        unbatched: tensor arguments without a batch dimension.
    """

    name: str
    denoiser: str
    component: str
    stacks: tuple[Stack, ...]
    image: str
    text: str
    cfg: Literal["batched", "separate"]
    grid: Callable[[dict[str, Any], nn.Module], tuple[int, int]]
    encode: Callable[[Any, list[str], int, torch.device], torch.Tensor]
    text_ids: str | None = None
    unbatched: tuple[str, ...] = ()

    def sites(self, model: nn.Module) -> list[Site]:
        """Every attention module of the model, layers numbered through all primary stacks."""
        found: list[Site] = []
        offset = 0
        seen: dict[str, int] = {}
        for stack in self.stacks:
            blocks = getattr(model, stack.blocks)
            base = seen.setdefault(stack.blocks, offset)
            for index, block in enumerate(blocks):
                module = getattr(block, stack.attention, None)
                if module is None:
                    continue
                path = f"{stack.blocks}.{index}.{stack.attention}"
                found.append(Site(path, base + index, stack.kind, module.heads, stack.streams, stack.primary))
            if stack.primary:
                offset = base + len(blocks)
        return found

    def bind(self, forward: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments of a call by name."""
        return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)

    def add_text(self, bound: dict[str, Any], extra: torch.Tensor) -> dict[str, Any]:
        """The call with the text states `extra`, (1, E, C), appended for every row, in the order that `lay_out` expects."""
        text = bound[self.text]
        extra = extra.to(text).expand(text.shape[0], -1, -1)
        first = self.stacks[0].streams[0] == "text"
        out = {**bound, self.text: torch.cat([extra, text] if first else [text, extra], dim=1)}
        if self.text_ids is not None:
            ids = bound[self.text_ids]
            more = ids.new_zeros(*ids.shape[:-2], extra.shape[1], ids.shape[-1])
            out[self.text_ids] = torch.cat([more, ids] if first else [ids, more], dim=-2)
        return out

    def select_rows(self, bound: dict[str, Any], rows: slice, batch: int) -> dict[str, Any]:
        """The call with only some batch rows, in tensors, lists, tuples and dictionaries of tensors alike."""

        def pick(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value[rows] if value.ndim and value.shape[0] == batch else value
            if isinstance(value, dict):
                return {key: pick(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(pick(item) for item in value)
            return value

        return {name: value if name in self.unbatched else pick(value) for name, value in bound.items()}
