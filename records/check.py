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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from records import history, readme, rules, stats
from records.history import FOLDER
from records.log import Run, parse
from records.rules import Track

# the names of all reasons, with the rule behind each
RULES = {
    "not-a-log": "the file holds at least one measurement",
    "unreadable": "every result line can be read, nothing in the log contradicts itself",
    "edited": "the digest of the closing block fits the log",
    "incomplete": "the run ended: last step validated, finite loss, status complete",
    "resumed": "the run was made in one go",
    "no-digest": "the log has a closing block (public logs have none)",
    "no-source": "the program is in the log",
    "source-differs": "all runs are of one program, but for differences that are named",
    "recipe-differs": "all runs are of one recipe",
    "steps-differ": "all runs took the same number of steps",
    "track-differs": "all runs are of the track they are entered for, or of one with its target",
    "data-differs": "all runs used the same corpus, the one of the track",
    "hardware-differs": "all runs were made on the same hardware",
    "wrong-hardware": "the hardware is that of the track",
    "fixed-field": "the recipe has the values that the track fixes",
    "target-open": "the target of the track is fixed",
    "duplicate-run": "no run is counted twice",
    "same-seed": "every run has its own seed",
    "too-few-runs": "there are as many runs as the track asks for",
    "above-target": "the mean loss is at or below the target",
    "not-significant": "the losses are below the target beyond chance, as the track asks",
    "not-better": "the record is ahead of the track's record before it",
    "no-race": "a record by time was raced against the one before it on the same machine",
    "broken-folder": "no file of a record is missing, none in sources/ is without a record",
    "stale-result": "result.json holds the numbers that follow from the logs",
    "stale-readme": "the numbers in the record's README are those of result.json",
    "unwritten": "the author answered the questions of the README",
    "stale-table": "the tables in README.md are those that follow from the data",
}


@dataclass(frozen=True)
class Reason:
    name: str
    where: str
    text: str

    def __post_init__(self) -> None:
        assert self.name in RULES, self.name

    def __str__(self) -> str:
        return ": ".join(part for part in (self.name, self.where, self.text) if part)


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


def run_reasons(run: Run, label: str) -> list[Reason]:
    """The faults of one run as evidence for any claim."""
    found = [Reason("edited", label, text) for text in run.edits]
    found += [Reason("unreadable", label, text) for text in run.faults]
    if run.why_incomplete and not run.edits:
        found.append(Reason("incomplete", label, run.why_incomplete))
    if run.result.get("resumed") is True:
        found.append(Reason("resumed", label, "this run was resumed from a checkpoint"))
    if run.format not in ("ours", ""):
        found.append(Reason("no-digest", label,
                            "a public log: nothing in it shows whether it was edited"))
    if not run.sources and run.code_sha256 is None:
        found.append(Reason("no-source", label, "the log does not hold the program"))
    return found


def arithmetic(run: Run) -> str | None:
    """A contradiction between the recipe of a log and the steps and tokens that it claims."""
    steps = run.recipe.get("num_iterations")
    if not run.reached_total:
        return None
    if steps is not None and run.final_step != steps:
        return f"the recipe has {steps} steps, the run {run.final_step}"
    tokens = run.tokens_at(run.final_step)
    if tokens is not None and run.tokens != tokens:
        return f"{run.final_step} steps of its recipe are {tokens} tokens, it claims {run.tokens}"
    return None


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


def load(paths: Sequence[Path | str]) -> tuple[list[Run], list[Reason]]:
    """All runs of these logs; a file without any is a reason."""
    runs, reasons = [], []
    for path in paths:
        found = parse(path)
        if not any(run.points or run.faults for run in found):
            reasons.append(Reason("not-a-log", Path(path).name, "no measurement in it"))
        runs += found
    return runs, reasons


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
        names.append(Path(run.path).name + number)
    return names


def judge(
    runs: Sequence[Run],
    track: Track,
    *,
    differs: Sequence[str] = (),
    systems_only: bool = False,
) -> Verdict:
    """Every rule that these runs of one claim do not meet, and the numbers that follow from them.

    differs        names of sources that may differ between runs (the author names them)
    systems_only   the change leaves the mathematics alone; where the track allows it, no p is asked
    """
    verdict = Verdict(track, list(runs))
    names = labels(runs)
    for run, label in zip(runs, names):
        verdict.reasons += run_reasons(run, label)
    if not runs:
        verdict.add("too-few-runs", "", "there is no run at all")
        return verdict
    _same_claim(verdict, names, differs)
    _same_machine(verdict, names)
    _independent(verdict, names)
    # the statistics are of the runs that ended; the others were named above
    ended = [run for run in runs if _ended(run)]
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


def _same_claim(verdict: Verdict, names: list[str], differs: Sequence[str]) -> None:
    """One track, program, recipe, length and corpus; the recipe as the track fixes it."""
    runs, track = verdict.runs, verdict.track
    for run, label in zip(runs, names):
        claimed = run.result.get("track")
        if claimed is not None and not _same_game(rules.TRACKS.get(claimed), track):
            verdict.add("track-differs", label, f"its track is {claimed}, not {track.name}")
        if run.recipe is not None:
            for path, expected in track.fixed.items():
                got = recipe_field(run.recipe, path)
                if got != expected:
                    verdict.add("fixed-field", label, f"{path}: expected {expected}, got {got}")
            problem = arithmetic(run)
            if problem:
                verdict.add("unreadable", label, problem)
    _same(verdict, "steps-differ", "its last step", [run.final_step for run in runs], names)
    if all(run.sources for run in runs):
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


def _same_game(claimed: Track | None, track: Track) -> bool:
    """A run for one track may be entered for another with the same corpus and target."""
    return claimed is not None and (claimed.name == track.name or (
        claimed.corpus == track.corpus and claimed.target == track.target is not None))


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


def _independent(verdict: Verdict, names: list[str]) -> None:
    """Runs are evidence only if they are independent: no copies, no seed twice."""
    curves: dict[tuple, str] = {}
    seeds: dict[object, str] = {}
    for run, label in zip(verdict.runs, names):
        losses = tuple((p.step, p.val_loss) for p in run.points if p.step > 0)
        if len(losses) < 3:  # too few to tell runs apart by loss alone
            losses += tuple(p.train_time_ms for p in run.points)
        copy = losses and curves.get(losses)
        if copy:
            verdict.add("duplicate-run", label, f"the same losses at every step as {copy}")
        curves.setdefault(losses, label)
        seed = run.result.get("seed")
        if seed is not None and seed in seeds and not copy:
            verdict.add("same-seed", label, f"seed {seed} is that of {seeds[seed]}")
        seeds.setdefault(seed, label)


def _significance(verdict: Verdict, runs: list[Run], systems_only: bool) -> None:
    track = verdict.track
    if track.target is None:
        verdict.add("target-open", track.name, "the target of this track is not yet fixed")
    if len(runs) < track.min_runs:
        verdict.add("too-few-runs", "", f"expected at least {track.min_runs} runs that ended, "
                                        f"got {len(runs)}")
    if not runs or track.target is None:
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
        if value < track.margin - 1e-9:
            verdict.add("not-significant", "", f"(target - mean) * sqrt(n) = {value:.5f}, expected "
                                               f"at least {track.margin:g}")


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
    p = stats.p_below(losses, track.target) if track.target is not None else math.nan
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
    if track.test == "fixed_sigma" and track.target is not None:
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
    short = verdict.names() & {"not-significant", "too-few-runs", "above-target"}
    if track.target is None or track.test == "mean" or not result or not short:
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

OWN_KEYS = ("name", "kind", "date", "by", "prior", "race")  # of result.json, not from the logs


def record_folders(root: Path = FOLDER) -> list[Path]:
    return [path for name in rules.TRACKS for path in sorted((root / name).glob("*"))
            if path.is_dir() and not path.name.startswith((".", "_"))]


def read_result(folder: Path) -> dict:
    """result.json of a record folder; ValueError names its fault."""
    path = folder / "result.json"
    try:
        result = json.loads(history.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the result of a record: {error}") from None
    if not isinstance(result, dict) or result.get("track") not in rules.TRACKS:
        raise ValueError(f"{path}: expected a result of one of {', '.join(rules.TRACKS)}")
    for key, kind in (("name", str), ("kind", str), ("date", str), ("by", list), ("differs", list),
                      ("losses", list), ("val_loss", dict), ("train_time_ms", dict)):
        if not isinstance(result.get(key), kind):
            raise ValueError(f"{path}: {key}: expected a {kind.__name__}, got {result.get(key)!r}")
    return result


def folder_logs(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "logs").glob("*") if path.is_file())


def check_folder(folder: Path, root: Path = FOLDER) -> Verdict:
    """A record folder against its own logs: every number re-derived, every text up to date."""
    where = folder.name
    try:
        claimed = read_result(folder)
    except ValueError as error:
        verdict = Verdict(rules.TRACKS["short"], [])
        verdict.add("broken-folder", where, str(error))
        return verdict
    track = rules.TRACKS[claimed["track"]]
    runs, unread = load(folder_logs(folder))
    verdict = judge(runs, track, differs=claimed["differs"],
                    systems_only=claimed.get("systems_only") is True)
    verdict.reasons += unread
    for name in ("README.md", "curves.png", "curves.svg"):
        if not (folder / name).exists():
            verdict.add("broken-folder", where, f"{name} is missing")
    place = f"{folder.parent.name}/{where.removeprefix('.').removesuffix('.tmp')}"
    expected = f"{track.name}/{claimed['date']}_{claimed['name']}"
    if place != expected:
        verdict.add("broken-folder", where, f"expected {expected}, got {place}")
    if claimed["kind"] not in ("record", "baseline"):
        verdict.add("broken-folder", where,
                    f"kind: expected record or baseline, got {claimed['kind']!r}")
    if not runs:
        return verdict
    try:
        ahead_of_prior(verdict, claimed, root)
        not_reused(verdict, claimed, root)
    except ValueError as error:  # another record's folder is broken
        verdict.add("broken-folder", where, str(error))
    again = {key: claimed.get(key) for key in OWN_KEYS} | verdict.result
    again["logs"] = log_digests(runs)
    for key in sorted(set(again) | set(claimed)):
        if again.get(key) != claimed.get(key):
            verdict.add("stale-result", where, f"{key}: result.json has "
                        f"{_brief(claimed.get(key))}, the logs give {_brief(again.get(key))}")
    verdict.result = again
    if (folder / "README.md").is_file():
        try:
            text, numbers = history.read_text(folder / "README.md"), readme.numbers(claimed)
        except (ValueError, KeyError, TypeError) as error:
            verdict.add("broken-folder", where, f"README.md and result.json: {error!r}")
            return verdict
        if numbers not in text:
            verdict.add("stale-readme", where, "the numbers in README.md are not those of "
                        "result.json; `python -m records table --markdown` writes them again")
        for question in readme.unanswered(text):
            verdict.add("unwritten", where, f"README.md: {question}")
    return verdict


def log_digests(runs: Sequence[Run]) -> dict[str, str | None]:
    return {Path(run.path).name.removesuffix(".gz"): run.digest for run in runs}


def not_reused(verdict: Verdict, claimed: dict, root: Path = FOLDER) -> None:
    """No log of this record is evidence for another record too."""
    digests = {run.digest: Path(run.path).name for run in verdict.runs if run.digest}
    for other in history.own_records(None, root):
        if other["name"] != claimed["name"]:
            for name, digest in other["logs"].items():
                if digest in digests:
                    verdict.add("duplicate-run", digests[digest],
                                f"is {name} of the record {other['name']}")


def ahead_of_prior(verdict: Verdict, claimed: dict, root: Path = FOLDER) -> None:
    """A record is ahead of the one before it: by tokens or steps outright, by time in a race."""
    if claimed.get("kind") == "baseline" or not verdict.result:
        return
    name = claimed.get("prior")
    track, result = verdict.track, verdict.result
    others = [r for r in history.own_records(track.name, root)
              if r["name"] != claimed["name"] and r["kind"] == "record"]
    where = claimed.get("name") or ""
    if name is None:
        earlier = [r for r in others if claimed["date"] and r["date"] < claimed["date"]]
        if earlier:
            verdict.add("not-better", where, f"it names no record before it; {earlier[0]['name']} "
                                             f"is of {earlier[0]['date']}")
        return
    prior = next((r for r in others if r["name"] == name), None)
    if prior is None:
        verdict.add("not-better", where, f"its prior record {name} is not in the table")
        return
    for metric in track.metric:
        if metric == "train_time_ms":
            _won_race(verdict, claimed.get("race"), result, prior)
            return
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
    elif [[race.get(side, {}).get(key) for key in keys] for side in "ab"] != [
            [record[key] for key in keys] for record in (prior, result)]:
        verdict.add("no-race", "", "the race was not between the prior record's program (A) and "
                                   f"this one (B), each with its recipe: {hint}")
    elif not stats.ratio(race["a"]["times_ms"], race["b"]["times_ms"]).high < 1:
        verdict.add("not-better", "", "the race against the prior record does not show less time")
