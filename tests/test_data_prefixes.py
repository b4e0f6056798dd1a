"""The prefix of each token, for the prefix loss (#88)."""

import numpy as np
import pytest

from data import prefixes, tokenizer
from data.prefixes import longest_prefixes, token_prefixes


def test_the_longest_proper_prefix_that_is_a_token():
    tokens = [b"a", b"b", b"ab", b"abcd", b"bcd", b"abcde", b""]
    assert longest_prefixes(tokens).tolist() == [-1, -1, 0, 2, 1, 3, -1]


def test_gpt2s_table():
    """Bytes and end-of-text have no prefix, all 50,000 merged tokens have one; from prefix to
    prefix every token gets to a byte."""
    table = token_prefixes(50_257)
    assert table.shape == (50_257,) and table.dtype == np.int64
    without = np.flatnonzero(table < 0)
    assert without.tolist() == [*range(256), 50_256]
    at = np.arange(256, 50_256)
    for _ in range(200):
        at = np.where(at >= 256, table[at], at)
    assert (at < 256).all() and (at >= 0).all()
    hello, world = 15_496, 995
    for token, shorter in ((hello, (28_254, 12_621, 1544, 39)),     # Hell, Hel, He, H
                           (world, (476, 24_486, 266, 220))):       # " wor", " wo", " w", " "
        for expected in shorter:
            token = table[token]
            assert token == expected


def test_a_program_out_of_a_log_makes_the_table_from_the_ranks(monkeypatch, tmp_path):
    """Here of made-up bytes, since the ranks need a network."""
    class Encoding:
        @staticmethod
        def decode_single_token_bytes(k: int) -> bytes:
            assert k < 50_256
            return bytes([k % 256]) if k < 256 else b"a" + str(k).encode()

    monkeypatch.setattr(prefixes, "FILE", tmp_path / "gone.npy")
    monkeypatch.setattr(tokenizer, "gpt2_encoding", Encoding)
    table = prefixes.token_prefixes(50_257)
    assert (table[:256] == -1).all() and table[50_256] == -1
    assert table[256] == ord("a") and table[2560] == 256 and table[2600] == 260
    prefixes.main()
    assert (prefixes.token_prefixes(50_257) == table).all()


def test_bytes_have_none_and_other_vocabularies_are_refused():
    assert token_prefixes(257).tolist() == [-1] * 257
    with pytest.raises(ValueError, match="--prefix_weight: expected 0 or a vocabulary of 50257"):
        token_prefixes(5000)
