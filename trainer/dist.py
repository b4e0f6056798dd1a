"""Distributed setup: ranks, devices, timeouts, heartbeat and the training clock.

World size 1 runs the same code with nothing to communicate.
"""

import contextlib
import datetime
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Private, because torch has no public call for either: the store that the ranks met at, from which
# the heartbeat works without a collective; the timeout of a group that exists, and the list of all
# groups (gloo ranks of muon.Muon have one of their own).
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world

T = TypeVar("T")

FIRST_STEP_TIMEOUT_S = 600.0  # compiling and fetching come before it, and may take one rank long


class LostRank(RuntimeError):
    """A collective failed because another rank ended or hangs; the message names it."""


@dataclass(frozen=True)
class World:
    """This process among all: torchrun's environment, or the only one."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    heartbeat: "Heartbeat | None" = None
    # A second communicator on GPUs for status messages: on the default one they would queue behind
    # the gradients' reductions.
    control_group: dist.ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """Ranks on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.size > 1 else 1

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in the order of ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and broadcast its result; an error there is raised on all."""
        outcome = [None, None]
        if self.is_rank0:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def all_or_raise(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank; where it raises ValueError or OSError on one, raise
        ValueError on all, with the rank."""
        value, refusal = None, ""
        try:
            value = function()
        except (ValueError, OSError) as error:
            refusal = str(error)
        refusals = {rank: r for rank, r in enumerate(self.gather(refusal)) if r}
        if refusals:
            rank, text = min(refusals.items())
            same = len(refusals) == self.size and len(set(refusals.values())) == 1
            raise ValueError(text if same else f"rank {rank}: {text}")
        return value

    def assert_equal_across_ranks(self, facts: dict[str, object]) -> None:
        """Raise ValueError on all ranks where they differ in one of `facts`: name -> value."""
        everyone = self.gather(facts)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"the ranks disagree about {name}: rank 0 has {value}, rank {rank} has "
                        f"{theirs.get(name)}; give every rank the same command, code and data")

    def report_progress(self, step: int) -> None:
        """Publish by the heartbeat that this rank has done `step` updates."""
        if self.heartbeat is not None:
            self.heartbeat.report(step)

    def out_of_sync(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Tensors that are not the same on all ranks, bit for bit: `name on rank r`."""
        if self.size == 1:
            return []
        names, sums = [], []
        for name, tensor in named:
            bits = tensor.detach().contiguous().flatten().view(
                {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.itemsize])
            names.append(name)
            sums.append(bits.sum(dtype=torch.int64))
        mine = torch.stack(sums)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        table = torch.stack(everyone).cpu()
        usual = table.mode(0).values if self.size > 2 else table[0]
        return [f"{names[i]} on rank {rank}"
                for rank, i in (table != usual).nonzero().tolist()]

    def synchronize(self) -> None:
        """Wait until the devices of all ranks are idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()

    def set_timeout(self, timeout_s: float) -> None:
        """From here on a collective of any group that takes longer raises."""
        if self.size > 1:
            for group in list(_world.pg_map):
                _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)
            self.heartbeat.limit_s = timeout_s

    @contextlib.contextmanager
    def long_timeout(self) -> Iterator[None]:
        """For work of one rank that the others wait for, as a checkpoint of 6 GB on a slow disk:
        the timeout is that of the first step meanwhile. A collective call."""
        usual = None if self.heartbeat is None else self.heartbeat.limit_s
        if usual is None:  # one rank, or before the first step, when the timeout is long anyway
            yield
            return
        self.set_timeout(FIRST_STEP_TIMEOUT_S)
        try:
            yield
            self.synchronize()
        finally:
            self.set_timeout(usual)

    @contextlib.contextmanager
    def translate_comm_errors(self) -> Iterator[None]:
        """Turn the failure of a collective into LostRank, which names the rank."""
        try:
            yield
        except LostRank:
            raise
        except RuntimeError as error:  # gloo's errors have no class of their own
            words = r"gloo|nccl|time(d )?out|connection|socket|peer|pair closure"
            known = isinstance(error, dist.DistError) or re.search(words, str(error), re.I)
            if self.size == 1 or not known:
                raise
            why = str(error).strip().splitlines()[0].rpartition("] ")[2]
            raise LostRank(f"rank {self.rank} lost the others after step {self.heartbeat.step}: "
                           f"{self.heartbeat.diagnose()} ({why})") from None


def prepare_cuda() -> None:
    """Set CUDA environment variables; call before the first CUDA call (counting devices is none, it
    goes by NVML)."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        # Rows that grow from phase to phase leave gaps in segments of a fixed size: record #62
        # reserved 36.7 GiB so, 30.9 in segments that grow with them.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Each rank sees its own GPU alone, as the first one. The device's number is part of the key of
    # torch's compile cache: so all ranks share the graphs that one has compiled.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 1 < several <= torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(several)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank].strip()


def process_age_s() -> float:
    """Seconds since this process was started, Python's and torch's imports included."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the machine's start
    # Not /proc/uptime: some containers put their own there.
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)


def device_for(device: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` means on this machine; see prepare_cuda."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """The process group of torchrun's ranks; nothing at all for a single process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    own_device = device_for(device, local_rank)
    use_cuda = own_device.type == "cuda"
    if use_cuda:
        torch.cuda.set_device(own_device)
    if size == 1:
        yield World(rank, local_rank, size, own_device)
        return
    dist.init_process_group("nccl" if use_cuda else "gloo",
                            device_id=own_device if use_cuda else None,
                            timeout=datetime.timedelta(seconds=FIRST_STEP_TIMEOUT_S))
    heartbeat = Heartbeat(rank, size)
    orderly = True
    try:
        control_group = dist.new_group() if use_cuda else None
        yield World(rank, local_rank, size, own_device, heartbeat, control_group)
    except RuntimeError:  # lost or crashed: the others will not take part in an orderly end
        orderly = False
        raise
    finally:
        heartbeat.stop()
        if orderly:
            dist.destroy_process_group()


class Heartbeat:
    """A thread that publishes this rank's number of updates in the store that the ranks met at, so
    that a rank that ended, was stopped or hangs can be named by those that wait for it."""

    interval_s = 0.5
    watch_s = 2.5   # between the two looks at the others' heartbeats

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.step = 0
        self.limit_s: float | None = None   # the timeout, from the first step on
        self._moved = time.perf_counter()   # of this rank's last progress
        self._parent = os.getppid()
        self._store = _get_default_store().clone()  # a connection of its own
        self._store.set_timeout(datetime.timedelta(seconds=5))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def report(self, step: int) -> None:
        """This rank has done `step` updates."""
        self.step, self._moved = step, time.perf_counter()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        count, before, warned = 0, None, False
        while not self._end.wait(self.interval_s):
            if os.getppid() != self._parent:  # the launcher was killed: stop as if it had asked
                os.kill(os.getpid(), signal.SIGTERM)
                return
            count += 1
            try:
                self._store.set(f"heartbeat/{self.rank}", f"{count} {self.step}")
                if self.limit_s is None or warned:
                    continue
                # Warn some time before the limit, at which NCCL ends the process. The beat goes on
                # between the two looks, or ranks that look at the same time would miss each other.
                waited, warn_at = time.perf_counter() - self._moved, 0.8 * self.limit_s
                if waited < warn_at - self.watch_s:
                    before = None
                elif before is None:
                    before = self._read()
                elif waited > warn_at:
                    warned = True
                    if found := self._compare(before, self._read()):
                        print(f"rank {self.rank}: no progress for {waited:.0f} s after step "
                              f"{self.step}: {found}", file=sys.stderr, flush=True)
            except RuntimeError:
                return  # the store's process has ended; the next collective fails and says so

    def _read(self) -> dict[int, tuple[str, int]]:
        """Rank -> (count of beats, updates done) of the ranks that have published any."""
        found = {}
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"heartbeat/{rank}"]):
                count, step = self._store.get(f"heartbeat/{rank}").decode().split()
                found[rank] = (count, int(step))
        return found

    def _compare(self, before: dict, now: dict) -> str:
        """Which ranks had no heartbeat between two looks, or are behind; nothing: none."""
        silent = [r for r in range(self.size)
                  if r != self.rank and (r not in now or before.get(r, "")[:1] == now[r][:1])]
        behind = [r for r in now if r not in silent and now[r][1] < self.step]
        if silent:
            return "no heartbeat from " + ", ".join(f"rank {r}" for r in silent) + (
                f" for {self.watch_s:g} s")
        return ", ".join(f"rank {r} is still at step {now[r][1]}" for r in behind)

    def diagnose(self) -> str:
        """Why a collective failed, as far as heartbeats tell; takes watch_s. The first rank that
        knows tells the others, which would otherwise name those that ended because of it."""
        try:
            if self._store.check(["lost"]):
                return self._store.get("lost").decode()
            before = self._read()
            time.sleep(self.watch_s)
            if found := self._compare(before, self._read()):
                return self._store.compare_set("lost", "", found).decode()
            return "all ranks have a heartbeat: look at the network between them"
        except RuntimeError:
            return "the launcher, or the rank that held the store, has ended"


class Clock:
    """Training time by perf_counter, which no change of the system's time moves; started and
    stopped with the devices of all ranks synchronised. A counter that runs backwards all the same
    makes the time worthless: `fault` says so."""

    def __init__(self, world: World, elapsed_s: float = 0.0):
        self.world = world
        self.elapsed_s = elapsed_s
        self.fault = ""
        self._last: float | None = None

    def start(self) -> None:
        self.world.synchronize()
        self._last = time.perf_counter()

    def stop(self) -> None:
        self.world.synchronize()
        self._advance()
        self._last = None

    def now_ms(self) -> float:
        """Milliseconds so far; while running, as far as the host has come."""
        self._advance()
        return 1000 * self.elapsed_s

    def _advance(self) -> None:
        if self._last is None:
            return
        now = time.perf_counter()
        if now < self._last:
            self.fault = f"the clock ran backwards by {self._last - now:.3f} s: no time to report"
        self.elapsed_s += max(0.0, now - self._last)
        self._last = now
