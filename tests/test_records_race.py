"""Races and reproductions with a small program that writes real logs."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from records import history, launch
from records.__main__ import main
from records.history import write
from records.log import parse, source_path, without_sources

PROGRAM = '''
"""A trainer in twenty lines: no model, but true options, a true clock of its own, a true log."""
import argparse, random, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from records.log import RunLog, train_line, val_line
parser = argparse.ArgumentParser()
for name, default in (("record", 6), ("seed", 0), ("ms", 20.0), ("sleep", 0.0), ("fail", 0),
                      ("data_dir", "")):
    parser.add_argument("--" + name, type=type(default), default=default)
args = parser.parse_args()
rng = random.Random(args.seed * 100 + args.record)
name = "r%d_s%d_%d.txt" % (args.record, args.seed, time.time_ns())
log = RunLog(Path("logs") / name, {{"train_gpt.py": Path(__file__).read_text()}},
             {{"command": " ".join(["train_gpt.py", *sys.argv[1:]]), "device": "cpu",
               "cpu": "Example CPU"}},
             {{"num_iterations": 10, "batch_tokens": 100, "record": args.record}})
clock = 0.0
for step in range(11):
    if step:
        clock += rng.gauss(args.ms, 0.2)
        time.sleep(args.sleep)
        log.line(train_line(step, 10, 5 - step / 10, clock))
    if step % 5 == 0:
        loss = 5 - step / 10 + rng.gauss(0, 0.01)
        log.val(step, 10, loss, clock)
        print(val_line(step, 10, loss, clock), flush=True)
    if args.fail and step == args.fail:
        sys.exit("this program fails here")
log.close({{"status": "complete", "track": "pocket", "record": args.record, "seed": args.seed,
           "tokens": 1000, "world_size": 1, "data_digest": "00"}})
print("log:", log.path)
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A git repository with the program, in which records would live too."""
    tree = tmp_path / "tree"
    (tree / "records").mkdir(parents=True)
    (tree / "train_gpt.py").write_text(PROGRAM.format(root=str(ROOT)))
    (tree / ".gitignore").write_text("logs/\n")
    monkeypatch.chdir(tree)
    for key, value in {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
                       "GIT_COMMITTER_EMAIL": "a@b"}.items():
        monkeypatch.setenv(key, value)
    subprocess.run("git init -q -b main && git add -A && git commit -q -m one", shell=True,
                   check=True, cwd=tree)
    return tree


def records(tree, *words) -> int:
    return main(["--root", str(tree / "records"), *map(str, words)])


def test_a_race_by_turns_finds_the_faster_one(tree, capsys):
    assert records(tree, "race", "6", "6 --ms 18", "--runs", "3", "--out", "r") == 0
    out, err = capsys.readouterr()
    assert re.search(r"B is faster than A by (9|10)\.", out)
    assert "losses are equal run by run" in out
    assert "3 runs of each, by turns, on Example CPU" in out
    order = [line.split("  ")[1].split(":")[0] for line in err.splitlines()]
    assert order == ["A #6", "B #6 --ms 18"] * 3
    assert out.startswith("A = #6\nB = #6 --ms 18\n3 runs of each")
    state = json.loads((tree / "r/race.json").read_text())
    assert [e["seed"] for e in state["runs"]["a"]] == [0, 1, 2]
    losses = [[entry["loss"] for entry in state["runs"][side]] for side in "ab"]
    assert losses[0] == losses[1]  # same seeds
    for side in "ab":
        for entry in state["runs"][side]:
            assert parse(tree / "r" / entry["log"])[0].digest == entry["digest"]


def test_a_race_goes_on_where_it_stopped(tree, capsys):
    race_it = ["race", ".", ". --record 5", "--out", "r"]
    assert records(tree, *race_it, "--runs", "1") == 0
    assert "more runs are needed" in capsys.readouterr().out
    assert records(tree, *race_it, "--runs", "2") == 0
    out, err = capsys.readouterr()
    assert "going on with r: 1 of A and 1 of B are done" in err
    assert err.count("val_loss") == 2 and "2 runs of each" in out
    assert records(tree, *race_it, "--runs", "2", "--report") == 0
    assert capsys.readouterr().out == out
    assert records(tree, *race_it, "--runs", "2", "--seed", "4") == 2
    assert "holds another race (seed differ)" in capsys.readouterr().err


def test_an_interrupted_race_ends_its_program_and_can_go_on(tree):
    command = [sys.executable, "-m", "records", "--root", str(tree / "records"), "race", "6",
               "6 --sleep 0.01", "--runs", "2", "--options=--sleep 0.3", "--out", "r"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tree, env=environment, text=True,
                               stderr=subprocess.PIPE)
    output = tree / "r/a_01.out"
    deadline = time.monotonic() + 60
    while not (output.is_file() and "step:0/10" in output.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not [line for line in running.splitlines() if "train_gpt.py" in line
                and "--sleep 0.3" in line and "records" not in line]
    [log] = (tree / "logs").glob("*.txt")
    assert not parse(log)[0].complete
    assert not (tree / "r/race.json").exists()


def test_a_revision_runs_in_a_worktree_that_is_gone_afterwards(tree, capsys):
    text = (tree / "train_gpt.py").read_text()
    (tree / "train_gpt.py").write_text(text.replace('("ms", 20.0)', '("ms", 30.0)'))
    assert records(tree, "race", "main", ".", "--runs", "2", "--out", "logs/r") == 0
    assert "B is slower than A by " in capsys.readouterr().out
    assert not (tree / "logs/r/programs/a").exists()
    worktrees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1


def test_a_second_idea_never_gets_the_first_ones_answer(tree, capsys):
    race_it = ["race", "HEAD", ". --ms 10", "--runs", "2"]
    text = (tree / "train_gpt.py").read_text()
    for edit, words in ((".gauss(args.ms", "B is faster"), (".gauss(3 * args.ms", "B is slower"),
                        (".gauss(args.ms", "B is faster")):  # and back again: the first one's
        (tree / "train_gpt.py").write_text(text.replace(".gauss(args.ms", edit))
        assert records(tree, *race_it) == 0
        out, err = capsys.readouterr()
        assert words in out
    assert "2 of A and 2 of B are done" in err
    assert len(list(tree.glob("logs/race/HEAD_vs_ms-10/*/race.json"))) == 2
    data = tree / "tokens"
    for size in (1, 2):  # other data under the same name
        (data / "x.bin").parent.mkdir(exist_ok=True)
        (data / "x.bin").write_bytes(bytes(size))
        assert records(tree, "race", ".", ".", "--runs", "1", "--options=--data_dir tokens") == 0
        assert "are done" not in capsys.readouterr().err
    assert records(tree, *race_it, "--out", "r") == 0
    (tree / "train_gpt.py").write_text(text + "# changed\n")
    assert records(tree, *race_it, "--out", "r") == 2
    assert "holds another race (programs differ)" in capsys.readouterr().err


@pytest.mark.parametrize("side, why", [
    ("nowhere", "it is none of them"), ("records", "expected a folder with train_gpt.py"),
    ("6 --nonsense 1", "unrecognized arguments"), ("6 --fail 7", "this program fails here"),
    ("''", "expected a record"),
])
def test_what_cannot_race_is_said(tree, capsys, side, why):
    assert records(tree, "race", side, "6", "--runs", "1", "--out", "r") == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("command, kept", [
    ("train_gpt.py --record 6 --seed 7 --runs 5 --matrix_lr 0.1", ["--record", "6", "--matrix_lr",
                                                                   "0.1"]),
    ("train_gpt.py --seed=3 --wandb --log-dir x --record=6", ["--record=6"]),
    ("train_gpt.py --wandb --tied_head --data_dir /x --lr -1", ["--tied_head", "--lr", "-1"]),
    ("train_gpt.py", []),
])
def test_options_of_the_launch_are_not_of_the_training(command, kept):
    assert launch.training_options(command) == kept


def test_an_option_given_again_replaces_the_earlier_one():
    assert launch.merged(["--record", "6", "--lr", "1"], ["--lr=2", "--tied_head"], ["--x", "-1"]) \
        == ("--record", "6", "--lr=2", "--tied_head", "--x", "-1")
    assert launch.merged(["--matrix-lr", "1"], ["--matrix_lr", "2"]) == ("--matrix_lr", "2")


def the_log(tree, *options):
    done = subprocess.run([sys.executable, "train_gpt.py", *options], cwd=tree, check=True,
                          capture_output=True, text=True)
    return tree / done.stdout.splitlines()[-1].removeprefix("log: ")


def test_a_log_is_reproduced(tree, capsys):
    log = the_log(tree, "--record", "5", "--seed", "3", "--ms", "7")
    shutil.move(tree / "train_gpt.py", tree / "gone.py")
    assert records(tree, "reproduce", log, "--into", "again") == 0
    assert "the losses are equal at every validation" in capsys.readouterr().out
    [again] = (tree / "again/logs").glob("*.txt")
    assert parse(again)[0].result["seed"] == 3
    assert records(tree, "reproduce", log, "--into", "again") == 2
    assert "exists already" in capsys.readouterr().err


def test_check_deep_runs_the_first_steps_again(tree, capsys):
    log = the_log(tree, "--seed", "3")
    records(tree, "check", log, "--deep")
    assert "not-reproduced" not in capsys.readouterr().out
    text = re.sub(r"(?<=val_loss:)(\d\.\d+)", lambda m: f"{float(m[1]) - 0.1:.4f}", log.read_text())
    text = text[: text.index("marks: ")]
    log.write_text(f"{text}digest: {hashlib.sha256(text.encode()).hexdigest()}\n")
    assert parse(log)[0].complete
    assert records(tree, "check", log, "--deep") == 1
    assert re.search(r"not-reproduced: \S+: step:0/10 val_loss: the log has 4\.8\d+, its program "
                     r"gives 4\.9", capsys.readouterr().out)


def test_a_dry_run_unpacks_and_runs_nothing(tree, capsys):
    log = the_log(tree)
    assert records(tree, "reproduce", log, "--into", "again", "--dry-run") == 0
    assert "train_gpt.py --seed 0" in capsys.readouterr().out
    assert (tree / "again/train_gpt.py").read_text() == (tree / "train_gpt.py").read_text()
    assert not (tree / "again/logs").exists()


def test_a_record_gives_back_its_program_and_its_log(tree, capsys):
    log, source = the_log(tree), (tree / "train_gpt.py").read_bytes()
    kept, _ = without_sources(log)
    folder = tree / "records/pocket/2026-11-20_one"
    write(folder / "logs" / log.name, kept)
    path = source_path(tree / "records/sources", "train_gpt.py", hashlib.sha256(source).hexdigest())
    write(path, gzip.compress(source))
    result = history.own_records("pocket")[0] | {"name": "one", "losses": [4.0, 4.1]}
    write(folder / "result.json", json.dumps(result).encode())
    assert records(tree, "reproduce", folder, "--into", "again") == 0
    assert "the losses are equal at every validation" in capsys.readouterr().out
    assert (tree / "again/train_gpt.py").read_bytes() == source
    assert (tree / "again" / log.name).read_bytes() == log.read_bytes()


def test_a_log_that_was_changed_is_not_reproduced(tree, capsys):
    log = the_log(tree)
    log.write_text(log.read_text().replace("A trainer in twenty lines", "A trainer of evil lines"))
    assert records(tree, "reproduce", log, "--into", "again") == 2
    assert "was changed after the run" in capsys.readouterr().err
    assert not (tree / "again").exists()


def test_another_seed_is_compared_honestly(tree, capsys):
    log = the_log(tree, "--seed", "1")
    assert records(tree, "reproduce", log, "--into", "again", "--seed", "2") == 0
    assert "difference: " in capsys.readouterr().out


def test_a_public_log_gives_its_script_and_says_what_it_needs(tmp_path, capsys):
    log = tmp_path / "public.txt"
    log.write_text("import os\nimport torch\nfrom triton_kernels import x\n" + "=" * 100
                   + "\nRunning PyTorch 2.9.1 compiled for CUDA 12.6 on NVIDIA H100 with "
                   "world_size 8\nstep:5/5 val_loss:3.2000 train_time:10ms step_avg:2.00ms\n")
    assert main(["reproduce", str(log), "--into", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    for text in ("8x NVIDIA H100", "2.9.1", "torchrun --standalone --nproc_per_node=8",
                 "triton_kernels", "not run from here"):
        assert text in said
    assert (tmp_path / "again/train_gpt.py").read_text().startswith("import os\n")
    log.write_text("step:5/5 val_loss:3.2000 train_time:10ms step_avg:2.00ms\n")
    assert main(["reproduce", str(log), "--into", str(tmp_path / "b")]) == 2


def test_a_race_shows_progress_on_a_terminal(tree, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert records(tree, "race", "6", "5", "--runs", "1", "--out", "r") == 0
    said = capsys.readouterr().err
    assert re.search(r"race: +0%.* 0/2 .*#6 50%", said)
    assert re.search(r"race: +50%.* 1/2 .*#5 50%", said)
    assert "2/2  B #5: val_loss" in said
