"""First contact with a GPU: everything that can crash, in under five minutes.

    python bench/first.py --out results --data_dir shards
    python bench/first.py --out results --toy       toy sizes on a CPU: does this script still run?

Trainings of a few steps at full size, the tests that need a GPU (one process a file) and a smoke
test of NCCL run side by side, as many as the GPU's memory holds, each in its own process group, on
its own cores, with its own time limit. Before a process is killed it is asked where it is (SIGABRT:
Python prints the stack of each thread). Then, with the GPU to themselves: ceilings (matrix
products, copies, the head's products in fp8, attention), the loss kernels, a profile of three
steps.

OUT gets three files: first.json (status, seconds, last lines of each), logs.tar.xz (all output,
logs of trainings, the trace), caches.tar.xz (what torch.compile and Triton built; the second call
unpacks it). They are written anew after each wave, so that a lease that ends early costs the rest.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench.gpu import TOY, machine, unpacked
from recipes import RECORDS

NEWEST = max(RECORDS)
ASK_S = 5  # between asking a process where it is and killing it


@dataclass
class Case:
    """A process. Those with `gib` share the GPU with others, as far as its memory goes."""

    name: str
    command: list[str]
    gib: float | None = None
    limit_s: float = 140.0
    process: subprocess.Popen | None = None
    cores: set[int] = field(default_factory=set)
    started: float = 0.0
    asked: bool = False


PROBE = """
import shutil, subprocess, torch, triton
if shutil.which("nvidia-smi"):
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
print("torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
print("nccl", torch.cuda.nccl.version(), "cudnn", torch.backends.cudnn.version())
print("g++", shutil.which("g++"), "free, total memory", torch.cuda.mem_get_info())
try:
    import flash_attn_interface
    print("flash attention 3 is there")
except ImportError as error:
    print("no flash attention 3:", error)
"""

NCCL = """
import os, torch, torch.distributed as dist
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
torch.cuda.set_device(0)
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
for group in (dist.group.WORLD, dist.new_group([0])):
    x = torch.arange(1024.0, device="cuda")
    part, whole = torch.empty_like(x), torch.empty_like(x)
    dist.all_reduce(x, group=group)
    dist.reduce_scatter_tensor(part, x, group=group)
    dist.all_gather_into_tensor(whole, part, group=group)
    assert torch.equal(whole, torch.arange(1024.0, device="cuda"))
dist.destroy_process_group()
print("NCCL works with one rank")
"""

# In milliseconds by CUDA events, caches flushed; TFLOP/s or TB/s beside them.
CEILINGS = """
import torch
from bench.kernels import milliseconds
from kernels.attention import document_ids, packed_keys, attention
torch.manual_seed(0)
def say(name, call, amount, unit):
    ms = milliseconds(call, 20)
    print(f"{name:48} {ms:8.3f} ms {amount / ms / 1e9:8.2f} {unit}", flush=True)
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
say("bf16 product 8192^3", lambda: a @ b, 2 * 8192**3, "TFLOP/s")
big = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
into = torch.empty_like(big)
say("copy of 2 GiB", lambda: into.copy_(big), 4 * big.numel(), "TB/s")
del big, into
one, V, C = torch.ones((), device="cuda"), 50304, 768
e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
for N in (12288, 24576, 49152):
    x, w = (torch.randn(n, C, device="cuda").to(e4) for n in (N, V))
    g = torch.randn(N, V, device="cuda", dtype=torch.bfloat16).to(e5)
    gT, wT, xT = g.T.contiguous(), w.T.contiguous(), x.T.contiguous()
    for name, left, right, out in (("logits", x, w, torch.bfloat16), ("dx", g, wT, torch.bfloat16),
                                   ("dw", gT, xT, torch.float32), ("dw^T", xT, gT, torch.float32)):
        say(f"fp8 head {name}, {N} tokens", lambda: torch._scaled_mm(
            left, right.T, one, one, out_dtype=out, use_fast_accum=name == "logits"),
            2 * N * V * C, "TFLOP/s")
    del g, gT
T, H, D = 49152, 6, 128
tokens = torch.randint(50256, (1, T), device="cuda")
tokens[:, ::512] = 50256
for window in (64, 1728):
    keys = packed_keys(document_ids(tokens, 50256), window, torch.bfloat16,
                       torch.tensor([[T // 512, 512]]))
    q, k, v = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))
    y = attention(q, k, v, 0.1, keys)
    seen = sum(min(window, i + 1) for i in range(512)) * T / 512
    say(f"attention, documents of 512, window {window}", lambda: attention(q, k, v, 0.1, keys),
        4 * H * D * seen, "TFLOP/s")
    say("  and backward", lambda: torch.autograd.grad(attention(q, k, v, 0.1, keys), (q, k, v), y),
        14 * H * D * seen, "TFLOP/s")
"""


def cases(toy: bool, data: Path | None, work: Path) -> list[Case]:
    def train(name: str, record: int, gib: float | None, *options: str) -> Case:
        size = TOY if toy else ["--scale", "full", "--num_iterations", "6", "--val_every", "6",
                                "--val_tokens", "2097152", *options]
        return Case(name, [sys.executable, "train_gpt.py", "--record", str(record), *size,
                           "--log_dir", str(work / "logs" / name), "--save_model", "false",
                           *(["--data_dir", str(data)] if data else [])], gib)

    def script(name: str, text: str, gib: float | None = None) -> Case:
        return Case(name, [sys.executable, "-c", text], gib)

    tokens = ("--micro_batch_tokens", "49152")
    tests = [Case(file.stem, [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p",
                              "no:cacheprovider", "-o", "timeout=0", str(file)], 8)
             for file in sorted((ROOT / "tests").glob("test_*.py"))
             if "pytest.mark.gpu" in file.read_text() and file.name != "test_bench_gpu.py"]
    first = [train("record23", 23, 28, *tokens), train("newest", NEWEST, 48, *tokens)]
    if toy:
        return [first[0], next(case for case in tests if case.name == "test_kernels_symmetric")]
    return [script("probe", PROBE, 1), *first,
            train("record23_kernels", 23, 28, *tokens, "--kernels", "symmetric,relu2,loss"),
            train("record6", 6, 12, "--micro_batch_tokens", "16384"),
            train("record12", 12, 12, "--micro_batch_tokens", "65536"),
            script("nccl", NCCL, 2), *tests,
            script("ceilings", CEILINGS),
            Case("loss_kernels", [sys.executable, "bench/kernels.py", "--only", "loss"]),
            train("profile", 23, None, *tokens, "--profile", "3")]


def start(case: Case, work: Path, cores: set[int]) -> None:
    """In its own process group and on its cores, with all caches in `work`."""
    case.cores, case.started = cores, time.monotonic()
    with (work / "logs" / f"{case.name}.txt").open("w") as out:
        case.process = subprocess.Popen(
            case.command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {
                "PYTHONFAULTHANDLER": "1", "OMP_WAIT_POLICY": "passive",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "TORCHINDUCTOR_CACHE_DIR": str(work / "caches" / "inductor"),
                "TRITON_CACHE_DIR": str(work / "caches" / "triton")},
            preexec_fn=lambda: os.sched_setaffinity(0, cores))


def end(case: Case, work: Path) -> dict | None:
    """Its row once it has ended; kills it when its time is up."""
    seconds = time.monotonic() - case.started
    if case.process.poll() is None:
        if seconds > case.limit_s:
            os.killpg(case.process.pid, signal.SIGKILL)
        elif seconds > case.limit_s - ASK_S and not case.asked:
            os.killpg(case.process.pid, signal.SIGABRT)
            case.asked = True
        return None
    kill(case)  # what it has left behind
    text = (work / "logs" / f"{case.name}.txt").read_text(errors="replace").strip().splitlines()
    return {"name": case.name, "status": case.process.returncode, "seconds": round(seconds, 1),
            "late": case.asked, "last": text[-6:]}


def kill(case: Case) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(case.process.pid, signal.SIGKILL)


def run_all(todo: list[Case], work: Path, gib: float, after: Callable[[list[dict]], None]) -> None:
    """Those with `gib` side by side, as far as the memory goes; then the others, one by one."""
    all_cores = set(os.sched_getaffinity(0))
    share = max(1, len(all_cores) // 8)
    running, rows, waiting = [], [], sorted(todo, key=lambda case: case.gib is None)
    while waiting or running:
        for case in list(waiting):
            cores = sorted(all_cores.difference(*(other.cores for other in running)))
            used = sum(other.gib for other in running if other.gib is not None)
            if case.gib is None:
                fits, count = not running, len(cores)
            else:
                fits, count = used + case.gib <= gib and len(cores) >= share, share
            if fits:
                start(case, work, set(cores[:count]))
                running.append(case)
                waiting.remove(case)
        time.sleep(0.2)
        for case in list(running):
            if row := end(case, work):
                running.remove(case)
                rows.append(row)
                how = "killed, too late" if row["late"] else (
                    "ok" if row["status"] == 0 else f"STATUS {row['status']}")
                print(f"{row['seconds']:7.1f} s  {case.name:28} {how:17} "
                      f"{(row['last'] or [''])[-1][:90]}", flush=True)
                after(rows)


def pack(folder: Path, file: Path) -> None:
    """`folder` as an archive; a partial one never replaces a whole one."""
    partial = file.with_name(file.name + ".tmp")
    with tarfile.open(partial, "w:xz", preset=1) as archive:
        archive.add(folder, folder.name, filter=lambda entry: None if entry.name.endswith(
            ".best_config") else entry)  # tuned beside other processes
    partial.replace(file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data_dir", type=Path, help="shards of real tokens (.bin or .bin.xz)")
    parser.add_argument("--only", nargs="+", help="cases by name")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args(arguments)
    if not (args.toy or torch.cuda.is_available()):
        parser.error("there is no GPU here; --toy runs the script at toy sizes on a CPU")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    gib = 64.0 if args.toy else 0.9 * torch.cuda.get_device_properties(0).total_memory / 2**30
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for part in ("logs", "caches", "data"):
            (work / part).mkdir()
        data = args.data_dir and unpacked(args.data_dir.resolve(), work / "data")
        todo = cases(args.toy, data, work)
        if args.only:
            if unknown := set(args.only) - {case.name for case in todo}:
                parser.error(f"--only: expected some of {', '.join(c.name for c in todo)}; got "
                             f"{', '.join(unknown)}")
            todo = [case for case in todo if case.name in args.only]

        def after(rows: list[dict]) -> None:
            (args.out / "first.json").write_text(json.dumps(
                {"machine": machine(args.toy), "rows": rows}, indent=1))
            pack(work / "logs", args.out / "logs.tar.xz")
            if len(rows) == len(todo):
                pack(work / "caches", args.out / "caches.tar.xz")

        try:
            run_all(todo, work, gib, after)
        finally:
            for case in todo:
                if case.process is not None:
                    kill(case)
        rows = json.loads((args.out / "first.json").read_text())["rows"]
    bad = [row["name"] for row in rows if row["status"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} well, {time.monotonic() - began:.0f} s; "
          f"not well: {', '.join(bad) or 'none'}")
    return int(bool(bad))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
