"""What the tests share: small shards to train on, and a way to start the trainer as people do."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from forked import Forked

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "tests" / "facts"  # numbers of the published records, each file says from where

# Without a GPU the kernels run in Triton's interpreter; it is chosen where they are defined.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# A shell that starts something in the background has it ignore Ctrl-C, and children inherit that.
# Here they are to be stopped by it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A model that trains in a second: record 6 with 2 layers of width 32, 12 rows of 32 tokens a step.
TINY = {"record": 6, "scale": "pocket", "num_layers": 2, "num_heads": 2, "head_dim": 16,
        "seq_len": 32, "batch_tokens": 384, "num_iterations": 6, "val_tokens": 1024, "val_every": 3}


def tiny_options(*extra: object) -> list[str]:
    """TINY as options, without those that `extra` sets itself, and then `extra`."""
    given = {str(word).removeprefix("--") for word in extra}
    kept = {f"--{name}": str(value) for name, value in TINY.items() if name not in given}
    return [*(word for pair in kept.items() for word in pair), *map(str, extra)]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with two training shards and one for validation: 257 tokens, learnable order."""
    from data.shards import write_shard

    folder = tmp_path_factory.mktemp("tiny_data")
    generator = np.random.default_rng(0)
    for name, count in (("train_000001", 6000), ("train_000002", 6000), ("val_000000", 2500)):
        walk = np.cumsum(generator.integers(1, 4, count)) % 256
        walk[:: 100] = 256  # a document opens every hundred tokens
        write_shard(folder / f"tiny_{name}.bin", walk.astype(np.uint16))
    return folder


def clean_environment(**changes: str) -> dict[str, str]:
    """This environment without torchrun's variables, one thread a process."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
            "NPROC", "NNODES")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return environment | {"PATH": path, "OMP_NUM_THREADS": "1",
                          "OMP_WAIT_POLICY": "passive"} | changes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environments(count: int, **environment: str) -> list[dict[str, str]]:
    """The environment of each of `count` ranks of one machine, as torchrun sets it."""
    if count == 1:
        return [clean_environment(**environment)]
    meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free_port())}
    return [clean_environment(RANK=str(rank), LOCAL_RANK=str(rank), **meeting, **environment)
            for rank in range(count)]


def trainer(words: list[str]) -> int:
    """`python train_gpt.py WORDS`, in a fork."""
    import train_gpt

    sys.argv = ["train_gpt.py", *words]
    return train_gpt.main(words)


def start(*arguments: str, nproc: int = 1, timeout: float = 100,
          **environment: str) -> subprocess.CompletedProcess:
    """`train_gpt.py ARGUMENTS` in `nproc` processes; output and status of the first one, which
    fails with any other."""
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        outs, errs = ([Path(folder) / f"{rank}.{kind}" for rank in range(nproc)]
                      for kind in ("out", "err"))
        ranks = [Forked(trainer, words, environment=own, out=out, err=err)
                 for own, out, err in zip(rank_environments(nproc, **environment), outs, errs)]
        try:
            end = time.monotonic() + timeout
            codes = [rank.wait(max(0.0, end - time.monotonic())) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        return subprocess.CompletedProcess(
            words, codes[0] or max(codes), outs[0].read_text(),
            "".join(err.read_text() for err in errs))


@pytest.fixture
def train(tiny_data, tmp_path):
    """train(*options, nproc=1) -> (finished process, logs it wrote): the tiny model, once."""
    def run(*extra: str, nproc: int = 1, log_dir: Path = tmp_path / "logs", **environment: str):
        done = start(*tiny_options("--data_dir", tiny_data, "--log_dir", log_dir, *extra),
                     nproc=nproc, **environment)
        return done, sorted(log_dir.glob("*.txt"))
    return run
