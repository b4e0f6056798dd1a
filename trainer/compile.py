"""torch.compile as the trainer uses it: which parts of a model become graphs, and when.

Ranks of a machine share torch's cache on the disk, so each begins its warm-up with another phase of
the schedule and finds there the graphs that the others have compiled.
"""

import functools
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

import recipes
from data.loader import Batch
from kernels.loss import compiled
from model import GPT, Phase, sources_of_the_end
from recipes import Recipe, batch_shape
from trainer.dist import World
from trainer.memory import dummy_batch, local_rows, micro_batch_rows
from trainer.options import RunOptions


def wants_compile(run: RunOptions, world: World) -> tuple[bool, str]:
    """(whether to compile the model, the reason to print)."""
    device = world.device
    if run.compile == "off":
        return False, "eager (--compile off)"
    if run.compile == "auto" and device.type == "cpu":
        return False, "eager (the default on CPU: compiling takes longer than it saves here)"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return False, "eager (no C++ compiler found: install g++ to compile)"
    if device.type == "cpu" and " " in torch.__file__:  # the linker gets -L/a folder in two words
        return False, "eager (torch.compile cannot link torch in a folder with a space in its name)"
    count = layers_a_graph(run, world)
    layers = {0: "all layers", 1: "one layer"}.get(count, f"{count} layers")
    return True, f"torch.compile, {layers} a graph"


def layers_a_graph(run: RunOptions, world: World) -> int:
    """Several layers fuse what lies between them: the sum of a block's gradients takes a pass over
    the stream less. On one rank nothing overlaps, so all layers are one graph; on several,
    gradients that come by fours are reduced under the rest of the backward pass."""
    if run.compile_layers is not None:
        return run.compile_layers
    return 0 if world.size == 1 else 4


def wants_compiled_optimizer(run: RunOptions, world: World) -> bool:
    """Fused, an update reads and writes each number once: record #62 on one of eight ranks takes
    134 kernels instead of 603 (bench/NULL_GPU.md)."""
    wanted = {"on": True, "off": False, "auto": world.device.type == "cuda"}[run.compile_optimizer]
    return wanted and wants_compile(run, world)[0]


def compile_segments(model: GPT, num_layers: int = 1, backend: str = "inductor") -> None:
    """Compile the start, the layers and the head by themselves. One layer a graph: alike ones share
    it, and gradients arrive layer by layer. Several layers a graph (0: all) fuse across them,
    compile longer, arrive later.
    """
    # A layer that no longer fits the cache would run eager with only a warning.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64  # kinds of layers x shapes of batches
    # Compile both passes of a graph at once, so that compile_ahead needs no backward pass.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    L = len(model.blocks)
    n = min(num_layers or L, L)
    model.segments = [range(first, min(first + n, L)) for first in range(0, L, n)]
    if n == 1:
        between = [model.gates_late] if model.config.token_gates else []
        for part in [*model.blocks, *between]:
            part.compile(dynamic=False, backend=backend)
    else:
        model.run_layers = compiled_layers(model, backend)
    for name in ("embed_tokens", "final_norm"):
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False, backend=backend))
    model.loss_bodies = compiled(model.loss_bodies, backend)


def compiled_layers(model: GPT, backend: str) -> Callable:
    """model.run_layers as graphs which return only what is read behind them: for every further
    output the backward pass is given a gradient of zeros, 75 MB for 49,152 tokens."""
    run_layers, L = model.run_layers, len(model.blocks)
    last_reader = dict.fromkeys(sources_of_the_end(model.config), L)
    for i, layer in enumerate(model.plan):
        for source in {layer.skip_from, layer.attn_from} - {None}:
            last_reader[source] = max(i, last_reader.get(source, 0))

    @functools.partial(torch.compile, dynamic=False, backend=backend)
    def graph(layers, x_BTC, shared, values, keys, extras, outputs):
        known, extras, outputs = extras.keys(), dict(extras), dict(outputs)
        x_BTC = run_layers(layers, x_BTC, shared, values, keys, extras, outputs)
        later = {i: gates for i, gates in extras.items() if i not in known and i > layers[-1]}
        read = {i: outputs[i] for i in layers if last_reader.get(i, 0) > layers[-1]}
        return x_BTC, later, read

    def call(layers, x_BTC, shared, values, keys, extras, outputs):
        x_BTC, later, read = graph(layers, x_BTC, shared, values, keys, extras, outputs)
        extras |= later
        outputs |= read
        return x_BTC

    return call


def compiled_graphs() -> int:
    """How many graphs this process has compiled, or found in the cache."""
    utils = sys.modules.get("torch._dynamo.utils")  # an eager run does not pay for its import
    return utils.counters["stats"]["unique_graphs"] if utils else 0


class ForwardKind(NamedTuple):
    """Forward passes that share their compiled code."""

    phase: Phase
    shape: tuple[int, int]      # rows of a micro-batch, tokens a row
    training: bool


def forward_kinds(recipe: Recipe, world: World, micro_tokens: int) -> list[ForwardKind]:
    """One for each phase of the schedule, then validation."""
    kinds = []
    for step in recipes.phase_steps(recipe):
        num_rows, seq_len = batch_shape(step, recipe)
        rows = micro_batch_rows(local_rows(num_rows, world), seq_len, micro_tokens)
        kinds.append(ForwardKind(recipes.phase(step, recipe), (rows, seq_len), True))
    rows = max(1, micro_tokens // recipe.val_row)
    return [*kinds, ForwardKind(recipes.eval_phase(0, recipe), (rows, recipe.val_row), False)]


def compile_ahead(model: GPT, recipe: Recipe, world: World, micro_tokens: int) -> None:
    """Build all graphs of the model, beginning at another phase on each rank of a machine: two
    ranks of #62 on two cores took 117 s cold, 186 s where both began alike (bench/NULL_GPU.md)."""
    generator = torch.Generator().manual_seed(0)
    kinds = forward_kinds(recipe, world, micro_tokens)
    first = world.local_rank * len(kinds) // world.local_size
    for kind in kinds[first:] + kinds[:first]:
        batch: Batch = dummy_batch(kind.shape, recipe, world.device, generator)
        model.set_phase(kind.phase)
        model.train(kind.training)
        with torch.set_grad_enabled(kind.training):
            model(batch.inputs_BT, batch.targets_BT, batch.docs_B2)
    model.train()
