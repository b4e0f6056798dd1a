"""Every recipe computes what it computed when tests/golden.json was written, on 1 and 2 ranks."""

import json

import golden
import pytest
import torch
from muon_helpers import run_ranks

from trainer.dist import World

EXPECTED = json.loads(golden.FILE.read_text())


def differences(found: dict) -> dict:
    """Recipe -> largest difference to the golden losses, where it is more than rounding."""
    worst = {record: max(abs(a - b) for a, b in zip(found[record], row, strict=True))
             for record, row in EXPECTED.items()}
    return {record: x for record, x in worst.items() if not x < 1e-9}


def two_ranks(rank: int, world_size: int, folder) -> None:
    world = World(rank, rank, world_size, torch.device("cpu"))
    assert differences(golden.all_losses(golden.data_in(folder), world)) == {}


def test_every_recipe_trains_as_it_did_on_one_rank(tmp_path):
    world = World(0, 0, 1, torch.device("cpu"))
    assert differences(golden.all_losses(golden.write_tokens(tmp_path), world)) == {}


@pytest.mark.ranks
def test_every_recipe_trains_as_it_did_on_two_ranks(tmp_path):
    golden.write_tokens(tmp_path)
    run_ranks(2, tmp_path, two_ranks, tmp_path)
