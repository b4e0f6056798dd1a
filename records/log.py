"""The log of a run: one definition, used by the trainer to write and by `records` to read.

Our format, version 1. UTF-8 text, lines end in a newline:

    nanogpt speedrun log 1
    begin source NAME lines=N newline=1 sha256=HEX    one block for each local source of the run
    ...N lines, any text...                           newline=0: the last line has none in the file
    end source
    begin environment lines=N
    key: value                                        Python, torch, GPUs, commit, ...
    end environment
    begin recipe lines=N
    {...}                                             the resolved recipe as JSON
    end recipe
    begin steps
    step:0/100 val_loss:5.5452 train_time:0ms step_avg:0.00ms
    step:1/100 train_loss:5.5449 train_time:21ms step_avg:21.00ms
    ...other text is a note...
    begin result
    status: complete                                  complete, preempted or failed; then key: value
    ...
    marks: 3f2a...                                    4 hex digits for each line outside the sources
    digest: HEX                                       sha256 of every byte above this line

Blocks carry their number of lines, so a source may contain anything, this docstring too. In a
record folder the sources are kept once, beside the logs: a log there says `kept source NAME ...`
instead of the block, and reading it puts the block back, so the digest is still that of the log as
it was written.

What the digest proves: the file is, byte for byte, what was closed. A changed digit, a lost line,
a swapped source or a cut tail is found, and the marks name the line. What it cannot prove: that the
numbers were ever measured. Whoever rewrites a log can compute a new digest; only running the
program again (`python -m records reproduce`) answers that.

`parse` reads this format and the public ones: `step:N/M val_loss:X train_time:Yms step_avg:Zms`
with milliseconds or seconds, and llm.c's `s:N tel:X`. It is strict about what a result line is and
lenient about everything else; what looks like a result and cannot be read is named in `Run.faults`,
never guessed. Memory is bounded whatever the file holds.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MAGIC = "nanogpt speedrun log 1"
STATUSES = ("complete", "preempted", "failed")

LINE_CAP = 1 << 16  # bytes; longer lines are hashed and counted, never interpreted
FILE_CAP = 1 << 30  # bytes after decompression; a log of 1 GiB is not a log
POINT_CAP = 200_000  # validation points of one file
RUN_CAP = 1_000  # runs in one file
SOURCE_CAP = 1 << 24  # bytes of source text kept in memory when asked for
MARKS_PER_LINE = 256


# ---------------------------------------------------------------------------------- result lines


def val_line(step: int, num_iterations: int, val_loss: float, train_time_ms: float) -> str:
    """The validation line of every run; times are milliseconds of training, validation excluded."""
    return (
        f"step:{step}/{num_iterations} val_loss:{val_loss:.4f} "
        f"train_time:{train_time_ms:.0f}ms step_avg:{train_time_ms / max(step, 1):.2f}ms"
    )


def train_line(step: int, num_iterations: int, train_loss: float, train_time_ms: float) -> str:
    """The training line; `train_loss` is the mean loss of this step's tokens."""
    return (
        f"step:{step}/{num_iterations} train_loss:{train_loss:.4f} "
        f"train_time:{train_time_ms:.0f}ms step_avg:{train_time_ms / max(step, 1):.2f}ms"
    )


# ---------------------------------------------------------------------------------- writing


class LogError(ValueError):
    """A log that cannot be written or cannot be read as what it claims to be."""


def _clean_name(name: str) -> str:
    parts = PurePosixPath(name).parts
    bad = not parts or name.startswith("/") or ".." in parts or re.search(r"[\s\\:\x00-\x1f]", name)
    if bad or str(PurePosixPath(name)) != name:
        raise LogError(
            f"source name: expected a relative path with / and without spaces, got {name!r}"
        )
    return name


def _one_line(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    return " | ".join(str(value).splitlines()).strip()


class RunLog:
    """Writes one log. Until `close` has returned, the file on disk is an incomplete log.

    path          must not exist yet; parents are made
    sources       name (relative, `/`) -> text, each local source the run uses
    environment   key -> value; `started` (UTC) is added if missing
    recipe        anything JSON can hold; NaN is refused

    Every line reaches the operating system before the call returns. A write that fails (disk full)
    raises OSError, and from then on every call raises: a log with a hole is never closed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        sources: Mapping[str, str],
        environment: Mapping[str, object],
        recipe: Mapping[str, object],
    ) -> None:
        self.path = Path(path)
        environment = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **environment}
        head = [f"{MAGIC}\n".encode()]
        bodies: dict[int, bytes] = {}  # position in head -> source body, which carries no marks
        for name, text in sources.items():
            body = text.encode()
            newline = int(body.endswith(b"\n") or not body)
            num_lines = body.count(b"\n") + (1 - newline)
            digest = hashlib.sha256(body).hexdigest()
            head.append(
                f"begin source {_clean_name(name)} lines={num_lines} newline={newline} "
                f"sha256={digest}\n".encode()
            )
            bodies[len(head)] = body if newline else body + b"\n"
            head.append(b"end source\n")
        env_lines = []
        for key, value in environment.items():
            if not re.fullmatch(r"[\w .()/+-]{1,80}", key):
                raise LogError(f"environment key: expected words, got {key!r}")
            env_lines.append(f"{key}: {_one_line(value)}")
        recipe_lines = json.dumps(recipe, indent=1, sort_keys=True, allow_nan=False).split("\n")
        for title, lines in (("environment", env_lines), ("recipe", recipe_lines)):
            head.append(f"begin {title} lines={len(lines)}\n".encode())
            head.extend(f"{line}\n".encode() for line in lines)
            head.append(f"end {title}\n".encode())
        head.append(b"begin steps\n")

        self._hash = hashlib.sha256()
        self._marks = bytearray()
        self._size = 0
        self._broken = False
        self._last_val: tuple[int, int, float] | None = None  # step, num_iterations, loss
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 (open for the run)
        except FileExistsError:
            raise FileExistsError(
                f"{self.path} exists already: another run has this name; choose another run id"
            ) from None
        chunk = bytearray()
        for i, line in enumerate(head):
            chunk += bodies.get(i, b"") + line
            self._marks += _mark(line)
        self._write(bytes(chunk))

    def _write(self, data: bytes) -> None:
        if self._broken or self._file.closed:
            raise LogError(f"{self.path}: this log is closed or an earlier write to it failed")
        view = memoryview(data)
        try:
            while view:
                written = self._file.write(view)
                view = view[written:]
        except BaseException:  # a full disk, or an interrupt inside a line: the log has a hole
            self._broken = True
            raise
        self._hash.update(data)
        self._size += len(data)

    def line(self, text: str) -> None:
        """Write one line (a step line or a note). Several lines in `text` are several notes."""
        for part in str(text).splitlines() or [""]:
            if part.startswith(("begin ", "end ", "kept ", "marks:", "digest:", MAGIC)):
                part = " " + part  # a note must not look like a part of the format
            raw = f"{part}\n".encode(errors="backslashreplace")
            self._write(raw)
            self._marks += _mark(raw)
            fields = _read_fields(raw)
            if fields and "val_loss" in fields:
                try:
                    point = _val_point(fields, 0, "val_loss")
                except LogError as error:
                    self._broken = True
                    raise LogError(f"{self.path}: {error}; val_line() makes it") from None
                self._last_val = (point.step, point.total or -1, point.val_loss)

    def close(self, result: Mapping[str, object]) -> None:
        """Write the closing block and make it durable. `result["status"]` says how the run ended.

        `complete` is refused (LogError, the file stays incomplete) unless the last validation line
        is that of the last step and its loss is finite and equal to `final_val_loss`, if given.
        """
        status = result.get("status")
        if status not in STATUSES:
            raise LogError(f"status: expected one of {', '.join(STATUSES)}, got {status!r}")
        if status == "complete":
            problem = self._not_complete(result)
            if problem:
                self.abandon()
                raise LogError(f"{self.path}: cannot be closed as complete: {problem}")
        lines = [b"begin result\n", f"status: {status}\n".encode()]
        for key, value in result.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", key) or key in ("marks", "digest"):
                raise LogError(f"result key: expected lower-case words, got {key!r}")
            if key != "status":
                lines.append(f"{key}: {_one_line(value)}\n".encode())
        for raw in lines:
            self._marks += _mark(raw)
        hexed = self._marks.hex()
        width = 4 * MARKS_PER_LINE
        lines += [f"marks: {hexed[i : i + width]}\n".encode() for i in range(0, len(hexed), width)]
        try:
            self._write(b"".join(lines))
            os.fsync(self._file.fileno())
            self._check_untouched()
            end = self._size
            self._write(f"digest: {self._hash.hexdigest()}\n".encode())
            try:
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file without a closing block: the log stays incomplete. Safe to call twice."""
        self._broken = True
        self._file.close()

    def _not_complete(self, result: Mapping[str, object]) -> str | None:
        if self._last_val is None:
            return "it holds no validation line"
        step, total, loss = self._last_val
        if step != total:
            return f"its last validation is of step {step}, the run has {total}"
        if not math.isfinite(loss):
            return f"its final loss is {loss}"
        final = result.get("final_val_loss", loss)
        if not isinstance(final, (int, float)) or not abs(final - loss) <= 5.1e-5:
            return f"final_val_loss is {final}, its last validation line says {loss}"
        return None

    def _check_untouched(self) -> None:
        """The file under this path is the one written here, and nobody cut or extended it."""
        try:
            here, ours = os.stat(self.path), os.fstat(self._file.fileno())
        except FileNotFoundError:
            raise LogError(f"{self.path}: was removed while the run wrote to it") from None
        if (here.st_dev, here.st_ino) != (ours.st_dev, ours.st_ino):
            raise LogError(f"{self.path}: was replaced while the run wrote to it")
        if ours.st_size != self._size:
            raise LogError(
                f"{self.path}: expected {self._size} bytes written, found {ours.st_size}: "
                "something else wrote to this log"
            )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self.abandon()


def _mark(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:2]


# ---------------------------------------------------------------------------------- what is read


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
    """One run of a log file. `faults` name what makes it unfit as evidence, `notes` what is odd."""

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
    notes: list[str] = field(default_factory=list)

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


# ---------------------------------------------------------------------------------- reading lines

# step lines as nearly all logs have them; the general reading below covers the rest
_TRAIN = re.compile(
    rb"step:(\d{1,9})/(\d{1,9}) (?:train_loss:(\S{1,24}) )?train_time:(\d{1,12}(?:\.\d{1,9})?)(m?s)"
    rb" step_avg:\S{1,24}ms\s*$"
)
_KEY_VALUE = re.compile(rb"([A-Za-z_]\w{0,40}):(\S{1,64})$")
_STEP = re.compile(rb"(\d{1,9})(?:/(\d{1,9}))?$")
_LOSS = re.compile(rb"(?:\d{1,6}\.\d{1,12}|-?nan|-?inf)$", re.IGNORECASE)
_TIME = re.compile(rb"(\d{1,12}(?:\.\d{1,9})?)(ms|s)$")
_LLMC = re.compile(rb"s:(\d{1,9}) (tel|trl):")
_RULE = re.compile(rb"={80,}\s*$")


def _read_fields(raw: bytes) -> dict[str, bytes] | None:
    """`key:value` fields at the start of a line up to the first other word; None if it has none.

    A `step` field must be among them. The last field of a line without a newline may be cut: it is
    kept under its own name only if the line ended.
    """
    fields: dict[str, bytes] = {}
    for token in raw.split():
        match = _KEY_VALUE.match(token)
        if match is None:
            break
        fields.setdefault(match[1].decode(), match[2])
    return fields if "step" in fields else None


def _val_point(fields: dict[str, bytes], line: int, loss_key: str) -> Point:
    step = _STEP.match(fields["step"])
    loss = _LOSS.match(fields[loss_key])
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


def _show(raw: bytes) -> str:
    return repr(raw[:100].decode(errors="replace").rstrip("\r\n"))


class _Curve:
    """Collects the result lines of a file into runs. Knows nothing about the rest of the file."""

    EARLY = 20  # the clock of 2024 logs restarts after its first ten steps

    def __init__(self, path: str, loss_key: str, fixed_run: Run | None = None) -> None:
        self.path = path
        self.loss_key = loss_key
        self.fixed_run = fixed_run  # ours: one run a log, a step that falls back is a fault
        self.runs: list[Run] = [fixed_run] if fixed_run else []
        self.num_points = 0
        self._fresh()

    def _fresh(self) -> None:
        self.seen: set[int] = set()
        self.step = -1
        self.clock: float | None = None
        self.decimals: int | None = None

    def _run(self, kind: str) -> Run | None:
        if not self.runs:
            if len(self.runs) >= RUN_CAP:
                return None
            self.runs.append(Run(self.path))
        run = self.runs[-1]
        run.format = run.format or kind
        return run

    def fault(self, text: str) -> None:
        run = self._run("")
        if run is not None and len(run.faults) < 50:
            run.faults.append(text)

    def _back(self, step: int, raw: bytes, line: int) -> bool:
        """A step below the last one: an echo (True: drop it) or the start of another run."""
        if step > 0 and hash(raw) in self.seen:
            self.runs[-1].num_echoed += 1
            return True
        if self.fixed_run is not None:
            self.fault(f"line {line}: step {step} comes after step {self.step}")
        elif len(self.runs) < RUN_CAP:
            self.runs.append(Run(self.path))
            self._fresh()
        return False

    def _tick(self, step: int, clock: float | None, line: int) -> None:
        if clock is None:
            return
        if self.clock is not None and clock < self.clock and self.step > self.EARLY:
            self.fault(
                f"line {line}: the clock runs backwards, {clock:.0f} ms after {self.clock:.0f} ms"
            )
        self.clock = clock

    def train(self, match: re.Match, raw: bytes, line: int) -> None:
        step = int(match[1])
        if step <= 1 and step < self.step and self._back(step, raw, line):
            return
        if step < self.step:  # an echo of a line of this run, or text of another program
            if hash(raw) in self.seen:
                self.runs[-1].num_echoed += 1
            elif self.fixed_run is not None:
                self.fault(f"line {line}: step {step} comes after step {self.step}")
            return
        run = self._run("step/ms" if match[5] == b"ms" else "step/s")
        if run is None:
            return
        if len(self.seen) < POINT_CAP:
            self.seen.add(hash(raw))
        self._tick(step, float(match[4]) * (1.0 if match[5] == b"ms" else 1000.0), line)
        self.step = step
        run.last_train_step = max(step, run.last_train_step or 0)

    def val(self, fields: dict[str, bytes], raw: bytes, line: int, ended: bool) -> None:
        try:
            point = _val_point(fields, line, self.loss_key)
            if not ended and not _TIME.match(fields.get("step_avg", b"")):
                raise LogError("the line is cut")
        except LogError as error:
            self.fault(f"line {line}: a validation line that is not counted, {error}: {_show(raw)}")
            return
        kind = "step/s" if fields["train_time"].endswith(b"s") and not fields[
            "train_time"
        ].endswith(b"ms") else "step/ms"
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
        if run is None:
            return
        if run.points and run.points[-1].step == point.step:
            if hash(raw) in self.seen and point.step > 0:
                run.num_echoed += 1
                return
            if point.step == 0 and self.fixed_run is None:  # two runs that both stopped at once
                self.runs.append(Run(self.path, format=kind))
                self._fresh()
                run = self.runs[-1]
            else:
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
            run.notes.append(f"line {line}: loss is {point.val_loss}")
        if run.points and point.total != run.points[-1].total:
            self.fault(
                f"line {line}: {point.total} steps where this run had {run.points[-1].total}"
            )
        self._tick(point.step, point.train_time_ms, line)
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


# ---------------------------------------------------------------------------------- reading files


def _open(source: object) -> tuple[io.BufferedIOBase, str, Path | None]:
    if isinstance(source, bytes):
        return io.BytesIO(source), "<bytes>", None
    if isinstance(source, str) and "\n" in source:
        return io.BytesIO(source.encode()), "<text>", None
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the file of a log, found none")
    file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    if file.read(2) == b"\x1f\x8b":
        file.close()
        return gzip.open(path, "rb"), str(path), path
    file.seek(0)
    return file, str(path), path


def _pieces(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Lines of at most LINE_CAP bytes; a longer line comes in several pieces."""
    total = 0
    while True:
        try:
            piece = file.readline(LINE_CAP)
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise LogError(f"the file cannot be read to its end: {error}") from error
        if not piece:
            return
        total += len(piece)
        if total > FILE_CAP:
            raise LogError(f"the file is larger than {FILE_CAP >> 20} MiB, the rest was not read")
        yield piece


def parse(
    source: str | bytes | os.PathLike, *, loss_key: str = "val_loss", keep_sources: bool = False
) -> list[Run]:
    """All runs of a log file (a path, or its text), ours or public, gzip or plain.

    loss_key       the field that counts as the loss (`val_loss`; one public record names another)
    keep_sources   keep the text of our logs' sources in `Run.sources`, up to SOURCE_CAP bytes
    A file without a measurement gives []. Raises FileNotFoundError if there is no such file.
    """
    file, name, path = _open(source)
    with file:
        pieces = _pieces(file)
        first = b""
        try:
            first = next(pieces, b"")
            if first.rstrip(b"\r\n") == MAGIC.encode():
                return _parse_ours(first, pieces, name, path, source, loss_key, keep_sources)
            return _parse_public(first, pieces, name, loss_key)
        except LogError as error:
            return [Run(name, faults=[str(error)])]


# ---------------------------------------------------------------------------------- our format

_SOURCE = re.compile(
    r"(begin|kept) source (\S{1,200}) lines=(\d{1,9}) newline=([01]) sha256=([0-9a-f]{64})$"
)
_BLOCK = re.compile(r"begin (environment|recipe) lines=(\d{1,7})$")


def _find_kept(path: Path | None, name: str, sha256: str) -> Path | None:
    """The file of a kept source, in `source/` beside the log or one folder up; maybe a variant."""
    if path is None:
        return None
    for folder in (path.parent / "source", path.parent.parent / "source"):
        for candidate in (folder / name, folder / "variants" / sha256[:12] / name):
            if candidate.is_file() and _file_sha256(candidate) == sha256:
                return candidate
    return None


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Stream:
    """The pieces of a log of ours, with its hash, line number and marks kept up to date.

    The hash covers every piece handed out so far but the current one, so that the digest line can
    be compared with what stands above it.
    """

    def __init__(self, first: bytes, pieces: Iterator[bytes], marks: bool) -> None:
        self.pieces, self.pending = pieces, first
        self.hash = hashlib.sha256()
        self.current = b""
        self.line = 0
        self.want_marks, self.marks, self.mark_lines = marks, bytearray(), []

    def next(self) -> bytes:
        self.commit()
        if self.pending:
            piece, self.pending = self.pending, b""
        else:
            piece = next(self.pieces, b"")
        self.current = piece
        return piece

    def text(self) -> str | None:
        """The next whole line without its newline, None at the end of the file or if it is cut."""
        piece = self.next()
        if not piece:
            return None
        whole = piece.endswith(b"\n")
        if not whole and len(piece) == LINE_CAP:
            while piece and not piece.endswith(b"\n"):  # a line nobody wants to read: hash only
                piece = self.next()
            self.line += 1
            return ""
        self.line += 1
        if self.want_marks and len(self.marks) < 2 * POINT_CAP:
            self.marks += _mark(piece)
            self.mark_lines.append(self.line)
        return piece[:-1].decode(errors="replace") if whole else None

    def commit(self) -> None:
        if self.current:
            self.hash.update(self.current)
            self.current = b""

    def replace(self, text: str) -> None:
        """The line as it was when the log was closed (`kept source` was `begin source`)."""
        self.current = text.encode() + b"\n"
        if self.want_marks:
            self.marks[-2:] = _mark(self.current)


def _parse_ours(first, pieces, name, path, source, loss_key, keep_sources) -> list[Run]:
    runs = []
    while first:
        stream = _Stream(first, pieces, marks=False)
        run = Run(name, format="ours")
        _read_ours(stream, run, path, loss_key, keep_sources)
        if run.digest is None and any("digest" in fault for fault in run.faults) and not runs:
            changed = _locate(source)
            if changed:
                run.faults.append(changed)
        runs.append(run)
        # a file may hold a second log after the first one's digest
        first = next(pieces, b"")
        if first and first.rstrip(b"\r\n") != MAGIC.encode():
            run.faults.append(f"line {stream.line + 1}: text after the closing block")
            run.digest = None
            break
        if len(runs) >= RUN_CAP:
            break
    return runs


def _read_ours(
    stream: _Stream, run: Run, path: Path | None, loss_key: str, keep_sources: bool
) -> list[str]:
    """Reads one log into `run`; returns the marks of its closing block."""
    fault = run.faults.append
    curve = _Curve(run.path, loss_key, fixed_run=run)
    code = hashlib.sha256()
    kept_bytes = 0
    section = "head"
    marks: list[str] = []
    stream.text()  # the first line, MAGIC
    while True:
        text = stream.text()
        if text is None:
            if stream.current:
                fault(f"line {stream.line}: the log ends in the middle of a line")
                curve_line = stream.current
                fields = _read_fields(curve_line)
                if fields and loss_key in fields:
                    curve.val(fields, curve_line, stream.line, ended=False)
            fault("no closing block: the run did not end, or the log was cut")
            return marks
        if section == "result":
            key, colon, value = text.partition(": ")
            if key == "digest" and colon:
                actual = stream.hash.hexdigest()
                if value == actual:
                    run.digest = value
                else:
                    fault(f"digest does not fit: the log was changed (says {value[:12]}, is "
                          f"{actual[:12]})")
                break
            if key == "marks" and colon:
                if len(marks) < 2 * POINT_CAP // MARKS_PER_LINE:
                    marks.append(value)
            elif colon and len(run.result) < 1000:
                run.result[key] = _value(value)
            else:
                fault(f"line {stream.line}: not a `key: value` of the closing block: {text[:80]!r}")
            continue
        if section == "steps":
            if text == "begin result":
                section = "result"
                continue
            _step_line(curve, stream.current, stream.line, loss_key)
            continue
        if text == "begin steps":
            section = "steps"
            continue
        header = _SOURCE.match(text)
        if header:
            state, source_name, num_lines, newline, sha256 = header.groups()
            try:
                _clean_name(source_name)
            except LogError as error:
                fault(f"line {stream.line}: {error}")
                continue
            if source_name in run.sources:
                fault(f"line {stream.line}: source {source_name} appears twice")
            body: list[bytes] = []
            digest = hashlib.sha256()
            want = keep_sources and kept_bytes < SOURCE_CAP
            if state == "kept":
                kept_bytes += _insert_kept(stream, run, path, text, header, digest, body, want)
            else:
                kept_bytes += _read_body(
                    stream, int(num_lines), newline == "0", digest, body, want
                )
                if stream.text() != "end source":
                    fault(
                        f"line {stream.line}: source {source_name} does not have the "
                        f"{num_lines} lines it announces"
                    )
            if digest.hexdigest() != sha256:
                fault(f"source {source_name} is not the one this run used (sha256 differs)")
            full = want and kept_bytes <= SOURCE_CAP
            run.sources[source_name] = Source(
                source_name,
                sha256,
                int(num_lines),
                b"".join(body).decode(errors="replace") if full else None,
            )
            code.update(f"{source_name} {sha256}\n".encode())
            continue
        block = _BLOCK.match(text)
        if block:
            lines, size = [], 0
            for _ in range(int(block[2])):
                inner = stream.text()
                if inner is None:
                    break
                size += len(inner)
                if size <= 1 << 20:
                    lines.append(inner)
            if stream.text() != f"end {block[1]}":
                fault(f"line {stream.line}: the {block[1]} does not have the lines it announces")
            _take_block(run, block[1], lines)
            continue
        fault(f"line {stream.line}: not a part of the format: {text[:80]!r}")
    if run.sources:
        run.code_sha256 = code.hexdigest()
    final = run.final
    claimed = run.result.get("final_val_loss")
    agree = claimed is None or final is None or (
        isinstance(claimed, (int, float)) and abs(claimed - final.val_loss) <= 5.1e-5
    )
    if run.result.get("status") == "complete" and not agree:
        fault(f"final_val_loss is {claimed}, the last validation line says {final.val_loss}")
    return marks


def _read_body(stream, num_lines, cut_newline, digest, body, want) -> int:
    size = 0
    while num_lines:
        piece = stream.next()
        if not piece:
            break
        ends = piece.endswith(b"\n")
        if ends:
            num_lines -= 1
            stream.line += 1
        kept = piece[:-1] if ends and cut_newline and not num_lines else piece
        digest.update(kept)
        size += len(kept)
        if want and size <= SOURCE_CAP:
            body.append(kept)
    return size


def _insert_kept(stream, run, path, text, header, digest, body, want) -> int:
    """Hashes the block of a source that the record folder keeps, as if it stood in the log."""
    _, name, num_lines, newline, sha256 = header.groups()
    file = _find_kept(path, name, sha256)
    if file is None:
        run.faults.append(f"source {name} is not in the record folder, or not as it was run")
        digest.update(b"missing")
        return 0
    stream.replace("begin" + text.removeprefix("kept"))
    stream.commit()
    data = b""
    size = 0
    with open(file, "rb") as content:
        while data := content.read(1 << 20):
            digest.update(data)
            stream.hash.update(data)
            size += len(data)
            if want and size <= SOURCE_CAP:
                body.append(data)
    if newline == "0":
        stream.hash.update(b"\n")
    stream.current = b"end source\n"
    stream.line += int(num_lines) + 1
    if stream.want_marks:
        stream.marks += _mark(stream.current)
        stream.mark_lines.append(stream.line)
    return size


def _take_block(run: Run, title: str, lines: list[str]) -> None:
    if title == "recipe":
        try:
            recipe = json.loads("\n".join(lines))
        except (ValueError, RecursionError):
            recipe = None
        if not isinstance(recipe, dict):
            run.faults.append("the recipe is not JSON")
        else:
            run.recipe = recipe
        return
    for line in lines:
        key, colon, value = line.partition(": ")
        if colon:
            run.environment[key] = value
    env = run.environment
    run.python, run.torch, run.cuda = env.get("python"), env.get("torch"), env.get("cuda")
    run.gpu = env.get("gpu")
    count = env.get("gpu_count", "")
    run.gpu_count = int(count) if re.fullmatch(r"\d{1,6}", count) else None


_FLOAT = re.compile(r"-?(?:\d{1,18}\.\d{0,20}|\d{1,18}(?=e))(?:e[+-]?\d{1,3})?|-?inf|nan")


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    if text == "none":
        return None
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _step_line(curve: _Curve, raw: bytes, line: int, loss_key: str) -> None:
    match = _TRAIN.match(raw)
    if match:
        curve.train(match, raw, line)
    elif loss_key.encode() in raw:
        fields = _read_fields(raw)
        if fields and loss_key in fields:
            curve.val(fields, raw, line, ended=True)


def _locate(source: object) -> str | None:
    """Second reading of a log whose digest does not fit: the first line its marks disagree with."""
    file, name, path = _open(source)
    with file:
        pieces = _pieces(file)
        stream = _Stream(next(pieces, b""), pieces, marks=True)
        run = Run(name, format="ours")
        said = "".join(_read_ours(stream, run, path, "val_loss", False))
    try:
        expected = bytes.fromhex(said)
    except ValueError:
        return "the marks of the closing block were changed"
    num_marks = sum(len(chunk) for chunk in (said,)) // 4
    closing = -(-num_marks // MARKS_PER_LINE) + 1  # the lines of the marks and of the digest
    pairs = range(0, len(stream.marks) - 2 * closing, 2)
    actual = [bytes(stream.marks[i : i + 2]) for i in pairs]
    wanted = [expected[i : i + 2] for i in range(0, len(expected), 2)]
    if actual == wanted:
        return None  # a source, named by its own sha256, or the marks or digest themselves
    at = next(
        (i for i, (a, b) in enumerate(zip(actual, wanted)) if a != b), min(len(actual), len(wanted))
    )
    line = stream.mark_lines[at]
    gap = len(wanted) - len(actual)
    if gap > 0 and actual[at:] == wanted[at + gap :]:
        return f"line {line}: {gap} line{'s' * (gap > 1)} removed before this one"
    if gap < 0 and actual[at - gap :] == wanted[at:]:
        return f"line {line}: {-gap} line{'s' * (gap < -1)} added from here"
    return f"line {line}: changed"


# ---------------------------------------------------------------------------------- public formats

_TORCH = re.compile(
    r"Running (?i:pytorch) (\S{1,80}) compiled for CUDA (\S{1,20})"
    r"(?: on (.{1,80}?) with world_size (\d{1,6}))?\s*$"
)
_PYTHON = re.compile(r"Running [Pp]ython (\d+\.\d+\.\S{1,20})")
_DEVICE = re.compile(r"Running on device_name=(.{1,80}?) with world_size=(\d{1,6})\s*$")
_SMI_GPU = re.compile(
    r"\|\s{1,6}(\d{1,4})\s{1,4}(\S.{0,40}?)\s{1,40}(?:On |Off|N/A)?\s{0,4}\|\s{1,4}[0-9A-F]{8}:"
)
_CODE = re.compile(rb"(?:import \w|from [\w.]+ import |with open\(sys\.argv)")


def _parse_public(first: bytes, pieces: Iterator[bytes], name: str, loss_key: str) -> list[Run]:
    """Public logs: perhaps code, a rule, the environment, a rule, step lines.

    Lines of the code are never results: what stands between the first import and the next rule is
    set aside, and read only if no rule follows (a capture of stdout that happens to say "import").
    """
    curve = _Curve(name, loss_key)
    environment = Run(name)
    gpus: dict[int, str] = {}
    code_hash, num_code = hashlib.sha256(), 0
    in_code = False
    aside: list[tuple[bytes, int, bool]] = []
    early: list[bytes] = []  # lines before the first import belong to the code too
    key = loss_key.encode()
    line, piece, continued, fault = 0, first, False, None

    def read(raw: bytes, number: int, ended: bool) -> None:
        match = _TRAIN.match(raw) if ended else None
        if match:
            curve.train(match, raw, number)
            return
        llmc = _LLMC.match(raw)
        if llmc:
            _llmc_line(curve, raw, llmc, number, ended)
            return
        fields = _read_fields(raw)
        if fields and loss_key in fields:
            curve.val(fields, raw, number, ended)
        elif not ended and fields and curve.runs:
            curve.runs[-1].notes.append(f"line {number}: the last line is cut: {_show(raw)}")

    while piece:
        ended = piece.endswith(b"\n")
        too_long = not ended and len(piece) == LINE_CAP
        if not continued:
            line += 1
            interesting = not too_long and (
                piece.startswith((b"step:", b"s:")) or key in piece
            )
            if in_code:
                if _RULE.match(piece):
                    in_code, aside = False, []
                else:
                    code_hash.update(piece)
                    num_code += 1
                    if interesting and len(aside) < POINT_CAP:
                        aside.append((piece, line, ended))
            elif interesting:
                read(piece, line, ended)
            elif _CODE.match(piece):
                in_code = True
                for raw in early:
                    code_hash.update(raw)
                code_hash.update(piece)
                num_code += 1
            elif _RULE.match(piece):
                early = []
            else:
                if num_code == 0 and len(early) < 200:
                    early.append(piece)
                if piece[:1] in b"R|":
                    _environment_line(piece.decode(errors="replace"), environment, gpus)
        elif in_code:
            code_hash.update(piece)
        continued = too_long or (continued and not ended)
        try:
            piece = next(pieces, b"")
        except LogError as error:
            piece, fault = b"", str(error)
    for raw, number, ended in aside:
        read(raw, number, ended)
    if fault:
        curve.fault(fault)
    runs = [r for r in curve.runs if r.points or r.faults or r.last_train_step is not None]
    for run in runs:
        run.python, run.torch, run.cuda = environment.python, environment.torch, environment.cuda
        run.gpu, run.gpu_count = environment.gpu, environment.gpu_count
        if run.gpu is None and gpus:
            run.gpu = gpus[min(gpus)]
        if run.gpu_count is None and gpus:
            run.gpu_count = len(gpus)
        if num_code and not aside:
            run.code_sha256 = code_hash.hexdigest()
    return runs


def _llmc_line(curve: _Curve, raw: bytes, match: re.Match, line: int, ended: bool) -> None:
    if match[2] == b"trl":
        return
    digits = raw[match.end() :].split()[0] if raw[match.end() :].split() else b""
    if not ended or not _LOSS.match(digits):
        why = "its loss cannot be read" if ended else "the line is cut"
        curve.fault(f"line {line}: a validation line that is not counted, {why}: {_show(raw)}")
        return
    curve.add(Point(int(match[1]), None, float(digits), None, line), digits, raw, "llm.c")


def _environment_line(text: str, run: Run, gpus: dict[int, str]) -> None:
    if text.startswith("Running"):
        if match := _TORCH.match(text):
            run.torch, run.cuda = match[1], match[2]
            if match[3]:
                run.gpu, run.gpu_count = match[3].strip(), int(match[4])
        elif match := _DEVICE.match(text):
            run.gpu, run.gpu_count = match[1].strip(), int(match[2])
        elif match := _PYTHON.match(text):
            run.python = match[1]
    elif (match := _SMI_GPU.match(text)) and len(gpus) < 4096:
        gpus.setdefault(int(match[1]), match[2].strip())
