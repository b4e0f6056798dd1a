"""Public logs: what the reference files hold is what is read, and nothing is guessed."""

import gzip
import json
import math

import pytest

from conftest import FACTS
from records.log import parse
from records.reproduce import embedded_code

PUBLIC = json.loads((FACTS / "public_logs.json").read_text())
RULE = "=" * 100


def write_log(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(line + "\n" for line in lines)
    return path


@pytest.mark.parametrize("name", PUBLIC["cases"])
def test_a_public_log_is_read_as_expected(name, tmp_path):
    case = PUBLIC["cases"][name]
    expected, runs = case["expected"], parse(write_log(tmp_path / name, case["lines"]))
    assert len(runs) == expected["n_runs"]
    if not expected["is_log"]:
        return
    last = runs[-1]
    assert last.final_step == expected["final_step"]
    assert last.final_val_loss == expected["val_loss"]
    assert last.train_time_ms == expected["train_time_ms"]
    assert sum(len(run.points) for run in runs) == expected["n_val_points"]
    assert last.last_train_step == expected["last_train_step"]
    assert last.reached_total == expected["reached_total"]
    assert sum(run.num_echoed for run in runs) == expected["n_echoed_lines"]
    for key in ("python", "torch", "cuda", "gpu", "gpu_count"):
        assert getattr(last, key) == expected[key], key
    for run, want in zip(runs, expected["runs"] or []):
        assert run.points[0].step == want["first_val_step"]
        assert len(run.points) == want["n_val_points"]
        assert (run.final_val_loss, run.train_time_ms) == (want["val_loss"], want["train_time_ms"])
    assert not any(run.faults for run in runs)
    assert last.complete == (expected["reached_total"] is not False)


@pytest.mark.parametrize("name", PUBLIC["groups"])
def test_a_public_group_gives_the_expected_numbers(name, tmp_path):
    from records import check, rules

    group = PUBLIC["groups"][name]
    expected = group["expected"]
    runs, unread = check.load([write_log(tmp_path / file, group["head"] + lines)
                               for file, lines in group["files"].items()])
    verdict = check.judge(runs, rules.TRACKS["short"])
    result = verdict.result
    assert not unread and result["num_runs"] == expected["n_used"]
    assert result["val_loss"]["mean"] == pytest.approx(expected["mean_val_loss"], abs=1e-6)
    assert result["val_loss"]["sd"] == pytest.approx(expected["std_val_loss"], abs=1e-6)
    assert result["p"] == pytest.approx(expected["p_value_less"], rel=1e-3)
    assert result["train_time_ms"]["mean"] / 1000 == pytest.approx(expected["mean_time_s"])
    assert result["train_time_ms"]["sd"] / 1000 == pytest.approx(expected["std_time_s"], abs=1e-3)
    assert ("not-significant" in verdict.names()) == (not expected["passes_p01"])
    assert verdict.names() <= {"above-target", "not-significant"}
    closed = check.judge(runs, rules.TRACKS["short"], closed=True)
    assert closed.names() >= {"no-digest", "no-source"}


def read(*lines, newline=True):
    return parse("\n".join(lines) + ("\n" if newline else "") if len(lines) > 1 or newline
                 else lines[0].encode())


def losses(*lines, **options):
    return [[(p.step, p.val_loss) for p in run.points] for run in read(*lines, **options)]


VAL = "step:10/10 val_loss:3.2770 train_time:1000ms step_avg:100.00ms"


@pytest.mark.parametrize("line, loss, ms", [
    (VAL, 3.277, 1000.0),
    ("step:10/10 val_loss:3.27701 train_time:1.000s step_avg:100.00ms", 3.27701, 1000.0),
    ("step:10/10 val_loss:3.277012 train_time:1000ms step_avg:nanms", 3.277012, 1000.0),
    ("rank:0 step:10/10 lr:0.1 val_loss:3.2770 train_time:1000ms step_avg:100ms x:1", 3.277, 1000),
    ("step:10/10 val_loss:3.2770 train_time:1000ms step_avg:100.00ms best so far", 3.277, 1000.0),
    ("s:9536 tel:3.275959", 3.275959, None),
    ("s:60000 tel:2.9282 ", 2.9282, None),
])
def test_formats_in_the_wild(line, loss, ms):
    [run] = read(line)
    assert (run.final_val_loss, run.train_time_ms) == (loss, ms)
    assert run.complete and not run.faults


@pytest.mark.parametrize("line", [
    'print0(f"step:{step}/{steps} val_loss:{val_loss:.4f} train_time:{ms:.0f}ms")',
    "# step:10/10 val_loss:3.2770 train_time:1000ms step_avg:100.00ms",
    "    step:10/10 val_loss 3.2746",
    "best val_loss:3.2770 at step:10/10",
    "tail_ema applied step:2720 tau:150 lambda:0.6 start_step:2000",
    "s:9780 trl:3.4378 lr:0.000317 norm:0.25",
    "",
])
def test_what_is_no_result_line_is_no_result(line):
    assert losses(line) in ([], [[]])


@pytest.mark.parametrize("line", [
    "step:10/10 val_loss:3 train_time:1000ms step_avg:100.00ms",
    "step:10/10 val_loss:3.27x train_time:1000ms step_avg:100.00ms",
    "step:10/10 val_loss:3.2770 train_time:1000 step_avg:100.00ms",
    "step:10/10 val_loss:3.2770 train_time:-5ms step_avg:100.00ms",
    "step:10/10 val_loss:3.2770",
    "step:x/10 val_loss:3.2770 train_time:1000ms step_avg:100.00ms",
    "step:10/10 val_loss:1e-3 train_time:1000ms step_avg:100.00ms",
])
def test_what_cannot_be_read_is_named_and_not_guessed(line):
    [run] = read(line)
    assert not run.points and not run.complete
    assert run.faults == [run.faults[0]] and run.faults[0].startswith("line 1: a validation line")


def test_a_last_line_cut_in_a_number_is_not_a_loss():
    for end in range(len("step:10/10 val_loss:3"), len(VAL) - len("s")):
        runs = parse(VAL[:end].encode())
        assert not any(run.points for run in runs), VAL[:end]
    assert parse(VAL.encode())[0].final_val_loss == 3.277  # whole, but for its newline
    assert not any(run.points for run in parse(b"s:9536 tel:3.27"))


def test_a_loss_with_fewer_decimals_than_the_run_prints_was_cut():
    [run] = read("s:250 tel:3.2959", "s:500 tel:3.2")
    assert run.final_step == 250 and "cut, not counted" in run.faults[0]


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf"])
def test_nan_never_passes(value):
    [run] = read(VAL.replace("10/10", "5/10"), VAL.replace("3.2770", value))
    assert not math.isfinite(run.final_val_loss)
    assert not run.complete and "final loss is" in run.why_incomplete


def test_units_may_be_mixed():
    [run] = read("step:5/10 val_loss:3.5000 train_time:500ms step_avg:100.00ms",
                 "step:10/10 val_loss:3.4000 train_time:1.000s step_avg:100.00ms")
    assert [p.train_time_ms for p in run.points] == [500.0, 1000.0] and not run.faults


def test_a_wrong_unit_is_noticed():
    [run] = read("step:50/100 val_loss:3.5000 train_time:5000ms step_avg:100.00ms",
                 "step:100/100 val_loss:3.4000 train_time:10000s step_avg:100.00ms")
    assert run.faults == ["line 2: step_avg is 100.00 ms, train_time gives 100000.00 ms a step: "
                          "one of them was changed"]


def test_step_avg_may_be_of_the_steps_since_the_last_validation():
    lines = ["step:125/375 val_loss:4.6680 train_time:77.998s step_avg:623.98ms",
             "step:250/375 val_loss:4.1745 train_time:119.880s step_avg:335.06ms",
             "step:375/375 val_loss:4.0163 train_time:161.647s step_avg:334.13ms"]
    [run] = read(*lines)
    assert not run.faults
    [run] = read(lines[0], lines[1].replace("119.880s", "109.880s"), lines[2])
    assert len(run.faults) == 2  # of this interval and of the next


def test_runs_are_split_where_the_step_falls_back():
    one = ["step:0/10 val_loss:9.0000 train_time:0ms step_avg:nanms",
           "step:5/10 val_loss:4.0000 train_time:500ms step_avg:100.00ms"]
    runs = read(*one, VAL, *one, VAL.replace("3.2770", "3.2771"))
    assert [run.final_val_loss for run in runs] == [3.277, 3.2771]
    runs = read("step:1/10 train_time:9ms step_avg:9.00ms", VAL,
                "step:1/10 train_time:8ms step_avg:8.00ms", VAL.replace("3.2770", "3.2771"))
    assert [run.last_train_step for run in runs] == [1, 1]
    assert [len(run.points) for run in runs] == [1, 1]


def test_echoed_lines_count_once():
    half = "step:5/10 val_loss:4.0000 train_time:500ms step_avg:100.00ms"
    [run] = read(half, half, VAL, half, VAL)
    assert [p.step for p in run.points] == [5, 10] and run.num_echoed == 3


def test_two_losses_for_one_step_are_named():
    [run] = read(VAL, VAL.replace("3.2770", "3.2000"))
    assert run.final_val_loss == 3.277 and "a second validation of step 10" in run.faults[0]


def test_the_clock_may_restart_early_and_never_later():
    early = [f"step:{s}/200 train_time:{ms}ms step_avg:nanms"
             for s, ms in ((1, 240_000), (9, 245_000), (10, 0), (11, 130), (30, 2600))]
    [run] = read(*early, "step:200/200 val_loss:3.2000 train_time:26000ms step_avg:130ms")
    assert not run.faults
    [run] = read("step:100/200 val_loss:3.5000 train_time:20000ms step_avg:200ms",
                 "step:200/200 val_loss:3.2000 train_time:19000ms step_avg:95ms")
    assert "the clock runs backwards" in run.faults[0]


def test_training_that_went_on_without_a_validation_is_incomplete():
    [run] = read("step:5/10 val_loss:4.0000 train_time:500ms step_avg:100.00ms",
                 "step:9/10 train_time:900ms step_avg:100.00ms")
    assert run.why_incomplete == "stopped at step 5 of 10"
    [run] = read("s:5 tel:4.0000", "step:9/10 train_time:900ms step_avg:100.00ms")
    assert run.why_incomplete == "last validated at step 5, trained on to 9"


CODE = ["import os", "with open(sys.argv[0]) as f:", "    code = f.read()", '"""a docstring says',
        VAL.replace("3.2770", "1.0000"), '"""', "from torch import nn"]


@pytest.mark.parametrize("opening", [[], ["=" * 80], ["#!/usr/bin/env python", "# a comment"]])
def test_the_code_in_a_log_is_no_result(opening, tmp_path):
    body = [*opening, *CODE, RULE, "Running PyTorch 2.9.1 compiled for CUDA 12.6", RULE, VAL]
    assert losses(*body) == [[(10, 3.277)]]
    assert read(*body)[0].torch == "2.9.1"
    path = tmp_path / "log.txt"
    path.write_text("\n".join(body) + "\n")
    kept = [line for line in opening if not line.startswith("=")] + CODE
    assert embedded_code(path).decode() == "\n".join(kept) + "\n"


def test_the_same_code_has_the_same_hash():
    def run(last):
        return read(*CODE, last, RULE, VAL)[0].code_sha256

    assert run("x = 1") == run("x = 1") != run("x = 2")
    assert read(VAL)[0].code_sha256 is None


def test_a_capture_that_says_import_is_still_read():
    assert losses("import warnings happened", VAL) == [[(10, 3.277)]]


def test_another_loss_can_be_named():
    line = "step:10/10 val_loss:3.3000 val_ema_loss:3.2770 train_time:1000ms step_avg:100.00ms"
    assert parse(line + "\n", loss_key="val_ema_loss")[0].final_val_loss == 3.277


@pytest.mark.parametrize("line, expected", [
    ("Running pytorch 2.4.1+cu121 compiled for CUDA 12.1", ("2.4.1+cu121", "12.1", None, None)),
    ("Running PyTorch 2.7.0a0+79aa17489c.nv25.04 compiled for CUDA 12.9",
     ("2.7.0a0+79aa17489c.nv25.04", "12.9", None, None)),
    ("Running PyTorch 2.11.0+cu130 compiled for CUDA 13.0 on NVIDIA GH200 120GB with world_size 4",
     ("2.11.0+cu130", "13.0", "NVIDIA GH200 120GB", 4)),
    ("Running on device_name=NVIDIA H100 80GB HBM3   with world_size=8",
     (None, None, "NVIDIA H100 80GB HBM3", 8)),
    ("|   3  NVIDIA H100 80GB HBM3          On  | 00000000:65:02.0 Off |            0 |",
     (None, None, "NVIDIA H100 80GB HBM3", 1)),
    ("|    0   N/A  N/A      1234      C   /usr/bin/python3   5774MiB |", (None,) * 4),
])
def test_environment_lines(line, expected):
    [run] = read(line, VAL)
    assert (run.torch, run.cuda, run.gpu, run.gpu_count) == expected


def test_a_conda_python_line():
    line = "Running python 3.12.12 | packaged by conda-forge | (main, Oct 22 2025) [GCC 14.3.0]"
    assert read(line, VAL)[0].python == "3.12.12"
