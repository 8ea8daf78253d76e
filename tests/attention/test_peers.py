"""Keys of other batch rows, and segments for some rows."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attnctrl.attention import (
    KeyGroup,
    Lerp,
    Peers,
    Plan,
    Segment,
    Watch,
    dense,
    record_kernels,
    run,
    run_rows,
    with_mask,
)
from attnctrl.attention.watch import Measure
from attnctrl.errors import AttnCtrlError

from .helpers import budget, qkv, random_lerp, random_mask, random_segments, random_tokens


EVERY = (KeyGroup(slice(0, None)),)


def random_peers(n: int, batch: int, rng: random.Random) -> Peers:
    several = rng.random() < 0.5
    return Peers(
        tuple(random_tokens(n, rng) for _ in range(batch)) if several else random_tokens(n, rng),
        rng.choice(("batch", "first")),
        rng.choice((0.0, 0.0, -0.7, 1.5, torch.randn(rng.randint(1, batch), n))),
        rng.choice((None, None, slice(2, n))),
        rng.choice((0.0, 0.0, 0.5)),
        rng.randrange(1000),
    )


def random_shared_plan(n: int, rng: random.Random, batch: int, heads: int) -> Plan:
    """Segments of which some borrow keys and some are for one row alone, under lerps and a head scale."""
    peers = random_peers(n, batch, rng)

    def lending(segments, share=1.0):
        return tuple(
            replace(s, peers=peers if rng.random() < 0.6 else None, weight=share, rows=rows) for s in segments
        )

    segments = []
    alone = rng.randrange(batch) if rng.random() < 0.4 else None
    for rows in [None] if alone is None else [(alone,), tuple(row for row in range(batch) if row != alone)]:
        drawn = random_segments(n, n, rng, batch=batch, heads=heads, keep=0)
        if rng.random() < 0.4:
            other = random_segments(n, n, rng, batch=batch, heads=heads, keep=0)
            segments += [*lending(drawn, 0.3), *lending(other, 0.7)]
        else:
            segments += lending(drawn)
    lerps = tuple(random_lerp(n, rng, batch, heads) for _ in range(rng.randint(0, 2)))
    scale = torch.rand(batch, heads) + 0.5 if rng.random() < 0.3 else None
    return Plan(tuple(segments), lerps, scale)


@pytest.mark.parametrize("seed", range(80))
def test_random_plans(seed):
    rng = random.Random(seed)
    n, heads, batch = rng.choice((5, 16, 29)), 4, rng.choice((2, 3, 4))
    plan = random_shared_plan(n, rng, batch, heads)
    dtype = rng.choice((torch.float64, torch.float32))
    if any(lerp.target == "argmax" for lerp in plan.lerps):
        dtype = torch.float64
    q, k, v = qkv(batch + 1, heads, n, dtype=dtype, kv_heads=rng.choice((4, 2, 1)), std=4, seed=seed)
    if rng.random() < 0.5:
        q, k, v = (x[:batch] for x in (q, k, v))
    else:
        plan = plan.on(*sorted(rng.sample(range(batch + 1), batch)))
    plan.check(n, n, heads, len(q))
    if plan.rows is None and rng.random() < 0.5:
        plan = with_mask(plan, random_mask(n, rng, batch, heads), n, n)
    found, expected = run(q, k, v, plan), dense(q, k, v, plan)
    error = float((found.double() - expected).abs().max())
    assert error <= budget(q, k.repeat(1, 1, batch, 1), v), f"{error:.3g} for {plan.describe()}"


def by_hand(q, k, v, lent, sources, bias=0.0, own=None):
    """Row by row: softmax over own keys and those lent by other rows."""
    outs = []
    for row in range(len(q)):
        mine = own if own is not None and sources[row] else torch.arange(k.shape[2])
        keys = [k[row][:, mine], *(k[a][:, lent[a]] for a in sources[row])]
        values = [v[row][:, mine], *(v[a][:, lent[a]] for a in sources[row])]
        added = torch.cat([torch.zeros(len(mine)), *(torch.full((len(lent[a]),), bias) for a in sources[row])])
        s = q[row] @ torch.cat(keys, 1).transpose(-1, -2) / q.shape[-1] ** 0.5 + added
        outs.append(s.softmax(-1) @ torch.cat(values, 1))
    return torch.stack(outs)


@pytest.mark.parametrize("reference, sources", [("batch", [(1, 2), (0, 2), (0, 1)]), ("first", [(), (0,), (0,)])])
@pytest.mark.parametrize("instead", [None, slice(3, 10)])
def test_by_hand(reference, sources, instead):
    q, k, v = qkv(3, 2, 12)
    lent = [torch.tensor([1, 4]), torch.arange(3, 9), torch.tensor([0, 11])]
    plan = Plan((Segment(slice(0, None), EVERY, peers=Peers(tuple(lent), reference, -0.5, instead)),))
    plan.check(12, 12, 2, 3)
    own = None if instead is None else torch.tensor([0, 1, 2, 10, 11])
    expected = by_hand(q, k, v, lent, sources, -0.5, own)
    torch.testing.assert_close(run(q, k, v, plan), expected)
    torch.testing.assert_close(dense(q, k, v, plan), expected)


@pytest.mark.parametrize("instead", [None, slice(0, 12)])
@pytest.mark.parametrize("reference", ["batch", "first"])
def test_copies_of_a_row_change_nothing(reference, instead):
    q, k, v = (x.expand(3, -1, -1, -1) for x in qkv(1, 2, 12))
    plan = Plan((Segment(slice(0, None), EVERY, peers=Peers(slice(0, 12), reference, instead=instead)),))
    torch.testing.assert_close(run(q, k, v, plan), F.scaled_dot_product_attention(q, k, v))


def test_halves_of_a_batch_do_not_mix_and_the_reference_stays():
    q, k, v = qkv(6, 2, 12, dtype=torch.float32)
    plan = Plan((Segment(slice(0, None), EVERY, peers=Peers(slice(2, 9), "first")),))
    plans = [plan.on(0, 1, 2), plan.on(3, 4, 5)]
    before = run_rows(q, k, v, plans)
    own = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(before[[0, 3]], own[[0, 3]])
    assert not torch.allclose(before[[1, 2, 4, 5]], own[[1, 2, 4, 5]], atol=1e-3)
    k[:3], v[:3] = 100.0, -100.0
    assert torch.equal(run_rows(q, k, v, plans)[3:], before[3:])


def test_dropout_is_drawn_once_from_its_seed():
    full, peers = Peers(slice(0, 4000)), Peers(slice(0, 4000), dropout=0.3, seed=5)
    assert peers.lent(1, 4000) == Peers(slice(0, 4000), dropout=0.3, seed=5).lent(1, 4000)
    assert len({peers.lent(0, 4000), peers.lent(1, 4000), replace(peers, seed=6).lent(1, 4000)}) == 3
    assert full.lent(1, 4000) == ((0, 4000),)
    assert sum(b - a for a, b in peers.lent(1, 4000)) / 4000 == pytest.approx(0.7, abs=0.04)


def test_rows_with_the_same_lender_share_a_call_and_no_mask_exists():
    q, k, v = qkv(5, 2, 12, dtype=torch.float32)
    plan = Plan((Segment(slice(0, None), EVERY, peers=Peers(slice(0, 12), "first")),))
    with record_kernels() as log:
        run(q, k, v, plan)
    assert log == {"sdpa": 2}
    run(q, k, v, plan)
    assert len([key for key in plan.programs if key[0] == "rows"]) == 1


def test_gradients_are_those_of_dense_attention():
    tensors = [x.requires_grad_() for x in qkv(2, 2, 6)]
    plan = Plan(
        (Segment(slice(0, None), EVERY, peers=Peers(slice(1, 5))),), (Lerp("identity", torch.tensor([0.5, 0.0])),)
    )
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, plan), tensors)


def test_mistakes_are_named():
    segment = Segment(slice(0, None), EVERY, peers=Peers(slice(0, 4)))
    for plan, batch, message in (
        (Plan((segment,)), 1, "no other rows"),
        (Plan((segment,), rows=(1,)), 2, "no other rows"),
        (Plan((replace(segment, peers=Peers((slice(0, 4),) * 2)),)), 3, "2 rows for a batch of 3"),
        (Plan((replace(segment, peers=Peers(slice(0, 40))),)), 2, "reach outside 0..11"),
        (Plan((replace(segment, rows=(0, 2)),)), 2, "rows 0..2 of a batch of 2"),
        (Plan((replace(segment, rows=(0,)),)), 2, "12 of 12 query tokens are in no segment"),
    ):
        with pytest.raises(AttnCtrlError, match=message):
            plan.check(12, 12, 2, batch)
    q, k, v = qkv(2, 2, 12)
    with pytest.raises(AttnCtrlError, match="causal"):
        run(q, k, v, Plan((segment,)), causal=True)
    with pytest.raises(AttnCtrlError, match="neither 'batch' nor 'first'.*not between 0 and 1"):
        Peers(slice(0, 2), "last", dropout=2)
    with pytest.raises(AttnCtrlError, match=r"bias \(3,\) is not \(rows, keys\)"):
        Peers(slice(0, 2), bias=torch.zeros(3))


# --- watches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_watch_sees_probabilities_and_changes_nothing(kv_heads, masked):
    q, k, v = qkv(3, 4, 14, 20, kv_heads=kv_heads, std=4)
    seen = []
    sets = (slice(3, 5), torch.tensor([4, 9, 17]), slice(0, 20))
    plan = Plan(lerps=(Watch(slice(2, 12), sets, seen.append),), rows=(0, 2))
    plan.check(14, 20, 4, 3)
    mask = random_mask(20, random.Random(1), 3, 4) if masked else None
    out = run(q, k, v, plan, mask=mask, scale=0.4)
    grouped = {"enable_gqa": kv_heads != 4, "attn_mask": mask, "scale": 0.4}
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, **grouped))
    s = 0.4 * q @ k.repeat_interleave(4 // kv_heads, 1).transpose(-1, -2)
    if masked:
        s = (
            s.masked_fill(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else s + mask.masked_fill(mask < -5e3, -torch.inf)
        )
    pattern = s.softmax(-1)[[0, 2]].mean(1)[:, 2:12]
    (mass,) = seen
    torch.testing.assert_close(mass, torch.stack([pattern[..., tokens].sum(-1) for tokens in sets], -1))


def test_a_watch_sees_plain_attention_beside_segments_and_lerps():
    q, k, v = qkv(2, 2, 10)
    seen, alone = [], []
    lerps = (Lerp("identity", torch.ones(2)), Watch(slice(0, 10), (slice(0, 3),), seen.append))
    run(q, k, v, Plan((Segment(slice(0, 10), (KeyGroup(slice(5, 10)),), peers=Peers(slice(0, 2))),), lerps))
    run(q, k, v, Plan(lerps=(Watch(slice(0, 10), (slice(0, 3),), alone.append),)))
    assert len(seen) == len(alone) == 1 and torch.equal(seen[0], alone[0])
    with pytest.raises(AttnCtrlError, match="watch: keys"):
        Plan(lerps=(Watch(slice(0, 10), (slice(0, 30),), seen.append),)).check(10, 10)


@pytest.mark.parametrize("few", [64, 2], ids=["columns", "LSEs"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_measure_and_its_gradient_are_those_of_dense_attention(kv_heads, masked, few, monkeypatch):
    monkeypatch.setattr("attnctrl.attention.watch.MANY", few)
    tensors = [x.requires_grad_() for x in qkv(2, 4, 14, 20, kv_heads=kv_heads, std=2)]
    q, k, v = tensors
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool) if masked else None
    if masked:
        mask[1, ..., 14:] = False
    sets, among, seen = (torch.tensor([4, 9, 17]), slice(3, 12), slice(5, 6)), slice(3, 18), []
    measure = Measure(slice(2, 12), sets, seen.append, among)
    run(q, k, v, Plan(lerps=(measure,)), mask=mask)
    s = q[:, :, 2:12] @ k.repeat_interleave(4 // kv_heads, 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    pattern = (s if mask is None else s.masked_fill(~mask, -torch.inf))[..., among].softmax(-1).mean(1)
    expected = torch.stack([pattern[..., at].sum(-1) for at in (sets[0] - 3, slice(0, 9), slice(2, 3))], -1)
    torch.testing.assert_close(seen[0], expected)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad((slope * expected).sum(), (q, k))
    torch.testing.assert_close(torch.autograd.grad((slope * seen[0]).sum(), (q, k)), wanted)
    run(q, k.detach(), v.detach(), Plan(lerps=(measure,)), mask=mask)
    (of_q,) = torch.autograd.grad((slope * seen[1]).sum(), q)
    torch.testing.assert_close(of_q, wanted[0])
    with torch.no_grad():
        run(q, k, v, Plan(lerps=(measure,)), mask=mask)
    assert torch.equal(seen[2], seen[0]) and not seen[2].requires_grad


def test_segments_of_single_rows():
    q, k, v = qkv(3, 2, 10)
    cut = Segment(slice(0, 10), (KeyGroup(slice(0, 4)),), rows=(1,))
    plan = Plan((cut, Segment(slice(0, 10), EVERY, rows=(0, 2))))
    plan.check(10, 10, 2, 3)
    expected = F.scaled_dot_product_attention(q, k, v)
    expected[1] = F.scaled_dot_product_attention(q[1], k[1, :, :4], v[1, :, :4])
    torch.testing.assert_close(run(q, k, v, plan), expected)
