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
reduces their gradients (under the backward pass, after `sync_next_backward()`), updates them and
sends the new weights to the others.

Three parts, each readable without the next: mathematics (`orthogonalize`, `steepest`), update rules
(`RULES`), and the optimizer (`make_plan`, `Muon`). Only the optimizer knows of ranks.

Letters: G gradient or momentum, X the iterate, A = X X^T, (a, b, c) is a x + b x^3 + c x^5; K
parameters of one shape in a batch, W ranks.

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
from collections.abc import Callable
from dataclasses import dataclass

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
    """What the iterate is stored in. "fast" is bf16, which the records used; its rounding is 33% of
    the energy of an update of rank 8 (Polar Express, 768 x 768). "accurate", the default, keeps
    that below 2%: fp16 on CUDA (10 bits, as fast as bf16 there), fp32 elsewhere. A CPU without bf16
    units computes both in fp32."""
    if mode not in ("fast", "accurate", None):
        raise ValueError(f'mode: expected "fast", "accurate" or None, got {mode!r}')
    if mode == "fast" and (device.type != "cpu" or bf16_units()):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


@contextlib.contextmanager
def _precision(device: torch.device):
    """Matrix products as this file means them, whatever the program chose for its own: no autocast,
    fp32 as it is on a CPU, and on CUDA all sums in fp32, where cuBLAS may add up parts of an fp16
    product in fp16. Compiled code cannot change this: it must run inside."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    known = {
        "cpu": (cpu, "fp32_precision", "ieee"),
        "cuda": (cuda, "allow_fp16_reduced_precision_reduction", False),
    }
    if torch.compiler.is_compiling() or device.type not in known:
        yield
        return
    owner, name, wanted = known[device.type]
    before = getattr(owner, name)
    if before == wanted and not torch.is_autocast_enabled(device.type):
        yield
        return
    setattr(owner, name, wanted)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(owner, name, before)


def normalize(G: Tensor, dim: int | tuple, factor: float = 1.0, eps: float = 0.0) -> Tensor:
    """A new G / (factor * its 2-norm over `dim`). The norm is summed in fp64, where the squares of
    all fp32 numbers fit, so that G may have any scale. Zeros stay zeros; `eps` bounds the norm
    below."""
    wide = torch.float32 if G.device.type == "mps" else torch.float64
    norm = torch.linalg.vector_norm(G, dim=dim, keepdim=True, dtype=wide)
    return G * (norm.clamp(min=max(eps, 2.0**-126)) * factor).reciprocal().to(G.dtype)


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
    """U V^T of G = U S V^T for every matrix of G (..., rows, cols), or nearly that.

    Odd polynomials, one a step, act on the singular values; the short side is iterated. `method`
    "svd" is exact, the others take `steps` polynomials. The result has G's dtype and is the same
    for G at any scale (unless `eps` > 0, torch.optim.Muon's lower bound on the norm). A zero matrix
    stays zero; NaNs do not leak into the other matrices of the batch. `products` = (gram,
    polynomial) replaces X -> X X^T and (A, b, c) -> b A + c A A, over (K, m, n) and (K, m, m), by
    faster kernels for symmetric results.
    """
    if G.ndim < 2:
        raise ValueError(f"orthogonalize: expected (..., rows, cols), got shape {tuple(G.shape)}")
    if G.numel() == 0:
        return torch.zeros_like(G)
    tall = G.shape[-2] > G.shape[-1]
    X = (G.mT if tall else G).to(torch.promote_types(G.dtype, torch.float32)).contiguous()
    if method == "svd" and ns_coefficients is None:
        U, S, Vh = torch.linalg.svd(normalize(X, (-2, -1)), full_matrices=False)
        kept = S.gt(torch.finfo(X.dtype).eps * X.shape[-1] * S[..., :1])
        with _precision(X.device):
            X = (U * kept.to(U.dtype).unsqueeze(-2)) @ Vh
        return (X.mT if tall else X).to(G.dtype)
    polynomials, safety = coefficients(method, steps, ns_coefficients)
    dtype = X.dtype if X.dtype == torch.float64 else storage_dtype(mode, X.device)
    X = normalize(X, (-2, -1), safety, eps).to(dtype).view(-1, *X.shape[-2:])
    gram, polynomial = products or (_gram, _polynomial)
    wide = dtype.itemsize >= 4 and X.shape[-1] >= 2 * X.shape[-2]
    with _precision(X.device):
        if wide and len(polynomials) > 1 and math.prod(abs(a) for a, *_ in polynomials) <= 1e3:
            X = torch.bmm(_accumulated(gram(X), polynomials, polynomial), X)
            polynomials = ()
        for a, b, c in polynomials:
            A = gram(X)
            B = polynomial(A, b, c) if c else A.mul_(b)
            X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def _gram(X: Tensor) -> Tensor:
    return torch.bmm(X, X.mT)


def _polynomial(A: Tensor, b: float, c: float) -> Tensor:
    return torch.baddbmm(A, A, A, beta=b, alpha=c)


def _accumulated(R: Tensor, polynomials: tuple, polynomial) -> Tensor:
    """Q with Q X = all polynomials applied to X, from R = X X^T alone: Gram Newton-Schulz. For 4:1
    matrices 5 steps take 5/9 of the products. Only fp32 and fp64 stand it without a restart, and
    only while the slopes at 0, whose product amplifies rounding, stay below 1e3 (5 steps)."""
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
# A step of a parameter is three functions. `average` turns the gradient into an update, entry by
# entry; `direction` turns that into another one and needs whole matrices (rules without it can be
# sharded anyhow); `descend` subtracts it. All work on batches (K, ..., rows, cols) in fp32, change
# their state in place, and read the options of their group: floats, or 0-D tensors.

SCALES = {  # factor on the update of an r x c matrix (fan_out x fan_in)
    "spectral": lambda r, c: math.sqrt(r / c),  # RMS -> RMS operator norm 1 at every width
    "original": lambda r, c: math.sqrt(max(1.0, r / c)),  # records 8 on
    "match_rms_adamw": lambda r, c: 0.2 * math.sqrt(max(r, c)),  # entries of RMS 0.2, like Adam's
    "unit_rms": lambda r, c: math.sqrt(max(r, c)),  # entries of RMS 1: records 4 to 7
    "none": lambda r, c: 1.0,  # record 3
    "embed": lambda r, c: math.sqrt(c),  # with norm "row": rows of RMS 1
    "head": lambda r, c: 1 / math.sqrt(c),  # with norm "row": logits move by 1 for inputs of RMS 1
}


def _ema(average: Tensor, x: Tensor, decay: float | Tensor) -> Tensor:
    """decay * average + (1 - decay) * x."""
    if isinstance(decay, Tensor):
        return average + (x - average) * (1 - decay)
    return average.lerp(x, 1 - decay)


def _ema_(average: Tensor, x: Tensor, decay: float | Tensor) -> Tensor:
    """The same in place."""
    if isinstance(decay, Tensor):
        return average.add_((x - average) * (1 - decay))
    return average.lerp_(x, 1 - decay)


def descend(
    param: Tensor, update: Tensor, lr, weight_decay, decay: str | None = "lr", cautious=False,
    scale: float = 1.0,
) -> None:  # fmt: skip
    """param -= lr * scale * update, after weight decay. "lr": param loses lr * weight_decay of
    itself. "lr2": param loses lr * (lr * scale) * weight_decay of itself, which anneals as the
    schedule squared (#43). `cautious`: only entries that the update shrinks as well decay (update *
    param >= 0 for True, > 0 for "strict")."""
    if decay in ("lr", "lr2"):
        keep = 1 - lr * weight_decay * (lr * scale if decay == "lr2" else 1.0)
        if cautious:
            agree = update * param
            agree = agree > 0 if cautious == "strict" else agree >= 0
            keep = torch.where(agree, keep, 1.0)
        param.mul_(keep)
    if isinstance(lr, Tensor):
        param.sub_(update * (lr * scale))
    else:
        param.sub_(update, alpha=lr * scale)


def momentum_average(grad: Tensor, state: dict, muon: dict) -> Tensor:
    """The momentum of Muon; with Nesterov's look ahead, as if grad came once more."""
    momentum, buffer = muon["momentum"], state["momentum_buffer"]
    if muon["momentum_form"] == "ema":
        _ema_(buffer, grad, momentum)
        return _ema(buffer, grad, momentum) if muon["nesterov"] else buffer
    buffer.mul_(momentum).add_(grad)  # heavy ball: the EMA's buffer over 1 - momentum
    return grad + buffer * momentum if muon["nesterov"] else buffer


def steepest_direction(update: Tensor, state: dict, muon: dict) -> Tensor:
    """Of unit norm for every matrix: orthogonal under the spectral norm. Then NorMuon's scaling
    (#41)."""
    update = steepest(update, muon["norm"], method=muon["method"], steps=muon["ns_steps"],
                      mode=muon["mode"], ns_coefficients=muon["ns_coefficients"], eps=muon["eps"],
                      products=muon["products"])  # fmt: skip
    if muon["second_moment"]:
        update = normuon(update, state["second_moment"], muon["beta2"], muon["second_moment"])
    return update


def normuon(X: Tensor, v: Tensor, beta2: float | Tensor, axis: str) -> Tensor:
    """Even out the RMS of X's rows ("row": one number per output neuron, as in the paper) or
    columns ("col") by a running mean of squares v, updated in place; each matrix keeps its
    Frobenius norm, so that v needs no bias correction."""
    squares = X.square().mean(-1 if axis == "row" else -2, keepdim=True)
    weight = _ema_(v, squares, beta2).clamp(min=1e-10).reciprocal()
    before, after = (x.sum((-2, -1), keepdim=True) for x in (squares, squares * weight))
    return X * (weight * before / after.clamp(min=1e-30)).sqrt()


def second_moment_shape(shape: tuple, muon: dict) -> dict[str, tuple]:
    """State of NorMuon for a matrix (..., rows, cols)."""
    axis = {None: None, "row": (*shape[:-1], 1), "col": (*shape[:-2], 1, shape[-1])}
    kept = axis[muon["second_moment"]]
    return {"second_moment": kept} if kept else {}


def adam_average(grad: Tensor, state: dict, adam: dict) -> Tensor:
    """The update of Adam: the mean gradient over the root of its mean square."""
    beta1, beta2 = adam["betas"]
    step = state["step"].add_(1)
    mean = _ema_(state["exp_avg"], grad, beta1)
    mean_square = _ema_(state["exp_avg_sq"], grad.square(), beta2)
    # 1 - beta^t by expm1: the plain form loses 5e-5 of 1 - 0.999 in fp32
    logs = (torch.as_tensor(beta, dtype=torch.float64).log() for beta in (beta1, beta2))
    correct1, correct2 = (-torch.expm1(step * log) for log in logs)
    return mean / correct1 / ((mean_square / correct2).sqrt_().add_(adam["eps"]))


@dataclass(frozen=True)
class Rule:
    """An update rule: its functions (see above), its options with their defaults, and its state."""

    average: Callable[[Tensor, dict, dict], Tensor]
    options: dict
    buffers: tuple[str, ...]  # state of the parameter's shape
    more: Callable[[tuple, dict], dict] = lambda shape, group: {}  # shapes of further state
    direction: Callable[[Tensor, dict, dict], Tensor] | None = None


_BOTH = {
    "lr": 1e-3, "weight_decay": 0.0, "decay": "lr", "cautious": False,
    "update_interval": 1, "frozen": False,
}  # fmt: skip
RULES = {
    "muon": Rule(momentum_average, {
        **_BOTH, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "momentum_form": "ema",
        "norm": "spectral", "method": "jordan", "ns_steps": 5, "ns_coefficients": None, "eps": 0.0,
        "mode": None, "scale": "original", "multiplier": 1.0, "second_moment": None, "beta2": 0.95,
        "view": None, "split": None, "split_axis": 0,
    }, ("momentum_buffer",), second_moment_shape, steepest_direction),
    "adam": Rule(adam_average, {**_BOTH, "betas": (0.9, 0.999), "eps": 1e-8},
                 ("exp_avg", "exp_avg_sq"), lambda shape, group: {"step": ()}),
}  # fmt: skip


def matrix_view(t: Tensor, group: dict) -> Tensor:
    """A view (K, ..., rows, cols) of a batch t (K, *shape), by the group's view and split; (K, n)
    for rules that take entries one by one."""
    if RULES[group["rule"]].direction is None:
        return t.unsqueeze(-1).flatten(1)
    if group["view"] == "flatten" and t.ndim > 3:
        t = t.flatten(2)
    while t.ndim < 3:  # vectors and scalars, under the norms that take them
        t = t.unsqueeze(1)
    if group["split"] is None:
        return t
    blocks = t.unflatten(group["split_axis"] - 2, (group["split"], -1))
    return blocks if group["split_axis"] == 0 else blocks.movedim(-2, -3)


def matrix_shape(shape: tuple[int, ...], group: dict) -> tuple[int, ...]:
    """Of the matrices (..., rows, cols) that a parameter is seen as."""
    return tuple(matrix_view(torch.empty(1, *shape, device="meta"), group).shape[1:])


def state_spec(
    shape: tuple[int, ...], dtype: torch.dtype, group: dict
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each state tensor of one parameter."""
    rule, wide = RULES[group["rule"]], torch.promote_types(dtype, torch.float32)
    sizes = {"master": shape} if dtype != wide else {}  # bf16 parameters, exact fp32 updates
    sizes |= dict.fromkeys(rule.buffers, shape) | rule.more(matrix_shape(shape, group), group)
    return {name: (size, wide) for name, size in sizes.items()}


def update_batch(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], ok: Tensor | None, group: dict,
    whole: Callable | None = None,
) -> None:  # fmt: skip
    """One step of a group's rule for a batch (K, *shape), in place. Where `ok` (K,) is False
    nothing changes: decided on the device, unknown to the host; None means True everywhere.
    `state["master"]` are the fp32 weights that a bf16 `param` rounds; a weight that was changed
    from outside wins over its master. `whole(direction, update)` applies a direction to matrices of
    which this rank holds some rows only."""
    rule, wide = RULES[group["rule"]], torch.promote_types(param.dtype, torch.float32)
    grad, weight = grad.to(wide), state.get("master", param)
    if weight is not param:
        same = weight.to(param.dtype) == param
        weight.copy_(torch.where(same, weight, param.to(wide)))
    changed = {"weight": weight, **state}
    before = {} if ok is None else {name: t.clone() for name, t in changed.items()}
    if group["decay"] == "l2":
        grad = grad + weight * group["weight_decay"]
    # the tensors as the rule sees them
    views = {name: matrix_view(state[name], group) for name in rule.buffers}
    for name in state.keys() - views.keys() - {"master"}:
        views[name] = state[name] if state[name].ndim > 1 else state[name].unsqueeze(1)
    p, g, scale = matrix_view(weight, group), matrix_view(grad, group), group.get("scale", 1.0)
    if isinstance(scale, str):
        scale = SCALES[scale](*p.shape[-2:])
    scale *= group.get("multiplier", 1.0)
    update = rule.average(g, views, group)
    if rule.direction is not None and whole is not None:
        update = whole(lambda update: rule.direction(update, views, group), update)
    elif rule.direction is not None:
        update = rule.direction(update, views, group)
    descend(p, update, group["lr"], group["weight_decay"], group["decay"], group["cautious"], scale)
    for name, old in before.items():
        t = changed[name]
        t.copy_(torch.where(ok.view(-1, *[1] * (t.ndim - 1)), t, old))
    if weight is not param:
        param.copy_(weight)


def checked_update(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], present: Tensor | None,
    gate: Tensor | None, group: dict, agree: Callable | None = None, whole: Callable | None = None,
) -> Tensor:  # fmt: skip
    """update_batch where the gradient is finite, `present` (K,) > 0 and `gate` is True; returns
    where it is finite, (K,). `present` is 0 where no rank has a gradient, NaN where another shard
    of a table is not finite. `agree` adds up the sums of the ranks that hold rows of one matrix."""
    # A sum is finite where all its terms are, and costs one pass.
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = grad.unsqueeze(-1).flatten(1).sum(1, dtype=wide)
    sums = sums if present is None else sums + 0 * present
    if agree is not None:
        agree(sums)
    finite = sums.isfinite()
    ok = finite if present is None else finite & (present > 0)
    ok = ok if gate is None else ok & gate
    if param.device.type == "cpu" and not torch.compiler.is_compiling():  # asking needs no sync
        if not ok.any():
            return finite
        ok = None if ok.all() else ok
    update_batch(param, grad, state, ok, group, whole)
    return finite


# ------------------------------------------------------------------------------------ the plan

ALIGNMENT = 128  # bytes: every tensor in a bucket starts on a cache line of its own
SHARD_FROM = 1 << 17  # elements: larger tables are sharded by rows, smaller parameters replicated
CHUNK = 1 << 19  # elements that a CPU updates at once: what fits its caches, in one batch


@dataclass(eq=False)
class Slot:
    """A parameter's place in the plan. Kinds:

    "owned"       one rank updates it: what needs whole matrices
    "sharded"     each rank updates as many of its rows: large tables, stacks of many matrices
    "replicated"  every rank updates all of it: what is small
    "dtensor"     FSDP2 has sharded it already
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    kind: str
    cost: float  # FLOP of its update
    update_interval: int = 1
    order: float = 0.0  # when backward is expected to finish it: 0 first, 1 last
    owner: int = 0
    offset: int = 0  # elements from the start of its owner's segment
    flag: int = 0  # its number among its owner's


class Bucket:
    """What one collective moves: a flat buffer of equal segments, one per rank (replicated: one in
    all). The last elements of a segment count the ranks that had a gradient for each of its slots.
    A sharded table is its own bucket, with segments of equal rows, and keeps its flag apart."""

    def __init__(self, slots: list[Slot], world_size: int):
        first = slots[0]
        self.kind, self.dtype, self.update_interval = first.kind, first.dtype, first.update_interval
        self.slots = sorted(slots, key=lambda s: (s.owner, s.group, s.shape, s.index))
        self.num_segments = 1 if self.kind in ("replicated", "dtensor") else world_size
        self.rows = -(-first.shape[0] // world_size) if self.kind == "sharded" else 0
        self.num_flags, self.align = 0, max(1, ALIGNMENT // self.dtype.itemsize)
        if self.rows:
            self.segment = self.rows * math.prod(first.shape[1:])
            return
        ends, counts = [0] * self.num_segments, [0] * self.num_segments
        for slot in self.slots:
            slot.offset, slot.flag = ends[slot.owner], counts[slot.owner]
            ends[slot.owner] += self.padded(math.prod(slot.shape))
            counts[slot.owner] += 1
        self.num_flags = max(counts)
        self.segment = max(ends) + self.padded(self.num_flags)

    def padded(self, numel: int) -> int:
        return -(-numel // self.align) * self.align

    def batches(self, rank: int) -> list[list[Slot]]:
        """The slots that `rank` updates, those of one group and shape together: they lie side by
        side in its segment."""
        found: dict[tuple, list[Slot]] = {}
        for slot in self.slots:
            if self.num_segments == 1 or self.rows or slot.owner == rank:
                found.setdefault((slot.group, slot.shape), []).append(slot)
        return list(found.values())

    @property
    def num_bytes(self) -> int:
        return self.segment * self.num_segments * self.dtype.itemsize


def update_flops(shape: tuple[int, ...], group: dict) -> float:
    """FLOP of one update: products of the iteration, or ten per element where there are none."""
    if RULES[group["rule"]].direction is None or group["norm"] != "spectral":
        return 10.0 * math.prod(shape)
    *stack, rows, cols = matrix_shape(shape, group)
    m, n = min(rows, cols), max(rows, cols)
    return math.prod(stack) * group["ns_steps"] * (4.0 * m * m * n + 2.0 * m**3)


def _owned_buckets(slots: list[Slot], count: int, world_size: int) -> list[Bucket]:
    """Up to `count` buckets of consecutive slots of about equal cost. Each slot goes to the least
    loaded rank, the most expensive first (greedy LPT); loads add up over the buckets."""
    total, seen, parts = sum(s.cost for s in slots) or 1.0, 0.0, [[] for _ in range(count)]
    for slot in slots:
        parts[min(count - 1, int((seen + slot.cost / 2) / total * count))].append(slot)
        seen += slot.cost
    loads, buckets = [0.0] * world_size, []
    for part in filter(None, parts):
        sizes = [0] * world_size
        for slot in sorted(part, key=lambda s: (-s.cost, -math.prod(s.shape), s.order, s.index)):
            slot.owner = min(range(world_size), key=lambda r: (loads[r], sizes[r], r))
            loads[slot.owner] += slot.cost
            sizes[slot.owner] += math.prod(slot.shape)
        buckets.append(Bucket(part, world_size))
    return buckets


def make_plan(
    slots: list[Slot], world_size: int, num_buckets: int | None = None
) -> list[Bucket]:
    """The buckets of `slots` in launch order, with owners and layout; knows no tensors.

    Owned slots go into `num_buckets`. After backward there is the last reduction to wait for, and
    all gathers: more buckets make the first smaller, but pad. By default as many, up to 5, as leave
    the fewest bytes of both.
    """
    buckets, classes = [], {}
    for slot in sorted(slots, key=lambda s: (s.order, s.index)):
        table = slot.index if slot.kind == "sharded" else None
        key = (slot.kind, slot.dtype, slot.update_interval, table)
        classes.setdefault(key, []).append(slot)
    for (kind, *_), members in classes.items():
        if kind != "owned" or world_size == 1:
            buckets.append(Bucket(members, world_size))
            continue
        def bytes_left(count: int, members=members) -> float:
            trial = _owned_buckets(members, count, world_size)
            return sum(bucket.num_bytes for bucket in trial) * (1 + 1 / len(trial))

        count = num_buckets or min(range(1, 6), key=bytes_left)
        buckets += _owned_buckets(members, count, world_size)
    return sorted(buckets, key=lambda bucket: max(slot.order for slot in bucket.slots))


# -------------------------------------------------------------------------------------- groups

FIXED = ("rule", "update_interval", "view", "split", "split_axis", "second_moment")
CHOICES = {
    "rule": RULES, "decay": ("lr", "lr2", "l2"), "cautious": (False, True, "strict"),
    "momentum_form": ("ema", "heavy_ball"), "norm": NORMS, "method": METHODS,
    "mode": (None, "fast", "accurate"), "second_moment": (None, "row", "col"),
    "view": (None, "matrix", "flatten", "batch"), "split_axis": (0, 1),
    "collective": ("reduce_scatter", "all_reduce"), "reduce": ("mean", "sum", "none"),
    "adjust_lr_fn": (None, "original", "match_rms_adamw"),
}  # fmt: skip


def _check_options(options: dict) -> None:
    def is_number(x) -> bool:
        if isinstance(x, Tensor):  # on a device it is not read
            return x.numel() == 1 and (x.device.type != "cpu" or x.item() >= 0)
        return isinstance(x, (int, float)) and x >= 0

    def must(key: str, fits: bool, wanted: str) -> None:
        if key in options and not fits:
            raise ValueError(f"{key}: expected {wanted}, got {options[key]!r}")

    for key, value in options.items():
        if key in CHOICES:
            must(key, value in CHOICES[key], f"one of {', '.join(map(repr, CHOICES[key]))}")
    for key in ("lr", "weight_decay", "momentum", "eps", "beta2"):
        must(key, is_number(options.get(key)), "a number >= 0")
    betas = options.get("betas")
    must("betas", isinstance(betas, (tuple, list)) and len(betas) == 2 and all(
        is_number(beta) and not beta >= 1 for beta in betas), "two numbers from 0 to below 1")
    for key in ("ns_steps", "update_interval", "split"):
        value = options.get(key)
        whole = isinstance(value, int) and 1 <= value < 100
        must(key, whole or (key == "split" and value is None), "a whole number from 1 to 99")
    scale = options.get("scale")
    must("scale", scale in SCALES or isinstance(scale, (int, float)),
         f"a number or one of {', '.join(SCALES)}")
    for key in ("amsgrad", "maximize"):
        must(key, not options.get(key), "False: it is not supported")
    if "use_muon" in options or "algorithm" in options:
        raise ValueError('use_muon, algorithm: say {"rule": "muon"} or {"rule": "adam"} in a group')


def resolve(group: dict, rule: str, given: dict, strict: bool = False) -> dict:
    """A group's options in full: the rule's defaults, then `given`, then the group's own. Names
    that are none of ours are kept in groups, as torch keeps them, unless they look like a slip;
    `strict` refuses them in `given`."""
    options = dict(RULES[rule].options)
    ours = {*options, "params", "param_names", "rule", "adjust_lr_fn"}
    for source in (given, group):
        for key in source.keys() - ours:
            near = difflib.get_close_matches(key, ours, 1, cutoff=0.85)
            if near or (strict and source is given):
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


def _check_param(name: str, p: Tensor, group: dict) -> None:
    """Refuse what a rule cannot update well, saying what to do instead."""
    what, view, shape = f"parameter {name!r} of shape {tuple(p.shape)}", group.get("view"), p.shape
    if not p.is_floating_point():
        raise ValueError(f"{what}: expected a real floating point tensor, got {p.dtype}")
    if RULES[group["rule"]].direction is None:
        return
    adam = 'put it into a group with {"rule": "adam"}'
    if p.ndim < 2 and group["norm"] not in ("sign", "l2"):
        raise ValueError(f"{what}: Muon needs matrices, got {p.ndim} dimensions; {adam}")
    if view is None and p.ndim > 2:
        flat = f"({shape[0]}, {math.prod(shape[1:])})"
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
    rows = 1 if p.ndim < 2 else shape[0]
    shape = (rows, p.numel() // max(1, rows)) if view == "flatten" or p.ndim < 2 else shape
    split, side = group["split"], shape[group["split_axis"] - 2]
    if split is not None and side % split:
        raise ValueError(f"{what}: split={split} does not divide the {side} of its split axis")


# ------------------------------------------------------------------------------- the optimizer


def _stacked(tensors: list[Tensor]) -> Tensor:
    """A batch (K, ...): a view of contiguous tensors that lie side by side, such as one table or
    the state of a batch, else a copy."""
    first, count = tensors[0], len(tensors)
    start, size = first.data_ptr(), first.nbytes
    room = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
    if room >= count * size and all(
        t.is_contiguous() and t.data_ptr() == start + k * size for k, t in enumerate(tensors)
    ):
        return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))
    return torch.stack(tensors).contiguous()


class _Batch:
    """K parameters of one group and shape that this rank updates together."""

    def __init__(self, slots: list[Slot], params: list[Tensor], group: dict, rows: slice | None):
        self.slots, self.params, self.rows, self.group = slots, params, rows, slots[0].group
        self.sharded = slots[0].kind == "dtensor"
        self.shape = self.local(params[0]).shape
        group = {**group, "split": None} if self.sharded else group  # splits concern whole matrices
        self.spec = state_spec(tuple(self.shape), slots[0].dtype, group)
        self.index = torch.tensor([slot.index for slot in slots], device=params[0].device)
        # In the reduced bucket: gradients (K, ...), and how many ranks had one. None: not reduced.
        self.grad: Tensor | None = None
        self.present: Tensor | None = None

    def local(self, t: Tensor) -> Tensor:
        """What this rank updates of a parameter or of its gradient."""
        if self.sharded:
            placements = self.params[0].placements
            return (t if t.placements == placements else t.redistribute(placements)).to_local()
        return t if self.rows is None else t[self.rows]

    def local_state(self, t: Tensor) -> Tensor:
        return t.to_local() if self.sharded and t.ndim else t


class _LiveBucket:
    """A bucket of the plan with what this rank updates of it, and what its collectives read and
    write: that lives as long as the optimizer, so that nothing is freed or reused under way."""

    def __init__(self, plan: Bucket, optimizer: "Muon"):
        params = optimizer._params
        self.plan, self.params = plan, [params[slot.index] for slot in plan.slots]
        self.node, self.world = optimizer._node, optimizer._world
        reduce, collective = (optimizer.settings[key] for key in ("reduce", "collective"))
        # Whether weights travel, and gradients; and these by all-reduce.
        self.gathers = plan.num_segments > 1
        self.reduces = self.world is not None and reduce != "none" and plan.kind != "dtensor"
        self.all_reduces = collective == "all_reduce" or not self.gathers
        self.works: list = []  # reductions under way
        self.gather = None
        self.sent: list[tuple] = []  # slot, gradient and its version when its reduction began
        self.pending, self.launched, self.arrived = 0, False, math.inf
        if self.reduces or self.gathers:
            self._allocate(optimizer.rank)
        first = optimizer.rank * plan.rows
        rows = slice(first, first + plan.rows) if plan.rows and self.gathers else None
        self.batches = []
        for slots in plan.batches(optimizer.rank):
            mine = [params[slot.index] for slot in slots]
            batch = _Batch(slots, mine, optimizer.param_groups[slots[0].group], rows)
            self.batches.append(batch)
            if self.reduces:
                strides = torch.empty(batch.shape, device="meta").stride()
                strides = (plan.padded(batch.shape.numel()), *strides)
                start = self.shard.storage_offset() + slots[0].offset
                batch.grad = self.shard.as_strided((len(slots), *batch.shape), strides, start)
                batch.present = self.own_flags[slots[0].flag :][: len(slots)]

    def _allocate(self, rank: int) -> None:
        plan, table = self.plan, self.params[0]
        size, total = plan.segment, plan.segment * plan.num_segments
        make = functools.partial(torch.zeros, dtype=plan.dtype, device=table.device)
        self.own = slice(rank * size, (rank + 1) * size) if self.gathers else slice(None)
        # A table whose rows divide evenly travels from its .grad and into itself, uncopied.
        even = bool(plan.rows) and table.numel() == total and table.is_contiguous()
        self.direct = even and not self.all_reduces
        self.buffer = make(0 if self.direct else total)
        # this rank's part of the sum
        self.shard = self.buffer[self.own] if self.all_reduces else make(size)
        if plan.rows:
            self.flags = torch.zeros(1, 1, device=table.device)
            self.own_flags = self.flags[0]
            self.views = [] if self.direct else [self.buffer[: table.numel()].view(table.shape)]
            self.sends = self.receives = list(range(len(self.views)))
            return
        flags = slice(size - plan.num_flags, size)
        self.flags, self.own_flags = self.buffer.view(-1, size)[:, flags], self.shard[flags]
        starts = [slot.owner * size + slot.offset for slot in plan.slots]
        self.views = [self.buffer[start : start + p.numel()].view(p.shape)
                      for start, p in zip(starts, self.params)]  # fmt: skip
        self.sends = [k for k, slot in enumerate(plan.slots) if slot.owner == rank]
        self.receives = [k for k, slot in enumerate(plan.slots) if slot.owner != rank]

    @torch.no_grad()
    def launch(self) -> None:
        """Start to add up the gradients over the ranks: copy them into the buffer, flag those that
        exist, send it off."""
        grads = [p.grad for p in self.params]
        self.launched = True
        self.flags.fill_(1.0)
        for slot, grad in zip(self.plan.slots, grads):
            if grad is None:
                self.flags[slot.owner, slot.flag] = 0.0
            else:
                self.sent.append((slot, grad, grad._version))
        source = self.buffer
        if self.direct:
            grad = torch.zeros_like(self.params[0]) if grads[0] is None else grads[0]
            source = grad.contiguous().view(-1)
        else:
            given = [(view, grad) for view, grad in zip(self.views, grads) if grad is not None]
            if given:
                torch._foreach_copy_(*map(list, zip(*given)))
            if len(given) < len(grads):
                torch._foreach_zero_([v for v, grad in zip(self.views, grads) if grad is None])
        if self.plan.rows:
            # One shard's NaN must mask them all, so the flag carries it (inf * 0 is NaN), also
            # where only the sum over the ranks would overflow.
            largest = torch.linalg.vector_norm(source, math.inf).float()
            self.flags.add_(largest * dist.get_world_size(self.world) * 0.0)
        if self.all_reduces:
            self.works.append(dist.all_reduce(source, group=self.world, async_op=True))
        else:
            self.works.append(_reduce_scatter(self.shard, source, group=self.node, async_op=True))
        if self.plan.rows:
            self.works.append(dist.all_reduce(self.flags, group=self.world, async_op=True))

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works.clear()

    def launch_gather(self) -> None:
        """Start to send the new weights to the other ranks."""
        if self.sends:
            torch._foreach_copy_(*([x[k] for k in self.sends] for x in (self.views, self.params)))
        whole = self.params[0].detach().view(-1) if self.direct else self.buffer
        self.gather = _all_gather(whole, whole[self.own], group=self.node, async_op=True)

    def receive(self) -> None:
        """Wait for the new weights and take them."""
        self.gather.wait()
        self.gather = None
        if self.direct:
            torch.autograd.graph.increment_version(self.params[0])
        elif self.receives:
            both = self.params, self.views
            torch._foreach_copy_(*([x[k] for k in self.receives] for x in both))


class Muon(torch.optim.Optimizer):
    """Muon for matrices and Adam for the rest, in one optimizer, on any number of ranks.

    The first arguments are torch.optim.Muon's, with its meaning and defaults. Groups choose their
    rule with {"rule": "muon"} (default) or {"rule": "adam"} and set any option of RULES; params may
    be (name, tensor) pairs. Writing a group's lr, momentum, weight_decay ... between steps is free.

    Parameters and gradients stay the caller's. With several ranks the first one's weights are sent
    to all. Without a gradient on some ranks a parameter counts as zeros there; without one on any
    it is left alone. So is one whose gradient is not finite, which `nonfinite` tells.

    Options of "muon" groups, beside torch's
        method         "svd", "cubic", "jordan", "polar_express", with ns_steps
        mode           "accurate" or "fast", see storage_dtype
        norm           "spectral", or "row", "col", "sign", "l2": see steepest
        scale          a key of SCALES or a number (torch: adjust_lr_fn), times `multiplier`
        momentum_form  "ema" as torch, or "heavy_ball": the same direction
        second_moment  "row" or "col": NorMuon by that axis, with beta2
        view           None (2-D), "batch" (leading dimensions stack), "flatten" (filters), "matrix"
        split          number of equal blocks (heads, fused QKV) along split_axis 0 or 1
    Options of both rules
        decay          "lr": lr * wd of a parameter a step; "lr2": lr * lr * scale * wd; "l2"
        cautious       True or "strict": decay only what the update shrinks as well
        update_interval  k: act on every k-th step only; gradients add up in between
        frozen         True: no update for now, and zero_grad() drops the gradients
    Options of the whole
        process_group  the ranks that train together, None is all; with collectives of your own
                       between sync_next_backward() and step() on NCCL, a group of its own
        node_size      owners span so many consecutive ranks, and owned shards are all-reduced
                       across such nodes; None is torchrun's LOCAL_WORLD_SIZE
        reduce         "mean" or "sum" over ranks; "none" where .grad is reduced already, as in DDP
        collective     "reduce_scatter", or "all_reduce" as in records 6 to 23
        overlap        False: sync_next_backward() does nothing
        num_buckets    of the owned matrices; None: see make_plan
        products       faster symmetric products, see orthogonalize
        compile        fuse the update rules with torch.compile
    """

    default_rule = "muon"
    gate: Tensor | None = None
    """A 0-D bool tensor on the parameters' device, alike on all ranks: where it is False, step()
    changes no parameter and no state. The host never asks, so it may be the outcome of a check."""
    nonfinite: Tensor
    """Whether the last step found each parameter's gradient not finite, on the rank that updates
    it; in the order of the groups."""

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
            "process_group": None, "node_size": None, "reduce": "mean",
            "collective": "reduce_scatter", "overlap": True, "num_buckets": None,
            "products": None, "compile": False,
        }  # fmt: skip
        self.settings = {key: given.pop(key, value) for key, value in settings.items()}
        _check_options(self.settings)
        self._given, self._live, self._handles = given, None, []
        self._update_fn = checked_update
        if self.settings["compile"]:
            self._update_fn = torch.compile(checked_update, dynamic=False)
        super().__init__(params, resolve({}, self.default_rule, given, strict=True))
        self._join_ranks()
        self._build()

    def add_param_group(self, group: dict) -> None:
        """Add a group. After construction this plans anew, keeps all state, and is collective."""
        rule = group.get("rule", self.default_rule)
        _check_options({"rule": rule})
        options = resolve(group, rule, self._given if rule == self.default_rule else {})
        options.setdefault("step_count", self.step_count)
        before = self._full_state() if self._live is not None else None
        super().add_param_group(options)
        for key in self.defaults.keys() - options.keys():  # of the other rule
            del self.param_groups[-1][key]
        if before is not None:
            self._build()
            self._take_state(before)

    @property
    def step_count(self) -> int:
        """Steps taken."""
        return self.param_groups[0]["step_count"] if self.param_groups else 0

    @property
    def plan(self) -> list[Bucket]:
        """The buckets in launch order."""
        return [live.plan for live in self._live]

    # ---- construction

    def _join_ranks(self) -> None:
        """`_world` are all ranks, `_node` those that shard, `_replicas` the owners of the same
        shard in all nodes."""
        self._world = self._node = self._replicas = None
        self.rank, self.world_size, self.num_ranks = 0, 1, 1
        if not (dist.is_available() and dist.is_initialized()):
            return
        given, size = self.settings["process_group"], self.settings["node_size"]
        group = given or dist.group.WORLD
        if given is None and dist.get_backend() == "gloo":
            # Where a rank lacks a gradient its launches come later: collectives of others between
            # sync_next_backward() and step() must not get in between. On NCCL a group costs memory.
            group = dist.new_group()
        self._world = self._node = group
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
        if size is None:
            size = int(os.environ.get("LOCAL_WORLD_SIZE", len(ranks)))
            size = size if given is None and size and len(ranks) % size == 0 else len(ranks)
        if size < 1 or len(ranks) % size:
            raise ValueError(f"node_size: expected a divisor of {len(ranks)} ranks, got {size}")
        self.num_ranks, self.world_size, self.rank = len(ranks), size, me % size
        if size < len(ranks):
            for start in range(0, len(ranks), size):
                made = dist.new_group(ranks[start : start + size])
                self._node = made if start <= me < start + size else self._node
            for start in range(size):
                made = dist.new_group(ranks[start::size])
                self._replicas = made if me % size == start else self._replicas

    def _build(self) -> None:
        """Plan, and make this rank's buckets and hooks."""
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._names, costs, slots = [], {}, []
        for number, group in enumerate(self.param_groups):
            count = len(group["params"])
            names = group.get("param_names") or range(len(slots), len(slots) + count)
            for k, (name, p) in enumerate(zip(names, group["params"])):
                name, shape = str(name), tuple(p.shape)
                _check_param(name, p, group)
                if (number, shape) not in costs:
                    costs[number, shape] = update_flops(shape, group)
                # Backward comes from the end; groups that span the depth run side by side.
                interval, order = group["update_interval"], 1 - (k + 1) / count
                slots.append(Slot(len(slots), name, shape, p.dtype, number, "owned",
                                  costs[number, shape], interval, order))  # fmt: skip
                self._names.append(name)
        if len(set(self._names)) < len(self._names):
            twice = sorted({name for name in self._names if self._names.count(name) > 1})
            raise ValueError(f"names of parameters must differ, got twice: {twice}")
        devices = {p.device for p in self._params}
        if len(devices) > 1:
            raise ValueError(f"parameters: expected one device, got {sorted(map(str, devices))}")
        self.device = devices.pop() if devices else torch.device("cpu")
        fair = sum(s.cost for s in slots if RULES[self.param_groups[s.group]["rule"]].direction)
        for slot in slots:
            slot.kind = self._kind(slot, fair / self.world_size)
        plan = make_plan(slots, self.world_size, self.settings["num_buckets"])
        if self._world is not None:
            self._compare_plans(slots)
            for slot, p in zip(slots, self._params):
                if slot.kind != "dtensor":
                    dist.broadcast(p.detach(), group=self._world, group_src=0)
        self.nonfinite = torch.zeros(len(slots), dtype=torch.bool, device=self.device)
        self._layout = [self._layout_of(p) for p in self._params]
        self._live, self._live_of = [], {}
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for bucket in plan:
            live = _LiveBucket(bucket, self)
            self._live.append(live)
            for slot, p in zip(bucket.slots, live.params):
                self._live_of[slot.index] = live
                if live.reduces and p.requires_grad:
                    hook = self._hook(slot.index)
                    self._handles.append(p.register_post_accumulate_grad_hook(hook))
        self._queue: deque[_LiveBucket] = deque()
        self._syncing, self._arrivals, self._learned = False, 0, False

    def _kind(self, slot: Slot, fair: float) -> str:
        """The kind of a slot, see Slot; `fair` is one rank's share of the cost of all matrices."""
        p, group = self._params[slot.index], self.param_groups[slot.group]
        if hasattr(p, "placements"):
            sharded = [place for place in p.placements if not place.is_replicate()]
            rows = len(sharded) == 1 and sharded[0].is_shard(0)
            if not rows or group.get("second_moment"):
                raise ValueError(
                    f"parameter {slot.name!r}: of DTensors expected those that are sharded by rows "
                    "alone, as FSDP2's fully_shard does, and no second_moment; got placements "
                    f"{p.placements}"
                )
            return "dtensor"
        if RULES[group["rule"]].direction is None or group["norm"] in ("row", "sign"):
            large = math.prod(slot.shape) >= SHARD_FROM and len(slot.shape) > 1
            return "sharded" if large else "replicated"
        # A stack of matrices that is more than one rank's share is cut between its matrices.
        stack = group["view"] == "batch" and 1 < self.world_size <= slot.shape[0]
        return "sharded" if stack and slot.cost > fair else "owned"

    @staticmethod
    def _layout_of(p: Tensor) -> tuple:
        return id(p), p.shape, p.dtype, p.device, p.stride()

    def _check_layout(self) -> None:
        """Plan anew where the model was moved or converted, or others took the place of parameters
        in the groups; across ranks that is an error."""
        now = (p for group in self.param_groups for p in group["params"])
        if [self._layout_of(p) for p in now] == self._layout:
            return
        if self._world is not None:
            raise RuntimeError("parameters were replaced, or changed their shape, dtype, device or "
                               "strides: make the optimizer after that")  # fmt: skip
        self._build()

    def _compare_plans(self, slots: list[Slot]) -> None:
        """All ranks must have made the same plan: else an error here, not a hang later."""
        told = [(s.name, s.shape, str(s.dtype), s.group, s.kind, s.update_interval) for s in slots]
        told += [str(self.settings[key]) for key in ("collective", "num_buckets", "reduce")]
        digest = zlib.crc32(repr([*told, self.world_size]).encode())
        extremes = torch.tensor([digest, -digest], device=self.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._world)
        if extremes[0] != -extremes[1]:
            raise ValueError(
                "the ranks disagree about their parameters: expected the same names, shapes, "
                f"dtypes and groups in the same order on each; this rank has {len(slots)}"
            )

    # ---- gradients

    def _due(self, live: _LiveBucket) -> bool:
        frozen = all(self.param_groups[slot.group]["frozen"] for slot in live.plan.slots)
        return not frozen and (self.step_count + 1) % live.plan.update_interval == 0

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or zero them. Groups that still collect for their k-th step
        (update_interval=k) keep them, unless they are frozen."""
        for group in self.param_groups:
            if self.step_count % group["update_interval"] and not group["frozen"]:
                continue
            for p in group["params"]:
                if set_to_none or p.grad is None:
                    p.grad = None
                    continue
                if p.grad.grad_fn is not None:  # of a backward with create_graph
                    p.grad.detach_()
                p.grad.zero_()

    def sync_next_backward(self) -> None:
        """Call before the LAST backward of a step: reductions then start as gradients arrive.
        Between that backward and step() the gradients must not be changed."""
        if self.settings["reduce"] == "none":
            raise RuntimeError('sync_next_backward: with reduce="none" (DDP) there is nothing to '
                               "reduce; leave the call out")  # fmt: skip
        if self._world is None or not self.settings["overlap"]:
            return
        self._check_layout()
        self._queue = deque(live for live in self._live if live.reduces and self._due(live))
        for live in self._queue:
            live.pending = sum(p.requires_grad for p in live.params)
        self._syncing = True

    arm = sync_next_backward  # its name until November 2026

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        this = weakref.ref(self)

        def arrived(_: Tensor) -> None:
            optimizer = this()
            if optimizer is not None and optimizer._syncing:
                optimizer._arrived(index)
        return arrived

    def _arrived(self, index: int) -> None:
        live = self._live_of[index]
        if live.launched:
            raise RuntimeError(
                f"parameter {self._names[index]!r} got a gradient after its reduction was "
                "launched: call sync_next_backward() before the last backward of a step only"
            )
        live.pending -= 1
        self._arrivals += 1
        live.arrived = self._arrivals
        # Strictly in one order on every rank, whatever arrives where: collectives must match.
        while self._queue and self._queue[0].pending == 0:
            self._queue.popleft().launch()

    def _learn_order(self) -> None:
        """From now on launch buckets in the order in which rank 0 saw backward fill them."""
        order = sorted(range(len(self._live)), key=lambda n: (self._live[n].arrived, n))
        order = torch.tensor(order, device=self.device)
        dist.broadcast(order, group=self._world, group_src=0)
        self._live = [self._live[n] for n in order.tolist()]
        self._learned = True

    def _check_gradients(self, live: _LiveBucket) -> None:
        for slot, p in zip(live.plan.slots, live.params):
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(
                    f"parameter {slot.name!r}: got a sparse gradient; make its embedding with "
                    "sparse=False"
                )
        for slot, grad, version in live.sent:
            if self._params[slot.index].grad is not grad or grad._version != version:
                raise RuntimeError(
                    f"the gradient of {slot.name!r} was changed after its reduction had started, "
                    "by clipping, unscaling or DDP: leave out sync_next_backward() then"
                )

    # ---- the step

    @torch.no_grad()
    def step(self, closure=None):
        """Update every group that is due; collective. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_layout()
        due = [live for live in self._live if self._due(live)]
        learn = self._syncing and not self._learned and len(due) == len(self._live)
        self._syncing = False
        self.nonfinite.zero_()

        # 1. Add up gradients: what backward has not launched is launched now.
        for live in due:
            self._check_gradients(live)
            if live.reduces and not live.launched:
                live.launch()
        for live in due if self._replicas is not None else ():
            if live.reduces and not live.all_reduces:
                live.wait()
                work = dist.all_reduce(live.shard, group=self._replicas, async_op=True)
                live.works.append(work)

        # 2. Update what this rank owns, bucket by bucket, and send the new weights off.
        with _precision(self.device):
            for live in due:
                live.wait()
                if live.reduces and self.settings["reduce"] == "mean":
                    live.shard.div_(self.num_ranks)
                for batch in live.batches:
                    self._update(batch)
                live.launched = False
                live.sent.clear()
                if live.gathers:
                    live.launch_gather()

        # 3. Take the new weights of the other ranks.
        for live in due:
            if live.gathers:
                live.receive()
                self._enter(live)
        for group in self.param_groups:
            group["step_count"] += 1
        if learn:
            self._learn_order()
        return loss

    def _update(self, batch: _Batch) -> None:
        """Apply the group's rule to a batch, on a CPU in parts that its caches hold."""
        group, count = self.param_groups[batch.group], len(batch.slots)
        if group["frozen"] or (batch.shape.numel() == 0 and not batch.sharded):
            return
        options, part = self._options(group, batch), count
        if self.device.type == "cpu" and not batch.sharded:
            part = max(1, CHUNK // batch.shape.numel())
            if part > 1:  # two threads take as long for 3 matrices as for 4
                part += -part % torch.get_num_threads()
        for k in range(0, count, part):
            self._update_part(batch, slice(k, k + part), options)

    def _options(self, group: dict, batch: _Batch) -> dict:
        """The group's options as the rules read them."""
        rule = RULES[group["rule"]]
        options = {name: group[name] for name in (*rule.options, "rule")}
        if not isinstance(group["weight_decay"], Tensor) and group["weight_decay"] == 0:
            options["decay"] = None
        if rule.direction is not None:
            options["products"] = self.settings["products"]
        if batch.sharded and rule.direction is not None:  # the rule sees shapes of shards
            if isinstance(group["scale"], str):
                shape = matrix_shape(tuple(batch.params[0].shape), group)
                options["scale"] = SCALES[group["scale"]](*shape[-2:])
            options["split"] = group["split"] if group["view"] == "batch" else None
        if self.settings["compile"]:  # a new value must not mean a new graph
            for name in {"lr", "weight_decay", "momentum", "beta2"} & options.keys():
                options[name] = torch.as_tensor(options[name], dtype=torch.float64)
            if "betas" in options:
                options["betas"] = tuple(torch.as_tensor(options["betas"], dtype=torch.float64))
        return options

    def _update_part(self, batch: _Batch, part: slice, options: dict) -> None:
        params, index = batch.params[part], batch.index[part]
        if batch.grad is not None:
            grad, present = batch.grad[part], batch.present[part]
        else:
            given = [k for k, p in enumerate(params) if p.grad is not None]
            if not given:
                return
            if len(given) < len(params):  # as torch: what has no gradient is not there
                params, index = [params[k] for k in given], index[given]
            grad = _stacked([batch.local(p.grad) for p in params])
            present = None
            if batch.rows is not None:  # some rows of a gradient that DDP has reduced
                present = 1 + 0 * params[0].grad.sum()
        states = self._states_of(batch, params)
        tensors = {name: [batch.local_state(s[name]) for s in states] for name in batch.spec}
        state = {name: _stacked(group) for name, group in tensors.items()}
        weights = tensors["param"] = [batch.local(p) for p in params]
        param = torch.stack(weights) if len(weights) > 1 else _stacked(weights)
        if batch.sharded:
            agree = functools.partial(dist.all_reduce, group=self._shards(params[0]))
            group, whole = self.param_groups[batch.group], None
            if options.get("view") != "batch":
                whole = functools.partial(self._on_owners, params[0], group)
            ok = checked_update(param, grad, state, present, self.gate, options, agree, whole)
        else:
            ok = self._update_fn(param, grad, state, present, self.gate, options)
        self.nonfinite.index_copy_(0, index, ~ok)
        for name, stack in (*state.items(), ("param", param)):
            if stack.data_ptr() != tensors[name][0].data_ptr():
                torch._foreach_copy_(tensors[name], list(stack.unbind()))

    # ---- matrices that FSDP2 has sharded

    @staticmethod
    def _shards(p: Tensor):
        """The ranks among which the rows of a DTensor are shared out."""
        dim = next(n for n, place in enumerate(p.placements) if place.is_shard())
        return p.device_mesh.get_group(dim)

    def _on_owners(self, p: Tensor, group: dict, direction: Callable, update: Tensor) -> Tensor:
        """`direction` of matrices like `p`, of which every rank holds some rows (K, rows, cols):
        each rank gathers K / W of them, and sends the rows of the results back."""
        if p.ndim == 1:  # a row for the rules, but its entries are shared out as rows are
            update = update.mT
        shards, (K, held, *rest) = self._shards(p), update.shape
        W, size = dist.get_world_size(shards), p.shape[0]
        share, rows = -(-K // W), -(-size // W)  # as torch.chunk cuts

        def exchange(sent: Tensor) -> Tensor:
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=shards)
            return received

        sent = update.new_zeros(W * share, rows, *rest)
        sent[:K, :held] = update
        whole = exchange(sent).view(W, share, rows, *rest).transpose(0, 1)
        whole = whole.reshape(share, W * rows, *rest)
        result = torch.zeros_like(whole)
        mine = max(0, min(share, K - dist.get_rank(shards) * share))  # the others are padding
        if mine:
            view, out = (matrix_view(t[:mine, :size], group) for t in (whole, result))
            out.copy_(direction(view))
        back = result.view(share, W, rows, *rest).transpose(0, 1).reshape(W * share, rows, *rest)
        back = exchange(back)[:K, :held]
        return back.mT if p.ndim == 1 else back

    # ---- state

    def state_bytes(self) -> int:
        """Bytes of state that this rank keeps from the first step on."""
        return sum(math.prod(shape) * dtype.itemsize for live in self._live
                   for batch in live.batches for _ in batch.slots
                   for shape, dtype in batch.spec.values())

    def _states_of(self, batch: _Batch, params: list[Tensor]) -> list[dict[str, Tensor]]:
        """The state of `params` on this rank: as much of it as this rank updates. Made when
        missing, side by side."""
        states = [self.state[p] for p in params]
        for name, (shape, dtype) in batch.spec.items():
            missing = [(p, state) for p, state in zip(params, states) if name not in state]
            if not missing:
                continue
            made = torch.zeros(len(missing), *shape, dtype=dtype, device=self.device)
            for (p, state), t in zip(missing, made):
                if name == "master":
                    t.copy_(batch.local(p))
                if batch.sharded and shape:
                    t = type(p.data).from_local(
                        t, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                        stride=p.stride(),
                    )  # fmt: skip
                state[name] = t
        return states

    def _enter(self, live: _LiveBucket) -> None:
        """An entry in `state` for parameters of other ranks too: torch.distributed.checkpoint
        calls step() on a rank that has none, and the others would not follow."""
        for p in live.params if live.gathers else ():
            self.state.setdefault(p, {})

    @torch.no_grad()
    def _full_state(self) -> dict[int, dict[str, Tensor]]:
        """State by index of the parameter, whole on every rank, as copies; collective."""
        self._check_layout()
        found: dict[int, dict[str, Tensor]] = {}
        for live in self._live:
            self._enter(live)
            for batch in live.batches:
                for slot, state in zip(batch.slots, self._states_of(batch, batch.params)):
                    found[slot.index] = {name: t.clone() for name, t in state.items()}
            for slot in live.plan.slots if live.gathers else ():
                full = found.setdefault(slot.index, {})
                group = self.param_groups[slot.group]
                for name, (shape, dtype) in state_spec(slot.shape, slot.dtype, group).items():
                    t = torch.zeros(shape, dtype=dtype, device=self.device)
                    if not live.plan.rows:
                        t.copy_(full.get(name, t))
                        dist.broadcast(t, group=self._node, group_src=slot.owner)
                        full[name] = t
                    elif shape:
                        mine = t.new_zeros(live.plan.rows, *shape[1:])
                        mine[: len(full[name])] = full[name]
                        whole = t.new_zeros(self.world_size * len(mine), *shape[1:])
                        _all_gather(whole, mine, group=self._node)
                        full[name] = whole[: shape[0]].clone()
        return dict(sorted(found.items()))

    @torch.no_grad()
    def _take_state(self, saved: dict[int, dict]) -> None:
        """Copy this rank's part of state that is whole, as state_dict() gives it."""
        self._check_layout()
        for live in self._live:
            self._enter(live)
            for batch in live.batches:
                for slot, p in zip(batch.slots, batch.params):
                    self.state[p] = self._part_of(batch, slot.name, saved.get(slot.index) or {})
                for name in () if batch.sharded else batch.spec:  # side by side, see _stacked
                    states = [self.state[p] for p in batch.params if name in self.state[p]]
                    if states:
                        for state, t in zip(states, _stacked([state[name] for state in states])):
                            state[name] = t

    def _part_of(self, batch: _Batch, name: str, saved: dict) -> dict[str, Tensor]:
        part = {}
        for key, (shape, dtype) in batch.spec.items() if saved else ():
            if key not in saved and key != "master":  # which is made from the weights
                raise ValueError(f"state_dict: parameter {name!r} has no {key!r}")
            if key not in saved:
                continue
            t = torch.as_tensor(saved[key])
            if batch.rows is not None and t.ndim:
                t = t[batch.rows]
            if batch.local_state(t).shape != shape:
                raise ValueError(
                    f"state_dict: parameter {name!r}, {key}: expected shape {tuple(shape)}, "
                    f"got {tuple(t.shape)}"
                )
            part[key] = t.to(self.device, dtype, copy=True)
        return part

    def state_dict(self) -> dict:
        """As torch.optim's, of full tensors, the same for any number of ranks; copies, collective.
        State of DTensors is DTensors."""
        def fill(_, made: dict) -> dict:
            return {**made, "state": self._full_state()}

        handle = self.register_state_dict_post_hook(fill, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what state_dict() gave, on any number of ranks, or what torch.optim's AdamW, Adam or
        Muon gave; parameters by position."""
        def take(_, given: dict) -> dict:  # after all other hooks
            for number, (mine, other) in enumerate(zip(self.param_groups, given["param_groups"])):
                for key in FIXED:
                    if key in mine and other.get(key, mine[key]) != mine[key]:
                        raise ValueError(
                            f"state_dict: group {number} was saved with {key}={other[key]!r}, "
                            f"this optimizer has {mine[key]!r}"
                        )
            order = (index for group in given["param_groups"] for index in group["params"])
            self._incoming = {n: given["state"].get(key, {}) for n, key in enumerate(order)}
            return {**given, "state": {}}  # torch would round it to the parameters' dtype

        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict) -> None:
        """Called by torch at the end of loading, with the groups that were saved."""
        for mine, other in zip(self.param_groups, state["param_groups"]):
            if "adjust_lr_fn" in other:  # torch.optim.Muon's and Adam's words for ours
                other["scale"] = other.pop("adjust_lr_fn") or "original"
            if "decoupled_weight_decay" in other:
                other["decay"] = "lr" if other.pop("decoupled_weight_decay") else "l2"
            _check_options(other)
            mine.update(other)
        super().__setstate__({"param_groups": self.param_groups})
        self._take_state(self._incoming)

    def copy_state(self, source: str, target: str) -> None:
        """Give parameter `target` the state of `source`, which must be updated on the same ranks in
        the same shape: a local copy, for an embedding that leaves its head."""
        a, b = (next(slot for live in self._live for slot in live.plan.slots if slot.name == name)
                for name in (source, target))  # fmt: skip
        if (a.kind, a.owner, a.shape, a.dtype) != (b.kind, b.owner, b.shape, b.dtype):
            raise ValueError(
                f"copy_state: {source!r} and {target!r} must lie alike on the ranks, got "
                f"{a.kind} {a.shape} and {b.kind} {b.shape}"
            )
        state = self.state[self._params[a.index]]
        self.state[self._params[b.index]] = {name: t.clone() for name, t in state.items()}

    def __reduce__(self):
        """Copies and pickles are made anew from options and full state; on one rank only."""
        if self.num_ranks > 1:
            raise ValueError("copying or pickling an optimizer works on one rank; use state_dict()")
        groups = [dict(group) for group in self.param_groups]
        for group in groups:
            names = group.pop("param_names", None)
            group["params"] = list(zip(names, group["params"])) if names else list(group["params"])
        given = {**self.settings, **self._given}
        return _remake, (type(self), groups, given, self._full_state())


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


def _remake(kind: type, groups: list[dict], given: dict, state: dict) -> Muon:
    optimizer = kind.__new__(kind)  # whose __init__ may take other arguments
    optimizer._setup(groups, given)
    optimizer._take_state(state)
    return optimizer
