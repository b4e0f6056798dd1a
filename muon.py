"""Muon and Adam for one process or many, in one file that needs nothing but torch.

    from muon import Muon
    optimizer = Muon([
        {"params": matrices, "lr": 0.02, "method": "polar_express"},
        {"params": the_rest, "rule": "adam", "lr": 3e-4, "betas": (0.9, 0.95)},
    ])
    ...
    loss.backward(); optimizer.step(); optimizer.zero_grad()

Muon is steepest descent under the spectral norm: the momentum of a weight matrix is replaced by the
nearest semi-orthogonal matrix, so that every direction moves at the same speed. Where
torch.distributed is initialised the same code shards itself: each rank owns some of the matrices,
reduces their gradients (under the backward pass, once `arm()` was called), updates them and gathers
the new weights.

Three parts: mathematics (`orthogonalize`, `steepest`), update rules (`muon_update`, `adam_update`),
and the plan with its driver (`make_plan`, `Muon`). The first two are pure functions over batches
(..., rows, cols); only the driver knows of ranks.

Letters: G gradient or momentum, X the iterate, A = X X^T, (a, b, c) is a x + b x^3 + c x^5; K
parameters of one shape in a batch, W ranks, S elements in a rank's segment of a flat buffer.

Sources: Jordan 2024 (Muon), Bernstein 2025 (Deriving Muon; the norms), Amsel et al. 2025 (Polar
Express), Dao-AILab 2026 (Gram Newton-Schulz), Liu et al. 2025 (Moonlight: RMS matching), NorMuon
(arXiv 2510.05491), cautious weight decay (arXiv 2510.12402).
"""

import contextlib
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

# torch 2.13 renamed these two and warns of the old names; 2.11 knows only those
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# --------------------------------------------------------------------------------- mathematics

CUBIC = (1.5, -0.5, 0.0)  # Kovarik 1970, Bjorck and Bowie 1971: converges from all of (0, sqrt 3)
JORDAN = (3.4445, -4.7750, 2.0315)  # steep at 0, never exactly 1: values end in [0.68, 1.2]
METHODS = ("svd", "cubic", "jordan", "polar_express")


def _minimax_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic nearest to 1 on [low, high] in its largest error, by Remez exchange."""
    if low / high > 1 - 5e-6:  # the system below becomes singular; its limit is Taylor's quintic
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    q, r, before = (3 * low + high) / 4, (low + 3 * high) / 4, math.inf
    while True:
        rows = [[x, x**3, x**5, sign] for x, sign in ((low, 1), (q, -1), (r, 1), (high, -1))]
        ones = torch.ones(4, dtype=torch.float64)
        a, b, c, error = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), ones).tolist()
        if abs(error - before) <= 1e-15:
            return a, b, c
        before, root = error, math.sqrt(9 * b * b - 20 * a * c)
        q, r = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))


@functools.lru_cache
def polar_express(
    steps: int, *, lower: float = 1e-3, safety: float = 1.02, cushion: float = 0.02
) -> tuple[tuple[float, float, float], ...]:
    """The polynomials of Polar Express: each is optimal for the interval that the last one left.

    Singular values are promised in [lower, 1]. `cushion` keeps a polynomial from spending its error
    on values below cushion * high; `safety` stretches all but the last, so that rounding above 1
    does not run away: the same factor must multiply the norm before the first step.
    """
    low, high, schedule = lower, 1.0, []
    for step in range(steps):
        a, b, c = _minimax_quintic(max(low, cushion * high), high)
        if cushion * high > low:  # centre the error of the true interval on 1
            ends = sum(x * (a + x * x * (b + x * x * c)) for x in (low, high))
            a, b, c = 2 * a / ends, 2 * b / ends, 2 * c / ends
        s = safety if step < steps - 1 else 1.0
        a, b, c = a / s, b / s**3, c / s**5
        schedule.append((a, b, c))
        low = low * (a + low * low * (b + low * low * c))
        high = 2 - low
    return tuple(schedule)


@torch.compiler.assume_constant_result  # else a compiler traces the Remez exchange, in pieces
def coefficients(method: str, steps: int, given: tuple | None = None) -> tuple[tuple, float]:
    """(polynomials, factor on the norm) of a method; `given` is one triple or one a step."""
    if given is not None:
        triples = given if isinstance(given[0], (tuple, list)) else [given] * steps
        if any(len(triple) != 3 for triple in triples):
            raise ValueError(f"ns_coefficients: expected (a, b, c) or a list of them, got {given}")
        return tuple(tuple(triple) for triple in triples), 1.0
    if method == "polar_express":
        return polar_express(steps), 1.02
    if method not in ("cubic", "jordan"):
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return (CUBIC if method == "cubic" else JORDAN,) * steps, 1.0


@torch.compiler.assume_constant_result
def bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX). Elsewhere it is emulated:
    against fp32 5 times as slow with AVX-512, 50 times with AVX2 (16 of 128 x 128)."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def storage_dtype(mode: str | None, device: torch.device) -> torch.dtype:
    """What the iterate is stored in. "accurate" keeps rounding noise below 2% of the energy of an
    update of rank 8: fp16 on CUDA (10 bits, as fast as bf16 there), fp32 elsewhere, which a CPU
    with bf16 units multiplies rounded to bf16 (_rounds) and gives up for bf16 once little would
    amplify its rounding (0.4%). "fast" is bf16, which the records used: 33% with Polar Express at
    768 x 768. It means speed, not rounding: a CPU without bf16 units computes both modes in plain
    fp32. Training to 524K tokens at pocket scale cannot tell the modes apart (bench/MUON.md), so
    the default is what adds no noise: "accurate"."""
    if mode not in ("fast", "accurate", None):
        raise ValueError(f'mode: expected "fast", "accurate" or None, got {mode!r}')
    if mode == "fast" and (device.type != "cpu" or bf16_units()):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def _rounds(X: Tensor, dtype: torch.dtype) -> bool:
    """Whether fp32 products of X are rounded to bf16: from a short side of 65 on. Below, plain fp32
    is as fast on squares and faster on 4:1, by its cheaper form; and up to 16 torch would round or
    not by the number of matrices, which differs between ranks."""
    units = X.device.type == "cpu" and bf16_units()
    return units and dtype == torch.float32 and min(X.shape[-2:]) > 64


@contextlib.contextmanager
def _precision(rounded: bool, device: torch.device):
    """How products are formed, whatever the program chose for its own: on a CPU of fp32 as it is,
    or `rounded` to bf16; on CUDA with all sums in fp32, where cuBLAS may add up parts of an fp16
    product in fp16. Compiled code cannot change this: it must run inside."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    known = {
        "cpu": (cpu, "fp32_precision", "bf16" if rounded else "ieee"),
        "cuda": (cuda, "allow_fp16_reduced_precision_reduction", False),
    }
    if torch.compiler.is_compiling() or device.type not in known:
        yield
        return
    owner, name, wanted = known[device.type]
    before = getattr(owner, name)
    setattr(owner, name, wanted)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _norm(G: Tensor, dim: int | tuple) -> Tensor:
    """2-norms over `dim`, kept as dimensions, in fp64, where the squares of all fp32 numbers fit.
    That takes a CPU four times as long as fp32 does, in which it adds up the rows; where squares
    would leave its range, after a division by a power of two, which changes no bit."""
    if G.device.type != "cpu" or G.dtype != torch.float32 or torch.compiler.is_compiling():
        wide = torch.float32 if G.device.type == "mps" else torch.float64
        return torch.linalg.vector_norm(G, dim=dim, keepdim=True, dtype=wide)
    *others, last = dim if isinstance(dim, tuple) else (dim,)

    def norm_of(G: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(G, dim=last, keepdim=True).double()
        return torch.linalg.vector_norm(norm, dim=others, keepdim=True) if others else norm

    norm = norm_of(G)
    if ((norm > 1e-9) & (norm < 1e9)).all():
        return norm
    exponent = torch.frexp(G.abs().amax(dim, keepdim=True)).exponent.clamp(-126, 126)
    return norm_of(G * torch.exp2(-exponent)) * torch.exp2(exponent.double())


def normalize(G: Tensor, dim: int | tuple, factor: float = 1.0, eps: float = 0.0) -> Tensor:
    """A new G / (factor * its 2-norm over `dim`), the same for G at any scale: see _norm. Zeros
    stay zeros; `eps` bounds the norm below."""
    norm = _norm(G, dim).clamp(min=max(eps, 2.0**-126))
    return G * (norm * factor).reciprocal().to(G.dtype)


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

    "svd" is exact; the others apply `steps` odd polynomials to the singular values, iterating the
    short side. The result has G's dtype and is the same for G at any scale (unless `eps` > 0,
    torch.optim.Muon's lower bound on the norm). A zero matrix stays zero, one with NaN spoils
    itself alone. `products` = (gram, polynomial) replaces X -> X X^T and (A, b, c) -> b A + c A A,
    over (K, m, n) and (K, m, m), by faster kernels for symmetric results.
    """
    if G.ndim < 2:
        raise ValueError(f"orthogonalize: expected (..., rows, cols), got shape {tuple(G.shape)}")
    tall = G.shape[-2] > G.shape[-1]
    X = (G.mT if tall else G).to(torch.promote_types(G.dtype, torch.float32)).contiguous()
    if method == "svd" and ns_coefficients is None:
        U, S, Vh = torch.linalg.svd(normalize(X, (-2, -1)), full_matrices=False)
        kept = S.gt(torch.finfo(X.dtype).eps * X.shape[-1] * S[..., :1])
        with _precision(False, X.device):
            X = (U * kept.to(U.dtype).unsqueeze(-2)) @ Vh
        return (X.mT if tall else X).to(G.dtype)
    polynomials, safety = coefficients(method, steps, ns_coefficients)
    dtype = X.dtype if X.dtype == torch.float64 else storage_dtype(mode, X.device)
    X = normalize(X, (-2, -1), safety, eps).to(dtype).view(-1, *X.shape[-2:])
    gram, polynomial = products or (_gram, _polynomial)
    rounded = _rounds(X, dtype)
    exact = dtype.itemsize >= 4 and not rounded
    with _precision(rounded, X.device):
        if exact and X.shape[-1] >= 2 * X.shape[-2] and len(polynomials) > 1:
            X = torch.bmm(_accumulated(gram(X), polynomials, polynomial), X)
            polynomials = ()
        for step, (a, b, c) in enumerate(polynomials):
            # From here on the slopes at 0 multiply what rounding adds to X by less than 64.
            if rounded and math.prod(abs(triple[0]) for triple in polynomials[step:]) < 64:
                X = X.to(torch.bfloat16)
            # Wherever it happens, rounding what B is made of leaves the rank of B X alone.
            A = gram(X.to(torch.bfloat16) if rounded else X)
            B = polynomial(A, b, c) if c else A.mul_(b)
            X = torch.baddbmm(X, B.to(X.dtype), X, beta=a)
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def _gram(X: Tensor) -> Tensor:
    return torch.bmm(X, X.mT)


def _polynomial(A: Tensor, b: float, c: float) -> Tensor:
    return torch.baddbmm(A, A, A, beta=b, alpha=c)


def _accumulated(R: Tensor, polynomials: tuple, polynomial) -> Tensor:
    """Q with Q X = all polynomials applied to X, from R = X X^T alone: Gram Newton-Schulz. For 4:1
    matrices 5 steps take 5/9 of the products; only fp32 and fp64 stand it without a restart."""
    Q = None
    for step, (a, b, c) in enumerate(polynomials):
        Z = polynomial(R, b, c) if c else R * b
        Z.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = Z if Q is None else torch.bmm(Z, Q)
        if step < len(polynomials) - 1:
            R = torch.bmm(Z, torch.bmm(R, Z))
    return Q


NORMS = ("spectral", "row", "col", "sign", "l2")


def steepest(G: Tensor, norm: str, **options) -> Tensor:
    """The T of unit norm with the largest <G, T>, for every matrix of G. Norms: "spectral" (largest
    singular value; `options` go to orthogonalize), "row" or "col" (largest 2-norm of a row or
    column), "sign" (largest entry), "l2" (Frobenius)."""
    if norm == "spectral":
        return orthogonalize(G, **options)
    if norm == "sign":
        return G.sign()
    return normalize(G, {"row": -1, "col": -2, "l2": (-2, -1)}[norm])


# -------------------------------------------------------------------------------- update rules
# Functions of tensors (K, ..., rows, cols) in fp32; lr and the like are floats or 0-D tensors. They
# change nothing but what `out` names to write results to, which may be the inputs themselves: what
# is not written twice saves a CPU up to a fifth of a step.

SCALES = {  # factor on the update of an r x c matrix (fan_out x fan_in)
    "spectral": lambda r, c: math.sqrt(r / c),  # RMS -> RMS operator norm 1 at every width
    "original": lambda r, c: math.sqrt(max(1.0, r / c)),  # records 8 on
    "match_rms_adamw": lambda r, c: 0.2 * math.sqrt(max(r, c)),  # entries of RMS 0.2, like Adam's
    "unit_rms": lambda r, c: math.sqrt(max(r, c)),  # entries of RMS 1: records 4 to 7
    "none": lambda r, c: 1.0,  # record 3
    "embed": lambda r, c: math.sqrt(c),  # with norm "row": rows of RMS 1
    "head": lambda r, c: 1 / math.sqrt(c),  # with norm "row": logits move by 1 for inputs of RMS 1
}


def _mix(x: Tensor, y: Tensor, weight: float | Tensor, out: Tensor | None = None) -> Tensor:
    if isinstance(weight, Tensor):
        return x + (y - x) * weight
    return torch.lerp(x, y, weight, out=out)


def _minus(x: Tensor, y: Tensor, factor: float | Tensor, out: Tensor | None = None) -> Tensor:
    if isinstance(factor, Tensor):
        return x - y * factor
    return torch.sub(x, y, alpha=factor, out=out)


def _stepped(
    param: Tensor, update: Tensor, decay, cautious, lr, weight_decay, scale=1.0, out=None
) -> Tensor:
    """param - lr * scale * update, after weight decay: lr * wd of it ("lr"), or lr * (lr * scale) *
    wd ("lr2", which anneals as the schedule squared: records 43 on). Cautious: decay only entries
    that the update shrinks as well (update * param >= 0 for True, > 0 for "strict")."""
    if decay not in ("lr", "lr2"):
        return _minus(param, update, lr * scale, out)
    keep = 1 - lr * weight_decay * (lr * scale if decay == "lr2" else 1.0)
    if cautious:
        agree = update * param
        agree = agree > 0 if cautious == "strict" else agree >= 0
        keep = torch.where(agree, keep, 1.0)
    return _minus(torch.mul(param, keep, out=out), update, lr * scale, out)


def normuon(X: Tensor, v: Tensor, beta2: float | Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """Even out the RMS of X's rows ("row": one number per output neuron, as in the paper) or
    columns ("col") by a running mean of squares v; each matrix keeps its Frobenius norm, so that v
    needs no bias correction."""
    squares = X.square().mean(-1 if axis == "row" else -2, keepdim=True)
    v = _mix(squares, v, beta2)
    weight = v.clamp(min=1e-10).reciprocal()
    before, after = (x.sum((-2, -1), keepdim=True) for x in (squares, squares * weight))
    return X * (weight * before / after.clamp(min=1e-30)).sqrt(), v


def muon_update(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, second_moment: Tensor | None = None, *,
    lr, momentum, weight_decay, beta2, scale: float, momentum_form: str, nesterov: bool, norm: str,
    method: str, ns_steps: int, ns_coefficients: tuple | None, eps: float, mode: str | None,
    products: tuple | None, renorm: bool, axis: str | None, decay: str | None, cautious,
    out=(None, None, None),
) -> tuple[Tensor, ...]:  # fmt: skip
    """(param, momentum_buffer[, second_moment]) after one step; the options are Muon's."""
    if decay == "l2":
        grad = grad + param * weight_decay
    if momentum_form == "ema":
        B = _mix(grad, momentum_buffer, momentum, out[1])
        update = _mix(grad, B, momentum) if nesterov else B
    else:  # heavy ball: the EMA's buffer over 1 - momentum
        B = _minus(grad, momentum_buffer, -momentum, out[1])
        update = _minus(grad, B, -momentum) if nesterov else B
    options = {"method": method, "steps": ns_steps, "ns_coefficients": ns_coefficients}
    update = steepest(update, norm, **options, mode=mode, eps=eps, products=products)
    if renorm:  # give the update the norm of an exactly orthogonal one
        update = normalize(update, (-2, -1)) * math.sqrt(min(update.shape[-2:]))
    if axis:
        update, second_moment = normuon(update, second_moment, beta2, axis)
    new = _stepped(param, update, decay, cautious, lr, weight_decay, scale, out[0])
    return new, B, *([second_moment] if axis else [])


def adam_update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
    lr, beta1, beta2, eps: float, weight_decay, decay: str | None, cautious, out=(None,) * 4,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(param, exp_avg, exp_avg_sq, step) after one step of Adam or AdamW; `step` broadcasts."""
    if decay == "l2":
        grad = grad + param * weight_decay
    step = step + 1
    exp_avg = _mix(grad, exp_avg, beta1, out[1])
    exp_avg_sq = _mix(grad.square(), exp_avg_sq, beta2, out[2])
    # 1 - beta^t by expm1: the plain form loses 5e-5 of 1 - 0.999 in fp32
    logs = (torch.as_tensor(beta, dtype=torch.float64).log() for beta in (beta1, beta2))
    correct1, correct2 = (-torch.expm1(step * log) for log in logs)
    update = exp_avg / correct1 / ((exp_avg_sq / correct2).sqrt_() + eps)
    new = _stepped(param, update, decay, cautious, lr, weight_decay, out=out[0])
    return new, exp_avg, exp_avg_sq, step


def apply_update(
    rule, param: Tensor, grad: Tensor, state: list[Tensor], master: Tensor | None, ok: Tensor,
    options: dict, share: int = 1,
) -> None:  # fmt: skip
    """One step of `rule` for a batch, in place where `ok`: decided on the device, unknown to the
    host. Gradients are divided by `share`. `master`: the fp32 weights that `param` rounds; a weight
    that was changed from outside wins over its master copy."""
    wide = torch.promote_types(param.dtype, torch.float32)
    grad = grad.to(wide)
    if share > 1:
        grad = grad / share
    if master is not None:
        same = master.to(param.dtype) == param
        master.copy_(torch.where(same, master, param.to(wide)))
    weight = param if master is None else master
    eager, targets = not torch.compiler.is_compiling(), [weight, *state]
    everything = eager and ok.device.type == "cpu" and bool(ok.all())  # a CPU may ask: it is free
    out = targets if everything else [None] * len(targets)
    for target, new in zip(targets, rule(weight, grad, *state, **options, out=out)):
        if new is target:
            continue
        if everything:
            target.copy_(new)
        elif eager:
            torch.where(ok, new, target, out=target)
        else:
            target.copy_(torch.where(ok, new, target))
    if master is not None:
        param.copy_(master)


# ------------------------------------------------------------------------------------ the plan

ALIGNMENT = 128  # bytes: every tensor starts on a cache line of its own
ROWS_FROM = 1 << 17  # elements: larger tables are sharded by rows, smaller parameters copied
CHUNK = 1 << 19  # elements that a CPU updates at once: what fits its caches, in one batch
RATES = {  # latency s, bytes/s on the wire, FLOP/s of the products, s to launch a batch's kernels
    "cuda": (15e-6, 4e11, 3e14, 6e-5),  # 8xH100 by NVLink, a third of the dense bf16 peak
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
    local_shape: tuple[int, ...] = ()  # of what its owner holds

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)


@dataclass
class Run:
    """K parameters of one group and shape, side by side in their owner's segment: one batch."""

    items: list[Item]
    offset: int  # elements from the start of the segment to the first
    stride: int  # and from each to the next
    flag: int  # the first item's number among its owner's


@dataclass
class Bucket:
    """What one collective moves: a flat buffer of equal segments, one per rank ("copy": just one).
    The last `num_flags` elements of a segment count, once reduced, the ranks that had a gradient
    for each of its items; "rows" needs segments without a gap and keeps its one flag apart."""

    kind: str
    items: list[Item]
    runs: list[list[Run]]  # by owner; one list for "copy" and "rows", where ranks look alike
    segment: int
    num_flags: int

    def __post_init__(self):
        self.dtype, self.every = self.items[0].dtype, self.items[0].every

    def num_bytes(self, world_size: int) -> int:
        return self.segment * (1 if self.kind == "copy" else world_size) * self.dtype.itemsize

    def wire_bytes(self, world_size: int) -> float:
        """Sent by each rank for one reduce-scatter or all-gather ("copy": the all-reduce)."""
        share = (world_size - 1) / world_size * (2 if self.kind == "copy" else 1)
        return self.num_bytes(world_size) * share

    def seconds(self, world_size: int, device: str) -> float:
        latency, wire, *_ = RATES.get(device, RATES["cuda"])
        return latency + self.wire_bytes(world_size) / wire if world_size > 1 else 0.0


def _make_bucket(kind: str, items: list[Item], owned: list[list[Item]]) -> Bucket:
    """Lay out each owner's items, equal ones next to each other so that a batch is a view."""
    align, laid_out, used = max(1, ALIGNMENT // items[0].dtype.itemsize), [], 0
    for mine in owned:
        runs, at = [], 0
        for flag, item in enumerate(sorted(mine, key=lambda i: (i.group, i.local_shape, i.index))):
            stride, last = -(-item.numel // align) * align, runs[-1].items[-1] if runs else item
            if runs and (last.group, last.local_shape) == (item.group, item.local_shape):
                runs[-1].items.append(item)
            else:
                runs.append(Run([item], at, stride, flag))
            at += stride
        laid_out.append(runs)
        used = max(used, at)
    if kind == "rows":
        return Bucket(kind, items, laid_out, items[0].numel, 1)
    num_flags = max(len(mine) for mine in owned)
    return Bucket(kind, items, laid_out, used + -(-num_flags // align) * align, num_flags)


def _assign(items: list[Item], loads: list[float]) -> list[list[Item]]:
    """Longest processing time first: the dearest item left goes to the least loaded rank."""
    owned, sizes = [[] for _ in loads], [0] * len(loads)
    for item in sorted(items, key=lambda i: (-i.cost, -i.numel, i.order, i.index)):
        rank = min(range(len(loads)), key=lambda r: (loads[r], sizes[r], r))
        owned[rank].append(item)
        loads[rank] += item.cost
        sizes[rank] += item.numel
    return owned


def _cut(items: list[Item], count: int) -> list[list[Item]]:
    """Up to `count` consecutive parts of about equal cost."""
    total, seen, parts = sum(i.cost for i in items) or 1.0, 0.0, [[] for _ in range(count)]
    for item in items:
        parts[min(count - 1, int((seen + item.cost / 2) / total * count))].append(item)
        seen += item.cost
    return [part for part in parts if part]


def exposed_seconds(buckets: list[Bucket], world_size: int, device: str) -> float:
    """Predicted time that backward cannot hide: the last bucket's reduction, then the updates in
    order, each gathered while the next is computed."""
    flops, launch = RATES.get(device, RATES["cuda"])[2:]
    done, wired = 0.0, buckets[-1].seconds(world_size, device)
    reduced = [0.0] * (len(buckets) - 1) + [wired]
    for bucket, ready in zip(buckets, reduced):
        done = max(done, ready) + max(
            sum(sum(item.cost for item in run.items) / flops + launch for run in runs)
            for runs in bucket.runs
        )
        if bucket.kind != "copy":
            wired = max(wired, done) + bucket.seconds(world_size, device)
    return max(done, wired)


@dataclass
class Plan:
    buckets: list[Bucket]  # in launch order
    world_size: int
    device: str
    tried: list[tuple[int, float, float, bool]] = field(default_factory=list)
    # per number of buckets: (number, bytes / least bytes, predicted exposed seconds, chosen)

    def loads(self) -> list[float]:
        """FLOP per rank."""
        loads = [0.0] * self.world_size
        for bucket in self.buckets:
            for rank in range(self.world_size):
                runs = bucket.runs[rank if len(bucket.runs) > 1 else 0]
                share = self.world_size if bucket.kind == "rows" else 1
                loads[rank] += sum(item.cost for run in runs for item in run.items) / share
        return loads


def make_plan(
    items: list[Item], world_size: int, *, device: str = "cuda", num_buckets: int | None = None
) -> Plan:
    """Owners, layout and launch order of `items` on `world_size` ranks; knows no tensors.

    Items owned whole go into 1 to 8 buckets (or `num_buckets`): more leave less to wait for after
    backward, but cost padding, balance and latency. The predicted time decides.
    """
    plan, classes = Plan([], world_size, device), {}
    for item in sorted(items, key=lambda i: (i.order, i.index)):
        item.local_shape = item.shape
        if item.kind == "rows":
            row = math.prod(item.shape[1:]) * item.dtype.itemsize
            step = ALIGNMENT // math.gcd(ALIGNMENT, row)  # rows, so that every shard is aligned
            rows = -(-item.shape[0] // (world_size * step)) * step
            item.local_shape = (rows, *item.shape[1:])
        classes.setdefault((item.kind, str(item.dtype), item.every), []).append(item)
    for (kind, *_), members in classes.items():
        if kind == "rows":
            plan.buckets += [_make_bucket(kind, [item], [[item]]) for item in members]
        elif kind == "copy" or world_size == 1:
            plan.buckets.append(_make_bucket(kind, members, [members]))
        else:
            least, best = sum(item.numel for item in members), {}
            for count in [num_buckets] if num_buckets else range(1, min(8, len(members)) + 1):
                loads, trial = [0.0] * world_size, []
                for part in _cut(members, count):  # balanced in sum, not each by itself
                    trial.append(_make_bucket(kind, part, _assign(part, loads)))
                padded = sum(bucket.segment - bucket.num_flags for bucket in trial) * world_size
                option = (exposed_seconds(trial, world_size, device), padded / least)
                if option < best.get(len(trial), ((math.inf,),))[0]:
                    best[len(trial)] = (option, trial)
            # A prediction within 5% of the best is as good: the fewest buckets win.
            limit = 1.05 * min(option[0] for option, _ in best.values())
            chosen = min(count for count, (option, _) in best.items() if option[0] <= limit)
            plan.buckets += best[chosen][1]
            plan.tried += [(n, o[1], o[0], n == chosen) for n, (o, _) in sorted(best.items())]
    plan.buckets.sort(key=lambda bucket: max(item.order for item in bucket.items))
    return plan


# -------------------------------------------------------------------------------------- groups

_BOTH = {
    "lr": 1e-3, "weight_decay": 0.0, "decay": "lr", "cautious": False,
    "every": 1, "frozen": False,
}  # fmt: skip
RULES = {  # options of a group and their defaults
    "muon": {
        **_BOTH, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "momentum_form": "ema",
        "norm": "spectral", "method": "jordan", "ns_steps": 5, "ns_coefficients": None, "eps": 0.0,
        "mode": None, "scale": "original", "multiplier": 1.0, "renorm": False,
        "second_moment": None, "beta2": 0.95, "view": None, "split": None, "split_axis": 0,
    },
    "adam": {**_BOTH, "betas": (0.9, 0.999), "eps": 1e-8},
}  # fmt: skip
FIXED = ("rule", "every", "view", "split", "split_axis", "second_moment")
CHOICES = {
    "rule": tuple(RULES), "decay": ("lr", "lr2", "l2"), "cautious": (False, True, "strict"),
    "momentum_form": ("ema", "heavy_ball"), "norm": NORMS, "method": METHODS,
    "mode": (None, "fast", "accurate"), "second_moment": (None, "row", "col"),
    "view": (None, "matrix", "flatten", "batch"), "split_axis": (0, 1),
    "collective": ("reduce_scatter", "all_reduce"), "reduce": ("mean", "sum"),
    "adjust_lr_fn": (None, "original", "match_rms_adamw"), "wire_dtype": (None, torch.bfloat16),
}  # fmt: skip


def _check_options(options: dict) -> None:
    for key, value in options.items():
        if key in CHOICES and value not in CHOICES[key]:
            choices = ", ".join(map(repr, CHOICES[key]))
            raise ValueError(f"{key}: expected one of {choices}; got {value!r}")
        number = key in ("lr", "weight_decay", "momentum", "eps", "beta2")
        if number and not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{key}: expected a number >= 0, got {value!r}")
        if key == "every" and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"every: expected a whole number of steps >= 1, got {value!r}")
        if key == "scale" and value not in SCALES and not isinstance(value, (int, float)):
            raise ValueError(f"scale: expected a number or {', '.join(SCALES)}; got {value!r}")


def resolve(group: dict, rule: str, given: dict) -> dict:
    """A group's options in full: the rule's defaults, then `given`, then the group's own."""
    defaults = RULES[rule]
    known = {*defaults, "params", "param_names", "rule", "adjust_lr_fn", "initial_lr", "name"}
    options = dict(defaults)
    for source in (given, group):
        for key in source.keys() - known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown option {key!r} for rule {rule!r}{hint}")
        _check_options(source)
        if source.get("adjust_lr_fn"):  # torch.optim.Muon's word
            options["scale"] = source["adjust_lr_fn"]
        options.update(source)
    options.pop("adjust_lr_fn", None)
    if rule == "muon" and options["method"] != "svd":
        coefficients(options["method"], options["ns_steps"], options["ns_coefficients"])
    return {**options, "rule": rule}


def matrix_views(t: Tensor, group: dict) -> list[Tensor]:
    """Views (K, ..., rows, cols) of a batch t (K, *shape), by the group's view and split."""
    if group["view"] == "flatten":
        t = t.flatten(2)
    elif t.ndim == 2:  # vectors, under the norms that take them
        t = t.unsqueeze(1)
    split, axis = group["split"], group["split_axis"]
    if split is None:
        return [t]
    if not isinstance(split, int):
        return list(t.split(list(split), axis - 2))
    blocks = t.unflatten(axis - 2, (split, t.shape[axis - 2] // split))
    return [blocks if axis == 0 else blocks.movedim(-2, -3)]


def update_flops(shape: tuple[int, ...], group: dict) -> float:
    """FLOP of one update: products of the iteration, or ten per element where there are none."""
    if group["rule"] == "adam" or group["norm"] != "spectral":
        return 10.0 * math.prod(shape)
    method, flops = "jordan" if group["method"] == "svd" else group["method"], 0.0
    steps = len(coefficients(method, group["ns_steps"], group["ns_coefficients"])[0])
    for view in matrix_views(torch.empty(1, *shape, device="meta"), group):
        m, n = sorted(view.shape[-2:])
        flops += math.prod(view.shape[:-2]) * steps * (4.0 * m * m * n + 2.0 * m**3)
    return flops


def _check_param(name: str, p: Tensor, group: dict) -> None:
    """Refuse what a rule cannot update well, saying what to do instead."""
    what, view, shape = f"parameter {name!r} of shape {tuple(p.shape)}", group.get("view"), p.shape
    if not p.is_floating_point():
        raise ValueError(f"{what}: expected a real floating point tensor, got {p.dtype}")
    if group["rule"] == "adam":
        return
    adam = 'put it into a group with {"rule": "adam"}'
    if p.ndim < 2 and (p.ndim == 0 or group["norm"] not in ("sign", "l2")):
        raise ValueError(f"{what}: Muon needs matrices, got {p.ndim} dimensions; {adam}")
    if view is None and p.ndim > 2:
        flat = f"({shape[0]}, {p[0].numel()})"
        raise ValueError(
            f'{what}: say how to see it as matrices: {{"view": "batch"}} for a stack of matrices '
            f'such as experts, {{"view": "flatten"}} for convolution filters as one matrix {flat}'
        )
    if (view == "matrix" and p.ndim != 2) or (view == "batch" and p.ndim < 3):
        raise ValueError(f"{what}: view={view!r} does not fit {p.ndim} dimensions")
    table = p.ndim == 2 and shape[0] >= 8192 and shape[0] >= 16 * shape[1]
    named = any(part in name.lower() for part in ("embed", "wte", "wpe", "lm_head"))
    if view is None and group["norm"] == "spectral" and (table or named):
        raise ValueError(
            f"{what}: looks like an embedding or a head, which Muon trains badly; {adam}, or say "
            '{"view": "matrix"} if it is a hidden matrix'
        )
    shape = (shape[0], p[0].numel()) if view == "flatten" or p.ndim == 1 else shape
    split, side = group["split"], shape[group["split_axis"] - 2]
    if split is not None and (side % split if isinstance(split, int) else sum(split) != side):
        raise ValueError(f"{what}: split={split} does not divide the {side} of its split axis")


def state_spec(run: Run, group: dict) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each state tensor of a run; the first dimension counts its parameters."""
    size, dtype = (len(run.items), *run.items[0].local_shape), run.items[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    spec = {"master": (size, wide)} if dtype != wide else {}  # bf16 parameters, exact fp32 updates
    if group["rule"] == "adam":
        averages = {name: (size, wide) for name in ("exp_avg", "exp_avg_sq")}
        return {**spec, **averages, "step": (size[:1], wide)}
    spec["momentum_buffer"] = (size, wide)
    views = matrix_views(torch.empty(size, device="meta"), group)
    for number, view in enumerate(views if group["second_moment"] else ()):
        kept_sizes = (*view.shape[:-1], 1)
        if group["second_moment"] == "col":
            kept_sizes = (*view.shape[:-2], 1, view.shape[-1])
        spec["second_moment" + (f".{number}" if len(views) > 1 else "")] = (kept_sizes, wide)
    return spec


# ---------------------------------------------------------------------------------- the driver


def _vectors(t: Tensor) -> Tensor:
    """(K, ...) as (K, n)."""
    return t.unsqueeze(-1).flatten(1)


class _LiveBucket:
    """A bucket with this rank's tensors. They live as long as the optimizer, so nothing that a
    collective reads or writes is freed or reused while it is under way."""

    def __init__(self, plan: Bucket, rank: int, world_size: int, device, separate: bool, wire):
        self.plan, S, flags = plan, plan.segment, plan.num_flags
        ranks = 1 if plan.kind == "copy" else world_size
        self.params = torch.zeros(ranks * S, dtype=plan.dtype, device=device)
        self.grads = torch.zeros(ranks * S, dtype=plan.dtype, device=device)
        mine = slice(rank * S, (rank + 1) * S) if ranks > 1 else slice(None)
        apart = separate and ranks > 1
        self.param_shard = self.params[mine]
        self.grad_shard = self.grads[mine].clone() if apart else self.grads[mine]
        # What the ranks add up: the gradients where they lie, or a copy in the type of the wire.
        self.sent, self.sent_shard = self.grads, self.grad_shard
        if wire is not None and wire.itemsize < plan.dtype.itemsize:
            self.sent = self.grads.to(wire)
            self.sent_shard = self.sent[mine].clone() if apart else self.sent[mine]
        self.flags, self.my_flags = (
            grads.view(-1, S)[:, S - flags :] for grads in (self.grads, self.grad_shard)
        )
        if plan.kind == "rows":
            self.flags = self.my_flags = torch.zeros(1, 1, device=device)
        self.entries: list[tuple] = []  # parameter, its gradient's view, index, owner, flag
        # Of the items that this rank updates: their numbers, and the sums of their gradients.
        owner = rank if len(plan.runs) > 1 else 0
        mine = [item.index for run in plan.runs[owner] for item in run.items]
        wide = torch.promote_types(plan.dtype, torch.float32)
        self.index = torch.tensor(mine, dtype=torch.long, device=device)
        self.sums = torch.zeros(len(mine), dtype=wide, device=device)
        self.runs: list[_LiveRun] = []
        self.works: list = []  # reductions under way
        self.gather = None
        self.pending, self.launched, self.arrived = 0, False, math.inf


class _LiveRun:
    """A run with its views (K, *local_shape) of this rank's segment, and its state."""

    def __init__(self, plan: Run, live: _LiveBucket, group: dict, device):
        size = (len(plan.items), *plan.items[0].local_shape)
        strides = (plan.stride, *torch.empty(size[1:], device="meta").stride())
        self.plan, self.place = plan, slice(plan.flag, plan.flag + size[0])
        self.param, self.grad = (
            flat.as_strided(size, strides, flat.storage_offset() + plan.offset)
            for flat in (live.param_shard, live.grad_shard)
        )
        self.state = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in state_spec(plan, group).items()
        }
        if "master" in self.state:
            self.state["master"].copy_(self.param)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and Adam for the rest, in one optimizer, on any number of ranks.

    The first arguments are torch.optim.Muon's, with its meaning and defaults. Groups choose their
    rule with {"rule": "muon"} (default) or {"rule": "adam"} and set any option of RULES; params may
    be (name, tensor) pairs. Writing a group's lr, momentum, weight_decay ... between steps is free.

    Parameters and gradients become views of flat buffers here, so make the optimizer after the
    model is on its device; with several ranks the first one's values are sent to all. Without a
    gradient on some ranks a parameter counts as zeros there; without one on any it is left alone.

    Options of "muon" groups, beside torch's
        method         "svd", "cubic", "jordan", "polar_express", with ns_steps
        mode           "accurate" or "fast", see storage_dtype
        norm           "spectral", or "row", "col", "sign", "l2": see steepest
        scale          a key of SCALES or a number (torch: adjust_lr_fn), times `multiplier`
        momentum_form  "ema" as torch, or "heavy_ball": the same direction
        renorm         rescale each update to the norm of an exactly orthogonal one
        second_moment  "row" or "col": NorMuon by that axis, with beta2
        view           None (2-D), "batch" (leading dimensions stack), "flatten" (filters), "matrix"
        split          number of equal blocks (heads), or sizes (fused QKV), along split_axis 0 or 1
    Options of both rules
        decay          "lr": lr * wd of a parameter a step; "lr2": lr * lr * scale * wd; "l2"
        cautious       True or "strict": decay only what the update shrinks as well
        every          act on every k-th step only; gradients add up in between
        frozen         True: no update for now, and zero_grad() drops the gradients
    Options of the whole
        process_group  the ranks that train together, None is all; with collectives of your own
                       between arm() and step() on NCCL, a group of its own
        node_size      owners span so many consecutive ranks, and owned shards are all-reduced
                       across such nodes; None is torchrun's LOCAL_WORLD_SIZE
        collective     "reduce_scatter", or "all_reduce" as in records 6 to 23
        reduce         "mean" or "sum" over ranks
        wire_dtype     torch.bfloat16: fp32 gradients are rounded and added up in it, half the bytes
        overlap        False: arm() does nothing
        num_buckets    None: the plan weighs overlap against padding
        products       faster symmetric products, see orthogonalize
        compile        fuse the update rules with torch.compile
    """

    default_rule = "muon"
    gate: Tensor | None = None
    """A 0-D bool tensor on the parameters' device, alike on all ranks: where it is False, step()
    moves no parameter and no state. The host never asks, so it may be the outcome of a check."""

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple | None = None,  # None: the method's own
        eps: float = 0.0,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options,
    ):
        given = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        self._setup(params, {**given, **options})

    def _setup(self, params, given: dict) -> None:
        settings = {
            "process_group": None, "node_size": None, "collective": "reduce_scatter",
            "wire_dtype": None, "reduce": "mean", "overlap": True, "num_buckets": None,
            "products": None, "compile": False,
        }  # fmt: skip
        self.settings = {key: given.pop(key, value) for key, value in settings.items()}
        _check_options(self.settings)
        self._given, self._built, self.calls, self._handles = given, False, 0, []
        compiled = self.settings["compile"]
        self._apply = torch.compile(apply_update, dynamic=False) if compiled else apply_update
        super().__init__(params, {})
        self._join_ranks()
        self._build()

    def add_param_group(self, group: dict) -> None:
        """Add a group. After construction this plans anew, keeps all state, and is collective."""
        rule = group.get("rule", self.default_rule)
        _check_options({"rule": rule})
        options = resolve(group, rule, self._given if rule == self.default_rule else {})
        before = self.state_dict() if self._built else None
        super().add_param_group(options)
        if before is not None:
            self._build()
            self._load(before, strict=False)

    # ---- construction

    def _join_ranks(self) -> None:
        """`_node` is the ranks that shard, `_across` the owners of the same shard in all nodes."""
        self._everyone = self._node = self._across = None
        self.rank, self.world_size, self.num_ranks, self._first = 0, 1, 1, True
        if not (dist.is_available() and dist.is_initialized()):
            return
        given, size = self.settings["process_group"], self.settings["node_size"]
        group = given or dist.group.WORLD
        if given is None and dist.get_backend() == "gloo":
            # Where a rank lacks a gradient its launches come later: collectives of others between
            # arm() and step() must not get in between. On NCCL a group costs memory: pass one.
            group = dist.new_group()
        self._everyone = self._node = group
        ranks, me = dist.get_process_group_ranks(self._everyone), dist.get_rank(self._everyone)
        if size is None:
            size = int(os.environ.get("LOCAL_WORLD_SIZE", len(ranks)))
            size = size if given is None and size and len(ranks) % size == 0 else len(ranks)
        if size < 1 or len(ranks) % size:
            raise ValueError(f"node_size: expected a divisor of {len(ranks)} ranks, got {size}")
        self.num_ranks, self.world_size, self.rank = len(ranks), size, me % size
        self._first = me == 0
        if size < len(ranks):
            for start in range(0, len(ranks), size):
                made = dist.new_group(ranks[start : start + size])
                self._node = made if start <= me < start + size else self._node
            for start in range(size):
                made = dist.new_group(ranks[start::size])
                self._across = made if me % size == start else self._across

    def _build(self) -> None:
        """Plan, make the flat buffers, turn parameters and gradients into views of them."""
        self._params, self._names, items = [], [], []
        for number, group in enumerate(self.param_groups):
            names, count = group.get("param_names"), len(group["params"])
            for k, p in enumerate(group["params"]):
                index, shape = len(self._params), tuple(p.shape)
                self._params.append(p)
                self._names.append(names[k] if names else str(index))
                _check_param(self._names[-1], p, group)
                cost = update_flops(shape, group)
                # Backward comes from the end; groups that span the depth run side by side.
                place = (group["every"], 1 - (k + 1) / count)
                items.append(
                    Item(index, self._names[-1], shape, number, "whole", cost, p.dtype, *place)
                )
        twice = {name for name in self._names if self._names.count(name) > 1}
        if twice:
            raise ValueError(f"names of parameters must differ, got twice: {sorted(twice)}")
        devices = {p.device for p in self._params}
        if len(devices) > 1:
            raise ValueError(f"parameters: expected one device, got {sorted(map(str, devices))}")
        self.device = device = devices.pop()
        matrices = sum(i.cost for i in items if self.param_groups[i.group]["rule"] == "muon")
        for item in items:
            item.kind = self._kind(item, matrices / self.world_size)
        count = self.settings["num_buckets"]
        self.plan = make_plan(items, self.world_size, device=device.type, num_buckets=count)
        self._agree(items)
        for handle in self._handles:
            handle.remove()
        self._handles, self._live, self._bucket_of = [], [], {}
        self._versions = [-1] * len(self._params)
        for bucket in self.plan.buckets:
            separate = self.settings["collective"] == "reduce_scatter"
            wire = self.settings["wire_dtype"] if self._everyone is not None else None
            live = _LiveBucket(bucket, self.rank, self.world_size, device, separate, wire)
            self._live.append(live)
            for owner, runs in enumerate(bucket.runs):
                for run in runs:
                    for k, item in enumerate(run.items):
                        start = owner * bucket.segment + run.offset + k * run.stride
                        self._adopt(live, item, start, owner, run.flag + k)
            if self._everyone is not None:
                dist.broadcast(live.params, group=self._everyone, group_src=0)
            for run in bucket.runs[self.rank if len(bucket.runs) > 1 else 0]:
                group = self.param_groups[run.items[0].group]
                live.runs.append(_LiveRun(run, live, group, device))
        self.nonfinite = torch.zeros(len(self._params), dtype=torch.bool, device=device)
        self.state.clear()
        for live in self._live:  # a rank sees the state that it owns
            for run in live.runs:
                for k, item in enumerate(run.plan.items):
                    self.state[self._params[item.index]] = {n: t[k] for n, t in run.state.items()}
        self._queue: deque[_LiveBucket] = deque()
        self._armed, self._arrivals, self._learned, self._built = False, 0, False, True

    def _kind(self, item: Item, fair: float) -> str:
        group, several = self.param_groups[item.group], self.world_size > 1
        if group["rule"] == "adam" or group["norm"] in ("row", "sign"):
            large = math.prod(item.shape) >= ROWS_FROM and len(item.shape) > 1
            return "copy" if not large else "rows" if several else "whole"
        # A stack of matrices that is more than one rank's share is cut between its matrices.
        stack = group["view"] == "batch" and several and item.shape[0] >= self.world_size
        return "rows" if stack and item.cost > fair else "whole"

    def _agree(self, items: list[Item]) -> None:
        """All ranks must have made the same plan: else an error here, not a hang later."""
        if self._everyone is None:
            return
        told = [(i.name, i.shape, str(i.dtype), i.group, i.kind, i.every) for i in items]
        told += [str(self.settings[key]) for key in ("collective", "num_buckets", "wire_dtype")]
        told.append(self.world_size)
        digest = zlib.crc32(repr(told).encode())
        extremes = torch.tensor([digest, -digest], device=self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._everyone)
        if extremes[0] != -extremes[1]:
            raise ValueError(
                "the ranks disagree about their parameters: expected the same names, shapes, "
                f"dtypes and groups in the same order on each; this rank has {len(items)}"
            )

    def _adopt(self, live: _LiveBucket, item: Item, start: int, owner: int, flag: int) -> None:
        p, index = self._params[item.index], item.index
        here = slice(start, start + p.numel())
        p.data = live.params[here].view(p.shape).copy_(p.data)
        # .data gives each view a version counter of its own: it tells whether anything was added.
        grad = live.grads.data[here].view(p.shape)
        if p.grad is None:
            self._versions[index] = grad._version
        else:
            grad.copy_(p.grad)
        p.grad = grad
        live.entries.append((p, grad, index, owner, flag))
        self._bucket_of[index] = live
        if p.requires_grad and self._everyone is not None:
            this = weakref.ref(self)

            def hook(_: Tensor) -> None:
                optimizer = this()
                if optimizer is not None and optimizer._armed:
                    optimizer._arrived(index)

            self._handles.append(p.register_post_accumulate_grad_hook(hook))

    # ---- gradients

    def _due(self, live: _LiveBucket) -> bool:
        frozen = all(self.param_groups[item.group]["frozen"] for item in live.plan.items)
        return not frozen and (self.calls + 1) % live.plan.every == 0

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the flat gradients; each stays its parameter's .grad. `set_to_none` says whether a
        parameter that gets nothing from then on counts as one without a gradient. Groups that still
        collect for their k-th step (every=k) keep what they have, unless they are frozen."""
        for live in self._live:
            if self.calls % live.plan.every == 0:
                live.grads.zero_()
                dropped = live.entries
            else:
                frozen = {item.index for item in live.plan.items
                          if self.param_groups[item.group]["frozen"]}  # fmt: skip
                dropped = [entry for entry in live.entries if entry[2] in frozen]
                if dropped:
                    torch._foreach_zero_([grad for _, grad, *_ in dropped])
            for p, grad, index, *_ in dropped:
                p.grad = grad
                self._versions[index] = grad._version if set_to_none else -1

    def arm(self) -> None:
        """Call before the LAST backward of a step: reductions then start as gradients arrive."""
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
                f"parameter {self._names[index]!r} got a gradient after its reduction was "
                "launched: call arm() before the last backward of a step only"
            )
        live.pending -= 1
        self._arrivals += 1
        live.arrived = self._arrivals
        # Strictly in one order on every rank, whatever arrives where: collectives must match.
        while self._queue and self._queue[0].pending == 0:
            self._launch(self._queue.popleft())

    def _learn_order(self) -> None:
        """From now on launch buckets in the order in which rank 0 saw backward fill them."""
        order = sorted(range(len(self._live)), key=lambda n: (self._live[n].arrived, n))
        order = torch.tensor(order, device=self.device)
        dist.broadcast(order, group=self._everyone, group_src=0)
        order, self._learned = order.tolist(), True
        self._live = [self._live[n] for n in order]
        self.plan.buckets = [self.plan.buckets[n] for n in order]

    def _collect(self, live: _LiveBucket) -> None:
        """Bring stray gradients into the flat buffer, and flag those that exist."""
        live.flags.fill_(1.0)
        for p, grad, index, owner, flag in live.entries:
            if p.grad is None:
                grad.zero_()
                live.flags[owner, flag].zero_()
            elif p.grad is not grad:
                if p.grad.is_sparse:
                    raise ValueError(
                        f"parameter {self._names[index]!r}: got a sparse gradient; make its "
                        "embedding with sparse=False"
                    )
                grad.copy_(p.grad)
            elif grad._version == self._versions[index]:
                live.flags[owner, flag].zero_()
            p.grad = grad
        if live.plan.kind == "rows" and self.num_ranks > 1:
            # One shard's NaN must mask them all, so the flag carries it (inf * 0 is NaN), also
            # where only the sum over the ranks would overflow.
            largest = torch.linalg.vector_norm(live.grads, math.inf).float()
            live.flags.add_(largest * self.num_ranks * 0.0)

    @torch.no_grad()
    def _launch(self, live: _LiveBucket) -> None:
        self._collect(live)
        live.launched = True
        if self._everyone is None:
            return
        if live.sent is not live.grads:
            live.sent.copy_(live.grads)
        if live.plan.kind == "copy" or self.settings["collective"] == "all_reduce":
            work = dist.all_reduce(live.sent, group=self._everyone, async_op=True)
        else:
            work = _reduce_scatter(live.sent_shard, live.sent, group=self._node, async_op=True)
        live.works.append(work)
        if live.plan.kind == "rows":
            live.works.append(dist.all_reduce(live.flags, group=self._everyone, async_op=True))

    # ---- the step

    @torch.no_grad()
    def step(self, closure=None):
        """Update every group that is due; collective. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [live for live in self._live if self._due(live)]
        learn = self._armed and not self._learned and len(due) == len(self._live)
        self._armed = False
        self.nonfinite.zero_()
        for live in due:
            if not live.launched:
                self._launch(live)
        if self._across is not None and self.settings["collective"] == "reduce_scatter":
            for live in due:
                if live.plan.kind != "copy":
                    self._wait(live)
                    work = dist.all_reduce(live.sent_shard, group=self._across, async_op=True)
                    live.works.append(work)
        for live in due:
            self._wait(live)
            if live.sent is not live.grads:
                live.grad_shard.copy_(live.sent_shard)
            ok = self._sound(live)
            for run in live.runs:
                if not self._group(run)["frozen"]:
                    self._update(run, ok[run.place])
            live.launched = False
            if self.world_size > 1 and live.plan.kind != "copy":
                live.gather = _all_gather(
                    live.params, live.param_shard, group=self._node, async_op=True
                )
        for live in due:
            if live.gather is not None:
                live.gather.wait()
                live.gather = None
        self.calls += 1
        if learn:
            self._learn_order()
        return loss

    @staticmethod
    def _wait(live: _LiveBucket) -> None:
        for work in live.works:
            work.wait()
        live.works.clear()

    def _group(self, run: _LiveRun) -> dict:
        return self.param_groups[run.plan.items[0].group]

    def _sound(self, live: _LiveBucket) -> Tensor:
        """Which of this rank's items of a bucket have a gradient, and a finite one; notes what is
        not finite. For all items at once: on a GPU the small kernels of a step add up."""
        for run in live.runs:
            total = live.sums[run.place]
            if self._group(run)["frozen"]:
                total.zero_()
            else:  # a sum is finite where all its terms are, and costs one pass
                torch.sum(_vectors(run.grad), 1, dtype=total.dtype, out=total)
        marks = live.my_flags[0, : len(live.sums)] + 0 * live.sums  # inf * 0 is NaN
        self.nonfinite.index_copy_(0, live.index, marks.isnan())
        ok = marks > 0
        return ok if self.gate is None else ok & self.gate

    def _update(self, run: _LiveRun, ok: Tensor) -> None:
        """Apply the group's rule to a batch, on a CPU in parts that its caches hold."""
        group, count = self._group(run), len(run.plan.items)
        names = ("lr", "weight_decay", "momentum", "beta2")
        numbers = {name: group[name] for name in names if name in group}
        if group["rule"] == "adam":
            numbers["beta1"], numbers["beta2"] = group["betas"]
        if self.settings["compile"]:  # a new value must not mean a new graph
            numbers = {
                name: torch.as_tensor(value, dtype=torch.float64) for name, value in numbers.items()
            }
        none = not isinstance(group["weight_decay"], Tensor) and group["weight_decay"] == 0
        options = {"decay": None if none else group["decay"], "cautious": group["cautious"]}
        if group["rule"] == "muon":
            options["axis"] = group["second_moment"]
            options["products"] = self.settings["products"]
            for name in ("momentum_form", "nesterov", "norm", "method", "ns_steps",
                         "ns_coefficients", "mode", "renorm"):  # fmt: skip
                options[name] = group[name]
        options |= {**numbers, "eps": group["eps"]}
        part = max(1, CHUNK // run.plan.stride) if self.device.type == "cpu" else count
        if part > 1:  # two threads take as long for 3 matrices as for 4
            part += -part % torch.get_num_threads()
        for k in range(0, count, part):
            here = slice(k, k + part)
            self._update_part(run, here, ok[here], options)

    def _update_part(self, run: _LiveRun, part: slice, ok: Tensor, options: dict) -> None:
        group, share = self._group(run), self._share()
        state = {name: t[part] for name, t in run.state.items()}
        param, grad, master = run.param[part], run.grad[part], state.pop("master", None)
        if group["rule"] == "adam":  # all are vectors to it
            param, grad, *averages = (
                _vectors(t) for t in (param, grad, state["exp_avg"], state["exp_avg_sq"])
            )
            averages.append(state["step"].unsqueeze(1))
            master = master if master is None else _vectors(master)
            self._apply(adam_update, param, grad, averages, master, ok.unsqueeze(1), options, share)
            return
        momentum = state.pop("momentum_buffer")
        seconds = list(state.values())  # one per view
        views = [matrix_views(t, group) for t in (param, grad, momentum)]
        masters = [None] * len(views[0]) if master is None else matrix_views(master, group)
        for number, (p, g, B) in enumerate(zip(*views)):
            scale = group["scale"]
            scale = SCALES[scale](*p.shape[-2:]) if isinstance(scale, str) else scale
            extra, mask = {"scale": scale * group["multiplier"]}, ok.view(-1, *[1] * (p.ndim - 1))
            rounded = _rounds(p, storage_dtype(group["mode"], p.device))
            with _precision(rounded and group["method"] != "svd", p.device):
                self._apply(muon_update, p, g, [B, *seconds[number : number + 1]], masters[number],
                            mask, {**options, **extra}, share)

    # ---- state

    @torch.no_grad()
    def state_dict(self) -> dict:
        """Full tensors by parameter name, the same for any number of ranks; copies, collective."""
        state: dict[str, dict] = {name: {} for name in self._names}
        for live in self._live:
            several = len(live.plan.runs) > 1
            for owner, runs in enumerate(live.plan.runs):
                for number, run in enumerate(runs):
                    group = self.param_groups[run.items[0].group]
                    for name, (size, dtype) in state_spec(run, group).items():
                        t = torch.empty(size, dtype=dtype, device=self.device)
                        if not several or owner == self.rank:
                            t.copy_(live.runs[number].state[name])
                        if several:
                            dist.broadcast(t, group=self._node, group_src=owner)
                        elif live.plan.kind == "rows" and t.ndim > 1:
                            full = t.new_empty(self.world_size * t.shape[1], *t.shape[2:])
                            _all_gather(full, t[0].contiguous(), group=self._node)
                            t = full[None, : run.items[0].shape[0]]
                        for k, item in enumerate(run.items):
                            state[item.name][name] = t[k].clone()
        pending = {}  # gradients that groups collect for their k-th step
        for live in self._live:
            if self.calls % live.plan.every:
                grads = live.grads.clone()
                if self._everyone is not None:
                    dist.all_reduce(grads, group=self._everyone)
                start = live.grads.storage_offset()
                for p, grad, index, *_ in live.entries:
                    here = grads.as_strided(p.shape, p.stride(), grad.storage_offset() - start)
                    pending[self._names[index]] = here.clone() / self._share()
        groups, names = [], iter(self._names)
        for group in self.param_groups:
            kept = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            groups.append({**kept, "params": [next(names) for _ in group["params"]]})
        calls = self.calls
        return {"state": state, "param_groups": groups, "calls": calls, "pending": pending}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what state_dict() gave, on any number of ranks, or what torch.optim's gave."""
        theirs = state_dict["param_groups"]
        both = (self.param_groups, theirs)
        sizes = [[len(group["params"]) for group in groups] for groups in both]
        if sizes[0] != sizes[1]:
            raise ValueError(f"state_dict: expected groups of {sizes[0]} tensors, got {sizes[1]}")
        for number, (mine, other) in enumerate(zip(self.param_groups, theirs)):
            for key in FIXED:
                if key in mine and other.get(key, mine[key]) != mine[key]:
                    raise ValueError(
                        f"state_dict: group {number} was saved with {key}={other[key]!r}, "
                        f"this optimizer has {mine[key]!r}"
                    )
        self._load(state_dict, strict=True)
        for mine, other in zip(self.param_groups, theirs):
            known = mine.keys() - {"params", "param_names"}
            mine.update({key: value for key, value in other.items() if key in known})
            if "adjust_lr_fn" in other:  # torch.optim.Muon's and Adam's words for ours
                mine["scale"] = other["adjust_lr_fn"] or "original"
            if "decoupled_weight_decay" in other:
                mine["decay"] = "lr" if other["decoupled_weight_decay"] else "l2"

    @torch.no_grad()
    def _load(self, state_dict: dict, strict: bool) -> None:
        saved = dict(state_dict["state"])
        foreign = any(isinstance(key, int) for key in saved)
        if foreign:  # torch's: by number, and nothing for what had no gradient yet
            saved = {self._names[n]: tensors for n, tensors in saved.items()}
        missing, unknown = set(self._names) - saved.keys(), saved.keys() - set(self._names)
        if strict and (unknown or (missing and not foreign)):
            raise ValueError(
                "state_dict: parameters do not match; "
                f"missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}"
            )
        for live in self._live:
            for run in live.runs:
                for k, item in enumerate(run.plan.items):
                    for key, t in run.state.items() if item.name in saved else ():
                        self._load_tensor(live, item, key, t[k], saved[item.name])
        self.calls = state_dict.get("calls", self.calls)
        for live in self._live:
            for _, grad, index, *_ in live.entries:
                pending = state_dict.get("pending", {}).get(self._names[index])
                if pending is not None:  # one rank holds the sum
                    grad.copy_(pending * self._share() * self._first)
                    self._versions[index] = -1

    def _share(self) -> int:
        """What a sum over the ranks is divided by."""
        return self.num_ranks if self.settings["reduce"] == "mean" else 1

    def _load_tensor(self, live: _LiveBucket, item: Item, key: str, mine: Tensor, saved: dict):
        if key not in saved:
            raise ValueError(f"state_dict: parameter {item.name!r} has no {key!r}")
        full = torch.as_tensor(saved[key]).to(self.device)
        if live.plan.kind == "rows" and mine.ndim > 0:  # this rank's rows, if any
            full = full[self.rank * mine.shape[0] :][: mine.shape[0]]
            mine = mine.zero_()[: len(full)]
        if full.shape != mine.shape:
            raise ValueError(
                f"state_dict: parameter {item.name!r}, {key}: expected shape {tuple(mine.shape)}, "
                f"got {tuple(full.shape)}"
            )
        mine.copy_(full)

    def copy_state(self, source: str, target: str) -> None:
        """Give parameter `target` the state of `source`, which must lie on the same ranks in the
        same shape: a local copy, for an embedding that leaves its head."""
        a, b = (self.state[self._params[self._names.index(name)]] for name in (source, target))
        shapes = [{key: tuple(t.shape) for key, t in state.items()} for state in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"copy_state: {source!r} and {target!r} must lie alike on the ranks, got {shapes}"
            )
        for key, t in a.items():
            b[key].copy_(t)

    def __reduce__(self):
        """Copies and pickles are made anew from options and full state; on one rank only."""
        if self.num_ranks > 1:
            raise ValueError("copying or pickling an optimizer works on one rank; use state_dict()")
        groups = [dict(group) for group in self.param_groups]
        for group in groups:
            names = group.pop("param_names", None)
            group["params"] = list(zip(names, group["params"])) if names else list(group["params"])
        return _remake, (type(self), groups, self.settings, self.state_dict())

    def explain(self) -> str:
        """The plan in words: buckets in launch order, owners, bytes, GFLOP, predicted time."""
        plan, W = self.plan, self.world_size
        nodes = f" in each of {self.num_ranks // W} nodes" if self.num_ranks > W else ""
        count = f"{len(self._params)} parameters on {W} rank{'s' * (W > 1)}"
        wire = self.settings["wire_dtype"]  # the predictions leave it out
        wire = f"; gradients travel in {str(wire)[6:]}, weights as they are" if wire else ""
        lines = [f"{count}{nodes}; this is rank {self.rank}{wire}"]
        for number, bucket in enumerate(plan.buckets):
            real = sum(math.prod(item.shape) for item in bucket.items) * bucket.dtype.itemsize
            held, wire = bucket.num_bytes(W), bucket.wire_bytes(W)
            lines.append(
                f"bucket {number}: {len(bucket.items)} {bucket.kind} {str(bucket.dtype)[6:]}"
                f"{f', every {bucket.every}' * (bucket.every > 1)}, {held / 1e6:.3f} MB for "
                f"{real / 1e6:.3f} ({held / max(real, 1):.3f}x), sends {wire / 1e6:.3f} MB each "
                f"way, {1e3 * bucket.seconds(W, plan.device):.3f} ms"
            )
            for owner, runs in enumerate(bucket.runs):
                for run in runs:
                    first, last = run.items[0], run.items[-1]
                    names = first.name if first is last else f"{first.name} ... {last.name}"
                    shape = "x".join(map(str, first.local_shape)) or "1"
                    gflop = sum(item.cost for item in run.items) / 1e9
                    who = f"rank {owner}" if len(bucket.runs) > 1 else "each rank"
                    lines.append(f"  {who}: {len(run.items)} x ({shape}) {gflop:.3f} GFLOP {names}")
        loads, flops = plan.loads(), RATES.get(plan.device, RATES["cuda"])[2]
        balance = sum(loads) / W / max(*loads, 1e-30)
        lines.append(
            f"GFLOP per rank {' '.join(f'{load / 1e9:.3f}' for load in loads)}: balance "
            f"{100 * balance:.1f}%, slowest {1e3 * max(loads) / flops:.3f} ms"
        )
        for count, ratio, seconds, chosen in plan.tried:
            lines.append(
                f"{count} bucket{'s' * (count > 1)}: {ratio:.3f}x bytes, {1e3 * seconds:.3f} ms "
                f"after backward (predicted){', chosen' * chosen}"
            )
        return "\n".join(lines)


class Adam(Muon):
    """Adam with decoupled decay (AdamW; decay="l2" is torch.optim.Adam's), by the same machinery:
    the class Muon with "adam" as the default rule."""

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
        self._setup(params, {**given, **options})


def _remake(kind: type, groups: list[dict], settings: dict, state: dict) -> Muon:
    optimizer = kind(groups, **settings)
    optimizer.load_state_dict(state)
    return optimizer
