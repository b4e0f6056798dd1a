"""Processes that compile ahead on fake tensors: who compiles what, and that a rank finds it."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from conftest import ROOT, clean_environment, tiny_options
from trainer import compile as compiling
from trainer import options
from trainer.compile import Claims, Helpers

# --- claims ---------------------------------------------------------------------------------------

def test_a_graph_is_compiled_by_whoever_claims_it_first(tmp_path):
    with Claims(tmp_path).claim("graph", waits=False) as mine:
        with Claims(tmp_path).claim("graph", waits=False) as others:
            assert mine and not others
        with Claims(tmp_path).claim("another", waits=False) as others:
            assert others
    for waits in (False, True):
        with Claims(tmp_path).claim("graph", waits) as again:
            assert not again


def test_a_rank_waits_for_the_one_who_compiles(tmp_path):
    heard = []

    def rank():
        with Claims(tmp_path).claim("graph", waits=True) as mine:
            heard.append(mine)

    threads = [threading.Thread(target=rank) for _ in range(3)]
    with Claims(tmp_path).claim("graph", waits=False):
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert not heard
    for thread in threads:
        thread.join(20)
    assert heard == [False] * 3


def test_nobody_waits_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "PATIENCE_S", 0.1)
    claims = Claims(tmp_path)
    with claims.claim("graph", waits=False), claims.claim("graph", waits=True) as mine:
        assert not mine


def test_what_a_process_left_undone_is_free_again(tmp_path):
    with pytest.raises(RuntimeError), Claims(tmp_path).claim("graph", waits=False):
        raise RuntimeError
    with Claims(tmp_path).claim("graph", waits=True) as mine:
        assert mine
    killed = (f"import os, sys, pathlib; sys.path.insert(0, {str(ROOT)!r}); import compiling\n"
              f"with compiling.Claims(pathlib.Path({str(tmp_path)!r})).claim('other', False):\n"
              "    os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -9
    with Claims(tmp_path).claim("other", waits=True) as mine:
        assert mine


# --- helpers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("cores, parts, ranks, expected", [
    (1, 4, 1, 0), (2, 4, 1, 1), (4, 4, 1, 3), (16, 4, 1, 7), (16, 2, 1, 3), (208, 4, 8, 4),
    (208, 4, 2, 6), (208, 9, 1, 7), (8, 4, 8, 0)])
@pytest.mark.parametrize("gib, most", [(139, 7), (79, 4), (24, 1), (11, 0)])
def test_helpers_are_as_many_as_can_be_of_use(cores, parts, ranks, expected, gib, most,
                                              monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert compiling.how_many(parts, ranks, gib * 2**30) == min(expected, most)


def test_no_helper_outlives_the_warm_up_and_a_failure_is_told(tmp_path):
    helpers = Helpers()
    helpers.marker = tmp_path / "warm"
    for name, code in (("sleeps", "import time; time.sleep(60)"), ("ends", ""),
                       ("fails", "raise ValueError('no such thing')")):
        with open(tmp_path / name, "wb") as file:
            process = subprocess.Popen([sys.executable, "-c", code], stderr=file)
        helpers.processes[process] = tmp_path / name
    started = list(helpers.processes)
    for process in started[1:]:
        process.wait()
    assert helpers.end(warm=True) == ["ValueError: no such thing"]
    assert all(process.returncode is not None for process in started)
    assert helpers.marker.exists() and helpers.end() == []


RANK = """
import json, sys
sys.path.insert(0, ROOT)
from functools import partial
from pathlib import Path
import torch, compiling, options, recipes
from trainer.dist import World
from torch._dynamo.utils import counters

run, recipe = options.parse(WORDS, has_cuda=False)
world = World(0, 0, 1, torch.device("cpu"))
model = recipes.build_model(recipe, seed=0)
compiling.compile_segments(model, 1, partial(compiling.rank_backend,
                                             compiling.Claims(Path(CLAIMS))))
model.recomputed = 1
generator = torch.Generator().manual_seed(1)
for part in compiling.run_parts(recipe, world, 8192):
    model.set_stage(part.stage)
    batch = compiling.throw_away(part.shape, recipe, world.device, generator)
    model.train(part.training)
    with torch.set_grad_enabled(part.training):
        loss = model(batch.inputs_BT, batch.targets_BT, batch.docs_B2)
    if part.training:
        loss.backward()
print(json.dumps({**counters["aot_autograd"], **counters["inductor"],
                  "graphs": counters["stats"]["unique_graphs"], "loss": loss.item()}))
"""


@pytest.mark.skipif(not compiling.wants_compile(options.Run(compile="on"), torch.device("cpu"))[0],
                    reason="there is no C++ compiler here")
def test_a_rank_finds_all_that_a_helper_compiled_without_numbers(tmp_path):
    """Both passes of training and the one of validation; nothing is compiled a second time."""
    claims = tmp_path / "claims"
    claims.mkdir()
    (claims / compiling.FITS).write_text('{"micro_tokens": 8192, "recomputed": 1}')
    environment = clean_environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    words = tiny_options("--record", 6, "--num_layers", 1, "--compile", "on", "--device", "cpu")
    helper = subprocess.run([sys.executable, str(ROOT / "compiling.py"), str(claims), "0", *words],
                            env=environment, capture_output=True, text=True)
    assert helper.returncode == 0, helper.stderr
    (claims / compiling.FITS).unlink()
    graphs = list(claims.iterdir())
    assert graphs and all(graph.read_bytes() == compiling.DONE for graph in graphs)
    code = f"ROOT, WORDS, CLAIMS = {str(ROOT)!r}, {words!r}, {str(claims)!r}\n" + RANK
    rank = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True)
    assert rank.returncode == 0, rank.stderr
    seen = json.loads(rank.stdout.splitlines()[-1])
    assert seen["autograd_cache_hit"] == seen["graphs"] == len(graphs)
    assert not seen.get("autograd_cache_miss", 0) and not seen.get("fxgraph_cache_miss", 0)
    assert torch.isfinite(torch.tensor(seen["loss"]))
