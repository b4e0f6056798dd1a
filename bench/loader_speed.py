"""How fast the loader makes batches: tokens per second of one core, for every alignment.

    python bench/loader_speed.py [--tokens 20_000_000]

Documents have FineWeb's lengths (log-normal, median 495, mean 767 tokens); a training step that
asks for more tokens per second than stand here would wait for its data. A step of record 89 on
eight H100s asks each rank's loader, which plans all rows and reads its own, for one eighth of 7M.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.loader import Loader, check_enough_tokens
from data.shards import read_shard, write_shard

BOS = 50256
ROWS = (  # name, rows of a step, tokens of a row, alignment, longest document
    ("records 6-11", 512, 1024, "none", None),
    ("records 12-24", 8, 65536, "none", None),
    ("record 26", 8, 49152, "row", None),
    ("records 29-40", 8, 49152, "document", 2048),
    ("record 89, first third", 8, 16384, "document", 896),
    ("pocket size, packed", 32, 512, "document", 512),
)


def fineweb_like(num_tokens: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, BOS, num_tokens, np.uint16)
    lengths = generator.lognormal(np.log(495), np.sqrt(2 * np.log(767 / 495)), num_tokens // 400)
    starts = np.cumsum(np.maximum(1, lengths.astype(np.int64)))
    tokens[0] = BOS
    tokens[starts[starts < num_tokens]] = BOS
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000_000, help="size of the shard")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench_train_000001.bin"
        write_shard(file, fineweb_like(args.tokens))
        started = time.perf_counter()
        read_shard(file, vocab_size=BOS + 1, bos_id=BOS)
        scan_ms = 1e3 * (time.perf_counter() - started)
        print(f"one shard of {args.tokens:,} tokens, checked in {scan_ms:.1f} ms\n")
        print("| rows of | rows x tokens | align | ms/step | M tokens/s | M tokens/s a core | "
              "check before step 0, ms |")
        print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
        for name, num_rows, seq_len, align, max_doc_len in ROWS:
            common = {"vocab_size": BOS + 1, "bos_id": BOS, "align": align,
                      "max_doc_len": max_doc_len}

            def batch_shape(step: int, shape: tuple[int, int] = (num_rows, seq_len)):
                return shape

            with Loader([file], batch_shape, **common) as loader:
                next(loader)  # opens and scans the shard, finds the documents
                wall, cpu, num_steps = time.perf_counter(), time.process_time(), 0
                try:
                    while True:
                        next(loader)
                        num_steps += 1
                except ValueError:  # the shard is used up
                    pass
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            started = time.perf_counter()
            check_enough_tokens([file], batch_shape, num_steps + 1, **common)
            check_ms = 1e3 * (time.perf_counter() - started)
            million = num_steps * num_rows * seq_len / 1e6
            print(f"| {name} | {num_rows} x {seq_len} | {align} | {1e3 * wall / num_steps:.2f} | "
                  f"{million / wall:.0f} | {million / cpu:.0f} | {check_ms:.1f} |")


if __name__ == "__main__":
    main()
