"""The derivation's claim: with spectral scaling one rate serves narrow and wide networks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import muon_lr_transfer as transfer


def best(rule, width, grid):
    losses = [transfer.final_loss(rule, width, 2.0**power, seed=0) for power in grid]
    return transfer.best_rate(grid, losses)


def test_the_best_rate_moves_less_than_twofold_from_width_64_to_256():
    grid = [-4, -3, -2]
    assert abs(best("spectral", 256, grid) - best("spectral", 64, grid)) < 1
    # and with entries of RMS 0.2 it does move: the operator norm grows as the root of the width
    grid = [-6, -5, -4, -3]
    assert best("match_rms_adamw", 256, grid) - best("match_rms_adamw", 64, grid) < -1
