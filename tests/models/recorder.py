"""The attention calls of a forward pass, site by site."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnctrl.sites import Site


class Call(NamedTuple):
    """q, k, v (B, H, N, D) and the mask as a site's processor hands them to `scaled_dot_product_attention`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None


class Recorder(TorchFunctionMode):
    """Inside it, `calls` collects (path of the site, Call) in the order in which they happen. Calls outside all sites are left out."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]):
        super().__init__()
        self.model, self.paths = model, [site.path for site in sites]
        self.calls: list[tuple[str, Call]] = []
        self.inside: str | None = None

    def __enter__(self):
        modules, self.handles = dict(self.model.named_modules()), []
        for path in self.paths:
            self.handles += [
                modules[path].register_forward_pre_hook(lambda module, args, path=path: setattr(self, "inside", path)),
                modules[path].register_forward_hook(lambda module, args, out: setattr(self, "inside", None)),
            ]
        return super().__enter__()

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exc)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside is not None:
            named = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
            call = Call(named["query"], named["key"], named["value"], named.get("attn_mask"))
            self.calls.append((self.inside, call))
        return func(*args, **kwargs)


def record(model: nn.Module, sites: Iterable[Site], call: dict) -> list[tuple[str, Call]]:
    """The attention calls of one forward pass."""
    with torch.no_grad(), Recorder(model, sites) as recorder:
        model(**call)
    return recorder.calls
