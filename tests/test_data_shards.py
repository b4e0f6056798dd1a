"""Every fault of a shard has its own message, and a shard is written whole or not at all."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.shards import ShardError, read_header, read_shard, write_shard

ROOT = Path(__file__).resolve().parent.parent


def raw_shard(path: Path, tokens=(256, 1, 2, 3), magic=20240520, version=1, count=None, tail=b""):
    """A shard written byte by byte, independent of write_shard."""
    header = bytearray(1024)
    for place, number in enumerate((magic, version, len(tokens) if count is None else count)):
        header[4 * place : 4 * place + 4] = (number & 0xFFFFFFFF).to_bytes(4, "little")
    body = b"".join(int(token).to_bytes(2, "little") for token in tokens)
    path.write_bytes(bytes(header) + body + tail)
    return path


def test_reads_what_the_format_says(tmp_path):
    path = raw_shard(tmp_path / "a.bin", (50256, 0, 65535, 258))
    tokens = read_shard(path)
    assert tokens.tolist() == [50256, 0, 65535, 258]
    assert tokens.dtype == np.uint16 and isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable
    assert read_header(path) == 4


def test_writes_what_the_format_says(tmp_path):
    tokens = [50256, 0, 65535, 258]
    expected = raw_shard(tmp_path / "a.bin", tokens).read_bytes()
    for kind in (np.uint16, np.int32, np.int64, ">u2", ">i8"):
        write_shard(tmp_path / "b.bin", np.array(tokens, kind))
        assert (tmp_path / "b.bin").read_bytes() == expected
    write_shard(tmp_path / "b.bin", np.array([[1, 9], [2, 9], [3, 9]])[:, 0])  # a strided view
    assert read_shard(tmp_path / "b.bin").tolist() == [1, 2, 3]


def npy(tokens):
    np.save(buffer := io.BytesIO(), np.array(tokens, np.uint16))
    return buffer.getvalue()


FAULTS = {
    "D2 short": (lambda p: p.write_bytes(b"x" * 1023), "header of 1024 bytes, got a file of 1023"),
    "D2 empty": (lambda p: p.write_bytes(b""), "got a file of 0 bytes"),
    "D3 magic": (lambda p: raw_shard(p, magic=7), "expected magic 20240520, got 7;.*tokenize"),
    "D3 llama": (lambda p: raw_shard(p, magic=20240801), "32-bit tokens.*tokenize"),
    "nanoGPT": (lambda p: (np.arange(700) * 77 % 50257).astype("<u2").tofile(p),
                "16-bit tokens without a header, as nanoGPT's; convert: python -m data.fineweb "
                "tokenize .* --out"),
    "npy": (lambda p: p.write_bytes(npy([1, 2])), r"got numpy's \.npy; convert: python -m"),
    "D20 html": (lambda p: p.write_bytes(b"<html>" * 400), "looks like an HTML page"),
    "D4 version": (lambda p: raw_shard(p, version=2), "expected version 1, got 2"),
    "D5 truncated": (lambda p: raw_shard(p, count=5), "truncated: expected 1034 bytes.*found 1032"),
    "D6 trailing": (lambda p: raw_shard(p, count=3), "expected 1030 bytes.*2 bytes too many"),
    "D7 zero": (lambda p: raw_shard(p, count=0), "count of 1 to 2147483647, got 0"),
    "D7 negative": (lambda p: raw_shard(p, count=-4), "got -4"),
    "D7 2^31": (lambda p: raw_shard(p, count=2**31), "got -2147483648"),
    "D9 odd": (lambda p: raw_shard(p, tail=b"!"), "9 bytes follow the header, an odd number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(tmp_path, fault):
    path = tmp_path / "bad.bin"
    inject, message = FAULTS[fault]
    inject(path)
    for reader in (read_header, read_shard):
        with pytest.raises(ShardError, match=rf"^{path}: .*{message}") as caught:
            reader(path)
        assert "\n" not in str(caught.value)


def test_all_faults_have_different_messages():
    assert len({message for _, message in FAULTS.values()}) == len(FAULTS)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"nothing\.bin: no such shard.*{os.getcwd()}"):
        read_shard(tmp_path / "nothing.bin")
    with pytest.raises(ShardError, match="expected a shard, got a folder"):
        read_shard(tmp_path)


@pytest.mark.parametrize("where", [0, 4_200_000, 4_499_999])  # in the second piece of the scan too
@pytest.mark.parametrize("token", [50257, 50303, 65535])
def test_d8_token_outside_the_vocabulary(tmp_path, where, token):
    tokens = np.full(4_500_000, 50256, np.uint16)
    tokens[where] = token
    write_shard(tmp_path / "a.bin", tokens)
    with pytest.raises(ShardError, match=f"token {token} at offset {where} .*0 to 50256"):
        read_shard(tmp_path / "a.bin", vocab_size=50257)
    read_shard(tmp_path / "a.bin", vocab_size=65536)


def test_d8_names_the_first_of_several(tmp_path):
    path = raw_shard(tmp_path / "a.bin", (1, 300, 299, 400))
    with pytest.raises(ShardError, match="token 300 at offset 1"):
        read_shard(path, vocab_size=257)


def test_d13_no_document_start(tmp_path):
    path = raw_shard(tmp_path / "a.bin", (1, 2, 3))
    with pytest.raises(ShardError, match=r"no document start \(token 256\) among 3 tokens"):
        read_shard(path, bos_id=256)
    tokens = np.zeros(4_500_000, np.uint16)
    tokens[-1] = 256
    write_shard(path, tokens)
    assert len(read_shard(path, bos_id=256)) == len(tokens)


@pytest.mark.parametrize("tokens, message", [
    (np.array([], np.uint16), "expected 1 to 2147483647 tokens, got 0"),
    (np.zeros((2, 2), np.uint16), "flat integer array, got uint16 of shape"),
    (np.array([0.5]), "flat integer array, got float64"),
    (np.array([True]), "flat integer array, got bool"),
    (np.array([-1, 5]), "16 bits .* got -1 to 5"),
    (np.array([0, 65536]), "16 bits .* got 0 to 65536"),
])
def test_write_refuses(tmp_path, tokens, message):
    with pytest.raises(ShardError, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_shard_and_nothing_else(tmp_path, monkeypatch):
    path = raw_shard(tmp_path / "a.bin")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, np.arange(100))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_d1_pattern_without_files(tmp_path):
    pattern = tmp_path / "train_*.bin"
    with pytest.raises(FileNotFoundError) as caught:
        shards.find(pattern)
    assert str(pattern) in str(caught.value) and os.getcwd() in str(caught.value)
    for number in (10, 2, 1):
        raw_shard(tmp_path / f"train_{number:06d}.bin")
    assert [p.name[6:12] for p in shards.find(pattern)] == ["000001", "000002", "000010"]
    odd = raw_shard(tmp_path / "a[1].bin")
    assert shards.find(odd) == [odd]


def test_d16_training_and_validation_overlap(tmp_path):
    one, two = raw_shard(tmp_path / "1.bin"), raw_shard(tmp_path / "2.bin")
    shards.check_disjoint([one], [two])
    (tmp_path / "link.bin").symlink_to(one)
    for val in (one, tmp_path / "link.bin", str(tmp_path / "." / "1.bin")):
        with pytest.raises(ShardError, match="is a validation shard and a training shard"):
            shards.check_disjoint([two, one], [val])


def test_d17_manifest(tmp_path):
    files = [raw_shard(tmp_path / "1.bin"), raw_shard(tmp_path / "2.bin", (9, 9))]
    manifest = tmp_path / "MANIFEST"
    shards.write_manifest(files, manifest)
    shards.check_manifest(files, manifest)
    subprocess.run(["sha256sum", "--check", "--quiet", manifest], cwd=tmp_path, check=True)
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    old, new = manifest.read_text().split()[2], shards.sha256_files(files[1:])[0]
    with pytest.raises(ShardError, match=rf"^{files[1]}: .*{old}, got {new}"):
        shards.check_manifest(files, manifest)
    with pytest.raises(ShardError, match="not in the manifest"):
        shards.check_manifest([raw_shard(tmp_path / "3.bin")], manifest)
    manifest.write_text("nonsense\n")
    with pytest.raises(ShardError, match="line 1: expected `sha256  name`, got 'nonsense'"):
        shards.check_manifest(files, manifest)


def test_data_digest_sees_content_and_order_but_no_names(tmp_path):
    one, two = raw_shard(tmp_path / "1.bin"), raw_shard(tmp_path / "2.bin", (9, 9))
    digest = shards.data_digest([one, two])
    assert digest != shards.data_digest([two, one])
    assert digest != shards.data_digest([one])
    (tmp_path / "other").mkdir()
    moved = [one.rename(tmp_path / "other" / "x.bin"), two]
    assert shards.data_digest(moved) == digest


def test_command_line(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "data.shards", *map(str, arguments)],
            cwd=ROOT, capture_output=True, text=True,
        )

    path = raw_shard(tmp_path / "1.bin", (50256, 5, 50256))
    done = run(tmp_path / "*.bin", "--write", tmp_path / "MANIFEST")
    assert done.returncode == 0, done.stderr
    assert "3 tokens, 2 documents, sha256" in done.stdout
    assert run(path, "--manifest", tmp_path / "MANIFEST").returncode == 0
    raw_shard(path, (50256, 5, 50257))
    done = run(path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}: token 50257 at offset 2")
    assert done.stderr.count("\n") == 1
