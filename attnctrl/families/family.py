"""What attnctrl has to be told about a model family: one frozen table each."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import AttnCtrlError
from ..sites import Block, Site


_MISSING = object()


def running(pipeline: Any, name: str, default: Any = _MISSING) -> Any:
    """A setting of the running call of a pipeline: its property, or the local variable of its `__call__`."""
    value = getattr(pipeline, name, None)
    if value is not None:
        return value
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_locals.get("self") is pipeline and name in frame.f_locals:
            return frame.f_locals[name]
        frame = frame.f_back
    if default is not _MISSING:
        return default
    raise AttnCtrlError(
        f"{type(pipeline).__name__} does not tell its {name}, so its conditional and unconditional predictions cannot be told apart\n"
        "HINT: attach to its denoiser alone to control every row; pipelines with a guider take HeadGuidance(…, guider=pipe.guider)"
    )


def _guides_with_cfg(pipeline: Any) -> bool:
    return bool(running(pipeline, "do_classifier_free_guidance"))


def _uncond_weight(pipeline: Any) -> float:
    return 1 - float(running(pipeline, "guidance_scale"))


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind and one attention module inside each.

    Args:
        blocks: dotted path of the list of blocks, or of a single block; `*` stands for every entry of a list on the way:
            ``"transformer_blocks"``, ``"down_blocks.*.attentions.*.transformer_blocks"``. Entries without it are left out.
        attention: the attention module in a block.
        kind: "joint" (text and image in one sequence), "self", or "cross" (image rows, text keys).
        streams: order of the token streams along the rows of that attention call.
        primary: False for attention that no layer number selects; its path does.
        takes: streams and the arguments of a block's `forward` that carry them.
        gives: streams that a block returns, in order; one name if it returns one tensor. Two stacks over the same blocks (self- and
            cross-attention) repeat them.
    """

    blocks: str
    attention: str
    kind: Literal["self", "cross", "joint"]
    streams: tuple[str, ...]
    primary: bool = True
    takes: tuple[tuple[str, str], ...] = (("image", "hidden_states"), ("text", "encoder_hidden_states"))
    gives: tuple[str, ...] = ("image",)


@dataclass(frozen=True)
class Family:
    """How a family's denoiser is built and called. Names of arguments are those of its `forward`.

    Args:
        name: as reports and head sets write it.
        denoiser: class name of the denoiser.
        component: the pipeline attribute that holds it.
        stacks: block stacks in the order in which layers are numbered, which is the order in which they run.
        image: argument with the latents. text: argument with the text states, (B, T, C); None if there is none.
        cfg: "batched": one call with the rows [uncond, cond]; "batched, cond first": [cond, uncond]; "separate": two calls a step,
            the conditional one first.
        grid: (bound arguments, model) -> (rows, columns) of image tokens in the first block, or (frames, rows, columns).
        encode: (pipeline, prompts, text length, device) -> (R, T, C) text states of region prompts; None where prompts of their own
            cannot be appended to the text.
        tokenizers: (pipeline attribute of a tokenizer, attribute with the number of its first token or None for 0) of those whose tokens
            make up the text; empty where the text holds others too.
        text_ids: argument with one row of position ids per text token, (T, n), when text has ids.
        image_ids: argument with the rotary positions of image tokens, (N, n) or (B, N, n) alike in all rows, frame, row and column
            first; None where the model makes them itself.
        numbered_text: the last entry of a text token's ids is its number in the prompt; otherwise all are 0.
        text_mask: argument that masks text tokens, (B, T); appended prompts are added to it.
        trims: (text, its mask) arguments whose padding is cut off before prompts are appended, as masks count tokens.
        refiner: path of a module in which text tokens attend to each other before the blocks; appended prompts pass it one by one.
        unbatched: tensor arguments without a batch dimension.
        row_dims: arguments whose batch dimension is not the first, with its number.
        lengths: (bound arguments, model) -> tokens per stream in an attention call, {"image": …, "text": …}; None for the product of
            the grid and the length of `text`. An entry may be missing or None when it differs between calls (UNets). "reference"
            counts tokens of other pictures, which stand behind those of the image.
        units: dotted paths (with `*`) of what runs one after the other, in order, where that is not the stacks' blocks (UNets:
            down, mid and up blocks). Prefix reuse skips whole units.
        skips: True when outputs of units are also used later than by the next unit (UNets).
        cfg_on: pipeline -> whether its running step guides with CFG.
        uncond_weight: pipeline -> the coefficient of the unconditional prediction in its running step, 1 − g.
        renormalizes: pipeline -> True when it rescales the guided prediction to the conditional one (`guidance_rescale`, …).
        lists: arguments that are lists with one entry per row of the batch (Z-Image); rows are counted by `image` then too.
        adapters: diffusers loads IP-Adapters into this family.
        refuses: reasons by control name, or under "*" for all, why a control cannot work on this family.
    """

    name: str
    denoiser: str
    component: str
    stacks: tuple[Stack, ...]
    image: str
    text: str | None
    cfg: Literal["batched", "batched, cond first", "separate"]
    grid: Callable[[dict[str, Any], nn.Module], tuple[int, ...]]
    encode: Callable[[Any, list[str], int, torch.device], torch.Tensor] | None = None
    tokenizers: tuple[tuple[str, str | None], ...] = ()
    text_ids: str | None = None
    image_ids: str | None = None
    numbered_text: bool = False
    text_mask: str | None = None
    trims: tuple[tuple[str, str], ...] = ()
    refiner: str | None = None
    unbatched: tuple[str, ...] = ()
    row_dims: tuple[tuple[str, int], ...] = ()
    lengths: Callable[[dict[str, Any], nn.Module], dict[str, int | None]] | None = None
    units: tuple[str, ...] = ()
    skips: bool = False
    cfg_on: Callable[[Any], bool] = _guides_with_cfg
    uncond_weight: Callable[[Any], float] = _uncond_weight
    renormalizes: Callable[[Any], bool] | None = None
    lists: tuple[str, ...] = ()
    adapters: bool = False
    refuses: tuple[tuple[str, str], ...] = ()

    def sites(self, model: nn.Module) -> list[Site]:
        """Every attention module of the model, layers numbered through all primary stacks."""
        numbers = self._numbers(model)
        found: list[Site] = []
        for stack in self.stacks:
            for path, block in expand(model, stack.blocks):
                module = getattr(block, stack.attention, None)
                if module is not None:
                    heads = head_count(module)
                    site = f"{path}.{stack.attention}"
                    found.append(Site(site, numbers[path], stack.kind, heads, stack.streams, stack.primary))
        return found

    def blocks(self, model: nn.Module) -> list[Block]:
        """Every transformer block, in the order of layers."""
        numbers, found = self._numbers(model), {}
        for stack in self.stacks:
            for path, _ in expand(model, stack.blocks):
                found.setdefault(path, Block(path, numbers[path], stack.takes, stack.gives, stack.streams))
        return sorted(found.values(), key=lambda block: block.layer)

    def run_order(self, model: nn.Module) -> list[str]:
        """Paths of the units that run one after the other."""
        if self.units:
            return [path for pattern in self.units for path, _ in expand(model, pattern)]
        return [block.path for block in self.blocks(model)]

    def _numbers(self, model: nn.Module) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for stack in self.stacks:
            for path, _ in expand(model, stack.blocks):
                numbers.setdefault(path, len(numbers))
        return numbers

    def bind(self, forward: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments of a call by name; what `forward` collects in `**kwargs` stays as it is."""
        signature = inspect.signature(forward)
        bound = dict(signature.bind(*args, **kwargs).arguments)
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        return {**{k: v for k, v in bound.items() if k != rest}, **bound.get(rest, {})}

    def rows(self, bound: dict[str, Any]) -> int:
        """Rows of the batch."""
        return len(bound[self.image])

    def tokens(self, bound: dict[str, Any], model: nn.Module) -> tuple[dict[str, int | None], tuple[int, ...]]:
        """(tokens per stream, grid) of a call."""
        grid = self.grid(bound, model)
        if self.lengths is not None:
            return self.lengths(bound, model), grid
        found: dict[str, int | None] = {"image": math.prod(grid)}
        if self.text is not None and isinstance(bound.get(self.text), torch.Tensor):
            found["text"] = bound[self.text].shape[1]
        return found, grid

    def tokenizers_of(self, pipeline: Any) -> list[tuple[Any, int]]:
        """Tokenizers of a pipeline's text, each with the number of its first token there."""
        found = [(getattr(pipeline, name, None), first) for name, first in self.tokenizers]
        return [(one, getattr(pipeline, first) if first else 0) for one, first in found if one is not None]

    def trim(self, bound: dict[str, Any]) -> dict[str, Any]:
        """The call without the padding of its prompts. Raises where these differ in length."""
        out = dict(bound)
        for text, mask in self.trims:
            if isinstance(bound.get(mask), torch.Tensor):
                counts = bound[mask].bool().sum(1).tolist()
                if len(set(counts)) > 1:
                    raise AttnCtrlError(
                        f"the prompts of this batch have {min(counts)} to {max(counts)} tokens, and others can be appended behind "
                        "prompts of one length alone\nHINT: one prompt per call (num_images_per_prompt gives several pictures of it)"
                    )
                out[text], out[mask] = bound[text][:, : counts[0]], bound[mask][:, : counts[0]]
        return out

    def add_text(self, bound: dict[str, Any], states: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The call with the text states of several prompts, (1, T, C) each, appended for every row, in the order that `lay_out` expects."""
        bound = self.trim(bound)
        text = bound[self.text]
        extra = torch.cat(list(states), dim=1).to(text).expand(text.shape[0], -1, -1)
        first = self.stacks[0].streams[0] == "text"
        out = {**bound, self.text: torch.cat([extra, text] if first else [text, extra], dim=1)}
        if self.text_ids is not None:
            ids = bound[self.text_ids]
            more = ids.new_zeros(*ids.shape[:-2], extra.shape[1], ids.shape[-1])
            if self.numbered_text:
                more[..., -1] = torch.cat([torch.arange(state.shape[1]) for state in states]).to(ids)
            out[self.text_ids] = torch.cat([more, ids] if first else [ids, more], dim=-2)
        if self.text_mask is not None and isinstance(bound.get(self.text_mask), torch.Tensor):
            mask = bound[self.text_mask]
            ones = mask.new_ones(mask.shape[0], extra.shape[1])
            out[self.text_mask] = torch.cat([ones, mask] if first else [mask, ones], dim=1)
        return out

    def select_rows(self, bound: dict[str, Any], rows: slice, batch: int) -> dict[str, Any]:
        """The call with only some batch rows, in tensors, lists, tuples and dictionaries of tensors alike."""
        out, row_dims = {}, dict(self.row_dims)
        for name, value in bound.items():
            if name in row_dims and isinstance(value, torch.Tensor):
                out[name] = value[(slice(None),) * row_dims[name] + (rows,)]
            elif name in self.lists and isinstance(value, (list, tuple)):
                out[name] = value[rows]
            else:
                out[name] = value if name in self.unbatched else pick_rows(value, rows, batch)
        return out


def pick_rows(value: Any, rows: slice, batch: int) -> Any:
    """Some rows of every tensor with `batch` rows in a nest of lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: pick_rows(item, rows, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(pick_rows(item, rows, batch) for item in value)
    return value


def without_padding(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The text states (1, T, C) of one prompt without the padding at their end; mask is (1, T), 1 for real tokens."""
    return states[:, : int(mask.sum())]


def expand(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """(path, module) of a dotted pattern; `*` and a list at the end stand for every entry, missing ones are left out."""
    found: list[tuple[str, Any]] = [("", model)]
    for part in pattern.split("."):
        step = []
        for path, module in found:
            prefix = f"{path}." if path else ""
            if part == "*":
                step += [(f"{prefix}{i}", child) for i, child in enumerate(module)]
            elif getattr(module, part, None) is not None:
                step.append((f"{prefix}{part}", getattr(module, part)))
        found = step
    out: list[tuple[str, nn.Module]] = []
    for path, module in found:
        if isinstance(module, nn.ModuleList):
            out += [(f"{path}.{i}", child) for i, child in enumerate(module)]
        else:
            out.append((path, module))
    return out


def head_count(module: nn.Module) -> int:
    """Query heads of an attention module."""
    for name in ("heads", "num_heads", "num_attention_heads", "n_heads"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    raise AttributeError(f"{type(module).__name__} names its number of heads in none of heads, num_heads, n_heads")
