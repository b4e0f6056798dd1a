"""Compiled in pieces of one layer, several or all, the model computes what it did, and a schedule
that moves does not compile again."""

import pytest
import torch
from torch._dynamo.utils import counters

import recipes
import train_gpt
from conftest import tiny_options
from data.loader import Batch
from trainer import options
from trainer.compile import compile_ahead, compile_segments
from trainer.dist import World
from trainer.memory import micro_batches

# torch's tracer warns of what it does itself
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning",
                                        "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    limits = torch._dynamo.config.fail_on_recompile_limit_hit, torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    (torch._dynamo.config.fail_on_recompile_limit_hit,
     torch._dynamo.config.recompile_limit) = limits


def recipe_of(record, *extra):
    if record in (62, 89):
        extra = (*extra, "--batch_stages", "192,384,384")
    return options.parse(tiny_options("--record", record, *extra), has_cuda=False)[1]


def rows(recipe, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(257, (2, 2, recipe.model.seq_len), generator=generator)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(batch[0].int(), batch[1])
    loss.backward()
    return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters()
                           if p.grad is not None}


@pytest.mark.parametrize("record, num_layers", [
    (1, 3), (6, 1), (6, 0), (12, 3), (62, 1), (89, 1), (89, 3), (89, 0)])
def test_segments_of_any_length_compute_the_same(record, num_layers):
    recipe = recipe_of(record, "--num_layers", 4)
    model, batch = recipes.build_model(recipe, seed=0), rows(recipe)
    model.set_phase(recipes.phase(0, recipe))
    loss, gradients = loss_and_gradients(model, batch)
    compile_segments(model, num_layers, backend="aot_eager")
    assert [i for layers in model.segments for i in layers] == list(range(4))
    compiled_loss, compiled = loss_and_gradients(model, batch)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    assert compiled.keys() == gradients.keys()
    scale = max(g.abs().max() for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6 * scale,
                                   msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("record", [6, 89])
def test_layers_of_one_graph_may_be_computed_again(record):
    recipe = recipe_of(record, "--num_layers", 4)
    model, batch = recipes.build_model(recipe, seed=0), rows(recipe)
    model.set_phase(recipes.phase(0, recipe))
    loss, gradients = loss_and_gradients(model, batch)
    model.recomputed = 2
    compile_segments(model, 0, backend="aot_eager")
    again, compiled = loss_and_gradients(model, batch)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("record, num_layers, expected", [
    (6, 0, [1]), (12, 0, [1]), (62, 0, [2]),    # of #62 the output for the end too
    (12, 4, [4, 1, 1])])                        # skips from layers 0 to 3 into 9 to 6
def test_a_graph_of_layers_returns_what_is_read_behind_it(record, num_layers, expected):
    """An output more is a gradient of zeros more, as large as the stream."""
    outputs = []

    def backend(graph, inputs):
        outputs.append(len(graph.graph.output_node().args[0]))
        return graph.forward

    recipe = recipe_of(record, "--num_layers", 11)
    model = recipes.build_model(recipe, seed=0)
    model.set_phase(recipes.phase(0, recipe))
    compile_segments(model, num_layers, backend=backend)
    loss_and_gradients(model, rows(recipe))
    assert outputs[1:1 + len(expected)] == expected     # behind the start


def test_alike_layers_share_a_graph():
    """Else every layer is compiled, and a 12-layer model takes minutes to start."""
    model = recipes.build_model(recipe_of(6, "--num_layers", 8), seed=0)
    compile_segments(model, backend="aot_eager")
    loss_and_gradients(model, rows(recipe_of(6)))
    assert counters["stats"]["unique_graphs"] == 4  # start, a layer, end, head


def test_the_first_layer_shares_its_graph_with_another_of_its_kind():
    """What enters it is x0, which it is given besides: twice the same tensor would be a kind."""
    recipe = recipe_of(62, "--num_layers", 11)
    model = recipes.build_model(recipe, seed=0)
    model.set_phase(recipes.phase(0, recipe))
    kinds = {(layer.keys, layer.value_table is None, layer.skip_from is None, block.attn is None,
              block.mlp is None) for layer, block in zip(model.plan, model.blocks)}
    compile_segments(model, backend="aot_eager")
    loss_and_gradients(model, rows(recipe))
    assert len(kinds) == 7
    assert counters["stats"]["unique_graphs"] == 1 + len(kinds) + 1 + 1  # start, end, head


@pytest.mark.parametrize("record", [6, 12, 89])
def test_graphs_are_such_as_the_compilers_cache_keeps(record):
    """It keeps none with an autograd.Function inside: then each start would compile again."""
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    recipe = recipe_of(record, "--num_layers", 3)
    model = recipes.build_model(recipe, seed=0)
    compile_segments(model, backend=backend)
    loss_and_gradients(model, rows(recipe))
    assert any("linear" in target for target in targets)
    assert not [target for target in targets if "autograd_function" in target]


@pytest.mark.parametrize("record", [24, 89])
def test_a_schedule_that_moves_builds_no_graph_that_the_warm_up_did_not(record):
    """Windows, rotary tables, targets and tying change while training; what a layer is given is a
    tensor or None for that reason."""
    recipe = recipe_of(record, "--num_iterations", 40, "--num_layers", 3)
    model = recipes.build_model(recipe, seed=0)
    compile_segments(model, backend="aot_eager")
    for step in [0, *recipes.phase_steps(recipe)]:
        model.set_phase(recipes.phase(step, recipe))
        loss_and_gradients(model, rows(recipe))
    graphs, windows = counters["stats"]["unique_graphs"], set()
    for step in range(recipe.num_iterations):
        model.set_phase(recipes.phase(step, recipe))
        windows.add(model.phase.window)
        loss_and_gradients(model, rows(recipe, seed=step))
    assert len(windows) > 1
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("record, rows", [(6, 4), (89, 1)])
def test_nothing_is_compiled_while_the_clock_runs(record, rows, tiny_data, tmp_path, monkeypatch):
    """One row a rank, as on eight GPUs, and several."""
    monkeypatch.setattr(train_gpt, "compile_segments", lambda model, num_layers:
                        compile_segments(model, num_layers, backend="aot_eager"))
    stages = ["--batch_stages", f"{16 * rows},{32 * rows},{32 * rows}"] if record == 89 else []
    words = tiny_options("--record", record, "--compile", "on", "--compile_optimizer", "off",
                         "--batch_tokens", 32 * rows, "--num_layers", 3, *stages,
                         "--data_dir", tiny_data, "--log_dir", tmp_path)
    assert train_gpt.main(words) == 0
    assert counters["stats"]["unique_graphs"] > 4
    log, = tmp_path.glob("*.txt")
    assert "graphs_in_clock:0" in log.read_text().replace(" ", "")


def test_the_compiled_optimizer_of_the_newest_record_is_the_eager_one():
    """With bf16 tables and their master copies, cautious decay, NorMuon, Adam on every second step
    and scalars that rest; what moves with the schedule compiles nothing again."""
    recipe = recipe_of(62, "--num_layers", 4, "--num_iterations", 24, "--embed_dtype", "bf16",
                       "--head_dtype", "bf16")
    models = [recipes.build_model(recipe, seed=0) for _ in range(2)]
    optimizers = [train_gpt.build_optimizer(model, recipe, compiled=compiled)
                  for model, compiled in zip(models, (False, True))]
    start = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    generator, graphs = torch.Generator().manual_seed(0), 0
    for step in range(recipe.num_iterations):
        grads = {name: torch.randn(p.shape, generator=generator) for name, p in start.items()}
        for model, optimizer in zip(models, optimizers):
            recipes.enter_phase(model, optimizer, recipes.phase(step, recipe))
            for group in optimizer.param_groups:
                group.update(recipes.group_schedule(step, group["name"], recipe))
            for name, p in model.named_parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.add_(grads[name].to(p.dtype))
            optimizer.step()
            optimizer.zero_grad()
        if step == 3:
            graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs
    for (name, eager), compiled in zip(models[0].named_parameters(), models[1].parameters()):
        moved = (eager.double() - start[name].double()).norm()
        apart = (eager.double() - compiled.double()).norm()
        assert moved > 0 and apart < (1e-2 if eager.dtype == torch.bfloat16 else 1e-3) * moved, name


def test_ranks_of_a_machine_begin_to_compile_with_different_stages(monkeypatch):
    """And each ends with all graphs that training and validation need, and without gradients."""
    recipe = recipe_of(62, "--num_iterations", 24)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    orders = []
    for rank in range(2):
        torch._dynamo.reset()
        counters.clear()
        world = World(rank, rank, 2, torch.device("cpu"))
        model = recipes.build_model(recipe, seed=0)
        order, forward = [], model.forward
        compile_segments(model, backend="aot_eager")

        def seen(inputs_BT, *rest, order=order, forward=forward, model=model):
            order.append((tuple(inputs_BT.shape), model.training))
            return forward(inputs_BT, *rest)

        monkeypatch.setattr(model, "forward", seen)
        compile_ahead(model, recipe, world, micro_tokens=64)
        assert all(p.grad is None for p in model.parameters())
        graphs = counters["stats"]["unique_graphs"]
        for step in recipes.phase_steps(recipe):
            model.set_phase(recipes.phase(step, recipe))
            num_rows, seq_len = recipes.batch_shape(step, recipe)
            tokens = torch.randint(257, (2, num_rows // 2, seq_len))
            batch = Batch(tokens[0].int(), tokens[1], None)
            for part in micro_batches(batch, 64):
                model(*part).backward()
        assert counters["stats"]["unique_graphs"] == graphs
        orders.append(order)
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert {training for _, training in orders[0]} == {True, False}
