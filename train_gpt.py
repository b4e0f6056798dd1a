"""The trainer: options -> ranks -> data -> model -> optimizer -> warm-up -> timed loop -> log.

    python train_gpt.py                          one process: a GPU, or pocket scale on a CPU
    torchrun --standalone --nproc_per_node 8 train_gpt.py --record 6
    ./run.sh                                     the same with environment and data taken care of

The recipe defines the training, never the machine: a step's rows exist before ranks do, each rank
takes a consecutive run of them, losses are sums over tokens divided by one number for all ranks
(the tokens of the whole step, or the recipe's loss_divisor), and gradients are summed. So any
number of ranks sees the same tokens and agrees up to rounding. World size 1 is the same code.

The clock runs from the first step to the last, device synchronised at both ends; compiling,
validation and saving stand outside it and are reported beside it.
"""

import dataclasses
import datetime
import gc
import hashlib
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

import checkpoint
import options
import recipes
from checkpoint import Keeper
from compiling import (
    Helpers,
    compile_ahead,
    compile_segments,
    compiled_graphs,
    compiles_optimizer,
    start_helpers,
    wants_compile,
)
from data import corpus, fineweb
from data.loader import (
    Batch,
    Loader,
    OutOfTokens,
    check_enough_tokens,
    rank_rows,
    val_batches,
)
from data.shards import check_disjoint, data_digest
from kernels import check_kernels, peak_flops, symmetric
from kernels.attention import activate_flash_attention
from kernels.fp8 import check_fp8
from micro_steps import fit_memory, micro_batches, own_rows, rows_at_once, throw_away
from model import GPT, num_parameters
from muon import Muon
from profiling import Profile, check_profile
from ranks import (
    FIRST_STEP_TIMEOUT_S,
    Clock,
    LostRank,
    PeakMemory,
    Signal,
    Signals,
    StopRequest,
    World,
    device_for,
    join_world,
    prepare_cuda,
    process_age_s,
)
from recipes import Recipe, batch_shape
from report import (
    Reporter,
    Screen,
    environment,
    header,
    local_sources,
    show_end,
    source_digest,
    without_secrets,
)

ROOT = Path(__file__).resolve().parent


# --- what a run stands on -------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    """The files of one run."""

    train_files: list[Path]
    val_files: list[Path]
    bos_id: int
    digest: str


def find_data(recipe: Recipe, run: options.Run) -> Data:
    """Fetch, build or find the tokens that the recipe needs, and check that they last."""
    if run.data_dir is not None:
        folder = Path(run.data_dir)
        found = {part: sorted(folder.glob(f"*{part}*.bin")) for part in ("train", "val")}
        for part, files in found.items():
            if not files:
                raise FileNotFoundError(f"--data_dir: expected *{part}*.bin in "
                                        f"{folder.resolve()}, found none")
        train_files, val_files = found["train"], found["val"]
    elif recipe.corpus == "built-in":
        built = corpus.build()
        if built.note:
            print(f"corpus: {built.note}", file=sys.stderr)
        train_files, val_files = list(built.train_files), list(built.val_files)
    else:
        # As many shards as the run takes: 100M tokens each, less what no step uses (a shard's tail;
        # from record #26 on tokens before the next document, and what is cut from long ones).
        folder, num_shards = ROOT / "data" / "fineweb10B", math.ceil(recipe.total_tokens / 1e8)
        while True:
            train_files, val_files = fineweb.ensure(num_shards, folder)
            try:
                check_data(recipe, train_files, val_files, fineweb.BOS)
                break
            except OutOfTokens:
                num_shards += 1
    # What opens a document follows from the tokens, which --data_dir may change.
    of_bytes = recipe.corpus == "built-in" if run.data_dir is None else (
        recipe.model.vocab_size == corpus.VOCAB_SIZE)
    bos_id = corpus.BOS if of_bytes else fineweb.BOS
    check_data(recipe, train_files, val_files, bos_id)
    return Data(train_files, val_files, bos_id, data_digest([*train_files, *val_files]))


def check_data(recipe: Recipe, train_files: list[Path], val_files: list[Path],
               bos_id: int) -> None:
    """Every shard the run touches is whole, and there are tokens for every step and validation.
    Raises OutOfTokens where more training shards would help, ValueError otherwise."""
    check_disjoint(train_files, val_files)
    check_enough_tokens(train_files, partial(batch_shape, recipe=recipe), recipe.num_iterations,
                        vocab_size=recipe.model.vocab_size, bos_id=bos_id,
                        repeat_first=recipe.first_batch_repeated, align=recipe.data_align,
                        max_doc_len=recipe.max_doc_len)
    val_batches(val_files, recipe.val_tokens, recipe.val_row, 1,
                vocab_size=recipe.model.vocab_size)


# --- model and optimizer --------------------------------------------------------------------------

def build_model(recipe: Recipe, seed: int, device: torch.device,
                kernels: frozenset[str] = frozenset()) -> GPT:
    torch.manual_seed(seed)  # whatever draws a random number from here on draws the run's own
    return recipes.build_model(recipe, seed, kernels).to(device)


def build_optimizer(model: GPT, recipe: Recipe, kernels: frozenset[str] = frozenset(),
                    compiled: bool = False) -> Muon:
    """One optimizer for all parameters, grouped by the recipe."""
    products = (symmetric.gram, symmetric.polynomial) if "symmetric" in kernels else None
    return Muon(recipes.optimizer_groups(recipe, model.named_parameters()), reduce="sum",
                collective=recipe.grad_collective, overlap=recipe.grad_overlap, products=products,
                compile=compiled)


def describe_speed(run: options.Run, job: "Job") -> str:
    """What of a run changes its speed and not what it trains, for its header."""
    at_once = rows_at_once(own_rows(job.recipe.num_rows, job.world), job.recipe.model.seq_len,
                           job.micro_tokens)
    rows = f"{at_once} row{'s' * (at_once > 1)} at once"
    again = job.model.recomputed
    return "; ".join([
        wants_compile(run, job.world.device)[1]
        + ", the optimizer too" * compiles_optimizer(run, job.world.device),
        rows + (f", {again} of {len(job.model.blocks)} layers computed again in backward"
                if again else ""),
        f"Triton: {', '.join(sorted(run.triton_kernels)) or 'none'}"])


# --- one step -------------------------------------------------------------------------------------

def clip_gradients(model: GPT, largest: float) -> None:
    """Scale all gradients down so that the norm of their sum over ranks is at most `largest`.

    Record #1 alone does it. The norm is known only after all gradients have met, so they meet here,
    and each rank hands the optimizer, which adds them up, its share of the sum.
    """
    grads = [p.grad for p in model.parameters()]
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size > 1:
        for grad in grads:
            dist.all_reduce(grad)
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    factor = (largest / (total + 1e-6)).clamp(max=1.0) / size
    for grad in grads:
        grad.mul_(factor)


def train_step(model: GPT, optimizer: Muon, recipe: Recipe, batch: Batch, micro_tokens: int,
               global_tokens: int, signals: Signals | None = None, stop: bool = False) -> None:
    """Gradients of one step and the update; where `signals` watches, a bad step moves nothing.

    A rank's share of the loss is a sum over its tokens divided by a number that all ranks know
    (`global_tokens`, where the recipe has no loss_divisor), so shares add up. What `signals` tell
    is the mean in nats per token.
    """
    divisor = recipe.loss_divisor or global_tokens
    share = torch.zeros((), device=batch.inputs_BT.device)
    parts = micro_batches(batch, micro_tokens)
    for i, part in enumerate(parts):
        if i == len(parts) - 1:
            if signals is not None:
                signals.arm()
            if recipe.grad_clip is None:
                optimizer.arm()  # from here on a bucket is reduced as soon as it is complete
        loss = model(*part)
        (loss / divisor).backward()
        share += loss.detach() / global_tokens
    if recipe.grad_clip is not None:
        clip_gradients(model, recipe.grad_clip * global_tokens / divisor)
    if signals is not None:
        signals.agree(share, optimizer.nonfinite.any(), stop)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: GPT, recipe: Recipe, data: Data, world: World, micro_tokens: int) -> float:
    """Mean cross-entropy in nats over the first val_tokens validation tokens, each once, in order.

    Part of the harness that the game fixes: a record does not change it.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    rows = max(1, micro_tokens // recipe.val_row)
    for batch in val_batches(data.val_files, recipe.val_tokens, recipe.val_row, rows, world.rank,
                             world.size, vocab_size=recipe.model.vocab_size,
                             bos_id=data.bos_id, device=world.device):
        total += model(batch.inputs_BT, batch.targets_BT, batch.docs_B2).double()
    model.train()
    return (world.sum(total) / recipe.val_tokens).item()


def short_of_memory(device: torch.device) -> bool:
    """Whether a copy of what lies on `device` now could be missing later, beside a step: 24 GB hold
    record #62's model, gradients and optimizer (6.9 GB) and a step or a copy of them, not all."""
    return device.type == "cuda" and 4 * torch.cuda.memory_allocated(device) > (
        torch.cuda.get_device_properties(device).total_memory)


def warm_up(model: GPT, optimizer: Muon, recipe: Recipe, data: Data, world: World,
            micro_tokens: int, signals: Signals | None = None) -> None:
    """Run every kernel of a step and of a validation, then put everything back as it was.

    What is restored (parameters, gradients, optimizer state, random numbers) is compared with
    what was there before; a warm-up that leaked would be training outside the clock.
    """
    def state() -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"grad.{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        return tensors | {"rng": torch.get_rng_state()}

    before, optimizer_before = state(), optimizer.state_dict()
    if short_of_memory(world.device):
        before, optimizer_before = checkpoint.on_cpu(before), checkpoint.to_cpu(optimizer_before)
    else:
        before = {k: v.clone() for k, v in before.items()}
    generator = torch.Generator().manual_seed(0)
    steps = [0, *recipes.stage_steps(recipe)]
    # Each group must act once, also one that waits for its k-th step.
    slowest = max(group["every"] for group in optimizer.param_groups)
    for step in steps + [0] * (slowest - len(steps)):
        recipes.enter_stage(model, optimizer, recipes.stage(step, recipe))
        num_rows, seq_len = batch_shape(step, recipe)
        batch = throw_away((own_rows(num_rows, world), seq_len), recipe, world.device, generator)
        train_step(model, optimizer, recipe, batch, micro_tokens, num_rows * seq_len, signals)
    val_tokens = recipe.val_row * min(max(1, micro_tokens // recipe.val_row) * world.size,
                                      recipe.val_tokens // recipe.val_row)
    model.set_stage(recipes.eval_stage(0, recipe))
    evaluate(model, dataclasses.replace(recipe, val_tokens=val_tokens), data, world,
             micro_tokens)
    model.set_stage(recipes.stage(0, recipe))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(before[f"model.{name}"])
    optimizer.load_state_dict(optimizer_before)
    optimizer.zero_grad()  # after the state: groups that collect over steps are at their start now
    optimizer.nonfinite.zero_()
    if signals is not None:
        signals.reset()
    torch.set_rng_state(before["rng"])
    leaks = [k for k, v in state().items()
             if k in before and not torch.equal(v, before[k].to(v.device))]
    assert not leaks, f"the warm-up changed {leaks}"


# --- a run ----------------------------------------------------------------------------------------

def new_run_id(recipe: Recipe, seed: int) -> str:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{now}_r{recipe.record}_{recipe.scale}_s{seed}_{secrets.token_hex(2)}"


@dataclass(frozen=True)
class Job:
    """One training: what it is, on what it runs, and what it changes."""

    run: options.Run
    recipe: Recipe
    seed: int
    data: Data
    world: World
    model: GPT
    optimizer: Muon
    signals: Signals
    micro_tokens: int


@dataclass
class Progress:
    """Where a training stands."""

    clock: Clock
    memory: PeakMemory
    step: int = 0               # updates done
    validation_s: float = 0.0
    graphs: int = 0             # compiled in a step, which the warm-up should have
    reason: str = ""            # why it stopped before its end

    @property
    def status(self) -> str:
        return {"": "complete", PREEMPTED: "preempted", PROFILED: "preempted"}.get(
            self.reason, "failed")

    def tokens(self, recipe: Recipe) -> int:
        """Trained on so far."""
        return sum(math.prod(batch_shape(step, recipe)) for step in range(self.step))


PREEMPTED = "preempted: somebody asked to stop"
PROFILED = "profiled, which is all it was for: no record"


class Crash(RuntimeError):
    """Something nobody foresaw; what it was stands above it in the traceback."""


def make_job(run: options.Run, recipe: Recipe, seed: int, data: Data, world: World,
             backend: str | Callable = "inductor") -> Job:
    activate_flash_attention(world.device)
    model = build_model(recipe, seed, world.device, run.triton_kernels)
    if wants_compile(run, world.device)[0]:
        compile_segments(model, run.compile_layers, backend)
    signals = Signals(world, model.named_parameters())
    optimizer = build_optimizer(model, recipe, run.triton_kernels,
                                compiles_optimizer(run, world.device))
    signals.guard(optimizer)
    micro_tokens, model.recomputed = fit_memory(recipe, run, world.device)
    return Job(run, recipe, seed, data, world, model, optimizer, signals, micro_tokens)


def make_loader(recipe: Recipe, data: Data, world: World, cursor: dict | None) -> Loader:
    return Loader(data.train_files, partial(batch_shape, recipe=recipe),
                  vocab_size=recipe.model.vocab_size, bos_id=data.bos_id,
                  repeat_first=recipe.first_batch_repeated, align=recipe.data_align,
                  max_doc_len=recipe.max_doc_len, rank=world.rank, world_size=world.size,
                  cursor=cursor, device=world.device)


@record_function("data")
def next_batch(loader: Loader, step: int, job: Job) -> Batch:
    """This rank's rows. Where they cannot be read it takes part in the step with zeros, so that
    no rank waits for it, and the fault makes the step void for all."""
    try:
        return next(loader)
    except (ValueError, OSError) as error:
        job.signals.fault = str(error)
        num_rows, seq_len = batch_shape(step, job.recipe)
        rows = own_rows(num_rows, job.world)
        zeros_BT = torch.zeros(rows, seq_len, dtype=torch.int32, device=job.world.device)
        return Batch(zeros_BT, zeros_BT.long(), torch.tensor([[1, seq_len]] * rows))


def validate(job: Job, step: int) -> tuple[float, str]:
    """(loss, what is wrong) of a validation, with the clock stopped; collective."""
    model, world = job.model, job.world
    model.set_stage(recipes.eval_stage(step, job.recipe))
    try:
        val_loss = evaluate(model, job.recipe, job.data, world, job.micro_tokens)
    except (ValueError, OSError) as error:  # a file that went away: the others wait for a number
        job.signals.fault = str(error)
        val_loss = world.sum(torch.full((), math.nan, dtype=torch.float64,
                                        device=world.device)).item()
    model.set_stage(recipes.stage(step, job.recipe))
    drifted = world.drifted(model.named_parameters())
    if not math.isfinite(val_loss):
        return val_loss, f"validation loss {val_loss} after step {step}; {job.signals.why()}"
    if drifted:
        return val_loss, f"ranks drifted apart before step {step}: {', '.join(drifted[:5])}"
    return val_loss, ""


def timed_loop(job: Job, at: Progress, loader: Loader, reporter: Reporter, keeper: Keeper,
               stop_request: StopRequest, profile: Profile | None = None) -> None:
    """The training itself, with the clock on it; `at` says how it ended."""
    recipe, model, optimizer, signals = job.recipe, job.model, job.optimizer, job.signals
    clock, start = at.clock, at.step
    validated = reporter.history[-1][0] if reporter.history else -1
    if profile is not None:
        validated = recipe.num_iterations  # no validation among the steps to look at

    def heed(said: Signal | None) -> str:
        """Note what the ranks said of a step; the reason to stop, or nothing."""
        failed = at.reason not in ("", PREEMPTED)
        if said is None or failed:  # a step under way when a bad one was found was void
            return ""
        if said.step == start:
            job.world.limit_waiting(job.run.timeout_s)
        reporter.trained(said)
        if said.num_bad or not math.isfinite(said.loss):
            at.step = said.step  # neither this update nor one after it was made
            return f"bad step {said.step + 1}, no update was made; {signals.why()}"
        return PREEMPTED if said.stop else ""

    clock.start()
    while True:
        step = at.step
        ends = step == recipe.num_iterations
        recipes.enter_stage(model, optimizer, recipes.stage(step, recipe))
        validates = (ends or step % recipe.val_every == 0) and step > validated
        # No checkpoint, and no stop, while gradients add up over several steps.
        whole = not any(optimizer.calls % group["every"] for group in optimizer.param_groups)
        if validates or keeper.due(step, ends) or at.reason or ends:
            at.reason = heed(signals.receive()) or at.reason
            if ends and at.reason == PREEMPTED:
                at.reason = ""  # nothing is left to be stopped
            clock.stop()
            at.memory.look(steps=True)
            began = time.perf_counter()
            if validates and not at.reason:
                val_loss, at.reason = validate(job, step)
                reporter.validated(step, val_loss, 1000 * clock.elapsed_s, at.tokens(recipe))
                validated = step
                at.validation_s += time.perf_counter() - began
            stops = at.reason and (whole or at.reason != PREEMPTED)
            asked = at.reason == PREEMPTED
            if whole and (asked or (keeper.due(step, ends) and not at.reason)):
                with job.world.patient():
                    keep_checkpoint(job, at, loader.cursor, reporter, keeper)
            at.memory.look(steps=False)
            if ends or stops:
                break
            clock.start()
        for group in optimizer.param_groups:
            group.update(recipes.group_schedule(step, group["name"], recipe))
        batch = next_batch(loader, step, job)
        signals.fault = signals.fault or clock.fault or reporter.fault
        graphs = compiled_graphs()
        train_step(model, optimizer, recipe, batch, job.micro_tokens,
                   math.prod(batch_shape(step, recipe)), signals, stop_request.asked)
        at.graphs += compiled_graphs() - graphs
        at.step += 1
        job.world.mark(at.step)
        at.reason = heed(signals.receive()) or at.reason  # of the step before: the host never waits
        signals.send(step, clock.now_ms())
        if profile is not None and profile.after_step():
            at.reason = at.reason or PROFILED


def keep_checkpoint(job: Job, at: Progress, cursor: dict, reporter: Reporter,
                    keeper: Keeper) -> None:
    """A collective call. A disk that refuses costs the checkpoint, not the run."""
    optimizer_state = job.optimizer.state_dict()
    if not job.world.is_first:
        keeper.last = at.step
        return
    try:
        path = keeper.keep(at.step, {
            "elapsed_s": at.clock.elapsed_s, "validation_s": at.validation_s, "cursor": cursor,
            "history": [list(point) for point in reporter.history],
            **checkpoint.capture(job.model, optimizer_state)})
        reporter.say(f"checkpoint: {path.name}")
    except OSError as error:
        reporter.say(f"NO CHECKPOINT at step {at.step}: {error}; earlier ones are intact")


def tensors_of(path: str, world: World) -> dict:
    """A checkpoint that the first rank has verified, on every rank from the file where all see it:
    what is sent lies three times over in each one's memory, 18 GB for record #62."""
    def read() -> dict:
        return checkpoint.load(Path(path), mmap=True)

    everywhere = len(set(world.gather(checkpoint.stamp(path)))) == 1
    return world.every(read) if everywhere else world.first(read)


def train(run: options.Run, recipe: Recipe, seed: int, data: Data, world: World, screen: Screen,
          stop_request: StopRequest, helpers: Helpers, wall_start: float) -> str:
    """One training from seed to log: complete, preempted or failed. `wall_start`: when it began,
    by time.perf_counter."""
    log_dir = Path(run.log_dir)
    run_id = world.first(lambda: new_run_id(recipe, seed))
    log_path = log_dir / f"{run_id}.txt"
    sources = local_sources()
    mine = {"seed": seed, "recipe": recipes.to_dict(recipe), "data_digest": data.digest,
            "source_digest": source_digest(sources), "world_size": world.size}
    earlier = world.first(lambda: checkpoint.resume(run.resume, log_dir, mine, screen.line,
                                                    screen.warn))
    check_profile(run.profile, earlier["step"] if earlier else 0, recipe.num_iterations)
    if earlier is not None and earlier["step"] == recipe.num_iterations:
        screen.line(f"run {earlier['run_id']} is complete: all {earlier['step']} steps are done, "
                    "nothing is left to do (another --seed trains another model)")
        return "complete"

    job = make_job(run, recipe, seed, data, world, helpers.backend)
    helpers.begin(job.micro_tokens, job.model.recomputed)
    where = environment(world, torch.get_num_threads())
    screen.line()
    screen.facts(header(recipe, seed, job.model, f"{run.data_dir or recipe.corpus}, "
                        f"{len(data.train_files)} training shard"
                        f"{'s' * (len(data.train_files) > 1)}, digest {data.digest[:12]}", world,
                        describe_speed(run, job), where))

    warmup_start = time.perf_counter()
    if wants_compile(run, world.device)[0] and world.local_size > 1:
        compile_ahead(job.model, recipe, world, job.micro_tokens)
    warm_up(job.model, job.optimizer, recipe, data, world, job.micro_tokens, job.signals)
    world.synchronize()
    for why in helpers.end(warm=True):
        screen.warn(f"a process that should help to compile failed: {why}")
    now = time.perf_counter()
    warmup_s, start_s = now - warmup_start, now - wall_start
    screen.line(f"warm-up done in {warmup_s:.1f} s, {start_s:.1f} s from the start; everything put "
                "back as it was")

    at = Progress(Clock(world), PeakMemory(world.device))
    reporter = Reporter(recipe, screen, run_id, run.wandb, data.digest)
    if earlier is not None:
        recipes.enter_stage(job.model, job.optimizer, recipes.stage(earlier["step"], recipe))
        checkpoint.restore(tensors_of(earlier["path"], world), job.model, job.optimizer)
        at.step, at.clock.elapsed_s = earlier["step"], earlier["elapsed_s"]
        at.validation_s = earlier["validation_s"]
        reporter.history = [tuple(point) for point in earlier["history"]]
        where |= {"resumed_from": earlier["run_id"], "resumed_step": str(at.step),
                  "resumed_log_sha256": earlier["log_sha256"]}
    profile = Profile(run.profile, world) if run.profile else None
    keeper = Keeper(log_dir, run_id, run.checkpoint_every, run.keep, at.step, mine)
    crash = None
    with world.every(lambda: make_loader(recipe, data, world,
                                         earlier and earlier["cursor"])) as loader:
        world.first(lambda: reporter.open_log(log_path, sources, where))
        if at.step:
            reporter.say(f"resumed from step {at.step} of run {earlier['run_id']}, after "
                         f"{at.clock.elapsed_s:.1f} s of training")
        screen.start(recipe.total_tokens, at.tokens(recipe))
        try:
            with world.watched():
                timed_loop(job, at, loader, reporter, keeper, stop_request, profile)
        except Exception as error:
            crash, at.reason = error, f"{type(error).__name__}: {error}"
    if crash is None:  # the others have nothing more to do, the first rank has: it saves
        world.limit_waiting(FIRST_STEP_TIMEOUT_S)
    at.reason = at.clock.fault or at.reason
    if at.reason:
        reporter.say(f"stopped after step {at.step}: {at.reason}")
    if at.graphs:
        reporter.say(f"the clock holds compiling: {at.graphs} graphs that the warm-up did not "
                     "build")
    if profile is not None:
        for line in profile.finish(log_path.with_suffix(".trace.json.gz"),
                                   recipe.model.padded_vocab_size):
            reporter.say(line)

    model_path = log_path.with_suffix(".pt") if crash is None and profile is None else None
    if world.is_first and model_path is not None:
        try:
            checkpoint.save(model_path, {
                "kind": "model", "run_id": run_id, "step": at.step, "recipe": mine["recipe"],
                "model": checkpoint.on_cpu(job.model.state_dict())})
        except OSError as error:
            reporter.say(f"THE MODEL IS NOT SAVED: {error}")
            model_path = None
    tokens, val_loss = at.tokens(recipe), reporter.history[-1][1] if reporter.history else math.nan
    tokens_per_s = tokens / max(at.clock.elapsed_s, 1e-9)
    flops, peak = recipes.mean_flops_per_token(recipe, job.model), peak_flops(world.device)
    result = {
        "status": at.status, "track": recipe.track, "record": recipe.record,
        "scale": recipe.scale, "seed": seed, "world_size": world.size, "target": recipe.target,
        "reached": recipe.target is not None and at.status == "complete"
                   and val_loss <= recipe.target,
        "final_val_loss": f"{val_loss:.6f}", "num_iterations": recipe.num_iterations,
        "tokens": tokens, "train_time_ms": f"{1000 * at.clock.elapsed_s:.0f}",
        "wall_time_s": f"{time.perf_counter() - wall_start:.1f}",
        "start_s": f"{start_s:.1f}", "warmup_s": f"{warmup_s:.1f}",
        "validation_s": f"{at.validation_s:.1f}",
        "tokens_per_s": f"{tokens_per_s:.0f}",
        "mfu": "unknown" if peak is None else f"{tokens_per_s * flops / peak / world.size:.4f}",
        "peak_memory_mib": f"{at.memory.all:.0f}", "peak_step_mib": f"{at.memory.steps:.0f}",
        "graphs_in_clock": at.graphs,
        "parameters": num_parameters(job.model), "data_digest": data.digest,
        "resumed": earlier is not None, "profiled_steps": run.profile, "checkpoint": model_path,
    }
    whole = reporter.close(result)
    if crash is not None:
        raise crash if isinstance(crash, LostRank) else Crash(f"rank {world.rank}") from crash
    if world.is_first and profile is None:
        show_end(screen, recipe, result, log_path, job.model)
    return at.status if whole else "failed"


# --- main -----------------------------------------------------------------------------------------

def data_here(data: Data) -> str:
    """What this rank sees of the files that the first one found."""
    sizes = [f"{path} {path.stat().st_size}" for path in (*data.train_files, *data.val_files)]
    return f"{len(sizes)} files, {hashlib.sha256(' '.join(sizes).encode()).hexdigest()[:12]}"


def main(argv: list[str]) -> int:
    prepare_cuda()
    first = int(os.environ.get("RANK", 0)) == 0
    if "--help" in argv or "-h" in argv:
        if first:
            print(options.help_text())
        return 0
    screen = Screen(speaks=first)
    try:
        run, recipe = options.parse(argv, has_cuda=torch.cuda.is_available())
        if recipe.model.head == "fp8":
            check_fp8(device_for(run.device))
        check_kernels(run.triton_kernels, device_for(run.device))
        if run.prepare:
            checkpoint.check_folder(Path(run.log_dir))
            find_data(recipe, run)
            rank_rows(batch_shape(0, recipe)[0], 0, int(os.environ.get("WORLD_SIZE", 1)))
            return 0
        with join_world(run.device) as world, StopRequest() as stop_request, world.watched():
            facts, code = recipes.to_dict(recipe), source_digest(local_sources())
            world.agree(facts.pop("model") | facts
                        | {name: getattr(run, name) for name in
                           ("seed", "runs", "resume", "checkpoint_every", "timeout_s", "compile",
                            "compile_layers", "compile_optimizer", "kernels", "recompute",
                            "profile")}
                        | {"the code": code})
            rank_rows(batch_shape(0, recipe)[0], world.rank, world.size)
            with start_helpers(run, recipe, world, argv, code) as helpers:
                data = world.first(lambda: find_data(recipe, run))
                world.agree({"the data": world.every(lambda: data_here(data))})
                began = time.perf_counter() - process_age_s()
                for seed in range(run.seed, run.seed + run.runs):
                    status = train(run, recipe, seed, data, world, screen, stop_request, helpers,
                                   began)
                    began = time.perf_counter()
                    if status != "complete":
                        return int(status == "failed")
                    gc.collect()  # a compiled model refers to itself: it would stay beside the next
        return 0
    except (ValueError, OSError) as error:  # what a user or the network can cause
        if first:
            print(f"train_gpt.py: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except LostRank as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was anything to save
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
