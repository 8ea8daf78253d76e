import random

import pytest
import torch

from attnctrl.attention import as_tokens, signatures, union
from attnctrl.attention.groups import join, minus, overlap, positions, put, spans, staircase, take, tokens_of
from attnctrl.errors import AttnCtrlError

from .helpers import random_tokens


def members(tokens, n):
    return set(torch.arange(n)[tokens].tolist())


@pytest.mark.parametrize(
    "index, expected",
    [
        ([3, 4, 5], slice(3, 6)),
        (range(2, 4), slice(2, 4)),
        ([], slice(0, 0)),
        (torch.tensor([5, 3, 4, 4]), slice(3, 6)),
        (torch.tensor([False, True, True]), slice(1, 3)),
        (slice(7, None), slice(7, None)),
    ],
)
def test_a_run_becomes_a_slice(index, expected):
    assert as_tokens(index) == expected


def test_scattered_tokens_are_sorted_int64():
    tokens = as_tokens([9, 1, 4, 1])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [1, 4, 9]


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2), torch.rand(3), slice(0, 9, 2)])
def test_what_is_no_token_set_is_refused(wrong):
    with pytest.raises(AttnCtrlError):
        as_tokens(wrong)


@pytest.mark.parametrize("seed", range(40))
def test_set_algebra_equals_python_sets(seed):
    rng = random.Random(seed)
    n = rng.choice((5, 17, 40))
    a, b = random_tokens(n, rng), random_tokens(n, rng)
    left, right = spans(a, n), spans(b, n)
    for name, found, expected in (
        ("join", join(left, right), members(a, n) | members(b, n)),
        ("overlap", overlap(left, right), members(a, n) & members(b, n)),
        ("minus", minus(left, right), members(a, n) - members(b, n)),
    ):
        assert members(tokens_of(found), n) == expected, name
        assert all(x[1] < y[0] for x, y in zip(found, found[1:], strict=False)), f"{name} leaves touching runs"
    both = overlap(left, right)
    where = torch.arange(n)[a][tokens_of(positions(both, left))]
    assert set(where.tolist()) == members(tokens_of(both), n)


def test_union_merges_touching_groups():
    assert union(slice(0, 4), slice(4, 9), torch.tensor([9, 10])) == slice(0, 11)
    assert union(slice(0, 2), slice(5, 6)).tolist() == [0, 1, 5]
    assert union(slice(2, None), slice(0, 2), n=8) == slice(0, 8)
    with pytest.raises(AttnCtrlError, match="HINT: pass n="):
        union(slice(2, None), slice(0, 2))


@pytest.mark.parametrize("seed", range(10))
def test_signatures_partition_the_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(3, 50, generator=generator) < 0.4
    found = signatures(masks)
    seen = torch.zeros(50, dtype=torch.int64)
    for signature, tokens in found:
        seen[tokens] += 1
        expected = torch.tensor([[r in signature] for r in range(3)])
        assert torch.equal(masks[:, tokens], expected.expand(-1, len(seen[tokens])))
    assert (seen == 1).all()
    assert len({signature for signature, _ in found}) == len(found)


def test_signatures_of_no_region_are_the_background():
    assert signatures(torch.zeros(0, 6, dtype=torch.bool)) == [((), slice(0, 6))]
    assert signatures(torch.zeros(2, 6, dtype=torch.bool)) == [((), slice(0, 6))]


@pytest.mark.parametrize("seed", range(60))
def test_staircase_equals_counting(seed):
    """Every row sees as many of the keys as there are at or before its position."""
    rng = random.Random(seed)
    n_q, n_k = rng.choice(((12, 12), (7, 20), (20, 7), (1, 9)))
    rows, keys = random_tokens(n_q, rng), random_tokens(n_k, rng)
    index, visible = torch.arange(n_q)[rows], torch.arange(n_k)[keys]
    expected = [(visible <= int(i) + n_k - n_q).sum().item() for i in index]
    found = []
    for start, stop, count, causal in staircase(spans(rows, n_q), spans(keys, n_k), n_k - n_q):
        assert start == len(found)
        found += [count - (stop - 1 - row) if causal else count for row in range(start, stop)]
    assert found == expected


def test_staircase_of_runs_has_few_pieces():
    assert len(staircase(((0, 100),), ((0, 100),), 0)) == 1
    assert len(staircase(((0, 100),), ((20, 40),), 0)) == 3
    scattered = tuple((i, i + 1) for i in range(0, 100, 3))
    assert len(staircase(scattered, scattered, 0)) == 1, "the same tokens on both sides are a plain triangle"


@pytest.mark.parametrize("tokens", [slice(1, 4), torch.tensor([0, 2, 5])])
def test_take_and_put(tokens):
    x = torch.arange(2 * 3 * 6 * 1.0).reshape(2, 3, 6, 1)
    assert torch.equal(take(x, tokens), x[:, :, tokens])
    out = put(torch.zeros_like(x), tokens, take(x, tokens))
    assert torch.equal(out[:, :, tokens], x[:, :, tokens])
    assert (out != 0).sum() <= 2 * 3 * 3
