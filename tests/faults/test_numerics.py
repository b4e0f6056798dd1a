"""Numbers that go wrong: who notices, who is named, and that no parameter moves."""

import math

import pytest
import torch

import train_gpt
from faults.helpers import body_of, checkpoints, logs_in, result_of, same, state_of
from muon import Muon

NEWEST = ("--record", "62", "--num_iterations", "16", "--seq_len", "384", "--batch_tokens", "1536",
          "--num_layers", "4", "--val_tokens", "1024", "--val_every", "16")


def model_of(path) -> dict:
    return state_of(path)["model"]


def assert_stopped_before_update(folder, step: int) -> str:
    """The run failed at `step` (0-based) and its parameters are those from before; the log."""
    log = logs_in(folder)[-1]
    result = result_of(log)
    assert result["status"] == "failed" and result["reached"] is False
    kept = checkpoints(folder)
    assert max(kept) == step  # nothing that came after the bad step was kept
    assert same(model_of(log.with_suffix(".pt")), model_of(kept[step]))
    assert f"bad step {step + 1}, no update was made" in body_of(log)
    return body_of(log)


# 1e38 is finite, and so is its orthogonal update; but its square is not, and Adam would divide by
# it for ever.
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e38"])
def test_N1_N3_a_bad_gradient_moves_no_parameter(train, broken, value):
    broken(f"gradient:0:4:{value}")
    ran = train("--record", "6", "--checkpoint_every", "4")
    assert ran.code == 1
    text = assert_stopped_before_update(ran.folder, 4)
    shown = "nan" if value == "nan" else "inf"
    assert f"rank 0: gradient of blocks.0.mlp.fc.weight (norm {shown})" in text
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_N2_a_bad_loss_moves_no_parameter(train, broken, value):
    """Even where all gradients are finite."""
    broken(f"loss:0:4:{value}")
    ran = train("--record", "6", "--checkpoint_every", "4")
    assert ran.code == 1
    text = assert_stopped_before_update(ran.folder, 4)
    assert f"rank 0: loss {value}" in text and "gradient of" not in text


def test_N1_with_all_ideas_of_the_newest_recipe(train, broken):
    broken("gradient:0:8:nan")
    ran = train(*NEWEST, "--checkpoint_every", "8")
    assert ran.code == 1
    assert_stopped_before_update(ran.folder, 8)


def test_N1_in_the_last_step(train, broken):
    """There is no later step to hear of it in: the run must not end as complete."""
    broken("gradient:0:5:nan")
    ran = train("--record", "6", "--checkpoint_every", "5")
    assert ran.code == 1
    assert_stopped_before_update(ran.folder, 5)
    assert "step:6/6 val_loss" not in ran.out


def test_a_run_goes_on_from_before_the_bad_step(train, monkeypatch):
    from faults.inject import Broken

    whole = train("--checkpoint_every", "6", folder="whole")
    with monkeypatch.context() as patch:
        Broken(["gradient:0:4:nan"], patch.setattr)
        assert train("--checkpoint_every", "3").code == 1
    ran = train("--checkpoint_every", "6", "--resume", "auto")
    assert ran.code == 0 and "step 3" in ran.out
    assert same(model_of(checkpoints(ran.folder)[6]), model_of(checkpoints(whole.folder)[6]))


@pytest.mark.ranks
@pytest.mark.parametrize("fault, says, collective", [
    ("gradient:1:4:nan", "rank 1: gradient of blocks.0.mlp.fc.weight (norm nan)", "all_reduce"),
    ("gradient:1:4:nan", "rank 1: gradient of blocks.0.mlp.fc.weight (norm nan)",
     "reduce_scatter"),
    ("loss:1:4:inf", "rank 1: loss inf", "all_reduce"),  # which does not travel with gradients
])
def test_N1_N2_all_ranks_stop_together_and_the_one_is_named(ranks, tmp_path, fault, says,
                                                           collective):
    with ranks(2, "--record", "6", "--checkpoint_every", "4", "--grad_collective", collective,
               faults=(fault,)) as two:
        assert two.wait() == [1, 1], two.said()
    text = assert_stopped_before_update(tmp_path / "logs", 4)
    assert says in text and "rank 0: " not in text
    assert "Traceback" not in two.said(0) + two.said(1)


def test_the_gate_does_not_change_a_good_step(tiny_data):
    """The same bits as without."""
    from conftest import tiny_options
    from trainer import options

    _, recipe = options.parse(tiny_options("--record", "6"), has_cuda=False)
    world = train_gpt.World(0, 0, 1, torch.device("cpu"))
    models = []
    for watched in (False, True):
        model = train_gpt.build_model(recipe, 0, world.device)
        status = train_gpt.StepStatus(world, model.named_parameters()) if watched else None
        optimizer = train_gpt.build_optimizer(model, recipe)
        if watched:
            optimizer.gate = status.gate
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            tokens = torch.randint(257, (12, 33), generator=generator)
            batch = train_gpt.Batch(tokens[:, :-1].int(), tokens[:, 1:])
            for group in optimizer.param_groups:
                group.update(train_gpt.recipes.group_schedule(3, group["name"], recipe))
            train_gpt.train_step(model, optimizer, recipe, batch, 5, 384, status)
        models.append(model.state_dict())
    assert same(*models)


def test_a_bad_step_in_the_warm_up_leaves_the_gate_open(tiny_data):
    """Else every step of the run would be void, and nobody would say so."""
    from conftest import tiny_options
    from trainer import options

    _, recipe = options.parse(tiny_options("--record", "6", "--matrix_lr", "1e30"), has_cuda=False)
    files = {part: sorted(tiny_data.glob(f"*{part}*.bin")) for part in ("train", "val")}
    data = train_gpt.Data(files["train"], files["val"], 256, "digest")
    world = train_gpt.World(0, 0, 1, torch.device("cpu"))
    model = train_gpt.build_model(recipe, 0, world.device)
    status = train_gpt.StepStatus(world, model.named_parameters())
    optimizer = train_gpt.build_optimizer(model, recipe)
    optimizer.gate = status.gate
    shut = []
    original = status.reset
    status.reset = lambda: (shut.append(not status.gate.item()), original())
    train_gpt.warm_up(model, optimizer, recipe, data, world, 100, status)
    assert shut == [True] and optimizer.gate.item() is True
    tokens = torch.randint(257, (12, 33), generator=torch.Generator().manual_seed(1))
    batch = train_gpt.Batch(tokens[:, :-1].int(), tokens[:, 1:])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_gpt.train_step(model, optimizer, recipe, batch, 100, 384, status)
    assert not same(before, model.state_dict())


def test_nothing_reads_the_device_between_two_steps(tiny_data, monkeypatch):
    """reduce() must not wait for the device: no .item(), .tolist(), bool() of a tensor."""
    world = train_gpt.World(0, 0, 1, torch.device("cpu"))
    layer = torch.nn.Linear(4, 4)
    status = train_gpt.StepStatus(world, layer.named_parameters())

    def forbidden(*_):
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    loss = layer(torch.ones(2, 4)).sum()
    loss.backward()
    status.take_norms()
    status.reduce(loss.detach(), torch.zeros(()), False)
    monkeypatch.undo()
    assert status.gate.item() is True


def test_N4_a_zero_gradient_matrix_changes_nothing():
    weight = torch.nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    optimizer = Muon([{"params": [("w", weight)], "lr": 0.1, "weight_decay": 0.0}])
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.equal(weight, before) and not optimizer.nonfinite.any()


@pytest.mark.parametrize("options", [
    ("--matrix_lr", "3.6e16", "--embed_lr", "3.6e17", "--head_lr", "3.6e17"),  # LR x 1e20
])
def test_N5_an_absurd_learning_rate_stops_the_run(train, options):
    ran = train("--record", "6", *options)
    result = result_of(ran.logs[0])
    assert ran.code == 1 and result["status"] == "failed"
    assert "bad step" in ran.out
    step = int(ran.out.split("bad step ")[1].split(",")[0])
    assert step <= 4
    saved = model_of(ran.logs[0].with_suffix(".pt"))
    assert all(t.isfinite().all() for t in saved.values())


@pytest.mark.ranks
def test_N6_a_parameter_that_drifts_on_one_rank_is_reported(ranks, tmp_path):
    """Looked for at each validation, where the clock stands still."""
    with ranks(2, "--record", "6", faults=("nudge:1:2",)) as two:
        assert two.wait() == [1, 1], two.said()
    (log,) = logs_in(tmp_path / "logs")
    assert "ranks drifted apart before step 3: embed.weight on rank 1" in body_of(log)
    assert result_of(log)["status"] == "failed"


@pytest.mark.parametrize("x, w", [(0.0, 0.0), (0.0, 1.0), (1e30, 1.0), (1.0, 1e30)])
def test_N7_fp8_gives_no_nan(x, w):
    """All zeros (an amax of 0) and values far beyond e4m3's 448."""
    from kernels.loss import Softcap, head_loss

    x_NC = torch.full((16, 32), x, requires_grad=True)
    w_VC = torch.full((16, 32), w, requires_grad=True)
    try:
        loss = head_loss(x_NC, w_VC, torch.arange(16)[:, None], torch.ones(1), Softcap(),
                         torch.float32, (1.0, 1.0, 1.0))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no fp8 products here: {error}")
    loss.backward()
    for t in (loss, x_NC.grad, w_VC.grad):
        assert t.isfinite().all()


def test_validation_that_is_not_finite_is_not_a_complete_run(train, monkeypatch):
    monkeypatch.setattr(train_gpt, "evaluate", lambda *_: math.nan)
    ran = train()
    assert ran.code == 1 and "validation loss nan after step 0" in ran.out
    assert result_of(ran.logs[0])["status"] == "failed"
