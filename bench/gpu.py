"""Everything that a GPU has to show, in one script: checks, kernels, optimizer, speed, loss.

    python bench/gpu.py --data_dir shards              all parts, in order: half an hour (estimated)
    python bench/gpu.py speed variants --out results   these parts; again: what is missing of them
    python bench/gpu.py report --out results           write bench/RESULTS.md from what was measured
    python bench/gpu.py --toy                          a CPU: does the script still run?

Parts: tests (those that need a GPU), kernels (bench/kernels.py), optimizer (a step of Muon against
torch.optim.Muon), speed (whole trainings of a few steps on random tokens in documents of FineWeb's
lengths), variants (layers a graph, Triton kernels on and off), profile (where a step's time goes),
loss (real tokens; needs --data_dir with *train*.bin and *val*.bin, or those as .bin.xz).

Each part writes OUT/<part>.json after each of its rows, so a lease that ends early loses one row;
the same command then continues with the rows that are missing, and after them those that failed.
Rows are kept from the same device, torch and Triton alone, whatever the code was: --again measures
all of them anew. What takes longer than its limit is killed, and its row says so. Numbers are
compared within a table only.
"""

import argparse
import functools
import json
import lzma
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

import kernels
import recipes
from bench import muon_step, train_speed
from data.loader import OutOfTokens, check_enough_tokens
from data.shards import write_shard
from recipes import RECORDS, batch_shape
from trainer.data import doc_len

BOS = 50_256
SPEED = (6, 12, 23, 62)     # an era each: plain rows, FlexAttention, 48K rows, the newest
LOSS = (2, 6, 23, 62)
LOSS_TOKENS = 39_000_000
STEPS = 30                  # of a run that only its speed is wanted of
LIMIT_S = 240               # of a training; that of a part's one long process:
LONG_LIMIT_S = 540          # under ten minutes
TOY = ["--scale", "pocket", "--num_layers", "2", "--head_dim", "16", "--num_iterations", "2",
       "--val_every", "2", "--val_tokens", "16384"]
UNKNOWN = "not yet measured"

Task = tuple[dict, Callable[[], dict]]  # what names a row, and what measures the rest of it


# --- rows, as they come ---------------------------------------------------------------------------

def machine(toy: bool) -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    return {"date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if on_gpu else "a CPU",
            "torch": torch.__version__, "cuda": str(torch.version.cuda),
            "triton": getattr(kernels.triton, "__version__", "none"),
            **({"size": "toy"} if toy else {})}


def reason(error: Exception) -> str:
    """Why there is no row; the page shows the last line of it."""
    if isinstance(error, subprocess.TimeoutExpired):
        last = (error.output or "").strip().splitlines()[-1:]
        return "\n".join([*last, f"timed out after {error.timeout:g} s"])
    return f"{type(error).__name__}: {str(error)[-500:]}"


def measured(tasks: Sequence[Task], file: Path | None, here: dict[str, str],
             again: bool = False) -> Iterator[dict]:
    """Measure the rows that `file` does not hold from a machine like this one, and write it after
    each; yields the new ones. An error is a row with "failed", which the next call tries again,
    after the rows that nobody tried: one that hangs or kills the process costs itself only."""
    rows: list[dict | None] = [None] * len(tasks)
    if file is not None and file.is_file() and not again:
        said = json.loads(file.read_text())
        if all(said["machine"].get(what) == here.get(what)
               for what in ("device", "torch", "triton", "size")):
            rows = [next((row for row in said["rows"] if key.items() <= row.items()), None)
                    for key, _ in tasks]

    def write() -> None:
        if file is not None:
            partial = file.with_name(file.name + ".tmp")
            partial.write_text(json.dumps({"machine": here, "of": len(tasks),
                                           "rows": [row for row in rows if row]}, indent=1))
            partial.replace(file)

    todo = [i for i, row in enumerate(rows) if row is None or "failed" in row]
    if len(todo) < len(tasks):
        print(f"  {len(tasks) - len(todo)} of {len(tasks)} rows were measured before and are kept "
              "(--again: anew)", file=sys.stderr, flush=True)
    for i in sorted(todo, key=lambda i: rows[i] is not None):
        key, measure = tasks[i]
        rows[i] = key | {"failed": "cut off before it was done"}  # should this process be killed
        write()
        began = time.perf_counter()
        try:
            rows[i] = key | measure()
        except Exception as error:  # a row that breaks must not cost those behind it
            rows[i] = key | {"failed": reason(error)}
        rows[i]["seconds"] = round(time.perf_counter() - began, 1)
        write()
        yield rows[i]


# --- data -----------------------------------------------------------------------------------------

def write_documents(folder: Path, num_tokens: int, seed: int = 0) -> None:
    """Shards of random tokens in documents as long as FineWeb's: lognormal with median 403 and mean
    690 tokens, at least 32, each opened by BOS. For speed; there is nothing in them to learn."""
    generator = np.random.default_rng(seed)
    sigma = math.sqrt(2 * math.log(690 / 403))
    for name, count in (("train_000001", num_tokens), ("val_000000", 2_200_000)):
        tokens = generator.integers(0, BOS, count, dtype=np.uint16)
        lengths = np.exp(generator.normal(math.log(403), sigma, count // 200)).astype(int)
        starts = np.cumsum(np.maximum(32, lengths))
        tokens[0] = tokens[starts[starts < count]] = BOS
        write_shard(folder / f"documents_{name}.bin", tokens)


def unpacked(folder: Path, into: Path) -> Path:
    """`folder`, or, where its shards are packed, `into` with the unpacked ones."""
    if not (packed := sorted(folder.glob("*.bin.xz"))):
        return folder
    for file in packed:
        (into / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
    return into


def steps_for(record: int, num_tokens: int, folder: Path) -> int:
    """The most steps of a record's recipe that take at most num_tokens, and that the files give."""
    files = sorted(folder.glob("*train*.bin"))

    def takes(steps: int) -> bool:
        recipe = recipes.change(RECORDS[record], num_iterations=steps)
        if recipe.total_tokens > num_tokens:
            return False
        try:
            check_enough_tokens(files, functools.partial(batch_shape, recipe=recipe), steps,
                                vocab_size=recipe.model.vocab_size, bos_id=BOS,
                                repeat_first=recipe.first_batch_repeated, align=recipe.data_align,
                                max_doc_len=doc_len(recipe))
        except OutOfTokens:
            return False
        return True

    steps = num_tokens // RECORDS[record].batch_tokens
    while takes(steps + 1):
        steps += 1
    while steps > 1 and not takes(steps):
        steps -= 1
    return steps


# --- the parts ------------------------------------------------------------------------------------

KEPT = ("tokens_per_s", "mfu", "peak_memory_mib", "peak_step_mib", "start_s", "warmup_s",
        "train_time_ms", "num_iterations", "tokens", "final_val_loss", "wall_time_s")


def said_by(command: Sequence[str | os.PathLike], limit_s: float) -> str:
    """Its standard output. Raises RuntimeError where it failed, TimeoutExpired."""
    done = train_speed.run_process(command, limit_s)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: "
                           f"{(done.stderr.strip() or done.stdout.strip())[-500:]}")
    return done.stdout


def train(record: int, options: Sequence[str], args: argparse.Namespace,
          caches: Path | None = None) -> dict:
    """What one run of the trainer came to, with the machine's compile caches or those in a folder.
    """
    words = ["--record", str(record), *(TOY if args.toy else options)]
    print(f"  {' '.join(words)}", flush=True)
    env = {} if caches is None else {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
                                     "TRITON_CACHE_DIR": str(caches / "triton")}
    result = train_speed.run_once(words, args.limit_s or LIMIT_S, env)
    return {"options": " ".join(words)} | {key: result[key] for key in KEPT if key in result}


def short(folder: Path, *options: str) -> list[str]:
    """Options of a run for speed."""
    return ["--scale", "full", "--num_iterations", str(STEPS), "--val_every", str(STEPS),
            "--val_tokens", "2097152", "--data_dir", str(folder), "--save_model",
            "false", *options]


def tests(args: argparse.Namespace, folder: Path) -> list[Task]:
    """One process a file: pytest's timeout ends the process, and an assertion on the device breaks
    its context for all tests behind it."""
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py"))
             if "pytest.mark.gpu" in file.read_text() and file.name != "test_bench_gpu.py"]

    def run(file: Path) -> dict:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                   str(file)]
        done = train_speed.run_process(command, args.limit_s or LIMIT_S)
        said = done.stdout.strip().splitlines()
        if not (said and re.search(r" in [\d.]+s", said[-1])):  # it did not come to its end
            raise RuntimeError(f"status {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
        failures = [line for line in said if line.startswith(("FAILED", "ERROR"))]
        return {"tests": said[-1], "failures": failures}

    return [({"file": file.name}, functools.partial(run, file))
            for file in (files[:1] if args.toy else files)]


def kernel_rows(args: argparse.Namespace, folder: Path) -> list[Task]:
    """bench/kernels.py writes its rows itself, as they come. A kernel that breaks the device's
    context ends it; then another process goes on behind that row."""
    file = args.out / "kernels.json"
    command = [sys.executable, "bench/kernels.py", "--json", file,
               *(["--quick", "--only", "gram"] if args.toy else [])]
    again, tried = ["--again"] * args.again, None
    while True:
        try:
            said_by([*command, *again], args.limit_s or LONG_LIMIT_S)
            return []
        except RuntimeError:
            said = json.loads(file.read_text()) if file.is_file() else {"rows": [], "of": 0}
            if len(said["rows"]) in (tried, said["of"]):
                raise
            again, tried = [], len(said["rows"])


BEST_STEPS = """import json, sys
from bench.muon_step import best_steps, layer_shapes
width, num_layers, device = json.loads(sys.argv[1])
print(json.dumps(best_steps(layer_shapes(width, num_layers), 10, device)))"""


def optimizer(args: argparse.Namespace, folder: Path) -> list[Task]:
    """Muon's step at the hidden matrices of 124M, and of 1.5B (8 of its 48 layers); in a process of
    its own, so that the parts behind it have the whole device."""
    shapes = {"124M, 768 x 12 layers": (768, 12), "1.5B, 1600 x 8 of 48 layers": (1600, 8)}
    if args.toy:
        shapes = {"toy, 32 x 1 layer": (32, 1)}
    device = "cpu" if args.toy else "cuda"

    def best(width: int, num_layers: int) -> dict:
        return json.loads(said_by([sys.executable, "-c", BEST_STEPS, json.dumps(
            [width, num_layers, device])], args.limit_s or LIMIT_S))

    return [({"shapes": name}, functools.partial(best, *of)) for name, of in shapes.items()]


def speed(args: argparse.Namespace, folder: Path) -> list[Task]:
    """Each record's true shapes, compiled cold, in empty caches of its own; then the newest once
    more, warm, with what that left."""
    write_documents(folder, 200_000 if args.toy else 20_000_000)
    records = SPEED[:1] if args.toy else SPEED
    left: dict[int, Path] = {}  # by record, the caches of its cold run

    def cold(record: int) -> dict:
        left[record] = Path(tempfile.mkdtemp(dir=folder))
        return train(record, short(folder), args, left[record])

    def warm(record: int) -> dict:
        if record not in left:  # its cold row is there from an earlier call, its caches are not
            cold(record)
        return train(record, short(folder), args, left[record])

    return [*(({"record": record, "cache": "cold"}, functools.partial(cold, record))
              for record in records),
            ({"record": records[-1], "cache": "warm"}, functools.partial(warm, records[-1]))]


def variants(args: argparse.Namespace, folder: Path) -> list[Task]:
    """The newest recipe with layers a graph and Triton kernels changed, one at a time."""
    write_documents(folder, 200_000 if args.toy else 20_000_000)
    changes = [(), ("--compile_layers", "4"), ("--compile_layers", "0"),
               *(("--kernels", name) for name in kernels.NAMES), ("--compile_optimizer", "off"),
               ("--recompute", "on"),
               ("--head", "bf16"), ("--kernels", ",".join(kernels.NAMES))]
    return [({"record": SPEED[-1], "variant": " ".join(change) or "as it is"},
             functools.partial(train, SPEED[-1], short(folder, *change), args))
            for change in (changes[:1] if args.toy else changes)]


def profile(args: argparse.Namespace, folder: Path) -> list[Task]:
    write_documents(folder, 200_000 if args.toy else 20_000_000)
    logs = folder / "logs"
    options = TOY[:-6] if args.toy else short(folder)

    def run() -> dict:
        said = said_by([sys.executable, "train_gpt.py", "--record", str(SPEED[-1]), *options,
                        "--profile", "5", "--log_dir", logs], args.limit_s or LIMIT_S).splitlines()
        if not args.toy:
            for trace in logs.glob("*.trace.json.gz"):
                (args.out / "trace.json.gz").write_bytes(trace.read_bytes())
        first = next(i for i, line in enumerate(said) if line.startswith("profile of"))
        return {"lines": [line for line in said[first:] if not line.startswith("trace:")]}

    return [({"record": SPEED[-1]}, run)]


def loss(args: argparse.Namespace, folder: Path) -> list[Task]:
    """Validation loss after one file of real tokens, schedules shortened to it."""
    if args.toy:
        return [({"record": LOSS[0]}, functools.partial(train, LOSS[0], (), args))]
    if args.data_dir is None:
        raise ValueError("loss: needs --data_dir with *train*.bin and *val*.bin (or .bin.xz)")
    data = unpacked(args.data_dir, folder)
    tasks = []
    for record in LOSS:
        steps = str(steps_for(record, LOSS_TOKENS, data))
        options = ["--scale", "full", "--data_dir", str(data), "--num_iterations", steps,
                   "--val_every", steps, "--val_tokens", "2097152"]
        tasks.append(({"record": record, "steps": steps},
                      functools.partial(train, record, options, args)))
    return tasks


PARTS: dict[str, Callable[[argparse.Namespace, Path], list[Task]]] = {
    "tests": tests, "kernels": kernel_rows, "optimizer": optimizer, "speed": speed,
    "variants": variants, "profile": profile, "loss": loss}


# --- the page -------------------------------------------------------------------------------------

def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    right = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, right, *rows)]


def failure(row: dict) -> str:
    return f"failed: {row['failed'].splitlines()[-1][:80]}".replace("|", "/")


COLUMNS: dict[str, Callable[[dict], object]] = {
    "tokens": lambda row: f"{int(row['tokens']):,}",
    "tokens/s": lambda row: f"{float(row['tokens_per_s']):,.0f}",
    "MFU": lambda row: row["mfu"],
    "ms a step": lambda row: f"{float(row['train_time_ms']) / int(row['num_iterations']):.1f}",
    "peak GiB": lambda row: f"{train_speed.peak_mib(row) / 1024:.1f}",
    "start to first step s": lambda row: row["start_s"],
    "compile and warm-up s": lambda row: row["warmup_s"],
    "val loss": lambda row: f"{float(row['final_val_loss']):.4f}"}
SPEED_COLUMNS = ("tokens/s", "MFU", "ms a step", "peak GiB")


def runs(rows: list[dict], first: dict[str, Callable[[dict], object]],
         columns: Sequence[str]) -> list[str]:
    """A table of trainings: what names them, then COLUMNS."""
    return table([*first, *columns], (
        [*(of(row) for of in first.values()),
         *([failure(row)] if "failed" in row else [COLUMNS[name](row) for name in columns])]
        for row in rows))


def page(out: Path) -> str:
    """bench/RESULTS.md from the parts that were measured; the others say that they were not."""
    from bench import kernels as kernel_bench

    def part(name: str, of: Callable[[list[dict]], list[str]]) -> list[str]:
        file = out / f"{name}.json"
        if not file.is_file():
            return [UNKNOWN, ""]
        said = json.loads(file.read_text())
        done = sum("failed" not in row for row in said["rows"])
        return [", ".join(f"{key} {value}" for key, value in said["machine"].items()), "",
                *([f"{done} of {said['of']} rows.", ""] if done < said["of"] else []),
                *of(said["rows"]), ""]

    def of_kernels(rows: list[dict]) -> list[str]:
        head = ["kernel", "shape", "dtype", "ms", "eager ms", "compiled ms", "eager/ours",
                "compiled/ours", "MiB", "compiled MiB", "TFLOP/s", "GB/s", "of roofline", "error",
                "reference's"]
        timed = any("kernel_ms" in row for row in rows)
        return table(head if timed else head[:3] + head[-2:],
                     [kernel_bench.cells(row) for row in rows])

    def of_optimizer(rows: list[dict]) -> list[str]:
        modes = muon_step.MODES
        return table(["shapes", "torch.optim.Muon ms", *(f"{m} ms" for m in modes),
                      *(f"torch/{m}" for m in modes)],
                     [[row["shapes"], failure(row)] if "failed" in row else
                      [row["shapes"], f"{row['torch']:.2f}", *(f"{row[m]:.2f}" for m in modes),
                       *(f"{row['torch'] / row[m]:.2f}" for m in modes)] for row in rows])

    def of_tests(rows: list[dict]) -> list[str]:
        return [line for row in rows for line in (
            [f"- {row['file']}: {failure(row)}"] if "failed" in row else
            [f"- {row['file']}: {row['tests']}", *(f"  - {line}" for line in row["failures"])])]

    def of_profile(rows: list[dict]) -> list[str]:
        (row,) = rows
        return ["```", *([failure(row)] if "failed" in row else row["lines"]), "```"]

    record = {"record": lambda row: f"#{row['record']}"}
    return "\n".join([
        "# What a GPU showed", "",
        "Written by `python bench/gpu.py report`; see that file for what each part does. Rows are "
        "to be compared within a table.", "",
        "## Tests that need a GPU", "", *part("tests", of_tests),
        "## Speed of whole trainings", "",
        f"{STEPS} steps on random tokens in documents of FineWeb's lengths, true shapes. Cold "
        "compiles with empty caches, warm with what the cold run left.", "",
        *part("speed", lambda rows: runs(rows, record | {"cache": lambda row: row["cache"]},
                                         (*SPEED_COLUMNS, "start to first step s",
                                          "compile and warm-up s"))),
        "## The newest recipe, one thing changed", "",
        "Compiled with what the machine's caches held already, so how long that took says nothing "
        "and is left out, as in the table of losses.", "",
        *part("variants", lambda rows: runs(rows, {"change": lambda row: f"`{row['variant']}`"},
                                            SPEED_COLUMNS)),
        "## Where a step's time goes", "", *part("profile", of_profile),
        "## Loss after one file of real tokens", "",
        *part("loss", lambda rows: runs(rows, record, ("tokens", *SPEED_COLUMNS, "val loss"))),
        "## A step of the optimizer", "", *part("optimizer", of_optimizer),
        "## Kernels", "", *part("kernels", of_kernels)])


# --- the command ----------------------------------------------------------------------------------

def measure(name: str, args: argparse.Namespace) -> None:
    print(f"{name} ...", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tasks = PARTS[name](args, Path(folder))
        for row in measured(tasks, args.out / f"{name}.json", machine(args.toy), args.again):
            if "failed" in row:
                print(f"  {failure(row)}", flush=True)
    print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}, report; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "gpu", help="for the results")
    parser.add_argument("--data_dir", type=Path, help="real tokens, for the part loss")
    parser.add_argument("--page", type=Path, help="what report writes; default: bench/RESULTS.md, "
                        "with --toy RESULTS.md in OUT")
    parser.add_argument("--again", action="store_true", help="measure anew what OUT holds already")
    parser.add_argument("--limit_s", type=float, help="after which a process is killed; default: "
                        f"{LIMIT_S}, tests and kernels {LONG_LIMIT_S}")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args(arguments)
    parts = args.parts or [*PARTS, "report"]
    if unknown := set(parts) - {*PARTS, "report"}:
        parser.error(f"expected parts of {', '.join(PARTS)}, report; got {', '.join(unknown)}")
    if not (args.toy or torch.cuda.is_available() or parts == ["report"]):
        parser.error("there is no GPU here; --toy runs the script at toy sizes on a CPU")
    args.out = args.out.resolve()  # processes started from here run in the repository
    args.out.mkdir(parents=True, exist_ok=True)
    args.page = args.page or (args.out if args.toy else ROOT / "bench") / "RESULTS.md"
    failed = []
    for name in parts:
        if name == "report":
            args.page.write_text(page(args.out))
            print(re.sub(r"^", "  ", page(args.out), flags=re.M))
            continue
        try:
            measure(name, args)
        except Exception as error:  # one part that breaks must not cost those behind it
            failed.append(name)
            print(f"{name}: FAILED: {reason(error)}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    # `timeout` ends us so: our children, in process groups of their own, must not stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
