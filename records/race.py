"""A and B by turns on one machine: A B A B ..., same seeds, same data; which one is faster.

The state is on disk after every run (race.json): the same command goes on where it stopped, as long
as programs, options and data are the same. After an edit it is another race, in its own folder.
Interleaving keeps slow changes of the machine (heat, other users) from favouring one side; Welch's
test of the times does not assume equal spreads, and losses are compared seed by seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from records import check, launch, rules, stats
from records.history import FOLDER, clock, write
from records.parse import Run


def race(
    a: str,
    b: str,
    *,
    runs: int,
    seed: int = 0,
    nproc: int = 1,
    options: str = "",
    out: Path | None = None,
    root: Path = FOLDER,
    report_only: bool = False,
) -> int:
    """Run the race (or go on with it) and print its report. Exit status 0; 130 if interrupted."""
    if runs < 1:
        raise ValueError(f"--runs: expected a whole number from 1, got {runs}")
    if nproc < 1:
        raise ValueError(f"--nproc: expected a whole number from 1, got {nproc}")
    place = out or root.parent / "logs" / "race" / f"{_slug(a)}_vs_{_slug(b)}"
    programs: dict[str, launch.Program] = {}
    both = tuple(shlex.split(options))
    try:
        for side, text in (("a", a), ("b", b)):
            program = launch.find(text, place / "programs" / side, root)
            programs[side] = replace(program, options=launch.merged(program.options, both))
        asked = {"a": a, "b": b, "seed": seed, "nproc": nproc, "options": options,
                 "programs": {side: _digest(programs[side]) for side in "ab"}}
        out = out or place / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
        state = _resume(out, asked)
        labels = {side: programs[side].label for side in "ab"}
        if labels["a"] == labels["b"]:
            labels = {side: f"{side.upper()} ({labels[side]})" for side in "ab"}
        state["labels"] = labels
        if not report_only:
            _run_all(state, programs, labels, runs, seed, nproc, out)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        for side in programs:
            launch.forget(programs[side], place / "programs" / side, root)
    if not state["runs"]["a"] or not state["runs"]["b"]:
        raise ValueError(f"{out}: expected at least one run of each side, there is none yet")
    print(report(state))
    print(f"\n{out / 'race.json'}")
    return 0


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:40] or "tree"


def _digest(program: launch.Program) -> str:
    """sha256 of a program's Python files and options, and of the names and dates in --data_dir."""
    found = hashlib.sha256(json.dumps(program.options).encode())
    for place, folders, files in os.walk(program.folder):
        folders[:] = sorted(f for f in folders if f not in ("logs", "tests") and f[0] not in "._")
        for path in (Path(place, file) for file in sorted(files) if file.endswith(".py")):
            found.update(f"{path.relative_to(program.folder)}\0".encode() + path.read_bytes())
    for name, words in launch.split_options(program.options):
        folder = words[-1].partition("=")[2] or words[-1]
        for path in sorted((program.folder / folder).glob("*")) if name == "--data_dir" else ():
            found.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\0".encode())
    return found.hexdigest()


def _resume(out: Path, asked: dict) -> dict:
    path = out / "race.json"
    if not path.is_file():
        return {"asked": asked, "runs": {"a": [], "b": []}}
    try:
        state = json.loads(path.read_text())
        before = state["asked"]
        found = {side: len(state["runs"][side]) for side in "ab"}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the state of a race: {error!r}") from None
    if before != asked:
        other = [k for k in asked if before.get(k) != asked[k]]
        raise ValueError(f"{out}: holds another race ({', '.join(other)} differ): choose --out, or "
                         "remove it")
    if sum(found.values()):
        print(f"going on with {out}: {found['a']} of A and {found['b']} of B are done",
              file=sys.stderr)
    return state


def _run_all(state, programs, labels, runs, seed, nproc, out) -> None:
    """Run what is missing, A and B by turns; a bar on a terminal, one line for each run."""
    from tqdm import tqdm

    done = sum(min(runs, len(state["runs"][side])) for side in "ab")
    with tqdm(total=2 * runs, initial=done, disable=None, unit="run", dynamic_ncols=True,
              desc="race") as bar:
        for i, side in itertools.product(range(runs), "ab"):
            if len(state["runs"][side]) > i:
                continue

            def show(fraction: float, label=labels[side][:24]) -> None:
                bar.set_postfix_str(f"{label} {fraction:.0%}")

            run = launch.execute(programs[side], seed + i, nproc, out / f"{side}_{i + 1:02d}.out",
                                 on_step=show)
            state["runs"][side].append(_keep(state, side, run, out, i))
            write(out / "race.json", (json.dumps(state, indent=1) + "\n").encode())
            done += 1
            bar.update()
            tqdm.write(f"{done}/{2 * runs}  {side.upper()} {labels[side][:30]}: val_loss "
                       f"{run.final_val_loss:.4f} in {clock(run.train_time_ms)}", file=sys.stderr)


def _keep(state: dict, side: str, run: Run, out: Path, i: int) -> dict:
    """Copy the log of a run and return its entry; ValueError if its side or the machine changed."""
    entry = {
        "log": f"{side}/{i + 1:02d}_{Path(run.path).name}",
        "digest": run.digest,
        "loss": run.final_val_loss,
        "time_ms": run.train_time_ms,
        "tokens": run.tokens,
        "seed": run.result.get("seed"),
        "track": run.result.get("track"),
        "code_sha256": run.code_sha256,
        "recipe_sha256": check.recipe_sha256(run.recipe),
        "data_digest": run.result.get("data_digest"),
        "hardware": check.hardware(run),
    }
    for before in state["runs"][side][:1]:
        for key in ("code_sha256", "recipe_sha256", "hardware"):
            if before[key] != entry[key]:
                raise ValueError(f"{side.upper()} changed during the race ({key}): all runs of a "
                                 "side must be of one program; start again with another --out")
    for other in [*state["runs"]["a"][:1], *state["runs"]["b"][:1]]:
        for key in ("data_digest", "hardware"):
            if other[key] != entry[key]:
                raise ValueError(f"the two sides do not agree in {key}: {other[key]} and "
                                 f"{entry[key]}; a race needs the same data on the same machine")
    target = out / entry["log"]
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.path, target)
    return entry


def report(state: dict) -> str:
    """The race in words and numbers; sides are cut to the number of runs that both have."""
    num = min(len(state["runs"][side]) for side in "ab")
    runs = {side: state["runs"][side][:num] for side in "ab"}
    sides = {side: {"times_ms": [run["time_ms"] for run in runs[side]],
                    "losses": [run["loss"] for run in runs[side]]} for side in "ab"}
    lines = [f"{side.upper()} = {state['labels'][side]}" for side in "ab"]
    lines += [f"{num} run{'s' * (num > 1)} of each, by turns, on {runs['a'][0]['hardware']}", "",
              f"   {'time':>9}  {'sd':>7}  {'loss':>7}  {'sd':>7}  {'tokens':>14}"]
    tokens = [runs[side][0]["tokens"] for side in "ab"]
    for side, trained in zip("ab", tokens):
        time_, loss = map(stats.Sample.of, sides[side].values())
        cells = (f"{time_.sd / 1000:.3f}", f"{loss.sd:.4f}", f"{trained or 0:,}")
        time_sd, loss_sd, shown = ("-" if cell in ("nan", "0") else cell for cell in cells)
        lines.append(f"{side.upper()}  {time_.mean / 1000:8.3f}s  {time_sd:>7}  {loss.mean:7.4f}  "
                     f"{loss_sd:>7}  {shown:>14}")
    lines += ["", stats.comparison_words(sides["a"], sides["b"]) + "."]
    if all(tokens) and tokens[0] != tokens[1]:
        lines.append(f"B trains on {tokens[1] / tokens[0]:.3f} of A's tokens.")
    name = runs["b"][0]["track"]
    if name in rules.TRACKS:
        target = rules.TRACKS[name].target
        who = "".join(s for s in "ab" if sum(sides[s]["losses"]) / num <= target)
        words = {"ab": "both reach", "a": "only A reaches", "b": "only B reaches",
                 "": "neither reaches"}
        lines.append(f"By the mean, {words[who]} the target {target:g} of {name}.")
    return "\n".join(lines)
