"""HellaSwag score of a model that was trained here.

    python -m tools.hellaswag logs/RUN              the 10,042 validation scenes, fetched once
    python -m tools.hellaswag logs/RUN --limit 500  the first of them, on a CPU
    python -m tools.hellaswag logs/RUN --file FILE  scenes of a file, without a network

A scene has four endings, one of them right (Zellers et al. 2019). The model takes the one with the
likeliest tokens: in the mean ("normalised", the figure that is quoted) or in the sum.
Chance is 25%; OpenAI's GPT-2 (124M) takes 29.55% by the mean and 28.59% by the sum as llm.c
measured it: this way, but without the token that opens a document, which these models know.
"""

import argparse
import json
import math
import os
import sys
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.tokenizer import tokenizer_of
from model import GPT
from tools.sample import load_model

ROOT = Path(__file__).resolve().parent.parent
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
NUM_SCENES = 10_042
BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}  # padded tokens in one forward pass


class Scene(NamedTuple):
    context: str
    endings: tuple[str, ...]
    label: int


# --- the scenes -----------------------------------------------------------------------------------

def read_scenes(path: Path) -> list[Scene]:
    """The scenes of a JSON-lines file with ctx, endings, label. Raises OSError, ValueError."""
    scenes = []
    # Not splitlines(), which ends a line at U+2028 too: HellaSwag has some.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            scene = Scene(fields["ctx"], tuple(fields["endings"]), int(fields["label"]))
            if not 0 <= scene.label < len(scene.endings):
                raise ValueError(f"label {scene.label} of {len(scene.endings)} endings")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected JSON with ctx, endings and label "
                             f"({type(error).__name__}: {error})") from None
        scenes.append(scene)
    if not scenes:
        raise ValueError(f"{path}: expected scenes, one a line, got an empty file")
    return scenes


def fetch(path: Path, url: str = URL) -> Path:
    """The validation scenes at `path`, whole or not at all. Raises OSError without a network."""
    if path.is_file():
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            temporary.write_bytes(answer.read())
        count = len(read_scenes(temporary))
        if count != NUM_SCENES:
            raise OSError(f"expected {NUM_SCENES:,} scenes, got {count:,}")
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot fetch HellaSwag: {error}. Without a network bring the file of {url} "
                      "here and give it as --file") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


# --- the score ------------------------------------------------------------------------------------

def rows_of(scene: Scene, encode, bos_id: int, seq_len: int) -> Iterator[tuple[list[int], int]]:
    """(tokens, how many of them are the ending) for each ending. What is longer than the model's
    rows loses its beginning."""
    context = [bos_id, *map(int, encode(scene.context))]
    for text in scene.endings:
        ending = [int(token) for token in encode(" " + text)]
        tokens = (context + ending)[-seq_len - 1:]
        yield tokens, min(len(ending), len(tokens) - 1)


@torch.no_grad()
def ending_losses(model: GPT, rows: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """(rows, 2), fp64 on the CPU: sum and mean over the ending's tokens of their losses in nats."""
    device, bos_id = next(model.parameters()).device, model.config.bos_id
    longest = max(len(tokens) for tokens, _ in rows)
    # Padding comes after the ending, where causal attention does not see it.
    padded = torch.tensor([tokens + [bos_id] * (longest - len(tokens)) for tokens, _ in rows])
    counts = torch.tensor([count for _, count in rows])
    last = torch.tensor([len(tokens) - 1 for tokens, _ in rows])  # targets end there
    place = torch.arange(longest - 1)
    ends_BT = (place >= (last - counts)[:, None]) & (place < last[:, None])
    x_BTC = model.hidden(padded[:, :-1].to(torch.int32).to(device))
    logits_NV = model.logits(x_BTC[ends_BT.to(device)])[:, :model.config.vocab_size]
    losses_N = F.cross_entropy(logits_NV, padded[:, 1:][ends_BT].to(device), reduction="none")
    which_N = torch.arange(len(rows)).repeat_interleave(counts)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    sums.index_add_(0, which_N, losses_N.double().cpu())
    return torch.stack([sums, sums / counts], dim=1)


def batches(scenes: Iterable[Scene], encode, bos_id: int, seq_len: int,
            num_tokens: int) -> Iterator[tuple[list[Scene], list[tuple[list[int], int]]]]:
    """Consecutive scenes with their rows, as many as num_tokens hold with padding."""
    some: list[Scene] = []
    rows: list[tuple[list[int], int]] = []
    for scene in scenes:
        more = list(rows_of(scene, encode, bos_id, seq_len))
        if rows and max(len(tokens) for tokens, _ in rows + more) * len(rows + more) > num_tokens:
            yield some, rows
            some, rows = [], []
        some.append(scene)
        rows += more
    if rows:
        yield some, rows


@torch.compiler.set_stance("force_eager")
def score(model: GPT, scenes: Sequence[Scene]) -> tuple[int, int]:
    """How many scenes the model ends right: by the sum, and by the mean of the ending's losses."""
    tokenizer = tokenizer_of(model.config.vocab_size)
    encode = tokenizer.encoder()
    at_once = BATCH_TOKENS.get(next(model.parameters()).device.type, BATCH_TOKENS["cpu"])
    right, model = torch.zeros(2, dtype=torch.long), model.eval()
    with tqdm(total=len(scenes), unit="scene", disable=None, leave=False) as bar:
        for some, rows in batches(scenes, encode, tokenizer.bos_id, model.config.seq_len, at_once):
            losses = ending_losses(model, rows)
            for scene, four in zip(some, losses.split([len(s.endings) for s in some])):
                right += four.argmin(0) == scene.label
            bar.update(len(some))
    return tuple(right.tolist())


def report(right: tuple[int, int], total: int) -> str:
    """The score in words, with the 95% interval of a share (Wilson's)."""
    by_sum, by_mean = (count / total for count in right)
    z2 = 1.96**2 / total
    middle, half = by_mean + z2 / 2, math.sqrt(z2 * (by_mean * (1 - by_mean) + z2 / 4))
    low, high = (100 * (middle + side * half) / (1 + z2) for side in (-1, 1))
    return (f"HellaSwag: {100 * by_mean:.2f}% of {total:,} scenes right (95% interval {low:.1f} to "
            f"{high:.1f}); {100 * by_sum:.2f}% by the sum. Chance 25%, GPT-2 (124M) 29.55%")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="logs/RUN of a training run, or a checkpoint of one")
    parser.add_argument("--file", type=Path, help="JSON lines with ctx, endings, label; default: "
                        "the validation scenes, fetched into data/")
    parser.add_argument("--limit", type=int, help="only so many scenes")
    args = parser.parse_args(argv)
    try:
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"--limit: expected a whole number from 1, got {args.limit}")
        model, _ = load_model(args.run)
        scenes = read_scenes(args.file or fetch(ROOT / "data" / "hellaswag_val.jsonl"))
        scenes = scenes[:args.limit]
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        print(report(score(model, scenes), len(scenes)))
    except (ValueError, OSError) as error:  # no such model or file; no network
        print(f"tools.hellaswag: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
