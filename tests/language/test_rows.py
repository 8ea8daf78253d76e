"""Edits of rows against the formula, in tiles of a few scores."""

import math

import pytest
import torch

from attnctrl.attention import rows, tiled
from attnctrl.attention.row_engine import Mask, edit_rows
from attnctrl.attention.rows import Bias, Columns, Gain, Recycle, RowEdit, Tally


B, H, KV, N, D = 2, 4, 2, 9, 8


def inputs(n_q=N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(B, H, n_q, D, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(B, KV, N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def masks(n_q):
    causal = torch.ones(n_q, N, dtype=torch.bool).tril(N - n_q).expand(B, 1, -1, -1)
    padded = causal & (torch.arange(N) >= torch.tensor([0, 2])[:, None])[:, None, None]
    prefix = causal | (torch.arange(N) < 8)
    slope = torch.linspace(-1, 1, N).double().expand(B, 1, n_q, N).masked_fill(~padded, -math.inf)
    minimum = torch.zeros(B, 1, n_q, N).masked_fill(~padded, torch.finfo(torch.float32).min)
    return {
        "none": (None, causal.double().log()),
        "padded": (padded, padded.double().log()),
        "two-dimensional": (padded[:, 0, -1].long(), padded.double().log()),
        "prefix": (prefix, prefix.double().log()),
        "minimum": (minimum, padded.double().log()),
        "added": (slope, slope),
    }


def formula(q, k, v, added, edits, softcap=None):
    """Row by row, head by head."""
    out = torch.zeros(B, H, q.shape[2], D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(q.shape[2]):
                s = k[b, h // 2].double() @ q[b, h, i].double() / math.sqrt(D)
                s = s if softcap is None else softcap * torch.tanh(s / softcap)
                mine = [e for e in edits if (e.heads is None or h in e.heads) and (e.start is None or i >= e.start[b])]
                for edit in mine:
                    if isinstance(edit.what, Gain):
                        factor = edit.what.factor.expand(B, H, N)[b, h]
                        s = s + factor * (s.abs() if edit.what.absolute else s)
                for edit in mine:
                    if isinstance(edit.what, Bias):
                        s = s + edit.what.bias.expand(B, H, N)[b, h]
                p = torch.softmax(s + added[b, 0, i], -1).nan_to_num(0.0)
                for edit in mine:
                    if isinstance(edit.what, Recycle):
                        r = edit.what
                        sink, picture = r.sinks[b], r.image[b]
                        free = picture & ~sink
                        seen = bool((sink & picture).any())
                        if (
                            seen
                            and p[picture].sum() >= r.min_image_mass
                            and p[free].sum() >= r.min_non_sink * p[picture].sum()
                        ):
                            moved = r.share * p[sink].sum()
                            p = torch.where(
                                sink, p * (1 - r.share), torch.where(free, p + moved * p / p[free].sum(), p)
                            )
                out[b, h, i] = p @ v[b, h // 2].double()
    return out


def edits(n_q):
    generator = torch.Generator().manual_seed(6)
    image = torch.zeros(B, N, dtype=torch.bool)
    image[0, 2:6] = image[1, 3:7] = True
    sinks = torch.zeros_like(image)
    sinks[0, [0, 3]] = sinks[1, [2, 4]] = True
    last = n_q - 1
    return [
        RowEdit(Recycle(sinks, image, 0.6, 0.5, 0.2, Tally()), (last // 2, last)),
        RowEdit(Bias(torch.randn(B, 1, N, generator=generator).double()), None, (0, 3)),
        RowEdit(Bias(torch.randn(1, H, N, generator=generator).double())),
        RowEdit(Gain(0.3 * image[:, None].double(), absolute=True), (last, last)),
        RowEdit(Gain(torch.randn(B, H, N, generator=generator).double()), (last // 2, n_q), (1, 2)),
    ]


@pytest.mark.parametrize("n_q", [N, 4, 1])
@pytest.mark.parametrize("kind", masks(N))
def test_equals_the_formula(kind, n_q, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 2 * B * H * N)
    q, k, v = inputs(n_q)
    mask, added = masks(n_q)[kind]
    read = Mask.read(mask, n_q, N, causal=True)
    assert (read.pairs is not None) == (kind in ("prefix", "added") and n_q > 1)
    every = edits(n_q)
    for chosen in (every, every[:1], every[1:2], every[1:3], every[3:], every[2:4]):
        found = edit_rows(q, k, v, chosen, lambda: formula(q, k, v, added, []), mask=read)
        torch.testing.assert_close(found, formula(q, k, v, added, chosen), rtol=0, atol=1e-9)
    capped = edit_rows(q, k, v, every, lambda: formula(q, k, v, added, [], 0.5), mask=read, softcap=0.5)
    torch.testing.assert_close(capped, formula(q, k, v, added, every, 0.5), rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [4, 3 * B * H * N])
@pytest.mark.parametrize("n_q", [N, 1])
def test_half_precision_in_pieces(n_q, chunk, monkeypatch):
    """Keys and values are widened a few at a time where there is one tile, and rows are cut off where the order of tokens hides keys."""
    monkeypatch.setattr(rows, "CHUNK", chunk)
    q, k, v = inputs(n_q, torch.bfloat16)
    mask, added = masks(n_q)["none"]
    read = Mask.read(mask, n_q, N, causal=True)
    for chosen in (edits(n_q), [RowEdit(edits(n_q)[0].what)]):
        plain = formula(q, k, v, added, [])
        found = edit_rows(q, k, v, chosen, plain.clone, mask=read)
        torch.testing.assert_close(found.double(), formula(q, k, v, added, chosen), rtol=2**-7, atol=2**-7)


def test_gradients_do_not_write_into_the_models_own():
    q, k, v = (x.requires_grad_() for x in inputs())
    chosen = [RowEdit(Gain(torch.full((1, 1, N), 0.3).double()), (4, 6))]
    added = masks(N)["none"][1]

    def plain():
        s = torch.stack([q[:, h] @ k[:, h // 2].mT for h in range(H)], 1) / math.sqrt(D) + added[:, None, 0]
        return torch.softmax(s, -1) @ v.repeat_interleave(2, 1)

    own = plain()
    found = edit_rows(q, k, v, chosen, lambda: own, mask=Mask(True))
    torch.testing.assert_close(found.detach(), formula(*(x.detach() for x in (q, k, v)), added, chosen))
    assert torch.equal(own, plain()) and not torch.equal(found, own)
    found.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_looking_needs_no_values():
    q, k, v = inputs()
    columns = Columns()
    own = torch.randn(B, H, N, D).double()
    assert edit_rows(q, k, v.fill_(math.nan), [RowEdit(columns)], lambda: own, mask=Mask(True)) is own
    torch.testing.assert_close(columns.total.sum(1), torch.full((B,), float(H * N)).double())


def test_probability_stays_and_columns_count_it():
    q, k, _ = inputs()
    one = torch.ones(B, KV, N, 1, dtype=torch.float64)
    columns = Columns()
    chosen = [*edits(N)[:1], RowEdit(columns)]
    found = edit_rows(q, k, one, chosen, lambda: one.new_ones(B, H, N, 1), mask=Mask(True))
    torch.testing.assert_close(found, torch.ones_like(found))
    torch.testing.assert_close(columns.total.sum(1), torch.full((B,), float(H * N), dtype=torch.float64))
    assert 0 < chosen[0].what.tally["edited"] <= chosen[0].what.tally["rows"]


def test_rows_before_the_first_edit_are_the_models_own():
    q, k, v = inputs(dtype=torch.bfloat16)
    own = torch.randn(B, H, N, D).bfloat16()
    edit = RowEdit(Gain(torch.ones(1, 1, N)), (6, 8), (1, 2))
    found = edit_rows(q, k, v, [edit], own.clone, mask=Mask(True))
    changed = (found != own).any(-1)
    wanted = torch.zeros(B, H, N, dtype=torch.bool)
    wanted[0, 1:3, 6:] = wanted[1, 1:3, 8:] = True
    assert torch.equal(changed, wanted)
