"""Recipe `norms`: every layer moves by the learning rate in its own norm, whatever its width."""

import math

import numpy as np
import pytest
import torch

import recipes
import train_gpt
from model import num_parameters
from muon import Muon
from records.log import parse


def trained_once(width: int, tokens: torch.Tensor, num_steps: int = 1):
    """Model after `num_steps` on `tokens`, its weights before the last of them, the optimizer."""
    recipe = recipes.edit(recipes.pocket(recipes.RECIPES["norms"]), num_layers=2, num_heads=2,
                          head_dim=width // 2)
    model = recipes.build_model(recipe, seed=0)
    with torch.no_grad():
        for p in model.parameters():  # no zeros that keep gradients from the rest
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / width)
    optimizer = train_gpt.build_optimizer(model, recipe)
    for row in tokens[:num_steps]:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        (model(row[None, :-1], row[None, 1:]) / (len(row) - 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before, optimizer


@pytest.mark.parametrize("width", [32, 64])
def test_a_step_moves_every_matrix_by_its_rate_in_its_norm(width):
    tokens = torch.randint(100, (1, 65), generator=torch.Generator().manual_seed(0))
    model, before, optimizer = trained_once(width, tokens)
    assert {group["rule"] for group in optimizer.param_groups} == {"muon"}
    moved = 0
    for group in optimizer.param_groups:
        rate = group["lr"] * group["multiplier"]
        for name, p in zip(group["param_names"], group["params"]):
            step = (p.detach().double() - before[name].double()).numpy()
            moved += p.numel()
            if name == "embed.weight":  # RMS of the row of a token, of those that came
                seen = np.isin(np.arange(len(step)), tokens[0, :-1].numpy())
                rms = np.sqrt(np.square(step).mean(1))
                assert rms[seen] == pytest.approx(rate, rel=1e-3)
                assert not rms[~seen].any()
            elif name == "lm_head.weight":  # largest change of a logit for inputs of RMS 1
                largest = math.sqrt(width) * np.linalg.norm(step, axis=1)
                assert largest == pytest.approx(rate, rel=1e-3)
            else:  # largest RMS of outputs for inputs of RMS 1
                for part in np.split(step, 3 if "qkv" in name else 1):
                    gain = np.linalg.norm(part, 2) * math.sqrt(part.shape[1] / part.shape[0])
                    assert 0.85 * rate < gain < 1.15 * rate, name  # what the method promises
    assert moved == num_parameters(model)


def test_a_token_that_does_not_come_rests():
    """With momentum its row would go on by a full step each time: the norm knows no small ones."""
    tokens = torch.stack([torch.arange(50, 67), torch.arange(17)])
    model, before, _ = trained_once(32, tokens, num_steps=2)
    moved = (model.embed.weight != before["embed.weight"]).any(1).nonzero().flatten()
    assert moved.tolist() == list(range(16))


def test_scalars_and_vectors_move_by_the_rate():
    weights = [torch.nn.Parameter(torch.full(shape, 2.0)) for shape in ((), (3,))]
    optimizer = Muon(weights, lr=0.25, norm="sign", scale="none", weight_decay=0.0)
    weights[0].grad, weights[1].grad = torch.tensor(-3.0), torch.tensor([1e-9, 0.0, -5.0])
    optimizer.step()
    assert [p.tolist() for p in weights] == [2.25, [1.75, 2.0, 2.25]]


def test_it_trains_and_the_log_says_its_name(train):
    done, (log,) = train("--record", "norms", "--num_iterations", "30", "--val_every", "30")
    assert done.returncode == 0, done.stderr
    (run,) = parse(log)
    first, last = (point.val_loss for point in run.points)
    assert first == pytest.approx(math.log(320), abs=0.01)  # logits of zero over padded rows
    assert last < first - 0.5
    assert "_rnorms_pocket_" in log.name and run.recipe["name"] == "norms"
    assert run.result["record"] == 6
