"""The loader against a slow loop over single tokens, and everything that can go wrong around it."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader as loader_module
from data.loader import (
    ALIGNMENTS,
    Loader,
    OutOfTokens,
    check_enough_tokens,
    count_epochs,
    rank_rows,
    val_batches,
)
from data.shards import ShardError, write_shard

ROOT = Path(__file__).resolve().parent.parent
BOS, VOCAB = 50, 51
IDS = {"vocab_size": VOCAB, "bos_id": BOS}


# --- the slow twin: tokens one by one, no arithmetic on document starts ---------------------------


def slow_rows_none(tokens, position, num_rows, seq_len):
    rows = []
    for _ in range(num_rows):
        row = tokens[position : position + seq_len + 1]
        if len(row) < seq_len + 1:
            return None
        rows.append(row)
        position += seq_len
    return rows, position


def slow_rows_row(tokens, position, num_rows, seq_len):
    rows, earliest = [], position
    while len(rows) < num_rows:
        start = earliest
        while start < len(tokens) and tokens[start] != BOS:
            start += 1
        row = tokens[start : start + seq_len + 1]
        if len(row) < seq_len + 1:
            return None
        rows.append(row)
        earliest = start + seq_len
    while earliest < len(tokens) and tokens[earliest] != BOS:
        earliest += 1
    return rows, earliest


def slow_rows_document(tokens, position, num_rows, seq_len, max_doc_len):
    rows = []
    while position < len(tokens) and tokens[position] != BOS:
        position += 1
    for _ in range(num_rows):
        row = []
        while len(row) < seq_len + 1:
            if position >= len(tokens):
                return None
            taken = 0
            while True:  # one document
                if len(row) < seq_len + 1 and (max_doc_len is None or taken < max_doc_len):
                    row.append(tokens[position])
                    taken += 1
                position += 1
                if position >= len(tokens) or tokens[position] == BOS:
                    break
        rows.append(row)
    return rows, position


def slow_steps(shards, batch_shape, align, max_doc_len=None, repeat_first=False, limit=10**9):
    """Rows of seq_len+1 tokens of all steps until the data end."""
    steps, shard, position = [], 0, 0
    extra = {"max_doc_len": max_doc_len} if align == "document" else {}
    while len(steps) < limit:
        num_rows, seq_len = batch_shape(len(steps))
        while True:
            made = globals()[f"slow_rows_{align}"](
                shards[shard], position, num_rows, seq_len, **extra
            )
            if made is not None:
                break
            shard, position = shard + 1, 0
            if shard == len(shards):
                return steps
        if not (repeat_first and not steps):
            position = made[1]
        steps.append(made[0])
    return steps


# --- helpers --------------------------------------------------------------------------------------


def stream(seed, count, bos_share=0.05, opens=True):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, BOS, count)
    tokens[generator.random(count) < bos_share] = BOS
    if opens:
        tokens[0] = BOS
    return tokens


def write(folder, shards):
    files = []
    for number, tokens in enumerate(shards):
        files.append(folder / f"s_{number:02d}.bin")
        write_shard(files[-1], np.asarray(tokens, np.uint16))
    return files


def windows(batch):
    """Rows of seq_len+1 tokens as lists, after a look at the batch itself."""
    x_BT, y_BT = batch.inputs_BT, batch.targets_BT
    assert x_BT.dtype == torch.int32 and y_BT.dtype == torch.int64
    assert x_BT.shape == y_BT.shape and x_BT.is_contiguous() and y_BT.is_contiguous()
    assert torch.equal(x_BT[:, 1:].long(), y_BT[:, :-1])
    return torch.cat([x_BT.long(), y_BT[:, -1:]], 1).tolist()


def drain(loader):
    """All steps of a loader until it runs out of tokens."""
    steps = []
    with loader, pytest.raises(ShardError, match=r"^step \d+: the training data end in"):
        while True:
            steps.append(windows(next(loader)))
    return steps


@pytest.fixture
def three(tmp_path):
    shards = [stream(1, 3000), stream(2, 2000, opens=False), stream(3, 2500)]
    return write(tmp_path, shards), [s.tolist() for s in shards]


# --- order ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_alignment_equals_the_slow_loop(tmp_path_factory, data):
    align = data.draw(st.sampled_from(ALIGNMENTS))
    counts = data.draw(st.lists(st.integers(20, 400), min_size=1, max_size=3))
    share = data.draw(st.sampled_from([0.02, 0.1, 0.5, 0.95]))
    seed = data.draw(st.integers(0, 10**6))
    shards = [stream(seed + i, n, share, opens=i == 0) for i, n in enumerate(counts)]
    for tokens in shards:
        if BOS not in tokens:
            tokens[-1] = BOS  # a document of one token, at the very end
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 24)), min_size=1,
                                max_size=3))
    doc_len = data.draw(st.none() | st.integers(1, 30)) if align == "document" else None
    repeat_first = data.draw(st.booleans())

    def batch_shape(step):
        return shapes[0] if step < 2 else shapes[step % len(shapes)]

    files = write(tmp_path_factory.mktemp("s"), shards)
    expected = slow_steps([s.tolist() for s in shards], batch_shape, align, doc_len, repeat_first)
    common = IDS | {"align": align, "max_doc_len": doc_len, "repeat_first": repeat_first}
    loader = Loader(files, batch_shape, **common)
    assert drain(loader) == expected
    # The check before step 0 says the same number of steps, exactly.
    check_enough_tokens(files, batch_shape, len(expected), **common)
    with pytest.raises(ValueError, match="not enough training data"):
        check_enough_tokens(files, batch_shape, len(expected) + 1, **common)


def test_document_rows_by_hand(tmp_path):
    b = BOS
    files = write(tmp_path, [[9, b, 1, 2, 3, 4, 5, b, 6, b, 7, 8, b, 1, 1, 1, 1, 1, b, 2, 3, 4, 5]])
    with Loader(files, lambda s: (2, 5), **IDS, align="document", max_doc_len=3) as loader:
        assert windows(next(loader)) == [[b, 1, 2, b, 6, b], [b, 1, 1, b, 2, 3]]
        # 3 of 23 tokens are left: `b 2 3` was cut by the row's end, so were `b 7 8` and the long
        # ones by max_doc_len; the 9 before the first document was passed over.
        assert loader.cursor | {"name": "", "num_tokens": 0} == {
            "step": 1, "shard": 0, "name": "", "num_tokens": 0, "position": 23,
            "skipped_tokens": 23 - 2 * 5, "cut_docs": 4,
        }


def test_row_starts_by_hand(tmp_path):
    b = BOS
    files = write(tmp_path, [[b, 1, 2, 3, b, 4, b, 5, 6, 7, 8, b, b, 1, 2, 3, b]])
    with Loader(files, lambda s: (3, 4), **IDS, align="row") as loader:
        assert windows(next(loader)) == [[b, 1, 2, 3, b], [b, 4, b, 5, 6], [b, b, 1, 2, 3]]
        assert loader.cursor["position"] == 16  # the first start at least 4 after 11


def test_records_4_to_11_see_the_first_batch_twice(three):
    files, shards = three
    with Loader(files, lambda s: (6, 20), **IDS, repeat_first=True) as loader:
        steps = [windows(next(loader)) for _ in range(4)]
        assert loader.cursor["position"] == 3 * 120
    with Loader(files, lambda s: (6, 20), **IDS) as loader:
        plain = [windows(next(loader)) for _ in range(3)]
    assert steps == [plain[0], plain[0], plain[1], plain[2]]
    assert [t for row in plain[0] for t in row[:-1]] == shards[0][:120]


def test_max_doc_len_may_change_with_the_step(three):
    files, shards = three

    def doc_len(step):
        return 4 if step < 3 else 15

    with Loader(files, lambda s: (4, 20), **IDS, align="document", max_doc_len=doc_len) as loader:
        got = [windows(next(loader)) for _ in range(6)]
    expected, position = [], 0
    for step in range(6):
        rows, position = slow_rows_document(shards[0], position, 4, 20, doc_len(step))
        expected.append(rows)
    assert got == expected


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_share_the_rows_of_one_rank(three, align, world_size):
    files, _ = three

    def batch_shape(step):
        return [(7, 16), (9, 11)][step % 2]

    with Loader(files, batch_shape, **IDS, align=align) as whole:
        loaders = [
            Loader(files, batch_shape, **IDS, align=align, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        for _ in range(25):
            expected = windows(next(whole))
            parts = [windows(next(loader)) for loader in loaders]
            assert [row for part in parts for row in part] == expected
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert all(loader.cursor == whole.cursor for loader in loaders)
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("repeat_first", [False, True])
def test_a_cursor_resumes_at_any_step_and_world_size(three, align, repeat_first):
    files = three[0] * 2  # a second epoch: packing alone would use up the first
    common = IDS | {"align": align, "repeat_first": repeat_first,
                    "max_doc_len": 12 if align == "document" else None}

    def batch_shape(step):
        return (6, 20) if step < 9 else (4, 33)

    cursors, steps = [], []
    with Loader(files, batch_shape, **common) as loader:
        for _ in range(26):
            cursors.append(json.loads(json.dumps(loader.cursor)))
            steps.append(windows(next(loader)))
    assert any(cursor["shard"] == 1 for cursor in cursors)
    for start in (0, 1, 2, 8, 9, 10, 17, 25):
        for world_size in (1, 3):
            rows = []
            for rank in range(world_size):
                with Loader(files, batch_shape, **common, rank=rank, world_size=world_size,
                            cursor=cursors[start]) as resumed:
                    assert resumed.cursor == cursors[start]
                    rows.append([windows(next(resumed)) for _ in range(min(3, 26 - start))])
            together = [[row for part in step for row in part] for step in zip(*rows)]
            assert together == steps[start : start + 3]


def test_the_same_files_again_are_a_second_epoch(three):
    files, shards = three
    expected = slow_steps(shards * 2, lambda s: (5, 30), "row")
    assert drain(Loader(files * 2, lambda s: (5, 30), **IDS, align="row")) == expected


# --- repeat: an endless stream of documents -------------------------------------------------------


def documents_of(shards):
    """Tokens before the first BOS of a shard are a document too."""
    found = []
    for shard in shards:
        for place, token in enumerate(shard):
            if place == 0 or token == BOS:
                found.append([])
            found[-1].append(token)
    return found


@pytest.mark.parametrize("rows, seq_len", [(4, 30), (1, 10_000), (50, 7)])
def test_each_epoch_has_every_document_once_in_an_order_of_its_own(tmp_path, rows, seq_len):
    """Shorter and longer steps, and rows, than the data."""
    shards = [stream(n, count) for n, count in enumerate((700, 400, 500))]  # open with BOS
    files, expected = write(tmp_path, shards), documents_of(shards)
    total = sum(map(len, shards))
    seen, targets = [], []
    with Loader(files, lambda s: (rows, seq_len), **IDS, repeat=True) as loader:
        while len(seen) < 3 * total:
            batch = next(loader)
            windows(batch)
            seen += batch.inputs_BT.flatten().tolist()
            targets += batch.targets_BT.flatten().tolist()
        cursor = loader.cursor
    assert seen[1:] == targets[:-1]
    assert cursor == {"step": len(seen) // (rows * seq_len), "position": len(seen),
                      "num_tokens": total, "num_docs": len(expected)}
    epochs = [seen[n * total:(n + 1) * total] for n in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        assert sorted(documents_of([epoch])) == sorted(expected)


def test_an_order_is_the_same_for_ever(tmp_path):
    """It follows from the epoch's number alone: no seed, no numpy version, no number of ranks."""
    files = write(tmp_path, [[BOS, 1, BOS, 2, BOS, 3], [BOS, 4, BOS, 5, 5, 5]])
    with Loader(files, lambda s: (1, 12), **IDS, repeat=True) as loader:
        epochs = [next(loader).inputs_BT.flatten().tolist() for _ in range(3)]
    assert [[t for t in epoch if t != BOS] for epoch in epochs] == [
        [4, 3, 2, 1, 5, 5, 5], [3, 5, 5, 5, 1, 4, 2], [4, 1, 2, 5, 5, 5, 3]]


def test_a_long_document_goes_on_in_the_next_row(tmp_path):
    document = [BOS, *(n % 50 for n in range(399))]
    (file,) = write(tmp_path, [document])
    for align in ALIGNMENTS:  # it fills eight rows
        with Loader([file], lambda s: (3, 50), **IDS, repeat=True, align=align) as loader:
            rows = [row for _ in range(4) for row in windows(next(loader))]
        endless = document * 3
        assert rows == [endless[50 * n:50 * n + 51] for n in range(12)]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_of_a_stream_equal_a_slow_loop(tmp_path_factory, data):
    """Rows open with a document, or inside one of which a whole row is left."""
    shards = [stream(data.draw(st.integers(0, 99)), data.draw(st.integers(20, 200)),
                     data.draw(st.sampled_from([0.01, 0.05, 0.3]))) for _ in range(2)]
    files = write(tmp_path_factory.mktemp("s"), shards)
    rows, seq_len = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    total = sum(map(len, shards))
    with Loader(files, lambda s: (1, total), **IDS, repeat=True) as loader:
        endless = [t for _ in range(2 + 9 * rows * seq_len * 40 // total)
                   for t in next(loader).inputs_BT[0].tolist()]
    # An order can put a document in front of itself at the end of an epoch: BOS tells them apart.
    opens = [n for n, token in enumerate(endless) if token == BOS]
    position, expected = 0, []
    for _ in range(6 * rows):
        expected.append(endless[position:position + seq_len + 1])
        position += seq_len
        end = next(n for n in opens if n > position)
        if endless[position] != BOS and end - position < seq_len:
            position = end
    for align in ("row", "document"):
        with Loader(files, lambda s: (rows, seq_len), **IDS, repeat=True, align=align) as loader:
            found = [row for _ in range(6) for row in windows(next(loader))]
            assert found == expected and loader.cursor["position"] == position
        assert count_epochs(files, lambda s: (rows, seq_len), 6, **IDS, align=align) == (
            position / total)


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("repeat_first", [False, True])
def test_a_stream_is_the_same_at_any_step_and_number_of_ranks(three, align, repeat_first):
    files, _ = three
    common = IDS | {"repeat": True, "repeat_first": repeat_first, "align": align}

    def batch_shape(step):
        return (6, 200) if step < 9 else (4, 333)

    cursors, steps = [], []
    with Loader(files, batch_shape, **common) as loader:
        for _ in range(14):
            cursors.append(json.loads(json.dumps(loader.cursor)))
            steps.append(windows(next(loader)))
    assert (steps[0] == steps[1]) is repeat_first
    for start in (0, 1, 2, 8, 9, 13):
        for world_size in (1, 3):
            loaders = [Loader(files, batch_shape, **common, rank=rank, world_size=world_size,
                              cursor=cursors[start]) for rank in range(world_size)]
            parts = [windows(next(loader)) for loader in loaders]
            assert [row for part in parts for row in part] == steps[start]
            for loader in loaders:
                loader.close()


def test_faults_of_a_stream(three, tmp_path):
    files, _ = three
    shape = lambda step: (4, 16)  # noqa: E731
    gc.collect()  # a mapped file is open as long as its error's traceback
    before = len(os.listdir("/proc/self/fd"))
    refused(ShardError, r"s_00\.bin: token 50 at offset 0 is outside", files, shape, vocab_size=50,
            repeat=True)
    with Loader(files, shape, **IDS, repeat=True) as loader:
        cursor = loader.cursor
    refused(ValueError, "belongs to other data: expected num_tokens 5000, got 7500", files[:2],
            shape, cursor=cursor, repeat=True)
    refused(ValueError, "5 ranks cannot share 4 rows", files, shape, world_size=5, repeat=True)
    with Loader(files, shape, **IDS, repeat=True) as loader:
        next(loader)
        os.truncate(files[1], 1500)
        with pytest.raises(ShardError, match=rf"step \d+: {files[1]}: cut while in use"):
            for _ in range(10):
                next(loader)
    del loader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_rank_rows():
    for num_rows in range(1, 20):
        for world_size in range(1, num_rows + 1):
            runs = [list(rank_rows(num_rows, r, world_size)) for r in range(world_size)]
            assert [row for run in runs for row in run] == list(range(num_rows))
            assert max(map(len, runs)) - min(map(len, runs)) <= 1
    with pytest.raises(ValueError, match=r"9 ranks cannot share 8 rows.*at most 8.*1, 2, 4, 8"):
        rank_rows(8, 0, 9)
    with pytest.raises(ValueError, match="rank of 0 to 1, got 2"):
        rank_rows(8, 2, 2)


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_gpt2_ids_and_long_documents_equal_the_slow_loop(tmp_path, align):
    """All of GPT-2's ids, half of which int16 cannot hold; FineWeb's document lengths: a median of
    400 tokens, one in a hundred above 4,000."""
    generator = np.random.default_rng(7)
    tokens = generator.integers(0, 50256, 200_000)
    lengths = 1 + generator.lognormal(np.log(400), 1.0, 2000).astype(int)
    tokens[np.cumsum(lengths[np.cumsum(lengths) < len(tokens)])] = 50256
    tokens[0] = 50256
    files = write(tmp_path, [tokens])
    own = {"max_doc_len": 896} if align == "document" else {}
    # The slow loop knows BOS as 50: give it the stream in which the two have changed places.
    swap = np.arange(50257)
    swap[[50, 50256]] = 50256, 50
    expected = slow_steps([swap[tokens].tolist()], lambda s: (4, 2048), align, **own)
    assert len(expected) > 10
    with Loader(files, lambda s: (4, 2048), vocab_size=50257, bos_id=50256, align=align,
                **own) as loader:
        for rows in expected:
            assert (np.array(windows(next(loader))) == swap[np.array(rows)]).all()


# --- supply ---------------------------------------------------------------------------------------


def test_d12_not_enough_tokens_is_known_before_step_0(three):
    files, _ = three
    supply = check_enough_tokens(files, lambda s: (5, 40), 20, **IDS)
    # 14 steps in the first shard (2,800 of 3,000), 6 in the second.
    assert supply == loader_module.Supply(
        present_tokens=7500, needed_tokens=3000 + 6 * 200 + 1, num_shards=2, skipped_tokens=200,
        cut_docs=0,
    )
    with pytest.raises(OutOfTokens) as caught:
        check_enough_tokens(files, lambda s: (5, 40), 100, **IDS)
    message = str(caught.value)
    assert "100 steps need about 21,1" in message and "7,500 are present in 3 shards" in message
    assert f"step 35: the training data end in {files[2]}" in message and "\n" not in message


@pytest.mark.parametrize("align", ["row", "document"])
def test_supply_counts_what_the_cursor_counts(three, align):
    files, _ = three
    supply = check_enough_tokens(files, lambda s: (5, 20), 35, **IDS, align=align)
    with Loader(files, lambda s: (5, 20), **IDS, align=align) as loader:
        for _ in range(35):
            next(loader)
        cursor = loader.cursor
    assert cursor["shard"] == 2 == supply.num_shards - 1
    assert supply.needed_tokens == 5000 + cursor["position"]
    assert supply.skipped_tokens == cursor["skipped_tokens"] == supply.needed_tokens - 35 * 100
    assert supply.cut_docs == cursor["cut_docs"] > 0


def test_supply_from_a_cursor(three):
    files, _ = three
    with Loader(files, lambda s: (5, 20), **IDS, align="document") as loader:
        for _ in range(10):
            next(loader)
        cursor = loader.cursor
    common = IDS | {"align": "document"}
    assert check_enough_tokens(files, lambda s: (5, 20), 30, **common, cursor=cursor) == (
        check_enough_tokens(files, lambda s: (5, 20), 30, **common)
    )


def test_d14_a_document_longer_than_the_budget_is_cut_and_counted(tmp_path):
    tokens = np.ones(4000, np.int64)
    tokens[[0, 1000, 2500, 3900]] = BOS
    files = write(tmp_path, [tokens])
    with Loader(files, lambda s: (2, 64), **IDS, align="document") as loader:
        batch = next(loader)
        assert batch.inputs_BT.shape == (2, 64)
        assert (batch.inputs_BT[:, 0] == BOS).all()
        assert loader.cursor["cut_docs"] == 2
        assert loader.cursor["skipped_tokens"] == 2500 - 128


# --- faults ---------------------------------------------------------------------------------------


def refused(error, match, *arguments, **options):
    before = threading.active_count()
    with pytest.raises(error, match=match):
        Loader(*arguments, **IDS | options)
    assert threading.active_count() == before


def test_bad_arguments_and_bad_shards_are_refused_at_once(three):
    files, _ = three
    shape = lambda step: (4, 16)  # noqa: E731
    refused(ValueError, "at least one training shard", [], shape)
    refused(ValueError, "align to be one of none, row, document, got 'bos'", files, shape,
            align="bos")
    refused(ValueError, "max_doc_len works with align='document' only", files, shape, max_doc_len=9)
    refused(ValueError, "max_doc_len of at least 1, got 0", files, shape, max_doc_len=0,
            align="document")
    refused(ValueError, "prefetch of at least 1", files, shape, prefetch=0)
    refused(ValueError, "5 ranks cannot share 4 rows", files, shape, world_size=5)
    refused(FileNotFoundError, "no such shard", [*files, files[0].with_name("x")], shape)
    refused(ShardError, "token 50 at offset 0 is outside", files, shape, vocab_size=50)
    os.truncate(files[2], 1500)  # a later shard: its header is looked at all the same
    refused(ShardError, r"s_02\.bin: truncated", files, shape)


def test_d13_no_document_start_in_a_shard(tmp_path):
    files = write(tmp_path, [[1, 2, 3] * 100, stream(0, 300)])
    for align in ("row", "document"):
        refused(ShardError, r"s_00\.bin: no document start", files, lambda s: (2, 8), align=align)
    with Loader(files, lambda s: (2, 8), **IDS) as loader:  # contiguous rows need none
        next(loader)


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("fault, message", [
    ("delete", "no such shard"),  # D10
    ("truncate", "truncated"),  # D11, before it is opened
    ("token", "token 60 at offset 1000 is outside"),  # D8 in a later shard
])
def test_a_later_shard_goes_bad(three, align, fault, message):
    files, shards = three
    good = slow_steps(shards[:1], lambda s: (5, 40), align)
    with Loader(files, lambda s: (5, 40), **IDS, align=align) as loader:
        first = windows(next(loader))  # at most two more batches are made before we go on
        if fault == "delete":
            files[1].unlink()
        elif fault == "truncate":
            os.truncate(files[1], 3000)
        else:
            with open(files[1], "r+b") as file:
                file.seek(1024 + 2 * 1000)
                file.write(b"\x3c\x00")
        assert [first] + [windows(next(loader)) for _ in good[1:]] == good
        cursor = loader.cursor
        for _ in range(2):  # asked again, it says the same
            with pytest.raises(ShardError) as caught:
                next(loader)
            text = str(caught.value)
            assert text.startswith(f"step {len(good)}: ") and message in text and "\n" not in text
            assert str(files[1]) in text
        assert loader.cursor == cursor  # still of the batch that could not be made


def test_d11_a_shard_is_cut_while_in_use(three):
    files, _ = three
    with Loader(files, lambda s: (5, 40), **IDS) as loader:
        next(loader)
        time.sleep(0.05)  # the two batches ahead may be made before or after: both are right
        os.truncate(files[0], 1100)
        with pytest.raises(ShardError, match=rf"step \d+: {files[0]}: cut while in use: expected "
                                             r"7024 bytes, found 1100"):
            for _ in range(10):
                next(loader)


def test_a_deleted_shard_in_use_is_read_to_its_end(three):
    files, shards = three
    with Loader(files, lambda s: (5, 40), **IDS) as loader:
        next(loader)
        files[0].unlink()
        assert [windows(next(loader)) for _ in range(13)] == (
            slow_steps(shards[:1], lambda s: (5, 40), "none")[1:]
        )


def test_cursor_of_other_data(three, tmp_path):
    files, _ = three
    with Loader(files, lambda s: (5, 40), **IDS) as loader:
        for _ in range(20):
            next(loader)
        cursor = loader.cursor
    assert cursor["shard"] == 1
    refused(ValueError, "shard 2 .*only 1 shards", files[:1], lambda s: (5, 40), cursor=cursor)
    refused(ValueError, r"expected shard 2 to have name s_01\.bin, got s_02\.bin",
            [files[0], files[2]], lambda s: (5, 40), cursor=cursor)
    write_shard(files[1], np.zeros(999, np.uint16))
    refused(ValueError, "num_tokens 2000, got 999", files, lambda s: (5, 40), cursor=cursor)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("shape"), MemoryError()])
def test_p9_any_error_of_the_thread_reaches_the_caller(three, error):
    files, _ = three

    def batch_shape(step):
        if step == 3:
            raise error
        return 5, 40

    with Loader(files, batch_shape, **IDS) as loader:
        for _ in range(3):
            next(loader)
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                next(loader)
            assert caught.value is error


# --- the thread -----------------------------------------------------------------------------------


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "data-prefetch"]


def test_two_batches_are_made_ahead_and_no_more(three, monkeypatch):
    files, _ = three
    made = []
    original = loader_module._batch
    monkeypatch.setattr(
        loader_module, "_batch", lambda *args: made.append(None) or original(*args)
    )
    with Loader(files, lambda s: (5, 40), **IDS) as loader:
        for taken in range(4):
            deadline = time.monotonic() + 20
            while len(made) < taken + 2:
                assert time.monotonic() < deadline, "prefetch stands still"
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(made) == taken + 2
            next(loader)


def test_close_joins_the_thread_and_closes_the_files(three):
    files, _ = three
    before = len(os.listdir("/proc/self/fd"))
    loader = Loader(files, lambda s: (5, 40), **IDS)
    next(loader)
    cursor = loader.cursor
    assert len(prefetch_threads()) == 1
    loader.close()
    loader.close()
    assert prefetch_threads() == [] and len(os.listdir("/proc/self/fd")) == before
    assert loader.cursor == cursor
    with pytest.raises(ValueError, match="this Loader is closed"):
        next(loader)
    with Loader(files, lambda s: (5, 40), **IDS, cursor=cursor) as again:
        next(again)


def test_a_forgotten_loader_ends_its_thread(three):
    files, _ = three
    for _ in range(3):
        loader = Loader(files, lambda s: (5, 40), **IDS)
        next(loader)
        del loader
    gc.collect()
    assert prefetch_threads() == []


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "import gc; gc.collect()"])
def test_a_program_that_never_closes_ends_cleanly(three, end):
    files, _ = three
    program = (
        "from data.loader import Loader\n"
        f"loader = Loader({[str(f) for f in files]!r}, lambda s: (5, 40), vocab_size=51, "
        f"bos_id=50, align='document')\nnext(loader)\n{end}\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", program],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_batches_on_cuda_equal_those_on_cpu(three, align):
    files, _ = three
    with (
        Loader(files, lambda s: (5, 40), **IDS, align=align) as cpu,
        Loader(files, lambda s: (5, 40), **IDS, align=align, device="cuda") as cuda,
    ):
        for _ in range(20):
            batch = next(cuda)
            assert batch.inputs_BT.is_cuda and batch.targets_BT.is_cuda
            torch.cuda.current_stream().synchronize()
            host = loader_module.Batch(batch.inputs_BT.cpu(), batch.targets_BT.cpu())
            assert windows(host) == windows(next(cpu))


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_rows", [1, 4, 100])
def test_every_validation_token_once_and_in_order(three, world_size, micro_rows):
    files, shards = three
    tokens = [token for shard in shards for token in shard]
    inputs, targets = [], []
    for rank in range(world_size):
        for batch in val_batches(files, 25 * 200, 200, micro_rows, rank, world_size,
                                 vocab_size=VOCAB):
            assert len(batch.inputs_BT) <= micro_rows
            windows(batch)
            inputs += batch.inputs_BT.flatten().tolist()
            targets += batch.targets_BT.flatten().tolist()
    assert inputs == tokens[:5000]  # over the ends of the first and the second file
    assert targets == tokens[1:5001]


def test_validation_may_use_up_all_but_one_token(tmp_path):
    files = write(tmp_path, [stream(1, 100), stream(2, 101)])
    (batch,) = val_batches(files, 200, 50, 9, vocab_size=VOCAB)
    assert batch.inputs_BT.shape == (4, 50)
    with pytest.raises(ShardError, match=r"expected 251 tokens .* got 201"):  # D15
        val_batches(files, 250, 50, 9, vocab_size=VOCAB)


def test_validation_is_checked_before_its_first_batch(three):
    files, _ = three
    for options, message in (
        ({"val_tokens": 250, "seq_len": 100}, "multiple of seq_len 100, got 250"),
        ({"val_tokens": 0, "seq_len": 100}, "multiple of seq_len 100, got 0"),
        ({"val_tokens": 300, "seq_len": 100, "micro_rows": 0}, "micro_rows of at least 1"),
        ({"val_tokens": 7500, "seq_len": 100}, "expected 7,501 tokens .* got 7,500"),
        ({"val_tokens": 300, "seq_len": 100, "vocab_size": 50}, "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            val_batches(files, **{"micro_rows": 4, "vocab_size": VOCAB} | options)


def test_validation_shard_cut_while_in_use(three):
    files, _ = three
    batches = val_batches(files, 2000, 100, 4, vocab_size=VOCAB)
    next(batches)
    os.truncate(files[0], 2000)
    with pytest.raises(ShardError, match="cut while in use"):
        next(batches)
