"""The trainer with something broken on purpose.

    python tests/faults/inject.py slow:0.05 nan_gradient:1:3 -- OPTIONS OF train_gpt.py

A fault is NAME:WHERE:WHEN: the rank, and the step (0-based) just before which it happens.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt

RANK = int(os.environ.get("RANK", 0))


class Broken:
    """Hooks into the trainer where a step begins; `setattr` is pytest's where it must be undone."""

    def __init__(self, faults: list[str], setattr=setattr):
        self.faults = [fault.split(":") for fault in faults]
        self.model = self.reporter = None
        build_model, next_batch = train_gpt.build_model, train_gpt.next_batch
        open_log = train_gpt.Reporter.open_log

        def built(*arguments):
            self.model = build_model(*arguments)
            return self.model

        def opened(reporter, *arguments):
            self.reporter = reporter
            return open_log(reporter, *arguments)

        def batch(loader, state):
            for name, *rest in self.faults:
                getattr(self, name)(state.step, *rest)
            return next_batch(loader, state)

        if ["other_code", str(RANK)] in self.faults:
            sources = train_gpt.local_sources
            setattr(train_gpt, "local_sources", lambda: sources() | {"model.py": "other"})
        setattr(train_gpt, "build_model", built)
        setattr(train_gpt, "next_batch", batch)
        setattr(train_gpt.Reporter, "open_log", opened)

    def parameter(self, name: str = "blocks.0.mlp.fc.weight") -> torch.nn.Parameter:
        return dict(self.model.named_parameters())[name]

    def slow(self, step: int, seconds: str) -> None:
        time.sleep(float(seconds))

    def slow_from(self, step: int, when: str, seconds: str) -> None:
        """Sleep that long whatever signals come, as a kernel does."""
        end = time.monotonic() + float(seconds)
        while step >= int(when) and time.monotonic() < end:
            time.sleep(0.05)

    def gradient(self, step: int, rank: str, when: str, value: str) -> None:
        """One entry of one gradient becomes `value`, once."""
        if (RANK, step) == (int(rank), int(when)):
            def spoil(grad: torch.Tensor) -> torch.Tensor:
                handle.remove()
                grad = grad.clone()
                grad.view(-1)[7] = float(value)
                return grad

            handle = self.parameter().register_hook(spoil)

    def loss(self, step: int, rank: str, when: str, value: str) -> None:
        """The loss becomes `value` while its gradient stays as it is."""
        if (RANK, step) == (int(rank), int(when)):
            def spoil(module, inputs, loss: torch.Tensor) -> torch.Tensor:
                handle.remove()
                return loss + float(value) if math.isfinite(float(value)) else loss + (
                    torch.full_like(loss, float(value)))

            handle = self.model.register_forward_hook(spoil)

    def nudge(self, step: int, rank: str, when: str) -> None:
        """A parameter that all ranks own changes on one of them."""
        if (RANK, step) == (int(rank), int(when)):
            with torch.no_grad():
                self.parameter("embed.weight").view(-1)[5] += 1e-6

    def crash(self, step: int, rank: str, when: str) -> None:
        if (RANK, step) == (int(rank), int(when)):
            raise KeyError("an error that nobody foresaw")

    def delete(self, step: int, when: str, path: str) -> None:
        if step == int(when):
            Path(path).unlink(missing_ok=True)

    def halve(self, step: int, when: str, path: str) -> None:
        """A file is cut while it is in use."""
        if step == int(when):
            os.truncate(path, os.path.getsize(path) // 2)

    def freeze(self, step: int, rank: str, when: str) -> None:
        """SIGSTOP of oneself, after the ranks agreed on the step and before its update."""
        if (RANK, step) == (int(rank), int(when)):
            update = train_gpt.Muon.step

            def stopped(*arguments):
                os.kill(os.getpid(), signal.SIGSTOP)
                return update(*arguments)

            train_gpt.Muon.step = stopped

    def other_code(self, step: int, rank: str) -> None:
        """Acts when it is named: see __init__."""

    def full_log(self, step: int, when: str) -> None:
        """The disk of the log is full from here on."""
        if RANK == 0 and step == int(when):
            self.reporter.log._file.close()
            self.reporter.log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115

    def full_disk(self, step: int, when: str, folder: str) -> None:
        """All but 100 kB of the disk of `folder` is taken."""
        if step == int(when):
            disk = os.statvfs(folder)
            ballast = Path(folder) / "ballast"
            ballast.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - 100_000)))

    def kill_once(self, step: int, rank: str, when: str) -> None:
        """kill -9 of oneself, in a first life only (torchrun counts restarts)."""
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first_life and (RANK, step) == (int(rank), int(when)):
            os.kill(os.getpid(), signal.SIGKILL)

    def slow_save(self, step: int, when: str, seconds: str) -> None:
        """From the checkpoint of that step on, files stand half-written for a while."""
        if step == int(when) - 1:
            verify = train_gpt.checkpoint.verify

            def slowly(path: Path) -> None:
                if path.suffix == ".tmp":
                    print("half-written", flush=True)
                    time.sleep(float(seconds))
                verify(path)

            train_gpt.checkpoint.verify = slowly


if __name__ == "__main__":
    at = sys.argv.index("--")
    Broken(sys.argv[1:at])
    del sys.argv[1 : at + 1]
    sys.exit(train_gpt.main(sys.argv[1:]))
