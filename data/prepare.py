"""Shards of your own text, and a manifest that says what they are.

    python -m data.fineweb tokenize FILES, FOLDERS or 'PATTERNS' --out data/mine
    python -m data.fineweb tokenize --help

Writes data/mine/train_000001.bin, ..., val_000000.bin and manifest.json: tokenizer, vocabulary,
tokens and documents. The trainer reads it, so `./run.sh --data_dir data/mine` needs nothing else.
An interrupted call leaves its whole shards in data/mine/.partial; the same call goes on there.
"""

import argparse
import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import text
from data.shards import read_header, read_shard, write_shard
from data.text import Piece, Reading
from data.tokenizer import TOKENIZERS, Tokenizer
from records.rules import FINEWEB_VAL_TOKENS

ROOT = Path(__file__).resolve().parent.parent
SHARD_TOKENS = 100_000_000
VAL_EVERY = 20  # every so many-th document is for validation
MIN_VAL_TOKENS = 1024 + 1  # a row of validation and its last target
MAX_VAL_TOKENS = FINEWEB_VAL_TOKENS + 1  # the trainer reads no more at any scale
MANIFEST, PARTIAL = "manifest.json", ".partial"


@dataclass(frozen=True)
class Manifest:
    """What the shards of a folder are."""

    tokenizer: str  # a name in TOKENIZERS
    vocab_size: int
    bos_id: int
    train_files: list[str]
    val_files: list[str]
    train_tokens: int
    val_tokens: int
    documents: int

    def write(self, folder: Path) -> None:
        _write_json(folder / MANIFEST, asdict(self))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder of shards; None where there is none. ValueError if it is broken, or
    where a shard that it names is missing."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text()))
        expected = TOKENIZERS[manifest.tokenizer]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a manifest of `python -m data.fineweb tokenize` "
                         f"({type(error).__name__}: {error}); make the shards again") from None
    if (manifest.vocab_size, manifest.bos_id) != (expected.vocab_size, expected.bos_id):
        raise ValueError(f"{path}: expected vocab_size {expected.vocab_size} and bos_id "
                         f"{expected.bos_id} of {manifest.tokenizer}, got {manifest.vocab_size} "
                         f"and {manifest.bos_id}; make the shards again")
    for name in (*manifest.train_files, *manifest.val_files):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such shard, though {path} names it; copy the "
                             "whole folder, or make the shards again")
    return manifest


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --- text to tokens -------------------------------------------------------------------------------

def encode_pieces(
    pieces: Iterable[Piece], encode: Callable[[str], np.ndarray] | None, jobs: int, start: int = 0
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """(number, tokens (n,) uint16 without BOS, opens) of the pieces from number `start` on.

    Threads are enough: tiktoken lets go of the interpreter's lock while it encodes.
    """

    def encode_task(task: list[tuple[int, Piece]]) -> list[tuple[int, np.ndarray, bool]]:
        return [(number, encode(p.body) if isinstance(p.body, str) else p.body, p.opens)
                for number, p in task]

    pool = ThreadPoolExecutor(jobs)
    try:
        waiting, task, size = deque(), [], 0
        for number, piece in enumerate(pieces):
            if number < start:
                continue
            task.append((number, piece))
            size += len(piece.body)
            if size >= text.PIECE_CHARS:  # so long that handing it over costs nothing
                waiting.append(pool.submit(encode_task, task))
                task, size = [], 0
                while len(waiting) > 4 * jobs:
                    yield from waiting.popleft().result()
        waiting.append(pool.submit(encode_task, task))
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# --- tokens to shards -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Place:
    """Where in the stream of pieces a shard ends."""

    piece: int = 0  # number of the first piece that is not wholly in shards
    skip: int = 0  # its tokens that are
    inside: bool = False  # a document that began before goes on there


class _Writer:
    """Cuts documents into shards of at most `size` tokens. A document that does not fit any more
    opens the next shard; only one longer than a shard is cut, and begins again with BOS."""

    def __init__(self, folder: Path, part: str, size: int, bos_id: int, place: Place = Place(),
                 files: Iterable[Path] = ()):
        self.folder, self.part, self.size, self.place = folder, part, size, place
        self.files = list(files)
        self.written = sum(map(read_header, self.files))  # tokens
        self.bos = np.array([bos_id], np.uint16)
        self.buffer, self.filled = np.empty(size, np.uint16), 0
        self.opened, self.opened_by = 0, 0  # the current document: place in buffer, first piece
        self.cut = place.inside  # whether a whole shard has a part of it

    @property
    def tokens(self) -> int:
        return self.written + self.filled

    def add(self, number: int, tokens: np.ndarray, opens: bool) -> Iterator[Path]:
        """Take a piece; yields each shard once it is on disk, and then self.place behind it."""
        if opens and self.filled == self.size:
            yield self._finish(self.size, Place(number))
        if opens:
            self.opened, self.opened_by, self.cut = self.filled, number, False
        done = self.place.skip if number == self.place.piece else 0
        if opens or (self.cut and not self.filled):
            self.put(self.bos)
        while done < len(tokens):
            if self.filled == self.size and self.opened:
                document = self.buffer[self.opened:].copy()
                yield self._finish(self.opened, Place(self.opened_by))
                self.opened = 0
                self.put(document)
            elif self.filled == self.size:
                self.cut = True
                yield self._finish(self.size, Place(number, done, True))
                self.put(self.bos)
            count = min(self.size - self.filled, len(tokens) - done)
            self.put(tokens[done:done + count])
            done += count

    def put(self, tokens: np.ndarray) -> None:
        self.buffer[self.filled:self.filled + len(tokens)] = tokens
        self.filled += len(tokens)

    def _finish(self, count: int, place: Place) -> Path:
        path = self.folder / f"{self.part}_{len(self.files) + (self.part == 'train'):06d}.bin"
        write_shard(path, self.buffer[:count])
        self.files.append(path)
        self.written, self.filled, self.place = self.written + count, 0, place
        return path

    def take_document(self) -> np.ndarray:
        """Take back the current document, with its BOS; it must not be cut."""
        document = self.buffer[self.opened:self.filled].copy()
        self.filled = self.opened
        return document

    def take_end(self, count: int) -> np.ndarray:
        """Take back the last `count` tokens or, where there are fewer, half of all, opened by
        BOS."""
        count, taken = min(count, self.tokens // 2), []
        while count > self.filled - 2 and self.files:  # all of this shard, and some before it
            taken.insert(0, self.buffer[:self.filled].copy())
            count, last = count - self.filled, read_shard(self.files.pop())
            self.filled, self.written = 0, self.written - len(last)
            self.put(last)
        self.filled -= max(0, count)
        tokens = np.concatenate([self.buffer[self.filled:self.filled + max(0, count)], *taken])
        return tokens if tokens[:1] == self.bos else np.concatenate([self.bos, tokens])

    def close(self) -> None:
        if self.filled:
            self._finish(self.filled, self.place)


def tokenize(
    files: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    val_files: Sequence[str | os.PathLike] = (),
    tokenizer: str = "gpt2",
    text_field: str = "text",
    encoding: str = "utf-8",
    shard_tokens: int = SHARD_TOKENS,
    jobs: int | None = None,
) -> Manifest:
    """Turn files of text (data/text.py) into shards and a manifest in `folder`.

    Documents keep their order and open with BOS; see _Writer. Validation: the documents of
    `val_files`; or every twentieth document, at most as many tokens as a run at full scale reads;
    or, where those are no row of 1,024 tokens or less than half of a twentieth, the end of the
    text. All shards appear at the end, or none do; what an interrupted call has made is kept in
    folder/.partial, and the same call goes on there. Raises ValueError or OSError in one line.
    """
    folder, tok = Path(folder), TOKENIZERS.get(tokenizer)
    if tok is None:
        raise ValueError(f"--tokenizer: expected {' or '.join(TOKENIZERS)}, got {tokenizer!r}")
    if shard_tokens < 2:
        raise ValueError(f"--shard_tokens: expected 2 or more, got {shard_tokens}")
    reading = Reading(text_field, encoding)
    train, notes = text.expand(files, folder)
    val, more = text.expand(val_files, folder)
    for note in notes + more:
        print(note, flush=True)
    if both := {p.resolve() for p in train} & {p.resolve() for p in val}:
        raise ValueError(f"{min(both)}: is given to train on and for validation")
    for path in train + val:
        text.check(path, reading)
        if tokenizer != "gpt2" and text.kind_of(path) in text.TOKEN_FILES:
            raise ValueError(f"{path}: has GPT-2's tokens; --tokenizer {tokenizer} needs text")
    only_tokens = all(text.kind_of(path) in text.TOKEN_FILES for path in train + val)
    encode = None if only_tokens else tok.encoder()
    there = [*folder.glob(MANIFEST), *sorted(folder.glob("*train*.bin")),
             *sorted(folder.glob("*val*.bin"))]
    new, partial = not folder.exists(), folder / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"{folder}: another call is writing there") from None
        work = _Work(partial, {
            "files": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns]
                      for p in train + val],
            "options": [len(val), tokenizer, text_field, encoding, shard_tokens]})
        try:
            if not (partial / MANIFEST).exists():
                if there:
                    raise FileExistsError(f"{there[0]} is there already: remove the old shards, or "
                                          "choose another --out")
                work.run(train, val, reading, encode, tok, shard_tokens,
                         jobs or len(os.sched_getaffinity(0)))
            manifest = _publish(partial, folder)
        except BaseException as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            said = _disk_full(folder, work.whole_shards, shard_tokens) if full else error
            made = work.whole_shards or (partial / MANIFEST).exists()
            if isinstance(error, ValueError) or not made:
                shutil.rmtree(partial)
                if new:
                    folder.rmdir()
            raise said from None
    shutil.rmtree(partial)
    for note in reading.notes():
        print(note, flush=True)
    return manifest


def _disk_full(folder: Path, whole_shards: int, shard_tokens: int) -> OSError:
    free = shutil.disk_usage(folder).free
    return OSError(
        f"the disk of {folder.resolve()} is full ({free / 1e6:,.0f} MB free, a shard needs "
        f"{2 * shard_tokens / 1e6:,.0f}): make room and call again"
        + f"; {whole_shards} whole shards are kept" * bool(whole_shards))


def _publish(partial: Path, folder: Path) -> Manifest:
    """Move the finished shards into the folder, the manifest last."""
    manifest = Manifest(**json.loads((partial / MANIFEST).read_text()))
    for name in (*manifest.train_files, *manifest.val_files, MANIFEST):
        if (partial / name).exists():  # else an earlier call has moved it
            os.replace(partial / name, folder / name)
    return manifest


class _Work:
    """One tokenisation, in a folder of its own; after each whole shard it notes where it is."""

    def __init__(self, partial: Path, made_from: dict):
        self.partial, self.made_from = partial, made_from
        self.place, self.documents, self.files = Place(), 0, []
        self.held_out = np.empty(0, np.uint16)  # documents for validation so far
        self.restore()

    @property
    def whole_shards(self) -> int:
        return len(self.files)

    def restore(self) -> None:
        """Go on from what an earlier call left; sweep it away where it does not fit."""
        state = {}
        if (self.partial / "state.json").exists():
            state = json.loads((self.partial / "state.json").read_text())
        if state.get("made_from") == self.made_from and (self.partial / MANIFEST).exists():
            return  # all was made, and some of it may have been moved
        if state.get("made_from") == self.made_from and all(
                (self.partial / name).exists() and read_header(self.partial / name) == count
                for name, count in state["shards"].items()):
            self.place, self.documents = Place(*state["place"]), state["documents"]
            self.files = [self.partial / name for name in state["shards"] if name != state["val"]]
            if state["val"]:
                self.held_out = np.array(read_shard(self.partial / state["val"]))
            if self.files:
                print(f"going on after {len(self.files)} whole shards of an earlier call",
                      flush=True)
            kept = {*state["shards"], "state.json", "lock"}
        else:
            if state:
                print("an earlier call was interrupted, but with other files or options: "
                      "starting anew", flush=True)
            kept = {"lock"}
        for path in self.partial.iterdir():
            if path.name not in kept:
                path.unlink()
        if "state.json" not in kept:
            self._write_state(Place(), None, [])

    def _write_state(self, place: Place, val: str | None, shards: list[str]) -> None:
        _write_json(self.partial / "state.json", {
            "made_from": self.made_from, "documents": self.documents,
            "place": [place.piece, place.skip, place.inside], "val": val,
            "shards": {name: read_header(self.partial / name) for name in shards}})

    def save(self, writer: _Writer, held_out: np.ndarray) -> None:
        """Note that the writer's shards are whole. The state before stays good until then."""
        self.files, val = writer.files, None
        if len(held_out):
            val = f"sofar_{len(held_out)}.bin"
            write_shard(self.partial / val, held_out)
        shards = [path.name for path in self.files] + [val] * bool(val)
        self._write_state(writer.place, val, shards)
        for path in self.partial.glob("sofar_*.bin"):
            if path.name != val:
                path.unlink()

    def run(self, train: list[Path], val: list[Path], reading: Reading, encode: Callable | None,
            tok: Tokenizer, shard_tokens: int, jobs: int) -> None:
        """All files to shards and a manifest, in self.partial."""
        first, val_documents = self.place, 0
        writer = _Writer(self.partial, "train", shard_tokens, tok.bos_id, first, self.files)
        val_writer = _Writer(self.partial, "val", shard_tokens if val else MAX_VAL_TOKENS,
                             tok.bos_id)
        with tqdm(total=sum(p.stat().st_size for p in train + val), unit="B", unit_scale=True,
                  desc="tokenising", disable=None, leave=False) as bar:
            def stream(paths: list[Path], start: int) -> Iterator[tuple[int, np.ndarray, bool]]:
                pieces = (piece for path in paths for piece in text.read(path, reading))
                for item in encode_pieces(pieces, encode, jobs, start):
                    bar.update(reading.bytes_read - bar.n)
                    yield item

            for number, tokens, opens in stream(val, 0):
                val_documents += opens
                for _ in val_writer.add(number, tokens, opens):
                    pass
            val_writer.put(self.held_out)
            for number, tokens, opens in stream(train, first.piece):
                if number > first.piece and opens:
                    self._document_ends(writer, None if val else val_writer)
                goes_on = number == first.piece and first.inside
                for path in writer.add(number, tokens, opens and not goes_on):
                    self.save(writer, val_writer.buffer[:0 if val else val_writer.filled])
                    tqdm.write(f"{path.name}: {read_header(path):,} tokens, "
                               f"{100 * reading.bytes_read / max(1, bar.total):.0f}% of the text "
                               "is read")
        if writer.filled:
            self._document_ends(writer, None if val else val_writer)
        total = writer.tokens + val_writer.tokens
        if not val:
            self._hold_out_the_end(writer, val_writer)
        for name, part in (("train on", writer), ("validate on", val_writer)):
            if part.tokens < 2:
                empty = [str(p) for p in train + val if p.stat().st_size == 0]
                raise ValueError(
                    f"too little text to {name}: {total} tokens in "
                    f"{self.documents + val_documents} documents"
                    + (f"; empty files: {', '.join(empty)}" if empty
                       else "".join(f"; {note}" for note in reading.notes())))
        writer.close()
        val_writer.close()
        Manifest(tok.name, tok.vocab_size, tok.bos_id, [p.name for p in writer.files],
                 [p.name for p in val_writer.files], writer.tokens, val_writer.tokens,
                 self.documents + val_documents).write(self.partial)

    def _document_ends(self, writer: _Writer, val_writer: _Writer | None) -> None:
        """Count it; every twentieth is held out, unless it is cut or more than a tenth of all."""
        self.documents += 1
        if val_writer and self.documents % VAL_EVERY == 0 and not writer.cut:
            held_out = val_writer.filled + writer.filled - writer.opened
            if held_out <= min(MAX_VAL_TOKENS, (writer.tokens + val_writer.filled) // 10):
                val_writer.put(writer.take_document())

    def _hold_out_the_end(self, writer: _Writer, val_writer: _Writer) -> None:
        """Where the documents held out are too few, the end of the text as well."""
        total, held_out = writer.tokens + val_writer.filled, val_writer.filled
        wanted = min(MAX_VAL_TOKENS - 1, max(total // VAL_EVERY, MIN_VAL_TOKENS), total // 2)
        if held_out < max(min(MIN_VAL_TOKENS, wanted), wanted // 2):
            val_writer.put(writer.take_end(wanted - held_out))


# --- command line ---------------------------------------------------------------------------------

def command_for(folder: Path) -> str:
    """The command that trains on the folder, from where this one was typed."""
    here = Path.cwd() == ROOT
    script = "./run.sh" if here else shlex.quote(str(ROOT / "run.sh"))
    return f"{script} --data_dir {shlex.quote(str(folder if here else folder.resolve()))}"


def _terminate(signum, frame) -> None:
    raise KeyboardInterrupt(signum)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.fineweb tokenize",
        description="Turn text into shards of tokens that `./run.sh --data_dir OUT` trains on.",
        epilog=text.__doc__.split("\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="files, folders or quoted patterns, in order")
    parser.add_argument("--out", required=True, help="folder for the shards")
    parser.add_argument("--val", nargs="+", default=[], metavar="FILE",
                        help="files for validation; default: a twentieth of the documents")
    parser.add_argument("--tokenizer", default="gpt2", choices=TOKENIZERS,
                        help="default gpt2; bytes: a small vocabulary, for small models")
    parser.add_argument("--text_field", default="text", help="field or column (default text)")
    parser.add_argument("--encoding", default="utf-8", help="of the text; default UTF-8")
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="default 100M")
    parser.add_argument("--jobs", type=int, help="threads (default: all cores)")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        manifest = tokenize(
            args.files, args.out, val_files=args.val, tokenizer=args.tokenizer,
            text_field=args.text_field, encoding=args.encoding, shard_tokens=args.shard_tokens,
            jobs=args.jobs)
    except KeyboardInterrupt as stop:
        kept = len(list(Path(args.out).glob(f"{PARTIAL}/train_*.bin")))
        print(f"interrupted; {kept} whole shards are kept in {Path(args.out) / PARTIAL}, the same "
              "command goes on there" if kept else "interrupted before the first whole shard; "
              "nothing is kept", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    total, seconds = manifest.train_tokens + manifest.val_tokens, time.perf_counter() - started
    print(f"{args.out}: {manifest.documents:,} document{'s' * (manifest.documents != 1)}, "
          f"{total:,} tokens ({manifest.tokenizer}): {manifest.train_tokens:,} to train on in "
          f"{len(manifest.train_files)} shard{'s' * (len(manifest.train_files) != 1)}, "
          f"{manifest.val_tokens:,} for validation; {seconds:.1f} s")
    if args.tokenizer == "gpt2" and not Path("/dev/nvidiactl").exists():
        print("note: on a CPU a model of bytes trains faster: --tokenizer bytes")
    print(f"next: {command_for(Path(args.out))}")
    return 0
