"""GPT-2 (Radford et al. 2019) as record #1 trained it: learned positions, LayerNorm, GELU, biases.

The baseline that the speedrun started from, kept apart so that model.py need not carry what was
thrown out with record #2. It answers to the same calls as model.GPT.

Shapes: B rows, T tokens a row, C model_dim, H heads, D head_dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import DTYPES
from kernels.attention import attention
from kernels.loss import KERNELS, TWINS, Softcap
from model import GPT, GPTConfig, Layer, Stage, run_block
from pieces import Linear, Table, Then


class BiasLinear(Linear):
    """y = x W^T + b."""

    def __init__(self, in_dim: int, out_dim: int, compute_dtype: torch.dtype):
        super().__init__(in_dim, out_dim, compute_dtype)
        self.bias = nn.Parameter(torch.empty(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class GPT2Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        dim, dtype = config.model_dim, DTYPES[config.compute_dtype]
        self.head_dim = config.head_dim
        self.ln = nn.LayerNorm(dim)
        self.qkv = BiasLinear(dim, 3 * dim, dtype)
        self.out = BiasLinear(dim, dim, dtype)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln(x_BTC)).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return x_BTC + self.out(attention(q, k, v, self.head_dim ** -0.5).flatten(-2))


class GPT2MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        dim, dtype = config.model_dim, DTYPES[config.compute_dtype]
        self.ln = nn.LayerNorm(dim)
        self.fc = BiasLinear(dim, config.mlp_ratio * dim, dtype)
        self.proj = BiasLinear(config.mlp_ratio * dim, dim, dtype)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.proj(F.gelu(self.fc(self.ln(x_BTC)), approximate="tanh"))


class GPT2Block(Then):
    layer = Layer()

    def __init__(self, config: GPTConfig):
        super().__init__({"attn": GPT2Attention(config), "mlp": GPT2MLP(config)})


class GPT2(nn.Module):
    """tokens -> embedding and position -> blocks -> tied head -> loss."""

    def __init__(self, config: GPTConfig, kernels: frozenset[str] = frozenset()):
        super().__init__()
        self.config, dim = config, config.model_dim
        self.embed = Table(config.padded_vocab_size, dim)
        self.position = Table(config.seq_len, dim)
        self.blocks = nn.ModuleList(GPT2Block(config) for _ in range(config.num_layers))
        self.ln = nn.LayerNorm(dim)
        self.lm_head = Linear(dim, config.padded_vocab_size, DTYPES[config.head])
        self.lm_head.weight = self.embed.weight
        self.segments, self.recomputed = [range(config.num_layers)], 0
        self.softcap, self.loss_bodies = Softcap(), KERNELS if "loss" in kernels else TWINS
        self.register_buffer("target_weights", torch.ones(1), persistent=False)
        self.set_stage(Stage())

    def set_stage(self, stage: Stage) -> None:
        self.stage = stage

    hidden = GPT.hidden

    def see(self, *_) -> None:
        """Rows have no documents: attention is plainly causal."""

    def enter(self, tokens_BT: Tensor) -> tuple[Tensor, None, None]:
        """The embeddings of tokens and positions; T is at most seq_len."""
        return self.embed(tokens_BT) + self.position.weight[:tokens_BT.size(1)], None, None

    def run_layers(self, layers: range, x_BTC: Tensor, *_) -> Tensor:
        for i in layers:
            x_BTC = run_block(self.blocks[i], i < self.recomputed, x_BTC)
        return x_BTC

    def leave(self, x_BTC: Tensor, outputs: dict) -> Tensor:
        return self.ln(x_BTC)

    def logits(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V) in fp32."""
        return self.lm_head(x_BTC).float()

    head_loss, forward = GPT.head_loss, GPT.forward

    def init_rules(self) -> dict[str, tuple]:
        """Normal with 0.02; what is added to the stream smaller by sqrt(2 num_layers)."""
        small = 0.02 * (2 * self.config.num_layers) ** -0.5
        return {"embed.weight": ("normal", 0.02), "position.weight": ("normal", 0.02),
                "ln.weight": ("constant", 1.0), "bias": ("constant", 0.0),
                "qkv.weight": ("normal", 0.02), "out.weight": ("normal", small),
                "fc.weight": ("normal", 0.02), "proj.weight": ("normal", small)}
