"""Claims held to logs: groups, programs as programs, numbers of a README, the audit."""

import io
import json

import pytest
from records_runs import write_logs

from conftest import ROOT
from records import check, claim, history, rules
from records.__main__ import main
from records.log import parse

CODE = '''import torch
# {comment}
seed = {seed}
torch.manual_seed({seed})
def train(lr{hint}):
    """Train."""
    return lr
train(lr={lr})
'''
LOSSES = [3.2791, 3.2778, 3.2787, 3.2784]  # of record #75: mean 3.2785, p 0.006


def public(folder, losses=LOSSES, ms=87_700, steps=1000, codes=None, gpus=8, key="val_loss"):
    """Public logs of one folder, each with its program."""
    folder.mkdir(parents=True)
    for i, loss in enumerate(losses):
        code = {"comment": "", "seed": 0, "hint": "", "lr": "0.0375"} | (codes or {}).get(i, {})
        lines = [CODE.format(**code) + "=" * 100, "Running PyTorch 2.9.1 compiled for CUDA 12.6 on "
                 f"NVIDIA H100 80GB HBM3 with world_size {gpus}"]
        for step in (500, 900, steps):
            t, last = (ms + 37 * i) * step / steps, loss + 0.001 * (steps - step) / 100
            lines.append(f"step:{step}/{steps} {key}:{last:.4f} train_time:{t:.0f}ms "
                         f"step_avg:{t / step:.2f}ms")
        (folder / f"{i}.txt").write_text("\n".join(lines) + "\n")
    return folder


def said(capsys, *words):
    status = main(["check", *map(str, words)])
    return status, capsys.readouterr().out


def test_comments_types_and_seeds_are_no_other_program(tmp_path, capsys):
    codes = {1: {"comment": "a note"}, 2: {"hint": ": float"}, 3: {"seed": 7}}
    status, out = said(capsys, public(tmp_path / "a", codes=codes), "--track", "short")
    assert status == 0 and "n = 4, loss mean 3.27850" in out
    assert "1 of 4 runs, in what changes nothing: def train(lr: float):, not def train(lr):" in out


def test_another_program_is_another_group_and_its_difference_is_shown(tmp_path, capsys):
    codes = {3: {"lr": "0.0400", "comment": "x"}}
    _, out = said(capsys, public(tmp_path / "a", codes=codes), "--track", "steps")
    assert "n = 3, loss" in out and "n = 1, loss" in out
    assert "1 runs of another program than a (3 runs as 0.txt, 1000 steps): train(lr=0.04), not " \
           "train(lr=0.0375)" in out


def test_folders_are_not_pooled_but_compared(tmp_path, capsys):
    public(tmp_path / "pr/baseline", [3.2790, 3.2795, 3.2785], ms=90_000)
    public(tmp_path / "pr/this_pr", [3.2781, 3.2779, 3.2783], ms=81_000)
    status, out = said(capsys, tmp_path / "pr", "--track", "short")
    assert status == 0 and out.count("n = 3") == 2 and out.count("ok  ") == 2
    assert "beside baseline: time x 0.9000 (0.899" in out and "loss -0.0009" in out


README = """# Faster

`losses = [3.2791, 3.2778, 3.2787, 3.2784]`, p = {p}, n = 4, mean loss {mean}, 1,000 steps.
The mean time is {time}. Memory: 30 runs of nothing.
"""


@pytest.mark.parametrize("facts, line", [
    ({}, "follows: p 0.0060, from a"), ({}, "follows: mean loss 3.2785, from a"),
    ({}, "follows: time 87.756, from a"), ({}, "follows: losses, 4 numbers"),
    ({}, "follows: steps 1,000, from a"),
    ({"time": "87756 ms"}, "follows: time 87756, from a"),
    ({"p": "0.0001"}, "does not follow: p 0.0001: a gives 0.00598346, its list losses gives 0.005"),
    ({"mean": "3.2777"}, "does not follow: mean loss 3.2777: a gives 3.2785"),
    ({"time": "1.4 min"}, "does not follow: time 1.4: a gives 87.7555"),
    ({}, "does not follow: n 30: a gives 4"),
])
def test_each_number_of_a_readme_has_a_verdict(tmp_path, capsys, facts, line):
    folder = public(tmp_path / "a")
    facts = {"p": "0.0060", "mean": "3.2785", "time": "87.756 s"} | facts
    (folder / "README.md").write_text(README.format(**facts))
    status, out = said(capsys, folder, "--track", "short")
    assert status == 1 and line in out


@pytest.mark.parametrize("text", [
    "p = 1e999, n = " + "9" * 5000, "losses = [1.2.3, 4..5, .]", "p=0.1 " * 10**5,
    "mean " + "x" * 10**6, "time 1e99 min, 1e99 steps", "losses = [" + "3.1, " * 10**5 + "]",
])
def test_no_text_of_a_readme_breaks_check(tmp_path, text):
    public(tmp_path / "a", LOSSES[:2])
    claim.judge(claim.log_files(tmp_path), rules.TRACKS["steps"], text=text)


def test_losses_without_a_log_are_named(tmp_path):
    public(tmp_path / "a", LOSSES[:2])
    found = claim.judge(claim.log_files(tmp_path), rules.TRACKS["short"],
                        text="losses = [3.2791, 3.2778, 3.2787]\np=0.0085\ntime 1.2 s")
    assert any(str(r).endswith("losses, 3 numbers: 1 are the final loss of no log: 3.2787")
               for r in found[-1][1].reasons)


def test_a_number_that_no_log_has_cannot_be_derived(tmp_path):
    (tmp_path / "a.log").write_text("s:9536 tel:3.2759\n")
    [_, (_, verdict)] = claim.judge([tmp_path / "a.log"], rules.TRACKS["short"],
                                       text="The time is 31.4 minutes.")
    assert [str(r) for r in verdict.reasons] == ["not-derived: cannot be derived: time 31.4"]


def test_a_pull_requests_text_comes_on_stdin(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("p=0.006, over 4 runs"))
    status, out = said(capsys, public(tmp_path / "a"), "--track", "short", "--claim", "-")
    assert status == 0 and "follows: p 0.006" in out and "follows: n 4" in out


def test_options_for_logs_are_refused_for_a_record_that_has_its_own_numbers(capsys):
    (folder, *_) = (ROOT / "records" / "pocket").glob("2026-*")
    assert main(["check", str(folder), "--claim", "-"]) == 2
    assert "held to its result.json" in capsys.readouterr().err


def test_the_steps_track_is_judged_at_a_step_and_by_another_loss(tmp_path, capsys):
    folder = public(tmp_path / "track_3_optimization/a", [3.2770, 3.2772], key="val_ema_loss",
                    codes={0: {"seed": 1}})
    status, out = said(capsys, folder, "--loss", "val_ema_loss")
    assert status == 0 and "meets the rule first at step 1000" in out
    assert "(target - mean) * sqrt(n) = 0.00410, at least 0.004 is asked" in out
    status, out = said(capsys, folder, "--loss", "val_ema_loss", "--at", 900)
    assert status == 1 and "900 steps" in out and "= 0.00269, expected at least 0.004" in out
    status, out = said(capsys, folder, "--loss", "val_ema_loss", "--at", 901)
    assert status == 1 and "incomplete" in out


def test_a_claim_of_the_steps_track_may_be_of_an_earlier_step(tmp_path, capsys):
    folder = public(tmp_path / "a", [3.2750, 3.2752])
    (folder / "README.md").write_text("Mean 3.2761 after 900 steps, not 3.9 after 950 steps.")
    status, out = said(capsys, folder, "--track", "steps")
    assert status == 1 and "follows: mean loss 3.2761, from a at step 900" in out
    assert "follows: steps 900, from a at step 900" in out
    assert "does not follow: steps 950: a gives 1000, a at step 900 gives 900" in out


def test_what_is_no_log_is_named_and_no_fault(tmp_path, capsys):
    folder = public(tmp_path / "a")
    (folder / "requirements.txt").write_text("torch\n")
    (folder / "1.txt").rename(folder / "1.out")
    status, out = said(capsys, folder, "--track", "short")
    assert status == 0 and "n = 4" in out
    assert "passed over: not-a-log: requirements.txt: no measurement in it" in out


def test_one_digit_changed_is_still_a_copy(tmp_path):
    first = write_logs(tmp_path)[0]
    text = first.read_text().split("begin steps\n")[1].split("begin result")[0]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text.replace("/100 val_loss:1", "/100 val_loss:2"))
    runs = [*parse(tmp_path / "a.txt"), *parse(tmp_path / "b.txt")]
    assert check.copies(runs) == {1: (0, "clock")}
    verdict = check.judge(runs, rules.TRACKS["short"])
    assert verdict.result["num_runs"] == 1 and "duplicate-run" in verdict.names()


def test_the_audit_names_what_does_not_fit(tmp_path, monkeypatch):
    place = tmp_path / "clone/records/track_1_short"
    public(place / "2026-01-01_A/this_pr", gpus=1)
    public(place / "2026-01-01_A/baseline", [3.2790, 3.2795], ms=90_000)
    (place / "2026-01-01_A/README.md").write_text("p=0.0001")
    row = {"track": "short", "number": 88, "date": "2026-01-01", "minutes": 1.0, "steps": 1100}
    paths = ["2026-01-01_A/this_pr/0.txt", "2026-01-01_A/baseline/0.txt", "2026-01-01_B/x.txt"]
    monkeypatch.setattr(history, "public_records", lambda folder: [
        row | {"log_paths": [f"records/track_1_short/{path}"]} for path in paths])
    text = claim.audit(tmp_path / "clone/records", tmp_path)
    for line in ("- 2026-01-01_A: this_pr: n = 4, mean 3.27850, p = 0.005983",
                 "not-derived: does not follow: p 0.0001: baseline gives",
                 "- #88 (2026-01-01): 0.txt: expected 8 GPUs, got 1",
                 "- #88 (2026-01-01): 0.txt has 1000 steps, the row 1100",
                 "- #88 (2026-01-01): 0.txt took 87.7s, the row 60.0s",
                 "0.txt is of the runs baseline, 90.0s; nearer to the row are this_pr, 87.8s",
                 "- #88 (2026-01-01): dead link: x.txt"):
        assert line in text, text


def test_the_history_gets_the_numbers_of_all_logs(tmp_path, capsys):
    clone, root = tmp_path / "clone/records", tmp_path / "records"
    public(clone / "track_1_short/2026-02-23_X")
    rows = [{"track": "short", "number": n, "date": "2026-02-23", "minutes": 1.46, "steps": 1000,
             "evidence": {"num_runs": 1, "val_loss": 3.2791, "train_time_ms": 87700.0},
             "log_paths": [f"records/track_1_short/2026-02-23_{name}"]}
            for n, name in ((75, "X/0.txt"), (76, "X"), (77, "Y/0.txt"))]
    history.write(root / "data/history.json", json.dumps({"about": "é", "records": rows}).encode())
    history.public_records.cache_clear()
    assert main(["--root", str(root), "audit", str(clone), "--history"]) == 0
    written = json.loads((root / "data/history.json").read_text())
    a, b, c = [row["evidence"] for row in written["records"]]
    assert a == b and (a["num_runs"], a["val_loss"], a["p"]) == (4, 3.2785, 0.005983)
    assert c == rows[2]["evidence"] and written["about"] == "é"
