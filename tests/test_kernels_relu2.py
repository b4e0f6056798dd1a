"""relu(x W1^T)^2 W2^T with the activations in the products, against float64; in Triton's
interpreter or on a GPU. The oracle is the plain reference and torch's own gradients of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from kernels_compile import compile_for_gpu

from kernels.relu2 import (
    INTERPRET,
    linear_relu2,
    linear_relu2_backward,
    mlp_relu2,
    mlp_relu2_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rounding to nearest errs by half a step; the interpreter cuts bf16 off, which errs by a whole one.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11,
        torch.bfloat16: 2.0**-7 if INTERPRET else 2.0**-8}
# (N, C, F): whole tiles, edges on every side, several groups of tiles, one token, the pocket's.
SHAPES = [(32, 32, 32), (70, 45, 100), (161, 33, 64), (1, 5, 3), (40, 64, 256)]


def arguments(N, C, F, dtype=torch.float32, seed=0):
    """x, fc, proj that require gradients, and a gradient of the output; hidden units around 1."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((N, C, 1.0), (F, C, C**-0.5), (C, F, F**-0.5), (N, C, 1.0))
    x, fc, proj, grad = ((scale * torch.randn(*size, generator=generator)).to(DEVICE, dtype)
                         for *size, scale in sizes)
    return [t.requires_grad_() for t in (x, fc, proj)], grad


def with_gradients(mlp, inputs, grad):
    out = mlp(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def in_float64(inputs, grad):
    exact = [t.detach().double().requires_grad_() for t in inputs]
    return with_gradients(mlp_relu2_reference, exact, grad.double())


def distance(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, C, F", SHAPES)
def test_output_and_gradients_are_the_exact_ones(N, C, F, dtype):
    """Each passes at most two roundings on its way and sums of rounded terms; their errors add up
    like random ones, or where the interpreter cuts bf16 off, all in one direction."""
    inputs, grad = arguments(N, C, F, dtype)
    results = with_gradients(mlp_relu2, inputs, grad)
    for got, exact in zip(results, in_float64(inputs, grad), strict=True):
        assert got.dtype == dtype and got.shape == exact.shape
        assert distance(got, exact) < max(UNIT[dtype], 2.0**-21)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, C, F", SHAPES)
def test_the_activation_is_rounded_once(N, C, F, dtype):
    """Entry by entry: y from sums in fp32 (tensor cores truncate: four times their bound), and dh
    with sqrt(y), which halves y's error and takes a step of fp32 more where that is y's dtype."""
    (x, fc, proj), grad = ([t.detach() for t in ts] if isinstance(ts, list) else ts
                           for ts in arguments(N, C, F, dtype))
    y = linear_relu2(x, fc)
    h = x.double() @ fc.double().T
    slack = C * 2.0**-22 * (x.double().abs() @ fc.double().abs().T)
    tiny = torch.finfo(dtype).smallest_normal * UNIT[dtype]
    assert y.dtype == dtype and ((y > 0) <= (h > -slack)).all()
    exact = h.relu().square()
    assert ((y - exact).abs() <= UNIT[dtype] * exact + 2 * h.abs() * slack + slack**2 + tiny).all()
    dh = linear_relu2_backward(grad, proj, y)
    r, product = y.double().sqrt(), grad.double() @ proj.double()
    slack = C * 2.0**-22 * (grad.double().abs() @ proj.double().abs())
    allowed = (UNIT[dtype] + 2.0**-22) * product.abs() + slack
    assert ((dh - 2 * r * product).abs() <= 2 * r * allowed + tiny).all()


def test_fp16_and_bf16_are_no_worse_than_the_plain_reference():
    """y is rounded once where the reference rounds h and y. fp16 only in the interpreter: it cuts
    bf16 off, so there the two differ by rounding itself."""
    dtype = torch.float16 if INTERPRET else torch.bfloat16
    inputs, grad = arguments(160, 64, 128, dtype)
    exact = in_float64(inputs, grad)
    ours, plain = (with_gradients(mlp, inputs, grad) for mlp in (mlp_relu2, mlp_relu2_reference))
    for a, b, c in zip(ours, plain, exact):
        assert distance(a, c) < 1.02 * distance(b, c)


def test_gradients_are_slopes():
    """Central differences of the kernel itself, along one direction of each input."""
    inputs, grad = arguments(40, 20, 50)
    directions = [t.detach() for t in arguments(40, 20, 50, seed=1)[0]]
    _, *gradients = with_gradients(mlp_relu2, inputs, grad)
    for n, (g, d) in enumerate(zip(gradients, directions)):
        ends = []
        for sign in (1, -1):
            moved = [t.detach() + sign * 1e-2 * d if k == n else t for k, t in enumerate(inputs)]
            ends.append((mlp_relu2(*moved).double() * grad).sum())
        slope = (ends[0] - ends[1]) / 2e-2
        torch.testing.assert_close(slope, (g.double() * d).sum(), rtol=2e-3, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
def test_what_is_not_finite_stays_in_its_row():
    """relu must not turn NaN into 0, which would hide that a training has broken."""
    (x, fc, proj), grad = arguments(70, 45, 100)
    good = mlp_relu2(x, fc, proj)
    with torch.no_grad():
        x[69, 3] = float("nan")
    out = mlp_relu2(x, fc, proj)
    assert out[69].isnan().all() and torch.equal(out[:69], good[:69])
    dx, _, _ = torch.autograd.grad(out, (x, fc, proj), grad)
    assert dx[69].isnan().all() and dx[:69].isfinite().all()


def test_strides_do_not_matter():
    """Columns of a larger tensor, transposed weights, the gradient of a sum (one expanded number).
    """
    (x, fc, proj), _ = arguments(35, 40, 50)
    results = []
    for inputs in ((x, fc, proj), (torch.cat((x, x), 1)[:, :40], fc.T.contiguous().T,
                                   proj.T.contiguous().T)):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = mlp_relu2(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grad, y = x.detach(), linear_relu2(x.detach(), fc.detach())
    expected = linear_relu2_backward(grad, proj, y)
    assert torch.equal(linear_relu2_backward(grad, proj, y.T.contiguous().T), expected)


def test_no_tokens():
    (x, fc, proj), grad = arguments(0, 8, 16)
    out, dx, dfc, dproj = with_gradients(mlp_relu2, (x, fc, proj), grad)
    assert out.shape == dx.shape == (0, 8) and not dfc.any() and not dproj.any()


def test_only_the_activation_is_kept_for_backward():
    """Beside the arguments: relu(h)^2 alone, not h."""
    kept = []
    inputs, _ = arguments(40, 20, 50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp_relu2(*inputs)
    assert [tuple(t.shape) for t in kept] == [(40, 20), (50, 20), (20, 50), (40, 50)]


def test_mixed_dtypes_and_fp64_are_refused():
    (x, fc, proj), _ = arguments(4, 8, 16)
    with pytest.raises(ValueError, match=r"one dtype .* got torch.float32, torch.bfloat16"):
        mlp_relu2(x, fc.bfloat16(), proj)
    with pytest.raises(ValueError, match=r"one dtype .* got torch.float64"):
        mlp_relu2(x.double(), fc.double(), proj.double())


def test_operators_are_sound():
    """torch.library's own checks: schema, fake kernels, tracing with dynamic shapes."""
    (x, fc, proj), grad = arguments(33, 20, 40)
    x, fc, proj = (t.detach() for t in (x, fc, proj))
    torch.library.opcheck(linear_relu2, (x, fc))
    torch.library.opcheck(linear_relu2_backward, (grad, proj, x.new_ones(33, 40)))


def test_shapes_for_the_compiler_on_a_gpu():
    with FakeTensorMode():
        x, fc = (torch.empty(n, 24, device="cuda", dtype=torch.bfloat16) for n in (64, 48))
        y = linear_relu2(x, fc)
        dh = linear_relu2_backward(x, fc.T, torch.empty(48, 64, device="cuda", dtype=y.dtype).T)
    for result in (y, dh):
        assert (result.shape, result.dtype, result.device.type, result.stride()) == (
            (64, 48), torch.bfloat16, "cuda", (48, 1))


# What dynamo itself does while it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_lives_inside_compiled_code():
    torch._dynamo.reset()
    inputs, grad = arguments(33, 20, 40)
    compiled = torch.compile(lambda x, fc, proj: 2 * mlp_relu2(x + 1, fc, proj),
                             backend="aot_eager", fullgraph=True)
    results = with_gradients(compiled, inputs, grad)
    expected = with_gradients(lambda x, fc, proj: 2 * mlp_relu2_reference(x + 1, fc, proj), inputs,
                              grad)
    for a, b in zip(results, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_it_compiles_for_gpus(tmp_path):
    """For Ampere and Hopper, both ways, with tensor cores and 16-byte loads and stores."""
    jobs = []
    for capability, backward in ((80, False), (90, False), (90, True)):
        one, other = ("stride_n", "stride_k") if backward else ("stride_k", "stride_n")
        types = {f"{name}_ptr": "*bf16" for name in ("a", "b", "y", "out")}
        jobs.append({"capability": capability, "types": types | {"M": "i32", "N": "i32",
                                                                 other: "i32"},
                     "constants": {one: 1, "K": 768, "BACKWARD": backward, "UPCAST": False,
                                   "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8},
                     "options": {"num_warps": 8, "num_stages": 3}})
    ampere, *hopper = compile_for_gpu("kernels.relu2", "_product_kernel", jobs, tmp_path)
    assert "mma.sync" in ampere[0]
    assert all("wgmma.mma_async" in ptx for ptx, _ in hopper)
    for ptx, _ in (ampere, *hopper):
        assert "cp.async.cg" in ptx and "cp.async.ca" not in ptx  # 16 bytes, not 4 or 8
        assert "st.global.v4" in ptx and "st.global.b16" not in ptx


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_at_the_trainers_shapes(compiled):
    """bf16, by itself and inside compiled code, no further from fp64 than the reference."""
    torch._dynamo.reset()
    inputs, grad = arguments(8192, 768, 3072, torch.bfloat16)
    ours = with_gradients(torch.compile(mlp_relu2, fullgraph=True) if compiled else mlp_relu2,
                          inputs, grad)
    plain = with_gradients(mlp_relu2_reference, inputs, grad)
    for a, b, c in zip(ours, plain, in_float64(inputs, grad)):
        assert distance(a, c) <= 1.05 * distance(b, c)


@pytest.mark.skipif(DEVICE == "cuda", reason="the same script, at length, is run by itself")
def test_the_benchmark_prints_errors_without_a_gpu(tmp_path, capsys):
    import json

    from bench.kernels import main

    main(["--json", str(tmp_path / "kernels.json")])
    written = json.loads((tmp_path / "kernels.json").read_text())
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(written["rows"])
    assert {"gram", "polynomial", "linear_relu2"} < {row["kernel"] for row in written["rows"]}
    for row in written["rows"]:
        assert 0 < row["error"] < 0.1 and "kernel_ms" not in row, row
