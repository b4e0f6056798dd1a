"""Published bugs of optimizers, put into a copy of muon.py one at a time: each must be caught.

A mutation replaces text of the source; the named check passes on the true module and must fail on
the mutant. What only several ranks can show is checked with the mutants on two gloo ranks.
"""

import math
import sys
import time
import types
from pathlib import Path

import muon_helpers as h
import pytest
import torch

SOURCE = (Path(__file__).parent.parent / "muon.py").read_text()


def load(name="muon_true", *edits):
    """muon.py as a fresh module, with (old, new) pairs of its text replaced, on a CPU without bf16
    units: exact to the last bits."""
    text = SOURCE
    for old, new in edits:
        assert old in text, f"mutation {name}: the text it changes is gone"
        text = text.replace(old, new)
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(text, name, "exec"), module.__dict__)
    module.bf16_units = lambda: False
    return module


# ------------------------------------------------------------------------- checks on one process


def one_step(m, shape, G, **options):
    """The change that one step without momentum or decay makes, per unit of lr."""
    p = torch.nn.Parameter(torch.zeros(shape))
    h.step_with(m.Muon([p], **{"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, **options}), [G])
    return -p.detach()


def conv_scale(m):
    for shape in ((512, 16, 1, 1), (64, 8, 5, 1)):
        G = h.gaussian(*shape)
        factor = math.sqrt(max(1, shape[0] / math.prod(shape[1:])))
        want = factor * h.exact(G.flatten(1))
        got = one_step(m, shape, G, view="flatten", method="svd").flatten(1)
        assert (got - want).abs().max() < 1e-3


def layers_apart(m):
    params = [torch.nn.Parameter(torch.zeros(16, 3, 3, 3)) for _ in range(3)]
    grads = [h.gaussian(16, 3, 3, 3, seed=n) for n in range(3)]
    options = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "view": "flatten", "method": "svd"}
    h.step_with(m.Muon(params, **options), grads)
    for p, G in zip(params, grads):
        assert (-p.detach().flatten(1) - h.exact(G.flatten(1))).abs().max() < 1e-3


def any_scale(m):
    G = h.gaussian(32, 48)
    X = m.orthogonalize(G)
    for scale in (1e-30, 1e-12, 1e12, 1e30):
        assert (m.orthogonalize(G * scale) - X).norm() < 1e-4 * X.norm()


def zeros_stay(m):
    assert m.orthogonalize(torch.zeros(2, 8, 8)).eq(0).all()


def maps_positive_and_bounded(m):
    for method in ("polar_express", "jordan"):
        polynomials, safety = m.coefficients(method, 5)
        y = h.scalar_map(polynomials, torch.linspace(1e-3, 1.018, 20000).double() / safety)
        assert y.min() > 0 and y.max() < 1.25, method
        # a rank-1 gradient whose rounding lands just above 1
    x = torch.linspace(1e-3, 1.018, 20000).double()
    assert h.scalar_map(m.polar_express(5), x).max() < 1.15


def noise_at_rank_8(m):
    for rows, cols in ((192, 192), (80, 256)):
        G, *spaces = h.low_rank(8, rows, cols)
        for path in ("fp32", "rounded"):
            with h.on(path, m):
                X = m.orthogonalize(G)
            assert h.noise_energy(X, *spaces) < 0.02 and X.norm() < 1.2 * 8**0.5


def emulation_avoided(m):
    """Without bf16 units nothing is ever stored in bf16, whatever the mode."""
    G = h.gaussian(72, 80)
    for mode in ("accurate", "fast"):
        X = m.orthogonalize(G, mode=mode)
        assert (X - m.orthogonalize(G.double())).norm() < 1e-4 * X.norm()


def short_side(m):
    G = h.gaussian(96, 70)
    for path in h.PATHS:
        with h.on(path, m) as mode:
            assert torch.equal(m.orthogonalize(G, mode=mode).mT, m.orthogonalize(G.mT, mode=mode))
    assert (m.orthogonalize(G, "polar_express", 12) - h.exact(G)).abs().max() < 1e-3


def one_matrix_one_norm(m):
    G = h.gaussian(3, 12, 24)  # torch rounds products of three of them, and not of one
    for path in h.PATHS:
        with h.on(path, m) as mode:
            X = m.orthogonalize(G, mode=mode)
            assert all(torch.equal(m.orthogonalize(g, mode=mode), x) for g, x in zip(G, X))


def buffers_unaliased(m):
    p = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.bfloat16))
    optimizer = m.Muon([p], momentum=0.0, nesterov=False)
    G = h.gaussian(32, 32).bfloat16()
    h.step_with(optimizer, [G])
    assert torch.equal(optimizer.state[p]["momentum_buffer"], G.float())


def gradient_untouched(m):
    p, G = torch.nn.Parameter(torch.zeros(8, 8)), h.gaussian(8, 8)
    optimizer = m.Muon([p])
    for _ in range(2):
        h.step_with(optimizer, [G])
        assert torch.equal(p.grad, G)


def forms_agree(m):
    results = []
    for form in ("ema", "heavy_ball"):
        p = torch.nn.Parameter(torch.zeros(8, 12))
        optimizer = m.Muon([p], momentum_form=form, lr=0.1)
        for step in range(4):
            h.step_with(optimizer, [h.gaussian(8, 12, seed=step)])
        results.append(p.detach().clone())
    assert torch.allclose(*results, atol=1e-5)


def drop_in(m):
    m.bf16_units = lambda: True
    for nesterov in (True, False):
        a, b = (torch.nn.Parameter(h.gaussian(24, 16)) for _ in range(2))
        ours = m.Muon([a], lr=0.02, nesterov=nesterov, mode="fast")
        theirs = torch.optim.Muon([b], lr=0.02, nesterov=nesterov)
        for step in range(4):
            for optimizer in (ours, theirs):
                h.step_with(optimizer, [h.gaussian(24, 16, seed=step + 5)])
        assert (a - b).abs().max() < 2e-3


def decay_is_unscaled(m):
    p = torch.nn.Parameter(torch.ones(64, 4))
    h.step_with(m.Muon([p], lr=0.1, weight_decay=0.5), [torch.zeros(64, 4)])
    assert torch.allclose(p, torch.tensor(0.95))


def caution(m):
    p0, G = h.gaussian(6, 9), h.gaussian(6, 9, seed=1)
    p = torch.nn.Parameter(p0.clone())
    options = {"lr": 0.1, "momentum": 0.0, "method": "svd", "cautious": True, "weight_decay": 0.5}
    h.step_with(m.Muon([p], **options), [G])
    update = h.exact(G).float()
    want = p0 - 0.05 * p0 * (update * p0 >= 0) - 0.1 * update
    assert torch.allclose(p, want, atol=1e-5)


def normuon_axis(m):
    G = h.gaussian(64, 16) * torch.linspace(0.1, 3, 64)[:, None]
    got = one_step(m, (64, 16), G, second_moment="row", scale="none", method="polar_express")
    plain = one_step(m, (64, 16), G, scale="none", method="polar_express")
    rms = got.square().mean(1)
    assert rms.max() / rms.min() < 1.001
    assert torch.allclose(got.norm(), plain.norm(), rtol=1e-4)


def adam_like_torch(m):
    a, b = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    options = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1, "eps": 1e-3}
    ours, theirs = m.Adam([a], **options), torch.optim.AdamW([b], **options)
    for step in range(5):
        for optimizer in (ours, theirs):
            h.step_with(optimizer, [h.gaussian(5, seed=step) / 100])
    assert torch.allclose(a, b, atol=1e-6)


def none_is_inert(m):
    p = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = m.Muon([p], lr=0.1, weight_decay=0.5)
    h.step_with(optimizer, [None])
    assert p.eq(1).all()


def nan_is_masked(m):
    for kind in (m.Muon, m.Adam):
        a, b = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
        optimizer = kind([a, b], lr=0.1)
        h.step_with(optimizer, [torch.full((8, 8), math.nan), torch.eye(8)])
        assert a.eq(1).all() and optimizer.state[a].keys() == optimizer.state[b].keys()
        assert all(t.isfinite().all() for t in optimizer.state[a].values())
        assert optimizer.nonfinite.tolist() == [True, False] and not b.eq(1).all()


def small_steps_survive_bf16(m):
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = m.Muon([p], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        h.step_with(optimizer, [torch.eye(8).bfloat16()])
    assert p.detach().diagonal().lt(0.995).all()


def outside_changes_win(m):
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = m.Muon([p], lr=1e-4, weight_decay=0.0)
    with torch.no_grad():
        p.fill_(5.0)
    h.step_with(optimizer, [torch.eye(8).bfloat16()])
    assert p.detach().gt(4.9).all()


def snapshots_are_copies(m):
    p = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = m.Muon([p])
    state = optimizer.state_dict()
    h.step_with(optimizer, [torch.eye(8)])
    assert state["state"]["0"]["momentum_buffer"].eq(0).all()


def waiting_gradients_add_up(m):
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = m.Adam([p], every=2, lr=0.1)
    for step in range(2):
        (p * (step + 1.0)).sum().backward()
        optimizer.step()
        assert p.grad.eq(3.0 if step else 1.0).all() and p.eq(0).all() == (step == 0)
        optimizer.zero_grad()
        assert p.grad.eq(0.0 if step else 1.0).all()


def split_views(m):
    G = h.gaussian(48, 16)
    got = one_step(m, (48, 16), G, split=3, scale="none", method="svd")
    want = torch.cat([h.exact(piece) for piece in G.split(16)])
    assert (got - want).abs().max() < 1e-4


def tables_are_refused(m):
    shapes = {"wte.weight": (64, 8), "w": (50304, 8), "gain": (8,), "experts": (2, 4, 4)}
    for name, shape in shapes.items():
        with pytest.raises(ValueError, match=name):
            m.Muon([(name, torch.nn.Parameter(torch.zeros(shape)))])


def balanced_plan(m):
    """GPT-2 124M on 8 ranks: perfect balance, no padding (the published stacks: 83% and 1.22x)."""
    shapes = [s for _ in range(12) for s in ((768, 768),) * 4 + ((3072, 768), (768, 3072))]
    cost = {768 * 768: 1.0, 768 * 3072: 3.0}
    items = [
        m.Item(n, str(n), s, 0, "whole", cost[math.prod(s)] * 13.59e9, order=1 - n / 72)
        for n, s in enumerate(shapes)
    ]
    plan = m.make_plan(items, 8)
    loads = plan.loads()
    assert max(loads) < 1.001 * sum(loads) / 8
    bytes_held = sum(bucket.num_bytes(8) for bucket in plan.buckets)
    assert bytes_held < 1.001 * 4 * sum(math.prod(s) for s in shapes)


# name, check, (old, new) ...
MUTATIONS = [
    ("scale from the kernel's dimensions", conv_scale,
     ("SCALES[scale](*p.shape[-2:])", "SCALES[scale](*param.shape[-2:])")),
    ("flatten mixes layers", layers_apart,
     ("update = steepest(update, norm, **options, mode=mode, eps=eps, products=products)",
      "update = steepest(update.flatten(0, -2), norm, **options).view_as(update)")),
    ("eps of 1e-7 in the norm", any_scale,
     ("eps: float = 0.0,\n    products", "eps: float = 1e-7,\n    products")),
    ("squares that overflow fp32", any_scale,
     ("if ((norm > 1e-9) & (norm < 1e9)).all():", "if True:")),
    ("zero over zero", zeros_stay,
     ("_norm(G, dim).clamp(min=max(eps, 2.0**-126))", "_norm(G, dim)")),
    ("the coefficients that step uphill", maps_positive_and_bounded,
     ("return polar_express(steps), 1.02", f"return {h.REVERSED_LIST!r}, 1.0")),
    ("no safety: the cliff just above 1", maps_positive_and_bounded,
     ("safety: float = 1.02, cushion: float = 0.02", "safety: float = 1.0, cushion: float = 0.0")),
    ("norm without the coefficients' safety", maps_positive_and_bounded,
     ("return polar_express(steps), 1.02", "return polar_express(steps), 0.99")),
    ("bf16 by default", noise_at_rank_8,
     ("return torch.float16 if device.type == \"cuda\" else", "return torch.bfloat16 if 1 else")),
    ("rounded in bf16 from the start", noise_at_rank_8,
     ("for triple in polynomials[step:]) < 64", "for triple in polynomials[step:]) < 1e9")),
    ("bf16 products that nothing computes", emulation_avoided,
     ("if mode == \"fast\" and (device.type != \"cpu\" or bf16_units())", "if mode == \"fast\"")),
    ("fp32 products without the units to round them", emulation_avoided,
     ("units = X.device.type == \"cpu\" and bf16_units()", "units = True")),
    ("small matrices rounded by their number", one_matrix_one_norm,
     ("min(X.shape[-2:]) > 64", "True")),
    ("the long side iterated", short_side,
     ("tall = G.shape[-2] > G.shape[-1]", "tall = False")),
    ("one norm for the whole batch", one_matrix_one_norm,
     ("normalize(X, (-2, -1), safety, eps)", "normalize(X, tuple(range(X.ndim)), safety, eps)")),
    ("momentum normalised in place", buffers_unaliased,
     ("    options = {\"method\": method, \"steps\": ns_steps",
      "    update.div_(update.norm())\n    options = {\"method\": method, \"steps\": ns_steps")),
    ("the gradient blended in place", gradient_untouched,
     ("B = _mix(grad, momentum_buffer, momentum, out[1])",
      "B = grad.lerp_(momentum_buffer, momentum)")),
    ("one Nesterov form for both momenta", forms_agree,
     ("update = _minus(grad, B, -momentum) if nesterov else B",
      "update = _mix(grad, B, momentum) if nesterov else B")),
    ("Nesterov dropped", drop_in,
     ("update = _mix(grad, B, momentum) if nesterov else B", "update = B")),
    ("decay scaled by the shape", decay_is_unscaled,
     ("keep = 1 - lr * weight_decay *", "keep = 1 - lr * scale * weight_decay *")),
    ("caution turned round", caution, ("else agree >= 0", "else agree <= 0")),
    ("NorMuon over the wrong axis", normuon_axis,
     ("    return {**options, \"rule\": rule}",
      "    swap = {\"row\": \"col\", \"col\": \"row\"}.get(options.get(\"second_moment\"))\n"
      "    return {**options, \"rule\": rule, \"second_moment\": swap}")),
    ("NorMuon without its norm", normuon_axis,
     ("X * (weight * before / after.clamp(min=1e-30)).sqrt(), v", "X * weight.sqrt(), v")),
    ("no bias correction", adam_like_torch, ("update = exp_avg / correct1", "update = exp_avg")),
    ("eps inside the root", adam_like_torch,
     ("(exp_avg_sq / correct2).sqrt_() + eps", "(exp_avg_sq / correct2 + eps).sqrt_()")),
    ("a missing gradient counted as zeros", none_is_inert,
     ("live.flags[owner, flag].zero_()", "pass")),
    ("no mask", nan_is_masked, (" + 0 * live.sums", "")),
    ("no master copy", small_steps_survive_bf16,
     ("spec = {\"master\": (size, wide)} if dtype != wide else {}", "spec = {}")),
    ("a stale master copy", outside_changes_win,
     ("master.copy_(torch.where(same, master, param.to(wide)))", "pass")),
    ("state_dict hands out its own tensors", snapshots_are_copies,
     ("t.copy_(live.runs[number].state[name])", "t = live.runs[number].state[name]"),
     ("= t[k].clone()", "= t[k]")),
    ("waiting gradients dropped", waiting_gradients_add_up,
     ("if self.calls % live.plan.every == 0:\n                live.grads.zero_()",
      "if True:\n                live.grads.zero_()")),
    ("fused matrices orthogonalised whole", split_views,
     ("    if split is None:\n        return", "    if split or split is None:\n        return")),
    ("anything goes into Muon", tables_are_refused,
     ("    if group[\"rule\"] == \"adam\":\n        return\n    adam", "    return\n    adam")),
    ("owners by count, not by cost", balanced_plan,
     ("loads[rank] += item.cost", "loads[rank] += 1"),
     ("key=lambda i: (-i.cost, -i.numel, i.order, i.index)", "key=lambda i: i.index")),
]  # fmt: skip


@pytest.mark.parametrize("check", sorted({m[1] for m in MUTATIONS}, key=lambda c: c.__name__))
def test_the_true_module_passes(check):
    check(load())


@pytest.mark.parametrize("name, check, edits", [(m[0], m[1], m[2:]) for m in MUTATIONS])
def test_every_mutation_is_caught(name, check, edits):
    mutant = load(name, *edits)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(mutant)


# ------------------------------------------------------------------------------ on two ranks


def slow_collectives(m):
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
            work = function(value, source, group=group, async_op=True)
            return Late(work, out, value) if async_op else Late(work, out, value).wait()

        return call

    m._reduce_scatter, m._all_gather = late(m._reduce_scatter), late(m._all_gather)


def two_rank_training(m, rank, world_size, group=None):
    """Parameters after three steps of the mixed model plus a NaN for one row of its table."""
    m.ROWS_FROM = 4000
    params = h.mixed_params(seed=0 if group or rank == 0 else 3)
    optimizer = h.mixed_optimizer(m, params, process_group=group, num_buckets=3)
    h.mixed_train(optimizer, params, range(3), rank, world_size)
    for p in params.values():
        p.grad.zero_()
    if rank == 0:
        params["table"].grad[0, 0] = math.nan
    optimizer.step()
    return h.values(params)


RANK_MUTATIONS = [
    ("the gather is never waited for", ("                live.gather.wait()\n", "")),
    ("the reduction is never waited for", ("            work.wait()\n", "            pass\n")),
    ("every rank keeps its own gradient",
     ("        if self._everyone is None:\n            return\n        if live.sent",
      "        live.grad_shard.copy_(live.grads[: len(live.grad_shard)])\n        return\n"
      "        if live.sent")),
    ("NorMuon's norm per shard",
     ("    before, after = (x.sum((-2, -1), keepdim=True) for x in (squares, squares * weight))",
      "    part = slice(0, X.shape[-2] // dist.get_world_size())\n"
      "    before, after = (x[..., part, :].sum((-2, -1), keepdim=True) "
      "for x in (squares, squares * weight))")),
    ("a NaN masks only the shard it is in",
     ("live.flags.add_(largest * self.num_ranks * 0.0)", "pass")),
    ("ranks start from their own weights",
     ("dist.broadcast(live.params, group=self._everyone, group_src=0)", "pass")),
    ("matrices cut between ranks, then orthogonalised",
     ('        return "rows" if stack and item.cost > fair else "whole"',
      '        plain = len(item.shape) == 2 and not item.shape[0] % 2 and not group["split"]\n'
      '        return "rows" if several and plain and not group["second_moment"] else "whole"')),
]  # fmt: skip


def run_mutants(rank, world_size, path):
    import torch.distributed as dist

    own = dist.new_group([rank], use_local_synchronization=True)
    true = load()
    reference = two_rank_training(true, 0, 1, own)
    results = {}
    for name, *edits in [("true",), *RANK_MUTATIONS]:
        mutant = load(name, *edits)
        slow_collectives(mutant)
        results[name] = two_rank_training(mutant, rank, world_size)
        time.sleep(0.01 * rank)
        dist.barrier()
    torch.save((reference, results), f"{path}/rank{rank}")


@pytest.mark.ranks
def test_every_mutation_that_only_ranks_can_show_is_caught(tmp_path):
    h.run_ranks(2, tmp_path, run_mutants, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    for name in ["true", *(m[0] for m in RANK_MUTATIONS)]:
        right = all(h.same(results[name], reference) for reference, results in ranks)
        assert right == (name == "true"), name
