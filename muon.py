"""Muon and Adam for one process or many, in one file that needs nothing but torch.

    from muon import Muon
    optimizer = Muon([
        {"params": matrices, "lr": 0.02, "method": "polar_express"},
        {"params": the_rest, "rule": "adam", "lr": 3e-4, "betas": (0.9, 0.95)},
    ])
    ...
    loss.backward(); optimizer.step(); optimizer.zero_grad()

Muon is steepest descent under the spectral norm: the momentum of a weight matrix is replaced by the
nearest semi-orthogonal matrix, so every direction moves at the same speed. With torch.distributed
initialised the same code shards itself: each rank owns some of the matrices, reduces their gradients
(under the backward pass, once `arm()` was called), updates them and gathers the new weights.

Three parts, top down: mathematics (`orthogonalize`, `steepest`), update rules (`muon_update`,
`adam_update`) and the plan with its driver (`make_plan`, `Muon`). The first two are pure functions over
batches (..., rows, cols); only the driver knows of ranks.

Letters: G gradient or momentum, X the iterate, A = X X^T, (a, b, c) one polynomial a x + b x^3 + c x^5.
Names in shapes: K parameters of one shape in a batch, W ranks, S elements of one rank's segment.

Sources: Jordan 2024 (Muon), Bernstein 2025 (Deriving Muon), Amsel et al. 2025 (Polar Express),
Liu et al. 2025 (Moonlight: RMS matching), Li et al. 2025 (NorMuon), Chen et al. 2025 (cautious decay).
"""

import difflib
import functools
import math
import os
import weakref
import zlib
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Mathematics


CUBIC = (1.5, -0.5, 0.0)  # Kovarik 1970, Bjorck and Bowie 1971: converges from everywhere in (0, sqrt 3)
JORDAN = (3.4445, -4.7750, 2.0315)  # steep at 0 and never exactly 1: singular values end in [0.68, 1.2]


def _minimax_quintic(l: float, u: float) -> tuple[float, float, float]:
    """The odd quintic nearest to 1 on [l, u] in the largest error, by Remez exchange."""
    if l / u > 1 - 5e-6:  # the system below is singular in the limit, which is Taylor's quintic
        return 15 / 8 / u, -10 / 8 / u**3, 3 / 8 / u**5
    q, r, E = (3 * l + u) / 4, (l + 3 * u) / 4, math.inf
    while True:
        rows = [[x, x**3, x**5, sign] for x, sign in ((l, 1), (q, -1), (r, 1), (u, -1))]
        ones = torch.ones(4, dtype=torch.float64)
        a, b, c, error = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), ones).tolist()
        if not abs(error - E) > 1e-15:
            return a, b, c
        E, root = error, math.sqrt(9 * b * b - 20 * a * c)
        q, r = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))


@functools.lru_cache
def polar_express(
    steps: int, *, lower: float = 1e-3, safety: float = 1.02, cushion: float = 0.02
) -> tuple[tuple[float, float, float], ...]:
    """The polynomials of Polar Express: each is optimal for the interval its predecessors leave.

    Singular values are promised to lie in [lower, 1]. `cushion` keeps a polynomial from spending its
    error on values below cushion * u; `safety` stretches all but the last polynomial, so that rounding
    above 1 does not run away: the same factor must multiply the norm before the first step.
    """
    l, u, schedule = lower, 1.0, []
    for step in range(steps):
        a, b, c = _minimax_quintic(max(l, cushion * u), u)
        if cushion * u > l:  # centre the error of the true interval on 1
            ends = sum(x * (a + x * x * (b + x * x * c)) for x in (l, u))
            a, b, c = 2 * a / ends, 2 * b / ends, 2 * c / ends
        s = safety if step < steps - 1 else 1.0
        a, b, c = a / s, b / s**3, c / s**5
        schedule.append((a, b, c))
        l = l * (a + l * l * (b + l * l * c))
        u = 2 - l
    return tuple(schedule)


METHODS = ("svd", "cubic", "jordan", "polar_express")


def coefficients(method: str, steps: int, given: tuple | None = None) -> tuple[tuple, float]:
    """(polynomials, factor on the norm) of a method; `given` is one triple, or one triple a step."""
    if given is not None:
        triples = given if isinstance(given[0], (tuple, list)) else [given] * steps
        if any(len(triple) != 3 for triple in triples):
            raise ValueError(
                f"ns_coefficients: expected (a, b, c) or one such triple a step, got {given}"
            )
        return tuple(tuple(triple) for triple in triples), 1.0
    if method == "polar_express":
        return polar_express(steps), 1.02
    if method not in ("cubic", "jordan"):
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return (CUBIC if method == "cubic" else JORDAN,) * steps, 1.0


def storage_dtype(mode: str | None, device: torch.device) -> torch.dtype:
    """What the iterate is stored in. "accurate" (the default) keeps rounding noise below 2% of the
    update's energy for momentum of rank 8: fp16 on CUDA (10 bits, as fast as bf16 there), fp32
    elsewhere. "fast" is bf16, which the records used: 59% for Polar Express on the same matrix."""
    if mode not in ("fast", "accurate", None):
        raise ValueError(f'mode: expected "fast", "accurate" or None, got {mode!r}')
    if mode == "fast":
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def orthogonalize(
    G: Tensor,
    method: str = "polar_express",
    steps: int = 5,
    *,
    mode: str | None = None,
    ns_coefficients: tuple | None = None,
    eps: float = 0.0,
    products: tuple | None = None,
) -> Tensor:
    """U V^T of G = U S V^T for every matrix of G (..., rows, cols), as nearly as `method` gives it.

    "svd" is exact; the others apply `steps` odd polynomials to the singular values. The result has
    G's dtype and does not depend on G's scale: the largest entry is divided out before the norm is
    taken, both in fp32 (`eps` > 0 adds torch.optim.Muon's lower bound on the norm). A zero matrix
    stays zero, one with NaN spoils itself alone. `products` = (gram, polynomial) replaces
    X -> X X^T and (A, b, c) -> b A + c A A by faster kernels for symmetric results.
    """
    if G.ndim < 2:
        raise ValueError(f"orthogonalize: expected (..., rows, cols), got shape {tuple(G.shape)}")
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X.to(torch.promote_types(G.dtype, torch.float32)).contiguous()
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / largest.clamp(min=torch.finfo(X.dtype).tiny)
    if method == "svd" and ns_coefficients is None:
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        cut = torch.finfo(X.dtype).eps * X.shape[-1] * S[..., :1]
        X = (U * (cut < S).to(U.dtype).unsqueeze(-2)) @ Vh
        return (X.mT if tall else X).to(G.dtype)
    polynomials, safety = coefficients(method, steps, ns_coefficients)
    # The largest entry is 1 now, so a norm is at least 1 unless the matrix is zero.
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=1.0) * safety
    if eps:
        norm = torch.maximum(norm, eps / largest)
    dtype = X.dtype if X.dtype == torch.float64 else storage_dtype(mode, X.device)
    X = (X / norm).to(dtype).flatten(0, -3) if X.ndim > 2 else (X / norm).to(dtype).unsqueeze(0)
    gram, polynomial = products or (_gram, _polynomial)
    for a, b, c in polynomials:
        A = gram(X)
        if c:
            X = torch.baddbmm(X, polynomial(A, b, c), X, beta=a)
        else:
            X = torch.baddbmm(X, A, X, beta=a, alpha=b)
    X = X.mT if tall else X
    return X.reshape(G.shape).to(G.dtype)


def _gram(X: Tensor) -> Tensor:
    return torch.bmm(X, X.mT)


def _polynomial(A: Tensor, b: float, c: float) -> Tensor:
    return torch.baddbmm(A, A, A, beta=b, alpha=c)


# --------------------------------------------------------------------------------------------------
# Update rules: pure functions of (..., rows, cols) tensors in fp32; lr and friends are floats or 0-D


SCALES = {  # factor on the orthogonal update of an r x c matrix (fan_out x fan_in)
    "spectral": lambda r, c: math.sqrt(r / c),  # RMS -> RMS operator norm 1 at every width
    "original": lambda r, c: math.sqrt(max(1.0, r / c)),  # records 8 on
    "match_rms_adamw": lambda r, c: 0.2 * math.sqrt(max(r, c)),  # entries of RMS 0.2, as Adam's
    "unit_rms": lambda r, c: math.sqrt(max(r, c)),  # entries of RMS 1: records 4 to 7
    "none": lambda r, c: 1.0,  # record 3
}


def decayed(param: Tensor, update: Tensor, rate: float | Tensor, cautious: bool | str) -> Tensor:
    """What decay takes from `param`. Cautious: only where it pulls the way the update goes already
    (update * param >= 0 for True, > 0 for "strict")."""
    if not cautious:
        return param * rate
    agree = update * param
    agree = agree > 0 if cautious == "strict" else agree >= 0
    return torch.where(agree, param * rate, 0.0)


def decay_rate(decay: str, lr: float | Tensor, weight_decay: float | Tensor, scale: float):
    """Share of a parameter that one step takes: "lr" is lr * wd, "lr2" is lr * (lr * scale) * wd, which
    anneals as the schedule squared (records 43 on)."""
    return lr * weight_decay * (lr * scale if decay == "lr2" else 1.0)


def normuon(
    O: Tensor, v: Tensor, beta2: float | Tensor, axis: str, eps: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """Even out the RMS of rows ("row": one number per row, NorMuon's neurons) or columns ("col") by a
    running mean of squares v, keeping each matrix's Frobenius norm. No bias correction: it cancels."""
    squares = O.square().mean(-1 if axis == "row" else -2, keepdim=True)
    v = v + (squares - v) * (1 - beta2)
    weight = v.clamp(min=eps).reciprocal()
    before, after = (x.sum((-2, -1), keepdim=True) for x in (squares, squares * weight))
    shrink = (before / after.clamp(min=torch.finfo(O.dtype).tiny)).sqrt()
    return O * (weight.sqrt() * shrink), v


def muon_update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    beta2: float | Tensor,
    scale: float,
    momentum_form: str = "ema",
    nesterov: bool = True,
    method: str = "jordan",
    ns_steps: int = 5,
    ns_coefficients: tuple | None = None,
    eps: float = 0.0,
    mode: str | None = None,
    products: tuple | None = None,
    renorm: bool = False,
    axis: str | None = None,
    decay: str | None = "lr",
    cautious: bool | str = False,
) -> tuple[Tensor, ...]:
    """(param, momentum_buffer[, second_moment]) after one step."""
    if decay == "l2":
        grad = grad + param * weight_decay
    B, fresh = momentum_buffer, 1.0 if momentum_form == "heavy_ball" else 1 - momentum
    B = B * momentum + grad * fresh
    update = B * momentum + grad * fresh if nesterov else B
    update = orthogonalize(
        update, method, ns_steps, mode=mode, ns_coefficients=ns_coefficients, eps=eps,
        products=products,
    )  # fmt: skip
    if renorm:  # make ||O||_F the sqrt(min(r, c)) of an exactly orthogonal matrix
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        update = update * (math.sqrt(min(update.shape[-2:])) / norm.clamp(min=1e-30))
    if axis:
        update, second_moment = normuon(update, second_moment, beta2, axis)
    new = param
    if decay in ("lr", "lr2"):
        new = new - decayed(param, update, decay_rate(decay, lr, weight_decay, scale), cautious)
    new = new - update * (lr * scale)
    return (new, B, second_moment) if axis else (new, B)


def adam_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    log_betas: tuple,
    eps: float,
    weight_decay: float | Tensor,
    decay: str | None = "lr",
    cautious: bool | str = False,
) -> tuple[Tensor, ...]:
    """(param, exp_avg, exp_avg_sq, step) after one step of Adam / AdamW; `step` broadcasts."""
    if decay == "l2":
        grad = grad + param * weight_decay
    step = step + 1
    exp_avg = exp_avg + (grad - exp_avg) * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + grad.square() * (1 - beta2)
    # 1 - beta^t by expm1: in fp32 the plain form loses 5e-5 of 1 - 0.999
    correct1, correct2 = (-torch.expm1(step * log_beta) for log_beta in log_betas)
    update = exp_avg / correct1 / ((exp_avg_sq / correct2).sqrt() + eps)
    new = param
    if decay in ("lr", "lr2"):
        new = new - decayed(param, update, decay_rate(decay, lr, weight_decay, 1.0), cautious)
    return new - update * lr, exp_avg, exp_avg_sq, step


def apply_update(rule, param, state: list[Tensor], ok: Tensor, inputs: tuple, options: dict) -> None:
    """Run `rule` and keep its result where `ok`: a device-side choice, the host never learns of it."""
    for old, new in zip((param, *state), rule(*inputs, **options)):
        old.copy_(torch.where(ok, new.to(old.dtype), old))


# --------------------------------------------------------------------------------------------------
# The plan: who owns what, in which bucket, and what that should cost


ALIGNMENT = 128  # bytes: every tensor starts on its own cache line, as kernels and NCCL like it
ROWS_FROM = 1 << 17  # Adam parameters of more elements are sharded by rows, smaller ones copied
RATES = {  # latency s, bytes/s on the wire, FLOP/s of the products, s to launch one batch's kernels
    "cuda": (15e-6, 4e11, 3e14, 6e-5),  # 8xH100 by NVLink, half of the dense bf16 peak
    "cpu": (1e-4, 2e9, 2e11, 2e-4),
}


@dataclass
class Item:
    """One parameter in the plan. `order` guesses when backward finishes it: 0 first, 1 last."""

    index: int
    name: str
    shape: tuple[int, ...]
    group: int
    kind: str  # "whole": one rank owns it; "rows": ranks own equal runs of rows; "copy": all own it
    cost: float  # FLOP of its update
    dtype: torch.dtype = torch.float32
    every: int = 1
    order: float = 0.0
    local_shape: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)


@dataclass
class Run:
    """K parameters of one group and shape, side by side at a constant distance: one batch."""

    items: list[Item]
    offset: int  # elements, inside the owner's segment
    stride: int
    flag: int  # number of the first item's flag


@dataclass
class Bucket:
    """What one collective moves: a flat buffer of `ranks` equal segments. The last `num_flags` elements
    of a segment count the ranks that had a gradient for each of its items ("rows" keep it apart)."""

    kind: str
    dtype: torch.dtype
    every: int
    runs: list[list[Run]]  # by owner; one list for "copy" and "rows", whose ranks all look alike
    segment: int
    num_flags: int
    items: list[Item]

    def ranks(self, world_size: int) -> int:
        return 1 if self.kind == "copy" else world_size

    def start(self, owner: int, run: Run, k: int) -> int:
        return owner * self.segment + run.offset + k * run.stride


def _lay_out(items: list[Item], element_size: int) -> tuple[list[Run], int]:
    """Put items side by side, equal ones next to each other; (runs, aligned elements used)."""
    align, runs, at, flag = max(1, ALIGNMENT // element_size), [], 0, 0
    for item in sorted(items, key=lambda i: (i.group, i.local_shape, i.index)):
        last = runs[-1].items[-1] if runs else None
        stride = -(-item.numel // align) * align
        if last and (last.group, last.local_shape) == (item.group, item.local_shape):
            runs[-1].items.append(item)
        else:
            runs.append(Run([item], at, stride, flag))
        at, flag = at + stride, flag + 1
    return runs, at


def _make_bucket(kind: str, items: list[Item], owned: list[list[Item]]) -> Bucket:
    dtype, every = items[0].dtype, items[0].every
    size = torch.empty((), dtype=dtype).element_size()
    laid_out = [_lay_out(mine, size) for mine in owned]
    used = max(end for _, end in laid_out)
    if kind == "rows":  # nothing may stand between two ranks' rows
        return Bucket(kind, dtype, every, [r for r, _ in laid_out], items[0].numel, 1, items)
    align, num_flags = max(1, ALIGNMENT // size), max(len(mine) for mine in owned)
    segment = used + -(-num_flags // align) * align
    return Bucket(kind, dtype, every, [r for r, _ in laid_out], segment, num_flags, items)


def _assign(items: list[Item], world_size: int, loads: list[float]) -> list[list[Item]]:
    """Longest processing time first: the dearest item goes to the least loaded rank."""
    owned, sizes = [[] for _ in range(world_size)], [0] * world_size
    for item in sorted(items, key=lambda i: (-i.cost, -i.numel, i.order, i.index)):
        rank = min(range(world_size), key=lambda r: (loads[r], sizes[r], r))
        owned[rank].append(item)
        loads[rank] += item.cost
        sizes[rank] += item.numel
    return owned


def _cut(items: list[Item], count: int) -> list[list[Item]]:
    """`count` consecutive parts of about equal cost, in the order that backward finishes them."""
    total, parts, seen = sum(i.cost for i in items), [[] for _ in range(count)], 0.0
    for item in items:
        middle = (seen + item.cost / 2) / max(total, 1e-30)
        parts[min(count - 1, int(middle * count))].append(item)
        seen += item.cost
    return [part for part in parts if part]


def exposed_seconds(buckets: list[Bucket], world_size: int, device: str) -> float:
    """Predicted time that backward cannot hide: the last reduction, then updates in bucket order while
    gathers of finished buckets are under way."""
    latency, wire, flops, launch = RATES.get(device, RATES["cuda"])
    reduced = wired = 0.0
    if world_size > 1:
        reduced = wired = latency + _wire_bytes(buckets[-1], world_size) / wire
    done = 0.0
    for number, bucket in enumerate(buckets):
        slowest = max(
            sum(len(run.items) * run.items[0].cost / flops + launch for run in runs)
            for runs in bucket.runs
        )
        done = max(done, reduced if number == len(buckets) - 1 else 0.0) + slowest
        if world_size > 1 and bucket.kind != "copy":
            wired = max(wired, done) + latency + _wire_bytes(bucket, world_size) / wire
    return max(done, wired)


def _wire_bytes(bucket: Bucket, world_size: int) -> float:
    """Bytes one rank sends for one reduce-scatter (or one all-gather) of this bucket."""
    size = torch.empty((), dtype=bucket.dtype).element_size()
    twice = 2 if bucket.kind == "copy" else 1
    total = bucket.segment * bucket.ranks(world_size) * size
    return twice * total * (world_size - 1) / world_size


@dataclass
class Plan:
    buckets: list[Bucket]  # in the order that backward finishes them, which is the launch order
    world_size: int
    device: str
    tried: list[tuple[int, float, float, bool]] = field(default_factory=list)
    # per number of buckets: (count, bytes / least bytes, predicted exposed seconds, chosen)

    def loads(self) -> list[float]:
        """FLOP per rank."""
        return [
            sum(
                sum(item.cost for run in b.runs[0 if len(b.runs) == 1 else rank] for item in run.items)
                for b in self.buckets
            )
            for rank in range(self.world_size)
        ]


def make_plan(
    items: list[Item], world_size: int, *, device: str = "cuda", num_buckets: int | None = None
) -> Plan:
    """Owners, layout and launch order of `items` on `world_size` ranks; knows no tensors.

    Items that are owned whole go into 1 to 8 buckets (`num_buckets` to fix it): more buckets leave
    less to wait for after backward, but cost padding and balance. The predicted time decides.
    """
    buckets, plan = [], Plan([], world_size, device)
    classes: dict[tuple, list[Item]] = {}
    for item in sorted(items, key=lambda i: (i.order, i.index)):
        item.local_shape = item.shape
        if item.kind == "rows":
            row = math.prod(item.shape[1:]) * torch.empty((), dtype=item.dtype).element_size()
            step = ALIGNMENT // math.gcd(ALIGNMENT, row)  # rows per shard, so that shards are aligned
            rows = -(-item.shape[0] // (world_size * step)) * step
            item.local_shape = (rows, *item.shape[1:])
        classes.setdefault((item.kind, str(item.dtype), item.every), []).append(item)
    for (kind, *_), members in classes.items():
        if kind == "rows":
            buckets += [_make_bucket(kind, [item], [[item]]) for item in members]
        elif kind == "copy":
            buckets.append(_make_bucket(kind, members, [members]))
        else:
            counts = [num_buckets] if num_buckets else range(1, min(8, len(members)) + 1)
            options = []
            for count in counts if world_size > 1 else [1]:
                for carry in (False, True):  # balance each bucket by itself, or the sum so far
                    loads, trial = [0.0] * world_size, []
                    for part in _cut(members, count):
                        loads = loads if carry else [0.0] * world_size
                        trial.append(_make_bucket(kind, part, _assign(part, world_size, loads)))
                    least = sum(item.numel for item in members)
                    used = sum(b.segment - b.num_flags for b in trial) * world_size
                    seconds = exposed_seconds(trial, world_size, device)
                    options.append((seconds, used / least, len(trial), trial))
            best = min(options, key=lambda option: option[:3])
            buckets += best[3]
            for count in sorted({option[2] for option in options}):
                seconds, ratio, *_ = min(o[:3] for o in options if o[2] == count)
                plan.tried.append((count, ratio, seconds, count == best[2]))
    plan.buckets = sorted(buckets, key=lambda b: max(item.order for item in b.items))
    return plan


# --------------------------------------------------------------------------------------------------
# Groups: options, and how a parameter is seen as matrices


_SHARED = {
    "lr": 1e-3, "weight_decay": 0.0, "decay": "lr", "cautious": False,
    "every": 1, "frozen": False, "shard": None, "state_dtype": None,
}  # fmt: skip
RULES = {
    "muon": {
        **_SHARED, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "momentum_form": "ema",
        "method": "jordan", "ns_steps": 5, "ns_coefficients": None, "eps": 0.0, "mode": None,
        "scale": "original", "multiplier": 1.0, "renorm": False,
        "second_moment": None, "beta2": 0.95, "view": None, "split": None, "split_axis": 0,
    },
    "adam": {**_SHARED, "betas": (0.9, 0.999), "eps": 1e-8},
}  # fmt: skip
FIXED = ("rule", "every", "shard", "view", "split", "split_axis", "second_moment", "state_dtype")
CHOICES = {
    "decay": ("lr", "lr2", "l2"),
    "cautious": (False, True, "strict"),
    "momentum_form": ("ema", "heavy_ball"),
    "method": METHODS,
    "mode": (None, "fast", "accurate"),
    "second_moment": (None, "row", "col"),
    "view": (None, "matrix", "flatten", "batch"),
    "split_axis": (0, 1),
    "shard": (None, "whole", "rows", "copy"),
}


def matrix_views(t: Tensor, group: dict) -> list[Tensor]:
    """Views (K, ..., rows, cols) of a batch t (K, *shape), by the group's view and split."""
    if group["view"] == "flatten":
        t = t.flatten(2)
    split, axis = group["split"], group["split_axis"]
    if split is None:
        return [t]
    if not isinstance(split, int):
        return list(t.split(list(split), -2 + axis))
    if axis == 0:
        return [t.unflatten(-2, (split, t.shape[-2] // split))]
    return [t.unflatten(-1, (split, t.shape[-1] // split)).movedim(-2, -3)]


def update_flops(shape: tuple[int, ...], group: dict) -> float:
    """FLOP of one update, products of the iteration only (Adam: ten per element)."""
    if group["rule"] == "adam":
        return 10.0 * math.prod(shape)
    flops = 0.0
    for view in matrix_views(torch.empty(1, *shape, device="meta"), group):
        m, n = sorted(view.shape[-2:])
        triples = group["ns_coefficients"]
        steps = len(triples) if triples and isinstance(triples[0], tuple) else group["ns_steps"]
        flops += math.prod(view.shape[:-2]) * steps * (4.0 * m * m * n + 2.0 * m**3)
    return flops


def _check_option(group: dict, key: str) -> None:
    if key in CHOICES and group[key] not in CHOICES[key]:
        options = ", ".join(repr(choice) for choice in CHOICES[key])
        raise ValueError(f"{key}: expected one of {options}, got {group[key]!r}")


def _check_param(name: str, p: Tensor, group: dict) -> None:
    """Refuse what a rule cannot update well, saying what to do instead."""
    what = f"parameter {name!r} of shape {tuple(p.shape)}"
    if p.is_complex() or not p.is_floating_point():
        raise ValueError(f"{what}: expected a real floating point tensor, got {p.dtype}")
    if group["rule"] == "adam":
        return
    adam = 'put it into a group with {"rule": "adam"}'
    view = group["view"]
    if p.ndim < 2:
        raise ValueError(f"{what}: Muon needs matrices, got {p.ndim} dimensions; {adam}")
    if view is None and p.ndim == 3:
        raise ValueError(
            f'{what}: say how to see it as matrices, with {{"view": "batch"}} for a stack of matrices '
            'such as experts, with {"view": "flatten"} for a convolution'
        )
    if view is None and p.ndim > 3:
        raise ValueError(
            f'{what}: say {{"view": "flatten"}} to see a convolution as ({p.shape[0]}, '
            f'{p[0].numel()}), or {{"view": "batch"}} for a stack of matrices'
        )
    if (view == "matrix" and p.ndim != 2) or (view == "batch" and p.ndim < 3):
        raise ValueError(f"{what}: view={view!r} does not fit {p.ndim} dimensions")
    names = ("embed", "wte", "wpe", "lm_head")
    table = p.ndim == 2 and p.shape[0] >= 8192 and p.shape[0] >= 16 * p.shape[1]
    if view is None and (table or any(part in name.lower() for part in names)):
        raise ValueError(
            f"{what}: looks like an embedding or a head, which Muon trains badly; {adam}, or say "
            '{"view": "matrix"} if it is a hidden matrix'
        )
    shape = p.shape if view != "flatten" else (p.shape[0], p[0].numel())
    split, side = group["split"], shape[-2 + group["split_axis"]]
    fits = split is None or (side % split == 0 if isinstance(split, int) else sum(split) == side)
    if not fits:
        raise ValueError(f"{what}: split={split} does not divide the {side} of the split axis")


# --------------------------------------------------------------------------------------------------
# The driver


class _Live:
    """A bucket with its tensors on this rank: what it holds is referenced for the whole training, so
    nothing that a collective reads or writes can be freed while it is under way."""

    def __init__(self, bucket: Bucket, owner: int, world_size: int, device, separate: bool):
        self.plan, self.owner = bucket, owner
        ranks = bucket.ranks(world_size)
        S, dtype = bucket.segment, bucket.dtype
        self.params = torch.zeros(ranks * S, dtype=dtype, device=device)
        self.grads = torch.zeros(ranks * S, dtype=dtype, device=device)
        mine = slice(owner * S, (owner + 1) * S) if ranks > 1 else slice(None)
        self.param_shard, self.grad_shard = self.params[mine], self.grads[mine]
        if separate and ranks > 1:
            self.grad_shard = torch.empty(S, dtype=dtype, device=device)
        flags = bucket.num_flags
        if bucket.kind == "rows":
            self.flags = self.my_flags = torch.zeros(1, dtype=torch.float32, device=device)
        else:
            self.flags = self.grads.view(ranks, S)[:, S - flags :]
            self.my_flags = self.grad_shard[S - flags :]
        self.entries: list[tuple[Tensor, Tensor, str, int, int]] = []  # p, grad view, name, owner, flag
        self.runs: list[_LiveRun] = []
        self.works: list = []  # reductions under way
        self.gather = None
        self.pending = 0
        self.launched = False


class _LiveRun:
    """A run with this rank's views and state; every tensor here is (K, *local_shape) or as said."""

    def __init__(self, run: Run, live: _Live, group: dict, device):
        K, shape = len(run.items), run.items[0].local_shape
        inner = torch.empty(shape, device="meta").stride()
        size, stride = (K, *shape), (run.stride, *inner)
        self.plan = run
        self.param, self.grad = (
            flat.as_strided(size, stride, flat.storage_offset() + run.offset)
            for flat in (live.param_shard, live.grad_shard)
        )
        self.flags = live.my_flags[run.flag : run.flag + K]
        self.index = torch.tensor([item.index for item in run.items], device=device)
        self.state = {
            name: torch.zeros(size, dtype=dtype, device=device)
            for name, (size, dtype) in state_spec(run, live.plan.dtype, group).items()
        }
        if "master" in self.state:
            self.state["master"].copy_(self.param)


def state_spec(run: Run, dtype: torch.dtype, group: dict) -> dict[str, tuple[tuple, torch.dtype]]:
    """Names, shapes and dtypes of a run's state; the leading dimension is the parameter's number."""
    size = (len(run.items), *run.items[0].local_shape)
    wide = torch.promote_types(dtype, torch.float32)
    kept = group["state_dtype"] or wide
    spec = {"master": (size, wide)} if dtype != wide else {}
    if group["rule"] == "adam":
        step = (size[:1], torch.float32)
        return {**spec, "step": step, "exp_avg": (size, kept), "exp_avg_sq": (size, kept)}
    spec["momentum_buffer"] = (size, kept)
    if group["second_moment"]:
        views = matrix_views(torch.empty(size, device="meta"), group)
        for number, view in enumerate(views):
            dim, shape = -1 if group["second_moment"] == "row" else -2, list(view.shape)
            shape[dim] = 1
            spec["second_moment" + (f".{number}" if len(views) > 1 else "")] = (tuple(shape), wide)
    return spec


class Muon(torch.optim.Optimizer):
    """Muon for matrices and Adam for the rest, in one optimizer, on any number of ranks.

    The first arguments are torch.optim.Muon's, with its meaning and defaults. Groups choose their rule
    with {"rule": "muon"} (default) or {"rule": "adam"} and may set any option of RULES; params may be
    (name, tensor) pairs. Writing a group's lr, momentum, weight_decay ... between steps costs nothing.

    Parameters and gradients become views of flat buffers when the optimizer is made, so make it after
    the model is on its device; with several ranks, rank 0's values are sent to the others. A parameter
    without a gradient on a rank counts as zeros there; without one on every rank it is left alone.

    Options of a "muon" group, beside torch's
        method         "svd", "cubic", "jordan", "polar_express"; ns_steps, ns_coefficients, eps
        mode           "accurate", "fast" or None, see storage_dtype
        scale          a key of SCALES or a number; adjust_lr_fn is torch's word; times `multiplier`
        momentum_form  "ema" (torch) or "heavy_ball": the same update at the same lr
        renorm         rescale each update to the norm of an exactly orthogonal one
        second_moment  "row" or "col": NorMuon with its axis, and beta2
        view           None for 2-D, "batch" (leading dimensions are a stack), "flatten" (conv filters)
        split          number of equal blocks (heads), or sizes (fused QKV), along split_axis 0 or 1
    and of both rules
        decay          "lr": lr * wd of a parameter per step; "lr2": lr * lr * scale * wd; "l2"
        cautious       True, "strict": decay only where it agrees with the update
        every          step every k-th time only; gradients add up in between
        frozen         True: leave the group alone for now
        shard          None (choose), "whole", "rows" or "copy"
        state_dtype    of momentum and Adam's averages; None is fp32

    Arguments for many processes
        process_group  the ranks to train with; None is all of them
        node_size      ownership spans that many consecutive ranks, and owned shards are all-reduced
                       across; None is LOCAL_WORLD_SIZE where that divides the ranks
        collective     "reduce_scatter", or "all_reduce" as records 6 to 23 did
        reduce         "mean" or "sum" of the ranks' gradients
        overlap        False: arm() does nothing
        num_buckets    None: the plan weighs overlap against padding
        products       see orthogonalize; `compile` fuses the update rules with torch.compile
    """

    default_rule = "muon"

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple | None = None,
        eps: float = 0.0,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options,
    ):
        given = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps,
        }  # fmt: skip
        if adjust_lr_fn is not None:
            given["adjust_lr_fn"] = adjust_lr_fn
        self._setup(params, given, **options)

    def _setup(
        self,
        params,
        given: dict,
        *,
        process_group=None,
        node_size: int | None = None,
        collective: str = "reduce_scatter",
        reduce: str = "mean",
        overlap: bool = True,
        num_buckets: int | None = None,
        products: tuple | None = None,
        compile: bool = False,
        **options,
    ) -> None:
        for key, value, choices in (
            ("collective", collective, ("reduce_scatter", "all_reduce")),
            ("reduce", reduce, ("mean", "sum")),
        ):
            if value not in choices:
                raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")
        self.settings = {
            "process_group": process_group, "node_size": node_size, "collective": collective,
            "reduce": reduce, "overlap": overlap, "num_buckets": num_buckets, "products": products,
            "compile": compile,
        }  # fmt: skip
        self._given, self._built, self.calls = {**given, **options}, False, 0
        self._apply = torch.compile(apply_update, dynamic=False) if compile else apply_update
        self._handles: list = []
        super().__init__(params, {})
        self._join_ranks()
        self._build()

    # ---- groups

    def add_param_group(self, group: dict) -> None:
        """Add a group; after construction this plans anew (a collective call) and keeps all state."""
        rule = group.setdefault("rule", self.default_rule)
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
        defaults = dict(RULES[rule])
        for source in (self._given if rule == self.default_rule else {}, group):
            if source.get("adjust_lr_fn") is not None:
                name = source["adjust_lr_fn"]
                if name not in ("original", "match_rms_adamw"):
                    raise ValueError(f"adjust_lr_fn: expected original or match_rms_adamw, got {name!r}")
                source = {"scale": name, **source}
            known = {*defaults, "params", "param_names", "rule", "adjust_lr_fn", "initial_lr", "name"}
            for key in source.keys() - known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown option {key!r} for rule {rule!r}{hint}")
            defaults.update(source)
        defaults.pop("adjust_lr_fn", None)
        group.clear()
        group.update(defaults)
        for key in defaults:
            _check_option(group, key)
        for key in ("lr", "weight_decay", "momentum", "eps"):
            value = group.get(key, 0.0)
            if not isinstance(value, Tensor) and not value >= 0:
                raise ValueError(f"{key}: expected a number >= 0, got {value!r}")
        if rule == "muon":
            if not isinstance(group["scale"], (int, float)) and group["scale"] not in SCALES:
                raise ValueError(
                    f"scale: expected a number or one of {', '.join(SCALES)}, got {group['scale']!r}"
                )
            if group["method"] != "svd" or group["ns_coefficients"]:
                coefficients(group["method"], group["ns_steps"], group["ns_coefficients"])
        old = self.state_dict() if self._built else None
        super().add_param_group(group)
        if old is not None:
            self._build()
            self._load(old, strict=False)

    # ---- ranks

    def _join_ranks(self) -> None:
        """Find the ranks: `_node` shards, `_across` joins the owners of one shard over the nodes."""
        self._everyone = self._node = self._across = None
        self.rank, self.world_size, self.num_ranks = 0, 1, 1
        if not (dist.is_available() and dist.is_initialized()):
            return
        group = self.settings["process_group"] or dist.group.WORLD
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
        num_ranks = len(ranks)
        size = self.settings["node_size"]
        if size is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
            whole = self.settings["process_group"] is None and local and num_ranks % local == 0
            size = local if whole else num_ranks
        if not 1 <= size <= num_ranks or num_ranks % size:
            raise ValueError(f"node_size: expected a divisor of {num_ranks} ranks, got {size}")
        self._everyone = self._node = group
        self.num_ranks, self.world_size, self.rank = num_ranks, size, me % size
        if size < num_ranks:
            for start in range(0, num_ranks, size):
                made = dist.new_group(ranks[start : start + size])
                self._node = made if start <= me < start + size else self._node
            for start in range(size):
                made = dist.new_group(ranks[start::size])
                self._across = made if me % size == start else self._across

    # ---- buffers

    def _build(self) -> None:
        """Plan, make the flat buffers, turn parameters and gradients into views of them."""
        self._params, self._names, items = [], [], []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for k, p in enumerate(group["params"]):
                index = len(self._params)
                name = names[k] if names else str(index)
                _check_param(name, p, group)
                self._params.append(p)
                self._names.append(name)
                cost, shape = update_flops(tuple(p.shape), group), tuple(p.shape)
                # Backward comes from the end; groups that span the depth run side by side.
                order = 1 - (k + 1) / len(group["params"])
                items.append(
                    Item(index, name, shape, number, "whole", cost, p.dtype, group["every"], order)
                )
        if len(set(self._names)) < len(self._names):
            twice = sorted({name for name in self._names if self._names.count(name) > 1})
            raise ValueError(f"names of parameters must differ, got twice: {', '.join(twice)}")
        devices = {p.device for p in self._params}
        if len(devices) > 1:
            raise ValueError(f"parameters: expected one device, got {sorted(map(str, devices))}")
        device = self.device = devices.pop()
        total = sum(item.cost for item in items if self.param_groups[item.group]["rule"] == "muon")
        for item in items:
            item.kind = self._kind(item, total)
        num_buckets = self.settings["num_buckets"]
        self.plan = make_plan(items, self.world_size, device=device.type, num_buckets=num_buckets)
        self._agree(items)
        for handle in self._handles:
            handle.remove()
        self._handles, self._live, self._bucket_of = [], [], {}
        separate = self.settings["collective"] == "reduce_scatter"
        for bucket in self.plan.buckets:
            live = _Live(bucket, self.rank, self.world_size, device, separate)
            self._live.append(live)
            for owner, runs in enumerate(bucket.runs):
                for run in runs:
                    for k, item in enumerate(run.items):
                        self._adopt(live, item, bucket.start(owner, run, k), owner, run.flag + k)
            if self._everyone is not None:
                dist.broadcast(live.params, group=self._everyone, group_src=0)
            mine = bucket.runs[0 if len(bucket.runs) == 1 else self.rank]
            for run in mine:
                group = self.param_groups[run.items[0].group]
                live.runs.append(_LiveRun(run, live, group, device))
        self._versions = [-1] * len(self._params)  # gradients present now count as given
        self.nonfinite = torch.zeros(len(self._params), dtype=torch.bool, device=device)
        for p in self._params:
            self.state[p] = {}
        for live in self._live:
            for run in live.runs:
                for k, item in enumerate(run.plan.items):
                    p = self._params[item.index]
                    self.state[p] = {name: t[k] for name, t in run.state.items()}
        self._queue: deque[_Live] = deque()
        self._armed, self._built = False, True

    def _kind(self, item: Item, total: float) -> str:
        group = self.param_groups[item.group]
        if group["shard"] == "rows" and self.world_size > 1:
            if group["rule"] == "muon" and group["view"] != "batch":
                raise ValueError(
                    f'parameter {item.name!r}: Muon needs whole matrices; shard="rows" needs view="batch"'
                )
            return "rows"
        if group["shard"] in ("whole", "copy"):
            return group["shard"]
        if group["rule"] == "adam":
            large = math.prod(item.shape) >= ROWS_FROM and len(item.shape) > 1
            return "rows" if large and self.world_size > 1 else "copy"
        # a stack of matrices too dear for one rank is cut between its matrices
        stack = group["view"] == "batch" and item.shape[0] >= self.world_size > 1
        return "rows" if stack and item.cost > total / self.world_size else "whole"

    def _agree(self, items: list[Item]) -> None:
        """All ranks must have made the same plan: a difference is an error here, not a hang later."""
        if self._everyone is None:
            return
        told = [(i.name, i.shape, str(i.dtype), i.group, i.kind, i.every) for i in items]
        digest = zlib.crc32(repr((told, self.world_size, self.settings["collective"])).encode())
        extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._everyone)
        if extremes[0] != -extremes[1]:
            raise ValueError(
                "the ranks disagree about their parameters: expected the same names, shapes, dtypes "
                f"and groups in the same order on each; this rank has {len(items)} parameters"
            )

    def _adopt(self, live: _Live, item: Item, start: int, owner: int, flag: int) -> None:
        p = self._params[item.index]
        here = slice(start, start + p.numel())
        value = live.params[here].view(p.shape)
        value.copy_(p.data)
        p.data = value
        # .data gives the view a version counter of its own, which tells whether anything was added
        grad = live.grads.data[here].view(p.shape)
        if p.grad is not None:
            grad.copy_(p.grad)
        p.grad = grad
        live.entries.append((p, grad, item.index, owner, flag))
        self._bucket_of[item.index] = live
        if p.requires_grad and self._everyone is not None:
            this, index = weakref.ref(self), item.index

            def hook(_p: Tensor) -> None:
                optimizer = this()
                if optimizer is not None and optimizer._armed:
                    optimizer._arrived(index)

            self._handles.append(p.register_post_accumulate_grad_hook(hook))

    # ---- gradients

    def _due(self, live: _Live) -> bool:
        groups = (self.param_groups[item.group] for item in live.plan.items)
        return (self.calls + 1) % live.plan.every == 0 and not all(g["frozen"] for g in groups)

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the flat gradients, which stay the parameters' .grad; `set_to_none` decides whether a
        parameter that then gets no gradient counts as without one. Groups that are still collecting
        for their k-th step (every=k) are left alone."""
        for live in self._live:
            if self.calls % live.plan.every:
                continue
            live.grads.zero_()
            for p, grad, index, *_ in live.entries:
                p.grad = grad
                self._versions[index] = grad._version if set_to_none else -1

    def arm(self) -> None:
        """Call before the LAST backward of a step: reductions start as gradients arrive."""
        if self._everyone is None or not self.settings["overlap"]:
            return
        self._queue = deque(live for live in self._live if self._due(live))
        for live in self._queue:
            live.pending = sum(p.requires_grad for p, *_ in live.entries)
        self._armed = True

    def _arrived(self, index: int) -> None:
        live = self._bucket_of[index]
        if live.launched:
            raise RuntimeError(
                f"parameter {self._names[index]!r} got a gradient after its reduction was launched: "
                "call arm() before the last backward of a step only"
            )
        live.pending -= 1
        # Strictly in plan order, which is the same on every rank whatever arrives where.
        while self._queue and self._queue[0].pending == 0:
            self._launch(self._queue.popleft())

    def _collect(self, live: _Live) -> None:
        """Bring stray gradients into the flat buffer and set the flags of those that exist."""
        missing = []
        for p, grad, index, owner, flag in live.entries:
            if p.grad is None:
                grad.zero_()
                missing.append((owner, flag))
            elif p.grad is not grad:
                if p.grad.is_sparse:
                    raise ValueError(
                        f"parameter {self._names[index]!r}: sparse gradients are not supported; "
                        "make its embedding with sparse=False"
                    )
                grad.copy_(p.grad)
            elif grad._version == self._versions[index]:
                missing.append((owner, flag))
            p.grad = grad
        if missing:
            flags = torch.ones(live.flags.shape)
            for owner, flag in missing:
                flags.view(-1, live.plan.num_flags)[owner, flag] = 0.0
            live.flags.copy_(flags)
        else:
            live.flags.fill_(1.0)
        if live.plan.kind == "rows" and self.num_ranks > 1:
            # Every shard must be masked when one holds NaN: the flag carries it (inf * 0 = NaN), also
            # where only the sum over ranks would overflow.
            largest = torch.linalg.vector_norm(live.grads, math.inf).float()
            live.flags.add_(largest * self.num_ranks * 0.0)

    @torch.no_grad()
    def _launch(self, live: _Live) -> None:
        self._collect(live)
        live.launched = True
        if self._everyone is None:
            return
        if live.plan.kind == "copy" or self.settings["collective"] == "all_reduce":
            work = dist.all_reduce(live.grads, group=self._everyone, async_op=True)
        else:
            work = dist.reduce_scatter_tensor(
                live.grad_shard, live.grads, group=self._node, async_op=True
            )
        live.works.append(work)
        if live.plan.kind == "rows":
            live.works.append(dist.all_reduce(live.flags, group=self._everyone, async_op=True))

    # ---- the step

    @torch.no_grad()
    def step(self, closure=None):
        """Update every group that is due. Collective; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [live for live in self._live if self._due(live)]
        self._armed = False
        self.nonfinite.zero_()
        for live in due:
            if not live.launched:
                self._launch(live)
        if self._across is not None and self.settings["collective"] == "reduce_scatter":
            for live in due:
                if live.plan.kind != "copy":
                    self._wait(live)
                    work = dist.all_reduce(live.grad_shard, group=self._across, async_op=True)
                    live.works.append(work)
        for live in due:
            self._wait(live)
            for run in live.runs:
                self._update(live, run)
            live.launched = False
            if self.world_size > 1 and live.plan.kind != "copy":
                live.gather = dist.all_gather_into_tensor(
                    live.params, live.param_shard, group=self._node, async_op=True
                )
        for live in due:
            if live.gather is not None:
                live.gather.wait()
                live.gather = None
        self.calls += 1
        return loss

    @staticmethod
    def _wait(live: _Live) -> None:
        for work in live.works:
            work.wait()
        live.works.clear()

    def _update(self, live: _Live, run: _LiveRun) -> None:
        group, state = self.param_groups[run.plan.items[0].group], run.state
        if group["frozen"]:
            return
        dims = (-1,) + (1,) * (run.param.ndim - 1)
        finite = torch.linalg.vector_norm(run.grad.flatten(1), math.inf, dim=1).isfinite()
        ok = finite & (run.flags > 0)
        self.nonfinite.index_copy_(0, run.index, ~finite | run.flags.isnan())
        wide = torch.promote_types(run.param.dtype, torch.float32)
        grad = run.grad.to(wide)
        if self.settings["reduce"] == "mean" and self.num_ranks > 1:
            grad = grad / self.num_ranks
        param = run.param
        if "master" in state:  # a weight that was changed from outside wins over its master copy
            same = state["master"].to(param.dtype) == param
            state["master"].copy_(torch.where(same, state["master"], param.to(wide)))
            param = state["master"]
        number = self._number
        decay = group["decay"] if not _is_zero(group["weight_decay"]) else None
        options = {
            "lr": number(group["lr"]), "weight_decay": number(group["weight_decay"]), "decay": decay,
            "cautious": group["cautious"], "eps": group["eps"],
        }  # fmt: skip
        if group["rule"] == "adam":
            beta1, beta2 = group["betas"]
            options |= {
                "beta1": number(beta1), "beta2": number(beta2),
                "log_betas": (number(_log(beta1)), number(_log(beta2))),
            }  # fmt: skip
            mean, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"].view(dims)
            inputs = (param, grad, mean.to(wide), square.to(wide), step)
            self._apply(adam_update, param, [mean, square, step], ok.view(dims), inputs, options)
        else:
            options |= {
                key: group[key]
                for key in ("momentum_form", "nesterov", "method", "ns_steps", "ns_coefficients",
                            "mode", "renorm")
            }  # fmt: skip
            options |= {
                "momentum": number(group["momentum"]), "beta2": number(group["beta2"]),
                "axis": group["second_moment"], "products": self.settings["products"],
            }  # fmt: skip
            seconds = [t for name, t in state.items() if name.startswith("second_moment")]
            whole = (param, grad, state["momentum_buffer"])
            for n, (p, g, B) in enumerate(zip(*(matrix_views(t, group) for t in whole))):
                second = seconds[n] if seconds else None
                kept = [B, second] if seconds else [B]
                mask = ok.view((-1,) + (1,) * (p.ndim - 1))
                scale = group["scale"]
                scale = scale if not isinstance(scale, str) else SCALES[scale](*p.shape[-2:])
                options["scale"] = scale * group["multiplier"]
                self._apply(muon_update, p, kept, mask, (p, g, B.to(wide), second), options)
        if "master" in state:
            run.param.copy_(param)

    def _number(self, value: float | Tensor) -> float | Tensor:
        """A 0-D tensor where rules are compiled: a new value must not mean a new graph."""
        if isinstance(value, Tensor) or not self.settings["compile"]:
            return value
        return torch.tensor(value, dtype=torch.float32)

    # ---- state

    @torch.no_grad()
    def state_dict(self) -> dict:
        """Full tensors by parameter name, the same for every number of ranks. Collective; all copies."""
        state: dict[str, dict] = {name: {} for name in self._names}
        for live in self._live:
            for owner, runs in enumerate(live.plan.runs):
                for number, run in enumerate(runs):
                    group = self.param_groups[run.items[0].group]
                    for name, (size, dtype) in state_spec(run, live.plan.dtype, group).items():
                        lone = len(live.plan.runs) == 1
                        t = torch.empty(size, dtype=dtype, device=self.device)
                        if lone or owner == self.rank:
                            t.copy_(live.runs[number].state[name])
                        if not lone:
                            dist.broadcast(t, group=self._node, group_src=owner)
                        elif live.plan.kind == "rows" and t.ndim > 1:
                            whole = t.new_empty(1, self.world_size * t.shape[1], *t.shape[2:])
                            dist.all_gather_into_tensor(whole[0], t[0], group=self._node)
                            t = whole[:, : run.items[0].shape[0]]
                        for k, item in enumerate(run.items):
                            state[item.name][name] = t[k].clone()
        groups, at = [], 0
        for group in self.param_groups:
            names = self._names[at : at + len(group["params"])]
            at += len(names)
            kept = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append({**kept, "params": names})
        return {"state": state, "param_groups": groups, "calls": self.calls}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what state_dict() gave, on any number of ranks; torch.optim.Muon's and Adam's fit too."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"state_dict: expected {len(self.param_groups)} groups, got {len(groups)}"
            )
        for number, (mine, theirs) in enumerate(zip(self.param_groups, groups)):
            if len(mine["params"]) != len(theirs["params"]):
                raise ValueError(
                    f"state_dict: expected {len(mine['params'])} parameters in group {number}, "
                    f"got {len(theirs['params'])}"
                )
            for key in FIXED:
                if key in theirs and key in mine and theirs[key] != mine[key]:
                    raise ValueError(
                        f"state_dict: group {number} was saved with {key}={theirs[key]!r}, "
                        f"this optimizer has {mine[key]!r}"
                    )
        self._load(state_dict, strict=True)
        for mine, theirs in zip(self.param_groups, groups):
            mine.update({k: v for k, v in theirs.items() if k in mine and not k.startswith("param")})

    @torch.no_grad()
    def _load(self, state_dict: dict, strict: bool) -> None:
        state, ours = dict(state_dict["state"]), {}
        foreign = any(isinstance(key, int) for key in state)  # torch counts, and makes state late
        for index, name in enumerate(self._names):
            ours[name] = state.pop(index if foreign else name, None)
            if ours[name] is None and strict and not foreign:
                raise ValueError(f"state_dict: nothing for parameter {name!r}")
        if state and strict:
            raise ValueError(f"state_dict: unknown parameters {', '.join(map(str, state))}")
        for live in self._live:
            for run in live.runs:
                for k, item in enumerate(run.plan.items):
                    for key, t in run.state.items() if ours[item.name] is not None else ():
                        self._load_tensor(live, item, key, t[k], ours[item.name])
        self.calls = state_dict.get("calls", self.calls)

    def _load_tensor(self, live: _Live, item: Item, key: str, mine: Tensor, saved: dict) -> None:
        if key not in saved:
            raise ValueError(f"state_dict: parameter {item.name!r} has no {key!r}")
        full = torch.as_tensor(saved[key]).to(self.device)
        if live.plan.kind == "rows" and mine.ndim > 0:
            rows = mine.shape[0]
            full, mine = full[self.rank * rows :][:rows], mine.zero_()
            mine = mine[: len(full)]
        if full.shape != mine.shape:
            raise ValueError(
                f"state_dict: parameter {item.name!r}, {key}: expected shape "
                f"{tuple(mine.shape)}, got {tuple(full.shape)}"
            )
        mine.copy_(full)

    def copy_state(self, source: str, target: str) -> None:
        """Give parameter `target` the optimizer state of `source`, which has the same shape and layout:
        a local copy on each rank, for an embedding that leaves its head."""
        a, b = (self.state[self._params[self._names.index(name)]] for name in (source, target))
        shapes = [{key: t.shape for key, t in state.items()} for state in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"copy_state: {source!r} and {target!r} must lie on the same ranks in the same shape, "
                f"got {shapes[0]} and {shapes[1]}"
            )
        for key, t in a.items():
            b[key].copy_(t)

    def __reduce__(self):
        """Copies and pickles are made anew from options and full state; one process only."""
        if self.num_ranks > 1:
            raise ValueError("pickle and deepcopy work on one rank only: use state_dict()")
        groups = [dict(group) for group in self.param_groups]
        for group in groups:
            names = group.pop("param_names", None)
            group["params"] = list(zip(names, group["params"])) if names else list(group["params"])
        return _remake, (type(self), groups, self.settings, self.state_dict())

    # ---- people

    def explain(self) -> str:
        """The plan in words: buckets in launch order, owners, bytes, GFLOP and the predicted time."""
        plan, W = self.plan, self.world_size
        latency, wire, flops, _ = RATES.get(plan.device, RATES["cuda"])
        nodes = f" in each of {self.num_ranks // W} nodes" if self.num_ranks > W else ""
        lines = [f"{len(self._params)} parameters on {W} rank{'s' * (W > 1)}{nodes}, this is {self.rank}"]
        for number, bucket in enumerate(plan.buckets):
            size = torch.empty((), dtype=bucket.dtype).element_size()
            held = bucket.segment * bucket.ranks(W) * size
            real = sum(math.prod(item.shape) for item in bucket.items) * size
            lines.append(
                f"bucket {number}: {len(bucket.items)} {bucket.kind} {str(bucket.dtype)[6:]}, "
                f"{held / 1e6:.3f} MB held for {real / 1e6:.3f} MB ({held / max(real, 1):.3f}x), "
                f"every {bucket.every}, {_wire_bytes(bucket, W) / 1e6:.3f} MB to send per rank and way, "
                f"{1e3 * (latency + _wire_bytes(bucket, W) / wire) * (W > 1):.3f} ms"
            )
            for owner, runs in enumerate(bucket.runs):
                who = f"rank {owner}" if len(bucket.runs) > 1 else "every rank"
                for run in runs:
                    first, last = run.items[0], run.items[-1]
                    names = first.name if first is last else f"{first.name} ... {last.name}"
                    shape = "x".join(map(str, first.local_shape))
                    gflop = sum(item.cost for item in run.items) / 1e9
                    lines.append(f"  {who}: {len(run.items)} x {shape}  {gflop:.3f} GFLOP  {names}")
        loads = plan.loads()
        slow, mean = max(loads), sum(loads) / len(loads)
        shown = " ".join(f"{load / 1e9:.3f}" for load in loads)
        lines.append(
            f"GFLOP per rank: {shown} (balance {100 * mean / max(slow, 1e-30):.1f}%, slowest "
            f"{1e3 * slow / flops:.3f} ms)"
        )
        for count, ratio, seconds, chosen in plan.tried:
            lines.append(
                f"{count} bucket{'s' * (count > 1)}: {ratio:.3f}x bytes, {1e3 * seconds:.3f} ms after "
                f"backward (predicted){' <- chosen' * chosen}"
            )
        return "\n".join(lines)


class Adam(Muon):
    """Adam / AdamW (decoupled decay; {"decay": "l2"} is torch.optim.Adam's) by the same machinery: the
    class Muon with rule "adam" as default."""

    default_rule = "adam"

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options,
    ):
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._setup(params, given, **options)


def _remake(kind: type, groups: list[dict], settings: dict, state: dict) -> Muon:
    optimizer = kind(groups, **settings)
    optimizer.load_state_dict(state)
    return optimizer


def _is_zero(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _log(value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        return value.double().log()
    return math.log(value) if value > 0 else -math.inf
