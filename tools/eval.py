"""Loss and perplexity of a model that was trained here, on any text or shards.

    python -m tools.eval logs/RUN my.txt notes/ 'more/*.jsonl'     text, read as the tokenizer does
    python -m tools.eval logs/RUN --data_dir data/mine             the validation shards of a folder
    python -m tools.eval logs/RUN --hellaswag                      as python -m tools.hellaswag

Documents are one stream of tokens, each opened by BOS, in rows as long as those of the run's
validation; each token is predicted once, from those before it in its row. Bytes are those of the
text: the loss a byte compares models of different tokenizers.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import text
from data.loader import row_documents
from data.shards import read_shard
from data.text import Reading
from data.tokenizer import TOKENIZERS, Tokenizer, gpt2_encoding, tokenizer_of
from model import GPT
from tools import hellaswag
from tools.sample import load_model
from trainer.data import val_shards

BATCH_TOKENS = {"cpu": 8192, "cuda": 65_536}  # in one forward pass, rows allowing


class Score(NamedTuple):
    """nats: the summed loss of `tokens` predictions, in which are `num_bytes` bytes of text."""

    nats: float
    tokens: int
    num_bytes: int

    def report(self) -> str:
        loss, rate = self.nats / self.tokens, self.nats / max(1, self.num_bytes)
        return (f"loss {loss:.4f} nats a token, perplexity {math.exp(min(loss, 700)):.2f}, over "
                f"{self.tokens:,} tokens\n"
                f"loss {rate:.4f} nats a byte ({rate / math.log(2):.4f} bits), perplexity "
                f"{math.exp(min(rate, 700)):.3f}, over {self.num_bytes:,} bytes")


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int64: how many bytes of text each token is; BOS none."""
    if tokenizer is TOKENIZERS["bytes"]:
        lengths = np.ones(tokenizer.vocab_size, np.int64)
    else:
        encoding = gpt2_encoding()
        lengths = np.array([len(encoding.decode_single_token_bytes(token))
                            for token in range(tokenizer.bos_id)] + [0])
    lengths[tokenizer.bos_id] = 0
    return lengths


def documents(paths: list[Path], reading: Reading, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of the files, piece by piece, BOS before each document."""
    encode, bos = tokenizer.encoder(), np.array([tokenizer.bos_id], np.uint16)
    for path in paths:
        text.check(path, reading)
    for path in paths:
        for piece in text.read(path, reading):
            if piece.opens:
                yield bos
            yield encode(piece.body) if isinstance(piece.body, str) else piece.body


def rows(tokens: Iterator[np.ndarray], seq_len: int, num_rows: int) -> Iterator[np.ndarray]:
    """(B, T+1) rows of the stream, up to num_rows at once, each opening with the last target of the
    one before; the last row is shorter than seq_len."""
    left, size = np.empty(0, np.uint16), num_rows * seq_len
    for piece in tokens:
        left = np.concatenate([left, piece])
        while len(left) > size:
            yield np.lib.stride_tricks.sliding_window_view(left[:size + 1], seq_len + 1)[::seq_len]
            left = left[size:]
    whole = (len(left) - 1) // seq_len * seq_len
    if whole > 0:
        yield np.lib.stride_tricks.sliding_window_view(left[:whole + 1], seq_len + 1)[::seq_len]
    if len(left) - max(whole, 0) > 1:
        yield left[None, max(whole, 0):]


@torch.compiler.set_stance("force_eager")  # the last row would be a graph of its own
@torch.no_grad()
def score(model: GPT, tokens: Iterator[np.ndarray], seq_len: int) -> Score:
    """The loss of predicting each token of the stream but the first, in rows of seq_len."""
    config, device = model.config, next(model.parameters()).device
    lengths = token_bytes(tokenizer_of(config.vocab_size))
    num_rows = max(1, BATCH_TOKENS[device.type] // seq_len)
    total, count, num_bytes = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    with tqdm(unit="tok", unit_scale=True, disable=None, leave=False) as bar:
        for window_BT1 in rows(tokens, seq_len, num_rows):
            inputs = torch.from_numpy(window_BT1[:, :-1].astype(np.int32)).to(device)
            targets = torch.from_numpy(window_BT1[:, 1:].astype(np.int64)).to(device)
            docs = row_documents(window_BT1[:, :-1], config.bos_id)
            total += model(inputs, targets, docs).double()
            count += targets.numel()
            num_bytes += int(lengths[window_BT1[:, 1:]].sum())
            bar.update(targets.numel())
    if count == 0:
        raise ValueError("expected text of a token or more, got none")
    return Score(total.item(), count, num_bytes)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.eval",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("run", help="logs/RUN of a training run, or a checkpoint of one")
    parser.add_argument("files", nargs="*", help="files, folders or quoted patterns of text")
    parser.add_argument("--data_dir", help="a folder of shards, of which those for validation")
    parser.add_argument("--hellaswag", action="store_true", help="the HellaSwag score instead")
    parser.add_argument("--text_field", default="text", help="field or column (default text)")
    parser.add_argument("--encoding", default="utf-8", help="of the text; default UTF-8")
    args = parser.parse_args(argv)
    try:
        if bool(args.files) + bool(args.data_dir) + args.hellaswag != 1:
            raise ValueError("expected one of: files of text, --data_dir, --hellaswag")
        if args.hellaswag:
            return hellaswag.main([args.run])
        model, recipe = load_model(args.run)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer, reading = tokenizer_of(recipe.model.vocab_size), Reading(args.text_field,
                                                                            args.encoding)
        if args.data_dir:
            tokens = (read_shard(file, vocab_size=tokenizer.vocab_size)
                      for file in val_shards(Path(args.data_dir), tokenizer))
        else:
            tokens = documents(text.expand(args.files)[0], reading, tokenizer)
        print(score(model, tokens, recipe.val_row).report())
        for note in reading.notes():
            print(note)
    except (ValueError, OSError) as error:  # no such model or file
        print(f"tools.eval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
