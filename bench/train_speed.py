"""Speed of whole trainings: tokens/s, MFU, peak memory and warm-up of recipes, side by side.

    python bench/train_speed.py                            pocket scale on this machine
    python bench/train_speed.py --scale full --records 6 12 23 --steps 30 --data_dir shards
    NPROC=8 python bench/train_speed.py --scale full       under torchrun

Each row is a run of train_gpt.py with few steps; the figures are those of its log. The rows of one
table were measured one after the other, `--repeat` times in turn, and the best of each is shown:
compare within a table, not across machines.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from records.log import parse


def run_process(command: Sequence[str | os.PathLike], limit_s: float | None = None,
                env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """subprocess.run in this repository, output captured as text; but what is not done after
    limit_s, or when this process is told to end, is killed with all that it started.
    Raises TimeoutExpired, which carries the output so far."""
    with (tempfile.TemporaryFile("w+", errors="replace") as out,
          tempfile.TemporaryFile("w+", errors="replace") as err):
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err,
                                   start_new_session=True)
        late = None
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            late = error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        if late is not None:
            raise subprocess.TimeoutExpired(command, late.timeout, out.read(), err.read())
        return subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())


def run_once(arguments: list[str], limit_s: float | None = None,
             env: Mapping[str, str] | None = None) -> dict:
    """The closing block of one run's log; `env` is added to the environment.
    Raises RuntimeError with what the trainer said, TimeoutExpired after limit_s."""
    nproc = int(os.environ.get("NPROC", 1))
    launch = [sys.executable] if nproc == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(nproc)]
    with tempfile.TemporaryDirectory() as folder:
        done = run_process([*launch, "train_gpt.py", *arguments, "--log_dir", folder], limit_s,
                           {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000", **os.environ,
                            **(env or {})})
        logs = list(Path(folder).glob("*.txt"))
        if done.returncode or not logs:
            why = done.stderr.strip()[-500:] or next(  # a run that stopped itself says so there
                (line for line in done.stdout.splitlines() if line.startswith("result")), "")
            raise RuntimeError(f"{' '.join(arguments)}: status {done.returncode}: {why}")
        (run,) = parse(logs[0])
        return run.result


def peak_mib(result: dict) -> float:
    """Peak memory of training steps alone, where the log tells it from the whole run's."""
    return float(result.get("peak_step_mib", result["peak_memory_mib"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[6])
    parser.add_argument("--scale", default="pocket")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--data_dir", help="folder of shards in place of the recipe's corpus")
    parser.add_argument("--compile", nargs="+", default=["auto"], help="auto, on, off")
    args = parser.parse_args()
    rows: dict[tuple[int, str], list[dict]] = {}
    for _ in range(args.repeat):
        for record in args.records:
            for compiled in args.compile:
                words = ["--record", str(record), "--scale", args.scale, "--compile", compiled,
                         "--num_iterations", str(args.steps), "--val_every", str(args.steps)]
                if args.scale == "pocket":
                    words += ["--val_tokens", "32768"]
                else:
                    words += ["--val_tokens", "1048576"]
                if args.data_dir:
                    words += ["--data_dir", args.data_dir]
                print(f"#{record}, compile {compiled} ...", file=sys.stderr, flush=True)
                rows.setdefault((record, compiled), []).append(run_once(words))
    print("| record | compile | tokens/s | MFU | peak MiB | warm-up s | ms/step |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for (record, compiled), results in rows.items():
        best = max(results, key=lambda r: float(r["tokens_per_s"]))
        ms = float(best["train_time_ms"]) / args.steps
        print(f"| {record} | {compiled} | {float(best['tokens_per_s']):,.0f} | {best['mfu']} "
              f"| {peak_mib(best):,.0f} | {best['warmup_s']} | {ms:.1f} |")


if __name__ == "__main__":
    main()
