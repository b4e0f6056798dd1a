"""Record 1: llm.c baseline.

    python record1.py DATA_DIR [SEED]
    torchrun --standalone --nproc_per_node 8 record1.py DATA_DIR

DATA_DIR has shards *train*.bin and *val*.bin of GPT-2 tokens. One GPU or many, bf16; any
number of ranks sees the same tokens in the same steps. The log goes to logs/, its source included.
Printed by `python -m flat 1`.

Shapes: B rows, T tokens a row, C model_dim, H heads, D head_dim, V vocabulary (padded).
"""

import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

BOS_ID = 50256
HEAD_DIM = 64
MLP_RATIO = 4
MODEL_DIM = 768
NUM_LAYERS = 12
PADDED_VOCAB_SIZE = 50257
SEQ_LEN = 1024
BATCH_TOKENS = 524288
COOLDOWN_STEPS = 18860
GRAD_CLIP = 1.0
NUM_ITERATIONS = 19560
NUM_ROWS = 512
SCHEDULED_STEPS = 19560
VAL_EVERY = 250
VAL_ROW = 1024
VAL_TOKENS = 10485760
WARMUP_STEPS = 700

MICRO_BATCH_TOKENS = 65_536     # per rank; more are accumulated
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if CUDA else "cpu")


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
            num_rows, T = batch_shape()
            rows = tokens[position:position + num_rows * T + 1]
            if len(rows) <= num_rows * T:
                break
            yield np.lib.stride_tricks.sliding_window_view(rows, T + 1)[::T]
            position += num_rows * T
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
    parts = (torch.from_numpy(rows[i:i + num_rows].astype(np.int64)).to(DEVICE)
             for i in range(0, len(rows), num_rows))
    return [(part[:, :-1], part[:, 1:]) for part in parts]


# --- model ----------------------------------------------------------------------------------------

def attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float) -> Tensor:
    """Causal attention of each row; (B, T, H, D) in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return y.transpose(1, 2)


class Init(NamedTuple):
    """How a parameter starts: uniform or normal with a standard deviation, or a constant."""

    kind: str
    number: float


def parameter_table() -> dict[str, tuple[str, Init]]:
    """Pattern of a parameter's name -> (role, initialisation).

    The role chooses the parameter's optimizer group, see recipes.optimizer_groups. A parameter that
    no pattern fits is refused.
    """
    zero = Init("constant", 0.0)

    # (#1) what is added to the stream smaller by sqrt(2 num_layers)
    embed = into_layer = Init("normal", 0.02)
    out = proj = Init("normal", 0.02 * (2 * NUM_LAYERS) ** -0.5)
    qkv = into_layer
    return {
        "embed.weight": ("embed", embed),
        "position.weight": ("embed", embed),
        "*.qkv.weight": ("attn_in", qkv),
        "*.out.weight": ("attn_out", out),
        "*.fc.weight": ("mlp_in", into_layer),
        "*.proj.weight": ("mlp_out", proj),
        "*.bias": ("scalar", zero),
        "*ln.weight": ("scalar", Init("constant", 1.0)),
    }


def parameter_entry(name: str) -> tuple[str, Init]:
    """(role, initialisation) of the parameter `name`; ValueError where the table has none."""
    for pattern, entry in parameter_table().items():
        if fnmatchcase(name, pattern):
            return entry
    raise ValueError(f"no role and no initialisation for parameter {name}: add a line to "
                     "parameter_table")


@torch.no_grad()
def init_weights(model: "GPT", seed: int) -> None:
    """Set every parameter, by name, from one seed; the same values on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        _, (kind, number) = parameter_entry(name)
        if kind == "constant" or number == 0:
            p.fill_(number)
        elif kind == "uniform":
            bound = math.sqrt(3) * number
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        else:
            p.copy_(torch.empty(p.shape).normal_(0, number, generator=generator))


class Linear(nn.Module):
    """y = x W^T; the weight (out, in) is cast where it is used."""

    def __init__(self, in_dim: int, out_dim: int, compute_dtype: torch.dtype,
                 dtype: torch.dtype | None = None, bias: bool = False):
        super().__init__()
        dtype = dtype or torch.promote_types(compute_dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype
        weight = self.weight
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), bias)


class Embedding(nn.Embedding):
    """nn.Embedding without its default initialisation (7 s for the tables of record 62)."""

    def reset_parameters(self) -> None:
        pass


class Attention(nn.Module):
    """Causal self-attention; adds to the residual stream."""

    def __init__(self):
        super().__init__()
        dim, dtype = MODEL_DIM, torch.bfloat16
        self.scale = HEAD_DIM ** -0.5
        self.ln = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim, dtype, bias=True)
        self.out = Linear(dim, dim, dtype, bias=True)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTC = self.ln(x_BTC)
        q_BTHD, k_BTHD, v_BTHD = self.qkv(h_BTC).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)

        v_BTHD = v_BTHD.type_as(q_BTHD)

        q, k, v = q_BTHD, k_BTHD, v_BTHD

        y_BTHD = attention(q, k, v, self.scale).reshape(q_BTHD.shape)
        y_BTC = self.out(y_BTHD.flatten(-2))
        return x_BTC + y_BTC


class MLP(nn.Module):
    """Two matrices with an activation between; adds to the residual stream."""

    def __init__(self):
        super().__init__()
        dim, dtype = MODEL_DIM, torch.bfloat16
        self.ln = nn.LayerNorm(dim)
        self.fc = Linear(dim, MLP_RATIO * dim, dtype, bias=True)
        self.proj = Linear(MLP_RATIO * dim, dim, dtype, bias=True)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTC = self.ln(x_BTC)
        h = self.fc(h_BTC)
        h = F.gelu(h, approximate="tanh")  # (#1)
        return x_BTC + self.proj(h)


class Block(nn.Module):
    """One layer: skips and embeddings into the stream, then attention and MLP."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = MLP()

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.attn(x_BTC)
        x_BTC = self.mlp(x_BTC)
        return x_BTC


class GPT(nn.Module):
    """tokens -> embedding -> blocks -> head -> loss."""

    def __init__(self):
        super().__init__()
        dim, rows = MODEL_DIM, PADDED_VOCAB_SIZE
        table_dtype, self.stream_dtype = torch.float32, torch.float32

        self.embed = Embedding(rows, dim, dtype=table_dtype)
        self.position = Embedding(SEQ_LEN, dim, dtype=table_dtype)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.ln = nn.LayerNorm(dim)
        self.lm_head = Linear(dim, rows, torch.bfloat16, torch.float32)
        self.lm_head.weight = self.embed.weight

        # Rotary tables of every position.
        positions = SEQ_LEN
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(positions, HEAD_DIM // 2), persistent=False)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, divisor: float = 1.0) -> Tensor:
        """The summed cross-entropy, over `divisor`, of predicting targets from inputs."""
        return self.head_loss(self.hidden(inputs_BT), targets_BT, divisor)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head."""
        x_BTC = self.embed_tokens(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.final_norm(x_BTC)

    def embed_tokens(self, tokens_BT: Tensor) -> Tensor:
        """The embedding, what all layers share, and the value embeddings by their table."""
        stream = self.stream_dtype
        table = self.embed
        x_BTC = F.embedding(tokens_BT, table.weight).to(stream)
        x_BTC = x_BTC + self.position.weight[:tokens_BT.size(1)]  # (#1)

        return x_BTC

    def final_norm(self, x_BTC: Tensor) -> Tensor:
        return self.ln(x_BTC)

    def head_loss(self, x_BTC: Tensor, targets_BT: Tensor, divisor: float) -> Tensor:
        """Cross-entropy in nats, summed over the B*T tokens, over `divisor`."""
        x_NC = x_BTC.flatten(0, 1)
        z_NV = self.lm_head(x_NC).float()
        return F.cross_entropy(z_NV, targets_BT.flatten(), reduction="sum") / divisor


# --- optimizer ------------------------------------------------------------------------------------

def mix(x: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
    return torch.lerp(x, y, weight)


def minus(x: Tensor, y: Tensor, factor: float | Tensor) -> Tensor:
    return torch.sub(x, y, alpha=factor)


def stepped(param: Tensor, update: Tensor, lr, weight_decay) -> Tensor:
    """param - lr * scale * update, after weight decay: lr * wd of it ("lr"), or lr * (lr * scale) *
    wd ("lr2", which anneals as the schedule squared: records 43 on). Cautious: decay only entries
    that the update shrinks as well (update * param >= 0 for True, > 0 for "strict")."""
    keep = 1 - (lr * weight_decay)
    return minus(torch.mul(param, keep), update, lr)


def adam_update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
                lr, beta1, beta2, weight_decay) -> tuple[Tensor, ...]:
    """(param, exp_avg, exp_avg_sq, step) after one step of Adam or AdamW; `step` broadcasts."""
    step = step + 1
    exp_avg = mix(grad, exp_avg, beta1)
    exp_avg_sq = mix(grad.square(), exp_avg_sq, beta2)
    # 1 - beta^t by expm1: the plain form loses 5e-5 of 1 - 0.999 in fp32
    logs = (torch.as_tensor(beta, dtype=torch.float64).log() for beta in (beta1, beta2))
    correct1, correct2 = (-torch.expm1(step * log) for log in logs)
    update = exp_avg / correct1 / ((exp_avg_sq / correct2).sqrt_() + 1e-08)
    new = stepped(param, update, lr, weight_decay)
    return new, exp_avg, exp_avg_sq, step


# The optimizer's groups by the role of a parameter; learning rates are times
# lr_multiplier(step).
GROUPS = {
    "attn_in": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "attn_out": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "mlp_in": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "mlp_out": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "embed": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "scalar": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.0},
}


class Optimizer:
    """Muon and Adam. Gradients are summed over ranks, from within the backward pass that completes
    them. Each rank updates its share of Muon's matrices and sends them to the others; what Adam
    trains is updated by all."""

    def __init__(self, model: nn.Module):
        self.groups = {role: dict(options, params=[]) for role, options in GROUPS.items()}
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.reductions = []
        for name, p in model.named_parameters():
            role, _ = parameter_entry(name)
            self.groups[role]["params"].append(p)
            self.state[p] = {}
            if WORLD_SIZE > 1:
                dist.broadcast(p.data, 0)

    def reduce(self, p: Tensor) -> None:
        self.reductions.append(dist.all_reduce(p.grad, async_op=True))

    @torch.no_grad()
    def step(self, step: int, divisor: float, num_tokens: int) -> None:
        """The update of `step`."""
        groups = self.groups
        params = [p for group in groups.values() for p in group["params"] if p.grad is not None]
        if WORLD_SIZE > 1:
            for p in params:
                self.reduce(p)
            for reduction in self.reductions:
                reduction.wait()
        self.reductions = []
        # the norm of all gradients of the mean loss together (#1)
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.grad.mul_((GRAD_CLIP * num_tokens / divisor / (norm + 1e-6)).clamp(max=1.0))

        lr, sends = lr_multiplier(step), []
        for group in groups.values():
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.adam_step(p, group, group["lr"] * lr)
                p.grad = None
        for send in sends:
            send.wait()

    def adam_step(self, p: Tensor, adam: dict, lr: float) -> None:
        state, wide = self.state[p], torch.promote_types(p.dtype, torch.float32)
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
        weight = p
        beta1, beta2 = adam["betas"]
        new, state["exp_avg"], state["exp_avg_sq"], state["step"] = adam_update(
            weight, p.grad.to(wide), state["exp_avg"], state["exp_avg_sq"], state["step"], lr=lr,
            beta1=beta1, beta2=beta2, weight_decay=adam["weight_decay"])
        p.copy_(new)


# --- schedules ------------------------------------------------------------------------------------

def batch_tokens() -> int:
    return BATCH_TOKENS


def batch_shape() -> tuple[int, int]:
    """(rows, tokens a row) of the global batch of `step`, before ranks exist."""
    return NUM_ROWS, batch_tokens() // NUM_ROWS


def lr_multiplier(step: int) -> float:
    """What the learning rates are multiplied by at the update of `step` (0-based).

    Linear warm-up, hold, then down to final_lr_frac, reached where the schedule ends.
    """
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    end = SCHEDULED_STEPS
    left = min(1.0, max(0, end - step) / COOLDOWN_STEPS)
    left = (1 - math.cos(math.pi * left)) / 2
    return left


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
    num_tokens = rows.shape[0] * (rows.shape[1] - 1)
    divisor = num_tokens  # gradients of the mean loss
    optimizer.step_count, batches = step, micro_batches(rows)
    for i, (inputs_BT, targets_BT) in enumerate(batches):
        if WORLD_SIZE > 1:
            optimizer.completing = i == len(batches) - 1
        model(inputs_BT, targets_BT, divisor).backward()
    optimizer.step(step, divisor, num_tokens)


def build_graphs(model: GPT) -> None:
    """Forward and backward pass of a micro-batch of `step`, of random tokens."""
    num_rows, T = batch_shape()
    rows = np.random.default_rng(0).integers(0, BOS_ID, (num_rows, T + 1))
    inputs_BT, targets_BT = micro_batches(rows)[0]
    model(inputs_BT, targets_BT, 1.0).backward()


def compile_model(model: GPT) -> None:
    """Compile blocks and head; build the graphs of each third of the schedule on random tokens,
    before the clock starts. Nothing is updated, and the gradients are dropped."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile()
    model.head_loss = torch.compile(model.head_loss)
    build_graphs(model)
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()


class Log:
    """A log in the public format, by rank 0: source, environment, step lines."""

    def __init__(self) -> None:
        self.path = Path("logs") / f"{uuid.uuid4()}.txt"
        if RANK == 0:
            self.path.parent.mkdir(exist_ok=True)
            hardware = torch.cuda.get_device_name() if CUDA else "CPU"
            rule = "=" * 100
            self.write(Path(__file__).read_text() + rule)
            self.write(f"Running Python {sys.version.split()[0]}")
            self.write(f"Running PyTorch {torch.version.__version__} compiled for CUDA "
                       f"{torch.version.cuda} on {hardware} with world_size {WORLD_SIZE}")
            if CUDA:
                self.write(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
            self.write(rule)

    def write(self, text: str) -> None:
        with open(self.path, "a") as file:
            file.write(f"{text}\n")

    def line(self, text: str) -> None:
        if RANK == 0:
            print(text, flush=True)
            self.write(text)


def train(train_files: list[Path], val_files: list[Path], seed: int, log: Log) -> None:
    model = GPT()
    init_weights(model, seed)
    model.to(DEVICE)
    optimizer = Optimizer(model)
    validation = val_rows(val_files)
    batches = train_batches(train_files)
    if CUDA:
        compile_model(model)
    train_s, t0 = 0.0, time.perf_counter()
    for step in range(NUM_ITERATIONS + 1):
        last = step == NUM_ITERATIONS
        if last or step % VAL_EVERY == 0:
            if CUDA:
                torch.cuda.synchronize()
            train_s += time.perf_counter() - t0
            val_loss = evaluate(model, validation)
            log.line(f"step:{step}/{NUM_ITERATIONS} val_loss:{val_loss:.6f} "
                     f"train_time:{1000 * train_s:.0f}ms "
                     f"step_avg:{1000 * train_s / max(1, step):.2f}ms")
            t0 = time.perf_counter()
        if last:
            break
        train_step(model, optimizer, next(batches), step)
        elapsed_ms = 1000 * (train_s + time.perf_counter() - t0)
        log.line(f"step:{step + 1}/{NUM_ITERATIONS} train_time:{elapsed_ms:.0f}ms "
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
    if not CUDA:
        sys.exit("record 1 at full size needs a GPU with bf16; "
                 "for a CPU: python -m flat 1 --scale pocket")
    if WORLD_SIZE > 1:
        if CUDA:
            torch.cuda.set_device(DEVICE)
        dist.init_process_group("nccl" if CUDA else "gloo")
    train(train_files, val_files, seed, Log())
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
