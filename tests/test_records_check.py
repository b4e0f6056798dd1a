"""Every rule of a record, each broken by itself; and the way from logs to a record folder."""

import dataclasses
import gzip
import json
import shutil

import pytest
from records_runs import SOURCES, TARGET, write_log, write_logs

from records import add, check, history, rules, table
from records.__main__ import main
from records.log import parse

# the pocket track with a target, whatever the real one is by now
POCKET = dataclasses.replace(
    rules.TRACKS["pocket"], target=TARGET, data_digest=None, fixed={}, min_runs=5)


@pytest.fixture(autouse=True)
def pocket(monkeypatch):
    monkeypatch.setitem(rules.TRACKS, "pocket", POCKET)
    return POCKET


def judged(paths, track="pocket", **options):
    runs, unread = check.load(paths)
    verdict = check.judge(runs, rules.TRACKS[track], **options)
    verdict.reasons += unread
    return verdict


def test_six_honest_runs_pass(tmp_path):
    verdict = judged(write_logs(tmp_path))
    assert verdict.passed, list(map(str, verdict.reasons))
    assert verdict.result["num_runs"] == 6 and verdict.result["seeds"] == list(range(6))
    assert verdict.result["tokens"] == 409_600
    assert verdict.result["curve"]["tokens"][-1] == 409_600
    assert verdict.result["hardware"] == "Example CPU"


def broken(name, **changes):
    """Six runs, of which the last differs from the rules in one way."""
    return pytest.param(changes, name, id=name + "-" + "-".join(changes))


@pytest.mark.parametrize("changes, name", [
    broken("source-differs", sources={"train_gpt.py": "print('other')\n"}),
    broken("recipe-differs", recipe={"lr": 0.1}),
    broken("steps-differ", steps=80),
    broken("track-differs", track="short"),
    broken("data-differs", data_digest="cd" * 32),
    broken("hardware-differs", environment={"cpu": "Another CPU"}),
    broken("wrong-hardware", environment={"device": "cuda"}),
    broken("same-seed", seed=0),
    broken("resumed", resumed=True),
    broken("unreadable", tokens=100),
    broken("unreadable", tokens_per_s=100),
    broken("unreadable", train_time_ms=1000),
    broken("unreadable", num_iterations=90),
    broken("unreadable", environment={"command": "train_gpt.py --seed 4"}),
    broken("unreadable", environment={"tokens_per_step": [[0, 2048]]}, tokens=204_800),
    broken("unreadable", recipe={"num_iterations": 99}),
    broken("missing-fact", tokens="many"),
    broken("missing-fact", recipe={"batch_stages": 5}),
    broken("missing-run", seed=7),
    broken("no-source", sources={}),
    broken("incomplete", status="preempted"),
])
def test_each_rule_names_the_run_that_breaks_it(tmp_path, changes, name):
    paths = write_logs(tmp_path)
    paths[5].unlink()
    write_log(paths[5], **({"seed": 5, "curve_seed": 5} | changes))
    verdict = judged(paths)
    assert name in verdict.names(), list(map(str, verdict.reasons))
    where = "" if name == "missing-run" else "run5.txt"
    assert any(r.name == name and r.where == where for r in verdict.reasons)


def test_a_difference_that_is_named_is_allowed(tmp_path):
    paths = write_logs(tmp_path)
    paths[5].unlink()
    write_log(paths[5], 5, sources={"train_gpt.py": "print('x')\n",
                                    "data/loader.py": "x = 1\nno_newline = True"})
    assert judged(paths).names() == {"source-differs"}
    verdict = judged(paths, differs=["train_gpt.py"])
    assert verdict.passed and "differs between runs, as named" in verdict.notes[0]


def test_a_copy_is_a_copy_under_any_name_and_seed(tmp_path):
    paths = write_logs(tmp_path)
    shutil.copy(paths[0], tmp_path / "other.txt")
    paths.append(tmp_path / "other.txt")
    paths.append(write_log(tmp_path / "seeded.txt", 77, curve_seed=1))
    found = [r for r in judged(paths).reasons if r.name == "duplicate-run"]
    assert [(r.where, r.text) for r in found] == [
        ("other.txt", "the same clock as run0.txt"), ("seeded.txt", "the same clock as run1.txt")]
    assert judged(paths).result["num_runs"] == 6  # each counts once


def test_too_few_runs_and_how_many_more(tmp_path):
    verdict = judged(write_logs(tmp_path, 3))
    assert "too-few-runs" in verdict.names()
    assert "2 more runs (5 in all)" in check.outlook(verdict, tmp_path)


def test_a_mean_above_the_target(tmp_path):
    paths = [write_log(tmp_path / f"{s}.txt", s, loss=TARGET + 0.001 * s) for s in range(6)]
    verdict = judged(paths)
    assert verdict.names() == {"above-target", "not-significant"}
    assert "no number of runs would do" in check.outlook(verdict, tmp_path)


def test_a_mean_on_the_target_reaches_it(tmp_path):
    paths = [write_log(tmp_path / f"{s}.txt", s, loss=TARGET + 0.001 * (s - 2)) for s in range(5)]
    assert judged(paths).names() == {"not-significant"}


def test_losses_that_are_all_equal_prove_nothing(tmp_path):
    paths = [write_log(tmp_path / f"{s}.txt", s, loss=1.8) for s in range(5)]
    [reason] = judged(paths).reasons
    assert reason.name == "not-significant" and "not independent" in reason.text


def test_the_corpus_and_fields_that_a_track_prescribes(tmp_path, monkeypatch, pocket):
    fixed = dataclasses.replace(pocket, data_digest="ef" * 32, fixed={"model.num_layers": 3})
    monkeypatch.setitem(rules.TRACKS, "pocket", fixed)
    verdict = judged(write_logs(tmp_path))
    assert verdict.names() == {"data-differs", "fixed-field"}
    assert any(r.text == "model.num_layers: expected 3, got 2" for r in verdict.reasons)


LINE = "step:10/10 val_loss:{} train_time:1000ms step_avg:100.00ms\n"


def public(folder, losses, num_gpus=8):
    """Public logs with code, so that nothing but the numbers decides."""
    for i, loss in enumerate(losses):
        (folder / f"{i}.txt").write_text(
            "import torch\n" + "=" * 100 + "\nRunning PyTorch 2.9 compiled for CUDA 12.6 on "
            f"NVIDIA H100 with world_size {num_gpus}\n"
            + LINE.format(loss).replace("1000", str(1000 + i)))
    return sorted(folder.glob("*.txt"))


def test_a_systems_record_needs_no_p_but_the_target(tmp_path):
    paths = public(tmp_path, ["3.2790", "3.2799", "3.2801"])
    assert judged(paths, "short").names() == {"not-significant"}
    verdict = judged(paths, "short", systems_only=True)
    assert verdict.passed and "exempt" in verdict.notes[0]


def test_the_steps_track_counts_with_a_known_spread(tmp_path):
    paths = public(tmp_path, ["3.27656", "3.27675"])
    assert judged(paths, "steps").passed
    paths = public(tmp_path, ["3.27756", "3.27775"])
    verdict = judged(paths, "steps")
    assert verdict.names() == {"not-significant"}
    assert check.outlook(verdict, tmp_path) == "1 more runs would do if the mean stays"


def test_the_medium_track_asks_for_p_as_well(tmp_path):
    assert judged(public(tmp_path, ["2.9190", "2.9191", "2.9192"]), "medium").passed
    verdict = judged(public(tmp_path, ["2.9190", "2.9201", "2.9191"]), "medium")
    assert verdict.names() == {"not-significant"}


def test_the_hardware_of_a_track(tmp_path):
    paths = public(tmp_path, ["3.2700", "3.2701"], num_gpus=4)
    assert "wrong-hardware" in judged(paths, "short").names()
    assert "wrong-hardware" not in judged(public(tmp_path, ["3.2700", "3.2701"]), "short").names()


def test_an_unfinished_run_is_named_and_not_counted(tmp_path):
    paths = public(tmp_path, ["3.2700", "3.2701", "3.2702"])
    paths[0].write_text(paths[0].read_text().replace("step:10/10", "step:9/10"))
    verdict = judged(paths, "short")
    assert verdict.result["num_runs"] == 2 and "incomplete" in verdict.names()


def test_what_is_no_log_is_named(tmp_path):
    (tmp_path / "stderr.txt").write_text("W0506 a warning\n")
    assert judged([tmp_path / "stderr.txt"]).names() == {"not-a-log", "too-few-runs"}


# --- from logs to a record ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six logs, and a repository with the record of them, finished, and a README with a table."""
    place = tmp_path_factory.mktemp("made")
    root = place / "repo" / "records"
    shutil.copytree(history.FOLDER / "data", root / "data")
    (root.parent / "README.md").write_text(f"# x\n\n{table.BEGIN}\n{table.END}\n\nend\n")
    logs = write_logs(place / "logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rules.TRACKS, "pocket", POCKET)
        assert run(root, "add", *logs, "--name", "first", "--by", "@me") == 0
        answer(next((root / "pocket").iterdir()))
        assert run(root, "table", "--markdown") == 0
    return place


@pytest.fixture
def root(made, tmp_path, capsys):
    """The records folder of a copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    capsys.readouterr()
    return tmp_path / "repo" / "records"


def run(root, *words) -> int:
    return main(["--root", str(root), *map(str, words)])


def answer(folder):
    """What the author does: replace every question by prose."""
    text = (folder / "README.md").read_text()
    for question in check_questions(text):
        text = text.replace(f"<!-- write: {question} -->", "It is deeper.")
    (folder / "README.md").write_text(text)


def check_questions(text):
    from records import readme

    return readme.unanswered(text)


def record(root):
    return next((root / "pocket").glob("*_first"))


def test_a_record_holds_everything_once(root, tmp_path):
    folder = record(root)
    assert folder.name == "2026-11-20_first"
    held = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert held == ["README.md", "curves.png", "curves.svg",
                    *(f"logs/run{s}.txt" for s in range(6)), "result.json"]
    store = root / "sources"
    assert {str(p.relative_to(store)).split(".py.")[0] for p in store.rglob("*.gz")} == \
        {"data/loader", "train_gpt"}
    assert not any("print('hello')" in p.read_text() for p in (folder / "logs").iterdir())
    for seed in range(6):
        [here], [there] = parse(folder / f"logs/run{seed}.txt"), parse(tmp_path /
                                                                      f"logs/run{seed}.txt")
        assert here.digest == there.digest and here.complete
    result = json.loads((folder / "result.json").read_text())
    assert result["logs"]["run0.txt"] == parse(folder / "logs/run0.txt")[0].digest
    assert run(root, "check") == 0


def test_check_says_ok_and_shows_the_numbers(root, capsys):
    assert run(root, "check", record(root)) == 0
    said = capsys.readouterr().out
    assert said.startswith("ok") and "pocket: n = 6, loss mean" in said and "p = " in said


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def stored(folder):
    """train_gpt.py of the record, in records/sources."""
    [path] = (folder.parents[1] / "sources").glob("train_gpt.py.*.gz")
    return path


def change_digit(folder):
    log = folder / "logs/run3.txt"
    line = next(x for x in log.read_text().splitlines() if x.startswith("step:100/100 val_loss"))
    digits = line.split()[1]
    edit(log, digits, digits[:-4] + "7000")


def cut_last_log(folder):
    log = folder / "logs/run3.txt"
    data = log.read_bytes()
    log.write_bytes(data[: data.rindex(b"step:100/100 val_loss:") + 24])


@pytest.mark.parametrize("tamper, names", [
    (change_digit, {"edited", "stale-result"}),
    (cut_last_log, {"incomplete", "unreadable", "stale-result"}),
    (lambda f: (f / "logs/run3.txt").unlink(), {"stale-result"}),
    (lambda f: stored(f).write_bytes(gzip.compress(b"print('HELLO')\n")), {"edited"}),
    (lambda f: stored(f).write_bytes(stored(f).read_bytes()[:-9]), {"edited"}),
    (lambda f: stored(f).write_text("print('hello')\n"), {"edited"}),
    (lambda f: stored(f).unlink(), {"edited"}),
    (lambda f: edit(f / "result.json", '"p": ', '"p": 1'), {"stale-result", "stale-readme"}),
    (lambda f: edit(f / "result.json", '"num_runs": 6', '"num_runs": 7'),
     {"stale-result", "stale-readme"}),
    (lambda f: edit(f / "README.md", "n = 6", "n = 9"), {"stale-readme"}),
    (lambda f: edit(f / "README.md", "It is deeper.", "<!-- write: What? -->"), {"unwritten"}),
    (lambda f: (f / "curves.png").unlink(), {"broken-folder"}),
    (lambda f: (f / "result.json").write_text("{"), {"broken-folder"}),
    (lambda f: edit(f / "result.json", '"differs": []', '"differs": 5'), {"broken-folder"}),
    (lambda f: edit(f / "result.json", '"mean"', '"men"'), {"broken-folder"}),
    (lambda f: edit(f / "result.json", '"val_loss": {', '"val_loss": {}, "x": {'),
     {"broken-folder"}),
    (lambda f: edit(f / "result.json", '"name": "first"', '"name": "../../../first"'),
     {"broken-folder"}),
    (lambda f: edit(f / "result.json", '"name": "first"', '"name": "a\\u001b[1A"'),
     {"broken-folder"}),
    (lambda f: edit(f / "result.json", '"2026-11-20"', '"2026-11-19"'),
     {"broken-folder", "stale-readme"}),
    (lambda f: edit(f / "result.json", '"kind": "record"', '"kind": "great"'), {"broken-folder"}),
    (lambda f: (f / "README.md").write_text("<!--" * 5_000_000), {"broken-folder"}),
    (lambda f: shutil.rmtree(f / "logs"), {"too-few-runs"}),
])
def test_check_finds_a_record_that_was_tampered_with(root, tamper, names):
    tamper(record(root))
    verdict = check.check_folder(record(root), root)
    assert names <= verdict.names(), list(map(str, verdict.reasons))
    assert run(root, "check", record(root)) == 1


def test_a_log_of_another_run_does_not_pass_as_this_one(root, tmp_path):
    shutil.copy(write_log(tmp_path / "other.txt", 99), record(root) / "logs/run3.txt")
    assert check.check_folder(record(root), root).names() == {"stale-result", "missing-run"}


@pytest.mark.parametrize("path, old, new", [
    ("README.md", "| 45:00 |", "| 44:00 |"), ("README.md", "6 |", "5 |"),
    ("records/TABLES.md", "45:00", "44:00"),
])
def test_a_stale_table_is_found_and_written_again(root, capsys, path, old, new):
    edit(root.parent / path, old, new)
    assert run(root, "check") == 1
    assert "stale-table: " in capsys.readouterr().out
    assert run(root, "table", "--markdown") == 0 and run(root, "check") == 0


def test_a_new_fact_makes_the_tables_stale(root):
    path = root / "data/history.json"
    text = path.read_text().replace('"minutes": 45.0', '"minutes": 46.0')
    assert table.stale((root.parent / "README.md").read_text(), root) == []
    path.write_text(text)
    history.public_records.cache_clear()
    try:
        assert len(table.stale((root.parent / "README.md").read_text(), root)) == 2
    finally:
        history.public_records.cache_clear()


def test_add_refuses_what_check_would_refuse(root, tmp_path, capsys):
    few = write_logs(tmp_path / "few", 3)
    assert run(root, "add", *few, "--name", "second") == 1
    said = capsys.readouterr().err
    assert "too-few-runs: expected at least 5 runs that ended, got 3" in said
    assert "more runs" in said and said.endswith("Nothing was written.\n")
    assert [p.name for p in (root / "pocket").iterdir()] == ["2026-11-20_first"]


def test_a_record_must_be_ahead_of_the_one_before(root, tmp_path, capsys):
    more = write_logs(tmp_path / "more", 6, steps=120)
    assert run(root, "add", *more, "--name", "second") == 1
    assert "not-better: second: 492K tokens, the record before it (first) needs 410K tokens" in \
        capsys.readouterr().err
    assert run(root, "add", *more, "--name", "reference", "--baseline") == 0
    fewer = write_logs(tmp_path / "fewer", 6, steps=80)
    assert run(root, "add", *fewer, "--name", "second") == 0
    assert [r["name"] for r in history.own_records("pocket", root)] == ["second", "first",
                                                                     "reference"]
    assert check.read_result(root / "pocket/2026-11-20_second")["prior"] == "first"


def race(folder, a=None, b=None, b_ms=18.0, runs=3):
    """The folder of a finished race, by default of the first record and of a faster program."""
    sides = {"a": a or {}, "b": (b or {"sources": FAST}) | {"step_ms": b_ms}}
    logs = {side: [write_log(folder / side / f"{i}.txt", i, **changes) for i in range(runs)]
            for side, changes in sides.items()}
    (folder / "race.json").write_text(json.dumps({"runs": {
        side: [{"log": f"{side}/{log.name}"} for log in logs[side]] for side in "ab"}}))
    return folder / "race.json"


FAST = {"train_gpt.py": "fast = 1\n"}


def test_equal_tokens_need_a_race_against_the_record_before(root, tmp_path, capsys):
    logs = write_logs(tmp_path / "fast", 6, step_ms=15.0, sources=FAST)
    add_it = ["add", *logs, "--name", "second"]
    assert run(root, *add_it) == 1
    assert "no-race: times are compared side by side only" in capsys.readouterr().err
    for name, why, facts in (
        ("slow", "not-better", {"b_ms": 20.0}),
        ("other", "the race was not between the prior record's program", {"a": {"sources": FAST}}),
        ("recipe", "each with its recipe", {"b": {"sources": FAST, "recipe": {"lr": 3}}}),
        ("one", "no-race: expected two runs of each side", {"runs": 1}),
        ("machine", "hardware-differs: a_0.txt", {"a": {"environment": {"cpu": "Slow CPU"}}}),
    ):
        assert run(root, *add_it, "--race", race(tmp_path / name, **facts)) == 1
        assert why in capsys.readouterr().err, name
    assert run(root, *add_it, "--race", race(tmp_path / "good", b_ms=15.0)) == 0
    folder = root / "pocket/2026-11-20_second"
    assert "B is faster than A by 2" in (folder / "README.md").read_text()
    assert len(list((folder / "race").iterdir())) == 6
    answer(folder)
    run(root, "table", "--markdown")
    assert run(root, "check") == 0
    typed = json.loads((folder / "result.json").read_text())
    typed["race"]["b"]["times_ms"] = [100.0, 101.0, 99.0]
    (folder / "result.json").write_text(json.dumps(typed))
    assert "stale-result" in check.check_folder(folder, root).names()


@pytest.mark.parametrize("words, why", [
    (["--name", "a b"], "--name"), (["--name", "first"], "already"),
    (["--name", "x", "--race", "nothing.json"], "--race"),
])
def test_add_explains_what_it_cannot_use(root, tmp_path, capsys, words, why):
    logs = write_logs(tmp_path / "again", 6, steps=80)
    assert run(root, "add", *logs, *words) == 2
    assert why in capsys.readouterr().err


def test_add_wants_one_log_for_each_run(root, tmp_path, capsys):
    logs = write_logs(tmp_path / "two", 6, steps=80)
    logs[0].write_bytes(logs[0].read_bytes() + logs[5].read_bytes())
    assert run(root, "add", *logs[:5], "--name", "second") == 1
    assert "expected one run in each log" in capsys.readouterr().err


def test_a_version_of_a_source_is_kept_once_for_all_records(root, tmp_path):
    before = {p: p.read_bytes() for p in (root / "sources").rglob("*.gz")}
    logs = write_logs(tmp_path / "vary", 6, steps=80, sources={**SOURCES, "muon.py": "x = 1\n"})
    assert run(root, "add", *logs, "--name", "second") == 0
    new = {p: p.read_bytes() for p in (root / "sources").rglob("*.gz")}
    assert before.items() <= new.items() and len(new) == len(before) + 1
    stray = root / "sources/muon.py.0123456789abcdef.gz"
    stray.write_bytes(b"")
    tables = table.check_all(root)[-1][1]
    assert [(r.name, r.where) for r in tables.reasons] == [
        ("broken-folder", f"sources/{stray.name}")]


def test_a_named_difference_is_kept_with_the_record(root, tmp_path):
    logs = write_logs(tmp_path / "vary", 6, steps=80)
    logs[5].unlink()
    write_log(logs[5], 5, steps=80, sources={"train_gpt.py": "print('other')\n",
                                             "data/loader.py": "x = 1\nno_newline = True"})
    assert run(root, "add", *logs, "--name", "second", "--differs", "train_gpt.py") == 0
    folder = root / "pocket/2026-11-20_second"
    assert len(list((root / "sources").glob("train_gpt.py.*.gz"))) == 2
    answer(folder)
    assert check.check_folder(folder, root).passed


def test_nothing_is_left_behind_when_writing_fails(root, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(add.plot, "draw", fails)
    before = list((root / "sources").rglob("*.gz"))
    logs = write_logs(tmp_path / "b", 6, steps=80, sources={"train_gpt.py": "new = 1\n"})
    assert run(root, "add", *logs, "--name", "second") == 2
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in (root / "pocket").iterdir()] == ["2026-11-20_first"]
    assert list((root / "sources").rglob("*.gz")) == before


def test_a_reason_can_be_waived_by_name(tmp_path, capsys):
    paths = public(tmp_path, ["3.2700", "3.2701", "3.2702"], num_gpus=4)
    assert main(["check", *map(str, paths), "--track", "short"]) == 1
    said = capsys.readouterr().out
    assert said.count("wrong-hardware") == 1
    assert "wrong-hardware: 0.txt and 2 more: expected 8 GPUs, got 4" in said
    assert main(["check", *map(str, paths), "--track", "short", "--waive", "wrong-hardware"]) == 0
    assert "waived wrong-hardware" in capsys.readouterr().out
    assert main(["check", *map(str, paths), "--track", "short", "--waive", "nonsense"]) == 2
    assert main(["check", *map(str, paths)]) == 2  # nothing in a public log says its track
    assert "--track" in capsys.readouterr().err


def test_a_log_is_evidence_for_one_record_only(root, tmp_path, capsys):
    logs = write_logs(tmp_path / "c", 6, steps=80)
    assert run(root, "add", *logs, "--name", "second") == 0
    assert run(root, "add", *logs, "--name", "third", "--baseline") == 1
    assert "duplicate-run: run0.txt: the same clock as run0.txt of the record second" in \
        capsys.readouterr().err


def test_the_record_before_cannot_be_left_out(root, tmp_path):
    logs = write_logs(tmp_path / "c", 6, steps=80,
                      environment={"started": "2026-11-25T10:00:00Z"})
    assert run(root, "add", *logs, "--name", "second") == 0
    folder = root / "pocket/2026-11-25_second"
    edit(folder / "result.json", '"prior": "first"', '"prior": null')
    assert "not-better" in check.check_folder(folder, root).names()


def test_a_broken_record_does_not_hide_the_others(root, tmp_path, capsys):
    logs = write_logs(tmp_path / "c", 6, steps=80)
    assert run(root, "add", *logs, "--name", "second") == 0
    (record(root) / "result.json").write_text("[]")
    assert run(root, "check") == 1
    said = capsys.readouterr().out
    assert "FAIL  pocket/2026-11-20_first" in said and "broken-folder" in said
    assert "pocket/2026-11-20_second" in said


def test_a_run_may_be_entered_for_a_track_with_the_same_goal(tmp_path):
    path = write_log(tmp_path / "a.txt", track="short", loss=3.27)
    assert "track-differs" not in judged([path], "solo").names()
    assert "track-differs" not in judged([path], "steps").names()
    assert "track-differs" in judged([path], "medium").names()
    assert "track-differs" in judged([path], "pocket").names()


STAGED = {"recipe": {"batch_stages": [100, 200, 300], "extension_steps": 10}}  # until 2026-11-28
SAID = STAGED | {"environment": {"tokens_per_step": [[0, 100], [30, 200], [60, 300]]}}


@pytest.mark.parametrize("grows", [STAGED, SAID])
def test_tokens_follow_from_a_batch_that_grows(tmp_path, grows):
    """Three sizes over 90 of 100 steps, then ten more steps of the last."""
    log = write_log(tmp_path / "a.txt", **grows, tokens=30 * 100 + 30 * 200 + 40 * 300)
    [run] = parse(log)
    assert check.contradictions(run) == []
    assert [run.tokens_at(s) for s in (0, 1, 30, 31, 60, 61, 90, 100)] == \
        [0, 100, 3000, 3200, 9000, 9300, 18_000, 21_000]
    assert judged([log]).result["curve"]["tokens"] == [0, 2000, 5000, 9000, 15_000, 21_000]
    [run] = parse(write_log(tmp_path / "b.txt", **grows))
    assert check.contradictions(run) == [
        "its tokens are 409600 in the closing block, 21000 by its steps and batch"]


def test_a_batch_that_cannot_be_read_is_named(tmp_path):
    log = write_log(tmp_path / "a.txt", environment={"tokens_per_step": "4096"})
    [run] = parse(log)
    assert run.tokens_at(5) is None
    [fault] = run.faults
    assert fault == "tokens_per_step: expected [[0, TOKENS], [STEP, TOKENS], ...], got '4096'"
