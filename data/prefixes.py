"""The longest shorter token that each token begins with, for the prefix loss (#88).

    python -m data.prefixes     write data/gpt2_prefixes.npy anew, from tiktoken's ranks

" world" begins with " wor"; a model that predicts a part of the next token is partly right. Of
GPT-2's 50,257 tokens the 50,000 merged ones begin with another; bytes and end-of-text do not.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import tokenizer
from data.tokenizer import TOKENIZERS

FILE = Path(__file__).with_name("gpt2_prefixes.npy")
NONE = 65_535   # in the file, of a token that begins with no other


def longest_prefixes(tokens: Sequence[bytes]) -> np.ndarray:
    """(V,) int64: the token whose bytes are the longest proper prefix of each token's; -1: none."""
    number = {token: k for k, token in enumerate(tokens)}
    return np.array([
        next((number[token[:n]] for n in range(len(token) - 1, 0, -1) if token[:n] in number), -1)
        for token in tokens])


def from_ranks() -> np.ndarray:
    """GPT-2's, from the bytes of its tokens. End-of-text is no text: it has none and is none."""
    encoding = tokenizer.gpt2_encoding()
    return longest_prefixes(
        [encoding.decode_single_token_bytes(k) for k in range(TOKENIZERS["gpt2"].bos_id)] + [b""])


def token_prefixes(vocab_size: int) -> np.ndarray:
    """longest_prefixes of a vocabulary: GPT-2's, or that of bytes, none of which has any."""
    if vocab_size == TOKENIZERS["bytes"].vocab_size:
        return np.full(vocab_size, -1)
    if vocab_size != TOKENIZERS["gpt2"].vocab_size:
        raise ValueError("--prefix_weight: expected 0 or a vocabulary of 50257 "
                         f"tokens (GPT-2's, whose prefixes are known), got {vocab_size}")
    if not FILE.is_file():  # a program taken out of a log, which holds sources alone
        return from_ranks()
    table = np.load(FILE).astype(np.int64)
    return np.where(table == NONE, -1, table)


def main() -> None:
    table = from_ranks()
    np.save(FILE, np.where(table < 0, NONE, table).astype(np.uint16))


if __name__ == "__main__":
    main()
