"""The corpora that a recipe can name: where their shards come from, and what their tokens are.

Another corpus is another entry of SOURCES.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import corpus, fineweb

FINEWEB_DIR = Path(__file__).resolve().parent / "fineweb10B"
Files = tuple[list[Path], list[Path]]   # of training, of validation
Codec = tuple[Callable[[str], Sequence[int]], Callable[[Sequence[int]], str]]   # encode, decode


@dataclass(frozen=True)
class Source:
    """A corpus as shards of tokens."""

    vocab_size: int
    bos_id: int                         # the token that opens a document
    files: Callable[[int], Files]       # fetch or build so many training shards of 100M tokens
    codec: Callable[[], Codec]
    grows: bool                         # whether more shards can be fetched


def _built_in_files(num_shards: int) -> Files:
    built = corpus.build()
    if built.note:
        print(f"corpus: {built.note}", file=sys.stderr)
    return list(built.train_files), list(built.val_files)


def _gpt2_codec() -> Codec:
    encoding = fineweb.gpt2_encoding()
    return encoding.encode_ordinary, encoding.decode


SOURCES = {
    "built-in": Source(corpus.VOCAB_SIZE, corpus.BOS, _built_in_files,
                       lambda: (corpus.encode, corpus.decode), grows=False),
    "fineweb": Source(fineweb.VOCAB_SIZE, fineweb.BOS,
                      lambda num_shards: fineweb.ensure(num_shards, FINEWEB_DIR), _gpt2_codec,
                      grows=True),
}


def source_of(vocab_size: int) -> Source:
    """The source whose kind of tokens a model of this vocabulary reads: bytes, or else GPT-2's. A
    model trained on shards of your own (--data_dir) has one of these too."""
    return SOURCES["built-in" if vocab_size == corpus.VOCAB_SIZE else "fineweb"]
