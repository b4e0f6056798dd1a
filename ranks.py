"""The ranks of a run: who they are, what they agree on, and the clock that they share.

World size 1 is the same code with nothing to send.
"""

import contextlib
import datetime
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: torchrun's environment, or the only one."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def first(self, function: Callable[[], T]) -> T:
        """What `function` gives on the first rank, on all; an error there is an error on all."""
        outcome = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, on every rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """The process group of torchrun's ranks; nothing at all for a single process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    if size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo",
                                device_id=where if use_cuda else None,
                                timeout=datetime.timedelta(seconds=300))
    try:
        yield World(rank, local_rank, size, where)
    finally:
        if size > 1:
            dist.destroy_process_group()


class Clock:
    """Training time: perf_counter, which no change of the system's time moves, started and
    stopped with the devices of all ranks synchronised."""

    def __init__(self, world: World):
        self.world = world
        self.elapsed_s = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self.world.synchronize()
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.world.synchronize()
        self.elapsed_s += time.perf_counter() - self._since
        self._since = None

    def now_ms(self) -> float:
        """Milliseconds so far; while running, as far as the host has come."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return 1000 * (self.elapsed_s + running)


class Signal(NamedTuple):
    """What the ranks say of one step: its mean loss, how many gradients were not finite, whether
    somebody was asked to stop."""

    step: int
    ms: float
    loss: float
    num_nonfinite: int
    stop: bool


class Signals:
    """Loss, finiteness and stop request of a step: summed over ranks, read one step later, so
    that the host never waits for the device inside the timed loop."""

    def __init__(self, world: World):
        self.world = world
        self._sent: tuple | None = None

    def send(self, step: int, ms: float, loss_share: Tensor, num_nonfinite: Tensor,
             stop: bool) -> None:
        """`step` is done (the host's part of it, on a GPU), `ms` of training time in all."""
        x = torch.stack([loss_share.float(), num_nonfinite.float(),
                         torch.full((), float(stop), device=loss_share.device)])
        work = dist.all_reduce(x, async_op=True) if self.world.size > 1 else None
        if self.world.device.type == "cuda":
            if work is not None:
                work.wait()  # orders the stream, not the host
            host = torch.empty(3, pin_memory=True)
            host.copy_(x, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self._sent = (step, ms, host, done, None)
        else:
            self._sent = (step, ms, x, None, work)

    def receive(self) -> Signal | None:
        """What all ranks said of the step last sent; None where nothing is on its way."""
        if self._sent is None:
            return None
        step, ms, x, done, work = self._sent
        if work is not None:
            work.wait()
        if done is not None:
            done.synchronize()
        self._sent = None
        loss, num_nonfinite, stop = x.tolist()
        return Signal(step, ms, loss, int(num_nonfinite), stop > 0)


class StopRequest:
    """SIGTERM and Ctrl-C ask for a stop after the current step; a second one ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True


def peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
