"""Records of this repository, edited by someone who closes the logs again: what check refuses."""

import gzip
import hashlib
import json
import re
import shutil
import time

import pytest
from records_runs import write_log

from records import check, history, readme
from records.__main__ import main
from records.log import parse, read_lines

BEST, BEFORE, FIRST = "fewest-steps", "record-27-at-pocket-scale", "record-62-at-pocket-scale"


@pytest.fixture
def root(tmp_path):
    """A records folder with a copy of the newest record; the others are links, for speed."""
    root = tmp_path / "repo" / "records"
    shutil.copytree(history.FOLDER / "sources", root / "sources")
    (root / "pocket").mkdir()
    for folder in (history.FOLDER / "pocket").iterdir():
        if folder.name.endswith(BEST):
            shutil.copytree(folder, root / "pocket" / folder.name)
        else:
            (root / "pocket" / folder.name).symlink_to(folder)
    (root / "data").symlink_to(history.FOLDER / "data")
    return root


def folder_of(root, name=BEST):
    return next(root.glob(f"pocket/*_{name}"))


def reclose(log, edit):
    """The log as if it had been closed with the text that `edit` makes of it."""
    text = log.read_text()
    log.write_text(edit(text[: text.index("marks: ")]))
    digest = hashlib.sha256(b"".join(read_lines(log))).hexdigest()
    log.write_text(f"{log.read_text()}digest: {digest}\n")


def reclose_all(folder, edit):
    for log in (folder / "logs").iterdir():
        reclose(log, edit)


def retell(folder, **facts):
    """result.json and README.md with the numbers that the logs give now, and these facts."""
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    result = check.check_folder(folder, folder.parents[1]).result
    path.write_text(json.dumps(result))
    text = folder / "README.md"
    text.write_text(readme.renew(text.read_text(), result))


def scaled(factor, *names):
    """Multiply these fields of the step lines."""
    def edit(text):
        return re.sub(rf"({'|'.join(names)}):(\d+)(\.\d+)?ms", lambda m: (
            f"{m[1]}:{float(m[2] + (m[3] or '')) * factor:.{2 if m[3] else 0}f}ms"), text)
    return edit


def raised(by):
    return lambda text: re.sub(r"(?<=val_loss:) ?(\d\.\d+)", lambda m: f"{float(m[1]) + by:.4f}",
                               text.replace("final_val_loss: ", "final_val_loss:")).replace(
                                   "final_val_loss:", "final_val_loss: ")


def without_recipe(folder):
    reclose_all(folder, lambda t: re.sub(r"begin recipe.*end recipe\n", "", re.sub(
        r"\ntokens: \d+", "\ntokens: 1000", t), flags=re.DOTALL))


def without_worst(folder):
    worst = max((folder / "logs").iterdir(), key=lambda p: parse(p)[0].final_val_loss)
    worst.unlink()


def copied(folder):
    """Another record's logs, each validation a little worse, as a reference of its own."""
    other = folder.with_name("2026-11-22_mine")
    shutil.copytree(folder, other)
    reclose_all(other, raised(0.0003))
    retell(other, name="mine", kind="baseline", prior=None)
    return other


def dated(folder):
    retell(folder, date="2026-11-20")
    text = json.loads((folder / "result.json").read_text()) | {"date": "2026-11-20"}
    (folder / "result.json").write_text(json.dumps(text))
    return folder.rename(folder.with_name("2026-11-20_" + BEST))


def linked(folder):
    outside, log = folder.parents[2] / "outside.txt", next((folder / "logs").glob("*s3*"))
    outside.write_bytes(b"".join(read_lines(log)))
    log.unlink()
    log.symlink_to(outside)


ATTACKS = {
    "recipe": (without_recipe, "missing-fact: RUN and 5 more: it does not say its recipe"),
    "seed": (lambda f: reclose_all(f, lambda t: re.sub(r"\nseed: \d", "", t)),
             "missing-fact: RUN and 5 more: it does not say its seed"),
    "times": (lambda f: reclose_all(f, scaled(0.5, "train_time", "step_avg")),
              "unreadable: RUN: its training time in ms is 22195 in the closing block, 11098 in "
              "the last line"),
    "averages": (lambda f: reclose_all(f, lambda t: scaled(0.5, "train_time")(t)),
                 "unreadable: RUN: line LINE: step_avg is 92.48 ms, train_time gives 46.24 ms a "
                 "step: one of them was changed"),
    "speed": (lambda f: reclose_all(f, lambda t: re.sub(
        r"train_time_ms: (\d+)", lambda m: f"train_time_ms: {float(m[1]) * 0.5:.0f}",
        scaled(0.5, "train_time", "step_avg")(t))),
              "unreadable: RUN: its tokens a second are 16609 in the closing block, 33217 by its "
              "tokens and time"),
    "steps": (lambda f: reclose_all(f, lambda t: t.replace("/240 ", "/239 ").replace(
        "step:240/", "step:239/")),
              "unreadable: RUN and 5 more: its steps are 240 in the recipe, 239 in the last line"),
    "date": (dated, "stale-result: 2026-11-20_fewest-steps: date: result.json has 2026-11-20, the "
                    "logs give 2026-11-22"),
    "prior": (lambda f: retell(f, prior=FIRST),
              f"not-better: {BEST}: its prior is {FIRST}, the record before it is {BEFORE}"),
    "no prior": (lambda f: retell(f, prior=None),
                 f"not-better: {BEST}: its prior is none, the record before it is {BEFORE}"),
    "copy": (copied, f"duplicate-run: RUN: the same clock as RUN of the record {BEST}"),
    "worst run": (without_worst,
                  "missing-run: seed 2 is missing: the seeds and commands of the runs say 0 to 5"),
    "link": (linked, "broken-folder: 2026-11-22_fewest-steps: logs/20261122-101022_r27_pocket_s3_"
                     "065b.txt: expected a plain file, found a symbolic link"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_edited_record_is_refused_in_one_line(root, capsys, name):
    attack, line = ATTACKS[name]
    folder = attack(folder_of(root)) or folder_of(root)
    if name not in ("date", "prior", "no prior", "copy", "link"):
        retell(folder)
    assert main(["--root", str(root), "check", str(folder)]) == 1
    said = capsys.readouterr().out
    said = re.sub(r"20261122\S+_s\d_[0-9a-f]{4}\.txt(?!:? expected)", "RUN", said)
    assert line in re.sub(r"line \d+", "line LINE", said)


def test_what_check_cannot_prove_it_says(root, capsys):
    """All losses lowered alike are consistent: only the program, run again, gives them away."""
    folder = folder_of(root)
    reclose_all(folder, raised(-0.1))
    retell(folder)
    assert main(["--root", str(root), "check", str(folder)]) == 0
    assert "not proven: that the runs were made" in capsys.readouterr().out


FORGED = "x\n\x1b[2Kok  pocket/2026-11-22_fewest-steps"


def test_no_text_of_a_log_can_forge_a_line(tmp_path, capsys):
    log = tmp_path / f"{FORGED.replace('/', '_')}.txt"
    log.write_text("Running PyTorch 2.9 compiled for CUDA 12.6 on NVIDIA \x1b[2Kok H100 with "
                   "world_size 4\nstep:9/9 val_loss:3.2000 train_time:90ms step_avg:10.00ms\n")
    assert main(["check", str(tmp_path), "--track", "short"]) == 1
    ours = write_log(tmp_path / "ours.txt", track=FORGED, environment={"cpu": "\x1b[2K\u202e"})
    for words in (["check", str(ours), "--track", "pocket"], ["rank", str(ours), "--track", "solo"],
                  ["reproduce", str(ours), "--dry-run", "--into", str(tmp_path / "again")],
                  ["check", str(tmp_path / FORGED)]):
        main(words)
        out, err = capsys.readouterr()
        assert not re.search(r"[^ -~\n]", out + err) and "\nok" not in out + err
    assert parse(ours)[0].environment["cpu"] == r"\x1b[2K\u202e"


def zipped(path, data):
    path.write_bytes(gzip.compress(data, 1))
    return path


HEAD = b"nanogpt speedrun log 1\n"
STEP = b"step:%d/99999999 val_loss:3.2800 train_time:%dms step_avg:1.00ms\n"


@pytest.mark.parametrize("data", [
    HEAD + b"begin source a.py lines=999999999 newline=1 sha256=" + b"0" * 64 + b"\n" * 10**6,
    HEAD + b"begin environment lines=9999999\n" + b"\n" * 10**6,
    HEAD + b"begin steps\nbegin result\n" + b"".join(b"a%d: b\n" % i for i in range(10**5)),
    b"\n" * 10**6,
    b"import torch\n" + STEP % (1, 1) * 10**5,
    b"".join(STEP % (i, i) for i in range(60_000)),
], ids=["source", "environment", "result", "empty", "code", "validations"])
def test_a_small_file_cannot_cost_much(tmp_path, data):
    """Tens of KB in gzip: before, up to minutes."""
    path, begun = zipped(tmp_path / "x.txt.gz", data), time.process_time()
    runs = parse(path)
    assert time.process_time() - begun < 10
    assert any("the rest was not read" in fault for run in runs for fault in run.faults)


def test_a_file_that_cannot_be_read_stops_nothing(root, capsys):
    (root / "pocket" / f"2026-11-22_{BEFORE}").unlink()
    shutil.copytree(history.FOLDER / f"pocket/2026-11-22_{BEFORE}", folder_of(root).with_name(
        f"2026-11-22_{BEFORE}"))
    logs = folder_of(root) / "logs"
    (logs / "dead.txt").symlink_to("nowhere")
    (root / "pocket" / "dead").symlink_to("nowhere")
    assert main(["--root", str(root), "check", str(logs)]) == 1
    said = capsys.readouterr().out
    assert "n = 6" in said and "unreadable: dead.txt: the file: No such file" in said
    assert main(["--root", str(root), "check"]) == 1
    said = capsys.readouterr().out
    assert "logs/dead.txt: expected a plain file, found a symbolic link" in said
    assert f"ok  pocket/2026-11-22_{BEFORE}" in said


def test_a_name_does_not_lead_out_of_the_folder(root, capsys):
    path = folder_of(root) / "result.json"
    path.write_text(path.read_text().replace(f'"{BEST}"', '"../../../out"', 1))
    assert main(["--root", str(root), "reproduce", str(path.parent), "--dry-run"]) == 2
    assert "name as [A-Za-z0-9]" in capsys.readouterr().err
    assert not list(root.parent.parent.glob("out*"))
