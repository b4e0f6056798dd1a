"""The script that a GPU is given: it runs, at toy sizes, and says what was not measured."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bench import gpu, train_speed
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
    done = run("report", "--out", tmp_path, "--page", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.count(gpu.UNKNOWN) == 5  # tests, variants, profile, loss, kernels
    assert f"{float(rows[0]['tokens_per_s']):,.0f}" in page


def test_a_run_that_fails_stands_in_the_table_as_failed(tmp_path):
    (tmp_path / "loss.json").write_text(json.dumps({
        "machine": {"device": "x"}, "rows": [{"record": 6, "failed": "first\nout of memory"}]}))
    assert "| #6 | 0 | failed: out of memory |" in gpu.page(tmp_path)


def test_the_memory_of_steps_alone_is_shown_where_a_log_has_it():
    assert train_speed.peak_mib({"peak_memory_mib": "22700"}) == 22700
    row = {"tokens_per_s": 1, "mfu": 0, "train_time_ms": 1, "num_iterations": 1, "warmup_s": 1,
           "final_val_loss": 1, "peak_memory_mib": "22700", "peak_step_mib": "2048"}
    assert "2.0" in gpu.run_cells(row) and "22.2" not in gpu.run_cells(row)


def test_without_a_gpu_it_says_what_to_do():
    done = run("speed")
    assert done.returncode == 2 and "--toy" in done.stderr
    assert "expected parts of" in run("--toy", "fast").stderr


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
