"""The HellaSwag score against a slow loop, and what people can get wrong."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

import recipes
from conftest import tiny_options
from data import corpus
from tools import hellaswag
from trainer import checkpoint, options

CONTEXTS = ["A man", "She opens the door and then", "",
            "Two children play with a ball. One of them"]


def scenes(labels=(0, 1, 2, 3)):
    return [hellaswag.Scene(context, tuple(f"{word} {context[::-1][:n]}" for n, word in enumerate(
        ("runs", "sits down and waits", "é", "falls off the roof"))), label)
        for context, label in zip(CONTEXTS, labels)]


def model_of(record):
    extra = ("--batch_stages", "768,1536,1536") if record == 62 else ()
    recipe = options.parse(tiny_options("--record", record, "--seq_len", 128, "--num_layers", 4,
                                         "--batch_tokens", 1536, *extra), has_cuda=False)[1]
    model = recipes.build_model(recipe, seed=0)
    with torch.no_grad():  # out of the zeros of the start
        for n, p in enumerate(model.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    model.set_phase(recipes.eval_phase(recipe.num_iterations, recipe))
    return model.eval(), recipe


@torch.no_grad()
def slowly(model, scene):
    """Sum and mean of each ending's losses, token by token, a row at a time, without padding."""
    found = []
    for text in scene.endings:
        ending = list(map(int, corpus.encode(" " + text)))
        tokens = [corpus.BOS, *map(int, corpus.encode(scene.context)), *ending]
        x_TC = model.hidden(torch.tensor([tokens[:-1]], dtype=torch.int32))[0]
        logits_TV = model.logits(x_TC)[:, :257].double()
        losses = [F.cross_entropy(logits_TV[t], torch.tensor(tokens[t + 1]))
                  for t in range(len(tokens) - 1)][-len(ending):]
        found.append((sum(losses).item(), sum(losses).item() / len(losses)))
    return torch.tensor(found)


@pytest.mark.parametrize("record", [1, 6, 12, 62])
@pytest.mark.parametrize("num_tokens", [1, 400, 10_000])
def test_losses_of_endings_are_those_of_a_slow_loop(record, num_tokens, monkeypatch):
    model, _ = model_of(record)
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", num_tokens)
    expected = [slowly(model, scene) for scene in scenes()]
    done = []
    for some, rows in hellaswag.batches(scenes(), corpus.encode, corpus.BOS, 128, num_tokens):
        assert len(some) == 1 or max(len(t) for t, _ in rows) * len(rows) <= num_tokens
        done.append(hellaswag.ending_losses(model, rows))
    torch.testing.assert_close(torch.cat(done).float(), torch.cat(expected), rtol=1e-5, atol=1e-4)
    best = [tuple(losses.argmin(0).tolist()) for losses in expected]
    labels = [by_mean for _, by_mean in best]
    by_sum = sum(a == b for a, b in best)
    assert hellaswag.score(model, scenes(labels)) == (by_sum, 4)
    assert hellaswag.score(model, scenes([(label + 1) % 4 for label in labels]))[1] == 0


def test_what_is_longer_than_a_row_loses_its_beginning():
    scene = hellaswag.Scene("abc" * 50, ("x" * 5, "y" * 200), 0)
    (short, five), (long, all_of_it) = hellaswag.rows_of(scene, corpus.encode, corpus.BOS, 128)
    assert len(short) == len(long) == 129 and (five, all_of_it) == (6, 128)
    assert corpus.decode(short).endswith("abc xxxxx")
    losses = hellaswag.ending_losses(model_of(6)[0], [(short, five), (long, all_of_it)])
    assert losses.isfinite().all()


def test_the_interval_is_that_of_the_library():
    from scipy.stats import binomtest

    for right, total in ((2967, 10_042), (1, 1), (0, 40)):
        interval = binomtest(right, total).proportion_ci(method="wilson")
        said = re.search(r"interval (\S+) to (\S+)\)", hellaswag.report((0, right), total))
        for number, bound in zip(said.groups(), interval):
            assert abs(float(number) - 100 * bound) < 0.06


def written(folder, lines):
    path = folder / "scenes.jsonl"
    path.write_text("\n".join(lines))
    return path


def line(**changes):
    return json.dumps({"ctx": "A", "endings": ["a", "b", "c", "d"], "label": 1} | changes)


def test_the_command_scores_a_saved_model(tmp_path, capsys):
    model, recipe = model_of(6)
    checkpoint.save(tmp_path / "run.pt", {
        "kind": "model", "run_id": "run", "step": 0, "recipe": recipes.to_dict(recipe),
        "model": model.state_dict()})
    path = written(tmp_path, [line(), line(label="2"), line()])
    assert hellaswag.main([str(tmp_path / "run"), "--file", str(path)]) == 0
    assert "of 3 scenes" in capsys.readouterr().out
    assert hellaswag.main([str(tmp_path / "run"), "--file", str(path), "--limit", "2"]) == 0
    assert "of 2 scenes" in capsys.readouterr().out
    for words, says in ((["--limit", "0"], "--limit"), (["--file", str(tmp_path / "no")], "no"),
                        (["--file", str(written(tmp_path, [line(), line(label=4)]))], "line 2")):
        assert hellaswag.main([str(tmp_path / "run"), *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and says in said


@pytest.mark.parametrize("broken", ["{", "[]", line(label="x"), line(endings=[]), '{"ctx": "A"}'])
def test_what_is_no_scene_is_said_with_its_line(tmp_path, broken):
    with pytest.raises(ValueError, match="line 2: expected JSON with ctx, endings and label"):
        hellaswag.read_scenes(written(tmp_path, [line(), broken]))
    with pytest.raises(ValueError, match="empty"):
        hellaswag.read_scenes(written(tmp_path, []))


def test_a_line_of_u2028_is_one_line(tmp_path):
    path = tmp_path / "scenes.jsonl"
    path.write_text('{"ctx": "a pot.\u2028(He", "endings": ["a", "b"], "label": 0}\n'
                    '{"ctx": "c", "endings": ["d", "e"], "label": "1"}\n', encoding="utf-8")
    assert [scene.context for scene in hellaswag.read_scenes(path)] == ["a pot.\u2028(He", "c"]


def test_what_is_fetched_is_whole_or_not_there(tmp_path, monkeypatch):
    source, path = written(tmp_path, [line()] * 3), tmp_path / "val.jsonl"
    with pytest.raises(OSError, match=r"expected 10,042 scenes, got 3.*--file"):
        hellaswag.fetch(path, source.as_uri())
    with pytest.raises(OSError, match="cannot fetch HellaSwag"):
        hellaswag.fetch(path, (tmp_path / "nothing").as_uri())
    assert [p.name for p in tmp_path.iterdir()] == ["scenes.jsonl"]
    monkeypatch.setattr(hellaswag, "NUM_SCENES", 3)
    assert hellaswag.fetch(path, source.as_uri()).read_bytes() == source.read_bytes()
    source.unlink()
    assert hellaswag.fetch(path, source.as_uri()) == path  # it is there: no network
