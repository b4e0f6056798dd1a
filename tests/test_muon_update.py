"""The update rules and the optimizer on one process, against torch's optimizers and by hand."""

import copy
import functools
import io
import math
import pickle

import muon_helpers as h
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import muon
from muon import Adam, Muon

SHAPES = ((32, 48), (48, 32), (24, 24), (24, 24), (1, 20))


def pair(shapes=SHAPES, seed=0, dtype=torch.float32):
    made = [
        [torch.nn.Parameter(h.gaussian(*s, seed=seed + n).to(dtype)) for n, s in enumerate(shapes)]
        for _ in range(2)
    ]
    return made


def gradients(step, shapes=SHAPES):
    return [h.gaussian(*s, seed=100 * step + n + 50) for n, s in enumerate(shapes)]


def distance(a, b):
    return max(float((x.detach().double() - y.detach().double()).abs().max()) for x, y in zip(a, b))


# ------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("options", [
    {}, {"lr": 0.02, "weight_decay": 0.0}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"},
    {"adjust_lr_fn": "original", "momentum": 0.8}, {"ns_coefficients": (2.0, -1.5, 0.5)},
    {"ns_steps": 3, "eps": 1e-5}, {"lr": torch.tensor(0.01)},
])  # fmt: skip
def test_a_drop_in_for_torch_optim_muon(options, monkeypatch):
    monkeypatch.setattr(muon, "bf16_units", lambda: True)  # its products, also where they are slow
    ours, theirs = pair()
    mine, other = Muon(ours, **options, mode="fast"), torch.optim.Muon(theirs, **options)
    start = [p.detach().clone() for p in ours]
    for step in range(4):
        for optimizer in (mine, other):
            h.step_with(optimizer, gradients(step))
    for p, q, before in zip(ours, theirs, start):  # rounded to bf16 in two orders: 0.2% to 3.3%
        assert (p - q).norm() < 0.05 * (q - before).norm()
    # its checkpoints load, and training goes on alike
    again, _ = pair(seed=9)
    loaded = Muon(again, lr=5.0, mode="fast")
    with torch.no_grad():
        for p, q in zip(again, theirs):
            p.copy_(q)
    loaded.load_state_dict(other.state_dict())
    group = loaded.param_groups[0]
    assert group["lr"] == options.get("lr", 1e-3)
    assert group["ns_steps"] == options.get("ns_steps", 5)
    start = [p.detach().clone() for p in again]
    for optimizer in (loaded, other):
        h.step_with(optimizer, gradients(7))
    for p, q, before in zip(again, theirs, start):
        assert (p - q).norm() < 0.05 * (q - before).norm()


def test_torchs_rule_in_fp64_by_hand():
    """The same mathematics without any rounding to speak of: 1e-12 of the written-out rule."""
    ours, _ = pair(dtype=torch.float64)
    expected = [p.detach().clone() for p in ours]
    buffers = [torch.zeros_like(p) for p in ours]
    optimizer = Muon(ours, lr=0.02, weight_decay=0.1)
    for step in range(3):
        for p, B, g in zip(expected, buffers, gradients(step)):
            g = g.double()
            B.mul_(0.95).add_(g, alpha=0.05)
            N = 0.05 * g + 0.95 * B
            U, S, Vh = torch.linalg.svd(N, full_matrices=False)
            O = U @ torch.diag(h.scalar_map((muon.JORDAN,) * 5, S / S.norm())) @ Vh  # noqa: E741
            p.mul_(1 - 0.02 * 0.1).sub_(O, alpha=0.02 * math.sqrt(max(1, p.shape[0] / p.shape[1])))
        h.step_with(optimizer, [g.double() for g in gradients(step)])
    assert distance(ours, expected) < 1e-12


@pytest.mark.parametrize("theirs, ours", [
    (torch.optim.Adam, {"decay": "l2"}), (torch.optim.AdamW, {}),
])  # fmt: skip
@pytest.mark.parametrize("betas, eps, weight_decay", [
    ((0.9, 0.999), 1e-8, 0.0), ((0.65, 0.95), 1e-10, 0.1), ((0.0, 0.99), 1e-3, 0.01),
])  # fmt: skip
def test_adam_is_torchs(theirs, ours, betas, eps, weight_decay):
    shapes = ((30, 7), (5,), (), (2, 3, 4))
    a, b = pair(shapes)
    both = {"lr": 0.01, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    mine, other = Adam(a, **both, **ours), theirs(b, **both)
    for step in range(50):
        for optimizer in (mine, other):
            h.step_with(optimizer, gradients(step, shapes))
    assert distance(a, b) < 3e-6  # a few ulps after 50 steps
    loaded = Adam([torch.nn.Parameter(p.detach().clone()) for p in b])
    loaded.load_state_dict(other.state_dict())
    for optimizer in (loaded, other):
        h.step_with(optimizer, gradients(60, shapes))
    assert distance(loaded.param_groups[0]["params"], b) < 1e-6


# ------------------------------------------------------------------------------------ by hand


def test_ema_and_heavy_ball_are_the_same_update():
    for nesterov in (True, False):
        a, b = pair()
        ema = Muon(a, lr=0.02, nesterov=nesterov)
        ball = Muon(b, lr=0.02, nesterov=nesterov, momentum_form="heavy_ball")
        for step in range(6):
            for optimizer in (ema, ball):
                h.step_with(optimizer, gradients(step))
        assert distance(a, b) < 2e-6 * 6
        for p, q in zip(a, b):  # B = (1 - mu) B'
            B, C = (o.state[x]["momentum_buffer"] for o, x in ((ema, p), (ball, q)))
            assert torch.allclose(B, 0.05 * C, atol=1e-6)


def test_heavy_ball_remembers_more_than_ema_while_momentum_grows():
    """buf = m buf + g, direction g + m buf: records 3 to 14, whose momentum warms up from #9 on."""
    (p,), (q,) = pair(((8, 8),))
    options = {"lr": 1.0, "weight_decay": 0.0, "norm": "l2"}
    ball, ema = (Muon([x], **options, momentum_form=form) for x, form in (
        (p, "heavy_ball"), (q, "ema")))
    buffer = torch.zeros(8, 8, dtype=torch.float64)
    for step in range(10):
        momentum, G = 0.85 + 0.01 * step, gradients(step, ((8, 8),))[0]
        buffer = momentum * buffer + G.double()
        expected = G + momentum * buffer
        before = p.detach().clone()
        for optimizer in (ball, ema):
            optimizer.param_groups[0]["momentum"] = momentum
            h.step_with(optimizer, [G])
        assert torch.allclose((before - p).double(), expected / expected.norm(), atol=1e-6)
    assert distance([p], [q]) > 1e-2


@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
def test_scales_mean_what_they_say(shape):
    G = h.gaussian(*shape)

    def update(scale, **options):
        p = torch.nn.Parameter(torch.zeros(shape))
        options = {"method": "polar_express", **options}
        optimizer = Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, scale=scale,
                         **options)  # fmt: skip
        h.step_with(optimizer, [G])
        return p.detach()

    for scale, rms in (("match_rms_adamw", 0.2), ("unit_rms", 1.0)):
        assert abs(update(scale, method="svd").square().mean().sqrt() / rms - 1) < 1e-4
        assert abs(update(scale).square().mean().sqrt() / rms - 1) < 0.06
    assert abs(h.op_norm(update("spectral")) - 1) < 0.15
    bare = update("none")
    assert torch.equal(update(3.0), update("none", multiplier=3.0))
    factor = max(1.0, shape[0] / shape[1]) ** 0.5
    assert torch.allclose(update("original"), factor * bare)


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_the_operator_norm_of_a_step_does_not_depend_on_width(width):
    p = torch.nn.Parameter(torch.zeros(width, width // 2))
    optimizer = Muon([p], lr=0.1, scale="spectral", method="polar_express", weight_decay=0.0)
    h.step_with(optimizer, [h.gaussian(width, width // 2)])
    assert abs(h.op_norm(p.detach()) / 0.1 - 1) < 0.15


def one_decay(p0, G, **options):
    p = torch.nn.Parameter(p0.clone())
    optimizer = Muon([p], lr=0.1, momentum=0.0, nesterov=False, method="svd", **options)
    h.step_with(optimizer, [G])
    return p.detach()


def test_weight_decay_by_hand_on_two_by_two():
    p = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    G = torch.tensor([[3.0, 0.0], [0.0, -5.0]])
    O = torch.tensor([[1.0, 0.0], [0.0, -1.0]])  # noqa: E741
    assert torch.allclose(one_decay(p, G, weight_decay=0.5), p * 0.95 - 0.1 * O)
    lr2 = one_decay(p, G, weight_decay=0.5, decay="lr2", multiplier=3.0)
    assert torch.allclose(lr2, p * (1 - 0.1 * 0.3 * 0.5) - 0.3 * O)
    # cautious: entries with update * p >= 0 (all but the last), with > 0 (the first alone)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    cautious = one_decay(p, G, weight_decay=0.5, cautious=True)
    assert torch.allclose(cautious, p - 0.05 * p * mask - 0.1 * O)
    strict = one_decay(p, G, weight_decay=0.5, cautious="strict")
    mask[0, 1] = mask[1, 0] = 0.0
    assert torch.allclose(strict, p - 0.05 * p * mask - 0.1 * O)
    assert torch.allclose(one_decay(p, G, weight_decay=0.0), p - 0.1 * O)
    l2 = one_decay(p, G, weight_decay=0.5, decay="l2")
    assert torch.allclose(l2, p - 0.1 * h.exact(G + 0.5 * p).float(), atol=1e-6)


def test_decay_has_its_fixed_point():
    p = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = Muon([p], lr=0.05, weight_decay=2.0, method="svd")
    for _ in range(200):
        h.step_with(optimizer, [torch.eye(16)])
    assert torch.allclose(p.detach(), -torch.eye(16) / 2.0, atol=1e-4)  # step / decay


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), strict=st.booleans())
def test_cautious_decay_never_moves_a_weight_away_from_zero(seed, strict):
    p, G = h.gaussian(6, 9, seed=seed), h.gaussian(6, 9, seed=seed + 1)
    with_decay = one_decay(p, G, weight_decay=0.7, cautious="strict" if strict else True)
    without = one_decay(p, G, weight_decay=0.0)
    signs = (p.sign() * with_decay <= p.sign() * without + 1e-7)
    assert signs.all()


def test_adam_decays_cautiously_with_the_square_of_lr():
    p0 = torch.tensor([1.0, -1.0, 2.0, 3.0])
    p = torch.nn.Parameter(p0.clone())
    optimizer = Adam([p], lr=0.1, weight_decay=2.0, decay="lr2", cautious="strict", eps=0.0)
    h.step_with(optimizer, [torch.tensor([1.0, 1.0, -1.0, 1.0])])
    update = torch.tensor([1.0, 1.0, -1.0, 1.0])
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert torch.allclose(p.detach(), p0 - 0.01 * 2.0 * p0 * mask - 0.1 * update)


# --------------------------------------------------------------------------------------- views


def updates(params, grads, **options):
    before = [p.detach().clone() for p in params]
    h.step_with(Muon(params, lr=1.0, weight_decay=0.0, **options), grads)
    return [p.detach() - b for p, b in zip(params, before)]


def test_views_are_the_matrices_they_stand_for():
    settings = {"method": "polar_express", "second_moment": "row", "scale": "spectral"}

    def apart(G, pieces):
        """Each piece as a parameter of its own."""
        params = [torch.nn.Parameter(torch.zeros_like(piece)) for piece in pieces(G)]
        return updates(params, [piece.contiguous() for piece in pieces(G)], **settings)

    def together(G, **view):
        return updates([torch.nn.Parameter(torch.zeros_like(G))], [G], **settings, **view)[0]

    G = h.gaussian(96, 40)
    for split, axis in ((3, 0), (4, 1)):
        want = torch.cat(apart(G, lambda t, n=split, a=axis: t.chunk(n, a)), axis)
        assert torch.equal(together(G, split=split, split_axis=axis), want)
    stack = h.gaussian(5, 24, 16)
    assert torch.equal(together(stack, view="batch"), torch.stack(apart(stack, lambda t: t)))
    deep = h.gaussian(2, 3, 24, 16)
    want = torch.stack(apart(deep, lambda t: t.flatten(0, 1))).view(deep.shape)
    assert torch.equal(together(deep, view="batch"), want)
    heads = torch.cat([t for w in stack for t in apart(w, lambda t: t.split(8))]).view(5, 24, 16)
    assert torch.equal(together(stack, view="batch", split=3), heads)
    conv = h.gaussian(64, 8, 5, 1)
    want = apart(conv.flatten(1), lambda t: [t])[0]
    assert torch.equal(together(conv, view="flatten").flatten(1), want)


@pytest.mark.parametrize("axis, dim", [("row", 1), ("col", 0)])
def test_normuon_evens_out_the_axis_that_its_group_names(axis, dim):
    """Rows of very different size come out with one RMS, in a matrix of the same norm."""
    settings = {"momentum": 0.0, "scale": "none", "method": "polar_express"}
    G = h.gaussian(64, 16) * torch.linspace(0.1, 3, 64)[:, None] * torch.linspace(3, 0.1, 16)
    plain, even = (updates([torch.nn.Parameter(torch.zeros(64, 16))], [G], **settings, **more)[0]
                   for more in ({}, {"second_moment": axis}))
    rms = even.square().mean(dim).sqrt()
    assert rms.max() < 1.001 * rms.min() and torch.allclose(even.norm(), plain.norm(), rtol=1e-4)
    assert plain.square().mean(dim).sqrt().aminmax().max > 1.05 * rms.mean()


def test_conv_filters_scale_by_their_flattened_shape_and_layers_never_mix():
    for shape in ((512, 16, 1, 1), (64, 8, 5, 1), (16, 3, 3, 3)):
        rows, cols = shape[0], math.prod(shape[1:])
        grads = [h.gaussian(*shape, seed=n) for n in range(3)]
        params = [torch.nn.Parameter(torch.zeros(shape)) for _ in grads]
        got = updates(params, grads, view="flatten", method="svd", momentum=0.0)
        for u, G in zip(got, grads):
            want = -math.sqrt(max(1, rows / cols)) * h.exact(G.flatten(1))
            assert (u.flatten(1).double() - want).abs().max() < 1e-4


def test_a_parameter_in_any_memory_order_keeps_its_values():
    p = torch.nn.Parameter(h.gaussian(8, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    q = torch.nn.Parameter(p.detach().contiguous())
    G = h.gaussian(8, 4, 3, 3, seed=2)
    assert torch.equal(*(updates([x], [G], view="flatten")[0] for x in (p, q)))


# ------------------------------------------------------------------------- gradients and steps


def test_gradients_stay_the_callers():
    a, b = pair()
    for kind, params in ((Muon, a), (torch.optim.Muon, b)):
        optimizer, grads = kind(params), gradients(0)
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, grads)) and h.same(grads, gradients(0))
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad is g and g.eq(0).all() for p, g in zip(params, grads))
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)


def test_zero_moves_by_momentum_and_none_not_at_all():
    def trained(second):
        a, _ = pair()
        optimizer = Muon(a, lr=0.1, weight_decay=0.5)
        h.step_with(optimizer, gradients(0))
        middle = [p.detach().clone() for p in a]
        kept = [optimizer.state[p]["momentum_buffer"].clone() for p in a]
        second(optimizer, a)
        now = [optimizer.state[p]["momentum_buffer"] for p in a]
        return middle, a, kept, now

    def none(optimizer, a):
        h.step_with(optimizer, [None] * 5)

    def untouched(optimizer, a):
        optimizer.zero_grad()
        optimizer.step()

    def zeros(optimizer, a):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()

    for nothing in (none, untouched):
        middle, a, kept, now = trained(nothing)
        assert h.same(middle, a) and h.same(kept, now)
    middle, a, kept, now = trained(zeros)
    assert all(not torch.equal(m, p) for m, p in zip(middle, a))
    assert all(torch.allclose(0.95 * k, n) for k, n in zip(kept, now))
    # zero gradients from the start: weight decay alone, finite
    a, b = pair()
    h.step_with(Muon(a, lr=0.1, weight_decay=0.5), [torch.zeros_like(p) for p in a])
    assert all(torch.allclose(p, q * 0.95) for p, q in zip(a, b))


def test_gradients_add_up_over_backward_passes_and_replaced_ones_count():
    a, b = pair()
    one, two = Muon(a), Muon(b)
    G, H = gradients(0), gradients(1)
    for p, g, other in zip(a, G, H):
        (p * g).sum().backward()
        (p * other).sum().backward()
    for p, g, other in zip(b, G, H):
        p.grad = None  # as model.zero_grad() does
        (p * (g + other)).sum().backward()
    one.step()
    two.step()
    assert distance(a, b) < 3e-6  # a few ulps after 50 steps


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_gradient_masks_its_parameter_alone(bad):
    for rule in ("muon", "adam"):
        a, b = pair()
        one, two = ({"muon": Muon, "adam": Adam}[rule](x) for x in (a, b))
        for optimizer in (one, two):
            h.step_with(optimizer, gradients(0))
        G = gradients(1)
        before, state = a[2].detach().clone(), one.state_dict()["state"][2]
        broken = [g.clone() for g in G]
        broken[2][3, 3] = bad
        h.step_with(one, broken)
        h.step_with(two, [g if n != 2 else None for n, g in enumerate(G)])
        assert one.nonfinite.tolist() == [False, False, True, False, False]
        assert torch.equal(a[2], before) and h.same(a, b)
        now = one.state_dict()["state"][2]
        assert all(torch.equal(state[key], now[key]) for key in state)
        h.step_with(one, G)
        assert not one.nonfinite.any() and not torch.equal(a[2], before)


def test_a_shut_gate_keeps_parameters_and_state_as_they_are():
    for rule, dtype in (("muon", torch.float32), ("adam", torch.float32), ("muon", torch.bfloat16)):
        p = torch.nn.Parameter(h.gaussian(8, 12).to(dtype))
        optimizer = {"muon": Muon, "adam": Adam}[rule]([p], lr=0.1)
        gate = optimizer.gate = torch.ones((), dtype=torch.bool)
        h.step_with(optimizer, [h.gaussian(8, 12, seed=1).to(dtype)])
        before, state = p.detach().clone(), optimizer.state_dict()["state"][0]
        gate &= False  # in place: the optimizer looks at the tensor it was given
        h.step_with(optimizer, [h.gaussian(8, 12, seed=2).to(dtype)])
        assert torch.equal(p, before)
        now = optimizer.state_dict()["state"][0]
        assert all(torch.equal(now[key], t) for key, t in state.items())
        gate |= True
        h.step_with(optimizer, [h.gaussian(8, 12, seed=2).to(dtype)])
        assert not torch.equal(p, before)


def test_every_kth_step_adds_gradients_up_and_frozen_groups_rest():
    a, b = pair(((8, 8), (5,)))
    slow = {"params": a[1:], "rule": "adam", "update_interval": 3}
    one = Muon([{"params": a[:1], "lr": 0.1}, slow])
    two = Adam(b[1:])
    for step in range(6):
        grads = gradients(step, ((8, 8), (5,)))
        before = a[1].detach().clone()
        (a[0] * grads[0]).sum().backward()
        (a[1] * grads[1]).sum().backward()
        one.step()
        one.zero_grad()
        assert torch.equal(a[1], before) == (step % 3 != 2)
        assert a[0].grad is None and (a[1].grad is None) == (step % 3 == 2)
        (b[1] * grads[1]).sum().backward()
        if step % 3 == 2:
            two.step()
            two.zero_grad()
    assert distance(a[1:], b[1:]) < 1e-7
    one.param_groups[0]["frozen"] = True
    before = a[0].detach().clone()
    (a[0] * 2).sum().backward()
    one.step()
    one.zero_grad()
    assert torch.equal(a[0], before) and a[0].grad is None


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_a_frozen_steps_gradient_is_dropped(interval):
    """Record 53 drops it; its neighbour in the bucket goes on collecting for its k-th step."""
    a, b = pair(((5,), (6,)))
    one = Adam([{"params": a[:1]}, {"params": a[1:]}], update_interval=interval)
    two = Adam(b)
    for step in range(4 * interval):
        grads = gradients(step, ((5,), (6,)))
        # the last frozen step is the first of those whose gradients add up, if interval > 1
        frozen = interval <= step < 2 * interval + 1
        one.param_groups[0]["frozen"] = frozen
        for params in (a, b):
            for p, grad in zip(params, grads):
                (p * grad).sum().backward()
        one.step()
        one.zero_grad()
        if frozen:
            b[0].grad = None
            assert a[0].grad is None
        if step % interval == interval - 1:
            two.step()
            two.zero_grad()
    assert distance(a, b) < 1e-7


def test_closures_schedulers_and_tensor_rates():
    a, b = pair()
    one, two = Muon(a, lr=0.1), Muon(b, lr=torch.tensor(0.1))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)) for o in (one, two)]
    for step in range(3):
        for optimizer, params, schedule in zip((one, two), (a, b), schedules):

            def closure(optimizer=optimizer, params=params, step=step):
                optimizer.zero_grad()
                loss = sum((p * g).sum() for p, g in zip(params, gradients(step)))
                loss.backward()
                return loss

            assert isinstance(optimizer.step(closure), torch.Tensor)
            schedule.step()
    assert one.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    assert distance(a, b) < 3e-6  # a few ulps after 50 steps


# --------------------------------------------------------------------------------------- bf16


def test_bf16_parameters_take_exact_fp32_updates():
    """A thousand steps that are each far below a bf16 ulp must not be lost."""
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    q = torch.nn.Parameter(torch.ones(8, 8))
    low, full = Muon([p], lr=1e-5, weight_decay=0.01), Muon([q], lr=1e-5, weight_decay=0.01)
    G = h.gaussian(8, 8).bfloat16()
    for _ in range(1000):
        h.step_with(low, [G])
        h.step_with(full, [G.float()])
    assert torch.equal(p, q.bfloat16()) and not p.eq(1).all()
    assert torch.equal(low.state[p]["master"], q)
    with torch.no_grad():
        p.fill_(3.0)  # loaded from elsewhere: the parameter wins over its master
        q.fill_(3.0)
    h.step_with(low, [G])
    h.step_with(full, [G.float()])
    assert torch.equal(low.state[p]["master"], q)


def test_buffers_are_never_aliased_by_updates():
    """torch.optim.Muon normalised its own buffer here (bf16, nesterov=False)."""
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
        optimizer = Muon([p], nesterov=False, momentum=0.0)
        G = h.gaussian(64, 64).to(dtype)
        h.step_with(optimizer, [G])
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.dtype == torch.float32 and torch.equal(buffer, G.float())


# ------------------------------------------------------------------------------ people's needs


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "state_dict", "saved", "with the model"])
def test_copies_continue_exactly(way):
    params = h.mixed_params()
    optimizer = h.mixed_optimizer(muon, params)
    h.mixed_train(optimizer, params, range(4))  # no group is collecting gradients
    if way == "with the model":
        other, twins = copy.deepcopy((optimizer, params))
    elif way in ("pickle", "deepcopy"):
        pickled = way == "pickle"
        other = pickle.loads(pickle.dumps(optimizer)) if pickled else copy.deepcopy(optimizer)
        found = [p for group in other.param_groups for p in group["params"]]
        names = [n for group in other.param_groups for n in group["param_names"]]
        twins = dict(zip(names, found))
        twins = {name: twins[name] for name in params}
    else:
        twins = h.mixed_params(seed=4)
        other = h.mixed_optimizer(muon, twins)
        state = optimizer.state_dict()
        if way == "saved":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other.load_state_dict(state)
        with torch.no_grad():
            for p, q in zip(twins.values(), params.values()):
                p.copy_(q)
    assert h.same(h.values(params), h.values(twins))
    for o, ps in ((optimizer, params), (other, twins)):
        h.mixed_train(o, ps, range(4, 7))
    assert h.same(h.values(params), h.values(twins))
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(params.values(), twins.values()))


def test_a_state_dict_is_a_snapshot_with_all_state_before_the_first_step():
    params = h.mixed_params()
    optimizer = h.mixed_optimizer(muon, params)
    fresh = optimizer.state_dict()
    assert list(fresh["state"]) and all(fresh["state"].values())
    values = h.values(params)
    h.mixed_train(optimizer, params, range(2))
    with torch.no_grad():
        for p, value in zip(params.values(), values):
            p.copy_(value)
    optimizer.load_state_dict(fresh)
    optimizer.zero_grad()
    h.mixed_train(optimizer, params, range(2))
    again = h.mixed_params()
    h.mixed_train(h.mixed_optimizer(muon, again), again, range(2))
    assert h.same(h.values(params), h.values(again))


def test_a_group_added_later_keeps_what_was_there():
    a, b = pair()
    one, two = Muon(a[:2], lr=0.1), Muon(b[:2], lr=0.1)
    for optimizer in (one, two):
        h.step_with(optimizer, gradients(0))
    one.add_param_group({"params": a[2:], "lr": 0.2, "rule": "adam"})
    for n, p in enumerate(b[2:]):
        assert torch.equal(a[2 + n], p)
    h.step_with(one, gradients(1))
    h.step_with(two, gradients(1))
    assert h.same(a[:2], b[:2]) and not torch.equal(a[2], b[2])


def test_untying_copies_state_locally():
    head, embed = (torch.nn.Parameter(h.gaussian(300, 8)) for _ in range(2))
    gain = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([("head", head), ("embed", embed), ("gain", gain)])
    for step in range(3):
        h.step_with(optimizer, [h.gaussian(300, 8, seed=step), None, None])
    assert not optimizer.state[embed]
    optimizer.copy_state("head", "embed")
    with torch.no_grad():
        embed.copy_(head)
    G = h.gaussian(300, 8, seed=9)
    h.step_with(optimizer, [G, G, None])
    assert torch.equal(head, embed) and optimizer.state[embed]["step"] == 4
    with pytest.raises(ValueError, match="copy_state"):
        optimizer.copy_state("head", "gain")


def bad(message, params=None, **options):
    params = [("w", torch.nn.Parameter(torch.zeros(8, 8)))] if params is None else params
    with pytest.raises(ValueError, match=message):
        Muon(params, **options)


def test_errors_name_the_parameter_and_the_way_out():
    def named(name, *shape):
        return [(name, torch.nn.Parameter(torch.zeros(*shape)))]

    bad(r"'embed.weight'.*embedding.*\"rule\": \"adam\"", named("embed.weight", 100, 8))
    bad(r"'w' of shape \(50304, 8\).*looks like an embedding", named("w", 50304, 8))
    bad(r"'gain'.*needs matrices, got 1.*adam", named("gain", 8))
    bad(r"'experts'.*\"view\": \"batch\".*\"view\": \"flatten\"", named("experts", 4, 8, 8))
    bad(r"one matrix \(8, 36\)", named("conv", 8, 4, 3, 3))
    bad("does not fit", named("w", 8, 8), view="batch")
    bad("split=3 does not divide the 8", split=3)
    bad("split: expected a whole number", split=(4, 4))
    bad("unknown option 'momentun'.*did you mean 'momentum'", momentun=0.9)
    bad("'method'|method: expected one of 'svd'", method="newton")
    bad("lr: expected a number >= 0", lr=-1.0)
    bad("momentum", momentum=-0.1)
    bad("weight_decay", weight_decay=-0.1)
    bad("adjust_lr_fn", adjust_lr_fn="arbitrary")
    bad("scale", scale="wide")
    bad("update_interval", update_interval=0)
    bad("rule: expected one of", [{"params": named("w", 8, 8), "rule": "sgd"}])
    bad("collective", collective="broadcast")
    bad("ns_coefficients", ns_coefficients=((1.0, 2.0),))
    bad("floating point", [("w", torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), False))])
    bad("got twice", named("w", 4, 4) + named("w", 4, 4))
    table = torch.nn.Embedding(8, 4, sparse=True)
    optimizer = Adam([("table", table.weight)])
    table.weight.grad = None
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"'table'.*sparse"):
        optimizer.step()
    Muon(named("embed.weight", 100, 8), norm="row", scale="embed")  # its own norm is fine
    Muon(named("embed.weight", 100, 8), view="matrix")  # and so is insisting
    Muon(named("bias", 8), norm="sign")


def test_loading_what_does_not_fit_is_refused():
    def make(name="w", shape=(8, 8), **options):
        return Muon([(name, torch.nn.Parameter(torch.zeros(shape)))], **options)

    state = make().state_dict()
    for other, message in (
        (make(shape=(8, 4)), r"'w', momentum_buffer: expected shape \(8, 4\), got \(8, 8\)"),
        (make(update_interval=2), "saved with update_interval=1"),
        (make(second_moment="row"), "saved with second_moment=None"),
        (Adam([torch.nn.Parameter(torch.zeros(8, 8))]), "saved with rule='muon'"),
        (Muon([torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]), "size of optimizer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


def test_every_norm_trains_a_network_of_its_own_kind():
    """One optimizer, each layer by its own norm: column/row RMS, spectral, sign, l2."""
    torch.manual_seed(0)
    embed, hidden = torch.nn.Parameter(torch.randn(32, 16)), torch.nn.Parameter(torch.randn(16, 16))
    head, bias = torch.nn.Parameter(torch.zeros(32, 16)), torch.nn.Parameter(torch.zeros(32))
    optimizer = Muon([
        {"params": [("embed", embed)], "norm": "row", "scale": "embed", "lr": 0.05},
        {"params": [("hidden", hidden)], "scale": "spectral", "lr": 0.05},
        {"params": [("head", head)], "norm": "row", "scale": "head", "lr": 2.0},
        {"params": [("bias", bias)], "norm": "sign", "scale": "none", "lr": 0.01},
    ], weight_decay=0.0)  # fmt: skip
    x = torch.arange(32)
    y = (x * 7 + 3) % 32
    losses = []
    for _ in range(60):
        logits = torch.tanh(embed[x] @ hidden) @ head.T + bias
        loss = torch.nn.functional.cross_entropy(logits, y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(32), abs=1e-3) and losses[-1] < 0.1


def test_a_quadratic_falls_to_half_and_then_to_nothing():
    target = h.gaussian(32, 48)
    W = torch.nn.Parameter(torch.zeros(32, 48))
    optimizer = Muon([W], lr=0.5, weight_decay=0.0, method="polar_express")
    losses = []
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / 100)
        loss = (W - target).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[49] < losses[0] / 2 and losses[-1] < 1e-2 * losses[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own compiler
@pytest.mark.parametrize("rule, options", [
    ("muon", {"method": "jordan"}), ("muon", {"method": "polar_express"}), ("adam", {})])
def test_compiled_rules_never_recompile_when_schedules_move(rule, options, monkeypatch):
    graphs_alone = functools.partial(torch.compile, backend="aot_eager")  # no C++: seconds less
    monkeypatch.setattr(torch, "compile", graphs_alone)
    a, b = pair(((16, 16), (16, 16)))
    groups = [{"params": x, "rule": rule, "weight_decay": 0.1, "cautious": True, **options}
              for x in (a, b)]
    one, two = Muon([groups[0]], compile=True), Muon([groups[1]])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    frames = None
    for step in range(12):
        for optimizer in (one, two):
            group = optimizer.param_groups[0]
            group["lr"], group["weight_decay"] = 0.01 * (step + 1), 0.1 / (step + 1)
            if rule == "muon":
                group["momentum"] = 0.85 + 0.01 * step
            h.step_with(optimizer, gradients(step, ((16, 16), (16, 16))))
        now = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert frames in (None, now)
        frames = now
    assert frames == 1 and distance(a, b) < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
@pytest.mark.parametrize("path", h.PATHS)
def test_compiled_updates_are_the_eager_ones_whatever_precision_the_program_chose(path):
    """Compiled code takes its precision from the step around it: bf16 products would blow up the
    Gram form, by which fp32 iterates 4:1 matrices."""
    G, *spaces = h.low_rank(8, 80, 256)
    steps = {}
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch._dynamo.reset()
    try:
        torch.set_float32_matmul_precision("medium")
        with h.on(path, muon) as mode:
            for compiled in (False, True):
                p = torch.nn.Parameter(torch.zeros(80, 256))
                h.step_with(Muon([p], lr=1.0, mode=mode, compile=compiled), [G])
                steps[compiled] = p.detach()
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before
        torch._dynamo.reset()
    error = (steps[True] - steps[False]).norm() / steps[False].norm()
    noise = h.noise_energy(steps[True], *spaces)  # an ulp before the first rounding changes it
    limits = {"fp32": (1e-3, 1e-6), "bf16": (0.1, 0.3)}
    assert error < limits[path][0] and noise < limits[path][1]
