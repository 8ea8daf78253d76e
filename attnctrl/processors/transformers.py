"""The way into transformers' attention interface: one attention function and one mask function under one name.

``attnctrl_sdpa`` stands for "sdpa, and whatever session holds this module". The function finds the session by the module it is called
for and falls back to sdpa, so modules without a session that share a config are not affected. An attention function without a mask
function of its name would get no mask at all: both are registered together.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import AttnCtrlError


PREFIX = "attnctrl_"
LOCK = threading.RLock()
_HOLDERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # attention module -> its session
_USED: dict[int, tuple[Any, str, list[int]]] = {}  # id of a config -> (config, its own implementation, [sessions])


def holder(module: nn.Module):
    """The session that holds an attention module, or None."""
    return _HOLDERS.get(module)


def hold(modules: list[nn.Module], session: Any) -> None:
    for module in modules:
        _HOLDERS[module] = session


def release(modules: list[nn.Module]) -> None:
    for module in modules:
        _HOLDERS.pop(module, None)


def switch_on(config: Any) -> None:
    """Sends the attention of all modules with this config through ours. Counted: models may share a config."""
    if id(config) in _USED:
        _USED[id(config)][2][0] += 1
        return
    own = config._attn_implementation or "eager"
    if own.startswith(PREFIX):
        raise AttnCtrlError(
            f"the attention implementation is {own!r} already, set by hand or copied from an attached model"
        )
    if own == "flex_attention":
        raise AttnCtrlError(
            "flex_attention keeps its masks in a form that rows cannot be read from\nHINT: model.set_attn_implementation('sdpa')"
        )
    _USED[id(config)] = (config, config._attn_implementation_internal, [1])
    config._attn_implementation_internal = _registered(own)


def switch_off(config: Any) -> None:
    _, own, users = _USED[id(config)]
    users[0] -= 1
    if users[0] == 0:
        del _USED[id(config)]
        config._attn_implementation_internal = own


def _registered(own: str) -> str:
    """The name for an implementation, registered with what its mask function is."""
    name = PREFIX + own
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_controlled, own))
        if own in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    return name


@torch.compiler.disable
def _controlled(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args,
    **kwargs,
):
    session = holder(module)
    inner = _implementation(own, module)
    if session is None:
        return inner(module, query, key, value, attention_mask, *args, **kwargs)
    return session.attend(inner, module, query, key, value, attention_mask, *args, **kwargs)


def _implementation(own: str, module: nn.Module) -> Callable:
    """The model's own attention function. Eager ones are in the file of the model."""
    if own != "eager":
        return ALL_ATTENTION_FUNCTIONS[own]
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise AttnCtrlError(f"no eager attention for {type(module).__name__}\nHINT: model.set_attn_implementation('sdpa')")
