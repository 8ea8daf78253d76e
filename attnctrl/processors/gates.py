"""Gates stand before blocks: they keep what a block returned, hand it out again, or let a control edit the block.

A gate takes the place of the block's compiled call, which `nn.Module.__call__` consults before anything else. So it works the same for
plain, offloaded and regionally compiled blocks, hooks of the block stay in place, and a pass that reuses a kept output does not even
touch the block's weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import AttnCtrlError
from ..sites import Block


_SLOT = "_compiled_call_impl"


class Gate:
    """In front of one module; `through(gate, args, kwargs)` decides what its call returns."""

    def __init__(self, path: str, module: nn.Module, through: Callable[[Gate, tuple, dict], Any]):
        self.path, self.module, self.through = path, module, through
        self._had = _SLOT in module.__dict__
        self._before = getattr(module, _SLOT, None)
        self._names: inspect.Signature | None = None
        module.__dict__[_SLOT] = self

    def remove(self) -> None:
        """Restores the module. A gate that something else has replaced since is left alone."""
        if self.module.__dict__.get(_SLOT) is self:
            if self._had:
                self.module.__dict__[_SLOT] = self._before
            else:
                del self.module.__dict__[_SLOT]

    def __call__(self, *args, **kwargs):
        return self.through(self, args, kwargs)

    def inner(self, args: tuple, kwargs: dict) -> Any:
        """The module's own call, compiled if it was compiled."""
        return self._before(*args, **kwargs) if self._before is not None else self.module._call_impl(*args, **kwargs)

    # -- streams of a block ----------------------------------------------------------------------------------------------

    def _bind(self, args: tuple, kwargs: dict) -> inspect.BoundArguments:
        if self._names is None:
            self._names = inspect.signature(self.module.forward)
        return self._names.bind(*args, **kwargs)

    def streams(self, block: Block, args: tuple, kwargs: dict) -> dict[str, torch.Tensor]:
        """What goes into the block, by stream."""
        given = self._bind(args, kwargs).arguments
        return {stream: given[name] for stream, name in block.takes if isinstance(given.get(name), torch.Tensor)}

    def run(
        self, block: Block, streams: dict[str, torch.Tensor], args: tuple, kwargs: dict
    ) -> dict[str, torch.Tensor]:
        """The block on other streams; what it gives, by stream."""
        bound = self._bind(args, kwargs)
        for stream, name in block.takes:
            if stream in streams:
                bound.arguments[name] = streams[stream]
        return self.given(block, self.inner(bound.args, bound.kwargs))

    def given(self, block: Block, output: Any) -> dict[str, torch.Tensor]:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        if len(parts) != len(block.gives):
            raise AttnCtrlError(
                f"{block.path} returned {len(parts)} streams, its family table says {', '.join(block.gives)}"
            )
        return dict(zip(block.gives, parts))

    def pack(self, block: Block, streams: dict[str, torch.Tensor]) -> Any:
        """The block's return value from streams."""
        parts = tuple(streams[name] for name in block.gives)
        return parts[0] if len(block.gives) == 1 else parts


class Kept:
    """Rows of a block's output, and whether it has been written to since."""

    def __init__(self, value: Any):
        tensors = _tensors(value)
        if any(tensor.is_inference() for tensor in tensors):  # these do not count their versions
            value = _clone(value)
            tensors = []
        self.value = value
        self._versions = [(tensor, tensor._version) for tensor in tensors]

    @property
    def intact(self) -> bool:
        return all(tensor._version == version for tensor, version in self._versions)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    return type(value)(_clone(item) for item in value) if isinstance(value, (list, tuple)) else value
