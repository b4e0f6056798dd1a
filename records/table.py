"""The record tables: public history and our own records, for a terminal, Markdown or JSON.

Everything is computed from `records/data/` and from the record folders. The README holds a compact
table between two markers, TABLES.md beside this file all of it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from records import check, history, readme, rules
from records.check import Verdict
from records.history import FOLDER, clock, count
from records.log import source_path
from records.parse import printable
from records.rules import Track

BEGIN = "<!-- records:begin -->"
END = "<!-- records:end -->"
MILESTONE = 0.8  # a milestone takes at most this share of the time of the one before


class Row(SimpleNamespace):
    """One record, ours or public. Missing facts are None and shown as a dash."""


def rows(track: Track, root: Path = FOLDER) -> list[Row]:
    """The records of a track: the public ones as they came, then ours, best last."""
    found = [_public(r) for r in history.public_records(root) if r["track"] == track.name]
    ours = [_own(r, root) for r in history.own_records(track.name, root)]
    return found + ours[::-1]


def all_rows(root: Path = FOLDER) -> dict[str, list[Row]]:
    """The rows of every track: each record of ours is checked once for all tables."""
    return {name: rows(track, root) for name, track in rules.TRACKS.items()}


def _public(record: dict) -> Row:
    evidence, ms, track = record["evidence"], record["minutes"] * 60_000, record["track"]
    num, log_ms = evidence["num_runs"], evidence["train_time_ms"]
    words = f"{num} log{'s' * (num > 1)}" if num else "none"
    if log_ms and abs(log_ms / ms - 1) > 0.03:
        words += f", clock {log_ms / ms - 1:+.0%}"
    return Row(
        track=track, label=f"#{record['number']}", own=False, kind=record["kind"],
        date=record["date"], time_ms=ms, time_sd_ms=evidence.get("train_time_ms_sd"),
        steps=record["steps"], tokens=record["tokens"], num_runs=num, mean=evidence["val_loss"],
        sd=evidence.get("val_loss_sd"), p=evidence.get("p"), folder=None, evidence=words,
        hardware=f"{rules.TRACKS[track].gpu_count}x {rules.TRACKS[track].gpu}",
        changed=record["title"] + " (re-timed)" * (record["kind"] == "re-timing"),
        by=tuple(record["contributors"]),
    )


def _own(record: dict, root: Path) -> Row:
    folder = root / record["folder"]
    names = check.check_folder(folder, root).names() - {"unwritten"}
    try:
        changed = printable(readme.changed(history.read_text(folder / "README.md")))
    except (OSError, ValueError):
        changed = ""
    time, loss = record["train_time_ms"], record["val_loss"]
    same = {key: record[key] for key in
            ("track", "kind", "date", "steps", "tokens", "num_runs", "p", "hardware", "folder")}
    return Row(
        **same, label=record["name"], own=True, time_ms=time["mean"], time_sd_ms=time["sd"],
        mean=loss["mean"], sd=loss["sd"], by=tuple(record["by"]),
        evidence="re-derived" if not names else f"FAILS: {', '.join(sorted(names))}",
        changed=changed + " (baseline)" * (record["kind"] == "baseline"),
    )


# ---------------------------------------------------------------------------------- cells


def number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def p_value(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if value >= 0.00005 else f"{value:.0e}"


def _short_hardware(text: str | None) -> str:
    if text is None:
        return "-"
    for word in ("NVIDIA ", " 80GB HBM3", "(R)", "(TM)", " Processor", " CPU"):
        text = text.replace(word, "")
    return text if len(text) <= 24 else text[:23] + "…"


# header, cell, importance (smaller is kept longer when the terminal is narrow)
COLUMNS = (
    ("record", lambda r: r.label, 0),
    ("date", lambda r: r.date or "-", 2),
    ("time", lambda r: clock(r.time_ms, tenths=True), 0),
    ("steps", lambda r: f"{r.steps:,}" if r.steps else "-", 1),
    ("tokens", lambda r: count(r.tokens), 3),
    ("n", lambda r: str(r.num_runs) if r.num_runs else "-", 4),
    ("loss", lambda r: number(r.mean, 4), 4),
    ("sd", lambda r: number(r.sd, 4), 6),
    ("p", lambda r: p_value(r.p), 5),
    ("hardware", lambda r: _short_hardware(r.hardware), 8),
    ("evidence", lambda r: r.evidence, 7),
    ("what changed", lambda r: r.changed, 0),
    ("by", lambda r: ", ".join(r.by), 9),
)
LEFT = {"record", "date", "hardware", "evidence", "what changed", "by"}


def terminal(track: Track, found: list[Row], width: int) -> str:
    """The table of a track in `width` columns; columns that do not fit are left out."""
    head = f"{track.name}: {track.title}"
    lines = [_fit(head, width), _fit(f"target {track.target:g}; {track.rule}", width)]
    if not found:
        return "\n".join([*lines, "  no record yet"])
    cells = {name: [cell(row) for row in found] for name, cell, _ in COLUMNS}
    widths = {name: max(len(name), *map(len, cells[name])) for name in cells}
    natural = widths["what changed"]
    for name, most in (("what changed", 22), ("record", 16), ("by", 24), ("evidence", 30)):
        widths[name] = min(widths[name], most)
    shown = [name for name, _, importance in COLUMNS if importance == 0]
    first = {"train_time_ms": "time"}.get(track.metric[0], track.metric[0])
    for name, _, importance in sorted(COLUMNS, key=lambda c: 1 if c[0] == first else c[2]):
        useful = any(cell != "-" for cell in cells[name])
        room = width - sum(widths[n] for n in shown) - 2 * len(shown)
        if importance and useful and widths[name] <= room:
            shown.append(name)
    used = sum(widths[n] for n in shown) + 2 * (len(shown) - 1)
    widths["what changed"] = min(natural, widths["what changed"] + max(0, width - used))
    order = [name for name, *_ in COLUMNS if name in shown]

    def line(values: dict[str, str]) -> str:
        parts = []
        for name in order:
            text = _fit(values[name], widths[name])
            parts.append(text.ljust(widths[name]) if name in LEFT else text.rjust(widths[name]))
        return "  ".join(parts).rstrip()

    lines.append(line({name: name for name in order}))
    lines += [line({name: cells[name][i] for name in order}) for i in range(len(found))]
    return "\n".join(lines)


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


# ---------------------------------------------------------------------------------- Markdown


def _markdown(names: list[str], found: list[Row], link: str) -> str:
    cells = {name: cell for name, cell, _ in COLUMNS}

    def text(row: Row, name: str) -> str:
        value = cells[name](row).replace("|", "\\|")
        if name == "record" and row.folder:
            return f"[{value}]({link}{row.folder})"
        return value

    align = [":--" if name in LEFT else "--:" for name in names]
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join(align)} |"]
    lines += [f"| {' | '.join(text(row, name) for name in names)} |" for row in found]
    return "\n".join(lines)


def milestones(found: list[Row]) -> list[Row]:
    """The first record, each that took at most 80% of the milestone before it, and the newest."""
    records = [row for row in found if row.kind == "record" and not row.own]
    chosen: list[Row] = []
    for row in records:
        if not chosen or row.time_ms <= MILESTONE * chosen[-1].time_ms:
            chosen.append(row)
    if records and chosen[-1] is not records[-1]:
        chosen.append(records[-1])
    return chosen


def compact(found: dict[str, list[Row]]) -> str:
    """The tables between the markers of README.md: our records, milestones of the public ones."""
    parts = []
    for track in rules.TRACKS.values():
        ours = [row for row in found[track.name] if row.own]
        if ours:
            names = ["record", "tokens", "time", "loss", "sd", "n", "p", "hardware", "what changed",
                     "by"]
            if track.metric[0] == "train_time_ms":
                names.remove("tokens")
            parts.append(f"**{track.name}**: {track.title}, target {track.target:g}\n\n"
                         + _markdown(names, ours[::-1], "records/"))
    short = rules.TRACKS["short"]
    public = milestones(found["short"])
    if public:
        total = len([row for row in found["short"] if row.kind == "record" and not row.own])
        parts.append(
            f"**{short.name}**, public history: {short.title}, {total} records, of which each "
            f"row took at most {MILESTONE:.0%} of the time of the row above, and the newest\n\n"
            + _markdown(["record", "date", "time", "steps", "tokens", "what changed", "by"],
                        public, "")
        )
    return "\n\n".join(parts)


def full(found: dict[str, list[Row]]) -> str:
    """TABLES.md: every record of every track."""
    parts = [
        "# Record tables",
        "Written by `python -m records table --markdown` from `records/data/` and the record "
        "folders; `python -m records check` says when it is out of date. Public rows: the official "
        "time; steps, loss and spread of the logs named under evidence (`clock +8%`: the log's own "
        "clock ends that far from the official time, which was chained across machines). Our rows: "
        "everything is derived again from the logs in the folder.",
    ]
    for track in rules.TRACKS.values():
        parts.append(f"## {track.name}\n\n{track.title}. Target {track.target:g}; {track.rule}.")
        names = [name for name, *_ in COLUMNS]
        here = found[track.name]
        parts.append(_markdown(names, here, "") if here else "No record yet.")
    return "\n\n".join(parts) + "\n"


def replaced(text: str, found: dict[str, list[Row]]) -> str:
    """README text with the tables of today between the markers; ValueError without markers."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}, once each, in this "
                         "order, around the record table")
    return f"{text[: start + len(BEGIN)]}\n{compact(found)}\n{text[end:]}"


def stale(text: str, root: Path = FOLDER) -> list[str]:
    """The tables that are out of date: in the README text (if it has markers) and TABLES.md."""
    problems, found = [], all_rows(root)
    renew = "run python -m records table --markdown"
    if BEGIN in text or END in text:
        try:
            if replaced(text, found) != text:
                problems.append(f"the table between the markers is out of date: {renew}")
        except ValueError as error:
            problems.append(str(error))
    tables = root / "TABLES.md"
    if not tables.is_file() or tables.read_text() != full(found):
        problems.append(f"records/TABLES.md is out of date: {renew}")
    return problems


def write_markdown(root: Path = FOLDER) -> list[str]:
    """Bring TABLES.md, README.md and the numbers of every record's README up to date.

    Returns a line for each file. A README without markers is left alone.
    """
    done = []
    for folder in check.record_folders(root):
        path = folder / "README.md"
        if path.is_file() and (folder / "result.json").is_file():
            before = path.read_text()
            done += _update(path, before, readme.renew(before, history.read_result(folder)))
    found = all_rows(root)
    path = root / "TABLES.md"
    done += _update(path, path.read_text() if path.is_file() else None, full(found))
    path = root.parent / "README.md"
    before = path.read_text() if path.is_file() else None
    if before is None:
        done.append(f"{path} is not there: no table written")
    elif BEGIN not in before:
        done.append(f"{path} has no {BEGIN}: no table written")
    else:
        done += _update(path, before, replaced(before, found))
    return done


def _update(path: Path, before: str | None, after: str) -> list[str]:
    if before == after:
        return [f"{path} is up to date"]
    history.write(path, after.encode())
    return [f"{path} written"]


def as_json(tracks: list[Track], root: Path = FOLDER) -> str:
    """Every row of these tracks, as plain data."""
    return json.dumps(
        {t.name: [row.__dict__ for row in rows(t, root)] for t in tracks}, indent=1, default=list
    )


def check_all(root: Path = FOLDER) -> list[tuple[str, Verdict]]:
    """The verdict on every record folder of ours, and last that on the tables and the sources."""
    verdicts = [(f"{folder.parent.name}/{folder.name}", check.check_folder(folder, root))
                for folder in check.record_folders(root)]
    whole = Verdict(rules.TRACKS["short"], [])
    names = Counter(verdict.result.get("name") for _, verdict in verdicts if verdict.result)
    for name, num in names.items():
        if num > 1:
            whole.add("broken-folder", str(name), f"{num} records have this name")
    known = {source_path(root / "sources", source.name, source.sha256)
             for _, verdict in verdicts for run in verdict.runs for source in run.sources.values()}
    known |= {source_path(root / "sources", source.name, source.sha256)
              for folder in check.record_folders(root)
              for run in check.load(check.folder_logs(folder, "race"))[0]
              for source in run.sources.values()}
    for path in sorted((root / "sources").rglob("*")):
        if path.is_symlink() or (path.is_file() and path not in known):
            whole.add("broken-folder", str(path.relative_to(root)), "no log of a record names it")
    front = root.parent / "README.md"
    try:
        for problem in stale(front.read_text() if front.is_file() else "", root):
            whole.add("stale-table", "", problem)
    except ValueError as error:
        whole.add("stale-table", "", str(error))
    return [*verdicts, ("tables", whole)]
