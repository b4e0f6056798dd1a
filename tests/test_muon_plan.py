"""The plan: balance, bytes and layout, against the calculated tables for GPT-2 124M."""

import math

import muon_helpers as h
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import muon
from muon import ALIGNMENT, Slot, make_plan, update_flops

GPT2 = [s for _ in range(12) for s in ((768, 768),) * 4 + ((3072, 768), (768, 3072))]
# ranks: (GFLOP of the slowest, its share of perfect, bytes held over bytes needed), one bucket
TABLE = {
    1: (1631, 1.0, 1.0), 2: (815, 1.0, 1.0), 4: (408, 1.0, 1.0), 8: (204, 1.0, 1.0),
    12: (136, 1.0, 1.0), 16: (109, 0.94, 1.0), 24: (68, 1.0, 1.0), 32: (54, 0.94, 1.11),
    48: (41, 0.83, 1.33), 64: (41, 0.62, 1.78),
}  # fmt: skip


def gpt2_slots():
    group = muon.resolve({}, "muon", {})
    return [
        Slot(n, f"layer{n // 6}.{n % 6}", shape, torch.float32, 0, "owned",
             update_flops(shape, group), order=1 - n / 72)
        for n, shape in enumerate(GPT2)
    ]  # fmt: skip


def loads_of(slots, world_size):
    """FLOP of each rank's updates."""
    return [sum(s.cost for s in slots if s.owner == rank) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", TABLE)
def test_one_bucket_reaches_the_calculated_balance_and_bytes(world_size):
    slowest, share, ratio = TABLE[world_size]
    slots = gpt2_slots()
    (bucket,) = make_plan(slots, world_size, num_buckets=1)
    loads = loads_of(slots, world_size)
    assert round(max(loads) / 1e9) == slowest
    assert sum(loads) / world_size / max(loads) == pytest.approx(share, abs=0.01)
    assert sum(loads) == pytest.approx(1.6308e12, rel=1e-4)
    held = bucket.num_bytes / (4 * sum(math.prod(s) for s in GPT2))
    assert held == pytest.approx(ratio, abs=0.005)
    # no distribution of whole matrices does better: units of 1 (square) and 3 (MLP), 120 in all
    unit = min(slot.cost for slot in slots)
    assert max(loads) / unit == pytest.approx(max(3, math.ceil(120 / world_size)), abs=1e-6)


def test_buckets_weigh_padding_against_overlap():
    """On 8 ranks 3 buckets of GPT-2's matrices pad nothing, 4 pad by 11%: 1 + 1/3 < 1.11 (1 + 1/4).
    On 16 ranks 2 pad by 11%: 1.11 (1 + 1/2) < 1 + 1."""
    full = 4 * sum(math.prod(s) for s in GPT2)
    for count, ratio in ((1, 1.0), (3, 1.0), (4, 1.11), (6, 1.33)):
        plan = make_plan(gpt2_slots(), 8, num_buckets=count)
        assert len(plan) == count
        assert sum(b.num_bytes for b in plan) / full == pytest.approx(ratio, abs=0.01)
    slots = gpt2_slots()
    plan = make_plan(slots, 8)
    loads = loads_of(slots, 8)
    assert len(plan) == 3 and max(loads) == pytest.approx(min(loads))
    # the last layers' matrices, which backward finishes first, are launched first
    layers = [{slot.name.split(".")[0] for slot in bucket.slots} for bucket in plan]
    assert layers[0] == {f"layer{n}" for n in range(8, 12)}
    assert layers[2] == {f"layer{n}" for n in range(4)}
    assert [len(make_plan(gpt2_slots(), W)) for W in (1, 16, 64)] == [1, 2, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 40), st.integers(1, 40),
            st.sampled_from(("owned", "sharded", "replicated")),
            st.booleans(), st.integers(1, 2), st.integers(0, 2),
        ),
        min_size=1, max_size=20,
    ),
    st.integers(1, 9),
)  # fmt: skip
def test_every_tensor_lies_aligned_once_and_nothing_overlaps(described, world_size):
    slots = [
        Slot(n, str(n), (r, c), torch.bfloat16 if low else torch.float32, group, kind, r * c,
             interval, n / 20)
        for n, (r, c, kind, low, interval, group) in enumerate(described)
    ]  # fmt: skip
    seen = []
    for bucket in make_plan(slots, world_size):
        alike = {(s.kind, s.dtype, s.update_interval) for s in bucket.slots}
        assert alike == {(bucket.kind, bucket.dtype, bucket.update_interval)}
        seen += bucket.slots
        size = bucket.dtype.itemsize
        if bucket.rows:  # a table is alone, in equal rows
            (slot,) = bucket.slots
            assert bucket.segment == bucket.rows * slot.shape[1] and bucket.num_flags == 0
            assert 0 <= bucket.rows * world_size - slot.shape[0] < world_size
            assert all(bucket.batches(rank) == [[slot]] for rank in range(world_size))
            continue
        assert bucket.segment * size % ALIGNMENT == 0
        several = bucket.kind == "owned" and world_size > 1
        assert bucket.num_segments == (world_size if bucket.kind != "replicated" else 1)
        for rank in range(world_size):
            mine = [s for s in bucket.slots if s.owner == rank or not several]
            batches = bucket.batches(rank)
            assert sorted(s.index for b in batches for s in b) == sorted(s.index for s in mine)
            assert all(len({(s.group, s.shape) for s in b}) == 1 for b in batches)
            for batch in batches:  # equally far apart: one strided view
                first, stride = batch[0], bucket.padded(math.prod(batch[0].shape))
                for k, slot in enumerate(batch):
                    assert slot.offset == first.offset + k * stride
                    assert slot.flag == first.flag + k
            end = 0
            for slot in sorted(mine, key=lambda s: s.offset):
                assert slot.offset >= end and slot.offset * size % ALIGNMENT == 0
                end = slot.offset + math.prod(slot.shape)
            assert end <= bucket.segment - bucket.num_flags
            assert sorted(s.flag for s in mine) == list(range(len(mine)))
            assert len(mine) <= bucket.num_flags
    assert sorted(slot.index for slot in seen) == list(range(len(slots)))


def test_state_and_flops_follow_the_views():
    group = muon.resolve({"split": 3}, "muon", {})
    one = update_flops((768, 768), {**group, "split": 1})
    assert update_flops((768 * 3, 768), group) == 3 * one
    assert update_flops((768, 768), group | {"split": None}) == 5 * 6 * 768**3
    assert update_flops((10, 4), {"rule": "adam"}) == 400


def test_a_stack_beyond_one_ranks_share_is_cut_and_small_tables_are_replicated():
    optimizer = h.mixed_optimizer(muon, h.mixed_params())
    optimizer.world_size = 4
    slots = {slot.name: slot for bucket in optimizer.plan for slot in bucket.slots}
    kinds = {name: optimizer._kind(slot, slot.cost / 2) for name, slot in slots.items()}
    assert kinds["bank"] == "sharded" and kinds["0.up"] == "owned" and kinds["conv"] == "owned"
    assert optimizer._kind(slots["bank"], 2 * slots["bank"].cost) == "owned"
    assert kinds["table"] == kinds["bias"] == "replicated"
    slots["table"].shape = (50304, 768)
    assert optimizer._kind(slots["table"], 1.0) == "sharded"
