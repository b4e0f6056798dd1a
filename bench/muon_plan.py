"""Predictions for muon's plan: balance, bytes, time after backward. Calculates only.

    python bench/muon_plan.py       the table for GPT-2 124M's hidden matrices on 1 to 64 ranks
    explain(optimizer)              the plan of a muon.Muon in words

72 matrices, 84.93 M elements, 1,631 GFLOP of Newton-Schulz a step. Slowest: GFLOP of the rank with
most, beside the least that whole matrices allow (a matrix costs 1 or 3 units, 120 in all). Bytes:
held by the buckets over needed. Exposed: predicted time after the last gradient on GPUs of one
node, with the planned buckets and with a single one.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import muon
from muon import Bucket, Slot


class Rates(NamedTuple):
    latency: float  # s, of a collective
    wire: float     # bytes/s that a rank sends
    flops: float    # FLOP/s of the products
    launch: float   # s, to launch the kernels of a batch


RATES = {
    "cuda": Rates(15e-6, 4e11, 3e14, 6e-5),  # 8xH100 by NVLink, a third of the dense bf16 peak
    "cpu": Rates(1e-4, 2e9, 2e11, 2e-4),
}


def wire_bytes(bucket: Bucket, world_size: int) -> float:
    """Sent by each rank for one reduce-scatter or all-gather (replicated: for the all-reduce)."""
    rings = {"replicated": 2, "dtensor": 0}.get(bucket.kind, 1)  # FSDP2 has reduced the last
    return rings * (world_size - 1) / world_size * bucket.num_bytes


def wire_seconds(bucket: Bucket, world_size: int, rates: Rates) -> float:
    """Of one collective of the bucket."""
    sent = wire_bytes(bucket, world_size)
    return rates.latency + sent / rates.wire if sent else 0.0


def update_cost(bucket: Bucket, rank: int, world_size: int) -> tuple[float, int]:
    """(FLOP, batches) of a rank's update of a bucket."""
    batches = bucket.batches(rank)
    parts = world_size if bucket.kind in ("sharded", "dtensor") else 1
    return sum(slot.cost for batch in batches for slot in batch) / parts, len(batches)


def loads(plan: Sequence[Bucket], world_size: int) -> list[float]:
    """FLOP of a step on each rank."""
    return [sum(update_cost(bucket, rank, world_size)[0] for bucket in plan)
            for rank in range(world_size)]


def balance(plan: Sequence[Bucket], world_size: int) -> float:
    """Mean load over the largest: 1 where all ranks have as much to do."""
    of_ranks = loads(plan, world_size)
    return sum(of_ranks) / world_size / max(*of_ranks, 1e-30)


def exposed_seconds(plan: Sequence[Bucket], world_size: int, rates: Rates) -> float:
    """Predicted time that backward cannot hide: the last bucket's reduction, then the updates in
    order, each gathered while the next is computed."""
    done, wired = 0.0, wire_seconds(plan[-1], world_size, rates)
    reduced = [0.0] * (len(plan) - 1) + [wired]
    for bucket, ready in zip(plan, reduced):
        costs = (update_cost(bucket, rank, world_size) for rank in range(world_size))
        done = max(done, ready) + max(flop / rates.flops + n * rates.launch for flop, n in costs)
        if bucket.num_segments > 1:
            wired = max(wired, done) + wire_seconds(bucket, world_size, rates)
    return max(done, wired)


def explain(optimizer: muon.Muon) -> str:
    """The plan in words: buckets in launch order with their bytes and predicted times, the batches
    of each rank, the balance. Predicted for all gradients at hand and no update skipped."""
    plan, W = optimizer.plan, optimizer.world_size
    rates = RATES.get(optimizer.device.type, RATES["cuda"])
    count = sum(len(bucket.slots) for bucket in plan)
    nodes = f" in each of {optimizer.num_ranks // W} nodes" if optimizer.num_ranks > W else ""
    lines = [f"{count} parameters on {W} rank{'s' * (W > 1)}{nodes}; this is rank {optimizer.rank}"]
    for number, bucket in enumerate(plan):
        interval = bucket.update_interval
        needed = sum(math.prod(s.shape) for s in bucket.slots) * bucket.dtype.itemsize
        words = [f"bucket {number}: {len(bucket.slots)} {bucket.kind} {str(bucket.dtype)[6:]}",
                 *([f"every {interval} steps"] if interval > 1 else []), f"{needed / 1e6:.3f} MB"]
        if sent := wire_bytes(bucket, W):
            words += [f"{bucket.num_bytes / max(needed, 1):.3f}x in the bucket",
                      f"sends {sent / 1e6:.3f} MB in {1e3 * wire_seconds(bucket, W, rates):.3f} ms"]
        lines.append(", ".join(words))
        whole = bucket.num_segments == 1 or bucket.rows  # ranks look alike
        for rank in range(1 if whole else W):
            lines += [f"  {'each rank' if whole else f'rank {rank}'}: {_batch_words(bucket, b, W)}"
                      for b in bucket.batches(rank)]
    of_ranks = loads(plan, W)
    slowest = max(of_ranks, default=0.0)
    lines.append(f"GFLOP per rank {' '.join(f'{load / 1e9:.3f}' for load in of_ranks)}: balance "
                 f"{balance(plan, W):.1%}, slowest {1e3 * slowest / rates.flops:.3f} ms")
    if W > 1:
        seconds = exposed_seconds(plan, W, rates)
        lines.append(f"predicted: {1e3 * seconds:.3f} ms after backward")
    return "\n".join(lines)


def _batch_words(bucket: Bucket, batch: list[Slot], world_size: int) -> str:
    first, last = batch[0], batch[-1]
    shape = (bucket.rows, *first.shape[1:]) if bucket.rows else first.shape
    names = first.name if first is last else f"{first.name} ... {last.name}"
    parts = world_size if bucket.kind in ("sharded", "dtensor") else 1
    gflop = sum(slot.cost for slot in batch) / parts / 1e9
    return f"{len(batch)} x ({'x'.join(map(str, shape)) or 1}) {gflop:.3f} GFLOP {names}"


# --- GPT-2 124M -----------------------------------------------------------------------------------

SHAPES = [s for _ in range(12) for s in ((768, 768),) * 4 + ((3072, 768), (768, 3072))]


def gpt2_slots() -> list[Slot]:
    """Its hidden matrices, the first layer's first."""
    group, num = muon.resolve({}, "muon", {}), len(SHAPES)
    return [Slot(n, f"layer{n // 6}.{n % 6}", shape, torch.float32, 0, "owned",
                 muon.update_flops(shape, group), order=1 - (n + 1) / num)
            for n, shape in enumerate(SHAPES)]


def main() -> None:
    costs = [slot.cost for slot in gpt2_slots()]
    needed = 4 * sum(math.prod(s) for s in SHAPES)
    print("| ranks | buckets | slowest GFLOP | lower bound | balance | bytes | MB each way, fp32 | "
          "exposed ms | one bucket: slowest | balance | bytes | exposed ms |")  # fmt: skip
    print("| --- " * 12 + "|")
    for W in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        cells = [f"{W}"]
        for count in (None, 1):
            plan = muon.make_plan(gpt2_slots(), W, count)
            slowest = f"{max(loads(plan, W)) / 1e9:.0f}"
            share = f"{balance(plan, W):.0%}"
            held = f"{sum(bucket.num_bytes for bucket in plan) / needed:.2f}x"
            exposed = f"{1e3 * exposed_seconds(plan, W, RATES['cuda']):.2f}"
            bound = f"{max(max(costs), min(costs) * math.ceil(120 / W)) / 1e9:.0f}"
            wire = f"{sum(wire_bytes(bucket, W) for bucket in plan) / 1e6:.0f}"
            cells += ([f"{len(plan)}", slowest, bound, share, held, wire, exposed]
                      if count is None else [slowest, share, held, exposed])
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
