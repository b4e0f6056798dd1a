"""Token shards: the .bin format, read like a stranger's file, written whole or not at all.

    256 little-endian int32   magic 20240520, version 1, number of tokens, 253 unused (0)
    count little-endian uint16   the tokens

    python -m data.shards FILES ...                      check, print tokens, documents, sha256
    python -m data.shards FILES ... --write MANIFEST     note sha256 and names, as `sha256sum` does
    python -m data.shards FILES ... --manifest MANIFEST  compare with such a note

The format is llm.c's, so shards made for it or for modded-nanogpt can be used as they are.
"""

import argparse
import glob
import hashlib
import os
import shlex
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
MAX_COUNT = 2**31 - 1  # the header's count is an int32
LLAMA3_MAGIC = 20240801  # llm.c's format with 32-bit tokens
GPT2_VOCAB_SIZE = 50257
SCAN_TOKENS = 1 << 22  # scans go piece by piece: 8 MB at a time instead of a 100 MB mask

CONVERT = "make shards from text with `python -m data.fineweb tokenize FILES`"


class ShardError(ValueError):
    """A shard that must not be trained on; the message names the file and the fault."""


def read_header(path: str | os.PathLike) -> int:
    """Number of tokens in a shard, from its header and its size on disk; no token is read."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such shard (current folder {os.getcwd()})") from None
    except IsADirectoryError:
        raise ShardError(f"{path}: expected a shard, got a folder") from None
    if foreign := _foreign_tokens(head):
        raise ShardError(f"{path}: expected a shard, got {foreign}; convert: "
                         f"{convert_command(Path(path))}")
    if len(head) < HEADER_BYTES:
        raise ShardError(
            f"{path}: expected a header of {HEADER_BYTES} bytes, got a file of {size} bytes"
        )
    magic, version, count = (int(n) for n in np.frombuffer(head, "<i4")[:3])
    if magic == LLAMA3_MAGIC:
        raise ShardError(
            f"{path}: magic {magic} marks 32-bit tokens; these are not GPT-2's; {CONVERT}"
        )
    if magic != MAGIC:
        looks = " (this looks like an HTML page)" if head.lstrip()[:1] == b"<" else ""
        raise ShardError(f"{path}: expected magic {MAGIC}, got {magic}{looks}; {CONVERT}")
    if version != VERSION:
        raise ShardError(f"{path}: expected version {VERSION}, got {version}; {CONVERT}")
    if count <= 0:
        raise ShardError(f"{path}: expected a token count of 1 to {MAX_COUNT}, got {count}")
    body = size - HEADER_BYTES
    if body % 2:
        raise ShardError(
            f"{path}: {body} bytes follow the header, an odd number, but a token has two bytes"
        )
    expected = HEADER_BYTES + 2 * count
    if size < expected:
        raise ShardError(
            f"{path}: truncated: expected {expected} bytes for {count} tokens, found {size}; "
            "remove it and fetch it again"
        )
    if size > expected:
        raise ShardError(
            f"{path}: expected {expected} bytes for {count} tokens, found {size}: "
            f"{size - expected} bytes too many"
        )
    return count


def _foreign_tokens(head: bytes) -> str:
    """What a file of tokens without our header is by its first bytes; "" if it is none."""
    if head[:6] == b"\x93NUMPY":
        return "numpy's .npy"
    tokens = np.frombuffer(head[: len(head) // 2 * 2], "<u2")
    # A header is mostly zeros, and text is ASCII for the most part.
    if (len(head) == HEADER_BYTES and tokens.max() < GPT2_VOCAB_SIZE and (tokens == 0).mean() < 0.5
            and not head[:64].isascii()):
        return "16-bit tokens without a header, as nanoGPT's"
    return ""


def convert_command(path: Path) -> str:
    """The command that makes shards of a file of tokens, with the file for validation beside it."""
    val = path.with_name(path.name.replace("train", "val"))
    beside = f" --val {shlex.quote(str(val))}" if val != path and val.exists() else ""
    return (f"python -m data.fineweb tokenize {shlex.quote(str(path))}{beside} --out "
            "data/mine")


def read_shard(
    path: str | os.PathLike, *, vocab_size: int | None = None, bos_id: int | None = None
) -> np.ndarray:
    """The tokens of a shard as a read-only uint16 memmap (count,), after every check.

    vocab_size: refuse tokens >= vocab_size (pass 50257 for GPT-2, not the padded 50304: rows of the
    padding would be trained on silently). bos_id: refuse a shard in which this token is missing.
    A full scan of 100M tokens takes about 0.05 s once the file is in the page cache.
    """
    count = read_header(path)
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None and vocab_size <= np.iinfo(np.uint16).max:
        for start in range(0, count, SCAN_TOKENS):
            piece = tokens[start : start + SCAN_TOKENS]
            if piece.max() >= vocab_size:
                offset = start + int(np.argmax(piece >= vocab_size))
                of_gpt2 = vocab_size < GPT2_VOCAB_SIZE and int(piece.max()) < GPT2_VOCAB_SIZE
                raise ShardError(
                    f"{path}: token {int(tokens[offset])} at offset {offset} is outside the "
                    f"vocabulary: expected 0 to {vocab_size - 1}"
                    + f" (GPT-2's tokens: --vocab_size {GPT2_VOCAB_SIZE})" * of_gpt2
                )
    if bos_id is not None and not any(
        (tokens[start : start + SCAN_TOKENS] == bos_id).any()
        for start in range(0, count, SCAN_TOKENS)
    ):
        raise ShardError(
            f"{path}: no document start (token {bos_id}) among {count} tokens; each document must "
            f"open with it; {CONVERT}"
        )
    return tokens


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write tokens, an integer array (count,) of values 0..65535: a whole shard, or none."""
    path = Path(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ShardError(
            f"{path}: expected a flat integer array, got {tokens.dtype} of shape {tokens.shape}"
        )
    if not 1 <= len(tokens) <= MAX_COUNT:
        raise ShardError(f"{path}: expected 1 to {MAX_COUNT} tokens, got {len(tokens)}")
    if tokens.dtype != np.uint16 and not 0 <= tokens.min() <= tokens.max() <= 65535:
        raise ShardError(
            f"{path}: tokens must fit 16 bits (0 to 65535), got {tokens.min()} to {tokens.max()}"
        )
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            file.write(np.ascontiguousarray(tokens, "<u2"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name must survive a power cut too
    finally:
        os.close(folder)


def find(pattern: str | os.PathLike) -> list[Path]:
    """Files that match a glob, sorted by name: the order of training."""
    if os.path.isfile(pattern):  # a name with [ or * in it is still a name
        return [Path(pattern)]
    files = sorted(Path(name) for name in glob.glob(os.fspath(pattern)))
    if not files:
        raise FileNotFoundError(
            f"no file matches {os.fspath(pattern)!r} (current folder {os.getcwd()}); "
            "`python -m data.fineweb --shards 9` fetches the FineWeb shards"
        )
    return files


def check_disjoint(train_files: Iterable, val_files: Iterable) -> None:
    """Refuse a file that is trained on and validated on, under whatever name or link."""
    train = {os.path.realpath(file): file for file in train_files}
    for file in val_files:
        if os.path.realpath(file) in train:
            raise ShardError(
                f"{file} is a validation shard and a training shard "
                f"({train[os.path.realpath(file)]}): the validation loss would mean nothing"
            )


def sha256_files(files: Iterable[str | os.PathLike]) -> list[str]:
    """sha256 of each file, several at once (about 0.2 to 0.6 s for a shard of 100M tokens)."""

    def digest(path: str | os.PathLike) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, files))


def data_digest(files: Iterable[str | os.PathLike]) -> str:
    """One sha256 over the contents of files in their order; names and folders do not matter."""
    return hashlib.sha256("".join(sha256_files(files)).encode()).hexdigest()


def write_manifest(files: Iterable[str | os.PathLike], manifest: str | os.PathLike) -> None:
    """Note the sha256 of files by name, one line each, in the form that `sha256sum -c` reads."""
    files = list(files)
    lines = [f"{sha}  {Path(f).name}\n" for sha, f in zip(sha256_files(files), files)]
    temporary = Path(manifest).with_name(f".{Path(manifest).name}.{os.getpid()}.tmp")
    temporary.write_text("".join(lines))
    os.replace(temporary, manifest)


def check_manifest(files: Iterable[str | os.PathLike], manifest: str | os.PathLike) -> None:
    """Refuse files whose sha256 is not the one noted, or that the manifest does not know."""
    noted = {}
    for number, line in enumerate(Path(manifest).read_text().splitlines(), 1):
        sha, _, name = line.partition("  ")
        if len(sha) != 64 or not name:
            raise ShardError(f"{manifest}: line {number}: expected `sha256  name`, got {line!r}")
        noted[name] = sha
    files = list(files)
    for file, found in zip(files, sha256_files(files)):
        expected = noted.get(Path(file).name)
        if expected is None:
            raise ShardError(f"{file}: not in the manifest {manifest}")
        if expected != found:
            raise ShardError(
                f"{file}: its content changed: expected sha256 {expected}, got {found} "
                f"(manifest {manifest}); fetch it again or write a new manifest"
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.shards", description="Check token shards and their manifest."
    )
    parser.add_argument("files", nargs="+", help="shards, or quoted patterns")
    parser.add_argument("--vocab_size", type=int, default=50257, help="default 50257 (GPT-2)")
    parser.add_argument("--bos_id", type=int, default=50256, help="default 50256 (GPT-2)")
    parser.add_argument("--manifest", help="compare with the sha256 noted in this file")
    parser.add_argument("--write", metavar="MANIFEST", help="note the sha256 of the files")
    args = parser.parse_args(argv)
    try:
        files = [file for pattern in args.files for file in find(pattern)]
        for file, sha in zip(files, sha256_files(files)):
            tokens = read_shard(file, vocab_size=args.vocab_size, bos_id=args.bos_id)
            documents = sum(
                int(np.count_nonzero(tokens[start : start + SCAN_TOKENS] == args.bos_id))
                for start in range(0, len(tokens), SCAN_TOKENS)
            )
            print(f"{file}: {len(tokens):,} tokens, {documents:,} documents, sha256 {sha}")
        if args.manifest:
            check_manifest(files, args.manifest)
            print(f"all as noted in {args.manifest}")
        if args.write:
            write_manifest(files, args.write)
            print(f"noted in {args.write}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
