"""The trainer as people start it, and the promises it makes about its numbers."""

import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kernels
import recipes
import train_gpt
from conftest import ROOT, clean_environment, start, tiny_options
from data import fineweb
from data.shards import read_shard, write_shard
from model import GPT, init_weights
from muon import Adam
from records.log import parse
from tools import sample
from trainer import compile as compiling
from trainer import dist, options
from trainer.memory import fit_memory, micro_batch_rows

ONE = dist.World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def losses(log) -> dict[int, float]:
    (run,) = parse(log)
    return {p.step: p.val_loss for p in run.points}


def tiny_recipe(*extra: str, record: int = 6) -> recipes.Recipe:
    return options.parse(tiny_options("--record", record, *extra), has_cuda=False)[1]


def data_of(tiny_data) -> train_gpt.Data:
    files = {part: sorted(tiny_data.glob(f"*{part}*.bin")) for part in ("train", "val")}
    return train_gpt.Data(files["train"], files["val"], 256, "digest")


# --- one process ----------------------------------------------------------------------------------

def test_a_run_leaves_a_whole_log_and_a_model_that_writes(train, tmp_path):
    done, (log,) = train("--record", "6", "--seed", "3")
    assert done.returncode == 0, done.stderr
    (run,) = parse(log)
    assert not run.faults
    assert run.result["status"] == "complete" and run.result["seed"] == 3
    assert [p.step for p in run.points] == [0, 3, 6]
    assert run.points[-1].val_loss < run.points[0].val_loss
    assert run.recipe["model"]["num_layers"] == 2
    assert f"log: {log}" in done.stdout.splitlines()[-1]
    # The expression that fits the public logs since 2024-10.
    lines = re.findall(r"^step:(\d+)/(\d+) val_loss:(\d+\.\d+) train_time:(\d+)ms "
                       r"step_avg:(\d+\.\d+)ms$", log.read_text(), re.M)
    assert [int(line[0]) for line in lines] == [0, 3, 6]
    wrote = subprocess.run([sys.executable, "-m", "tools.sample", log.with_suffix(""),
                            "--prompt", "abc", "--num_tokens", "20", "--temperature", "0"],
                           cwd=ROOT, capture_output=True, timeout=60, env=clean_environment())
    assert wrote.returncode == 0 and wrote.stdout.startswith(b"abc"), wrote.stderr


def test_sample_writes_from_a_checkpoint_too(train, capsys):
    done, (log,) = train("--checkpoint_every", "4", "--keep", "1")
    assert done.returncode == 0, done.stderr
    (kept,) = log.parent.glob("*.step000006.ckpt")
    texts = []
    for run in (kept, log):
        assert sample.main([str(run), "--prompt", "abc", "--num_tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("abc")


@pytest.mark.parametrize("words, says", [
    (["--temperature", "-1"], "--temperature: expected 0 or more, got -1.0"),
    (["--temperature", "nan"], "--temperature: expected 0 or more, got nan"),
    (["--num_tokens", "0"], "--num_tokens: expected a whole number from 1, got 0"),
    ([], "no checkpoint at logs/nothing.pt"),
])
def test_sample_refuses_in_one_line(words, says, capsys):
    assert sample.main(["logs/nothing", *words]) == 2
    assert capsys.readouterr().err == f"tools.sample: {says}\n"


def test_sample_without_gpt2s_ranks_is_one_line(monkeypatch, capsys):
    def no_network(run):
        raise OSError("tiktoken cannot get GPT-2's ranks")

    monkeypatch.setattr(sample, "load_model", no_network)
    assert sample.main(["logs/x"]) == 2
    assert capsys.readouterr().err == "tools.sample: tiktoken cannot get GPT-2's ranks\n"


def test_the_same_seed_gives_the_same_run_bit_for_bit(train, tmp_path):
    logs = [train("--seed", "5", log_dir=tmp_path / name)[1][0] for name in "ab"]
    assert losses(logs[0]) == losses(logs[1])
    weights = [torch.load(log.with_suffix(".pt"))["model"] for log in logs]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_runs_take_consecutive_seeds_one_log_each(train):
    done, logs = train("--seed", "7", "--runs", "2", "--num_iterations", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(parse(log)[0].result["seed"] for log in logs) == [7, 8]
    assert len({tuple(losses(log).values()) for log in logs}) == 2


def test_a_model_that_is_not_wanted_is_not_written(train):
    done, (log,) = train("--save_model", "false")
    assert not log.with_suffix(".pt").exists()
    assert "not saved" in done.stdout and "next:" not in done.stdout


def test_micro_batches_change_nothing_but_rounding(train, tmp_path):
    whole = train(log_dir=tmp_path / "a")[1][0]
    split = train("--micro_batch_tokens", "96", log_dir=tmp_path / "b")[1][0]
    assert losses(split) == pytest.approx(losses(whole), abs=2e-4)


@pytest.mark.parametrize("words, says", [
    (("--recrd", "6"), "did you mean --record?"),
    (("--data_dir", "/nowhere"), "--data_dir: expected"),
    (("--val_tokens", "1000"), "val"),
])
def test_a_wrong_start_is_one_line_and_leaves_nothing(words, says, tiny_data, tmp_path):
    places = [] if "--data_dir" in words else ["--data_dir", tiny_data]
    done = start(*tiny_options(*places, "--log_dir", tmp_path / "logs", *words))
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "logs").glob("*"))


def test_more_ranks_than_rows_is_refused_with_numbers_that_work():
    with pytest.raises(ValueError, match="12"):
        train_gpt.rank_rows(12, 0, 13)


def test_wandb_offline_never_stops_a_run(train, tmp_path):
    done, (log,) = train("--wandb", "--num_iterations", "2", WANDB_MODE="offline",
                         WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    assert parse(log)[0].result["status"] == "complete"
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_recomputed_layers_are_the_same_layers(train, tmp_path):
    """Less memory, more time, not one bit of difference."""
    for record in ("1", "62"):
        few = ("--record", record, "--num_iterations", "3", "--val_every", "3")
        few += ("--batch_stages", "192,384,384") * (record == "62")
        kept, again = (train(*few, *extra, log_dir=tmp_path / f"{record}{len(extra)}")
                       for extra in ((), ("--recompute", "on")))
        assert "computed again" in again[0].stdout and "computed again" not in kept[0].stdout
        assert losses(kept[1][0]) == losses(again[1][0])
    (run,) = parse(kept[1][0])
    assert run.environment["tokens_per_step"] == "[[0, 192], [1, 384]]"
    assert run.tokens_at(3) == run.tokens == 192 + 384 + 384


@pytest.mark.parametrize("record", [1, 12, 62])
@pytest.mark.parametrize("recomputed", [1, 3])
def test_some_layers_may_be_computed_again_and_others_not(record, recomputed):
    words = tiny_options("--record", record, "--num_layers", 4)
    words += ["--batch_stages", "192,384,384"] * (record == 62)
    recipe = options.parse(words, has_cuda=False)[1]
    tokens = torch.randint(257, (2, 2, recipe.model.seq_len),
                           generator=torch.Generator().manual_seed(0))
    gradients = []
    for count in (0, recomputed):
        model = recipes.build_model(recipe, seed=0)
        model.set_phase(recipes.phase(0, recipe))
        model.recomputed, calls = count, []
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
        model(tokens[0].int(), tokens[1]).backward()
        assert sorted(calls) == sorted([*range(4), *range(count)])
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_triton_kernels_train_the_same_model(train, tmp_path):
    """All of them at once, in Triton's interpreter; nothing falls back without saying so."""
    pytest.importorskip("triton")
    few = ("--num_iterations", "1", "--val_every", "1", "--num_layers", "1")
    few += ("--batch_tokens", "32", "--val_tokens", "32")  # the interpreter takes its time
    plain = train(*few, log_dir=tmp_path / "plain")
    fused = train(*few, "--kernels", "symmetric,relu2,loss", log_dir=tmp_path / "fused",
                  TRITON_INTERPRET="1")
    assert fused[0].returncode == 0, fused[0].stderr
    assert "Triton: loss, relu2, symmetric" in fused[0].stdout
    for step, loss in losses(plain[1][0]).items():
        assert losses(fused[1][0])[step] == pytest.approx(loss, abs=2e-4)


def test_triton_kernels_are_refused_without_a_gpu(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "INTERPRET", False)
    assert train_gpt.main(tiny_options("--kernels", "loss", "--device", "cpu")) == 2
    assert "need a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("gib, seq_len, expected", [
    (24, 1024, (32, 0)), (80, 1024, (64, 0)), (24, 65_536, (1, 6)), (36, 65_536, (1, 2)),
    (80, 65_536, (1, 0)), (141, 1024, (64, 0)), (16, 65_536, (1, 10)), (10, 65_536, (1, 12))])
def test_as_many_rows_as_the_memory_holds(gib, seq_len, expected, monkeypatch):
    """A row of 64K tokens trains on a card of 24 GB: half of its layers are computed again. 0.5 of
    2 GB is allocated; the first step brings gradients and Adam's two averages."""
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(total_memory=gib * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**29)
    recipe = SimpleNamespace(model=SimpleNamespace(seq_len=seq_len, num_layers=12, model_dim=768))
    gpu, weights = torch.device("cuda", 0), torch.nn.Parameter(torch.empty(2**27, device="meta"))
    optimizer = Adam([weights])
    tokens, recomputed = fit_memory(recipe, options.RunOptions(), gpu, optimizer)
    assert (micro_batch_rows(512, seq_len, tokens), recomputed) == expected
    tokens, recomputed = fit_memory(
        recipe, options.RunOptions(recompute="on", micro_batch_tokens=2048), gpu, optimizer)
    rows = micro_batch_rows(512, seq_len, tokens)
    assert (rows, recomputed) == (max(1, 2048 // seq_len), 12)


@pytest.mark.parametrize("num_rows, seq_len, rows", [
    (8, 16_384, 4), (8, 32_768, 2), (8, 49_152, 1), (512, 1024, 64), (66, 1024, 33), (7, 32_768, 2),
    (3, 1024, 3), (1, 65_536, 1), (5, 100_000, 1)])
def test_rows_come_in_equal_parts_of_at_most_64k_tokens(num_rows, seq_len, rows):
    """Short rows of an early phase go several at once; 8 rows never as 3, 3 and 2."""
    assert micro_batch_rows(num_rows, seq_len, 65_536) == rows


def test_without_a_compiler_it_runs_eager_and_says_so(monkeypatch):
    on = options.RunOptions(compile="on")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    compiled, how = compiling.wants_compile(on, ONE)
    assert not compiled and "no C++ compiler" in how
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert compiling.wants_compile(on, ONE)[0]
    monkeypatch.setattr(compiling.torch, "__file__", "/home/me/my clone/.venv/torch/__init__.py")
    compiled, how = compiling.wants_compile(on, ONE)
    assert not compiled and "a space in its name" in how


# --- the harness: what a record does not change ---------------------------------------------------

def test_evaluate_reads_every_validation_token_once_and_in_order(tiny_data):
    """Against a slow loop over the file, and through the number itself."""
    recipe = tiny_recipe()
    model = GPT(recipe.model)
    init_weights(model, 0)
    seen = []
    original = model.forward

    def watched(inputs_BT, targets_BT, docs_B2):
        seen.extend(inputs_BT.flatten().tolist())
        return original(inputs_BT, targets_BT)

    model.forward = watched
    got = train_gpt.evaluate(model, recipe, data_of(tiny_data), ONE, micro_tokens=160)
    tokens = np.asarray(read_shard(data_of(tiny_data).val_files[0]), dtype=np.int64)
    assert seen == tokens[:1024].tolist()
    total = 0.0
    for start_at in range(0, 1024, 32):
        row = torch.from_numpy(tokens[start_at:start_at + 33])[None]
        with torch.no_grad():
            logits = model.logits(model.hidden(row[:, :-1]))[0].double()
        total -= logits.log_softmax(-1).gather(1, row[0, 1:, None]).sum().item()
    assert got == pytest.approx(total / 1024, abs=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_together_train_on_exactly_the_recipes_rows(tiny_data, world):
    recipe = tiny_recipe()
    files = data_of(tiny_data).train_files
    tokens = np.asarray(read_shard(files[0]), dtype=np.int64)
    for first_repeated in (True, False):
        shares = []
        for rank in range(world):
            with train_gpt.Loader(files, lambda step: recipes.batch_shape(step, recipe),
                                  vocab_size=257, bos_id=256, repeat_first=first_repeated,
                                  rank=rank, world_size=world) as loader:
                shares.append([next(loader).inputs_BT for _ in range(3)])
        for step in range(3):
            rows = torch.cat([share[step] for share in shares])
            at = (max(0, step - 1) if first_repeated else step) * recipe.batch_tokens
            assert rows.flatten().tolist() == tokens[at:at + recipe.batch_tokens].tolist()


def test_the_warm_up_leaves_no_trace(tiny_data):
    recipe = tiny_recipe()
    model = train_gpt.build_model(recipe, 0, ONE.device)
    optimizer = train_gpt.build_optimizer(model, recipe)
    fresh = GPT(recipe.model)
    init_weights(fresh, 0)
    rng = torch.get_rng_state()
    state, (first, *others) = optimizer.state_dict(), model.parameters()
    first.grad = torch.ones_like(first)
    train_gpt.warm_up(model, optimizer, recipe, data_of(tiny_data), ONE, micro_tokens=128)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))
    assert first.grad.eq(1).all() and all(p.grad is None for p in others)
    assert torch.equal(rng, torch.get_rng_state())
    after = optimizer.state_dict()
    assert str(state) == str(after)


def test_a_warm_up_that_leaks_is_found(tiny_data, monkeypatch):
    recipe = tiny_recipe()
    model = train_gpt.build_model(recipe, 0, ONE.device)
    optimizer = train_gpt.build_optimizer(model, recipe)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    monkeypatch.setattr(train_gpt, "train_step", lambda *arguments: torch.rand(1))
    with pytest.raises(AssertionError, match="not restored"):
        train_gpt.warm_up(model, optimizer, recipe, data_of(tiny_data), ONE, micro_tokens=128)


def test_the_clock_counts_training_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(dist, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = dist.Clock(ONE)
    clock.start()
    now[0] += 2
    assert clock.now_ms() == 2000
    clock.stop()
    now[0] += 50  # validation, saving, compiling
    assert clock.now_ms() == 2000
    clock.start()
    now[0] += 1
    clock.stop()
    assert clock.elapsed_s == 3


def test_initial_loss_of_a_zero_head_is_ln_v():
    recipe = tiny_recipe("--tied_head", "false", "--embed_norm", "true")
    model = GPT(recipe.model)
    init_weights(model, 0)
    tokens = torch.randint(257, (2, 33))
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
    assert loss.item() == pytest.approx(math.log(recipe.model.padded_vocab_size), abs=1e-5)


def test_as_many_shards_are_fetched_as_the_run_takes(tmp_path, monkeypatch):
    """Packing whole documents skips tokens, so the first guess (tokens / 100M) can be too low."""
    asked = []

    def ensure(num_shards, folder):
        asked.append(num_shards)
        files = []
        for i in range(num_shards + 1):
            tokens = np.full(1000, 7, dtype=np.uint16)
            tokens[::50] = 50256
            tokens[-1] = i  # no two shards alike
            files.append(tmp_path / f"fineweb_{'val' if i == 0 else 'train'}_{i:06d}.bin")
            write_shard(files[-1], tokens)
        return files[1:], files[:1]

    monkeypatch.setattr(fineweb, "ensure", ensure)
    run, recipe = options.parse(
        ["--record", "29", "--scale", "full", "--seq_len", "64", "--batch_tokens", "128",
         "--num_iterations", "20", "--val_tokens", "256", "--val_seq_len", "64",
         "--max_doc_len", "40", "--device", "cpu", "--head", "bf16"], has_cuda=False)
    data, _ = train_gpt.find_data(recipe, run.data_dir)
    assert asked == list(range(1, len(asked) + 1)) and len(asked) > 1
    assert len(data.train_files) == asked[-1]


def test_no_network_is_one_line(monkeypatch, capsys):
    def ensure(num_shards, folder):
        raise OSError("cannot reach the hub; without a network: --scale pocket")

    monkeypatch.setattr(fineweb, "ensure", ensure)
    for words in ([], ["--prepare"]):
        assert train_gpt.main(["--record", "8", "--scale", "full", "--device", "cpu", *words]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "train_gpt.py: cannot reach the hub; without a network: --scale pocket"]


def test_a_head_that_the_device_cannot_multiply_is_refused_before_any_data(monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "find_data", lambda *_: pytest.fail("asked for data"))
    assert train_gpt.main(["--record", "62", "--scale", "full", "--device", "cpu"]) == 2
    assert "--head bf16" in capsys.readouterr().err


# --- several ranks --------------------------------------------------------------------------------

@pytest.mark.ranks
@pytest.mark.parametrize("nproc", [2, 3, 8])
def test_any_number_of_ranks_trains_the_same_model(train, tmp_path, nproc):
    one = train(log_dir=tmp_path / "one")[1][0]
    done, (many,) = train(nproc=nproc, log_dir=tmp_path / "many")
    assert done.returncode == 0, done.stderr
    assert losses(many) == pytest.approx(losses(one), abs=2e-4)
    assert parse(many)[0].result["world_size"] == nproc


@pytest.mark.ranks
def test_two_nodes_on_loopback_are_one(train, tiny_data, tmp_path):
    """run.sh on each of two 'machines', one rank each, against one machine alone."""
    import socket

    one = train(log_dir=tmp_path / "one")[1][0]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    nodes = [subprocess.Popen(
        ["./run.sh", *tiny_options("--data_dir", tiny_data, "--log_dir", tmp_path / "two")],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=clean_environment(NNODES="2", NODE_RANK=str(node), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port, NPROC="1", NO_VENV="1"))
        for node in range(2)]
    said = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    (two,) = (tmp_path / "two").glob("*.txt")
    assert losses(two) == pytest.approx(losses(one), abs=2e-4)


# --- run.sh ---------------------------------------------------------------------------------------

def run_sh(*arguments: str, **environment: str):
    return subprocess.run(["./run.sh", *arguments], cwd=ROOT, text=True, capture_output=True,
                          timeout=60, env=clean_environment(NO_VENV="1", **environment))


def test_run_sh_explains_itself():
    done = run_sh("--help")
    assert done.returncode == 0
    assert "NPROC" in done.stdout and "--num_iterations" in done.stdout


@pytest.mark.parametrize("environment, says", [
    ({"NPROC": "0"}, "NPROC: expected a whole number from 1, got 0"),
    ({"NPROC": "two"}, "NPROC: expected"),
    ({"NNODES": "x"}, "NNODES: expected"),
    ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK (0 to 1)"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
    ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "host"}, "NODE_RANK: expected 0 to 1, got 2"),
    ({"NNODES": "2", "NODE_RANK": "one", "MASTER_ADDR": "host"}, "NODE_RANK: expected 0 to 1"),
    ({"RESTARTS": "often"}, "RESTARTS: expected a whole number from 0, got often"),
    ({"PYTHON": "python0.0"}, "no python0.0 on PATH"),
])
def test_run_sh_refuses_in_one_line(environment, says, tmp_path):
    """Before any Python but the look for torch, which this one passes at once."""
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "python3").chmod(0o755)
    done = run_sh(**environment, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.ranks
def test_more_ranks_than_rows_are_said_once(tiny_data):
    """run.sh asks before it starts any rank, as for a wrong option or missing data."""
    done = run_sh(*map(str, tiny_options("--data_dir", tiny_data)), NPROC="13")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "13 ranks cannot share" in line
