"""Options, ranks and ports that do not fit, and runs that meet in one place."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from conftest import ROOT, clean_environment
from faults.helpers import (
    assert_refused,
    body_of,
    checkpoints,
    logs_in,
    result_of,
    state_of,
    tiny,
)
from records.log import parse


def losses(log) -> dict[int, float]:
    return {p.step: p.val_loss for p in parse(log)[0].points}


@pytest.mark.ranks
def test_L1_L2_three_ranks_share_rows_that_three_does_not_divide(ranks, train, tmp_path):
    """The recipe's 10 rows are 4, 3 and 3; losses equal those of one rank to 1e-4 over 10 steps."""
    options = ("--batch_tokens", "320", "--num_iterations", "10", "--val_every", "1")
    alone = train(*options, folder="one")
    with ranks(3, *options) as three:
        assert three.wait(90) == [0, 0, 0], three.said()
    (log,) = logs_in(tmp_path / "logs")
    assert losses(log) == pytest.approx(losses(alone.logs[0]), abs=1e-4)
    assert len(losses(log)) == 11


@pytest.mark.ranks
def test_L1_more_ranks_than_rows_is_refused_by_all(ranks, tmp_path):
    with ranks(3, "--batch_tokens", "64") as three:
        assert three.wait() == [2, 2, 2], three.said()
        said = [three.said(rank).strip() for rank in range(3)]
    assert "3 ranks cannot share 2 rows" in said[0] and "evenly shared by 1, 2" in said[0]
    assert len(said[0].splitlines()) == 1 and said[1:] == ["", ""]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("options, says", [
    (("--num_layer", "3"), "did you mean --num_layers?"),
    (("--colour", "red"), "unknown option --colour"),
    (("--num_layers", "two"), "--num_layers: expected a whole number, got 'two'"),
    (("--wandb", "maybe"), "--wandb: expected true or false"),
    (("--batch_tokens", "400"), "--batch_tokens: expected a multiple of seq_len 32, got 400"),
    (("--num_iterations", "0"), "--num_iterations: expected a whole number from 1, got 0"),
    (("--matrix_lr", "-1"), "--matrix_lr: expected"),
    (("--matrix_lr", "nan"), "--matrix_lr: expected"),
    (("--cooldown_steps", "7"), "--cooldown_steps: expected"),
    (("--record", "13", "--window_range", "96,64"), "--window_range: expected"),
    (("--device", "cuda"), "--device cuda: there is no CUDA device here; --device cpu trains"),
    (("--checkpoint_every", "-1"), "--checkpoint_every: expected 0 or more"),
    (("--keep", "0"), "--keep: expected"),
    (("--timeout_s", "0"), "--timeout_s: expected"),
    (("--resume", "x.ckpt", "--runs", "2"), "--resume PATH: goes on with one run"),
])
def test_L3_L4_L5_L9_each_wrong_option_has_its_own_line(train, options, says, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = train(*options)
    assert_refused(ran, says)
    assert not ran.folder.exists()


def test_L6_without_a_launcher_it_is_one_rank_and_says_so(train, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ran = train("--num_iterations", "2")
    assert ran.code == 0 and "none (one rank)" in ran.out.replace("\n          ", " ")
    assert result_of(ran.logs[0])["world_size"] == 1


@pytest.mark.ranks
def test_L7_a_port_that_is_taken_is_said_within_10_s(tmp_path, data, record_property):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node",
             "2", "--master_addr", "127.0.0.1", "--master_port", str(taken.getsockname()[1]),
             "train_gpt.py", *tiny("--data_dir", data, "--log_dir", tmp_path / "logs")],
            cwd=ROOT, text=True, capture_output=True, timeout=60, env=clean_environment())
        seconds = time.monotonic() - began
    record_property("reacts", seconds)
    assert done.returncode != 0 and "EADDRINUSE" in done.stderr
    assert seconds < 30  # measured: see README.md; this machine may be busy
    assert not (tmp_path / "logs").exists()


@pytest.mark.ranks
def test_L8_two_runs_in_one_folder_do_not_meet(ranks, tmp_path):
    """Same recipe, same seed, same second: names of their own, and each keeps its own checkpoints.
    A lock on the folder would forbid what is harmless."""
    options = ("--checkpoint_every", "1", "--keep", "2", "--num_iterations", "12")
    with ranks(1, *options) as a, ranks(1, *options) as b:
        assert a.wait() == [0] and b.wait() == [0]
    folder = tmp_path / "logs"
    logs = logs_in(folder)
    assert len(logs) == 2 and all(result_of(log)["status"] == "complete" for log in logs)
    for log in logs:
        own = sorted(p.name for p in folder.glob(f"{log.stem}.*.ckpt"))
        assert own == [f"{log.stem}.step{n:06d}.ckpt" for n in (11, 12)]
    assert losses(logs[0]) == losses(logs[1])
    assert not list(folder.glob(".*"))


def test_L8_a_log_of_the_same_name_is_never_overwritten(train, monkeypatch, tmp_path):
    import train_gpt

    monkeypatch.setattr(train_gpt, "new_run_id", lambda *_: "the_same")
    first = train("--num_iterations", "2")
    before = first.logs[0].read_bytes()
    ran = train("--num_iterations", "2")
    assert ran.code == 2 and "the_same.txt" in ran.err and "exists already" in ran.err
    assert first.logs[0].read_bytes() == before


@pytest.mark.ranks
@pytest.mark.parametrize("own, says", [
    (("--num_layers", "3"), "the ranks disagree about num_layers: rank 0 has 2, rank 1 has 3"),
    (("--seed", "4"), "the ranks disagree about seed: rank 0 has 0, rank 1 has 4"),
])
def test_L10_ranks_with_different_options_refuse_together(ranks, tmp_path, own, says):
    began = time.monotonic()
    with ranks(2, own_options={1: own}) as two:
        assert two.wait(50) == [2, 2], two.said()
        assert says in two.said(0) and len(two.said(0).strip().splitlines()) == 1
    assert time.monotonic() - began < 50
    assert not (tmp_path / "logs").exists()


@pytest.mark.ranks
def test_L10_ranks_with_different_code_refuse_together(ranks, tmp_path):
    with ranks(2, faults=("other_code:1",)) as two:
        assert two.wait(50) == [2, 2], two.said()
        assert "the ranks disagree about the code" in two.said(0)
    assert not (tmp_path / "logs").exists()


@pytest.mark.ranks
def test_D18_ranks_that_see_different_files_refuse_together(ranks, tmp_path, data):
    """Each in a folder of its own, as on machines of their own; one of them lacks a shard."""
    folders = {rank: tmp_path / f"machine{rank}" for rank in (0, 1)}
    for folder in folders.values():
        shutil.copytree(data, folder / "data")
    sorted((folders[1] / "data").glob("*train*"))[1].unlink()
    with ranks(2, data="data", folders=folders) as two:
        assert two.wait(50) == [2, 2], two.said()
        assert "rank 1: " in two.said(0) and "tiny_train_000002.bin" in two.said(0)
        assert len(two.said(0).strip().splitlines()) == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.ranks
def test_D18_files_of_another_size(ranks, tmp_path, data):
    folders = {rank: tmp_path / f"machine{rank}" for rank in (0, 1)}
    for folder in folders.values():
        shutil.copytree(data, folder / "data")
    shard = sorted((folders[1] / "data").glob("*train*"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    with ranks(2, data="data", folders=folders) as two:
        assert two.wait(50) == [2, 2], two.said()
        assert "the ranks disagree about the data" in two.said(0)


@pytest.mark.ranks
def test_run_sh_goes_on_after_it_was_stopped(ranks, tmp_path, data):
    """The options pass through run.sh, which checks them before torchrun starts."""
    folder = tmp_path / "logs"
    options = ("--checkpoint_every", "3", "--resume", "auto")
    with ranks(2, *options) as two:
        assert two.wait() == [0, 0], two.said()
        assert "starting at step 0" in two.said()
    done = subprocess.run(["./run.sh", *tiny("--data_dir", data, "--log_dir", folder, *options)],
                          cwd=ROOT, text=True, capture_output=True, timeout=100,
                          env=clean_environment(NPROC="2", NO_VENV="1"))
    assert done.returncode == 0, done.stderr
    assert "nothing is left to do" in done.stdout
    assert len(logs_in(folder)) == 1 and state_of(checkpoints(folder)[6])["world_size"] == 2
    assert "checkpoint: " in body_of(logs_in(folder)[0])
