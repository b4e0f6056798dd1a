"""One optimizer step against torch.optim.Muon, in one run: milliseconds and error against the SVD.

    python bench/muon_step.py            pocket shapes and GPT-2 124M's, two minutes
    python bench/muon_step.py --quick    pocket shapes, 30 seconds
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python bench/muon_step.py --quick --no_units
                                         as on a CPU without bf16 units: both modes in plain fp32

torch's optimizer and the modes of ours take turns on the same shapes, so that a busy machine slows
all of them; the table gives each one's best step and how many times as fast as torch's it is.
Error: ||update - U V^T||_F / ||U V^T||_F of the direction alone, on a Gaussian matrix and on one of
rank 8, with the share of that update's energy outside the true row and column spaces.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.optim._muon import _zeropower_via_newtonschulz

import muon


def layer_shapes(width: int, num_layers: int) -> list[tuple[int, int]]:
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return layer * num_layers


def make(kind: str, shapes: list, device: str):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device=device) / s[1] ** 0.5) for s in shapes]
    if kind == "torch":
        optimizer = torch.optim.Muon(params, lr=0.02)
    else:
        optimizer = muon.Muon(params, lr=0.02, mode=kind)
    for p in params:
        g = torch.randn_like(p)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)
    return optimizer


MODES = ("fast", "accurate")


def best_steps(shapes: list, repeats: int, device: str) -> dict[str, float]:
    optimizers = {kind: make(kind, shapes, device) for kind in ("torch", *MODES)}
    best = dict.fromkeys(optimizers, float("inf"))
    for repeat in range(repeats + 1):
        for kind, optimizer in optimizers.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 1:
                best[kind] = min(best[kind], 1e3 * (time.perf_counter() - start))
    return best


def errors(shape: tuple[int, int], device: str) -> list[str]:
    source = torch.Generator().manual_seed(0)
    rows, cols = shape
    gauss = torch.randn(rows, cols, generator=source, dtype=torch.float64)
    left, right = (torch.randn(n, 8, generator=source, dtype=torch.float64) for n in shape)
    low = left @ right.T
    U, _, Vh = torch.linalg.svd(gauss, full_matrices=False)
    A, _, Bh = torch.linalg.svd(low, full_matrices=False)
    lines = []
    theirs = functools.partial(_zeropower_via_newtonschulz, ns_coefficients=muon.JORDAN,
                               ns_steps=5, eps=1e-7)  # fmt: skip
    functions = {"torch, jordan": theirs}
    for method in ("jordan", "polar_express"):
        for mode in MODES:
            function = functools.partial(muon.orthogonalize, method=method, mode=mode)
            functions[f"{mode}, {method}"] = function
    for name, function in functions.items():
        X = function(gauss.float().to(device)).double().cpu()
        gauss_error = (X - U @ Vh).norm() / (U @ Vh).norm()
        X, polar = function(low.float().to(device)).double().cpu(), A[:, :8] @ Bh[:8]
        inside = A[:, :8] @ (A[:, :8].T @ X @ Bh[:8].T) @ Bh[:8]
        noise = (X - inside).square().sum() / X.square().sum()
        rank_error = (X - polar).norm() / polar.norm()
        lines.append(
            f"| {rows}x{cols} | {name} | {gauss_error:.3f} | {rank_error:.3f} | {noise:.4f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="pocket shapes only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no_units", action="store_true", help="as if the CPU had none")
    options = parser.parse_args()
    if options.no_units:
        muon.bf16_units = lambda: False
    shapes = [("pocket 64 x 4 layers", layer_shapes(64, 4), 40),
              ("pocket 128 x 4 layers", layer_shapes(128, 4), 40),
              ("pocket 192 x 6 layers", layer_shapes(192, 6), 25)]  # fmt: skip
    if not options.quick:
        shapes.append(("GPT-2 124M's, 768 x 4 layers", layer_shapes(768, 4), 2))
    columns = " | ".join(f"{mode} ms | times torch" for mode in MODES)
    print(f"| shapes | torch ms | {columns} |")
    print("| --- " * (2 + 2 * len(MODES)) + "|")
    for name, layers, repeats in shapes:
        ms = best_steps(layers, repeats, options.device)
        cells = " | ".join(f"{ms[mode]:.2f} | {ms['torch'] / ms[mode]:.2f}x" for mode in MODES)
        print(f"| {name} | {ms['torch']:.2f} | {cells} |", flush=True)
    print("\n| matrix | products | error, Gaussian | error, rank 8 | noise energy, rank 8 |")
    print("| --- | --- | --- | --- | --- |")
    for shape in ((192, 192),) if options.quick else ((768, 768), (3072, 768)):
        print("\n".join(errors(shape, options.device)), flush=True)


if __name__ == "__main__":
    main()
