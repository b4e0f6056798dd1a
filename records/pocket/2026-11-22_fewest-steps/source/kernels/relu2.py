"""relu(x)^2, the activation of the MLPs (So et al. 2021; record #5), by itself and inside the MLP.

`mlp_relu2` puts the activation into the epilogues of the products around it, where the sums are
still in registers. Only y = relu(h)^2 is ever stored: the second weight's gradient needs y anyway,
and relu(h), which the backward pass multiplies by, is sqrt(y), with half of y's rounding error.

                 forward                     backward                           sweeps of (N, F)
    unfused      write h; read h, write y    write dy; read dy and h, write dh  7
    mlp_relu2    write y                     read y, write dh                   3

Calculated: 32,768 tokens of 768 -> 3072 in bf16 move 0.8 GB less a layer, 0.24 ms at 3.35 TB/s, and
h is not kept for the backward pass. What the plain products read is the same in both. Storing
relu(h) instead would need a product of our own, with a squared operand, where cuBLAS serves now.

Shapes: N tokens, C width, F hidden units.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import INTERPRET, jit, tl, triton


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2. Eager it is ReLUSquared; a compiler fuses the plain form to the same, and keeps no
    graph with a Function in its cache."""
    return F.relu(x).square() if torch.compiler.is_compiling() else ReLUSquared.apply(x)


class ReLUSquared(torch.autograd.Function):
    """relu(x)^2 with a backward pass in one sweep: 2 relu(x) grad is zero where relu is, so the
    mask need not be applied again. The same bits as F.relu(x).square(); eager on a CPU, forward and
    backward of (4096, 512) take half the time."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, y, value=2)


@jit
def _product_kernel(a_ptr, b_ptr, y_ptr, out_ptr, M, N, K: tl.constexpr, stride_k, stride_n,
                    BACKWARD: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """One tile of relu(a b)^2, or if BACKWARD of (a b) * 2 sqrt(y), for a (M, K) and b (K, N)."""
    # GROUP rows of tiles are swept column by column, so that few tiles of a and b serve many.
    tile, columns = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    height = min(tl.cdiv(M, BLOCK_M) - first, GROUP)
    tile %= GROUP * columns
    rows = (first + tile % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile // height * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the edge wrap around to some that exist and are never stored.
    left = a_ptr + (rows % M).to(tl.int64)[:, None] * K + ks[None, :]
    right = b_ptr + ks[:, None] * stride_k + (cols % N)[None, :] * stride_n
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        u = tl.load(left, mask=ks[None, :] < K - k, other=0.0)
        v = tl.load(right, mask=ks[:, None] < K - k, other=0.0)
        if UPCAST:  # the interpreter's products of bf16 are wrong
            u, v = u.to(tl.float32), v.to(tl.float32)
        product = tl.dot(u, v, product, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K * stride_k
    offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if BACKWARD:
        product *= 2 * tl.sqrt(tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32))
    else:
        product = tl.where(product < 0, 0.0, product)  # NaN stays; tl.maximum would drop it
        product *= product
    tl.store(out_ptr + offsets, product.to(out_ptr.dtype.element_ty), mask=inside)


def _configs() -> list:
    if INTERPRET:
        return [triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2})]
    return [triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=warps,
                          num_stages=stages)
            for m, n, k, warps, stages in ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
                                           (128, 128, 64, 8, 3), (128, 128, 32, 4, 4),
                                           (64, 64, 32, 4, 3))]


def _for_dtype(configs: list, arguments: dict, **_) -> list:
    """The smallest tiles for fp32, which has no tensor cores to fill: the largest take 11 s to
    compile and spill their registers."""
    return configs[-1:] if arguments["a_ptr"].dtype == torch.float32 else configs


if triton is not None:  # choices are kept on disk beside the compiled kernels; M hardly matters
    _product_kernel = triton.autotune(
        _configs(), key=["N", "K", "BACKWARD"], cache_results=True,
        prune_configs_by={"early_config_prune": _for_dtype})(_product_kernel)


def _launch(a: Tensor, b: Tensor, y: Tensor | None) -> Tensor:
    """relu(a b)^2 without y, else (a b) * 2 sqrt(y)."""
    a, (M, K), N = a.contiguous(), a.shape, b.shape[1]
    out = a.new_empty(M, N)
    if out.numel() == 0:
        return out

    def grid(config: dict) -> tuple[int]:
        return (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)

    _product_kernel[grid](a, b, out if y is None else y.contiguous(), out, M, N, K, *b.stride(),
                          BACKWARD=y is not None, UPCAST=INTERPRET)
    return out


@torch.library.custom_op("speedrun::linear_relu2", mutates_args=())
def linear_relu2(x_NC: Tensor, fc_FC: Tensor) -> Tensor:
    """relu(x fc^T)^2 (N, F), rounded once. No gradients: `mlp_relu2` has them."""
    return _launch(x_NC, fc_FC.T, None)


@linear_relu2.register_fake
def _(x_NC, fc_FC):
    return x_NC.new_empty(x_NC.shape[0], fc_FC.shape[0])


@torch.library.custom_op("speedrun::linear_relu2_backward", mutates_args=())
def linear_relu2_backward(grad_NC: Tensor, proj_CF: Tensor, y_NF: Tensor) -> Tensor:
    """dL/dh (N, F) of y = relu(h)^2 from the gradient of y proj^T."""
    return _launch(grad_NC, proj_CF, y_NF)


@linear_relu2_backward.register_fake
def _(grad_NC, proj_CF, y_NF):
    return grad_NC.new_empty(y_NF.shape)


class _MLPReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NC: Tensor, fc_FC: Tensor, proj_CF: Tensor) -> Tensor:
        y_NF = linear_relu2(x_NC, fc_FC)
        ctx.save_for_backward(x_NC, fc_FC, proj_CF, y_NF)
        return y_NF @ proj_CF.T

    @staticmethod
    def backward(ctx, grad_NC: Tensor):
        x_NC, fc_FC, proj_CF, y_NF = ctx.saved_tensors
        dh_NF = linear_relu2_backward(grad_NC, proj_CF, y_NF)
        return dh_NF @ fc_FC, dh_NF.T @ x_NC, grad_NC.T @ y_NF


def mlp_relu2(x_NC: Tensor, fc_FC: Tensor, proj_CF: Tensor) -> Tensor:
    """relu(x fc^T)^2 proj^T (N, C), the two activations inside Triton products, the other four
    products by torch. One dtype for all three, bf16, fp16 or fp32, sums in fp32; gradients too."""
    dtypes = {t.dtype for t in (x_NC, fc_FC, proj_CF)}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError("mlp_relu2: expected one dtype of bf16, fp16 and fp32, got "
                         f"{x_NC.dtype}, {fc_FC.dtype}, {proj_CF.dtype}")
    return _MLPReLU2.apply(x_NC, fc_FC, proj_CF)


def mlp_relu2_reference(x_NC: Tensor, fc_FC: Tensor, proj_CF: Tensor) -> Tensor:
    """What `mlp_relu2` computes, in plain torch: any device, any dtype."""
    return F.linear(F.relu(F.linear(x_NC, fc_FC)).square(), proj_CF)
