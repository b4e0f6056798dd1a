"""Products with symmetric results for Newton-Schulz, at half the work: X X^T and b A + c A A.

    Muon(params, products=(kernels.symmetric.gram, kernels.symmetric.polynomial))

Only tiles on and below the diagonal are computed; each one below it is stored a second time,
mirrored, so that the result is symmetric bit for bit. One kernel does both: for a symmetric A the
polynomial is b A + c A A^T. Record #27 introduced the idea to the speedrun. The references are
`muon._gram` and `muon._polynomial`, one batched product each.

Shapes: K matrices in a batch, X (K, m, n), A (K, m, m). Storage bf16, fp16 or fp32 in any strides,
sums in fp32 (fp32 inputs are not rounded to TF32), results contiguous in the input's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import INTERPRET, jit, tl, triton


@jit
def _symmetric_kernel(x_ptr, out_ptr, m, n: tl.constexpr, stride_matrix, stride_row, stride_col,
                      b, c, ADD: tl.constexpr, UPCAST: tl.constexpr,
                      BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of c X X^T (+ b X if ADD, where m = n) and its mirror image."""
    # Program t has tile (i, j) of the lower triangle, row by row: t = i (i + 1) / 2 + j. Solved for
    # i at the middle of the row's first step, so that fp32 rounds right up to 500 rows of tiles.
    # The order needs no grouping: all programs of some matrices run at once and share them in L2.
    t = tl.program_id(0)
    i = (tl.sqrt(2.0 * t + 0.5) - 0.5).to(tl.int32)
    j = t - i * (i + 1) // 2
    matrix = tl.program_id(1).to(tl.int64)
    x_ptr += matrix * stride_matrix
    out_ptr += matrix * m * m
    rows, cols = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    ks = tl.arange(0, BLOCK_K)
    # Rows beyond the edge wrap around to some that exist: their sums are never stored.
    left = x_ptr + (rows % m)[:, None] * stride_row + ks[None, :] * stride_col
    right = x_ptr + (cols % m)[None, :] * stride_row + ks[:, None] * stride_col
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, n, BLOCK_K):
        u = tl.load(left, mask=ks[None, :] < n - k, other=0.0)
        v = tl.load(right, mask=ks[:, None] < n - k, other=0.0)
        if UPCAST:  # the interpreter's products of bf16 are wrong
            u, v = u.to(tl.float32), v.to(tl.float32)
        product = tl.dot(u, v, product, input_precision="ieee")
        left += BLOCK_K * stride_col
        right += BLOCK_K * stride_col
    product *= c
    inside = (rows < m)[:, None] & (cols < m)[None, :]
    if ADD:
        addend = x_ptr + rows[:, None] * stride_row + cols[None, :] * stride_col
        product += b * tl.load(addend, mask=inside, other=0.0).to(tl.float32)
    tile = product.to(out_ptr.dtype.element_ty)
    if i == j:  # rounding may differ across the diagonal: the lower half decides
        tile = tl.where(rows[:, None] >= cols[None, :], tile, tl.trans(tile))
    else:
        tl.store(out_ptr + cols[None, :] * m + rows[:, None], tile, mask=inside)
    tl.store(out_ptr + rows[:, None] * m + cols[None, :], tile, mask=inside)


def _configs() -> list:
    if INTERPRET:
        return [triton.Config({"BLOCK": 32, "BLOCK_K": 32})]
    # All leave room for two or more programs on a multiprocessor of Hopper, so that the stores of
    # one overlap with products of another: n = 768 is 12 steps only.
    return [triton.Config({"BLOCK": block, "BLOCK_K": 64}, num_warps=warps, num_stages=stages)
            for block, warps, stages in ((128, 8, 3), (128, 4, 3), (64, 4, 4), (64, 4, 3))]


def _for_dtype(configs: list, arguments: dict, **_) -> list:
    """Small tiles for fp32, which has no tensor cores to fill: those compile fast."""
    wide = arguments["x_ptr"].dtype == torch.float32
    return [config for config in configs if not wide or config.kwargs["BLOCK"] == 64]


if triton is not None:  # choices are kept on disk beside the compiled kernels
    _symmetric_kernel = triton.autotune(
        _configs(), key=["m", "n", "ADD"], cache_results=True,
        prune_configs_by={"early_config_prune": _for_dtype})(_symmetric_kernel)


def _launch(x: Tensor, b: float, c: float, add: bool) -> Tensor:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"symmetric products: expected bf16, fp16 or fp32, got {x.dtype}")
    K, m, n = x.shape
    out = x.new_empty(K, m, m)
    if out.numel() == 0:
        return out

    def grid(config: dict) -> tuple[int, int]:
        side = triton.cdiv(m, config["BLOCK"])
        return side * (side + 1) // 2, K

    _symmetric_kernel[grid](x, out, m, n, *x.stride(), b, c, ADD=add, UPCAST=INTERPRET)
    return out


@torch.library.custom_op("speedrun::gram", mutates_args=())
def gram(X: Tensor) -> Tensor:
    """X X^T for every matrix of X (K, m, n) -> (K, m, m)."""
    return _launch(X, 0.0, 1.0, add=False)


@gram.register_fake
def _(X):
    return X.new_empty(X.shape[0], X.shape[1], X.shape[1])


@torch.library.custom_op("speedrun::symmetric_polynomial", mutates_args=())
def polynomial(A: Tensor, b: float, c: float) -> Tensor:
    """b A + c A A for every symmetric A (K, m, m) -> (K, m, m). Where rounding left A not quite
    symmetric, its lower half is what b multiplies, and the product is A A^T."""
    return _launch(A, b, c, add=True)


@polynomial.register_fake
def _(A, b, c):
    return A.new_empty(A.shape)
