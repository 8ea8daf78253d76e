"""How much probability query rows give to sets of keys: explicit columns and LSEs of fused calls, never n_q x n_k.

A ``Measure`` keeps gradients. With the LSE as a function of q and k,

    d lse_i / d q_i = scale sum_j p_ij k_j      attention with the keys as values
    d lse_i / d k_j = scale p_ij q_i            what these values get as their gradient, for an output gradient of scale q_i

so its gradient, too, is one fused call each way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from attnctrl.attention import groups
from attnctrl.attention.blocks import Inputs, exact
from attnctrl.attention.dispatch import attend
from attnctrl.attention.groups import Spans, Tokens, take
from attnctrl.attention.plan import Plan, Watch
from attnctrl.errors import AttnCtrlError


PAIRS = "the model masks pairs of tokens, under which no probabilities are recorded"
MANY = 64  # a set of more keys is summed by an LSE of its own, a smaller one key by key


@dataclass(frozen=True, eq=False)
class Measure(Watch):
    """A watch that ``see`` can differentiate. Its probabilities are those among the keys ``among`` (None = all), which hold all its sets:
    the text alone, in joint attention, is what cross-attention would see."""

    among: Tokens | None = None


def check_watches(plan: Plan) -> None:
    """Raises if a plan is to look under a mask that tells query rows apart."""
    if plan.mask is not None and plan.key_bias is None and any(isinstance(lerp, Watch) for lerp in plan.lerps):
        raise AttnCtrlError(PAIRS)


def look(inputs: Inputs, watch: Watch) -> None:
    """Shows the watch exp(s_ij - lse_i), summed over each of its key sets."""
    if inputs.causal or (inputs.mask is not None and inputs.key_bias is None):
        raise AttnCtrlError(PAIRS)
    with torch.set_grad_enabled(torch.is_grad_enabled() and isinstance(watch, Measure)):
        watch.see(_masses(inputs, watch))


def _masses(inputs: Inputs, watch: Watch) -> Tensor:
    """(B, n, sets): the mean over heads of the probability on each set."""
    n_k, wide = inputs.k.shape[2], exact(inputs.q)
    q, k, v, bias = take(inputs.q, watch.queries), inputs.k, inputs.v, inputs.key_bias
    sets = [groups.spans(tokens, n_k) for tokens in watch.keys]
    among = getattr(watch, "among", None)
    if among is not None:
        within = groups.spans(among, n_k)
        sets = [groups.positions(these, within) for these in sets]
        among = groups.tokens_of(within, q.device)
        k, v = take(k, among), take(v, among)
        bias = None if bias is None else take(bias, among, -1)
    n_k = k.shape[2]
    scale = q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale

    def of_keys(these: Spans) -> tuple[Tensor, Tensor | None]:
        tokens = groups.tokens_of(these, q.device)
        return take(k, tokens), None if bias is None else take(bias, tokens, -1)

    whole = _lse(q, k, v, scale, bias, inputs.kernel).to(wide)
    whole = whole.masked_fill(whole == -torch.inf, 0.0)
    few = [these for these in sets if groups.count(these) <= MANY]
    columns = groups.join(*few)
    found = []
    if few:
        arguments = (q, *of_keys(columns), whole, scale)
        if torch.is_grad_enabled() and whole.requires_grad:
            p = checkpoint(_columns, *arguments, use_reentrant=False)
        else:
            p = _columns(*arguments)
    for these in sets:
        if groups.count(these) <= MANY:
            found.append(take(p, groups.tokens_of(groups.positions(these, columns), q.device), -1).sum(-1))
        else:
            keys, added = of_keys(these)
            found.append(torch.exp(_lse(q, keys, keys, scale, added, inputs.kernel).to(wide) - whole).mean(1))
    return torch.stack(found, -1)


def _columns(q: Tensor, k: Tensor, bias: Tensor | None, lse: Tensor, scale: float) -> Tensor:
    """exp(s_ij - lse_i), the mean over heads: (B, n_q, n) for n keys."""
    s = (q.to(lse) * scale).unflatten(1, (k.shape[1], -1)) @ k.to(lse)[:, :, None].transpose(-1, -2)
    s = s.flatten(1, 2)
    if bias is not None:
        s = s + bias.to(s)[:, :, None]
    return torch.exp(s - lse[..., None]).mean(1)


def _lse(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, kernel: str | None) -> Tensor:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _LSE.apply(q, k, scale, bias)
    return attend(q, k, v, scale=scale, kernel=kernel, key_bias=bias)[1]


class _LSE(torch.autograd.Function):
    """log sum_j exp(scale q_i k_j + bias_j), (B, H, n_q)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale, ctx.bias = scale, bias
        return attend(q, k, k, scale=scale, key_bias=bias)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (q, k), (of_q, of_k) = ctx.saved_tensors, ctx.needs_input_grad[:2]
        grad = ctx.scale * grad[..., None]
        with torch.set_grad_enabled(of_k):
            values = k.detach().requires_grad_(of_k)
            named = {"scale": ctx.scale, "key_bias": ctx.bias, "need_lse": False}
            out, _ = attend(q.detach(), k.detach(), values, **named)
        to_q = (grad * out.detach()).to(q.dtype) if of_q else None
        to_k = None
        if of_k:
            (to_k,) = torch.autograd.grad(out, values, (grad * q.detach()).to(out.dtype))
        return to_q, to_k, None, None
