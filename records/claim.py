"""A claim beside its logs: runs in groups, and each number of a README held to them.

Runs are never pooled over folders, programs, lengths or machines. Programs are compared without
comments, docstrings, type hints, seed and run_id.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from records import check, history, rules, stats
from records.check import Verdict
from records.log import parse
from records.parse import Run
from records.reproduce import embedded_code

Named = list[tuple[str, Verdict]]


PROGRAM_CAP = 1 << 20  # characters; the largest public program has 0.2 million


# --- programs -------------------------------------------------------------------------------------

class _Plain(ast.NodeTransformer):
    """Drops what does not change what a program computes."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        return ast.Assign([node.target], node.value, lineno=0) if node.value else ast.Pass()

    def visit_Expr(self, node):
        return ast.Pass() if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Assign(self, node):
        if {getattr(t, "id", getattr(t, "attr", "")) for t in node.targets} & {"seed", "run_id"}:
            node.value = ast.Constant("one for each run")
        return self.generic_visit(node)

    def visit_Call(self, node):
        if getattr(node.func, "attr", "").startswith("manual_seed"):
            node.args = []
        return self.generic_visit(node)


def plain(text: str) -> str:
    """A program without comments, docstrings, type hints and seeds; as it is, if no Python."""
    if len(text) > PROGRAM_CAP:
        return text
    try:
        lines = ast.unparse(_Plain().visit(ast.parse(text))).splitlines()
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    return "\n".join(line for line in lines if line.strip() != "pass")


_PROGRAMS: dict[str | None, tuple[str, str]] = {None: ("", "")}  # by sha256: each read once


def program(run: Run) -> tuple[str, str]:
    """The program of a run, as it is and plain; empty where the log holds none."""
    if run.code_sha256 not in _PROGRAMS:
        texts = [(embedded_code(run.path) or b"").decode(errors="replace")]
        if run.format == "ours":
            sources = parse(run.path, keep_sources=True)[0].sources.values()
            texts = [f"# {source.name}\n{source.text or ''}" for source in sources]
        _PROGRAMS[run.code_sha256] = "\n".join(texts), "\n".join(map(plain, texts))
    return _PROGRAMS[run.code_sha256]


def difference(a: str, b: str, most: int = 5) -> list[str]:
    """Lines of program b that are not those of a; first those that differ in numbers alone."""
    before, after, found = a[:PROGRAM_CAP].splitlines(), b[:PROGRAM_CAP].splitlines(), []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, before, after).get_opcodes():
        if kind == "replace" and j - i == m - k:
            found += [(_words(x) != _words(y), f"{y.strip()}, not {x.strip()}")
                      for x, y in zip(before[i:j], after[k:m])]
        elif kind != "equal":
            found += [(True, f"without {x.strip()}") for x in before[i:j]]
            found += [(True, f"with {y.strip()}") for y in after[k:m]]
    found = [text[:110] for _, text in sorted(found, key=lambda pair: pair[0])]
    return found[:most] + [f"and {len(found) - most} more lines"] * (len(found) > most)


def _words(line: str) -> str:
    return re.sub(r"\d+(?:\.\d*)?(?:e-?\d+)?", "0", line)


# --- groups ---------------------------------------------------------------------------------------

def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one folder, program, number of steps and machine, by a name for each."""
    codes: dict[tuple, dict[str | None, list[Run]]] = {}
    for run in runs:
        key = Path(run.path).parent, run.final and run.final.total, check.hardware(run)
        codes.setdefault(key, {}).setdefault(run.code_sha256, []).append(run)
    found: dict[tuple, list[Run]] = {}
    for key, of_code in codes.items():
        for group in of_code.values():
            text = program(group[0])[1] if len(of_code) > 1 else ""
            found.setdefault((*key, text), []).extend(group)
    parts = Counter(key[0] for key in found)
    named: dict[str, list[Run]] = {}
    for (folder, *_), group in found.items():
        name = folder.name
        if parts[folder] > 1:
            last = group[0].final
            name += f" ({len(group)} runs as {Path(group[0].path).name}"
            name += f", {last.total} steps)" if last and last.total else ")"
        named[name if name not in named else f"{folder.parent.name}/{name}"] = group
    return named


def at_step(run: Run, step: int) -> Run:
    """The run as if it had ended with this step; without its validation it is no run that ended."""
    points = [point for point in run.points if point.step <= step]
    if points and points[-1].step == step:
        points[-1] = replace(points[-1], total=step)
    return replace(run, points=points, last_train_step=None)


def earliest(runs: Sequence[Run], track: rules.Track) -> int | None:
    """The first step validated by all runs at which the rule of the steps track is met."""
    losses = [{point.step: point.val_loss for point in run.points} for run in runs]
    for step in sorted(set.intersection(*map(set, losses))):
        values = [of_run[step] for of_run in losses]
        if stats.fixed_sigma_margin(values, track.target) >= track.margin - 1e-9:
            return step
    return None


def judge(paths: Iterable[Path], track: rules.Track, *, at: int | None = None,
          loss_key: str = "val_loss", text: str = "", **options) -> Named:
    """A verdict for each group of the runs in these logs, and last one on what a text claims."""
    runs, unread = check.load(paths, loss_key)
    found: Named = []
    for name, group in groups(runs).items():
        used = group if at is None else [at_step(run, at) for run in group]
        verdict = check.judge(used, track, one_program=True, **options)
        if "baseline" in name.lower():  # what a record is compared with need not be one
            verdict.notes += [str(r) for r in verdict.reasons if r.name in check.EVIDENCE]
            verdict.reasons = [r for r in verdict.reasons if r.name not in check.EVIDENCE]
        one_of = {run.code_sha256: run for run in group}
        (usual, _), *others = Counter(run.code_sha256 for run in group).most_common(4)
        verdict.notes += [f"{num} of {len(group)} runs, in what changes nothing: " + "; ".join(
            difference(program(one_of[usual])[0], program(one_of[code])[0], 3))
            for code, num in others]
        if track.test == "fixed_sigma" and (first := earliest(group, track)) is not None:
            verdict.notes.append(f"meets the rule first at step {first}, of those that all its "
                                 "runs validated")
        if found:
            verdict.notes += _beside(*found[0], verdict)
        found.append((name, verdict))
    rest = Verdict(track, [])
    for reason in unread:  # a requirements.txt is no fault of a claim
        if found and reason.name == "not-a-log":
            rest.notes.append(f"passed over: {reason}")
        else:
            rest.reasons.append(reason)
    for status, words in answers(text, found):
        (rest.notes.append if status == "follows" else
         lambda line: rest.add("not-derived", "", line))(f"{status}: {words}")
    return [*found, ("the claim" if text else "other files", rest)] if text or unread else found


def _beside(name: str, first: Verdict, other: Verdict) -> list[str]:
    """How a group differs from the first: program, and on the same machine time and loss."""
    a, b = first.runs[0], other.runs[0]
    lines = []
    changes = []
    if a.code_sha256 != b.code_sha256:
        changes = difference(program(a)[1], program(b)[1])
    if changes:
        lines.append(f"{len(other.runs)} runs of another program than {name}: "
                     + "; ".join(changes))
    if first.result and other.result and check.hardware(a) == check.hardware(b):
        sides = [{"times_ms": v.result["times_ms"], "losses": v.result["losses"]}
                 for v in (first, other)]
        if all(None not in side["times_ms"] and len(side["losses"]) > 1 for side in sides):
            time = stats.ratio(*(side["times_ms"] for side in sides))
            loss = stats.difference(*(side["losses"] for side in sides))
            lines.append(f"beside {name}: time x {time.value:.4f} ({time.low:.4f} to "
                         f"{time.high:.4f}), loss {loss.value:+.4f} ({loss.low:+.4f} to "
                         f"{loss.high:+.4f}), 95% intervals")
    return lines


# --- what a text claims ---------------------------------------------------------------------------

MOST = 200  # numbers of one kind that a text may claim; the rest is not read
_NUMBER = r"(\d[\d,]{0,14}(?:\.\d{1,12})?(?:[eE]-?\d{1,2})?|\.\d{1,12})"
CLAIMS = {
    "p": rf"(?i)\bp(?:[- ]?value)?\s*[=:≈]\s*{_NUMBER}",
    "n": rf"(?i)\bn\s*=\s*{_NUMBER}|\b{_NUMBER} (?:runs|logs|seeds|trials)\b",
    "mean loss": r"(?i)\b(?:mean|average|avg)\b[^\n\d]{0,40}?\b(\d\.\d{3,6})\b"
                 r"|\(tensor\([\d.]+\), tensor\((\d\.\d{3,6})\)\)",
    "steps": rf"(?i)\b{_NUMBER} (?:steps|iterations)\b",
    "time": rf"(?i)\btimes?\b[^\n\d]{{0,40}}?{_NUMBER} ?(ms|s|sec|seconds|min|minutes)\b"
            r"|\(tensor\([\d.]+\), tensor\((\d\d+\.\d+)\)\)",
}
_LIST = re.compile(r"(?i)\b(\w*(?:loss|acc)\w*)\s*=\s*\[([\d.,\s]+)\]")
_SECONDS = {"ms": 1e-3, "min": 60.0, "minutes": 60.0}


def answers(text: str, found: Named) -> list[tuple[str, str]]:
    """(follows, does not follow or cannot be derived; the sentence) for each number claimed."""
    known = {name: _numbers(v.result) for name, v in found if v.result}
    early = {int(float(m[1].replace(",", "")))
             for m in islice(re.finditer(CLAIMS["steps"], text), MOST)}
    for name, v in found:  # claims of the steps track are often of an earlier step
        for step in early if v.track.test == "fixed_sigma" else ():
            runs = [at_step(run, step) for run in v.runs]
            if step != v.result.get("steps") and all(run.final_step == step for run in runs):
                known[f"{name} at step {step}"] = _numbers(check.summarize(runs, v.track))
    said: list[tuple[str, str]] = []
    for name, body in (match.groups() for match in islice(_LIST.finditer(text), MOST)):
        listed = re.findall(r"\d{1,6}(?:\.\d{1,12})?", body)[:MOST]
        left = Counter(f"{loss:.6f}" for _, v in found for loss in v.result.get("losses", ()))
        absent = [word for word in listed if not _take(left, word)]
        why = f": {len(absent)} are the final loss of no log: {', '.join(absent[:5])}"
        said.append(("does not follow" if absent else "follows",
                     f"{name}, {len(listed)} numbers" + why * bool(absent)))
        if found and listed:
            target = found[0][1].track.target
            known[f"its list {name}"] = _of_list([float(word) for word in listed], target)
    for kind, pattern in CLAIMS.items():
        claims = islice(re.finditer(pattern, text), MOST)
        for match in dict.fromkeys(m.groups() for m in claims):
            word, *unit = [part for part in match if part]
            digits = word.replace(",", "").rstrip(".")
            scale = _SECONDS.get(unit[0], 1.0) if unit else 1.0
            mantissa, _, power = digits.lower().partition("e")
            half = 0.5 * 10 ** (int(power or 0) - len(mantissa.partition(".")[2])) * scale
            value = float(digits) * scale
            values = {name: numbers[kind] for name, numbers in known.items()
                      if numbers.get(kind) is not None}
            fits = [name for name, v in values.items() if abs(v - value) <= half + 1e-6 * value]
            of_logs = [name for name in fits if not name.startswith("its list ")]
            if not values:
                said.append(("cannot be derived", f"{kind} {word}"))
            elif of_logs:
                said.append(("follows", f"{kind} {word}, from {', '.join(of_logs)}"))
            else:
                others = ", ".join(f"{n} gives {v:.6g}" for n, v in values.items())
                said.append(("does not follow", f"{kind} {word}: {others}"))
    return said


def _numbers(result: dict) -> dict[str, float | None]:
    """What the result of a group gives for each kind of claim; seconds for time."""
    time = result["train_time_ms"]["mean"]
    return _of_list(result["losses"], result["target"]) | {
        "time": time and time / 1000, "steps": result["steps"]}


def _of_list(losses: Sequence[float], target: float) -> dict[str, float | None]:
    p = stats.p_below(losses, target)
    return {"n": len(losses), "mean loss": stats.Sample.of(losses).mean,
            "p": None if math.isnan(p) else p}


def _take(left: Counter, word: str) -> bool:
    """Take one loss that rounds to this word."""
    digits = len(word.partition(".")[2])
    loss = next((k for k, num in left.items() if num and f"{float(k):.{digits}f}" == word), None)
    if loss is not None:
        left[loss] -= 1
    return loss is not None


# --- the archive of public records ----------------------------------------------------------------

def audit(archive: Path, root: Path) -> str:
    """records/AUDIT.md: folders of a clone and rows of the history, each held to its logs."""
    lines = ["# Audit of the public records", "",
             "Written by `python -m records audit ARCHIVE`: what follows from the logs, and what "
             "does not."]
    for track in rules.TRACKS.values():
        if not track.archive:
            continue
        place = archive / track.archive
        lines += ["", f"## {track.name}", ""]
        for folder in submissions(place):
            readme = folder / "README.md"
            text = history.read_text(readme) if readme.is_file() else ""
            for name, verdict in judge(log_files(folder), track, text=text):
                result, notes = verdict.result, [*verdict.reasons, *verdict.notes]
                numbers = (f"n = {result['num_runs']}, mean {result['val_loss']['mean']:.5f}, "
                           f"p = {result['p']}" if result else "")
                lines.append(f"- {folder.relative_to(place)}: {name}: {numbers}")
                lines += [f"  - {note}" for note in check.grouped(
                    [n for n in notes if isinstance(n, check.Reason)])]
                lines += [f"  - {note}" for note in notes if isinstance(note, str)]
        for record in history.public_records(root):
            if record["track"] == track.name:
                lines += [f"- #{record['number']} ({record['date']}): {fault}"
                          for path in record["log_paths"]
                          for fault in row_faults(archive.parent / path, track, record)]
    return "\n".join(lines) + "\n"


def evidence(archive: Path, record: dict) -> dict | None:
    """What the runs beside a row's linked log say: n, mean, sd and p; None without that log.

    The runs are the group with the log; for a link to a folder, its largest group.
    """
    for log in (archive.parent / path for path in record["log_paths"]):
        folder = log if log.is_dir() else log.parent
        found = [v for _, v in judge(log_files(folder), rules.TRACKS[record["track"]])
                 if v.result and (log == folder or str(log) in {run.path for run in v.runs})]
        if found:
            result = max(found, key=lambda verdict: len(verdict.runs)).result
            loss, time = result["val_loss"], result["train_time_ms"]
            return {"num_runs": result["num_runs"], "val_loss": loss["mean"],
                    "val_loss_sd": loss["sd"], "p": result["p"], "train_time_ms": time["mean"],
                    "train_time_ms_sd": time["sd"]}
    return None


def renew_history(archive: Path, root: Path) -> Path:
    """Write the evidence of every row again whose log is in the archive."""
    path = root / "data" / "history.json"
    history_ = json.loads(path.read_text())
    rows = [row | {"evidence": evidence(archive, row) or row["evidence"]}
            for row in history_.pop("records")]
    head = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in history_.items()]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    history.write(path, ("{\n" + ",\n".join(head) + f',\n"records": [\n{lines}\n]\n}}\n').encode())
    return path


def submissions(place: Path) -> list[Path]:
    """The folders of a track in the archive, those below `results` one by one."""
    return sorted(folder for pattern in ("*", "results/*") for folder in place.glob(pattern)
                  if folder.is_dir() and folder.name != "results" and log_files(folder))


def log_files(folder: Path) -> list[Path]:
    suffixes = (".txt", ".log", ".gz", ".stdout", ".out")
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def row_faults(path: Path, track: rules.Track, record: dict) -> list[str]:
    """What does not fit between a row of the history and the log, or folder, that it links."""
    if not path.exists():
        return [f"dead link: {path.name}"]
    runs, _ = check.load(log_files(path) if path.is_dir() else [path])
    faults = [] if runs else [f"{path.name} holds no run"]
    for run in runs[:1]:
        faults += [f"{path.name}: {reason.text}" for reason in check.judge(runs, track).reasons
                   if reason.name in ("wrong-hardware", "incomplete", "unreadable")]
        if record["steps"] not in (None, run.final_step):
            faults.append(f"{path.name} has {run.final_step} steps, the row {record['steps']}")
        official = record["minutes"] * 60_000
        folder = next((f for f in path.parents if f.parent.name == track.archive), path)
        timed = [(name, v) for name, v in judge(log_files(folder), track)
                 if v.result and v.result["train_time_ms"]["mean"]]
        times = {name: v.result["train_time_ms"]["mean"] for name, v in timed}
        nearest = min(times, key=lambda name: abs(times[name] - official), default=None)
        own = next((n for n, v in timed if str(path) in {r.path for r in v.runs}), nearest)
        if path.is_file() and own != nearest:
            faults.append(f"{path.name} is of the runs {own}, {history.clock(times[own])}; nearer "
                          f"to the row are {nearest}, {history.clock(times[nearest])}")
        if run.train_time_ms and abs(run.train_time_ms / official - 1) > 0.1:
            faults.append(f"{path.name} took {history.clock(run.train_time_ms)}, the row "
                          f"{history.clock(official)}")
    return faults
