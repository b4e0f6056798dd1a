"""The ranks of a run: who they are, what they agree on, and the clock that they share.

World size 1 is the same code with nothing to send.
"""

import contextlib
import datetime
import math
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world

T = TypeVar("T")

FIRST_STEP_TIMEOUT_S = 600.0  # compiling and fetching come before it, and may take one rank long


class LostRank(RuntimeError):
    """A collective failed because another rank is gone or hangs; the message names it."""


@dataclass(frozen=True)
class World:
    """This process among all: torchrun's environment, or the only one."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    pulse: "Pulse | None" = None
    # A second communicator on GPUs: on the default one, what the ranks tell each other in a step
    # would queue behind the gradients' reductions.
    aside: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
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

    def every(self, function: Callable[[], T]) -> T:
        """What `function` gives here; what a user can cause on one rank is refused by all."""
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

    def agree(self, facts: dict[str, object]) -> None:
        """Raise ValueError on all ranks where they differ in one of `facts`: what -> value."""
        everyone = self.gather(facts)
        for rank, theirs in enumerate(everyone):
            for what, value in everyone[0].items():
                if theirs.get(what) != value:
                    raise ValueError(
                        f"the ranks disagree about {what}: rank 0 has {value}, rank {rank} has "
                        f"{theirs.get(what)}; give every rank the same command, code and data")

    def mark(self, step: int) -> None:
        """Let the others see how far this rank is: `step` updates are done."""
        if self.pulse is not None:
            self.pulse.mark(step)

    def drifted(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
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
        """Wait until the device has done all it was given, on every rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()

    def limit_waiting(self, timeout_s: float) -> None:
        """From here on a collective that takes longer, in whatever group of ranks, means that a
        rank is lost."""
        if self.size > 1:
            for group in list(_world.pg_map):
                _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)
            self.pulse.limit_s = timeout_s

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """While one rank alone has work (a checkpoint of 6 GB on a slow disk takes minutes), the
        others wait for it as long as for a first step; collective."""
        usual = None if self.pulse is None else self.pulse.limit_s
        if usual is None:  # alone, or before the first step, when they are patient anyway
            yield
            return
        self.limit_waiting(FIRST_STEP_TIMEOUT_S)
        try:
            yield
            self.synchronize()
        finally:
            self.limit_waiting(usual)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the failure of a collective into LostRank."""
        try:
            yield
        except LostRank:
            raise
        except RuntimeError as error:  # what gloo raises has no class of its own
            words = r"gloo|nccl|time(d )?out|connection|socket|peer|pair closure"
            known = isinstance(error, dist.DistError) or re.search(words, str(error), re.I)
            if self.size == 1 or not known:
                raise
            why = str(error).strip().splitlines()[0].rpartition("] ")[2]
            raise LostRank(f"rank {self.rank} lost the others after step {self.pulse.step}: "
                           f"{self.pulse.missing()} ({why})") from None


def prepare_cuda() -> None:
    """What CUDA and its allocator read from the environment when they wake: call it before anything
    asks them (counting devices does not, it goes by NVML)."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        # Rows that grow from stage to stage leave gaps in segments of a fixed size: record #62
        # reserved 36.7 GiB so, 30.9 in segments that grow with them.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Each rank sees its own GPU alone, as the first one. The device's number is part of the key of
    # torch's compile cache: so all ranks share what one has compiled.
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
    """What `--device` comes to on this machine; see prepare_cuda."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """The process group of torchrun's ranks; nothing at all for a single process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    where = device_for(device, local_rank)
    use_cuda = where.type == "cuda"
    if use_cuda:
        torch.cuda.set_device(where)
    if size == 1:
        yield World(rank, local_rank, size, where)
        return
    dist.init_process_group("nccl" if use_cuda else "gloo", device_id=where if use_cuda else None,
                            timeout=datetime.timedelta(seconds=FIRST_STEP_TIMEOUT_S))
    pulse = Pulse(rank, size)
    orderly = True
    try:
        aside = dist.new_group() if use_cuda else None
        yield World(rank, local_rank, size, where, pulse, aside)
    except RuntimeError:  # lost or crashed: the others will not take part in an orderly end
        orderly = False
        raise
    finally:
        pulse.stop()
        if orderly:
            dist.destroy_process_group()


class Pulse:
    """A thread that tells the other ranks that this one lives and how far it is, through the store
    that they met at; so a rank that is gone, stopped or stuck can be named by those that wait."""

    interval_s = 0.5
    all_answer = "all ranks answer: look at the network between them"

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.step = 0
        self.limit_s: float | None = None
        self._moved = time.perf_counter()
        self._parent = os.getppid()
        self._store = _get_default_store().clone()  # a connection of its own
        self._store.set_timeout(datetime.timedelta(seconds=5))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def mark(self, step: int) -> None:
        """This rank got somewhere: `step` updates are done."""
        self.step, self._moved = step, time.perf_counter()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        count, said = 0, False
        while not self._end.wait(self.interval_s):
            if os.getppid() != self._parent:  # the launcher was killed: stop as if it had asked
                os.kill(os.getpid(), signal.SIGTERM)
                return
            count += 1
            try:
                self._store.set(f"pulse/{self.rank}", f"{count} {self.step}")
            except RuntimeError:
                return  # whoever held the store is gone; the next collective fails and says so
            waited = time.perf_counter() - self._moved
            # Some time before the limit, at which NCCL ends the process.
            if self.limit_s is not None and waited > 0.8 * self.limit_s and not said:
                said = True
                missing = self.missing()
                if missing != self.all_answer:
                    print(f"rank {self.rank}: nothing has moved for {waited:.0f} s after step "
                          f"{self.step}: {missing}", file=sys.stderr, flush=True)

    def _read(self) -> dict[int, tuple[str, int]]:
        """Rank -> (count of beats, steps done) of the ranks that ever said something."""
        found = {}
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"pulse/{rank}"]):
                count, step = self._store.get(f"pulse/{rank}").decode().split()
                found[rank] = (count, int(step))
        return found

    def missing(self) -> str:
        """Which ranks do not answer or stand still; takes about a second and a half. The first rank
        that finds out tells the others, who would otherwise name those that ended because of it."""
        try:
            if self._store.check(["lost"]):
                return self._store.get("lost").decode()
            before = self._read()
            time.sleep(3 * self.interval_s)
            now = self._read()
            gone = [r for r in range(self.size)
                    if r != self.rank and (r not in now or before.get(r, "")[:1] == now[r][:1])]
            behind = [r for r in now if r not in gone and now[r][1] < self.step]
            if gone:
                text = ", ".join(f"rank {r}" for r in gone) + " does not answer: its process was " \
                       "killed, was stopped or has ended"
            elif behind:
                text = ", ".join(f"rank {r} (step {now[r][1]})" for r in behind) + " is stuck"
            else:
                return self.all_answer
            return self._store.compare_set("lost", "", text).decode()
        except RuntimeError:
            return "the launcher, or the rank that held the meeting point, is gone"


class Clock:
    """Training time: perf_counter, which no change of the system's time moves, started and
    stopped with the devices of all ranks synchronised.

    A counter that runs backwards all the same makes the time worthless: `fault` says so.
    """

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


class Signal(NamedTuple):
    """What the ranks say of one step: its mean loss, how many of them found it bad, whether
    somebody was asked to stop."""

    step: int
    ms: float
    loss: float
    num_bad: int
    stop: bool


class Signals:
    """What the ranks tell each other in every step: loss, faults and stop request, in one small
    reduction between the backward pass and the update.

    The update hangs on it without the host: `gate` is true on the device as long as all went well,
    and false from the first bad step on, so that no parameter moves in a bad step or in the one
    that is under way when the host hears of it, one step later.

    A step is bad when on any rank the loss is not finite, the norm of a parameter's gradient is not
    below `limit` (or is no number), or something else failed: `fault` says what.
    Gradients are looked at by hooks, while they are still this rank's own, so that the rank can be
    named: make Signals before the optimizer, whose hooks send them off, and then `guard` it.
    """

    limit = 1e18  # above 1.8e19 squares leave the range of fp32 and bf16

    def __init__(self, world: World, named_parameters: Iterable[tuple[str, Tensor]]):
        self.world = world
        self.fault = ""
        self.gate = torch.ones((), dtype=torch.bool, device=world.device)
        self.names, parameters = zip(*named_parameters)
        wide = max((p.dtype for p in parameters), key=lambda dtype: dtype.itemsize)
        self._norms = torch.zeros(len(self.names), device=world.device,
                                  dtype=torch.promote_types(wide, torch.float32))
        self._blamed = self._norms.clone()  # of the last good or the first bad step
        self._loss = torch.zeros((), device=world.device)
        self._armed = False
        self._said: Tensor | None = None
        self._sent: tuple | None = None
        for i, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(self._norms[i]))

    def _hook(self, norm: Tensor) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if self._armed:
                torch.linalg.vector_norm(parameter.grad, dtype=norm.dtype, out=norm)
        return look

    def guard(self, optimizer) -> None:
        """Let a muon.Muon move nothing while the gate is shut: it looks on the device."""
        optimizer.gate = self.gate

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all steps so far and open the gate: what a warm-up did is not the run's."""
        self.gate.fill_(True)  # in place: an optimizer looks at it
        for tensor in (self._norms, self._blamed, self._loss):
            tensor.zero_()

    def arm(self) -> None:
        """The next backward pass is the last one of this step."""
        self._armed = True

    @torch.no_grad()
    def agree(self, loss_share: Tensor, num_nonfinite: Tensor, stop: bool) -> None:
        """Between backward and update: shuts the gate where a rank found the step bad.

        num_nonfinite: what the owners of parameters found in the update before, after reduction.
        """
        self._armed = False
        loss = loss_share.float()
        bad = ~((self._norms < self.limit).all() & loss.isfinite())
        told = bad.float() + (1.0 if self.fault else 0.0) + num_nonfinite.float()
        x = torch.stack([loss, told, torch.full_like(loss, float(stop))])
        if self.world.size > 1:
            dist.all_reduce(x, group=self.world.aside)
        self._blamed = torch.where(self.gate, self._norms, self._blamed)
        self._loss = torch.where(self.gate, loss, self._loss)
        self.gate &= x[0].isfinite() & (x[1] == 0)  # in place: an optimizer looks at it
        self._said = x

    def send(self, step: int, ms: float) -> None:
        """`step` is done (the host's part of it, on a GPU), `ms` of training time in all."""
        if self.world.device.type == "cuda":
            host = torch.empty(3, pin_memory=True)
            host.copy_(self._said, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self._sent = (step, ms, host, done)
        else:
            self._sent = (step, ms, self._said, None)

    def receive(self) -> Signal | None:
        """What all ranks said of the step last sent; None where nothing is on its way."""
        if self._sent is None:
            return None
        step, ms, x, done = self._sent
        if done is not None:
            done.synchronize()
        self._sent = None
        loss, num_bad, stop = x.tolist()
        return Signal(step, ms, loss, int(num_bad), stop > 0)

    def why(self) -> str:
        """After a bad step: every rank's reasons in words; a collective call."""
        reasons = [self.fault] if self.fault else []
        loss = self._loss.item()
        if not math.isfinite(loss):
            reasons.append(f"loss {loss}")
        norms = zip(self.names, self._blamed.tolist())
        bad = [f"{name} (norm {norm:.0e})" for name, norm in norms if not norm < self.limit]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            reasons.append(f"gradient of {', '.join(bad[:3])}{more}")
        everyone = self.world.gather("; ".join(reasons))
        said = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
        return " | ".join(said) or "a reduced gradient was not finite though each rank's own was"


class StopRequest:
    """SIGTERM, SIGHUP and Ctrl-C ask for a stop after the current step; a second one, a second or
    more after the first, ends at once. (Launchers repeat what a terminal sent already, so what
    follows within that second is the same wish.)"""

    patience_s = 1.0

    def __init__(self):
        self.asked = False
        self._when = 0.0
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        now = time.perf_counter()
        if self.asked and now - self._when >= self.patience_s:
            os._exit(128 + number)
        if not self.asked:
            self.asked, self._when = True, now


class PeakMemory:
    """The largest use of memory in MiB from now on, of training steps and of all together. A CPU
    knows one number, that of the whole process."""

    def __init__(self, device: torch.device):
        self.device, self.steps, self.all = device, 0.0, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def look(self, steps: bool) -> None:
        """Since the last look there were only training steps, or no steps."""
        if self.device.type == "cuda":
            mib = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.all = max(self.all, mib)
        self.steps = max(self.steps, mib) if steps else self.steps
