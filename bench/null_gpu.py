"""What a training on a GPU asks of the host, measured without a GPU: compiling, memory, launches.

    python bench/null_gpu.py                          the table below, for some records
    python bench/null_gpu.py --records 12 62 --gib 24 as on a card with 24 GiB
    python bench/null_gpu.py --records 62 --ranks 8   the first of eight ranks
    python bench/null_gpu.py --records 62 --ranks 8 --at_once 4   four of them, each compiling
    python bench/null_gpu.py --records 62 -- --kernels loss --compile_layers 0
    python bench/null_gpu.py --exec python bench/gpu.py kernels optimizer speed --out results

null_gpu.c answers the calls that a CUDA build of torch makes to CUDA, cuBLAS and NCCL: memory is
counted but not there, kernels are launched but do nothing. So losses mean nothing here, and neither
do a GPU's times. Everything that the host does is real: which code runs, torch.compile and Triton
for compute capability 9.0, torch's caching allocator with its peaks (and out of memory), the number
of launches, waits for the device, the host's time to launch a step. Other ranks are torch's `fake`
process group.

Needs a CUDA build of torch, which starts without a GPU, and gcc.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.gpu import table, write_documents

RECORDS = (6, 12, 23, 62)
STEPS = 8
COUNTS = ("launches", "products", "copies", "waits")
HEAD = ("record", "ranks", "GiB", "tokens at once", "peak GiB, step", "peak GiB, validation",
        "graphs", "compile and warm-up s, cold", "warm", "start to first step s, cold", "warm",
        "kernels a step", "products", "copies",
        "waits", "host ms a step", "kernels of the optimizer", "its host ms", "its copies, GB")


# What a kernel would have to answer, in every process on the null GPU; and no cuDNN, which talks to
# the driver in ways of its own.
START = """
import torch
equal = torch.equal
torch.equal = lambda a, b: a.is_cuda or equal(a, b)
torch.backends.cuda.enable_cudnn_sdp(False)
"""


# --- the library ----------------------------------------------------------------------------------

def header_folders() -> list[Path]:
    """CUDA's headers as torch's and Triton's packages bring them: torch's own version first, which
    lacks some files that Triton's has."""
    folders = []
    for package, pattern in (("nvidia", "*/include"), ("triton", "backends/nvidia/include")):
        if found := importlib.util.find_spec(package):
            for place in found.submodule_search_locations:
                folders += sorted(Path(place).glob(pattern))
    return folders


def build(folder: Path) -> Path:
    """libcuda.so.1 in `folder`, where Triton looks for it by name."""
    library = folder / "libcuda.so.1"
    includes = [word for folder in header_folders() for word in ("-I", str(folder))]
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-fvisibility=hidden", "-Wno-attributes",
                    *includes, "-Wl,-soname,libcuda.so.1", str(ROOT / "bench" / "null_gpu.c"),
                    "-o", str(library), "-ldl", "-lpthread"], check=True)
    (folder / "sitecustomize.py").write_text(START)
    return library


def environment(library: Path, gib: float) -> dict[str, str]:
    """Caches go where the library is, and with it: constants that a kernel should have computed are
    garbage in what is compiled here, so that no GPU may ever get it."""
    folder = str(library.parent)
    return os.environ | {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": folder,
                         "PYTHONPATH": folder, "NULL_GPU_GIB": str(gib),
                         "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                         "TRITON_CACHE_DIR": f"{folder}/triton"}


# --- one training, in a process of its own --------------------------------------------------------

class Meter:
    """What the library counted, the processor time of this process, and the bytes that muon.py's
    copies read and write, between two looks."""

    def __init__(self) -> None:
        import torch

        library = ctypes.CDLL(None)
        self._counts = {name: ctypes.c_uint64.in_dll(library, f"null_gpu_{name}")
                        for name in COUNTS}
        self._copied = 0
        foreach_copy, stack = torch._foreach_copy_, torch.stack

        def metered_copy(to, given, *rest):
            self._copied += sum(t.nbytes for t in (*to, *given))
            return foreach_copy(to, given, *rest)

        def metered_stack(tensors, *rest):
            batch = stack(tensors, *rest)
            self._copied += 2 * batch.nbytes * batch.is_cuda
            return batch

        torch._foreach_copy_, torch.stack = metered_copy, metered_stack

    def read(self) -> dict[str, float]:
        return {name: count.value for name, count in self._counts.items()} | {
            "host_ms": 1e3 * time.process_time(), "copied": self._copied}

    @contextlib.contextmanager
    def into(self, rows: list[dict[str, float]]) -> Iterator[None]:
        before = self.read()
        yield
        rows.append({name: now - before[name] for name, now in self.read().items()})


def child(arguments: Sequence[str], rank: int, ranks: int, out: Path) -> int:
    """Train by these options with the meter at a step, at the optimizer and at the memory."""
    import torch
    import torch.distributed as dist
    from torch._dynamo.utils import counters
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import muon
    import train_gpt
    from trainer.dist import World, process_age_s
    from trainer.memory import micro_batch_rows
    from trainer.status import StepStatus

    class OneOfMany(World):
        """The others say what this one says."""

        def gather(self, value):
            return [value] * self.size

        def from_rank0(self, function):
            return function()

        def out_of_sync(self, named):
            return []

        def set_timeout(self, timeout_s):
            pass

    @contextlib.contextmanager
    def join_world(device: str):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "LOCAL_WORLD_SIZE": str(ranks)}
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        yield OneOfMany(rank, rank, ranks, torch.device("cuda", 0))
        dist.destroy_process_group()

    meter, steps, updates, memory = Meter(), [], [], {"step": 0, "validation": 0}
    said, began = {}, time.perf_counter()
    train_step, evaluate, update = train_gpt.train_step, train_gpt.evaluate, muon.Muon.step

    def peak_of(what: str, call, *given, **named):
        torch.cuda.reset_peak_memory_stats()
        result = call(*given, **named)
        memory[what] = max(memory[what], torch.cuda.max_memory_allocated())
        return result

    def metered_step(*given, **named):
        with meter.into(steps):
            peak_of("step", train_step, *given, **named)

    def metered_update(self, *given, **named):
        with meter.into(updates):
            return update(self, *given, **named)

    def compile_ahead(*given, **named):
        said["start"] = time.perf_counter()
        original_compile_ahead(*given, **named)

    def warm_up(*given, **named):
        start = said.pop("start", time.perf_counter())
        original_warm_up(*given, **named)
        said["warmup_s"] = time.perf_counter() - start
        said["start_s"] = process_age_s()
        recipe, world = given[2], given[4]
        seq_len, mine = recipe.model.seq_len, recipe.num_rows // world.size
        said["tokens_at_once"] = seq_len * micro_batch_rows(mine, seq_len, given[5])

    # Memory that no kernel wrote says anything, also that a step was bad: it must not end the run.
    def metered_evaluate(*given, **named):
        peak_of("validation", evaluate, *given, **named)
        return 1.0

    def receive(self):
        report = original_receive(self)
        return report and report._replace(loss=1.0, num_bad=0, stop_requested=False)

    original_receive, StepStatus.receive = StepStatus.receive, receive
    original_warm_up, train_gpt.warm_up = train_gpt.warm_up, warm_up
    original_compile_ahead, train_gpt.compile_ahead = train_gpt.compile_ahead, compile_ahead
    train_gpt.train_step, muon.Muon.step = metered_step, metered_update
    train_gpt.evaluate = metered_evaluate
    if ranks > 1:
        train_gpt.join_world = join_world
    status = train_gpt.main(list(arguments))
    out.write_text(json.dumps({
        **said, "status": status, "seconds": time.perf_counter() - began,
        "peak_step": memory["step"], "peak_validation": memory["validation"],
        "step": steps[-1], "update": updates[-1],
        "graphs": counters["stats"]["unique_graphs"],
        "cache": dict(counters["aot_autograd"])}))
    return status


# --- the table ------------------------------------------------------------------------------------

def measure(record: int, options: Sequence[str], ranks: int, at_once: int, gib: float,
            library: Path, data: Path, folder: Path) -> dict:
    """`at_once` ranks with an empty cache, of which the slowest counts, and one with what they
    left; the last one's figures."""
    words = ["--record", str(record), "--scale", "full", "--num_iterations", str(STEPS),
             "--val_every", str(STEPS), "--val_tokens", "2097152", "--data_dir", str(data),
             "--log_dir", str(folder / "logs"), *options]
    env = environment(library, gib) | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
                                       "TRITON_CACHE_DIR": str(folder / "triton")}
    row = {"record": record, "ranks": ranks, "at_once": at_once, "gib": gib,
           "options": " ".join(options)}
    for cache, together in (("cold", at_once), ("warm", 1)):
        outs = {rank: folder / f"{cache}{rank}.json" for rank in range(0, ranks, ranks // together)}
        started = [subprocess.Popen(
            [sys.executable, __file__, "--child", str(out), "--ranks", str(ranks), "--rank",
             str(rank), "--", *words],
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank, out in outs.items()]
        said = [process.communicate()[0] for process in started]
        for line in "".join(said).splitlines():
            if line.startswith("warning: "):
                print(line, file=sys.stderr, flush=True)
        for out, words_of_it in zip(outs.values(), said):
            if not out.is_file():
                return row | {"failed": (words_of_it.strip() or "?").splitlines()[-1]}
        results = [json.loads(out.read_text()) for out in outs.values()]
        row |= results[0]
        if row["status"]:
            return row | {"failed": f"the run ended early, with status {row['status']}"}
        row[f"{cache}_s"] = max(result["warmup_s"] for result in results)
        row[f"{cache}_start_s"] = max(result["start_s"] for result in results)
    return row


def cells(row: dict) -> list[str]:
    first = [f"#{row['record']} {row['options']}".strip(), str(row["ranks"]), f"{row['gib']:g}"]
    if "failed" in row:
        return [*first, f"failed: {row['failed'][:100]}", *[""] * (len(HEAD) - 4)]
    step, update = row["step"], row["update"]
    return [*first, f"{row['tokens_at_once']:,}", f"{row['peak_step'] / 2**30:.1f}",
            f"{row['peak_validation'] / 2**30:.1f}", str(row["graphs"]), f"{row['cold_s']:.0f}",
            f"{row['warm_s']:.1f}", f"{row['cold_start_s']:.0f}", f"{row['warm_start_s']:.0f}",
            *(f"{step[name]:,}" for name in COUNTS),
            f"{step['host_ms']:.1f}", f"{update['launches']:,}", f"{update['host_ms']:.1f}",
            f"{step['copied'] / 1e9:.2f}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=RECORDS)
    parser.add_argument("--ranks", type=int, default=1, help="of one node; one of them runs")
    parser.add_argument("--at_once", type=int, default=1, help="ranks that start from empty caches "
                        "at the same time, spread over --ranks")
    parser.add_argument("--gib", type=float, default=139.0, help="memory of the GPU")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--exec", nargs=argparse.REMAINDER, help="run a command on the null GPU")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="after --: more options of train_gpt.py")
    args = parser.parse_args(arguments)
    if args.child:
        return child(args.options, args.rank, args.ranks, args.child)
    if not 1 <= args.at_once <= args.ranks:
        parser.error(f"--at_once: expected 1 to {args.ranks} of --ranks, got {args.at_once}")
    import torch

    if torch.version.cuda is None:
        parser.error(f"torch {torch.__version__} is a CPU build; this needs one for CUDA "
                     "(it runs without a GPU)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = build(folder)
        if args.exec:
            return subprocess.run(args.exec, env=environment(library, args.gib)).returncode
        write_documents(folder, 20_000_000)
        rows = []
        for record in args.records:
            own = folder / str(record)
            own.mkdir(exist_ok=True)
            rows.append(measure(record, args.options, args.ranks, args.at_once,
                                args.gib, library, folder, own))
            print(" | ".join(cells(rows[-1])), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    print("\n".join(["", *table(HEAD, [cells(row) for row in rows])]))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
