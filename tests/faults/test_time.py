"""Clocks that jump, logs that are edited, runs that are resumed."""

import hashlib
import itertools
import re
import time
from types import SimpleNamespace

import pytest
import torch

from faults.helpers import body_of, checkpoints, logs_in, result_of
from records.check import run_reasons
from records.log import parse
from trainer import dist


@pytest.mark.parametrize("jump", [-3600.0, 86400.0])
def test_T1_a_system_clock_that_jumps_does_not_move_the_training_time(train, monkeypatch, jump):
    real, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + (jump if next(calls) % 2 else 0))
    began = time.perf_counter()
    ran = train()
    wall_ms = 1000 * (time.perf_counter() - began)
    assert ran.code == 0
    assert 0 < result_of(ran.logs[0])["train_time_ms"] < wall_ms


def test_T2_a_clock_that_runs_backwards_makes_the_run_invalid(train, monkeypatch):
    """Not negative, not complete, and the log says why."""
    real, calls = time.perf_counter, itertools.count()
    fake = SimpleNamespace(**vars(time) | {
        "perf_counter": lambda: real() - (5 if next(calls) > 30 else 0)})
    monkeypatch.setattr(dist, "time", fake)
    ran = train("--num_iterations", "30")
    assert ran.code == 1
    (log,) = ran.logs
    result = result_of(log)
    assert result["status"] == "failed" and result["train_time_ms"] >= 0
    assert "the clock ran backwards by 5.0" in body_of(log)
    times = [int(t) for t in re.findall(r"train_time:(-?\d+)ms", body_of(log))]
    assert times == sorted(times) and times[0] >= 0


def test_T2_also_where_only_the_last_reading_is_wrong(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(dist, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = dist.Clock(dist.World(0, 0, 1, torch.device("cpu")))
    clock.start()
    now[0] -= 2
    clock.stop()
    assert clock.elapsed_s == 0 and "backwards by 2.000 s" in clock.fault


@pytest.mark.parametrize("edit, says", [
    (lambda text: re.sub(r"(step:3/6 val_loss:\d)", lambda m: m[1][:-1] + "1", text), "changed"),
    (lambda text: re.sub(r"step:2/6 train_loss.*\n", "", text), "1 line removed before this one"),
    (lambda text: text[: text.rindex("begin result")], "closing block"),
])
def test_T3_an_edited_log_is_found_out_and_the_line_named(train, edit, says):
    """More ways to edit a log: tests/test_records_log.py."""
    (log,) = train("--seed", "3").logs
    log.write_text(edit(log.read_text()))
    reasons = [str(reason) for reason in run_reasons(parse(log)[0], "the run", closed=True)]
    assert any(says in reason for reason in reasons), reasons
    if says != "closing block":
        assert any(re.search(r"line \d+", reason) for reason in reasons), reasons


def test_T4_a_resumed_run_says_so_and_its_time_is_the_sum(train):
    first = train("--checkpoint_every", "4", "--keep", "1")
    folder = first.folder
    checkpoints(folder)[6].unlink(missing_ok=True)
    path = train("--num_iterations", "6", "--checkpoint_every", "3", "--keep", "9",
                 folder="again").folder
    earlier = checkpoints(path)[3]
    (old_log,) = logs_in(path)
    ran = train("--resume", earlier, folder="again")
    assert ran.code == 0
    log = logs_in(path)[-1]
    (run,) = parse(log)
    assert run.result["resumed"] is True and run.result["status"] == "complete"
    # The log names the one that it goes on from, by content.
    assert run.environment["resumed_from"] == old_log.stem
    assert run.environment["resumed_log_sha256"] == hashlib.sha256(
        old_log.read_bytes()).hexdigest()
    assert run.environment["resumed_step"] == "3"
    at_3 = {p.step: p for p in parse(old_log)[0].points}[3]
    at_6 = {p.step: p for p in run.points}[6]
    assert at_6.train_time_ms > at_3.train_time_ms > 0
    assert run.result["train_time_ms"] == pytest.approx(at_6.train_time_ms, abs=1)
    assert [p.step for p in run.points] == [6]  # what was measured before is in the other log
    # And it is no evidence for a record.
    assert {"resumed"} <= {reason.name for reason in run_reasons(run, "the run", closed=True)}


def test_T6_validation_and_saving_stand_outside_the_time(train, monkeypatch):
    """tests/test_train.py has the unit test with a fake clock; here the whole loop."""
    import train_gpt

    slow = train_gpt.evaluate
    save = train_gpt.checkpoint.save

    def evaluate(*arguments):
        time.sleep(0.4)
        return slow(*arguments)

    def saved(*arguments):
        time.sleep(0.4)
        save(*arguments)

    monkeypatch.setattr(train_gpt, "evaluate", evaluate)
    monkeypatch.setattr(train_gpt.checkpoint, "save", saved)
    ran = train("--checkpoint_every", "1", "--val_every", "1")
    result = result_of(ran.logs[0])
    assert result["validation_s"] >= 7 * 0.4 - 0.1
    assert result["wall_time_s"] > result["train_time_ms"] / 1000 + 13 * 0.4
