"""The tokenizers: GPT-2's byte-pair encoding, and plain bytes, which need no download."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data import corpus

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True)
class Tokenizer:
    """vocab_size: tokens are 0 to vocab_size-1. bos_id: the token that opens a document.
    encoder(): text -> tokens (n,) uint16, without bos_id. decoder(): tokens -> text."""

    name: str
    vocab_size: int
    bos_id: int
    encoder: Callable[[], Callable[[str], np.ndarray]]
    decoder: Callable[[], Callable[[Sequence[int]], str]]


def gpt2_encoding() -> "tiktoken.Encoding":
    """GPT-2's byte-pair encoding; tiktoken fetches its ranks once and keeps them."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: wrong hash
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise OSError(
            f"tiktoken cannot get GPT-2's ranks ({reason}). Without a network, set "
            "TIKTOKEN_CACHE_DIR to a folder that has them: run `TIKTOKEN_CACHE_DIR=ranks "
            "python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"` on a machine with a "
            "network and copy the folder `ranks` here (data/README.md says more); or make bytes "
            "the tokens, which needs no ranks: --tokenizer bytes"
        ) from error


def _gpt2_encoder() -> Callable[[str], np.ndarray]:
    encoding = gpt2_encoding()
    return lambda text: encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


TOKENIZERS = {
    "gpt2": Tokenizer("gpt2", 50257, 50256, _gpt2_encoder, lambda: gpt2_encoding().decode),
    "bytes": Tokenizer("bytes", corpus.VOCAB_SIZE, corpus.BOS, lambda: corpus.encode,
                       lambda: corpus.decode),
}


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """The tokenizer of a model with this vocabulary: bytes, or else GPT-2's."""
    return TOKENIZERS["bytes" if vocab_size == corpus.VOCAB_SIZE else "gpt2"]
