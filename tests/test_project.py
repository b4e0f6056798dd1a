"""The model of the machine: its limits, its monotony, and how far it is from public runs."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

import recipes
from bench import project
from bench.project import Gpu, Link, Scale, run_parts, step_parts
from conftest import ROOT, clean_environment
from model import mean_keys
from recipes import RECORDS

GPU, LINK = Gpu(), Link()
IDEAL = Link(intra=math.inf, intra_latency=0.0, inter=math.inf, inter_latency=0.0)


# --- against published numbers --------------------------------------------------------------------

@pytest.fixture(scope="module")
def rows():
    return {row.what: row for row in project.check(GPU, LINK)}


def test_public_runs_are_met_within_a_few_percent(rows):
    errors = [abs(row.error) for row in rows.values()]
    assert len(rows) == len(project.PUBLIC) == 15
    assert max(errors) < 0.12 and sum(errors) / len(errors) < 0.06, rows


def test_the_stages_of_record_60_grow_as_they_did(rows):
    """The step's cost per token and what stands apart from tokens, both seen in the growth."""
    small, middle, large = (rows[f"#60, {n}"] for n in ("131K tokens a step", "262K", "393K"))
    for a, b in ((small, middle), (middle, large)):
        measured, predicted = b.measured - a.measured, b.predicted - a.predicted
        assert predicted == pytest.approx(measured, rel=0.1)


def test_one_gpu_of_record_48_takes_almost_eight_times_as_long(rows):
    assert rows["#48, one GH200 over 8 H100"].predicted == pytest.approx(7.9, rel=0.06)


@pytest.mark.parametrize("window, full, cropped", [
    (128, 116, 115), (384, 293, 280), (640, 418, 387), (1024, 550, 483), (1792, 708, 554)])
def test_documents_cap_what_a_window_sees(window, full, cropped):
    """Keys a token, calculated elsewhere from the same two facts about FineWeb's documents."""
    assert project.document_keys(window, 10 ** 9) == pytest.approx(full, rel=0.02)
    assert project.document_keys(window, 2048) == pytest.approx(cropped, rel=0.02)


def test_the_first_windows_of_the_trace_are_its_attention():
    """Constants and recipe together: 0.45 TFLOP in 5.1 ms at 32K tokens (#44's code is #43's)."""
    recipe = RECORDS[43]
    phase = recipes.phase(0, recipe)
    flops = 32_768 * project.attention_flops(recipe, phase, 32_768)
    assert flops == pytest.approx(0.45e12, rel=0.06)
    parts = project.micro_batch(recipe, phase, 32_768, 32_768, GPU)
    assert 1e3 * parts.attention == pytest.approx(5.1, rel=0.02)
    # Products 20.7 + 5.5 ms; memory 12.7 + 5.6 + 2.4 + 2.4.
    assert 1e3 * parts.products == pytest.approx(26.2, rel=0.05)
    assert 1e3 * parts.memory == pytest.approx(23.1, rel=0.01)


# --- limits ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("record", [6, 23, 62])
def test_with_a_perfect_link_nothing_is_exposed(record):
    recipe = RECORDS[record]
    for num in (1, 2, 8):
        parts = step_parts(recipe, 0, num, GPU, IDEAL)
        # Updates wait for gradients, gathers for updates: nothing else is left.
        assert parts.exposed == pytest.approx(0, abs=1e-12)
        assert parts.total == pytest.approx(sum(parts[:4]), rel=1e-12)


@pytest.mark.parametrize("record", [6, 23, 62])
def test_one_gpu_is_the_sum_of_its_parts(record):
    """No link, whatever it is; micro-batches add up; the update is everybody's."""
    recipe = RECORDS[record]
    parts = step_parts(recipe, 0, 1, GPU, Link(intra=1.0, intra_latency=9.0))
    assert parts.exposed == pytest.approx(0, abs=1e-12)
    num_rows, seq_len = recipes.batch_shape(0, recipe)
    whole = project.micro_batch(recipe, recipes.phase(0, recipe), seq_len, num_rows * seq_len, GPU)
    assert parts[:3] == pytest.approx(whole[:3])
    micro_rows = GPU.micro_tokens // seq_len
    update, exposed = project.after_backward(recipe, 1, 1.0, GPU, LINK)
    assert exposed == pytest.approx(0, abs=1e-12)
    assert parts.fixed == pytest.approx(
        math.ceil(num_rows / micro_rows) * GPU.gaps + update + GPU.optimizer)


def test_products_are_the_flops_over_the_rate():
    recipe = RECORDS[6]
    tokens = recipe.batch_tokens // 8
    parts = step_parts(recipe, 0, 8, GPU, LINK)
    flops = 6 * (12 * 12 * 768 ** 2 + 768 * 50304)
    assert parts.products == pytest.approx(tokens * flops / GPU.product_flops)


def test_windows_cost_and_documents_end_them():
    """#12 sees 1,024 tokens of a document where #6 sees half of a row of them."""
    plain, packed = (project.attention_flops(RECORDS[n], recipes.phase(0, RECORDS[n]), T)
                     for n, T in ((6, 1024), (12, 65_536)))
    assert plain == pytest.approx(12 * 768 * 12 * mean_keys(1024, None))
    assert packed == pytest.approx(12 * 768 * 12 * 550, rel=0.02)


# --- monotony -------------------------------------------------------------------------------------

@pytest.mark.parametrize("record", [6, 62])
def test_more_gpus_are_faster_and_less_efficient(record):
    recipe = RECORDS[record]
    counts = [n for n in project.GPUS if n <= recipe.num_rows]
    times = [run_parts(recipe, n, GPU, LINK).total for n in counts]
    assert times == sorted(times, reverse=True)
    work = [n * t for n, t in zip(counts, times)]
    assert work == sorted(work)


@pytest.mark.parametrize("name, better", [
    ("intra", 2), ("inter", 2), ("intra_latency", 0.5), ("inter_latency", 0.5)])
def test_a_better_link_never_costs(name, better):
    recipe = RECORDS[6]
    link = dataclasses.replace(LINK, **{name: getattr(LINK, name) * better})
    for num in (8, 16, 64, 256):
        usual, improved = (step_parts(recipe, 0, num, GPU, x).total for x in (LINK, link))
        assert improved <= usual
    assert improved < usual  # at 256, over several nodes, each of them matters


def test_gradients_that_wait_for_the_end_of_backward_are_exposed():
    late = recipes.edit(RECORDS[23], grad_overlap=False)
    assert step_parts(late, 0, 8, GPU, LINK).exposed > step_parts(
        RECORDS[23], 0, 8, GPU, LINK).exposed


def test_more_gpus_than_rows_is_refused_as_the_trainer_does():
    with pytest.raises(ValueError, match="8"):
        step_parts(RECORDS[62], 0, 16, GPU, LINK)
    table = project.project(RECORDS[62], GPU, LINK, Scale())
    assert [row[1] == "rows" for row in table] == [n > 8 for n in project.GPUS]


# --- measurements, and as people start it ---------------------------------------------------------

def test_a_measurement_scales_what_it_measured(tmp_path):
    recipe, tokens = RECORDS[62], 16_384
    phase, (_, seq_len) = recipes.phase(0, recipe), recipes.batch_shape(0, recipe)
    ms = 1e3 * (project.micro_batch(recipe, phase, seq_len, tokens, GPU).total + GPU.gaps)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"recipe": 62, "tokens": tokens, "ms": 2 * ms}]))
    (scale,) = project.read_measured(path, GPU).values()
    assert scale == pytest.approx(Scale(2.0, 1.0))
    usual, slower = (step_parts(recipe, 0, 8, GPU, LINK, s) for s in (Scale(), scale))
    assert slower[:3] == pytest.approx([2 * part for part in usual[:3]])
    assert slower.fixed == usual.fixed


def test_it_prints_tables_that_fit_a_narrow_terminal(capsys):
    assert project.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    for record in project.SHOWN:
        assert f"#{record}, {RECORDS[record].title}" in lines
    assert "How far off the public rates are, in ms" in lines


def test_it_starts_as_a_script():
    done = subprocess.run([sys.executable, "bench/project.py", "--help"], cwd=ROOT, text=True,
                          timeout=60, capture_output=True, env=clean_environment())
    assert done.returncode == 0 and "--measured" in done.stdout, done.stderr


def test_the_file_in_the_repository_is_about_what_it_writes(tmp_path, rows):
    """Within 5%: a better plan may change a little, a forgotten file differs more."""
    assert project.main(["--markdown", str(tmp_path / "new.md")]) == 0
    here = (ROOT / "bench" / "PROJECT.md").read_text()
    new = (tmp_path / "new.md").read_text()
    assert [x for x in here.splitlines() if x.startswith("#")] == \
        [x for x in new.splitlines() if x.startswith("#")]
    for row in rows.values():
        (line,) = (x for x in here.splitlines() if x.startswith(f"| {row.what} |"))
        assert float(line.split("|")[3]) == pytest.approx(row.predicted, rel=0.05)


@pytest.mark.parametrize("words, says", [
    (["--intra", "0"], "--intra: expected a number above 0"),
    (["--inter_latency", "-1"], "--inter_latency: expected 0 or more"),
    (["--node_size", "6"], "--node_size: expected a power of two, got 6"),
    (["--measured", "absent.json"], "--measured absent.json"),
])
def test_wrong_words_are_refused_with_what_would_do(words, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        project.main(words)
    assert stopped.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[", "[1]", '[{"recipe": 5000, "tokens": 1, "ms": 1}]',
                                  '[{"recipe": 6, "tokens": 1}]'])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="--measured"):
        project.read_measured(path, GPU)
