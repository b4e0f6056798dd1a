"""Make a record folder from logs: README with its numbers, result.json, logs, the plot.

Nothing is written unless the runs pass every rule of `check`. Sources go to records/sources, which
keeps each version of a file once. The folder gets a temporary name, is checked, and is renamed.
"""

from __future__ import annotations

import getpass
import gzip
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from records import check, history, plot, readme, rules
from records.check import Verdict
from records.history import FOLDER, write
from records.log import source_path, without_sources


class Refused(ValueError):
    """The runs are not a record; `verdict` has the reasons."""

    def __init__(self, verdict: Verdict, advice: str | None) -> None:
        super().__init__("these runs are not a record yet")
        self.verdict, self.advice = verdict, advice


def add(
    logs: Sequence[Path],
    name: str,
    *,
    by: Sequence[str] = (),
    track: str | None = None,
    kind: str = "record",
    systems_only: bool = False,
    differs: Sequence[str] = (),
    race: Path | None = None,
    root: Path = FOLDER,
) -> Path:
    """The folder of a new record; Refused with every reason if it is none."""
    if not history.NAME.fullmatch(name):
        raise ValueError(
            f"--name: expected up to 40 letters, digits, dots and dashes, got {name!r}"
        )
    runs, unread = check.load(logs)
    found = track or check.track_of(runs)
    if found is None:
        raise ValueError("--track: the logs do not agree on a track; name one of "
                         f"{', '.join(rules.TRACKS)}")
    rule = rules.track(found)
    if any(record["name"] == name for record in history.own_records(None, root)):
        raise ValueError(f"--name: there is a record named {name} already")
    verdict = check.judge(runs, rule, differs=differs, systems_only=systems_only, closed=True)
    verdict.reasons += unread
    if len({Path(run.path).name for run in runs}) != len(runs):
        verdict.add("broken-folder", "", "expected one run in each log and a name of its own for "
                    "each: a log holds several runs, or two logs share a name")
    date = check.record_date(runs)
    if date is None:
        raise ValueError("`started`: expected a date in the environment of each log, got none")
    prior = check.record_to_beat(rule, name, date, root) if kind == "record" else None
    race_logs = read_race(race) if race else {}
    own = {
        "name": name, "kind": kind, "date": date, "by": list(by) or [author()],
        "prior": prior["name"] if prior else None,
        "race": check.race_facts(list(race_logs.values()), runs, verdict, list(race_logs)),
    }
    check.ahead_of_prior(verdict, own, root)
    check.not_reused(verdict, own, root)
    if verdict.reasons:
        raise Refused(verdict, check.outlook(verdict, root))
    result = own | verdict.result | {"logs": check.log_digests(runs)}
    target = root / rule.name / f"{own['date']}_{name}"
    if target.exists():
        raise ValueError(f"{target} exists already: choose another --name")
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    new_sources: list[Path] = []
    try:
        logs = {f"logs/{Path(run.path).name.removesuffix('.gz')}": run.path for run in runs}
        logs |= {f"race/{file}": path for file, path in race_logs.items()}
        _fill(work, runs, logs, result, rule, root, new_sources)
        again = check.check_folder(work, root)
        again.reasons = [r for r in again.reasons if r.name != "unwritten"]
        if again.reasons:
            raise Refused(again, None)
        os.replace(work, target)
    except BaseException:
        for path in new_sources:
            path.unlink()
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _fill(work: Path, runs, logs: dict[str, Path], result: dict, rule: rules.Track, root: Path,
          new_sources: list[Path]) -> None:
    """Writes everything; appends to `new_sources` the files that records/sources did not have."""
    for name, log in logs.items():
        kept, sources = without_sources(log)
        write(work / name, kept)
        for file, body in sources.items():
            path = source_path(root / "sources", file, hashlib.sha256(body).hexdigest())
            if not path.exists():
                write(path, gzip.compress(body, mtime=0))
                new_sources.append(path)
    write(work / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    write(work / "README.md", readme.template(result).encode())
    plot.draw([(result["name"], runs)], rule, work / "curves", root=root)


def read_race(path: Path) -> dict[str, Path]:
    """The logs of a finished race, by the names under which a record keeps them."""
    try:
        runs = json.loads(path.read_text())["runs"]
        return {f"{side}_{Path(entry['log']).name}": path.parent / entry["log"]
                for side in "ab" for entry in runs[side]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--race: {path}: expected the race.json of a finished race: "
                         f"{error!r}") from None


def author() -> str:
    """The default of --by: git's user name, or the account."""
    try:
        found = subprocess.run(
            ["git", "config", "user.name"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = ""
    return found or getpass.getuser()
