"""Data that are wrong or go away, as the trainer meets them.

What each fault of a shard is called, and downloads, are tested in tests/test_data_shards.py,
test_data_loader.py and test_data_fineweb.py; here it is that all of them refuse a run in one line,
and what happens to a run under way.
"""

import shutil

import numpy as np
import pytest

from faults.helpers import (
    assert_refused,
    body_of,
    checkpoints,
    logs_in,
    result_of,
    same,
    state_of,
)


@pytest.fixture
def copy(data, tmp_path):
    """A folder of data of one's own, to be broken."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def shard(folder, part: str = "train", index: int = 0):
    return sorted(folder.glob(f"*{part}*.bin"))[index]


def header(path, position: int, value: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[4 * position : 4 * position + 4] = np.int32(np.uint32(value).astype(np.int32)).tobytes()
    path.write_bytes(raw)


def token(path, offset: int, value: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[1024 + 2 * offset : 1026 + 2 * offset] = np.uint16(value).tobytes()
    path.write_bytes(raw)


FAULTS = {
    "D2 shorter than its header": (lambda p: p.write_bytes(b"x" * 100), "file of 100 bytes"),
    "D3 magic": (lambda p: header(p, 0, 7), "expected magic 20240520, got 7"),
    "D4 version": (lambda p: header(p, 1, 9), "expected version 1, got 9"),
    "D5 truncated": (lambda p: header(p, 2, 90_000), "truncated: expected"),
    "D6 trailing bytes": (lambda p: header(p, 2, 2000), "bytes too many"),
    "D7 count 0": (lambda p: header(p, 2, 0), "expected a token count of 1 to"),
    "D7 count negative": (lambda p: header(p, 2, 2**32 - 5), "expected a token count of 1 to"),
    "D7 count 2^31": (lambda p: header(p, 2, 2**31), "expected a token count of 1 to"),
    "D8 token outside": (lambda p: token(p, 4321, 257), "token 257 at offset 4321"),
    "D8 padding row": (lambda p: token(p, 10, 300), "token 300 at offset 10"),
    "D9 odd length": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "an odd number"),
}


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("fault", FAULTS)
def test_D2_to_D9_a_bad_shard_is_refused_in_one_line(train, copy, fault, part):
    spoil, says = FAULTS[fault]
    path = shard(copy, part)
    if part == "val" and fault == "D8 token outside":
        token(path, 1021, 257)
        says = "token 257 at offset 1021"
    else:
        spoil(path)
    ran = train(data=copy)
    assert_refused(ran, says, path.name)
    assert not ran.folder.exists()


def test_D1_nothing_matches(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = train(data="nowhere")
    assert_refused(ran, "*train*.bin", str(tmp_path / "nowhere"))


def test_D12_D15_too_few_tokens_are_repeated_and_said(train, copy):
    for part, index, count in (("train", 0, 700), ("train", 1, 700), ("val", 0, 500)):
        path = shard(copy, part, index)
        header(path, 2, count)
        path.write_bytes(path.read_bytes()[:1024 + 2 * count])
    ran = train(data=copy)
    said = " ".join(ran.out.split())
    assert ran.code == 0, ran.err
    assert "1.6 epochs of 1,400 tokens, each in a new order of documents" in said
    assert "480 tokens in rows of 32, for there are no more; asked for: 1,024" in said


def test_D15_no_validation_at_all(train, copy):
    path = shard(copy, "val")
    header(path, 2, 1)
    path.write_bytes(path.read_bytes()[:1026])
    assert_refused(train(data=copy), "expected validation data of 2 tokens or more, got 1")


def test_D13_no_document_start(train, copy):
    for index in (0, 1):
        path = shard(copy, "train", index)
        raw = np.fromfile(path, "<u2")
        raw[512:][raw[512:] == 256] = 3
        raw.tofile(path)
    assert_refused(train("--data_align", "row", data=copy), "no document start (token 256)")


def test_D16_a_file_of_both_parts(train, copy):
    shard(copy, "val").unlink()
    (copy / "a_val_0.bin").symlink_to(shard(copy, "train"))
    assert_refused(train(data=copy), "is a validation shard and a training shard")


def assert_stopped_at(folder, step: int, name: str) -> None:
    """All was kept: the model of the steps that were done, the checkpoint, and a log that says
    which file it was."""
    log = logs_in(folder)[-1]
    assert result_of(log)["status"] == "failed"
    assert f"bad step {step + 1}, no update was made" in body_of(log)
    assert name in body_of(log)
    model = state_of(log.with_suffix(".pt"))
    assert model["step"] == step
    assert same(model["model"], state_of(checkpoints(folder)[step])["model"])


# The first shard lasts for 15 steps, and the loader is two batches ahead.
LONG = ("--num_iterations", "30", "--val_every", "30", "--checkpoint_every", "1", "--keep", "99",
        "--first_batch_repeated", "false")


def test_D10_a_shard_that_is_deleted_before_it_is_needed(train, copy, broken):
    missing = shard(copy, "train", 1)
    broken(f"delete:3:{missing}")
    ran = train(*LONG, data=copy)
    assert ran.code == 1 and "Traceback" not in ran.err
    assert_stopped_at(ran.folder, 15, missing.name)


def test_D11_a_shard_that_is_cut_while_in_use(train, copy, broken):
    path = shard(copy, "train", 0)
    broken(f"halve:3:{path}")
    ran = train(*LONG, data=copy)
    assert ran.code == 1 and "Traceback" not in ran.err
    step = max(checkpoints(ran.folder))
    assert 3 <= step <= 6
    assert_stopped_at(ran.folder, step, path.name)
    assert "cut while in use" in body_of(ran.logs[-1])


@pytest.mark.ranks
def test_D10_missing_on_one_rank_alone_stops_all_at_the_same_step(ranks, copy, data, tmp_path):
    """No rank waits for the one that has nothing to train on."""
    folders = {rank: tmp_path / f"machine{rank}" for rank in (0, 1)}
    for folder in folders.values():
        shutil.copytree(data, folder / "data")
    missing = shard(folders[1] / "data", "train", 1)
    with ranks(2, *LONG, data="data", folders=folders, faults=(f"delete:3:{missing}",)) as two:
        assert two.wait() == [1, 1], two.said()
        assert "Traceback" not in two.said(0) + two.said(1)
    assert_stopped_at(tmp_path / "logs", 15, "rank 1: step 15: ")


def test_a_validation_shard_that_goes_away(train, copy, broken):
    path = shard(copy, "val")
    broken(f"delete:4:{path}")
    ran = train("--checkpoint_every", "3", data=copy)
    assert ran.code == 1 and "Traceback" not in ran.err
    assert "validation loss nan after step 6" in ran.out and path.name in ran.out
    assert result_of(ran.logs[0])["status"] == "failed"
    assert checkpoints(ran.folder)[3]
