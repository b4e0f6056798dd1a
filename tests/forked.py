"""Processes that start in a tenth of a second: forks of one that has imported torch already.

Importing torch and the trainer takes 3 s of CPU time, more than a tiny training does. The server
that forks has one thread and has computed nothing, so a fork of it is as good as a new process. It
starts with the first test that needs it and ends with pytest.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
TIME_LIMIT_S = 150  # of a fork: longer than a test may take


def start_server() -> None:
    """Now, in this environment; without this call it starts with the first fork."""
    CONTEXT.set_forkserver_preload(["train_gpt", "torch._dynamo", "pytest"])
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _enter(function, arguments, environment, folder, out, err) -> None:
    """In the fork: the state that a new process has, then the work."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(TIME_LIMIT_S)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.exit(function(*arguments))


class Forked:
    """function(*arguments) in a process of its own, with the methods of subprocess.Popen that the
    tests use. Its output goes to the files `out` and `err`; the exit status is what it returns."""

    def __init__(self, function, *arguments, environment: dict[str, str], out: Path,
                 err: Path | None = None, folder: Path = ROOT):
        start_server()
        for file in {out, err or out}:
            file.touch()
        self._process = CONTEXT.Process(
            target=_enter, args=(function, arguments, environment, folder, out, err or out))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
