"""The imports point one way, and every file says what it is."""

import ast
import subprocess
import sys

import pytest

from conftest import ROOT

PACKAGES = ("kernels", "data", "records", "trainer", "tools")
FILES = sorted(f for folder in (".", *PACKAGES) for f in (ROOT / folder).glob("*.py"))
LOCAL = {f.stem for f in ROOT.glob("*.py")} | set(PACKAGES)


def imports(path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def third_party(path) -> set[str]:
    return {n for n in imports(path) if n not in sys.stdlib_module_names and n not in LOCAL}


@pytest.mark.parametrize("name, allowed", [
    ("muon.py", set()),
    ("model.py", {"kernels"}),
    ("recipes.py", {"model", "records"}),
    *((f"trainer/{name}.py", {"trainer", "recipes", "model", "kernels", "data", "records"})
      for name in ("options", "checkpoint", "dist", "memory", "compile", "profile", "report",
                   "status", "data")),
    *((f"tools/{name}.py", {"tools", "trainer", "recipes", "model", "data"})
      for name in ("sample", "hellaswag", "launch")),
    ("train_gpt.py", LOCAL - {"bench", "train_gpt"}),
])
def test_a_file_imports_only_what_is_below_it(name, allowed):
    assert imports(ROOT / name) & LOCAL <= allowed


def test_no_two_modules_import_each_other():
    names = {str(path.relative_to(ROOT)): path for path in FILES if path.name != "__init__.py"}
    reached = {name: closure(path) & names.keys() - {name} for name, path in names.items()}
    assert [(a, b) for a in names for b in reached[a] if a in reached[b]] == []


def test_muon_imports_torch_alone():
    assert third_party(ROOT / "muon.py") == {"torch"}


def test_kernels_import_torch_and_triton_alone():
    for path in (ROOT / "kernels").glob("*.py"):
        assert imports(path) & LOCAL <= {"kernels"}, path.name
        assert third_party(path) <= {"torch", "triton"}, path.name


def test_records_read_text_and_never_load_the_trainer():
    for path in (ROOT / "records").glob("*.py"):
        assert imports(path) & LOCAL <= {"records"}, path.name
        assert "torch" not in imports(path), path.name


def test_data_knows_nothing_of_models():
    for path in (ROOT / "data").glob("*.py"):
        # The digest that a track prescribes, and the tokens that it validates on.
        rules = {"records"} if path.name in ("corpus.py", "prepare.py") else set()
        assert imports(path) & LOCAL <= {"data"} | rules, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_importing_everything_prints_and_starts_nothing():
    names = [str(f.relative_to(ROOT).with_suffix("")).replace("/", ".") for f in FILES
             if f.name not in ("__main__.py",)]
    code = f"import sys\nfor n in {names!r}: __import__(n)\n" \
           "import threading; assert threading.active_count() == 1"
    done = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], cwd=ROOT,
                          text=True, capture_output=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def closure(start) -> set[str]:
    """Every local file that `start` reaches by imports, packages' __init__ included."""
    def files_of(module: str) -> list:
        path = ROOT / module.replace(".", "/")
        own = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        parents = [ROOT / module.split(".")[0] / "__init__.py"] if "." in module else []
        return [p for p in (own, *parents) if p.exists()]

    todo, seen = [start], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:
                    module = ".".join(filter(None, [path.parent.name, module]))
                names = [module, *(f"{module}.{a.name}" for a in node.names)]
            else:
                continue
            for name in names:
                if name.split(".")[0] in LOCAL:
                    todo += files_of(name)
    return {str(p.relative_to(ROOT)) for p in seen}


def test_the_log_holds_every_source_of_the_run(train):
    from records.log import parse

    done, (log,) = train("--num_iterations", "1")
    assert done.returncode == 0, done.stderr
    (run,) = parse(log, keep_sources=True)
    texts = {source.name: source.text for source in run.sources.values()}
    assert set(texts) >= closure(ROOT / "train_gpt.py")
    for name, text in texts.items():
        assert text == (ROOT / name).read_text(), name
