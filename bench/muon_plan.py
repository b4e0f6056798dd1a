"""Balance and bytes of the plan for GPT-2 124M's hidden matrices on 1 to 64 ranks. Calculates only.

    python bench/muon_plan.py

72 matrices, 84.93 M elements, 1,631 GFLOP of Newton-Schulz a step. Slowest: GFLOP of the rank with
most, beside what no assignment of whole matrices beats (a matrix costs 1 or 3 units, 120 in all).
Bytes: held by the buckets over needed. Exposed: time after the last gradient as predicted for GPUs
of one node (constants in muon.RATES), with the planned buckets and with a single one.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import muon

SHAPES = [s for _ in range(12) for s in ((768, 768),) * 4 + ((3072, 768), (768, 3072))]


def items() -> list[muon.Item]:
    group = muon.resolve({}, "muon", {})
    return [
        muon.Item(n, str(n), s, 0, "whole", muon.update_flops(s, group), order=1 - n / len(SHAPES))
        for n, s in enumerate(SHAPES)
    ]


def main() -> None:
    unit = min(item.cost for item in items()) / 1e9
    needed = 4 * sum(math.prod(s) for s in SHAPES)
    print("| ranks | buckets | slowest GFLOP | lower bound | balance | bytes | MB each way, fp32 | "
          "exposed ms | one bucket: slowest | balance | bytes | exposed ms |")  # fmt: skip
    print("| --- " * 12 + "|")
    for world_size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        cells = []
        for count in (None, 1):
            plan = muon.make_plan(items(), world_size, num_buckets=count)
            loads = plan.loads()
            held = sum(bucket.num_bytes(world_size) for bucket in plan.buckets)
            wire = sum(bucket.wire_bytes(world_size) for bucket in plan.buckets)
            exposed = 1e3 * muon.exposed_seconds(plan.buckets, world_size, "cuda")
            slowest, balance = max(loads) / 1e9, sum(loads) / world_size / max(loads)
            bound = unit * max(3, math.ceil(120 / world_size))
            if count is None:
                cells += [f"{world_size}", f"{len(plan.buckets)}", f"{slowest:.0f}", f"{bound:.0f}",
                          f"{100 * balance:.0f}%", f"{held / needed:.2f}x", f"{wire / 1e6:.0f}",
                          f"{exposed:.2f}"]  # fmt: skip
            else:
                cells += [f"{slowest:.0f}", f"{100 * balance:.0f}%", f"{held / needed:.2f}x",
                          f"{exposed:.2f}"]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
