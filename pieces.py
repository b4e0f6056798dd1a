"""The ideas of the speedrun, one class each: a few lines, the source, the record that brought it.

A piece acts on one tensor, given what all layers are given (`Given`); it knows nothing of recipes
or of other pieces. model.py says which recipe uses which, and where.

Shapes: B rows, T tokens a row, C model_dim, H heads, D head_dim, V vocabulary (padded).
A tensor's name ends in its shape: x_BTC, q_BTHD, logits_BTV.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Keys, attention
from kernels.loss import Softcap, softcapped
from kernels.norm import rms_norm
from kernels.relu2 import relu_squared

GATE_CHANNELS = 12  # of the stream, that the gates of record #28 and later look at


class Given(NamedTuple):
    """What a layer is given besides x. Tensors or None, never ints: an int that changes from layer
    to layer makes torch.compile build one graph each."""

    rotary: tuple[Tensor, Tensor]           # cos and sin, (positions, D/2)
    keys: Keys | None = None                # which keys are seen; None: all up to the query's
    x0_BTC: Tensor | None = None            # the embedding, as it enters the first block
    first_v_BTHD: Tensor | None = None      # values of the first layer
    bigram_BTC: Tensor | None = None
    value_BTHD: Tensor | None = None        # this layer's value embedding
    skip_BTC: Tensor | None = None          # output of the layer that this one is linked to


class Then(nn.ModuleDict):
    """Pieces that act in turn on one tensor; may be empty."""

    def forward(self, x: Tensor, *rest) -> Tensor:
        for piece in self.values():
            x = piece(x, *rest)
        return x

    def __repr__(self) -> str:
        return super().__repr__() if len(self) else "nothing"


def norm(x: Tensor, *_) -> Tensor:
    """RMSNorm over the last dimension, no parameters, eps of fp32 (records #2 and #5)."""
    return rms_norm(x)


class Norm(nn.Module):
    """`norm` as a piece."""

    def forward(self, x: Tensor, *_) -> Tensor:
        return norm(x)


def scalar() -> nn.Parameter:
    """A learned number. 0-dimensional, so that it does not lift a bf16 stream to fp32."""
    return nn.Parameter(torch.empty(()))


def gate_weight(num_gates: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(num_gates, GATE_CHANNELS))


def gate(weight: Tensor, x_BTC: Tensor) -> Tensor:
    """(B, T, gates) between 0 and 1, from the first channels of the stream (record #28)."""
    x = x_BTC[..., :GATE_CHANNELS]
    return torch.sigmoid(F.linear(x, weight.to(x.dtype)))


# --- matrices -------------------------------------------------------------------------------------

class Linear(nn.Module):
    """y = x W^T without bias; W (out, in), at least fp32 if no dtype is given, is cast where it is
    used."""

    fp8_factors = None  # of the head's products in training; see Fp8Head

    def __init__(self, in_dim: int, out_dim: int, compute_dtype: torch.dtype,
                 dtype: torch.dtype | None = None):
        super().__init__()
        dtype = dtype or torch.promote_types(compute_dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, dtype=dtype))
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype))

    def extra_repr(self) -> str:
        out_dim, in_dim = self.weight.shape
        return f"{in_dim} -> {out_dim}, {str(self.compute_dtype).removeprefix('torch.')}"


class ScaledLinear(Linear):
    """A matrix with a learned factor of its own (#47; on QKV it acts on the values alone, because
    q and k are normed)."""

    def __init__(self, in_dim: int, out_dim: int, compute_dtype: torch.dtype):
        super().__init__(in_dim, out_dim, compute_dtype)
        self.factor = scalar()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.factor * self.weight
        return F.linear(x.to(self.compute_dtype), weight.to(self.compute_dtype))


class Fp8Head(Linear):
    """The head whose three products are fp8 while training (#19; kernels/loss.py makes them), and
    compute_dtype in validation. Factors: of x, w and the summed loss's gradient."""

    def __init__(self, in_dim: int, out_dim: int, compute_dtype: torch.dtype,
                 fp8_factors: tuple[float, float, float], dtype: torch.dtype | None = None):
        super().__init__(in_dim, out_dim, compute_dtype, dtype)
        self.fp8_factors = fp8_factors

    def extra_repr(self) -> str:
        return super().extra_repr() + ", fp8 in training"


class Table(nn.Embedding):
    """An embedding whose rows nobody draws before init_weights does: for #62 it would take 7 s."""

    def reset_parameters(self) -> None:
        pass


# --- queries and keys -----------------------------------------------------------------------------

class Rotary(nn.Module):
    """Rotary embedding (Su et al. 2021; record #2): turn the pair (i, i + D/2) by its angle."""

    def forward(self, x_BTHD: Tensor, given: Given) -> Tensor:
        cos_TD, sin_TD = (table[:x_BTHD.size(1), None] for table in given.rotary)
        x1, x2 = x_BTHD.chunk(2, dim=-1)
        turned = torch.cat([x1 * cos_TD + x2 * sin_TD, x2 * cos_TD - x1 * sin_TD], dim=-1)
        return turned.type_as(x_BTHD)


class KeyOffset(nn.Module):
    """The dimensions that do not turn come from the position before, so that a head can look for
    "what followed this token" in one layer (#49)."""

    def forward(self, k_BTHD: Tensor, given: Given) -> Tensor:
        t1, s1, t2, s2 = k_BTHD.chunk(4, dim=-1)  # turning, still, turning, still
        s1, s2 = (torch.cat([s[:, :1], s[:, :-1]], dim=1) for s in (s1, s2))
        return torch.cat([t1, s1, t2, s2], dim=-1)


class Scores(nn.Module):
    """softmax(q k^T) v over the keys that are seen."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, given: Given) -> Tensor:
        return attention(q_BTHD, k_BTHD, v_BTHD, self.scale, given.keys)

    def extra_repr(self) -> str:
        return f"scale {self.scale:.4g}"


# --- values, and what attention gives -------------------------------------------------------------

class MixOne(nn.Module):
    """v = (1 - l) v + l e: with the first layer's values (Zhou et al. 2024; record #9) or with a
    value embedding (record #14)."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.value_lambda = scalar()

    def forward(self, v_BTHD: Tensor, h_BTC: Tensor, given: Given) -> Tensor:
        e_BTHD = getattr(given, self.source)
        return (1 - self.value_lambda) * v_BTHD + self.value_lambda * e_BTHD

    def extra_repr(self) -> str:
        return f"{self.source}"


class ScaleValue(nn.Module):
    """v = a v, in layers without a table of their own (record #17)."""

    def __init__(self):
        super().__init__()
        self.value_lambda = scalar()

    def forward(self, v_BTHD: Tensor, h_BTC: Tensor, given: Given) -> Tensor:
        return self.value_lambda * v_BTHD


class MixTwo(nn.Module):
    """v = a v + b e (record #15)."""

    def __init__(self):
        super().__init__()
        self.value_lambda, self.embed_lambda = scalar(), scalar()

    def forward(self, v_BTHD: Tensor, h_BTC: Tensor, given: Given) -> Tensor:
        return self.value_lambda * v_BTHD + self.embed_lambda * given.value_BTHD


class AddValue(nn.Module):
    """v = v + e (#47)."""

    def forward(self, v_BTHD: Tensor, h_BTC: Tensor, given: Given) -> Tensor:
        return v_BTHD + given.value_BTHD


class GateValue(nn.Module):
    """v = v + 2 sigmoid(W h) e, a gate for each head (#55)."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.value_gate = gate_weight(num_heads)

    def forward(self, v_BTHD: Tensor, h_BTC: Tensor, given: Given) -> Tensor:
        return v_BTHD + 2 * gate(self.value_gate, h_BTC).unsqueeze(-1) * given.value_BTHD


class HeadGate(nn.Module):
    """Each head's output times sigmoid(W h) (sparse attention gate, #28)."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.attn_gate = gate_weight(num_heads)

    def forward(self, y_BTHD: Tensor, h_BTC: Tensor) -> Tensor:
        return y_BTHD * gate(self.attn_gate, h_BTC).unsqueeze(-1)


class Damping(nn.Module):
    """y times a constant (records #2 to #4)."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, y: Tensor, *_) -> Tensor:
        return y * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:.4f}"


# --- the residual stream --------------------------------------------------------------------------

class Skip(nn.Module):
    """x = x + w * output of an earlier layer (U-net, record #11)."""

    def __init__(self):
        super().__init__()
        self.skip_lambda = scalar()

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        return x_BTC + self.skip_lambda * given.skip_BTC


class SigmoidSkip(Skip):
    """x = x + sigmoid(w) * output of an earlier layer (#32; a single one from #45)."""

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        return x_BTC + torch.sigmoid(self.skip_lambda) * given.skip_BTC


class GatedSkip(Skip):
    """x = x + sigmoid(w) * 2 sigmoid(W x0) * output of an earlier layer (#55)."""

    def __init__(self):
        super().__init__()
        self.skip_gate = gate_weight(1)

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        opened = 2 * torch.sigmoid(self.skip_lambda) * gate(self.skip_gate, given.x0_BTC)
        return x_BTC + opened * given.skip_BTC


class MixX0(nn.Module):
    """x = a x + b x0: the embedding again, at the start of each block (record #9)."""

    def __init__(self):
        super().__init__()
        self.resid_lambda, self.x0_lambda = scalar(), scalar()

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        return self.resid_lambda * x_BTC + self.x0_lambda * given.x0_BTC


class AddBigram(nn.Module):
    """x = x + c * embedding of the last two tokens' hash (record #62)."""

    def __init__(self):
        super().__init__()
        self.bigram_lambda = scalar()

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        return x_BTC + self.bigram_lambda * given.bigram_BTC


class Backout(nn.Module):
    """x = x - l * output of a middle layer: what served there need not reach the head (#40)."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.backout_lambda = scalar()

    def forward(self, x_BTC: Tensor, outputs: dict[int, Tensor]) -> Tensor:
        return x_BTC - self.backout_lambda * outputs[self.layer]

    def extra_repr(self) -> str:
        return f"layer {self.layer}"


# --- before and after the blocks ------------------------------------------------------------------

class Smear(nn.Module):
    """e_t = e_t + l sigmoid(W e_t) e_{t-1} (#34). Documents are not kept apart here."""

    def __init__(self):
        super().__init__()
        self.smear_gate, self.smear_lambda = gate_weight(1), scalar()

    def forward(self, e_BTC: Tensor) -> Tensor:
        now, before = e_BTC[:, 1:], e_BTC[:, :-1]
        smeared = now + self.smear_lambda * gate(self.smear_gate, now) * before
        return torch.cat([e_BTC[:, :1], smeared], dim=1)


class Bigrams(Table):
    """An embedding of (token before, token), hashed into a few vocabularies of rows (#62)."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        last = self.num_embeddings - 1  # the first position of a row has no token before
        now, before = tokens_BT[:, 1:].long(), tokens_BT[:, :-1].long()
        hashed = torch.bitwise_xor(36313 * now, 27191 * before) % last
        return super().forward(F.pad(hashed, (1, 0), value=last))


class ReLU2(nn.Module):
    """relu(x)^2 (So et al. 2021; record #5)."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_squared(x)


class TanhCap(nn.Module):
    """cap * tanh((z + shift) / div): logits that cannot run away (Gemma 2; record #9)."""

    kind = "tanh"

    def __init__(self, cap: float, div: float, shift: float):
        super().__init__()
        self.softcap = Softcap(self.kind, cap, div, shift)

    def forward(self, z_BTV: Tensor) -> Tensor:
        return softcapped(z_BTV, self.softcap)

    def extra_repr(self) -> str:
        _, cap, div, shift = self.softcap
        return f"cap {cap:g}, (z + {shift:g}) / {div:.4g}"


class SigmoidCap(TanhCap):
    """cap * sigmoid((z + shift) / div): the same curve moved up, which softmax does not see (#19),
    until a shift makes room for larger logits (#54)."""

    kind = "sigmoid"
