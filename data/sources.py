"""The corpora that a recipe can name: where their shards come from, and what their tokens are.

Another corpus is another entry of SOURCES.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import corpus, fineweb
from data.tokenizer import TOKENIZERS, Tokenizer

FINEWEB_DIR = Path(__file__).resolve().parent / "fineweb10B"
Files = tuple[list[Path], list[Path]]   # of training, of validation


@dataclass(frozen=True)
class Source:
    """A corpus as shards of tokens."""

    tokenizer: Tokenizer
    files: Callable[[int], Files]       # fetch or build so many training shards of 100M tokens
    grows: bool                         # whether more shards can be fetched


def _built_in_files(num_shards: int) -> Files:
    built = corpus.build()
    if built.note:
        print(f"corpus: {built.note}", file=sys.stderr)
    return list(built.train_files), list(built.val_files)


SOURCES = {
    "built-in": Source(TOKENIZERS["bytes"], _built_in_files, grows=False),
    "fineweb": Source(TOKENIZERS["gpt2"],
                      lambda num_shards: fineweb.ensure(num_shards, FINEWEB_DIR), grows=True),
}
