"""What the tests of muon.py share: published coefficients, test matrices, a mixed model, ranks."""

import contextlib
import math
import time

import pytest
import torch
import torch.distributed as dist

from conftest import clean_environment
from forked import Forked

# Published coefficients: Polar Express as the records used it (5 steps, safety 1.02) and as the
# paper lists it (no safety); the same without cushion, which is known as CANS.
RECORD_LIST = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
PAPER_CUSHION = 0.02407327424182761
PAPER_LIST = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
AUTHORS_LIST = (  # safety 1.01; the eighth Remez system is nearly singular
    (8.237312490495558, -23.157747414558205, 16.68056841144592),
    (4.082441999064834, -2.893047735332586, 0.5252849256975647),
    (3.926347992254655, -2.85474680347653, 0.531802242289499),
    (3.2982187133085143, -2.424541981026706, 0.48632008358844075),
    (2.297036943455258, -1.6366255812590327, 0.4002628455953635),
    (1.8763805351440446, -1.234789657772233, 0.3589188750166889),
    (1.8564423485588517, -1.2132449880877845, 0.35680034877976435),
)
CANS_LIST = (
    (8.470328803848073, -25.10807470666187, 18.629275599118007),
    (4.182834183293943, -3.108701109889242, 0.5806066813500492),
    (3.9618572789615976, -2.954063746359376, 0.5629761179538959),
    (3.2865862170279603, -2.4647201345312815, 0.5073576938614547),
    (2.273749994434038, -1.6446603679080687, 0.41619092749788617),
)


def scalar_map(polynomials, x):
    for a, b, c in polynomials:
        x = x * (a + x * x * (b + x * x * c))
    return x


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def low_rank(rank, rows, cols, seed=0):
    """A matrix of exact rank with Gaussian factors, and orthonormal bases of its two spaces."""
    G = gaussian(rows, rank, seed=seed).double() @ gaussian(rank, cols, seed=seed + 1).double()
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return G.float(), U[:, :rank], Vh[:rank]


def spectrum(values, rows, cols, seed=0):
    """A matrix with these singular values and random singular vectors, in fp64."""
    count = len(values)
    U = torch.linalg.qr(gaussian(rows, count, seed=seed).double())[0]
    V = torch.linalg.qr(gaussian(cols, count, seed=seed + 1).double())[0]
    return U @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ V.T


def noise_energy(X, U, Vh):
    """Share of ||X||_F^2 that lies outside the row and column space of the input."""
    X = X.double()
    inside = U @ (U.T @ X @ Vh.T) @ Vh
    return float((X - inside).square().sum() / X.square().sum())


def exact(G):
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ Vh


# The ways through the products, which every machine can be made to go: name, mode, bf16 units
PATHS = {"fp32": ("accurate", False), "bf16": ("fast", True)}


@contextlib.contextmanager
def on(path, module):
    """The mode to ask of this muon module, whose CPU has bf16 units or not for so long."""
    mode, units = PATHS[path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "bf16_units", lambda: units)
        yield mode


def step_with(optimizer, gradients):
    """One step with these gradients by parameter (None for none)."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients):
        p.grad = None if g is None else g.clone()
    optimizer.step()


# ------------------------------------------------------------------------------------ a mixed model

# name, shape, dtype, group: everything that shards differently
MIXED = (
    ("table", (301, 48), torch.float32, "adam"),
    ("second.table", (150, 32), torch.float32, "adam"),
    ("late.table", (70, 64), torch.bfloat16, "adam"),
    ("gain", (), torch.float32, "adam"),
    *((f"{n}.q", (72, 72), torch.float32, "muon") for n in range(3)),
    *((f"{n}.k", (48, 48), torch.bfloat16, "muon") for n in range(3)),
    *((f"{n}.up", (96, 48), torch.float32, "muon") for n in range(3)),
    *((f"{n}.down", (48, 96), torch.float32, "normuon") for n in range(3)),
    ("row", (1, 40), torch.float32, "muon"),
    ("column", (40, 1), torch.float32, "muon"),
    ("fused", (72, 24), torch.float32, "fused"),
    ("conv", (16, 3, 3, 3), torch.float32, "conv"),
    ("bank", (5, 32, 64), torch.float32, "bank"),
    ("bias", (33,), torch.float32, "slow"),
    ("unused", (20, 20), torch.float32, "muon"),
)
GROUPS = {
    "adam": {"rule": "adam", "lr": 0.02, "weight_decay": 0.1, "cautious": "strict"},
    "slow": {"rule": "adam", "lr": 0.02, "update_interval": 2},
    "muon": {"lr": 0.02, "method": "polar_express", "cautious": True, "decay": "lr2"},
    "normuon": {"lr": 0.02, "second_moment": "row", "scale": "spectral"},
    "fused": {"lr": 0.02, "split": 3, "second_moment": "col"},
    "conv": {"lr": 0.02, "view": "flatten", "split": 2},
    "bank": {"lr": 0.02, "view": "batch", "method": "cubic", "second_moment": "row"},
}


def mixed_params(seed=0):
    source = generator(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=source).to(dtype))
        for name, shape, dtype, _ in MIXED
    }


def mixed_optimizer(muon, params, **settings):
    groups = {key: {**options, "params": []} for key, options in GROUPS.items()}
    for name, _, _, key in MIXED:
        groups[key]["params"].append((name, params[name]))
    return muon.Muon(list(groups.values()), reduce="sum", **settings)


def mixed_parts(step, parts=24):
    """`parts` summands of every gradient, small integers: their sums are exact in any order and any
    dtype, so that ranks can share them out differently and still must agree bit for bit."""
    source = generator(1000 + step)
    return {
        name: torch.randint(-2, 3, (parts, *shape), generator=source).to(dtype)
        for name, shape, dtype, _ in MIXED
        if name != "unused"
    }


def mixed_train(optimizer, params, steps, rank=0, world_size=1, parts=24, arm=True, micro=2):
    """Train on this rank's share of the parts, in `micro` backward passes."""
    for step in steps:
        shares = mixed_parts(step, parts)
        mine = range(rank * parts // world_size, (rank + 1) * parts // world_size)
        cut = [mine[n * len(mine) // micro : (n + 1) * len(mine) // micro] for n in range(micro)]
        for number, piece in enumerate(cut):
            if arm and number == micro - 1:
                optimizer.sync_next_backward()
            piece = list(piece)
            loss = sum((share[piece].sum(0) * params[n]).sum() for n, share in shares.items())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def values(params):
    return [p.detach().clone() for p in params.values()]


# ------------------------------------------------------------------------------------------- ranks


def start_rank(rank, world_size, path, work, arguments):
    torch.set_num_threads(1)
    init = f"file://{path}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    try:
        work(rank, world_size, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(world_size, path, work, *arguments):
    """work(rank, world_size, *arguments) on gloo ranks; what one of them raises fails the test."""
    outs = [path / f"rank{rank}.out" for rank in range(world_size)]
    ranks = [Forked(start_rank, rank, world_size, path, work, arguments, out=out,
                    environment=clean_environment()) for rank, out in enumerate(outs)]
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.01)
        time.sleep(0.5 * any(codes))  # the others only see a lost connection
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert not any(codes), "\n".join(out.read_text() for out in outs)


def same_on_all_ranks(params, group=None):
    flat = torch.cat([p.detach().double().flatten() for p in params.values()])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, flat, group=group)
    return all(torch.equal(flat, other) for other in gathered)


def op_norm(X):
    """The RMS -> RMS operator norm of a fan_out x fan_in matrix."""
    return float(torch.linalg.matrix_norm(X.double(), 2)) * math.sqrt(X.shape[1] / X.shape[0])
