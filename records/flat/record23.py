"""Record 23: Gradient all-reduce under the backward pass.

    python record23.py DATA_DIR [SEED]
    torchrun --standalone --nproc_per_node 8 record23.py DATA_DIR

DATA_DIR has shards *train*.bin and *val*.bin of GPT-2 tokens. One GPU or many, bf16; any
number of ranks sees the same tokens in the same steps. The log goes to logs/, its source included.
Printed by `python -m flat 23`.

Shapes: B rows, T tokens a row, C model_dim, H heads, D head_dim, V vocabulary (padded).
"""

import hashlib
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

# model
HEAD_DIM = 128
SEQ_LEN = 49_152
MAX_SEQ_LEN = 262_144
MLP_RATIO = 4
ROTARY_BASE = 2.0**10
ATTN_SCALE = 0.12
NORM_EPS = 2.0**-23
LOGIT_SOFTCAP = 30.0
SOFTCAP_DIV = 43200 ** 0.5
FP8_FACTORS = (16.165807537309522, 56 / 3, 448.0)
BOS_ID = 50_256
MODEL_DIM = 768
PADDED_VOCAB_SIZE = 50_304
# training
NUM_ITERATIONS = 1770
LOSS_DIVISOR = 8
COOLDOWN_STEPS = 708
FINAL_LR_FRAC = 0.1
MUON_MOMENTUM = 0.95
MOMENTUM_START = 0.85
MOMENTUM_WARMUP_STEPS = 300
WINDOW_RANGE = (128, 1856, 128)
WINDOW_BLOCK = 128
VAL_TOKENS = 10_485_760
VAL_EVERY = 125
NUM_ROWS = 8
VAL_ROW = 262_144
NS_COEFFICIENTS = ((3.4445, -4.775, 2.0315),) * 5

MICRO_BATCH_TOKENS = 65_536     # per rank; more are accumulated
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
DEVICE = torch.device("cuda", LOCAL_RANK)
LOG = Path("logs") / f"{uuid.uuid4()}.txt"


# --- data -----------------------------------------------------------------------------------------

def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard: 256 int32 of header, then uint16."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        sys.exit(f"{path}: expected a shard of tokens, found another header")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def train_batches(files: list[Path]) -> Iterator[np.ndarray]:
    """(rows, T + 1) tokens of each step, over all ranks. No row crosses from a shard into the next;
    what is left of one, too short for a step, is skipped."""
    step = 0
    for file in files:
        tokens = read_shard(file)
        position = 0
        while True:
            rows = tokens[position:position + NUM_ROWS * SEQ_LEN + 1]
            if len(rows) <= NUM_ROWS * SEQ_LEN:
                break
            yield np.lib.stride_tricks.sliding_window_view(rows, SEQ_LEN + 1)[::SEQ_LEN]
            position += NUM_ROWS * SEQ_LEN
            step += 1
    sys.exit(f"the training data end before step {step}: expected more shards of tokens")


def val_rows(files: list[Path]) -> np.ndarray:
    """(rows, T + 1): the first VAL_TOKENS tokens of the validation data, and their targets."""
    tokens = np.concatenate([read_shard(file) for file in files])[:VAL_TOKENS + 1]
    if len(tokens) <= VAL_TOKENS:
        sys.exit(f"expected {VAL_TOKENS + 1} tokens of validation data, found {len(tokens)}")
    return np.lib.stride_tricks.sliding_window_view(tokens, VAL_ROW + 1)[::VAL_ROW]


def micro_batches(rows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of this rank's rows: consecutive runs, the first ranks' one row longer."""
    rows = np.array_split(rows, WORLD_SIZE)[RANK]
    num_rows = max(1, MICRO_BATCH_TOKENS // (rows.shape[1] - 1))
    parts = (torch.from_numpy(rows[i:i + num_rows].astype(np.int64))
             for i in range(0, len(rows), num_rows))
    return [(part[:, :-1], part[:, 1:]) for part in parts]


# --- model ----------------------------------------------------------------------------------------

def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters, of the last dimension (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


class Keys(NamedTuple):
    """Which keys the queries of packed rows see: their own document's, back to a window."""

    cu_seqlens: Tensor  # int32: where documents begin, in all rows laid end to end
    # on the CPU: ints here would make torch.compile build a graph for each
    longest: Tensor     # document
    window: Tensor


def packed_keys(doc_BT: Tensor, window: int) -> Keys:
    """The keys of causal attention inside documents, at most `window` of them, self included."""
    starts_BT = torch.ones_like(doc_BT, dtype=torch.bool)
    starts_BT[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    starts = starts_BT.flatten().nonzero().flatten()
    cu_seqlens = F.pad(starts, (0, 1), value=doc_BT.numel()).int()
    longest, cu_seqlens = cu_seqlens.diff().max(), cu_seqlens.to(DEVICE, non_blocking=True)
    torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one graph for any number of documents
    return Keys(cu_seqlens=cu_seqlens, longest=longest, window=torch.tensor(window))


@torch.compiler.disable
def packed_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, keys: Keys) -> Tensor:
    """Varlen flash attention; torch.compile fuses what is before and behind it."""
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q_BTHD, k_BTHD, v_BTHD))
    longest, window = int(keys.longest), int(keys.window)
    y = varlen_attn(q, k, v, keys.cu_seqlens, keys.cu_seqlens, longest, longest, scale=ATTN_SCALE,
                    window_size=(window - 1, 0))
    return y.view_as(q_BTHD)


class Fp8Matmul(torch.autograd.Function):
    """x w^T of the head in fp8 with static scales (#19): x and w in e4m3, the gradient in e5m2,
    each times its factor before the cast."""

    @staticmethod
    def quantize(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
        largest = torch.finfo(dtype).max
        return (x.float() * factor).clamp(-largest, largest).to(dtype)

    @staticmethod
    def product(a: Tensor, b: Tensor, a_factor: float, b_factor: float, dtype: torch.dtype,
                fast: bool) -> Tensor:
        """a b^T, both in rows."""
        scales = (torch.tensor(1 / factor, device=a.device) for factor in (a_factor, b_factor))
        return torch._scaled_mm(a, b.T, *scales, out_dtype=dtype, use_fast_accum=fast)

    @staticmethod
    def forward(ctx, x_NC: Tensor, w_VC: Tensor, divisor: float) -> Tensor:
        x_factor, w_factor, _ = FP8_FACTORS
        x8 = Fp8Matmul.quantize(x_NC, x_factor, torch.float8_e4m3fn)
        w8 = Fp8Matmul.quantize(w_VC, w_factor, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8)
        ctx.divisor, ctx.w_dtype = divisor, w_VC.dtype
        return Fp8Matmul.product(x8, w8, x_factor, w_factor, torch.bfloat16, True)

    @staticmethod
    def backward(ctx, grad_NV: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, w8 = ctx.saved_tensors
        x_factor, w_factor, g_factor = FP8_FACTORS
        g_factor = g_factor * ctx.divisor   # a factor is meant for the gradient of the summed loss
        g8 = Fp8Matmul.quantize(grad_NV, g_factor, torch.float8_e5m2)
        dx = Fp8Matmul.product(g8, w8.T.contiguous(), g_factor, w_factor, torch.bfloat16, False)
        dw = Fp8Matmul.product(g8.T.contiguous(), x8.T.contiguous(), g_factor, x_factor,
                               torch.float32, False)
        return dx, dw.to(ctx.w_dtype), None


# Role (which is its optimizer group) and start of each kind of parameter: uniform or normal with
# a standard deviation, or a constant.
PARAMETERS = {
    "embed.weight": ("embed", ("normal", 1.0)),
    "value_embeds.weight": ("value_embed", ("normal", 1.0)),
    "blocks.resid_lambda": ("scalar", ("constant", 1.0)),
    "blocks.x0_lambda": ("x0_lambda", ("constant", 0.0)),
    "blocks.attn.value_lambda": ("scalar", ("constant", 0.5)),
    "blocks.attn.embed_lambda": ("scalar", ("constant", 0.5)),
    "blocks.attn.qkv.weight": ("attn_in", ("uniform", 0.5 * MODEL_DIM ** -0.5)),
    "blocks.attn.out.weight": ("attn_out", ("constant", 0.0)),
    "blocks.mlp.fc.weight": ("mlp_in", ("uniform", 0.5 * MODEL_DIM ** -0.5)),
    "blocks.mlp.proj.weight": ("mlp_out", ("constant", 0.0)),
    "blocks.skip_lambda": ("scalar", ("constant", 1.0)),
    "lm_head.weight": ("head", ("normal", 0.0)),
}


class Layer(NamedTuple):
    """How one layer differs from the others."""

    keys: str = "long"                  # the kind of keys that its queries see
    value_table: int | None = None
    skip_from: int | None = None        # the layer whose output comes back here


@torch.no_grad()
def init_weights(model: "GPT", seed: int) -> None:
    """Set every parameter, by name, from one seed; the same values on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        _, (kind, number) = PARAMETERS[re.sub(r"\.\d+(?=\.)", "", name)]
        if kind == "constant" or number == 0:
            p.fill_(number)
        elif kind == "uniform":
            bound = math.sqrt(3) * number
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        else:
            p.copy_(torch.empty(p.shape).normal_(0, number, generator=generator))


class Linear(nn.Module):
    """y = x W^T; the weight (out, in) is cast where it is used."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16))


def scalar() -> nn.Parameter:
    """A learned number. 0-dimensional, so that it does not lift a bf16 stream to fp32."""
    return nn.Parameter(torch.empty(()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (i, i + D/2) of x's last dimension by an angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x)


def rotary(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021; #2): token t rotates by position t of the tables."""
    T = x_BTHD.size(1)
    return rotate(x_BTHD, cos[:T, None], sin[:T, None])


class Attention(nn.Module):
    """Causal self-attention: what it adds to the residual stream."""

    def __init__(self, layer: Layer):
        super().__init__()
        has_table = layer.value_table is not None
        self.qkv = Linear(MODEL_DIM, 3 * MODEL_DIM)
        self.value_lambda = scalar()
        if has_table:
            self.embed_lambda = scalar()
        self.out = Linear(MODEL_DIM, MODEL_DIM)

    def forward(self, x_BTC: Tensor, shared: dict[str, Tensor], ve_BTHD: Tensor | None,
                keys: Keys | None) -> Tensor:
        h_BTC = norm(x_BTC)
        q_BTHD, k_BTHD, v_BTHD = self.qkv(h_BTC).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)

        if ve_BTHD is not None:
            v_BTHD = self.value_lambda * v_BTHD + self.embed_lambda * ve_BTHD  # (#15)
        else:
            v_BTHD = self.value_lambda * v_BTHD  # (#17)
        v_BTHD = v_BTHD.type_as(q_BTHD)

        q, k, v = q_BTHD, k_BTHD, v_BTHD
        q, k = norm(q), norm(k)  # (#6)
        cos, sin = shared["cos"], shared["sin"]
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)  # (#2)

        # Causal attention of each row; (B, T, H, D) in and out.
        y_BTHD = packed_attention(q, k, v, keys)
        y_BTC = self.out(y_BTHD.flatten(-2))
        return y_BTC


class MLP(nn.Module):
    """Two matrices with an activation between: what they add to the residual stream."""

    def __init__(self):
        super().__init__()
        self.fc = Linear(MODEL_DIM, MLP_RATIO * MODEL_DIM)
        self.proj = Linear(MLP_RATIO * MODEL_DIM, MODEL_DIM)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTC = norm(x_BTC)
        h = self.fc(h_BTC)
        h = F.relu(h).square()  # (#5) So et al. 2021
        return self.proj(h)


class Block(nn.Module):
    """One layer: skips and embeddings into the stream, then attention and MLP."""

    def __init__(self, index: int, layer: Layer):
        super().__init__()
        if layer.skip_from is not None:
            self.skip_lambda = scalar()
        attends = index != 7  # (#17)
        self.resid_lambda, self.x0_lambda = scalar(), scalar()
        self.attn = Attention(layer) if attends else None
        self.mlp = MLP()

    def forward(self, x_BTC: Tensor, shared: dict[str, Tensor], ve_BTHD: Tensor | None,
                keys: Keys | None, skip_BTC: Tensor | None) -> Tensor:
        if skip_BTC is not None:  # output of an earlier layer (U-net, #11)
            x_BTC = x_BTC + self.skip_lambda * skip_BTC  # (#11)
        # the embedding again (#9)
        x_BTC = self.resid_lambda * x_BTC + self.x0_lambda * shared["x0"]
        if self.attn is not None:
            x_BTC = x_BTC + self.attn(x_BTC, shared, ve_BTHD, keys)
        x_BTC = x_BTC + self.mlp(x_BTC)
        return x_BTC


class GPT(nn.Module):
    """tokens -> embedding -> blocks -> head -> loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(PADDED_VOCAB_SIZE, MODEL_DIM, dtype=torch.bfloat16)
        tables = {layer.value_table for layer in PLAN} - {None}
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(PADDED_VOCAB_SIZE, MODEL_DIM, dtype=torch.bfloat16)
            for i in sorted(tables)})
        self.blocks = nn.ModuleList(Block(i, layer) for i, layer in enumerate(PLAN))
        # fp8 matmuls (#19) are for training; validation takes compute_dtype
        self.lm_head = Linear(MODEL_DIM, PADDED_VOCAB_SIZE)

        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(MAX_SEQ_LEN, HEAD_DIM // 2), persistent=False)

    def set_rotary(self) -> None:
        """Cos and sin of every position."""
        # (D/2,) radians a position, fp64: geometric from 1 down to 1/base (#2). With rotary_half
        # the second half of the pairs stays put, and the rest spans the whole range (#17).
        turning = ROTARY_BASE ** -torch.linspace(0, 1, HEAD_DIM // 4, dtype=torch.float64)
        freqs = torch.cat([turning, torch.zeros_like(turning)])
        positions = torch.arange(len(self.cos), dtype=torch.float64, device=self.cos.device)
        angle = torch.outer(positions, freqs.to(self.cos.device, non_blocking=True))
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, divisor: float = 1.0) -> Tensor:
        """The summed cross-entropy, over `divisor`, of predicting targets from inputs."""
        targets_BT = targets_BT.to(DEVICE, non_blocking=True)
        # validation has longer rows, whose logits would not fit
        x_BTC = self.hidden(inputs_BT)
        parts = zip(x_BTC.split(MICRO_BATCH_TOKENS, 1), targets_BT.split(MICRO_BATCH_TOKENS, 1))
        return sum(self.head_loss(x, y, divisor) for x, y in parts)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head."""
        # Which keys the layers of each kind see: documents (#12) and windows (#13, #20).
        # (B, T): a running number of the document that a token is in.
        doc_BT = (tokens_BT == BOS_ID).cumsum(1)
        long, short = self.window, self.short_window
        keys = {"long": packed_keys(doc_BT, long)}
        keys["short"] = packed_keys(doc_BT, short)  # (#20)
        tokens_BT = tokens_BT.to(DEVICE, non_blocking=True)
        # The embedding and what all layers share. The value embeddings by their table (#14).
        table = self.embed
        x_BTC = F.embedding(tokens_BT, table.weight)
        x_BTC = norm(x_BTC)  # (#8)

        shared = {"cos": self.cos, "sin": self.sin}
        shared["x0"] = x_BTC  # (#9)
        values = {int(i): embed(tokens_BT).to(torch.bfloat16).unflatten(-1, (-1, HEAD_DIM))
                  for i, embed in self.value_embeds.items()}  # (#14)
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            layer = PLAN[i]
            x_BTC = block(x_BTC, shared, values.get(layer.value_table), keys[layer.keys],
                          outputs.get(layer.skip_from))
            outputs[i] = x_BTC
        return norm(x_BTC)

    def head_loss(self, x_BTC: Tensor, targets_BT: Tensor, divisor: float) -> Tensor:
        """Cross-entropy in nats, summed over the B*T tokens, over `divisor`."""
        x_NC = x_BTC.flatten(0, 1)
        # in training (#19)
        if self.training:
            z_NV = Fp8Matmul.apply(x_NC, self.lm_head.weight, divisor).float()
        else:
            z_NV = self.lm_head(x_NC).float()
        # (#19) the same curve moved up, which softmax does not see
        z_NV = LOGIT_SOFTCAP * torch.sigmoid(z_NV / SOFTCAP_DIV)
        return F.cross_entropy(z_NV, targets_BT.flatten(), reduction="sum") / divisor


PLAN = [Layer("long", 0), Layer("short", 1), Layer("short", 2), Layer("short"), Layer(),
        Layer("short"), Layer("short", None, 5), Layer("short", None, 4), Layer("short", None, 3),
        Layer("short", 0, 2), Layer("short", 1, 1), Layer("long", 2, 0)]


# --- optimizer ------------------------------------------------------------------------------------

def orthogonalize(G: Tensor) -> Tensor:
    """U V^T of G = U S V^T for every matrix of G (..., rows, cols), or nearly that.

    Odd polynomials, one a step, act on the singular values; the short side is iterated. The
    result has G's dtype and is the same for G at any scale. A zero matrix stays zero; NaNs do
    not leak into the other matrices of the batch.
    """
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    norm = X.norm(dim=(-2, -1), keepdim=True)
    X = (X / norm.clamp(min=2.0**-126)).to(torch.bfloat16)
    for a, b, c in NS_COEFFICIENTS:
        A = torch.bmm(X, X.mT)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


# The optimizer's groups by the role of a parameter; lr is that of the peak.
GROUPS = {
    "attn_in": {"rule": "muon", "lr": 0.05, "split": 3, "scale": 1.0},
    "attn_out": {"rule": "muon", "lr": 0.05, "split": 1, "scale": 1.0},
    "mlp_in": {"rule": "muon", "lr": 0.05, "split": 1, "scale": 2.0},
    "mlp_out": {"rule": "muon", "lr": 0.05, "split": 1, "scale": 1.0},
    "embed": {"rule": "adam", "lr": 0.6, "betas": (0.8, 0.95)},
    "head": {"rule": "adam", "lr": 0.22, "betas": (0.8, 0.95)},
    "value_embed": {"rule": "adam", "lr": 0.6, "betas": (0.8, 0.95)},
    "x0_lambda": {"rule": "adam", "lr": 0.04, "betas": (0.8, 0.95)},
    "scalar": {"rule": "adam", "lr": 0.04, "betas": (0.8, 0.95)},
}


class Optimizer:
    """Gradients are summed over ranks. Each rank updates its share of Muon's matrices and sends
    them to the others (#3); what Adam trains is updated by all."""

    def __init__(self, model: nn.Module):
        self.groups = {role: dict(options, params=[]) for role, options in GROUPS.items()}
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.owner: dict[Tensor, int] = {}  # the rank that updates a matrix
        self.reductions = []
        self.completing = False     # whether this backward pass is the last one of its step
        for name, p in model.named_parameters():
            role, _ = PARAMETERS[re.sub(r"\.\d+(?=\.)", "", name)]
            self.owner[p] = len(self.groups[role]["params"]) % WORLD_SIZE
            self.groups[role]["params"].append(p)
            self.state[p] = {}
            if WORLD_SIZE > 1:
                dist.broadcast(p.data, 0)
                p.register_post_accumulate_grad_hook(self.reduce_early)

    def reduce_early(self, p: Tensor) -> None:
        """Called within each backward pass; the last one of a step completes the gradients."""
        if self.completing:
            self.reductions.append(dist.all_reduce(p.grad, async_op=True))

    @torch.no_grad()
    def step(self, step: int) -> None:
        """The update of `step`."""
        groups = self.groups
        if WORLD_SIZE > 1:
            for reduction in self.reductions:
                reduction.wait()
        self.completing, self.reductions = False, []

        lr, sends = lr_multiplier(step), []
        for group in groups.values():
            group["momentum"] = momentum(step)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if group["rule"] == "muon":
                    if self.owner[p] == RANK:
                        self.muon_step(p, group, group["lr"] * lr)
                    if WORLD_SIZE > 1:
                        sends.append(dist.broadcast(p.data, self.owner[p], async_op=True))
                else:
                    self.adam_step(p, group, group["lr"] * lr)
                p.grad = None
        for send in sends:
            send.wait()

    def muon_step(self, p: Tensor, muon: dict, lr: float) -> None:
        state, shape = self.state[p], (muon["split"], -1, p.size(-1))
        param, grad = p.view(shape), p.grad.view(shape)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        # The momentum of Muon; with Nesterov's look ahead, as if grad came once more.
        momentum, buffer = muon["momentum"], state["momentum_buffer"]
        buffer.lerp_(grad, 1 - momentum)
        update = buffer.lerp(grad, 1 - momentum)
        update = orthogonalize(update)
        # param -= lr * scale * update, after weight decay.
        param.sub_(update, alpha=lr * muon["scale"])

    def adam_step(self, p: Tensor, adam: dict, lr: float) -> None:
        state = self.state[p]
        # a table in bf16 rounds its master
        if not state:
            state["step"] = torch.zeros((), device=DEVICE)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            state["master"] = p.to(torch.float32)
        # The update of Adam: the mean gradient over the root of its mean square.
        grad = p.grad.to(torch.float32)
        beta1, beta2 = adam["betas"]
        step = state["step"].add_(1)
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        mean_square = state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
        # 1 - beta^t by expm1: the plain form loses 5e-5 of 1 - 0.999 in fp32
        logs = (torch.as_tensor(beta, dtype=torch.float64).log() for beta in (beta1, beta2))
        correct1, correct2 = (-torch.expm1(step * log) for log in logs)
        update = mean / correct1 / (mean_square / correct2).sqrt_().add_(1e-10)
        # param -= lr * scale * update, after weight decay.
        state["master"].sub_(update, alpha=lr)
        p.copy_(state["master"])


# --- schedules ------------------------------------------------------------------------------------

def lr_multiplier(step: int) -> float:
    """What the learning rates are multiplied by at the update of `step` (0-based).

    Constant, and at last down to FINAL_LR_FRAC, reached where the schedule ends.
    """
    left = min(1.0, max(0, NUM_ITERATIONS - step) / COOLDOWN_STEPS)
    return left + FINAL_LR_FRAC * (1 - left)


def momentum(step: int) -> float:
    """Muon's momentum at the update of `step`: linear warm-up to MUON_MOMENTUM."""
    risen = min(1.0, step / MOMENTUM_WARMUP_STEPS)
    return MOMENTUM_START + (MUON_MOMENTUM - MOMENTUM_START) * risen


def windows(step: int) -> tuple[int, int]:
    """(short, long) windows at `step` in tokens, as records count them."""
    first, end, by = WINDOW_RANGE
    long = (first * NUM_ITERATIONS + (end - first) * step) // (by * NUM_ITERATIONS) * by
    short = max(1, long // WINDOW_BLOCK // 2) * WINDOW_BLOCK
    return short, long


def window_in_keys(window: int) -> int:
    """Keys that a query sees, itself included, through a window as records count it.

    From #15 to #27 a query also saw no more than its own block and the ones before it that
    the window reaches into, so fewer keys, depending on its place in its block; here their mean,
    rounded down, for every query.
    """
    before = (window - 1) // WINDOW_BLOCK * WINDOW_BLOCK
    own = window - before       # 1 to block; position p of a block sees before + min(p + 1, own)
    return before + (own * (own + 1) // 2 + (WINDOW_BLOCK - own) * own) // WINDOW_BLOCK


def enter_phase(model: GPT, step: int) -> None:
    """Set in the model what changes while it trains."""
    short, long = windows(step)
    model.window, model.short_window = window_in_keys(long), window_in_keys(short)


# --- training -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model: GPT, rows: np.ndarray) -> float:
    """Mean cross-entropy in nats over the first VAL_TOKENS validation tokens."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for inputs_BT, targets_BT in micro_batches(rows):
        total += model(inputs_BT, targets_BT).double()
    model.train()
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return total.item() / VAL_TOKENS


def train_step(model: GPT, optimizer: Optimizer, rows: np.ndarray, step: int) -> None:
    batches = micro_batches(rows)
    for i, (inputs_BT, targets_BT) in enumerate(batches):
        if WORLD_SIZE > 1:
            optimizer.completing = i == len(batches) - 1
        model(inputs_BT, targets_BT, LOSS_DIVISOR).backward()
    optimizer.step(step)


def compile_model(model: GPT) -> None:
    """Compile blocks and head; build their graphs on random tokens, before the clock starts."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile()
    model.head_loss = torch.compile(model.head_loss)
    enter_phase(model, 0)
    rows = np.random.default_rng(0).integers(0, BOS_ID, (NUM_ROWS, SEQ_LEN + 1))
    rows[:, ::500] = BOS_ID
    inputs_BT, targets_BT = micro_batches(rows)[0]
    model(inputs_BT, targets_BT, LOSS_DIVISOR).backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()


def log(text: str) -> None:
    """Rank 0 shows a line and adds it to the log."""
    if RANK == 0:
        print(text, flush=True)
        with open(LOG, "a") as file:
            file.write(f"{text}\n")


def start_log(files: list[Path], seed: int) -> None:
    """What a log in the public format begins with: source and environment."""
    hashes = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    rule = "=" * 100
    hardware = torch.cuda.get_device_name()
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text(
        f"{Path(__file__).read_text()}{rule}\nRunning Python {sys.version.split()[0]}\n"
        f"Running PyTorch {torch.version.__version__} compiled for CUDA {torch.version.cuda} on "
        f"{hardware} with world_size {WORLD_SIZE}\n"
        f"Running for track short with seed {seed} on data {digest}\n{rule}\n")


def train(train_files: list[Path], val_files: list[Path], seed: int) -> None:
    model = GPT()
    init_weights(model, seed)
    model.to(DEVICE)
    model.set_rotary()
    optimizer = Optimizer(model)
    validation = val_rows(val_files)
    batches = train_batches(train_files)
    compile_model(model)
    train_s, t0 = 0.0, time.perf_counter()
    for step in range(NUM_ITERATIONS + 1):
        last = step == NUM_ITERATIONS
        if last or step % VAL_EVERY == 0:
            torch.cuda.synchronize()
            train_s += time.perf_counter() - t0
            enter_phase(model, step)
            val_loss = evaluate(model, validation)
            log(f"step:{step}/{NUM_ITERATIONS} val_loss:{val_loss:.6f} "
                f"train_time:{1000 * train_s:.0f}ms "
                f"step_avg:{1000 * train_s / max(1, step):.2f}ms")
            t0 = time.perf_counter()
        if last:
            break
        enter_phase(model, step)
        train_step(model, optimizer, next(batches), step)
        elapsed_ms = 1000 * (train_s + time.perf_counter() - t0)
        log(f"step:{step + 1}/{NUM_ITERATIONS} train_time:{elapsed_ms:.0f}ms "
            f"step_avg:{elapsed_ms / (step + 1):.2f}ms")


def main(arguments: list[str]) -> None:
    if not 1 <= len(arguments) <= 2:
        sys.exit(f"usage: {sys.argv[0]} DATA_DIR [SEED]")
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    train_files, val_files = (sorted(Path(arguments[0]).glob(f"*{part}*.bin"))
                              for part in ("train", "val"))
    if not train_files or not val_files:
        sys.exit(f"{arguments[0]}: expected shards *train*.bin and *val*.bin, found "
                 f"{len(train_files)} and {len(val_files)}")
    if not torch.cuda.is_available():
        sys.exit("record 23 at full size needs a GPU with bf16, fp8, flash attention; "
                 "for a CPU: python -m flat 23 --scale pocket")
    torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl")
    if RANK == 0:
        start_log([*train_files, *val_files], seed)
    train(train_files, val_files, seed)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
