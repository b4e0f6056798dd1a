"""Documents from the files that people have. One reader a format, all of them in FORMATS:

    .txt .text .md .markdown .rst   one document; several with <|endoftext|> between them
    .jsonl .ndjson                  one JSON object (or string) a line
    .json                           an array of such, or one a line
    .csv .tsv                       one row, under a line of column names
    .parquet                        one row
    .bin .npy                       16-bit GPT-2 tokens of other projects: no header, or numpy's;
                                    <|endoftext|> (50256) between documents; and our own shards

Text may be compressed (.gz, .zst). Endings may be in capitals. Text is UTF-8, or UTF-16 and UTF-32
with a byte order mark, or what --encoding says. A document is handed on in pieces, cut before white
space, where GPT-2's tokenizer always ends a token too: a long one needs no memory in proportion.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from data.shards import MAGIC, read_shard

MARKER = "<|endoftext|>"
MARKER_LINE = re.compile(re.escape(MARKER) + r"\r?\n?")  # with the end of its line
GPT2_BOS = 50256  # its token
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # 32 before 16: same start
PIECE_CHARS = 1 << 18
PIECE_TOKENS = 1 << 20
COMPRESSED = (".gz", ".zst")


class Piece(NamedTuple):
    """A document, or the next part of one. body: text, or tokens (n,) of a file of tokens."""

    body: str | np.ndarray
    opens: bool  # a document begins with it


@dataclass
class Reading:
    """Options of the readers, and what they met on the way."""

    text_field: str = "text"
    encoding: str = "utf-8"
    bytes_read: int = 0  # of all files so far, compressed as they are on disk
    seen: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # where each kind was met first

    def note(self, what: str, where: str, count: int = 1) -> None:
        self.seen[what] += count
        self.first.setdefault(what, where)

    def notes(self) -> list[str]:
        """One line for each kind of thing that was met."""
        return [f"{what}: {count:,} (the first in {self.first[what]})"
                for what, count in self.seen.items()]


def kind_of(path: Path) -> str:
    """The ending that names the format: .jsonl of a.JSONL.gz."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings else ""


def expand(words: Sequence[str | os.PathLike], leave_out: Path | None = None,
           ) -> tuple[list[Path], list[str]]:
    """The files that `words` name (files, folders, patterns), and a note on each folder.

    A folder gives its files of text, sorted by name, those of its folders too; hidden ones,
    files of tokens, other kinds and what is in `leave_out` are left. Raises FileNotFoundError, or
    ValueError for a file of an unknown kind.
    """
    files, notes = [], []
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file()
                            and not any(part.startswith(".") for part in p.relative_to(path).parts)
                            and not (leave_out and p.resolve().is_relative_to(leave_out.resolve())))
            taken = [p for p in inside if kind_of(p) in FORMATS and kind_of(p) not in TOKEN_FILES]
            if not taken:
                raise FileNotFoundError(f"{path}: expected files of text in this folder, found "
                                        f"{len(inside)} files and none of {_kinds()}")
            counts = Counter(map(kind_of, taken))
            left = sorted({kind_of(p) or p.name for p in inside if p not in set(taken)})
            notes.append(f"{path}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
                         + f"; left out: {', '.join(left)}" * bool(left))
            files += taken
        elif path.exists():
            files.append(path)
        else:
            matches = sorted(Path(p) for p in glob.glob(os.fspath(word), recursive=True)
                             if os.path.isfile(p))
            if not matches:
                raise FileNotFoundError(f"{word}: no such file or folder, and no file matches it "
                                        f"as a pattern (current folder {os.getcwd()})")
            files += matches
    for path in files:
        if kind_of(path) not in FORMATS:
            raise ValueError(f"{path}: expected one of {_kinds()} (also .gz, .zst), got "
                             f"{path.suffix or 'no ending'!r}; rename it if it is text")
    return files, notes


def _kinds() -> str:
    return " ".join(FORMATS)


def check(path: Path, reading: Reading) -> None:
    """Refuse before the first document what can be refused then: a Parquet column that is no
    text, tokens that are not GPT-2's, an encoding that Python does not know."""
    if path.stat().st_size == 0:
        return
    try:
        codecs.lookup(reading.encoding)
    except LookupError:
        raise ValueError(f"--encoding: expected a name that Python knows, as latin-1, cp1252 or "
                         f"utf-16; got {reading.encoding!r}") from None
    if kind_of(path) == ".parquet":
        _open_parquet(path, reading)
    elif kind_of(path) in TOKEN_FILES:
        _open_tokens(path)


def read(path: Path, reading: Reading) -> Iterator[Piece]:
    """The pieces of a file in their order. ValueError or OSError name the file and the line."""
    size = path.stat().st_size
    before = reading.bytes_read
    if size == 0:
        reading.note("empty files", str(path))
        return
    kind = kind_of(path)
    try:
        for where, body, opens in FORMATS[kind](path, reading):
            if isinstance(body, str):
                body = _clean(body, where, kind, reading)
            if len(body):
                yield Piece(body, opens)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file: {error}") from None
    except UnicodeError as error:
        raise _wrong_encoding(path, reading, error) from None
    reading.bytes_read = before + size


def _clean(text: str, where: str, kind: str, reading: Reading) -> str:
    """UTF-8 has no lone surrogates, and so no tokens for them; JSON and CSV can hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text, count = re.subn("[\ud800-\udfff]", "\ufffd", text)
        reading.note("lone surrogates that became U+FFFD", where, count)
    if kind not in TEXT_FILES and (count := text.count(MARKER)):
        reading.note(f"{MARKER} within documents, left as text", where, count)
    return text


# --- bytes to text --------------------------------------------------------------------------------

class _Counted(io.RawIOBase):
    """The file as it is on disk; reading.bytes_read follows it."""

    def __init__(self, path: Path, reading: Reading):
        self.file, self.reading, self.before = open(path, "rb"), reading, reading.bytes_read  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(buffer)
        self.reading.bytes_read = self.before + self.file.tell()
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class _Zstd(io.RawIOBase):
    def __init__(self, path: Path, file: IO[bytes]):
        import pyarrow  # it takes 0.1 s

        self.path = path
        self.stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            chunk = self.stream.read(len(buffer))
        except OSError as error:
            raise ValueError(f"{self.path}: broken zstd file: {error}") from None
        buffer[: len(chunk)] = chunk
        return len(chunk)


@contextmanager
def _open_bytes(path: Path, reading: Reading) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    with io.BufferedReader(_Counted(path, reading), 1 << 20) as file:
        if path.suffix.lower() == ".gz":
            yield gzip.GzipFile(fileobj=file)
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(_Zstd(path, file), 1 << 20)
        else:
            yield file


def _encoding(file: io.BufferedReader | gzip.GzipFile, reading: Reading) -> str:
    head = file.peek(4)
    return next((name for bom, name in BOMS.items() if head.startswith(bom)), reading.encoding)


@contextmanager
def _open_text(path: Path, reading: Reading, newline: str = "") -> Iterator[IO[str]]:
    with (_open_bytes(path, reading) as file,
          io.TextIOWrapper(file, _encoding(file, reading), newline=newline) as text):
        yield text


def _wrong_encoding(path: Path, reading: Reading, error: UnicodeError) -> ValueError:
    """What to say of it. A decoder does not know in which line it is, so look for it again."""
    line = ""
    with _open_bytes(path, Reading()) as file:
        encoding = _encoding(file, reading)
        if encoding.startswith("utf-8"):
            for number, content in enumerate(file, 1):
                try:
                    content.decode(encoding)
                except UnicodeDecodeError as found:
                    line, error = f"line {number}: ", found
                    break
    reason = str(error)
    if isinstance(error, UnicodeDecodeError):
        reason = f"byte 0x{error.object[error.start]:02x}: {error.reason}"
    return ValueError(f"{path}: {line}not {encoding.removesuffix('-sig').upper()} ({reason}); if "
                      "the text is in another encoding, name it: --encoding latin-1 (Western "
                      "Europe), cp1252 (Windows), gb18030 (Chinese), ...")


# --- formats: each yields (where, body, whether it opens a document) ------------------------------

Part = tuple[str, str | np.ndarray, bool]


def _last_cut(text: str) -> int:
    """The last place before white space, 0 if there is none: tokens of GPT-2 take white space in
    front of a word, never behind it, so cut here the parts have the tokens of the whole."""
    for i in range(len(text) - 1, 0, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return 0


def _read_text(path: Path, reading: Reading) -> Iterator[Part]:
    where, rest, opens = str(path), "", True
    with _open_text(path, reading) as file:
        ended = False
        while not ended:
            chunk = file.read(PIECE_CHARS)
            chunk += file.readline(PIECE_CHARS)  # to the end of a line: a marker's is not cut off
            ended = not chunk
            *documents, rest = MARKER_LINE.split(rest + chunk)
            if ended:
                documents.append(rest)
            for text in documents:  # whole, or the last part of one
                if not opens or text.strip():
                    yield where, text, opens
                opens = True
            if not ended and len(rest) >= PIECE_CHARS:
                # A word of a megabyte is cut anywhere, but not within a marker.
                cut = _last_cut(rest) or max(0, len(rest) - 4 * PIECE_CHARS)
                if cut:
                    yield where, rest[:cut], opens
                    rest, opens = rest[cut:], False


def _text_of(entry, where: str, reading: Reading) -> str | None:
    """The text of a record: the record itself, or its field; None for null and blank ones."""
    if isinstance(entry, dict):
        if reading.text_field not in entry:
            raise ValueError(f"{where}: expected a field {reading.text_field!r}, got "
                             f"{', '.join(map(str, entry))}; --text_field names another")
        entry, name = entry[reading.text_field], f"{reading.text_field!r} to be a string"
    else:
        name = f"a string or an object with {reading.text_field!r}"
    if entry is None or (isinstance(entry, str) and not entry.strip()):
        reading.note("documents without text (null or blank), skipped", where)
        return None
    if not isinstance(entry, str):
        kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list",
                 dict: "an object"}
        raise ValueError(f"{where}: expected {name}, got {kinds[type(entry)]}")
    return entry


def _records(entries: Iterable[tuple[str, object]], reading: Reading) -> Iterator[Part]:
    for where, entry in entries:
        text = _text_of(entry, where, reading)
        if text is not None:
            yield where, text, True


def _read_json_lines(path: Path, reading: Reading) -> Iterator[Part]:
    def entries() -> Iterator[tuple[str, object]]:
        with _open_text(path, reading, newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}: line {number}", json.loads(line)
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise ValueError(f"{path}: line {number}: not JSON: {error}") from None

    return _records(entries(), reading)


def _read_json(path: Path, reading: Reading) -> Iterator[Part]:
    """An array, which is read whole, or one object, or lines of objects."""
    with _open_text(path, Reading(encoding=reading.encoding)) as file:
        try:
            lines = not isinstance(json.loads(file.readline()), list)
        except json.JSONDecodeError:
            lines = False
    if lines:
        yield from _read_json_lines(path, reading)
        return
    with _open_text(path, reading) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(content, list):
        content = [content]
    yield from _records(((f"{path}: entry {i}", e) for i, e in enumerate(content, 1)), reading)


def _read_csv(path: Path, reading: Reading) -> Iterator[Part]:
    csv.field_size_limit(1 << 31)
    with _open_text(path, reading) as file:
        rows = csv.DictReader(file, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)

        def entries() -> Iterator[tuple[str, object]]:
            try:
                if reading.text_field not in (rows.fieldnames or ()):
                    raise ValueError(f"{path}: line 1: expected a column {reading.text_field!r}, "
                                     f"got {', '.join(rows.fieldnames or ())}; --text_field names "
                                     "another")
                for row in rows:
                    yield f"{path}: line {rows.line_num}", row[reading.text_field]
            except csv.Error as error:
                raise ValueError(f"{path}: line {rows.reader.line_num}: not CSV: {error}") from None

        yield from _records(entries(), reading)


def _open_parquet(path: Path, reading: Reading):
    import pyarrow.parquet  # it takes 0.2 s

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file: {_first_line(error)}") from None
    column, kinds = reading.text_field, dict(zip(file.schema_arrow.names, file.schema_arrow.types))

    def is_text(kind) -> bool:
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        return (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
                or pyarrow.types.is_string_view(kind))

    texts = ", ".join(name for name, kind in kinds.items() if is_text(kind)) or "none"
    if column not in kinds:
        raise ValueError(f"{path}: expected a column {column!r}, got {', '.join(kinds)}; "
                         f"--text_field names another (columns of text: {texts})")
    if not is_text(kinds[column]):
        raise ValueError(f"{path}: expected column {column!r} to be strings, got {kinds[column]}; "
                         f"--text_field names another (columns of text: {texts})")
    return file


def _read_parquet(path: Path, reading: Reading) -> Iterator[Part]:
    import pyarrow

    size, before = path.stat().st_size, reading.bytes_read
    with _open_parquet(path, reading) as file:
        def entries() -> Iterator[tuple[str, object]]:
            number, total = 0, max(1, file.metadata.num_rows)
            try:
                for batch in file.iter_batches(batch_size=1024, columns=[reading.text_field]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        yield f"{path}: row {number}", text
                    reading.bytes_read = before + size * number // total
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: row {number + 1}: {_first_line(error)}") from None

        yield from _records(entries(), reading)


def _open_tokens(path: Path) -> np.ndarray:
    """Tokens (n,) of a file of tokens, mapped. Raises ValueError unless they can be GPT-2's."""
    with open(path, "rb") as file:
        head = file.read(6)
    if head[:4] == np.int32(MAGIC).astype("<i4").tobytes():
        return read_shard(path)
    if (path.parent / "meta.pkl").exists():
        raise ValueError(f"{path}: its vocabulary is that of meta.pkl beside it and not GPT-2's; "
                         "give the text it was made from (and --tokenizer bytes, for characters)")
    if head == b"\x93NUMPY":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path}: {_first_line(error)}") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{path}: expected a row of whole numbers, got {tokens.dtype} of "
                             f"shape {tokens.shape}")
        return tokens
    if path.stat().st_size % 2:
        raise ValueError(f"{path}: expected 16-bit tokens, got an odd number of bytes")
    return np.memmap(path, "<u2", mode="r")


def _read_tokens(path: Path, reading: Reading) -> Iterator[Part]:
    tokens, opens, before = _open_tokens(path), True, reading.bytes_read
    for start in range(0, len(tokens), PIECE_TOKENS):
        chunk = np.asarray(tokens[start:start + PIECE_TOKENS])
        wrong = (chunk < 0) | (chunk > GPT2_BOS)
        if wrong.any():
            offset = start + int(wrong.argmax())
            raise ValueError(f"{path}: token {int(tokens[offset])} at offset {offset} is outside "
                             f"GPT-2's vocabulary: expected 0 to {GPT2_BOS}")
        parts = np.split(chunk.astype(np.uint16), np.flatnonzero(chunk == GPT2_BOS))
        for part in parts:
            if len(part) and part[0] == GPT2_BOS:
                opens, part = True, part[1:]
            if len(part):
                yield f"{path}: token {start}", part, opens
                opens = False
        reading.bytes_read = before + path.stat().st_size * (start + len(chunk)) // len(tokens)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


TEXT_FILES = (".txt", ".text", ".md", ".markdown", ".rst")
TOKEN_FILES = (".bin", ".npy")
FORMATS: dict[str, Callable[[Path, Reading], Iterator[Part]]] = {
    **dict.fromkeys(TEXT_FILES, _read_text),
    **dict.fromkeys((".jsonl", ".ndjson"), _read_json_lines), ".json": _read_json,
    **dict.fromkeys((".csv", ".tsv"), _read_csv), ".parquet": _read_parquet,
    **dict.fromkeys(TOKEN_FILES, _read_tokens),
}
