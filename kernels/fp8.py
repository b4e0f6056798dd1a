"""Products in fp8 with static scales: the head of record #19 and later."""

import torch
from torch import Tensor


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


def _fp8(x: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max  # the cast itself would make NaN or inf of what is larger
    return (x.float() * factor).clamp(-largest, largest).to(dtype)


class Fp8Linear(torch.autograd.Function):
    """x W^T with all three products in fp8 and static scales (record #19).

    x (N, C) and w (V, C) in e4m3, the gradient in e5m2, each multiplied by its factor before the
    cast. Output and dx in x's dtype, dw in fp32. Dimensions must be multiples of 16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, x_factor: float, w_factor: float,
                grad_factor: Tensor) -> Tensor:
        x8, w8 = _fp8(x, x_factor, torch.float8_e4m3fn), _fp8(w, w_factor, torch.float8_e4m3fn)
        ones = torch.ones((), device=x.device)
        ctx.save_for_backward(x8, w8, ones / x_factor, ones / w_factor, grad_factor)
        ctx.dtype = x.dtype
        return torch._scaled_mm(x8, w8.T, ones / x_factor, ones / w_factor, out_dtype=x.dtype,
                                use_fast_accum=x.is_cuda)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x8, w8, x_scale, w_scale, grad_factor = ctx.saved_tensors
        g8 = _fp8(grad, grad_factor, torch.float8_e5m2)
        g_scale = grad_factor.reciprocal()
        dx = torch._scaled_mm(g8, w8.T.contiguous().T, g_scale, w_scale, out_dtype=ctx.dtype)
        dw = torch._scaled_mm(g8.T.contiguous(), x8.T.contiguous().T, g_scale, x_scale,
                              out_dtype=torch.float32)
        return dx, dw, None, None, None
