"""The model: GPT-2's shape with what the speedrun found, every idea one named, deletable piece.

`GPT(config)` is decided when it is built: a piece that a recipe does not use is not there, and the
forward pass has no branch that asks. `print(model)` reads as what the recipe computes.

Shapes: B rows, T tokens a row, C model_dim, H heads, D head_dim, V vocabulary (padded).
A tensor's name ends in its shape: x_BTC, q_BTHD, logits_BTV.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import DTYPES, attention


@dataclass(frozen=True)
class GPTConfig:
    """What a model is. Defaults: record #6 (2024-10-18), the 124M model of the speedrun."""

    num_layers: int = 12
    num_heads: int = 6
    head_dim: int = 128
    vocab_size: int = 50257         # true tokens; the tables are padded to a multiple of 64
    seq_len: int = 1024             # tokens a row in training
    mlp_ratio: int = 4
    rotary_base: float = 10_000.0
    qk_norm: bool = True            # record #5
    tied_head: bool = True          # head and embedding share one table; untied from record #8
    embed_norm: bool = False        # RMSNorm right after the embedding; record #8
    logit_softcap: float | None = None  # cap * tanh(logits / cap); record #9
    compute_dtype: str = "bf16"     # of matrix products and attention; parameters stay fp32

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: a multiple of 64 keeps the head's products on fast tiles."""
        return 64 * math.ceil(self.vocab_size / 64)


class Given(NamedTuple):
    """What every layer is given besides x. Tensors or None, never ints: an int that changes
    from layer to layer makes torch.compile build one graph each."""

    cos_TD: Tensor
    sin_TD: Tensor


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, no parameters, eps of the dtype (record #5)."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Module):
    """y = x W^T without bias; W (out, in) is kept in fp32 and cast where it is used."""

    def __init__(self, in_dim: int, out_dim: int, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype))

    def extra_repr(self) -> str:
        out_dim, in_dim = self.weight.shape
        return f"{in_dim} -> {out_dim}, {str(self.compute_dtype).removeprefix('torch.')}"


def rotary_tables(seq_len: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, (T, D/2) fp32: geometric frequencies 1 .. 1/base."""
    freqs = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle_TD = torch.outer(torch.arange(seq_len, dtype=torch.float64), freqs)
    return angle_TD.cos().float(), angle_TD.sin().float()


def rotate(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021; record #2): turn the pair (i, i + D/2) by its angle."""
    cos, sin = cos_TD[:, None], sin_TD[:, None]  # the same for all heads
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; adds to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        dim, dtype = config.model_dim, DTYPES[config.compute_dtype]
        self.head_dim = config.head_dim
        self.scale = config.head_dim ** -0.5
        self.q, self.k, self.v = (Linear(dim, dim, dtype) for _ in range(3))
        self.out = Linear(dim, dim, dtype)
        self.qk_norm = norm if config.qk_norm else nn.Identity()

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        h_BTC = norm(x_BTC)
        q_BTHD, k_BTHD, v_BTHD = (
            project(h_BTC).unflatten(-1, (-1, self.head_dim))
            for project in (self.q, self.k, self.v))
        q_BTHD = rotate(self.qk_norm(q_BTHD), given.cos_TD, given.sin_TD)
        k_BTHD = rotate(self.qk_norm(k_BTHD), given.cos_TD, given.sin_TD)
        y_BTHD = attention(q_BTHD, k_BTHD, v_BTHD, self.scale)
        return x_BTC + self.out(y_BTHD.flatten(-2))


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them (So et al. 2021; record #5)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        dim, dtype = config.model_dim, DTYPES[config.compute_dtype]
        self.fc = Linear(dim, config.mlp_ratio * dim, dtype)
        self.proj = Linear(config.mlp_ratio * dim, dim, dtype)

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        return x_BTC + self.proj(F.relu(self.fc(norm(x_BTC))).square())


class Block(nn.Module):
    """One layer: its pieces, in the order in which they act on x."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        for piece in self.children():
            x_BTC = piece(x_BTC, given)
        return x_BTC


class Softcap(nn.Module):
    """cap * tanh(z / cap): logits that cannot run away (Gemma 2; record #9)."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap = cap

    def forward(self, logits_BTV: Tensor) -> Tensor:
        return self.cap * torch.tanh(logits_BTV / self.cap)

    def extra_repr(self) -> str:
        return f"{self.cap}"


class GPT(nn.Module):
    """tokens -> embedding -> blocks -> head -> loss."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        dim, dtype = config.model_dim, DTYPES[config.compute_dtype]
        self.embed = nn.Embedding(config.padded_vocab_size, dim)
        self.embed_norm = norm if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.lm_head = Linear(dim, config.padded_vocab_size, dtype)
        if config.tied_head:
            self.lm_head.weight = self.embed.weight
        self.softcap = nn.Identity() if config.logit_softcap is None else (
            Softcap(config.logit_softcap))
        # Positions restart with every row; rows are never longer in training than seq_len.
        cos, sin = rotary_tables(config.seq_len, config.head_dim, config.rotary_base)
        self.register_buffer("cos_TD", cos.to(dtype), persistent=False)
        self.register_buffer("sin_TD", sin.to(dtype), persistent=False)

    def hidden(self, inputs_BT: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head."""
        seq_len = inputs_BT.size(1)
        given = Given(self.cos_TD[:seq_len], self.sin_TD[:seq_len])
        x_BTC = self.embed_norm(self.embed(inputs_BT))
        for block in self.blocks:
            x_BTC = block(x_BTC, given)
        return norm(x_BTC)

    def logits(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V) in fp32; the columns past vocab_size are padding."""
        return self.softcap(self.lm_head(x_BTC).float())

    def head_loss(self, x_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over the B*T tokens: fp32 scalar."""
        logits_BTV = self.logits(x_BTC)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The summed cross-entropy of predicting targets from inputs, both (B, T).

        A sum, because the trainer divides by the tokens of the whole global batch: then no split
        into ranks or micro-batches, even an uneven one, changes the gradient.
        """
        return self.head_loss(self.hidden(inputs_BT), targets_BT)


def init_weights(model: GPT, seed: int) -> None:
    """Set every parameter, by name, from one seed; the same values on every device and rank.

    Raises ValueError for a parameter that no rule names: a forgotten one must not train.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tied_head

    def uniform(p: Tensor) -> Tensor:  # torch's default for nn.Linear: bound 1/sqrt(fan_in)
        bound = p.size(-1) ** -0.5
        return torch.empty(p.shape).uniform_(-bound, bound, generator=generator)

    rules = {
        "embed.weight": uniform if tied else lambda p: torch.randn(p.shape, generator=generator),
        "lm_head.weight": torch.zeros_like,     # record #8
        "attn.q.weight": uniform, "attn.k.weight": uniform, "attn.v.weight": uniform,
        "attn.out.weight": torch.zeros_like,    # each block starts as the identity (record #5)
        "mlp.fc.weight": uniform,
        "mlp.proj.weight": torch.zeros_like,
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            rule = next((r for suffix, r in rules.items() if name.endswith(suffix)), None)
            if rule is None:
                raise ValueError(f"no initialisation for parameter {name} {tuple(p.shape)}: "
                                 "add a rule to init_weights in model.py")
            p.copy_(rule(p))


def param_role(name: str) -> str:
    """Which optimizer group a parameter belongs to: embed, head, scalar or matrix."""
    if name == "embed.weight":
        return "embed"
    if name == "lm_head.weight":
        return "head"
    return "matrix"


def num_parameters(model: GPT) -> int:
    """Trained numbers, a tied head counted once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: GPT) -> float:
    """Forward and backward FLOPs a token: 6 x parameters of matrix products, plus 12 C times the
    keys a token attends to on average, per attention layer. The softmax that backward recomputes
    is not counted.
    """
    config = model.config
    matmul_parameters = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    mean_keys = (config.seq_len + 1) / 2
    num_attention = sum(isinstance(m, Attention) for m in model.modules())
    return 6 * matmul_parameters + 12 * config.model_dim * mean_keys * num_attention
