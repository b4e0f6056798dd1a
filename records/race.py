"""A and B by turns on one machine: A B A B ..., same seeds, same data; which one is faster.

The state is on disk after every run (race.json): the same command goes on where it stopped.
Interleaving keeps slow changes of the machine (heat, other users) from favouring one side; Welch's
test of the times does not assume equal spreads, and losses are compared seed by seed.
"""

from __future__ import annotations

import itertools
import json
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
    out = out or root.parent / "logs" / "race" / f"{_slug(a)}_vs_{_slug(b)}"
    asked = {"a": a, "b": b, "seed": seed, "nproc": nproc, "options": options}
    state = _resume(out, asked)
    if not report_only:
        places = {side: out / "programs" / side for side in "ab"}
        both = tuple(shlex.split(options))
        programs = {}
        for side, text in (("a", a), ("b", b)):
            program = launch.find(text, places[side], root)
            programs[side] = replace(program, options=launch.merged(program.options, both))
        labels = {side: programs[side].label for side in "ab"}
        if labels["a"] == labels["b"]:
            labels = {side: f"{side.upper()} ({labels[side]})" for side in "ab"}
        state["labels"] = labels
        try:
            _run_all(state, programs, labels, runs, seed, nproc, out)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from here", file=sys.stderr)
            return 130
        for side in "ab":
            launch.forget(programs[side], places[side], root)
    if not state["runs"]["a"] or not state["runs"]["b"]:
        raise ValueError(f"{out}: expected at least one run of each side, there is none yet")
    finding = summary(state)
    state |= finding
    _save(out, state)
    print(report(state))
    print(f"\n{out / 'race.json'}")
    return 0


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:40] or "tree"


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
    bar = tqdm(total=2 * runs, initial=done, disable=None, leave=False,
               bar_format="[{bar:24}] {desc}, {remaining} left")
    with bar:
        for i, side in itertools.product(range(runs), "ab"):
            if len(state["runs"][side]) > i:
                continue

            def show(fraction: float, done=done, label=labels[side][:24]) -> None:
                bar.n = done + fraction
                bar.set_description_str(f"{done}/{2 * runs} runs, {label} {fraction:4.0%}")

            show(0.0)
            run = launch.execute(programs[side], seed + i, nproc, out / f"{side}_{i + 1:02d}.out",
                                 on_step=show)
            state["runs"][side].append(_keep(state, side, run, out, i))
            _save(out, state)
            done += 1
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


def _save(out: Path, state: dict) -> None:
    write(out / "race.json", (json.dumps(state, indent=1) + "\n").encode())


def summary(state: dict) -> dict:
    """The numbers of a race so far; sides are cut to the number of runs both have."""
    num = min(len(state["runs"]["a"]), len(state["runs"]["b"]))
    found: dict = {"num_runs": num}
    for side in "ab":
        entries = state["runs"][side][:num]
        found[side] = {
            "label": state["labels"][side],
            "code_sha256": entries[0]["code_sha256"],
            "recipe_sha256": entries[0]["recipe_sha256"],
            "losses": [entry["loss"] for entry in entries],
            "times_ms": [entry["time_ms"] for entry in entries],
            "tokens": entries[0]["tokens"],
        }
    found["hardware"] = state["runs"]["a"][0]["hardware"]
    found["track"] = state["runs"]["b"][0]["track"]
    found["words"] = stats.comparison_words(found["a"], found["b"])
    return found


def report(state: dict) -> str:
    """The race in words and numbers."""
    num = state["num_runs"]
    lines = [f"{side.upper()} = {state[side]['label']}" for side in "ab"]
    lines += [
        f"{num} run{'s' * (num > 1)} of each, by turns, on {state['hardware']}",
        "",
        f"   {'time':>9}  {'sd':>7}  {'loss':>7}  {'sd':>7}  {'tokens':>14}",
    ]
    for side in "ab":
        time_, loss = (stats.Sample.of(state[side][key]) for key in ("times_ms", "losses"))
        tokens = state[side]["tokens"]
        lines.append(f"{side.upper()}  {time_.mean / 1000:8.3f}s  {_sd(time_.sd / 1000, 3)}  "
                     f"{loss.mean:7.4f}  {_sd(loss.sd, 4)}  {f'{tokens:,}' if tokens else '-':>14}")
    lines += ["", state["words"] + "."]
    tokens = [state[side]["tokens"] for side in "ab"]
    if all(tokens) and tokens[0] != tokens[1]:
        lines.append(f"B trains on {tokens[1] / tokens[0]:.3f} of A's tokens.")
    name = state["track"]
    target = rules.TRACKS[name].target if name in rules.TRACKS else None
    if target is not None:
        reached = [sum(state[side]["losses"]) / num <= target for side in "ab"]
        verdict = {(True, True): "both reach", (False, False): "neither reaches",
                   (True, False): "only A reaches", (False, True): "only B reaches"}
        lines.append(f"By the mean, {verdict[tuple(reached)]} the target {target:g} of {name}.")
    return "\n".join(lines)


def _sd(value: float, digits: int) -> str:
    return f"{value:7.{digits}f}" if value == value else f"{'-':>7}"
