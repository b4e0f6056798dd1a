"""Signals, deaths and hangs of processes."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, clean_environment
from faults.helpers import (
    INJECT,
    body_of,
    checkpoints,
    differing,
    logs_in,
    result_of,
    same,
    state_of,
    tiny,
    wait_until,
)

SLOW = ("--num_iterations", "200", "--val_every", "200", "--timeout_s", "20")
FORTY = ("--num_iterations", "40", "--val_every", "40", "--timeout_s", "20")


def torchrun(*words: object, nproc: int = 2, options=(), **environment: str) -> subprocess.Popen:
    """inject.py under launch.py, as run.sh starts several ranks, its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, "tools/launch.py", "--standalone", "--nproc_per_node", str(nproc),
         *options, INJECT, *map(str, words)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=clean_environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **environment))


def in_log(folder, step: int):
    return lambda: any(re.search(rf"^step:{step}/", body_of(log), re.M)
                       for log in folder.glob("*.txt"))


def assert_preempted(folder) -> int:
    """A whole log that says so, and a checkpoint of the step that it stopped after."""
    log = logs_in(folder)[-1]
    assert result_of(log)["status"] == "preempted"
    step = int(re.search(r"stopped after step (\d+): preempted", body_of(log))[1])
    assert checkpoints(folder)[step].name.startswith(log.stem)
    assert state_of(checkpoints(folder)[step])["step"] == step
    return step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """The folder of a whole run of 40 steps on two ranks."""
    from faults.helpers import Ranks

    folder = tmp_path_factory.mktemp("whole") / "logs"
    with Ranks(2, *FORTY, "--checkpoint_every", "1000", data=data, log_dir=folder) as two:
        assert two.wait() == [0, 0], two.said()
    return folder


# --- asked to stop --------------------------------------------------------------------------------

@pytest.mark.ranks
def test_P3_SIGTERM_to_torchrun_stops_all_ranks_and_resume_goes_on(tmp_path, data, ranks,
                                                                   uninterrupted, record_property):
    folder = tmp_path / "logs"
    run = torchrun("slow:0.1", "--", *tiny("--data_dir", data, "--log_dir", folder, *FORTY))
    wait_until(in_log(folder, 5))
    asked = time.monotonic()
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=30)
    record_property("reacts", time.monotonic() - asked)
    assert time.monotonic() - asked < 30
    assert run.returncode == 128 + signal.SIGTERM and "Traceback" not in said, said
    step = assert_preempted(folder)
    assert 5 <= step < 40, said
    with ranks(2, *FORTY, "--checkpoint_every", "1000", "--resume", "auto") as two:
        assert two.wait() == [0, 0], two.said()
    assert "since it was resumed" in " ".join(two.said().split())
    assert differing(checkpoints(folder)[40], checkpoints(uninterrupted)[40]) == []


@pytest.mark.ranks
def test_P4_SIGTERM_to_one_worker_stops_all_with_exit_status_0(ranks, tmp_path, record_property):
    with ranks(2, *SLOW, faults=("slow:0.05",)) as two:
        two.wait_for_step(3)
        two.signal(signal.SIGTERM, rank=1)
        asked = time.monotonic()
        assert two.wait(20) == [0, 0], two.said()
        record_property("reacts", time.monotonic() - asked)
    assert 3 <= assert_preempted(tmp_path / "logs") < 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_P4_one_process(ranks, tmp_path, number):
    with ranks(1, *SLOW, faults=("slow:0.05",)) as one:
        one.wait_for_step(3)
        one.signal(number)
        assert one.wait(20) == [0], one.said()
    assert_preempted(tmp_path / "logs")
    assert "next: the same command with --resume auto" in one.said()


def test_P4_a_reader_that_goes_away_stops_the_run_as_a_hangup_does(tmp_path, data):
    folder = tmp_path / "logs"
    command = [sys.executable, INJECT, "slow:0.05", "--", *tiny(
        "--data_dir", data, "--log_dir", folder, "--num_iterations", "150", "--val_every", "2")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=clean_environment()) as run:
        for line in run.stdout:
            if line.startswith("step:"):
                break
        run.stdout.close()  # `./run.sh | head`
        assert run.wait(60) == 0, run.stderr.read()
    assert_preempted(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_P5_the_second_signal_ends_at_once(ranks, tmp_path, number, record_property):
    """A step of 30 s is under way."""
    with ranks(1, *SLOW, "--checkpoint_every", "1", faults=("slow_from:2:30",)) as one:
        one.wait_for_step(2)
        one.signal(number)
        time.sleep(1.3)
        assert one.processes[0].poll() is None
        began = time.monotonic()
        one.signal(number)
        assert one.wait(5) == [128 + number], one.said()
        record_property("reacts", time.monotonic() - began)
        assert time.monotonic() - began < 3
    kept = checkpoints(tmp_path / "logs")
    assert kept and all(state_of(path)["step"] == step for step, path in kept.items())


def test_P5_a_signal_that_comes_twice_in_a_moment_is_one_wish(ranks, tmp_path):
    """A terminal and a launcher both pass Ctrl-C on."""
    with ranks(1, *SLOW, faults=("slow:0.2",)) as one:
        one.wait_for_step(2)
        one.signal(signal.SIGINT)
        time.sleep(0.02)
        one.signal(signal.SIGINT)
        assert one.wait(20) == [0], one.said()
    assert_preempted(tmp_path / "logs")


TERMINAL = """import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv("./run.sh", ["./run.sh", *sys.argv[1:]])
"""


@pytest.mark.ranks
@pytest.mark.parametrize("nproc", [1, 2])
def test_P5_ctrl_c_in_a_terminal(tmp_path, data, nproc):
    """run.sh on a terminal of its own, and the key pressed there."""
    ours, theirs = os.openpty()
    folder = tmp_path / "logs"
    out = tmp_path / "out"
    try:
        with open(out, "wb") as file:
            run = subprocess.Popen(
                [sys.executable, "-c", TERMINAL, *tiny(
                    "--data_dir", data, "--log_dir", folder, "--num_iterations", "500",
                    "--val_every", "500")], cwd=ROOT, stdin=theirs, stdout=file, stderr=file,
                env=clean_environment(NPROC=str(nproc), NO_VENV="1"))
        wait_until(in_log(folder, 5), explain=lambda: out.read_text(errors="replace"))
        os.write(ours, b"\x03")
        code = run.wait(timeout=30)
        said = out.read_text(errors="replace")
        assert code == (0 if nproc == 1 else 128 + signal.SIGINT), said
        assert "Traceback" not in said and "--resume auto goes on" in said[-1500:], said
    finally:
        run.kill()
        run.wait()
        os.close(ours)
        os.close(theirs)
    assert 5 <= assert_preempted(folder) < 500


# --- killed, hung, crashed ------------------------------------------------------------------------

@pytest.mark.ranks
@pytest.mark.parametrize("killed", [0, 1])
def test_P1_kill_9_of_a_rank_ends_the_run_and_is_named(ranks, tmp_path, train, killed,
                                                       record_property):
    with ranks(2, *SLOW, "--checkpoint_every", "2", faults=("slow:0.05",)) as two:
        two.wait_for_step(5)
        two.signal(signal.SIGKILL, rank=killed)
        began = time.monotonic()
        left = 1 - killed
        assert two.wait(10)[left] == 1
        record_property("reacts", time.monotonic() - began)
        assert time.monotonic() - began < 10
        words = ("no heartbeat from rank 1" if killed == 1 else "the rank that held the store")
        assert words in two.said(left), two.said(left)
        assert "Traceback" not in two.said(left)
    folder = tmp_path / "logs"
    if killed == 1:  # rank 0 writes the log
        assert result_of(logs_in(folder)[0])["status"] == "failed"
        assert "no heartbeat from rank 1 for 2.5 s" in body_of(logs_in(folder)[0])
    newest = max(checkpoints(folder))
    ran = train(*SLOW[:2], "--val_every", "200", "--resume", "auto")
    assert ran.code == 0 and f"step {newest}" in ran.out


@pytest.mark.ranks
def test_P1_kill_9_under_torchrun(tmp_path, data):
    folder = tmp_path / "logs"
    run = torchrun("slow:0.05", "kill_once:1:5", "--",
                   *tiny("--data_dir", data, "--log_dir", folder, *SLOW))
    wait_until(in_log(folder, 3))
    began = time.monotonic()
    said, _ = run.communicate(timeout=30)
    assert time.monotonic() - began < 10 and run.returncode == 128 + signal.SIGKILL
    assert "exitcode: -9" in said and "local_rank: 1" in said and "Traceback" not in said, said


@pytest.mark.ranks
def test_the_launcher_killed_leaves_no_orphans(tmp_path, data, record_property):
    """torchrun cannot tell its ranks of a kill -9; they see that they have another parent."""
    folder = tmp_path / "logs"
    run = torchrun("slow:0.05", "--", *tiny("--data_dir", data, "--log_dir", folder, *SLOW))
    wait_until(in_log(folder, 3))
    run.kill()
    began = time.monotonic()
    wait_until(lambda: "status:" in body_of(logs_in(folder)[0]), timeout=15)
    record_property("reacts", time.monotonic() - began)
    assert_preempted(folder)
    run.communicate(timeout=10)


def test_P2_kill_9_while_a_checkpoint_is_written(ranks, tmp_path, train):
    folder = tmp_path / "logs"
    with ranks(1, *SLOW, "--checkpoint_every", "2", "--keep", "9",
               faults=("slow_save:4:30",)) as one:
        wait_until(lambda: "half-written" in one.said(), explain=one.said)
        one.signal(signal.SIGKILL)
        one.wait(5)
    assert max(checkpoints(folder)) == 2
    (temporary,) = folder.glob(".*.tmp")
    ran = train(*SLOW[:2], "--val_every", "200", "--resume", "auto")
    assert ran.code == 0 and "step 2" in ran.out
    assert not temporary.exists()


def test_P2_the_file_of_a_living_writer_is_not_removed(tmp_path):
    import fcntl

    from trainer import checkpoint

    living, dead = tmp_path / ".a.ckpt.1.tmp", tmp_path / ".b.ckpt.2.tmp"
    dead.write_bytes(b"half")
    with open(living, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        checkpoint.sweep(tmp_path)
    assert living.exists() and not dead.exists()


@pytest.mark.ranks
def test_P6_a_stopped_rank_is_found_by_timeout_and_named(ranks, tmp_path, record_property):
    """torchrun would wait 30 s more for the stopped one before it kills it."""
    with ranks(2, *SLOW[:4], "--timeout_s", "4", faults=("slow:0.05",)) as two:
        two.wait_for_step(3)
        two.signal(signal.SIGSTOP, rank=1)
        began = time.monotonic()
        assert two.processes[0].wait(timeout=15) == 1
        record_property("reacts", time.monotonic() - began)
        assert 3 < time.monotonic() - began < 12
        assert "no heartbeat from rank 1 for 2.5 s" in two.said(0)
        assert "no progress for" in two.said(0)  # said before the collective gives up
        assert "Timed out" in two.said(0) or "timeout" in two.said(0)  # gloo's word for the cause
    assert "no heartbeat from rank 1 for 2.5 s" in body_of(logs_in(tmp_path / "logs")[0])


@pytest.mark.ranks
def test_P6_also_where_the_optimizer_waits_in_a_group_of_its_own(ranks, tmp_path):
    with ranks(2, *SLOW[:4], "--timeout_s", "4", faults=("freeze:1:5",)) as two:
        two.wait_for_step(4)
        began = time.monotonic()
        assert two.processes[0].wait(timeout=20) == 1
        assert time.monotonic() - began < 15
        assert "no heartbeat from rank 1 for 2.5 s" in two.said(0), two.said(0)


@pytest.mark.ranks
def test_P7_the_traceback_of_the_rank_that_failed_comes_first(tmp_path, data):
    run = torchrun("crash:1:3", "--", *tiny(
        "--data_dir", data, "--log_dir", tmp_path / "logs", "--timeout_s", "20"))
    began = time.monotonic()
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 1 and time.monotonic() - began < 40
    assert "KeyError: 'an error that nobody foresaw'" in said
    assert said.index("Traceback") < said.index("nobody foresaw")
    assert said[: said.index("nobody foresaw")].count("Traceback") == 1
    assert "ChildFailedError" not in said


def test_P7_one_process_closes_its_log_as_failed(ranks, tmp_path):
    with ranks(1, faults=("crash:0:3",)) as one:
        assert one.wait() == [1]
        assert "KeyError: 'an error that nobody foresaw'" in one.said()
    (log,) = logs_in(tmp_path / "logs")
    assert result_of(log)["status"] == "failed" and "nobody foresaw" in body_of(log)


@pytest.mark.ranks
def test_P8_torchrun_restarts_and_the_result_is_the_same(tmp_path, data, uninterrupted):
    folder = tmp_path / "logs"
    run = torchrun("kill_once:1:9", "--", *tiny(
        "--data_dir", data, "--log_dir", folder, *FORTY, "--checkpoint_every", "4", "--resume",
        "auto"), options=("--max-restarts", "1"))
    said, _ = run.communicate(timeout=100)
    assert run.returncode == 0, said
    assert "starting at step 0" in said and "step 8" in said
    log = logs_in(folder)[-1]
    assert result_of(log)["resumed"] is True and result_of(log)["status"] == "complete"
    assert same(state_of(log.with_suffix(".pt"))["model"],
                state_of(next(uninterrupted.glob("*.pt")))["model"])


def test_P9_an_error_in_the_prefetch_thread_reaches_the_run(train, monkeypatch):
    """Faults of the data: test_data.py; whatever else, with its traceback, and the log says so."""
    import data.loader
    import train_gpt

    read, calls = data.loader._Shard.read, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError("in the thread")
        return read(*arguments)

    monkeypatch.setattr(data.loader._Shard, "read", fails)
    with pytest.raises(train_gpt.Crash) as caught:
        train()
    assert isinstance(caught.value.__cause__, MemoryError)
