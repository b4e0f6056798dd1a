"""What a rank sets up before it meets the others, and what it measures."""

import os
import subprocess
import sys
import time

import pytest
import torch

import train_gpt
from conftest import ROOT
from trainer import dist
from trainer.memory import PeakMemory


@pytest.mark.parametrize("gpus, local, several, visible, sees", [
    (8, 3, 8, None, "3"), (8, 0, 4, None, "0"), (4, 2, 4, "7,6, 5,4", "5"), (8, 0, 1, None, None),
    (2, 1, 2, "GPU-a,GPU-b", "GPU-b"), (1, 3, 8, None, None), (0, 1, 2, None, None)])
def test_a_rank_sees_its_own_gpu_alone(monkeypatch, gpus, local, several, visible, sees):
    """So the device's number is the same on all, and they share what one of them compiled. With
    more ranks than GPUs, or without any, nothing is changed."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(several)}
                        | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    dist.prepare_cuda()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == sees
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("given", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_set_for_the_allocator_stays(monkeypatch, given):
    monkeypatch.setattr(os, "environ", {given: "expandable_segments:False"})
    dist.prepare_cuda()
    assert os.environ == {given: "expandable_segments:False"}


def test_the_environment_is_set_before_cuda_is_asked_anything(monkeypatch):
    """CUDA reads it once: record #62's check for fp8 used to wake it first."""
    seen = []
    prepare = train_gpt.prepare_cuda
    monkeypatch.setattr(train_gpt, "prepare_cuda", lambda: (seen.append("prepared"), prepare()))

    def asked(*_):
        seen.append("asked")
        raise KeyboardInterrupt

    for name in ("is_available", "get_device_capability", "get_device_properties", "set_device"):
        monkeypatch.setattr(torch.cuda, name, asked)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert train_gpt.main(["--record", "62"]) == 130
    assert seen == ["prepared", "asked"]


def test_memory_of_steps_is_told_from_the_rest(monkeypatch):
    peak = {"mib": 0}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.update(mib=100))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak["mib"] * 2**20)
    peak["mib"] = 900  # of the warm-up: it does not count
    memory = PeakMemory(torch.device("cuda"))
    for mib, steps in ((300, True), (500, False), (400, True), (200, False)):
        peak["mib"] = mib
        memory.update(only_steps=steps)
    assert (memory.steps_mib, memory.all_mib) == (400, 500)


def test_the_start_of_a_process_counts_from_before_its_imports():
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); began = time.perf_counter()\n"
            "from trainer import dist\n"
            "print(time.perf_counter() - began, dist.process_age_s())")
    began = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imports_s, age_s = map(float, said.stdout.split())
    assert imports_s - 0.02 <= age_s <= time.perf_counter() - began + 0.02  # counted in 10 ms


class Store:
    """The calls of torch's store that a heartbeat makes, in one process."""

    def __init__(self):
        self.values = {}

    def clone(self):
        return self

    def set_timeout(self, _):
        pass

    def check(self, keys):
        return all(key in self.values for key in keys)

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def compare_set(self, key, _, value):
        return self.values.setdefault(key, value.encode())


@pytest.fixture
def heartbeats(monkeypatch):
    """heartbeats(count) -> heartbeats of ranks that share a store, forty times as fast."""
    store, started = Store(), []
    monkeypatch.setattr(dist, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist.Heartbeat, "interval_s", 0.0125)
    monkeypatch.setattr(dist.Heartbeat, "watch_s", 0.25)

    def start(count: int) -> list[dist.Heartbeat]:
        started.extend(dist.Heartbeat(rank, count) for rank in range(count))
        return started
    yield start
    for heartbeat in started:
        heartbeat.stop()


def test_ranks_that_wait_at_the_same_time_do_not_miss_each_other(heartbeats, capfd):
    """One of them is saving a checkpoint; both have reached the time at which they would warn."""
    for heartbeat in heartbeats(2):
        heartbeat.limit_s = 0.5
    time.sleep(1.0)
    assert capfd.readouterr().err == ""


def test_a_rank_without_a_heartbeat_is_named_for_what_is_known(heartbeats, capfd):
    one, two, three = heartbeats(3)
    for heartbeat in (one, two, three):
        heartbeat.report(7)
    two.stop()  # as a process that was stopped, killed, or starved
    three.limit_s = 0.5
    time.sleep(1.0)
    warning = capfd.readouterr().err
    assert warning.startswith("rank 2: no progress for ")
    assert warning.endswith(" s after step 7: no heartbeat from rank 1 for 0.25 s\n")
    assert not one._store.check(["lost"])  # a warning is no verdict for the others
    assert one.diagnose() == "no heartbeat from rank 1 for 0.25 s"
    assert three.diagnose() == one.diagnose()


def test_a_rank_that_is_behind_is_told_from_one_that_is_gone(heartbeats):
    one, two = heartbeats(2)
    one.report(9)
    two.report(4)
    time.sleep(0.1)
    assert one.diagnose() == "rank 1 is still at step 4"
