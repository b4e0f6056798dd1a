"""bench/kernels.py around what it measures: the waits before a launch, and cases that fail."""

import time

import torch

from bench import kernels as bench


def test_the_device_sleeps_longer_than_the_host_takes_to_launch(monkeypatch):
    """Cycles of a clock of 2 GHz, the fastest there is: the host's 5 ms are at least 10 million."""
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def elapsed_time(self, end):
            return 0.5

    slept = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    assert bench.milliseconds(lambda: time.sleep(0.005), repeats=2) == 0.5
    assert len(slept) == 2 and min(slept) >= 0.005 * 2e9
