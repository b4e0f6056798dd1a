"""The plan: balance, bytes and layout, against the calculated tables for GPT-2 124M."""

import math

import muon_helpers as h
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import muon
from muon import ALIGNMENT, Item, make_plan, update_flops

GPT2 = [s for _ in range(12) for s in ((768, 768),) * 4 + ((3072, 768), (768, 3072))]
# ranks: (GFLOP of the slowest, its share of perfect, bytes held over bytes needed), one bucket
TABLE = {
    1: (1631, 1.0, 1.0), 2: (815, 1.0, 1.0), 4: (408, 1.0, 1.0), 8: (204, 1.0, 1.0),
    12: (136, 1.0, 1.0), 16: (109, 0.94, 1.0), 24: (68, 1.0, 1.0), 32: (54, 0.94, 1.11),
    48: (41, 0.83, 1.33), 64: (41, 0.62, 1.78),
}  # fmt: skip


def gpt2_items(kind="whole"):
    group = muon.resolve({}, "muon", {})
    return [
        Item(n, f"layer{n // 6}.{n % 6}", s, 0, kind, update_flops(s, group), order=1 - n / 72)
        for n, s in enumerate(GPT2)
    ]


@pytest.mark.parametrize("world_size", TABLE)
def test_one_bucket_reaches_the_calculated_balance_and_bytes(world_size):
    slowest, share, ratio = TABLE[world_size]
    plan = make_plan(gpt2_items(), world_size, num_buckets=1)
    loads = plan.loads()
    assert len(plan.buckets) == 1 and round(max(loads) / 1e9) == slowest
    assert sum(loads) / world_size / max(loads) == pytest.approx(share, abs=0.01)
    assert sum(loads) == pytest.approx(1.6308e12, rel=1e-4)
    held = plan.buckets[0].num_bytes(world_size) / (4 * sum(math.prod(s) for s in GPT2))
    assert held == pytest.approx(ratio, abs=0.005)
    # no distribution of whole matrices does better: units of 1 (square) and 3 (MLP), 120 in all
    unit = min(i.cost for i in gpt2_items())
    assert max(loads) / unit == pytest.approx(max(3, math.ceil(120 / world_size)), abs=1e-6)


def test_buckets_weigh_padding_against_overlap():
    plan = make_plan(gpt2_items(), 8)
    ratios = {count: ratio for count, ratio, _, _ in plan.tried}
    assert ratios[1] == pytest.approx(1, abs=1e-4) == ratios[3]
    assert ratios[4] == pytest.approx(1.11, abs=0.01) and ratios[6] == pytest.approx(1.33, abs=0.01)
    assert len(plan.buckets) == 3 and [t[0] for t in plan.tried if t[3]] == [3]
    assert max(plan.loads()) == pytest.approx(min(plan.loads()))
    # the last layers' matrices, which backward finishes first, are launched first
    layers = [{item.name.split(".")[0] for item in bucket.items} for bucket in plan.buckets]
    assert layers[0] == {f"layer{n}" for n in range(8, 12)}
    assert layers[2] == {f"layer{n}" for n in range(4)}


def test_the_plan_says_what_it_tried():
    params = [(f"w{n}", torch.nn.Parameter(torch.zeros(8, 8))) for n in range(4)]
    optimizer = muon.Muon(params)
    optimizer.plan = make_plan(gpt2_items(), 8)
    optimizer.world_size = 8
    text = optimizer.explain()
    assert "3 buckets: 1.000x bytes" in text and "chosen" in text
    assert "balance 100.0%" in text and "rank 7" in text and "6 buckets: 1.333x" in text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 40), st.integers(1, 40), st.sampled_from(("whole", "rows", "copy")),
            st.booleans(), st.integers(1, 2), st.integers(0, 2),
        ),
        min_size=1, max_size=20,
    ),
    st.integers(1, 9),
)  # fmt: skip
def test_every_tensor_lies_aligned_once_and_nothing_overlaps(described, world_size):
    items = [
        Item(n, str(n), (r, c), group, kind if world_size > 1 else "copy", r * c,
             torch.bfloat16 if low else torch.float32, every, n / 20)
        for n, (r, c, kind, low, every, group) in enumerate(described)
    ]  # fmt: skip
    plan = make_plan(items, world_size)
    seen = []
    for bucket in plan.buckets:
        assert {(i.dtype, i.every) for i in bucket.items} == {(bucket.dtype, bucket.every)}
        seen += bucket.items
        size = bucket.dtype.itemsize
        assert bucket.segment * size % ALIGNMENT == 0
        for runs in bucket.runs:
            end, flags = 0, []
            for run in runs:
                for k, item in enumerate(run.items):
                    start = run.offset + k * run.stride
                    assert start >= end and start * size % ALIGNMENT == 0
                    end = start + item.numel
                    flags.append(run.flag + k)
                    assert item.local_shape == run.items[0].local_shape
            assert flags == list(range(len(flags)))
            spare = 0 if bucket.kind == "rows" else bucket.num_flags
            assert end <= bucket.segment - spare and len(flags) <= bucket.num_flags
        if bucket.kind == "rows":
            rows = bucket.items[0].local_shape[0]
            assert rows * world_size >= bucket.items[0].shape[0]
    assert sorted(item.index for item in seen) == list(range(len(items)))


def test_state_and_flops_follow_the_views():
    group = muon.resolve({"split": 3}, "muon", {})
    one = update_flops((768, 768), {**group, "split": 1})
    assert update_flops((768 * 3, 768), group) == 3 * one
    assert update_flops((768, 768), group | {"split": None}) == 5 * 6 * 768**3
    assert update_flops((10, 4), {"rule": "adam"}) == 400


def test_a_stack_beyond_one_ranks_share_is_cut_and_small_tables_are_copied():
    params = h.mixed_params()
    optimizer = h.mixed_optimizer(muon, params)
    optimizer.world_size = 4
    kinds, number = {}, list(h.GROUPS).index
    for name, shape, _, key in h.MIXED:
        item = Item(0, name, shape, number(key), "", 1.0)
        kinds[name] = optimizer._kind(item, fair=0.5)
    assert kinds["bank"] == "rows" and kinds["0.up"] == "whole" and kinds["conv"] == "whole"
    assert kinds["table"] == kinds["bias"] == "copy"
    large = Item(0, "table", (50304, 768), 0, "", 1.0)
    assert optimizer._kind(large, 1.0) == "rows"
