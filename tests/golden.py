"""Golden losses: a few steps of every recipe in fp64. A refactor shows by them that it is one.

    python tests/golden.py          write tests/golden.json anew; say in the commit why it changed

Each recipe is shrunk from pocket scale to a second of work: width 32, two rows a step, six steps
that pass through every phase of its schedules. All parameters get noise, so that nothing is hidden
behind a zero. The numbers are validation losses before steps 0, 2 and 4 and after the last.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import recipes  # noqa: E402
import train_gpt  # noqa: E402
from data.shards import write_shard  # noqa: E402
from trainer.dist import World  # noqa: E402

FILE = Path(__file__).with_suffix(".json")
STEPS = 6
FP64 = dict.fromkeys(("compute_dtype", "stream_dtype", "embed_dtype", "head_dtype", "head"), "fp64")


def small_recipe(record: int | str) -> recipes.Recipe:
    """A recipe by its number or name at pocket scale, with STEPS steps of two rows, in fp64."""
    r = recipes.pocket(recipes.RECIPES[str(record)])
    lengths = {name: min(getattr(r, name), 1 if name in ("extension_steps", "freeze_steps") else 3)
               for name in recipes.STEP_FIELDS}
    rows = r.num_rows
    return recipes.edit(
        r, **FP64, **lengths, head_dim=16, num_iterations=STEPS, val_tokens=2 * r.val_row,
        batch_tokens=2 * r.model.seq_len, batch_stages=tuple(2 * b // rows for b in r.batch_stages))


def write_tokens(folder: Path) -> train_gpt.Data:
    """Two shards of bytes that can be learnt, in documents of 3 to 900 tokens."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 30_000), ("val", 4_000)):
        tokens = np.cumsum(generator.integers(1, 4, count)) % 256
        tokens[np.cumsum(generator.integers(3, 900, count // 300))[:count // 900]] = 256
        tokens[0] = 256
        write_shard(folder / f"golden_{part}_000000.bin", tokens.astype(np.uint16))
    return data_in(folder)


def data_in(folder: Path) -> train_gpt.Data:
    train, val = (folder / f"golden_{part}_000000.bin" for part in ("train", "val"))
    return train_gpt.Data([train], [val], 256, "golden")


def noise(name: str, shape: torch.Size) -> torch.Tensor:
    """By the layer and the last word or two of a parameter's name, which a refactor keeps."""
    words = name.split(".")
    layer = next((word for word in words if word.isdigit()), "")
    last = words[-2:] if words[-1] in ("weight", "bias", "factor") else words[-1:]
    generator = torch.Generator().manual_seed(zlib.crc32(" ".join([layer, *last]).encode()))
    return torch.empty(shape).normal_(0, 0.02, generator=generator)


def losses(record: int | str, data: train_gpt.Data, world: World,
           recipe: recipes.Recipe | None = None) -> list[float]:
    """Validation losses in nats a token before steps 0, 2 and 4 and after the last."""
    recipe, tokens = recipe or small_recipe(record), 1024
    model = train_gpt.build_model(recipe, 0, world.device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(noise(name, p.shape))
    optimizer = train_gpt.build_optimizer(model, recipe)
    found = []
    with train_gpt.make_loader(recipe, data, world, None) as loader:
        for step in range(STEPS + 1):
            recipes.enter_phase(model, optimizer, recipes.phase(min(step, STEPS - 1), recipe))
            if step % 2 == 0:
                model.set_phase(recipes.eval_phase(step, recipe))
                found.append(train_gpt.evaluate(model, recipe, data, world, tokens))
            if step == STEPS:
                return found
            model.set_phase(recipes.phase(step, recipe))
            for group in optimizer.param_groups:
                group.update(recipes.group_schedule(step, group["name"], recipe))
            rows, seq_len = recipes.batch_shape(step, recipe)
            train_gpt.train_step(model, optimizer, recipe, next(loader), tokens, rows * seq_len)


def all_losses(data: train_gpt.Data, world: World) -> dict[str, list[float]]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return {name: losses(name, data, world) for name in recipes.RECIPES}
    finally:
        torch.set_default_dtype(default)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
        found = all_losses(write_tokens(Path(folder)), world)
    rows = (f'"{record}": {json.dumps([round(x, 12) for x in row])}'
            for record, row in found.items())
    FILE.write_text("{" + ",\n ".join(rows) + "}\n")


if __name__ == "__main__":
    main()
