"""Does one learning rate train narrow and wide transformers? Losses over rates and widths.

    python bench/norms_transfer.py              widths 64 to 512, draws norms_transfer.png
    python bench/norms_transfer.py --quick      widths 64 and 128, no picture

Recipe `norms` (each layer by steepest descent under its own norm) and record #6 (Muon for hidden
matrices at unit RMS, Adam for the shared table of embedding and head), on the built-in corpus, with
2 layers, heads of 64, 64 steps of 1,024 tokens in rows of 128: more heads are all that changes with
the width. A rate is given as log2 of a factor on all rates of the recipe at pocket scale, which
were chosen at width 128. The best of a width is the minimum of a parabola through the three best
points; `lost` is what the best rate of the narrowest network loses at the width, in nats.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from muon_lr_transfer import best_rate

import recipes
import train_gpt
from trainer.data import find_data, make_loader
from trainer.dist import World

GRIDS = {"norms": range(-2, 3), "6": range(-2, 4)}  # recipe: log2 of the factor on its rates
RATES = ("matrix_lr", "embed_lr", "head_lr", "scalar_lr")
SIZES = {"num_layers": 2, "head_dim": 64, "seq_len": 128, "batch_tokens": 1024,
         "num_iterations": 64, "val_tokens": 32_768}


def recipe_at(name: str, width: int, power: float = 0.0) -> recipes.Recipe:
    """A recipe at a width, with all rates times 2**power."""
    recipe = recipes.pocket(recipes.RECIPES[name])
    rates = {rate: getattr(recipe, rate) * 2.0**power for rate in RATES}
    return recipes.change(recipe, **SIZES, **rates, num_heads=width // SIZES["head_dim"])


def final_loss(recipe: recipes.Recipe, seed: int = 0) -> float:
    """Validation loss at the end of the training, in nats a byte; infinite where it diverged."""
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    data, recipe = find_data(recipe)
    model = train_gpt.build_model(recipe, seed, world.device)
    optimizer = train_gpt.build_optimizer(model, recipe)
    with make_loader(recipe, data, world) as loader:
        for step in range(recipe.num_iterations):
            for group in optimizer.param_groups:
                group.update(recipes.group_schedule(step, group["name"], recipe))
            train_gpt.train_step(model, optimizer, recipe, next(loader), recipe.batch_tokens,
                                 recipe.batch_tokens)
    loss = train_gpt.evaluate(model, recipe, data, world, recipe.batch_tokens)
    return loss if math.isfinite(loss) else math.inf


def draw(results: dict, widths: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panes = plt.subplots(1, len(GRIDS), figsize=(9, 4), sharey=True)
    colours = plt.get_cmap("viridis")
    for pane, (name, grid) in zip(panes, GRIDS.items()):
        for n, width in enumerate(widths):
            colour, losses = colours(0.9 * n / max(1, len(widths) - 1)), results[name, width]
            pane.plot(grid, losses, "o-", color=colour, label=f"width {width}", markersize=3)
            pane.plot([best_rate(list(grid), losses)], [min(losses)], "v", color=colour,
                      markersize=9)
        pane.set(title=name if name == "norms" else f"record #{name}",
                 xlabel="log2 of the factor on all learning rates", xticks=list(grid))
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("validation loss, nats a byte")
    panes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="widths 64 and 128, no picture")
    options = parser.parse_args()
    widths = [64, 128] if options.quick else [64, 128, 256, 512]
    start, results = time.perf_counter(), {}
    powers = range(-2, 4)
    print("| recipe | width | " + " | ".join(f"{power:+d}" for power in powers)
          + " | best | lost |\n| --- |" + " ---: |" * (len(powers) + 3))
    for name, grid in GRIDS.items():
        for width in widths:
            losses = [final_loss(recipe_at(name, width, power)) for power in grid]
            results[name, width] = losses
            narrow = results[name, widths[0]]
            lost = losses[narrow.index(min(narrow))] - min(losses)
            cells = [f"{loss:.3f}" for loss in losses] + [""] * (len(powers) - len(losses))
            print(f"| {name} | {width} | {' | '.join(cells)} | "
                  f"{best_rate(list(grid), losses):+.2f} | {lost:.3f} |", flush=True)
    if not options.quick:
        draw(results, widths, Path(__file__).with_suffix(".png"))
    print(f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
