"""Shards of one's own text: cut where a slow loop cuts them, split, resumed, described."""

import errno
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import fineweb, prepare, text
from data.prepare import encode_pieces, read_manifest, tokenize
from data.shards import read_header, read_shard
from data.text import Piece
from data.tokenizer import TOKENIZERS

ROOT = Path(__file__).resolve().parent.parent
BOS = 256


@pytest.fixture(autouse=True)
def small_validation(monkeypatch):
    """A row of 20 tokens is enough, and 3,000 tokens are a large text."""
    monkeypatch.setattr(prepare, "MIN_VAL_TOKENS", 21)


def some_documents(seed, count, longest=60):
    generator = np.random.default_rng(seed)
    letters = np.array(list("abc é語\n."))
    return ["x" + "".join(generator.choice(letters, generator.integers(0, longest)))
            for _ in range(count)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def slow_shards(documents, shard_tokens):
    """Documents to shards, token by token."""
    shards = [[]]
    for document in documents:
        tokens = [BOS, *document.encode()]
        if shards[-1] and len(shards[-1]) + len(tokens) > shard_tokens:
            shards.append([])
        for token in tokens:
            if len(shards[-1]) == shard_tokens:
                shards.append([BOS])
            shards[-1].append(token)
    return shards


def shards(folder, part="train"):
    manifest = read_manifest(folder)
    names = {"train": manifest.train_files, "val": manifest.val_files}[part]
    found = [read_shard(folder / name, vocab_size=257, bos_id=BOS).tolist() for name in names]
    assert sum(map(len, found)) == getattr(manifest, f"{part}_tokens")
    return found


def visible(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shard_tokens", [130, 700, 100_000])
@pytest.mark.parametrize("jobs", [1, 3])
def test_shards_equal_the_slow_loop(tmp_path, shard_tokens, jobs):
    """The twentieth, fortieth ... document is for validation, the others keep their order."""
    documents = some_documents(1, 70, longest=30)
    file = write_jsonl(tmp_path / "a.jsonl", documents)
    out = tmp_path / "out"
    manifest = tokenize([file], out, tokenizer="bytes", shard_tokens=shard_tokens, jobs=jobs)
    held_out = documents[19::20]
    kept = [d for d in documents if d not in held_out]
    assert shards(out, "val") == slow_shards(held_out, 10**9)
    assert shards(out) == slow_shards(kept, shard_tokens)
    assert (manifest.documents, manifest.vocab_size, manifest.bos_id) == (70, 257, BOS)
    assert visible(out) == sorted([*manifest.train_files, "manifest.json", "val_000000.bin"])
    assert manifest.train_files[0] == "train_000001.bin"


def test_one_document_gives_its_end_to_validation(tmp_path):
    """One play in one file: what most people bring first."""
    play = "ANNA:\nThe river.\n\n" * 60
    (tmp_path / "play.txt").write_text(play)
    tokenize(["play.txt"] if Path.cwd() == tmp_path else [tmp_path / "play.txt"],
             tmp_path / "out", tokenizer="bytes")
    tokens = list(play.encode())
    held_out = (len(tokens) + 1) // 20
    assert shards(tmp_path / "out") == [[BOS, *tokens[:-held_out]]]
    assert shards(tmp_path / "out", "val") == [[BOS, *tokens[-held_out:]]]


@pytest.mark.parametrize("shard_tokens", [10, 100, 999])
def test_a_document_longer_than_a_shard_begins_again_with_bos(tmp_path, shard_tokens, monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARS", 64)
    content = "".join(some_documents(2, 12))
    (tmp_path / "a.txt").write_text(content)
    tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer="bytes", shard_tokens=shard_tokens)
    train, (val,) = shards(tmp_path / "out"), shards(tmp_path / "out", "val")
    assert all(shard[0] == BOS and len(shard) <= shard_tokens for shard in train)
    assert bytes(t for shard in [*train, val] for t in shard if t != BOS).decode() == content
    total = sum(map(len, train)) + len(val)
    assert total / 25 < len(val) <= total / 20 + shard_tokens // 20 + 2


@pytest.mark.parametrize("content, train, val", [
    ("abcdefgh", 5, 5), ("ab", 2, 2), ("x" * 400, 380, 22), ("x" * 30, 16, 16)])
def test_validation_is_at_least_a_row_and_at_most_half(tmp_path, content, train, val):
    (tmp_path / "a.txt").write_text(content)
    manifest = tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer="bytes")
    assert (manifest.train_tokens, manifest.val_tokens) == (train, val)


def test_validation_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_VAL_TOKENS", 100)
    file = write_jsonl(tmp_path / "a.jsonl", ["x" * 39] * 200)
    assert tokenize([file], tmp_path / "out", tokenizer="bytes").val_tokens == 80


def test_files_for_validation(tmp_path):
    documents, others = some_documents(3, 50), some_documents(4, 7)
    files = [write_jsonl(tmp_path / "a.jsonl", documents),
             write_jsonl(tmp_path / "b.jsonl", others)]
    out = tmp_path / "out"
    tokenize(files[:1], out, val_files=files[1:], tokenizer="bytes", shard_tokens=100)
    assert shards(out) == slow_shards(documents, 100)
    assert shards(out, "val") == slow_shards(others, 100)
    with pytest.raises(ValueError, match=r"a\.jsonl: is given to train on and for validation"):
        tokenize(files, tmp_path / "c", val_files=files[:1], tokenizer="bytes")


def test_the_order_survives_many_threads():
    """The first piece takes until another task is done."""
    other, overtaken = threading.Event(), []

    def encode(body):
        if body.startswith("0 "):
            overtaken.append(other.wait(timeout=20))
        elif int(body.split()[0]) > 5:
            other.set()
        return np.frombuffer(body.encode(), np.uint8)

    pieces = [Piece(f"{n} " + "x" * 100_000, True) for n in range(40)]
    got = list(encode_pieces(pieces, encode, jobs=4, start=0))
    assert [bytes(tokens).split()[0] for _, tokens, _ in got] == [b"%d" % n for n in range(40)]
    assert [number for number, _, _ in got] == list(range(40)) and overtaken == [True]
    assert [n for n, _, _ in encode_pieces(pieces[30:], encode, jobs=1, start=8)] == [8, 9]


# --- interruptions --------------------------------------------------------------------------------

class Interrupted(Exception):
    pass


@pytest.mark.parametrize("one_document", [False, True])
@pytest.mark.parametrize("shard_tokens", [40, 150])
def test_goes_on_at_the_last_whole_shard(tmp_path, monkeypatch, one_document, shard_tokens):
    """Stopped after each shard in turn; the shards are those of one call, and nothing is encoded
    twice but the document that was begun."""
    monkeypatch.setattr(text, "PIECE_CHARS", 50)
    documents = some_documents(5, 25, longest=30)
    if one_document:
        file = tmp_path / "a.txt"
        file.write_text(" ".join(documents))
    else:
        file = write_jsonl(tmp_path / "a.jsonl", documents)
    options = {"tokenizer": "bytes", "shard_tokens": shard_tokens}
    tokenize([file], tmp_path / "whole", **options)
    original = prepare._Work.save

    def save_and_stop(work, *arguments):
        original(work, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare._Work, "save", save_and_stop)
    stops, encoded = 0, []
    encode = TOKENIZERS["bytes"].encoder()
    monkeypatch.setitem(prepare.TOKENIZERS, "bytes", prepare.Tokenizer(
        "bytes", 257, BOS, lambda: lambda body: encoded.append(len(body)) or encode(body), None))
    while True:
        try:
            encoded.clear()
            tokenize([file], tmp_path / "out", jobs=1, **options)
            break
        except KeyboardInterrupt:
            stops += 1
            assert visible(tmp_path / "out") == [".partial"]
    # The end that goes to validation can take a shard or more.
    assert stops >= len(list((tmp_path / "whole").glob("train*"))) - 1 >= 3
    assert sum(encoded) < 300
    for part in ("train", "val"):
        assert shards(tmp_path / "out", part) == shards(tmp_path / "whole", part)
    assert visible(tmp_path / "out") == visible(tmp_path / "whole")


def test_other_options_start_anew_and_a_killed_call_is_swept(tmp_path, monkeypatch, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", some_documents(5, 60))

    def stop(*_):
        raise KeyboardInterrupt

    original = prepare._Writer.take_document
    monkeypatch.setattr(prepare._Writer, "take_document", stop)
    with pytest.raises(KeyboardInterrupt):
        tokenize([file], tmp_path / "out", tokenizer="bytes", shard_tokens=50)
    monkeypatch.setattr(prepare._Writer, "take_document", original)
    (tmp_path / "out/.partial/.train_000009.bin.77.tmp").write_bytes(b"killed")
    assert len(list((tmp_path / "out/.partial").glob("train_*.bin"))) > 3
    tokenize([file], tmp_path / "out", tokenizer="bytes", shard_tokens=300)
    assert "with other files or options: starting anew" in capsys.readouterr().out
    tokenize([file], tmp_path / "whole", tokenizer="bytes", shard_tokens=300)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert visible(tmp_path / "out") == visible(tmp_path / "whole")


@pytest.mark.parametrize("name, status", [("INT", 130), ("TERM", 143)])
def test_both_signals_stop_it_alike(tmp_path, name, status):
    line = json.dumps({"text": "word " * 20_000}) + "\n"
    (tmp_path / "big.jsonl").write_text(line * 400)
    process = subprocess.Popen(
        [sys.executable, "-m", "data.fineweb", "tokenize", tmp_path / "big.jsonl", "--out",
         tmp_path / "out", "--tokenizer", "bytes", "--shard_tokens", "100000"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("out/.partial/train_*.bin"))) < 3:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(getattr(signal, f"SIG{name}"))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "whole shards are kept in" in errors and errors.count("\n") == 1
    assert output.startswith("train_000001.bin: 100,000 tokens, ")


@pytest.mark.parametrize("shard_tokens", [100, 10**6])
def test_a_call_interrupted_while_it_moves_the_shards(tmp_path, monkeypatch, shard_tokens):
    file = write_jsonl(tmp_path / "a.jsonl", some_documents(5, 60))
    options = {"tokenizer": "bytes", "shard_tokens": shard_tokens}
    tokenize([file], tmp_path / "whole", **options)
    original, moved = prepare.os.replace, []

    def replace(source, target):
        if Path(target).parent == tmp_path / "out":
            moved.append(target)
            if len(moved) == 2:
                raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(prepare.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        tokenize([file], tmp_path / "out", **options)
    assert visible(tmp_path / "out") == [".partial", "train_000001.bin"]
    tokenize([file], tmp_path / "out", **options)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert visible(tmp_path / "out") == visible(tmp_path / "whole")


@pytest.mark.parametrize("shard_tokens, kept", [(100, "; 3 whole shards"), (10**6, "call again$")])
def test_a_full_disk_is_named(tmp_path, monkeypatch, shard_tokens, kept):
    file = write_jsonl(tmp_path / "a.jsonl", some_documents(5, 60))
    original, calls = prepare.write_shard, []

    def full(path, tokens):
        calls.append(path)
        if len(calls) > 3 or shard_tokens > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, tokens)

    monkeypatch.setattr(prepare, "write_shard", full)
    with pytest.raises(OSError, match=rf"the disk of {tmp_path}/out is full .*{kept}"):
        tokenize([file], tmp_path / "out", tokenizer="bytes", shard_tokens=shard_tokens)
    assert (tmp_path / "out").exists() == (shard_tokens == 100)


# --- refusals -------------------------------------------------------------------------------------

def test_a_bad_line_leaves_nothing(tmp_path):
    files = [write_jsonl(tmp_path / "good.jsonl", some_documents(0, 50)), tmp_path / "bad.jsonl"]
    files[1].write_text('{"text": \n')
    with pytest.raises(ValueError, match=rf"^{files[1]}: line 1: not JSON"):
        tokenize(files, tmp_path / "out", tokenizer="bytes", shard_tokens=100)
    assert not (tmp_path / "out").exists()


def test_too_little_text(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": null}\n{"text": "x"}\n')
    for name, says in (("empty.txt", rf"0 tokens in 0 documents; empty files: {tmp_path}/empty"),
                       ("blank.jsonl", r"2 tokens in 1 documents; documents without text .*: 1")):
        with pytest.raises(ValueError, match=rf"^too little text to train on: {says}"):
            tokenize([tmp_path / name], tmp_path / "out", tokenizer="bytes")
        assert not (tmp_path / "out").exists()


def test_refusals(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    np.array([1, 2], "<u2").tofile(tmp_path / "a.bin")
    out = tmp_path / "out"
    for options, says in (({"tokenizer": "words"}, "--tokenizer: expected gpt2 or bytes"),
                          ({"shard_tokens": 1}, "--shard_tokens: expected 2 or more, got 1")):
        with pytest.raises(ValueError, match=says):
            tokenize([tmp_path / "a.txt"], out, **options)
    with pytest.raises(ValueError, match=r"a\.bin: has GPT-2's tokens; --tokenizer bytes"):
        tokenize([tmp_path / "a.bin"], out, tokenizer="bytes")
    assert not out.exists()
    tokenize([tmp_path / "a.txt"], out, tokenizer="bytes")
    with pytest.raises(FileExistsError, match=r"manifest\.json is there already: remove"):
        tokenize([tmp_path / "a.txt"], out, tokenizer="bytes")
    assert visible(out) == ["manifest.json", "train_000001.bin", "val_000000.bin"]


def test_manifests_that_cannot_be_trusted(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer="bytes")
    path = tmp_path / "out/manifest.json"
    good = json.loads(path.read_text())
    assert read_manifest(tmp_path) is None
    for change, says in (({"tokenizer": "words"}, "expected a manifest"), ({"more": 1}, "more"),
                         ({"vocab_size": 300}, "expected vocab_size 257 .* got 300"),
                         ({"val_files": ["gone.bin"]}, r"gone\.bin: no such shard")):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=says):
            read_manifest(tmp_path / "out")


def test_ranks_that_cannot_be_had(tmp_path, monkeypatch):
    import requests
    import tiktoken.load

    def offline(url):
        raise requests.ConnectionError("name resolution failed")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(OSError, match=r"set TIKTOKEN_CACHE_DIR .*--tokenizer bytes") as caught:
        tokenize([tmp_path / "a.txt"], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# --- command line ---------------------------------------------------------------------------------

@pytest.fixture
def few_gpt2_tokens(monkeypatch):
    """GPT-2's ids of all bytes, of two words and of the document start, without a download."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    in_order = [*printable, *(n for n in range(256) if n not in printable)]
    ranks = {bytes([n]): number for number, n in enumerate(in_order)}
    few = tiktoken.Encoding("gpt2", pat_str=r" ?\w+|[\s\S]",
                            mergeable_ranks=ranks | {b"Hello": 15496, b" world": 995},
                            special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": few}.get)
    return few


def test_gpt2_tokens_from_the_command_line(tmp_path, few_gpt2_tokens, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["Hello world", "hello <|endoftext|>, GPT-2!", "é語"])
    assert fineweb.main(["tokenize", "a.jsonl", "--out", "my data"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert any("3 documents" in line for line in output)
    assert any("left as text: 1" in line for line in output)
    assert output[-1] == f"next: {ROOT}/run.sh --data_dir '{tmp_path}/my data'"
    out = tmp_path / "my data"
    tokens = [read_shard(out / name, vocab_size=50257).tolist()
              for name in ("train_000001.bin", "val_000000.bin")]
    assert tokens[0][:4] == [50256, 15496, 995, 50256]  # published ids of "Hello" and " world"
    assert few_gpt2_tokens.decode(tokens[0] + tokens[1][1:]) == (
        "<|endoftext|>Hello world<|endoftext|>hello <|endoftext|>, GPT-2!<|endoftext|>é語")


def test_command_line_errors_are_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "data.fineweb", "tokenize", tmp_path / "nothing.txt", "--out",
         tmp_path / "out"], cwd=ROOT, text=True, capture_output=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokens_of_nanogpt_become_shards(tmp_path):
    np.array([1, 2, 3, 50256, 4, 50256], "<u2").tofile(tmp_path / "train.bin")
    np.array([5, 6, 50256], "<u2").tofile(tmp_path / "val.bin")
    out = tmp_path / "out"
    manifest = tokenize([tmp_path / "train.bin"], out, val_files=[tmp_path / "val.bin"])
    assert read_shard(out / "train_000001.bin").tolist() == [50256, 1, 2, 3, 50256, 4]
    assert read_shard(out / "val_000000.bin").tolist() == [50256, 5, 6]
    assert manifest.tokenizer == "gpt2" and read_header(out / "val_000000.bin") == 3
