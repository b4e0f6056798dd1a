"""The tokens of a run: find, fetch or build the shards that a recipe needs, and check that they
suffice, before step 0."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.loader import Loader, OutOfTokens, check_enough_tokens, val_batches
from data.shards import check_disjoint, data_digest
from data.sources import SOURCES, source_of
from recipes import Recipe, batch_shape, max_doc_len
from trainer.dist import World


@dataclass(frozen=True)
class Data:
    """The files of one run."""

    train_files: list[Path]
    val_files: list[Path]
    bos_id: int
    digest: str


def find_data(recipe: Recipe, data_dir: str | None = None) -> Data:
    """The recipe's shards, fetched or built where they are missing; or those of a folder.

    Raises FileNotFoundError or ValueError where there are none, or too few tokens.
    """
    if data_dir is not None:
        source, folder = source_of(recipe.model.vocab_size), Path(data_dir)
        found = {part: sorted(folder.glob(f"*{part}*.bin")) for part in ("train", "val")}
        for part, files in found.items():
            if not files:
                raise FileNotFoundError(f"--data_dir: expected *{part}*.bin in "
                                        f"{folder.resolve()}, found none")
        train_files, val_files = found["train"], found["val"]
        check_data(recipe, train_files, val_files, source.bos_id)
    else:
        source = SOURCES[recipe.corpus]
        # 100M tokens a shard, less those that no step uses: a shard's tail and, from record #26 on,
        # tokens before the next document and the ends of long ones.
        num_shards = math.ceil(recipe.total_tokens / 1e8)
        while True:
            train_files, val_files = source.files(num_shards)
            try:
                check_data(recipe, train_files, val_files, source.bos_id)
                break
            except OutOfTokens:
                if not source.grows:
                    raise
                num_shards += 1
    return Data(train_files, val_files, source.bos_id, data_digest([*train_files, *val_files]))


def doc_len(recipe: Recipe) -> int | Callable[[int], int] | None:
    """The loader's max_doc_len: a number, or one for each step."""
    return partial(max_doc_len, recipe=recipe) if recipe.max_doc_stages else recipe.max_doc_len


def check_data(recipe: Recipe, train_files: list[Path], val_files: list[Path],
               bos_id: int) -> None:
    """Every shard the run touches is whole, and there are tokens for every step and validation.
    Raises OutOfTokens where more training shards would help, ValueError otherwise."""
    check_disjoint(train_files, val_files)
    check_enough_tokens(train_files, partial(batch_shape, recipe=recipe), recipe.num_iterations,
                        vocab_size=recipe.model.vocab_size, bos_id=bos_id,
                        repeat_first=recipe.first_batch_repeated, align=recipe.data_align,
                        max_doc_len=doc_len(recipe))
    val_batches(val_files, recipe.val_tokens, recipe.val_row, 1,
                vocab_size=recipe.model.vocab_size)


def describe_files(data: Data) -> str:
    """The files as this rank sees them, to compare with other ranks."""
    sizes = [f"{path} {path.stat().st_size}" for path in (*data.train_files, *data.val_files)]
    return f"{len(sizes)} files, {hashlib.sha256(' '.join(sizes).encode()).hexdigest()[:12]}"


def make_loader(recipe: Recipe, data: Data, world: World, cursor: dict | None = None) -> Loader:
    """This rank's batches in the recipe's order, from `cursor` on."""
    return Loader(data.train_files, partial(batch_shape, recipe=recipe),
                  vocab_size=recipe.model.vocab_size, bos_id=data.bos_id,
                  repeat_first=recipe.first_batch_repeated, align=recipe.data_align,
                  max_doc_len=doc_len(recipe), rank=world.rank, world_size=world.size,
                  cursor=cursor, device=world.device)
