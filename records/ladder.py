"""The ladder at pocket scale: every rung trained on this machine, beside the published ladder.

    python -m records ladder --seeds 3          run the missing runs, write table and plot
    python -m records ladder --times 2          time all rungs in turns, on a quiet machine
    python -m records ladder --report           only write table and plot of the runs so far

Runs go seed by seed, within a seed rung by rung: the same seed gives every rung the same start and
the same order of data, so gains are differences between pairs of runs. Results are kept in one line
a run; an interrupted ladder goes on where it stopped. Losses do not depend on other work on the
machine, times do: they come from short runs of all rungs in turns, one at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.stats

from records import history, stats
from records.check import recipe_sha256
from records.log import parse
from records.rules import TRACKS

ROOT = Path(__file__).resolve().parent.parent
TIMED_STEPS = 24
BASELINE = 2    # the AdamW baseline: the loss that the others are to reach sooner
TARGET = TRACKS["pocket"].target
PERMUTATIONS = 9999
ALPHA = 0.05    # a gain counts where chance would give one as large less often than this


# --- running --------------------------------------------------------------------------------------

_RECIPES = """
import json, sys, recipes; from trainer import options
print(json.dumps([recipes.to_dict(recipes.Recipe()), {record: recipes.to_dict(options.parse(
    ["--record", str(record), "--scale", "pocket", *sys.argv[1:]], has_cuda=False)[1])
    for record in recipes.RECORDS}]))
"""
# Fields of a recipe that change how a run is measured, not the training.
WATCHED = ("val_tokens", "val_every", "val_seq_len", "target", "title", "track")


def known_rungs(options: Sequence[str] = ()) -> dict[int, str]:
    """Record -> fingerprint of its recipe as the program trains it now."""
    done = subprocess.run([sys.executable, "-c", _RECIPES, *options], cwd=ROOT, text=True,
                          capture_output=True)
    if done.returncode:
        raise ValueError(f"--options: {done.stderr.strip().splitlines()[-1]}")
    defaults, found = json.loads(done.stdout)
    return {int(record): fingerprint(recipe, defaults) for record, recipe in found.items()}


def fingerprint(recipe: dict, defaults: dict) -> str:
    """Digest of the training fields that are not at their defaults. A kept run counts while its
    rung's is the same; a new field that older recipes leave alone does not change it."""
    rest = {k: v for k, v in recipe.items() if k not in WATCHED and v != defaults.get(k)}
    model = {k: v for k, v in recipe["model"].items() if v != defaults["model"].get(k)}
    return recipe_sha256({**rest, "model": model})


def run_once(record: int, seed: int, options: Sequence[str], threads: int,
             fingerprint: str) -> dict:
    """Train one rung and return the facts of its log; ValueError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive",
                   "GOMP_SPINCOUNT": "20000"}  # as in tools/env.sh
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train_gpt.py", "--record", str(record), "--scale", "pocket",
                   "--seed", str(seed), "--log_dir", folder, *options]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)
        logs = list(Path(folder).glob("*.txt"))
        if done.returncode or len(logs) != 1:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise ValueError(f"record {record}, seed {seed}: {' '.join(command[1:])} ended with "
                             f"{done.returncode}: {' '.join(last)}")
        (run,) = parse(logs[0])
    result = run.result
    return {
        "record": record, "seed": seed, "val_loss": float(result["final_val_loss"]),
        "tokens": int(result["tokens"]), "num_iterations": int(result["num_iterations"]),
        "parameters": int(result["parameters"]),
        "train_time_ms": float(result["train_time_ms"]), "threads": threads,
        "curve": [[p.step, p.val_loss] for p in run.points],
        "options": list(options), "fingerprint": fingerprint,
        "data_digest": result["data_digest"], "commit": run.environment.get("git_commit"),
    }


def run_missing(kept: Path, rungs: dict[int, str], records: Sequence[int], seeds: int,
                options: Sequence[str], jobs: int, threads: int) -> None:
    """Append one line to `kept` for each run that is not there yet with its rung's recipe."""
    from tqdm import tqdm

    there = {(r["record"], r["seed"]) for r in current(read(kept), rungs)}
    todo = [(record, seed) for seed in range(seeds) for record in records
            if (record, seed) not in there]
    kept.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(records) * seeds, initial=len(records) * seeds - len(todo), unit="run",
               dynamic_ncols=True, desc="ladder")
    with bar, ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(
                lambda at: run_once(*at, options, threads, rungs[at[0]]), todo):
            with open(kept, "a") as file:
                file.write(json.dumps(result) + "\n")
                file.flush()
                os.fsync(file.fileno())
            bar.set_postfix_str(f"#{result['record']} seed {result['seed']}: "
                                f"{result['val_loss']:.4f}")
            bar.update()


def time_rungs(kept: Path, rungs: dict[int, str], records: Sequence[int], rounds: int,
               threads: int) -> None:
    """Append one line to `kept` for each timed run: `rounds` times all records, in turns."""
    from tqdm import tqdm

    few = ["--num_iterations", str(TIMED_STEPS), "--val_every", str(TIMED_STEPS),
           "--val_tokens", "65536"]
    for record in tqdm([*records] * rounds, unit="run", dynamic_ncols=True, desc="times"):
        run = run_once(record, 0, few, threads, rungs[record])
        line = {"record": record, "ms_per_token": run["train_time_ms"] / run["tokens"],
                "threads": threads, "fingerprint": run["fingerprint"], "commit": run["commit"]}
        with open(kept, "a") as file:
            file.write(json.dumps(line) + "\n")


def read(kept: Path) -> list[dict]:
    """The runs kept so far. Raises ValueError for a line that is not one."""
    runs = []
    for number, line in enumerate(kept.read_text().splitlines() if kept.is_file() else (), 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{kept}, line {number}: expected a run as JSON, got {line[:40]!r}; "
                             "delete the line to have it run again") from None
    return runs


def current(runs: Sequence[dict], rungs: dict[int, str]) -> list[dict]:
    """The runs whose recipe is still that of their rung."""
    return [run for run in runs if rungs.get(run["record"]) == run["fingerprint"]]


# --- gains and verdicts ---------------------------------------------------------------------------

def rungs(runs: Sequence[dict], times: Sequence[dict] = ()) -> list[dict]:
    """A row for each record: losses, and the gain over the rung before as paired differences.

    One standard deviation for all gains, pooled over the rungs, because few seeds say little about
    that of a single rung.
    """
    by_record: dict[int, dict[int, dict]] = {}
    for run in runs:
        by_record.setdefault(run["record"], {})[run["seed"]] = run
    published = {r["number"]: r for r in history.public_records() if r["track"] == "short"
                 and r["kind"] == "record"}
    bar = by_record.get(BASELINE)
    bar = statistics.fmean(r["val_loss"] for r in bar.values()) if bar else math.nan
    rows, before = [], None
    for record, of_seed in sorted(by_record.items()):
        losses = [run["val_loss"] for run in of_seed.values()]
        first = next(iter(of_seed.values()))
        seconds_per_token = statistics.median(
            [t["ms_per_token"] for t in times if t["record"] == record] or [math.nan]) / 1000
        row = {
            "record": record, "n": len(losses), "loss": statistics.fmean(losses),
            "sd": statistics.stdev(losses) if len(losses) > 1 else math.nan,
            "losses": losses, "parameters": first["parameters"],
            "num_iterations": first["num_iterations"], "tokens": first["tokens"],
            "seconds": seconds_per_token * first["tokens"],
            "seconds_to_target": seconds_per_token * statistics.fmean(
                tokens_to(r, TARGET) for r in of_seed.values()),
            "tokens_to_bar": statistics.fmean(tokens_to(r, bar) for r in of_seed.values()),
            "gains": [before[s]["val_loss"] - run["val_loss"] for s, run in of_seed.items()
                      if before and s in before],
            "published": published.get(record),
            "same_recipe": before is not None and only_names_differ(record),
        }
        rows.append(row)
        before = of_seed
    spread = _spread(rows)
    for row in rows:
        row["gain"] = statistics.fmean(row["gains"]) if row["gains"] else math.nan
        row["error"] = spread / math.sqrt(len(row["gains"])) if row["gains"] else math.nan
    return rows


def only_names_differ(record: int) -> bool:
    """Rungs whose recipe differs from the one before by systems alone: their gain is noise."""
    return record in (6, 7, 23, 24, 89)


def tokens_to(run: dict, loss: float) -> float:
    """Tokens until the run's validation was at `loss`, linear between validations; NaN if never."""
    per_step = run["tokens"] / run["num_iterations"]
    curve = run["curve"]
    for (step, high), (later, low) in itertools.pairwise(curve):
        if low <= loss < high:
            return per_step * (step + (later - step) * (high - loss) / (high - low))
    return math.nan


def _spread(rows: Sequence[dict]) -> float:
    """Standard deviation of the gains of all rungs, each around its own mean."""
    return stats.pooled_sd([(len(row["gains"]), statistics.stdev(row["gains"]))
                            for row in rows if len(row["gains"]) > 1])


def verdict(row: dict, freedom: int) -> str:
    """helps, hurts, or within noise, by a two-sided t-test with the pooled deviation."""
    if not row["gains"] or not row["error"] > 0:
        return ""
    if 2 * scipy.stats.t.sf(abs(row["gain"]) / row["error"], freedom) > ALPHA:
        return "within noise"
    return "helps" if row["gain"] > 0 else "hurts"


def rank_correlation(rows: Sequence[dict]) -> tuple[float, float, int]:
    """(Spearman's rho, p, rungs): pocket gains with the published ones, both over the rung before.

    A published gain is the logarithm of tokens saved to the same loss; minutes would include the
    systems work.
    """
    pairs = [(row["gain"], math.log(prior["published"]["tokens"] / row["published"]["tokens"]))
             for prior, row in itertools.pairwise(rows)
             if row["gains"] and prior["published"] and row["published"]
             and prior["published"]["tokens"] and row["published"]["tokens"]]
    if len(pairs) < 3:
        return math.nan, math.nan, len(pairs)
    gains, savings = (scipy.stats.rankdata(side) for side in zip(*pairs))
    rho = float(np.corrcoef(gains, savings)[0, 1])
    rng = np.random.default_rng(0)  # p: how often a shuffled order does as well, either way
    shuffled = [np.corrcoef(rng.permutation(gains), savings)[0, 1] for _ in range(PERMUTATIONS)]
    as_good = sum(abs(r) >= abs(rho) - 1e-12 for r in shuffled)
    return rho, (as_good + 1) / (PERMUTATIONS + 1), len(pairs)


# --- the page -------------------------------------------------------------------------------------

def validation_note(runs: Sequence[dict]) -> str:
    """A warning where the runs validate on fewer tokens than the track."""
    options = {tuple(run["options"]) for run in runs}
    counts = {words[words.index("--val_tokens") + 1] for words in options
              if "--val_tokens" in words}
    whole = TRACKS["pocket"].fixed["val_tokens"]
    if not counts - {str(whole)}:
        return ""
    shown = " or ".join(f"{int(count):,}" for count in sorted(counts))
    return (f" Validation here is over the first {shown} tokens, the track's over {whole:,}: "
            "compare these losses, and when they pass the target, with each other only.")


def page(runs: Sequence[dict], there: Sequence[int] = (), times: Sequence[dict] = ()) -> str:
    """records/LADDER.md: every number in it comes from the runs. `there`: all rungs there are."""
    rows = rungs(runs, times)
    gains = [row["gains"] for row in rows if len(row["gains"]) > 1]
    freedom = sum(len(g) - 1 for g in gains)
    spread = _spread(rows)
    rho, p, num = rank_correlation(rows)
    words = {row["record"]: verdict(row, freedom) for row in rows}

    def number(value: float, form: str) -> str:
        return "" if value is None or math.isnan(value) else format(value, form)

    lines = [
        "# The ladder at pocket scale", "",
        "Written by `python -m records ladder`; every number comes from "
        "`records/data/ladder.jsonl`.", "",
        f"Every rung sees {rows[0]['tokens']:,} tokens of the built-in corpus (the last digits "
        "differ where a batch does not divide them). Loss is the mean over seeds at the end; gain "
        "is the loss of the rung before minus this one's, paired by seed" + (
            f"; its error is one standard deviation pooled over all rungs ({spread:.4f} a pair) "
            f"over the root of n. A gain counts where a two-sided t-test gives p < {ALPHA}"
            if freedom else "") + ". Tokens to the baseline: "
        f"when the loss that #{BASELINE} ends with was reached. Seconds: for all tokens, and for "
        f"those up to the track's target of {TARGET} where all seeds reach it, at the median speed "
        "of short runs of all rungs in turns." + validation_note(runs), "",
        "![published and pocket ladder](ladder.svg)", "",
        "| # | published | minutes | tokens | pocket loss | n | gain over the rung before | | "
        f"tokens to the baseline | s | s to {TARGET} | parameters | steps |",
        "|-:|-|-:|-:|-:|-:|-:|-|-:|-:|-:|-:|-:|",
    ]
    for row in rows:
        known = row["published"] or {}
        gain = "" if not row["gains"] else f"{row['gain']:+.4f}" + (
            f" ± {row['error']:.4f}" if row["error"] > 0 else "")
        lines.append(
            f"| {row['record']} | {known.get('title', '')} | {known.get('minutes', '')} | "
            f"{history.count(known.get('tokens'))} | {row['loss']:.4f} | {row['n']} | {gain} | "
            f"{words[row['record']]} | {number(row['tokens_to_bar'], ',.0f')} | "
            f"{number(row['seconds'], '.1f')} | {number(row['seconds_to_target'], '.1f')} | "
            f"{row['parameters']:,} | {row['num_iterations']} |")
    same = [f"#{r['record']}" for r in rows if r["same_recipe"]]
    lines += ["", f"Nothing in the mathematics changed with {', '.join(same)}. " * bool(same)
              + "Pocket scale is fp32 throughout, so what #10 and #19 did to precision is not in "
              "it; no byte begins with another token, so neither is the prefix loss (#88). "
              "Learning rates are those of the records, not tuned for this size; Muon's at "
              "unit RMS (#4 to #7) follows the width by rule."]
    if absent := [f"#{record}" for record in there if record not in words]:
        lines += ["", f"Not run yet: {', '.join(absent)}."]
    if not freedom:
        lines += ["", "With one run a rung a gain cannot be told from chance: no verdicts."]
    for word, says in (("helps", "Help at this scale"), ("hurts", "Hurt at this scale"),
                       ("within noise", "Cannot be told from chance here")):
        named = [f"#{record}" for record, w in words.items() if w == word]
        lines += [] if not freedom else ["", f"{says}: {', '.join(named) or 'none'}."]
    lines += ["", "Rank correlation of pocket gains with published ones (logarithm of tokens saved "
              f"over the rung before): Spearman {number(rho, '+.2f')}, p = {number(p, '.2g')}, "
              f"{num} rungs.", ""]
    return "\n".join(lines)


def draw(runs: Sequence[dict], out: Path) -> list[Path]:
    """The published ladder (tokens, minutes to 3.28) over the pocket one (loss at equal tokens)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from records.plot import COLORS, STYLE, save

    rows = rungs(runs)
    at = {row["record"]: i for i, row in enumerate(rows)}
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.6), layout="constrained",
                                              sharex=True)
        for key, scale, color, label in (("tokens", 1e9, COLORS[0], "billions of tokens"),
                                         ("minutes", 1, COLORS[1], "minutes on 8 H100")):
            points = [(at[r["record"]], r["published"][key] / scale) for r in rows
                      if r["published"] and r["published"].get(key)]
            above.plot(*zip(*points), marker="o", markersize=3, color=color, label=label)
        above.set_yscale("log")
        low, high = above.get_ylim()
        ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
        above.set_yticks(ticks, [f"{t:g}" for t in ticks])
        above.minorticks_off()
        above.set_ylabel("published: to 3.28")
        above.legend(loc="upper right")
        below.plot([at[r["record"]] for r in rows], [r["loss"] for r in rows], color=COLORS[2],
                   marker="o", markersize=3, label="mean")
        for r in rows:
            below.plot([at[r["record"]]] * r["n"], r["losses"], ".", color="#999999", markersize=3)
        below.set_ylabel(f"pocket: loss at {history.count(rows[0]['tokens'])} tokens")
        below.set_xticks(range(len(rows)), [f"{r['record']}" for r in rows])
        below.set_xlabel("record")
        files = save(figure, out)
        plt.close(figure)
    return files


# --- the command ----------------------------------------------------------------------------------

def add_arguments(add: Callable) -> None:
    add("--seeds", type=int, default=3, help="runs of each rung (default 3)")
    add("--records", default="", help="only these rungs, as 2,6,24")
    add("--jobs", type=int, default=1, help="runs at a time (default 1)")
    add("--threads", type=int, default=1, help="threads of each run (default 1)")
    add("--options", default="", help="options for all runs, in quotes")
    add("--times", type=int, default=0, metavar="ROUNDS",
        help="time the steps of all rungs so many times, train nothing else")
    add("--report", action="store_true", help="only report the runs made so far")


def ladder(args: argparse.Namespace) -> int:
    kept, timed = (args.root / "data" / name for name in ("ladder.jsonl", "ladder_times.jsonl"))
    if args.seeds < 1 or args.jobs < 1 or args.threads < 1 or args.times < 0:
        raise ValueError("--seeds, --jobs and --threads: expected whole numbers from 1; --times "
                         "from 0")
    there = known_rungs(args.options.split())
    if not args.report:
        chosen = [int(n) for n in args.records.split(",")] if args.records else list(there)
        if unknown := sorted(set(chosen) - set(there)):
            raise ValueError(f"--records: expected some of {', '.join(map(str, there))}; got "
                             f"{', '.join(map(str, unknown))}")
        if args.times:
            time_rungs(timed, there, chosen, args.times, args.threads)
        else:
            run_missing(kept, there, chosen, args.seeds, args.options.split(), args.jobs,
                        args.threads)
    runs, times = current(read(kept), there), current(read(timed), there)
    if not runs:
        raise FileNotFoundError(f"{kept}: expected runs of the present recipes, found none; leave "
                                "out --report")
    history.write(args.root / "LADDER.md", page(runs, list(there), times).encode())
    for path in (args.root / "LADDER.md", *draw(runs, args.root / "ladder")):
        print(path)
    return 0
