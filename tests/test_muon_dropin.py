"""Muon and Adam in place of torch.optim's, in loops, wrappers and checkpoints that know only those.

The oracle is torch.optim.AdamW or torch.optim.Muon, taken through the same code side by side.
"""

import copy
import functools
import gc
import inspect
import math
import pickle
import time

import muon_helpers as h
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    parameters_to_vector,
    vector_to_parameters,
)
from torch.optim import lr_scheduler

import muon
from muon import Adam, Muon

# Ours, torch's, and how far weights may drift apart at lr 0.05. torch.optim.Muon computes in bf16,
# whose rounding the cubic polynomial amplifies least.
CUBIC = {"ns_coefficients": muon.CUBIC}
PAIRS = {
    "adam": (Adam, torch.optim.AdamW, 1e-6),
    "muon": (functools.partial(Muon, **CUBIC), functools.partial(torch.optim.Muon, **CUBIC), 1e-3),
}
side_by_side = pytest.mark.parametrize("rule", PAIRS)


def network(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    layers = nn.Linear(8, 8, bias=bias), nn.Tanh(), nn.Linear(8, 8, bias=bias)
    return nn.Sequential(*layers).to(dtype)


def loss_of(model, step=0):
    x = h.gaussian(4, 8, seed=step).to(next(model.parameters()).dtype)
    return (model(x) - x.flip(1)).square().sum()


def made(kind, params, **options):
    return kind(params, **{"lr": 0.05, "weight_decay": 0.1, **options})


def alike(rule, scenario, **options):
    """scenario(model, optimizer) ends with the same weights for both; returns our optimizer."""
    ours, theirs, slack = PAIRS[rule]
    ends, optimizers = [], []
    for kind in (ours, theirs):
        model = network()
        optimizers.append(made(kind, model.parameters(), **options))
        scenario(model, optimizers[-1])
        ends.append(parameters_to_vector(model.parameters()).detach().double())
    assert (ends[0] - ends[1]).abs().max() < slack
    return optimizers[0]


def train(model, optimizer, steps=range(3)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def options_of(optimizer):
    return [{key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups]  # fmt: skip


def states_of(optimizer):
    """All state tensors, in the order of the parameters."""
    return [optimizer.state[p][key] for group in optimizer.param_groups for p in group["params"]
            for key in sorted(optimizer.state.get(p, ()))]  # fmt: skip


# ----------------------------------------------------------------- parameters stay the caller's


@side_by_side
def test_parameters_keep_their_own_memory(rule):
    """safetensors leaves out tensors that share memory: checkpoints lost weights (accelerate)."""
    model = network(bias=rule == "adam")
    before = [p.data_ptr() for p in model.parameters()]
    optimizer = made(PAIRS[rule][0], model.parameters())
    train(model, optimizer)
    assert [p.data_ptr() for p in model.parameters()] == before
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in model.parameters())


def data_cloned(model, optimizer):
    for step in range(3):
        for p in model.parameters():
            p.data = p.data.clone()
        train(model, optimizer, [step])


def vector_written(model, optimizer):
    for step in range(3):
        vector_to_parameters(0.9 * parameters_to_vector(model.parameters()), model.parameters())
        train(model, optimizer, [step])


def weights_loaded_by_assignment(model, optimizer):
    train(model, optimizer, [0])
    with torch.no_grad():
        for p in model.parameters():
            p.set_((0.5 * p).clone())
    train(model, optimizer, [1, 2])


def converted_before(model, optimizer):
    model.double()
    train(model, optimizer)
    assert model[0].weight.dtype == torch.float64


def parameters_replaced_in_groups(model, optimizer):
    """As accelerate does after it has sharded or moved a model."""
    train(model, optimizer, [0])
    model[0].weight = nn.Parameter(0.5 * model[0].weight.detach())
    optimizer.param_groups[0]["params"][0] = model[0].weight
    train(model, optimizer, [1, 2])
    model[2].weight = nn.Parameter(0.5 * model[2].weight.detach())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, [3, 4])
    assert all(optimizer.state[p] for p in model.parameters())


def sharpness_aware(model, optimizer):
    """SAM: the gradient at a perturbed point moves the weights from where they were."""
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        before = [p.data for p in model.parameters()]
        for p in model.parameters():
            p.data = p.data + 0.1 * p.grad / p.grad.norm()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for p, data in zip(model.parameters(), before):
            p.data = data
        optimizer.step()


def gradients_swapped(model, optimizer):
    a, b = model.parameters()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        a.grad, b.grad = b.grad, a.grad
        optimizer.step()


def gradients_through_data(model, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for p in model.parameters():
            p.grad.data = p.grad.data.clamp(-0.1, 0.1)
        model[0].weight.grad.data.copy_(torch.ones(8, 8))
        optimizer.step()


def zeroed_in_place(model, optimizer):
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, step).backward()
        optimizer.step()
        assert all(p.grad.requires_grad is False for p in model.parameters())


def frozen_and_thawed(model, optimizer):
    first = model[0].weight
    for step in range(6):
        first.requires_grad_(step not in (2, 3))
        before = first.detach().clone()
        train(model, optimizer, [step])
        assert torch.equal(first, before) == (step in (2, 3))


def frozen_from_the_start_and_clipped(model, optimizer):
    """clip_grad_norm_ once gave frozen weights a gradient of zeros, and so weight decay."""
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def clipped_by_norm(model, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        assert clip_grad_norm_(model.parameters(), 0.5) > 1
        optimizer.step()


def clipped_by_value(model, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        clip_grad_value_(model.parameters(), 0.05)
        optimizer.step()


def scaled(model, optimizer, enabled=True):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if enabled and step == 1:
            model[0].weight.grad[0, 0] = math.inf  # the scaler skips this step
        scaler.step(optimizer)
        scaler.update()


def accumulated_in_backward(model, optimizer):
    """The optimizer runs in a hook of the last gradient, and drops it."""
    def stepped(_):
        optimizer.step()
        optimizer.zero_grad()

    for step in range(3):
        handle = model[0].weight.register_post_accumulate_grad_hook(stepped)
        loss_of(model, step).backward()
        handle.remove()
        assert all(p.grad is None for p in model.parameters())


SCENARIOS = (
    data_cloned, vector_written, weights_loaded_by_assignment, converted_before,
    parameters_replaced_in_groups, sharpness_aware, gradients_swapped, gradients_through_data,
    zeroed_in_place, frozen_and_thawed, frozen_from_the_start_and_clipped, clipped_by_norm,
    clipped_by_value, scaled, functools.partial(scaled, enabled=False), accumulated_in_backward,
)  # fmt: skip


@side_by_side
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: getattr(s, "__name__", "unscaled"))
def test_whatever_a_loop_does_to_parameters_and_gradients(rule, scenario):
    alike(rule, scenario)


@side_by_side
def test_a_model_converted_after_steps_goes_on_or_fails_as_with_torch(rule):
    for kind in PAIRS[rule][:2]:
        model = network()
        optimizer = made(kind, model.parameters())
        train(model, optimizer)
        model.double()
        with pytest.raises(RuntimeError, match="dtype"):  # fp32 state
            train(model, optimizer)
    model, reference = network(), network()
    optimizer, other = (made(PAIRS[rule][0], m.parameters()) for m in (model, reference))
    train(model, optimizer)
    train(reference, other)
    model.bfloat16()
    for step in range(3, 6):
        train(model, optimizer, [step])
        for p, q in zip(model.parameters(), reference.parameters()):
            q.grad = p.grad.float()
        other.step()
    for p, q in zip(model.parameters(), reference.parameters()):  # one rounding, at conversion
        assert p.dtype == torch.bfloat16 and (p - q).abs().max() < 2**-8 * q.abs().max() * 2


@side_by_side
def test_gradients_that_are_held_survive_the_next_step(rule):
    held = []

    def hold(model, optimizer):
        for step in range(3):
            train(model, optimizer, [step])
            held.append([p.grad for p in model.parameters()])

    alike(rule, hold)
    for ours, theirs in zip(held[:3], held[3:]):
        assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(ours, theirs))
    assert min((a - b).abs().max() for a, b in zip(held[0], held[2])) > 0.3  # they did change


@side_by_side
def test_a_backward_after_step_finds_its_weights_changed(rule):
    for kind in PAIRS[rule][:2]:
        model = network()
        optimizer, loss = made(kind, model.parameters()), loss_of(model)
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_group_added_between_backward_and_step_gives_no_gradient_to_others():
    ends = []
    for kind in (Adam, torch.optim.AdamW):
        used, unused, new = (nn.Parameter(torch.ones(4)) for _ in range(3))
        optimizer = made(kind, [used, unused])
        (used.sum() + unused.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        used.sum().backward()
        optimizer.add_param_group({"params": [new]})
        optimizer.step()
        ends.append((used, unused, new))
    assert all(torch.allclose(a, b) for a, b in zip(*ends)) and ends[0][2].eq(1).all()


class Ours(Muon):
    """A class of a user, with arguments of its own."""

    def __init__(self, model, rate):
        super().__init__(model.parameters(), lr=rate)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_has_the_class_and_the_defaults_of_its_original(copied):
    for optimizer in (Ours(network(), 0.07), Adam(network().parameters(), lr=0.07),
                      torch.optim.AdamW(network().parameters(), lr=0.07)):  # fmt: skip
        other = copied(optimizer)
        assert type(other) is type(optimizer) and other.defaults == optimizer.defaults
        other.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4))]})
        assert other.param_groups[1]["lr"] == 0.07 and len(optimizer.param_groups) == 1


def test_nothing_to_train_is_no_error():
    for kind in (Adam, torch.optim.AdamW, Muon, torch.optim.Muon):
        p = nn.Parameter(torch.zeros(0, 4))
        optimizer = kind([p])
        p.grad = torch.zeros(0, 4)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        empty = kind([{"params": []}])
        empty.step()
        empty.zero_grad()
        assert empty.state_dict()["state"] == {}
        with pytest.raises(ValueError, match="empty parameter list"):
            kind([])


# ----------------------------------------------------------------------------------- schedulers

SCHEDULES = {
    "LambdaLR": {"lr_lambda": lambda step: 1 / (1 + step)},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {"total_iters": 3},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 4},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "ReduceLROnPlateau": {"patience": 0},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 8},
    "SWALR": {"swa_lr": 0.01},
    "SequentialLR": None,
    "ChainedScheduler": None,
}


def schedule(name, optimizer, **more):
    if SCHEDULES[name] is None:
        parts = [schedule(part, optimizer) for part in ("ConstantLR", "ExponentialLR")]
        if name == "SequentialLR":
            return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
        return lr_scheduler.ChainedScheduler(parts, optimizer)
    where = torch.optim.swa_utils if name == "SWALR" else lr_scheduler
    return getattr(where, name)(optimizer, **SCHEDULES[name], **more)


def test_no_scheduler_of_torch_is_forgotten():
    found = {name for name, kind in vars(lr_scheduler).items() if inspect.isclass(kind)
             and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")}
    assert found - {"LRScheduler"} <= SCHEDULES.keys()


@side_by_side
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_set_what_they_set_in_torch(name, rule):
    def scheduled(model, optimizer):
        scheduler = schedule(name, optimizer)
        for step in range(6):
            train(model, optimizer, [step])
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
        groups.append({key: value for key, value in optimizer.param_groups[0].items()
                       if isinstance(value, (int, float, tuple))})

    groups = []
    optimizer = alike(rule, scheduled)
    moved = ("lr", "initial_lr", "momentum", "betas", "max_lr", "min_lr", "max_momentum")
    for key in moved & groups[1].keys():
        assert groups[0][key] == pytest.approx(groups[1][key]), key
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert options_of(copied) == options_of(optimizer)
        assert h.same(states_of(copied), states_of(optimizer))


@side_by_side
@pytest.mark.parametrize("name", ["StepLR", "LambdaLR", "CyclicLR", "OneCycleLR"])
def test_schedules_resume_at_a_step(name, rule):
    """last_epoch needs the initial_lr that the group had when it was saved."""
    rates = []
    for kind in PAIRS[rule][:2]:
        optimizer, again = (made(kind, network().parameters()) for _ in range(2))
        scheduler = schedule(name, optimizer)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        scheduler = schedule(name, again, last_epoch=3)
        for _ in range(3):
            again.step()
            scheduler.step()
            rates.append(again.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx(rates[3:]) and len(set(rates)) > 1


def test_momentum_cycles_in_a_mixed_optimizer():
    """The scheduler writes "momentum" into the groups of both rules; a copy takes both."""
    a, b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = Muon([{"params": [a]}, {"params": [b], "rule": "adam", "betas": (0.8, 0.9)}])
    scheduler = lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=4)
    seen = []
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        seen.append((optimizer.param_groups[0]["momentum"], optimizer.param_groups[1]["betas"]))
    assert len({momentum for momentum, _ in seen}) == 3 and {b for _, b in seen} == {(0.8, 0.9)}
    assert options_of(copy.deepcopy(optimizer)) == options_of(optimizer)


# ------------------------------------------------------------------------------------ checkpoints


def test_hooks_see_and_change_state_dicts():
    seen = []
    for kind in (Adam, torch.optim.AdamW):
        model, told = network(), []
        optimizer = made(kind, model.parameters())
        train(model, optimizer)
        optimizer.register_state_dict_pre_hook(lambda o, told=told: told.append("saving"))
        optimizer.register_state_dict_post_hook(
            lambda o, made, told=told: told.append(sorted(made["state"])) or {**made, "mine": 1})
        optimizer.register_load_state_dict_pre_hook(
            lambda o, given, told=told: told.append(given["mine"]) or {
                **given, "param_groups": [{**given["param_groups"][0], "lr": 0.125}]})
        optimizer.register_load_state_dict_post_hook(
            lambda o, told=told: told.append((o.param_groups[0]["lr"], len(o.state))))
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        assert state["mine"] == 1 and state["param_groups"][0]["lr"] == 0.05
        train(model, optimizer, [0])
        seen.append(told)
    assert seen[0] == seen[1] == ["saving", [0, 1], 1, (0.125, 2)]


@side_by_side
def test_state_dicts_look_like_torchs(rule):
    for names in (False, True):
        states = []
        for kind in PAIRS[rule][:2]:
            model = network()
            optimizer = made(kind, model.named_parameters() if names else model.parameters())
            train(model, optimizer)
            states.append(optimizer.state_dict())
        ours, theirs = states
        assert ours.keys() == theirs.keys() and ours["state"].keys() == theirs["state"].keys()
        for mine, other in zip(ours["state"].values(), theirs["state"].values()):
            shapes = ({k: (t.shape, t.dtype) for k, t in s.items()} for s in (mine, other))
            assert next(shapes) == next(shapes)
        group, other = (s["param_groups"][0] for s in (ours, theirs))
        assert group["params"] == other["params"] == [0, 1]
        assert group.get("param_names") == other.get("param_names")
        assert ("param_names" in group) == names


@side_by_side
@pytest.mark.parametrize("source", ["ours", "theirs"])
@pytest.mark.parametrize("names", [(False, True), (True, False), (True, True)])
def test_checkpoints_load_by_position_with_names_or_without(rule, source, names):
    kind = PAIRS[rule][source == "theirs"]
    model, twin = network(), network()
    optimizer = made(kind, model.named_parameters() if names[0] else model.parameters())
    again = [(f"module.{n}", p) for n, p in twin.named_parameters()]
    other = made(PAIRS[rule][0], again if names[1] else twin.parameters(), lr=9.0)
    train(model, optimizer)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, range(3, 6))
    slack = PAIRS[rule][2] * (source == "theirs")
    for p, q in zip(model.parameters(), twin.parameters()):
        assert (p - q).abs().max() <= slack
    reference = made(PAIRS[rule][1], again if names[1] else twin.parameters())
    reference.load_state_dict(optimizer.state_dict())
    groups = (o.param_groups[0].get("param_names") for o in (other, reference))
    assert next(groups) == next(groups)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.Muon])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_checkpoints_load_before_and_after_their_first_step(kind, steps, dtype):
    """State from fp32 weights stays fp32 beside bf16 weights; their master is made from them."""
    model, twin = network(), network(dtype)
    theirs = made(kind, model.parameters())
    train(model, theirs, range(steps))
    ours = (Muon if kind is torch.optim.Muon else Adam)(twin.parameters())
    given, before = theirs.state_dict(), str(theirs.state_dict())
    ours.load_state_dict(given)
    assert str(given) == before
    group, other = ours.param_groups[0], theirs.param_groups[0]
    assert all(group[key] == other[key] for key in ("lr", "weight_decay"))
    assert group["decay"] == ("l2" if kind is torch.optim.Adam else "lr")
    for p, q in zip(twin.parameters(), model.parameters()):
        assert ours.state[p].keys() - {"master"} == theirs.state[q].keys()
        for key, t in theirs.state[q].items():
            assert ours.state[p][key].dtype == torch.float32 and torch.equal(ours.state[p][key], t)
    before = parameters_to_vector(twin.parameters()).detach().clone()
    train(twin, ours, range(2))
    assert all(ours.state[p][key].dtype == torch.float32 for p in twin.parameters()
               for key in ours.state[p])  # fmt: skip
    assert not torch.equal(before, parameters_to_vector(twin.parameters()))


@side_by_side
def test_nothing_is_shared_between_two_optimizers(rule):
    kind = PAIRS[rule][0]
    model, twin = network(), network()
    a = made(kind, model.parameters(), lr=torch.tensor(0.05))
    b = made(kind, twin.parameters(), lr=torch.tensor(0.05))
    train(model, a)
    state = a.state_dict()
    b.load_state_dict(state)
    b.param_groups[0]["lr"].mul_(0.5)
    assert a.param_groups[0]["lr"] == 0.05
    memory = [{t.data_ptr() for t in tensors} for tensors in (
        states_of(a), states_of(b), [t for s in state["state"].values() for t in s.values()])]
    assert len(set.union(*memory)) == 3 * len(memory[0])
    kept = [t.clone() for t in states_of(b)]
    train(model, a)
    assert h.same(states_of(b), kept)


# ------------------------------------------------------------------ state changed from outside


def replaced_as_new_dicts(model, optimizer):
    train(model, optimizer)
    for p in model.parameters():
        optimizer.state[p] = {key: 0.5 * t for key, t in optimizer.state[p].items()}
    train(model, optimizer)


def replaced_as_new_tensors(model, optimizer):
    train(model, optimizer)
    for state in optimizer.state.values():
        for key in state:
            state[key] = state[key].to("cpu", copy=True)
    train(model, optimizer)


def changed_in_place(model, optimizer):
    train(model, optimizer)
    for state in optimizer.state.values():
        for t in state.values():
            t.zero_()
    train(model, optimizer)


def cleared(model, optimizer):
    train(model, optimizer)
    optimizer.state.clear()
    train(model, optimizer)


def dropped_for_one_parameter(model, optimizer):
    train(model, optimizer)
    del optimizer.state[model[0].weight]
    train(model, optimizer)


def written_through_a_state_dict(model, optimizer):
    train(model, optimizer)
    state = optimizer.state_dict()
    state["state"].pop(1)
    optimizer.load_state_dict(state)
    train(model, optimizer)


@side_by_side
@pytest.mark.parametrize("scenario", [
    replaced_as_new_dicts, replaced_as_new_tensors, changed_in_place, cleared,
    dropped_for_one_parameter, written_through_a_state_dict,
])  # fmt: skip
def test_state_belongs_to_the_caller_too(rule, scenario):
    optimizer = alike(rule, scenario)
    key = "momentum_buffer" if rule == "muon" else "exp_avg"
    for p in optimizer.param_groups[0]["params"]:
        assert optimizer.state[p][key].abs().max() > 0


# ----------------------------------------------------------------------------------------- groups


def test_unknown_keys_of_groups_are_kept_and_near_misses_refused():
    p, q = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    for kind in (Muon, Adam, torch.optim.AdamW):
        optimizer = kind([{"params": [p], "lr_scale": 0.5, "name": "hidden", "max_lr": 0.1}])
        optimizer.add_param_group({"params": [q], "my_tag": [1, 2]})
        first, second = optimizer.param_groups
        assert (first["lr_scale"], first["name"], first["max_lr"]) == (0.5, "hidden", 0.1)
        assert second["my_tag"] == [1, 2] and second["lr"] == 1e-3
        again = optimizer.state_dict()["param_groups"]
        assert again[0]["lr_scale"] == 0.5 and again[1]["my_tag"] == [1, 2]
    for slip, meant in (("weight_deacy", "weight_decay"), ("nestrov", "nesterov"),
                        ("ns_step", "ns_steps"), ("splits", "split"), ("beta", "betas")):
        kind = Adam if meant == "betas" else Muon
        with pytest.raises(ValueError, match=f"{slip!r}.*did you mean {meant!r}"):
            kind([{"params": [p], slip: 1}])
    with pytest.raises(ValueError, match="unknown option 'lr_scale'"):
        Muon([p], lr_scale=0.5)  # a keyword of the class is ours alone
    for key in ("use_muon", "algorithm"):
        with pytest.raises(ValueError, match=r'"rule": "muon"'):
            Muon([{"params": [p], key: True}])


@pytest.mark.parametrize("options, message", [
    ({"amsgrad": True}, "amsgrad"), ({"maximize": True}, "maximize"),
    ({"betas": (0.9,)}, "betas"), ({"betas": (0.9, 1.0)}, "betas"), ({"betas": 0.9}, "betas"),
    ({"betas": (-0.1, 0.9)}, "betas"), ({"betas": (0.9, torch.tensor(1.5))}, "betas"),
    ({"lr": -1.0}, "lr"), ({"lr": "0.1"}, "lr"), ({"lr": None}, "lr"),
    ({"lr": torch.tensor(-0.1)}, "lr"), ({"lr": torch.tensor([0.1, 0.2])}, "lr"),
    ({"lr": math.nan}, "lr"), ({"eps": -1e-8}, "eps"), ({"weight_decay": -0.1}, "weight_decay"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["class", "group", "add"])
def test_values_out_of_range_are_refused_everywhere(options, message, where):
    p = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=message):
        if where == "class":
            Adam([p], **options)
        elif where == "group":
            Adam([{"params": [p], **options}])
        else:
            Adam([nn.Parameter(torch.zeros(2))]).add_param_group({"params": [p], **options})


@pytest.mark.parametrize("options", [
    {"ns_steps": 0}, {"ns_steps": 100}, {"ns_steps": 2.5}, {"split": 0}, {"split": 1.5},
    {"split": 3}, {"split_axis": 2}, {"momentum": -0.1}, {"beta2": -1.0},
    {"ns_coefficients": (1.0, 2.0)}, {"method": "newton"},
])  # fmt: skip
def test_values_out_of_range_are_refused_for_muon(options):
    for params in ([nn.Parameter(torch.zeros(4, 4))], [{"params": nn.Parameter(torch.zeros(4, 4)),
                                                       **options}]):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            Muon(params, **(options if isinstance(params[0], nn.Parameter) else {}))


def test_rates_may_be_tensors_of_one_element():
    ends = []
    for make in (float, torch.tensor, lambda rate: torch.tensor([rate])):
        for kind in (Muon, Adam):
            model, lr = network(), make(0.05)
            optimizer = made(kind, model.parameters(), lr=lr)
            train(model, optimizer)
            if isinstance(lr, torch.Tensor):
                optimizer.param_groups[0]["lr"].mul_(0.5)  # in place, as schedulers do
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
            train(model, optimizer)
            ends.append(parameters_to_vector(model.parameters()).detach())
    for n in (2, 3, 4, 5):
        assert torch.allclose(ends[n], ends[n % 2], atol=1e-6)


def test_twenty_thousand_parameters_take_ten_times_as_long_as_two_thousand():
    seconds = {}
    for count in (2_000, 20_000):
        params = [nn.Parameter(torch.zeros(4, 4)) for _ in range(count)]
        for _ in range(3):
            gc.collect()
            start = time.process_time()
            Muon(params)
            took = time.process_time() - start
            seconds[count] = min(took, seconds.get(count, math.inf))
    print(f"construction: {seconds}")
    assert seconds[20_000] < 20 * seconds[2_000]  # quadratic: 100


# -------------------------------------------------------------------------------------- precision


@side_by_side
def test_a_step_inside_autocast_is_the_step_outside(rule):
    """bf16 products made the Gram form of 4:1 matrices explode: updates of 1e4."""
    ends = []
    for inside in (False, True):
        p = nn.Parameter(h.gaussian(64, 256, seed=1))
        optimizer = made(Muon if rule == "muon" else Adam, [p])
        for step in range(3):
            p.grad = h.low_rank(8, 64, 256, seed=step)[0]
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends) and ends[0].abs().max() < 6


DEEPSEEK = (muon.JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2


@pytest.mark.parametrize("options", [
    {"method": "jordan", "steps": 10}, {"steps": 12}, {"method": "cubic", "steps": 25},
    {"steps": 10, "ns_coefficients": DEEPSEEK}, {"method": "jordan", "steps": 5}, {"steps": 5},
], ids=str)  # fmt: skip
def test_long_iterations_of_wide_matrices_stay_bounded(options):
    """The gradient of 8 tokens, 4:1: by the Gram matrix alone 10 steps ended at 1e9 and more."""
    G, *spaces = h.low_rank(8, 128, 512)
    X = muon.orthogonalize(G, **options)
    assert torch.linalg.matrix_norm(X, 2) <= 1.2
    assert torch.linalg.svdvals(X)[7] > 0.65 and h.noise_energy(X, *spaces) < 1e-3


# ------------------------------------------------------------------------------------ many ranks


def kinds_of_parameters():
    """Every way in which weights reach the other ranks of two, with few elements."""
    muon.SHARD_FROM = 64
    shapes = {"a": (8, 8), "b": (8, 8), "even": (16, 8), "odd": (17, 8), "single": (1, 80),
              "bias": (5,)}  # fmt: skip
    params = {name: nn.Parameter(h.gaussian(*shape, seed=n))
              for n, (name, shape) in enumerate(shapes.items())}  # fmt: skip
    groups = [{"params": [(n, params[n]) for n in "ab"]},
              {"params": [(n, p) for n, p in params.items() if n not in "ab"], "rule": "adam"}]
    optimizer = Muon(groups, lr=0.05)
    kinds = {slot.name: b.kind for b in optimizer.plan for slot in b.slots}
    assert kinds == {"a": "owned", "b": "owned", "even": "sharded", "odd": "sharded",
                     "single": "sharded", "bias": "replicated"}  # fmt: skip
    return params, optimizer


def memory_gradients_and_versions(rank, _):
    params, optimizer = kinds_of_parameters()
    for overlap in (False, True):
        losses = {name: (p * p).sum() * (rank + 1) for name, p in params.items()}
        own = {name: 2 * (rank + 1) * p.detach() for name, p in params.items()}
        if overlap:
            optimizer.arm()  # the old name
        sum(losses.values()).backward(retain_graph=True)
        held = {name: p.grad for name, p in params.items()}
        before = h.values(params)
        optimizer.step()
        for name, p in params.items():  # what arrived from other ranks counts as a change
            assert p.grad is held[name] and torch.allclose(p.grad, own[name]), name
            assert p.untyped_storage().nbytes() == 4 * p.numel(), name
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                losses[name].backward()
        assert not any(torch.equal(old, new) for old, new in zip(before, h.values(params)))
        optimizer.zero_grad()
        assert all(torch.equal(g, own[name]) for name, g in held.items())
        for p in params.values():
            p.data = p.data.clone()
        assert h.same_on_all_ranks(params)


@pytest.mark.ranks
def test_ranks_leave_memory_and_gradients_to_the_caller_and_count_versions(tmp_path):
    h.run_ranks(2, tmp_path, memory_gradients_and_versions)


def grouped(kind, model, names=True, **options):
    """One optimizer for matrices by Muon and vectors by Adam; with kind Adam, all by that."""
    matrices, vectors = ([(name, p) if names else p for name, p in model.named_parameters()
                          if (p.ndim == 2) == wanted] for wanted in (True, False))  # fmt: skip
    if kind is Adam:
        return Adam(matrices + vectors, lr=0.05, weight_decay=0.1, **options)
    groups = [{"params": matrices, "lr": 0.05}, {"params": vectors, "rule": "adam", "lr": 0.05}]
    return Muon(groups, **options)


def rows_of(step, rank=0, world_size=1):
    x = h.gaussian(8, 8, seed=step).double()
    return x[rank * 8 // world_size : (rank + 1) * 8 // world_size]


def train_rows(model, optimizer, steps, rank=0, world_size=1):
    for step in steps:
        model(rows_of(step, rank, world_size)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_alone(kind, steps, rank):
    """The network after these steps of one process with all rows."""
    own = dist.new_group([rank], use_local_synchronization=True)
    model = network(torch.float64, bias=True)
    train_rows(model, grouped(kind, model, process_group=own), steps)
    return parameters_to_vector(model.parameters())


def data_parallel(rank, world_size):
    for kind, views in ((Muon, False), (Muon, True), (Adam, True)):
        want = trained_alone(kind, range(4), rank)
        for settings in ({"reduce": "none"}, {}):
            model = network(torch.float64, bias=True)
            wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
            optimizer = grouped(kind, model, **settings)
            train_rows(wrapped, optimizer, range(3), rank, world_size)
            with wrapped.no_sync():  # the last step in two parts
                (0.25 * wrapped(rows_of(3, rank, world_size)).square().mean()).backward()
            (0.75 * wrapped(rows_of(3, rank, world_size)).square().mean()).backward()
            optimizer.step()
            got = parameters_to_vector(model.parameters())
            assert (got - want).abs().max() < 1e-12, (kind, views, settings)
            if settings:
                with pytest.raises(RuntimeError, match="nothing to reduce; leave the call out"):
                    optimizer.sync_next_backward()
                continue
            for _ in range(2):  # DDP reduces again what is under way
                optimizer.zero_grad()
                optimizer.sync_next_backward()
                wrapped(rows_of(4, rank, world_size)).square().mean().backward()
                with pytest.raises(RuntimeError, match=r"changed after its reduction.*DDP"):
                    optimizer.step()
                optimizer = grouped(kind, model)


@pytest.mark.ranks
def test_under_ddp_ranks_train_as_one_process(tmp_path):
    h.run_ranks(2, tmp_path, data_parallel)


def gathered(model, optimizer, **options):
    return dcp_state.get_state_dict(model, optimizer,
                                    options=dcp_state.StateDictOptions(**options))  # fmt: skip


def save_distributed(rank, world_size, path, names=True):
    """Two steps, then a checkpoint for each kind; once where one rank has no state of its own."""
    for kind in (Muon, Adam):
        model = network(torch.float64, bias=True)
        optimizer = grouped(kind, model, names)
        train_rows(model, optimizer, range(2), rank, world_size)
        for flat in (False, True):
            states = gathered(model, optimizer, flatten_optimizer_state_dict=flat)
            dcp.save(dict(zip(("model", "optimizer"), states)),
                     checkpoint_id=f"{path}/{kind.__name__}{flat}")  # fmt: skip
    single = nn.Linear(4, 4, bias=False)
    optimizer = Muon(single.parameters())
    for _ in range(2):  # before the first step and after
        state = gathered(single, optimizer)[1]["state"]["weight"]
        assert state["momentum_buffer"].shape == (4, 4)
        single(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded = Muon(single.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    assert gathered(single, loaded)[1]["state"]["weight"]["momentum_buffer"].abs().max() > 0


def load_distributed(rank, world_size, path, names=True):
    for kind in (Muon, Adam):
        for flat in (False, True):
            model = network(torch.float64, bias=True)
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            optimizer = grouped(kind, model, names)
            states = gathered(model, optimizer, flatten_optimizer_state_dict=flat)
            both = dict(zip(("model", "optimizer"), states))
            dcp.load(both, checkpoint_id=f"{path}/{kind.__name__}{flat}")
            dcp_state.set_state_dict(
                model, optimizer, model_state_dict=both["model"],
                optim_state_dict=both["optimizer"],
                options=dcp_state.StateDictOptions(flatten_optimizer_state_dict=flat))
            assert optimizer.step_count == 2
            train_rows(model, optimizer, range(2, 5), rank, world_size)
            want = torch.load(f"{path}/{kind.__name__}.pt")
            got = parameters_to_vector(model.parameters()).detach()
            assert (got - want).abs().max() < 1e-12, (kind, flat, world_size)


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of torch's own
def test_distributed_checkpoints_move_between_one_rank_and_two(tmp_path):
    for kind in (Muon, Adam):
        model = network(torch.float64, bias=True)
        train_rows(model, grouped(kind, model), range(5))
        torch.save(parameters_to_vector(model.parameters()).detach(),
                   tmp_path / f"{kind.__name__}.pt")  # fmt: skip
    path = str(tmp_path)
    save_distributed(0, 1, path)
    load_distributed(0, 1, path)
    for number, (work, names) in enumerate((
            (load_distributed, True), (save_distributed, False), (load_distributed, False))):
        (tmp_path / str(number)).mkdir()
        h.run_ranks(2, tmp_path / str(number), work, path, names)
    load_distributed(0, 1, path, names=False)


# Shape and options of each parameter of a model that FSDP2 shards, but for the last: rows that 2
# and 4 ranks divide or do not, fewer rows than ranks, every norm, splits and views, Adam.
SHARDED = (
    ((24, 16), {"method": "polar_express", "scale": "spectral"}),
    ((24, 16), {"method": "polar_express", "scale": "spectral"}),
    ((30, 8), {"cautious": True, "decay": "lr2"}), ((3, 20), {}), ((1, 20), {}),
    ((24, 12), {"split": 3}), ((12, 24), {"split": 2, "split_axis": 1}),
    ((21, 6), {"norm": "row", "scale": "embed"}), ((7, 6), {"norm": "col"}),
    ((9, 4), {"norm": "l2", "momentum_form": "heavy_ball"}), ((6, 4), {"norm": "sign"}),
    ((5, 8, 12), {"view": "batch", "scale": "match_rms_adamw"}),
    ((3, 8, 12), {"view": "batch", "split": 2}), ((10, 2, 3), {"view": "flatten"}),
    ((2,), {"norm": "sign"}), ((11,), {"norm": "l2"}),
    ((11,), {"rule": "adam"}), ((13, 5), {"rule": "adam", "decay": "l2"}), ((6, 6), {}),
)  # fmt: skip


class Weights(nn.Module):
    """Parameters whose gradients are the inputs."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(
            h.gaussian(*shape, seed=n).double() for n, (shape, _) in enumerate(SHARDED))

    def forward(self, inputs):
        return sum((p * x).sum() for p, x in zip(self.weights, inputs) if x is not None)


def weights_and_optimizer(mesh=None, **settings):
    from torch.distributed.fsdp import fully_shard

    model = Weights()
    if mesh is not None:
        fully_shard(model, mesh=mesh, ignored_params={model.weights[-1]})
    groups = {}
    for (name, p), (_, options) in zip(model.named_parameters(), SHARDED):
        group = groups.setdefault(str(options), {"params": [], "lr": 0.05, **options})
        group["params"].append((name, p))
    return model, Muon(list(groups.values()), weight_decay=0.1, **settings)


def train_weights(model, optimizer, steps, rank=0, world_size=1):
    for step in steps:
        inputs = []
        for n, (shape, _) in enumerate(SHARDED):
            shares = h.gaussian(4, *shape, seed=100 * step + n).double()
            share = shares.unflatten(0, (world_size, -1))[rank].mean(0)
            inputs.append(None if step == 1 and n % 2 else share)  # no rank has these gradients
        model(inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


def full_values(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone()
            for p in (q.detach() for q in model.parameters())]  # fmt: skip


def farthest(model, other):
    pairs = zip(full_values(model), full_values(other), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


def fully_sharded(rank, world_size, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    alone, reference = weights_and_optimizer(
        process_group=dist.new_group([rank], use_local_synchronization=True))
    train_weights(alone, reference, range(3))
    model, optimizer = weights_and_optimizer(mesh)
    kinds = [bucket.kind for bucket in optimizer.plan for _ in bucket.slots]
    assert kinds.count("dtensor") == len(SHARDED) - 1
    train_weights(model, optimizer, range(3), rank, world_size)
    assert farthest(model, alone) < 1e-12
    if world_size == 4:  # two replicas of two shards
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        hybrid, other = weights_and_optimizer(grid)
        train_weights(hybrid, other, range(3), rank, world_size)
        assert farthest(hybrid, alone) < 1e-12

    # a checkpoint of two ranks goes on with two and with four
    if world_size == 2:
        states = dcp_state.get_state_dict(model, optimizer)
        dcp.save(dict(zip(("model", "optimizer"), states)), checkpoint_id=path)
    again, loaded = weights_and_optimizer(mesh)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    state = dict(zip(("model", "optimizer"), dcp_state.get_state_dict(again, loaded)))
    dcp.load(state, checkpoint_id=path)
    dcp_state.set_state_dict(again, loaded, model_state_dict=state["model"],
                             optim_state_dict=state["optimizer"])  # fmt: skip
    train_weights(alone, reference, range(3, 5))
    for run in ((model, optimizer), (again, loaded)):
        train_weights(*run, range(3, 5), rank, world_size)
        assert farthest(run[0], alone) < 1e-12

    # one shard's NaN leaves its matrix alone on every rank, and nothing else
    before = full_values(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if rank == 0:
        model.weights[0].grad.to_local()[0, 0] = math.nan
    optimizer.step()
    kept = [torch.equal(a, b) for a, b in zip(before, full_values(model))]
    assert kept == [True] + [False] * (len(SHARDED) - 1)
    assert optimizer.nonfinite.tolist() == [True] + [False] * (len(SHARDED) - 1)

    def make(placement, **options):
        t = distribute_tensor(torch.ones(8, 8), mesh, [placement])
        return Muon([{"params": [("w", nn.Parameter(t))], **options}])

    for placement, options in ((Shard(1), {}), (Shard(0), {"second_moment": "row"})):
        with pytest.raises(ValueError, match=r"'w'.*sharded by rows"):
            make(placement, **options)


@pytest.mark.ranks
def test_under_fsdp2_ranks_train_as_one_process(tmp_path):
    for world_size in (2, 4):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        h.run_ranks(world_size, folder, fully_sharded, str(tmp_path / "checkpoint"))
