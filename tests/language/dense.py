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


# What acts on the pattern: p (B, H, T, S) -> p. Positions outside the prompt are neither image nor sink.


def known(mask, k_at):
    """A mask of the prompt's positions (B, n) as one of keys (B, S)."""
    out = torch.zeros(len(mask), len(k_at), dtype=torch.bool)
    for j, at in enumerate(k_at.tolist()):
        if at < mask.shape[1]:
            out[:, j] = mask[:, at]
    return out


def act(p, mask, valid, q_at, k_at, threshold, beta, heads, sinks):
    """`sinks`: filled when the prompt is read: (H, position) of each row."""
    new = p.clone()
    for b in range(len(p)):
        first = int(valid[b].nonzero()[0])
        for h in heads:
            if (b, h) not in sinks:
                sinks[b, h] = set()
                queries = [i for i, at in enumerate(q_at.tolist()) if valid[b, at]]
                for j, at in enumerate(k_at.tolist()):
                    seeing = [i for i in queries if mask[b, 0, i, j]]
                    limit = threshold if isinstance(threshold, float) else threshold[0] / int(valid[b].sum())
                    if seeing and at != first and sum(p[b, h, i, j] for i in seeing) / len(seeing) > limit:
                        sinks[b, h].add(at)
            sink = torch.tensor([at in sinks[b, h] for at in k_at.tolist()])
            for i in range(len(q_at)):
                row = p[b, h, i]
                if row[~sink].sum() == 0:  # padding, or a window with nothing but sinks
                    continue
                moved = (1 - beta) * row[sink].sum()
                new[b, h, i, sink] = beta * row[sink]
                new[b, h, i, ~sink] = row[~sink] * (1 + moved / row[~sink].sum())
    return new


def salient(pattern, words):
    """Of one prompt: pattern (H, T, K) over its image, words: rows. The formula of the paper."""
    rise = torch.stack([(pattern[:, i] - pattern[:, i - 1]).clamp(min=0) for i in words], 1)
    strongest = sorted(range(len(rise)), key=lambda h: -float(rise[h].sum()))[: len(rise) // 2]
    mean = sum(rise[h].sum(0) for h in strongest) / (len(strongest) * len(words))
    spread = 3 * math.sqrt(float(((mean - mean.mean()) ** 2).sum() / (len(mean) - 1)))
    mean = torch.stack([min(max(x, mean.mean() - spread), mean.mean() + spread) for x in mean])
    return (mean - mean.min()) / (mean.max() - mean.min())


def gift(p, image, question, q_at, k_at, saliency, alpha):
    """`saliency`: per prompt over its image tokens."""
    picture, asked = known(image, k_at), known(question, k_at)
    new = p.clone()
    for b in range(len(p)):
        last = int(question[b].nonzero()[-1])
        grow = torch.zeros(image.shape[1], dtype=torch.float64)
        grow[image[b]] = alpha * saliency[b]
        factor = torch.tensor([math.exp(grow[at]) if at < len(grow) else 1.0 for at in k_at.tolist()])
        for i in (q_at >= last).nonzero().flatten().tolist():
            rows = p[b, :, i].double()
            half = len(rows) // 2
            v, q = rows[:, picture[b]].sum(1), rows[:, asked[b]].sum(1)
            looks, asks = v.argsort(descending=True)[:half], q.argsort(descending=True)[:half]
            seen = sum(v[h] for h in looks)  # 0 where a window has left the image behind
            r = sum((rows[h] * factor)[picture[b]].sum() for h in looks) / seen if seen > 0 else 1.0
            for h in range(len(rows)):
                row = rows[h].clone()
                if h in looks:
                    row = torch.where(picture[b], row * factor, row)
                if h in asks:
                    row = torch.where(asked[b], row * r, row)
                new[b, h, i] = row / row.sum()
    return new


def spin(s, p, mask, image, q_at, k_at, keep, factor):
    """The output of a head is linear in its pattern."""
    picture, new = known(image, k_at), p.clone()
    for b in range(len(p)):
        for i in (q_at >= image.shape[1] - 1).nonzero().flatten().tolist():
            seen = picture[b] & mask[b, 0, i]
            score = s[b, :, i][:, seen].sum(1)
            for h in score.argsort(descending=True)[keep:] if seen.any() else ():
                new[b, h, i] = p[b, h, i] * factor
    return new
