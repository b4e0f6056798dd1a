"""Batches from token shards: one global order, prefetched in a thread, resumable at any world size.

The recipe fixes rows before ranks exist: step s has batch_shape(s) = (num_rows, seq_len) rows, and
ranks take consecutive runs of them. So 1, 2, 3 or 8 ranks see the same tokens in the same order,
and a cursor names a place in the stream of tokens, never a rank. Three alignments:

    "none"      rows are contiguous; a step takes num_rows*seq_len+1 tokens and moves on by
                num_rows*seq_len (records 1-25)
    "row"       each row starts at a document start: the earliest one at least seq_len tokens after
                the row before it; the rest of the last document is skipped (record 26)
    "document"  rows are packed from whole documents, each cut at max_doc_len, the last one of a row
                cut to fill seq_len+1 tokens; the next row opens with the next document (29 on)

No row crosses from one shard into the next: a tail too short for a whole step is dropped. The files
end where they end: this is how the records read FineWeb.

With `repeat`, which text of one's own is read with, all documents are one endless stream, epoch
after epoch, each in a new order, and the data may be shorter than a step or a row. Rows are
contiguous ("none") or open with a document (the other two); but a document longer than a row goes
on in the next one, as often as it fills a row, and max_doc_len is not used.

Shapes: B rows of this rank, T = seq_len.
"""

import itertools
import math
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.shards import HEADER_BYTES, SCAN_TOKENS, ShardError, read_header, read_shard

ALIGNMENTS = ("none", "row", "document")


class OutOfTokens(ShardError):
    """The files do not last: more of them would help, while a bad shard must be mended."""


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one step. targets_BT[b, t] is the token after inputs_BT[b, t]."""

    inputs_BT: torch.Tensor  # int32
    targets_BT: torch.Tensor  # int64, as cross_entropy wants them
    docs_B2: torch.Tensor | None = None  # on the CPU: each row's documents, tokens of its longest


@dataclass(frozen=True)
class Supply:
    """What a run takes from its files; see check_enough_tokens."""

    present_tokens: int  # in all files
    needed_tokens: int  # passed over from the first file's start to the end of the last step
    num_shards: int  # files touched
    skipped_tokens: int  # of needed_tokens, those that are never an input
    cut_docs: int  # documents that are not used to their end


def rank_rows(num_rows: int, rank: int, world_size: int) -> range:
    """The rows of this rank: consecutive runs in rank order, the first ranks one row longer."""
    if not 0 <= rank < world_size:
        raise ValueError(f"expected a rank of 0 to {world_size - 1}, got {rank}")
    if world_size > num_rows:
        even = [n for n in range(1, num_rows + 1) if num_rows % n == 0]
        raise ValueError(
            f"{world_size} ranks cannot share {num_rows} rows: expected at most {num_rows} ranks "
            f"(evenly shared by {', '.join(map(str, even))})"
        )
    return _share(num_rows, rank, world_size)


def _share(num_rows: int, rank: int, world_size: int) -> range:
    quotient, longer = divmod(num_rows, world_size)
    start = rank * quotient + min(rank, longer)
    return range(start, start + quotient + (rank < longer))


class _Shard:
    """An open shard: its tokens, where documents start, and which document opens the next row."""

    def __init__(self, path: str | os.PathLike, vocab_size: int, bos_id: int, align: str):
        self.path, self.align = path, align
        checked = read_shard(
            path, vocab_size=vocab_size, bos_id=None if align == "none" else bos_id
        )
        self.tokens = checked.view(np.ndarray)  # slicing a memmap object costs ten times as much
        self.count = len(self.tokens)
        if align != "none":
            self.starts = np.concatenate([
                offset + np.flatnonzero(self.tokens[offset : offset + SCAN_TOKENS] == bos_id)
                for offset in range(0, self.count, SCAN_TOKENS)
            ])
            self.ends = np.append(self.starts[1:], self.count)
        self._links = (None, None)
        self._file = open(path, "rb")  # noqa: SIM115  kept for fstat, closed by close()

    def close(self) -> None:
        self._file.close()

    def check_size(self) -> None:
        """Refuse a file cut after it was mapped: reading past its end would kill us by SIGBUS."""
        expected, found = HEADER_BYTES + 2 * self.count, os.fstat(self._file.fileno()).st_size
        if found < expected:
            raise ShardError(
                f"{self.path}: cut while in use: expected {expected} bytes, found {found}"
            )

    def left(self, position: int) -> str:
        """What is left from position on, in the unit that rows need, for a message."""
        tokens = f"{self.count - position:,} tokens are left"
        if self.align == "none":
            return tokens
        documents = len(self.starts) - int(np.searchsorted(self.starts, position))
        return f"{documents:,} documents ({tokens}), of which each row opens with one"

    def _next_row_doc(self, seq_len: int, max_doc_len: int | None) -> list[int]:
        """For each document: if a row opens with it, which one opens the next row; -1: no room."""
        if self._links[0] != (seq_len, max_doc_len):
            if self.align == "row":
                links = np.searchsorted(self.starts, self.starts + seq_len)
                links[self.starts + seq_len + 1 > self.count] = -1
            else:
                lengths = self.ends - self.starts
                if max_doc_len is not None:
                    lengths = np.minimum(lengths, max_doc_len)
                filled = np.concatenate([[0], np.cumsum(lengths)])
                links = np.searchsorted(filled, filled[:-1] + seq_len + 1)
                links[links > len(lengths)] = -1
            self._links = ((seq_len, max_doc_len), links.tolist())
        return self._links[1]

    def plan(
        self, position: int, num_rows: int, seq_len: int, max_doc_len: int | None
    ) -> "_Plan | None":
        """The rows of a step that starts at position; None if what is left is too short."""
        if self.align == "none":
            after = position + num_rows * seq_len
            if after + 1 > self.count:
                return None
            return _Plan(position, seq_len, max_doc_len, None, after, cut_docs=0)
        links = self._next_row_doc(seq_len, max_doc_len)
        doc = int(np.searchsorted(self.starts, position))
        row_docs = [doc]
        for _ in range(num_rows):
            doc = links[doc] if doc < len(links) else -1
            if doc < 0:
                return None
            row_docs.append(doc)
        after = int(self.starts[doc]) if doc < len(links) else self.count
        if self.align == "row":
            opens, closes = self.starts[row_docs[:-1]], self.ends[np.array(row_docs[1:]) - 1]
            cut_docs = np.count_nonzero(opens + seq_len < closes)
        else:
            _, ends = self._doc_spans(row_docs, seq_len, max_doc_len)
            cut_docs = np.count_nonzero(ends < self.ends[row_docs[0] : row_docs[-1]])
        return _Plan(position, seq_len, max_doc_len, row_docs, after, int(cut_docs))

    def _doc_spans(
        self, row_docs: list[int], seq_len: int, max_doc_len: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each document of packed rows begins and, cut as the rows need it, ends."""
        first, last = row_docs[0], row_docs[-1]
        starts = self.starts[first:last]
        lengths = self.ends[first:last] - starts
        if max_doc_len is not None:
            lengths = np.minimum(lengths, max_doc_len)
        filled = np.cumsum(lengths)
        row_last = np.array(row_docs[1:]) - 1 - first  # the document that closes each row
        surplus = np.diff(filled[row_last], prepend=0) - (seq_len + 1)
        lengths[row_last] -= surplus
        return starts, starts + lengths

    def read(self, plan: "_Plan", rows: range) -> np.ndarray:
        """Rows of a plan as uint16 (B, T+1), a fresh copy or a view to be copied at once."""
        self.check_size()
        T, tokens = plan.seq_len, self.tokens
        if self.align == "none":
            start, stop = plan.position + rows.start * T, plan.position + rows.stop * T + 1
            return np.lib.stride_tricks.sliding_window_view(tokens[start:stop], T + 1)[::T]
        row_docs = plan.row_docs[rows.start : rows.stop + 1]
        if self.align == "row":
            return np.stack([tokens[s : s + T + 1] for s in self.starts[row_docs[:-1]].tolist()])
        starts, ends = self._doc_spans(row_docs, T, plan.max_doc_len)
        pieces = [tokens[s:e] for s, e in zip(starts.tolist(), ends.tolist())]
        return np.concatenate(pieces).reshape(len(rows), T + 1)


class _Stream:
    """The documents of all shards, epoch after epoch, as one endless stream of tokens.

    The order of an epoch follows from its number alone. Tokens before the first BOS of a shard are
    a document too.
    """

    def __init__(self, files: Sequence, vocab_size: int, bos_id: int):
        self.shards = []
        try:
            for file in files:
                self.shards.append(_Shard(file, vocab_size, bos_id, "none"))
        except BaseException:
            self.close()
            raise
        self.first = np.cumsum([0, *(shard.count for shard in self.shards)])  # of each shard
        starts = [[0]]
        for shard, first in zip(self.shards, self.first):
            for offset in range(0, shard.count, SCAN_TOKENS):
                piece = shard.tokens[offset:offset + SCAN_TOKENS]
                starts.append(first + offset + np.flatnonzero(piece == bos_id))
            starts.append([first + shard.count])
        self.starts = np.unique(np.concatenate(starts))[:-1]
        self.count = int(self.first[-1])
        self.lengths = np.diff(np.append(self.starts, self.count))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in the order of an epoch, and where in it each one ends."""
        if number not in self._epochs:
            # Raw bits: numpy promises them for ever, and not what permutation() makes of them.
            order = np.argsort(np.random.PCG64(number).random_raw(len(self.starts)), kind="stable")
            kept = {n: self._epochs[n] for n in self._epochs if n == number - 1}
            self._epochs = kept | {number: (order, np.cumsum(self.lengths[order]))}
        return self._epochs[number]

    def next_row(self, position: int, seq_len: int) -> int:
        """Where the row after the one at `position` opens: with a document, or inside one that
        fills that row too."""
        after = position + seq_len
        epoch, offset = divmod(after, self.count)
        order, ends = self._epoch(epoch)
        i = int(np.searchsorted(ends, offset, side="right"))
        left = int(ends[i]) - offset
        opens = left == self.lengths[order[i]]
        return after if opens or left >= seq_len else after + left

    def read(self, plan: "_Plan", rows: range) -> np.ndarray:
        """Rows of a plan as uint16 (B, T+1), views of a fresh copy."""
        T = plan.seq_len
        for shard in self.shards:
            shard.check_size()
        if plan.row_docs is not None:
            return np.stack([self._tokens(plan.row_docs[row], T + 1) for row in rows])
        flat = self._tokens(plan.position + rows.start * T, len(rows) * T + 1)
        return np.lib.stride_tricks.sliding_window_view(flat, T + 1)[::T]

    def _tokens(self, position: int, count: int) -> np.ndarray:
        """`count` tokens of the stream from `position` on, a copy."""
        flat, filled = np.empty(count, np.uint16), 0
        while filled < len(flat):
            epoch, offset = divmod(position + filled, self.count)
            order, ends = self._epoch(epoch)
            for i in range(int(np.searchsorted(ends, offset, side="right")), len(order)):
                document = order[i]
                start = self.starts[document] + offset - (ends[i] - self.lengths[document])
                count = min(int(ends[i] - offset), len(flat) - filled)
                shard = int(np.searchsorted(self.first, start, side="right")) - 1
                start -= self.first[shard]
                flat[filled:filled + count] = self.shards[shard].tokens[start:start + count]
                filled, offset = filled + count, offset + count
                if filled == len(flat):
                    break
        return flat


@dataclass(frozen=True)
class _Plan:
    position: int
    seq_len: int
    max_doc_len: int | None
    row_docs: list[int] | None  # document that opens each row, and the one after the last row; in
    # an endless stream, where each row opens
    after: int  # position of the next step
    cut_docs: int


def _new_cursor(files: Sequence) -> dict:
    cursor = {"step": 0, "shard": 0, "name": "", "num_tokens": 0, "position": 0}
    return _at_shard(cursor | {"skipped_tokens": 0, "cut_docs": 0}, files, 0)


def _at_shard(cursor: dict, files: Sequence, shard: int) -> dict:
    path = Path(files[shard])
    named = {"shard": shard, "name": path.name, "num_tokens": read_header(path)}
    return cursor | named | {"position": 0}


def _check_cursor(cursor: dict, files: Sequence) -> None:
    """Refuse a cursor that points into other files: resuming there would repeat or skip tokens."""
    shard = cursor["shard"]
    if shard >= len(files):
        raise ValueError(
            f"the cursor stands in shard {shard + 1} ({cursor['name']}), but there are only "
            f"{len(files)} shards; give the files that the run began with"
        )
    found = _at_shard(cursor, files, shard)
    for key in ("name", "num_tokens"):
        if cursor[key] != found[key]:
            raise ValueError(
                f"the cursor belongs to other data: expected shard {shard + 1} to have {key} "
                f"{cursor[key]}, got {found[key]} ({files[shard]}); give the files that the run "
                "began with"
            )


def _stream_cursor(stream: _Stream, cursor: dict | None) -> dict:
    """Where a stream begins, or a cursor of the same stream; ValueError for one of other data."""
    new = {"step": 0, "position": 0, "num_tokens": stream.count, "num_docs": len(stream.starts)}
    cursor = new if cursor is None else cursor
    for key in ("num_tokens", "num_docs"):
        if cursor.get(key) != new[key]:
            stream.close()
            raise ValueError(f"the cursor belongs to other data: expected {key} {new[key]}, got "
                             f"{cursor.get(key)}; give the files that the run began with")
    return dict(cursor)


def _walk(
    files: Sequence, batch_shape: Callable, vocab_size: int, bos_id: int, align: str,
    max_doc_len: Callable, repeat_first: bool, cursor: dict,
) -> Iterator[tuple[_Shard, _Plan, dict]]:
    """Step after step: the open shard, the step's rows in it, and the cursor behind that step.

    Knows no ranks and reads no tokens, so the loader and the check before step 0 share it.
    """
    shard = None
    try:
        while True:
            step = cursor["step"]
            num_rows, seq_len = batch_shape(step)
            try:
                if shard is None:
                    shard = _Shard(files[cursor["shard"]], vocab_size, bos_id, align)
                while True:
                    plan = shard.plan(cursor["position"], num_rows, seq_len, max_doc_len(step))
                    if plan is not None:
                        break
                    if cursor["shard"] + 1 >= len(files):
                        raise OutOfTokens(
                            f"the training data end in {shard.path} (shard {len(files)} of "
                            f"{len(files)}): {shard.left(cursor['position'])}, too few for "
                            f"{num_rows} rows of {seq_len}; give more shards"
                        )
                    left = cursor["skipped_tokens"] + shard.count - cursor["position"]
                    shard.close()
                    cursor = _at_shard(cursor, files, cursor["shard"] + 1)
                    cursor["skipped_tokens"] = left
                    shard = _Shard(files[cursor["shard"]], vocab_size, bos_id, align)
            except OutOfTokens as error:
                raise OutOfTokens(f"step {step}: {error}") from None
            except (ValueError, OSError) as error:
                raise ShardError(f"step {step}: {error}") from error
            if repeat_first and step == 0:  # records 4-11 rewind after the first batch
                cursor = cursor | {"step": 1}
            else:
                skipped = plan.after - plan.position - num_rows * seq_len
                cursor = cursor | {
                    "step": step + 1,
                    "position": plan.after,
                    "skipped_tokens": cursor["skipped_tokens"] + skipped,
                    "cut_docs": cursor["cut_docs"] + plan.cut_docs,
                }
            yield shard, plan, cursor
    finally:
        if shard is not None:
            shard.close()


def _walk_stream(
    stream: _Stream, batch_shape: Callable, align: str, repeat_first: bool, cursor: dict
) -> Iterator[tuple[_Stream, _Plan, dict]]:
    """As _walk."""
    position = cursor["position"]
    for step in itertools.count(cursor["step"]):
        num_rows, seq_len = batch_shape(step)
        starts, after = None, position + num_rows * seq_len
        if align != "none":
            starts = [position]
            for _ in range(num_rows):
                starts.append(stream.next_row(starts[-1], seq_len))
            after = starts[-1]
        if repeat_first and step == 0:
            after = position
        yield stream, _Plan(position, seq_len, None, starts, after, cut_docs=0), cursor | {
            "step": step + 1, "position": after}
        position = after


def count_epochs(
    files: Sequence[str | os.PathLike], batch_shape: Callable[[int], tuple[int, int]],
    num_iterations: int, *, vocab_size: int, bos_id: int, align: str = "none"
) -> float:
    """How often a run with `repeat` passes over the files, each of which is checked on the way."""
    stream = _Stream(files, vocab_size, bos_id)
    try:
        if align == "none":
            passed = sum(math.prod(batch_shape(step)) for step in range(num_iterations))
        else:
            walk = _walk_stream(stream, batch_shape, align, False, _stream_cursor(stream, None))
            for _, plan, _ in itertools.islice(walk, num_iterations):
                passed = plan.after
        return passed / stream.count
    finally:
        stream.close()


def _arguments(
    files: Sequence, align: str, max_doc_len: int | Callable | None, cursor: dict | None
) -> tuple[list, Callable, dict]:
    """The checks and defaults that the loader and check_enough_tokens share."""
    files = list(files)
    if not files:
        raise ValueError("expected at least one training shard, got an empty list")
    if align not in ALIGNMENTS:
        raise ValueError(f"expected align to be one of {', '.join(ALIGNMENTS)}, got {align!r}")
    if max_doc_len is not None and align != "document":
        raise ValueError(f"max_doc_len works with align='document' only, got align={align!r}")
    if isinstance(max_doc_len, int) and max_doc_len < 1:
        raise ValueError(f"expected max_doc_len of at least 1, got {max_doc_len}")
    if cursor is None:
        cursor = _new_cursor(files)
    else:
        _check_cursor(cursor, files)
    doc_len = max_doc_len if callable(max_doc_len) else lambda step: max_doc_len
    return files, doc_len, dict(cursor)


def row_documents(inputs_BT: np.ndarray, bos_id: int) -> torch.Tensor:
    """(B, 2) int64: how many documents a row has, and the tokens of the longest. What stands before
    the first bos_id counts as one. The host counts, so that no kernel has to be asked."""
    opens_BT = inputs_BT == bos_id
    opens_BT[:, 0] = True
    rows, places = np.nonzero(opens_BT)
    lengths = np.diff(np.append(rows * inputs_BT.shape[1] + places, inputs_BT.size))
    longest = np.maximum.reduceat(lengths, np.flatnonzero(places == 0))
    return torch.from_numpy(np.stack([np.bincount(rows), longest], axis=1).astype(np.int64))


def _batch(window_BT1: np.ndarray, device: torch.device, bos_id: int | None) -> Batch:
    """Inputs and targets of rows of T+1 tokens; on CUDA through pinned memory, without waiting."""
    inputs_BT = torch.from_numpy(window_BT1[:, :-1].astype(np.int32))
    targets_BT = torch.from_numpy(window_BT1[:, 1:].astype(np.int64))
    if device.type == "cuda":
        inputs_BT = inputs_BT.pin_memory().to(device, non_blocking=True)
        targets_BT = targets_BT.pin_memory().to(device, non_blocking=True)
    docs_B2 = None if bos_id is None else row_documents(window_BT1[:, :-1], bos_id)
    return Batch(inputs_BT, targets_BT, docs_B2)


def _prefetch(
    walk: Iterator, ready: queue.SimpleQueue, free: threading.Semaphore, stop: threading.Event,
    batch_shape: Callable, rank: int, world_size: int, device: torch.device, bos_id: int,
) -> None:
    """The thread: puts (batch, copy event, cursor behind it) or an exception. Holds no Loader."""
    try:
        stream = None
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread starts on the first one, and would wake it
            stream = torch.cuda.Stream(device)
        while True:
            free.acquire()
            if stop.is_set():
                return
            shard, plan, cursor = next(walk)
            step = cursor["step"] - 1
            try:
                rows = rank_rows(batch_shape(step)[0], rank, world_size)
                window_BT1 = shard.read(plan, rows)
            except (ValueError, OSError) as error:
                raise ShardError(f"step {step}: {error}") from error
            copied = None
            if stream is None:
                batch = _batch(window_BT1, device, bos_id)
            else:
                with torch.cuda.stream(stream):  # its own: copies run beside the computation
                    batch = _batch(window_BT1, device, bos_id)
                copied = stream.record_event()
            ready.put((batch, copied, cursor))
    except BaseException as error:  # whatever it is, the caller must not wait for ever
        ready.put(error)
    finally:
        walk.close()


def _stop(thread: threading.Thread, free: threading.Semaphore, stop: threading.Event,
          stream: _Stream | None) -> None:
    stop.set()
    free.release()
    if thread is not threading.current_thread():  # garbage collection may run in the thread itself
        thread.join()
    if stream is not None:
        stream.close()


class Loader:
    """An endless iterator of Batch, prefetched; a context manager.

    files: shards in the order of training. batch_shape: step -> (num_rows, seq_len), rows of all
    ranks together. vocab_size: tokens >= vocab_size are refused. bos_id: the token that opens a
    document. align, max_doc_len (tokens; an int, or a function of the step as record 89 has it),
    repeat: see the top of this file. repeat_first: steps 0 and 1 get the same
    batch (records 4-11). cursor: where an earlier Loader stood (`loader.cursor`), at any world
    size. prefetch: batches made ahead; 2 hides the work and leaves none of it to be done while the
    clock is stopped.

    Faults of the first shard are raised here; later ones by __next__ at the step that needs the
    data, as ShardError naming step and file.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike],
        batch_shape: Callable[[int], tuple[int, int]],
        *,
        vocab_size: int,
        bos_id: int,
        align: str = "none",
        max_doc_len: int | Callable[[int], int | None] | None = None,
        repeat_first: bool = False,
        repeat: bool = False,
        rank: int = 0,
        world_size: int = 1,
        cursor: dict | None = None,
        device: str | torch.device = "cpu",
        prefetch: int = 2,
    ):
        if prefetch < 1:
            raise ValueError(f"expected prefetch of at least 1 batch, got {prefetch}")
        if repeat:
            rank_rows(batch_shape(cursor["step"] if cursor else 0)[0], rank, world_size)
            stream = _Stream(files, vocab_size, bos_id)
            self._cursor = _stream_cursor(stream, cursor)
            walk = _walk_stream(stream, batch_shape, align, repeat_first, self._cursor)
        else:
            stream = None
            files, doc_len, self._cursor = _arguments(files, align, max_doc_len, cursor)
            rank_rows(batch_shape(self._cursor["step"])[0], rank, world_size)
            # Every header now, the tokens of the first shard now, those of the others when their
            # turn comes: a fault that can be seen before step 0 is.
            for file in files:
                read_header(file)
            _Shard(files[self._cursor["shard"]], vocab_size, bos_id, align).close()
            walk = _walk(files, batch_shape, vocab_size, bos_id, align, doc_len, repeat_first,
                         self._cursor)
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._free = threading.Semaphore(prefetch)
        self._error: BaseException | None = None
        stop = threading.Event()
        thread = threading.Thread(
            target=_prefetch,
            args=(walk, self._ready, self._free, stop, batch_shape, rank, world_size, self._device,
                  bos_id),
            name="data-prefetch",
            daemon=True,
        )
        thread.start()
        # Also called when the Loader is garbage or the interpreter ends.
        self._finalizer = weakref.finalize(self, _stop, thread, self._free, stop, stream)

    @property
    def cursor(self) -> dict:
        """Where the next batch, not handed out yet, begins. JSON-able; knows nothing of ranks.

        step, shard (index into files), name and num_tokens of that shard, position (token offset),
        and two running counts: skipped_tokens (passed over, never an input) and cut_docs. With
        repeat: step, position in the endless stream, num_tokens and num_docs of an epoch.
        """
        return dict(self._cursor)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise ValueError("this Loader is closed; make a new one from its cursor")
        if self._error is None:
            item = self._ready.get()
            if isinstance(item, BaseException):
                self._error = item
        if self._error is not None:
            raise self._error
        self._free.release()
        batch, copied, self._cursor = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            batch.inputs_BT.record_stream(stream)
            batch.targets_BT.record_stream(stream)
        return batch

    def close(self) -> None:
        """Stop and join the thread, close the files. Again is fine; the cursor stays readable."""
        self._finalizer()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_enough_tokens(
    files: Sequence[str | os.PathLike],
    batch_shape: Callable[[int], tuple[int, int]],
    num_iterations: int,
    *,
    vocab_size: int,
    bos_id: int,
    align: str = "none",
    max_doc_len: int | Callable[[int], int | None] | None = None,
    repeat_first: bool = False,
    cursor: dict | None = None,
) -> Supply:
    """Before step 0: do the files last for num_iterations steps? If not, OutOfTokens with numbers.

    Exact for every alignment: it walks the whole run over the document starts, with the loader's
    own planning but without reading rows. Every shard that the run will touch is opened and fully
    checked on the way (about 0.1 s for 100M tokens in the page cache), so call it on one rank.
    """
    files, doc_len, cursor = _arguments(files, align, max_doc_len, cursor)
    counts = [read_header(file) for file in files]
    walk = _walk(files, batch_shape, vocab_size, bos_id, align, doc_len, repeat_first, cursor)

    def passed() -> int:
        return sum(counts[: cursor["shard"]]) + cursor["position"]

    def batch_tokens(first: int, last: int) -> int:
        rows = (batch_shape(step) for step in range(first, last))
        return sum(num_rows * seq_len for num_rows, seq_len in rows)

    try:
        while cursor["step"] < num_iterations:
            _, _, cursor = next(walk)
    except OutOfTokens as error:
        step, present = cursor["step"], sum(counts)
        trained = batch_tokens(0, step)
        waste = passed() / trained if trained else 1.0  # 1.0 where nothing is skipped
        needed = passed() + int(batch_tokens(step, num_iterations) * max(1.0, waste)) + 1
        raise OutOfTokens(
            f"not enough training data: {num_iterations} steps need about {needed:,} tokens"
            + " in rows that open with a document" * (align != "none")
            + f", {present:,} are present in {len(files)} shards; {error}"
        ) from None
    finally:
        walk.close()
    one_more = int(align == "none" and num_iterations > 0)  # the target of the last input
    return Supply(
        present_tokens=sum(counts),
        needed_tokens=passed() + one_more,
        num_shards=cursor["shard"] + 1,
        skipped_tokens=cursor["skipped_tokens"],
        cut_docs=cursor["cut_docs"],
    )


def val_batches(
    files: Sequence[str | os.PathLike],
    val_tokens: int,
    seq_len: int,
    micro_rows: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    vocab_size: int,
    bos_id: int | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Batch]:
    """The first val_tokens of the validation stream, each an input exactly once and in order.

    Rows of seq_len, contiguous and not aligned, over the files in their order as one stream; ranks
    take consecutive runs of rows, micro_rows at a time (the last batch may have fewer). One token
    more than val_tokens is read: the last target. All checks run in this call, before the first
    batch is asked for. Add up losses over tokens and divide by val_tokens: ranks may have
    different numbers of rows, or none. Documents are counted where bos_id is given.
    """
    if val_tokens < seq_len or val_tokens % seq_len:
        raise ValueError(
            f"expected val_tokens to be a multiple of seq_len {seq_len}, got {val_tokens}"
        )
    if micro_rows < 1:
        raise ValueError(f"expected micro_rows of at least 1, got {micro_rows}")
    rows = _share(val_tokens // seq_len, rank, world_size)
    counts = [read_header(file) for file in files]
    if sum(counts) < val_tokens + 1:
        raise ShardError(
            f"not enough validation data: expected {val_tokens + 1:,} tokens (val_tokens and one "
            f"more as the last target), got {sum(counts):,} in {', '.join(map(str, files))}"
        )
    offsets = np.concatenate([[0], np.cumsum(counts)]).tolist()
    used = [file for file, offset in zip(files, offsets) if offset <= val_tokens]
    for file in used:
        read_shard(file, vocab_size=vocab_size)

    def batches() -> Iterator[Batch]:
        shards = [_Shard(file, vocab_size, 0, "none") for file in used]
        try:
            for first in range(rows.start, rows.stop, micro_rows):
                last = min(first + micro_rows, rows.stop)
                start, stop = first * seq_len, last * seq_len + 1
                for shard in shards:
                    shard.check_size()
                flat = np.concatenate([
                    shard.tokens[max(0, start - offset) : max(0, stop - offset)]
                    for shard, offset in zip(shards, offsets)
                ])
                window = np.lib.stride_tricks.sliding_window_view(flat, seq_len + 1)[::seq_len]
                yield _batch(window, torch.device(device), bos_id)
        finally:
            for shard in shards:
                shard.close()

    return batches()
