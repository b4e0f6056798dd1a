"""Flat programs against the trainer: the same losses in fp64, on one rank and on several; and what
`python -m flat` prints."""

import ast
import contextlib
import dataclasses
import functools
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from muon_helpers import run_ranks

import recipes
import train_gpt
from conftest import ROOT, clean_environment, free_port
from data.shards import data_digest
from flat import __main__ as command
from flat import tree
from flat.program import folded, printed
from records import check, rules
from records.log import parse
from trainer.dist import World

CPU = torch.device("cpu")
EXPECTED = json.loads(golden.FILE.read_text())
ON_RANKS = {2: (1, 6, 12, 23, 29, 41, 53, 62, 83, 89), 3: (1, 23, 41, 89)}


def run_flat(text: str, recipe: recipes.Recipe, data: train_gpt.Data) -> list[float]:
    """golden.losses of a flat program: validation losses before steps 0, 2, 4 and after the last.

    As the program's own `train`, but for the noise that is added to the parameters.
    """
    program = {"__name__": "flat program"}
    exec(compile(text, "flat program", "exec"), program)
    model = program["GPT"]()
    program["init_weights"](model, 0)
    if "read_prefixes" in program:
        file = data.train_files[0].with_name("gpt2_prefixes.npy")
        model.prefixes = program["read_prefixes"](file)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(golden.noise(name, p.shape))
    if not (recipe.model.yarn or recipe.model.learned_positions):
        model.set_rotary()
    optimizer = program["Optimizer"](model)
    batches, rows = program["train_batches"](data.train_files), program["val_rows"](data.val_files)
    enter, found = program.get("enter_phase", lambda: None), []
    names = enter.__code__.co_varnames[:enter.__code__.co_argcount]

    def enter_phase(**given) -> None:
        enter(**{name: given[name] for name in names})

    for step in range(golden.STEPS):
        if step % 2 == 0:
            enter_phase(model=model, optimizer=optimizer, step=step, evaluating=True)
            found.append(program["evaluate"](model, rows))
        enter_phase(model=model, optimizer=optimizer, step=step, evaluating=False)
        program["train_step"](model, optimizer, next(batches), step)
    enter_phase(model=model, optimizer=optimizer, step=golden.STEPS, evaluating=True)
    return [*found, program["evaluate"](model, rows)]


@pytest.fixture
def in_fp64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return golden.write_tokens(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("record", recipes.RECORDS)
def test_a_program_trains_as_the_trainer_does(tokens, in_fp64, record):
    """The numbers of the trainer are those of tests/test_golden.py."""
    recipe = golden.small_recipe(record)
    found = run_flat(printed(recipe, str(record)), recipe, tokens)
    assert found == pytest.approx(EXPECTED[str(record)], rel=0, abs=1e-9)


def test_a_program_with_the_prefix_loss_trains_as_the_trainer_does(tokens, in_fp64, monkeypatch):
    """Where tokens have prefixes: those of bytes at pocket scale have none."""
    recipe = recipes.edit(golden.small_recipe(88), prefix_weight=0.25)
    table = np.arange(257) // 2 - 1
    monkeypatch.setattr(train_gpt, "token_prefixes", lambda vocab_size: table)
    np.save(tokens.train_files[0].with_name("gpt2_prefixes.npy"),
            np.where(table < 0, 65_535, table).astype(np.uint16))
    expected = golden.losses(88, tokens, World(0, 0, 1, CPU), recipe)
    found = run_flat(printed(recipe, "88"), recipe, tokens)
    assert found == pytest.approx(expected, rel=0, abs=1e-9)
    assert abs(found[-1] - EXPECTED["88"][-1]) > 1e-4


@pytest.mark.parametrize("record", [12, 62])
def test_tables_in_bf16_have_masters_in_fp32(tokens, record):
    """In fp32 rounding alone moves the losses by 1e-5; without masters those of #62 by 2e-4."""
    head = "bf16" if record > 31 else "fp32"
    recipe = recipes.edit(
        golden.small_recipe(record), compute_dtype="fp32", head="fp32", stream_dtype="bf16",
        embed_dtype="bf16", head_dtype=head)
    found = run_flat(printed(recipe, str(record)), recipe, tokens)
    expected = golden.losses(record, tokens, World(0, 0, 1, CPU), recipe)
    assert found == pytest.approx(expected, rel=0, abs=5e-5)


def uneven(record: int) -> recipes.Recipe:
    """golden.small_recipe with four rows a step, 2, 1 and 1 on three ranks, three in validation."""
    r = golden.small_recipe(record)
    return recipes.edit(r, val_tokens=3 * r.val_row, batch_tokens=4 * r.model.seq_len,
                        batch_stages=tuple(4 * b // r.num_rows for b in r.batch_stages))


def on_ranks(rank: int, world_size: int, folder: Path) -> None:
    """The trainer's numbers on two ranks are those of tests/test_golden.py; on three it runs."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_default_dtype(torch.float64)
    data, world = golden.data_in(folder), World(rank, rank, world_size, CPU)
    for record in ON_RANKS[world_size]:
        recipe = golden.small_recipe(record) if world_size == 2 else uneven(record)
        found = run_flat((folder / f"record{record}.py").read_text(), recipe, data)
        expected = EXPECTED[str(record)]
        if world_size == 3:
            expected = golden.losses(record, data, world, recipe)
        worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert worst < 1e-9, (record, found, expected)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", ON_RANKS)
def test_recipes_train_as_the_trainer_does_on_several_ranks(tmp_path, world_size):
    golden.write_tokens(tmp_path)
    for record in ON_RANKS[world_size]:
        recipe = golden.small_recipe(record) if world_size == 2 else uneven(record)
        (tmp_path / f"record{record}.py").write_text(printed(recipe, str(record)))
    run_ranks(world_size, tmp_path, on_ranks, tmp_path)


# --- the command ----------------------------------------------------------------------------------

SHOWN = (1, 6, 23, 62, 89)
full = functools.cache(lambda record: command.program(str(record), []))
TINY = ("--scale", "pocket", "--num_iterations", "6", "--val_tokens", "2048", "--val_every", "3",
        "--num_layers", "2", "--head_dim", "16", "--seq_len", "64", "--batch_tokens", "1024")


def run_file(path: Path, *arguments: object, nproc: int = 1) -> subprocess.CompletedProcess:
    """The program in its folder, in `nproc` processes; the output of the first one."""
    ranks = [{}] if nproc == 1 else [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc),
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for port in [str(free_port())] for rank in range(nproc)]
    command_line = [sys.executable, path.name, *map(str, arguments)]
    running = [subprocess.Popen(command_line, cwd=path.parent, env=clean_environment(**rank),
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for rank in ranks]
    done = [(*process.communicate(timeout=60), process.returncode) for process in running]
    return subprocess.CompletedProcess(command_line, max(d[2] for d in done), done[0][0],
                                       done[0][1])


@pytest.mark.ranks
@pytest.mark.parametrize("record, nproc", [("6", 1), ("27", 2)])
def test_a_program_runs_by_itself_and_writes_a_public_log(tmp_path, tiny_data, record, nproc):
    """A file beside no other of this project, and a log that the records read."""
    text = command.program(record, list(TINY))
    path = tmp_path / f"record{record}.py"
    path.write_text(text)
    done = run_file(path, tiny_data, 7, nproc=nproc)
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "logs").glob("*.txt")
    (run,) = parse(log)
    assert [point.step for point in run.points] == [0, 3, 6] and run.complete
    assert run.points[2].val_loss < run.points[0].val_loss
    assert run.code_sha256 is not None and not run.faults and not run.edits
    assert run.torch == torch.__version__ and text in log.read_text()
    digest = data_digest(sorted(tiny_data.glob("*train*")) + sorted(tiny_data.glob("*val*")))
    assert run.result == {"track": "pocket", "seed": 7, "data_digest": digest, "world_size": nproc}

    track = rules.track("pocket")
    reasons = {reason.name: reason.text for reason in check.judge([run], track).reasons}
    assert "wrong-hardware" not in reasons and "track-differs" not in reasons
    assert f"its corpus is {digest[:12]}" in reasons["data-differs"]
    own = dataclasses.replace(track, data_digest=digest)
    assert "data-differs" not in check.judge([run], own).names()
    full = check.judge([run], rules.track("short"))
    assert "wrong-hardware: " + log.name + ": expected cuda, got cpu" in map(str, full.reasons)


def test_a_program_says_in_one_line_what_it_misses(tmp_path, tiny_data):
    small = command.program("6", list(TINY))
    cases = [(small, [], "usage: "), (small, [tmp_path], "found 0 and 0")]
    if not torch.cuda.is_available():
        cases.append((full(6), [tiny_data], "needs a GPU with bf16"))
    for text, arguments, words in cases:
        program = {"__name__": "flat program"}
        exec(text, program)
        with pytest.raises(SystemExit) as stopped:  # Python prints its text and exits with 1
            program["main"](list(map(str, arguments)))
        assert words in stopped.value.code and "\n" not in stopped.value.code
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("words, expected", [
    (["5x"], "expected a record"), (["25"], "expected a record"), (["6", "--diff"], "got ''"),
    (["6", "--num_heads", "0"], "--num_heads: expected"), (["6", "--seed", "1"], "no options"),
    (["6", "--nonsense", "1"], "unknown option --nonsense")])
def test_bad_input_is_one_line(capsys, words, expected):
    assert command.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and expected in err and len(err.splitlines()) == 1


def test_the_difference_of_two_records_is_a_short_diff(capsys):
    """#6 is #5 with the norm of q and k before rotary."""
    assert command.main(["5", "--diff", "6"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines()
             if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    norms = "        q, k = norm(q), norm(k)  # (#{})"
    assert [line for line in lines if "norm(" in line] == [f"+{norms.format(6)}",
                                                          f"-{norms.format(5)}"]
    assert len(lines) < 20  # the others say which record it is


# --- what is printed ------------------------------------------------------------------------------

@pytest.mark.parametrize("record", SHOWN)
def test_records_flat_is_what_the_command_prints(record):
    """`python -m flat N > records/flat/recordN.py` prints it anew."""
    path = ROOT / "records" / "flat" / f"record{record}.py"
    assert path.read_text() == full(record)


def test_programs_import_torch_and_numpy_alone():
    for path in (ROOT / "records" / "flat").glob("*.py"):
        modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
                   for n in ast.walk(ast.parse(path.read_text()))
                   if isinstance(n, ast.Import | ast.ImportFrom)}
        others = {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names)
        assert others == {"numpy", "torch"}


def comments_of(text: str) -> list[str]:
    return [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT]


@pytest.mark.parametrize("record", SHOWN)
def test_comments_and_docstrings_are_about_the_record(record):
    """No newer record, and no name in backticks that the program has not."""
    program = ast.parse(full(record))
    names = {getattr(n, key, None) for n in ast.walk(program) for key in ("id", "attr", "arg")}
    documented = [n for n in ast.walk(program) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    for words in [*comments_of(full(record)), *(ast.get_docstring(n) or "" for n in documented)]:
        assert all(int(n) <= record for n in re.findall(r"#(\d+)", words)[:1]), words
        assert set(re.findall(r"`(\w+)`", words)) <= names, words


def test_every_rule_of_known_of_is_met():
    """What program.py says of an expression in model.py, muon.py or recipes.py must still fit it;
    else the program only gets longer."""
    rules_of, met = set(), set()
    for record in (1, 6, 12, 23, 62, 89):
        known = folded(recipes.RECORDS[record]).known
        rules_of |= {*known.values, *known.sources, *known.dropped, *known.inlined}
        met |= known.used
    assert rules_of == met


# --- how it is printed ----------------------------------------------------------------------------

@pytest.mark.parametrize("record", SHOWN)
def test_a_tree_that_nothing_changes_is_printed_as_it_was_written(record):
    assert tree.show(tree.parse(full(record))) == full(record)


@pytest.mark.parametrize("name", ["model.py", "records/flat/record62.py"])
def test_a_tree_is_printed_anew_with_its_comments(name):
    text = (ROOT / name).read_text()
    module = tree.parse(text)
    for node in tree.walk(module):
        node.dirty = True
    shown = tree.show(module)
    assert ast.dump(ast.parse(shown)) == ast.dump(ast.parse(text))
    assert Counter(comments_of(shown)) == Counter(comments_of(text))


# --- pages ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Record 6 as a page, lines that #5 has not marked."""
    path = tmp_path_factory.mktemp("page") / "6.html"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command.main(["6", "--html", "--diff", "5"]) == 0
    path.write_text(out.getvalue())
    return path


OLD = r'<span class="line old"[^>]*>[^<]*</span>'     # lines of the other program


def test_the_text_of_a_page_is_the_program(page):
    (inside,) = re.findall(r"<pre>(.*)</pre>", page.read_text(), re.S)
    assert html.unescape(re.sub(r"<[^>]*>", "", re.sub(OLD, "", inside))) == full(6)
    old = "".join(re.findall(OLD, inside))
    assert "        q, k = norm(q), norm(k)  # (#5)\n" in html.unescape(old)


def test_a_page_says_what_the_record_gained(page):
    """The minutes are published, the losses are those of records/LADDER.md."""
    (row,) = re.findall(r"(?m)^\| 6 \|.*", (ROOT / "records" / "LADDER.md").read_text())
    minutes, loss, gain = (row.split(" | ")[n] for n in (2, 4, 6))
    error = gain.split("± ")[1]
    (said,) = re.findall(r"<p>(Published.*?)</p>", page.read_text())
    assert f"{minutes} minutes on 8 H100, after 15.2 of #5" in said
    assert f"loss {loss}, {-float(gain.split(' ')[0]):+.4f} ± {error} against #5" in said


def test_a_page_marks_new_lines_and_links_to_functions(page):
    text, lines = page.read_text(), full(6).splitlines()
    new = [lines[int(n) - 1] for n in re.findall(r'class="line new" id="L(\d+)"', text)]
    assert "        q, k = norm(q), norm(k)  # (#6)" in new and len(new) < 10
    names = {n.name for n in ast.walk(ast.parse(full(6)))
             if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    links = re.findall(r'<a class="([\w ]*)" href="#L(\d+)">(\w+)</a>', text)
    assert {name for kind, _, name in links if kind != "section"} == names
    assert all(name in lines[int(n) - 1] for _, n, name in links)
    assert "http" not in text.replace("http-equiv", "")  # nothing from elsewhere


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1200])  # chromium's windows are at least 500 wide
def test_a_page_fits_its_window(page, width):
    """In a browser: nothing is wider than the window, and the text is the program's."""
    script = ("<script>document.title = document.documentElement.scrollWidth + ' ' + "
              "[...document.querySelectorAll('.line:not(.old)')]"
              ".reduce((n, line) => n + line.textContent.length, 0)</script>")
    probe = page.with_name(f"{width}.html")
    probe.write_text(page.read_text() + script)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={page.parent / 'chromium'}", f"--window-size={width},900",
         "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=100)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    assert title == f"{width} {len(full(6))}"
