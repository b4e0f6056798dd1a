"""The loss of the language-model head in chunks of tokens, forward and backward in one pass.

With the softcap f, logits z = x W^T and K targets a position of weights w_k (multi-token
prediction; K = 1, w = 1 is plain cross-entropy), W_n the sum of the weights of position n's targets
that exist:

    loss    = sum_n [ W_n logsumexp(f(z_n)) - sum_k w_k f(z_n)[y_nk] ]
    dloss/dz = (W_n softmax(f(z_n)) - sum_k w_k onehot(y_nk)) f'(z_n)

Both need only the rows of z that are there, so a chunk's logits live until its share of dx and dW
is added up, and nothing of size (N, V) ever does: 64K tokens over 50,304 rows would be 6.6 GB in
bf16 and 13 GB in fp32. K targets cost one softmax. The gradient is that of the summed loss; what
the trainer divides by arrives in backward and multiplies dx and dW.

Shapes: N tokens in all, n of a chunk, C model_dim, V vocabulary, K targets a token. Known
elsewhere as the fused linear cross-entropy of Liger and the one-pass loss of record #79.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import jit, tl, triton
from kernels.fp8 import Fp8Products, quantize, transpose_fp8

# --- the curve and the targets --------------------------------------------------------------------


class Softcap(NamedTuple):
    """cap * tanh((z + shift) / div), cap * sigmoid((z + shift) / div), or none. Constants of the
    recipe, so that they are compiled in."""

    kind: str = "none"
    cap: float = 1.0
    div: float = 1.0
    shift: float = 0.0

    @property
    def bounded(self) -> bool:
        """Whether exp(f - cap) neither overflows nor underflows in fp32 for any f in [-cap, cap]:
        then logsumexp needs no maximum, and one sweep does."""
        return self.kind != "none" and self.cap <= 40


def softcapped(z: Tensor, softcap: Softcap) -> Tensor:
    if softcap.kind == "none":
        return z
    squash = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[softcap.kind]
    return softcap.cap * squash((z + softcap.shift) / softcap.div)


def targets_ahead(targets_BT: Tensor, num_targets: int) -> Tensor:
    """(B*T, K): each position's next tokens; -1 where they would lie in the next row."""
    ahead_BTK = F.pad(targets_BT, (0, num_targets - 1), value=-1).unfold(1, num_targets, 1)
    return ahead_BTK.flatten(0, 1)


# --- one chunk: plain torch -----------------------------------------------------------------------

def softcapped_loss_and_grad(
        logits_NV: Tensor, targets_NK: Tensor, weights_K: Tensor, softcap: Softcap,
        with_grad: bool = True, fp8_factor: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of each token (N,), fp32, and its gradient with respect to the logits.

    The gradient comes in the logits' dtype and may lie in their memory: they are used up. With
    fp8_factor it comes in e5m2, multiplied by it, and a second time as (V, N), since fp8 products
    want both layouts. Targets below 0 do not count. Inside all is fp32 (fp64 for fp64).

    Eager, the operations work in place on a chunk that fits in cache. Compiled they fuse into one
    sweep that reduces and one that writes.
    """
    # A copy costs nothing then. A mutation would, and torch 2.11 orders it wrong: with one target
    # its C++ read the targets' logits where the gradients lay already.
    compiling = torch.compiler.is_compiling()
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    at_NK = targets_NK.clamp(min=0)
    weight_NK = torch.where(targets_NK >= 0, weights_K.to(dtype), 0)
    weight_N1 = weight_NK.sum(1, keepdim=True)
    hit_NK = softcapped(logits_NV.gather(1, at_NK).to(dtype), softcap)

    z_NV = logits_NV.to(dtype, copy=compiling)
    if softcap.kind == "none":
        base = z_NV.amax(1, keepdim=True)
        e_NV = z_NV.sub_(base).exp_()
    else:
        if softcap.shift:
            z_NV.add_(softcap.shift)
        z_NV.div_(softcap.div)
        squashed_NV = z_NV.tanh_() if softcap.kind == "tanh" else z_NV.sigmoid_()
        if softcap.bounded:
            base = softcap.cap
            e_NV = torch.sub(squashed_NV, 1).mul_(base).exp_()
        else:
            base = softcap.cap * squashed_NV.amax(1, keepdim=True)
            e_NV = torch.mul(squashed_NV, softcap.cap).sub_(base).exp_()
    sum_N1 = e_NV.sum(1, keepdim=True)
    loss_N = (weight_N1 * (sum_N1.log() + base)).squeeze(1) - (weight_NK * hit_NK).sum(1)
    if not with_grad:
        return loss_N, None, None

    slope = 1.0 if softcap.kind == "none" else softcap.cap / softcap.div
    g_NV = e_NV.mul_(slope * weight_N1 / sum_N1)
    if compiling:  # comparing fuses into the sweep; a scatter would be a sweep of its own
        columns_V = torch.arange(g_NV.size(1), device=g_NV.device)
        for y_N1, w_N1 in zip(targets_NK.split(1, 1), weight_NK.split(1, 1)):
            g_NV = g_NV - torch.where(columns_V == y_N1, slope * w_N1, 0)
    else:
        g_NV.scatter_add_(1, at_NK, -slope * weight_NK)
    if softcap.kind != "none":  # times 1 - t^2, or s - s^2; g is used once, or it would be stored
        first = squashed_NV if softcap.kind == "sigmoid" else g_NV.new_ones(())
        g_NV = g_NV.mul_(torch.addcmul(first, squashed_NV, squashed_NV, value=-1))

    if fp8_factor is not None:
        return loss_N, *quantize(g_NV, fp8_factor, torch.float8_e5m2)
    if compiling:
        return loss_N, g_NV.to(logits_NV.dtype), None
    return loss_N, g_NV if z_NV is logits_NV else logits_NV.copy_(g_NV), None


# --- one chunk: Triton ----------------------------------------------------------------------------

@jit
def _squash(z, KIND: tl.constexpr, DIV: tl.constexpr, SHIFT: tl.constexpr, BOUNDED: tl.constexpr):
    """tanh or sigmoid of (z + shift) / div; z itself without a softcap."""
    u = (z + SHIFT) / DIV
    if KIND == "tanh":
        t = 2 * tl.sigmoid(2 * u) - 1
        if not BOUNDED:  # the difference is off by 1e-7, which a large cap would multiply
            t = tl.where(tl.abs(u) < 0.05, u - u * u * u / 3, t)
        return t
    elif KIND == "sigmoid":
        return tl.sigmoid(u)
    else:
        return z


@jit
def _loss_kernel(logits, targets, weights, loss, grad, factor, V: tl.constexpr,
                 KIND: tl.constexpr, CAP: tl.constexpr, DIV: tl.constexpr, SHIFT: tl.constexpr,
                 BOUNDED: tl.constexpr, NUM_TARGETS: tl.constexpr, WITH_GRAD: tl.constexpr,
                 FP8: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program: a sweep for logsumexp, a second, over a row that L2 still holds, for the
    gradient. `grad` may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    targets += row * NUM_TARGETS

    weight = 0.0
    hit = 0.0
    for k in tl.static_range(NUM_TARGETS):
        y = tl.load(targets + k)
        w = tl.where(y >= 0, tl.load(weights + k), 0.0)
        z = tl.load(logits + y, mask=(y >= 0) & (y < V), other=0.0).to(tl.float32)
        f = CAP * _squash(z, KIND, DIV, SHIFT, BOUNDED)
        hit += w * tl.where(y < V, f, float("nan"))  # a target that is no token spoils the loss
        weight += w

    top_B = tl.full((BLOCK,), -1e30, tl.float32)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        z_B = tl.load(logits + at_B, mask=at_B < V, other=0.0).to(tl.float32)
        f_B = CAP * _squash(z_B, KIND, DIV, SHIFT, BOUNDED)
        if BOUNDED:
            sum_B += tl.where(at_B < V, tl.exp(f_B - CAP), 0.0)
        else:
            f_B = tl.where(at_B < V, f_B, -1e30)
            new_B = tl.maximum(top_B, f_B)
            e_B = tl.where(at_B < V, tl.exp(f_B - new_B), 0.0)
            sum_B = sum_B * tl.exp(top_B - new_B) + e_B
            top_B = new_B
    if BOUNDED:
        lse = tl.log(tl.sum(sum_B, 0)) + CAP
    else:
        top = tl.max(top_B, 0)
        lse = tl.log(tl.sum(sum_B * tl.exp(top_B - top), 0)) + top
    tl.store(loss + row, weight * lse - hit)

    if WITH_GRAD:
        tl.debug_barrier()  # all have read the targets' logits before the first is overwritten
        grad += row * V
        for start in range(0, V, BLOCK):
            at_B = start + tl.arange(0, BLOCK)
            z_B = tl.load(logits + at_B, mask=at_B < V, other=0.0).to(tl.float32)
            s_B = _squash(z_B, KIND, DIV, SHIFT, BOUNDED)
            g_B = weight * tl.exp(CAP * s_B - lse)
            for k in tl.static_range(NUM_TARGETS):
                y = tl.load(targets + k)
                g_B -= tl.where(at_B == y, tl.load(weights + k), 0.0)
            if KIND == "tanh":
                g_B *= (1 - s_B * s_B) * (CAP / DIV)
            elif KIND == "sigmoid":
                g_B *= s_B * (1 - s_B) * (CAP / DIV)
            if FP8:
                g_B *= factor  # and no further than e5m2 reaches; a NaN stays one
                g_B = tl.maximum(g_B, -57344.0, propagate_nan=tl.PropagateNan.ALL)
                g_B = tl.minimum(g_B, 57344.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(grad + at_B, g_B.to(grad.dtype.element_ty), mask=at_B < V)


def _launch(logits_NV: Tensor, targets_NK: Tensor, weights_K: Tensor, grad_NV: Tensor,
            softcap: Softcap, with_grad: bool, factor: float | None = None) -> Tensor:
    N, V = logits_NV.shape
    assert logits_NV.is_contiguous() and grad_NV.is_contiguous()
    loss_N = logits_NV.new_empty(N, dtype=torch.float32)
    _loss_kernel[(N,)](
        logits_NV, targets_NK.contiguous(), weights_K, loss_N, grad_NV, factor or 1.0, V,
        *softcap, softcap.bounded, targets_NK.size(1), with_grad, factor is not None,
        min(4096, triton.next_power_of_2(V)), num_warps=8)
    return loss_N


@torch.library.custom_op("speedrun::softcapped_loss_", mutates_args=("logits_NV",))
def softcapped_loss_(logits_NV: Tensor, targets_NK: Tensor, weights_K: Tensor, kind: str,
                     cap: float, div: float, shift: float, with_grad: bool) -> Tensor:
    """The loss of each token; with_grad, the gradient takes the logits' place."""
    return _launch(logits_NV, targets_NK, weights_K, logits_NV, Softcap(kind, cap, div, shift),
                   with_grad)


@softcapped_loss_.register_fake
def _(logits_NV, targets_NK, weights_K, kind, cap, div, shift, with_grad):
    return logits_NV.new_empty(len(logits_NV), dtype=torch.float32)


@torch.library.custom_op("speedrun::softcapped_loss_fp8", mutates_args=())
def softcapped_loss_fp8(logits_NV: Tensor, targets_NK: Tensor, weights_K: Tensor, kind: str,
                        cap: float, div: float, shift: float,
                        factor: float) -> tuple[Tensor, Tensor]:
    """The loss of each token, and `factor` times the gradient in e5m2."""
    # The interpreter's cast to fp8 loses carries, so torch casts there.
    stored = torch.float32 if triton.knobs.runtime.interpret else torch.float8_e5m2
    grad_NV = torch.empty_like(logits_NV, dtype=stored)
    loss_N = _launch(logits_NV, targets_NK, weights_K, grad_NV, Softcap(kind, cap, div, shift),
                     True, factor)
    return loss_N, grad_NV.to(torch.float8_e5m2)


@softcapped_loss_fp8.register_fake
def _(logits_NV, targets_NK, weights_K, kind, cap, div, shift, factor):
    return (logits_NV.new_empty(len(logits_NV), dtype=torch.float32),
            torch.empty_like(logits_NV, dtype=torch.float8_e5m2))


def triton_loss_and_grad(
        logits_NV: Tensor, targets_NK: Tensor, weights_K: Tensor, softcap: Softcap,
        with_grad: bool = True, fp8_factor: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softcapped_loss_and_grad in one kernel: logits are read from memory once, and the gradient
    is written once."""
    if with_grad and fp8_factor is not None:
        loss_N, g_NV = softcapped_loss_fp8(logits_NV, targets_NK, weights_K, *softcap, fp8_factor)
        return loss_N, g_NV, transpose_fp8(g_NV)
    loss_N = softcapped_loss_(logits_NV, targets_NK, weights_K, *softcap, with_grad)
    return loss_N, logits_NV if with_grad else None, None


# --- all chunks -----------------------------------------------------------------------------------

class Bodies(NamedTuple):
    """What is worth compiling: everything in the loss that is not a matrix product."""

    loss_and_grad: Callable = softcapped_loss_and_grad
    quantize: Callable = quantize


REFERENCES, KERNELS = Bodies(), Bodies(triton_loss_and_grad)


def compiled(bodies: Bodies, backend: str = "inductor") -> Bodies:
    """A graph for each shape of chunk, each number of targets, with and without gradients; never
    one for all chunks. The Triton kernel is one already."""
    return Bodies(*(body if body is triton_loss_and_grad else torch.compile(
        body, dynamic=False, backend=backend) for body in bodies))


class Products:
    """The head's three products in `dtype`, a chunk of rows at a time; see Fp8Products."""

    grad_factor = None

    def __init__(self, x_NC: Tensor, weight_VC: Tensor, dtype: torch.dtype):
        self.x_NC, self.w_VC, self.dtype = x_NC.to(dtype), weight_VC.to(dtype), dtype

    def logits(self, rows: slice) -> Tensor:
        return F.linear(self.x_NC[rows], self.w_VC)

    def add_grads(self, rows: slice, g_nV: Tensor, g_Vn: None, dx_NC: Tensor,
                  dw_VC: Tensor) -> None:
        """dx_NC[rows] = g w, and dw_VC += g^T x; the first chunk overwrites dw_VC."""
        torch.mm(g_nV, self.w_VC, out=dx_NC[rows])
        x_nC, g_Vn, beta = self.x_NC[rows], g_nV.T, int(rows.start > 0)
        if g_nV.dtype == dw_VC.dtype:
            torch.addmm(dw_VC, g_Vn, x_nC, beta=beta, out=dw_VC)
        elif g_nV.device.type == "cpu":
            torch.addmm(dw_VC, g_Vn.to(dw_VC.dtype), x_nC.to(dw_VC.dtype), beta=beta, out=dw_VC)
        else:  # bf16 in, added up in fp32 on the way
            torch.addmm(dw_VC, g_Vn, x_nC, out_dtype=dw_VC.dtype, beta=beta, out=dw_VC)


def chunk_tokens(num_tokens: int, vocab_rows: int, device: torch.device) -> int:
    """Tokens whose logits exist at once: a power of two within a budget, or less where that makes
    all chunks equal. A multiple of 16, which fp8 products need.

    GPU: 4 bytes a logit (bf16, and its gradient in bf16 or in fp8 in two layouts) within
    2.5 GB: 8,192 tokens at 50,304 rows, long enough for the products. Eager, with bodies neither
    compiled nor in Triton, fp32 takes three times that. CPU: what stays in cache.
    """
    logits = 2.5e9 / 4 if device.type == "cuda" else 2**19
    limit = 2 ** max(4, int(math.log2(logits / vocab_rows)))
    fewest = max(1, math.ceil(num_tokens / limit))
    chunks = next((n for n in range(fewest, 2 * fewest) if num_tokens % (16 * n) == 0), fewest)
    return 16 * math.ceil(num_tokens / chunks / 16)


@torch.no_grad()
def _sweep(products, targets_NK: Tensor, weights_K: Tensor, softcap: Softcap,
           loss_and_grad: Callable, size: int,
           grads: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The summed loss; dx and dW go into `grads` where they are wanted."""
    num_tokens, losses = len(targets_NK), []
    for start in range(0, num_tokens, size):
        rows = slice(start, min(start + size, num_tokens))
        logits_nV = products.logits(rows)
        loss_n, *g = loss_and_grad(logits_nV, targets_NK[rows], weights_K, softcap,
                                   grads is not None, products.grad_factor)
        losses.append(loss_n)
        if grads is not None:
            products.add_grads(rows, *g, *grads)
        del logits_nV, g  # else the next chunk's are allocated beside them
    return torch.cat(losses).sum()


class _HeadLoss(torch.autograd.Function):
    """head_loss where gradients are wanted: forward computes them, backward multiplies them by the
    gradient of the sum, which is a number."""

    @staticmethod
    def forward(ctx, x_NC: Tensor, weight_VC: Tensor, sweep: Callable,
                dtype: torch.dtype) -> Tensor:
        dx_NC = torch.empty_like(x_NC, dtype=dtype)
        dw_VC = torch.empty_like(weight_VC, dtype=torch.promote_types(dtype, torch.float32))
        loss = sweep(grads=(dx_NC, dw_VC))
        ctx.save_for_backward(dx_NC, dw_VC)
        ctx.dtypes = x_NC.dtype, weight_VC.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        dx_NC, dw_VC = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        dw = torch.empty_like(dw_VC, dtype=weight_dtype)  # multiplied and cast in one go
        return dx_NC.to(x_dtype) * grad, torch.mul(dw_VC, grad, out=dw), None, None


def head_loss(x_NC: Tensor, weight_VC: Tensor, targets_NK: Tensor, weights_K: Tensor,
              softcap: Softcap, dtype: torch.dtype,
              fp8_factors: tuple[float, float, float] | None = None, bodies: Bodies = REFERENCES,
              size: int | None = None) -> Tensor:
    """The weighted cross-entropy in nats of targets_NK (-1: none), summed: a scalar in fp32.

    Products are in `dtype`, or in fp8 with the factors of x, w and the summed loss's gradient.
    dW is added up over chunks in fp32. `size`: tokens of a chunk, none: chunk_tokens.
    """
    with torch.no_grad():
        products = Products(x_NC, weight_VC, dtype) if fp8_factors is None else Fp8Products(
            x_NC, weight_VC, dtype, fp8_factors, bodies.quantize)
    size = size or chunk_tokens(len(x_NC), len(weight_VC), x_NC.device)
    sweep = partial(_sweep, products, targets_NK, weights_K, softcap, bodies.loss_and_grad, size)
    if torch.is_grad_enabled() and (x_NC.requires_grad or weight_VC.requires_grad):
        return _HeadLoss.apply(x_NC, weight_VC, sweep, dtype)
    return sweep()
