"""Record 1: llm.c baseline.

    python record1.py DATA_DIR [SEED]
    torchrun --standalone --nproc_per_node 8 record1.py DATA_DIR

DATA_DIR has shards *train*.bin and *val*.bin of GPT-2 tokens. One GPU or many, bf16; any
number of ranks sees the same tokens in the same steps. The log goes to logs/, its source included.
Printed by `python -m flat 1`.

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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# model
NUM_LAYERS = 12
HEAD_DIM = 64
SEQ_LEN = 1024
MLP_RATIO = 4
BOS_ID = 50_256
MODEL_DIM = 768
PADDED_VOCAB_SIZE = 50_257
# training
NUM_ITERATIONS = 19_560
WARMUP_STEPS = 700
COOLDOWN_STEPS = 18_860
GRAD_CLIP = 1.0
VAL_TOKENS = 10_485_760
VAL_EVERY = 250
NUM_ROWS = 512

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
    return np.lib.stride_tricks.sliding_window_view(tokens, SEQ_LEN + 1)[::SEQ_LEN]


def micro_batches(rows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of this rank's rows: consecutive runs, the first ranks' one row longer."""
    rows = np.array_split(rows, WORLD_SIZE)[RANK]
    num_rows = max(1, MICRO_BATCH_TOKENS // (rows.shape[1] - 1))
    parts = (torch.from_numpy(rows[i:i + num_rows].astype(np.int64))
             for i in range(0, len(rows), num_rows))
    return [(part[:, :-1], part[:, 1:]) for part in parts]


# --- model ----------------------------------------------------------------------------------------

# Role (which is its optimizer group) and start of each kind of parameter: uniform or normal with
# a standard deviation, or a constant.
PARAMETERS = {
    "embed.weight": ("embed", ("normal", 0.02)),
    "position.weight": ("embed", ("normal", 0.02)),
    "blocks.attn.ln.weight": ("scalar", ("constant", 1.0)),
    "blocks.attn.ln.bias": ("scalar", ("constant", 0.0)),
    "blocks.attn.qkv.weight": ("attn_in", ("normal", 0.02)),
    "blocks.attn.qkv.bias": ("scalar", ("constant", 0.0)),
    "blocks.attn.out.weight": ("attn_out", ("normal", 0.02 * (2 * NUM_LAYERS) ** -0.5)),
    "blocks.attn.out.bias": ("scalar", ("constant", 0.0)),
    "blocks.mlp.ln.weight": ("scalar", ("constant", 1.0)),
    "blocks.mlp.ln.bias": ("scalar", ("constant", 0.0)),
    "blocks.mlp.fc.weight": ("mlp_in", ("normal", 0.02)),
    "blocks.mlp.fc.bias": ("scalar", ("constant", 0.0)),
    "blocks.mlp.proj.weight": ("mlp_out", ("normal", 0.02 * (2 * NUM_LAYERS) ** -0.5)),
    "blocks.mlp.proj.bias": ("scalar", ("constant", 0.0)),
    "ln.weight": ("scalar", ("constant", 1.0)),
    "ln.bias": ("scalar", ("constant", 0.0)),
}


@torch.no_grad()
def init_weights(model: "GPT", seed: int) -> None:
    """Set every parameter, by name, from one seed; the same values on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        _, (kind, number) = PARAMETERS[re.sub(r"\.\d+(?=\.)", "", name)]
        if kind == "constant" or number == 0:
            p.fill_(number)
        else:
            p.copy_(torch.empty(p.shape).normal_(0, number, generator=generator))


class Linear(nn.Module):
    """y = x W^T; the weight (out, in) is cast where it is used."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16), bias)


class Attention(nn.Module):
    """Causal self-attention: what it adds to the residual stream."""

    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(MODEL_DIM)
        self.qkv = Linear(MODEL_DIM, 3 * MODEL_DIM, bias=True)
        self.out = Linear(MODEL_DIM, MODEL_DIM, bias=True)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTC = self.ln(x_BTC)
        q_BTHD, k_BTHD, v_BTHD = self.qkv(h_BTC).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)

        # Causal attention of each row; (B, T, H, D) in and out.
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=HEAD_DIM ** -0.5)
        y_BTHD = y.transpose(1, 2)
        y_BTC = self.out(y_BTHD.flatten(-2))
        return y_BTC


class MLP(nn.Module):
    """Two matrices with an activation between: what they add to the residual stream."""

    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(MODEL_DIM)
        self.fc = Linear(MODEL_DIM, MLP_RATIO * MODEL_DIM, bias=True)
        self.proj = Linear(MLP_RATIO * MODEL_DIM, MODEL_DIM, bias=True)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTC = self.ln(x_BTC)
        h = self.fc(h_BTC)
        h = F.gelu(h, approximate="tanh")  # (#1)
        return self.proj(h)


class Block(nn.Module):
    """One layer: skips and embeddings into the stream, then attention and MLP."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = MLP()

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(x_BTC)
        x_BTC = x_BTC + self.mlp(x_BTC)
        return x_BTC


class GPT(nn.Module):
    """tokens -> embedding -> blocks -> head -> loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(PADDED_VOCAB_SIZE, MODEL_DIM, dtype=torch.float32)
        self.position = nn.Embedding(SEQ_LEN, MODEL_DIM, dtype=torch.float32)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.ln = nn.LayerNorm(MODEL_DIM)
        self.lm_head = Linear(MODEL_DIM, PADDED_VOCAB_SIZE)
        self.lm_head.weight = self.embed.weight

        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(SEQ_LEN, HEAD_DIM // 2), persistent=False)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, divisor: float = 1.0) -> Tensor:
        """The summed cross-entropy, over `divisor`, of predicting targets from inputs."""
        targets_BT = targets_BT.to(DEVICE, non_blocking=True)
        return self.head_loss(self.hidden(inputs_BT), targets_BT, divisor)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head."""
        tokens_BT = tokens_BT.to(DEVICE, non_blocking=True)
        # The embedding and what all layers share.
        table = self.embed
        x_BTC = F.embedding(tokens_BT, table.weight)
        x_BTC = x_BTC + self.position.weight[:tokens_BT.size(1)]  # (#1)

        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.ln(x_BTC)

    def head_loss(self, x_BTC: Tensor, targets_BT: Tensor, divisor: float) -> Tensor:
        """Cross-entropy in nats, summed over the B*T tokens, over `divisor`."""
        x_NC = x_BTC.flatten(0, 1)
        z_NV = self.lm_head(x_NC).float()
        return F.cross_entropy(z_NV, targets_BT.flatten(), reduction="sum") / divisor


# --- optimizer ------------------------------------------------------------------------------------

# The optimizer's groups by the role of a parameter; lr is that of the peak.
GROUPS = {
    "attn_in": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "attn_out": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "mlp_in": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "mlp_out": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "embed": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "scalar": {"lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.0},
}


class Optimizer:
    """Gradients are summed over ranks."""

    def __init__(self, model: nn.Module):
        self.groups = {role: dict(options, params=[]) for role, options in GROUPS.items()}
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.reductions = []
        for name, p in model.named_parameters():
            role, _ = PARAMETERS[re.sub(r"\.\d+(?=\.)", "", name)]
            self.groups[role]["params"].append(p)
            self.state[p] = {}
            if WORLD_SIZE > 1:
                dist.broadcast(p.data, 0)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """The update of `step`."""
        groups = self.groups
        params = [p for group in groups.values() for p in group["params"] if p.grad is not None]
        if WORLD_SIZE > 1:
            for p in params:
                self.reductions.append(dist.all_reduce(p.grad, async_op=True))
            for reduction in self.reductions:
                reduction.wait()
        self.reductions = []
        # the norm of all gradients of the mean loss together (#1)
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.grad.mul_((GRAD_CLIP / (norm + 1e-6)).clamp(max=1.0))

        lr = lr_multiplier(step)
        for group in groups.values():
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.adam_step(p, group, group["lr"] * lr)
                p.grad = None

    def adam_step(self, p: Tensor, adam: dict, lr: float) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=DEVICE)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        # The update of Adam: the mean gradient over the root of its mean square.
        beta1, beta2 = adam["betas"]
        step = state["step"].add_(1)
        mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
        mean_square = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
        # 1 - beta^t by expm1: the plain form loses 5e-5 of 1 - 0.999 in fp32
        logs = (torch.as_tensor(beta, dtype=torch.float64).log() for beta in (beta1, beta2))
        correct1, correct2 = (-torch.expm1(step * log) for log in logs)
        update = mean / correct1 / (mean_square / correct2).sqrt_().add_(1e-8)
        # param -= lr * scale * update, after weight decay. Param loses lr * weight_decay of
        # itself.
        keep = 1 - lr * adam["weight_decay"]
        p.mul_(keep)
        p.sub_(update, alpha=lr)


# --- schedules ------------------------------------------------------------------------------------

def lr_multiplier(step: int) -> float:
    """What the learning rates are multiplied by at the update of `step` (0-based).

    Linear warm-up over WARMUP_STEPS.
    """
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    left = min(1.0, max(0, NUM_ITERATIONS - step) / COOLDOWN_STEPS)
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
    batches = micro_batches(rows)
    for i, (inputs_BT, targets_BT) in enumerate(batches):
        if WORLD_SIZE > 1:
            optimizer.completing = i == len(batches) - 1
        model(inputs_BT, targets_BT, num_tokens).backward()
    optimizer.step(step)


def compile_model(model: GPT) -> None:
    """Compile blocks and head; build their graphs on random tokens, before the clock starts."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile()
    model.head_loss = torch.compile(model.head_loss)
    rows = np.random.default_rng(0).integers(0, BOS_ID, (NUM_ROWS, SEQ_LEN + 1))
    inputs_BT, targets_BT = micro_batches(rows)[0]
    model(inputs_BT, targets_BT, NUM_ROWS * SEQ_LEN).backward()
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
            val_loss = evaluate(model, validation)
            log(f"step:{step}/{NUM_ITERATIONS} val_loss:{val_loss:.6f} "
                f"train_time:{1000 * train_s:.0f}ms "
                f"step_avg:{1000 * train_s / max(1, step):.2f}ms")
            t0 = time.perf_counter()
        if last:
            break
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
        sys.exit("record 1 at full size needs a GPU with bf16; "
                 "for a CPU: python -m flat 1 --scale pocket")
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
