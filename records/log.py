"""The log of a run: one definition, used by the trainer to write and by `records` to read.

Our format, version 1. UTF-8 text, lines end in a newline:

    nanogpt speedrun log 1
    begin source NAME lines=N newline=1 sha256=HEX    one block for each local source of the run
    ...N lines, any text...                           newline=0: the last line has none in the file
    end source
    begin environment lines=N
    key: value                                        Python, torch, GPUs, commit, ...
    tokens_per_step: [[0, 131072], [640, 262144]]     from step 0 on, from step 640 on
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

Blocks carry their number of lines, so a source may contain anything, this docstring too. The logs
of a record folder have a line `kept source NAME ...` in place of each source block: the text is in
`records/sources/`, once for all records, and reading puts the block back. The digest is still that
of the log as it was closed.

The digest proves that the file has not changed since it was closed: it finds a changed digit, a
lost line, a swapped source, a cut tail, and the marks name the line. It does not prove that the
numbers were measured: a new digest for an edited log is easy to compute. Only running the program
again (`python -m records reproduce`) answers that.

`parse` reads this format and the public ones of records/parse.py. It is strict about result lines
and lenient about everything else; a line that looks like a result and cannot be read is named in
`Run.faults`, never guessed. Memory is bounded for every file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath

from records.parse import (
    BATCHES,
    FILE_CAP,
    LINE_CAP,
    LINES_CAP,
    POINT_CAP,
    RUN_CAP,
    Collector,
    LogError,
    Point,
    Run,
    Source,
    parse_public,
    printable,
    read_fields,
)

__all__ = ["LogError", "Point", "Run", "RunLog", "Source", "parse", "train_line", "val_line"]

MAGIC = "nanogpt speedrun log 1"
STATUSES = ("complete", "preempted", "failed")
SOURCE_CAP = 1 << 24  # bytes of source text kept in memory when asked for
MARKS_PER_LINE = 256
# keys of the closing block whose values are whole numbers
WHOLE = ("world_size", "seed", "tokens", "num_iterations", "train_time_ms", "tokens_per_s",
         "parameters", "record")
ROUNDING = 5.1e-5  # of a loss printed with four decimals
MAX_LOSS = 1e6  # a line with a larger loss is not read as a validation


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
        head, self._marks = bytearray(), bytearray()

        def put(line: str) -> None:
            raw = f"{line}\n".encode()
            head.extend(raw)
            self._marks.extend(_mark(raw))

        put(MAGIC)
        for name, text in sources.items():
            body = text.encode()
            newline = int(body.endswith(b"\n") or not body)
            num_lines = body.count(b"\n") + 1 - newline
            put(f"begin source {_clean_name(name)} lines={num_lines} newline={newline} "
                f"sha256={hashlib.sha256(body).hexdigest()}")
            head += body if newline else body + b"\n"  # without marks: it has a sha256
            put("end source")
        env_lines = []
        for key, value in environment.items():
            if not re.fullmatch(r"[\w .()/+-]{1,80}", key):
                raise LogError(f"environment key: expected words, got {key!r}")
            env_lines.append(f"{key}: {_one_line(value)}")
        recipe_lines = json.dumps(recipe, indent=1, sort_keys=True, allow_nan=False).split("\n")
        for title, lines in (("environment", env_lines), ("recipe", recipe_lines)):
            put(f"begin {title} lines={len(lines)}")
            for line in lines:
                put(line)
            put(f"end {title}")
        put("begin steps")

        self._hash = hashlib.sha256()
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
        self._write(bytes(head))

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
        """Write a training line or a note. Several lines in `text` are several notes."""
        for part in str(text).splitlines() or [""]:
            if part.startswith(("begin ", "end ", "kept ", "marks:", "digest:", MAGIC)):
                part = " " + part  # a note must not look like a part of the format
            elif "val_loss:" in part:
                part = "note: " + part  # nor like a validation
            self._put(part)

    def val(self, step: int, num_iterations: int, val_loss: float, train_time_ms: float) -> None:
        """Write the line of a validation (val_line)."""
        self._put(val_line(step, num_iterations, val_loss, train_time_ms))
        self._last_val = (step, num_iterations, val_loss)

    def _put(self, line: str) -> None:
        raw = f"{line}\n".encode(errors="backslashreplace")
        self._write(raw)
        self._marks += _mark(raw)

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
        if not abs(loss) < MAX_LOSS:
            return f"its final loss is {loss}"
        final = result.get("final_val_loss", loss)
        try:
            agree = abs(float(final) - loss) <= ROUNDING
        except (TypeError, ValueError):
            agree = False
        if not agree:
            return f"final_val_loss is {final}, its last validation line says {loss}"
        return None

    def _check_untouched(self) -> None:
        """Compare the file under this path, byte for byte, with the bytes written here."""
        try:
            here, ours = os.stat(self.path), os.fstat(self._file.fileno())
        except FileNotFoundError:
            raise LogError(f"{self.path}: was removed while the run wrote to it") from None
        if (here.st_dev, here.st_ino) != (ours.st_dev, ours.st_ino):
            raise LogError(f"{self.path}: was replaced while the run wrote to it")
        with open(self.path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").digest()
        if found != self._hash.digest():
            raise LogError(
                f"{self.path}: expected the {self._size} bytes written by this run, found "
                f"{ours.st_size} others: something else wrote to this log"
            )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self.abandon()


def _mark(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:2]


# ---------------------------------------------------------------------------------- reading files


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
        pieces = _pieces(file, path)
        try:
            first = next(pieces, b"")
            if first.rstrip(b"\r\n") != MAGIC.encode():
                return parse_public(first, pieces, name, loss_key)
            return _parse_ours(first, pieces, name, source, loss_key, keep_sources)
        except LogError as error:
            return [Run(name, faults=[str(error)])]


def read_lines(path: str | os.PathLike) -> Iterator[bytes]:
    """A log as it was closed, sources included, in lines of at most LINE_CAP bytes."""
    file, _, path = _open(path)
    with file:
        yield from _pieces(file, path)


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


def _pieces(file: io.BufferedIOBase, path: Path | None) -> Iterator[bytes]:
    """The lines of a log, source blocks put back; a line above LINE_CAP comes in pieces."""
    total, lines, at_head = 0, 0, path is not None
    while True:
        try:
            piece = file.readline(LINE_CAP)
        except (EOFError, OSError, zlib.error) as error:
            raise LogError(f"the file cannot be read to its end: {error}") from error
        if not piece:
            return
        block: Iterable[bytes] = (piece,)
        # the sources of a log follow its first line
        if at_head and (at_head := piece.startswith((b"kept ", MAGIC.encode()))):
            block = _source_block(piece, path)
        for part in block:
            total += len(part)
            lines += 1
            if total > FILE_CAP or lines > LINES_CAP:
                raise LogError(f"the file has more than {FILE_CAP >> 20} MiB or {LINES_CAP:,} "
                               "lines, the rest was not read")
            yield part


def _source_block(kept: bytes, log: Path) -> Iterator[bytes]:
    """The block that a `kept source` line replaced; the line itself where its text is missing."""
    header = _SOURCE.match(kept.decode(errors="replace").rstrip("\n"))
    folders = log.resolve().parents
    body = None
    if header and header[1] == "kept" and len(folders) > 3:  # records/<track>/<record>/logs/<log>
        body = read_source(folders[3] / "sources", header[2], header[5])
    if body is None:
        yield kept
        return
    yield b"begin" + kept.removeprefix(b"kept")
    yield from io.BytesIO(body if header[4] == "1" else body + b"\n")
    yield b"end source\n"


def source_path(folder: Path, name: str, sha256: str) -> Path:
    """Where `folder` (records/sources) keeps this version of a source."""
    return folder / f"{_clean_name(name)}.{sha256[:16]}.gz"


def read_source(folder: Path, name: str, sha256: str) -> bytes | None:
    """A stored source; None if it is missing, damaged or another one than this sha256 says."""
    try:
        with gzip.open(source_path(folder, name, sha256)) as file:
            body = file.read(SOURCE_CAP + 1)
    except (OSError, EOFError, zlib.error):
        return None
    return body if hashlib.sha256(body).hexdigest() == sha256 else None


def without_sources(path: str | os.PathLike) -> tuple[bytes, dict[str, bytes]]:
    """A log of ours as a record folder keeps it, and the sources that it held, byte for byte."""
    kept, sources = bytearray(), {}
    lines = read_lines(path)
    if next(lines, b"").rstrip(b"\r\n") != MAGIC.encode():
        raise LogError(f"{path}: expected a log that starts with {MAGIC!r}")
    kept += f"{MAGIC}\n".encode()
    for raw in lines:
        header = _SOURCE.match(raw.decode(errors="replace").rstrip("\n"))
        if not header:
            kept += raw + b"".join(lines)
            break
        body, left = bytearray(), int(header[3])
        while left and (piece := next(lines, b"")):
            body += piece
            left -= piece.endswith(b"\n")
        if next(lines, b"") != b"end source\n":
            raise LogError(f"{path}: source {header[2]} does not have the lines it announces")
        sources[_clean_name(header[2])] = bytes(body if header[4] == "1" else body[:-1])
        kept += b"kept" + raw.removeprefix(b"begin")
    return bytes(kept), sources


# ---------------------------------------------------------------------------------- our format

_SOURCE = re.compile(
    r"(begin|kept) source (\S{1,200}) lines=(\d{1,9}) newline=([01]) sha256=([0-9a-f]{64})$"
)
_BLOCK = re.compile(r"begin (environment|recipe) lines=(\d{1,7})$")


class _Stream:
    """The pieces of a log of ours, with its hash, line number and marks kept up to date.

    The hash covers every piece handed out before `current`, so the digest line can be compared
    with the lines above it.
    """

    def __init__(self, pieces: Iterator[bytes], marks: bool = False) -> None:
        self.pieces = pieces
        self.hash = hashlib.sha256()
        self.current = b""
        self.number = 0
        self.want_marks, self.marks, self.mark_lines = marks, bytearray(), []

    def next(self) -> bytes:
        self.hash.update(self.current)
        self.current = next(self.pieces, b"")
        return self.current

    def line(self) -> bytes:
        """The next line with its newline; b"" at the end of the file or where it is cut.

        A line above LINE_CAP is b"\n" here: it is hashed, never interpreted.
        """
        piece = self.next()
        if not piece.endswith(b"\n"):
            if len(piece) < LINE_CAP:
                return b""
            while piece and not piece.endswith(b"\n"):
                piece = self.next()
            self.number += 1
            return b"\n"
        self.number += 1
        if self.want_marks and len(self.marks) < 2 * POINT_CAP:
            self.marks += _mark(piece)
            self.mark_lines.append(self.number)
        return piece


def _parse_ours(first, pieces, name, source, loss_key, keep_sources) -> list[Run]:
    runs = []
    while first:
        stream = _Stream(chain([first], pieces))
        run = Run(name, format="ours")
        _read_ours(stream, run, loss_key, keep_sources)
        if run.edits and not runs:
            changed = _locate(source)
            if changed:
                run.edit(changed)
        runs.append(run)
        # a file may hold a second log after the first one's digest
        first = next(pieces, b"")
        if first and first.rstrip(b"\r\n") != MAGIC.encode():
            run.edit(f"line {stream.number + 1}: text after the closing block")
            run.digest = None
            break
        if len(runs) >= RUN_CAP:
            break
    return runs


def _read_ours(stream: _Stream, run: Run, loss_key: str, keep_sources: bool) -> str:
    """Reads one log into `run`; returns the marks of its closing block."""
    curve = Collector(run.path, loss_key, fixed_run=run)
    marks: list[str] = []
    stream.line()  # MAGIC
    whole = _read_head(stream, run, keep_sources)
    while whole and (raw := stream.line()) != b"begin result\n":
        whole = curve.read(raw, stream.number, ended=True) or bool(raw)
    whole = whole and _read_result(stream, run, marks)
    if not whole and stream.current:
        run.fault(f"line {stream.number}: the log ends in the middle of a line")
        fields = read_fields(stream.current)
        if fields and loss_key in fields:
            curve.val(fields, stream.current, stream.number, ended=False)
    return "".join(marks)


def _read_head(stream: _Stream, run: Run, keep_sources: bool) -> bool:
    """Sources, environment and recipe; False if the log ends in them."""
    missing: list[str] = []
    room = SOURCE_CAP if keep_sources else -1
    text = ""
    while text != "begin steps" and (raw := stream.line()):
        text = raw[:-1].decode(errors="replace")
        if header := _SOURCE.match(text):
            if header[1] == "kept":
                missing.append(header[2])
            else:
                room -= _read_source(stream, run, header, room)
        elif block := _BLOCK.match(text):
            _read_block(stream, run, block[1], int(block[2]))
        elif text != "begin steps":
            run.fault(f"line {stream.number}: not a part of the format: {text[:80]!r}")
    if missing:
        run.edit(f"not in records/sources, or not as it was run: {', '.join(missing[:9])}")
    if run.sources:
        code = "".join(f"{source.name} {source.sha256}\n" for source in run.sources.values())
        run.code_sha256 = hashlib.sha256(code.encode()).hexdigest()
    return text == "begin steps"


def _read_source(stream: _Stream, run: Run, header: re.Match, room: int) -> int:
    """One source block; its text is kept if it has at most `room` bytes. Bytes kept."""
    _, name, num_lines, newline, sha256 = header.groups()
    if _clean_name(name) in run.sources:
        run.fault(f"line {stream.number}: source {name} appears twice")
    digest, body, left = hashlib.sha256(), bytearray(), int(num_lines)
    while left and (piece := stream.next()):
        if piece.endswith(b"\n"):
            left -= 1
            stream.number += 1
            if newline == "0" and not left:
                piece = piece[:-1]
        digest.update(piece)
        if len(body) <= room:
            body += piece
    if stream.line() != b"end source\n":
        run.fault(f"line {stream.number}: source {name} does not have the {num_lines} lines it "
                  "announces")
    if digest.hexdigest() != sha256:
        run.edit(f"source {name} is not the one this run used (sha256 differs)")
    text = body.decode(errors="replace") if len(body) <= room else None
    run.sources[name] = Source(name, sha256, text)
    return len(body)


def _read_block(stream: _Stream, run: Run, title: str, num_lines: int) -> None:
    lines, size = [], 0
    while len(lines) < num_lines and (raw := stream.line()):
        size += len(raw)
        lines.append(raw[:-1].decode(errors="replace") if size <= 1 << 20 else "")
    if stream.line() != f"end {title}\n".encode():
        run.fault(f"line {stream.number}: the {title} does not have the lines it announces")
    if title == "recipe":
        try:
            recipe = json.loads("\n".join(lines))
        except (ValueError, RecursionError):
            recipe = None
        if isinstance(recipe, dict):
            run.recipe = recipe
        else:
            run.fault("the recipe is not JSON")
        return
    env = run.environment
    env.update(printable(line).split(": ", 1) for line in lines if ": " in line)
    run.python, run.torch, run.cuda = env.get("python"), env.get("torch"), env.get("cuda")
    run.gpu = env.get("gpu")
    if not BATCHES.fullmatch(env.get("tokens_per_step", "[[0, 1]]")):
        run.fault(f"tokens_per_step: expected [[0, TOKENS], [STEP, TOKENS], ...], got "
                  f"{env['tokens_per_step'][:80]!r}")
    count = env.get("gpu_count", "")
    run.gpu_count = int(count) if re.fullmatch(r"\d{1,6}", count) else None


def _read_result(stream: _Stream, run: Run, marks: list[str]) -> bool:
    """The closing block, with its digest compared; appends to `marks`."""
    while raw := stream.line():
        text = raw[:-1].decode(errors="replace")
        key, colon, value = text.partition(": ")
        if key == "digest" and colon:
            break
        if key == "marks" and colon:
            if len(value) <= 4 * MARKS_PER_LINE and len(marks) < POINT_CAP // MARKS_PER_LINE:
                marks.append(value)
        elif len(run.result) == 1000:
            raise LogError(f"line {stream.number}: more than 1000 lines in the closing block, the "
                           "rest was not read")
        elif colon:
            found = _value(printable(value[:4096]))
            if key in WHOLE and not isinstance(found, int | None):
                run.fault(f"{key}: expected a whole number, got {str(found)[:80]!r}")
            else:
                run.result[key] = found
        else:
            run.fault(f"line {stream.number}: not a `key: value` of the closing block: "
                      f"{text[:80]!r}")
    else:
        return False
    actual = stream.hash.hexdigest()
    if value == actual:
        run.digest = value
    else:
        run.edit(f"the digest does not fit (it says {value[:12]}, the log gives {actual[:12]})")
    final, claimed = run.final_val_loss, run.result.get("final_val_loss")
    agree = claimed is None or final is None or (
        isinstance(claimed, (int, float)) and abs(claimed - final) <= ROUNDING)
    if run.result.get("status") == "complete" and not agree:
        run.fault(f"final_val_loss is {claimed}, the last validation line says {final}")
    return True


_FLOAT = re.compile(r"-?(?:\d{1,18}\.\d{0,20}|\d{1,18}(?=e))(?:e[+-]?\d{1,3})?|-?inf|nan")


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    if text == "none":
        return None
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _locate(source: object) -> str | None:
    """Second reading of a log whose digest does not fit: the first line its marks disagree with."""
    file, name, path = _open(source)
    with file:
        stream = _Stream(_pieces(file, path), marks=True)
        written = _read_ours(stream, Run(name, format="ours"), "val_loss", False)
    try:
        expected = bytes.fromhex(written)
    except ValueError:
        return "the marks of the closing block were changed"
    closing = -(-len(written) // 4 // MARKS_PER_LINE) + 1  # lines of the marks and of the digest
    actual = stream.marks[: max(0, len(stream.marks) - 2 * closing)]
    actual = [bytes(actual[i : i + 2]) for i in range(0, len(actual), 2)]
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
