"""Runs, validation points and the result lines of logs, whatever the format of the file.

A result line begins with `key:value` fields, `step` and the loss among them. Everything else in a
log is text. What looks like a result line and cannot be read is a fault of the run, never a number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

LINE_CAP = 1 << 16  # bytes; longer lines are hashed and counted, never interpreted
FILE_CAP = 1 << 30  # bytes after decompression; a log of 1 GiB is not a log
POINT_CAP = 200_000  # validation points of one file
RUN_CAP = 1_000  # runs in one file
REMARK_CAP = 50  # faults or notes of one run


class LogError(ValueError):
    """A log that cannot be written or cannot be read as what it claims to be."""


@dataclass(frozen=True, slots=True)
class Point:
    """One validation: `val_loss` may be NaN, `train_time_ms` None where the format has no clock."""

    step: int
    total: int | None
    val_loss: float
    train_time_ms: float | None
    line: int


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    sha256: str
    num_lines: int
    text: str | None = None


@dataclass
class Run:
    """One run of a log file.

    faults   what makes it unfit as evidence: unreadable result lines, contradictions
    edits    signs that the log is not what was closed: digest, lines, sources
    notes    odd, but no reason to doubt it
    """

    path: str
    format: str = ""  # "ours", "step/ms", "step/s", "llm.c"
    points: list[Point] = field(default_factory=list)
    last_train_step: int | None = None
    num_echoed: int = 0
    sources: dict[str, Source] = field(default_factory=dict)
    code_sha256: str | None = None  # of all sources of the run, whatever the format
    environment: dict[str, str] = field(default_factory=dict)
    recipe: dict | None = None
    result: dict[str, object] = field(default_factory=dict)
    digest: str | None = None  # of the closing block, once verified
    python: str | None = None
    torch: str | None = None
    cuda: str | None = None
    gpu: str | None = None
    gpu_count: int | None = None
    faults: list[str] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        if len(self.faults) < REMARK_CAP:
            self.faults.append(text)

    def edit(self, text: str) -> None:
        if len(self.edits) < REMARK_CAP:
            self.edits.append(text)

    def note(self, text: str) -> None:
        if len(self.notes) < REMARK_CAP:
            self.notes.append(text)

    @property
    def final(self) -> Point | None:
        return self.points[-1] if self.points else None

    @property
    def final_val_loss(self) -> float | None:
        return self.points[-1].val_loss if self.points else None

    @property
    def train_time_ms(self) -> float | None:
        return self.points[-1].train_time_ms if self.points else None

    @property
    def final_step(self) -> int | None:
        return self.points[-1].step if self.points else None

    @property
    def reached_total(self) -> bool | None:
        """Was the last step validated? None where the format does not say how many there are."""
        last = self.final
        return None if last is None or last.total is None else last.step >= last.total

    @property
    def why_incomplete(self) -> str | None:
        """The reason this run did not end, or None. NaN is not an end."""
        last = self.final
        if last is None:
            return "no validation line"
        if last.total is not None and last.step < last.total:
            return f"stopped at step {last.step} of {last.total}"
        if self.last_train_step is not None and self.last_train_step > last.step:
            return f"last validated at step {last.step}, trained on to {self.last_train_step}"
        if not math.isfinite(last.val_loss):
            return f"final loss is {last.val_loss}"
        if self.format == "ours":
            if self.digest is None:
                return "no valid closing block"
            if self.result.get("status") != "complete":
                return f"status is {self.result.get('status')}"
        return None

    @property
    def complete(self) -> bool:
        return self.why_incomplete is None

    @property
    def tokens(self) -> int | None:
        value = self.result.get("tokens")
        return value if isinstance(value, int) and value > 0 else None

    @cached_property
    def batches(self) -> list[list[int]] | None:
        """[first step, tokens a step] of each batch size, in order; None if the log does not say.

        Logs before 2026-11-28 have no `tokens_per_step`: there the recipe's `batch_stages` are
        equal parts of the steps before its extension; without them a step takes `batch_tokens`.
        """
        if "tokens_per_step" in self.environment:
            said = self.environment["tokens_per_step"]
            return json.loads(said) if BATCHES.fullmatch(said) else None
        recipe = self.recipe or {}
        steps, sizes = recipe.get("num_iterations"), recipe.get("batch_stages")
        sizes = sizes or [recipe.get("batch_tokens")]
        scheduled = (steps or 0) - (recipe.get("extension_steps") or 0)
        if not all(isinstance(n, int) and n > 0 for n in (scheduled, *sizes)):
            return None
        return [[-(-i * scheduled // len(sizes)), size] for i, size in enumerate(sizes)]

    def tokens_at(self, step: int) -> int | None:
        """Tokens trained on before `step`; None if the log does not say."""
        return self.batches and trained_tokens(self.batches, step)


def trained_tokens(batches: Sequence[Sequence[int]], step: int) -> int:
    """Tokens trained on before `step`, from [first step, tokens a step] of each batch size."""
    ends = [start for start, _ in batches[1:]] + [step]
    return sum(size * max(0, min(step, end) - start)
               for (start, size), end in zip(batches, ends))


BATCHES = re.compile(r"\[\[0, \d{1,12}\](?:, \[\d{1,9}, \d{1,12}\]){0,1000}\]")

# ---------------------------------------------------------------------------------- reading lines

# step lines as nearly all logs have them; the general reading below covers the rest
TRAIN = re.compile(
    rb"step:(\d{1,9})/\d{1,9} (?:train_loss:\S{1,24} )?train_time:(\d{1,12}(?:\.\d{1,9})?)(m?s) "
)
_KEY_VALUE = re.compile(rb"([A-Za-z_]\w{0,40}):(\S{1,64})$")
_STEP = re.compile(rb"(\d{1,9})(?:/(\d{1,9}))?$")
LOSS = re.compile(rb"(?:\d{1,6}\.\d{1,12}|-?nan|-?inf)$", re.IGNORECASE)
_TIME = re.compile(rb"(\d{1,12}(?:\.\d{1,9})?)(ms|s)$")


def read_fields(raw: bytes) -> dict[str, bytes] | None:
    """`key:value` fields at the start of a line up to the first other word; None if it has none.

    A `step` field must be among them.
    """
    fields: dict[str, bytes] = {}
    for token in raw.split():
        match = _KEY_VALUE.match(token)
        if match is None:
            break
        fields.setdefault(match[1].decode(), match[2])
    return fields if "step" in fields else None


def val_point(fields: dict[str, bytes], line: int, loss_key: str) -> Point:
    step = _STEP.match(fields["step"])
    loss = LOSS.match(fields[loss_key])
    clock = _TIME.match(fields.get("train_time", b""))
    if step is None:
        raise LogError("its step cannot be read")
    if loss is None:
        raise LogError("its loss cannot be read")
    if clock is None:
        raise LogError("its train_time cannot be read (a number with ms or s)")
    return Point(
        step=int(step[1]),
        total=int(step[2]) if step[2] else None,
        val_loss=float(loss[0]),
        train_time_ms=float(clock[1]) * (1.0 if clock[2] == b"ms" else 1000.0),
        line=line,
    )


def show(raw: bytes) -> str:
    return repr(raw[:100].decode(errors="replace").rstrip("\r\n"))


class Collector:
    """Collects the result lines of a file into runs. Knows nothing about the rest of the file."""

    EARLY = 20  # the clock of 2024 logs restarts after its first ten steps

    def __init__(self, path: str, loss_key: str, fixed_run: Run | None = None) -> None:
        self.path = path
        self.loss_key = loss_key
        self.key = loss_key.encode()
        self.fixed_run = fixed_run  # ours: one run a log, a step that falls back is a fault
        self.runs: list[Run] = [fixed_run] if fixed_run else []
        self.num_points = 0
        self._fresh()

    def _fresh(self) -> None:
        self.seen: set[int] = set()
        self.step = -1
        self.clock = -1.0
        self.decimals: int | None = None

    def _run(self, kind: str) -> Run:
        if not self.runs:
            self.runs.append(Run(self.path))
        run = self.runs[-1]
        run.format = run.format or kind
        return run

    def read(self, raw: bytes, line: int, ended: bool) -> bool:
        """Take a line of the file, if it is a result line. `ended`: it has its newline."""
        match = TRAIN.match(raw) if ended else None
        if match:
            self.train(match, raw, line)
            return True
        if self.key not in raw:
            return False
        fields = read_fields(raw)
        if not fields or self.loss_key not in fields:
            return False
        self.val(fields, raw, line, ended)
        return True

    def fault(self, text: str) -> None:
        self._run("").fault(text)

    def _back(self, step: int, raw: bytes, line: int) -> bool:
        """A step below the last one: an echo (True: drop it) or the start of another run."""
        if step > 0 and hash(raw) in self.seen:
            self.runs[-1].num_echoed += 1
            return True
        if self.fixed_run is not None:
            self.fault(f"line {line}: step {step} comes after step {self.step}")
        elif len(self.runs) >= RUN_CAP:
            self.runs[-1].fault(f"line {line}: more than {RUN_CAP} runs, the rest is not read")
            return True
        else:
            self.runs.append(Run(self.path))
            self._fresh()
        return False

    def _tick(self, clock: float, line: int) -> None:
        if clock < self.clock and (self.step > self.EARLY or self.fixed_run is not None):
            self.fault(
                f"line {line}: the clock runs backwards, {clock:.0f} ms after {self.clock:.0f} ms"
            )
        self.clock = clock

    def train(self, match: re.Match, raw: bytes, line: int) -> None:
        """A training line. Nearly all lines of a log are of this kind: written to be fast.

        Only its step and clock count; an echo of a line of this run is dropped.
        """
        number, clock, unit = match.groups()
        step = int(number)
        if step < self.step:
            if step <= 1:
                if self._back(step, raw, line):
                    return
            else:
                if hash(raw) in self.seen:
                    self.runs[-1].num_echoed += 1
                elif self.fixed_run is not None:
                    self.fault(f"line {line}: step {step} comes after step {self.step}")
                return
        run = self.runs[-1] if self.runs else self._run("")
        if not run.format:
            run.format = "step/ms" if unit == b"ms" else "step/s"
        if len(self.seen) < POINT_CAP:
            self.seen.add(hash(raw))
        self._tick(float(clock) if unit == b"ms" else 1000.0 * float(clock), line)
        self.step = run.last_train_step = step

    def val(self, fields: dict[str, bytes], raw: bytes, line: int, ended: bool) -> None:
        try:
            point = val_point(fields, line, self.loss_key)
            if not ended and not _TIME.match(fields.get("step_avg", b"")):
                raise LogError("the line is cut")
        except LogError as error:
            self.fault(f"line {line}: a validation line that is not counted, {error}: {show(raw)}")
            return
        kind = "step/ms" if fields["train_time"].endswith(b"ms") else "step/s"
        self.add(point, fields[self.loss_key], raw, kind)
        self._check_average(point, fields.get("step_avg", b""))

    def add(self, point: Point, digits: bytes, raw: bytes, kind: str) -> None:
        line = point.line
        if self.num_points >= POINT_CAP:
            if self.num_points == POINT_CAP:
                self.fault(f"line {line}: more than {POINT_CAP} validation lines, rest not read")
                self.num_points += 1
            return
        if point.step < self.step and self._back(point.step, raw, line):
            return
        run = self._run(kind)
        if run.points and run.points[-1].step == point.step:
            if hash(raw) in self.seen and point.step > 0:
                run.num_echoed += 1
                return
            self.fault(f"line {line}: a second validation of step {point.step}, not counted")
            return
        places = len(digits.partition(b".")[2])
        if math.isfinite(point.val_loss):
            if self.decimals is not None and places < self.decimals:
                self.fault(
                    f"line {line}: {digits.decode()} has {places} decimals where this run prints "
                    f"{self.decimals}: cut, not counted"
                )
                return
            self.decimals = places
        else:
            run.note(f"line {line}: loss is {point.val_loss}")
        if run.points and point.total != run.points[-1].total:
            self.fault(
                f"line {line}: {point.total} steps where this run had {run.points[-1].total}"
            )
        if point.train_time_ms is not None:
            self._tick(point.train_time_ms, line)
        if len(self.seen) < POINT_CAP:
            self.seen.add(hash(raw))
        self.step = point.step
        run.points.append(point)
        self.num_points += 1

    def _check_average(self, point: Point, step_avg: bytes) -> None:
        """train_time and step_avg must tell one story: the unit of one of them may be wrong."""
        average = _TIME.match(step_avg)
        if average is None or point.step <= self.EARLY or not point.train_time_ms:
            return
        average_ms = float(average[1]) * (1.0 if average[2] == b"ms" else 1000.0)
        if not 0.2 < average_ms * point.step / point.train_time_ms < 5.0:
            self.fault(
                f"line {point.line}: train_time and step_avg disagree by more than 5 times: "
                "one has a wrong unit or was changed"
            )
