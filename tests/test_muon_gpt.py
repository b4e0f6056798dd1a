"""A small GPT learns more in the same steps from Muon than from AdamW at its best rate."""

import functools
from pathlib import Path

import torch
from torch.nn import functional as F

from muon import Muon

DIM, HEADS, LAYERS, T, BATCH, STEPS = 64, 4, 2, 48, 12, 50
TEXT = Path(__file__).parent.parent.joinpath("muon.py").read_bytes()  # real text, always at hand


def network() -> dict[str, torch.nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    shapes = {"embed": (256, DIM), "position": (T, DIM), "head": (256, DIM)}
    for n in range(LAYERS):
        shapes |= {f"{n}.qkv": (3 * DIM, DIM), f"{n}.out": (DIM, DIM)}
        shapes |= {f"{n}.fc": (4 * DIM, DIM), f"{n}.proj": (DIM, 4 * DIM)}
    weights = {name: torch.randn(s, generator=source) * s[1] ** -0.5 for name, s in shapes.items()}
    for name in weights:
        if name.endswith(("out", "proj", "head")):
            weights[name].zero_()
    return {name: torch.nn.Parameter(W) for name, W in weights.items()}


def loss_of(W: dict[str, torch.nn.Parameter], tokens_BT: torch.Tensor) -> torch.Tensor:
    x_BTC = W["embed"][tokens_BT[:, :-1]] + W["position"]
    for n in range(LAYERS):
        h_BTC = F.rms_norm(x_BTC, (DIM,))
        qkv_BHTD = (h_BTC @ W[f"{n}.qkv"].T).unflatten(-1, (3, HEADS, -1)).movedim(1, 3)
        y_BHTD = F.scaled_dot_product_attention(*qkv_BHTD.unbind(1), is_causal=True)
        x_BTC = x_BTC + y_BHTD.movedim(1, 2).flatten(2) @ W[f"{n}.out"].T
        h_BTC = F.rms_norm(x_BTC, (DIM,))
        x_BTC = x_BTC + F.relu(h_BTC @ W[f"{n}.fc"].T).square() @ W[f"{n}.proj"].T
    logits_BTV = F.rms_norm(x_BTC, (DIM,)) @ W["head"].T
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def trained(make) -> float:
    """Mean loss on unseen text."""
    W, source = network(), torch.Generator().manual_seed(1)
    optimizer, text = make(W), torch.tensor(list(TEXT))
    peaks = [group["lr"] for group in optimizer.param_groups]
    train, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    for step in range(STEPS):
        starts = torch.randint(len(train) - T, (BATCH,), generator=source)
        loss = loss_of(W, torch.stack([train[s : s + T + 1] for s in starts.tolist()]))
        loss.backward()
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * min(1.0, 2 * (1 - step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        rows = held[: len(held) // (T + 1) * (T + 1)].view(-1, T + 1)
        return loss_of(W, rows).item()


def adamw(weights: dict, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)


def muon(weights: dict) -> Muon:
    groups = {"muon": [], "adam": []}
    for name, p in weights.items():
        groups["muon" if "." in name else "adam"].append((name, p))
    return Muon([
        {"params": groups["muon"], "lr": 0.02, "method": "polar_express", "weight_decay": 0.01},
        {"params": groups["adam"], "rule": "adam", "lr": 0.01, "betas": (0.9, 0.95)},
    ])


def test_muon_ends_below_adamw_at_its_best_rate():
    theirs = [trained(functools.partial(adamw, rate=rate)) for rate in (0.003, 0.01, 0.03)]
    assert theirs[1] == min(theirs)  # so the best rate lies inside
    assert trained(muon) < theirs[1] - 0.1
