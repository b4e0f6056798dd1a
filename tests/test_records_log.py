"""The run log: what is written is what is read, and nothing incomplete looks complete."""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records_runs import SOURCES, write_log, write_logs

from conftest import ROOT
from records.log import (
    LogError,
    RunLog,
    parse,
    read_lines,
    source_path,
    train_line,
    val_line,
    without_sources,
)

# the expression that fits the public logs since 2024-10
PUBLIC = re.compile(r"^step:(\d+)/(\d+) val_loss:(\d+\.\d+) train_time:(\d+)ms step_avg:(\S+)ms$")


def one(path):
    [run] = parse(path)
    return run


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "run.txt")


def test_what_is_written_is_read(log):
    [run] = parse(log, keep_sources=True)
    assert run.complete and not run.faults and not run.edits
    assert {name: source.text for name, source in run.sources.items()} == SOURCES
    for name, text in SOURCES.items():
        assert run.sources[name].sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert run.environment["cpu"] == "Example CPU" and run.python == "3.11.6"
    assert run.recipe["model"] == {"num_layers": 2}
    assert run.result["tokens"] == 409_600 and run.tokens == 409_600
    assert run.result["resumed"] is False and run.result["track"] == "pocket"
    assert [p.step for p in run.points] == [0, 20, 40, 60, 80, 100]
    assert run.last_train_step == run.final_step == 100
    text = log.read_text()
    assert text.splitlines()[-1] == f"digest: {run.digest}"
    above = text.encode()[: text.encode().rindex(b"digest: ")]
    assert hashlib.sha256(above).hexdigest() == run.digest


def test_the_validation_line_fits_the_public_logs():
    match = PUBLIC.match(val_line(1390, 1390, 3.27754, 79531.6))
    assert match.groups() == ("1390", "1390", "3.2775", "79532", "57.22")
    assert PUBLIC.match(val_line(0, 1390, 10.82584, 0.0))
    assert train_line(1, 9, 5.5, 21.4) == "step:1/9 train_loss:5.5000 train_time:21ms " \
                                          "step_avg:21.40ms"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@settings(max_examples=60, deadline=None)
@given(sources=st.dictionaries(st.sampled_from(["a.py", "b/c.py", "d.py"]), texts),
       notes=st.lists(texts, max_size=4), value=texts)
def test_any_text_survives(tmp_path_factory, sources, notes, value):
    path = tmp_path_factory.mktemp("log") / "run.txt"
    log = RunLog(path, sources, {"host": value}, {"text": value})
    for note in notes:
        log.line(note)
    log.val(1, 1, 2.5, 10)
    log.close({"status": "complete", "note": value})
    [run] = parse(path, keep_sources=True)
    assert not run.faults and not run.edits and run.complete
    assert {name: source.text for name, source in run.sources.items()} == sources
    assert run.recipe == {"text": value}
    assert run.final_val_loss == 2.5


def test_a_note_is_never_a_validation(tmp_path):
    log = small(tmp_path / "run.txt")
    log.line(val_line(2, 2, 1.5, 20))
    with pytest.raises(LogError, match="step 1, the run has 2"):
        log.close({"status": "complete"})
    assert [point.step for point in one(tmp_path / "run.txt").points] == [1]


def test_a_source_may_hold_a_whole_log(tmp_path, log):
    nested = tmp_path / "nested.txt"
    outer = RunLog(nested, {"old.py": log.read_text()}, {}, {})
    outer.val(1, 1, 2.5, 10)
    outer.close({"status": "complete"})
    assert one(nested).final_val_loss == 2.5


# --- never complete when it is not ----------------------------------------------------------------


def small(path, **result):
    log = RunLog(path, {}, {}, {})
    log.val(1, 2, 2.5, 10)
    return log


@pytest.mark.parametrize("lines, result, why", [
    ([], {"status": "complete"}, "no validation line"),
    ([(1, 2, 2.5, 10)], {"status": "complete"}, "step 1, the run has 2"),
    ([(2, 2, float("nan"), 10)], {"status": "complete"}, "final loss is nan"),
    ([(2, 2, 2.5, 10)], {"status": "complete", "final_val_loss": 2.4}, "2.4"),
    ([(2, 2, 2.5, 10)], {"status": "complete", "final_val_loss": "good"}, "good"),
    ([(2, 2, 1.2e6, 10)], {"status": "complete"}, "final loss is 1200000"),
    ([(2, 2, 2.5, 10)], {"status": "done"}, "expected one of"),
    ([(2, 2, 2.5, 10)], {}, "expected one of"),
    ([(2, 2, 2.5, 10)], {"status": "complete", "digest": "x"}, "result key"),
])
def test_a_run_that_did_not_end_cannot_be_closed_as_complete(tmp_path, lines, result, why):
    log = RunLog(tmp_path / "run.txt", {}, {}, {})
    for line in lines:
        log.val(*line)
    with pytest.raises(LogError, match=re.escape(why)):
        log.close(result)
    log.abandon()
    runs = parse(tmp_path / "run.txt")
    assert all(not run.complete for run in runs)


@pytest.mark.parametrize("status", ["preempted", "failed"])
def test_a_stopped_run_is_closed_and_not_complete(tmp_path, status):
    small(tmp_path / "run.txt").close({"status": status})
    run = one(tmp_path / "run.txt")
    assert run.digest and not run.complete and not run.faults


def test_an_exception_leaves_an_incomplete_log(tmp_path):
    with pytest.raises(RuntimeError), small(tmp_path / "run.txt") as log:
        log.val(2, 2, 2.5, 10)
        raise RuntimeError
    assert one(tmp_path / "run.txt").why_incomplete == "no valid closing block"


def test_lines_reach_the_file_at_once(tmp_path):
    log = small(tmp_path / "run.txt")
    assert (tmp_path / "run.txt").read_text().endswith(val_line(1, 2, 2.5, 10) + "\n")
    log.abandon()
    with pytest.raises(LogError, match="closed"):
        log.line("late")


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from records.log import RunLog
log = RunLog(sys.argv[1], {}, {}, {})
failed = ""
for step in range(1, 200):
    try:
        log.val(step, 199, 2.5, 10)
    except Exception as error:
        failed += type(error).__name__ + " "
try:
    log.close({"status": "complete"})
except Exception as error:
    failed += type(error).__name__
print(failed)
"""


def test_a_full_disk_raises_and_the_log_stays_incomplete(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "run.txt"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert names[0] == "OSError" and set(names[1:]) == {"LogError"}
    assert not one(tmp_path / "run.txt").complete


def test_a_disk_that_fills_at_the_end_leaves_no_digest(tmp_path, monkeypatch):
    log = small(tmp_path / "run.txt")
    log.val(2, 2, 2.5, 10)
    calls = []

    def fsync(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        log.close({"status": "complete"})
    assert "digest:" not in (tmp_path / "run.txt").read_text()
    assert not one(tmp_path / "run.txt").complete


@pytest.mark.parametrize("meddle, why", [
    (lambda path: path.unlink(), "removed"),
    (lambda path: path.rename(path.with_name("x")) and path.write_text("other"), "replaced"),
    (lambda path: os.truncate(path, 50), "something else wrote"),
    (lambda path: path.write_text(path.read_text().replace("2.5", "2.4")), "something else wrote"),
])
def test_a_log_that_somebody_else_touched_is_not_closed(tmp_path, meddle, why):
    path = tmp_path / "run.txt"
    log = small(path)
    log.val(2, 2, 2.5, 10)
    meddle(path)
    with pytest.raises(LogError, match=why):
        log.close({"status": "complete"})
    assert not path.exists() or not any(run.complete for run in parse(path))


def test_two_runs_never_share_a_log(tmp_path, log):
    with pytest.raises(FileExistsError, match="choose another run id"):
        RunLog(log, {}, {}, {})


@pytest.mark.parametrize("name", ["/etc/x.py", "../x.py", "a/../../x.py", "a b.py", "", "a\\b.py"])
def test_a_source_name_stays_inside_the_folder(tmp_path, name):
    with pytest.raises(LogError, match="source name"):
        RunLog(tmp_path / "run.txt", {name: ""}, {}, {})
    assert not (tmp_path / "run.txt").exists()


def test_a_recipe_with_nan_is_refused(tmp_path):
    with pytest.raises(ValueError):
        RunLog(tmp_path / "run.txt", {}, {}, {"lr": float("nan")})


# --- tampering ------------------------------------------------------------------------------------


def tampered(log, change) -> tuple[bytes, object]:
    before = log.read_bytes()
    after = change(before)
    assert after != before
    log.write_bytes(after)
    return before, one(log)


def line_of(data: bytes, text: bytes) -> int:
    return data[: data.index(text)].count(b"\n") + 1


def test_a_changed_digit_is_found_and_its_line_named(log):
    digits = re.search(rb"step:60/100 val_loss:(\S+)", log.read_bytes())
    before, run = tampered(log, lambda d: d.replace(digits[0], digits[0][:-1] + b"0"))
    assert not run.complete
    assert run.edits == [run.edits[0], f"line {line_of(before, digits[0])}: changed"]
    assert "digest does not fit" in run.edits[0]


def test_a_removed_line_is_found_and_its_place_named(log):
    def change(data):
        start = data.index(b"step:77/100")
        return data[:start] + data[data.index(b"\n", start) + 1 :]

    before, run = tampered(log, change)
    line = line_of(before, b"step:77/100")
    assert run.edits[1] == f"line {line}: 1 line removed before this one"


def test_an_added_line_is_found(log):
    before, run = tampered(log, lambda d: d.replace(b"step:77/100", b"a note\nstep:77/100"))
    assert run.edits[1] == f"line {line_of(before, b'step:77/100')}: 1 line added from here"


@pytest.mark.parametrize("old, new", [
    (b"tokens: 409600", b"tokens: 209600"), (b"status: complete", b"status: complet"),
    (b"3.11.6", b"3.11.7"), (b'"batch_tokens": 4096', b'"batch_tokens": 2048'),
    (b"seed: 0", b"seed: 9"), (b"digest: ", b"digest: 0"), (b"marks: ", b"marks: 00"),
])
def test_every_part_is_covered(log, old, new):
    _, run = tampered(log, lambda d: d.replace(old, new, 1))
    assert not run.complete and (run.edits or run.faults)


def test_a_swapped_source_is_named(log):
    _, run = tampered(log, lambda d: d.replace(b"print('hello')", b"print('HELLO')"))
    assert "source train_gpt.py is not the one this run used (sha256 differs)" in run.edits


def test_a_source_swapped_with_its_hash_is_still_found(log):
    old, new = b"print('hello')\n", b"print('HELLO')\n"
    _, run = tampered(log, lambda d: d.replace(old, new).replace(
        hashlib.sha256(old).hexdigest().encode(), hashlib.sha256(new).hexdigest().encode()))
    assert not run.complete and "digest does not fit" in run.edits[0]


def test_a_log_cut_anywhere_is_incomplete(tmp_path, log):
    data = log.read_bytes()
    cut = tmp_path / "cut.txt"
    for size in [*range(1, len(data), 97), *range(len(data) - 70, len(data))]:
        cut.write_bytes(data[:size])
        assert not any(run.complete for run in parse(cut)), size


def test_a_number_that_was_cut_is_not_a_loss(log):
    match = re.search(rb"step:60/100 val_loss:\S+ train_time:\d+ms", log.read_bytes())
    for end in range(len(b"step:60/100 val_loss:1"), len(match[0])):
        cut = log.read_bytes()[: match.start() + end]
        [run] = parse(cut)
        assert [p.step for p in run.points] == [0, 20, 40], cut[-30:]
        assert not run.complete


def test_two_logs_in_one_file_are_two_runs(tmp_path):
    a, b = write_logs(tmp_path, 2)
    a.write_bytes(a.read_bytes() + b.read_bytes())
    runs = parse(a)
    assert [run.result["seed"] for run in runs] == [0, 1]
    assert all(run.complete for run in runs)


def test_text_after_the_digest_is_found(log):
    _, run = tampered(log, lambda d: d + b"step:100/100 val_loss:1.0000 train_time:1ms "
                                         b"step_avg:1.00ms\n")
    assert not run.complete and "text after the closing block" in run.edits[0]


def test_a_clock_that_runs_backwards_is_a_fault(tmp_path):
    log = RunLog(tmp_path / "run.txt", {}, {}, {})
    log.val(1, 2, 2.6, 100)
    log.val(2, 2, 2.5, 90)
    log.close({"status": "complete"})
    assert "the clock runs backwards, 90 ms after 100 ms" in one(tmp_path / "run.txt").faults[0]


# --- sources kept once for all records ----------------------------------------------------------


def test_sources_can_be_kept_apart_from_the_log(tmp_path, log):
    kept, sources = without_sources(log)
    assert {name: body.decode() for name, body in sources.items()} == SOURCES
    assert b"print('hello')" not in kept
    thin = tmp_path / "records/pocket/a/logs/run.txt"
    thin.parent.mkdir(parents=True)
    thin.write_bytes(kept)
    assert any("train_gpt.py, data/loader.py" in edit for edit in one(thin).edits)
    store = tmp_path / "records/sources"
    for name, body in sources.items():
        path = source_path(store, name, hashlib.sha256(body).hexdigest())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(body))
    assert b"".join(read_lines(thin)) == log.read_bytes()
    [run] = parse(thin, keep_sources=True)
    assert run.complete and run.digest == one(log).digest
    assert {name: source.text for name, source in run.sources.items()} == SOURCES
    # a changed line is named by its number in the log as it was written
    line = line_of(log.read_bytes(), b"step:77/100")
    thin.write_bytes(kept.replace(b"step:77/100 train_loss", b"step:77/100 train_l0ss"))
    assert f"line {line}: changed" in one(thin).edits
    thin.write_bytes(kept.replace(b"kept source train_gpt.py", b"kept source ../../x.py"))
    assert not one(thin).complete
    shutil.rmtree(store / "data")
    thin.write_bytes(kept)
    assert any("data/loader.py" in edit for edit in one(thin).edits)


# --- hostile files --------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_garbage_is_read_without_an_error(data):
    for head in (b"", b"nanogpt speedrun log 1\n", b"nanogpt speedrun log 1\nbegin steps\n"):
        assert not any(run.complete for run in parse(head + data + b"\n"))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_log_with_random_damage_never_passes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "run.txt"
    whole = bytearray(write_log(path, steps=20).read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    runs = parse(bytes(whole))
    assert not any(run.complete and run.format == "ours" for run in runs)


def test_an_endless_line_is_not_kept(tmp_path):
    path = tmp_path / "run.txt"
    head = b"step:1/1 val_loss:1.0000 train_time:1ms step_avg:"
    path.write_bytes(head + b"9" * (5 << 20) + b"ms")
    assert not any(run.points for run in parse(path))


def test_a_source_with_an_endless_line_is_hashed_whole(tmp_path):
    text = "x = '" + "a" * 300_000 + "'\nstep:1/1 val_loss:1.0000 train_time:1ms step_avg:1.00ms\n"
    write_log(tmp_path / "run.txt", sources={"long.py": text})
    [run] = parse(tmp_path / "run.txt", keep_sources=True)
    assert run.complete and run.sources["long.py"].text == text


def test_a_log_that_claims_a_huge_source_ends(log):
    _, run = tampered(log, lambda d: d.replace(b"lines=1 ", b"lines=999999999 ", 1))
    assert not run.complete


def test_gzip_is_read_and_damaged_gzip_is_named(tmp_path, log):
    packed = tmp_path / "run.txt.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    assert one(packed).complete
    packed.write_bytes(gzip.compress(log.read_bytes())[:-30])
    [run] = parse(packed)
    assert not run.complete and any("cannot be read to its end" in f for f in run.faults)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the file of a log"):
        parse(tmp_path / "nothing.txt")
