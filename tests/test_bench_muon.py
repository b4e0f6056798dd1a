"""bench/muon_plan.py: predictions and words about a plan; and what state an optimizer announces."""

import contextlib
import re

import muon_helpers as h
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import muon
from bench import muon_plan
from bench.muon_plan import Rates, explain, exposed_seconds
from conftest import ROOT
from muon import Bucket, Slot


@contextlib.contextmanager
def one_of(world_size, rank=0):
    """A rank whose collectives do nothing; no process group for a world of 1."""
    if world_size > 1:
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def layers(width, num_layers=12):
    """Hidden matrices of GPT-2's proportions."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return [(f"layer{n}.{k}", torch.nn.Parameter(torch.zeros(shape)))
            for n in range(num_layers) for k, shape in enumerate(shapes)]


def test_a_plan_on_eight_ranks_in_words(monkeypatch):
    monkeypatch.setattr(muon, "SHARD_FROM", 4096)
    table, bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((100, 64), (64,)))
    with one_of(8, rank=3):
        optimizer = muon.Muon([{"params": layers(64)}], num_buckets=3)
        optimizer.add_param_group({"rule": "adam", "update_interval": 2,
                                   "params": [("table", table), ("bias", bias)]})
        text = explain(optimizer)
    lines = text.splitlines()
    assert lines[0] == "74 parameters on 8 ranks; this is rank 3"
    # 12 layers of 10 units, balanced; a unit is a 64 x 64 matrix, 5 steps of 6 * 64^3 FLOP.
    assert sum("24 owned float32, 0.786 MB" in line for line in lines) == 3
    assert "balance 100.0%" in text and f"GFLOP per rank {15 * 30 * 64**3 / 1e9:.3f} " in text
    assert len(re.findall("^  rank 7: ", text, re.M)) >= 3
    # 13 of 100 rows a rank; a reduce-scatter sends 7/8 of 104 rows.
    at = next(n for n, line in enumerate(lines) if " 1 sharded " in line)
    assert f"every 2 steps, {100 * 64 * 4 / 1e6:.3f} MB, 1.040x in the bucket" in lines[at]
    assert f"sends {7 / 8 * 104 * 64 * 4 / 1e6:.3f} MB" in lines[at]
    assert lines[at + 1].startswith("  each rank: 1 x (13x64) 0.000 GFLOP table")
    assert re.search(r"1 replicated float32.*\n  each rank: 1 x \(64\) 0.000 GFLOP bias", text)


def test_a_plan_on_one_rank_in_words():
    """Nothing is sent; tables keep their shapes."""
    tables = [(name, torch.nn.Parameter(torch.zeros(shape)))
              for name, shape in (("a", (4096, 64)), ("b", (8192, 32)))]
    text = explain(muon.Muon([{"params": layers(16, 2)}, {"params": tables, "rule": "adam"}]))
    for part in ("14 parameters on 1 rank; this is rank 0", "12 owned float32", "8 x (16x16)",
                 "1 x (4096x64) 0.003 GFLOP a", "1 x (8192x32) 0.003 GFLOP b"):
        assert part in text, text
    assert "sends" not in text and "after backward" not in text


def bucket(shape, kind="owned", count=2, world_size=2, cost=4.0):
    slots = [Slot(n, str(n), shape, torch.float32, 0, kind, cost,
                  owner=n % world_size if kind == "owned" else 0)
             for n in range(count)]
    return Bucket(slots, world_size)


def test_exposed_time_by_hand():
    """1 s to start a collective, 64 bytes/s, 2 FLOP/s, 1 s to launch a batch. A segment is its
    matrix of 32 elements and 32 more for its flag: 256 bytes, of which half are sent: 4 s."""
    rates = Rates(latency=1.0, wire=64.0, flops=2.0, launch=1.0)
    one = bucket((4, 8))
    assert one.num_bytes == 512 and muon_plan.wire_bytes(one, 2) == 256
    reduce = gather = 1 + 4
    update = 4 / 2 + 1
    assert exposed_seconds([one], 2, rates) == reduce + update + gather
    # The first bucket was reduced under backward; its gather waits for the wire. The second is
    # updated when reduced, and gathered when the first is.
    two = bucket((4, 8))
    assert exposed_seconds([one, two], 2, rates) == max(
        max(reduce, update) + gather, reduce + update) + gather
    # What all ranks update is not gathered, and an all-reduce sends twice.
    same = bucket((4, 8), kind="replicated")
    assert same.num_bytes == 2 * 128 + 128
    assert exposed_seconds([same], 2, rates) == 1 + 384 / 64 + 8 / 2 + 1
    # FSDP2 reduces and gathers by itself; each rank updates half.
    assert exposed_seconds([bucket((4, 8), kind="dtensor")], 2, rates) == 8 / 2 / 2 + 1


def test_the_table_is_the_page_s(capsys):
    muon_plan.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 14
    page = (ROOT / "bench" / "MUON.md").read_text().splitlines()
    assert [line for line in printed if line not in page] == []


# The sharded tables of 100 and 50 rows do not divide by 8: the last ranks have fewer rows or none.
@pytest.mark.parametrize("world_size, rank", [(1, 0), (2, 1), (8, 0), (8, 6), (8, 7)])
def test_state_takes_the_bytes_that_were_announced(world_size, rank, monkeypatch):
    """The trainer fills a GPU's memory by it before the first step makes any state."""
    monkeypatch.setattr(muon, "SHARD_FROM", 512)
    params = h.mixed_params()
    with one_of(world_size, rank):
        optimizer = h.mixed_optimizer(muon, params)
        announced = optimizer.state_bytes()
        assert not optimizer.state
        for _ in range(2):
            for p in params.values():
                p.grad = torch.ones_like(p)
            optimizer.step()
    kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert announced == kept > 0
