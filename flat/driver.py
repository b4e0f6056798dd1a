"""The plain second form of the machinery: loader, kernels, ranks, optimizer driver, loop.

flat/program.py prints what is below the marker, with the definitions of model.py, muon.py and
recipes.py put in, and folds a recipe `r` and its model's config `c` into the text. A definition
here takes the place of one with its name there; methods of class GPT join those of model.GPT. This
file is text for that purpose, not a module to import.
"""
# -------------------------------------------------------------------------------------- the program
"""Record {RECORD}: {TITLE}.

    python record{RECORD}.py DATA_DIR [SEED]
    torchrun --standalone --nproc_per_node 8 record{RECORD}.py DATA_DIR

DATA_DIR has shards *train*.bin and *val*.bin of {TOKENS}. One GPU or many, {DEVICES}; any
number of ranks sees the same tokens in the same steps. The log goes to logs/, its source included.
Printed by `python -m flat {WORDS}`.

Shapes: B rows, T tokens a row, C model_dim, H heads, D head_dim, V vocabulary (padded).
"""

import functools
import hashlib
import itertools
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

# <- constants

MICRO_BATCH_TOKENS = 65_536     # per rank; more are accumulated
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK, CUDA = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")
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
        if r.data_align == "none":
            position = 0
            while True:
                num_rows, T = batch_shape(step)
                rows = tokens[position:position + num_rows * T + 1]
                if len(rows) <= num_rows * T:
                    break
                yield np.lib.stride_tricks.sliding_window_view(rows, T + 1)[::T]
                if r.first_batch_repeated:  # steps 0 and 1 saw the same batch (#4 to #11)
                    position += num_rows * T if step > 0 else 0
                else:
                    position += num_rows * T
                step += 1
        elif r.data_align == "row":  # each row starts at a document (#26)
            starts, doc = np.flatnonzero(tokens == c.bos_id), 0
            while True:
                num_rows, T = batch_shape(step)
                rows = []
                while len(rows) < num_rows and doc < len(starts):
                    row = tokens[starts[doc]:starts[doc] + T + 1]
                    if len(row) <= T:
                        break
                    rows.append(row)
                    doc = np.searchsorted(starts, starts[doc] + T)
                if len(rows) < num_rows:
                    break
                yield np.stack(rows)
                step += 1
        else:  # rows of whole documents, long ones cut (#29)
            starts, doc = np.flatnonzero(tokens == c.bos_id), 0
            ends = np.append(starts[1:], len(tokens))
            if r.max_doc_len is not None:
                ends = np.minimum(ends, starts + r.max_doc_len)
            while True:
                num_rows, T = batch_shape(step)
                rows = []
                for _ in range(num_rows):
                    parts, length = [], 0
                    while length <= T and doc < len(starts):
                        if r.max_doc_stages:  # (#72)
                            parts.append(tokens[starts[doc]:ends[doc]][:max_doc_len(step)])
                        else:
                            parts.append(tokens[starts[doc]:ends[doc]])
                        length, doc = length + len(parts[-1]), doc + 1
                    if length <= T:
                        break
                    rows.append(np.concatenate(parts)[:T + 1])
                if len(rows) < num_rows:
                    break
                yield np.stack(rows)
                step += 1
    sys.exit(f"the training data end before step {step}: expected more shards of tokens")


def read_prefixes(file: Path) -> Tensor:
    """(V,) the longest token that each token begins with, or -1, for the prefix loss (#88)."""
    if not file.is_file():
        sys.exit(f"{file}: expected this project's data/{file.name} beside the shards, found none")
    table = torch.from_numpy(np.load(file).astype(np.int64))
    return torch.where(table == 65_535, -1, table)


def val_rows(files: list[Path]) -> np.ndarray:
    """(rows, T + 1): the first VAL_TOKENS tokens of the validation data, and their targets."""
    tokens = np.concatenate([read_shard(file) for file in files])[:r.val_tokens + 1]
    if len(tokens) <= r.val_tokens:
        sys.exit(f"expected {VAL_TOKENS + 1} tokens of validation data, found {len(tokens)}")
    return np.lib.stride_tricks.sliding_window_view(tokens, r.val_row + 1)[::r.val_row]


def micro_batches(rows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of this rank's rows: consecutive runs, the first ranks' one row longer."""
    rows = np.array_split(rows, WORLD_SIZE)[RANK]
    num_rows = max(1, MICRO_BATCH_TOKENS // (rows.shape[1] - 1))
    parts = (torch.from_numpy(rows[i:i + num_rows].astype(np.int64))
             for i in range(0, len(rows), num_rows))
    return [(part[:, :-1], part[:, 1:]) for part in parts]


# --- model ----------------------------------------------------------------------------------------

def norm(x: Tensor, eps: float | None) -> Tensor:
    """RMSNorm without parameters, of the last dimension (Zhang and Sennrich 2019)."""
    if c.norm_eps is None:
        return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(x.dtype).eps)
    return F.rms_norm(x, (x.size(-1),), eps=c.norm_eps)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def document_ids(tokens_BT: Tensor, bos_id: int) -> Tensor:
    """(B, T): a running number of the document that a token is in."""
    return (tokens_BT == c.bos_id).cumsum(1)


class Keys(NamedTuple):
    """Which keys the queries of packed rows see: their own document's, back to a window."""

    cu_seqlens: Tensor  # int32: where documents begin, in all rows laid end to end
    # on the CPU: ints here would make torch.compile build a graph for each
    longest: Tensor     # document
    window: Tensor


def packed_keys(doc_BT: Tensor, window: int, dtype: torch.dtype, docs: Tensor | None) -> Keys:
    """The keys of causal attention inside documents, at most `window` of them, self included."""
    if c.compute_dtype == "bf16":
        starts_BT = torch.ones_like(doc_BT, dtype=torch.bool)
        starts_BT[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
        starts = starts_BT.flatten().nonzero().flatten()
        cu_seqlens = F.pad(starts, (0, 1), value=doc_BT.numel()).int()
        longest, cu_seqlens = cu_seqlens.diff().max(), cu_seqlens.to(DEVICE, non_blocking=True)
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one graph for any number of documents
        return Keys(cu_seqlens=cu_seqlens, longest=longest, window=torch.tensor(window))
    i = torch.arange(doc_BT.size(1))
    near_TT = (i[:, None] >= i) & (i[:, None] - i < window)
    return (near_TT & (doc_BT[:, :, None] == doc_BT[:, None, :]))[:, None].to(DEVICE)


@torch.compiler.disable
def packed_attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float,
                     keys: Keys) -> Tensor:
    """Varlen flash attention; torch.compile fuses what is before and behind it."""
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q_BTHD, k_BTHD, v_BTHD))
    longest, window = int(keys.longest), int(keys.window)
    y = varlen_attn(q, k, v, keys.cu_seqlens, keys.cu_seqlens, longest, longest, scale=scale,
                    window_size=(window - 1, 0))
    return y.view_as(q_BTHD)


def attention(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float,
              keys: Keys | None) -> Tensor:
    """Causal attention of each row; (B, T, H, D) in and out."""
    if c.packed:
        if c.compute_dtype == "bf16":
            return packed_attention(q_BTHD, k_BTHD, v_BTHD, scale, keys)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    if c.packed:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return y.transpose(1, 2)


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
        x_factor, w_factor, _ = c.fp8_factors
        x8 = Fp8Matmul.quantize(x_NC, x_factor, torch.float8_e4m3fn)
        w8 = Fp8Matmul.quantize(w_VC, w_factor, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8)
        ctx.divisor, ctx.w_dtype = divisor, w_VC.dtype
        return Fp8Matmul.product(x8, w8, x_factor, w_factor, torch.bfloat16, True)

    @staticmethod
    def backward(ctx, grad_NV: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, w8 = ctx.saved_tensors
        x_factor, w_factor, g_factor = c.fp8_factors
        g_factor = g_factor * ctx.divisor   # a factor is meant for the gradient of the summed loss
        g8 = Fp8Matmul.quantize(grad_NV, g_factor, torch.float8_e5m2)
        dx = Fp8Matmul.product(g8, w8.T.contiguous(), g_factor, w_factor, torch.bfloat16, False)
        dw = Fp8Matmul.product(g8.T.contiguous(), x8.T.contiguous(), g_factor, x_factor,
                               torch.float32, False)
        return dx, dw.to(ctx.w_dtype), None


# <- parameters


def parameter_entry(name: str) -> tuple:
    return PARAMETERS[re.sub(r"\.\d+(?=\.)", "", name)]


# <- model


class GPT:
    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, divisor: float = 1.0) -> Tensor:
        """The summed cross-entropy, over `divisor`, of predicting targets from inputs."""
        targets_BT = targets_BT.to(DEVICE, non_blocking=True)
        if r.val_row > 65_536:  # validation has longer rows, whose logits would not fit
            x_BTC = self.hidden(inputs_BT)
            parts = zip(x_BTC.split(MICRO_BATCH_TOKENS, 1), targets_BT.split(MICRO_BATCH_TOKENS, 1))
            return sum(self.head_loss(x, y, divisor) for x, y in parts)
        return self.head_loss(self.hidden(inputs_BT), targets_BT, divisor)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head."""
        if c.packed:
            keys = self.attention_keys(tokens_BT)  # on the CPU: a GPU would have to wait for it
        tokens_BT = tokens_BT.to(DEVICE, non_blocking=True)
        x_BTC, shared, values = self.embed_tokens(tokens_BT)
        if LAYERS_ALIKE:
            for block in self.blocks:
                x_BTC = block(x_BTC, shared, None, None, None, None, None)
        else:
            if c.token_gates:
                extras = by_layer(shared["gates"], self.plan_early)
            outputs: dict[int, Tensor] = {}
            for i, block in enumerate(self.blocks):
                layer = self.plan[i]
                if c.token_gates:  # (#85)
                    if i == gates_layer(c):
                        extras |= by_layer(self.gates_late(x_BTC), self.plan_late)
                if c.mudd:
                    own = extras.get(i, Extras()) if c.token_gates else Extras()
                else:
                    own = None
                x_BTC = block(
                    x_BTC, shared,
                    values.get(layer.value_table) if c.value_embeds != "none" else None,
                    keys[layer.keys] if c.packed else None,
                    outputs.get(layer.skip_from) if c.unet != "none" else None,
                    outputs.get(layer.attn_from) if c.late_input else None,
                    own)
                outputs[i] = x_BTC
        return self.final_norm(x_BTC, shared, values, outputs)

    def head_loss(self, x_BTC: Tensor, targets_BT: Tensor, divisor: float) -> Tensor:
        """Cross-entropy in nats, summed over the B*T tokens, over `divisor`."""
        x_NC = x_BTC.flatten(0, 1)
        if c.head == "fp8":  # in training (#19)
            if self.training:
                z_NV = Fp8Matmul.apply(x_NC, self.lm_head.weight, divisor).float()
            else:
                z_NV = self.lm_head(x_NC).float()
        else:
            z_NV = self.lm_head(x_NC).float()
        if c.logit_softcap is not None:
            if c.softcap_kind == "tanh":  # (#9) Gemma 2
                z_NV = c.logit_softcap * torch.tanh((z_NV + c.softcap_shift) / c.softcap.div)
            else:  # (#19) the same curve moved up, which softmax does not see
                z_NV = c.logit_softcap * torch.sigmoid((z_NV + c.softcap_shift) / c.softcap.div)
        if r.num_targets > 1:  # (#53) several tokens ahead, inside the row
            loss = 0.0
            if r.prefix_weight:  # (#88) the longest token that the next one begins with
                weights = self.target_weights[:self.num_ahead]
                if len(self.target_weights) > self.num_ahead:
                    y_BT = self.prefixes[targets_BT]
                    loss = self.target_weights[-1] * F.cross_entropy(
                        z_NV, y_BT.flatten(), ignore_index=-1, reduction="sum")
            else:
                weights = self.target_weights
            for ahead, weight in enumerate(weights):
                y_BT = F.pad(targets_BT[:, ahead:], (0, ahead), value=-1)
                loss = loss + weight * F.cross_entropy(z_NV, y_BT.flatten(), ignore_index=-1,
                                                       reduction="sum")
            return loss / divisor
        return F.cross_entropy(z_NV, targets_BT.flatten(), reduction="sum") / divisor


# --- optimizer ------------------------------------------------------------------------------------

def normalize(G: Tensor, dim: tuple[int, ...], factor: float = 1.0, eps: float = 0.0) -> Tensor:
    norm = factor * G.norm(dim=dim, keepdim=True)
    return G / norm.clamp(min=2.0**-126)


# <- muon


# <- groups


class Optimizer:
    """Gradients are summed over ranks. Each rank updates its share of Muon's matrices and sends
    them to the others (#3); what Adam trains is updated by all."""

    def __init__(self, model: nn.Module):
        self.groups = {role: dict(options, params=[]) for role, options in GROUPS.items()}
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        if r.adam_every > 1:
            self.group_of: dict[Tensor, dict] = {}
        if r.matrix_rule == "muon":
            self.owner: dict[Tensor, int] = {}  # the rank that updates a matrix
        self.reductions = []
        self.completing = False     # whether this backward pass is the last one of its step
        for name, p in model.named_parameters():
            role, _ = parameter_entry(name)
            if r.matrix_rule == "muon":
                self.owner[p] = len(self.groups[role]["params"]) % WORLD_SIZE
            self.groups[role]["params"].append(p)
            self.state[p] = {}
            if r.adam_every > 1:
                self.group_of[p] = self.groups[role]
            if WORLD_SIZE > 1:
                dist.broadcast(p.data, 0)
                if r.grad_overlap and r.grad_clip is None:
                    p.register_post_accumulate_grad_hook(self.reduce_early)

    def reduce(self, p: Tensor) -> None:
        self.reductions.append(dist.all_reduce(p.grad, async_op=True))

    def reduce_early(self, p: Tensor) -> None:
        """Called within each backward pass; the last one of a step completes the gradients."""
        if r.adam_every > 1:
            if self.completing and self.is_due(self.group_of[p]):
                self.reduce(p)
        elif self.completing:
            self.reduce(p)

    def is_due(self, group: dict) -> bool:
        """Adam steps every ADAM_EVERY-th time, on the gradients since then (#39)."""
        return group["rule"] == "muon" or (self.step_count + 1) % r.adam_every == 0

    @torch.no_grad()
    def step(self, step: int, divisor: float, num_tokens: int) -> None:
        """The update of `step`."""
        if r.adam_every > 1:
            groups = {role: group for role, group in self.groups.items() if self.is_due(group)}
        else:
            groups = self.groups
        if r.freeze_steps:
            if _scalars_frozen(step):  # just after windows, batch or targets changed (#52)
                groups = {role: group for role, group in groups.items() if role != "scalar"}
                for p in self.groups["scalar"]["params"]:
                    p.grad = None
        params = [p for group in groups.values() for p in group["params"] if p.grad is not None]
        if WORLD_SIZE > 1:
            if not (r.grad_overlap and r.grad_clip is None):
                for p in params:
                    self.reduce(p)
            for reduction in self.reductions:
                reduction.wait()
        self.completing, self.reductions = False, []
        if r.grad_clip is not None:  # the norm of all gradients of the mean loss together (#1)
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            if r.loss_divisor is None:
                clip = r.grad_clip
            else:
                clip = r.grad_clip * num_tokens / divisor
            for p in params:
                p.grad.mul_((clip / (norm + 1e-6)).clamp(max=1.0))

        lr, sends = lr_multiplier(step), []
        for group in groups.values():
            if r.momentum_warmup_steps or r.momentum_cooldown_steps:
                group["momentum"] = momentum(step)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if r.matrix_rule == "muon":
                    if group["rule"] == "muon":
                        if self.owner[p] == RANK:
                            self.muon_step(p, group, group["lr"] * lr)
                        if WORLD_SIZE > 1:
                            sends.append(dist.broadcast(p.data, self.owner[p], async_op=True))
                    else:
                        self.adam_step(p, group, group["lr"] * lr)
                else:
                    self.adam_step(p, group, group["lr"] * lr)
                p.grad = None
        if r.matrix_rule == "muon":
            for send in sends:
                send.wait()

    def muon_step(self, p: Tensor, muon: dict, lr: float) -> None:
        state, shape = self.state[p], (muon["split"], -1, p.size(-1))
        param, grad = p.view(shape), p.grad.view(shape)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
            if any(r.normuon.values()):
                axis = -1 if muon["second_moment"] == "row" else -2
                state["second_moment"] = torch.zeros_like(grad).mean(axis, keepdim=True)
        update = momentum_average(grad, state, muon)
        update = steepest_direction(update, state, muon)
        descend(param, update, lr, muon["weight_decay"], muon["decay"], muon["cautious"],
                muon["scale"])

    def adam_step(self, p: Tensor, adam: dict, lr: float) -> None:
        state = self.state[p]
        if "bf16" in (c.embed_dtype, c.head_dtype):  # a table in bf16 rounds its master
            if not state:
                state["step"] = torch.zeros((), device=DEVICE)
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                state["master"] = p.to(torch.float32)
            update = adam_average(p.grad.to(torch.float32), state, adam)
            descend(state["master"], update, lr, adam["weight_decay"], adam["decay"],
                    adam["cautious"])
            p.copy_(state["master"])
        else:
            if not state:
                state["step"] = torch.zeros((), device=DEVICE)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            update = adam_average(p.grad, state, adam)
            descend(p, update, lr, adam["weight_decay"], adam["decay"], adam["cautious"])


# --- schedules ------------------------------------------------------------------------------------

# <- recipes


def enter_phase(model: GPT, optimizer: Optimizer, step: int, evaluating: bool = False) -> None:
    """Set in the model what changes while it trains."""
    if r.window_range or r.window_stages:
        if r.final_window or r.final_long:
            last = evaluating and step == r.num_iterations
        else:
            last = False
        short, long = windows(step, last=last)
        model.window, model.short_window = window_in_keys(long), window_in_keys(short)
        if c.yarn:
            so_far = _yarn_windows(step, r, last)
            if so_far != getattr(model, "yarn_windows", None):
                model.set_rotary(so_far)
                model.yarn_windows = so_far
    if r.num_targets > 1:
        weights = (1.0,) if evaluating else _target_weights(step)
        if r.prefix_weight:  # (#88)
            model.num_ahead = len(weights)
            if not evaluating and _prefix_weight(step) > 0:
                weights += (_prefix_weight(step),)
        model.target_weights = torch.tensor(weights).to(DEVICE, non_blocking=True)
    if r.tie_first:
        if step == untie_step() and model.tied:  # (#53) the embedding leaves with table and state
            model.embed.weight.data.copy_(model.lm_head.weight)
            optimizer.state[model.embed.weight] = {
                key: x.clone() if isinstance(x, Tensor) else x
                for key, x in optimizer.state[model.lm_head.weight].items()}
        model.tied = step < untie_step()


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
    return total.item() / r.val_tokens


def train_step(model: GPT, optimizer: Optimizer, rows: np.ndarray, step: int) -> None:
    num_tokens = rows.shape[0] * (rows.shape[1] - 1)
    if r.loss_divisor is None:  # gradients of the mean loss
        divisor = num_tokens
    else:  # records from #22 on summed the loss of a rank, and averaged over ranks
        divisor = r.loss_divisor
    if r.adam_every > 1:
        optimizer.step_count = step
    batches = micro_batches(rows)
    for i, (inputs_BT, targets_BT) in enumerate(batches):
        if WORLD_SIZE > 1:
            optimizer.completing = i == len(batches) - 1
        model(inputs_BT, targets_BT, divisor).backward()
    optimizer.step(step, divisor, num_tokens)


def compile_model(model: GPT, optimizer: Optimizer) -> None:
    """Compile blocks and head; build their graphs on random tokens, before the clock starts."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile()
    model.head_loss = torch.compile(model.head_loss)
    for step in GRAPH_STEPS:
        if PHASES:
            enter_phase(model, optimizer, step, evaluating=True)
        if r.num_targets > 1:
            weights = _target_weights(step)
            if r.prefix_weight:
                model.num_ahead = len(weights)
                if _prefix_weight(step) > 0:
                    weights += (_prefix_weight(step),)
            model.target_weights = torch.tensor(weights).to(DEVICE)
        num_rows, T = batch_shape(step)
        rows = np.random.default_rng(0).integers(0, c.bos_id, (num_rows, T + 1))
        if c.packed:
            rows[:, ::500] = c.bos_id
        inputs_BT, targets_BT = micro_batches(rows)[0]
        divisor = num_rows * T if r.loss_divisor is None else r.loss_divisor
        model(inputs_BT, targets_BT, divisor).backward()
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
    hardware = torch.cuda.get_device_name() if CUDA else f"CPU with {os.cpu_count()} cores"
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text(
        f"{Path(__file__).read_text()}{rule}\nRunning Python {sys.version.split()[0]}\n"
        f"Running PyTorch {torch.version.__version__} compiled for CUDA {torch.version.cuda} on "
        f"{hardware} with world_size {WORLD_SIZE}\n"
        f"Running for track {TRACK} with seed {seed} on data {digest}\n{rule}\n")


def train(train_files: list[Path], val_files: list[Path], seed: int) -> None:
    model = GPT()
    init_weights(model, seed)
    if r.prefix_weight:
        model.prefixes = read_prefixes(train_files[0].with_name("gpt2_prefixes.npy")).to(DEVICE)
    model.to(DEVICE)
    if not (c.yarn or c.learned_positions):
        model.set_rotary(())
    optimizer = Optimizer(model)
    validation = val_rows(val_files)
    batches = train_batches(train_files)
    if CUDA:
        compile_model(model, optimizer)
    train_s, t0 = 0.0, time.perf_counter()
    for step in range(r.num_iterations + 1):
        last = step == r.num_iterations
        if last or step % r.val_every == 0:
            if CUDA:
                torch.cuda.synchronize()
            train_s += time.perf_counter() - t0
            if PHASES:
                enter_phase(model, optimizer, step, evaluating=True)
            val_loss = evaluate(model, validation)
            log(f"step:{step}/{NUM_ITERATIONS} val_loss:{val_loss:.6f} "
                f"train_time:{1000 * train_s:.0f}ms "
                f"step_avg:{1000 * train_s / max(1, step):.2f}ms")
            t0 = time.perf_counter()
        if last:
            break
        if PHASES:
            enter_phase(model, optimizer, step)
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
    if r.scale == "full":
        if not torch.cuda.is_available():
            sys.exit("record {RECORD} at full size needs a GPU with {NEEDS}; "
                     "for a CPU: python -m flat {RECORD} --scale pocket")
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if CUDA else "gloo")
    if RANK == 0:
        start_log([*train_files, *val_files], seed)
    train(train_files, val_files, seed)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
