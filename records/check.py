"""Re-derive every number of a record from its logs, and name every rule that is not met.

`judge` checks the runs of one claim, `check_folder` a record folder against its own logs. A reason
has a name (a fixed word, for scripts and for `--waive`) and a sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from records import history, readme, rules, stats
from records.history import FOLDER, read_result
from records.log import Run, parse
from records.parse import printable
from records.rules import Track

# the names of all reasons, with the rule behind each
RULES = {
    "not-a-log": "the file holds at least one measurement",
    "unreadable": "every result line can be read, nothing in the log contradicts itself",
    "edited": "the digest of the closing block fits the log",
    "missing-fact": "a log of ours says recipe, seed, tokens, steps, time, loss, track and corpus",
    "incomplete": "the run ended: last step validated, finite loss, status complete",
    "resumed": "the run was made in one go",
    "no-digest": "a log in a record folder has a closing block (public logs have none)",
    "no-source": "the program is in the log, in a record folder",
    "source-differs": "all runs are of one program, but for differences that are named",
    "recipe-differs": "all runs are of one recipe",
    "steps-differ": "all runs took the same number of steps",
    "track-differs": "all runs are of the track they are entered for, or of one with its target",
    "data-differs": "all runs used the same corpus, the one of the track",
    "hardware-differs": "all runs were made on the same hardware",
    "wrong-hardware": "the hardware is that of the track",
    "fixed-field": "the recipe has the values that the track fixes",
    "duplicate-run": "no run is counted twice",
    "same-seed": "every run has its own seed",
    "missing-run": "no run is left out: seeds follow each other, as the commands say",
    "too-few-runs": "there are as many runs as the track asks for",
    "not-derived": "each number that a README claims follows from its logs",
    "above-target": "the mean loss is at or below the target",
    "not-significant": "the losses are below the target beyond chance, as the track asks",
    "not-better": "the record is ahead of the track's record before it",
    "no-race": "a record by time was raced against the one before it on the same machine",
    "broken-folder": "no file of a record is missing or a link, none in sources/ without a record",
    "not-reproduced": "the program of the best run gives its first losses again (`--deep`)",
    "stale-result": "result.json holds the numbers that follow from the logs",
    "stale-readme": "the numbers in the record's README are those of result.json",
    "unwritten": "the author answered the questions of the README",
    "stale-table": "the tables in README.md are those that follow from the data",
}


EVIDENCE = {"not-significant", "too-few-runs", "above-target"}  # reasons that more runs may mend


@dataclass(frozen=True)
class Reason:
    name: str
    where: str
    text: str

    def __post_init__(self) -> None:
        assert self.name in RULES, self.name

    def __str__(self) -> str:
        return ": ".join(printable(part) for part in (self.name, self.where, self.text) if part)


def grouped(reasons: Sequence[Reason]) -> list[Reason]:
    """One reason in place of the same reason for several runs."""
    groups: dict[tuple[str, str], list[Reason]] = {}
    for reason in reasons:
        groups.setdefault((reason.name, reason.text), []).append(reason)
    return [same[0] if len(same) == 1 else Reason(name, _and_more(r.where for r in same), text)
            for (name, text), same in groups.items()]


def _and_more(names) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first


@dataclass
class Verdict:
    """The outcome for the runs of one claim. `result` is the part of result.json about them."""

    track: Track
    runs: list[Run]
    reasons: list[Reason] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # worth knowing, no failure
    result: dict = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.reasons

    def names(self) -> set[str]:
        return {reason.name for reason in self.reasons}

    def add(self, name: str, where: str, text: str) -> None:
        self.reasons.append(Reason(name, where, text))


# ---------------------------------------------------------------------------------- one run


# the facts that the closing block of a log of ours has, and their types
FACTS = {"track": str, "seed": int, "tokens": int, "num_iterations": int, "train_time_ms": int,
         "final_val_loss": float, "data_digest": str}


def run_reasons(run: Run, label: str, closed: bool) -> list[Reason]:
    """The faults of one run as evidence. `closed`: the log must have a closing block."""
    found = [Reason("edited", label, text) for text in run.edits]
    found += [Reason("unreadable", label, text) for text in run.faults]
    if run.why_incomplete and not run.edits:
        found.append(Reason("incomplete", label, run.why_incomplete))
    if run.result.get("resumed") is True:
        found.append(Reason("resumed", label, "this run was resumed from a checkpoint"))
    if run.format == "ours" and run.complete:
        facts = [key for key, kind in FACTS.items() if type(run.result.get(key)) is not kind]
        if run.batches is None:
            facts.append("recipe" if run.recipe is None else "tokens per step")
        found += [Reason("missing-fact", label, f"it does not say its {fact}") for fact in facts]
        if not facts:
            found += [Reason("unreadable", label, text) for text in contradictions(run)]
    if closed and run.format not in ("ours", ""):
        found.append(Reason("no-digest", label,
                            "a public log: nothing in it shows whether it was edited"))
    if (closed or run.format == "ours") and not run.sources and run.code_sha256 is None:
        found.append(Reason("no-source", label, "the log does not hold the program"))
    return found


def contradictions(run: Run) -> list[str]:
    """Numbers that a complete log of ours holds twice, and that differ."""
    result, recipe, last, found = run.result, run.recipe or {}, run.final, []

    def same(noun: str, there: str, a: object, here: str, b: float, error: float = 0.0) -> None:
        if a is not None and not (type(a) in (int, float) and abs(a - b) <= error):
            found.append(f"its {noun} {a} in {there}, {b:.0f} {here}")

    same("steps are", "the recipe", recipe.get("num_iterations"), "in the last line", last.step)
    same("steps are", "the closing block", result["num_iterations"], "in the last line", last.step)
    tokens, ms = run.tokens_at(last.step), last.train_time_ms
    same("tokens are", "the closing block", result["tokens"], "by its steps and batch", tokens)
    same("training time in ms is", "the closing block", result["train_time_ms"],
         "in the last line", ms, 1.0)
    speed = 1000 * tokens / max(ms, 1.0)
    same("tokens a second are", "the closing block", result.get("tokens_per_s"),
         "by its tokens and time", round(speed), 1.0 + speed / max(ms, 1.0))
    first, num = announced(run)
    if first is not None and not first <= result["seed"] < first + num:
        found.append(f"its seed is {result['seed']} in the closing block, {first} in its command")
    sizes = recipe.get("batch_stages") or [recipe.get("batch_tokens")]
    row = recipe_field(recipe, "model.seq_len")  # a batch has whole rows
    row, known = row if type(row) is int else 1, sizes if isinstance(sizes, list) else []
    for _, size in run.batches:
        if not any(type(n) is int and 0 <= n - size < row for n in known):
            found.append(f"its tokens per step are {size}, the recipe has {sizes}")
    return found


def announced(run: Run) -> tuple[int | None, int]:
    """(first seed, number of runs) that the command of a log names."""
    command = run.environment.get("command", "")
    seed, runs = (re.search(rf"--{name}[= ](\d{{1,9}})\b", command) for name in ("seed", "runs"))
    if not seed and not runs:
        return None, 1
    return int(seed[1]) if seed else 0, int(runs[1]) if runs else 1


def recipe_field(recipe: dict, path: str) -> object:
    value: object = recipe
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def recipe_sha256(recipe: dict | None) -> str | None:
    if recipe is None:
        return None
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def hardware(run: Run) -> str | None:
    """The machine of a run: "8x NVIDIA H100 80GB HBM3", "AMD EPYC 7R13, 4 cores"; None: unknown."""
    if run.gpu:
        return f"{run.gpu_count or run.result.get('world_size') or 1}x {run.gpu}"
    cores, name = run.environment.get("cpu_cores"), run.environment.get("cpu")
    return f"{name}, {cores} cores" if name and cores else name


# ---------------------------------------------------------------------------------- many runs


def load(paths: Iterable[Path | str], loss_key: str = "val_loss") -> tuple[list[Run], list[Reason]]:
    """All runs of these logs; a file without any is a reason."""
    runs, reasons = [], []
    for path in map(Path, paths):
        try:
            found = _parsed(path, path.stat().st_mtime_ns, loss_key)
        except OSError as error:
            reasons.append(Reason("unreadable", path.name, f"the file: {error.strerror}"))
            continue
        if not any(run.points or run.faults for run in found):
            reasons.append(Reason("not-a-log", path.name, "no measurement in it"))
        runs += found
    return runs, reasons


@lru_cache(maxsize=4096)  # each record is compared with the logs of all others
def _parsed(path: Path, _changed: int, loss_key: str) -> tuple[Run, ...]:
    return tuple(parse(path, loss_key=loss_key))


def track_of(runs: Sequence[Run]) -> str | None:
    """The track that all runs name; None if they name none or several."""
    names = {run.result.get("track") for run in runs}
    return names.pop() if len(names) == 1 and isinstance(next(iter(names)), str) else None


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its file's, numbered where a file holds several."""
    files, seen = Counter(run.path for run in runs), Counter()
    names = []
    for run in runs:
        seen[run.path] += 1
        number = f" run {seen[run.path]}" if files[run.path] > 1 else ""
        names.append(printable(Path(run.path).name) + number)
    return names


def judge(
    runs: Sequence[Run],
    track: Track,
    *,
    differs: Sequence[str] = (),
    systems_only: bool = False,
    closed: bool = False,
    one_program: bool = False,
) -> Verdict:
    """Every rule that these runs of one claim do not meet, and the numbers that follow from them.

    differs        names of sources that may differ between runs (the author names them)
    systems_only   the change leaves the mathematics alone; where the track allows it, no p is asked
    one_program    the programs were compared already
    closed         evidence of a record of ours: every log has a closing block and its program
    """
    verdict = Verdict(track, list(runs))
    names = labels(runs)
    for run, label in zip(runs, names):
        verdict.reasons += run_reasons(run, label, closed)
    if not runs:
        verdict.add("too-few-runs", "", "there is no run at all")
        return verdict
    _same_claim(verdict, names, differs, one_program)
    _same_machine(verdict, names)
    # the statistics are of the runs that ended, each once; the others are named
    copied = _independent(verdict, names)
    ended = [run for i, run in enumerate(runs) if _ended(run) and i not in copied]
    _significance(verdict, ended, systems_only)
    verdict.result = summarize(ended, track, systems_only, differs)
    return verdict


def _ended(run: Run) -> bool:
    last = run.final
    return (last is not None and math.isfinite(last.val_loss) and run.reached_total is not False
            and not (run.last_train_step and run.last_train_step > last.step))


def _same(verdict: Verdict, name: str, noun: str, values: list, names: list[str]) -> None:
    """A reason for each group of runs whose value is not that of the first run."""
    groups: dict = {}
    for value, label in zip(values, names):
        groups.setdefault(value, []).append(label)
    first, *rest = groups.items()
    for value, others in rest:
        verdict.add(name, _and_more(others),
                    f"{noun} is {_brief(value)}, {first[1][0]} has {_brief(first[0])}")


def _brief(value: object) -> str:
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text[:80]


def _same_claim(verdict: Verdict, names: list[str], differs: Sequence[str],
                one_program: bool) -> None:
    """One track, program, recipe, length and corpus; the recipe as the track fixes it."""
    runs, track = verdict.runs, verdict.track
    for run, label in zip(runs, names):
        claimed = run.result.get("track")
        its = rules.TRACKS.get(claimed)
        same_goal = its and (its.corpus, its.target) == (track.corpus, track.target)
        if claimed not in (None, track.name) and not same_goal:
            verdict.add("track-differs", label, f"its track is {claimed}, not {track.name}")
        if run.recipe is not None:
            for path, expected in track.fixed.items():
                got = recipe_field(run.recipe, path)
                if got != expected:
                    verdict.add("fixed-field", label, f"{path}: expected {expected}, got {got}")
    _same(verdict, "steps-differ", "its last step", [run.final_step for run in runs], names)
    if one_program:
        pass
    elif all(run.sources for run in runs):
        for source in sorted({name for run in runs for name in run.sources}):
            values = [run.sources[source].sha256 if source in run.sources else "absent"
                      for run in runs]
            if len(set(values)) > 1 and source in differs:
                verdict.notes.append(f"source {source} differs between runs, as named")
            else:
                _same(verdict, "source-differs", f"source {source}", values, names)
    else:
        _same(verdict, "source-differs", "its program", [run.code_sha256 for run in runs], names)
    _same(verdict, "recipe-differs", "its recipe",
          [recipe_sha256(run.recipe) for run in runs], names)
    digests = [run.result.get("data_digest") for run in runs]
    _same(verdict, "data-differs", "its corpus", digests, names)
    if track.data_digest is not None and digests[0] != track.data_digest:
        verdict.add("data-differs", names[0], f"its corpus is {_brief(digests[0])}, the track's is "
                                              f"{_brief(track.data_digest)}")


def _same_machine(verdict: Verdict, names: list[str]) -> None:
    runs, track = verdict.runs, verdict.track
    _same(verdict, "hardware-differs", "its hardware", [hardware(run) for run in runs], names)
    for run, label in zip(runs, names):
        device = run.environment.get("device") or ("cuda" if run.gpu else None)
        num = run.gpu_count or run.result.get("world_size")
        if track.device and device and device != track.device:
            verdict.add("wrong-hardware", label, f"expected {track.device}, got {device}")
        elif track.gpu and run.gpu and track.gpu not in run.gpu:
            verdict.add("wrong-hardware", label, f"expected {track.gpu}, got {run.gpu}")
        elif track.gpu_count and num and num != track.gpu_count:
            verdict.add("wrong-hardware", label, f"expected {track.gpu_count} GPUs, got {num}")
        elif track.device and device is None and run.format == "ours":
            verdict.add("wrong-hardware", label, "the log does not say its device")


def _independent(verdict: Verdict, names: list[str]) -> set[int]:
    """Runs are evidence only if they are independent and all there. Indices of the copies."""
    found = copies(verdict.runs)
    for i, (j, what) in found.items():
        verdict.add("duplicate-run", names[i], f"the same {what} as {names[j]}")
    seeds: dict[int, str] = {}
    wanted: set[int] = set()
    for i, (run, label) in enumerate(zip(verdict.runs, names)):
        seed = run.result.get("seed")
        if isinstance(seed, int):
            if seed in seeds and i not in found:
                verdict.add("same-seed", label, f"seed {seed} is that of {seeds[seed]}")
            seeds.setdefault(seed, label)
            first, num = announced(run)
            wanted |= {seed} if first is None else {first, first + num - 1}
    if wanted:
        low, high = min(wanted), max(wanted)
        absent = [str(s) for s in islice((s for s in range(low, high + 1) if s not in seeds), 3)]
        if absent:
            verdict.add("missing-run", "", f"seed {', '.join(absent)} is missing: the seeds and "
                                           f"commands of the runs say {low} to {high}")
    return set(found)


def copies(runs: Sequence[Run], others: Sequence[Run] = ()) -> dict[int, tuple[int, str]]:
    """Runs that share more than half of their clock, or of their losses, with an earlier one.

    {index in `runs`: (index of the other, "clock" or "losses")}; the other is one of `others`, if
    given. Runs of one seed may have equal losses; no two share most of their milliseconds.
    """
    found: dict[int, tuple[int, str]] = {}
    for what in ("clock", "losses"):
        index: dict[tuple, list[int]] = {}
        for i, run in enumerate(others):
            for mark in _marks(run, what):
                index.setdefault(mark, []).append(i)
        for i, run in enumerate(runs):
            marks = _marks(run, what)
            shared = Counter(j for mark in marks for j in index.get(mark, ()))
            j, num = max(shared.items(), key=lambda item: item[1], default=(0, 0))
            if 2 * num > len(marks):
                found.setdefault(i, (j, what))
            for mark in marks if not others else ():
                index.setdefault(mark, []).append(i)
    return found


def _marks(run: Run, what: str) -> set[tuple]:
    """What tells a run from others: losses or clocks with their steps."""
    pairs = [(p.step, p.val_loss, p.train_time_ms) for p in run.points if p.step > 0]
    if len(pairs) + len(run.sampled) < 3:  # too few to tell by one of them alone
        return set(pairs)
    pairs += [(-step, *both) for step, both in run.sampled.items()]
    at = 1 if what == "losses" else 2
    return {(pair[0], pair[at]) for pair in pairs if pair[at] is not None}


def _significance(verdict: Verdict, runs: list[Run], systems_only: bool) -> None:
    track = verdict.track
    if len(runs) < track.min_runs:
        verdict.add("too-few-runs", "", f"expected at least {track.min_runs} runs that ended, "
                                        f"got {len(runs)}")
    if not runs:
        return
    losses = [run.final_val_loss for run in runs]
    mean = stats.Sample.of(losses).mean
    if mean > track.target + 1e-9:  # a mean on the target to the last digit is at the target
        verdict.add("above-target", "", f"mean loss {mean:.5f}, target {track.target:g}")
    p = stats.p_below(losses, track.target)
    if track.test == "t" and not p < track.alpha:
        text = f"p = {p:.4g}, expected p < {track.alpha:g}"
        if systems_only and track.systems_exempt:
            verdict.notes.append(f"{text}; a systems-only record is exempt")
        elif len(runs) > 1 and len(set(losses)) == 1:
            verdict.add("not-significant", "", "all losses are equal: the runs are not independent")
        else:
            verdict.add("not-significant", "", text)
    if track.test == "fixed_sigma":
        value = stats.fixed_sigma_margin(losses, track.target)
        words = f"(target - mean) * sqrt(n) = {value:.5f}"
        if value < track.margin - 1e-9:
            verdict.add("not-significant", "", f"{words}, expected at least {track.margin:g}")
        else:
            verdict.notes.append(f"{words}, at least {track.margin:g} is asked")


# ---------------------------------------------------------------------------------- the numbers


def _rounded(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def summarize(
    runs: Sequence[Run], track: Track, systems_only: bool = False, differs: Sequence[str] = ()
) -> dict:
    """The part of result.json about the runs: from the logs alone, the same every time."""
    if not runs:
        return {}
    losses = [run.final_val_loss for run in runs]
    times = [run.train_time_ms for run in runs]
    loss = stats.Sample.of(losses)
    time = stats.Sample.of(times if None not in times else [math.nan])
    p = stats.p_below(losses, track.target)
    first = runs[0]
    result = {
        "track": track.name,
        "target": track.target,
        "num_runs": len(runs),
        "losses": losses,
        "val_loss": {"mean": _rounded(loss.mean, 6), "sd": _rounded(loss.sd, 6)},
        "p": _rounded(p, 3 - math.floor(math.log10(p)) if p > 0 else 0),  # four digits
        "times_ms": times,
        "train_time_ms": {"mean": _rounded(time.mean, 1), "sd": _rounded(time.sd, 1)},
        "steps": first.final_step,
        "tokens": first.tokens,
        "record": first.result.get("record"),
        "scale": first.result.get("scale"),
        "parameters": first.result.get("parameters"),
        "seeds": [run.result.get("seed") for run in runs],
        "hardware": hardware(first),
        "world_size": first.result.get("world_size") or first.gpu_count,
        "python": first.python,
        "torch": first.torch,
        "data_digest": first.result.get("data_digest"),
        "recipe_sha256": recipe_sha256(first.recipe),
        "code_sha256": first.code_sha256,
        "systems_only": systems_only,
        "differs": sorted(differs),
        "curve": mean_curve(runs),
    }
    if track.test == "fixed_sigma":
        result["margin"] = _rounded(stats.fixed_sigma_margin(losses, track.target), 6)
    return result


def mean_curve(runs: Sequence[Run]) -> dict[str, list]:
    """The mean loss and clock at every step that all runs validated."""
    at = [{point.step: point for point in run.points} for run in runs]
    steps = sorted(set.intersection(*map(set, at)))

    def mean(name: str, step: int, digits: int) -> float | None:
        values = [getattr(points[step], name) for points in at]
        return None if None in values else round(sum(values) / len(values), digits)

    return {
        "step": steps,
        "val_loss": [mean("val_loss", step, 5) for step in steps],
        "train_time_ms": [mean("train_time_ms", step, 1) for step in steps],
        "tokens": [runs[0].tokens_at(step) for step in steps],
    }


def outlook(verdict: Verdict, folder: Path = FOLDER) -> str | None:
    """How many more runs would probably pass, from the spread of these runs and of the track's."""
    track, result = verdict.track, verdict.result
    if not verdict.names() & EVIDENCE or not result:
        return None
    n, mean = result["num_runs"], result["val_loss"]["mean"]
    if mean >= track.target:
        return "no number of runs would do: the mean is not below the target"
    if track.test == "fixed_sigma":
        need = math.ceil((track.margin / (track.target - mean)) ** 2 - 1e-9)
        return f"{need - n} more runs would do if the mean stays" if need > n else None
    try:
        others = [(r["num_runs"], r["val_loss"]["sd"] or math.nan)
                  for r in history.own_records(track.name, folder)]
    except (ValueError, KeyError, TypeError):  # a broken record of the track: named by check
        others = []
    sd = stats.pooled_sd([(n, result["val_loss"]["sd"] or math.nan), *others])
    if not math.isfinite(sd) or sd == 0:
        return "the spread is not known yet: add a run or two with other seeds"
    need = stats.runs_needed(mean, sd, track.target, track.alpha)
    if need is None:
        return (f"more than {stats.MAX_RUNS} runs would be needed: the mean is "
                f"{track.target - mean:.5f} below the target, one run scatters by {sd:.5f}")
    need = max(need, track.min_runs)
    if need <= n:
        return f"{n} runs pass with a chance above {stats.POWER:.0%} at this mean: one more may do"
    return (f"about {need - n} more run{'s' * (need - n > 1)} ({need} in all) would pass with a "
            f"chance of {stats.POWER:.0%}, if mean {mean:.4f} and spread {sd:.5f} stay")


# ---------------------------------------------------------------------------------- a folder

OWN_KEYS = ("name", "kind", "by", "prior")  # of result.json, by the author; the rest is of the logs


def record_folders(root: Path = FOLDER) -> list[Path]:
    return [path for name in rules.TRACKS for path in sorted((root / name).glob("*"))
            if path.is_dir() and not path.name.startswith((".", "_"))]


def folder_logs(folder: Path, part: str = "logs") -> list[Path]:
    """The logs of a record folder: those of its runs, or those of its race (`race`)."""
    return sorted(path for path in (folder / part).glob("*") if path.is_file())


def check_folder(folder: Path, root: Path = FOLDER) -> Verdict:
    """A record folder against its own logs: every number re-derived, every text up to date."""
    where = folder.name
    verdict = Verdict(rules.TRACKS["short"], [])
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink():
            verdict.add("broken-folder", where, f"{path.relative_to(folder)}: expected a plain "
                        "file, found a symbolic link")
    try:
        if verdict.reasons:
            return verdict
        claimed = read_result(folder)
    except ValueError as error:
        verdict.add("broken-folder", where, str(error))
        return verdict
    track = rules.TRACKS[claimed["track"]]
    runs, unread = load(folder_logs(folder))
    verdict = judge(runs, track, differs=claimed["differs"], systems_only=claimed["systems_only"],
                    closed=True)
    verdict.reasons += unread
    for name in ("README.md", "curves.png", "curves.svg"):
        if not (folder / name).exists():
            verdict.add("broken-folder", where, f"{name} is missing")
    place = f"{folder.parent.name}/{where.removeprefix('.').removesuffix('.tmp')}"
    expected = f"{track.name}/{claimed['date']}_{claimed['name']}"
    if place != expected:
        verdict.add("broken-folder", where, f"expected {expected}, got {place}")
    if not runs:
        return verdict
    again = {key: claimed[key] for key in OWN_KEYS} | verdict.result
    again |= {"date": record_date(runs), "logs": log_digests(runs),
              "race": race_facts(folder_logs(folder, "race"), runs, verdict)}
    try:
        ahead_of_prior(verdict, again, root)
        not_reused(verdict, again, root)
    except ValueError as error:  # another record's folder is broken
        verdict.add("broken-folder", where, str(error))
    for key in sorted(set(again) | set(claimed)):
        if again.get(key) != claimed.get(key):
            verdict.add("stale-result", where, f"{key}: result.json has "
                        f"{_brief(claimed.get(key))}, the logs give {_brief(again.get(key))}")
    verdict.result = again
    if (folder / "README.md").is_file():
        try:
            text = history.read_text(folder / "README.md")
        except ValueError as error:
            verdict.add("broken-folder", where, f"README.md: {error}")
            return verdict
        if readme.numbers(claimed) not in text:
            verdict.add("stale-readme", where, "the numbers in README.md are not those of "
                        "result.json; `python -m records table --markdown` writes them again")
        for question in readme.unanswered(text):
            verdict.add("unwritten", where, f"README.md: {question}")
    return verdict


def record_date(runs: Sequence[Run]) -> str | None:
    """The day of the last run, from the logs."""
    days = [run.environment.get("started", "")[:10] for run in runs]
    return max((day for day in days if re.fullmatch(r"\d{4}-\d\d-\d\d", day)), default=None)


def log_digests(runs: Sequence[Run]) -> dict[str, str | None]:
    return {Path(run.path).name.removesuffix(".gz"): run.digest for run in runs}


def race_facts(logs: Sequence[Path], runs: Sequence[Run], verdict: Verdict,
               names: Sequence[str] | None = None) -> dict | None:
    """What the logs of a race say of its sides; None without one.

    names   of the logs in the record's folder, `a_...` and `b_...`; default: those of the files
    """
    if not logs:
        return None
    sides = {}
    every, unread = load(logs)
    verdict.reasons += unread
    names = names or [Path(log).name for log in logs]
    if len(every) != len(names):
        verdict.add("no-race", "", "expected one run in each log of the race")
        return None
    for run, label in zip(every, names):
        verdict.reasons += run_reasons(run, label, closed=True)
    for i, (j, what) in copies(every).items():
        if what == "clock":
            verdict.add("duplicate-run", names[i], f"the same clock as {names[j]}")
    _same(verdict, "hardware-differs", "its hardware",
          [hardware(run) for run in [runs[0], *every]], [Path(runs[0].path).name, *names])
    for side in "ab":
        here = [(run, label) for run, label in zip(every, names) if label.startswith(side)]
        for noun in ("code_sha256", "recipe_sha256"):
            _same(verdict, "source-differs", f"its {noun}",
                  [_identity(run)[noun] for run, _ in here], [label for _, label in here])
        sides[side] = (_identity(here[0][0]) if here else {}) | {
            "losses": [run.final_val_loss for run, _ in here],
            "times_ms": [run.train_time_ms for run, _ in here],
            "logs": {label: run.digest for run, label in here}}
    seeds = [[run.result.get("seed") for run, label in zip(every, names) if label.startswith(side)]
             for side in "ab"]
    if seeds[0] != seeds[1] or len(seeds[0]) < 2:
        verdict.add("no-race", "", "expected two runs of each side or more, with the same seeds; A "
                                   f"has seeds {seeds[0]}, B has {seeds[1]}")
    return sides


def _identity(run: Run) -> dict[str, str | None]:
    return {"code_sha256": run.code_sha256, "recipe_sha256": recipe_sha256(run.recipe)}


def not_reused(verdict: Verdict, claimed: dict, root: Path = FOLDER) -> None:
    """No run of this record is evidence for another record too, as it is or with changed losses."""
    names = labels(verdict.runs)
    for folder in record_folders(root):
        own = f"{verdict.track.name}/{claimed['date']}_{claimed['name']}"
        if f"{folder.parent.name}/{folder.name}" == own or folder.is_symlink():
            continue
        others = load(folder_logs(folder))[0]
        theirs = labels(others)
        for i, (j, what) in copies(verdict.runs, others).items():
            # one seed may give equal losses again, in another run
            if what == "clock" or verdict.runs[i].digest == others[j].digest:
                verdict.add("duplicate-run", names[i], f"the same {what} as {theirs[j]} of the "
                                                       f"record {folder.name.partition('_')[2]}")


def record_to_beat(track: Track, name: str, date: str, root: Path = FOLDER) -> dict | None:
    """The record before a record of this name and day: the best by the track's metric, or, where
    that is time, the newest, because times of other machines do not rank."""
    records = {r["name"]: r for r in history.own_records(track.name, root)
               if r["kind"] == "record"}

    def line(record: dict) -> list[str]:
        names = [record["name"]]
        while (prior := records.get(names[-1], record)["prior"]) and prior not in names:
            names.append(prior)
        return names

    before = [r for r in records.values()
              if r["name"] != name and r["date"] <= date and name not in line(r)]
    if track.metric[0] == "train_time_ms":
        return max(before, key=lambda r: (r["date"], len(line(r))), default=None)
    return before[0] if before else None


def ahead_of_prior(verdict: Verdict, claimed: dict, root: Path = FOLDER) -> None:
    """A record is ahead of the one before it: by tokens or steps outright, by time in a race."""
    track, result, where = verdict.track, verdict.result, claimed["name"]
    if claimed["kind"] == "baseline" or not result or not claimed["date"]:
        return
    prior = record_to_beat(track, where, claimed["date"], root)
    name = prior and prior["name"]
    if claimed["prior"] != name:
        verdict.add("not-better", where, f"its prior is {claimed['prior'] or 'none'}, the record "
                                         f"before it is {name or 'none'}")
    if prior is None:
        return
    for metric in track.metric:
        if metric == "train_time_ms":
            _won_race(verdict, claimed["race"], result, prior)
            return
        if result[metric] is None:
            return  # named already: the log does not say it
        ours, theirs = history.metric_value(result, metric), history.metric_value(prior, metric)
        if ours > theirs:
            verdict.add("not-better", where,
                        f"{history.amount(ours, metric)}, the record before it ({name}) needs "
                        f"{history.amount(theirs, metric)}")
        if ours != theirs:
            return
    verdict.add("not-better", where, f"no better than {name} in any metric of the track")


def _won_race(verdict: Verdict, race: dict | None, result: dict, prior: dict) -> None:
    hint = f"python -m records race {prior['folder']} ."
    keys = ("code_sha256", "recipe_sha256")
    if not race:
        verdict.add("no-race", "", f"times are compared side by side only: {hint}; then "
                                   "add --race its race.json")
    elif any(reason.name == "no-race" for reason in verdict.reasons):
        return
    elif [[race[side][key] for key in keys] for side in "ab"] != [
            [record[key] for key in keys] for record in (prior, result)]:
        verdict.add("no-race", "", "the race was not between the prior record's program (A) and "
                                   f"this one (B), each with its recipe: {hint}")
    elif not stats.ratio(race["a"]["times_ms"], race["b"]["times_ms"]).high < 1:
        verdict.add("not-better", "", "the race against the prior record does not show less time")
