"""The public records, the published curves, and our own records.

The public ones are files in `records/data/`, ours the folders `records/<track>/<date>_<name>/`.
`FOLDER` is this package's folder; every function takes another one, for tests and for `--root`. A
folder without data (a program unpacked from its log) is an empty history, not an error.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from records.parse import trained_tokens
from records.rules import TRACKS

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Curve:
    """Loss along one published run or one record of ours (then the mean of its runs)."""

    label: str  # "#12", "pocket-first"
    minutes: float | None  # official time
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    times_ms: tuple[float, ...] | None
    tokens: tuple[int, ...] | None

    def at_fraction(self, fraction: float) -> float:
        """Loss after this fraction of the steps, by straight lines between validations."""
        return float(np.interp(fraction * self.steps[-1], self.steps, self.losses))

    def is_as_long(self, tokens: float | None, fraction: float) -> bool:
        """Whether it saw as many tokens by then, up to a factor of two; True where unknown."""
        if self.tokens is None or tokens is None:
            return True
        theirs = np.interp(fraction * self.steps[-1], self.steps, self.tokens)
        return bool(theirs == 0 or 0.5 <= tokens / theirs <= 2)

    def axis(self, metric: str) -> tuple[float, ...] | None:
        return {"train_time_ms": self.times_ms, "tokens": self.tokens, "steps": self.steps}[metric]

    def first_at(self, loss: float, metric: str) -> float | None:
        """Where this curve first was at or below `loss`; None if never, or without such an axis."""
        xs = self.axis(metric)
        if xs is None:
            return None
        for i, value in enumerate(self.losses):
            if value <= loss:
                if i == 0 or self.losses[i - 1] <= value:
                    return xs[i]
                part = (self.losses[i - 1] - loss) / (self.losses[i - 1] - value)
                return xs[i - 1] + part * (xs[i] - xs[i - 1])
        return None


TEXT_CAP = 1 << 24  # bytes of a README or a result.json


def read_text(path: Path) -> str:
    """A small text file; ValueError if it is too large to be one."""
    size = path.stat().st_size
    if size > TEXT_CAP:
        raise ValueError(f"{path}: expected at most {TEXT_CAP >> 20} MiB, got {size >> 20} MiB")
    return path.read_text(errors="replace")


@lru_cache
def public_records(folder: Path = FOLDER) -> tuple[dict, ...]:
    """The public records, one dict each, as in data/history.json."""
    path = folder / "data" / "history.json"
    return tuple(json.loads(path.read_text())["records"]) if path.is_file() else ()


@lru_cache
def published_curves(name: str, folder: Path = FOLDER) -> tuple[Curve, ...]:
    """The published curves of a track, in order of record number.

    A log without a clock (llm.c prints none; its step time was constant) gets the official time in
    proportion to its steps. A log whose clock ends more than 10% away from the official time comes
    from another machine: its curve keeps the losses, without a clock.
    """
    path = folder / "data" / "curves.csv"
    if not path.is_file():
        return ()
    official = {(record["number"], record["date"] or ""): record
                for record in public_records(folder) if record["track"] == name}
    rows: dict[tuple[int, str], list[dict]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["track"] == name:
                rows.setdefault((int(row["record"]), row["date"]), []).append(row)
    curves = []
    for key, points in rows.items():
        record = official[key]
        steps = tuple(int(p["step"]) for p in points)
        end_ms = record["minutes"] * 60_000
        times = tuple(end_ms * step / steps[-1] for step in steps)
        if all(p["train_time_ms"] for p in points):
            times = tuple(float(p["train_time_ms"]) for p in points)
            if abs(times[-1] / end_ms - 1) > 0.1:
                times = None
        curves.append(Curve(
            label=f"#{key[0]}" + ("" if record["kind"] == "record" else f" ({key[1]})"),
            minutes=record["minutes"],
            steps=steps,
            losses=tuple(float(p["val_loss"]) for p in points),
            times_ms=times,
            tokens=record["batch"] and tuple(trained_tokens(record["batch"], s) for s in steps),
        ))
    return tuple(curves)


def own_records(name: str | None = None, folder: Path = FOLDER) -> list[dict]:
    """`result.json` of every record folder of ours, of one track or of all, with its `folder`.

    Ordered by track, then by the track's metric, best first. A broken result.json raises
    ValueError.
    """
    found = []
    for rules in TRACKS.values():
        if name in (None, rules.name):
            here = [read_result(path.parent) | {"folder": f"{rules.name}/{path.parent.name}"}
                    for path in sorted((folder / rules.name).glob("*/result.json"))]
            found += sorted(here, key=lambda r: [metric_value(r, m) for m in rules.metric])
    return found


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,39}")
_SPREAD = {"mean": float, "sd": (float,)}
_SIDE = {"code_sha256": str, "recipe_sha256": str, "losses": [float], "times_ms": [float],
         "logs": dict}
# The form of result.json: a tuple marks what may be null, a list has any number of its item.
SHAPE = {
    "name": NAME, "kind": re.compile("record|baseline"), "by": [str], "prior": (NAME,),
    "date": re.compile(r"\d{4}-\d\d-\d\d"), "race": ({"a": _SIDE, "b": _SIDE},),
    "track": re.compile("|".join(TRACKS)), "target": (float,), "num_runs": int,
    "losses": [float], "val_loss": _SPREAD, "p": (float,), "times_ms": [float],
    "train_time_ms": _SPREAD, "steps": int, "tokens": int, "parameters": (int,),
    "seeds": [(int,)], "hardware": (str,), "python": (str,), "torch": (str,),
    "data_digest": (str,), "recipe_sha256": (str,), "code_sha256": (str,), "systems_only": bool,
    "differs": [str],
    "curve": {"step": [int], "val_loss": [float], "train_time_ms": [float], "tokens": [(int,)]},
    "logs": dict,
}


def _misfit(value: object, shape: object, name: str) -> str | None:
    """The first part of a JSON value that is not of this shape, in words."""
    if isinstance(shape, tuple):
        return None if value is None else _misfit(value, shape[0], name)
    if isinstance(shape, list | dict):
        kind, fits, parts = type(shape), isinstance(value, type(shape)), []
        if fits and kind is list:
            parts = [(item, shape[0], name) for item in value]
        elif fits:
            parts = [(value.get(k), s, f"{name} {k}".strip()) for k, s in shape.items()]
        if found := next(filter(None, (_misfit(*part) for part in parts)), None):
            return found
    elif isinstance(shape, re.Pattern):
        kind, fits = str, isinstance(value, str) and shape.fullmatch(value)
        name += f" as {shape.pattern}"
    else:
        kind, fits = shape, type(value) is shape or (shape is float and type(value) is int)
        fits = fits and (abs(value) < 1e15 if shape in (int, float) else str(value).isprintable())
    return None if fits else f"{name}: expected {kind.__name__}, got {str(value)[:40]!r}"


def read_result(folder: Path) -> dict:
    """result.json of a record folder; ValueError where it is not of the form of SHAPE."""
    path = folder / "result.json"
    try:
        result = json.loads(read_text(path))
        fault = _misfit(result, SHAPE, "")
        sides = (result["race"] or {}).values() if not fault else ()
        if not fault and len({len(values) for values in result["curve"].values()}) > 1:
            fault = "curve: expected lists of one length"
        if len({len(side[key]) for side in sides for key in ("losses", "times_ms")}) > 1:
            fault = "race: expected lists of one length"
    except (OSError, ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise ValueError(f"{path}: expected the result of a record: {fault}")
    return result


def metric_value(result: dict, metric: str) -> float:
    """A metric of a record of ours as it ranks: the mean over its runs."""
    if metric == "train_time_ms":
        return float(result["train_time_ms"]["mean"])
    return float(result[metric])


def own_curves(name: str, folder: Path = FOLDER) -> list[Curve]:
    """The mean curve of each record of ours in a track."""
    curves = []
    for result in own_records(name, folder):
        points = result["curve"]
        curves.append(Curve(label=result["name"],
                            minutes=result["train_time_ms"]["mean"] / 60_000,
                            steps=tuple(points["step"]),
                            losses=tuple(points["val_loss"]),
                            times_ms=tuple(points["train_time_ms"]),
                            tokens=None if None in points["tokens"] else tuple(points["tokens"])))
    return curves


def write(path: Path, data: bytes) -> None:
    """A whole file or none: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


# ---------------------------------------------------------------------------------- units in words


def clock(ms: float | None, tenths: bool = False) -> str:
    """A duration as the speedrun writes it: 45.2s, 3:05 (with tenths 3:05.1), 1:02:09."""
    if ms is None or not math.isfinite(ms):
        return "-"
    seconds = ms / 1000
    if seconds < 99.95:
        return f"{seconds:.1f}s"
    if tenths and seconds < 3599.95:
        units = round(seconds * 10)
        tenth = f".{units % 10}" if units % 10 else ""
        return f"{units // 600}:{units % 600 // 10:02d}{tenth}"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def count(value: float | None) -> str:
    """A number of tokens or steps in three digits: 740M, 2.7B, 1,390."""
    if value is None or not math.isfinite(value):
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            scaled = value / (1e3 if unit == "K" else size)
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{unit}"
    return f"{value:,.0f}"


def amount(value: float | None, metric: str) -> str:
    """A value of a metric with its unit: 3:05, 740M tokens, 1,390 steps."""
    if metric == "train_time_ms":
        return clock(value)
    return f"{count(value)} {metric}"
