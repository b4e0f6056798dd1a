"""Which model fits the pocket track: speed of sizes and precisions, eager and compiled, on a CPU.

    python bench/pocket_size.py [--compile]

Prints a table: parameters, milliseconds per forward and backward of one step's 4,096 tokens,
tokens/s, GFLOP/s. Compare rows of one table only: machines differ, and so do hours.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import recipes
from model import GPT, flops_per_token, init_weights, num_parameters
from trainer.compile import compile_segments

SIZES = [(2, 2, 64), (4, 2, 64), (6, 2, 64), (4, 3, 64), (4, 4, 64), (6, 4, 64)]
TOKENS, SEQ_LEN, REPEATS = 4096, 256, 5


def measure(size: tuple[int, int, int], precision: str, compiled: bool) -> tuple[GPT, float, float]:
    """(model, best milliseconds of a step's forward and backward, seconds to the first)."""
    num_layers, num_heads, head_dim = size
    recipe = recipes.change(
        recipes.pocket(recipes.RECORDS[6]), num_layers=num_layers, num_heads=num_heads,
        head_dim=head_dim, seq_len=SEQ_LEN, batch_tokens=TOKENS, compute_dtype=precision)
    torch._dynamo.reset()
    model = GPT(recipe.model)
    init_weights(model, 0)
    if compiled:
        compile_segments(model)
    tokens = torch.randint(257, (TOKENS // SEQ_LEN, SEQ_LEN + 1))
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        model(tokens[:, :-1].int(), tokens[:, 1:]).backward()
        times.append(time.perf_counter() - began)
    return model, 1000 * min(times[1:]), times[0]


def main() -> None:
    ways = [False, True] if "--compile" in sys.argv[1:] else [False]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| layers x width | parameters | precision | mode | first s | ms | tokens/s | GFLOP/s |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |")
    for compiled in ways:
        for size in SIZES if not compiled else SIZES[1:2]:
            for precision in ("fp32", "bf16"):
                model, ms, first = measure(size, precision, compiled)
                tokens_per_s = TOKENS / ms * 1000
                mode = "compiled" if compiled else "eager"
                gflops = tokens_per_s * flops_per_token(model) / 1e9
                print(f"| {size[0]} x {size[1] * size[2]} | {num_parameters(model):,} "
                      f"| {precision} | {mode} | {first:.1f} | {ms:.0f} | {tokens_per_s:,.0f} "
                      f"| {gflops:.0f} |", flush=True)


if __name__ == "__main__":
    main()
