"""Everything that a GPU has to show, in one script: checks, kernels, optimizer, speed, loss.

    python bench/gpu.py --data_dir shards              all parts, in order: 25 minutes (estimated)
    python bench/gpu.py speed variants --out results   these parts, each under ten minutes
    python bench/gpu.py report --out results           write bench/RESULTS.md from what was measured
    python bench/gpu.py --toy                          a CPU: does the script still run?

Parts: tests (those that need a GPU), kernels (bench/kernels.py), optimizer (a step of Muon against
torch.optim.Muon), speed (whole trainings of a few steps on random tokens in documents of FineWeb's
lengths), variants (layers a graph, Triton kernels on and off), profile (where a step's time goes),
loss (real tokens; needs --data_dir with *train*.bin and *val*.bin, or those as .bin.xz).

Each part writes OUT/<part>.json when it is done, so that a lease that ends early loses one part.
Numbers are compared within a table only: all rows of one come from one run of this script.
"""

import argparse
import functools
import json
import lzma
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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

BOS = 50_256
SPEED = (6, 12, 23, 62)     # an era each: plain rows, FlexAttention, 48K rows, the newest
LOSS = (2, 6, 23, 62)
LOSS_TOKENS = 39_000_000
STEPS = 30                  # of a run that only its speed is wanted of
TOY = ["--scale", "pocket", "--num_layers", "2", "--head_dim", "16", "--num_iterations", "2",
       "--val_every", "2", "--val_tokens", "16384"]
UNKNOWN = "not yet measured"


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
                                max_doc_len=recipe.max_doc_len)
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

KEPT = ("tokens_per_s", "mfu", "peak_memory_mib", "peak_step_mib", "warmup_s", "train_time_ms",
        "num_iterations", "tokens", "final_val_loss", "wall_time_s")


def train(record: int, options: Sequence[str], toy: bool) -> dict:
    """What one run of the trainer came to, or why it did not."""
    words = ["--record", str(record), *(TOY if toy else options)]
    row = {"record": record, "options": " ".join(words)}
    print(f"  {' '.join(words)}", flush=True)
    try:
        result = train_speed.run_once(words)
    except RuntimeError as error:
        return row | {"failed": str(error)[-500:]}
    return row | {key: result[key] for key in KEPT if key in result}


def short(folder: Path, *options: str) -> list[str]:
    """Options of a run for speed."""
    return ["--scale", "full", "--num_iterations", str(STEPS), "--val_every", str(STEPS),
            "--val_tokens", "2097152", "--data_dir", str(folder), *options]


def tests(args: argparse.Namespace, folder: Path) -> list[dict]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["tests/test_kernels.py"] if args.toy else []
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    said = done.stdout.strip().splitlines()
    failures = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    return [{"tests": said[-1] if said else done.stderr[-300:], "failures": failures}]


def kernel_rows(args: argparse.Namespace, folder: Path) -> list[dict]:
    out = folder / "kernels.json"
    quick = ["--quick", "--only", "gram"] if args.toy else []
    subprocess.run([sys.executable, "bench/kernels.py", "--json", out, *quick], cwd=ROOT,
                   check=True)
    return json.loads(out.read_text())["rows"]


def optimizer(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Muon's step at the hidden matrices of 124M, and of 1.5B (8 of its 48 layers)."""
    shapes = {"124M, 768 x 12 layers": (768, 12), "1.5B, 1600 x 8 of 48 layers": (1600, 8)}
    if args.toy:
        shapes = {"toy, 32 x 1 layer": (32, 1)}
    device = "cpu" if args.toy else "cuda"
    return [{"shapes": name, **muon_step.best_steps(muon_step.layer_shapes(*of), 10, device)}
            for name, of in shapes.items()]


def speed(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Each record's true shapes, cold: then the newest once more with what the cache holds."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    write_documents(folder, 200_000 if args.toy else 20_000_000)
    records = SPEED[:1] if args.toy else SPEED
    rows = [train(record, short(folder), args.toy) | {"cache": "cold"} for record in records]
    return [*rows, train(records[-1], short(folder), args.toy) | {"cache": "warm"}]


def variants(args: argparse.Namespace, folder: Path) -> list[dict]:
    """The newest recipe with layers a graph and Triton kernels changed, one at a time."""
    write_documents(folder, 200_000 if args.toy else 20_000_000)
    changes = [(), ("--compile_layers", "4"), ("--compile_layers", "0"),
               *(("--kernels", name) for name in kernels.NAMES), ("--compile_optimizer",),
               ("--recompute", "on"),
               ("--head", "bf16"), ("--kernels", ",".join(kernels.NAMES))]
    return [train(SPEED[-1], short(folder, *change), args.toy)
            | {"variant": " ".join(change) or "as it is"}
            for change in (changes[:1] if args.toy else changes)]


def profile(args: argparse.Namespace, folder: Path) -> list[dict]:
    write_documents(folder, 200_000 if args.toy else 20_000_000)
    logs = folder / "logs"
    options = TOY[:-6] if args.toy else short(folder)
    done = subprocess.run([sys.executable, "train_gpt.py", "--record", str(SPEED[-1]), *options,
                           "--profile", "5", "--log_dir", str(logs)],
                          cwd=ROOT, text=True, capture_output=True)
    traces = sorted(logs.glob("*.trace.json.gz"))
    if traces and not args.toy:
        (args.out / "trace.json.gz").write_bytes(traces[0].read_bytes())
    said = done.stdout.splitlines()
    first = next((i for i, line in enumerate(said) if line.startswith("profile of")), len(said))
    lines = [line for line in said[first:] if not line.startswith("trace:")]
    return [{"lines": lines or ["failed: " + done.stderr[-500:]]}]


def loss(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Validation loss after one file of real tokens, schedules shortened to it."""
    if args.toy:
        return [train(LOSS[0], (), True)]
    if args.data_dir is None:
        raise ValueError("loss: needs --data_dir with *train*.bin and *val*.bin (or .bin.xz)")
    data = unpacked(args.data_dir, folder)
    rows = []
    for record in LOSS:
        steps = str(steps_for(record, LOSS_TOKENS, data))
        rows.append(train(record, ["--scale", "full", "--data_dir", str(data), "--num_iterations",
                                   steps, "--val_every", steps, "--val_tokens", "2097152"], False))
    return rows


PARTS: dict[str, Callable[[argparse.Namespace, Path], list[dict]]] = {
    "tests": tests, "kernels": kernel_rows, "optimizer": optimizer, "speed": speed,
    "variants": variants, "profile": profile, "loss": loss}


# --- the page -------------------------------------------------------------------------------------

def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    right = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, right, *rows)]


def run_cells(row: dict, *first: object) -> list[object]:
    if "failed" in row:
        return [*first, f"failed: {row['failed'].splitlines()[-1][:80]}", *[""] * 5]
    ms = float(row["train_time_ms"]) / int(row["num_iterations"])
    return [*first, f"{float(row['tokens_per_s']):,.0f}", row["mfu"], f"{ms:.1f}",
            f"{train_speed.peak_mib(row) / 1024:.1f}", row["warmup_s"],
            f"{float(row['final_val_loss']):.4f}"]


RUN_HEAD = ["tokens/s", "MFU", "ms a step", "peak GiB", "compile and warm-up s", "val loss"]


def page(out: Path) -> str:
    """bench/RESULTS.md from the parts that were measured; the others say that they were not."""
    from bench import kernels as kernel_bench

    def part(name: str, of: Callable[[list[dict]], list[str]]) -> list[str]:
        file = out / f"{name}.json"
        if not file.is_file():
            return [UNKNOWN, ""]
        said = json.loads(file.read_text())
        return [", ".join(f"{key} {value}" for key, value in said["machine"].items()), "",
                *of(said["rows"]), ""]

    def of_kernels(rows: list[dict]) -> list[str]:
        head = ["kernel", "shape", "dtype", "ms", "eager ms", "compiled ms", "eager/ours",
                "compiled/ours", "MiB", "compiled MiB", "TFLOP/s", "GB/s", "of roofline", "error",
                "twin's"]
        return table(head if "kernel_ms" in rows[0] else head[:3] + head[-2:],
                     [kernel_bench.cells(row) for row in rows])

    def of_optimizer(rows: list[dict]) -> list[str]:
        modes = [key for key in rows[0] if key not in ("shapes", "torch")]
        return table(["shapes", "torch.optim.Muon ms", *(f"{m} ms" for m in modes),
                      *(f"torch/{m}" for m in modes)],
                     [[row["shapes"], f"{row['torch']:.2f}", *(f"{row[m]:.2f}" for m in modes),
                       *(f"{row['torch'] / row[m]:.2f}" for m in modes)] for row in rows])

    return "\n".join([
        "# What a GPU showed", "",
        "Written by `python bench/gpu.py report`; see that file for what each part does. Rows are "
        "to be compared within a table.", "",
        "## Tests that need a GPU", "",
        *part("tests", lambda rows: [rows[0]["tests"], *rows[0]["failures"]]),
        "## Speed of whole trainings", "",
        f"{STEPS} steps on random tokens in documents of FineWeb's lengths, true shapes.", "",
        *part("speed", lambda rows: table(["record", "cache", *RUN_HEAD[:-1]], [
            run_cells(row, f"#{row['record']}", row["cache"])[:-1] for row in rows])),
        "## The newest recipe, one thing changed", "",
        *part("variants", lambda rows: table(["change", *RUN_HEAD[:-1]], [
            run_cells(row, f"`{row['variant']}`")[:-1] for row in rows])),
        "## Where a step's time goes", "",
        *part("profile", lambda rows: ["```", *rows[0]["lines"], "```"]),
        "## Loss after one file of real tokens", "",
        *part("loss", lambda rows: table(["record", "tokens", *RUN_HEAD], [
            run_cells(row, f"#{row['record']}", f"{int(row.get('tokens', 0)):,}")
            for row in rows])),
        "## A step of the optimizer", "", *part("optimizer", of_optimizer),
        "## Kernels", "", *part("kernels", of_kernels)])


# --- the command ----------------------------------------------------------------------------------

def machine() -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    return {"date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if on_gpu else "a CPU",
            "torch": torch.__version__, "cuda": str(torch.version.cuda),
            "triton": getattr(kernels.triton, "__version__", "none")}


def measure(name: str, args: argparse.Namespace) -> None:
    print(f"{name} ...", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = PARTS[name](args, Path(folder))
    seconds = round(time.perf_counter() - began, 1)
    path = args.out / f"{name}.json"
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps({"machine": machine(), "seconds": seconds, "rows": rows},
                                  indent=1))
    partial.replace(path)
    print(f"{name}: {seconds} s, {path}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}, report; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "gpu", help="for the results")
    parser.add_argument("--data_dir", type=Path, help="real tokens, for the part loss")
    parser.add_argument("--page", type=Path, help="what report writes; default: bench/RESULTS.md, "
                        "with --toy RESULTS.md in OUT")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args(arguments)
    parts = args.parts or [*PARTS, "report"]
    if unknown := set(parts) - {*PARTS, "report"}:
        parser.error(f"expected parts of {', '.join(PARTS)}, report; got {', '.join(unknown)}")
    if not (args.toy or torch.cuda.is_available() or parts == ["report"]):
        parser.error("there is no GPU here; --toy runs the script at toy sizes on a CPU")
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
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
