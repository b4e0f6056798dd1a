"""The ladder command: what it keeps, where it goes on, and what its page says."""

import json
import math
import xml.etree.ElementTree

import pytest

from records import __main__ as command
from records import ladder

RUNGS = {record: f"recipe {record}" for record in (2, 3, 4, 5, 6, 8)}
GAINS = {3: 0.02, 4: 0.17, 5: 0.3, 6: 0.0, 8: 0.05}


def made_run(record: int, seed: int, loss: float) -> dict:
    curve = [[0, 5.0], [50, (5.0 + loss) / 2], [100, loss]]
    return {"record": record, "seed": seed, "val_loss": loss, "tokens": 200_000,
            "num_iterations": 100, "parameters": 800_000 + record, "threads": 1,
            "train_time_ms": 30_000.0 + record, "curve": curve, "options": [],
            "fingerprint": f"recipe {record}", "data_digest": "d", "commit": "c"}


def made_runs(seeds: int = 3) -> list[dict]:
    """Losses fall by GAINS; each seed moves all rungs together, and each run a little."""
    runs, loss = [], 2.2
    for record in (2, *GAINS):
        loss -= GAINS.get(record, 0.0)
        for seed in range(seeds):
            noise = 0.003 * ((record * 7 + seed * 3) % 5 - 2)
            runs.append(made_run(record, seed, loss + 0.1 * seed + noise))
    return runs


def test_gains_are_paired_by_seed():
    """The seeds lie 0.1 apart; their common part must not enter the gain or its error."""
    rows = {row["record"]: row for row in ladder.rungs(made_runs())}
    assert rows[2]["gains"] == [] and math.isnan(rows[2]["gain"])
    for record, gain in GAINS.items():
        assert rows[record]["gain"] == pytest.approx(gain, abs=0.012)
        assert 0 < rows[record]["error"] < 0.01


def test_verdicts_tell_gains_from_chance():
    runs = made_runs() + [made_run(9, seed, 2.9 + 0.1 * seed) for seed in range(3)]
    rows = ladder.rungs(runs)
    freedom = sum(len(row["gains"]) - 1 for row in rows if row["gains"])
    words = {row["record"]: ladder.verdict(row, freedom) for row in rows}
    assert words == {2: "", 3: "helps", 4: "helps", 5: "helps", 6: "within noise", 8: "helps",
                     9: "hurts"}


def test_one_seed_gives_gains_without_a_verdict():
    rows = ladder.rungs(made_runs(seeds=1))
    assert rows[1]["gain"] == pytest.approx(0.02, abs=0.02) and math.isnan(rows[1]["error"])
    assert ladder.verdict(rows[1], 0) == ""
    page = ladder.page(made_runs(seeds=1), there=[2, 3, 4, 5, 6, 7, 8, 9])
    assert "Validation here" not in page
    assert "nan" not in page and "±" not in page and "Help at this scale" not in page
    assert "no verdicts" in page
    assert "Not run yet: #7, #9." in page


def test_a_missing_seed_pairs_what_is_there():
    runs = [run for run in made_runs() if (run["record"], run["seed"]) != (4, 1)]
    rows = {row["record"]: row for row in ladder.rungs(runs)}
    assert (rows[4]["n"], len(rows[4]["gains"]), len(rows[5]["gains"])) == (2, 2, 2)


def test_tokens_to_a_loss():
    run = made_run(6, 0, 2.0)   # 5.0, 3.5, 2.0 at 0, 100,000 and 200,000 tokens
    assert ladder.tokens_to(run, 3.5) == pytest.approx(100_000)
    assert ladder.tokens_to(run, 2.75) == pytest.approx(150_000)
    assert math.isnan(ladder.tokens_to(run, 1.9))


def test_rank_correlation_with_the_published_ladder():
    """Published token savings over the rung before: #3 27%, #4 11%, #5 18%, #6 none, #8 10%."""
    rows = ladder.rungs([made_run(2, 0, 3.0)] + [
        made_run(record, 0, loss) for record, loss in
        ((3, 2.0), (4, 1.9), (5, 1.4), (6, 1.4), (8, 1.37))])
    rho, p, num = ladder.rank_correlation(rows)
    assert rho == pytest.approx(1.0) and num == 5
    assert p == pytest.approx(2 / 120, abs=0.005)  # two of 120 orders are as good


def test_the_error_of_a_gain_pools_the_rungs():
    """Gains 1, 3 and 5, 5, 5 around their own means: the pooled variance is 2 / 3."""
    rows = [{"gains": [1.0, 3.0]}, {"gains": [5.0, 5.0, 5.0]}, {"gains": [7.0]}]
    assert ladder._spread(rows) == pytest.approx((2 / 3) ** 0.5)
    assert math.isnan(ladder._spread([{"gains": [1.0]}]))


def test_a_ladder_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Seed by seed, rung by rung; a run that fails costs nothing of what was kept."""
    asked = []

    def run_once(record, seed, options, threads, fingerprint):
        if (record, seed) == (4, 1) and len(asked) < 6:
            raise ValueError("record 4, seed 1: the disk is full")
        asked.append((record, seed))
        return made_run(record, seed, 2.0)

    monkeypatch.setattr(ladder, "run_once", run_once)
    kept = tmp_path / "data" / "ladder.jsonl"
    with pytest.raises(ValueError, match="disk is full"):
        ladder.run_missing(kept, RUNGS, [2, 3, 4], 2, [], jobs=1, threads=1)
    assert asked == [(2, 0), (3, 0), (4, 0), (2, 1), (3, 1)]
    asked.append("again")
    ladder.run_missing(kept, RUNGS, [2, 3, 4], 2, [], jobs=1, threads=1)
    assert asked[-1] == (4, 1) and len(ladder.read(kept)) == 6


def test_times_come_from_short_runs_in_turns(tmp_path, monkeypatch, capsys):
    asked = []

    def run_once(record, seed, options, threads, fingerprint):
        asked.append(record)
        return made_run(record, seed, 2.0) | {"tokens": 1000, "train_time_ms": record * 100.0
                                              + len(asked)}

    monkeypatch.setattr(ladder, "run_once", run_once)
    monkeypatch.setattr(ladder, "known_rungs", lambda options: RUNGS)
    monkeypatch.setattr(ladder, "TARGET", 2.1)
    (tmp_path / "data").mkdir()
    kept = "".join(json.dumps(run) + "\n" for run in made_runs())
    (tmp_path / "data" / "ladder.jsonl").write_text(kept)
    assert command.main(["--root", str(tmp_path), "ladder", "--times", "3",
                         "--records", "2,8"]) == 0
    capsys.readouterr()
    assert asked == [2, 8] * 3 and (tmp_path / "data" / "ladder.jsonl").read_text() == kept
    rows = {row["record"]: row for row in ladder.rungs(
        made_runs(), ladder.read(tmp_path / "data" / "ladder_times.jsonl"))}
    assert rows[2]["seconds"] == pytest.approx(200_000 * 0.203 / 1000)
    assert rows[8]["seconds"] == pytest.approx(200_000 * 0.804 / 1000)
    to_target = [ladder.tokens_to(run, 2.1) for run in made_runs() if run["record"] == 8]
    assert rows[8]["seconds_to_target"] == pytest.approx(sum(to_target) / 3 * 0.804 / 1000)
    assert math.isnan(rows[2]["seconds_to_target"]) and math.isnan(rows[3]["seconds"])
    assert f" {200 * 0.203:.1f} |  | " in (tmp_path / "LADDER.md").read_text()


def test_a_changed_recipe_is_run_again(tmp_path, monkeypatch):
    """A number of the recipe as it was must not stand in the table of what it is."""
    asked = []
    monkeypatch.setattr(ladder, "run_once", lambda record, seed, *_: asked.append(record) or (
        made_run(record, seed, 1.9) | {"fingerprint": "another"}))
    kept = tmp_path / "data" / "ladder.jsonl"
    kept.parent.mkdir()
    kept.write_text("".join(json.dumps(made_run(r, 0, 2.0)) + "\n" for r in (2, 3, 4)))
    changed = RUNGS | {3: "another"}
    ladder.run_missing(kept, changed, [2, 3, 4], 1, [], jobs=1, threads=1)
    assert asked == [3]
    losses = {run["record"]: run["val_loss"] for run in ladder.current(ladder.read(kept), changed)}
    assert losses == {2: 2.0, 3: 1.9, 4: 2.0}


def test_a_fingerprint_is_of_what_is_trained_and_differs_from_the_defaults():
    defaults = {"record": 2, "model": {"num_layers": 12, "yarn": False}, "matrix_lr": 0.05,
                "val_tokens": 5, "target": None}
    recipe = defaults | {"record": 6, "model": {"num_layers": 4, "yarn": False}, "matrix_lr": 0.1}
    digest = ladder.fingerprint(recipe, defaults)
    assert digest == ladder.fingerprint(recipe | {"val_tokens": 20, "target": 1.7}, defaults)
    assert digest != ladder.fingerprint(recipe | {"matrix_lr": 0.2}, defaults)
    yarn = recipe | {"model": {"num_layers": 4, "yarn": True}}
    assert digest != ladder.fingerprint(yarn, defaults)
    # a field that came later, and that this recipe leaves at its default
    later = {**defaults, "gates": 0, "model": {**defaults["model"], "xsa": False}}
    given = {**recipe, "gates": 0, "model": {**recipe["model"], "xsa": False}}
    assert digest == ladder.fingerprint(given, later)


def test_a_spoilt_line_is_named(tmp_path):
    kept = tmp_path / "ladder.jsonl"
    kept.write_text(json.dumps(made_run(2, 0, 2.0)) + "\n{half a li")
    with pytest.raises(ValueError, match="line 2"):
        ladder.read(kept)


def test_the_command_writes_page_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ladder, "known_rungs", lambda options: RUNGS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ladder.jsonl").write_text(
        "".join(json.dumps(run) + "\n" for run in made_runs()))
    assert command.main(["--root", str(tmp_path), "ladder", "--report"]) == 0
    said = capsys.readouterr().out.split()
    assert [path.rpartition("/")[2] for path in said] == ["LADDER.md", "ladder.png", "ladder.svg"]
    page = (tmp_path / "LADDER.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row.split()[1] for row in rows] == ["2", "3", "4", "5", "6", "8"]
    assert "Help at this scale: #3, #4, #5, #8." in page
    assert "Cannot be told from chance here: #6." in page and "changed with #6." in page
    xml.etree.ElementTree.parse(tmp_path / "ladder.svg")
    before = page, (tmp_path / "ladder.svg").read_bytes()
    command.main(["--root", str(tmp_path), "ladder", "--report"])
    assert before == ((tmp_path / "LADDER.md").read_text(), (tmp_path / "ladder.svg").read_bytes())


@pytest.mark.parametrize("words, says", [
    (["--report"], "expected runs of the present recipes, found none"),
    (["--seeds", "0"], "whole numbers from 1"),
    (["--records", "6,25"], "got 25"),
])
def test_wrong_options_are_one_line(tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.setattr(ladder, "known_rungs", lambda options: {2: "", 6: ""})
    assert command.main(["--root", str(tmp_path), "ladder", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said


def test_the_rungs_are_those_that_the_trainer_knows():
    import recipes

    rungs = ladder.known_rungs(["--val_tokens", "65536"])
    assert list(rungs) == list(recipes.RECORDS) and rungs == ladder.known_rungs()
    assert rungs[6] != ladder.known_rungs(["--matrix_lr", "0.3"])[6]
    with pytest.raises(ValueError, match="--options"):
        ladder.known_rungs(["--nonsense", "1"])


@pytest.mark.parametrize("count, said", [("65536", True), ("131072", False)])
def test_the_page_says_where_it_validates_on_less_than_the_track(count, said):
    runs = [run | {"options": ["--val_tokens", count]} for run in made_runs(seeds=1)]
    assert ("over the first 65,536 tokens, the track's over 131,072" in ladder.page(runs)) == said
