"""What a run tells: to the person at the terminal, to the log, to Weights & Biases.

On a terminal there is a progress bar below lines that stay; without one the lines are the same.
"""

import contextlib
import functools
import hashlib
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

import recipes
from kernels import peak_flops
from kernels.attention import describe_attention
from model import num_parameters
from recipes import Recipe, batch_shape
from records.log import LogError, RunLog, train_line, val_line
from records.rank import progress
from records.rank import rank as rank_in_table
from trainer.compile import wants_compile, wants_compiled_optimizer
from trainer.data import OWN_DATA
from trainer.dist import World
from trainer.memory import local_rows, micro_batch_rows
from trainer.status import StepReport

ROOT = Path(__file__).resolve().parent.parent
WANDB_PATIENCE_S = 30  # how long a finished run waits for its server


def secrets_here() -> dict[str, str]:
    """Environment variables that hold a secret, by their name: WANDB_API_KEY, HF_TOKEN, ..."""
    return {name: value for name, value in os.environ.items() if len(value) >= 8
            and re.search(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", name.upper())}


def without_secrets(text: str) -> str:
    """`text` with what must not be published blacked out: values of this environment's secrets,
    Hugging Face tokens, passwords in URLs, and words after --api_key, token=, password=."""
    for name, value in secrets_here().items():
        text = text.replace(value, f"[{name}]")
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "[token]", text)
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1[login]@", text)
    word = "(?:key|token|password|secret)"
    return re.sub(rf"(?i)(--[\w-]*{word}[ =]|\b\w*{word}=)\S+", r"\1[secret]", text)


@functools.cache  # read once, right after the imports: a later edit is not what runs
def local_sources() -> dict[str, str]:
    """Every module of this repository that the run has imported: name -> text, for the log."""
    files = {Path(m.__file__).resolve() for m in list(sys.modules.values())
             if getattr(m, "__file__", None)}
    own = sorted(f.relative_to(ROOT) for f in files
                 if f.is_relative_to(ROOT) and f.suffix == ".py" and f.is_file()
                 and not {".venv", "tests"} & set(f.relative_to(ROOT).parts))
    return {str(f): (ROOT / f).read_text() for f in own}


def source_digest(sources: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{k}\0{v}\0" for k, v in sources.items()).encode()).hexdigest()


def environment(world: World, threads: int) -> dict[str, str]:
    """Where the run runs: versions, devices, the commit and whether the tree was clean."""
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT,
                                  check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    facts = {
        "command": without_secrets(" ".join(["train_gpt.py", *sys.argv[1:]])),
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


class Screen:
    """Prints on the first rank, stays silent on the others."""

    def __init__(self, speaks: bool):
        self.speaks = speaks
        self.bar: tqdm | None = None

    def line(self, text: str = "") -> None:
        """One line that stays, above the bar where there is one."""
        self._write(text, sys.stdout)

    def warn(self, text: str) -> None:
        self._write(f"warning: {text}", sys.stderr)

    def _write(self, text: str, stream: TextIO) -> None:
        if not self.speaks:
            return
        try:
            tqdm.write(text, file=stream)
            stream.flush()
        except BrokenPipeError:  # the reader has ended: stop as when a terminal closes
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            signal.raise_signal(signal.SIGHUP)

    def facts(self, rows: dict[str, object]) -> None:
        """Aligned `name  value` rows, wrapped to the terminal's width."""
        width = max(len(name) for name in rows) + 2
        columns = max(shutil.get_terminal_size((80, 24)).columns, width + 20)
        for name, value in rows.items():
            wrapped = textwrap.wrap(str(value), columns - width - 1) or [""]
            for i, part in enumerate(wrapped):
                self.line(f"{name if i == 0 else '':<{width}}{part}")

    def start(self, total_tokens: int, done_tokens: int = 0) -> None:
        """Show the bar; there is none without a terminal."""
        if self.speaks and sys.stderr.isatty():
            self.bar = tqdm(total=total_tokens, initial=done_tokens, unit="tok", unit_scale=True,
                            dynamic_ncols=True, leave=False, mininterval=0.25, smoothing=0.1,
                            desc="training")

    def advance(self, tokens: int, loss: float | None) -> None:
        if self.bar is not None:
            if loss is not None:
                self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update(tokens)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Reporter:
    """Screen, log and, if asked for, Weights & Biases: one call for each thing that happens.

    Made on every rank; only the first one's has a log and speaks.
    """

    def __init__(self, recipe: Recipe, screen: Screen, run_id: str, with_wandb: bool,
                 data_digest: str):
        self.recipe, self.screen, self.data_digest = recipe, screen, data_digest
        self.log: RunLog | None = None
        self.fault = ""
        self.wandb_run = self._start_wandb(run_id) if with_wandb and screen.speaks else None
        self.history: list[tuple[int, float]] = []

    def open_log(self, path: Path, sources: dict[str, str], environment: dict[str, str]) -> None:
        """Raises ValueError where the log cannot be made, or would publish a secret."""
        for name, text in sources.items():
            for secret, value in secrets_here().items():
                if value in text:
                    raise ValueError(f"{name} contains the value of {secret}, and every log "
                                     "contains the sources: take it out")
        try:
            self.log = RunLog(path, sources,
                              environment | {"tokens_per_step": tokens_per_step(self.recipe)},
                              recipes.to_dict(self.recipe))
        except OSError as error:
            path.unlink(missing_ok=True) if not isinstance(error, FileExistsError) else None
            raise ValueError(f"--log_dir: the log {path} cannot be written "
                             f"({error.strerror or error})") from None

    def _start_wandb(self, run_id: str):
        """It can fail; a training run does not fail with it."""
        try:
            import wandb
            return wandb.init(project="nanogpt-speedrun", name=run_id,
                              config=recipes.to_dict(self.recipe))
        except Exception as error:
            self.screen.line(without_secrets(
                f"wandb: not logging ({type(error).__name__}: {error})"))
            return None

    def _write(self, line: str) -> None:
        self._to_log(lambda log: log.line(line))

    def _to_log(self, write: Callable[[RunLog], None]) -> None:
        """A log that cannot be written ends the run: `fault` says so to the loop."""
        if self.log is None or self.fault:
            return
        try:
            write(self.log)
        except (OSError, LogError) as error:
            self.fault = f"the log cannot be written ({error})"
            self.screen.warn(f"{self.fault}: the run stops, because a run without a log is lost")

    def say(self, text: str) -> None:
        text = without_secrets(text)
        self.screen.line(text)
        self._write(text)

    def trained(self, report: StepReport) -> None:
        self._write(train_line(report.step + 1, self.recipe.num_iterations, report.loss,
                               report.ms))
        self.screen.advance(math.prod(batch_shape(report.step, self.recipe)), report.loss)
        self._to_wandb(report.step + 1, train_loss=report.loss)

    def validated(self, step: int, val_loss: float, ms: float, tokens: int) -> None:
        values = step, self.recipe.num_iterations, val_loss, ms
        self.screen.line(val_line(*values))
        self._to_log(lambda log: log.val(*values))
        if self.recipe.track != OWN_DATA:
            self.screen.line("  " + progress(
                self.recipe.track, val_loss, ms, tokens, history=self.history,
                target=self.recipe.target, num_iterations=self.recipe.num_iterations, step=step,
                data_digest=self.data_digest))
        self.history.append((step, val_loss))
        self._to_wandb(step, val_loss=val_loss, train_time_ms=ms)

    def _to_wandb(self, step: int, **values: float) -> None:
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log(values, step=step)
        except Exception as error:  # no error of its is worth a training run
            self.screen.line(without_secrets(
                f"wandb: stopped logging ({type(error).__name__}: {error})"))
            self.wandb_run = None

    def close(self, result: dict[str, object]) -> bool:
        """Close the log, then tell Weights & Biases. Returns whether the log is whole."""
        self.screen.stop()
        if self.log is not None:
            try:
                if self.fault:
                    self.log.abandon()
                else:
                    self.log.close(result)
            except (OSError, LogError) as error:
                self.fault = f"the log cannot be closed ({error})"
                self.screen.warn(self.fault)
        if self.wandb_run is not None:
            # It waits for its server, which may never answer.
            end = threading.Thread(target=self._finish_wandb, daemon=True)
            end.start()
            end.join(timeout=WANDB_PATIENCE_S)
        return not self.fault

    def _finish_wandb(self) -> None:
        with contextlib.suppress(Exception):
            self.wandb_run.finish(quiet=True)


def tokens_per_step(recipe: Recipe) -> list[list[int]]:
    """[first step, tokens a step] of each batch size, for the log."""
    sizes = [math.prod(batch_shape(step, recipe)) for step in range(recipe.num_iterations)]
    return [[step, size] for step, size in enumerate(sizes) if sizes[step - 1:step] != [size]]


def describe_speed(s) -> str:
    """Settings that change a run's speed and not what it trains. `s`: train_gpt.TrainState."""
    seq_len = s.recipe.model.seq_len
    rows = micro_batch_rows(local_rows(s.recipe.num_rows, s.world), seq_len, s.micro_tokens)
    recomputed = s.model.recomputed
    return "; ".join([
        wants_compile(s.run, s.world)[1]
        + ", the optimizer too" * wants_compiled_optimizer(s.run, s.world),
        f"{rows} row{'s' * (rows > 1)} a micro-batch"
        + (f", {recomputed} of {len(s.model.blocks)} layers computed again in backward"
           if recomputed else ""),
        f"Triton: {', '.join(sorted(s.run.triton_kernels)) or 'none'}"])


def _against_target(s, reached: bool) -> str:
    if s.recipe.track == OWN_DATA:
        return ""
    if s.recipe.target is None:
        return "; no target is fixed for this track yet"
    return f"; target {s.recipe.target} {'reached' if reached else 'not reached'}"


def header(s, environment: dict[str, str]) -> dict[str, str]:
    """The facts at the top of a run: recipe, sizes, device, and every backend with its reason.
    `s`: train_gpt.TrainState."""
    recipe, world, env = s.recipe, s.world, environment
    num_shards = len(s.data.train_files)
    return {
        "recipe": f"{recipe.name}, which changes " * bool(recipe.name)
                  + f"record #{recipe.record} ({recipe.title}), {recipe.scale} scale, "
                    f"seed {s.seed}",
        "model": f"{num_parameters(s.model) / 1e6:.1f}M parameters, {recipe.model.num_layers} "
                 f"layers of width {recipe.model.model_dim}",
        "steps": f"{recipe.num_iterations:,} of {recipe.batch_tokens:,} tokens in rows of "
                 f"{recipe.model.seq_len}: {recipe.total_tokens:,} tokens",
        "device": f"{world.size} x {env['gpu']}" if world.device.type == "cuda" else (
            f"{env['cpu']}; {world.size} rank{'s' * (world.size > 1)} of {env['threads']} "
            f"thread{'s' * (env['threads'] != '1')}"),
        "backends": f"{recipe.model.compute_dtype} matmuls; {describe_speed(s)}; "
                    f"attention: {describe_attention(world.device, recipe.model)}; "
                    f"collectives: {dist.get_backend() if world.size > 1 else 'none (one rank)'}",
        "data": f"{s.run.data_dir or recipe.corpus}, {num_shards} training "
                f"shard{'s' * (num_shards > 1)}, digest {s.data.digest[:12]}",
        **s.data.notes,
        "target": "none: a track's is for its own data" if recipe.track == OWN_DATA else
                  "not fixed yet" if recipe.target is None else f"val_loss {recipe.target}",
    }


def closing_block(s, reporter: Reporter, times: dict[str, float], model_path: Path | None,
                  resumed: bool) -> dict[str, object]:
    """The `key: value` block at the end of a log. `s`: train_gpt.TrainState; `times`: when the
    process started (perf_counter), seconds until the first step and of the warm-up."""
    recipe = s.recipe
    val_loss = reporter.history[-1][1] if reporter.history else math.nan
    tokens_per_s = s.tokens / max(s.clock.elapsed_s, 1e-9)
    flops, peak = recipes.mean_flops_per_token(recipe, s.model), peak_flops(s.world.device)
    reached = recipe.target is not None and s.outcome == "complete" and val_loss <= recipe.target
    return {
        "status": s.outcome, "track": recipe.track, "record": recipe.record,
        "scale": recipe.scale, "seed": s.seed, "world_size": s.world.size,
        "target": recipe.target, "reached": reached, "final_val_loss": f"{val_loss:.6f}",
        "num_iterations": recipe.num_iterations, "tokens": s.tokens,
        "train_time_ms": f"{1000 * s.clock.elapsed_s:.0f}",
        "wall_time_s": f"{time.perf_counter() - times['started']:.1f}",
        "start_s": f"{times['start_s']:.1f}", "warmup_s": f"{times['warmup_s']:.1f}",
        "validation_s": f"{s.validation_s:.1f}", "tokens_per_s": f"{tokens_per_s:.0f}",
        "mfu": ("unknown" if peak is None
                else f"{tokens_per_s * flops / peak / s.world.size:.4f}"),
        "peak_memory_mib": f"{s.memory.all_mib:.0f}", "peak_step_mib": f"{s.memory.steps_mib:.0f}",
        "graphs_in_clock": s.graphs_in_clock, "parameters": num_parameters(s.model),
        "data_digest": s.data.digest, "resumed": resumed, "profiled_steps": s.run.profile,
        "checkpoint": model_path,
    }


def show_end(s, reporter: Reporter, result: dict, log_path: Path, text: str) -> None:
    """Print the result, `text` that the model wrote, and the next command to type. `s`:
    train_gpt.TrainState; `result`: the closing block."""
    screen, recipe = reporter.screen, s.recipe
    seconds = s.clock.elapsed_s
    loss = reporter.history[-1][1] if reporter.history else math.nan
    outside = f"warm-up {result['warmup_s']} s and validation {result['validation_s']} s"
    screen.line()
    screen.facts({
        "result": f"{result['status']}: val_loss {loss:.4f}"
                  + _against_target(s, result["reached"]),
        # Training and validation count from step 0, the rest from where a run was resumed.
        "time": f"{seconds:.1f} s of training; " + (
            f"validation {result['validation_s']} s; since it was resumed "
            f"{result['wall_time_s']} s in all, of which warm-up {result['warmup_s']} s"
            if result["resumed"] else f"{result['wall_time_s']} s in all, of which {outside}"),
        "speed": f"{s.tokens / max(seconds, 1e-9):,.0f} tokens/s, MFU {result['mfu']}, peak "
                 f"memory {result['peak_memory_mib']} MiB",
        **({} if recipe.track == OWN_DATA else {
            "standing": rank_in_table(recipe.track, 1000 * seconds, s.tokens, loss)}),
        "log": log_path,
        "model": result["checkpoint"] or "not saved",
    })
    if text:
        screen.line("\nthe model now writes:\n")
        for line in text.splitlines():
            screen.line("    " + line)
    kept = any(log_path.parent.glob(f"{log_path.stem}.step*.ckpt"))
    if result["status"] == "preempted" and kept:
        screen.line("\nnext: the same command with --resume auto goes on from here")
    elif result["checkpoint"]:
        python = ".venv/bin/python" if Path(sys.prefix).name == ".venv" else "python"
        prompt = " --prompt \"Compute \"" * (recipe.track != OWN_DATA)
        screen.line(f"\nnext: {python} -m tools.sample {log_path.with_suffix('')}{prompt}")
    screen.line(f"log: {log_path}")
