"""The trainer: options -> ranks -> data -> model and optimizer -> warm-up -> training loop -> log.

    python train_gpt.py                          one process: a GPU, or pocket scale on a CPU
    torchrun --standalone --nproc_per_node 8 train_gpt.py --record 6
    ./run.sh                                     the same with environment and data taken care of

The recipe defines the training, never the machine: a step's rows exist before ranks do, each rank
takes a consecutive run of them, losses are sums over tokens divided by one number for all ranks
(the tokens of the whole step, or the recipe's loss_divisor), and gradients are summed. So any
number of ranks sees the same tokens and agrees up to rounding. World size 1 is the same code.

The clock runs from the first step to the last, device synchronised at both ends; compiling,
validation and saving are outside it and reported beside it.

The machinery (options, ranks, status, checkpoints, log) is in trainer/; none of it changes what is
learned.
"""

import dataclasses
import datetime
import gc
import math
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import record_function

import recipes
from data.loader import Batch, Loader, rank_rows, val_batches
from data.prefixes import token_prefixes
from data.tokenizer import TOKENIZERS, tokenizer_of
from kernels import check_kernels, symmetric
from kernels.attention import activate_flash_attention
from kernels.fp8 import check_fp8
from model import GPT
from muon import Muon
from recipes import Recipe, batch_shape
from tools.sample import generate
from trainer import checkpoint, options
from trainer.checkpoint import CheckpointWriter
from trainer.compile import (
    compile_ahead,
    compile_segments,
    compiled_graphs,
    layers_a_graph,
    wants_compile,
    wants_compiled_optimizer,
)
from trainer.data import OWN_DATA, Data, describe_files, find_data, make_loader
from trainer.dist import (
    FIRST_STEP_TIMEOUT_S,
    Clock,
    LostRank,
    World,
    device_for,
    join_world,
    prepare_cuda,
    process_age_s,
)
from trainer.memory import PeakMemory, dummy_batch, fit_memory, local_rows, micro_batches
from trainer.options import RunOptions
from trainer.profile import Profile, check_profile
from trainer.report import (
    Reporter,
    Screen,
    closing_block,
    environment,
    header,
    local_sources,
    show_end,
    source_digest,
    without_secrets,
)
from trainer.status import StepReport, StepStatus, StopRequest

PREEMPTED = "preempted: a signal asked to stop"
PROFILED = "profiled: a run with --profile stops here and is no record"
PROMPT = "Return the "  # of the text that a pocket model writes at the end


class Crash(RuntimeError):
    """Unexpected error; see the chained traceback."""


@dataclass
class TrainState:
    """One training: its parts, and how far it is."""

    run: RunOptions
    recipe: Recipe
    seed: int
    data: Data
    world: World
    model: GPT
    optimizer: Muon
    status: StepStatus
    micro_tokens: int           # of a micro-batch, in tokens per rank

    clock: Clock
    memory: PeakMemory
    step: int = 0               # updates done
    first_step: int = 0         # where this process began: 0, or where it was resumed
    validation_s: float = 0.0
    graphs_in_clock: int = 0    # compiled during a step, though the warm-up should have done it
    stop_reason: str = ""       # why it stopped before its end

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return sum(math.prod(batch_shape(step, self.recipe)) for step in range(self.step))

    @property
    def outcome(self) -> str:
        return {"": "complete", PREEMPTED: "preempted", PROFILED: "preempted"}.get(
            self.stop_reason, "failed")


# --- setup ----------------------------------------------------------------------------------------

def build_model(recipe: Recipe, seed: int, device: torch.device,
                kernels: frozenset[str] = frozenset()) -> GPT:
    torch.manual_seed(seed)
    model = recipes.build_model(recipe, seed, kernels)
    if recipe.prefix_weight:  # (#88)
        model.prefixes = torch.from_numpy(token_prefixes(recipe.model.vocab_size))
    return model.to(device)


def build_optimizer(model: GPT, recipe: Recipe, kernels: frozenset[str] = frozenset(),
                    compiled: bool = False) -> Muon:
    """One optimizer for all parameters, grouped by the recipe."""
    products = (symmetric.gram, symmetric.polynomial) if "symmetric" in kernels else None
    return Muon(recipes.optimizer_groups(recipe, model.named_parameters()), reduce="sum",
                collective=recipe.grad_collective, overlap=recipe.grad_overlap, products=products,
                compile=compiled)


def setup(run: RunOptions, recipe: Recipe, seed: int, data: Data, world: World) -> TrainState:
    activate_flash_attention(world.device)
    model = build_model(recipe, seed, world.device, run.triton_kernels)
    if wants_compile(run, world)[0]:
        compile_segments(model, layers_a_graph(run, world))
    status = StepStatus(world, model.named_parameters())
    optimizer = build_optimizer(model, recipe, run.triton_kernels,
                                wants_compiled_optimizer(run, world))
    optimizer.gate = status.gate
    micro_tokens, model.recomputed = fit_memory(recipe, run, world.device, optimizer)
    return TrainState(run, recipe, seed, data, world, model, optimizer, status, micro_tokens,
                      Clock(world), PeakMemory(world.device))


# --- one step -------------------------------------------------------------------------------------

def clip_gradients(model: GPT, max_norm: float) -> None:
    """Scale all gradients so that the norm of their sum over ranks is at most `max_norm` (#1).

    The norm needs the reduced gradients, so they are all-reduced here. The optimizer sums over
    ranks again; each rank hands it its share of the sum.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size > 1:
        for grad in grads:
            dist.all_reduce(grad)
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0) / size
    for grad in grads:
        grad.mul_(factor)


def train_step(model: GPT, optimizer: Muon, recipe: Recipe, batch: Batch, micro_tokens: int,
               global_tokens: int, status: StepStatus | None = None, stop: bool = False) -> None:
    """Gradients of one step, accumulated over micro-batches, and the update.

    A rank's share of the loss is the sum over its tokens divided by one number for all ranks, so
    that shares add up: the step's tokens, which makes a mean, or the recipe's loss_divisor, which
    gives gradients the unit that they had in the record. With `status` a bad step moves no
    parameter, and the ranks learn of each other's wish to `stop`.
    """
    divisor = recipe.loss_divisor or global_tokens
    loss_share = torch.zeros((), device=batch.inputs_BT.device)
    parts = micro_batches(batch, micro_tokens)
    for i, part in enumerate(parts):
        if i == len(parts) - 1 and recipe.grad_clip is None:
            optimizer.sync_next_backward()  # it completes the gradients: reduce as they come
        loss = model(*part) / divisor
        loss.backward()
        loss_share += loss.detach()
    if status is not None:
        status.take_norms()
    if recipe.grad_clip is not None:  # of the mean loss's gradients
        clip_gradients(model, recipe.grad_clip * global_tokens / divisor)
    if status is not None:
        if divisor != global_tokens:  # the log has the mean
            loss_share *= divisor / global_tokens
        status.reduce(loss_share, optimizer.nonfinite.any(), stop)
    optimizer.step()
    optimizer.zero_grad()


# --- validation -----------------------------------------------------------------------------------

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


def validate(s: TrainState) -> float:
    """The validation loss after s.step updates; sets s.stop_reason where the run must not go on."""
    began = time.perf_counter()
    s.model.set_phase(recipes.eval_phase(s.step, s.recipe))
    try:
        val_loss = evaluate(s.model, s.recipe, s.data, s.world, s.micro_tokens)
    except (ValueError, OSError) as error:  # a missing shard: the others wait for this sum
        s.status.local_fault = str(error)
        nan = torch.full((), math.nan, dtype=torch.float64, device=s.world.device)
        val_loss = s.world.sum(nan).item()
    s.model.set_phase(recipes.phase(s.step, s.recipe))
    differing = s.world.out_of_sync(s.model.named_parameters())
    if not math.isfinite(val_loss):
        s.stop_reason = f"validation loss {val_loss} after step {s.step}; {s.status.explain()}"
    elif differing:
        s.stop_reason = f"ranks drifted apart before step {s.step}: {', '.join(differing[:5])}"
    s.validation_s += time.perf_counter() - began
    return val_loss


# --- warm-up --------------------------------------------------------------------------------------

def warm_up(model: GPT, optimizer: Muon, recipe: Recipe, data: Data, world: World,
            micro_tokens: int, status: StepStatus | None = None) -> None:
    """Run every kernel of a step and of a validation on random tokens, outside the clock.

    Parameters, gradients, optimizer state and random numbers are restored and compared with those
    before: a warm-up that leaked would be training outside the clock.
    """
    with checkpoint.restored_afterwards(model, optimizer):
        generator = torch.Generator().manual_seed(0)
        # A step of each kind, and enough of them for groups that act on every k-th step only.
        steps = [0, *recipes.phase_steps(recipe)]
        steps += [0] * (max(group["update_interval"] for group in optimizer.param_groups)
                        - len(steps))
        for step in steps:
            recipes.enter_phase(model, optimizer, recipes.phase(step, recipe))
            num_rows, seq_len = batch_shape(step, recipe)
            batch = dummy_batch((local_rows(num_rows, world), seq_len), recipe, world.device,
                                generator)
            train_step(model, optimizer, recipe, batch, micro_tokens, num_rows * seq_len, status)
        one_batch = recipe.val_row * min(max(1, micro_tokens // recipe.val_row) * world.size,
                                         recipe.val_tokens // recipe.val_row)
        model.set_phase(recipes.eval_phase(0, recipe))
        evaluate(model, dataclasses.replace(recipe, val_tokens=one_batch), data, world,
                 micro_tokens)
        model.set_phase(recipes.phase(0, recipe))
    if status is not None:
        status.reset()


# --- the training loop ----------------------------------------------------------------------------

@record_function("data")
def next_batch(loader: Loader, s: TrainState) -> Batch:
    """This rank's rows of the next step. Where they cannot be read the rank takes part with zeros,
    so that no other waits for it, and its fault makes the step void on all."""
    try:
        return next(loader)
    except (ValueError, OSError) as error:
        s.status.local_fault = str(error)
        num_rows, seq_len = batch_shape(s.step, s.recipe)
        rows = local_rows(num_rows, s.world)
        zeros_BT = torch.zeros(rows, seq_len, dtype=torch.int32, device=s.world.device)
        return Batch(zeros_BT, zeros_BT.long(), torch.tensor([[1, seq_len]] * rows))


def handle_report(s: TrainState, report: StepReport | None, reporter: Reporter) -> None:
    """Log what the ranks reported of a step. A bad step or a stop request sets s.stop_reason."""
    already_failed = s.stop_reason not in ("", PREEMPTED)
    if report is None or already_failed:  # a step under way when a bad one was found was void
        return
    if report.step == s.first_step:  # compiling is over
        s.world.set_timeout(s.run.timeout_s)
    reporter.trained(report)
    if report.bad:
        s.step = report.step  # neither this update nor one after it was made
        s.stop_reason = (f"bad step {report.step + 1}, no update was made; "
                         f"{s.status.explain()}")
    elif report.stop_requested:
        s.stop_reason = PREEMPTED


def train_loop(s: TrainState, loader: Loader, reporter: Reporter, checkpoints: CheckpointWriter,
               stop_request: StopRequest, profile: Profile | None = None) -> None:
    """The training itself, with the clock on it. s.stop_reason says how it ended."""
    recipe, model, optimizer = s.recipe, s.model, s.optimizer
    validated = reporter.history[-1][0] if reporter.history else -1
    if profile is not None:
        validated = recipe.num_iterations  # no validation among the steps that are profiled
    s.clock.start()
    while True:
        last = s.step == recipe.num_iterations

        # windows, targets and tied embedding of this step
        recipes.enter_phase(model, optimizer, recipes.phase(s.step, recipe))

        # every so often: stop the clock, validate, write a checkpoint; and at the end leave
        validates = (last or s.step % recipe.val_every == 0) and s.step > validated
        # gradients that add up over several steps are in no checkpoint
        between_updates = not any(optimizer.step_count % group["update_interval"]
                                  for group in optimizer.param_groups)
        if validates or checkpoints.due(s.step, last) or s.stop_reason or last:
            handle_report(s, s.status.receive(), reporter)
            if last and s.stop_reason == PREEMPTED:
                s.stop_reason = ""  # nothing is left to stop
            s.clock.stop()
            s.memory.update(only_steps=True)
            if validates and not s.stop_reason:
                val_loss = validate(s)
                reporter.validated(s.step, val_loss, 1000 * s.clock.elapsed_s, s.tokens)
                validated = s.step
            wanted = s.stop_reason == PREEMPTED or (
                not s.stop_reason and checkpoints.due(s.step, last))
            if wanted and between_updates:
                save_checkpoint(s, loader, reporter, checkpoints)
            s.memory.update(only_steps=False)
            if last or (s.stop_reason and (between_updates or s.stop_reason != PREEMPTED)):
                return
            s.clock.start()

        # learning rates and momentum of this step
        for group in optimizer.param_groups:
            group.update(recipes.group_schedule(s.step, group["name"], recipe))

        # forward, backward and update
        batch = next_batch(loader, s)
        s.status.local_fault = s.status.local_fault or s.clock.fault or reporter.fault
        graphs = compiled_graphs()
        train_step(model, optimizer, recipe, batch, s.micro_tokens,
                   math.prod(batch_shape(s.step, recipe)), s.status, stop_request.asked)
        s.graphs_in_clock += compiled_graphs() - graphs
        step, s.step = s.step, s.step + 1
        s.world.report_progress(s.step)

        # read the report of the step before, so that the host never waits for this one
        handle_report(s, s.status.receive(), reporter)
        s.status.send(step, s.clock.now_ms())
        if profile is not None and profile.after_step():
            s.stop_reason = s.stop_reason or PROFILED


def save_checkpoint(s: TrainState, loader: Loader, reporter: Reporter,
                    checkpoints: CheckpointWriter) -> None:
    """A collective call. A disk that refuses costs the checkpoint, not the run."""
    with s.world.long_timeout():
        optimizer_state = s.optimizer.state_dict()  # gathered from all ranks
        if not s.world.is_rank0:
            checkpoints.last = s.step
            return
        try:
            path = checkpoints.write(s.step, {
                "elapsed_s": s.clock.elapsed_s, "validation_s": s.validation_s,
                "cursor": loader.cursor, "history": [list(point) for point in reporter.history],
                **checkpoint.capture(s.model, optimizer_state)})
            reporter.say(f"checkpoint: {path.name}")
        except OSError as error:
            reporter.say(f"NO CHECKPOINT at step {s.step}: {error}; earlier ones are intact")


# --- one run --------------------------------------------------------------------------------------

def new_run_id(recipe: Recipe, seed: int) -> str:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{now}_r{recipe.name or recipe.record}_{recipe.scale}_s{seed}_{secrets.token_hex(2)}"


def train(run: RunOptions, recipe: Recipe, seed: int, data: Data, world: World, screen: Screen,
          stop_request: StopRequest, started: float) -> str:
    """One training from seed to log; returns "complete", "preempted" or "failed". `started`: when
    it began, by time.perf_counter."""
    log_dir = Path(run.log_dir)
    run_id = world.from_rank0(lambda: new_run_id(recipe, seed))
    log_path = log_dir / f"{run_id}.txt"
    sources = local_sources()
    identity = {"seed": seed, "recipe": recipes.to_dict(recipe), "data_digest": data.digest,
                "source_digest": source_digest(sources), "world_size": world.size}
    resumed = world.from_rank0(lambda: checkpoint.resume(run.resume, log_dir, identity,
                                                         screen.line, screen.warn))
    check_profile(run.profile, resumed["step"] if resumed else 0, recipe.num_iterations)
    if resumed and resumed["step"] == recipe.num_iterations:
        screen.line(f"run {resumed['run_id']} is complete: all {resumed['step']} steps are done, "
                    "nothing is left to do (another --seed trains another model)")
        return "complete"

    # model, optimizer, and a warm-up that leaves no trace
    s = setup(run, recipe, seed, data, world)
    run_environment = environment(world, torch.get_num_threads())
    screen.line()
    screen.facts(header(s, run_environment))
    warmup_began = time.perf_counter()
    if wants_compile(run, world)[0] and world.local_size > 1:
        compile_ahead(s.model, recipe, world, s.micro_tokens)
    warm_up(s.model, s.optimizer, recipe, data, world, s.micro_tokens, s.status)
    world.synchronize()
    times = {"started": started, "start_s": time.perf_counter() - started,
             "warmup_s": time.perf_counter() - warmup_began}
    screen.line(f"warm-up done in {times['warmup_s']:.1f} s, {times['start_s']:.1f} s from the "
                "start; everything put back as it was")
    gc.collect()
    gc.freeze()  # collections on the clock look at what is new since the warm-up alone
    s.memory = PeakMemory(world.device)

    # resume, open the log, train
    reporter = Reporter(recipe, screen, run_id, run.wandb, data.digest)
    if resumed:
        recipes.enter_phase(s.model, s.optimizer, recipes.phase(resumed["step"], recipe))
        checkpoint.restore(checkpoint.read_on_ranks(resumed["path"], world), s.model, s.optimizer)
        s.step = s.first_step = resumed["step"]
        s.clock.elapsed_s, s.validation_s = resumed["elapsed_s"], resumed["validation_s"]
        reporter.history = [tuple(point) for point in resumed["history"]]
        run_environment |= {"resumed_from": resumed["run_id"], "resumed_step": str(s.step),
                            "resumed_log_sha256": resumed["log_sha256"]}
    profile = Profile(run.profile, world) if run.profile else None
    checkpoints = CheckpointWriter(log_dir, run_id, run.checkpoint_every, run.keep, s.step,
                                   identity)
    crash = None
    with world.all_or_raise(lambda: make_loader(recipe, data, world,
                                                resumed and resumed["cursor"])) as loader:
        world.from_rank0(lambda: reporter.open_log(log_path, sources, run_environment))
        if resumed:
            reporter.say(f"resumed from step {s.step} of run {resumed['run_id']}, after "
                         f"{s.clock.elapsed_s:.1f} s of training")
        screen.start(recipe.total_tokens, s.tokens)
        try:
            with world.translate_comm_errors():
                train_loop(s, loader, reporter, checkpoints, stop_request, profile)
        except Exception as error:
            crash, s.stop_reason = error, f"{type(error).__name__}: {error}"
    if crash is None:
        world.set_timeout(FIRST_STEP_TIMEOUT_S)  # the others wait while rank 0 saves the model
    return finish(s, reporter, log_path, run_id, identity, times, profile, resumed, crash)


def finish(s: TrainState, reporter: Reporter, log_path: Path, run_id: str, identity: dict,
           times: dict[str, float], profile: Profile | None, resumed: dict | None,
           crash: Exception | None) -> str:
    """Save the model, close the log and show the end of a run; returns its outcome."""
    s.stop_reason = s.clock.fault or s.stop_reason
    if s.stop_reason:
        reporter.say(f"stopped after step {s.step}: {s.stop_reason}")
    if s.graphs_in_clock:
        reporter.say(f"the clock includes compiling: {s.graphs_in_clock} graphs that the warm-up "
                     "did not build")
    if profile is not None:
        for line in profile.finish(log_path.with_suffix(".trace.json.gz"),
                                   s.recipe.model.padded_vocab_size):
            reporter.say(line)
    saved = s.run.save_model and crash is None and profile is None
    model_path = log_path.with_suffix(".pt") if saved else None
    if model_path is not None and s.world.is_rank0:
        try:
            checkpoint.save(model_path, {
                "kind": "model", "run_id": run_id, "step": s.step, "recipe": identity["recipe"],
                "model": checkpoint.on_cpu(s.model.state_dict())})
        except OSError as error:
            reporter.say(f"THE MODEL IS NOT SAVED: {error}")
            model_path = None
    result = closing_block(s, reporter, times, model_path, bool(resumed))
    log_is_whole = reporter.close(result)
    if crash is not None:
        raise crash if isinstance(crash, LostRank) else Crash(f"rank {s.world.rank}") from crash
    if s.world.is_rank0 and profile is None:
        text = ""
        bytes_only = tokenizer_of(s.recipe.model.vocab_size) is TOKENIZERS["bytes"]
        if bytes_only and s.outcome == "complete":  # GPT-2's ranks may need a network
            prompt = "" if s.recipe.track == OWN_DATA else PROMPT
            text = prompt + generate(s.model, prompt, num_tokens=240, temperature=0.7, seed=0)
        show_end(s, reporter, result, log_path, text)
    return s.outcome if log_is_whole else "failed"


# --- main -----------------------------------------------------------------------------------------

def run_all(run: RunOptions, recipe: Recipe, screen: Screen) -> int:
    """Train --runs seeds, one after the other, on the ranks that torchrun started."""
    with join_world(run.device) as world, StopRequest() as stop_request, (
            world.translate_comm_errors()):
        facts = recipes.to_dict(recipe)
        same_options = ("seed", "runs", "resume", "checkpoint_every", "timeout_s", "compile",
                        "compile_layers", "compile_optimizer", "kernels", "recompute", "profile")
        world.assert_equal_across_ranks(
            facts.pop("model") | facts | {name: getattr(run, name) for name in same_options}
            | {"the code": source_digest(local_sources())})
        rank_rows(batch_shape(0, recipe)[0], world.rank, world.size)
        data, recipe = world.from_rank0(lambda: find_data(recipe, run.data_dir))
        files = world.all_or_raise(lambda: describe_files(data))
        world.assert_equal_across_ranks({"the data": files})
        started = time.perf_counter() - process_age_s()
        for seed in range(run.seed, run.seed + run.runs):
            outcome = train(run, recipe, seed, data, world, screen, stop_request, started)
            if outcome != "complete":
                return int(outcome == "failed")
            gc.unfreeze()
            gc.collect()  # a compiled model is part of a cycle: it would stay beside the next one
            started = time.perf_counter()
    return 0


def main(argv: list[str]) -> int:
    prepare_cuda()
    is_rank0 = int(os.environ.get("RANK", 0)) == 0
    if "--help" in argv or "-h" in argv:
        if is_rank0:
            print(options.help_text())
        return 0
    try:
        run, recipe = options.parse(argv, has_cuda=torch.cuda.is_available())
        if recipe.model.head == "fp8":
            check_fp8(device_for(run.device))
        check_kernels(run.triton_kernels, device_for(run.device))
        if run.prepare:
            checkpoint.check_folder(Path(run.log_dir))
            find_data(recipe, run.data_dir)
            rank_rows(batch_shape(0, recipe)[0], 0, int(os.environ.get("WORLD_SIZE", 1)))
            return 0
        return run_all(run, recipe, Screen(speaks=is_rank0))
    except (ValueError, OSError) as error:  # of the user's or the network's making
        if is_rank0:
            print(f"train_gpt.py: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except LostRank as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was anything to save
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
