"""Public logs of the speedrun: code, a rule, the environment, a rule, step lines; or parts of it.

Formats seen so far: `step:N/M val_loss:X train_time:Yms step_avg:Zms` with milliseconds or seconds,
llm.c's `s:N tel:X`, captures of stdout, several runs in one file.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from collections.abc import Iterator
from itertools import chain

from records.lines import (
    LINE_CAP,
    LOSS,
    POINT_CAP,
    TRAIN,
    Collector,
    LogError,
    Point,
    Run,
    show,
)

CODE_CAP = 1 << 24  # bytes of a program
_LLMC = re.compile(rb"s:(\d{1,9}) (tel|trl):")
_RULE = re.compile(rb"={80,}\s*$")
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


def parse_public(first: bytes, pieces: Iterator[bytes], name: str, loss_key: str) -> list[Run]:
    """Public logs: perhaps code, a rule, the environment, a rule, step lines.

    Lines of the code are never results: what stands between the first import and the next rule is
    set aside, and read only if no rule follows (a capture of stdout that happens to say "import").
    """
    curve = Collector(name, loss_key)
    environment = Run(name)
    gpus: dict[int, str] = {}
    code_hash, has_code = hashlib.sha256(), False
    in_code = False
    aside: list[tuple[bytes, int, bool]] = []
    early: list[bytes] = []  # lines before the first import belong to the code too
    key = loss_key.encode()
    line, continued, fault = 0, False, None

    def read(raw: bytes, number: int, ended: bool) -> None:
        if curve.read(raw, number, ended):
            return
        llmc = _LLMC.match(raw)
        if llmc:
            _llmc_line(curve, raw, llmc, number, ended)
        elif not ended and curve.runs and raw.startswith(b"step:"):
            curve.runs[-1].note(f"line {number}: the last line is cut: {show(raw)}")

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
                if _RULE.match(piece):
                    in_code, aside = False, []
                else:
                    code_hash.update(piece)
                    if interesting and len(aside) < POINT_CAP:
                        aside.append((piece, line, ended))
            elif interesting:
                read(piece, line, ended)
            elif _CODE.match(piece):
                in_code = has_code = True
                for raw in early:
                    code_hash.update(raw)
                code_hash.update(piece)
            elif _RULE.match(piece):
                early = []
            else:
                if not has_code and len(early) < 200:
                    early.append(piece)
                if piece[:1] in b"R|":
                    _environment_line(piece.decode(errors="replace"), environment, gpus)
    except LogError as error:
        fault = str(error)
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
        if has_code and not aside:
            run.code_sha256 = code_hash.hexdigest()
    return runs


def _llmc_line(curve: Collector, raw: bytes, match: re.Match, line: int, ended: bool) -> None:
    if match[2] == b"trl":
        return
    digits = raw[match.end() :].split()[0] if raw[match.end() :].split() else b""
    if not ended or not LOSS.match(digits):
        why = "its loss cannot be read" if ended else "the line is cut"
        curve.fault(f"line {line}: a validation line that is not counted, {why}: {show(raw)}")
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


def embedded_code(path: str | os.PathLike) -> bytes | None:
    """The program at the head of a public log, byte for byte; None if there is none.

    It is what stands before the first rule of 100 `=` (after a rule of 80 that opens some logs), if
    that part imports anything.
    """
    opened = gzip.open if _is_gzip(path) else open
    kept, imports = bytearray(), False
    with opened(path, "rb") as file:
        while raw := file.readline(LINE_CAP):
            if _RULE.match(raw):
                if kept.strip():
                    return bytes(kept) if imports else None
                kept.clear()
                continue
            imports = imports or _CODE.match(raw) is not None
            kept += raw
            if len(kept) > CODE_CAP:
                return None
    return None


def _is_gzip(path: str | os.PathLike) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"
