"""Products in fp8 with static scales: the head of record #19 and later."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import jit, tl, triton


def has_fp8(device: torch.device) -> bool:
    """Whether `device` multiplies fp8: compute capability 8.9 and later. CPUs emulate it, entry by
    entry: right, and minutes where a GPU takes a millisecond."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def check_fp8(device: torch.device) -> None:
    """Raises ValueError where `device` cannot multiply fp8."""
    if not has_fp8(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ValueError(f"--head fp8: {name} does not multiply fp8 (GPUs of compute capability "
                         "8.9 and later do); --head bf16 trains without, and the log says so")


def quantize(x: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`factor` x in fp8, and its transpose: fp8 products want their first factor in rows and their
    second in columns, and what is a first factor in one of them is a second in another."""
    largest = torch.finfo(dtype).max  # the cast itself would make NaN or inf of what is larger
    x8 = (x.float() * factor).clamp(-largest, largest).to(dtype)
    return x8, x8.T.contiguous()


class Fp8Products:
    """The head's three products in fp8 with static scales (record #19), a chunk of rows at a time.

    x (N, C) and w (V, C) in e4m3, the summed loss's gradient in e5m2, each multiplied by its factor
    before the cast. Logits and dx in `dtype`, dw in fp32. Dimensions must be multiples of 16.
    """

    def __init__(self, x_NC: Tensor, weight_VC: Tensor, dtype: torch.dtype,
                 factors: tuple[float, float, float], quantize: Callable = quantize):
        self.dtype, self.grad_factor = dtype, factors[2]
        self.x_NC, self.x_CN = quantize(x_NC.to(dtype), factors[0], torch.float8_e4m3fn)
        self.w_VC, self.w_CV = quantize(weight_VC, factors[1], torch.float8_e4m3fn)
        self.scales = [torch.full((), 1 / factor, device=x_NC.device) for factor in factors]

    def logits(self, rows: slice) -> Tensor:
        x_scale, w_scale, _ = self.scales
        return torch._scaled_mm(self.x_NC[rows], self.w_VC.T, x_scale, w_scale,
                                out_dtype=self.dtype, use_fast_accum=self.x_NC.is_cuda)

    def add_grads(self, rows: slice, g_nV: Tensor, g_Vn: Tensor, dx_NC: Tensor,
                  dw_VC: Tensor) -> None:
        """dx_NC[rows] = g w, and dw_VC += g^T x; the first chunk overwrites dw_VC."""
        x_scale, w_scale, g_scale = self.scales
        dx_NC[rows] = torch._scaled_mm(g_nV, self.w_CV.T, g_scale, w_scale, out_dtype=self.dtype)
        dw = torch._scaled_mm(g_Vn, self.x_CN[:, rows].T, g_scale, x_scale,
                              out_dtype=dw_VC.dtype)
        dw_VC.add_(dw) if rows.start else dw_VC.copy_(dw)


# --- Triton ---------------------------------------------------------------------------------------

@jit
def _transpose_kernel(x, out, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    tile = tl.load(x + r[:, None] * columns + c[None, :],
                   mask=(r < rows)[:, None] & (c < columns)[None, :])
    tl.store(out + c[:, None] * rows + r[None, :], tl.trans(tile),
             mask=(c < columns)[:, None] & (r < rows)[None, :])


@torch.library.custom_op("speedrun::transpose_fp8", mutates_args=())
def transpose_fp8(x8: Tensor) -> Tensor:
    """x8.T.contiguous() of a contiguous matrix, in tiles: bytes that are read along rows are
    written along rows too, where a plain copy would scatter them one by one."""
    rows, columns = x8.shape
    out = x8.new_empty(columns, rows)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    _transpose_kernel[grid](x8.view(torch.uint8), out.view(torch.uint8), rows, columns, 128, 128)
    return out


@transpose_fp8.register_fake
def _(x8):
    return x8.new_empty(x8.shape[1], x8.shape[0])
