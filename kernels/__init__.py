"""Kernels chosen by hardware, one file each, beside their references in plain torch.

The reference runs anywhere and is the kernel's oracle in the tests. Kernels in Triton run on a CPU
too, slowly, in Triton's interpreter (TRITON_INTERPRET=1); where Triton is not installed their files
still import, and only the references can be called.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU build comes without
    triton = tl = None

INTERPRET = triton is not None and triton.knobs.runtime.interpret

# What --kernels names: the symmetric products of Newton-Schulz, linear + ReLU^2, the head's loss.
# Off by default until a GPU has shown what each is worth.
NAMES = ("symmetric", "relu2", "loss")


def check_kernels(names: frozenset[str], device: torch.device) -> None:
    """Raises ValueError where these Triton kernels cannot run on `device`."""
    if names and triton is None:
        raise ValueError("--kernels: Triton is not installed (torch's builds for GPUs bring it); "
                         "--kernels none trains without")
    if names and device.type != "cuda" and not INTERPRET:
        raise ValueError(f"--kernels {','.join(sorted(names))}: Triton kernels need a GPU, got a "
                         "CPU; --kernels none trains without (TRITON_INTERPRET=1 runs them here, "
                         "to look at them: a step takes minutes)")


DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets; MFU is stated against it.
# A device that is not listed has no MFU rather than a guessed one.
PEAK_FLOPS = {
    "H100 80GB HBM3": 989.4e12, "H100 PCIe": 756e12, "H200": 989.4e12, "GH200": 989.4e12,
    "B200": 2250e12, "A100": 312e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device` in FLOP/s, or None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def jit(function):
    """triton.jit, or the function itself where there is no Triton to run it. Files of kernels begin
    with `from __future__ import annotations`, so that tl.constexpr need not exist."""
    return function if triton is None else triton.jit(function)
