"""The built-in corpus: the docstrings of sympy, networkx and numpy, as bytes.

    python -m data.corpus            build it (once, some seconds) and describe it
    python -m data.corpus --show 3   print three training documents as well

The packages are pinned in requirements.txt and installed anyway, so every machine has the same
8 MB of real English and code without a network. Source files are parsed with `ast`, never imported.

One document = one docstring under its qualified name, the way pydoc prints it:

    sympy.ntheory.factor_.trailing(n)

    Count the number of trailing zero digits in the binary
    representation of n, ...

Exact duplicates are removed (the first in the fixed order stays). Tokens are bytes of UTF-8, and
BOS = 256 opens a document. Whole modules are held out for validation, chosen by the hash of their
names; both parts are in a fixed shuffled order, so that neighbouring batches do not come from one
package after the other. The digest of the result belongs into every log: losses on different
digests must not be compared.
"""

import argparse
import ast
import fcntl
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from data.shards import data_digest, read_shard, write_shard
from records.rules import TRACKS

BOS = 256
VOCAB_SIZE = 257
PINNED = {"sympy": "1.14.0", "networkx": "3.6.1", "numpy": "2.4.6"}
# data_digest of the two shards, equal on every machine with the pinned versions.
PINNED_DIGEST = TRACKS["pocket"].data_digest
# At least this many: val_tokens of 262,144 (or 131,072, or any smaller one) and the last target.
MIN_VAL_TOKENS = 262_144 + 1
# Not the same everywhere: written at build time, present for one system or Python only, or left
# out by some distributions.
LEFT_OUT = {
    "numpy/__config__.py", "numpy/version.py", "numpy/_distributor_init.py",
    "numpy/_distributor_init_local.py", "numpy/distutils",
}
CACHE_DIR = Path(__file__).resolve().parent / "corpus_cache"


@dataclass(frozen=True)
class Corpus:
    train_files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    digest: str  # sha256 over the tokens
    num_train_tokens: int
    num_val_tokens: int
    num_train_docs: int
    num_val_docs: int
    note: str  # "" for the pinned corpus; else one sentence on why this one is another


def encode(text: str) -> np.ndarray:
    """Byte tokens (n,) uint16, without BOS."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)


def decode(tokens: Iterable[int]) -> str:
    """Text of byte tokens. BOS becomes an empty line; bytes that are not UTF-8 become U+FFFD."""
    tokens = np.asarray(tokens).astype(np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= BOS:
        raise ValueError(f"expected byte tokens 0 to {BOS}, got {tokens.min()} to {tokens.max()}")
    pieces = np.split(tokens, np.flatnonzero(tokens == BOS))
    texts = [p[p != BOS].astype(np.uint8).tobytes().decode(errors="replace") for p in pieces]
    return "\n\n".join(texts[not texts[0] :])


def unigram_entropy(files: Iterable[str | os.PathLike]) -> float:
    """Entropy of single tokens in nats: the loss of a model that knows only their frequencies."""
    counts = sum(np.bincount(read_shard(file), minlength=65536) for file in files)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# --- extraction -----------------------------------------------------------------------------------


def source_files(package: str, folder: Path) -> list[tuple[str, Path]]:
    """(module name, file) of a package's modules, tests left out, in the order of their names."""
    found = []
    for file in folder.rglob("*.py"):
        parts = (package, *file.relative_to(folder).parts)
        inside = {"/".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if "tests" in parts or inside & LEFT_OUT:
            continue
        names = parts[:-1] if file.name == "__init__.py" else (*parts[:-1], file.stem)
        found.append((".".join(names), file))
    return sorted(found)


def _signature(arguments: ast.arguments, lines: list[bytes]) -> str:
    """Names and defaults without annotations; defaults as the source has them.

    Not ast.unparse: what it prints for the same source has changed between Python versions.
    """

    def text(node: ast.expr) -> str:
        piece = lines[node.lineno - 1 : node.end_lineno]
        piece[-1] = piece[-1][: node.end_col_offset]  # offsets count bytes of UTF-8
        piece[0] = piece[0][node.col_offset :]
        return " ".join(b"".join(piece).decode().split())

    def one(argument: ast.arg, default: ast.expr | None) -> str:
        return argument.arg if default is None else f"{argument.arg}={text(default)}"

    positional = arguments.posonlyargs + arguments.args
    no_default = [None] * (len(positional) - len(arguments.defaults))
    parts = [one(a, d) for a, d in zip(positional, no_default + arguments.defaults)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        parts.append("*" + arguments.vararg.arg)
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [one(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        parts.append("**" + arguments.kwarg.arg)
    return f"({', '.join(parts)})"


def docstrings(source: bytes, module: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module, its classes and functions, in the order of the source.

    Tabs and indentation are normalised by inspect.cleandoc, whatever this Python's compiler does.
    """

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        heading = name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            heading = name + _signature(node.args, lines)
        elif isinstance(node, ast.ClassDef):
            heading = f"class {name}"
        text = ast.get_docstring(node, clean=False)
        if text is not None and (text := inspect.cleandoc(text).strip()):
            yield heading, text
        yield from inner(node, name)

    def inner(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from visit(child, f"{name}.{child.name}")
            elif not isinstance(child, ast.expr):  # if, try, with ... can hold definitions
                yield from inner(child, name)

    code = importlib.util.decode_source(source)
    lines = code.encode().splitlines(keepends=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(code)
    yield from visit(tree, module)


def package_folder(package: str) -> Path:
    """Where a package is installed; finding it does not run any of it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"package {package} is not installed, but the built-in corpus is made of it: "
            f"`pip install {package}=={PINNED[package]}` or `./run.sh`"
        )
    return Path(spec.submodule_search_locations[0])


def extract(folders: dict[str, Path], share: int = 0, num_shares: int = 1) -> list[list]:
    """[module, [[heading, docstring], ...]] of every num_shares-th module of these packages."""
    files = [f for package, folder in folders.items() for f in source_files(package, folder)]
    # Neighbours are of like size, so dealing them out in turn gives every core as much.
    return [[m, list(docstrings(f.read_bytes(), m))] for m, f in files[share::num_shares]]


def _extract_on_all_cores(folders: dict[str, Path]) -> list[list]:
    """extract(), by one plain process a core: no fork beside running threads, no torch in them."""
    num_shares = len(os.sched_getaffinity(0))
    root = Path(__file__).resolve().parent.parent
    paths = json.dumps({package: str(folder) for package, folder in folders.items()})
    workers = []
    try:
        for share in range(num_shares):
            command = [sys.executable, "-m", "data.corpus", "--extract", paths]
            command += ["--share", str(share), "--num_shares", str(num_shares)]
            workers.append(subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE))
        shares = []
        for worker in workers:
            output = worker.communicate()[0]
            if worker.returncode:
                raise RuntimeError(f"extraction of the corpus failed ({worker.returncode})")
            shares.append(json.loads(output))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()
    modules = [None] * sum(map(len, shares))
    for share, part in enumerate(shares):
        modules[share::num_shares] = part
    return modules


# --- documents to shards --------------------------------------------------------------------------


def _order(text: str) -> bytes:
    """Sort key of a shuffle that is the same everywhere and for ever."""
    return hashlib.sha256(text.encode()).digest()


def split(modules: list[list], min_val_tokens: int) -> tuple[list[str], list[str]]:
    """Training and validation documents, each without duplicates and in their shuffled order.

    Modules are taken for validation by the hash of their names until min_val_tokens are reached.
    """
    seen, documents = set(), []
    for module, entries in modules:
        fresh = []
        for heading, text in entries:
            if text not in seen:
                seen.add(text)
                fresh.append(f"{heading}\n\n{text}\n")
        documents.append((module, fresh))
    train, val, val_tokens = [], [], 0
    for _, fresh in sorted(documents, key=lambda entry: _order(entry[0])):
        if val_tokens < min_val_tokens:
            val += fresh
            val_tokens += sum(len(document.encode()) + 1 for document in fresh)
        else:
            train += fresh
    return sorted(train, key=_order), sorted(val, key=_order)


def tokenize(documents: list[str]) -> np.ndarray:
    """BOS and bytes of each document, one after the other: uint16."""
    pieces = []
    for document in documents:
        pieces += [np.array([BOS], np.uint16), encode(document)]
    return np.concatenate(pieces)


def _key(versions: dict[str, str]) -> str:
    """Name of the cache entry: whatever the corpus depends on, known before it is built."""
    source = Path(__file__).read_bytes() + json.dumps(versions, sort_keys=True).encode()
    return hashlib.sha256(source).hexdigest()[:16]


def build(cache_dir: str | os.PathLike | None = None) -> Corpus:
    """The corpus, from cache_dir (data/corpus_cache) or built there now. Safe to call on all ranks.

    Finished folders appear by one rename, under a name made from the packages' versions and this
    file; one process builds while others wait for its lock. From the cache: milliseconds.
    """
    folders = {package: package_folder(package) for package in PINNED}
    versions = {package: metadata.version(package) for package in PINNED}
    cache = Path(CACHE_DIR if cache_dir is None else cache_dir)
    entry = cache / _key(versions)
    if not (entry / "corpus.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the other ranks wait for it
            if not (entry / "corpus.json").exists():
                _build_entry(entry, folders)
    facts = json.loads((entry / "corpus.json").read_text())
    other = [f"{p} {v} (pinned: {PINNED[p]})" for p, v in versions.items() if v != PINNED[p]]
    note = ""
    if other:
        note = f"another corpus than the pinned one: built from {', '.join(other)}"
    elif facts["digest"] != PINNED_DIGEST:
        note = "another corpus than the pinned one, although the versions are the pinned ones"
    if note:
        note += (
            f"; digest {facts['digest'][:16]} instead of {PINNED_DIGEST[:16]}: losses must not be "
            "compared with those of other digests; `pip install -r requirements.txt` mends it"
        )
    return Corpus((entry / "train.bin",), (entry / "val.bin",), note=note, **facts)


def _build_entry(entry: Path, folders: dict[str, Path]) -> None:
    for left in entry.parent.glob(".*.tmp"):  # of a build that was killed: we hold the lock
        shutil.rmtree(left)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".tmp", dir=entry.parent))
    try:
        train, val = split(_extract_on_all_cores(folders), MIN_VAL_TOKENS)
        train_tokens, val_tokens = tokenize(train), tokenize(val)
        files = [temporary / "train.bin", temporary / "val.bin"]
        write_shard(files[0], train_tokens)
        write_shard(files[1], val_tokens)
        facts = {
            "digest": data_digest(files),
            "num_train_tokens": len(train_tokens), "num_val_tokens": len(val_tokens),
            "num_train_docs": len(train), "num_val_docs": len(val),
        }
        (temporary / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
        temporary.chmod(0o755)  # mkdtemp's 0o700 would shut out other users of the checkout
        os.rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.corpus", description="Build and describe the built-in corpus."
    )
    parser.add_argument("--cache_dir", help=f"default {CACHE_DIR}")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N documents")
    for option in ("--extract", "--share", "--num_shares"):  # for the worker processes
        parser.add_argument(option, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.extract:
        folders = {package: Path(folder) for package, folder in json.loads(args.extract).items()}
        json.dump(extract(folders, int(args.share), int(args.num_shares)), sys.stdout)
        return 0
    started = time.perf_counter()
    corpus = build(args.cache_dir)
    seconds = time.perf_counter() - started
    print(f"built-in corpus {corpus.digest[:16]} in {seconds:.3f} s")
    if corpus.note:
        print(f"note: {corpus.note}")
    for part, files, tokens, docs in (
        ("train", corpus.train_files, corpus.num_train_tokens, corpus.num_train_docs),
        ("val", corpus.val_files, corpus.num_val_tokens, corpus.num_val_docs),
    ):
        print(
            f"{part:5}  {tokens:9,} tokens  {docs:6,} documents  "
            f"unigram entropy {unigram_entropy(files):.4f} nats/token  {files[0]}"
        )
    tokens = read_shard(corpus.train_files[0])
    starts = np.flatnonzero(tokens == BOS)
    for start, end in itertools.pairwise(starts[: args.show + 1]):
        print("-" * 80)
        print(decode(tokens[start:end]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
