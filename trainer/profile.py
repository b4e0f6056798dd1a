"""Where the time of a step goes: `python train_gpt.py --profile 5`.

After a few steps that are not counted, N steps run under torch.profiler. The first rank writes
logs/<run_id>.trace.json.gz (to be opened at ui.perfetto.dev) and prints a table: for each class of
kernels on a GPU, of operators on a CPU, the time a step, its share, the rate reached and the number
of calls; then communication that nothing hid and gaps in which nothing ran. Classes are those in
which public traces of the speedrun are read, so that rows can be laid side by side. The profiler
slows the host down, so such a run stops after its N steps and is no record.

`table` reads the events of a Chrome trace and nothing else; every other function serves it.
"""

import bisect
import gzip
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from trainer.dist import World

# Steps before the first profiled one: they allocate, and learn the order. The profiler records the
# last of them too, uncounted: its own first use takes time (CUPTI's, on a GPU).
WARM_UP = 4
STEP = "train step"     # the range around each profiled step, in the trace

Span = tuple[float, float]  # from, to, in microseconds

# --- classes, by name -----------------------------------------------------------------------------

COMMUNICATION = r"nccl|gloo|c10d|param_comms"
ATTENTION = r"flash|fmha|attention|attn"
LOSS = r"softmax|nll_loss|cross_entropy|softcap|^_loss_kernel"
PRODUCT_KERNEL = r"gemm|nvjet|cutlass|cublas|xmma|splitk|_mm\b|matmul|triton_tem|_product_kernel|" \
                 r"_symmetric_kernel"
PRODUCT_OP = r"^(aten|mkldnn)::(mm|addmm|bmm|baddbmm|_scaled_mm|mv|dot|matmul|_?linear)"
FP8 = r"e4m3|e5m2|fp8|float8|_scaled_mm"
COPY_OP = r"::(copy_|clone|_to_copy|to|contiguous|cat|stack|fill_|zero_|zeros|empty)"
NATIVE = r"^(aten|mkldnn)::|cpp_fused"


def kernel_class(name: str, op: str, on_vocabulary: bool, phase: str) -> str:
    """Class of a GPU kernel, from its name, the operator that launched it, whether one of the
    operator's tensors spans the vocabulary, and the phase of the step."""
    def has(pattern: str) -> bool:
        return bool(re.search(pattern, name, re.I))

    if has(r"nccl"):
        return "communication"
    if has(r"^mem(cpy|set)|^_transpose_kernel"):
        return "copies"
    if has(ATTENTION) and not has(r"^triton_(poi|red|per)"):
        backward = has(r"bwd|backward|_dq|_dkv") or phase == "backward"
        return "attention backward" if backward else "attention forward"
    if has(PRODUCT_KERNEL) or (re.search(PRODUCT_OP, op) and not has("elementwise|reduce|triton_")):
        if phase == "optimizer":
            return "Newton-Schulz"
        place = "head" if on_vocabulary else "block"
        return f"{place} GEMMs" + (", fp8" if re.search(FP8, name + op, re.I) else "")
    if phase == "optimizer":
        return "optimizer elementwise"
    if has("embedding|indexing_backward"):
        return "embedding"
    if has(LOSS) or on_vocabulary:
        return "softmax and loss"
    if has("triton_|elementwise|reduce|norm|Cat|index|fill|scan"):
        return "elementwise and norms"
    return "other"


def operator_class(name: str, on_vocabulary: bool, phase: str) -> str:
    """Class of a CPU operator."""
    def has(pattern: str) -> bool:
        return bool(re.search(pattern, name))

    if has(COMMUNICATION):
        return "communication"
    if phase in ("optimizer", "data"):
        return phase
    if has(PRODUCT_OP):
        return "products, head" if on_vocabulary else "products, blocks"
    if has(ATTENTION):
        return "attention"
    if has("embedding"):
        return "embedding"
    if has(LOSS) or (on_vocabulary and has(NATIVE)):
        return "softmax and loss"
    if has(COPY_OP):
        return "copies"
    if has("^CompiledFunction|CompiledFxGraph"):  # its C++ kernels are not recorded one by one
        return "fused by compiling"
    return "elementwise and norms" if has(NATIVE) else "other"


def product_flops(op: str, dims: list) -> float | None:
    """FLOPs of a matrix product from the shapes of its inputs; None for what is none."""
    name = op.rpartition("::")[2]
    dims = dims[1:] if name in ("addmm", "baddbmm") else dims
    if len(dims) < 2 or not (dims[0] and dims[1]):
        return None
    columns = {"mm": -1, "addmm": -1, "bmm": -1, "baddbmm": -1, "_scaled_mm": -1,
               "linear_relu2": 0}.get(name)
    return None if columns is None else 2.0 * math.prod(dims[0]) * dims[1][columns]


def moved_bytes(event: dict, op: dict) -> float | None:
    """Bytes that a copy, a collective (on the wire, a rank) or a fused kernel (each argument once)
    moves, where the trace says so."""
    args = event["args"]
    if "bytes" in args:
        return float(args["bytes"])
    size = item_bytes(args.get("dtype"))
    if "Collective name" in args and size:
        n = max(1, int(args.get("Group size", 1)))
        what, most = args["Collective name"], max(int(args.get("In msg nelems", 0)),
                                                  int(args.get("Out msg nelems", 0)))
        return most * size * (n - 1) / n * (2 if "allreduce" in what.replace("_", "") else 1)
    if op and op["name"].startswith("triton_"):
        types = op["args"].get("Input type", [])
        return float(sum(math.prod(d) * item_bytes(t) for d, t in zip(_dims(op), types) if d))
    return None


def item_bytes(dtype: object) -> int:
    """Of traces' words: "float", "c10::BFloat16", "Half", "long int", "float8_e4m3fn" ..."""
    sizes = {"8_|bool|byte|char": 1, "16|half": 2, "long|double": 8, "float|int": 4}
    return next((n for words, n in sizes.items() if re.search(words, str(dtype), re.I)), 0)


def _dims(op: dict | None) -> list[list[int]]:
    """Shapes of an operator's tensor inputs, lists of tensors left empty."""
    dims = (op or {}).get("args", {}).get("Input Dims", [])
    return [d if all(isinstance(n, int) for n in d) else [] for d in dims]


# --- spans of time --------------------------------------------------------------------------------

def union(spans: Iterable[Span]) -> list[Span]:
    """The same instants as disjoint spans in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)


def uncovered(spans: Iterable[Span], by: Iterable[Span]) -> float:
    """How much of `spans` no span of `by` covers."""
    spans, by = union(spans), union(by)
    return length(union([*spans, *by])) - length(by)


def _span(event: dict) -> Span:
    return event["ts"], event["ts"] + event.get("dur", 0)


# --- the table ------------------------------------------------------------------------------------

@dataclass
class Row:
    """One class, summed over all steps."""

    us: float = 0.0
    calls: int = 0
    flops: float = 0.0
    flops_us: float = 0.0   # of the calls whose FLOPs are known
    bytes: float = 0.0
    bytes_us: float = 0.0

    @property
    def rate(self) -> str:
        """What is known of it: products' FLOP/s, else bytes/s."""
        if self.flops_us:
            tera = self.flops / self.flops_us / 1e6
            return f"{tera:.0f} TFLOP/s" if tera >= 10 else f"{1000 * tera:.0f} GFLOP/s"
        return f"{self.bytes / self.bytes_us / 1e3:.0f} GB/s" if self.bytes_us else ""


@dataclass
class Table:
    """Classes by time, and what does not belong to one; microseconds over all steps."""

    num_steps: int
    us: float
    where: str                              # "kernels" or "operators"
    rows: dict[str, Row] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    exposed_us: float = 0.0
    idle_us: float = 0.0

    def lines(self) -> list[str]:
        """As text, 60 columns."""
        def line(name: str, us: float, rate: str = "", calls: int | str = "") -> str:
            count = f"{calls / self.num_steps:.0f}" if calls else ""
            return (f"{name:<23}{us / self.num_steps / 1000:>9.2f}{us / self.us:>7.1%}"
                    f"{rate:>13}{count:>8}")

        rows = sorted(self.rows.items(), key=lambda item: -item[1].us)
        text = [f"{'class':<23}{'ms/step':>9}{'share':>7}{'rate':>13}{'calls':>8}",
                *(line(name, row.us, row.rate, row.calls) for name, row in rows),
                line("exposed communication", self.exposed_us),
                line("idle gaps" if self.where == "kernels" else "between operators",
                     self.idle_us),
                line(f"a step ({self.where})", self.us,
                     calls=sum(row.calls for row in self.rows.values())),
                *(line(f"  of it {name}", us) for name, us in self.phases.items())]
        return [words.rstrip() for words in text]


def _phases(events: list[dict]) -> dict[str, list[Span]]:
    """When the host was in which phase: backward wherever autograd runs a node."""
    spans: dict[str, list[Span]] = {"backward": [], "optimizer": [], "data": []}
    for e in events:
        if e["name"].startswith("autograd::engine::evaluate_function"):
            spans["backward"].append(_span(e))
        elif e["name"].startswith("Optimizer."):
            spans["optimizer"].append(_span(e))
        elif e["name"] == "data" and e.get("cat") == "user_annotation":
            spans["data"].append(_span(e))
    return {name: union(found) for name, found in spans.items()}


def _phase(at: float, phases: dict[str, list[Span]]) -> str:
    for name, spans in phases.items():
        i = bisect.bisect_right(spans, at, key=lambda span: span[0])
        if i and at < spans[i - 1][1]:
            return name
    return "forward"


def self_times(ops: list[dict]) -> list[tuple[dict, float, dict | None]]:
    """(operator, its time without what ran inside it, the one around it) of one thread."""
    out: list[list] = []
    stack: list[list] = []
    for op in sorted(ops, key=lambda e: (e["ts"], -e.get("dur", 0))):
        while stack and op["ts"] >= _span(stack[-1][0])[1]:
            stack.pop()
        out.append([op, op.get("dur", 0.0), stack[-1][0] if stack else None])
        if stack:
            stack[-1][1] -= op.get("dur", 0.0)
        stack.append(out[-1])
    return [(op, max(0.0, us), around) for op, us, around in out]


def table(events: list[dict], vocab_size: int) -> Table:
    """The table of a Chrome trace: the list of its event dicts, with steps marked by ranges named
    STEP. Products and elementwise work on tensors `vocab_size` wide are the head's.
    Raises ValueError where no step is marked."""
    events = [e | {"args": e.get("args", {})} for e in events if e.get("ph") == "X"]
    steps = [e for e in events if e["name"] == STEP and e.get("cat") == "user_annotation"]
    if not steps:
        raise ValueError(f"no range named {STEP!r} in the trace: expected one a step, got none")
    start = min(e["ts"] for e in steps)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
               and e["ts"] >= start]  # the device was synchronised then: earlier ones are no step's
    phases = _phases(events)
    end = max(_span(e)[1] for e in [*steps, *kernels])
    found = Table(len(steps), end - start, "kernels" if kernels else "operators")
    busy: list[Span] = []
    communication: list[Span] = []
    seen: set[tuple[str, object]] = set()

    def wide(op: dict | None) -> bool:
        return any(vocab_size in dims for dims in _dims(op))

    def add(event: dict, op: dict | None, kind: str, us: float, calls: int, phase: str) -> None:
        row = found.rows.setdefault(kind, Row())
        row.us += us
        row.calls += calls
        found.phases[phase] = found.phases.get(phase, 0.0) + us
        name = op["name"] if op else ""
        flops = product_flops(name, _dims(op)) if kind != "communication" else None
        if flops and ("GEMM" in kind or "products" in kind or kind == "Newton-Schulz"):
            call = (name, op["args"].get("External id", id(op)))  # several kernels are one product
            row.flops += 0.0 if call in seen else flops
            row.flops_us += us
            seen.add(call)
        moved = moved_bytes(event, op)
        if moved:
            row.bytes += moved
            row.bytes_us += us

    if kernels:
        ops = {e["args"]["External id"]: e for e in events
               if e.get("cat") == "cpu_op" and "External id" in e["args"]}
        for e in kernels:
            op = ops.get(e["args"].get("External id"))
            phase = _phase(op["ts"], phases) if op else "unknown"
            kind = kernel_class(e["name"], op["name"] if op else "", wide(op), phase)
            (communication if kind == "communication" else busy).append(_span(e))
            add(e, op, kind, e.get("dur", 0), 1, phase)
    else:
        thread = steps[0].get("tid")
        mine = [e for e in events if start <= e["ts"] < end and e.get("tid") == thread and (
            e.get("cat") == "cpu_op" or e["name"] == "data")]
        kinds: dict[int, str] = {}
        for op, us, around in self_times(mine):
            phase = _phase(op["ts"], phases)
            kind = operator_class(op["name"], wide(op), phase)
            if around is not None and kinds[id(around)] == "attention":
                kind = "attention"  # by its range, not by its operators
            kinds[id(op)] = kind
            busy.append(_span(op))
            # What an operator calls of its own class is a part of it.
            add(op, op, kind, us, int(around is None or kinds[id(around)] != kind), phase)
        sent = [e for e in events if re.match("gloo:", e["name"]) and start <= e["ts"] < end]
        communication += [_span(e) for e in sent]
        if sent:  # other threads did it: what the trainer's own thread spent on it was the start
            found.rows["communication"] = Row(length(union(communication)), len(sent))
    found.exposed_us = uncovered(communication, busy)
    found.idle_us = uncovered([(start, end)], [*busy, *communication])
    return found


# --- profiling a run ------------------------------------------------------------------------------

def check_profile(num_steps: int, step: int, num_iterations: int) -> None:
    """Raises ValueError where a run at `step` has too few steps left to profile that many."""
    if num_steps and num_iterations - step < WARM_UP + num_steps:
        raise ValueError(f"--profile {num_steps}: expected --num_iterations of at least "
                         f"{step + WARM_UP + num_steps} ({WARM_UP} steps come before the profiled "
                         f"ones), got {num_iterations}")


class Profile:
    """Profiles `num_steps` steps of a run on the first rank; the others keep step.

    The devices are synchronised before the first and after the last profiled step, so the table's
    milliseconds are those of whole steps.
    """

    def __init__(self, num_steps: int, world: World):
        self.num_steps, self.world, self.seen = num_steps, world, 0
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on stderr
        self._profiler = None
        self._range = None

    def after_step(self) -> bool:
        """Call after each step. True once the last one that is wanted is done."""
        self.seen += 1
        last = self.seen == WARM_UP + self.num_steps
        if self.seen == WARM_UP or last:
            self.world.synchronize()
        self._close_range()
        if self.seen == WARM_UP - 1 or last:
            with self.world.long_timeout():  # the others wait while rank 0 starts or stops it
                self._start_or_stop(last)
        elif self.seen >= WARM_UP and self._profiler is not None:
            self._range = record_function(STEP)
            self._range.__enter__()
        return last

    def _start_or_stop(self, last: bool) -> None:
        if last and self._profiler is not None:
            self._profiler.stop()
        elif not last and self.world.is_rank0:
            activities = [ProfilerActivity.CPU]
            if self.world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def finish(self, path: Path, vocab_size: int) -> list[str]:
        """Write the trace to `path` and return the lines to show; none on other ranks."""
        if self._profiler is None:
            return []
        if self.seen < WARM_UP + self.num_steps:  # stopped under way
            self._close_range()
            self._profiler.stop()
            done = max(0, self.seen - WARM_UP)
            return [f"no profile: stopped after {done} of {self.num_steps} steps"]
        try:
            with tempfile.TemporaryDirectory() as folder:
                plain = Path(folder) / "trace.json"
                self._profiler.export_chrome_trace(str(plain))
                text = plain.read_bytes()
        except OSError as error:
            return [f"NO PROFILE: {error}"]
        return [f"profile of {self.num_steps} steps on rank 0 of {self.world.size}, slowed by the "
                "profiler:", *table(json.loads(text)["traceEvents"], vocab_size).lines(),
                write_trace(path, text)]


def write_trace(path: Path, text: bytes) -> str:
    """A whole file or none; returns the line to show. A disk that refuses costs the trace only."""
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
                packed.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        return f"NO TRACE: {error}"
    return f"trace: {path} (open it at ui.perfetto.dev)"
