"""The built-in corpus: what is taken, in which order, and that any number of builders agree."""

import ast
import collections
import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from data import corpus
from data.shards import data_digest, read_shard, write_shard

ROOT = Path(__file__).resolve().parent.parent
PINNED = all(metadata.version(package) == version for package, version in corpus.PINNED.items())


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The real corpus in a cache of its own, built by three processes at the same time."""
    cache = tmp_path_factory.mktemp("corpus_cache")
    command = [sys.executable, "-W", "error", "-m", "data.corpus", "--cache_dir", cache]
    builders = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for _ in range(3)
    ]
    outputs = []
    for builder in builders:
        output, errors = builder.communicate(timeout=110)
        assert (builder.returncode, errors) == (0, "")
        outputs.append(output)
    return cache, outputs


@pytest.fixture(scope="session")
def parts(built):
    """Documents of both parts as bytes, split at BOS by hand."""
    made = corpus.build(built[0])
    result = []
    for files in (made.train_files, made.val_files):
        documents, current = [], None
        for token in read_shard(files[0], vocab_size=257, bos_id=256).tolist():
            if token == 256:
                current = bytearray()
                documents.append(current)
            else:
                current.append(token)
        result.append([bytes(document).decode() for document in documents])
    return result


def test_builders_at_the_same_time_agree_and_leave_one_entry(built):
    cache, outputs = built
    without_time = {"\n".join(output.splitlines()[1:]) for output in outputs}
    assert len(without_time) == 1
    entries = sorted(path.name for path in cache.iterdir())
    assert len(entries) == 2 and entries[0] == ".lock"
    assert sorted(p.name for p in (cache / entries[1]).iterdir()) == [
        "corpus.json", "train.bin", "val.bin"
    ]


def test_the_cache_is_used(built, monkeypatch):
    def fail(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(corpus, "_extract_on_all_cores", fail)
    made = corpus.build(built[0])
    assert made.digest == data_digest(made.train_files + made.val_files)
    assert made.num_train_tokens == len(read_shard(made.train_files[0]))
    assert made.num_val_tokens == len(read_shard(made.val_files[0]))


@pytest.mark.skipif(not PINNED, reason="other versions than the pinned ones are installed")
def test_the_pinned_corpus_is_the_known_one(built):
    made = corpus.build(built[0])
    assert made.digest == corpus.PINNED_DIGEST
    assert made.note == ""
    assert (made.num_train_tokens, made.num_val_tokens) == (8_960_531, 265_744)
    assert (made.num_train_docs, made.num_val_docs) == (12_781, 381)


def test_validation_lasts_for_its_steps_and_stays_small(built):
    made = corpus.build(built[0])
    assert made.num_val_tokens >= 262_144 + 1
    assert 0.02 < made.num_val_tokens / (made.num_train_tokens + made.num_val_tokens) < 0.04


def test_no_document_twice_and_none_in_both_parts(parts):
    train, val = parts
    bodies = [document.split("\n\n", 1)[1] for document in train + val]
    assert len(set(bodies)) == len(bodies) > 10_000


def test_whole_modules_are_held_out(parts):
    modules = [name for package in corpus.PINNED for name, _ in
               corpus.source_files(package, corpus.package_folder(package))]
    names = set(modules)

    def module_of(document):
        heading = document.split("\n", 1)[0].removeprefix("class ").split("(")[0]
        while heading not in names:
            heading = heading.rpartition(".")[0]
        return heading

    train, val = ({module_of(document) for document in part} for part in parts)
    # numpy.testing.overrides.get_overridable_numpy_ufuncs and the like belong to the longest name.
    assert not train & val
    assert len(val) > 20
    assert {name.split(".")[0] for name in val} == set(corpus.PINNED)


def test_neighbours_come_from_all_packages(parts):
    train, _ = parts
    packages = [d.removeprefix("class ").split(".")[0].split("\n")[0] for d in train]
    everywhere = collections.Counter(packages)
    for start in range(0, len(packages) - 1000, 1000):
        here = collections.Counter(packages[start : start + 1000])
        for package in corpus.PINNED:
            share = everywhere[package] / len(packages)
            # five standard deviations of a draw of 1000
            assert abs(here[package] / 1000 - share) < 5 * math.sqrt(share * (1 - share) / 1000)


def test_documents_are_docstrings_of_the_live_objects(parts):
    """Against Python's own machinery: help() of a few functions that we import here."""
    import inspect

    import networkx

    documents = {d.split("\n", 1)[0].split("(")[0]: d for part in parts for d in part}
    for function in (networkx.algorithms.dag.topological_sort, np.linalg.svd, np.pad):
        function = inspect.unwrap(function)
        module = "numpy.linalg._linalg" if function.__name__ == "svd" else function.__module__
        module = "numpy.lib._arraypad_impl" if function.__name__ == "pad" else module
        document = documents[f"{module}.{function.__name__}"]
        assert document.split("\n\n", 1)[1].strip() == inspect.cleandoc(function.__doc__).strip()


SOURCE = '''\
"""Module doc.\n\n    Indented.\n"""
import os
if os.name:
    def f(a, /, b: int = 1, *args: str, c, d=(1,
            "é"), **kw) -> None:
        r"""One \\d."""
        def inner():
            """Two."""
else:
    async def g(*, x=lambda: 0):
        """Three."""
class A(Base):
    """
    Four.

        deeper
    """
    def method(self): "  Five.  "
    @property
    def no_doc(self): return "not a docstring"
    def empty(self): """   """
try:
    pass
except ValueError:
    class B: "Six."
x = """Not a docstring."""
'''


def test_extraction_by_hand():
    assert list(corpus.docstrings(SOURCE.encode(), "m")) == [
        ("m", "Module doc.\n\nIndented."),
        ('m.f(a, /, b=1, *args, c, d=(1, "é"), **kw)', "One \\d."),
        ("m.f.inner()", "Two."),
        ("m.g(*, x=lambda: 0)", "Three."),
        ("class m.A", "Four.\n\n    deeper"),
        ("m.A.method(self)", "Five."),
        ("class m.B", "Six."),
    ]


def test_line_ends_and_encodings_do_not_matter():
    expected = list(corpus.docstrings(SOURCE.encode(), "m"))
    assert list(corpus.docstrings(SOURCE.replace("\n", "\r\n").encode(), "m")) == expected
    latin = "# -*- coding: latin-1 -*-\n" + SOURCE
    assert list(corpus.docstrings(latin.encode("latin-1"), "m")) == expected


def test_signatures_parse_to_those_of_the_source():
    """Read back by Python, they are the arguments of the syntax tree."""
    folder = corpus.package_folder("networkx")
    compared = 0
    for module, file in corpus.source_files("networkx", folder)[::5]:
        headings = [heading for heading, _ in corpus.docstrings(file.read_bytes(), module)]
        expected = collections.Counter()
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "").strip():
                for argument in ast.walk(node.args):
                    if isinstance(argument, ast.arg):
                        argument.annotation = None
                expected[f"{node.name}({ast.unparse(node.args)})"] += 1
        found = collections.Counter()
        for heading in headings:
            if "(" in heading:
                name, _, arguments = heading.partition("(")
                (node,) = ast.parse(f"def {name.rpartition('.')[2]}({arguments}: pass").body
                found[f"{node.name}({ast.unparse(node.args)})"] += 1
        assert found == expected
        compared += sum(found.values())
    assert compared > 200


def test_generated_and_platform_files_are_left_out(tmp_path):
    folder = tmp_path / "numpy"
    for name in ("__init__.py", "__config__.py", "version.py", "_distributor_init.py", "a.py",
                 "distutils/core.py", "tests/test_a.py", "sub/tests/b.py", "sub/version.py",
                 "sub/__init__.py", "a.pyi"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('"""Doc."""\n')
    modules = [module for module, _ in corpus.source_files("numpy", folder)]
    assert modules == ["numpy", "numpy.a", "numpy.sub", "numpy.sub.version"]


def test_sharing_the_work_does_not_change_the_result():
    folders = {"networkx": corpus.package_folder("networkx") / "classes"}
    whole = corpus.extract(folders)
    assert len(whole) > 5
    parts = [corpus.extract(folders, share, 3) for share in range(3)]
    assert [parts[n % 3][n // 3] for n in range(len(whole))] == whole


def test_a_worker_that_fails_stops_the_build(tmp_path):
    (tmp_path / "broken.py").write_text("def (:\n")
    with pytest.raises(RuntimeError, match="extraction of the corpus failed"):
        corpus._extract_on_all_cores({"networkx": tmp_path})


def test_split_by_hand():
    modules = [[f"m{n}", [[f"m{n}.f()", f"text {n} é"], [f"m{n}.g()", "same"]]] for n in range(50)]
    train, val = corpus.split(modules, 100)
    texts = train + val
    assert sum("same" in text for text in texts) == 1 and len(texts) == 51
    assert sum(len(text.encode()) + 1 for text in val) >= 100
    assert "m7.f()\n\ntext 7 é\n" in texts
    held_out = {text.split(".")[0] for text in val}
    assert not held_out & {text.split(".")[0] for text in train}
    assert train != sorted(train) and corpus.split(modules, 100) == (train, val)
    tokens = corpus.tokenize(val)
    assert (tokens == 256).sum() == len(val) and tokens[0] == 256 and tokens.dtype == np.uint16


def test_encode_and_decode():
    for text in ("", "plain", "é ∑ 語 \x00\n", "\n\n"):
        tokens = corpus.encode(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == list(text.encode())
        assert corpus.decode(tokens) == text
    assert corpus.decode([256, 97, 256, 98, 256]) == "a\n\nb\n\n"
    assert corpus.decode([97, 256, 98]) == "a\n\nb"
    assert corpus.decode([]) == ""
    assert corpus.decode([0xE2, 0x88]) == "�"
    for bad in ([257], [-1]):
        with pytest.raises(ValueError, match="expected byte tokens 0 to 256"):
            corpus.decode(bad)


def test_unigram_entropy(tmp_path, built):
    write_shard(tmp_path / "a.bin", np.array([1, 1, 2, 2]))
    write_shard(tmp_path / "b.bin", np.array([3, 4, 3, 4]))
    assert corpus.unigram_entropy([tmp_path / "a.bin"]) == pytest.approx(math.log(2))
    both = [tmp_path / "a.bin", tmp_path / "b.bin"]
    assert corpus.unigram_entropy(both) == pytest.approx(math.log(4))
    made = corpus.build(built[0])
    for files in (made.train_files, made.val_files):
        counts = collections.Counter(read_shard(files[0]).tolist())
        total = sum(counts.values())
        slow = -sum(n / total * math.log(n / total) for n in counts.values())
        assert corpus.unigram_entropy(files) == pytest.approx(slow, abs=1e-9)
        assert 3.4 < slow < 3.7  # nats per byte


@pytest.fixture
def small_corpus(monkeypatch, tmp_path):
    """build() over a part of networkx, so that building takes no time."""
    entries = corpus.extract({"networkx": corpus.package_folder("networkx") / "classes"})
    monkeypatch.setattr(corpus, "_extract_on_all_cores", lambda folders: entries)
    monkeypatch.setattr(corpus, "MIN_VAL_TOKENS", 1000)
    return tmp_path / "cache"


def test_another_version_is_another_digest_and_is_said(small_corpus, monkeypatch):
    first = corpus.build(small_corpus)
    assert "although the versions are the pinned ones" in first.note  # it is only a part
    assert "must not be compared" in first.note and first.digest[:16] in first.note
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda p: "1.15.2" if p == "sympy" else real(p))
    second = corpus.build(small_corpus)
    assert second.train_files != first.train_files
    assert "built from sympy 1.15.2 (pinned: 1.14.0)" in second.note
    assert "pip install -r requirements.txt" in second.note


def test_a_build_that_dies_leaves_nothing_in_use(small_corpus, monkeypatch):
    small_corpus.mkdir()
    stale = small_corpus / ".0123.left.tmp"
    stale.mkdir()
    (stale / "train.bin").write_bytes(b"half")
    rename = os.rename

    def die(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(OSError, match="No space left"):
        corpus.build(small_corpus)
    assert [path.name for path in small_corpus.iterdir()] == [".lock"]
    monkeypatch.setattr(os, "rename", rename)
    made = corpus.build(small_corpus)
    facts = json.loads((made.train_files[0].parent / "corpus.json").read_text())
    assert facts["digest"] == made.digest == data_digest(made.train_files + made.val_files)


def test_a_missing_package_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "sympy" else find_spec(name))
    with pytest.raises(FileNotFoundError, match=r"package sympy .*pip install sympy==1\.14\.0"):
        corpus.build()


def test_building_imports_none_of_the_packages():
    program = (
        "import sys\nfrom data import corpus\n"
        "folders = {p: corpus.package_folder(p) for p in corpus.PINNED}\n"
        "corpus.extract({'networkx': folders['networkx'] / 'classes'})\n"
        "assert not {'sympy', 'networkx', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
