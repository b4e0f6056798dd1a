"""Many ranks on gloo: any number of them trains bit for bit like one, whatever arrives when."""

import random
import time

import muon_helpers as h
import pytest
import torch
import torch.distributed as dist

import muon

pytestmark = pytest.mark.ranks


def shrink():
    muon.SHARD_FROM = 4000  # so that the small tables here are sharded by rows as large ones are


def same_state(a, b):
    return a["param_groups"] == b["param_groups"] and all(
        torch.equal(a["state"][name][key], b["state"][name][key])
        for name in a["state"]
        for key in a["state"][name]
    )


def invariance_and_resharding(rank, _, path):
    shrink()
    groups = {W: dist.new_group(list(range(W))) for W in (1, 2, 3, 4)}
    ways = (
        {"collective": "reduce_scatter"},
        {"collective": "all_reduce", "num_buckets": 2},
        {"collective": "reduce_scatter", "num_buckets": 3, "overlap": False},
    )
    saved, kinds = {}, set()
    for W, group in groups.items():
        for number, settings in enumerate(ways):
            if rank < W:
                params = h.mixed_params()
                optimizer = h.mixed_optimizer(muon, params, process_group=group, **settings)
                kinds |= {bucket.kind for bucket in optimizer.plan}
                h.mixed_train(optimizer, params, range(4), rank, W, arm=number != 1)
                assert h.same_on_all_ranks(params, group), (W, settings)
                state = optimizer.state_dict()
                mine = sum(t.numel() for s in optimizer.state.values() for t in s.values())
                full = sum(t.numel() for s in state["state"].values() for t in s.values())
                if number == 0 and rank == 0:
                    torch.save((h.values(params), state), f"{path}/at{W}")
                    assert mine <= (1 / W + 0.15) * full, (W, mine, full)
                dist.barrier(group)
                first, first_state = torch.load(f"{path}/at1")
                assert h.same(h.values(params), first), (W, settings)
                assert same_state(state, first_state), (W, settings)
        dist.barrier()
    assert kinds == {"owned", "sharded", "replicated"}
    # Saved at any number of ranks, loaded at another: three more steps as if nothing had happened.
    for source, targets in {1: (1, 2, 4), 2: (3,), 3: (1, 4), 4: (1, 2)}.items():
        for W in targets:
            group = groups[W]
            if rank < W:
                values, state = torch.load(f"{path}/at{source}")
                params = h.mixed_params(seed=5)
                optimizer = h.mixed_optimizer(muon, params, process_group=group)
                with torch.no_grad():
                    for p, value in zip(params.values(), values):
                        p.copy_(value)
                optimizer.load_state_dict(state)
                h.mixed_train(optimizer, params, range(4, 7), rank, W)
                saved[W, source] = h.values(params)
        dist.barrier()
    if rank == 0:
        straight = h.mixed_params()
        optimizer = h.mixed_optimizer(muon, straight, process_group=groups[1])
        h.mixed_train(optimizer, straight, range(7))
        for pair, values in saved.items():
            assert h.same(values, h.values(straight)), pair


def test_one_to_four_ranks_train_alike_and_exchange_checkpoints(tmp_path):
    h.run_ranks(4, tmp_path, invariance_and_resharding, str(tmp_path))
    # and like a process that knows no other
    params, threads = h.mixed_params(), torch.get_num_threads()
    torch.set_num_threads(1)
    h.mixed_train(h.mixed_optimizer(muon, params), params, range(4))
    torch.set_num_threads(threads)
    assert h.same(h.values(params), torch.load(tmp_path / "at1")[0])


def eight_and_nodes(rank, world_size):
    shrink()
    one = dist.new_group([0])
    results = []
    nodes = {"node_size": 2, "collective": "all_reduce"}
    for settings in ({}, {"node_size": 4}, nodes, {"node_size": 1}):
        params = h.mixed_params(seed=rank if settings else 0)  # rank 0's values reach all
        optimizer = h.mixed_optimizer(muon, params, **settings)
        assert optimizer.world_size == settings.get("node_size", 8)
        h.mixed_train(optimizer, params, range(3), rank, world_size)
        assert h.same_on_all_ranks(params), settings
        results.append(h.values(params))
    if rank == 0:
        params = h.mixed_params()
        h.mixed_train(h.mixed_optimizer(muon, params, process_group=one), params, range(3))
        for values in results:
            assert h.same(values, h.values(params))


def test_eight_ranks_and_ownership_inside_nodes(tmp_path):
    h.run_ranks(8, tmp_path, eight_and_nodes)


def small(rank, **settings):
    """Two matrices, a table by rows and a vector, in three buckets or more."""
    source = h.generator(3)
    shapes = {"a": (8, 8), "b": (8, 16), "c": (8, 8), "t": (40, 8), "v": (5,)}
    params = {n: torch.nn.Parameter(torch.randn(s, generator=source)) for n, s in shapes.items()}
    groups = [
        {"params": [(n, params[n]) for n in "abc"], "lr": 0.02},
        {"params": [(n, params[n]) for n in "tv"], "rule": "adam", "lr": 0.02},
    ]
    muon.SHARD_FROM = 300
    return params, muon.Muon(groups, reduce="sum", **settings)


def missing_and_broken_gradients(rank, world_size):
    params, optimizer = small(rank, num_buckets=2)
    own = dist.new_group([rank], use_local_synchronization=True)
    twin, reference = small(rank, process_group=own)
    chance = random.Random(7)  # the same on every rank
    for pattern in range(80):
        has = {(r, n): chance.random() < 0.6 for r in range(world_size) for n in params}
        empty = chance.random() < 0.05
        total = {}
        optimizer.zero_grad()
        reference.zero_grad()
        if pattern % 2:
            optimizer.sync_next_backward()
        loss = 0.0
        for n, p in params.items():
            source = h.generator(pattern)
            share = torch.randint(-2, 3, (world_size, *p.shape), generator=source).float()
            givers = [r for r in range(world_size) if has[r, n] and not empty]
            if givers:
                total[n] = share[givers].sum(0)
            if rank in givers:
                loss = loss + (share[rank] * p).sum()
        if not isinstance(loss, float):
            loss.backward()
        for n, p in twin.items():
            p.grad = total.get(n)
        before = {n: p.detach().clone() for n, p in params.items()}
        dist.all_reduce(torch.ones(1))  # somebody else's, while reductions are under way
        optimizer.step()
        reference.step()
        assert h.same(h.values(params), h.values(twin)), pattern
        for n in params.keys() - total.keys():  # inert: not even decayed
            assert torch.equal(params[n], before[n]), (pattern, n)
        assert not optimizer.nonfinite.any()
    # One rank's NaN or inf masks its parameter on all ranks, whole, and nothing else.
    for name, bad in (("b", float("nan")), ("t", float("inf")), ("v", float("nan"))):
        before, state = h.values(params), optimizer.state_dict()["state"]
        optimizer.zero_grad()
        for n, p in params.items():
            p.grad = torch.full_like(p, 2.0 if n == name and rank == 0 else 1.0)
            if n == name and rank == 0:
                p.grad.view(-1)[0] = bad  # the first row only: other shards see finite sums
        optimizer.step()
        after = optimizer.state_dict()["state"]
        seen = optimizer.nonfinite.clone().int()
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        assert seen.tolist() == [int(n == name) for n in params], name
        for n, old, new in zip(params, before, h.values(params)):
            assert torch.equal(old, new) == (n == name), (n, name)
        number = list(params).index(name)
        assert all(torch.equal(state[number][key], t) for key, t in after[number].items())
    assert h.same_on_all_ranks(params)


def test_no_pattern_of_missing_or_broken_gradients_hangs_or_divides_the_ranks(tmp_path):
    h.run_ranks(3, tmp_path, missing_and_broken_gradients)


def stress(rank, world_size, steps):
    params, optimizer = small(rank, num_buckets=2)
    chance, total = random.Random(rank), torch.zeros(1)
    for step in range(steps):
        shares = {n: torch.full_like(p, (step + rank) % 5 - 2.0) for n, p in params.items()}
        optimizer.sync_next_backward()
        names = list(params)
        chance.shuffle(names)  # gradients arrive in another order on each rank
        if step % 50 == rank:
            time.sleep(0.01)  # and late on one
        sum((shares[n] * params[n].square()).sum() for n in names).backward()
        optimizer.step()
        optimizer.zero_grad()
        flat = torch.cat([p.detach().flatten() for p in params.values()])
        ends = torch.stack((flat, -flat))
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        assert torch.equal(ends[0], -ends[1]), step
        total += flat.abs().sum()
    assert total.isfinite() and optimizer.step_count == steps


def test_ranks_stay_identical_whatever_arrives_when(tmp_path):
    h.run_ranks(2, tmp_path, stress, 300)


def late_collectives(rank, world_size):
    """Collectives that write their result only in wait(), as late as a network may."""
    class Late:
        def __init__(self, work, out, value):
            self.work, self.out, self.value = work, out, value

        def wait(self):
            self.work.wait()
            self.out.copy_(self.value)

    def late(function):
        def call(out, source, group=None, async_op=False):
            value = torch.empty_like(out)
            made = Late(function(value, source, group=group, async_op=True), out, value)
            return made if async_op else made.wait()
        return call

    shrink()
    own = dist.new_group([rank], use_local_synchronization=True)
    reference = h.mixed_params()
    h.mixed_train(h.mixed_optimizer(muon, reference, process_group=own), reference, range(3))
    muon._reduce_scatter, muon._all_gather = late(muon._reduce_scatter), late(muon._all_gather)
    params = h.mixed_params()
    optimizer = h.mixed_optimizer(muon, params, num_buckets=3)
    h.mixed_train(optimizer, params, range(3), rank, world_size)
    assert h.same(h.values(params), h.values(reference))


def test_every_collective_is_waited_for(tmp_path):
    h.run_ranks(2, tmp_path, late_collectives)


def order_of_events(rank, _):
    """What is launched when, in a chain of matrices whose last one gets its gradient first."""
    events = []
    params = [torch.nn.Parameter(h.gaussian(16, 16, seed=n) / 4) for n in range(6)]
    for n, p in enumerate(params):  # before the optimizer's own hooks
        p.register_post_accumulate_grad_hook(lambda _, n=n: events.append(("gradient", n)))
    optimizer = muon.Muon([{"params": params}], num_buckets=3, overlap=True)

    def told(what, function):
        def call(*arguments, **options):
            moved = [n for n, live in enumerate(optimizer._live)
                     if any(t is live.buffer for t in arguments)]  # fmt: skip
            events.append((what, *moved))
            return function(*arguments, **options)
        return call

    muon._reduce_scatter = told("reduce", muon._reduce_scatter)
    muon._all_gather = told("gather", muon._all_gather)
    optimizer._update_fn = told("update", optimizer._update_fn)
    for _ in range(2):  # the second step knows the order of the first
        events.clear()
        x = torch.ones(2, 16)
        for p in params:
            x = x @ p
        optimizer.sync_next_backward()
        x.sum().backward()
        events.append("backward ends")
        optimizer.step()
        optimizer.zero_grad()
    assert [e for e in events if e[0] == "gradient"] == [("gradient", n) for n in range(5, -1, -1)]
    for n, live in enumerate(optimizer._live):
        # each bucket leaves with its last gradient, the first ones long before backward ends
        last = max(events.index(("gradient", slot.index)) for slot in live.plan.slots)
        assert events.index(("reduce", n)) == last + 1
        assert events.index(("reduce", n)) < events.index("backward ends")
        # and its new weights are gathered before the next bucket is updated
        assert events[: events.index(("gather", n))].count(("update",)) == n + 1
    assert events.index(("reduce", 0)) < events.index(("gradient", 3))
    assert len(optimizer._live) == 3


def test_reductions_leave_during_backward_and_gathers_between_updates(tmp_path):
    h.run_ranks(2, tmp_path, order_of_events)


def misuse(rank, _):
    shape = (8, 8) if rank else (8, 16)
    with pytest.raises(ValueError, match="ranks disagree"):
        muon.Muon([torch.nn.Parameter(torch.zeros(shape))])
    with pytest.raises(ValueError, match="node_size"):
        muon.Muon([torch.nn.Parameter(torch.zeros(8, 8))], node_size=3)
    params, optimizer = small(rank)
    optimizer.sync_next_backward()
    loss = sum(p.sum() for p in params.values())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"after its reduction was.*sync_next_backward\(\)"):
        loss.backward()
    with pytest.raises(RuntimeError, match="changed after its reduction"):
        optimizer.step()
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.__reduce__()
    # reduce="mean" averages, as DDP does: equal gradients on all ranks act like one rank's
    p = torch.nn.Parameter(torch.ones(4, 4))
    q = torch.nn.Parameter(torch.ones(4, 4))
    averaged = muon.Adam([p], lr=0.1, eps=1.0)
    single = muon.Adam(
        [q], lr=0.1, eps=1.0,
        process_group=dist.new_group([rank], use_local_synchronization=True),
    )  # fmt: skip
    for optimizer in (averaged, single):
        h.step_with(optimizer, [torch.full((4, 4), 0.5)])
    assert torch.equal(p, q)
    # the launch order is learned from the first backward: here the first parameter comes last
    a, b = (torch.nn.Parameter(torch.ones(n, 8)) for n in (400, 500))
    muon.SHARD_FROM = 300
    optimizer = muon.Adam([("a", a), ("b", b)])
    optimizer.sync_next_backward()
    (a.sum() + (b * a[0]).sum() * 0 + b.sum()).backward()
    arrived = sorted(optimizer._live, key=lambda live: live.arrived)
    optimizer.step()
    assert optimizer._live == arrived and optimizer._learned


def test_misuse_is_an_error_on_every_rank_and_mean_is_a_mean(tmp_path):
    h.run_ranks(2, tmp_path, misuse)
