"""The head's loss in chunks against plain cross-entropy in float64, its memory, and its kernel."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from kernels_compile import compile_for_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import loss as kernels_loss
from kernels.fp8 import transpose_fp8
from kernels.loss import (
    KERNELS,
    REFERENCES,
    Bodies,
    Softcap,
    chunk_tokens,
    compiled,
    head_loss,
    softcapped_loss_and_grad,
    targets_ahead,
    triton_loss_and_grad,
)

needs_triton = pytest.mark.skipif(kernels_loss.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels: else the interpreter
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SOFTCAPS = {"none": Softcap(), "tanh": Softcap("tanh", 15.0, 15.0),
            "sigmoid": Softcap("sigmoid", 23.0, 7.5, 5.0),
            "far": Softcap("tanh", 1e7, 1e7)}  # far above the logits: needs a maximum
CURVES = {"none": lambda z: z, "tanh": lambda z: 15 * torch.tanh(z / 15),
          "sigmoid": lambda z: 23 / (1 + torch.exp(-(z + 5) / 7.5)), "far": lambda z: z}
WEIGHTS = (1.0, 0.5, 0.2)


def a_head(B=4, T=24, C=16, V=80, seed=0, dtype=torch.float64, device="cpu"):
    """x (B*T, C), W (V, C) with logits of about 3, targets (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B * T, C, generator=generator, dtype=torch.float64)
    w = 3 * C ** -0.5 * torch.randn(V, C, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=generator)
    x, w = (t.to(device, dtype).requires_grad_() for t in (x, w))
    return x, w, targets.to(device)


def plain_loss(x_NC, w_VC, targets_BT, weights, cap: str):
    """As it is written down: logits, curve, and a cross-entropy for each target, row by row."""
    z_BTV = CURVES[cap](x_NC @ w_VC.T).unflatten(0, targets_BT.shape)
    T = targets_BT.size(1)
    return sum(weight * F.cross_entropy(z_V, targets_BT[b, k:], reduction="sum")
               for k, weight in enumerate(weights)
               for b, z_V in enumerate(z_BTV[:, :T - k]))


def chunked(x, w, targets_BT, weights, cap: str, **how):
    how = {"dtype": x.dtype} | how
    return head_loss(x, w, targets_ahead(targets_BT, len(weights)),
                     torch.tensor(weights, device=x.device), SOFTCAPS[cap], **how)


@pytest.mark.parametrize("size", [16, 40, 96, 1000, None])  # 40 leaves a rest of 16
@pytest.mark.parametrize("num_targets", [1, 2, 3])
@pytest.mark.parametrize("cap", SOFTCAPS)
def test_loss_and_gradients_are_cross_entropys(cap, num_targets, size):
    x, w, targets = a_head()
    weights = WEIGHTS[:num_targets]
    expected = plain_loss(x, w, targets, weights, cap)
    got = chunked(x, w, targets, weights, cap, size=size)
    tolerance = 1e-6 if num_targets > 1 else 1e-9  # the weights come in fp32
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)
    for ours, theirs in zip(torch.autograd.grad(got / 7, (x, w)),
                            torch.autograd.grad(expected / 7, (x, w))):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cap", SOFTCAPS)
def test_fp32_is_as_near_to_the_truth_as_plain_fp32(cap):
    """The one-pass formulas lose nothing: at most twice the error that autograd makes in fp32."""
    exact = a_head(T=64)
    truth = torch.autograd.grad(plain_loss(*exact, WEIGHTS, cap), exact[:2])
    x, w, targets = (t.detach().float() if t.is_floating_point() else t for t in exact)
    x.requires_grad_(), w.requires_grad_()
    ours = torch.autograd.grad(chunked(x, w, targets, WEIGHTS, cap, size=48), (x, w))
    plain = torch.autograd.grad(plain_loss(x, w, targets, WEIGHTS, cap), (x, w))
    for a, b, t in zip(ours, plain, truth):
        assert (a - t).norm() < 2 * (b - t).norm() + 1e-7 * t.norm()


def test_targets_stop_at_the_end_of_their_row():
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert targets_ahead(rows, 3).tolist() == [[1, 2, 3], [2, 3, -1], [3, -1, -1],
                                               [4, 5, 6], [5, 6, -1], [6, -1, -1]]
    assert targets_ahead(rows, 1).tolist() == [[t] for t in (1, 2, 3, 4, 5, 6)]


def test_without_gradients_none_are_computed():
    """Validation: the same loss, half of the work."""
    wanted = []

    def watched(logits, targets, weights, softcap, with_grad, factor):
        wanted.append(with_grad)
        return softcapped_loss_and_grad(logits, targets, weights, softcap, with_grad, factor)

    x, w, targets = a_head()
    how = {"bodies": Bodies(watched), "size": 32}
    trained = chunked(x, w, targets, WEIGHTS, "tanh", **how)
    with torch.no_grad():
        validated = chunked(x, w, targets, WEIGHTS, "tanh", **how)
    assert torch.equal(trained, validated) and not validated.requires_grad
    assert wanted == [True] * 3 + [False] * 3


def test_bf16_products_add_up_in_fp32():
    """Many chunks: dW in bf16 would lose more with each of them."""
    x, w, targets = a_head(B=8, T=128)
    (truth,) = torch.autograd.grad(plain_loss(x, w, targets, (1.0,), "tanh"), w)

    def error(size: int) -> float:
        w32 = w.detach().float().requires_grad_()
        half = x.detach().bfloat16().requires_grad_()
        (chunked(half, w32, targets, (1.0,), "tanh", size=size) / 4).backward()
        assert half.grad.dtype == torch.bfloat16 and w32.grad.dtype == torch.float32
        return ((4 * w32.grad - truth).norm() / truth.norm()).item()

    assert error(1024) < 0.01 and error(16) < 1.1 * error(1024)


def test_a_bf16_table_gets_a_bf16_gradient_and_an_fp32_stream_an_fp32_one():
    x, w, targets = a_head(dtype=torch.float32)
    table = w.detach().bfloat16().requires_grad_()
    chunked(x, table, targets, (1.0,), "none", dtype=torch.bfloat16).backward()
    assert (x.grad.dtype, table.grad.dtype) == (torch.float32, torch.bfloat16)


def test_gradients_arrive_once_and_in_place():
    """Muon's flat buffers: .grad is a view that must stay one, and hooks count arrivals. A tied
    head has two uses of its table and still one arrival."""
    x, w, targets = a_head(dtype=torch.float32)
    flat = torch.zeros(w.numel())
    w.grad = flat.view_as(w)
    arrivals = []
    w.register_post_accumulate_grad_hook(lambda p: arrivals.append(p))
    for _ in range(2):
        tied = F.embedding(targets.flatten(), w) + x.detach()
        chunked(tied, w, targets, WEIGHTS, "sigmoid", size=32).backward()
    assert len(arrivals) == 2 and w.grad.data_ptr() == flat.data_ptr()
    once = w.detach().clone().requires_grad_()
    plain_loss(F.embedding(targets.flatten(), once) + x.detach(), once, targets, WEIGHTS,
               "sigmoid").backward()
    torch.testing.assert_close(flat.view_as(w), 2 * once.grad, rtol=1e-4, atol=1e-4)


# --- memory ---------------------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.dtype_out:  # torch 2.11 has no meta kernel
            return kwargs["out"]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("grads", [True, False])
def test_logits_of_all_tokens_never_exist(grads):
    N, C, V = 2048, 8, 64
    x, w, targets = a_head(B=2, T=N // 2, C=C, V=V, dtype=torch.float32)
    with Largest() as plain:
        plain_loss(x, w, targets, WEIGHTS, "tanh").backward()
    assert plain.numel == N * V  # or the test would measure nothing
    with Largest() as ours, torch.set_grad_enabled(grads):
        loss = chunked(x, w, targets, WEIGHTS, "tanh", size=128)
        if grads:
            loss.backward()
    assert ours.numel <= max(128 * V, N * C)


def test_one_chunk_lives_at_a_time():
    """The logits of a chunk are gone before those of the next one are made."""
    import weakref

    alive = []

    def watched(logits, *rest):
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(logits))
        return softcapped_loss_and_grad(logits, *rest)

    x, w, targets = a_head()
    chunked(x, w, targets, (1.0,), "none", size=16, bodies=Bodies(watched)).backward()
    assert len(alive) == 6


@pytest.mark.parametrize("tokens, rows, device, expected", [
    (32_768, 50_304, "cuda", 8192), (49_152, 50_304, "cuda", 8192), (65_536, 50_304, "cuda", 8192),
    (262_144, 50_304, "cuda", 8192), (10_240, 50_304, "cuda", 5120), (24_000, 50_304, "cuda", 8000),
    (100, 50_304, "cuda", 112), (8192, 320, "cpu", 1024), (8192, 257, "cpu", 1024),
    (6144, 320, "cpu", 1024), (7919, 320, "cpu", 992), (64, 50_304, "cpu", 16), (1, 320, "cpu", 16),
])
def test_chunks_fit_the_budget_and_are_equal_where_they_can_be(tokens, rows, device, expected):
    size = chunk_tokens(tokens, rows, torch.device(device))
    assert size == expected and size % 16 == 0
    budget = 2.5e9 / 4 if device == "cuda" else 2**19
    assert size * rows <= budget or size == 16


# --- compiled -------------------------------------------------------------------------------------

# What dynamo itself does while it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("cap", ["none", "sigmoid"])
def test_compiled_it_is_the_same_in_one_graph_a_shape(cap):
    """Not one for all chunks: six chunks and a shorter one are two graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    body = torch.compile(softcapped_loss_and_grad, dynamic=False, fullgraph=True, backend=counter)
    x, w, targets = a_head(B=5, T=40, dtype=torch.float32)
    results = []
    for bodies in (REFERENCES, Bodies(body)):
        loss = chunked(x, w, targets, WEIGHTS, cap, size=32, bodies=bodies)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's
@pytest.mark.skipif(DEVICE == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))),
                    reason="no C++ compiler")
@pytest.mark.parametrize("cap", ["none", "tanh"])
def test_the_compilers_code_computes_the_same(cap):
    """For one target torch 2.11's code took the targets' logits after the gradients had taken
    their place: no error, another loss. Without a softcap it did not compile at all."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 320, generator=generator).to(DEVICE)
    targets = torch.randint(320, (64, 1), generator=generator).to(DEVICE)
    arguments = targets, torch.ones(1, device=DEVICE), SOFTCAPS[cap]
    for ours, references in zip(compiled(REFERENCES).loss_and_grad(logits.clone(), *arguments)[:2],
                           softcapped_loss_and_grad(logits.clone(), *arguments)[:2]):
        torch.testing.assert_close(ours, references, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_everything_but_the_products_is_compiled():
    """And the kernel, which is one already, is left alone: a graph around it might copy logits."""
    assert not set(compiled(REFERENCES, backend="eager")) & set(REFERENCES)
    loss_and_grad, quantize = compiled(KERNELS, backend="eager")
    assert loss_and_grad is triton_loss_and_grad and quantize is not KERNELS.quantize


# --- fp8 ------------------------------------------------------------------------------------------

def rounded(t, factor, dtype):
    """What fp8 keeps of t."""
    largest = torch.finfo(dtype).max
    return ((t.float() * factor).clamp(-largest, largest).to(dtype).double() / factor)


class Fp8Linear(torch.autograd.Function):
    """The head of record #19, one layer in a plain model: x W^T, its three products on values that
    fp8 keeps, each exact in itself."""

    @staticmethod
    def forward(ctx, x, w, x_factor, w_factor, grad_factor):
        x8, w8 = (rounded(t, factor, torch.float8_e4m3fn)
                  for t, factor in ((x, x_factor), (w, w_factor)))
        ctx.save_for_backward(x8, w8)
        ctx.factor = grad_factor
        return (x8 @ w8.T).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        g = rounded(grad, ctx.factor, torch.float8_e5m2)
        return (g @ w).to(grad.dtype), g.T @ x, None, None, None


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_fp8_rounds_what_a_layer_in_fp8_would(dtype, tolerance, triton):
    """A layer gets the mean loss's gradient, and a factor that is larger by the tokens: the same
    numbers are rounded. In bf16 the layer's gradient was rounded once before that."""
    x, w, targets = a_head(B=2, T=32, C=32, V=96, dtype=torch.float32,
                           device=DEVICE if triton else "cpu")
    half = x.detach().to(dtype).requires_grad_()
    factors = (16.0, 32.0, 448.0)
    z = Fp8Linear.apply(half, w, *factors[:2], factors[2] * 64).float()
    expected = F.cross_entropy(CURVES["sigmoid"](z), targets.flatten(), reduction="sum") / 64
    truth = torch.autograd.grad(expected, (half, w))
    got = chunked(half, w, targets, (1.0,), "sigmoid", dtype=dtype, fp8_factors=factors, size=48,
                  bodies=KERNELS if triton else REFERENCES) / 64
    torch.testing.assert_close(got, expected, rtol=1e-3 if dtype == torch.bfloat16 else 1e-6,
                               atol=0)
    for ours, theirs in zip(torch.autograd.grad(got, (half, w)), truth):
        assert (ours - theirs).norm() < tolerance * theirs.norm()
        assert ours.dtype == theirs.dtype
    exact = torch.autograd.grad(
        plain_loss(half.float(), w, targets, (1.0,), "sigmoid") / 64, (half, w))
    for theirs, true in zip(truth, exact):  # and rounding shows: the tolerance means something
        assert (theirs - true).norm() > 2 * 1e-5 * true.norm()


def test_fp8_products_get_the_layouts_that_gpus_take(monkeypatch):
    """The first factor in rows, the second in columns, all dimensions multiples of 16. The CPU's
    emulation would not mind."""
    calls, product = [], torch._scaled_mm

    def watched(a, b, *rest, **kwargs):
        assert a.stride(1) == 1 and b.stride(0) == 1
        assert all(size % 16 == 0 for size in (*a.shape, *b.shape, a.stride(0), b.stride(1)))
        calls.append((a.dtype, b.dtype))
        return product(a, b, *rest, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    x, w, targets = a_head(B=2, T=40, V=96, dtype=torch.float32)
    chunked(x, w, targets, (1.0,), "tanh", fp8_factors=(2.0, 32.0, 448.0), size=32).backward()
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert calls == [(e4m3, e4m3), (e5m2, e4m3), (e5m2, e4m3)] * 3


# --- the kernel, in Triton's interpreter where there is no GPU ------------------------------------

def chunk(cap: str, V: int, dtype=torch.float32, N=5, K=3):
    generator = torch.Generator().manual_seed(V)
    logits = (4 * torch.randn(N, V, generator=generator)).to(dtype)
    targets = torch.randint(V, (N, K), generator=generator)
    targets[0, 1:] = targets[0, 0]  # the same token more than once
    targets[-1, 1:] = -1
    return (logits.to(DEVICE), targets.to(DEVICE), torch.tensor(WEIGHTS[:K], device=DEVICE),
            SOFTCAPS[cap])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [7, 64, 257, 5003])  # 5003: two blocks, the second not full
@pytest.mark.parametrize("cap", SOFTCAPS)
def test_kernel_is_its_reference(cap, V, dtype):
    logits, *rest = chunk(cap, V, dtype)
    loss, grad, _ = softcapped_loss_and_grad(logits.clone(), *rest)
    ours = logits.clone()
    got, in_place, _ = triton_loss_and_grad(ours, *rest)
    assert in_place is ours and got.dtype == torch.float32
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=2e-5)
    exact = 1e-6 if dtype == torch.float32 else 2.0 ** -7  # one place of bf16: casts differ
    torch.testing.assert_close(in_place, grad, rtol=exact, atol=1e-6)
    got, none, _ = triton_loss_and_grad(logits, *rest, with_grad=False)
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=2e-5)
    assert none is None


@needs_triton
@pytest.mark.parametrize("body", [softcapped_loss_and_grad, triton_loss_and_grad])
@pytest.mark.parametrize("cap", ["none", "tanh", "sigmoid"])
def test_fp8_gradients_come_in_both_layouts_and_never_overflow(cap, body):
    logits, *rest = chunk(cap, 300, torch.bfloat16)
    _, exact, _ = softcapped_loss_and_grad(logits.float(), *rest)
    factor = 1e6  # beyond e5m2 for the targets' entries
    _, rows, columns = body(logits, *rest, fp8_factor=factor)
    assert rows.dtype == columns.dtype == torch.float8_e5m2
    assert torch.equal(rows.T.float(), columns.float()) and columns.is_contiguous()
    torch.testing.assert_close(rows.double() / factor, rounded(exact, factor, torch.float8_e5m2),
                               rtol=0.26, atol=1e-11)  # next to each other at most
    assert rows.float().abs().max() == torch.finfo(torch.float8_e5m2).max


@pytest.mark.parametrize("body", [softcapped_loss_and_grad,
                                  pytest.param(triton_loss_and_grad, marks=needs_triton)])
def test_what_is_not_a_number_stays_none(body):
    """The trainer stops at a loss that is not finite; it must reach it."""
    logits, *rest = chunk("tanh", 64)
    logits[2, 5] = math.nan
    loss, grad, _ = body(logits.clone(), *rest)
    assert loss.isnan().tolist() == [False, False, True, False, False]
    assert grad[2].isnan().all() and grad[:2].isfinite().all()
    _, rows, _ = body(logits, *rest, fp8_factor=1.0)
    assert rows.float()[2].isnan().all()


@needs_triton
def test_a_target_that_is_no_token_spoils_the_kernels_loss():
    """And no memory beyond the row is read."""
    logits, targets, weights, softcap = chunk("tanh", 64)
    targets[3, 1] = 64
    loss, _, _ = triton_loss_and_grad(logits, targets, weights, softcap)
    assert loss.isnan().tolist() == [False, False, False, True, False]


@needs_triton
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_operators_keep_what_they_say_to_the_compiler():
    """Mutation, aliases and fake shapes (torch.library's own check)."""
    logits, targets, weights, softcap = chunk("sigmoid", 48)
    torch.library.opcheck(kernels_loss.softcapped_loss_, (logits, targets, weights, *softcap, True))
    torch.library.opcheck(kernels_loss.softcapped_loss_fp8,
                          (logits, targets, weights, *softcap, 100.0),
                          test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(transpose_fp8, (logits.to(torch.uint8),),  # opcheck cannot compare fp8
                          test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("bodies", [REFERENCES, pytest.param(KERNELS, marks=needs_triton)])
@pytest.mark.parametrize("fp8", [None, (2.0, 32.0, 448.0)])
def test_shapes_and_dtypes_of_a_row_of_64k_tokens(bodies, fp8):
    """Tensors without memory take a GPU's way: products of bf16 that add up in fp32."""
    x = torch.empty(65_536, 768, dtype=torch.bfloat16, device="meta", requires_grad=True)
    w = torch.empty(50_304, 768, device="meta", requires_grad=True)
    targets = torch.empty(65_536, 3, dtype=torch.int64, device="meta")
    with Largest() as largest:
        loss = head_loss(x, w, targets, torch.empty(3, device="meta"), SOFTCAPS["tanh"],
                         torch.bfloat16, fp8, bodies, size=8192)
        loss.backward()
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)
    assert (w.grad.dtype, w.grad.shape) == (w.dtype, w.shape)
    assert largest.numel == 8192 * 50_304


@needs_triton
def test_kernels_compile_for_gpus(tmp_path):
    """Hopper with gradients in place and in e5m2, Ampere in place."""
    types = {"logits": "*bf16", "targets": "*i64", "weights": "*fp32", "loss": "*fp32",
             "grad": "*bf16", "factor": "fp32"}
    constants = {"V": 50_304, "KIND": "sigmoid", "CAP": 23.0, "DIV": 7.5, "SHIFT": 5.0,
                 "BOUNDED": True, "NUM_TARGETS": 3, "WITH_GRAD": True, "FP8": False, "BLOCK": 4096}
    options = {"num_warps": 8}
    jobs = [{"capability": 90, "types": types | {"grad": "*fp8e5"},
             "constants": constants | {"FP8": True}, "options": options},
            {"capability": 90, "types": types, "options": options,
             "constants": constants | {"KIND": "tanh", "BOUNDED": False}},
            {"capability": 80, "types": types, "constants": constants | {"KIND": "none"},
             "options": options}]
    to_fp8, *others = compile_for_gpu("kernels.loss", "_loss_kernel", jobs, tmp_path)
    assert "cvt.rn.satfinite.e5m2x2.f32" in to_fp8[0]
    for ptx, _ in others:
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx and "e5m2" not in ptx
    ((ptx, _),) = compile_for_gpu("kernels.fp8", "_transpose_kernel", [
        {"capability": 90, "types": {"x": "*u8", "out": "*u8", "rows": "i32", "columns": "i32"},
         "constants": {"BLOCK_R": 128, "BLOCK_C": 128}, "options": options}], tmp_path)
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx  # 16 bytes at a time on both sides


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [None, (4.48, 280.0, 448 / 0.75)])
@pytest.mark.parametrize("cap", ["none", "tanh", "sigmoid"])
def test_kernel_at_full_size(cap, fp8):
    """50,304 rows: against the reference, and against the memory it may take."""
    from kernels.fp8 import has_fp8
    if fp8 and not has_fp8(torch.device("cuda")):
        pytest.skip("this GPU does not multiply fp8")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(16_384, 768, generator=generator, device="cuda", dtype=torch.bfloat16)
    w = 0.1 * torch.randn(50_304, 768, generator=generator, device="cuda")
    targets = torch.randint(50_304, (8, 2048), generator=generator, device="cuda")
    results = []
    for bodies in (REFERENCES, KERNELS):
        x.grad = w.grad = None
        x.requires_grad_(), w.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = head_loss(x, w, targets_ahead(targets, 3), torch.tensor(WEIGHTS, device="cuda"),
                         SOFTCAPS[cap], torch.bfloat16, fp8, bodies)
        (loss / 16_384).backward()
        peak = torch.cuda.max_memory_allocated() - before
        results.append((loss.detach(), x.grad.float(), w.grad))
    assert peak < 3.5e9
    torch.testing.assert_close(*(loss for loss, _, _ in results), rtol=1e-4, atol=0)
    for reference, ours in list(zip(*results))[1:]:
        assert (ours - reference).norm() < (0.03 if fp8 else 0.01) * reference.norm()
