"""A run beside the records: one line at each validation, its place in the table at the end.

The trainer prints `progress` while it runs and `rank` when it ends; `python -m records rank LOG`
prints the same for a finished log. Neither raises for a bad loss: a line on the screen must never
end a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from records.history import (
    FOLDER,
    Curve,
    amount,
    clock,
    count,
    metric_value,
    own_curves,
    own_records,
    public_records,
    published_curves,
)
from records.parse import Run
from records.rules import Track
from records.rules import track as rules_of


def progress(
    track: str,
    val_loss: float,
    train_time_ms: float,
    tokens: int,
    *,
    history: Sequence[tuple] = (),
    target: float | None = None,
    num_iterations: int | None = None,
    step: int | None = None,
    data_digest: str | None = None,
    folder: Path = FOLDER,
) -> str:
    """One line: the records that had this loss near this point, and the projected end of the run.

    track            a track of records/rules.py; ValueError for another name
    train_time_ms    milliseconds of training so far; tokens: trained on so far
    history          (step, val_loss, ...) of validations of this run; their slope gives the
                     projection where the track has no curve of another run to learn from
    target           the loss to reach, if not the track's own
    num_iterations   steps of the whole run; with step, the projected finish is given
    data_digest      of the data of the run; data other than the track's are not compared
    """
    rules = rules_of(track)
    if not math.isfinite(val_loss):
        return f"{track}: loss is {val_loss}, no record is like that"
    if _other_data(rules, data_digest):
        return f"{track}: {val_loss:.4f} on other data than the track's, no record to compare with"
    target = rules.target if target is None else target
    if step == 0:
        return f"{track}: {val_loss:.4f} before the first step"
    curves = [*(published_curves(rules.published, folder) if rules.published else ()),
              *own_curves(rules.name, folder)]
    parts = [_neighbours(rules, curves, val_loss, _metric(rules, train_time_ms, tokens, step),
                         tokens)]
    if step and num_iterations and 0 < step < num_iterations:
        fraction = step / num_iterations
        alike = [curve for curve in curves if curve.is_as_long(tokens, fraction)]
        parts.append(_finish(alike, val_loss, train_time_ms, target, fraction, history, step))
    else:
        parts.append(_against(val_loss, target))
    return f"{track}: " + "; ".join(parts)


def rank(
    track: str,
    train_time_ms: float,
    tokens: int,
    final_val_loss: float,
    *,
    steps: int | None = None,
    target: float | None = None,
    data_digest: str | None = None,
    folder: Path = FOLDER,
) -> str:
    """The place of a finished run in the track's table. One run is not yet a record."""
    rules = rules_of(track)
    if _other_data(rules, data_digest):
        return f"{track}: no place: the run is on other data than the track's"
    target = rules.target if target is None else target
    if not final_val_loss <= target:
        return f"{track}: no place: {final_val_loss:.4f} is above the target {target:g}"
    value, metric = _metric(rules, train_time_ms, tokens, steps), rules.metric[0]
    if value is None:
        return f"{track}: no place: the run does not say its {metric}"
    table = _table(rules, folder)
    better = [entry for entry in table if entry[0] < value]
    level = [label for at, label in table if at == value]
    worse = [entry for entry in table if entry[0] > value]
    after = f", behind {better[-1][1]} ({amount(better[-1][0], metric)})" if better else ""
    before = f", ahead of {worse[0][1]} ({amount(worse[0][0], metric)})" if worse else ""
    race = ", where a race decides" if "train_time_ms" in rules.metric[1:] else ""
    beside = f", level with {level[0]}{race}" if level else ""
    return (f"{track}: {final_val_loss:.4f} reaches {target:g}: with {amount(value, metric)} place "
            f"{len(better) + 1} of {len(table) + 1}{after}{beside}{before}. A record needs "
            f"{rules.rule}")


def record_of(run: Run, folder: Path = FOLDER) -> str | None:
    """The record whose evidence this run is."""
    facts = run.final_val_loss, run.train_time_ms, run.final_step
    public = (f"#{r['number']}" for r in public_records(folder) if r["evidence"]["num_runs"] == 1
              and (r["evidence"]["val_loss"], r["evidence"]["train_time_ms"], r["steps"]) == facts)
    ours = (r["name"] for r in own_records(None, folder)
            if run.digest and run.digest in r["logs"].values())
    return next(chain(public, ours), None)


def _other_data(rules: Track, digest: str | None) -> bool:
    return None not in (rules.data_digest, digest) and rules.data_digest != digest


def _table(rules: Track, folder: Path) -> list[tuple[float, str]]:
    """(metric, label) of every record of the track, best first."""
    metric = rules.metric[0]
    entries = [(metric_value(record, metric), record["name"])
               for record in own_records(rules.name, folder) if record["kind"] == "record"]
    if metric == "train_time_ms":
        entries += [(record["minutes"] * 60_000, f"#{record['number']}")
                    for record in public_records(folder)
                    if record["track"] == rules.published and record["kind"] == "record"]
    return sorted(entries)


def _metric(rules: Track, train_time_ms, tokens, steps) -> float | None:
    return {"train_time_ms": train_time_ms, "tokens": tokens, "steps": steps}[rules.metric[0]]


def _neighbours(
    rules: Track, curves: list[Curve], val_loss: float, at: float | None, tokens: int | None
) -> str:
    """The records that had this loss just before and just after this point of the metric."""
    metric = rules.metric[0]
    if at is None:
        return f"{val_loss:.4f}"
    here = f"{val_loss:.4f} at {amount(at, metric)}"
    if not curves:
        return f"{here}: no record yet to compare with"
    last, words = _between(curves, val_loss, at, metric)
    if last and metric == "train_time_ms" and tokens:  # slower hardware: compare by tokens
        by_tokens = _between(curves, val_loss, tokens, "tokens")[1]
        words += f"; by tokens ({count(tokens)}) {by_tokens}" if by_tokens else ""
    return f"{here}: {words or 'below every published curve'}"


def _between(curves: list[Curve], val_loss: float, at: float, metric: str) -> tuple[bool, str]:
    """Whether every curve had this loss before `at`, and the two around it in words, or ""."""
    had = sorted((x, c.label) for c in curves if (x := c.first_at(val_loss, metric)) is not None)
    if not had:
        return False, ""
    faster = [entry for entry in had if entry[0] <= at]
    slower = [entry for entry in had if entry[0] > at]
    several = len(had) > 1
    parts = []
    if faster:
        last = ", the last of all" if several and not slower else ""
        parts.append(f"behind {faster[-1][1]} ({amount(faster[-1][0], metric)}){last}")
    if slower:
        first = ", the first of all" if several and not faster else ""
        parts.append(f"ahead of {slower[0][1]} ({amount(slower[0][0], metric)}){first}")
    return not slower, ", ".join(parts)


def _finish(curves, val_loss, train_time_ms, target, fraction, history, step) -> str:
    """Projected loss and time at the last step.

    The loss: this one plus the median change to the end in up to three records of about this
    length, those with the closest loss after the same fraction of their steps. Without such a
    curve: the straight line of this run's loss against log(step), which ignores a cooldown.
    """
    end = clock(train_time_ms / fraction)
    alike = sorted((abs(c.at_fraction(fraction) - val_loss), c.losses[-1] - c.at_fraction(fraction))
                   for c in curves)
    alike = [gain for distance, gain in alike[:3] if distance < 0.25]
    if fraction < 0.15:
        return f"finish at {end}"
    if alike:
        projected, how = val_loss + sorted(alike)[len(alike) // 2], ""
    else:
        points = [(s, v) for s, v, *_ in history if 0 < s < step and math.isfinite(v)][-3:]
        points.append((step, val_loss))
        if len(points) < 3:
            return f"finish at {end}"
        (s0, v0), (s1, v1) = points[0], points[-1]
        slope = (v1 - v0) / math.log(s1 / s0)
        projected, how = val_loss + slope * -math.log(fraction), " at this slope"
    return f"heading for {projected:.2f}{how} at {end}, {_against(projected, target)}"


def _against(loss: float, target: float) -> str:
    gap = loss - target
    if gap <= 0:
        return f"within target {target:g}"
    return f"{gap:.2f} above target {target:g}" if gap >= 0.005 else f"just above {target:g}"
