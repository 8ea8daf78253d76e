"""Language models with an explicit N x N attention in float64, edited by formulas that share nothing with the package."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


RUNNING: list = []


def _mask(*args, **kwargs):
    kwargs["allow_is_causal_skip"] = kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*args, **kwargs)


def _attention(module, q, k, v, mask, scaling=None, **kwargs):
    edit, tracker = RUNNING[-1]
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    s = q.double() @ k.transpose(-1, -2) * scaling
    total = tracker.total
    q_at = torch.arange(total - q.shape[2], total)
    k_at = torch.arange(total - k.shape[2], total)
    p = edit(module.layer_idx, s, mask[..., : k.shape[2]], q_at, k_at)
    return (p @ v).to(q.dtype).transpose(1, 2), None


AttentionInterface.register("dense_tests", _attention)
AttentionMaskInterface.register("dense_tests", _mask)


class Tracker:
    total = 0


def softmax(s, mask):
    return torch.softmax(s.masked_fill(~mask, -math.inf), -1).nan_to_num(0.0)


@contextmanager
def dense(decoder, edit):
    """Inside, `decoder` attends by `edit(layer, s, mask, q_at, k_at) -> p`, with s (B, H, T, S) before any mask."""
    own, tracker = decoder.config._attn_implementation, Tracker()
    decoder.config._attn_implementation = "dense_tests"
    RUNNING.append((edit, tracker))
    try:
        yield tracker
    finally:
        RUNNING.pop()
        decoder.config._attn_implementation = own


def pai(image, alpha, layers, heads=None):
    def edit(layer, s, mask, q_at, k_at):
        if layer in layers:
            for b in range(s.shape[0]):
                for h in range(s.shape[1]) if heads is None else heads:
                    for i in (q_at >= image.shape[1] - 1).nonzero().flatten().tolist():
                        for j, at in enumerate(k_at.tolist()):
                            if at < image.shape[1] and image[b, at]:
                                s[b, h, i, j] += alpha * abs(float(s[b, h, i, j]))
        return softmax(s, mask)

    return edit


def vaf(image, valid, up, down, layers):
    def edit(layer, s, mask, q_at, k_at):
        if layer in layers:
            for b in range(s.shape[0]):
                where = image[b].nonzero().flatten()
                rows = q_at > int(where[-1])
                factor = torch.ones(s.shape[-1], dtype=torch.float64)
                for j, at in enumerate(k_at.tolist()):
                    if at < image.shape[1]:
                        factor[j] = up if image[b, at] else down if at < int(where[0]) and valid[b, at] else 1.0
                s[b][:, rows] = s[b][:, rows] * factor
        return softmax(s, mask)

    return edit


def pasta(chosen, alpha, layers, heads=None, beyond=False):
    """`chosen` (B, n): whose probability is multiplied by alpha; `beyond`: generated tokens too."""

    def edit(layer, s, mask, q_at, k_at):
        p = softmax(s, mask)
        if layer not in layers:
            return p
        c = torch.ones(s.shape[0], 1, 1, s.shape[-1], dtype=torch.float64)
        for b in range(s.shape[0]):
            for j, at in enumerate(k_at.tolist()):
                if (at < chosen.shape[1] and chosen[b, at]) or (at >= chosen.shape[1] and beyond):
                    c[b, 0, 0, j] = alpha
        new = p * c
        new = (new / new.sum(-1, keepdim=True)).nan_to_num(0.0)
        if heads is None:
            return new
        out = p.clone()
        out[:, heads] = new[:, heads]
        return out

    return edit


def var(image, hidden, dims, tau, min_non_sink, min_image_mass, transfer, layers, tally):
    """`hidden[layer]`: (B, n, C), what entered the layer when the prompt was read."""

    def edit(layer, s, mask, q_at, k_at):
        p = softmax(s, mask)
        if layer not in layers:
            return p
        x = hidden[layer].double()
        phi = x[..., dims].abs().amax(-1) / (x.pow(2).mean(-1) + 1e-6).sqrt()
        for b in range(s.shape[0]):
            sink = torch.tensor([at < image.shape[1] and bool(phi[b, at] > tau) for at in k_at.tolist()])
            picture = torch.tensor([at < image.shape[1] and bool(image[b, at]) for at in k_at.tolist()])
            if not (sink & picture).any():
                continue
            for i in (q_at > int(image[b].nonzero()[-1])).nonzero().flatten().tolist():
                for h in range(s.shape[1]):
                    row = p[b, h, i]
                    free = picture & ~sink
                    tally["asked"] = tally.get("asked", 0) + 1
                    if row[picture].sum() < min_image_mass or row[free].sum() < min_non_sink * row[picture].sum():
                        continue
                    tally["edited"] = tally.get("edited", 0) + 1
                    new, moved = row.clone(), transfer * row[sink].sum()
                    new[sink] = row[sink] * (1 - transfer)
                    new[free] = row[free] + moved * row[free] / row[free].sum()
                    p[b, h, i] = new
        return p

    return edit
