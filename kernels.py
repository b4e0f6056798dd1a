"""Everything that is chosen by hardware: how attention is computed, and in which precision.

Each fast path stands beside a plain-torch twin that runs anywhere and is its test's oracle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

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


def attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float) -> Tensor:
    """Causal attention over each row; (B, T, H, D) in, (B, T, H, D) out.

    torch's own SDPA: flash attention on GPUs of sm80 and later, a blocked kernel on CPU.
    """
    y_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2),
        is_causal=True, scale=scale)
    return y_BHTD.transpose(1, 2)
