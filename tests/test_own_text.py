"""What `python -m data.fineweb tokenize` writes, the trainer trains on, with nothing else said."""

import json
import re

import numpy as np
import pytest

from conftest import start, tiny_options
from data.prepare import tokenize
from data.shards import read_shard, write_shard
from data.tokenizer import TOKENIZERS
from records.log import parse
from tools import sample
from trainer import options
from trainer.data import OWN_DATA, _fitted, find_data

PLAY = "".join(f"ANNA:\nThe river {verb} {count} letters.\n\n"
               for count in range(40) for verb in ("forgets", "carries", "sings to"))


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """One play in one file, 4,600 bytes: a step of the tiny model takes 384, a row 32."""
    folder = tmp_path_factory.mktemp("play")
    (folder / "play.txt").write_text(PLAY)
    tokenize([folder / "play.txt"], folder / "data", tokenizer="bytes")
    return folder / "data"


def recipe_of(*words):
    return options.parse(list(map(str, words)), has_cuda=False)[1]


def losses(log):
    (run,) = parse(log)
    return {p.step: p.val_loss for p in run.points}


def test_one_play_trains_at_once(play, tmp_path, capsys):
    """More steps than the text has, and less validation than the recipe asks for."""
    words = tiny_options("--data_dir", play, "--log_dir", tmp_path, "--val_tokens", 131_072,
                         "--num_iterations", 30, "--val_every", 10, "--checkpoint_every", 12)
    done = start(*words)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    train_tokens = json.loads((play / "manifest.json").read_text())["train_tokens"]
    assert f"epochs {30 * 384 / train_tokens:.1f} epochs of {train_tokens:,} tokens" in said
    assert re.search(r"validation 1,024 tokens in rows of 32, for there are no more; asked", said)
    assert "target none" in said and "1.77" not in said and "standing" not in said
    assert "no record to compare" not in said and "--prompt \"Compute" not in said
    (log,) = tmp_path.glob("*.txt")
    (run,) = parse(log)
    assert run.result["status"] == "complete" and run.result["track"] == OWN_DATA
    assert losses(log)[30] < losses(log)[0] - 1
    # Stopped and resumed, it is the same training.
    kept = sorted(tmp_path.glob("*.step000024.ckpt"))[-1]
    again = start(*tiny_options("--data_dir", play, "--log_dir", tmp_path / "b", "--val_tokens",
                                131_072, "--num_iterations", 30, "--val_every", 10, "--resume",
                                kept))
    assert again.returncode == 0, again.stderr
    (log_b,) = (tmp_path / "b").glob("*.txt")
    assert losses(log_b)[30] == losses(log)[30]
    assert sample.main([str(log), "--prompt", "ANNA", "--num_tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("ANNA")


@pytest.mark.ranks
def test_ranks_read_the_same_epochs(play, tmp_path):
    """Three ranks, of which one has no row of validation."""
    logs = []
    for nproc in (1, 3):
        done = start(*tiny_options("--data_dir", play, "--log_dir", tmp_path / str(nproc),
                                   "--num_iterations", 20, "--val_every", 20, "--val_tokens", 64),
                     nproc=nproc)
        assert done.returncode == 0, done.stderr
        logs += (tmp_path / str(nproc)).glob("*.txt")
    assert losses(logs[1]) == pytest.approx(losses(logs[0]), abs=2e-4)


@pytest.mark.parametrize("record", ["1", "6", "26", "27", "62"])
@pytest.mark.parametrize("scale", ["pocket", "full"])
def test_the_recipe_is_fitted_to_the_data(play, tmp_path, record, scale):
    """Every alignment of rows, also rows that are longer than all of the text."""
    words = ["--record", record, "--scale", scale, "--device", "cpu"]
    data, recipe = find_data(recipe_of(*words), play)
    asked = recipe_of(*words)
    assert (recipe.model.vocab_size, data.bos_id, data.repeat) == (257, 256, True)
    assert (recipe.track, recipe.target) == (OWN_DATA, None)
    row = min(asked.val_row, 1024)
    assert (recipe.val_row, recipe.val_tokens) == (row, 1024 // row * row)
    assert recipe.num_iterations == asked.num_iterations
    assert recipe.model.seq_len == asked.model.seq_len


@pytest.mark.parametrize("num_val, row, val_tokens", [
    (1854, 896, 1792), (1000, 896, 896), (100, 99, 99), (2, 1, 1), (15_000, 1024, 14_336),
    (131_072, 1024, 130_048), (131_073, 1024, 131_072), (10**6, 1024, 131_072)])
def test_rows_of_validation_leave_few_tokens_over(num_val, row, val_tokens):
    recipe = _fitted(recipe_of("--record", 27), TOKENIZERS["bytes"], True, num_val)
    assert (recipe.val_row, recipe.val_tokens) == (row, val_tokens)


def test_gpt2_tokens_need_no_vocab_size_at_pocket_scale(play, tmp_path):
    """With a manifest or, from elsewhere, by sight."""
    manifest = json.loads((play / "manifest.json").read_text())
    for name in manifest["train_files"] + manifest["val_files"]:
        tokens = np.array(read_shard(play / name))
        write_shard(tmp_path / name, np.where(tokens == 256, 50256, tokens))
    for _ in range(2):
        data, recipe = find_data(recipe_of("--record", 27, "--scale", "pocket"), tmp_path)
        assert (recipe.model.vocab_size, data.bos_id, recipe.target) == (50257, 50256, None)
        (tmp_path / "manifest.json").write_text(json.dumps(
            manifest | {"tokenizer": "gpt2", "vocab_size": 50257, "bos_id": 50256}))
    own = recipe_of("--scale", "pocket", "--vocab_size", 300)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="outside the vocabulary: expected 0 to 299"):
        find_data(own, tmp_path)


def test_shards_of_the_records_are_read_as_they_were(tiny_data):
    """No manifest and enough tokens: rows and order of the records. Too few: epochs."""
    words = tiny_options("--record", 62, "--batch_stages", "192,384,384")
    data, recipe = find_data(recipe_of(*words), tiny_data)
    assert not data.repeat and data.notes == {}
    assert recipe.val_tokens == 1024 and recipe.target is None  # another corpus than pocket's
    words = tiny_options("--record", 62, "--batch_stages", "192,384,384", "--num_iterations", 100)
    data, recipe = find_data(recipe_of(*words), tiny_data)
    assert data.repeat
    # A step takes 192 or 384 tokens of rows that open with documents of 100.
    epochs = float(data.notes["epochs"].split()[0])
    assert "epochs of 12,000 tokens" in data.notes["epochs"]
    assert recipe.total_tokens / 12_000 < epochs < 2 * recipe.total_tokens / 12_000


def test_the_built_in_corpus_is_repeated_too():
    words = ["--record", "6", "--scale", "pocket"]
    data, recipe = find_data(recipe_of(*words, "--num_iterations", 6000))
    assert data.repeat and recipe.target == 1.77
    epochs = recipe.total_tokens / 8_960_531
    assert data.notes["epochs"].startswith(f"{epochs:.1f} epochs of 8,960,531 tokens")


def test_what_is_no_folder_of_shards_says_how_to_make_one(tmp_path):
    recipe = recipe_of("--scale", "pocket")
    (tmp_path / "a b.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=rf"tokenize {tmp_path} --out data/mine"):
        find_data(recipe, tmp_path)
    (tmp_path / "begun/.partial").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="begun holds an unfinished tokenisation"):
        find_data(recipe, tmp_path / "begun")
    tokens = np.random.default_rng(0).integers(0, 50257, 5000).astype("<u2")
    for part in ("train", "val"):
        np.save(tmp_path / f"{part}.npy", tokens)
    with pytest.raises(FileNotFoundError, match=r"tokenize \S+/train.npy --val \S+/val.npy --out"):
        find_data(recipe, tmp_path)
    for part in ("train", "val"):
        tokens.tofile(tmp_path / f"{part}.bin")
    with pytest.raises(ValueError, match=r"nanoGPT's; convert: .* \S+/train.bin --val \S+/val.bin"):
        find_data(recipe, tmp_path)
