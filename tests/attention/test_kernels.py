import logging
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from attnctrl.attention import attend, available_kernels, merge, reasons, record_kernels, tiled
from attnctrl.attention import kernels as kernels_module
from attnctrl.attention.kernels import KERNELS, Call
from attnctrl.errors import AttnCtrlError

from .helpers import budget, qkv


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def reference(q, k, v, causal=False, bias=None, limits=None):
    """float64 attention and LSE with an explicit matrix."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    s = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias.double().reshape(*(bias.shape[:2] if bias.ndim > 1 else (1, 1)), 1, -1)
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:]).bool().tril(s.shape[-1] - s.shape[-2]), -math.inf)
    if limits is not None:
        s = s.masked_fill(torch.arange(s.shape[-1]) >= limits[:, None], -math.inf)
    return s.softmax(-1).nan_to_num(0.0) @ v, s.logsumexp(-1)


def assert_near(q, k, v, found, expected):
    """Values within the budget, LSE too, infinities in the same places."""
    limit = budget(q, k, v)
    (out, lse), (out_ref, lse_ref) = found, expected
    assert out.dtype == q.dtype
    assert (out.double() - out_ref).abs().max() <= limit
    if lse is not None:
        assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
        assert torch.equal(lse == -math.inf, lse_ref == -math.inf)
        difference = (lse.double() - lse_ref).nan_to_num(0.0)
        eps = torch.finfo(lse.dtype).eps
        assert difference.abs().max() <= limit + 4 * eps * lse_ref[lse_ref > -math.inf].abs().max()


@pytest.mark.parametrize("std", [1, 4, 16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ["sdpa", "cpu_flash", "math"])
def test_cpu_kernels(kernel, dtype, causal, std):
    for lengths in ((33, 33), (7, 50), (50, 7), (1, 19), (300, 300)):
        for kv_heads in (4, 2, 1):
            q, k, v = qkv(2, 4, *lengths, dim=20, kv_heads=kv_heads, dtype=dtype, std=std)
            if kernel == "sdpa" and causal and 1 < lengths[0] < lengths[1]:
                continue  # needs an LSE to merge; refused, see below
            found = attend(q, k, v, causal=causal, kernel=kernel, need_lse=kernel != "sdpa")
            assert_near(q, k, v, found, reference(q, k, v, causal))


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(40,), (1, 1, 40), (2, 1, 40), (1, 4, 40), (2, 4, 40)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_key_bias(kernel, causal, shape, kv_heads):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    bias[..., ::3] = -math.inf
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for n_q in (40, 13):
            q, k, v = qkv(2, 4, n_q, 40, kv_heads=kv_heads, dtype=dtype)
            found = attend(q, k, v, causal=causal, key_bias=bias, kernel=kernel)
            assert_near(q, k, v, found, reference(q, k, v, causal, bias))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
def test_a_row_without_keys_has_no_mass(kernel, causal):
    """aten's CPU kernel reports lse = 0 there, which would take mass from other groups."""
    q, k, v = qkv(1, 2, 9, dtype=torch.float32)
    bias = torch.full((9,), -math.inf)
    out, lse = attend(q, k, v, key_bias=bias, causal=causal, kernel=kernel)
    assert (out == 0).all() and (lse == -math.inf).all()
    bias[4] = 0.0
    out, lse = attend(q, k, v, key_bias=bias, causal=causal, kernel=kernel)
    assert (lse == -math.inf).any() == causal
    assert_near(q, k, v, (out, lse), reference(q, k, v, causal, bias))


@pytest.mark.parametrize("n_q, n_k", [(0, 5), (5, 0), (0, 0)])
def test_empty_sides_do_not_crash(n_q, n_k):
    """aten's CPU kernel ends the process with SIGFPE."""
    q, k, v = torch.randn(2, 4, n_q, 8), torch.randn(2, 2, n_k, 8), torch.randn(2, 2, n_k, 8)
    for causal in (False, True):
        out, lse = attend(q, k, v, causal=causal)
        assert out.shape == (2, 4, n_q, 8) and lse.shape == (2, 4, n_q)
        assert (out == 0).all() and (lse == -math.inf).all()


def test_strided_heads_are_not_garbage():
    """aten's CPU kernel assumes that the last dimension is dense."""
    q, k, v = (x.mT.contiguous().mT for x in qkv(1, 2, 17, dtype=torch.float32))
    assert q.stride(-1) != 1
    assert_near(q, k, v, attend(q, k, v), reference(q, k, v))


def test_limits():
    q, k, v = qkv(2, 4, 30, 20, kv_heads=2, dtype=torch.float32)
    limits = torch.randint(0, 21, (30,), generator=torch.Generator().manual_seed(0)).sort().values
    with record_kernels() as log:
        found = attend(q, k, v, limits=limits)
    assert log == {"math": 1}
    assert_near(q, k, v, found, reference(q, k, v, limits=limits))


def test_math_is_tiled(monkeypatch):
    q, k, v = qkv(2, 3, 50, 40)
    whole = attend(q, k, v, kernel="math")
    monkeypatch.setattr(tiled, "TILE", 2 * 3 * 40 * 7)
    for found, expected in zip(attend(q, k, v, kernel="math"), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_values_of_another_size():
    q, k, _ = qkv(1, 2, 12, dtype=torch.float32)
    v = torch.randn(1, 2, 12, 24)
    with record_kernels() as log:
        assert_near(q, k, v, attend(q, k, v), reference(q, k, v))
    assert log == {"math": 1}


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merge_of_key_groups_is_attention(parts, dtype):
    q, k, v = qkv(2, 2, 21, 30, dtype=dtype, std=4)
    index = torch.randperm(30, generator=torch.Generator().manual_seed(0)).chunk(parts)
    pairs = [attend(q, k[:, :, i], v[:, :, i]) for i in index]
    outs, lses = zip(*pairs, strict=True)
    assert_near(q, k, v, merge(outs, lses), reference(q, k, v))
    stacked = merge(torch.stack(outs), torch.stack(lses))
    assert torch.equal(stacked[0], merge(outs, lses)[0])


def test_merge_without_any_key():
    out, lse = merge(torch.randn(2, 1, 1, 3, 4), torch.full((2, 1, 1, 3), -math.inf))
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_q", [18, 7])
def test_gradients_flow_through_the_lse(causal, n_q):
    """Fused kernels drop them without a word, so they are refused."""
    inputs = [x.requires_grad_() for x in qkv(1, 4, n_q, 18, dim=8, kv_heads=2)]
    with record_kernels() as log:
        out, lse = attend(*inputs, causal=causal)
    assert set(log) == {"math"}
    found = torch.autograd.grad((out * lse.exp()[..., None]).sum(), inputs)
    out, lse = reference(*inputs, causal=causal)
    expected = torch.autograd.grad((out * lse.exp()[..., None]).sum(), inputs)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_tiles_are_differentiable(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 50)
    inputs = [x.requires_grad_() for x in qkv(1, 2, 11, 9, dim=4)]
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v, b: attend(q, k, v, key_bias=b), (*inputs, bias))


def test_a_named_kernel_runs_or_lists_every_reason():
    q, k, v = qkv(1, 2, 8, dtype=torch.float64)
    with pytest.raises(AttnCtrlError) as caught:
        attend(q, k, v, kernel="xformers", key_bias=torch.zeros(8))
    message = str(caught.value)
    for reason in (
        "runs on cuda, not cpu",
        "does not take float64",
        "takes no key bias",
        "HINT: these can: cpu_flash, math",
    ):
        assert reason in message
    with pytest.raises(AttnCtrlError, match="does not return the LSE"):
        attend(q, k, v, kernel="sdpa")
    with pytest.raises(AttnCtrlError, match="HINT: one of sdpa, cpu_flash"):
        attend(q, k, v, kernel="flashy")
    with pytest.raises(AttnCtrlError, match="no gradient through the LSE"):
        attend(q.requires_grad_(), k, v, kernel="cpu_flash")


def test_every_kernel_answers_every_call():
    for device in ("cpu", "cuda", "mps"):
        for dtype in DTYPES:
            call = Call(device, dtype, 1, 2, 8, 8, 16, 16)
            answers = reasons(call)
            assert list(answers) == list(KERNELS)
            assert answers["math"] == []
            if device != "cuda":
                assert answers["xformers"] and answers["flash"] and answers["efficient"]


def test_available_kernels():
    assert available_kernels() == ["cpu_flash", "math"]
    assert available_kernels(need_lse=False) == ["sdpa", "math"]


def test_broken_xformers_is_a_reason_not_an_error(monkeypatch, capfd):
    def broken(name):
        warnings.warn("built for another torch", stacklevel=1)
        logging.getLogger("xformers").warning("cannot load")
        raise OSError("undefined symbol")

    monkeypatch.setattr(kernels_module.importlib, "import_module", broken)
    kernels_module._fmha.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            why = reasons(Call("cuda", torch.float16, 1, 2, 8, 8, 16, 16))["xformers"]
        assert why == ["xformers cannot be imported: OSError: undefined symbol"]
        assert capfd.readouterr() == ("", "")
    finally:
        kernels_module._fmha.cache_clear()


def test_xformers_is_asked_operator_by_operator(capfd):
    why = reasons(Call("cuda", torch.float16, 1, 2, 8, 8, 16, 16))["xformers"]
    assert isinstance(why, list)
    assert "xformers" not in capfd.readouterr().err.lower().replace("test_xformers", "")


@pytest.mark.parametrize(
    "shapes", [((1, 2, 4, 8), (2, 2, 4, 8)), ((1, 3, 4, 8), (1, 2, 4, 8)), ((1, 2, 4, 8), (1, 2, 4, 6))]
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    q, k = (torch.randn(shape) for shape in shapes)
    with pytest.raises(AttnCtrlError, match="got q"):
        attend(q, k, k)


def test_key_bias_of_a_wrong_shape_is_refused():
    q, k, v = qkv(2, 4, 8)
    for shape in ((7,), (3, 1, 8), (1, 2, 8), (8, 8)):
        with pytest.raises(AttnCtrlError, match="key bias"):
            attend(q, k, v, key_bias=torch.zeros(shape))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kernel", ["xformers", "flash", "efficient", "math"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_kernels(kernel, dtype, causal):
    for n_q, n_k, kv_heads in ((64, 64, 4), (33, 33, 4), (17, 70, 2), (1, 40, 2)):
        q, k, v = (x.cuda() for x in qkv(2, 4, n_q, n_k, dim=64, kv_heads=kv_heads, dtype=dtype, std=4))
        call = Call("cuda", dtype, 2, 4, n_q, n_k, 64, 64, causal=causal)
        if why := KERNELS[kernel].reasons(call):
            pytest.skip(f"{kernel}: {'; '.join(why)}")
        out, lse = attend(q, k, v, causal=causal, kernel=kernel)
        cpu = [x.cpu() for x in (q, k, v)]
        assert_near(*cpu, (out.cpu(), lse.cpu()), reference(*cpu, causal))


@pytest.mark.gpu
@gpu
def test_cuda_key_bias():
    q, k, v = (x.cuda() for x in qkv(2, 4, 33, 41, dim=64, dtype=torch.float32))
    bias = torch.randn(2, 4, 41)
    bias[..., ::4] = -math.inf
    for need_lse in (True, False):
        out, lse = attend(q, k, v, key_bias=bias.cuda(), need_lse=need_lse)
        cpu = [x.cpu() for x in (q, k, v)]
        assert_near(*cpu, (out.cpu(), lse.cpu() if need_lse else None), reference(*cpu, bias=bias))


def test_the_plain_sdpa_call_is_torch():
    q, k, v = qkv(1, 2, 16, dtype=torch.float32)
    assert torch.equal(attend(q, k, v, need_lse=False)[0], F.scaled_dot_product_attention(q, k, v))
