"""Find a program by its name and run it: shared by race and reproduce.

A program is a folder with train_gpt.py and the options it is started with. It prints its steps and,
in its last lines, `log: PATH`; that log is all that is taken from it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from records import check
from records.history import FOLDER, own_records, read_result
from records.log import parse
from records.parse import Run

SCRIPT = "train_gpt.py"
CACHES = ("data/corpus_cache", "data/fineweb10B")  # kept out of git; linked, never copied
# options of one launch, not of the training
DROPPED = {"--seed", "--runs", "--log_dir", "--data_dir", "--wandb", "--prepare", "--resume",
           "--checkpoint_every", "--keep"}


@dataclass(frozen=True)
class Program:
    label: str
    folder: Path
    options: tuple[str, ...] = ()

    def command(self, seed: int | None, nproc: int) -> list[str]:
        start = [sys.executable]
        if nproc > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        seeded = [] if seed is None else ["--seed", str(seed)]
        return [*start, SCRIPT, *self.options, *seeded]


def training_options(command: str) -> list[str]:
    """The training options of a logged command line, without seed and folders."""
    return [word for name, words in split_options(shlex.split(command)[1:]) if name not in DROPPED
            for word in words]


def merged(*groups: Sequence[str]) -> tuple[str, ...]:
    """Several lists of options as one; an option given again replaces the earlier one."""
    last = {name: words for group in groups for name, words in split_options(group)}
    return tuple(word for words in last.values() for word in words)


def split_options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(--name, the words it is given with) for each option: --name value, --name=value, --name."""
    left, found = deque(words), []
    while left:
        word = left.popleft()
        name = "--" + word.removeprefix("--").partition("=")[0].replace("-", "_")
        taken = [word]
        value_follows = left and not left[0].startswith("--") and "=" not in word
        if word.startswith("--") and value_follows:
            taken.append(left.popleft())
        found.append((name, taken))
    return found


def unpack(run: Run, label: str, into: Path, tree: Path, options: Sequence[str]) -> Program:
    """The program of a run (of `parse(..., keep_sources=True)`), its sources written to `into`.

    Started with the training options of the log's command line and then `options`.
    """
    if run.edits:
        raise ValueError(f"{run.path}: was changed after the run: {run.edits[0]}")
    if not run.sources:
        raise ValueError(f"{run.path}: expected the sources of the program, the log holds none")
    for name, source in run.sources.items():
        body = (source.text or "").encode()
        if hashlib.sha256(body).hexdigest() != source.sha256:
            raise ValueError(f"{run.path}: {name}: expected UTF-8 text, 16 MiB for all sources")
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_bytes(body)
    link_caches(into, tree)
    kept = training_options(run.environment.get("command", SCRIPT))
    return Program(label, into.resolve(), merged(kept, options))


def link_caches(folder: Path, tree: Path) -> None:
    """Let an unpacked program use the data this tree has fetched or built already."""
    for name in CACHES:
        here, there = folder / name, tree / name
        if there.is_dir() and not here.exists() and not here.is_symlink():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.symlink_to(there.resolve())


def find(text: str, place: Path, root: Path = FOLDER) -> Program:
    """The program of a word, with the options after it; `place`: where it may be unpacked.

    A number is a record of the current tree's ladder; a folder with result.json, or the name of a
    record of ours, is that record's program; a folder with train_gpt.py is a working tree; anything
    else is a git revision.
    """
    words = shlex.split(text)
    if not words or not words[0]:
        raise ValueError("expected a record, a folder or a revision, got nothing")
    target, options = words[0], tuple(words[1:])
    tree = root.parent.resolve()
    remove(place, tree)  # what a process that was killed left there
    if re.fullmatch(r"#?\d+", target):
        number = target.removeprefix("#")
        return Program(f"#{number}" + _tail(options), tree, merged(("--record", number), options))
    folder = next((f for f in (Path(target), root / target) if f.is_dir()), None)
    named = [r for r in own_records(None, root) if target in (r["name"], r["folder"])]
    if named and (folder is None or not (folder / SCRIPT).is_file()):
        folder = root / named[0]["folder"]
    if folder is not None and (folder / "result.json").is_file():
        run = parse(check.folder_logs(folder)[0], keep_sources=True)[0]
        name = read_result(folder)["name"]
        return unpack(run, name + _tail(options), place, tree, options)
    if folder is not None:
        if not (folder / SCRIPT).is_file():
            raise ValueError(f"{target}: expected a folder with {SCRIPT} or result.json")
        return Program(target + _tail(options), folder.resolve(), options)
    commit = _git(tree, "rev-parse", "--verify", "--quiet", f"{target}^{{commit}}")
    if not commit:
        raise ValueError(f"{target}: expected a record's number or name, a folder with {SCRIPT} or "
                         "result.json, or a git revision; it is none of them")
    place.parent.mkdir(parents=True, exist_ok=True)
    _git(tree, "worktree", "prune")
    done = subprocess.run(["git", "-C", str(tree), "worktree", "add", "--detach", "--quiet",
                           str(place.resolve()), commit], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{target}: git worktree: {done.stderr.strip()}")
    if not (place / SCRIPT).is_file():
        raise ValueError(f"{target}: revision {commit[:12]} has no {SCRIPT}")
    link_caches(place, tree)
    return Program(target + _tail(options), place.resolve(), options)


def forget(program: Program, place: Path, root: Path = FOLDER) -> None:
    """Remove the worktree or the unpacked program that `find` made."""
    if program.folder == place.resolve():
        remove(place, root.parent)


def remove(place: Path, tree: Path) -> None:
    """Remove a folder; if it is a worktree of `tree`, git hears of it."""
    if (place / ".git").exists():
        _git(tree, "worktree", "remove", "--force", str(place.resolve()))
    shutil.rmtree(place, ignore_errors=True)


def _tail(options: tuple[str, ...]) -> str:
    return f" {' '.join(options)}" if options else ""


def _git(tree: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class ProgramFailed(ValueError):
    """A program ended without a complete log."""


@contextmanager
def _terminating():
    """SIGTERM raises KeyboardInterrupt here, so that the program that runs is ended too."""
    def stop(number, frame):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may set a handler
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def execute(
    program: Program, seed: int | None, nproc: int, output: Path, on_step: Callable = lambda f: None
) -> Run:
    """Run a program to its end and return its complete run. Its output goes to the file `output`.

    on_step is called with the fraction of steps done. If this process is interrupted, the program
    and all its ranks are ended. Raises ProgramFailed, with the program's last lines, where it ends
    without a complete log.
    """
    command = program.command(seed, nproc)
    last: deque[str] = deque(maxlen=8)
    log: Path | None = None
    output.parent.mkdir(parents=True, exist_ok=True)
    # threads that spin while they wait slow down a busy machine
    environment = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000",  # as in tools/env.sh
                   **os.environ, "PYTHONUNBUFFERED": "1"}
    with _terminating(), open(output, "w", buffering=1) as file:
        process = subprocess.Popen(
            command, cwd=program.folder, env=environment, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, errors="replace", start_new_session=True,
        )
        try:
            for line in process.stdout:
                file.write(line)
                last.append(line.rstrip())
                if match := re.match(r"step:(\d{1,9})/(\d{1,9}) ", line):
                    on_step(int(match[1]) / max(1, int(match[2])))
                if line.startswith("log: "):
                    log = program.folder / line[5:].strip()
            code = process.wait()
        except BaseException:
            end_group(process)
            raise
        finally:
            process.stdout.close()
    shown = "\n  ".join(last)
    if code:
        raise ProgramFailed(f"{program.label}: {shlex.join(command)} in {program.folder} ended "
                            f"with status {code}:\n  {shown}")
    if log is None or not log.is_file():
        raise ProgramFailed(f"{program.label}: expected `log: PATH` in its last lines, got:\n  "
                            f"{shown}")
    runs = parse(log)
    if len(runs) != 1 or not runs[0].complete:
        why = runs[0].why_incomplete if runs else "no run in it"
        raise ProgramFailed(f"{program.label}: {log} is not the log of one complete run: {why}")
    return runs[0]


def end_group(process: subprocess.Popen) -> None:
    """End a program and everything it started (it leads its own process group)."""
    for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()
