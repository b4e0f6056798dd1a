"""Result lines become runs; the public log formats.

A result line begins with `key:value` fields, `step` and the loss among them. Everything else in a
log is text. A line that looks like a result and cannot be read is a fault of the run, never a
number. `records.log` reads our format with these parts, and any file through its `parse`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

LINE_CAP = 1 << 16  # bytes; longer lines are hashed and counted, never interpreted
FILE_CAP = 1 << 26  # bytes after decompression; the largest public log has 1 MB
LINES_CAP = 1 << 19  # lines of one file
POINT_CAP = 50_000  # validations of one file
RUN_CAP = 1_000  # runs in one file
SAMPLED = 16  # of this many training steps one keeps its loss and clock
REMARK_CAP = 50  # faults or edits of one run


class LogError(ValueError):
    """A log that cannot be written, or cannot be read as the format that it claims."""


def printable(text: object) -> str:
    """Text of a log or a file name on one line: control characters are escaped."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
    text: str | None = None


@dataclass
class Run:
    """One run of a log file.

    faults   reasons against it as evidence: unreadable result lines, contradictions
    edits    signs that the log was changed after it was closed: digest, lines, sources
    """

    path: str
    format: str = ""  # "ours", "step/ms", "step/s", "llm.c"
    points: list[Point] = field(default_factory=list)
    sampled: dict[int, tuple] = field(default_factory=dict)  # step: (training loss, clock in ms)
    last_train_step: int | None = None
    num_echoed: int = 0
    sources: dict[str, Source] = field(default_factory=dict)
    code_sha256: str | None = None  # of all sources of the run, in every format
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

    def fault(self, text: str) -> None:
        if len(self.faults) < REMARK_CAP:
            self.faults.append(text)

    def edit(self, text: str) -> None:
        if len(self.edits) < REMARK_CAP:
            self.edits.append(text)

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
        """Whether the last step was validated; None where the format does not say their number."""
        last = self.final
        return None if last is None or last.total is None else last.step >= last.total

    @property
    def why_incomplete(self) -> str | None:
        """The reason why this run did not end, or None. NaN is not an end."""
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
            text = self.environment["tokens_per_step"]
            return json.loads(text) if BATCHES.fullmatch(text) else None
        recipe = self.recipe or {}
        sizes = recipe.get("batch_stages") or [recipe.get("batch_tokens")]
        numbers = [recipe.get("num_iterations"), recipe.get("extension_steps") or 0]
        if not (isinstance(sizes, list) and all(type(n) is int for n in numbers + sizes)):
            return None
        scheduled = numbers[0] - numbers[1]
        return [[-(-i * scheduled // len(sizes)), size] for i, size in enumerate(sizes)]

    def tokens_at(self, step: int) -> int | None:
        """Tokens trained on before `step`; None if the log does not say."""
        return self.batches and trained_tokens(self.batches, step)


BATCHES = re.compile(r"\[\[0, \d{1,12}\](?:, \[\d{1,9}, \d{1,12}\]){0,1000}\]")


def trained_tokens(batches: Sequence[Sequence[int]], step: int) -> int:
    """Tokens trained on before `step`, from [first step, tokens a step] of each batch size."""
    ends = [start for start, _ in batches[1:]] + [step]
    return sum(size * max(0, min(step, end) - start)
               for (start, size), end in zip(batches, ends))


# ---------------------------------------------------------------------------------- result lines

# step lines as nearly all logs have them; read_fields covers the rest
TRAIN = re.compile(
    rb"step:(\d{1,9})/\d{1,9} (?:train_loss:(\S{1,24}) )?train_time:(\d{1,12}(?:\.\d{1,9})?)(m?s) "
)
_KEY_VALUE = re.compile(rb"([A-Za-z_]\w{0,40}):(\S{1,64})$")
_STEP = re.compile(rb"(\d{1,9})(?:/(\d{1,9}))?$")
_LOSS = re.compile(rb"(?:\d{1,6}\.\d{1,12}|-?nan|-?inf)$", re.IGNORECASE)
_TIME = re.compile(rb"(\d{1,12}(?:\.\d{1,9})?)(ms|s)$")


def read_fields(raw: bytes) -> dict[str, bytes] | None:
    """`key:value` fields up to the first other word of a line; None without `step`."""
    fields: dict[str, bytes] = {}
    for token in raw.split():
        match = _KEY_VALUE.match(token)
        if match is None:
            break
        fields.setdefault(match[1].decode(), match[2])
    return fields if "step" in fields else None


def val_point(fields: dict[str, bytes], line: int, loss_key: str) -> Point:
    """The validation in these fields; LogError names the field that cannot be read."""
    step = _STEP.match(fields["step"])
    loss = _LOSS.match(fields[loss_key])
    train_time_ms = _milliseconds(fields.get("train_time", b""))
    if step is None:
        raise LogError("its step cannot be read")
    if loss is None:
        raise LogError("its loss cannot be read")
    if train_time_ms is None:
        raise LogError("its train_time cannot be read (a number with ms or s)")
    total = int(step[2]) if step[2] else None
    return Point(int(step[1]), total, float(loss[0]), train_time_ms, line)


def _milliseconds(text: bytes) -> float | None:
    match = _TIME.match(text)
    return match and float(match[1]) * (1.0 if match[2] == b"ms" else 1000.0)


def _quoted(raw: bytes) -> str:
    return repr(raw[:100].decode(errors="replace").rstrip("\r\n"))


class Collector:
    """Collects the result lines of a file into runs."""

    EARLY = 20  # the clock of 2024 logs restarts after the first ten steps

    def __init__(self, path: str, loss_key: str, fixed_run: Run | None = None) -> None:
        self.path = path
        self.loss_key = loss_key
        self.key = loss_key.encode()
        self.fixed_run = fixed_run  # ours: one run a log, a step that falls back is a fault
        self.runs: list[Run] = [fixed_run] if fixed_run else []
        self.num_points = 0
        self._reset()

    def _reset(self) -> None:
        self.seen: set[int] = set()  # hashes of the lines of this run
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
        """Take a line if it is a result line. `ended`: it has its newline."""
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

    def _is_echo(self, step: int, raw: bytes, line: int) -> bool:
        """For a step below the last one: True for a line to drop, False where a run starts."""
        if step > 0 and hash(raw) in self.seen:
            self.runs[-1].num_echoed += 1
            return True
        if self.fixed_run is not None:
            self.fault(f"line {line}: step {step} comes after step {self.step}")
        elif len(self.runs) >= RUN_CAP:
            raise LogError(f"line {line}: more than {RUN_CAP} runs, the rest was not read")
        else:
            self.runs.append(Run(self.path))
            self._reset()
        return False

    def _tick(self, clock: float, line: int) -> None:
        if clock < self.clock and (self.step > self.EARLY or self.fixed_run is not None):
            self.fault(
                f"line {line}: the clock runs backwards, {clock:.0f} ms after {self.clock:.0f} ms"
            )
        self.clock = clock

    def train(self, match: re.Match, raw: bytes, line: int) -> None:
        """A training line: only its step and clock count. Nearly all lines are of this kind."""
        number, loss, clock, unit = match.groups()
        step = int(number)
        if step < self.step:
            if step <= 1:
                if self._is_echo(step, raw, line):
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
        ms = float(clock) if unit == b"ms" else 1000.0 * float(clock)
        self._tick(ms, line)
        if not step % SAMPLED:
            run.sampled[step] = loss, ms
        self.step = run.last_train_step = step

    def val(self, fields: dict[str, bytes], raw: bytes, line: int, ended: bool) -> None:
        try:
            point = val_point(fields, line, self.loss_key)
            if not ended and not _TIME.match(fields.get("step_avg", b"")):
                raise LogError("the line is cut")
        except LogError as error:
            self.not_counted(raw, line, str(error))
            return
        kind = "step/ms" if fields["train_time"].endswith(b"ms") else "step/s"
        before = self.runs[-1].final if self.runs else None
        self.add(point, fields[self.loss_key], raw, kind)
        average = _milliseconds(fields.get("step_avg", b""))
        if average is not None and point.step > self.EARLY:
            self._check_average(point, average, before)

    def _check_average(self, point: Point, average: float, before: Point | None) -> None:
        """step_avg is train_time over the steps so far (in 2024 without the first ten), in logs of
        the steps track also over the steps since the validation before; exact to the rounding."""
        forms = [(point.train_time_ms, point.step)]
        if self.fixed_run is None:
            forms.append((point.train_time_ms, point.step - 10))
            if before and before.step < point.step and before.train_time_ms is not None:
                forms.append((point.train_time_ms - before.train_time_ms, point.step - before.step))
        if not any(abs(ms / steps - average) <= 0.006 + 1.1 / steps for ms, steps in forms):
            self.fault(f"line {point.line}: step_avg is {average:.2f} ms, train_time gives "
                       f"{forms[0][0] / point.step:.2f} ms a step: one of them was changed")

    def not_counted(self, raw: bytes, line: int, why: str) -> None:
        self.fault(f"line {line}: a validation line that is not counted, {why}: {_quoted(raw)}")

    def add(self, point: Point, digits: bytes, raw: bytes, kind: str) -> None:
        """Count a validation; `digits` is its loss as printed."""
        line = point.line
        if self.num_points >= POINT_CAP:
            raise LogError(f"line {line}: more than {POINT_CAP} validations, the rest was not read")
        if point.step < self.step and self._is_echo(point.step, raw, line):
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


# ---------------------------------------------------------------------------------- public logs
#
# Code, a rule, the environment, a rule, step lines; or parts of it. Formats seen so far:
# `step:N/M val_loss:X train_time:Yms step_avg:Zms` with milliseconds or seconds, llm.c's
# `s:N tel:X`, captures of stdout, several runs in one file. Flat programs (flat/) add track,
# seed and data, and name a CPU.

_LLMC = re.compile(rb"s:(\d{1,9}) (tel|trl):")
RULE = re.compile(rb"={80,}\s*$")
CODE = re.compile(rb"(?:import \w|from [\w.]+ import |with open\(sys\.argv)")
_TORCH = re.compile(r"Running (?i:pytorch) (\S{1,80}) compiled for CUDA (\S{1,20})"
                    r"(?: on (.{1,80}?) with world_size (\d{1,6}))?\s*$")
_CPU = re.compile(r"CPU with (\d{1,6}) cores")
_CLAIM = re.compile(r"Running for track (\w{1,40}) with seed (\d{1,18}) on data "
                    r"([0-9a-f]{64})\s*$")
_PYTHON = re.compile(r"Running [Pp]ython (\d+\.\d+\.\S{1,20})")
_DEVICE = re.compile(r"Running on device_name=(.{1,80}?) with world_size=(\d{1,6})\s*$")
_SMI_GPU = re.compile(
    r"\|\s{1,6}(\d{1,4})\s{1,4}(\S.{0,40}?)\s{1,40}(?:On |Off|N/A)?\s{0,4}\|\s{1,4}[0-9A-F]{8}:"
)


def parse_public(first: bytes, pieces: Iterator[bytes], name: str, loss_key: str) -> list[Run]:
    """The runs of a public log, given its first line and the others.

    Lines of the code are never results: lines between the first import and the next rule are held
    back, and read only if no rule follows (a capture of stdout that happens to say "import").
    """
    curve = Collector(name, loss_key)
    environment = Run(name)
    gpus: dict[int, str] = {}
    code_hash, has_code = hashlib.sha256(), False
    in_code = False
    held_back: list[tuple[bytes, int, bool]] = []
    early: list[bytes] = []  # lines before the first import belong to the code too
    key = loss_key.encode()
    line, continued, fault = 0, False, None

    def read(raw: bytes, number: int, ended: bool) -> None:
        if curve.read(raw, number, ended):
            return
        if llmc := _LLMC.match(raw):
            _llmc_line(curve, raw, llmc, number, ended)

    try:
        for piece in chain([first], pieces):
            if not in_code and not continued and piece.startswith(b"step:"):
                match = TRAIN.match(piece)
                if match and piece.endswith(b"\n") and key not in piece:  # nearly every line
                    line += 1
                    curve.train(match, piece, line)
                    continue
            ended = piece.endswith(b"\n")
            too_long = not ended and len(piece) == LINE_CAP
            if continued:
                if in_code:
                    code_hash.update(piece)
                continued = not ended
                continue
            continued = too_long
            line += 1
            interesting = not too_long and (piece.startswith((b"step:", b"s:")) or key in piece)
            if in_code:
                if RULE.match(piece):
                    in_code, held_back = False, []
                else:
                    code_hash.update(piece)
                    if interesting:
                        if len(held_back) == POINT_CAP:
                            raise LogError(f"line {line}: more than {POINT_CAP} result lines in "
                                           "the code, the rest was not read")
                        held_back.append((piece, line, ended))
            elif interesting:
                read(piece, line, ended)
            elif CODE.match(piece):
                in_code = has_code = True
                for raw in (*early, piece):
                    code_hash.update(raw)
            elif RULE.match(piece):
                early = []
            else:
                if not has_code and len(early) < 200:
                    early.append(piece)
                if piece[:1] in b"R|":
                    text = printable(piece.decode(errors="replace").rstrip("\r\n"))
                    _environment_line(text, environment, gpus)
    except LogError as error:
        fault = str(error)
    try:
        for raw, number, ended in held_back:
            read(raw, number, ended)
    except LogError as error:
        fault = str(error)
    if fault:
        curve.fault(fault)
    runs = [r for r in curve.runs if r.points or r.faults or r.last_train_step is not None]
    for run in runs:
        run.python, run.torch, run.cuda = environment.python, environment.torch, environment.cuda
        run.gpu, run.gpu_count = environment.gpu, environment.gpu_count
        run.environment, run.result = dict(environment.environment), dict(environment.result)
        if gpus:
            run.gpu = run.gpu or gpus[min(gpus)]
            run.gpu_count = run.gpu_count or len(gpus)
        if has_code and not held_back:
            run.code_sha256 = code_hash.hexdigest()
    return runs


def _llmc_line(curve: Collector, raw: bytes, match: re.Match, line: int, ended: bool) -> None:
    if match[2] == b"trl":
        return
    digits = b"".join(raw[match.end() :].split()[:1])
    if not ended:
        curve.not_counted(raw, line, "the line is cut")
    elif not _LOSS.match(digits):
        curve.not_counted(raw, line, "its loss cannot be read")
    else:
        curve.add(Point(int(match[1]), None, float(digits), None, line), digits, raw, "llm.c")


def _environment_line(text: str, run: Run, gpus: dict[int, str]) -> None:
    if text.startswith("Running"):
        if match := _TORCH.match(text):
            run.torch, run.cuda = match[1], match[2]
            if cpu := _CPU.fullmatch(match[3] or ""):
                run.environment |= {"device": "cpu", "cpu": "CPU", "cpu_cores": cpu[1]}
                run.result["world_size"] = int(match[4])
            elif match[3]:
                run.gpu, run.gpu_count = match[3].strip(), int(match[4])
        elif match := _CLAIM.match(text):
            run.result |= {"track": match[1], "seed": int(match[2]), "data_digest": match[3]}
        elif match := _DEVICE.match(text):
            run.gpu, run.gpu_count = match[1].strip(), int(match[2])
        elif match := _PYTHON.match(text):
            run.python = match[1]
    elif (match := _SMI_GPU.match(text)) and len(gpus) < 4096:
        gpus.setdefault(int(match[1]), match[2].strip())
