"""Sampling and evaluation of a trained model."""

import io
import math

import numpy as np
import pytest
import torch
from test_hellaswag import model_of

import recipes
from data import corpus
from data.prepare import tokenize
from data.shards import write_shard
from tools import eval as evaluate
from tools import sample
from trainer import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A saved model with noise for weights."""
    model, recipe = model_of(6)
    path = tmp_path_factory.mktemp("run") / "run.pt"
    checkpoint.save(path, {"kind": "model", "run_id": "run", "step": 0,
                           "recipe": recipes.to_dict(recipe), "model": model.state_dict()})
    return str(path)


# --- sample ---------------------------------------------------------------------------------------

def drawn(logits, count=300, **options):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    generator = torch.Generator().manual_seed(0)
    return [sample.next_token(torch.tensor(logits), **options, generator=generator)
            for _ in range(count)]


def test_which_tokens_can_be_drawn():
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert set(drawn(logits)) == {0, 1, 2, 3}
    assert set(drawn(logits, temperature=0)) == {1}
    assert set(drawn(logits, top_k=2)) == {1, 3}
    assert set(drawn(logits, top_k=99)) == {0, 1, 2, 3}
    assert set(drawn(logits, top_p=0.39)) == {1}
    assert set(drawn(logits, top_p=0.41)) == {1, 3}
    assert set(drawn(logits, top_p=0.71)) == {1, 2, 3}
    # top_p is of what top_k leaves: 0.4 and 0.3 become 0.57 and 0.43.
    assert set(drawn(logits, top_k=2, top_p=0.56)) == {1}
    share = drawn(logits, count=1000).count(1) / 1000
    assert share == pytest.approx(0.4, abs=0.05)
    cold = drawn(logits, count=1000, temperature=0.5).count(1) / 1000
    assert cold == pytest.approx(0.16 / (0.01 + 0.16 + 0.04 + 0.09), abs=0.05)


def scripted(monkeypatch, text):
    tokens = list(text.encode())
    monkeypatch.setattr(sample, "tokens_after", lambda *_: iter(tokens))


def test_characters_come_whole_and_as_soon_as_they_are(monkeypatch):
    model, _ = model_of(6)
    scripted(monkeypatch, "aé語b")
    assert list(sample.stream(model, "", 9, 1.0, 0)) == ["a", "é", "語", "b", ""]
    monkeypatch.setattr(sample, "tokens_after", lambda *_: iter([97, 0xC3]))  # cut off
    assert "".join(sample.stream(model, "", 9, 1.0, 0)) == "a\ufffd"


@pytest.mark.parametrize("stop, expected", [
    (["END"], "one EN two "), (["two", "END"], "one EN "), (["never"], "one EN two END three"),
    (["o"], ""), (["three."], "one EN two END three")])
def test_text_ends_before_a_stop_and_none_of_it_is_shown(monkeypatch, stop, expected):
    model, _ = model_of(6)
    scripted(monkeypatch, "one EN two END three")
    assert "".join(sample.stream(model, "", 9, 1.0, 0, stop=stop)) == expected


def test_generate_is_deterministic_and_leaves_the_model_as_it_was():
    model, _ = model_of(6)
    texts = [sample.generate(model.train(mode), "ab", 12, 1.0, seed)
             for mode, seed in ((True, 1), (False, 1), (False, 2))]
    assert texts[0] == texts[1] != texts[2] and not model.training


def test_samples_from_the_command_line(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("héllo")
    words = [run, "--num_tokens", "6", "--top_k", "0", "--top_p", "0.9"]
    assert sample.main([*words, "--prompt_file", str(tmp_path / "prompt.txt"),
                        "--num_samples", "2", "--seed", "3"]) == 0
    first, second = capsys.readouterr().out.split("--- sample ")[1:]
    assert first.startswith("1 of 2, seed 3\nhéllo") and second.startswith("2 of 2, seed 4\nhéllo")
    monkeypatch.setattr("sys.stdin", io.StringIO("héllo"))
    assert sample.main([*words, "--prompt_file", "-", "--seed", "4"]) == 0
    assert capsys.readouterr().out == second.partition("\n")[2]
    assert sample.main([*words, "--prompt", "x" * 125]) == 0
    captured = capsys.readouterr()
    assert "up to 132 tokens; the model sees the last 128 at a time" in captured.err
    for wrong, says in ((["--top_p", "0"], "--top_p: expected a number above 0, at most 1"),
                        (["--top_k", "-1"], "--top_k: expected"), (["--stop", ""], "--stop"),
                        (["--num_samples", "0"], "--num_samples: expected"),
                        (["--prompt_file", str(tmp_path / "no")], "No such file"),
                        (["--prompt", "x", "--prompt_file", "-"], "expected no --prompt")):
        assert sample.main([run, *wrong]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


# --- evaluate -------------------------------------------------------------------------------------

@torch.no_grad()
def slow_loss(model, tokens, seq_len):
    """Token by token, each from those before it in its row; as in validation, of all logits."""
    total = 0.0
    for start in range(0, len(tokens) - 1, seq_len):
        row = torch.tensor([tokens[start:start + seq_len + 1]])
        logits = model.logits(model.hidden(row[:, :-1].int()))[0].double()
        total -= logits.log_softmax(-1).gather(1, row[0, 1:, None]).sum().item()
    return total


@pytest.mark.parametrize("count", [2, 128, 129, 130, 1000, 20_000])
def test_each_token_is_predicted_once(count, monkeypatch):
    monkeypatch.setitem(evaluate.BATCH_TOKENS, "cpu", 512)
    model, _ = model_of(6)
    tokens = np.random.default_rng(0).integers(0, 256, count).astype(np.uint16)
    tokens[::50] = corpus.BOS
    found = evaluate.score(model, iter(np.array_split(tokens, 7)), 128)
    assert found.tokens == count - 1
    assert found.num_bytes == count - 1 - np.count_nonzero(tokens[1:] == corpus.BOS)
    if count < 2000:
        expected = slow_loss(model, tokens.tolist(), 128)
        assert found.nats == pytest.approx(expected, rel=1e-5)


def test_scores_of_text_and_shards(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("né " * 50 + "<|endoftext|>two")
    assert evaluate.main([run, str(tmp_path / "*.txt")]) == 0
    output = capsys.readouterr().out
    size = 4 * 50 + 3
    assert f"over {size + 1:,} tokens" in output and f"over {size:,} bytes" in output
    # The same documents as shards.
    tokens = [256, *("né " * 50).encode(), 256, *b"two"]
    for part in ("train", "val"):
        write_shard(tmp_path / f"{part}.bin", np.array(tokens))
    assert evaluate.main([run, "--data_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == output
    loss = float(output.split()[1])
    assert f"perplexity {math.exp(loss):.1f}"[:14] in output


def test_what_cannot_be_evaluated_is_one_line(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    np.array([1, 2, 50256, 3, 4, 50256, 5, 6], "<u2").tofile(tmp_path / "t.bin")
    tokenize([tmp_path / "t.bin"], tmp_path / "gpt2")
    for words, says in (([], "expected one of: files of text, --data_dir, --hellaswag"),
                        (["a.txt", "--data_dir", "b"], "expected one of"),
                        ([str(tmp_path / "no.txt")], "no.txt: no such file"),
                        ([str(tmp_path / "empty.txt")], "expected text of a token or more"),
                        (["--data_dir", str(tmp_path / "gpt2")], "has tokens of gpt2")):
        assert evaluate.main([run, *words]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
