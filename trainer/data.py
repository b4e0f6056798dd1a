"""The tokens of a run: find, fetch or build the shards that a recipe needs, and check that they
suffice, before step 0. A recipe that meets other data than its own is fitted to them."""

import hashlib
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data.loader import Loader, OutOfTokens, check_enough_tokens, count_epochs, val_batches
from data.prepare import PARTIAL, read_manifest
from data.shards import (
    SCAN_TOKENS,
    check_disjoint,
    convert_command,
    data_digest,
    read_header,
    read_shard,
)
from data.sources import SOURCES
from data.tokenizer import TOKENIZERS, Tokenizer, tokenizer_of
from recipes import Recipe, batch_shape, change, max_doc_len
from records.rules import TRACKS
from trainer.dist import World

OWN_DATA = "own"  # in place of a track: nothing to compare with


@dataclass(frozen=True)
class Data:
    """The files of one run. repeat: read them as an endless stream of documents, epoch after epoch
    (see data/loader.py), and not as the records read FineWeb. notes: lines for the header."""

    train_files: list[Path]
    val_files: list[Path]
    bos_id: int
    digest: str
    repeat: bool = False
    notes: dict[str, str] = field(default_factory=dict)


def find_data(recipe: Recipe, data_dir: str | None = None) -> tuple[Data, Recipe]:
    """The recipe's shards, fetched or built where they are missing, or those of a folder; and the
    recipe fitted to them.

    Text of one's own (a folder with a manifest) and data shorter than the run are repeated.
    Raises FileNotFoundError or ValueError where there are none, or a shard is bad.
    """
    if data_dir is not None:
        return _data_in(Path(data_dir), recipe)
    source = SOURCES[recipe.corpus]
    # 100M tokens a shard, less those that no step uses: a shard's tail and, from record #26 on,
    # tokens before the next document and the ends of long ones.
    num_shards = math.ceil(recipe.total_tokens / 1e8)
    repeat = False
    while True:
        train_files, val_files = source.files(num_shards)
        try:
            check_data(recipe, train_files, val_files, source.tokenizer.bos_id)
            break
        except OutOfTokens:
            if not source.grows:
                repeat = True
                break
            num_shards += 1
    return Data(train_files, val_files, source.tokenizer.bos_id,
                data_digest([*train_files, *val_files]), repeat,
                _notes(recipe, recipe, train_files if repeat else None)), recipe


def doc_len(recipe: Recipe) -> int | Callable[[int], int] | None:
    """The loader's max_doc_len: a number, or one for each step."""
    return partial(max_doc_len, recipe=recipe) if recipe.max_doc_stages else recipe.max_doc_len


def _data_in(folder: Path, recipe: Recipe) -> tuple[Data, Recipe]:
    manifest = read_manifest(folder)
    if manifest is not None:
        train_files, val_files = ([folder / name for name in names]
                                  for names in (manifest.train_files, manifest.val_files))
        tokenizer = TOKENIZERS[manifest.tokenizer]
    else:
        train_files, val_files = _shards_in(folder)
        tokenizer = _tokenizer_by_sight(train_files[0], recipe)
    digest = data_digest([*train_files, *val_files])
    prescribed = TRACKS[recipe.track].data_digest
    of_track = (manifest is None and tokenizer.vocab_size == recipe.model.vocab_size
                and prescribed in (None, digest))
    asked, recipe = recipe, _fitted(recipe, tokenizer, of_track,
                                    sum(map(read_header, val_files)))
    repeat = manifest is not None
    try:
        check_data(recipe, train_files, val_files, tokenizer.bos_id, repeat)
    except OutOfTokens:
        repeat = True
        check_data(recipe, train_files, val_files, tokenizer.bos_id, repeat)
    notes = _notes(asked, recipe, train_files if repeat else None)
    return Data(train_files, val_files, tokenizer.bos_id, digest, repeat, notes), recipe


def val_shards(folder: Path, tokenizer: Tokenizer) -> list[Path]:
    """The validation shards of a folder, for a model of this tokenizer. Raises ValueError where
    the folder has tokens of another, FileNotFoundError where it has no shards."""
    manifest = read_manifest(folder)
    if manifest is None:
        return _shards_in(folder)[1]
    if manifest.tokenizer != tokenizer.name:
        raise ValueError(f"{folder}: has tokens of {manifest.tokenizer}, and the model was trained "
                         f"on those of {tokenizer.name}; give it the text")
    return [folder / name for name in manifest.val_files]


def _shards_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Training and validation shards of a folder without a manifest, by their names."""
    found = [sorted(folder.glob(f"*{part}*.bin")) for part in ("train", "val")]
    for part, files in zip(("train", "val"), found):
        if not files and (folder / PARTIAL).exists():
            raise FileNotFoundError(f"--data_dir: {folder} holds an unfinished tokenisation; the "
                                    "`python -m data.fineweb tokenize` command that began it goes "
                                    "on there")
        if not files:
            arrays = sorted(folder.glob("*train*.npy"))
            inside = [p for p in folder.glob("*") if not p.name.startswith(".")]
            hint = convert_command(arrays[0]) if arrays else (
                f"python -m data.fineweb tokenize {shlex.quote(str(folder))} --out data/mine")
            raise FileNotFoundError(
                f"--data_dir: expected *{part}*.bin in {folder.resolve()}, found none"
                + f"; to make them of what is there: {hint}" * bool(inside))
    return found[0], found[1]


def _tokenizer_by_sight(file: Path, recipe: Recipe) -> Tokenizer:
    """What the tokens of a shard are, by their largest and by GPT-2's BOS, unless the recipe has a
    vocabulary of its own."""
    own = tokenizer_of(recipe.model.vocab_size)
    if own.vocab_size == recipe.model.vocab_size:
        tokens = read_shard(file)[:SCAN_TOKENS]
        if tokens.max() < TOKENIZERS["bytes"].vocab_size:
            return TOKENIZERS["bytes"]
        if (tokens == TOKENIZERS["gpt2"].bos_id).any():
            return TOKENIZERS["gpt2"]
    return own


def _fitted(recipe: Recipe, tokenizer: Tokenizer, of_track: bool, num_val: int) -> Recipe:
    """The recipe with the vocabulary of the data, no more validation than there is and, on other
    data than its track's, without track and target."""
    if num_val < 2:
        raise ValueError(f"expected validation data of 2 tokens or more, got {num_val}")
    changes = {}
    if tokenizer_of(recipe.model.vocab_size) != tokenizer:
        changes["vocab_size"] = tokenizer.vocab_size
    if not of_track:
        changes |= {"track": OWN_DATA, "target": None}
    if num_val <= recipe.val_tokens:
        row, val_tokens = _validation_rows(recipe.val_row, num_val - 1)
        changes |= {"val_seq_len": row, "val_tokens": val_tokens}
    return change(recipe, **changes)


def _validation_rows(longest: int, num_inputs: int) -> tuple[int, int]:
    """(tokens of a row, of all rows): the longest rows that leave out at most a tenth. Attention's
    kernels have blocks of 128 tokens."""
    rows = [min(longest, num_inputs)]
    if rows[0] >= 128:
        rows = [128 * n for n in range(rows[0] // 128, rows[0] // 256, -1)]
    covered = {row: num_inputs // row * row for row in rows}
    row = next((r for r in rows if covered[r] >= 0.9 * num_inputs), max(rows, key=covered.get))
    return row, covered[row]


def _notes(asked: Recipe, recipe: Recipe, repeated: list[Path] | None) -> dict[str, str]:
    notes = {}
    if repeated:
        tokens = sum(map(read_header, repeated))
        epochs = count_epochs(repeated, partial(batch_shape, recipe=recipe),
                              recipe.num_iterations, vocab_size=recipe.model.vocab_size,
                              bos_id=recipe.model.bos_id, align=recipe.data_align)
        notes["epochs"] = (f"{epochs:.{1 if epochs >= 1 else 3}f} epochs of {tokens:,} tokens, "
                           "each in a new order of documents")
    if recipe.val_tokens != asked.val_tokens:
        notes["validation"] = (f"{recipe.val_tokens:,} tokens in rows of {recipe.val_row}, for "
                               f"there are no more; asked for: {asked.val_tokens:,}")
    return notes


def check_data(recipe: Recipe, train_files: list[Path], val_files: list[Path], bos_id: int,
               repeat: bool = False) -> None:
    """Every shard the run touches is whole, and there are tokens for every step and validation.
    Raises OutOfTokens where more training shards would help, ValueError otherwise."""
    check_disjoint(train_files, val_files)
    val_batches(val_files, recipe.val_tokens, recipe.val_row, 1,
                vocab_size=recipe.model.vocab_size)
    if repeat:  # count_epochs looks at every file
        return
    check_enough_tokens(train_files, partial(batch_shape, recipe=recipe), recipe.num_iterations,
                        vocab_size=recipe.model.vocab_size, bos_id=bos_id,
                        repeat_first=recipe.first_batch_repeated, align=recipe.data_align,
                        max_doc_len=doc_len(recipe))


def describe_files(data: Data) -> str:
    """The files as this rank sees them, to compare with other ranks."""
    sizes = [f"{path} {path.stat().st_size}" for path in (*data.train_files, *data.val_files)]
    return f"{len(sizes)} files, {hashlib.sha256(' '.join(sizes).encode()).hexdigest()[:12]}"


def make_loader(recipe: Recipe, data: Data, world: World, cursor: dict | None = None) -> Loader:
    """This rank's batches in the recipe's order, from `cursor` on."""
    return Loader(data.train_files, partial(batch_shape, recipe=recipe),
                  vocab_size=recipe.model.vocab_size, bos_id=data.bos_id,
                  repeat_first=recipe.first_batch_repeated, align=recipe.data_align,
                  max_doc_len=doc_len(recipe), repeat=data.repeat, rank=world.rank,
                  world_size=world.size, cursor=cursor, device=world.device)
