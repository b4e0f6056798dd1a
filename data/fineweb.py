"""FineWeb's published GPT-2 tokens, or your own text as such shards.

    python -m data.fineweb --shards 9            fetch fineweb_val_000000, fineweb_train_000001..9
    python -m data.fineweb tokenize FILES ...    shards of your own text: data/prepare.py
    python -m data.fineweb tokenize --help

Shards of 100M tokens (200 MB) come from the dataset kjj0/fineweb10B-gpt2 on the Hugging Face hub,
several at once; a broken connection is resumed where it broke, in this call or in the next one,
and a file gets its name only after its sha256 and its tokens were checked. HF_ENDPOINT or
--endpoint names another server.
"""

import argparse
import fcntl
import hashlib
import io
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from data import prepare
from data.shards import MAGIC, ShardError, read_header, read_shard

REPO = "kjj0/fineweb10B-gpt2"
NUM_TRAIN_SHARDS = 103  # all that are published
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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        return prepare.main(argv[1:]) if argv[:1] == ["tokenize"] else _fetch_main(argv)
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


if __name__ == "__main__":
    sys.exit(main())
