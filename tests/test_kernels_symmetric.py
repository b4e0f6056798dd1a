"""X X^T and b A + c A A by half their tiles, against float64; in Triton's interpreter or on a GPU.

Tolerances: an entry is rounded once to its dtype, and its fp32 sum of n products errs by at most
n 2^-24 of the sum of their absolute values, four times that in tensor cores, which truncate.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from kernels_compile import compile_for_gpu

import muon
from kernels.symmetric import INTERPRET, gram, polynomial

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rounding to nearest errs by half a step; the interpreter cuts bf16 off, which errs by a whole one.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11,
        torch.bfloat16: 2.0**-7 if INTERPRET else 2.0**-8}
# One tile, edges on every side, several tiles, one row, the pocket's square and its MLP.
SHAPES = [(2, 32, 32), (3, 70, 45), (1, 129, 64), (2, 1, 5), (2, 64, 64), (1, 64, 256)]


@pytest.fixture(autouse=True)
def plain_fp32(monkeypatch):
    """A CPU with bf16 units would round torch's own fp32 products, not those compared with them."""
    monkeypatch.setattr(muon, "bf16_units", lambda: False)


def random(*size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(DEVICE, dtype)


def symmetric_random(K, m, dtype):
    A = random(K, m, m, dtype=dtype)
    return A.tril() + A.tril(-1).mT


def assert_near(got, exact, terms, absolute):
    """`absolute`: the sums of absolute values behind the entries, of `terms` products each."""
    tiny = torch.finfo(got.dtype).smallest_normal * UNIT[got.dtype]
    allowed = UNIT[got.dtype] * exact.abs() + terms * 2.0**-22 * absolute + tiny
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, m, n", SHAPES)
def test_gram_is_the_exact_one_rounded_and_symmetric(K, m, n, dtype):
    X = random(K, m, n, dtype=dtype)
    got, wide = gram(X), X.double()
    assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, (K, m, m), True)
    assert torch.equal(got, got.mT)
    assert_near(got, wide @ wide.mT, n, wide.abs() @ wide.abs().mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, m", sorted({(K, m) for K, m, n in SHAPES}))
def test_polynomial_is_the_exact_one_rounded_and_symmetric(K, m, dtype):
    A = symmetric_random(K, m, dtype)
    got, wide = polynomial(A, -4.775, 2.0315), A.double()
    assert torch.equal(got, got.mT)
    assert_near(got, -4.775 * wide + 2.0315 * wide @ wide, m + 2,
                4.775 * wide.abs() + 2.0315 * wide.abs() @ wide.abs())


def test_the_result_is_symmetric_where_the_argument_is_not_quite():
    """Rounding leaves Z R Z of Gram Newton-Schulz so; and on a GPU nothing promises that a tile on
    the diagonal comes out symmetric by itself."""
    A = symmetric_random(2, 70, torch.float32)
    A += 1e-6 * random(2, 70, 70, seed=1)
    got = polynomial(A, 3.0, 0.5)
    assert torch.equal(got, got.mT) and not torch.equal(A, A.mT)
    torch.testing.assert_close(got, 3 * A + 0.5 * A @ A, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("view", [
    lambda X: X.mT.contiguous().mT, lambda X: X[:, ::2, 1::3], lambda X: X[1:2].expand(3, -1, -1),
], ids=["transposed", "sliced", "expanded"])
def test_strides_do_not_matter(view):
    X = view(random(2, 66, 99))
    A = gram(X)
    assert torch.equal(A, gram(X.contiguous())) and A.is_contiguous()
    strided = A.mT.repeat(1, 2, 2)[:, :A.shape[1], :A.shape[1]]
    assert torch.equal(polynomial(strided, 0.5, 2.0), polynomial(A, 0.5, 2.0))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_matrices_of_a_batch_do_not_touch_each_other(bad):
    """Each is the same bits as by itself, and what is not finite stays in its own."""
    X = random(3, 45, 40)
    X[1, 44, 39] = bad
    A = gram(X)
    for k in range(3):
        torch.testing.assert_close(A[k], gram(X[k:k + 1])[0], rtol=0, atol=0, equal_nan=True)
    assert A[::2].isfinite().all() and not A[1, 44].isfinite().any()
    assert A[1, :44, :44].isfinite().all()
    B = polynomial(A, 1.0, 1.0)
    assert B[::2].isfinite().all() and not B[1].isfinite().any()


def test_nothing_in_nothing_out():
    assert gram(random(0, 4, 5)).shape == (0, 4, 4)
    assert polynomial(random(2, 0, 0), 1.0, 1.0).shape == (2, 0, 0)


def test_fp64_is_refused():
    with pytest.raises(ValueError, match=r"expected bf16, fp16 or fp32, got torch\.float64"):
        gram(random(1, 2, 2).double())


@pytest.mark.parametrize("mode, near", [("accurate", 2e-5), ("fast", 0.1)])
@pytest.mark.parametrize("shape", [(2, 64, 64), (40, 100), (2, 150, 33)])
def test_orthogonalize_is_the_plain_one_with_them(shape, mode, near):
    """fp32 (fp16 on a GPU) or bf16, by both ways through the iteration. In bf16 any other order of
    rounding moves small singular values: both are as far from U V^T."""
    G = random(*shape)
    near = 5e-3 if DEVICE == "cuda" and mode == "accurate" else near
    calls = []

    def counted(product):
        return lambda *arguments: calls.append(product) or product(*arguments)

    got = muon.orthogonalize(G, mode=mode, products=(counted(gram), counted(polynomial)))
    plain = muon.orthogonalize(G, mode=mode)
    assert set(calls) == {gram, polynomial}
    assert (got - plain).norm() < near * plain.norm()


def test_muon_takes_them():
    weights = [torch.nn.Parameter(random(48, 40, seed=seed)) for seed in (0, 0, 1, 1)]
    for p, products in zip(weights, (None, (gram, polynomial)) * 2):
        optimizer = muon.Muon([p], lr=0.1, products=products)
        for step in range(2):
            (p * random(48, 40, seed=9 + step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for plain, ours in (weights[:2], weights[2:]):
        torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6 if DEVICE == "cpu" else 1e-3)
        assert not torch.equal(plain, random(48, 40))


def test_operators_are_sound():
    """torch.library's own checks: schema, fake kernels, tracing with dynamic shapes."""
    torch.library.opcheck(gram, (random(2, 33, 20),))
    torch.library.opcheck(polynomial, (symmetric_random(2, 33, torch.float32), 0.5, 2.0))


def test_shapes_for_the_compiler_on_a_gpu():
    with FakeTensorMode():
        X = torch.empty(3, 20, 50, device="cuda", dtype=torch.bfloat16).mT
        A = gram(X)
        B = polynomial(A.mT, 1.0, 2.0)
    for result in (A, B):
        assert (result.shape, result.dtype, result.device.type, result.stride()) == (
            (3, 50, 50), torch.bfloat16, "cuda", (2500, 50, 1))


def test_they_live_inside_compiled_code():
    torch._dynamo.reset()
    G = random(2, 40, 33)
    compiled = torch.compile(muon.orthogonalize, backend="aot_eager", fullgraph=True)
    expected = muon.orthogonalize(G, "jordan", products=(gram, polynomial))
    torch.testing.assert_close(compiled(G, "jordan", products=(gram, polynomial)), expected)


def test_they_compile_for_gpus(tmp_path):
    """For Ampere and Hopper, rows or columns contiguous (tall matrices come as X.mT), with tensor
    cores and 16-byte loads and stores, of mirrored tiles too."""
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "m": "i32", "stride_matrix": "i32", "b": "fp32",
             "c": "fp32"}
    jobs = [{"capability": capability, "types": types | {other: "i32"},
             "constants": {"n": 768, one: 1, "ADD": add, "UPCAST": False, "BLOCK": 128,
                           "BLOCK_K": 64}, "options": {"num_warps": 8, "num_stages": 3}}
            for capability, add, one, other in ((80, True, "stride_col", "stride_row"),
                                                (90, True, "stride_col", "stride_row"),
                                                (90, False, "stride_row", "stride_col"))]
    ampere, *hopper = compile_for_gpu("kernels.symmetric", "_symmetric_kernel", jobs, tmp_path)
    assert "mma.sync" in ampere[0]
    for ptx, shared in hopper:
        assert "wgmma.mma_async" in ptx
        assert shared <= 113 * 1024  # two programs on a multiprocessor
    for ptx, _ in (ampere, *hopper):
        assert "cp.async.cg" in ptx and "cp.async.ca" not in ptx  # 16 bytes, not 4 or 8
        assert "st.global.v4" in ptx and "st.global.b16" not in ptx


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("K, m, n", [(12, 768, 768), (4, 768, 3072), (2, 1600, 1600)])
def test_on_a_gpu_at_the_trainers_shapes(K, m, n):
    """bf16, by themselves and inside compiled code, no further from fp64 than the references."""
    X = random(K, m, n, dtype=torch.bfloat16) / n**0.5
    wide = X.double()
    exact = wide @ wide.mT
    assert (gram(X) - exact).norm() <= 1.05 * (muon._gram(X) - exact).norm()
    A = gram(X)
    wide = A.double()
    exact = -4.775 * wide + 2.0315 * wide @ wide
    error = (polynomial(A, -4.775, 2.0315) - exact).norm()
    assert error <= 1.05 * (muon._polynomial(A, -4.775, 2.0315) - exact).norm()
    torch._dynamo.reset()
    compiled = torch.compile(muon.orthogonalize, fullgraph=True)
    for G in (X.float(), X.float().mT.contiguous()):
        fast, plain = (compiled(G, "jordan", mode="fast", products=products)
                       for products in ((gram, polynomial), None))
        assert (fast - plain).norm() < 0.1 * plain.norm()
