"""Attention and fp8 products against slow oracles in float64 with explicit masks."""

import math

import pytest
import torch

import kernels
import kernels.attention
import kernels.fp8
from data.loader import row_documents
from kernels.attention import Keys, attention, document_ids, packed_keys
from kernels.fp8 import Fp8Products, quantize
from kernels.norm import rms_norm
from kernels.relu2 import relu_squared
from model import GPTConfig


def oracle(q_BTHD, k_BTHD, v_BTHD, scale, seen_BTT):
    """softmax over the keys that are seen, one product at a time."""
    scores = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD) * scale
    weights = scores.masked_fill(~seen_BTT[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v_BTHD)


def seen(doc_BT, window):
    """Token by token: same document, not later, at most window - 1 earlier."""
    B, T = doc_BT.shape
    mask = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for q in range(T):
            for k in range(max(0, q - window + 1), q + 1):
                mask[b, q, k] = doc_BT[b, q] == doc_BT[b, k]
    return mask


def qkv(B, T, H=2, D=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, D, dtype=torch.float64, generator=generator, requires_grad=True)
            for _ in range(3)]


def tokens(B, T, every, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(B, T, generator=generator) < 1 / every, 256, 7)


@pytest.mark.parametrize("T, window, every", [
    (96, 1, 20), (96, 2, 20), (96, 33, 200), (128, 32, 10), (128, 31, 1000), (128, 65, 30),
    (192, 16, 40), (192, 191, 40), (192, 192, 40), (192, 5000, 40), (97, 20, 9), (256, 100, 50),
])
def test_packed_attention_is_the_oracles(T, window, every):
    doc_BT = document_ids(tokens(2, T, every, seed=T + window), 256)
    q, k, v = qkv(2, T, seed=window)
    expected = oracle(q, k, v, 0.3, seen(doc_BT, window))
    got = attention(q, k, v, 0.3, packed_keys(doc_BT, window, torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    g = torch.randn_like(got)
    for ours, theirs in zip(torch.autograd.grad(got, (q, k, v), g, retain_graph=True),
                            torch.autograd.grad(expected, (q, k, v), g)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_short_windows_are_computed_in_chunks():
    """Otherwise a long row would cost the square of its length."""
    doc_BT = document_ids(tokens(1, 4096, 10_000), 256)
    mask = packed_keys(doc_BT, 64, torch.float32).mask_BnQK
    assert mask.numel() < 4096 * 64 * 4


def test_rows_without_keys_are_plainly_causal():
    q, k, v = qkv(3, 50)
    everything = torch.zeros(3, 50, dtype=torch.long)
    torch.testing.assert_close(attention(q, k, v, 0.5), oracle(q, k, v, 0.5, seen(everything, 50)),
                               rtol=1e-9, atol=1e-9)


def test_a_document_starts_at_its_bos():
    row = torch.tensor([[5, 256, 7, 7, 256, 256, 3]])
    assert document_ids(row, 256).tolist() == [[0, 1, 1, 1, 2, 3, 3]]


def test_bounds_for_varlen_attention(monkeypatch):
    """What a GPU is handed: where documents begin in all rows laid end to end; a row's first token
    begins one in any case. Windows count the query itself, flash attention does not."""
    monkeypatch.setattr(kernels.attention, "has_varlen", lambda device, dtype: True)
    rows = torch.full((2, 64), 7)
    rows[0, 10], rows[1, 0], rows[1, 63] = 256, 256, 256
    docs_B2 = row_documents(rows.numpy(), 256)
    assert docs_B2.tolist() == [[2, 54], [2, 63]]
    keys = packed_keys(document_ids(rows, 256), 33, torch.bfloat16, docs_B2)
    bounds = keys.cu_seqlens.tolist()
    assert bounds[:5] == [0, 10, 64, 127, 128] and set(bounds[4:]) == {128}
    assert keys.cu_seqlens.dtype == torch.int32
    assert keys.bounds.tolist() == [33, 63, 4] and keys.bounds.device.type == "cpu"


@pytest.mark.parametrize("every", [2, 5, 30, 1000])
def test_the_host_counts_documents_as_the_device_would(every, monkeypatch):
    """Without the host's numbers (sampling) the same bounds come from the tokens themselves."""
    monkeypatch.setattr(kernels.attention, "has_varlen", lambda device, dtype: True)
    monkeypatch.setattr(torch, "_assert_async", lambda condition: None)  # documents of 2 tokens
    rows = tokens(3, 50, every, seed=every)
    docs_B2 = row_documents(rows.numpy(), 256)
    for b, row in enumerate(rows.tolist()):  # a slow loop
        lengths = [1]
        for token in row[1:]:
            if token == 256:
                lengths.append(0)
            lengths[-1] += 1
        assert docs_B2[b].tolist() == [len(lengths), max(lengths)]
    doc_BT = document_ids(rows, 256)
    known, counted = (packed_keys(doc_BT, 7, torch.bfloat16, docs) for docs in (docs_B2, None))
    assert known.bounds.tolist() == counted.bounds.tolist()
    torch.testing.assert_close(known.cu_seqlens, counted.cu_seqlens)


def test_varlen_operator_is_called_with_documents_and_window(monkeypatch):
    """The operator around torch's varlen attention, with an oracle in place of the GPU kernel."""
    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window):
        calls.append((max_q, max_k, causal, window))
        starts = cu_q.tolist()
        doc = torch.zeros(1, len(q), dtype=torch.long)
        for start in starts[1:]:
            doc[:, start:] += 1
        out = oracle(q[None], k[None], v[None], scale, seen(doc, window[0] + 1))[0]
        return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    import torch.nn.attention.varlen  # the operator exists only after this import
    monkeypatch.setattr(kernels.attention, "has_varlen", lambda device, dtype: True)
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", kernel)
    rows = tokens(2, 64, 12)
    doc_BT = document_ids(rows, 256)
    q, k, v = (x.detach() for x in qkv(2, 64))
    got = attention(q, k, v, 0.3, packed_keys(doc_BT, 20, torch.bfloat16))
    torch.testing.assert_close(got, oracle(q, k, v, 0.3, seen(doc_BT, 20)))
    longest = row_documents(rows.numpy(), 256)[:, 1].max().item()
    assert calls == [(longest, longest, False, [19, 0])] and longest < 64


def test_varlen_operator_has_shapes_for_the_compiler_and_a_backward():
    """Its fake kernel and its autograd formula fit together (torch.library's own check)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(128, 2, 8, requires_grad=True) for _ in range(3))
        cu = torch.empty(5, dtype=torch.int32)
        bounds = torch.empty(3, dtype=torch.int64)
        out, lse, _ = kernels.attention.packed_attention(q, k, v, cu, bounds, 0.3)
        assert out.shape == q.shape and lse.shape == (2, 128)
        out.sum().backward()
        assert [x.grad.shape for x in (q, k, v)] == [q.shape] * 3


def relative(got, exact):
    return ((got.double().cpu() - exact).norm() / exact.norm()).item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_varlen_attention_on_a_gpu_is_the_oracles(compiled):
    """Both passes in bf16 against float64 on the host, windows in turns, in one graph."""
    gpu, graphs = torch.device("cuda"), []

    def body(q, k, v, keys):
        return attention(q, k, v, 0.12, keys)

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    if compiled:
        body = torch.compile(body, dynamic=False, backend=counting)
    for window, every in ((1, 30), (33, 30), (128, 100), (1000, 3000)):
        rows = tokens(2, 512, every, seed=window)
        q, k, v = (x.detach().bfloat16() for x in qkv(2, 512, H=6, D=128, seed=window))
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        expected = oracle(*exact, 0.12, seen(document_ids(rows, 256), window))
        grad = torch.randn_like(expected).bfloat16()
        expected_grads = torch.autograd.grad(expected, exact, grad.double())
        ours = [x.to(gpu).requires_grad_() for x in (q, k, v)]
        keys = packed_keys(document_ids(rows.to(gpu), 256), window, torch.bfloat16,
                           row_documents(rows.numpy(), 256))
        assert keys.cu_seqlens is not None
        got = body(*ours, keys)
        assert relative(got.detach(), expected.detach()) < 1e-2
        # With a window of one key the gradients of q and k are exactly 0: v's size is the measure.
        size = expected_grads[2].norm()
        for mine, theirs in zip(torch.autograd.grad(got, ours, grad.to(gpu)), expected_grads):
            error = (mine.double().cpu() - theirs).norm()
            assert error < 2e-2 * (theirs.norm() if window > 1 else size)
    assert len(graphs) == compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_on_a_gpu_is_the_oracles(packed):
    """Plainly causal in bf16, and with masks in fp32, as pocket scale has it on a GPU."""
    dtype, bound = (torch.float32, 1e-5) if packed else (torch.bfloat16, 1e-2)
    rows = tokens(2, 256, 60)
    doc_BT = document_ids(rows, 256)
    q, k, v = (x.detach().to(dtype) for x in qkv(2, 256, H=2, D=64))
    window = 40 if packed else 256
    keys = packed_keys(doc_BT.cuda(), window, dtype) if packed else None
    mask = seen(doc_BT if packed else torch.zeros_like(doc_BT), window)
    expected = oracle(q.double(), k.double(), v.double(), 0.12, mask)
    assert relative(attention(q.cuda(), k.cuda(), v.cuda(), 0.12, keys), expected) < bound


def test_keys_carry_tensors_only():
    """An int in here would make torch.compile build a graph for each window."""
    keys = packed_keys(torch.zeros(1, 64, dtype=torch.long), 9, torch.float32)
    assert all(x is None or isinstance(x, torch.Tensor) for x in keys) and isinstance(keys, Keys)


# --- fp8 ------------------------------------------------------------------------------------------

def fp8_products(x, w, g, factors, size=None):
    """(x w^T, g w, g^T x) by Fp8Products, `size` rows at a time."""
    products, n = Fp8Products(x, w, x.dtype, factors), size or len(x)
    y, dx, dw = torch.empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)
    for start in range(0, len(x), n):
        rows = slice(start, start + n)
        y[rows] = products.logits(rows)
        products.add_grads(rows, *quantize(g[rows], factors[2], torch.float8_e5m2), dx, dw)
    return y, dx, dw


@pytest.mark.parametrize("size", [None, 16])
def test_fp8_products_are_near_the_exact_ones(size):
    torch.manual_seed(0)
    x, w, g = torch.randn(64, 32), 0.05 * torch.randn(48, 32), 1e-4 * torch.randn(64, 48)
    got = fp8_products(x, w, g, (2.0, 32.0, 2.0 ** 19), size)
    for ours, exact, bits in zip(got, (x @ w.T, g @ w, g.T @ x), (3, 2, 2)):
        error = (ours - exact).norm() / exact.norm()
        assert 1e-3 < error < 2.0 ** -bits / 2, error  # rounded, and no worse than its mantissa


def test_fp8_never_overflows_to_nan():
    huge = torch.full((16, 16), 1e6)
    for result in fp8_products(huge, huge, huge, (2.0, 2.0, 1e9)):
        assert result.isfinite().all()


FORMS = {"eager": lambda function: function,
         "compiled": lambda function: torch.compile(function, backend="aot_eager", dynamic=False)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 1, 64), (1, 1)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_rms_norm_and_its_gradient_are_torchs(shape, size, form):
    """In fp64 to rounding, for rows of zeros and tiny ones too, where eps decides; in eager bf16
    y is kept in place of x, which rounds the gradient once more."""
    generator = torch.Generator().manual_seed(len(shape))
    x = size * torch.randn(shape, dtype=torch.float64, generator=generator)
    x[0] = 0
    grad = torch.randn(shape, dtype=torch.float64, generator=generator)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        mine, theirs = (x.detach().to(dtype).requires_grad_() for _ in range(2))
        y = FORMS[form](rms_norm)(mine)
        expected = torch.nn.functional.rms_norm(theirs, shape[-1:], eps=2.0**-23)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=bound, atol=bound)
        got, want = (torch.autograd.grad(out, at, grad.to(dtype))[0]
                     for out, at in ((y, mine), (expected, theirs)))
        assert (got - want).double().norm() <= bound * want.double().norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_hides_no_overflow(dtype, form):
    """Rows of zeros in place of what overflowed would train on, and the run would call it good."""
    x = torch.full((2, 8), 1e25, dtype=dtype)
    x[1] = 1.0
    y = FORMS[form](rms_norm)(x)
    assert y[0].isnan().all() and (y[1] == 1).all()


def test_peak_is_unknown_on_a_cpu():
    assert kernels.peak_flops(torch.device("cpu")) is None
    assert not kernels.attention.has_varlen(torch.device("cpu"), torch.bfloat16)


def test_flash_attention_takes_bf16_from_ampere_on(monkeypatch):
    """Pocket scale on a GPU is fp32, which flash attention does not know."""
    gpu = torch.device("cuda", 0)
    for capability, dtype, expected in (((8, 0), torch.bfloat16, True),
                                        ((9, 0), torch.float32, False),
                                        ((7, 5), torch.bfloat16, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert kernels.attention.has_varlen(gpu, dtype) == expected
    config = GPTConfig(packed=True, compute_dtype="fp32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "masks" in kernels.attention.describe_attention(gpu, config)
    assert "varlen" in kernels.attention.describe_attention(gpu, GPTConfig(packed=True))
    assert kernels.attention.describe_attention(gpu, GPTConfig()) == "SDPA, causal"


@pytest.mark.parametrize("capability, installed, expected", [
    ((9, 0), True, ["FA3"]), ((9, 0), False, []), ((8, 0), True, []), ((10, 0), True, [])])
def test_flash_attention_3_is_taken_on_hopper_where_it_is_installed(capability, installed, expected,
                                                                    monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(kernels.attention.importlib.util, "find_spec",
                        lambda name: object() if installed else None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", taken.append)
    kernels.attention.activate_flash_attention(torch.device("cuda", 0))
    kernels.attention.activate_flash_attention(torch.device("cpu"))
    assert taken == expected


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_flash_attention_3_that_does_not_load_leaves_2_and_says_so(error, monkeypatch, capsys):
    def activate(impl):
        raise error("undefined symbol: _ZN3c10\nin flash_attn_3_cuda.so")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(kernels.attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    kernels.attention.activate_flash_attention(torch.device("cuda", 0))
    (said,) = capsys.readouterr().err.splitlines()
    assert "flash attention 2 stays" in said and f"{error.__name__}: undefined symbol" in said


def test_fp8_is_refused_where_it_is_emulated_with_the_option_that_replaces_it():
    with pytest.raises(ValueError, match=r"a CPU does not multiply fp8.*--head bf16"):
        kernels.fp8.check_fp8(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_squared_is_its_plain_reference_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(64, 48, generator=generator).to(dtype) for _ in range(2))
    x[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, -1.0])
    fast, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = relu_squared(fast), torch.relu(plain).square()
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(y, expected) and torch.equal(fast.grad, plain.grad)
