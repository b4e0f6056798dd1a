"""Logs for the tests of records: written by RunLog, with numbers that the test chooses."""

import random
import string
from pathlib import Path

from records.log import RunLog, train_line

SOURCES = {"train_gpt.py": "print('hello')\n", "data/loader.py": "x = 1\nno_newline = True"}
TARGET = 1.9


def write_log(path: Path, seed: int = 0, *, loss: float | None = None, steps: int = 100,
              step_ms: float = 20.0, sources: dict | None = None, recipe: dict | None = None,
              environment: dict | None = None, curve_seed: int | None = None, **result) -> Path:
    """One complete pocket run. Its final loss is about 1.885, spread 0.003, or `loss`."""
    rng = random.Random(1000 + (seed if curve_seed is None else curve_seed))
    name = path.parent.name.rstrip(string.digits)  # runs of another folder have another clock
    noise = random.Random(f"{name} {seed if curve_seed is None else curve_seed}")
    final = rng.gauss(1.885, 0.003) if loss is None else loss
    where = {"python": "3.11.6", "torch": "2.13.0", "device": "cpu", "cpu": "Example CPU",
             "started": "2026-11-20T10:00:00Z",
             "command": f"train_gpt.py --record 6 --seed {seed}"} | (environment or {})
    what = {"num_iterations": steps, "batch_tokens": 4096, "model": {"num_layers": 2}}
    log = RunLog(path, SOURCES if sources is None else sources, where, what | (recipe or {}))
    clock, speed = 0.0, noise.gauss(step_ms, step_ms / 30)
    for step in range(steps + 1):
        if step:
            clock += max(0.5, noise.gauss(speed, step_ms / 50))
            train_loss = 5.5 - 3.6 * (step / steps) ** 0.3 + noise.gauss(0, 0.01)
            log.line(train_line(step, steps, train_loss, clock))
        if step % 20 == 0:
            at = final if step == steps else \
                5.55 - (5.55 - final) * (step / steps) ** 0.3 + rng.gauss(0, 0.01)
            log.val(step, steps, at, clock)
            log.line("a note: level with #12")
    log.close({
        "status": "complete", "track": "pocket", "record": 6, "scale": "pocket", "seed": seed,
        "world_size": 1, "target": TARGET, "final_val_loss": f"{final:.6f}",
        "num_iterations": steps, "tokens": steps * 4096, "train_time_ms": round(clock),
        "parameters": 123_456, "data_digest": "ab" * 32, "resumed": False,
    } | result)
    return path


def write_logs(folder: Path, num: int = 6, **changes) -> list[Path]:
    """Runs of one claim that meet the rules, seeds 0, 1, 2, ..."""
    return [write_log(folder / f"run{seed}.txt", seed, **changes) for seed in range(num)]
