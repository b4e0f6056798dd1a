"""The status that ranks exchange in every step: loss, faults, stop request; and signals.

A bad step must move no parameter on any rank, and the host must not wait for the device to find
out. So the outcome stays on the device as `StepStatus.gate`, which the optimizer reads, and reaches
the host one step later.
"""

import math
import os
import signal
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.dist import World


class StepReport(NamedTuple):
    """The ranks' status after one step."""

    step: int               # 0-based
    ms: float               # training time at its end
    loss: float             # mean over the step's tokens, nats
    num_bad: int            # checks that failed, over all ranks
    stop_requested: bool    # on any rank

    @property
    def bad(self) -> bool:
        return self.num_bad > 0 or not math.isfinite(self.loss)


class StepStatus:
    """Checks one step on every rank and combines the results in one small all-reduce, between the
    backward pass and the update.

    `gate` is a bool tensor on the device: True as long as all steps were good, False from the first
    bad one on, so that no parameter moves in a bad step or in the one that is under way when the
    host reads of it, one step later.

    A step is bad where on any rank the loss is not finite, the norm of a parameter's gradient is
    not below `limit` (or is NaN), or `local_fault` says that something else failed. Norms are taken
    while gradients are still this rank's own, so that the rank can be named.
    """

    limit = 1e18  # above 1.8e19 squares leave the range of fp32 and bf16

    def __init__(self, world: World, named_parameters: Iterable[tuple[str, Tensor]]):
        self.world = world
        self.local_fault = ""
        self.gate = torch.ones((), dtype=torch.bool, device=world.device)
        self.names, self.parameters = zip(*named_parameters)
        wide = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self._norms = torch.zeros(len(self.names), device=world.device,
                                  dtype=torch.promote_types(wide, torch.float32))
        self._bad_norms = self._norms.clone()  # of the last good or the first bad step
        self._loss = torch.zeros((), device=world.device)
        self._reduced: Tensor | None = None
        self._sent: tuple | None = None

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all steps so far and open the gate, after a warm-up."""
        self.gate.fill_(True)  # in place: the optimizer holds it
        for tensor in (self._norms, self._bad_norms, self._loss):
            tensor.zero_()

    @torch.no_grad()
    def take_norms(self) -> None:
        """Of this rank's gradients; call after the last backward pass of a step."""
        norms = [norm for norm, p in zip(self._norms, self.parameters) if p.grad is not None]
        grads = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_copy_(norms, torch._foreach_norm(grads, dtype=self._norms.dtype))

    @torch.no_grad()
    def reduce(self, loss_share: Tensor, nonfinite: Tensor, stop: bool) -> None:
        """Combine the ranks' checks; call between backward and update. `loss_share`: this rank's
        part of the step's mean loss. `nonfinite`: whether owners of parameters found gradients that
        are not finite in the update before, after reduction."""
        loss = loss_share.float()
        bad = ~((self._norms < self.limit).all() & loss.isfinite())
        num_bad = bad.float() + (1.0 if self.local_fault else 0.0) + nonfinite.float()
        x = torch.stack([loss, num_bad, torch.full_like(loss, float(stop))])
        if self.world.size > 1:
            dist.all_reduce(x, group=self.world.control_group)
        self._bad_norms = torch.where(self.gate, self._norms, self._bad_norms)
        self._loss = torch.where(self.gate, loss, self._loss)
        self.gate &= x[0].isfinite() & (x[1] == 0)  # in place: the optimizer holds it
        self._reduced = x

    def send(self, step: int, ms: float) -> None:
        """Start the copy of this step's result to the host. `ms` of training time in all."""
        if self.world.device.type == "cuda":
            host = torch.empty(3, pin_memory=True)
            host.copy_(self._reduced, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self._sent = (step, ms, host, done)
        else:
            self._sent = (step, ms, self._reduced, None)

    def receive(self) -> StepReport | None:
        """The report of the step last sent; None where it was received already."""
        if self._sent is None:
            return None
        step, ms, x, done = self._sent
        if done is not None:
            done.synchronize()
        self._sent = None
        loss, num_bad, stop = x.tolist()
        return StepReport(step, ms, loss, int(num_bad), stop > 0)

    def explain(self) -> str:
        """After a bad step: every rank's reasons in words; a collective call."""
        reasons = [self.local_fault] if self.local_fault else []
        loss = self._loss.item()
        if not math.isfinite(loss):
            reasons.append(f"loss {loss}")
        norms = zip(self.names, self._bad_norms.tolist())
        bad = [f"{name} (norm {norm:.0e})" for name, norm in norms if not norm < self.limit]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            reasons.append(f"gradient of {', '.join(bad[:3])}{more}")
        everyone = self.world.gather("; ".join(reasons))
        texts = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
        return " | ".join(texts) or "a reduced gradient was not finite though each rank's own was"


class StopRequest:
    """SIGTERM, SIGHUP and Ctrl-C ask for a stop after the current step; a second one, a second or
    more after the first, ends at once. (Launchers repeat a signal that the terminal has sent
    already, so one that follows within that second counts as the same.)"""

    grace_s = 1.0

    def __init__(self):
        self.asked = False
        self._asked_at = 0.0
        self._handlers: dict = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP on purpose
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        now = time.perf_counter()
        if self.asked and now - self._asked_at >= self.grace_s:
            os._exit(128 + number)
        if not self.asked:
            self.asked, self._asked_at = True, now
