"""Attention inside documents and windows: SDPA on any device, varlen flash attention on GPUs.

Shapes: B rows, T positions a row, H heads, D head_dim; n chunks of Q queries that see K keys.
"""

import importlib.util
import math
import sys
from typing import NamedTuple

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from kernels import DTYPES


class Keys(NamedTuple):
    """Which keys the queries of packed rows see: their own document's, back to a window.

    Either a mask in chunks (any device) or the documents' bounds (varlen attention). Tensors only:
    a Python int that changes during training would make torch.compile build another graph.
    """

    mask_BnQK: Tensor | None = None     # bool: True where the key is seen
    cu_seqlens: Tensor | None = None    # int32: where documents begin, in all rows laid end to end
    bounds: Tensor | None = None        # int64 on the CPU: (window, longest document, documents)


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's varlen attention runs: in bf16, from compute capability 8.0."""
    return dtype == torch.bfloat16 and device.type == "cuda" and (
        torch.cuda.get_device_capability(device) >= (8, 0))


def activate_flash_attention(device: torch.device) -> None:
    """On Hopper take flash attention 3, which torch then uses for both passes, where its module is
    installed and loads; elsewhere flash attention 2 stays, which torch brings. Call it once, before
    training.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and (
            importlib.util.find_spec("flash_attn_interface")):
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch, say
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"flash_attn_interface does not load, flash attention 2 stays: {why}",
                  file=sys.stderr)


def describe_attention(device: torch.device, config) -> str:
    """Which attention a model of this GPTConfig gets on `device`, for the header of a run."""
    if not config.packed:
        return "SDPA, causal"
    if has_varlen(device, DTYPES[config.compute_dtype]):
        flash = torch.nn.attention.current_flash_attention_impl() or "FA2"
        return f"varlen flash attention ({flash}) over documents and windows"
    return "SDPA with masks of documents and windows, in chunks"


def document_ids(tokens_BT: Tensor, bos_id: int) -> Tensor:
    """(B, T): a running number of the document a token is in. `bos_id` opens a document;
    tokens before the first one in a row are document 0."""
    return (tokens_BT == bos_id).cumsum(1)


def packed_keys(doc_BT: Tensor, window: int, dtype: torch.dtype,
                docs_B2: Tensor | None = None) -> Keys:
    """The keys of causal attention inside documents, at most `window` of them, self included.
    `dtype` is that of the queries; `docs_B2`, on the CPU, says how many documents each row has and
    the tokens of its longest (without it varlen attention waits for the device to count them)."""
    if has_varlen(doc_BT.device, dtype):
        return _document_bounds(doc_BT, window, docs_B2)
    return Keys(mask_BnQK=_chunked_mask(doc_BT, window))


def _document_bounds(doc_BT: Tensor, window: int, docs_B2: Tensor | None) -> Keys:
    """Flash attention starts a block for each (queries of the longest document, document, head), so
    both numbers are given to it as they are: at a bound of 8 tokens a document and the row's length
    a 64K row would start 25 million blocks, and its backward take gigabytes."""
    B, T = doc_BT.shape
    starts_BT = torch.ones_like(doc_BT, dtype=torch.bool)
    starts_BT[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    if docs_B2 is None:
        lengths = torch.diff(torch.nonzero(starts_BT.flatten()).flatten(),
                             append=starts_BT.new_tensor([B * T], dtype=torch.int64))
        docs_B2 = torch.stack([torch.tensor(len(lengths)), lengths.max().cpu()])[None]
    # A fixed number of bounds, so that alike rows share a graph; the operator takes those in use.
    # Text with more than one document in 8 tokens stops the device.
    size = B * (T // 8 + 2)
    torch._assert_async(starts_BT.sum() < size)
    starts = torch.nonzero_static(starts_BT.flatten(), size=size, fill_value=B * T).flatten()
    return Keys(cu_seqlens=F.pad(starts, (0, 1), value=B * T).int(),
                bounds=torch.stack([torch.tensor(window), docs_B2[:, 1].max(),
                                    docs_B2[:, 0].sum()]))


def _chunked_mask(doc_BT: Tensor, window: int) -> Tensor:
    """(B, n, Q, K): queries in n chunks of Q, each chunk with the K keys that end where it ends.

    A window much shorter than the row makes most of a T x T mask empty; chunks skip that part.
    """
    B, T = doc_BT.shape
    Q = math.gcd(T, 2 ** max(5, int(math.log2(max(1, window // 2)))))
    before = -(-(window - 1) // Q)  # chunks of keys before the queries' own
    if Q < 16 or (before + 1) * Q >= T:
        Q, before = T, 0
    n, K = T // Q, (before + 1) * Q
    q = torch.arange(T, device=doc_BT.device).view(n, Q, 1)
    k = torch.arange(n, device=doc_BT.device).view(n, 1, 1) * Q - before * Q + torch.arange(
        K, device=doc_BT.device)
    near_nQK = (k >= 0) & (k <= q) & (q - k < window)
    same_BnQK = doc_BT.view(B, n, Q, 1) == doc_BT[:, k.clamp(min=0).view(n, K)].unsqueeze(2)
    return near_nQK & same_BnQK


def attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float,
              keys: Keys | None = None) -> Tensor:
    """Attention of each row; (B, T, H, D) in, (B, T, H, D) out. Without `keys` plainly causal."""
    if keys is None:
        y_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2),
            is_causal=True, scale=scale)
        return y_BHTD.transpose(1, 2)
    if keys.mask_BnQK is not None:
        return _chunked_attention(q_BTHD, k_BTHD, v_BTHD, scale, keys.mask_BnQK)
    flat = (x.flatten(0, 1).contiguous() for x in (q_BTHD, k_BTHD, v_BTHD))
    y, _, _ = packed_attention(*flat, keys.cu_seqlens, keys.bounds, scale)
    return y.view_as(q_BTHD)


def _chunked_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float,
                       mask_BnQK: Tensor) -> Tensor:
    B, n, Q, K = mask_BnQK.shape

    def chunks(x_BTHD: Tensor, before: int) -> Tensor:  # (B*n, H, (before + 1) * Q, D)
        x = x_BTHD.unflatten(1, (n, Q))
        shifted = [F.pad(x[:, :n - j], (0, 0, 0, 0, 0, 0, j, 0)) for j in range(before, 0, -1)]
        return torch.cat([*shifted, x], dim=2).flatten(0, 1).transpose(1, 2)

    before = K // Q - 1
    y = F.scaled_dot_product_attention(
        chunks(q_BTHD, 0), chunks(k_BTHD, before), chunks(v_BTHD, before),
        attn_mask=mask_BnQK.view(B * n, 1, Q, K), scale=scale)
    return y.transpose(1, 2).reshape(q_BTHD.shape)


# An operator of our own around torch's varlen attention: window, longest document and number of
# documents arrive as a tensor on the CPU and become ints inside, so that they may change without
# another graph and without a sync.

@torch.library.custom_op("speedrun::packed_attention", mutates_args=())
def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, bounds: Tensor,
                     scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B*T, H, D) each -> output, logsumexp, state for backward. Flash attention, from sm80."""
    import torch.nn.attention.varlen  # its import registers the operator

    window, longest, num_docs = bounds.tolist()
    cu_seqlens = cu_seqlens[:num_docs + 1]
    return torch.ops.torch_attn._varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, False, scale, [window - 1, 0])


@packed_attention.register_fake
def _(q, k, v, cu_seqlens, bounds, scale):
    return (torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
            q.new_empty(2, dtype=torch.uint64))


@torch.library.custom_op("speedrun::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor,
        cu_seqlens: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    window, longest, num_docs = bounds.tolist()
    cu_seqlens = cu_seqlens[:num_docs + 1]
    return torch.ops.torch_attn._varlen_attn_backward(
        grad.contiguous(), q, k, v, out, lse, cu_seqlens, cu_seqlens, longest, longest, False,
        rng, scale, [window - 1, 0])


@_packed_attention_backward.register_fake
def _(grad, q, k, v, out, lse, rng, cu_seqlens, bounds, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, bounds, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, bounds)


def _backward(ctx, grad, _grad_lse, _grad_rng):
    q, k, v, out, lse, rng, cu_seqlens, bounds = ctx.saved_tensors
    grads = _packed_attention_backward(grad, q, k, v, out, lse, rng, cu_seqlens, bounds, ctx.scale)
    return (*grads, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_save_for_backward)
