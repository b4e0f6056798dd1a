"""For every case: its data, and a look at what is left of it."""

import multiprocessing
import uuid
from pathlib import Path

import numpy as np
import pytest

import train_gpt
from data.shards import write_shard
from faults.helpers import Ranks, marked_processes, train_here, wait_until
from forked import start_server

SLOW = ("--num_iterations", "400", "--val_every", "400", "--timeout_s", "20")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Three training shards, the first of them good for 15 steps of 384 tokens."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, count in (("train_000001", 6000), ("train_000002", 200_000), ("val_000000", 2500)):
        walk = np.cumsum(generator.integers(1, 4, count)) % 256
        walk[::100] = 256
        write_shard(folder / f"tiny_{name}.bin", walk.astype(np.uint16))
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """P10: whatever a case did, none of its processes lives on."""
    start_server()  # which lives on, so without the marker
    marker = uuid.uuid4().hex
    monkeypatch.setenv("FAULT_CASE", marker)
    yield

    def left() -> list:
        return [*marked_processes(marker), *multiprocessing.active_children()]

    wait_until(lambda: not left(), timeout=5, explain=lambda: f"still running: {left()}")


@pytest.fixture
def train(capsys, data, tmp_path, monkeypatch):
    """train(*options, folder="logs"): the tiny run in this process."""
    monkeypatch.setattr(train_gpt, "generate", lambda *_, **__: "")  # longer than the training

    def run(*options: object, folder: str | Path = "logs", data: Path = data):
        return train_here(capsys, *options, data=data, log_dir=tmp_path / folder)
    return run


@pytest.fixture
def ranks(data, tmp_path):
    """ranks(count, *options, faults=()): processes, ended with the test."""
    started = []

    def run(count: int, *options: object, folder: str = "logs", data: Path = data, **more):
        started.append(Ranks(count, *options, data=data, log_dir=tmp_path / folder, **more))
        return started[-1]
    yield run
    for one in started:
        one.__exit__()


@pytest.fixture
def broken(monkeypatch):
    """broken("gradient:0:3:nan", ...): faults for trainings in this process."""
    from faults.inject import Broken

    return lambda *faults: Broken(list(faults), monkeypatch.setattr)
