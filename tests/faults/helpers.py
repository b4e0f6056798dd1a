"""Ways to run the trainer and to break it: in this process, or as ranks that a test can signal."""

import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import train_gpt
from conftest import ROOT, rank_environments, tiny_options, trainer
from forked import Forked
from records.log import parse

INJECT = str(Path(__file__).with_name("inject.py"))


def tiny(*extra: object) -> list[str]:
    """conftest's tiny training, of record 6 unless `extra` names another."""
    return tiny_options(*(() if "--record" in extra else ("--record", "6")), *extra)


def logs_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.txt"), key=lambda path: path.stat().st_mtime_ns)


def result_of(log: Path) -> dict:
    """The closing block of a whole log."""
    (run,) = parse(log)
    assert not run.faults, run.faults
    return run.result


def body_of(log: Path) -> str:
    """What the run wrote into its log, without the sources above it."""
    return log.read_text().rpartition("\nbegin steps\n")[2]


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> file."""
    return {int(re.search(r"step(\d+)", path.name)[1]): path for path in folder.glob("*.ckpt")}


def state_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    """Equal bit for bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


TRAINED = ("model", "optimizer", "cursor", "random", "step", "history")


def differing(a: Path, b: Path, keys=TRAINED) -> list[str]:
    """What of the training differs between two checkpoints."""
    one, two = state_of(a), state_of(b)
    return [key for key in keys if not same(one[key], two[key])]


def train_here(capsys, *options: object, data: Path, log_dir: Path) -> SimpleNamespace:
    """train_gpt.main in this process: code, out, err and the logs that are there afterwards."""
    code = train_gpt.main(tiny("--data_dir", data, "--log_dir", log_dir, *options))
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err, folder=log_dir,
                           logs=logs_in(log_dir) if log_dir.is_dir() else [])


def assert_refused(ran, *says: str) -> None:
    """Exit status 2, one line that says what, nothing left behind."""
    assert ran.code == 2, (ran.out, ran.err)
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    for word in says:
        assert word in ran.err
    assert not ran.folder.exists() or not list(ran.folder.glob("*.txt"))


def broken_trainer(faults: tuple[str, ...], words: list[str]) -> int:
    """inject.py as a function; it asks the environment for the rank when it is imported."""
    from faults import inject

    inject.Broken(list(faults))
    return trainer(words)


class Ranks:
    """Ranks started one by one, as a launcher does, each to be signalled by its own pid."""

    def __init__(self, count: int, *options: object, data: Path, log_dir: Path,
                 faults: tuple[str, ...] = (), own_options: dict | None = None,
                 folders: dict | None = None, **environment: str):
        log_dir.parent.mkdir(parents=True, exist_ok=True)
        self.log_dir = log_dir
        self.processes, self._outs = [], []
        for rank, own in enumerate(rank_environments(count, **environment)):
            words = tiny("--data_dir", data, "--log_dir", log_dir, *options,
                         *(own_options or {}).get(rank, ()))
            self._outs.append(log_dir.parent / f"rank{rank}.{time.monotonic_ns()}.out")
            self.processes.append(Forked(
                broken_trainer, faults, words, environment=own, out=self._outs[-1],
                folder=(folders or {}).get(rank, ROOT)))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(timeout=10)

    def said(self, rank: int = 0) -> str:
        return self._outs[rank].read_text(errors="replace")

    def wait(self, timeout: float = 60) -> list[int]:
        """Exit status of each rank."""
        end = time.monotonic() + timeout
        return [p.wait(timeout=max(0.1, end - time.monotonic())) for p in self.processes]

    def wait_for_step(self, step: int, timeout: float = 60) -> None:
        """Until the log says that `step` updates are done."""
        wait_until(lambda: any(re.search(rf"^step:{step}/", log.read_text(), re.M)
                               for log in self.log_dir.glob("*.txt")), timeout,
                   lambda: "\n".join(map(self.said, range(len(self.processes)))))

    def signal(self, number: int, rank: int = 0) -> None:
        self.processes[rank].send_signal(number)


def wait_until(condition, timeout: float = 60, explain=lambda: "") -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s in vain\n{explain()}"
        time.sleep(0.05)


def marked_processes(marker: str) -> list[int]:
    """Processes that were started with `marker` in their environment and still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]
