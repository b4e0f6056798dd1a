"""What backward keeps of a token: bytes for each layer and channel, eager, compiled, recomputed.

    python bench/memory.py                       #6, #12, #38, #62 at full width; minutes on a CPU
    python bench/memory.py --records 6 --eager   without compiling: seconds

The number of tokens that a card computes at once follows from it (KEPT_BYTES of trainer/memory.py).
Counted, not timed: storages that autograd saves in the layers of a model of 4 layers of width 768,
the difference between rows of 1,024 and of 512 tokens; parameters and the head are left out. The
last column is what the whole recipe keeps of one row.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import recipes
from recipes import RECORDS, Recipe
from trainer.compile import compile_segments

LAYERS, LENGTHS, WINDOW = 4, (512, 1024), 128


def kept_bytes(model: torch.nn.Module, seq_len: int) -> int:
    """Bytes of the storages that one row leaves for backward, parameters not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x_BTC = model.hidden(torch.randint(50_000, (1, seq_len), dtype=torch.int32))
    x_BTC.float().sum().backward()
    return sum(kept.values())


def measure(recipe: Recipe, way: str) -> float:
    """Bytes a token, layer and channel."""
    torch._dynamo.reset()
    small = recipes.change(recipe, num_layers=LAYERS, head="bf16")
    model = recipes.build_model(small, seed=0)
    phase = model.phase
    model.set_phase(phase._replace(**{name: WINDOW for name in ("window", "short_window")
                                      if getattr(phase, name)}))
    model.recomputed = LAYERS if way == "recomputed" else 0
    if way == "compiled":
        compile_segments(model)
    short, long = (kept_bytes(model, seq_len) for seq_len in LENGTHS)
    return (long - short) / (LENGTHS[1] - LENGTHS[0]) / LAYERS / recipe.model.model_dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[6, 12, 38, 62])
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    ways = ["eager", "recomputed"] + ["compiled"] * (not args.eager)
    print(f"| record | {' | '.join(ways)} | layers | row | GB a row, last way |")
    print("| --- |" + " ---: |" * (len(ways) + 3))
    for record in args.records:
        recipe = RECORDS[record]
        per = [measure(recipe, way) for way in ways]
        config = recipe.model
        row = per[-1] * config.num_layers * config.model_dim * config.seq_len / 1e9
        print(f"| #{record} | {' | '.join(f'{x:.1f}' for x in per)} | {config.num_layers} "
              f"| {config.seq_len:,} | {row:.1f} |", flush=True)


if __name__ == "__main__":
    main()
