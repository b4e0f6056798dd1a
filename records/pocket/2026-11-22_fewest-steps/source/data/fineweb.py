"""FineWeb's published GPT-2 tokens, or your own text as such shards.

    python -m data.fineweb --shards 9            fetch fineweb_val_000000, fineweb_train_000001..9
    python -m data.fineweb tokenize FILES ...    .jsonl[.gz], .txt[.gz], .parquet -> shards
    python -m data.fineweb tokenize --help

Shards of 100M tokens (200 MB) come from the dataset kjj0/fineweb10B-gpt2 on the Hugging Face hub,
several at once; a broken connection is resumed where it broke, in this call or in the next one,
and a file gets its name only after its sha256 and its tokens were checked. HF_ENDPOINT or
--endpoint names another server.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from data.shards import MAGIC, ShardError, read_header, read_shard, write_shard

if TYPE_CHECKING:
    import tiktoken

REPO = "kjj0/fineweb10B-gpt2"
NUM_TRAIN_SHARDS = 103  # all that are published
SHARD_TOKENS = 100_000_000
VOCAB_SIZE, BOS = 50257, 50256  # GPT-2
FOLDER = Path(__file__).resolve().parent / "fineweb10B"


def file_names(num_train_shards: int) -> tuple[list[str], list[str]]:
    """Names of the first training shards, numbered from 1, and of the validation shard."""
    if not 1 <= num_train_shards <= NUM_TRAIN_SHARDS:
        raise ValueError(f"expected 1 to {NUM_TRAIN_SHARDS} shards, got {num_train_shards}")
    train = [f"fineweb_train_{number:06d}.bin" for number in range(1, num_train_shards + 1)]
    return train, ["fineweb_val_000000.bin"]


def ensure(
    num_train_shards: int,
    folder: str | os.PathLike = FOLDER,
    *,
    endpoint: str | None = None,
    jobs: int = 4,
    attempts: int = 3,
) -> tuple[list[Path], list[Path]]:
    """Training and validation shards of FineWeb in folder; those that are missing are fetched.

    endpoint: another server than the hub (default: HF_ENDPOINT, or the hub). jobs: files at once.
    attempts: a file that breaks off is resumed this often, besides the tries of huggingface_hub.
    Raises ShardError or OSError with one sentence; what was finished stays, also partly.
    """
    folder = Path(folder)
    train, val = file_names(num_train_shards)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second launch waits instead of fetching as well
        missing = []
        for name in val + train:
            if (folder / name).exists():
                read_header(folder / name)
            else:
                missing.append(name)
        if missing:
            print(
                f"fetching {len(missing)} of {len(train) + len(val)} FineWeb shards "
                f"(200 MB each) into {folder}", flush=True,
            )
        stop = threading.Event()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for task in as_completed([
                    pool.submit(_fetch_or_stop, name, folder, endpoint, attempts, stop)
                    for name in missing
                ]):
                    task.result()
            except BaseException:  # also Ctrl-C: the other files stop at their next megabytes
                stop.set()
                raise
    return [folder / name for name in train], [folder / name for name in val]


def _fetch_or_stop(
    name: str, folder: Path, endpoint: str | None, attempts: int, stop: threading.Event
) -> None:
    """One shard; when it fails, the others need not go on, and only this one says why."""
    if stop.is_set():
        return
    try:
        _fetch(name, folder, endpoint, attempts, stop)
    except BaseException:
        if not stop.is_set():
            stop.set()
            raise


class _Part(io.BufferedWriter):
    """A file being fetched: appends, and breaks off when another file failed."""

    def __init__(self, path: Path, stop: threading.Event):
        super().__init__(io.FileIO(path, "ab"))
        self.stop = stop

    def write(self, chunk: bytes) -> int:
        if self.stop.is_set():
            raise InterruptedError("stopped with the other files")
        return super().write(chunk)


def _fetch(
    name: str, folder: Path, endpoint: str | None, attempts: int, stop: threading.Event
) -> None:
    """One shard, from wherever an earlier attempt broke off; checked before it gets its name."""
    # Not at the top: only those who fetch need it, and it takes 0.3 s.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get

    url = hf_hub_url(REPO, name, repo_type="dataset", endpoint=endpoint)
    server = url.split("/datasets/")[0]
    started = time.perf_counter()
    try:
        about = get_hf_file_metadata(url)
    except Exception as error:  # its HTTP library, and so the class, differs between versions
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            raise OSError(f"{server} answered {status} for {name} of {REPO}") from error
        raise OSError(
            f"cannot reach {server} for {name}: {_first_line(error)}. Without a network: copy the "
            f"shards to {folder}, or train on the built-in corpus (`./run.sh --scale pocket`)"
        ) from error
    if about.commit_hash is None or about.etag is None or about.size is None:
        raise OSError(
            f"{server} answered for {name}, but not as a Hugging Face hub does (a login page or a "
            "proxy?); check HF_ENDPOINT, --endpoint and the proxy's settings"
        )
    # huggingface_hub drops partial files at the end of a call; kept here under the name of their
    # content, they are resumed by the next one.
    etag = hashlib.sha256(about.etag.encode()).hexdigest()[:12]
    part = folder / f".{name}.{etag}.tmp"
    for attempt in range(1, attempts + 1):
        size = part.stat().st_size if part.exists() else 0
        if size > about.size:
            part.unlink()
            size = 0
        try:
            with _Part(part, stop) as file:
                http_get(url, file, resume_size=size, expected_size=about.size,
                         displayed_filename=name)
            break
        except Exception as error:
            _refuse_foreign(part, name, server)
            if attempt == attempts or stop.is_set():
                raise OSError(
                    f"{name}: broke off at {part.stat().st_size:,} of {about.size:,} bytes "
                    f"({_first_line(error)}); the next call resumes there"
                ) from error
            time.sleep(0.5 * attempt)
    _refuse_foreign(part, name, server)
    try:
        if len(about.etag) == 64:  # large files: the hub's etag is their sha256
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != about.etag:
                raise ShardError(f"expected sha256 {about.etag}, got {found}")
        num_tokens = len(read_shard(part, vocab_size=VOCAB_SIZE, bos_id=BOS))
    except ShardError as error:
        part.unlink()
        raise ShardError(
            f"{name} from {server} arrived broken and was removed: {error}"
        ) from error
    os.replace(part, folder / name)
    for other in folder.glob(f".{name}.*.tmp"):  # parts of an older version of the file
        other.unlink()
    seconds = time.perf_counter() - started
    print(f"{name}: {num_tokens:,} tokens, checked, {seconds:.1f} s", flush=True)


def _refuse_foreign(part: Path, name: str, server: str) -> None:
    """Drop what does not even begin like a shard, lest the next call resumes behind it."""
    with open(part, "rb") as file:
        head = file.read(4)
    if head and head != np.int32(MAGIC).astype("<i4").tobytes()[: len(head)]:
        part.unlink()
        kind = "an HTML page" if head[:1] == b"<" else "something else"
        raise ShardError(f"{server} sent {kind} instead of the shard {name}; it was removed")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- your own text --------------------------------------------------------------------------------


def gpt2_encoding() -> "tiktoken.Encoding":
    """GPT-2's byte-pair encoding; tiktoken fetches its ranks once and keeps them."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: wrong hash
        raise OSError(
            f"tiktoken cannot get GPT-2's ranks ({_first_line(error)[:120]}). Without a network, "
            "set TIKTOKEN_CACHE_DIR to a folder that has them: run `TIKTOKEN_CACHE_DIR=ranks "
            "python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"` on a machine with a "
            "network and copy the folder `ranks` here (data/README.md says more)"
        ) from error


@contextlib.contextmanager
def _text(path: Path) -> Iterator[IO[str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from None
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path}: broken gzip file: {error}") from None


def read_documents(path: str | os.PathLike, text_field: str = "text") -> Iterator[str]:
    """Documents of a file in their order: .jsonl, .jsonl.gz, .txt, .txt.gz, .parquet.

    A text file is one document, or several between lines that say <|endoftext|>.
    """
    path = Path(path)
    suffix = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])
    if suffix in (".jsonl", ".jsonl.gz"):
        with _text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}: line {number}: not JSON: {error}") from None
                if not isinstance(entry, dict) or not isinstance(entry.get(text_field), str):
                    has = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
                    raise ValueError(
                        f"{path}: line {number}: expected an object with a string {text_field!r}, "
                        f"got {has}; --text_field names another"
                    )
                yield entry[text_field]
    elif suffix in (".txt", ".txt.gz"):
        with _text(path) as file:
            lines = []
            for line in file:
                if line.strip() == "<|endoftext|>":
                    yield "".join(lines)
                    lines = []
                else:
                    lines.append(line)
            yield "".join(lines)
    elif suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(
                f"{path}: reading parquet needs pyarrow, which is not installed: "
                "`pip install pyarrow`, or give .jsonl, .jsonl.gz or .txt"
            ) from None
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise ValueError(
                    f"{path}: expected a column {text_field!r}, got "
                    f"{', '.join(file.schema_arrow.names)}; --text_field names another"
                )
            for batch in file.iter_batches(columns=[text_field]):
                yield from batch.column(0).to_pylist()
    else:
        raise ValueError(
            f"{path}: expected .jsonl, .jsonl.gz, .txt, .txt.gz or .parquet, got {suffix!r}"
        )


def encode_documents(
    documents: Iterable[str], encoding: "tiktoken.Encoding", jobs: int
) -> Iterator[np.ndarray]:
    """BOS and tokens (n,) uint16 of each document that is not empty, in their order.

    Threads are enough: tiktoken lets go of the interpreter's lock while it encodes.
    """
    bos = np.array([encoding.eot_token], np.uint16)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [
            np.concatenate([bos, encoding.encode_to_numpy(t, disallowed_special=())],
                           dtype=np.uint16, casting="unsafe")
            for t in texts
        ]

    with ThreadPoolExecutor(jobs) as pool:
        waiting, texts, chars = deque(), [], 0
        for document in documents:
            if not document:
                continue
            texts.append(document)
            chars += len(document)
            if chars >= 1 << 18:  # tasks long enough that handing them over costs nothing
                waiting.append(pool.submit(encode, texts))
                texts, chars = [], 0
                while len(waiting) > 4 * jobs:
                    yield from waiting.popleft().result()
        waiting.append(pool.submit(encode, texts))
        while waiting:
            yield from waiting.popleft().result()


def tokenize(
    files: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    name: str = "text",
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    num_val_shards: int = 1,
    encoding: "tiktoken.Encoding | None" = None,
    jobs: int | None = None,
) -> tuple[list[Path], list[Path]]:
    """Turn text files into shards folder/NAME_{train,val}_%06d.bin; returns (train, val) files.

    Documents keep their order and open with BOS (<|endoftext|>, 50256 in GPT-2); the first
    num_val_shards shards are for validation. A shard holds at most shard_tokens and opens with a
    document: one that does not fit any more goes into the next shard, and only a document longer
    than a whole shard is cut. All shards appear at the end, or none do.
    """
    files, folder = [Path(file) for file in files], Path(folder)
    if shard_tokens < 2 or num_val_shards < 0:
        raise ValueError(
            f"expected shard_tokens >= 2 and num_val_shards >= 0, got {shard_tokens} and "
            f"{num_val_shards}"
        )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file (current folder {os.getcwd()})")
    encoding = encoding or gpt2_encoding()
    if encoding.n_vocab > 65536:
        raise ValueError(
            f"the encoding {encoding.name} has {encoding.n_vocab} tokens; shards hold 16-bit "
            "tokens, at most 65536"
        )
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(folder.glob(f"{name}_train_*.bin")) + sorted(folder.glob(f"{name}_val_*.bin"))
    if there:
        raise FileExistsError(
            f"{there[0]} is there already: remove the old shards, or choose another --name or --out"
        )
    documents = (document for file in files for document in read_documents(file, text_field))
    staging = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=folder))
    buffer, filled, made = np.empty(shard_tokens, np.uint16), 0, []

    def finish_shard() -> None:
        split = "val" if len(made) < num_val_shards else "train"
        made.append(staging / f"{name}_{split}_{len(made):06d}.bin")
        write_shard(made[-1], buffer[:filled])

    try:
        for tokens in encode_documents(documents, encoding, jobs or len(os.sched_getaffinity(0))):
            if filled and filled + len(tokens) > shard_tokens:
                finish_shard()
                filled = 0
            while len(tokens) > shard_tokens:
                buffer[:], filled = tokens[:shard_tokens], shard_tokens
                finish_shard()
                tokens, filled = tokens[shard_tokens:], 0
            buffer[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        if filled:
            finish_shard()
        if len(made) <= num_val_shards:
            total = sum(read_header(file) for file in made)
            raise ValueError(
                f"{total:,} tokens in all: they fill {len(made)} shard(s), and the first "
                f"{num_val_shards} are for validation, so none is left to train on; choose "
                f"--shard_tokens below {max(2, total // (num_val_shards + 1)):,}"
            )
        finished = []
        for file in made:
            finished.append(folder / file.name)
            os.replace(file, finished[-1])
    finally:
        shutil.rmtree(staging)
    return finished[num_val_shards:], finished[:num_val_shards]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _tokenize_main(argv[1:]) if argv[:1] == ["tokenize"] else _fetch_main(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; call again to go on", file=sys.stderr)
        return 130


def _fetch_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.fineweb",
        description="Fetch FineWeb as GPT-2 tokens. `tokenize --help`: make shards of your text.",
    )
    parser.add_argument("--shards", type=int, default=9, help="training shards (default 9)")
    parser.add_argument("--folder", default=FOLDER, help=f"default {FOLDER}")
    parser.add_argument("--endpoint", help="another server than HF_ENDPOINT or the hub")
    parser.add_argument("--jobs", type=int, default=4, help="files at once (default 4)")
    args = parser.parse_args(argv)
    train, val = ensure(args.shards, args.folder, endpoint=args.endpoint, jobs=args.jobs)
    total = sum(read_header(file) for file in train)
    print(f"{len(train)} training shards ({total:,} tokens) and {len(val)} for validation "
          f"in {args.folder}")
    return 0


def _tokenize_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.fineweb tokenize", description="Turn text into shards of GPT-2 tokens."
    )
    parser.add_argument("files", nargs="+", help=".jsonl[.gz], .txt[.gz] or .parquet, in order")
    parser.add_argument("--out", required=True, help="folder for the shards")
    parser.add_argument("--name", default="text", help="shards are NAME_train_%%06d.bin")
    parser.add_argument("--text_field", default="text", help="field or column (default text)")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="default 100M")
    parser.add_argument("--val_shards", type=int, default=1, help="first shards, default 1")
    parser.add_argument("--jobs", type=int, help="threads (default: all cores)")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    train, val = tokenize(
        args.files, args.out, name=args.name, text_field=args.text_field,
        shard_tokens=args.shard_tokens, num_val_shards=args.val_shards, jobs=args.jobs,
    )
    seconds = time.perf_counter() - started
    total = sum(read_header(file) for file in train + val)
    print(f"{len(train)} training and {len(val)} validation shards, {total:,} tokens, "
          f"{seconds:.1f} s ({total / seconds:,.0f} tokens/s) in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
