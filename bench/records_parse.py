"""How fast logs are read: python bench/records_parse.py [--logs 1500] [--kib 186]

Writes synthetic logs of each format to a temporary folder, as large as the public ones are on
average, reads them all, and prints a table. Then one large and some hostile files, with the peak of
Python's memory while they were read.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from records.log import RunLog, parse, train_line, val_line

CODE = "import torch\n" + "".join(f"    x{i} = layer(x{i - 1})  # a line of code\n"
                                  for i in range(1, 1200))
RULE = "=" * 100 + "\n"


def num_steps(kib: int, line_bytes: int) -> int:
    """Steps that bring a log to this size."""
    return max(2, (kib * 1024 - len(CODE) - 500) // line_bytes)


def is_validated(step: int, num: int) -> bool:
    return step % 125 == 0 or step == num


def public_log(path: Path, kib: int) -> None:
    num = num_steps(kib, 62)
    lines = [CODE + RULE + "Running PyTorch 2.9.0 compiled for CUDA 12.6\n" + RULE.rstrip()]
    for step in range(num + 1):
        if step:
            lines.append(f"step:{step}/{num} train_time:{100 * step}ms step_avg:100.00ms")
        if is_validated(step, num):
            lines.append(val_line(step, num, 3.5, 100.0 * step))
    path.write_text("\n".join(lines) + "\n")


def our_log(path: Path, kib: int) -> None:
    num = num_steps(kib, 82)
    log = RunLog(path, {"train_gpt.py": CODE}, {"python": "3.11"}, {"num_iterations": num})
    for step in range(num + 1):
        if step:
            log.line(train_line(step, num, 3.9, 100.0 * step))
        if is_validated(step, num):
            log.val(step, num, 3.5, 100.0 * step)
    log.close({"status": "complete"})


def read_all(paths: list[Path]) -> tuple[float, int]:
    begun = time.perf_counter()
    num = sum(len(parse(path)) for path in paths)
    return time.perf_counter() - begun, num


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--logs", type=int, default=1500)
    options.add_argument("--kib", type=int, default=186)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'what':34} {'files':>6} {'MiB':>8} {'seconds':>8} {'MiB/s':>7}")
        for what, make in (("public, one training line a step", public_log),
                           ("ours, digest verified", our_log)):
            paths = [folder / f"{make.__name__}_{i}.txt" for i in range(args.logs)]
            make(paths[0], args.kib)
            for path in paths[1:]:
                path.write_bytes(paths[0].read_bytes())
            size = sum(path.stat().st_size for path in paths) / 2**20
            seconds, num = read_all(paths)
            assert num == len(paths)
            print(f"{what:34} {len(paths):6} {size:8.1f} {seconds:8.2f} {size / seconds:7.1f}")
            for path in paths:
                path.unlink()
        print(f"\n{'hostile or huge':34} {'MiB':>8} {'seconds':>8} {'peak MiB':>9}  read as")
        step = b"step:1/2 val_loss:3.2800 train_time:1ms step_avg:1.00ms\n"
        cases = {
            "one line of 64 MiB": b"x" * (64 << 20),
            "one line of val_loss: 64 MiB": b"val_loss:" * ((64 << 20) // 9),
            "a million validation lines": b"".join(
                b"step:%d/9999999 val_loss:3.2800 train_time:%dms step_avg:1.00ms\n" % (i, i)
                for i in range(1_000_000)),
            "a million runs": step * 2 + (b"step:0/2 val_loss:9.0000 train_time:0ms "
                                          b"step_avg:nanms\n" + step) * 300_000,
            "zeros, 256 MiB in gzip": None,
        }
        for what, data in cases.items():
            path = folder / "hostile"
            if data is None:
                with gzip.open(path, "wb", compresslevel=1) as file:
                    for _ in range(256):
                        file.write(bytes(1 << 20))
            else:
                path.write_bytes(data)
            size = (256 << 20 if data is None else len(data)) / 2**20
            begun = time.perf_counter()
            runs = parse(path)
            seconds = time.perf_counter() - begun
            tracemalloc.start()
            parse(path)
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            said = f"{len(runs)} runs, {sum(len(r.faults) for r in runs)} faults"
            print(f"{what:34} {size:8.1f} {seconds:8.2f} {peak:9.1f}  {said}")


if __name__ == "__main__":
    main()
