"""Tables, ranks and plots: computed from the data, readable, in step with this repository."""

import csv
import hashlib
import json
import math
import re
from itertools import pairwise

import pytest
from records_runs import write_logs

from conftest import FACTS
from records import check, history, plot, rank, rules, table
from records.__main__ import main
from records.log import parse


def test_this_repository_passes_its_own_check():
    for label, verdict in table.check_all():
        assert verdict.passed, (label, list(map(str, verdict.reasons)))


# --- history --------------------------------------------------------------------------------------


def digest(rows) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def test_the_published_history_and_curves_are_unchanged():
    """Digests of the rows that were compared one by one with the published records and logs."""
    told = ("track", "number", "date", "minutes", "kind", "title", "changed", "contributors")
    rows = [[record[key] for key in told] for record in history.public_records()]
    assert (len(rows), digest(rows)) == (112, "d6e9b763ef8fae3b")
    with open(history.FOLDER / "data" / "curves.csv") as file:
        points = [[row[key] for key in ("track", "record", "step", "val_loss", "train_time_ms")]
                  for row in csv.DictReader(file)]
    assert (len(points), digest(points)) == (1950, "e6cec0770fcd0582")


def test_tokens_follow_from_the_ladder():
    ladder = json.loads((FACTS / "ladder.json").read_text())
    known = {r["number"]: r for r in history.public_records() if r["track"] == "short"
             and r["kind"] == "record"}
    for number, entry in ladder.items():
        if number != "_meta":
            record = known[89 if number == "84" else int(number)]  # #89 links a log of #84
            assert record["tokens"] == entry["schedule"]["tokens_total"]
            assert record["steps"] == entry["schedule"]["steps"]
    batch = ladder["29"]["schedule"]["batch_tokens"]
    assert batch == ladder["31"]["schedule"]["batch_tokens"]
    assert known[30]["tokens"] == known[30]["steps"] * batch


def test_curves_end_where_the_records_do():
    for name in ("short", "medium"):
        for curve in history.published_curves(name):
            assert curve.steps == tuple(sorted(curve.steps)) and curve.steps[0] == 0
            if curve.times_ms is not None:
                assert curve.times_ms[-1] / 60_000 == pytest.approx(curve.minutes, rel=0.1)
    clocks = [c for c in history.published_curves("short") if c.times_ms is None]
    assert [c.label for c in clocks] == ["#88"]  # its log was made on another machine


def test_first_at_is_the_first_crossing():
    curve = history.Curve("x", 1.0, (0, 10, 20, 30), (9.0, 4.0, 4.5, 3.0), (0.0, 10.0, 20.0, 30.0),
                        None)
    assert curve.first_at(4.0, "steps") == 10
    assert curve.first_at(6.5, "train_time_ms") == 5.0
    assert curve.first_at(3.5, "steps") == pytest.approx(20 + 10 * 1.0 / 1.5)
    assert curve.first_at(2.9, "steps") is None and curve.first_at(4.0, "tokens") is None


@pytest.mark.parametrize("ms, said", [
    (0, "0.0s"), (45_230, "45.2s"), (99_949, "99.9s"), (99_951, "1:40"), (184_800, "3:05"),
    (3_599_400, "59:59"), (3_599_600, "1:00:00"), (3_729_000, "1:02:09"), (None, "-"),
    (math.nan, "-"),
])
def test_clock(ms, said):
    assert history.clock(ms) == said


def test_clock_with_tenths():
    assert history.clock(22.98 * 60_000, tenths=True) == "22:58.8"
    assert history.clock(22.99 * 60_000, tenths=True) == "22:59.4"
    assert history.clock(119_970, tenths=True) == "2:00"
    assert history.clock(31.4 * 60_000, tenths=True) == "31:24"


@pytest.mark.parametrize("value, said", [
    (1390, "1,390"), (19_560, "19.6K"), (740e6, "740M"), (2.674e9, "2.67B"), (12e6, "12.0M"),
    (None, "-"),
])
def test_count(value, said):
    assert history.count(value) == said


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 72, 80, 100, 132, 200])
@pytest.mark.parametrize("name", rules.TRACKS)
def test_a_table_fits_its_terminal(width, name):
    track = rules.TRACKS[name]
    lines = table.terminal(track, table.rows(track), width).splitlines()
    assert max(map(len, lines)) <= width
    if track.published:
        header = lines[2].split()
        assert {"record", "date", "time", "steps", "changed"} <= set(header)
        assert len(lines) == 3 + len(table.rows(track))


def test_the_command_prints_them_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["table"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in rules.TRACKS)
    assert re.search(r"^#92 +2026-08-30 +39\.9s +1,194 ", said, re.MULTILINE)
    assert main(["table", "nowhere"]) == 2


def test_json_holds_every_row(capsys):
    assert main(["table", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    public = {name: [r for r in rows[name] if not r["own"]] for name in rows}
    assert len(public["short"]) == 94 and len(public["medium"]) == 18
    row = next(r for r in rows["short"] if r["label"] == "#75")
    assert (row["num_runs"], row["mean"], row["p"]) == (4, 3.2785, 0.005983)
    assert row["evidence"] == "4 logs"


def test_milestones_each_take_at_most_four_fifths():
    found = table.milestones(table.rows(rules.TRACKS["short"]))
    assert (found[0].label, found[-1].label) == ("#1", "#92")
    times = [row.time_ms for row in found]
    assert all(b <= 0.8 * a for a, b in pairwise(times[:-1]))


@pytest.mark.parametrize("text", ["nothing", f"{table.BEGIN} only", f"{table.END}\n{table.BEGIN}",
                                  f"{table.BEGIN}{table.END}{table.BEGIN}{table.END}"])
def test_a_readme_without_its_markers_is_said(text):
    with pytest.raises(ValueError, match="expected the markers"):
        table.replaced(text, table.all_rows())


def test_text_around_the_markers_stays():
    found = table.all_rows()
    text = table.replaced(f"before\n{table.BEGIN}\na stale row\n{table.END}\nafter\n", found)
    assert text.startswith(f"before\n{table.BEGIN}\n") and text.endswith(f"{table.END}\nafter\n")
    assert "a stale row" not in text and table.replaced(text, found) == text
    assert table.stale(text) == []


# --- rank -----------------------------------------------------------------------------------------


def test_a_record_is_its_own_neighbour():
    curve = next(c for c in history.published_curves("short") if c.label == "#18")
    i = 6
    line = rank.progress("short", curve.losses[i], curve.times_ms[i], 0, step=curve.steps[i],
                          num_iterations=curve.steps[-1])
    assert "#18" in line and "\n" not in line
    projected = float(re.search(r"heading for (\S+) at", line)[1])
    assert projected == pytest.approx(curve.losses[-1], abs=0.03)
    assert history.clock(curve.times_ms[-1])[:2] in line.partition("heading for")[2]


def test_progress_names_the_records_before_and_after():
    line = rank.progress("short", 3.35, 200_000, 0)
    before, after = re.search(r"behind #(\d+) \(\S+\), ahead of #(\d+)", line).groups()
    curves = {c.label: c for c in history.published_curves("short")}
    assert curves[f"#{before}"].first_at(3.35, "train_time_ms") <= 200_000
    assert curves[f"#{after}"].first_at(3.35, "train_time_ms") > 200_000


def test_a_short_run_is_not_forecast_by_records_ten_times_as_long():
    """After 6 of 40 steps one was "heading for 1.67, within target", and ended at 2.61."""
    of_record = {"num_iterations": 341, "step": 60}
    curve = history.own_curves("pocket")[0]
    loss, tokens = curve.at_fraction(60 / 341), int(60 / 341 * curve.tokens[-1])
    assert "heading for" in rank.progress("pocket", loss, 4e3, tokens, **of_record)
    assert "heading for" not in rank.progress("pocket", loss, 4e3, tokens // 8, **of_record)


def test_progress_at_the_ends():
    assert "the last of all" in rank.progress("short", 3.5, 9e6, 0)
    assert "the first of all" in rank.progress("short", 3.5, 1e3, 0)
    assert "below every published curve" in rank.progress("short", 2.0, 1e3, 0)
    assert rank.progress("short", 10.8, 0, 0, step=0) == "short: 10.8000 before the first step"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_bad_loss_is_said_and_ends_nothing(loss):
    assert "no record is like that" in rank.progress("short", loss, 1e3, 0, step=1)
    assert "no place" in rank.rank("short", 1e3, 0, loss)


@pytest.mark.parametrize("name", rules.TRACKS)
@pytest.mark.parametrize("step", [None, 0, 1, 50, 99, 100])
def test_every_track_has_a_line_at_every_step(name, step):
    for tokens in (None, 0, 1000):
        line = rank.progress(name, 3.5, 1000.0, tokens, step=step, num_iterations=100,
                              history=[(0, 9.0, 0), (10, 5.0, 100.0), (20, 4.0, 200.0)])
        assert line.startswith(f"{name}: ") and "\n" not in line


def test_the_slope_is_used_where_there_is_no_curve(tmp_path):
    history = [(s, 5.0 - math.log(s)) for s in (10, 20, 40)]
    line = rank.progress("solo", 5.0 - math.log(80), 8000.0, 0, step=80, num_iterations=160,
                          history=history, folder=tmp_path)
    end = 5.0 - math.log(160)
    assert f"heading for {end:.2f} at this slope at 16.0s" in line


def test_rank_places_a_run_among_the_records(tmp_path):
    (tmp_path / "data").symlink_to(history.FOLDER / "data")  # the public records alone
    assert "with 39.0s place 1 of 93, ahead of #92 (39.9s)" in \
        rank.rank("short", 39_000, 0, 3.279, folder=tmp_path)
    assert "place 93 of 93, behind #1 (45:00)" in \
        rank.rank("short", 6e6, 0, 3.28, folder=tmp_path)
    assert "3.2801 is above the target 3.28" in rank.rank("short", 6e4, 0, 3.2801)
    with pytest.raises(ValueError, match="expected one of short"):
        rank.rank("long", 1, 1, 1.0)


def test_a_run_on_other_data_has_no_place():
    track, own = rules.TRACKS["pocket"], {"data_digest": "0" * 64}
    assert "no place: the run is on other data" in rank.rank("pocket", 1.0, 10, 1.0, **own)
    said = rank.progress("pocket", 1.5, 1.0, 10, step=5, num_iterations=10, **own)
    assert said == "pocket: 1.5000 on other data than the track's, no record to compare with"
    same = {"data_digest": track.data_digest}
    assert "place 1 of" in rank.rank("pocket", 1.0, 10, 1.0, **same)
    assert "place 1 of" in rank.rank("short", 1.0, 10, 1.0, **own)  # it prescribes none


def test_as_many_tokens_as_a_record_is_level_with_it():
    (best, tokens), *_ = sorted(((r["name"], history.metric_value(r, "tokens"))
                                 for r in history.own_records("pocket")), key=lambda r: r[1])
    level = rank.rank("pocket", 1.0, tokens, 1.6)
    assert f"level with {best}, where a race decides" in level and f"ahead of {best}" not in level
    assert f"ahead of {best}" in rank.rank("pocket", 1.0, tokens - 1, 1.6)


def test_a_program_without_the_data_has_a_line_too(tmp_path):
    assert "no record yet to compare with" in rank.progress("short", 3.5, 1e3, 0, folder=tmp_path)
    assert "place 1 of 1" in rank.rank("short", 1e3, 0, 3.2, folder=tmp_path)


def test_rank_says_the_same_of_a_finished_log(tmp_path, capsys):
    [log] = write_logs(tmp_path, 1, data_digest=rules.TRACKS["pocket"].data_digest)
    assert main(["rank", str(log)]) == 0
    lines = capsys.readouterr().out.splitlines()
    run = parse(log)[0]
    assert len(lines) == len(run.points) + 1
    point = run.points[2]
    assert lines[2] == f"step:{point.step}/100 " + rank.progress(
        "pocket", point.val_loss, point.train_time_ms, 4096 * point.step, step=point.step,
        num_iterations=100, history=[(p.step, p.val_loss) for p in run.points[:3]])
    assert main(["rank", str(log), "--track", "short", "--every", "9"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_log_of_a_record_is_not_ranked_against_itself(tmp_path, capsys):
    log = next((history.FOLDER / "pocket/2026-11-22_fewest-steps/logs").iterdir())
    assert main(["rank", str(log)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "this is the log of fewest-steps"
    (tmp_path / "89.txt").write_text("step:1390/1390 val_loss:3.2775 train_time:79532ms "
                                     "step_avg:57.22ms\n")  # of #89
    assert main(["rank", str(tmp_path / "89.txt"), "--track", "short"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "this is the log of #89"


@pytest.mark.parametrize("text, status, said", [
    ("stderr\n", 2, "found no measurement"),
    ("step:5/9 val_loss:3.2 train_time:9ms step_avg:2ms\n", 1, "stopped at step 5 of 9"),
])
def test_rank_of_what_is_no_finished_run(tmp_path, capsys, text, status, said):
    (tmp_path / "x.txt").write_text(text)
    assert main(["rank", str(tmp_path / "x.txt"), "--track", "short"]) == status
    assert said in "".join(capsys.readouterr())


# --- plots ----------------------------------------------------------------------------------------


def test_a_plot_is_png_and_svg_and_the_same_each_time(tmp_path):
    logs = write_logs(tmp_path, 2)
    words = ["plot", f"mine={logs[0]}", f"mine={logs[1]}", "--title", "two runs"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    png, svg = (tmp_path / "a.png").read_bytes(), (tmp_path / "a.svg").read_text()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    for text in ("mine (n = 2)", "two runs", "training time", "training tokens", "validation loss"):
        assert text in svg
    assert (tmp_path / "b.png").read_bytes() == png and (tmp_path / "b.svg").read_text() == svg


def test_a_plot_passes_over_logs_without_a_measurement(tmp_path, capsys):
    """`records plot logs/*.txt` after a --profile, which measures no loss."""
    profiled = tmp_path / "profiled.txt"
    profiled.write_text("stopped after step 8: profiled, which is all it was for: no record\n")
    (log,) = write_logs(tmp_path, 1)
    assert main(["plot", str(profiled), str(log), "--out", str(tmp_path / "new" / "a")]) == 0
    assert "passed over not-a-log: profiled.txt" in capsys.readouterr().err
    assert (tmp_path / "new" / "a.png").is_file()
    assert main(["plot", str(profiled), "--out", str(tmp_path / "b")]) == 2
    assert "expected at least one log with a measurement" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_published_curves_lie_behind(tmp_path):
    (tmp_path / "x.txt").write_text("".join(
        f"step:{s}/500 val_loss:{6 - s / 250:.4f} train_time:{s * 300}ms step_avg:300.00ms\n"
        for s in range(0, 501, 50)))
    runs = parse(tmp_path / "x.txt")
    plot.draw([("x", runs)], rules.TRACKS["short"], tmp_path / "with")
    plot.draw([("x", runs)], rules.TRACKS["short"], tmp_path / "without", published=False)
    assert "#89" in (tmp_path / "with.svg").read_text()
    assert "target 3.28" in (tmp_path / "with.svg").read_text()
    assert "#89" not in (tmp_path / "without.svg").read_text()
    assert "training tokens" not in (tmp_path / "with.svg").read_text()  # a public log says none


@pytest.mark.parametrize("words", [["plot", "nothing.txt"], ["rank", "nothing.txt"],
                                   ["check", "nothing.txt"], ["reproduce", "nothing.txt"]])
def test_a_missing_file_is_one_line(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "nothing.txt: expected" in said and said.count("\n") == 1


def test_the_guide_names_every_reason_and_track_as_they_are():
    guide = (history.FOLDER / "README.md").read_text()
    for name, rule in check.RULES.items():
        assert f"| `{name}` | {rule} |" in guide
    assert guide.count("\n| `") == len(check.RULES) + len(rules.TRACKS)
    for track in rules.TRACKS.values():
        assert f"| `{track.name}` |" in guide
        if track.published:
            assert f"to {track.target:g}" in guide


def test_on_slow_hardware_the_line_compares_by_tokens():
    record = next(c for c in history.published_curves("short") if c.label == "#6")
    i = 20
    line = rank.progress("short", record.losses[i], 50 * record.times_ms[i], record.tokens[i])
    assert "the last of all; by tokens (" in line
    assert "behind #6" in line.partition("by tokens")[2]
