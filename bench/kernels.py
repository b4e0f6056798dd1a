"""Each Triton kernel against its reference, eager and compiled, and against the roofline.

    python bench/kernels.py                       a GPU: the trainer's shapes; else toy shapes
    python bench/kernels.py --quick               toy shapes
    python bench/kernels.py --only gram --json kernels.json

A row: median milliseconds of `--repeats` calls by CUDA events, caches flushed before each; memory
that a call takes at its peak beside its inputs, in MiB; what the kernel reaches in TFLOP/s and
GB/s, counting only the work and the traffic that cannot be avoided; that bound's share of the time
taken (dense bf16 peak and HBM bandwidth from data sheets); and the largest error of kernel and
reference against the reference in float64, over the largest entry. Rows with gradients time the
forward and the backward pass. Without a GPU the kernels run in Triton's interpreter at toy shapes,
and only the errors are shown: times would mean nothing. (The interpreter cuts off what bf16 cannot
hold, a GPU rounds to nearest: there the errors halve.)

A new kernel: a function that yields Cases, named in CASES.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

if not torch.cuda.is_available():  # before the kernels are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kernels
import muon
from bench.gpu import failure, machine, measured
from kernels import loss, relu2, symmetric

# Bytes/s of one device's memory, from the vendors' data sheets.
BANDWIDTH = {
    "GH200": 4.0e12, "H200": 4.8e12, "H100 80GB HBM3": 3.35e12, "H100 PCIe": 2.0e12, "B200": 8.0e12,
    "A100-SXM4-80GB": 2.04e12, "A100 80GB PCIe": 1.94e12, "A100": 1.56e12, "RTX 4090": 1.01e12,
    "RTX 3090": 0.94e12, "L40S": 0.86e12,
}


@dataclass
class Case:
    """One row: kernel(*inputs()) against reference(*inputs()). Where inputs require gradients, the
    backward pass counts as well, for a random gradient of the one output."""

    name: str
    shape: str
    dtype: torch.dtype                   # of what the kernel reads
    kernel: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[], list[Tensor]]
    flops: float                         # that cannot be avoided
    bytes: float                         # read or written once each


def random(*size: int, dtype: torch.dtype, device: str, scale: float = 1.0,
           grad: bool = False) -> Tensor:
    x = torch.randn(size, device=device) * scale
    return x.to(dtype).requires_grad_(grad)


def symmetric_cases(toy: bool, device: str) -> Iterator[Case]:
    """A batch of 124M's matrices (attention, MLP) and of 1.5B's, an eighth of its 48 layers."""
    shapes = [(2, 48, 48), (2, 40, 160)] if toy else [
        (12, 768, 768), (72, 768, 768), (24, 768, 3072), (24, 1600, 1600), (12, 1600, 6400)]
    for dtype in (torch.bfloat16, torch.float16):
        size = dtype.itemsize
        for K, m, n in shapes:
            def inputs(K=K, m=m, n=n, dtype=dtype):
                return [random(K, m, n, dtype=dtype, device=device, scale=n**-0.5)]

            yield Case("gram", f"{K} x {m} x {n}", dtype, symmetric.gram, muon._gram, inputs,
                       K * m * (m + 1) * n, K * (m * n + m * m) * size)
            if m == n:
                yield Case("polynomial", f"{K} x {m} x {m}", dtype,
                           lambda X: symmetric.polynomial(X, -4.775, 2.0315),
                           lambda X: muon._polynomial(X, -4.775, 2.0315),
                           lambda inputs=inputs: [symmetric.gram(inputs()[0])],
                           K * m * (m + 1) * m, 2 * K * m * m * size)
    products = (symmetric.gram, symmetric.polynomial)
    for K, rows, cols in [*shapes, *((K, n, m) for K, m, n in shapes[1:] if m != n)]:
        m, n = sorted((rows, cols))
        flops = 5 * K * (m * (m + 1) * n + m * (m + 1) * m + 2 * m * m * n)
        yield Case("orthogonalize, bf16", f"{K} x {rows} x {cols}", torch.float32,
                   lambda G: muon.orthogonalize(G, "jordan", mode="fast", products=products),
                   lambda G: muon.orthogonalize(G, "jordan", mode="fast"),
                   lambda size=(K, rows, cols): [random(*size, dtype=torch.float32, device=device)],
                   flops, 8 * K * m * n)


def relu2_cases(toy: bool, device: str) -> Iterator[Case]:
    """A micro-step's tokens through the MLP of 124M."""
    N, C, F = (96, 40, 80) if toy else (32768, 768, 3072)
    shape, dtype = f"{N} x {C} -> {F}", torch.bfloat16

    def matrix(*size, grad=False):
        return random(*size, dtype=dtype, device=device, scale=size[-1]**-0.5, grad=grad)

    def tokens(width, grad=False):
        return random(N, width, dtype=dtype, device=device, grad=grad)

    def plain_backward(grad_NC, proj_CF, y_NF):
        return (grad_NC @ proj_CF) * (2 * y_NF.sqrt())

    yield Case("linear_relu2", shape, dtype, relu2.linear_relu2,
               lambda x, fc: torch.relu(x @ fc.T).square(), lambda: [tokens(C), matrix(F, C)],
               2 * N * C * F, 2 * (N * C + C * F + N * F))
    yield Case("linear_relu2_backward", shape, dtype, relu2.linear_relu2_backward, plain_backward,
               lambda: [tokens(C), matrix(C, F), tokens(F).relu().square()],
               2 * N * C * F, 2 * (N * C + C * F + 2 * N * F))
    yield Case("mlp_relu2 with gradients", shape, dtype, relu2.mlp_relu2, relu2.mlp_relu2_reference,
               lambda: [tokens(C, True), matrix(F, C, grad=True), matrix(C, F, grad=True)],
               12 * N * C * F, 2 * (4 * N * C + 4 * C * F + 2 * N * F))


def loss_cases(toy: bool, device: str) -> Iterator[Case]:
    """The newest recipe's head: chunks through the kernel, and chunks through its plain reference
    (compiled, as the trainer does it), against cross-entropy as it is written down, all logits at
    once. 16,384 tokens, because that takes about 50 GB in float64 (calculated)."""
    N, C, V, rows = (96, 32, 112, 2) if toy else (16_384, 768, 50_304, 8)
    softcap = loss.Softcap("sigmoid", 23.0, 7.5, 5.0)
    targets_BT = torch.randint(V, (rows, N // rows), device=device)

    def inputs():
        return [random(N, C, dtype=torch.bfloat16, device=device, grad=True),
                random(V, C, dtype=torch.float32, device=device, scale=3 * C**-0.5, grad=True)]

    for K in (1, 3):
        weights_K = 0.5 ** torch.arange(K, device=device)
        targets_NK = loss.targets_ahead(targets_BT, K)

        def chunked(x, w, bodies, targets_NK=targets_NK, weights_K=weights_K):
            return loss.head_loss(x, w, targets_NK, weights_K, softcap, x.dtype, bodies=bodies)

        def plain(x, w, targets_NK=targets_NK, weights_K=weights_K):
            z = (x @ w.to(x.dtype).T).to(torch.promote_types(x.dtype, torch.float32))
            f = loss.softcapped(z, softcap)
            return sum(weight * torch.nn.functional.cross_entropy(
                           f, targets_N, ignore_index=-1, reduction="sum")
                       for weight, targets_N in zip(weights_K, targets_NK.T))

        reference = loss.REFERENCES if toy else loss.compiled(loss.REFERENCES)
        ways = {"Triton": loss.KERNELS, "reference": reference}
        for way, bodies in ways.items():
            yield Case(f"head loss, {way}", f"{N} x {C} -> {V}, targets: {K}", torch.bfloat16,
                       partial(chunked, bodies=bodies), plain, inputs,
                       6 * N * C * V, 2 * 2 * N * C + 2 * 4 * V * C)


CASES = (symmetric_cases, relu2_cases, loss_cases)


def call(function: Callable, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """The output of `function`, and the gradients of the inputs that want one."""
    out = function(*inputs)
    if grad is None:
        return [out]
    wanted = [x for x in inputs if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def error(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference over the largest entry, in the worst of the tensors."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True))


def milliseconds(work: Callable, repeats: int) -> float:
    """Median time of `work` on the GPU alone, caches cold."""
    for _ in range(3):
        work()
    host_s = 1e-3
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        host_s = max(host_s, time.perf_counter() - began)
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # five times an H100's L2
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        # Twice as long as the host takes (no clock is faster than 2 GHz): it runs ahead, and no
        # launch leaves a gap.
        torch.cuda._sleep(int(2e9 * 2 * host_s))
        flush.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def peak_mib(work: Callable) -> float:
    """What `work` allocates on the GPU at its peak."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Case, repeats: int) -> dict:
    torch.manual_seed(0)
    inputs = case.inputs()
    device, wants = inputs[0].device, any(x.requires_grad for x in inputs)
    exact_inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    out = case.reference(*inputs)
    grad = torch.randn_like(out) if wants else None
    exact = call(case.reference, exact_inputs, None if grad is None else grad.double())
    row = {"error": error(call(case.kernel, inputs, grad), exact),
           "reference_error": error(call(case.reference, inputs, grad), exact)}
    del exact, exact_inputs, out
    if device.type != "cuda":
        return row
    torch._dynamo.reset()
    for name, function in (("kernel_ms", case.kernel), ("eager_ms", case.reference),
                           ("compiled_ms", torch.compile(case.reference, dynamic=False))):
        row[name] = milliseconds(lambda f=function: call(f, inputs, grad), repeats)
        row[name.replace("_ms", "_mib")] = peak_mib(lambda f=function: call(f, inputs, grad))
    seconds = row["kernel_ms"] / 1e3
    row |= {"tflops": case.flops / seconds / 1e12, "gb_per_s": case.bytes / seconds / 1e9}
    name = torch.cuda.get_device_name(device)
    peak, rate = kernels.peak_flops(device), next((v for k, v in BANDWIDTH.items() if k in name), 0)
    if peak and rate:
        row["roofline"] = max(case.flops / peak, case.bytes / rate) / seconds
    return row


def cells(row: dict) -> list[str]:
    """A row of the table. Columns that a CPU cannot fill are left out there."""
    shown = [row["kernel"], row["shape"], row["dtype"]]
    if "failed" in row:
        return [*shown, failure(row)]
    if "kernel_ms" in row:
        ms = [row[name] for name in ("kernel_ms", "eager_ms", "compiled_ms")]
        share = f"{row['roofline']:.0%}" if "roofline" in row else "-"
        shown += [*(f"{x:.3f}" for x in ms), f"{ms[1] / ms[0]:.2f}", f"{ms[2] / ms[0]:.2f}",
                  f"{row['kernel_mib']:.0f}", f"{row['compiled_mib']:.0f}",
                  f"{row['tflops']:.0f}", f"{row['gb_per_s']:.0f}", share]
    return [*shown, f"{row['error']:.1e}", f"{row['reference_error']:.1e}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy shapes; always without a GPU")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the rows to this file, each when it is "
                        "measured; those that it holds already are kept")
    parser.add_argument("--again", action="store_true", help="measure anew what the file holds")
    args = parser.parse_args(arguments)
    if kernels.triton is None:
        parser.exit(1, "bench/kernels.py: needs Triton: pip install triton\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    toy = args.quick or device == "cpu"
    here = machine(toy)
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    times = ["ms", "eager ms", "compiled ms", "eager/ours", "compiled/ours", "MiB", "compiled MiB",
             "TFLOP/s", "GB/s", "of roofline"] if device == "cuda" else []
    head = ["kernel", "shape", "dtype", *times, "error", "reference's"]
    print(f"\n| {' | '.join(head)} |\n| {' | '.join(['---'] * 3 + ['---:'] * (len(head) - 3))} |")
    tasks = [({"kernel": case.name, "shape": case.shape, "dtype": str(case.dtype)[6:]},
              partial(measure, case, args.repeats))
             for cases in CASES for case in cases(toy, device) if args.only in case.name]
    for row in measured(tasks, args.json, here, args.again):
        print(f"| {' | '.join(cells(row))} |", flush=True)
        if "failed" in row and device == "cuda":
            torch.cuda.synchronize()  # raises where the device's context is lost: nothing else runs


if __name__ == "__main__":
    main()
