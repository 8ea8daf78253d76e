"""How much probability query rows give to a few keys: explicit columns beside the LSE of one fused call, never n_q x n_k."""

from __future__ import annotations

import torch

from attnctrl.attention import groups
from attnctrl.attention.blocks import Inputs, exact
from attnctrl.attention.dispatch import attend
from attnctrl.attention.groups import take
from attnctrl.attention.plan import Plan, Watch
from attnctrl.errors import AttnCtrlError


PAIRS = "the model masks pairs of tokens, under which no probabilities are recorded"


def check_watches(plan: Plan) -> None:
    """Raises if a plan is to look under a mask that tells query rows apart."""
    if plan.mask is not None and plan.key_bias is None and any(isinstance(lerp, Watch) for lerp in plan.lerps):
        raise AttnCtrlError(PAIRS)


@torch.no_grad()
def look(inputs: Inputs, watch: Watch) -> None:
    """Shows the watch exp(s_ij - lse_i), summed over each of its key sets."""
    if inputs.causal or (inputs.mask is not None and inputs.key_bias is None):
        raise AttnCtrlError(PAIRS)
    n_k, wide = inputs.k.shape[2], exact(inputs.q)
    q = take(inputs.q, watch.queries)
    bias = inputs.key_bias
    _, lse = attend(q, inputs.k, inputs.v, scale=inputs.scale, kernel=inputs.kernel, key_bias=bias)
    sets = [groups.spans(tokens, n_k) for tokens in watch.keys]
    columns = groups.join(*sets)
    chosen = groups.tokens_of(columns, q.device)
    k = take(inputs.k, chosen).to(wide)
    scale = q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
    s = (q.to(wide) * scale).unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2)
    s = s.flatten(1, 2)
    if bias is not None:
        s = s + take(bias.to(s), chosen, -1)[:, :, None]
    p = torch.exp(s - lse.to(wide).masked_fill(lse == -torch.inf, 0.0)[..., None]).mean(1)
    masses = [take(p, groups.tokens_of(groups.positions(these, columns), q.device), -1).sum(-1) for these in sets]
    watch.see(torch.stack(masses, -1))
