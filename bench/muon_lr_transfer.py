"""Does one learning rate serve narrow and wide networks? Final losses over rates, widths and rules.

    python bench/muon_lr_transfer.py                 widths 64 to 1024, draws muon_lr_transfer.png
    python bench/muon_lr_transfer.py --quick         widths 64 to 256, two minutes, no picture

A network of three matrices, 32 -> width -> width -> 8, learns a fixed random network from fresh
batches; the rate falls linearly to 0. "spectral" scales each orthogonal update by sqrt(fan_out /
fan_in), so that its RMS -> RMS operator norm is the rate at every width; "match_rms_adamw" gives
entries of RMS 0.2, whose operator norm grows as the root of the width; AdamW moves all entries
alike.
The best rate of a width is the minimum of a parabola through the three best points, in powers of 2.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from muon import Adam, Muon

NUM_STEPS, BATCH = 60, 256
RULES = {  # name: (grid of log2 rates, how to make the optimizer)
    "spectral": (range(-6, 0), {"scale": "spectral"}),
    "match_rms_adamw": (range(-9, -2), {"scale": "match_rms_adamw"}),
    "AdamW": (range(-12, -4), None),
}


def network(width: int, seed: int, student: bool = True) -> list[torch.nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    shapes = ((width, 32), (width, width), (8, width))
    weights = [torch.randn(s, generator=source) * (2 / s[1]) ** 0.5 for s in shapes]
    if student:  # a random head would weigh sqrt(width) in operator norm
        weights[-1].zero_()
    return [torch.nn.Parameter(W) for W in weights]


def forward(x_BI: torch.Tensor, weights: list) -> torch.Tensor:
    for W in weights[:-1]:
        x_BI = torch.relu(x_BI @ W.T)
    return x_BI @ weights[-1].T


def final_loss(rule: str, width: int, rate: float, seed: int) -> float:
    """Mean loss of the last 10 steps."""
    source = torch.Generator().manual_seed(100 + seed)
    teacher = [W.detach() for W in network(64, 999, student=False)]
    weights, options = network(width, seed), RULES[rule][1]
    if options is None:
        optimizer = Adam(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    else:
        optimizer = Muon(
            weights, lr=rate, weight_decay=0.0, method="polar_express", mode="fast", **options
        )
    losses = []
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / NUM_STEPS)
        x_BI = torch.randn(BATCH, 32, generator=source)
        loss = (forward(x_BI, weights) - forward(x_BI, teacher)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    mean = sum(losses[-10:]) / 10
    return mean if mean == mean else float("inf")


def best_rate(grid: list[int], losses: list[float]) -> float:
    """log2 of the best rate: vertex of the parabola through log losses around the minimum."""
    k = min(range(len(grid)), key=losses.__getitem__)
    if not 0 < k < len(grid) - 1 or max(losses[k - 1 : k + 2]) == float("inf"):
        return grid[k]
    a, b, c = (torch.tensor(losses[k - 1 : k + 2]).log()).tolist()
    return grid[k] + 0.5 * (a - c) / (a - 2 * b + c)


def draw(results: dict, widths: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    colours = plt.get_cmap("viridis")
    for pane, rule in zip(panes, RULES):
        grid = list(RULES[rule][0])
        for n, width in enumerate(widths):
            colour = colours(0.9 * n / max(1, len(widths) - 1))
            losses = results[rule, width]
            pane.plot(grid, losses, "o-", color=colour, label=f"width {width}", markersize=3)
            best = best_rate(grid, losses)
            pane.plot([best], [min(losses)], "v", color=colour, markersize=9)
        pane.set(title=rule, xlabel="log2 learning rate", yscale="log", ylim=(1e-1, 3))
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("loss, mean of the last 10 of 60 steps")
    panes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="widths 64 to 256, no picture")
    options = parser.parse_args()
    widths = [64, 128, 256] if options.quick else [64, 128, 256, 512, 1024]
    start, results = time.perf_counter(), {}
    columns = [f"best log2 rate at {width}" for width in widths]
    print("| rule | " + " | ".join(columns) + " | widest / narrowest |")
    print("| --- " * (len(widths) + 2) + "|")
    for rule, (grid, _) in RULES.items():
        best = []
        for width in widths:
            results[rule, width] = [final_loss(rule, width, 2.0**power, seed=0) for power in grid]
            best.append(best_rate(list(grid), results[rule, width]))
        shown = " | ".join(f"{power:.2f}" for power in best)
        print(f"| {rule} | {shown} | {2 ** (best[-1] - best[0]):.2f}x |", flush=True)
    if not options.quick:
        draw(results, widths, Path(__file__).with_suffix(".png"))
    print(f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
