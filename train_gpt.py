"""The trainer: options -> ranks -> data -> model -> optimizer -> warm-up -> timed loop -> log.

    python train_gpt.py                          one process: a GPU, or pocket scale on a CPU
    torchrun --standalone --nproc_per_node 8 train_gpt.py --record 6
    ./run.sh                                     the same with environment and data taken care of

The recipe defines the training, never the machine: a step's rows exist before ranks do, each rank
takes a consecutive run of them, losses are sums over tokens divided by the tokens of the whole
step, and gradients are summed. So any number of ranks sees the same tokens and agrees up to
rounding. World size 1 is the same code.

The clock runs from the first step to the last, device synchronised at both ends; compiling,
validation and saving stand outside it and are reported beside it.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from muon import Muon
from records.standing import rank as rank_in_table
from records.standing import stand
from torch import Tensor

import checkpoint
import options
import recipes
from data import corpus, fineweb
from data.loader import Batch, Loader, check_enough_tokens, rank_rows, val_batches
from data.shards import digest_files
from kernels import peak_flops
from model import GPT, flops_per_token, init_weights, num_parameters
from recipes import Recipe, batch_shape
from records.log import RunLog
from sample import generate
from screen import Screen

ROOT = Path(__file__).resolve().parent


# --- ranks --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class World:
    """This process among all: torchrun's environment, or the only one."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, on every rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """The process group of torchrun's ranks; nothing at all for a single process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    if size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo",
                                device_id=where if use_cuda else None,
                                timeout=datetime.timedelta(seconds=300))
    try:
        yield World(rank, local_rank, size, where)
    finally:
        if size > 1:
            dist.destroy_process_group()


# --- what a run stands on -------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    """The files of one run."""

    train_files: list[Path]
    val_files: list[Path]
    bos_id: int
    digest: str


def find_data(recipe: Recipe, run: options.Run, screen: Screen) -> Data:
    """Fetch, build or find the tokens that the recipe needs. Safe to call on several ranks."""
    if run.data_dir is not None:
        folder = Path(run.data_dir)
        found = {part: sorted(folder.glob(f"*{part}*.bin")) for part in ("train", "val")}
        for part, files in found.items():
            if not files:
                raise FileNotFoundError(f"--data_dir: expected *{part}*.bin in "
                                        f"{folder.resolve()}, found none")
        train_files, val_files = found["train"], found["val"]
    elif recipe.corpus == "built-in":
        built = corpus.build(ROOT / "data" / "corpus_cache")
        train_files, val_files = list(built.train_files), list(built.val_files)
    else:
        # A shard holds 100M tokens; what is left at its end and fills no step is dropped.
        steps_per_shard = (100_000_000 - 1) // recipe.batch_tokens
        num_shards = math.ceil(recipe.num_iterations / steps_per_shard)
        folder = ROOT / "data" / "fineweb10B"
        train_files, val_files = fineweb.ensure(num_shards, folder)
    bos_id = corpus.BOS if recipe.corpus == "built-in" else fineweb.BOS
    check_enough_tokens(train_files, partial(batch_shape, recipe=recipe),
                        recipe.num_iterations, vocab_size=recipe.model.vocab_size, bos_id=bos_id)
    return Data(train_files, val_files, bos_id, digest_files([*train_files, *val_files]))


def local_sources() -> dict[str, str]:
    """Every module of this repository that the run has imported: name -> text, for the log."""
    files = {Path(m.__file__).resolve() for m in list(sys.modules.values())
             if getattr(m, "__file__", None)}
    own = sorted(f.relative_to(ROOT) for f in files
                 if f.is_relative_to(ROOT) and ".venv" not in f.parts and f.suffix == ".py"
                 and "tests" not in f.relative_to(ROOT).parts)
    return {str(f): (ROOT / f).read_text() for f in own}


def environment(world: World, run: options.Run, threads: int) -> dict[str, str]:
    """Where the run runs: versions, devices, the commit and whether the tree was clean."""
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT,
                                  check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    facts = {
        "command": " ".join(["train_gpt.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": next((line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines()
                     if line.startswith("model name")), platform.processor() or "unknown"),
        "cpu_cores": str(os.cpu_count()),
        "threads": str(threads),
        "world_size": str(world.size),
        "device": str(world.device.type),
        "git_commit": output("git", "rev-parse", "HEAD") or "none",
        "git_dirty": str(bool(output("git", "status", "--porcelain"))).lower(),
    }
    if world.device.type == "cuda":
        facts |= {
            "cuda": torch.version.cuda or "none",
            "gpu": torch.cuda.get_device_name(world.device),
            "gpus": "; ".join(output("nvidia-smi", "--query-gpu=name,driver_version,memory.total",
                                     "--format=csv,noheader").splitlines()),
        }
    return facts


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# --- model and optimizer --------------------------------------------------------------------------

def build_model(recipe: Recipe, seed: int, device: torch.device) -> GPT:
    model = GPT(recipe.model)
    init_weights(model, seed)  # on the CPU, so that every device starts from the same numbers
    return model.to(device)


def build_optimizer(model: GPT, recipe: Recipe) -> Muon:
    """One optimizer for all parameters, grouped by the recipe."""
    return Muon(recipes.optimizer_groups(recipe, model.named_parameters()), reduce="sum",
                collective=recipe.grad_collective, mode=recipe.muon_mode)


def wants_compile(run: options.Run, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and the reason to show."""
    if run.compile == "off":
        return False, "eager (--compile off)"
    if run.compile == "auto" and device.type == "cpu":
        return False, "eager (the default on CPU: compiling takes longer than it saves here)"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return False, "eager (no C++ compiler found: install g++ to compile)"
    return True, "torch.compile, one graph for all blocks"


def compile_segments(model: GPT) -> None:
    """Compile each block and the head by themselves: alike blocks share one graph, and gradients
    arrive block by block, so that their reduction overlaps with the rest of the backward pass."""
    # A block that no longer fits the cache would run eager with only a warning.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in model.blocks:
        block.compile(dynamic=False)
    model.head_loss = torch.compile(model.head_loss, dynamic=False)


# --- one step -------------------------------------------------------------------------------------

def default_micro_rows(recipe: Recipe, world: World) -> int:
    """Rows a rank computes at once. 64 rows of 1,024 tokens, as the records did, take about 60
    GiB: the logits dominate. Smaller cards take fewer rows at a time, which changes nothing else.
    """
    if world.device.type == "cpu":
        tokens = 8192
    else:
        gib = torch.cuda.get_device_properties(world.device).total_memory / 2**30
        tokens = 1024 * 2 ** int(math.log2(max(1, 0.85 * gib)))
    return max(1, tokens // recipe.model.seq_len)


def micro_batches(batch: Batch, micro_rows: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch.inputs_BT.split(micro_rows), batch.targets_BT.split(micro_rows)))


def train_step(model: GPT, optimizer: Muon, batch: Batch, micro_rows: int,
               global_tokens: int) -> Tensor:
    """Gradients of one step and the update; returns this rank's share of the mean loss.

    The share is a sum over this rank's tokens divided by all ranks' tokens, so shares add up.
    """
    share = torch.zeros((), device=batch.inputs_BT.device)
    parts = micro_batches(batch, micro_rows)
    for i, (inputs_BT, targets_BT) in enumerate(parts):
        if i == len(parts) - 1:
            optimizer.arm()  # from here on a bucket is reduced as soon as its gradients are there
        loss = model(inputs_BT, targets_BT) / global_tokens
        loss.backward()
        share += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return share


@torch.no_grad()
def evaluate(model: GPT, recipe: Recipe, data: Data, world: World, micro_rows: int) -> float:
    """Mean cross-entropy in nats over the first val_tokens validation tokens, each once, in order.

    Part of the harness that the game fixes: a record does not change it.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in val_batches(data.val_files, recipe.val_tokens, recipe.model.seq_len, micro_rows,
                             world.rank, world.size, vocab_size=recipe.model.vocab_size,
                             device=world.device):
        total += model(batch.inputs_BT, batch.targets_BT).double()
    model.train()
    return (world.sum(total) / recipe.val_tokens).item()


def warm_up(model: GPT, optimizer: Muon, recipe: Recipe, world: World, micro_rows: int) -> None:
    """Run every kernel of a step on throw-away tokens, then put everything back as it was.

    What is restored (parameters, gradients, optimizer state, random numbers) is compared with
    what was there before; a warm-up that leaked would be training outside the clock.
    """
    def state() -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"grad.{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        return tensors | {"rng": torch.get_rng_state()}

    before = {k: v.clone() for k, v in state().items()}
    optimizer_before = optimizer.state_dict()
    num_rows, seq_len = batch_shape(0, recipe)
    rows = len(rank_rows(num_rows, world.rank, world.size))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        tokens = torch.randint(recipe.model.vocab_size, (rows, seq_len + 1),
                               generator=generator).to(world.device)
        batch = Batch(tokens[:, :-1].int().contiguous(), tokens[:, 1:].contiguous())
        train_step(model, optimizer, batch, micro_rows, num_rows * seq_len)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(before[f"model.{name}"])
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer_before)
    torch.set_rng_state(before["rng"])
    leaks = [k for k, v in state().items() if k in before and not torch.equal(v, before[k])]
    assert not leaks, f"the warm-up changed {leaks}"


# --- clock and signals ----------------------------------------------------------------------------

class Clock:
    """Training time: perf_counter, which no change of the system's time moves, started and
    stopped with the devices of all ranks synchronised."""

    def __init__(self, world: World):
        self.world = world
        self.elapsed_s = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self.world.synchronize()
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.world.synchronize()
        self.elapsed_s += time.perf_counter() - self._since
        self._since = None

    def now_ms(self) -> float:
        """Milliseconds so far; while running, as far as the host has come."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return 1000 * (self.elapsed_s + running)


class Signals:
    """Loss, finiteness and stop request of a step: summed over ranks, read one step later, so
    that the host never waits for the device inside the timed loop."""

    def __init__(self, world: World):
        self.world = world
        self._sent: tuple | None = None

    def send(self, loss_share: Tensor, num_nonfinite: Tensor, stop: bool) -> None:
        x = torch.stack([loss_share.float(), num_nonfinite.float(),
                         torch.full((), float(stop), device=loss_share.device)])
        work = dist.all_reduce(x, async_op=True) if self.world.size > 1 else None
        if self.world.device.type == "cuda":
            if work is not None:
                work.wait()  # orders the stream, not the host
            host = torch.empty(3, pin_memory=True)
            host.copy_(x, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self._sent = (host, done, None)
        else:
            self._sent = (x, None, work)

    def receive(self) -> tuple[float, int, bool] | None:
        """(mean loss, non-finite gradients, stop) of the step last sent; None before the first."""
        if self._sent is None:
            return None
        x, done, work = self._sent
        if work is not None:
            work.wait()
        if done is not None:
            done.synchronize()
        self._sent = None
        loss, nonfinite, stop = x.tolist()
        return loss, int(nonfinite), stop > 0


class StopRequest:
    """SIGTERM and Ctrl-C ask for a stop after the current step; a second one ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True


# --- a run ----------------------------------------------------------------------------------------

def new_run_id(recipe: Recipe, seed: int) -> str:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{now}_r{recipe.record}_{recipe.scale}_s{seed}_{secrets.token_hex(2)}"


def start_wandb(run: options.Run, recipe: Recipe, run_id: str, screen: Screen):
    """Weights & Biases, if asked for. It can fail; a training run does not fail with it."""
    if not (run.wandb and screen.speaks):
        return None
    try:
        import wandb
        return wandb.init(project="nanogpt-speedrun", name=run_id, config=recipes.to_dict(recipe))
    except Exception as error:  # whatever it is, it is not worth a training run
        screen.line(f"wandb: not logging ({type(error).__name__}: {error})")
        return None


def report(wandb_run, screen: Screen, step: int, **values: float) -> None:
    if wandb_run is None:
        return
    try:
        wandb_run.log(values, step=step)
    except Exception as error:
        screen.line(f"wandb: {type(error).__name__}: {error}")


def train(run: options.Run, recipe: Recipe, seed: int, data: Data, world: World, screen: Screen,
          stop_request: StopRequest) -> bool:
    """One training from seed to log. Returns whether it ran to its end."""
    wall_start = time.perf_counter()
    run_id = [new_run_id(recipe, seed)]
    if world.size > 1:
        dist.broadcast_object_list(run_id)
    run_id = run_id[0]
    log_dir = Path(run.log_dir)
    log_path, model_path = log_dir / f"{run_id}.txt", log_dir / f"{run_id}.pt"

    model = build_model(recipe, seed, world.device)
    parameters, flops = num_parameters(model), flops_per_token(model)
    compiled, why = wants_compile(run, world.device)
    if compiled:
        compile_segments(model)
    optimizer = build_optimizer(model, recipe)
    micro_rows = default_micro_rows(recipe, world)
    if run.micro_batch_tokens is not None:
        micro_rows = max(1, run.micro_batch_tokens // recipe.model.seq_len)
    where = environment(world, run, torch.get_num_threads())
    screen.line()
    screen.facts({
        "recipe": f"record #{recipe.record} ({recipe.title}), {recipe.scale} scale, seed {seed}",
        "model": f"{parameters / 1e6:.1f}M parameters, {recipe.model.num_layers} layers of width "
                 f"{recipe.model.model_dim}, rows of {recipe.model.seq_len} tokens",
        "step": f"{recipe.batch_tokens:,} tokens; {recipe.num_iterations:,} steps; "
                f"{recipe.total_tokens:,} tokens in all",
        "device": f"{world.size} x {where.get('gpu', where['cpu'])}"
                  + ("" if world.device.type == "cuda" else f", {where['threads']} threads"),
        "backends": f"{recipe.model.compute_dtype} products; {why}; attention: SDPA; "
                    f"collectives: {dist.get_backend() if world.size > 1 else 'none (one rank)'}",
        "data": f"{recipe.corpus}, {len(data.train_files)} shard(s), digest {data.digest[:12]}",
        "target": "not fixed yet" if recipe.target is None else f"val_loss {recipe.target}",
    })

    warmup_start = time.perf_counter()
    warm_up(model, optimizer, recipe, world, micro_rows)
    with contextlib.suppress(StopIteration):  # the validation's graph compiles here, not later
        evaluate_shape = micro_rows
        evaluate(model, dataclasses.replace(
            recipe, val_tokens=recipe.model.seq_len * evaluate_shape * world.size), data, world,
            micro_rows)
    world.synchronize()
    warmup_s = time.perf_counter() - warmup_start
    screen.line(f"warm-up done in {warmup_s:.1f} s; everything put back as it was")

    log = RunLog(log_path, local_sources(), where, recipes.to_dict(recipe)) if world.is_first \
        else None
    wandb_run = start_wandb(run, recipe, run_id, screen)

    def say(text: str) -> None:
        screen.line(text)
        if log is not None:
            log.line(text)

    loader = Loader(data.train_files, partial(batch_shape, recipe=recipe),
                    vocab_size=recipe.model.vocab_size, bos_id=data.bos_id,
                    repeat_first=recipe.first_batch_repeated, rank=world.rank,
                    world_size=world.size, device=world.device)
    clock, signals = Clock(world), Signals(world)
    validation_s, history, status, val_loss, failure = 0.0, [], "complete", math.nan, ""
    screen.start(recipe.total_tokens)

    def after(step: int, received: tuple[float, int, bool] | None) -> str:
        """Record what the ranks agreed on about `step`; the reason to stop, or nothing."""
        if received is None:
            return ""
        loss, num_nonfinite, stop = received
        ms = clock.now_ms()
        if log is not None:
            log.line(f"step:{step + 1}/{recipe.num_iterations} train_loss:{loss:.4f} "
                     f"train_time:{ms:.0f}ms step_avg:{ms / (step + 1):.2f}ms")
        screen.advance(math.prod(batch_shape(step, recipe)), loss)
        report(wandb_run, screen, step + 1, train_loss=loss)
        if num_nonfinite or not math.isfinite(loss):
            names = optimizer.nonfinite_names()
            return (f"non-finite at step {step + 1}: loss {loss}"
                    + (f", gradients of {', '.join(names)}" if names else ""))
        return "preempted" if stop else ""

    with loader:
        clock.start()
        step = done_tokens = 0
        while True:
            ends = step == recipe.num_iterations
            if ends or step % recipe.val_every == 0:
                failure = failure or after(step - 1, signals.receive())
                clock.stop()
                began = time.perf_counter()
                val_loss = evaluate(model, recipe, data, world, micro_rows)
                ms = 1000 * clock.elapsed_s
                say(f"step:{step}/{recipe.num_iterations} val_loss:{val_loss:.4f} "
                    f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")
                history.append((step, val_loss, ms))
                screen.line("  " + stand(
                    recipe.track, val_loss, ms, done_tokens, history=history,
                    target=recipe.target, num_iterations=recipe.num_iterations, step=step))
                report(wandb_run, screen, step, val_loss=val_loss, train_time_ms=ms)
                validation_s += time.perf_counter() - began
                clock.start()
            if ends or failure:
                break
            for group in optimizer.param_groups:
                group.update(recipes.group_schedule(step, group["role"], recipe))
            global_tokens = math.prod(batch_shape(step, recipe))
            loss_share = train_step(model, optimizer, next(loader), micro_rows, global_tokens)
            earlier = signals.receive()
            signals.send(loss_share, optimizer.nonfinite.sum(), stop_request.asked)
            failure = after(step - 1, earlier)
            step, done_tokens = step + 1, done_tokens + global_tokens
            if failure:
                break
        clock.stop()
    screen.stop()

    if failure:
        status = "preempted" if failure == "preempted" else "failed"
        say(f"stopped after step {step}: {failure}")
    train_time_ms = 1000 * clock.elapsed_s
    tokens_per_s = done_tokens / max(clock.elapsed_s, 1e-9)
    peak = peak_flops(world.device)
    reached = recipe.target is not None and status == "complete" and val_loss <= recipe.target
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    if world.is_first:
        checkpoint.save(model_path, {"kind": "model", "recipe": recipes.to_dict(recipe),
                                     "run_id": run_id, "step": step, "model": weights})
        result = {
            "status": status, "track": recipe.track, "record": recipe.record,
            "scale": recipe.scale, "seed": seed, "world_size": world.size,
            "target": recipe.target, "reached": reached,
            "final_val_loss": f"{val_loss:.6f}", "num_iterations": recipe.num_iterations,
            "tokens": done_tokens, "train_time_ms": f"{train_time_ms:.0f}",
            "wall_time_s": f"{time.perf_counter() - wall_start:.1f}",
            "warmup_s": f"{warmup_s:.1f}", "validation_s": f"{validation_s:.1f}",
            "tokens_per_s": f"{tokens_per_s:.0f}",
            "mfu": "unknown" if peak is None
                   else f"{tokens_per_s * flops / (peak * world.size):.4f}",
            "peak_memory_mib": f"{peak_memory_mib(world.device):.0f}",
            "parameters": parameters, "data_digest": data.digest, "resumed": False,
            "checkpoint": model_path,
        }
        log.close({k: str(v).lower() if isinstance(v, bool) else v for k, v in result.items()})
        show_end(screen, run, recipe, result, log_path, model_path, model, world)
    if wandb_run is not None:
        with contextlib.suppress(Exception):
            wandb_run.finish(quiet=True)
    return status == "complete"


def peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show_end(screen: Screen, run: options.Run, recipe: Recipe, result: dict, log_path: Path,
             model_path: Path, model: GPT, world: World) -> None:
    """What the run came to, and what to type next."""
    seconds = float(result["train_time_ms"]) / 1000
    loss = float(result["final_val_loss"])
    target = "no target is fixed for this track yet" if recipe.target is None else (
        f"target {recipe.target} {'reached' if result['reached'] else 'not reached'}")
    screen.line()
    screen.facts({
        "result": f"{result['status']}: val_loss {loss:.4f}; {target}",
        "time": f"{seconds:.1f} s of training; {result['wall_time_s']} s in all, of which "
                f"warm-up {result['warmup_s']} s and validation {result['validation_s']} s",
        "speed": f"{float(result['tokens_per_s']):,.0f} tokens/s, MFU {result['mfu']}, peak "
                 f"memory {result['peak_memory_mib']} MiB",
        "standing": rank_in_table(recipe.track, float(result["train_time_ms"]),
                                  result["tokens"], loss),
        "log": log_path,
        "model": model_path,
    })
    if recipe.corpus == "built-in" and result["status"] == "complete":
        prompt = "Return the "
        screen.line("\nwhat it would write now:\n")
        text = generate(model, prompt, num_tokens=240, temperature=0.7, seed=0)
        for line in (prompt + text).splitlines():
            screen.line("    " + line)
    screen.line(f"\nnext: python sample.py {log_path.with_suffix('')} --prompt \"Compute \"")
    screen.line(f"log: {log_path}")


# --- main -----------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    first = int(os.environ.get("RANK", 0)) == 0
    if "--help" in argv or "-h" in argv:
        if first:
            print(options.help_text())
        return 0
    screen = Screen(speaks=first)
    try:
        run, recipe = options.parse(argv, has_cuda=torch.cuda.is_available())
        Path(run.log_dir).mkdir(parents=True, exist_ok=True)
        if run.prepare:
            find_data(recipe, run, screen)
            return 0
        with join_world(run.device) as world:
            data = find_data(recipe, run, screen)
            rank_rows(batch_shape(0, recipe)[0], world.rank, world.size)
            stop_request = StopRequest()
            for seed in range(run.seed, run.seed + run.runs):
                if not train(run, recipe, seed, data, world, screen, stop_request):
                    return 1
        return 0
    except (ValueError, FileNotFoundError) as error:
        if first:
            print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
