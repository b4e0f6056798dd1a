"""The script that a GPU is given: it runs, at toy sizes, and says what was not measured."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import first, gpu, train_speed
from conftest import ROOT, clean_environment
from data.shards import read_shard


def run(*arguments):
    return subprocess.run([sys.executable, "bench/gpu.py", *map(str, arguments)], cwd=ROOT,
                          text=True, capture_output=True, timeout=110, env=clean_environment())


def test_parts_write_their_numbers_and_report_shows_them(tmp_path):
    done = run("--toy", "speed", "optimizer", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["cache"] for row in rows] == ["cold", "warm"]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows), rows
    assert gpu.main(["report", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert page.count(gpu.UNKNOWN) == 5  # tests, variants, profile, loss, kernels
    assert f"{float(rows[0]['tokens_per_s']):,.0f}" in page
    # The same command again measures nothing that is there.
    written = (tmp_path / "speed.json").read_bytes()
    assert gpu.main(["--toy", "speed", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "speed.json").read_bytes() == written


HERE = {"device": "a GPU", "torch": "2", "triton": "3", "date": "today"}


def names(rows):
    return [row["name"] for row in rows]


def tasks(**how):
    """A task for each name: what it raises or returns."""
    def measure(result):
        if isinstance(result, BaseException):
            raise result
        return {"ms": result}
    return [({"name": name}, lambda result=result: measure(result)) for name, result in
            how.items()]


def test_what_was_measured_before_a_kill_stays_and_the_next_call_measures_the_rest(tmp_path):
    file = tmp_path / "part.json"
    with pytest.raises(KeyboardInterrupt):  # no Exception: as a signal ends it
        list(gpu.measured(tasks(a=1, b=ValueError("no"), c=KeyboardInterrupt(), d=4), file, HERE))
    said = json.loads(file.read_text())
    assert said["of"] == 4 and names(said["rows"]) == ["a", "b", "c"]
    assert "cut off" in said["rows"][2]["failed"]
    later = HERE | {"date": "tomorrow"}
    new = list(gpu.measured(tasks(a=10, b=20, c=30, d=40), file, later))
    assert names(new) == ["d", "b", "c"]  # a stays, and nobody had tried d
    assert [row["ms"] for row in json.loads(file.read_text())["rows"]] == [1, 20, 30, 40]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("here, again", [
    (HERE | {"torch": "1"}, False), (HERE | {"device": "another"}, False),
    (HERE | {"triton": "2"}, False), (HERE | {"size": "toy"}, False), (HERE, True)])
def test_rows_of_another_machine_are_measured_anew_and_all_where_one_asks(here, again, tmp_path):
    file = tmp_path / "part.json"
    list(gpu.measured(tasks(a=1), file, HERE))
    assert not list(gpu.measured(tasks(a=2), file, HERE))
    assert [row["ms"] for row in gpu.measured(tasks(a=2), file, here, again)] == [2]


@pytest.mark.parametrize("error, said", [
    (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    (ValueError("no log"), "ValueError: no log"), (OSError(28, "No space"), "OSError: [Errno 28]"),
    (subprocess.TimeoutExpired("train", 240.0, "x\nstep:3"), "step:3\ntimed out after 240 s"),
    (subprocess.TimeoutExpired("train", 1.5, ""), "timed out after 1.5 s")])
def test_whatever_breaks_a_row_the_next_one_is_measured(error, said, tmp_path):
    first, second = gpu.measured(tasks(a=error, b=2), tmp_path / "part.json", HERE)
    assert first["failed"].startswith(said) and second["ms"] == 2


def test_what_takes_too_long_is_killed_with_what_it_started(tmp_path):
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as late:
        train_speed.run_process(["sh", "-c", "sleep 60 & echo $!; wait"], 0.5)
    assert time.monotonic() - began < 30
    started = Path(f"/proc/{int(late.value.output)}/stat")
    deadline = time.monotonic() + 10
    while started.is_file() and started.read_text().split()[2] != "Z":  # gone, or not yet buried
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_training_over_its_limit_is_a_row_that_says_so(tmp_path):
    assert gpu.main(["--toy", "speed", "--limit_s", "0.1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == 2 * ["timed out after 0.1 s"]
    page = gpu.page(tmp_path)
    assert "| #6 | cold | failed: timed out after 0.1 s |" in page and "0 of 2 rows" in page


def result(rows, of=None):
    return json.dumps({"machine": {"device": "x"}, "of": of or len(rows), "rows": rows})


def test_a_run_that_fails_stands_in_the_table_as_failed(tmp_path):
    (tmp_path / "loss.json").write_text(result([{"record": 6, "failed": "a\nb|c"}]))
    assert "| #6 | failed: b/c |" in gpu.page(tmp_path)


@pytest.mark.parametrize("part", [*gpu.PARTS])
def test_a_part_of_which_every_row_failed_has_a_page(part, tmp_path):
    row = {"record": 6, "cache": "cold", "variant": "v", "shapes": "s", "kernel": "k", "shape": "s",
           "dtype": "d", "file": "f", "failed": "out of memory"}
    (tmp_path / f"{part}.json").write_text(result([row]))
    page = gpu.page(tmp_path)
    assert "failed: out of memory" in page and "0 of 1 rows" in page


TRAINED = {"tokens_per_s": 1, "mfu": 0, "train_time_ms": 1, "num_iterations": 1, "warmup_s": 1,
           "start_s": 2, "final_val_loss": 1, "peak_memory_mib": "22700", "peak_step_mib": "2048",
           "record": 6, "cache": "cold"}


def test_the_page_says_how_many_rows_of_a_part_are_there(tmp_path):
    (tmp_path / "speed.json").write_text(result([TRAINED], of=3))
    assert "1 of 3 rows" in gpu.page(tmp_path)
    (tmp_path / "speed.json").write_text(result([TRAINED]))
    assert "of 1 rows" not in gpu.page(tmp_path)


def test_the_memory_of_steps_alone_is_shown_where_a_log_has_it(tmp_path):
    assert train_speed.peak_mib({"peak_memory_mib": "22700"}) == 22700
    (tmp_path / "speed.json").write_text(result([TRAINED]))
    assert " 2.0 " in gpu.page(tmp_path) and "22.2" not in gpu.page(tmp_path)


@pytest.mark.parametrize("dies_at, calls", [((), 1), ((1,), 2), ((0, 2), 3)])
def test_a_kernel_that_ends_its_process_costs_its_own_row(dies_at, calls, tmp_path, monkeypatch):
    """Four rows, of which some end bench/kernels.py; those behind come from another process."""
    called, file = [], tmp_path / "kernels.json"

    def said_by(command, limit_s):
        called.append(command)
        assert ("--again" in command) == (len(called) == 1)
        rows = json.loads(file.read_text())["rows"] if file.is_file() else []
        todo = [*range(len(rows), 4), *(i for i, row in enumerate(rows) if "failed" in row)]
        for i in todo:
            rows[i:i + 1] = [{"name": i} | ({"failed": "?"} if i in dies_at else {})]
            file.write_text(result(rows, of=4))
            if i in dies_at:
                raise RuntimeError("status 1")

    monkeypatch.setattr(gpu, "said_by", said_by)
    args = argparse.Namespace(out=tmp_path, toy=True, again=True, limit_s=None)
    if dies_at:  # it dies of the same row once more, after all the others
        with pytest.raises(RuntimeError, match="status 1"):
            gpu.kernel_rows(args, tmp_path)
    else:
        assert gpu.kernel_rows(args, tmp_path) == []
    assert len(json.loads(file.read_text())["rows"]) == 4 and len(called) == calls


def test_cold_rows_start_with_empty_caches_and_the_warm_one_with_what_cold_left(
        tmp_path, monkeypatch):
    """Also where the cold row is there from an earlier call; and the environment stays as it was.
    """
    monkeypatch.setattr(gpu, "write_documents", lambda *_: None)
    found = []

    def run_once(words, limit_s, env):
        caches = [Path(env[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
        found.append((words[1], *(folder.exists() for folder in caches)))
        for folder in caches:
            folder.mkdir(parents=True, exist_ok=True)
        return {}

    monkeypatch.setattr(train_speed, "run_once", run_once)
    environment = dict(os.environ)
    args = argparse.Namespace(toy=False, limit_s=None)
    tasks = gpu.speed(args, tmp_path)
    for _, task in tasks:
        task()
    assert found == [*((str(record), False, False) for record in gpu.SPEED), ("62", True, True)]
    found.clear()
    gpu.speed(args, tmp_path)[-1][1]()
    assert found == [("62", False, False), ("62", True, True)]
    assert environment == dict(os.environ)


def test_each_file_of_gpu_tests_is_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(train_speed, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    body = "import pytest\n{}\n@pytest.mark.gpu\ndef test_it():\n    {}\n"
    for name, top, then in (("breaks", "", "import os; os._exit(1)"),  # as after a time limit
                              ("good", "", "pass"),
                              ("other_version", "from torch import no_such_name", "pass")):
        (tmp_path / "tests" / f"test_{name}.py").write_text(body.format(top, then))
    (tmp_path / "tests" / "test_of_a_cpu.py").write_text("def test_it():\n    assert False\n")
    (_, breaks), (_, good), (_, other) = gpu.tests(argparse.Namespace(toy=False, limit_s=100),
                                                   tmp_path)
    with pytest.raises(RuntimeError, match="status 1"):
        breaks()
    assert "1 passed" in good()["tests"] and good()["failures"] == []
    (failure,) = other()["failures"]
    assert failure.startswith("ERROR tests/test_other_version.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize("words, says", [(["speed"], "--toy"), (["--toy", "fast"], "parts of")])
def test_without_a_gpu_it_says_what_to_do(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(words)
    assert says in capsys.readouterr().err


def test_documents_are_as_long_as_finewebs(tmp_path):
    gpu.write_documents(tmp_path, 1_000_000)
    tokens = np.asarray(read_shard(tmp_path / "documents_train_000001.bin"))
    lengths = np.diff(np.flatnonzero(tokens == gpu.BOS))
    assert lengths.min() >= 32
    assert np.median(lengths) == pytest.approx(403, rel=0.1)
    assert lengths.mean() == pytest.approx(690, rel=0.1)


@pytest.mark.parametrize("record", [6, 62])
def test_as_many_steps_as_the_files_give(record, tmp_path):
    gpu.write_documents(tmp_path, 3_000_000)
    steps = gpu.steps_for(record, 2_900_000, tmp_path)
    recipe = gpu.recipes.change(gpu.RECORDS[record], num_iterations=steps)
    assert 0.5 * 2_900_000 < recipe.total_tokens <= 2_900_000


def test_first_contact_kills_what_hangs_with_its_stack_and_runs_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(first, "ASK_S", 1)
    for folder in ("logs", "caches"):
        (tmp_path / folder).mkdir()

    def case(name: str, text: str, gib: float | None, limit_s: float = 60) -> first.Case:
        return first.Case(name, [sys.executable, "-c", text], gib, limit_s)

    stay = "import time\ntime.sleep(100)"
    todo = [case("alone", "print('well')", None), case("hangs", stay, 30, 4),
            case("too much beside it", "raise SystemExit('no')", 40)]
    seen = []
    first.run_all(todo, tmp_path, 60, lambda rows: seen.append([row["name"] for row in rows]))
    assert seen[-1] == ["hangs", "too much beside it", "alone"]  # one after the other
    with pytest.raises(ProcessLookupError):
        os.kill(todo[1].process.pid, 0)
    text = (tmp_path / "logs" / "hangs.txt").read_text()
    assert "Fatal Python error: Aborted" in text and 'File "<string>", line 2' in text
    assert (tmp_path / "logs" / "alone.txt").read_text() == "well\n"
