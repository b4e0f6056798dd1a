"""Every rung trains: through all its stages, on several ranks alike, in one graph a block."""

import math

import pytest
import torch

import recipes
import train_gpt
from conftest import tiny_options
from data.loader import Batch
from model import GPT, parameter_entry
from recipes import RECORDS
from records.log import parse
from trainer import options

LADDER = list(RECORDS)
# Rows long enough for windows and documents; one layer of each kind.
SMALL = ("--num_layers", "4", "--seq_len", "64", "--batch_tokens", "256", "--val_tokens", "1024",
         "--val_seq_len", "64")


def small(record: int, *extra: str) -> recipes.Recipe:
    recipe = recipes.pocket(RECORDS[record])
    stages = recipe.batch_stages and ("--batch_stages", "128,192,256")
    return options.parse([*tiny_options("--record", record, *SMALL, *(stages or ()), *extra)],
                         has_cuda=False)[1]


def batches(recipe: recipes.Recipe):
    """Learnable rows: each byte follows the one before by one or two, documents of 40 tokens."""
    generator = torch.Generator().manual_seed(0)
    for step in range(recipe.num_iterations):
        rows, T = recipes.batch_shape(step, recipe)
        walk = torch.randint(1, 3, (rows, T + 1), generator=generator).cumsum(1) % 256
        walk[:, ::40] = 256
        yield Batch(walk[:, :-1].int(), walk[:, 1:])


@pytest.mark.parametrize("record", LADDER)
def test_a_rung_trains_through_all_its_stages(record):
    recipe = small(record, "--num_iterations", "24")
    model = train_gpt.build_model(recipe, 0, torch.device("cpu"))
    optimizer = train_gpt.build_optimizer(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, stages = [], []
    for step, batch in enumerate(batches(recipe)):
        recipes.enter_phase(model, optimizer, recipes.phase(step, recipe))
        stages.append(model.phase)
        for group in optimizer.param_groups:
            group.update(recipes.group_schedule(step, group["name"], recipe))
        train_gpt.train_step(model, optimizer, recipe, batch, 4 * batch.inputs_BT.size(1),
                             batch.inputs_BT.numel())
        model.set_phase(recipes.eval_phase(step, recipe))
        with torch.no_grad():
            losses.append(model(batch.inputs_BT, batch.targets_BT).item() / batch.inputs_BT.numel())
        model.set_phase(stages[-1])
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0] - 0.1
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    changes = len({(s.window, s.short_window) for s in stages})
    assert changes >= {0: 1, 1: 3}[bool(recipe.window_stages)]


@pytest.mark.parametrize("record", [9, 10, 19, 53, 62])
def test_a_rung_trains_in_the_precision_of_its_record(record):
    """bf16 products, stream and tables, fp8 head: all of it runs on a CPU, slowly."""
    full = RECORDS[record]
    precision = {name: getattr(full.model, name) for name in (
        "compute_dtype", "stream_dtype", "embed_dtype", "head_dtype", "head")}
    recipe = recipes.edit(small(record, "--num_iterations", "6"), muon_mode="fast", **precision)
    model = train_gpt.build_model(recipe, 0, torch.device("cpu"))
    optimizer = train_gpt.build_optimizer(model, recipe)
    assert model.embed.weight.dtype == (torch.bfloat16 if record >= 10 else torch.float32)
    stream = []
    model.blocks[1].register_forward_hook(lambda module, given, out: stream.append(out.dtype))
    losses = []
    for step, batch in enumerate(batches(recipe)):
        recipes.enter_phase(model, optimizer, recipes.phase(step, recipe))
        for group in optimizer.param_groups:
            group.update(recipes.group_schedule(step, group["name"], recipe))
        with torch.no_grad():
            model.eval()
            losses.append(model(batch.inputs_BT, batch.targets_BT).item() / batch.inputs_BT.numel())
            model.train()
        train_gpt.train_step(model, optimizer, recipe, batch, 4 * batch.inputs_BT.size(1),
                             batch.inputs_BT.numel())
    assert losses[-1] < losses[0] and math.isfinite(losses[-1])
    assert set(stream) == {torch.bfloat16 if record >= 10 else torch.float32}


def test_the_embedding_of_53_is_the_heads_until_it_leaves():
    recipe = small(53, "--num_iterations", "24")
    model = train_gpt.build_model(recipe, 0, torch.device("cpu"))
    optimizer = train_gpt.build_optimizer(model, recipe)
    leaves = recipes.untie_step(recipe)
    for step, batch in enumerate(batches(recipe)):
        if step == leaves:
            table = model.lm_head.weight.detach().clone()
        recipes.enter_phase(model, optimizer, recipes.phase(step, recipe))
        if step == leaves:
            assert torch.equal(model.embed.weight, table)
        train_gpt.train_step(model, optimizer, recipe, batch, 4 * batch.inputs_BT.size(1),
                             batch.inputs_BT.numel())
    assert not torch.equal(model.embed.weight, model.lm_head.weight)


def test_clipping_bounds_the_norm_of_all_gradients():
    recipe = small(1)
    model = train_gpt.build_model(recipe, 0, torch.device("cpu"))
    model.unused = torch.nn.Parameter(torch.ones(2))  # has no gradient
    batch = next(batches(recipe))

    def norm_after(largest: float) -> float:
        model.zero_grad()
        model(batch.inputs_BT, batch.targets_BT).backward()
        train_gpt.clip_gradients(model, largest)
        assert model.unused.grad is None
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return math.sqrt(sum(grad.square().sum().item() for grad in grads))

    free = norm_after(1e9)
    assert norm_after(0.5 * free) == pytest.approx(0.5 * free, rel=1e-4)
    assert norm_after(2 * free) == pytest.approx(free, rel=1e-6)


@pytest.mark.parametrize("record", [1, 21, 27, 62])
def test_gradients_are_in_the_records_unit_and_losses_in_nats_per_token(record, monkeypatch):
    """The summed loss over the step's tokens, or over 8 from #22 on, in every batch of a growing
    one; `grad_clip` always means the mean loss's gradient."""
    recipe = recipes.edit(small(record, "--num_iterations", "4"), grad_clip=None)
    model = train_gpt.build_model(recipe, 0, torch.device("cpu"))
    optimizer = train_gpt.build_optimizer(model, recipe)
    status = train_gpt.StepStatus(train_gpt.World(0, 0, 1, torch.device("cpu")),
                                  model.named_parameters())
    seen = []
    monkeypatch.setattr(optimizer, "step", lambda: seen.append(
        [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]))
    steps = list(enumerate(batches(recipe)))
    sizes = {batch.inputs_BT.numel() for _, batch in steps}
    assert len(sizes) == (3 if record == 62 else 1)
    for step, batch in steps:
        recipes.enter_phase(model, optimizer, recipes.phase(step, recipe))
        tokens = batch.inputs_BT.numel()
        loss = model(batch.inputs_BT, batch.targets_BT)
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True,
                                    materialize_grads=True)
        unit = tokens if record < 22 else 8
        train_gpt.train_step(model, optimizer, recipe, batch, tokens // 2, tokens, status)
        optimizer.zero_grad()
        norm = math.sqrt(sum(g.square().sum().item() for g in grads)) / unit
        for ours, theirs in zip(seen[-1], grads):
            assert (ours - theirs / unit).norm().item() < 1e-4 * norm
        status.send(step, 0.0)
        assert status.receive().loss == pytest.approx(loss.item() / tokens, rel=1e-5)
    clipped = recipes.edit(recipe, grad_clip=0.25 * norm * unit / tokens)
    train_gpt.train_step(model, optimizer, clipped, batch, tokens, tokens)
    total = math.sqrt(sum(g.square().sum().item() for g in seen[-1]))
    assert total == pytest.approx(0.25 * norm, rel=1e-3)


@pytest.mark.ranks
@pytest.mark.parametrize("record", [1, 19, 62])
def test_ranks_agree_where_a_record_has_its_own_way(train, tmp_path, record):
    """#1 clips all gradients together, #19 reduces after the backward pass, #62 has every stage."""
    def run(nproc: int):
        stages = ("--batch_stages", "128,192,256") if record == 62 else ()
        done, (log,) = train("--record", record, *SMALL, *stages, "--num_iterations", "8",
                             nproc=nproc, log_dir=tmp_path / str(nproc))
        assert done.returncode == 0, done.stderr
        (run,) = parse(log)
        return [point.val_loss for point in run.points]

    assert run(2) == pytest.approx(run(1), abs=3e-4)


# What dynamo itself does while it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("record", [2, 15, 62])
def test_a_block_is_one_graph_and_alike_blocks_share_it(record):
    """No break inside a block, and windows that move cost shapes only."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    recipe = small(record)
    model = recipes.build_model(recipe, 0)
    counter = CompileCounterWithBackend("eager")
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=counter)
    tokens = torch.randint(256, (2, 64))
    for _ in range(2):
        model(tokens, tokens).backward()
    assert counter.frame_count <= 4 and (record != 2 or counter.frame_count == 1)
    torch._dynamo.reset()


def test_every_role_of_the_ladder_is_used():
    used = set()
    for recipe in RECORDS.values():
        with torch.device("meta"):
            model = GPT(recipes.pocket(recipe).model)
        used |= {parameter_entry(name, model.config)[0] for name, _ in model.named_parameters()}
    assert used == set(recipes.ROLES)
