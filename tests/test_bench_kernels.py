"""bench/kernels.py around what it measures: the waits before a launch, and cases that fail."""

import json
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


def test_a_case_that_fails_is_a_row_and_the_next_call_tries_it_alone(tmp_path, monkeypatch, capsys):
    file, broken, measured = tmp_path / "kernels.json", [True], []

    def kernel(x):
        measured.append(x.item())
        if x == 2 and broken:
            raise RuntimeError("out of memory")
        return x + 1e-3

    def cases(toy, device):
        for value in (1.0, 2.0, 3.0):
            yield bench.Case("plus", f"{value}", torch.float32, kernel, lambda x: x + 0,
                             lambda value=value: [torch.tensor(value)], 1, 1)

    monkeypatch.setattr(bench, "CASES", (cases,))
    bench.main(["--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["shape"] for row in rows if "error" in row] == ["1.0", "3.0"]
    assert "out of memory" in rows[1]["failed"]
    assert "| plus | 2.0 | float32 | failed: RuntimeError: out of memory |" in \
        capsys.readouterr().out
    broken.clear()
    measured.clear()
    bench.main(["--json", str(file)])
    assert measured == [2.0]
    assert all("error" in row for row in json.loads(file.read_text())["rows"])
