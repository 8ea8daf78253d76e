"""How edits enter a diffusers denoiser: a processor that delegates to the model's own and takes over the one attention call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..attention import run_rows
from ..errors import AttnCtrlError
from ..sites import Site


if TYPE_CHECKING:
    from .adapters import AdapterCalls
    from .session import Session


class TakeOver(TorchFunctionMode):
    """Inside it, the attention call of a site runs under the session's plans, and those of an IP-Adapter under `adapter`."""

    def __init__(self, session: Session, site: Site, adapter: AdapterCalls | None = None):
        super().__init__()
        self.session, self.site, self.adapter = session, site, adapter
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (self.calls and self.adapter is None):
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
        q, k, v = named["query"], named["key"], named["value"]
        mask = named.get("attn_mask")
        if self.calls:
            out = self.adapter.attend(q, k, v, named.get("scale"))
            return func(*args, **kwargs) if out is None else out
        plans = self.session.plans_for(self.site, q.shape, k.shape[2], mask)
        if plans is None:
            return func(*args, **kwargs)  # another attention of the same processor, e.g. of an IP-Adapter
        self.calls += 1
        if not plans:
            return func(*args, **kwargs)
        return run_rows(q, k, v, plans, scale=named.get("scale"), causal=bool(named.get("is_causal")), mask=mask)


class ControlledAttnProcessor:
    """Stands in for a module's own processor, calls it, and hands its attention to the engine while a plan is in force.

    Projections, norms and rotary embedding stay the model's own code, so q, k and v arrive as its kernel would see them. Without
    a plan the inner processor is called and nothing else happens. In a compiled block it runs eagerly, between two graphs.
    """

    def __init__(self, inner: Any = None, site: Site | None = None, session: Session | None = None):
        if session is None:  # diffusers makes new processors of the class that it finds, to load an IP-Adapter
            raise AttnCtrlError(
                "the attention processors are being exchanged while controls are attached\n"
                "HINT: detach, load the adapter, and attach again"
            )
        self.inner, self.site, self.session = inner, site, session

        def call(*args, **kwargs):
            return type(self).__call__(self, *args, **kwargs)

        # diffusers drops keyword arguments that the signature of `processor.__call__` does not name: show the inner one's
        call.__signature__ = inspect.signature(inner.__call__)
        self.__call__ = call

    @property
    def _attention_backend(self):
        """The inner processor's backend, if it has one: `set_attention_backend` reaches it through a session."""
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend) -> None:
        self.inner._attention_backend = backend

    @torch.compiler.disable
    def __call__(self, attn, hidden_states: torch.Tensor, *args, **kwargs):
        if not self.session.controls_site(self.site):
            return self.inner(attn, hidden_states, *args, **kwargs)
        adapter = self.session.adapter_calls(self.site, self.inner)
        with TakeOver(self.session, self.site, adapter) as mode, _native_backend(self.inner), adapter or nullcontext():
            out = self.inner(attn, hidden_states, *args, **kwargs)
        if mode.calls == 0:
            raise AttnCtrlError(
                f"{self.site.path}: {type(self.inner).__name__} never called scaled_dot_product_attention on {self.session.expects(self.site)} "
                "tokens, so the controls could not act\n"
                "HINT: pipe.transformer.set_attention_backend('native'), or another attention processor"
            )
        if adapter is not None and not adapter.taken:
            self.session._note("the IP-Adapter's scale is 0 in some layers, where SubjectLayout has nothing to place")
        self.session.mark(self.site)
        return out


@contextmanager
def _native_backend(inner: Any) -> Iterator[None]:
    """Routes one call of a processor through SDPA, whatever diffusers attention backend the user chose."""
    if not hasattr(inner, "_attention_backend"):
        yield
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    own, saved = "_attention_backend" in vars(inner), inner._attention_backend
    inner._attention_backend = AttentionBackendName.NATIVE
    try:
        yield
    finally:
        if own:
            inner._attention_backend = saved
        else:
            del inner._attention_backend
