"""Where the pocket track's target comes from: a GPT-2 style AdamW baseline, learning rate swept.

    python bench/pocket_target.py --log_dir FOLDER [--rates 0.0012 0.0024 0.0048] [--report]

The baseline is record #1's recipe at pocket scale (learned positions, LayerNorm, GELU, biases, tied
head, AdamW with warm-up, cosine and clipping) on ten times the tokens of a pocket run, about five
minutes on two free cores. Runs that FOLDER already holds are not repeated; --report trains nothing.
Prints a table of the sweep, and where other runs in FOLDER (the pocket default, say) first were at
or below the best baseline's loss.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from records.log import Run, parse

STEPS = 2560  # of 2,048 tokens


def complete_runs(folder: Path) -> list[Run]:
    runs = [run for log in sorted(folder.glob("*.txt")) for run in parse(log)]
    return [run for run in runs if run.result.get("status") == "complete"]


def is_baseline(run: Run, rate: float | None = None) -> bool:
    recipe = run.recipe
    return recipe["record"] == 1 and recipe["num_iterations"] == STEPS and (
        rate is None or recipe["matrix_lr"] == rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log_dir", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0012, 0.0024, 0.0048])
    parser.add_argument("--report", action="store_true", help="only print what was run")
    args = parser.parse_args()
    args.log_dir.mkdir(parents=True, exist_ok=True)
    for rate in args.rates:
        if args.report or any(is_baseline(run, rate) for run in complete_runs(args.log_dir)):
            continue
        rates = [f"--{group}_lr={rate}" for group in ("matrix", "embed", "head", "scalar")]
        subprocess.run(
            [sys.executable, "train_gpt.py", "--record", "1", "--scale", "pocket",
             "--num_iterations", str(STEPS), "--val_every", "320", *rates,
             "--log_dir", str(args.log_dir)], cwd=ROOT, check=True)

    runs = complete_runs(args.log_dir)
    baselines = sorted((r for r in runs if is_baseline(r)), key=lambda r: r.recipe["matrix_lr"])
    print("\n| baseline: learning rate | val loss | tokens | training s |")
    print("| ---: | ---: | ---: | ---: |")
    for run in baselines:
        print(f"| {run.recipe['matrix_lr']:g} | {run.final_val_loss:.4f} | "
              f"{run.result['tokens']:,} | {run.train_time_ms / 1000:.0f} |")
    if not baselines:
        return
    best = min(baselines, key=lambda r: r.final_val_loss)
    print(f"\n| run | val loss | first at or below {best.final_val_loss:.4f}: tokens | of the "
          "baseline's | s | of the baseline's |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for run in (r for r in runs if not is_baseline(r)):
        there = next((p for p in run.points if p.val_loss <= best.final_val_loss), None)
        name = f"#{run.recipe['record']} seed {run.result['seed']}"
        if there is None:
            print(f"| {name} | {run.final_val_loss:.4f} | not reached | | | |")
            continue
        tokens = run.tokens_at(there.step)
        print(f"| {name} | {run.final_val_loss:.4f} | {tokens:,.0f} | "
              f"{tokens / best.result['tokens']:.1%} | {there.train_time_ms / 1000:.1f} | "
              f"{there.train_time_ms / best.train_time_ms:.1%} |")


if __name__ == "__main__":
    main()
