"""What people bring to train on: every format, every kind of dirt, and what is said of it."""

import gzip
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import text
from data.shards import write_shard
from data.text import Reading, expand, read


def documents(path, reading=None):
    """The documents of a file, pieces joined."""
    found = []
    for piece in read(path, reading or Reading()):
        if piece.opens:
            found.append(piece.body)
        else:
            found[-1] += piece.body
    return found


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "one\n\nwhole document\n", ["one\n\nwhole document\n"]),
    ("UPPER.TXT", "x", ["x"]),
    ("a.md", "# title\n\ntext\n", ["# title\n\ntext\n"]),
    # The marker ends a document wherever it is; a line end behind it belongs to it.
    ("a.txt", "a cat.<|endoftext|>a dog.<|endoftext|>\nThird.\n", ["a cat.", "a dog.", "Third.\n"]),
    ("a.txt", "<|endoftext|>\r\nHi.\r\n<|endoftext|>\r\nBye.\r\n", ["Hi.\r\n", "Bye.\r\n"]),
    ("a.txt", "a\n<|endoftext|>\n \n<|endoftext|>\nb", ["a\n", "b"]),
    ("bom.txt", b"\xef\xbb\xbfnotepad", ["notepad"]),
    ("utf16.txt", "né<|endoftext|>語".encode("utf-16"), ["né", "語"]),
    ("utf16be.txt", b"\xfe\xff" + "né".encode("utf-16-be"), ["né"]),
    ("utf32.txt", "né".encode("utf-32"), ["né"]),
    ("a.jsonl", '{"text": "one"}\n\n{"id": 7, "text": "two\\nlines"}', ["one", "two\nlines"]),
    ("bom.jsonl", b'\xef\xbb\xbf{"text": "notepad"}\r\n{"text": "second"}\r\n',
     ["notepad", "second"]),
    ("a.ndjson", '"bare"\n{"text": "two"}\n', ["bare", "two"]),
    ("u2028.jsonl", '{"text": "a\u2028b"}\n{"text": "c"}\n', ["a\u2028b", "c"]),
    ("a.json", '[{"text": "one"},\n {"text": "two"}, "three"]', ["one", "two", "three"]),
    ("a.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
    ("a.json", '{\n "text": "one"\n}\n', ["one"]),
    ("a.csv", 'id,text\n1,"hello, ""you""\nthere"\n2,b\n', ['hello, "you"\nthere', "b"]),
    ("a.tsv", "text\tid\none\t1\n", ["one"]),
])
def test_each_format(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    assert documents(path) == expected
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert documents(packed) == expected
    packed = tmp_path / f"{name}.ZST"
    packed.write_bytes(pyarrow.compress(path.read_bytes(), "zstd", asbytes=True))
    assert documents(packed) == expected


def parquet(path, values, kind=None):
    pyarrow.parquet.write_table(pyarrow.table({
        "id": list(range(len(values))), "text": pyarrow.array(values, kind)}), path,
        row_group_size=2)
    return path


@pytest.mark.parametrize("kind", [
    pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(),
                                                                 pyarrow.string())])
def test_parquet(tmp_path, kind):
    values = ["one", "two <|endoftext|>", None, "", "né"]
    reading = Reading()
    found = documents(parquet(tmp_path / "a.parquet", values, kind), reading)
    assert found == ["one", "two <|endoftext|>", "né"]
    assert list(reading.seen.values()) == [1, 2]
    assert f"(the first in {tmp_path / 'a.parquet'}: row 3)" in "".join(reading.notes())


@pytest.mark.parametrize("content, kind, says", [
    ([1, 2], pyarrow.int64(), "expected column 'text' to be strings, got int64; --text_field"),
    ([b"x"], pyarrow.binary(), "expected column 'text' to be strings, got binary"),
    ([["x"]], None, r"got list<.*string>"),
])
def test_parquet_columns_are_checked_before_the_first_document(tmp_path, content, kind, says):
    path = parquet(tmp_path / "a.parquet", content, kind)
    with pytest.raises(ValueError, match=rf"^{path}: .*{says}"):
        text.check(path, Reading())


def test_parquet_that_is_none(tmp_path):
    path = parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(ValueError, match=r"expected a column 'body', got id, text; .*text: text"):
        text.check(path, Reading("body"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"^{path}: not a whole Parquet file: \S"):
        text.check(path, Reading())


def test_null_and_blank_documents_are_skipped_alike(tmp_path):
    values = ["fine", None, "", "   "]
    lines = "".join(json.dumps({"text": v}) + "\n" for v in values)
    files = [write(tmp_path / "a.jsonl", lines),
             write(tmp_path / "a.json", json.dumps([{"text": v} for v in values])),
             write(tmp_path / "a.csv", "text,id\nfine,1\n,2\n,3\n   ,4\n"),
             parquet(tmp_path / "a.parquet", values)]
    for file in files:
        reading = Reading()
        assert documents(file, reading) == ["fine"]
        assert dict(reading.seen) == {"documents without text (null or blank), skipped": 3}


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "cut \\ud83d here \\udc00"}\n'
                                       '{"text": "whole \\ud83d\\ude00"}\n')
    reading = Reading()
    assert documents(path, reading) == ["cut \ufffd here \ufffd", "whole \U0001f600"]
    assert reading.notes() == [
        f"lone surrogates that became U+FFFD: 2 (the first in {path}: line 1)"]


def test_a_marker_in_a_record_stays_text_and_is_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": "a<|endoftext|>b"}\n')
    reading = Reading()
    assert documents(path, reading) == ["x", "a<|endoftext|>b"]
    (note,) = reading.notes()
    assert note.startswith("<|endoftext|> within documents, left as text: 1") and "line 2" in note


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", '{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
    ("a.jsonl", '{"body": "x"}\n', "line 1: expected a field 'text', got body; --text_field"),
    ("a.jsonl", '{"text": 7}\n', "line 1: expected 'text' to be a string, got a number"),
    ("a.jsonl", '["text"]\n', "line 1: expected a string or an object with 'text', got a list"),
    ("a.json", '[{"text": "x"},\n {"text": }]', "line 2: not JSON"),
    ("a.json", '[{"text": "x"}, {"text": [1]}]', "entry 2: expected 'text' to be a str.* a list"),
    ("a.csv", "id,body\n1,x\n", "line 1: expected a column 'text', got id, body"),
    ("a.csv", 'text\n"a"b\n', "line 2: not CSV"),
    ("a.txt", b"fine\nCaf\xe9\n", r"line 2: not UTF-8 \(byte 0xe9: .*--encoding latin-1"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
    ("a.csv", b"text\nok\n\xff\n", "line 3: not UTF-8"),
    ("a.txt", b"\xff\xfea\x00b", "not UTF-16"),
    ("a.txt.gz", gzip.compress(b"x" * 999)[:-9], "broken gzip file"),
    ("a.txt.gz", b"no gzip", "broken gzip file"),
    ("a.txt.zst", pyarrow.compress(bytes(999), "zstd", asbytes=True)[:-4], "broken zstd file"),
    ("a.bin", np.array([7, 50257], "<u2").tobytes(), "token 50257 at offset 1 is outside GPT-2"),
    ("a.bin", b"odd", "expected 16-bit tokens, got an odd number of bytes"),
])
def test_what_cannot_be_read_is_one_line_with_file_and_place(tmp_path, name, content, says):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"^{path}: {says}") as caught:
        documents(path)
    assert "\n" not in str(caught.value)


def test_another_encoding_is_named(tmp_path):
    path = write(tmp_path / "a.txt", b"Caf\xe9")
    assert documents(path, Reading(encoding="latin-1")) == ["Café"]
    with pytest.raises(ValueError, match=r"--encoding: expected a name .* got 'latin9000'"):
        text.check(path, Reading(encoding="latin9000"))


def test_an_empty_file_is_noted(tmp_path):
    reading = Reading()
    assert documents(write(tmp_path / "a.txt", ""), reading) == []
    assert reading.notes() == [f"empty files: 1 (the first in {tmp_path / 'a.txt'})"]


def test_a_long_document_comes_in_pieces_cut_where_a_token_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARS", 50)
    content = ("some words, and\n\n  more   of them; " * 40 + "<|endoftext|>\n" + "語" * 700
               + " " * 100 + "<|endoftext|>end")
    path = write(tmp_path / "a.txt", content)
    pieces = list(read(path, Reading()))
    assert len(pieces) > 20 and max(len(p.body) for p in pieces) < 300
    assert documents(path) == content.replace(">\n", ">").split("<|endoftext|>")
    for before, after in itertools.pairwise(pieces):
        if not after.opens and "語" not in before.body:
            assert after.body[0] in " \n" and not before.body[-1].isspace()


def token_documents(path):
    return [part.body.tolist() for part in read(path, Reading())]


def test_tokens_of_other_projects(tmp_path, monkeypatch):
    """nanoGPT closes documents with <|endoftext|>, others open them with it."""
    closed, opened = [1, 2, 3, 50256, 4, 50256], [50256, 1, 2, 3, 50256, 4]
    for tokens in (closed, opened):
        np.array(tokens, "<u2").tofile(tmp_path / "train.bin")
        np.save(tmp_path / "a.npy", np.array(tokens, np.int64))
        write_shard(tmp_path / "shard.bin", np.array(tokens))
        for name in ("train.bin", "a.npy", "shard.bin"):
            assert token_documents(tmp_path / name) == [[1, 2, 3], [4]]
    monkeypatch.setattr(text, "PIECE_TOKENS", 2)
    parts = list(read(tmp_path / "a.npy", Reading()))
    assert [(p.body.tolist(), p.opens) for p in parts] == [
        ([1], True), ([2, 3], False), ([4], True)]
    np.save(tmp_path / "b.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"a row of whole numbers, got float64 of shape \(2, 2\)"):
        text.check(tmp_path / "b.npy", Reading())
    (tmp_path / "meta.pkl").write_bytes(b"characters")
    with pytest.raises(ValueError, match=r"train\.bin: its vocabulary is that of meta\.pkl"):
        text.check(tmp_path / "train.bin", Reading())


def test_files_folders_and_patterns(tmp_path):
    folder = tmp_path / "notes"
    for name in ("b.md", "sub/a.TXT", "sub/c.jsonl.gz", ".git/x.txt", "d.png", "out/train.txt",
                 "e.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, "x")
    files, (note,) = expand([folder], leave_out=folder / "out")
    assert [str(f.relative_to(folder)) for f in files] == ["b.md", "sub/a.TXT", "sub/c.jsonl.gz"]
    assert note == f"{folder}: 1 .md, 1 .txt, 1 .jsonl; left out: .bin, .png"
    assert expand([f"{folder}/**/*.md", folder / "e.bin"])[0] == [folder / "b.md", folder / "e.bin"]
    write(tmp_path / "odd[1].txt", "x")
    assert expand([tmp_path / "odd[1].txt"])[0] == [tmp_path / "odd[1].txt"]
    for word, error, says in (
            (folder / "d.png", ValueError, r"d\.png: expected one of \.txt .*, got '\.png'"),
            (folder / "no.txt", FileNotFoundError, r"no\.txt: no such file or folder"),
            (folder / "*.rst", FileNotFoundError, r"\*\.rst: no such file")):
        with pytest.raises(error, match=says):
            expand([word])
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected files of text in this folder, found 0"):
        expand([folder / "empty"])


def test_bytes_read_follow_the_file(tmp_path):
    """For the progress bar: of what is on disk, whatever the format."""
    files = [write(tmp_path / "a.txt", "word " * 500_000),
             write(tmp_path / "b.txt.gz", gzip.compress(b"word " * 500_000)),
             parquet(tmp_path / "c.parquet", ["x"] * 3000)]
    reading, seen = Reading(), []
    for file in files:
        for _ in read(file, reading):
            seen.append(reading.bytes_read)
    assert seen == sorted(seen) and len(set(seen)) > 4
    assert reading.bytes_read == sum(f.stat().st_size for f in files)
