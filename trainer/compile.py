"""torch.compile as the trainer uses it: what becomes a graph, and helpers that compile ahead.

A recipe of several stages is dozens of graphs, each of which keeps one thread of Python busy for
seconds. Helpers are processes that run the same model on fake tensors, which have shapes and no
numbers: of the GPU each takes a context and no more. Nobody plans who compiles what: whoever comes
to a graph first claims it; a helper goes on to the next graph then, a rank waits and finds it in
torch's cache on the disk. A helper that fails costs time and nothing else.

    python compiling.py CLAIMS NUMBER OPTIONS OF train_gpt.py      what a helper runs
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import recipes
from data.loader import Batch
from kernels.loss import Products, compiled
from model import GPT, Stage
from recipes import Recipe, batch_shape
from trainer import options
from trainer.dist import World, device_for, prepare_cuda
from trainer.memory import own_rows, rows_at_once, throw_away

MOST_HELPERS = 7


# --- whether, and what ----------------------------------------------------------------------------

def wants_compile(run: options.Run, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and the reason to show."""
    if run.compile == "off":
        return False, "eager (--compile off)"
    if run.compile == "auto" and device.type == "cpu":
        return False, "eager (the default on CPU: compiling takes longer than it saves here)"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return False, "eager (no C++ compiler found: install g++ to compile)"
    if device.type == "cpu" and " " in torch.__file__:  # the linker gets -L/a folder in two words
        return False, "eager (torch.compile cannot link torch in a folder with a space in its name)"
    layers = {0: "all layers", 1: "one layer"}.get(run.compile_layers,
                                                   f"{run.compile_layers} layers")
    return True, f"torch.compile, {layers} a graph"


def compiles_optimizer(run: options.Run, device: torch.device) -> bool:
    """Fused, an update reads and writes each number once: record #62 on one of eight ranks takes
    159 kernels instead of 603 (bench/NULL_GPU.md)."""
    wanted = {"on": True, "off": False, "auto": device.type == "cuda"}[run.compile_optimizer]
    return wanted and wants_compile(run, device)[0]


def compile_segments(model: GPT, num_layers: int = 1,
                     backend: str | Callable = "inductor") -> None:
    """Compile the start, the layers and the head by themselves. One layer a graph: alike ones share
    it, and gradients arrive layer by layer, so that their reduction overlaps with the rest of the
    backward pass. Several layers a graph (0: all) fuse across them, compile longer, arrive later.
    """
    # A layer that no longer fits the cache would run eager with only a warning.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64  # kinds of layers x shapes of batches
    # Both passes of a graph at once, so that a helper, which has no gradients, compiles both. It is
    # part of the cache's key, and so the same everywhere.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    L = len(model.blocks)
    n = min(num_layers or L, L)
    model.segments = [range(first, min(first + n, L)) for first in range(0, L, n)]
    if n == 1:
        for block in model.blocks:
            block.compile(dynamic=False, backend=backend)
    for name in ("enter", *["run_layers"] * (n > 1), "leave"):
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False, backend=backend))
    model.loss_bodies = compiled(model.loss_bodies, backend)


def compiled_graphs() -> int:
    """How many graphs this process has compiled, or found in the cache."""
    utils = sys.modules.get("torch._dynamo.utils")  # an eager run does not pay for its import
    return utils.counters["stats"]["unique_graphs"] if utils else 0


# --- the forward passes of a run ------------------------------------------------------------------

class Part(NamedTuple):
    """Forward passes of one kind, for which code is compiled."""

    stage: Stage
    shape: tuple[int, int]      # rows at once, tokens a row
    training: bool


def run_parts(recipe: Recipe, world: World, micro_tokens: int) -> list[Part]:
    """One for each stage of the schedule, then validation."""
    parts = []
    for step in recipes.stage_steps(recipe):
        num_rows, seq_len = batch_shape(step, recipe)
        rows = rows_at_once(own_rows(num_rows, world), seq_len, micro_tokens)
        parts.append(Part(recipes.stage(step, recipe), (rows, seq_len), True))
    rows = max(1, micro_tokens // recipe.val_row)
    return [*parts, Part(recipes.eval_stage(0, recipe), (rows, recipe.val_row), False)]


def compile_parts(model: GPT, parts: list[Part], batches: list[Batch]) -> None:
    """Run each part forward, which compiles its backward too."""
    for part, batch in zip(parts, batches, strict=True):
        model.set_stage(part.stage)
        model.train(part.training)
        with torch.set_grad_enabled(part.training):
            model(batch.inputs_BT, batch.targets_BT, batch.docs_B2)
    model.train()


def turned(parts: list[Part], first: int) -> list[Part]:
    return parts[first:] + parts[:first]


def compile_ahead(model: GPT, recipe: Recipe, world: World, micro_tokens: int) -> None:
    """Build the model's graphs, each rank of a machine beginning with another part: what one has
    compiled the others find."""
    generator = torch.Generator().manual_seed(0)
    parts = run_parts(recipe, world, micro_tokens)
    parts = turned(parts, world.local_rank * len(parts) // world.local_size)
    compile_parts(model, parts, [throw_away(part.shape, recipe, world.device, generator)
                                 for part in parts])


# --- who compiles what ----------------------------------------------------------------------------

DONE = b"done"
PATIENCE_S = 120.0  # with one graph; the slowest of record #62 took 9


class Claims:
    """A file for each graph, in a folder that the processes of a machine share: locked by the one
    that compiles it, and so free again if that one dies."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def claim(self, key: str, waits: bool) -> Iterator[bool]:
        """Whether graph `key` is this process's to compile; with `waits` not before somebody has,
        or has had the time."""
        if not self.folder.is_dir():  # the first rank of the machine is through with it
            yield True
            return
        with open(self.folder / key, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                until = time.monotonic() + PATIENCE_S
                while waits and held(file) and time.monotonic() < until:
                    time.sleep(0.02)
                yield False
                return
            file.seek(0)
            mine = file.read() != DONE
            if not mine:
                fcntl.flock(file, fcntl.LOCK_UN)  # others may want to look at the same time
            yield mine
            if mine:
                file.write(DONE)


def held(file: BinaryIO) -> bool:
    """Whether another process has locked the file for itself."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def graph_key(graph: torch.fx.GraphModule, inputs: list) -> str:
    """The same in every process for the same code on inputs of the same kind."""
    kinds = [(tuple(x.shape), x.stride(), x.dtype, x.requires_grad)
             if isinstance(x, torch.Tensor) else x for x in inputs]
    words = f"{graph.code} {kinds} {torch.is_grad_enabled()}"
    return hashlib.sha256(words.encode()).hexdigest()


def inductor(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    from torch._inductor.compile_fx import compile_fx  # seconds, which eager runs do not take

    return compile_fx(graph, inputs)


def rank_backend(claims: Claims, graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """Compile the graph, or have it from the cache as soon as another process has."""
    with claims.claim(graph_key(graph, inputs), waits=True):
        return inductor(graph, inputs)


def helper_backend(claims: Claims, graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """Compile into the cache what nobody else does, and run the graph as it is, on fake tensors."""
    # The cache's key has the inputs' types, and a fake tensor's is a class of its own.
    for node, x in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.type = nn.Parameter if isinstance(x, nn.Parameter) else torch.Tensor
    graph.recompile()
    with claims.claim(graph_key(graph, inputs), waits=False) as mine:
        if mine:
            inductor(graph, inputs)
    return graph.forward


# --- helpers --------------------------------------------------------------------------------------

FITS = "fits.json"


class Helpers:
    """A machine's helpers, as one of its ranks sees them; `backend` is for compile_segments."""

    def __init__(self, backend: str | Callable = "inductor"):
        self.backend = backend
        self.folder: Path | None = None     # what they and the ranks of the machine share
        self.processes: dict[subprocess.Popen, Path] = {}   # and what each writes to
        self.marker: Path | None = None     # says that a run like this one has filled the cache

    def begin(self, micro_tokens: int, recomputed: int) -> None:
        """Tell them what the rank found to fit its memory; until then they import and wait."""
        if self.processes:
            words = json.dumps({"micro_tokens": micro_tokens, "recomputed": recomputed})
            (self.folder / "fits.tmp").write_text(words)
            (self.folder / "fits.tmp").rename(self.folder / FITS)

    def end(self, warm: bool = False) -> list[str]:
        """No helper outlives the warm-up. `warm`: all graphs are in the cache now. Returns why
        helpers failed, a line each."""
        failed = []
        for process, output in self.processes.items():
            if process.poll() is None:
                process.kill()
                process.wait()
            elif process.returncode != 0:
                failed += output.read_text(errors="replace").splitlines()[-1:]
        self.processes = {}
        if warm and self.marker is not None:
            with contextlib.suppress(OSError):
                self.marker.touch()
        return failed


def how_many(num_parts: int, local_size: int, gpu_bytes: int) -> int:
    """Helpers of a machine: at most two processes for each part, ranks included, which all need
    all parts, so that more of them than parts do not add up; no more processes than cores; and one
    for 16 GiB of the first GPU, where each has a context, of half a GiB, beside a step."""
    cores = len(os.sched_getaffinity(0))
    return max(0, min(MOST_HELPERS, 2 * num_parts - min(num_parts, local_size),
                      cores - local_size, gpu_bytes // 2**34))


@contextlib.contextmanager
def start_helpers(run: options.Run, recipe: Recipe, world: World, argv: list[str],
                  digest: str) -> Iterator[Helpers]:
    """Helpers for a run on GPUs that finds its caches cold; none otherwise. `digest` is that of the
    code. A collective call."""
    if world.device.type == "cpu" or not wants_compile(run, world.device)[0]:
        yield Helpers()
        return
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(tempfile.gettempdir(), world.first(lambda: f"claims-{secrets.token_hex(8)}"))
    folder.mkdir(exist_ok=True)
    helpers = Helpers(partial(rank_backend, Claims(folder)))
    helpers.folder = folder
    gpu = torch.cuda.get_device_properties(world.device)
    what = (digest, torch.__version__, recipe, world.size, run.kernels, run.compile_layers,
            run.recompute, run.micro_batch_tokens, gpu.name, gpu.total_memory)
    helpers.marker = Path(cache_dir(), "warm-" + hashlib.sha256(repr(what).encode()).hexdigest())
    if world.local_rank == 0 and not helpers.marker.exists():
        count = how_many(len(recipes.stage_steps(recipe)) + 1, world.local_size, gpu.total_memory)
        threads = max(1, len(os.sched_getaffinity(0)) // (count + world.local_size))
        env = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(threads)} | os.environ
        for number in range(count):
            output = folder / f"helper-{number}.txt"
            with open(output, "wb") as file:
                process = subprocess.Popen(
                    [sys.executable, __file__, str(folder), str(number), *argv], env=env,
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    start_new_session=True)  # Ctrl-C is for the ranks, which end their helpers
            helpers.processes[process] = output
    try:
        yield helpers
    finally:
        helpers.end()
        if world.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def help_compile(run: options.Run, recipe: Recipe, world: World, claims: Claims, first: int,
                 micro_tokens: int, recomputed: int) -> None:
    """Compile what nobody else has claimed, beginning with part `first`; `world` is the rank that
    the code is for."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, world.device:
        # The loss in Triton stands outside of all graphs, and cannot run without numbers.
        model = recipes.make_model(recipe, run.triton_kernels - {"loss"})
    model.recomputed = recomputed
    compile_segments(model, run.compile_layers, partial(helper_backend, claims))
    parts = run_parts(recipe, world, micro_tokens)
    parts = turned(parts, first % len(parts))
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    batches = [throw_away(part.shape, recipe, cpu, generator) for part in parts]
    with fake:
        compile_parts(model, parts, [
            Batch(fake.from_tensor(batch.inputs_BT).to(world.device),
                  fake.from_tensor(batch.targets_BT).to(world.device),
                  fake.from_tensor(batch.docs_B2)) for batch in batches])


def main(argv: list[str]) -> None:
    folder, number, *words = argv
    parent = os.getppid()
    prepare_cuda()
    run, recipe = options.parse(words, has_cuda=torch.cuda.is_available())
    rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    world = World(rank, local_rank, size, device_for(run.device, local_rank))
    fits = Path(folder, FITS)
    while not fits.exists():
        if not fits.parent.exists() or os.getppid() != parent:  # the run ended before it began
            return
        time.sleep(0.05)
    # Nor can the head's gradients: torch 2.11 has no fake of addmm into another dtype.
    Products.add_grads = lambda *_: None
    # The rank begins with the first part.
    help_compile(run, recipe, world, Claims(Path(folder)), int(number) + 1,
                 **json.loads(fits.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
