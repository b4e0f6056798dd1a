"""Flat programs against the trainer: the same losses in fp64, on one rank and on several; and what
`python -m flat` prints."""

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from muon_helpers import run_ranks

import recipes
import train_gpt
from conftest import ROOT, clean_environment, free_port
from flat import __main__ as command
from flat.program import printed
from records.log import parse
from trainer.dist import World

CPU = torch.device("cpu")
EXPECTED = json.loads(golden.FILE.read_text())
ON_RANKS = (1, 6, 12, 23, 29, 41, 53, 62)


def run_flat(text: str, recipe: recipes.Recipe, data: train_gpt.Data) -> list[float]:
    """golden.losses of a flat program: validation losses before steps 0, 2, 4 and after the last.

    As the program's own `train`, but for the noise that is added to the parameters.
    """
    program = {"__name__": "flat program"}
    exec(compile(text, "flat program", "exec"), program)
    model = program["GPT"]()
    program["init_weights"](model, 0)
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


@functools.cache
def three_rows(record: int) -> recipes.Recipe:
    """golden.small_recipe with three rows a step and in validation."""
    r = golden.small_recipe(record)
    return recipes.edit(r, val_tokens=3 * r.val_row, batch_tokens=3 * r.model.seq_len,
                        batch_stages=tuple(3 * b // r.num_rows for b in r.batch_stages))


@functools.cache
def program_of_three_rows(record: int) -> str:
    return printed(three_rows(record), str(record))


def flat_and_trainer(rank: int, world_size: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_default_dtype(torch.float64)
    data, world = golden.data_in(folder), World(rank, rank, world_size, CPU)
    for record in ON_RANKS:
        recipe, text = three_rows(record), (folder / f"record{record}.py").read_text()
        found = run_flat(text, recipe, data)
        expected = golden.losses(record, data, world, recipe)
        worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert worst < 1e-9, (record, found, expected)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_recipes_train_as_the_trainer_does_on_several_ranks(tmp_path, world_size):
    golden.write_tokens(tmp_path)
    for record in ON_RANKS:
        (tmp_path / f"record{record}.py").write_text(program_of_three_rows(record))
    run_ranks(world_size, tmp_path, flat_and_trainer, tmp_path)


# --- the command ----------------------------------------------------------------------------------

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
    assert run.torch == torch.__version__ and run.gpu_count == nproc
    assert text in log.read_text()


def test_a_program_says_in_one_line_what_it_misses(tmp_path, tiny_data):
    small, full = tmp_path / "small.py", tmp_path / "full.py"
    small.write_text(command.program("6", list(TINY)))
    full.write_text(command.program("6", []))
    for path, arguments, words in (
            (small, [], "usage: small.py DATA_DIR"), (small, [tmp_path], "found 0 and 0"),
            (full, [tiny_data], "needs a GPU with bf16")):
        done = run_file(path, *arguments)
        if path is full and torch.cuda.is_available():
            continue
        assert done.returncode == 1 and words in done.stderr
        assert len(done.stderr.splitlines()) == 1
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

@pytest.mark.parametrize("record", [1, 6, 23, 62])
def test_records_flat_is_what_the_command_prints(record):
    """`python -m flat N > records/flat/recordN.py` prints it anew."""
    path = ROOT / "records" / "flat" / f"record{record}.py"
    assert path.read_text() == command.program(str(record), [])


def test_programs_import_torch_and_numpy_alone():
    for path in (ROOT / "records" / "flat").glob("*.py"):
        modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
                   for n in ast.walk(ast.parse(path.read_text()))
                   if isinstance(n, ast.Import | ast.ImportFrom)}
        others = {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names)
        assert others == {"numpy", "torch"}
