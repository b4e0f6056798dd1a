"""A model of the machine: step time, time to target and efficiency on 1 to 256 GPUs.

    python -m bench.project                             rates of public 8xH100 runs
    python bench/project.py --measured rows.json        rates of measurements on one GPU
    python bench/project.py --markdown bench/PROJECT.md the tables as a file

A step is a sum: products at a rate, memory-bound work at a bandwidth, attention at a cost a token
and a rate, the optimizer by the plan's loads, gaps, and whatever of the plan's collectives the
backward pass does not hide. Each constant in `Gpu` and `Link` was measured once in public, in one
trace of record #44 unless its line says otherwise; none was fitted to a step time. `check` holds
the whole against step times of other records, and says how far off it is.

What it says, with the public rates: within 10% of all 15 public numbers, 4% in the mean. Too fast
for #12, the first with FlexAttention, and for #60 and #62, whose fused kernels count as free of all
but their traffic. On 8 GPUs products bound every recipe with 42 to 47% of a step and communication
takes 1 to 6%. What keeps #12 and later from more than 8 GPUs are their 8 rows, not the link; #6, of
512 rows, keeps 72% of its efficiency on 64 GPUs, and on 256 communication bounds it.

What it leaves out: ranks that wait for the slowest, products that lose speed when a GPU has few
rows (a floor on kernels stands in for it), clocks that drop with heat. It knows the public programs
of the records, not how far this repository's kernels are; --measured scales it to what was seen.

rows.json is a list of {"recipe": 62, "tokens": 32768, "ms": 55.0, "optimizer_ms": 4.0}: forward and
backward of one micro-batch of the first phase on one GPU, and an update of all parameters there.
"""

import argparse
import functools
import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import torch
from torch import nn

import muon
import recipes
from data.loader import rank_rows
from model import GPT, Linear, Phase, mean_keys
from recipes import RECORDS, Recipe

GPUS = (1, 2, 4, 8, 16, 64, 256)
SHOWN = (6, 12, 23, 62)
TRACE = 32_768 * 1e3    # tokens of the trace's step, and milliseconds to seconds


@dataclass(frozen=True)
class Gpu:
    """Rates reached by one H100 SXM, in FLOP/s, bytes/s and seconds, and where they were seen.

    "Trace": one step of record #44's code, 32,768 tokens a GPU, 11 layers of which 10 have
    attention, width 768, 50,304 logits; 60.65 ms under the profiler.
    """

    # Trace: products of the blocks, all shapes and directions together. The head's in bf16 alike.
    product_flops: float = 717e12
    # Trace: 1,163 forward, 1,521 and 1,534 backward, a third of the FLOPs each.
    fp8_flops: float = 3 / (1 / 1163e12 + 1 / 1521e12 + 1 / 1534e12)
    # Trace: relu^2 forward 3.03 and backward 3.09 TB/s; Hopper's data sheet says 3.35.
    memory: float = 3.06e12
    # Trace: 12.7 ms of norms, rotary, residuals, gates and relu^2, as passes over (tokens, width)
    # in bf16; 70 a layer. relu^2 makes 20 of them: 4 widths, read and written, 3 + 2 times.
    passes: float = 12.7 / TRACE * 3.06e12 / (11 * 768 * 2)
    relu2_passes: float = 20.0
    # An fp32 stream: half of the other passes are over it. Estimate; acts on records to #9.
    stream_share: float = 0.5
    # Trace: softmax and cross-entropy 5.6 ms, a logit and target.
    loss: float = 5.6 / TRACE / 50_304
    # Fused (#60): reads logits twice, writes their gradient once, all in bf16, at `memory`.
    fused_passes: float = 3.0
    # Trace: 2.4 ms of casts and transposes where the head is in fp8, a logit.
    fp8_cast: float = 2.4 / TRACE / 50_304
    # FLOP/s as windows grow: FA3 from #40's stages (1.2 ms for 25 MF a token more, 32K tokens),
    # Flex from #23's (10.1 ms for 46 MF, 48K tokens); SDPA is FA2 forward and backward, d 128.
    fa3_flops: float = 25e6 * 32_768 / 1.2e-3
    flex_flops: float = 46e6 * 49_152 / 10.1e-3
    sdpa_flops: float = 343e12
    # Trace: 5.1 ms with its helper kernels at 0.45 TFLOP; what growth does not explain, a token
    # and layer.
    attention: float = (5.1 - 0.45e15 / (25e6 * 32_768 / 1.2e-3)) / TRACE / 10
    # Trace: embedding's backward and copies, 2.4 ms, a token.
    embedding: float = 2.4 / TRACE
    # Trace: Newton-Schulz, 200 to 250 TFLOP/s of the FLOPs done; from #27 on 0.7 of them are.
    polar_flops: float = 225e12
    symmetric: float = 0.7
    # Adam: 22 bytes a parameter (gradient, weight, two averages); trace: 1.5 ms of the rest.
    adam_bytes: float = 22.0
    optimizer: float = 1.5e-3
    # Trace: 1.1 ms in which nothing ran, a micro-batch.
    gaps: float = 1.1e-3
    # Trace: 954 kernels a step; a launch costs the host about 5 us (estimate), a micro-batch.
    launches: float = 954 * 5e-6
    # Tokens of a micro-batch in 80 GB, as the trainer chooses them.
    micro_tokens: int = 65_536


@dataclass(frozen=True)
class Link:
    """What connects GPUs. Bytes/s are bus bandwidth: what a rank sends in a ring."""

    node_size: int = 8
    intra: float = 285e9        # trace: 277 to 295 GB/s over NVLink, reduce-scatter and all-gather
    intra_latency: float = 30e-6    # trace: 14 to 50 us
    # 8 x 400 Gb/s InfiniBand, a card a GPU: 50 GB/s at 80%, which nobody measured for us.
    inter: float = 40e9
    inter_latency: float = 50e-6    # estimate


class Parts(NamedTuple):
    """Seconds of a step, by what bounds them."""

    products: float = 0.0
    memory: float = 0.0
    attention: float = 0.0
    fixed: float = 0.0          # optimizer, gaps, launches
    exposed: float = 0.0        # communication that nothing hides

    @property
    def total(self) -> float:
        return sum(self)


# --- what a recipe asks for -----------------------------------------------------------------------

def by_value(function):
    """functools.cache for recipes, which cannot be hashed: they hold dictionaries."""
    known = {}

    @functools.wraps(function)
    def cached(*args):
        key = repr(args)
        if key not in known:
            known[key] = function(*args)
        return known[key]
    return cached


@functools.cache
def document_lengths(num: int = 4000) -> tuple[float, ...]:
    """Equally likely lengths of FineWeb's documents in GPT-2 tokens: a lognormal with their median,
    403, and mean, 690."""
    sigma = math.sqrt(2 * math.log(690 / 403))
    normal = statistics.NormalDist()
    return tuple(403 * math.exp(sigma * normal.inv_cdf((i + 0.5) / num)) for i in range(num))


@functools.cache
def document_keys(window: int | None, longest: int) -> float:
    """Keys a token attends to on average inside documents that are cut at `longest` tokens."""
    lengths = [min(length, longest) for length in document_lengths()]
    return sum(length * mean_keys(length, window) for length in lengths) / sum(lengths)


@by_value
def sizes(recipe: Recipe) -> tuple[float, float, int]:
    """(parameters in products of the blocks, in the head's, layers with attention)."""
    model = meta_model(recipe)
    head = model.lm_head.weight.numel()
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    return products - head, head, sum(block.attn is not None for block in model.blocks)


@by_value
def meta_model(recipe: Recipe) -> nn.Module:
    """The model at full size, in shapes only."""
    with torch.device("meta"):
        return GPT(recipe.model)


def attention_flops(recipe: Recipe, phase: Phase, seq_len: int) -> float:
    """Forward and backward, a token: 12 x width x keys, over the layers; documents end it."""
    windows = {"long": phase.window, "short": phase.short_window, "paired": phase.short_window}
    longest = min(seq_len, recipe.max_doc_len or seq_len)
    keys = sum(document_keys(windows[block.layer.keys], longest) if recipe.model.packed
               else mean_keys(seq_len, None) for block in meta_model(recipe).blocks
               if block.attn is not None)
    return 12 * recipe.model.model_dim * keys


def micro_batch(recipe: Recipe, phase: Phase, seq_len: int, tokens: int, gpu: Gpu) -> Parts:
    """Forward and backward of so many tokens on one GPU, gaps and launches aside."""
    block, head, layers = sizes(recipe)
    m, width, logits = recipe.model, recipe.model.model_dim, recipe.model.padded_vocab_size
    fp8, fused_relu2, fused_loss = m.head == "fp8", recipe.record >= 59, recipe.record >= 60
    products = 6 * block / gpu.product_flops + 6 * head / (
        gpu.fp8_flops if fp8 else gpu.product_flops)
    other = gpu.passes - gpu.relu2_passes
    passes = other * (1 + gpu.stream_share * (m.stream_dtype == "fp32")) + (
        0 if fused_relu2 else gpu.relu2_passes)
    loss = gpu.fused_passes * 2 / gpu.memory if fused_loss else gpu.loss * len(phase.target_weights)
    memory = passes * m.num_layers * width * 2 / gpu.memory + gpu.embedding + logits * (
        loss + gpu.fp8_cast * fp8)
    rate = gpu.fa3_flops if recipe.record >= 29 else gpu.flex_flops if m.packed else gpu.sdpa_flops
    attention = gpu.attention * layers + attention_flops(recipe, phase, seq_len) / rate
    return Parts(products * tokens, memory * tokens, attention * tokens)


# --- optimizer and communication, by the plan -----------------------------------------------------

@by_value
def make_plan(recipe: Recipe, ranks: int) -> tuple[list[muon.Bucket], tuple[str, ...]]:
    """muon's plan for the ranks of one node, and the rule of each of its groups."""
    groups = recipes.optimizer_groups(recipe, meta_model(recipe).named_parameters())
    slots, rules = [], []
    for number, group in enumerate(groups):
        options = {k: v for k, v in group.items() if k != "params"}
        options = muon.resolve(options, group["rule"], {})
        rules.append(group["rule"])
        for name, p in group["params"]:
            large = p.numel() >= muon.SHARD_FROM and p.ndim > 1
            kind = "owned" if group["rule"] == "muon" else "sharded" if large else "replicated"
            slots.append(muon.Slot(
                len(slots), name, tuple(p.shape), p.dtype, number, kind,
                muon.update_flops(tuple(p.shape), options), options["update_interval"],
                backward_order(name, recipe.model.num_layers)))
    return muon.make_plan(slots, ranks), tuple(rules)


def backward_order(name: str, num_layers: int) -> float:
    """When backward is done with a parameter: 0 first, the head; 1 last, the tables."""
    words = name.split(".")
    if words[0] == "blocks":
        return 1 - int(words[1]) / num_layers
    return 0.0 if words[0] == "lm_head" else 1.0


def updates(plan: list[muon.Bucket], rules: tuple[str, ...], recipe: Recipe,
            gpu: Gpu) -> list[float]:
    """Seconds of each bucket's update on the rank that has most to do in it."""
    share = gpu.symmetric if recipe.record >= 27 else 1.0
    out = []
    for bucket in plan:
        of_rank = []
        for rank in range(bucket.num_segments):
            mine = [slot for batch in bucket.batches(rank) for slot in batch]
            flops = sum(s.cost * share for s in mine if rules[s.group] == "muon")
            size = sum(bucket.segment if bucket.rows else math.prod(s.shape)
                       for s in mine if rules[s.group] == "adam")
            of_rank.append(flops / gpu.polar_flops + size * gpu.adam_bytes / gpu.memory)
        out.append(max(of_rank))
    return out


def communicate(bucket: muon.Bucket, recipe: Recipe, ranks: int, nodes: int,
                link: Link) -> tuple[float, float, float]:
    """Seconds to reduce a bucket inside the node, across nodes, and to gather it."""
    size, shared = bucket.num_bytes, bucket.num_segments > 1
    ring = (ranks - 1) / ranks * size / link.intra
    twice = not shared or recipe.grad_collective == "all_reduce"
    within = link.intra_latency + (2 if twice else 1) * ring if ranks > 1 else 0.0
    across = link.inter_latency + 2 * (nodes - 1) / nodes * size / ranks / link.inter \
        if nodes > 1 else 0.0
    gather = link.intra_latency + ring if shared else 0.0
    return within, across, gather


def after_backward(recipe: Recipe, num_gpus: int, backward: float, gpu: Gpu,
                   link: Link) -> tuple[float, float]:
    """(update, exposed communication): seconds after the last gradient, mean over steps.

    A bucket is reduced when backward has filled it, one after the other; updates follow in that
    order, each gathered while the next is computed. Reductions across nodes are begun in the step,
    with all_reduce earlier.
    """
    ranks, nodes = min(num_gpus, link.node_size), max(1, num_gpus // link.node_size)
    plan, rules = make_plan(recipe, ranks)
    costs = updates(plan, rules, recipe, gpu)
    rarest = max(bucket.update_interval for bucket in plan)
    update = exposed = 0.0
    for all_due in (True, False):
        chance = 1 / rarest if all_due else 1 - 1 / rarest
        due = [(b, cost) for b, cost in zip(plan, costs) if all_due or b.update_interval == 1]
        wire, reduced = 0.0, []
        early = recipe.grad_collective == "all_reduce"
        for bucket, _ in due:
            filled = max(slot.order for slot in bucket.slots) if recipe.grad_overlap else 1.0
            within, across, _ = communicate(bucket, recipe, ranks, nodes, link)
            wire = max(wire, filled * backward) + within + (
                across if early or bucket.num_segments == 1 else 0.0)
            reduced.append(wire)
        at, spent = backward, 0.0
        for (bucket, cost), done in zip(due, reduced):
            _, across, gather = communicate(bucket, recipe, ranks, nodes, link)
            if across and not early and bucket.num_segments > 1:
                done = wire = max(wire, done, backward) + across
            at = max(at, done) + cost
            spent += cost
            if gather:
                wire = max(wire, at) + gather
        update += chance * spent
        exposed += chance * max(0.0, max(at, wire) - backward - spent)
    return update, exposed


# --- a step, a run --------------------------------------------------------------------------------

class Scale(NamedTuple):
    """Measured over modelled: of forward and backward, and of the update."""

    compute: float = 1.0
    update: float = 1.0


def step_parts(recipe: Recipe, step: int, num_gpus: int, gpu: Gpu, link: Link,
               scale: Scale = Scale()) -> Parts:  # noqa: B008 - it is immutable
    """One step on `num_gpus`. Raises ValueError where they are more than the step's rows."""
    num_rows, seq_len = recipes.batch_shape(step, recipe)
    rows = max(len(rank_rows(num_rows, rank, num_gpus)) for rank in range(num_gpus))
    phase = recipes.phase(step, recipe)
    micro_rows = max(1, gpu.micro_tokens // seq_len)
    num_micro = -(-rows // micro_rows)
    each = micro_batch(recipe, phase, seq_len, rows * seq_len, gpu)
    busy = each.total * scale.compute
    backward = 2 / 3 * busy / num_micro  # of the last micro-batch, under which gradients travel
    update, exposed = after_backward(recipe, num_gpus, backward, gpu, link)
    waiting = max(num_micro * gpu.gaps, num_micro * gpu.launches - busy)
    fixed = waiting + scale.update * (update + gpu.optimizer)
    return Parts(*(part * scale.compute for part in each[:3]), fixed, exposed)


def run_parts(recipe: Recipe, num_gpus: int, gpu: Gpu, link: Link,
              scale: Scale = Scale()) -> Parts:  # noqa: B008
    """All steps together: seconds to the recipe's target."""
    kinds: Counter = Counter()
    first = {}
    for step in range(recipe.num_iterations):
        phase = recipes.phase(step, recipe)
        kind = (recipes.batch_shape(step, recipe), phase.window, phase.short_window,
                len(phase.target_weights))
        first.setdefault(kind, step)
        kinds[kind] += 1
    total = Parts()
    for kind, count in kinds.items():
        parts = step_parts(recipe, first[kind], num_gpus, gpu, link, scale)
        total = Parts(*(a + count * b for a, b in zip(total, parts)))
    return total


# --- measurements ---------------------------------------------------------------------------------

def read_measured(path: Path, gpu: Gpu) -> dict[int, Scale]:
    """Record -> how much slower than the model its first phase was measured on one GPU. Raises
    ValueError for a file that is no such list."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--measured {path}: {error}") from None
    found: dict[int, list[Scale]] = {}
    for row in rows if isinstance(rows, list) else [rows]:
        try:
            record, tokens, ms = int(row["recipe"]), int(row["tokens"]), float(row["ms"])
            recipe = RECORDS[record]
            update_ms = row.get("optimizer_ms")
            update_ms = update_ms if update_ms is None else float(update_ms)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f'--measured {path}: expected rows of {{"recipe": a record, "tokens": of a '
                f'micro-batch, "ms": of forward and backward}}, got {row}') from None
        phase, (_, seq_len) = recipes.phase(0, recipe), recipes.batch_shape(0, recipe)
        modelled = micro_batch(recipe, phase, seq_len, tokens, gpu).total + gpu.gaps
        plan, rules = make_plan(recipe, 1)
        update = sum(updates(plan, rules, recipe, gpu)) + gpu.optimizer
        found.setdefault(record, []).append(Scale(
            ms / 1e3 / modelled, 1.0 if update_ms is None else update_ms / 1e3 / update))
    return {record: Scale(*map(statistics.geometric_mean, zip(*scales)))
            for record, scales in found.items()}


# --- against public runs --------------------------------------------------------------------------

# (what, record, its first step of interest or None for the mean of the run, GPUs, measured ms).
# Means are those of each record's own log; #60's stages are in no recipe, so #62 stands for it,
# whose bigram table came two records later.
PUBLIC = [
    ("#6, mean step", 6, None, 8, 153.8),
    ("#12, mean step", 12, None, 8, 161.8),
    ("#20, mean step", 20, None, 8, 129.8),
    ("#23, mean step, 48K tokens a GPU", 23, None, 8, 101.0),
    ("#27, mean step", 27, None, 8, 96.6),
    ("#31, mean step", 31, None, 8, 95.4),
    ("#38, mean step", 38, None, 8, 89.0),
    ("#41, mean step, 32K tokens a GPU", 41, None, 8, 60.7),
    ("#46, mean step", 46, None, 8, 61.2),
    ("#53, mean step", 53, None, 8, 62.3),
    ("#60, 131K tokens a step", 60, 0, 8, 32.5),
    ("#60, 262K", 60, 1 / 3, 8, 59.4),
    ("#60, 393K", 60, 2 / 3, 8, 85.1),
    ("#62, mean step", 62, None, 8, 61.3),
    # Not ms: how many times eight GPUs' 131.2 s one takes. #46 is the recipe next to it.
    ("#48, one GH200 over 8 H100", 46, None, 1, 1036.5 / 131.2),
]


class Row(NamedTuple):
    what: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def check(gpu: Gpu, link: Link) -> list[Row]:
    """Predictions beside what public runs took."""
    rows = []
    for what, record, part, num_gpus, measured in PUBLIC:
        recipe = RECORDS[62 if record == 60 else record]
        if record == 60:
            recipe = recipes.edit(recipe, record=60, bigram=False)
        if part is None:
            seconds = run_parts(recipe, num_gpus, gpu, link).total / recipe.num_iterations
        else:
            step = math.ceil(part * recipe.scheduled_steps)
            seconds = step_parts(recipe, step, num_gpus, gpu, link).total
        if num_gpus == 1:  # a ratio
            eight = run_parts(recipe, 8, gpu, link).total / recipe.num_iterations
            seconds = seconds / eight / 1e3
        rows.append(Row(what, measured, 1e3 * seconds))
    return rows


# --- tables ---------------------------------------------------------------------------------------

HEAD = ("GPUs", "ms/step", "target", "eff.", "prod", "mem", "attn", "fixed", "comm")


def clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def project(recipe: Recipe, gpu: Gpu, link: Link, scale: Scale) -> list[tuple[str, ...]]:
    """A row for each number of GPUs; "rows" where the trainer refuses, for lack of them."""
    out, alone = [], run_parts(recipe, 1, gpu, link, scale).total
    for num in GPUS:
        try:
            parts = run_parts(recipe, num, gpu, link, scale)
        except ValueError:
            out.append((str(num), *["rows"] * (len(HEAD) - 1)))
            continue
        shares = (f"{part / parts.total:.0%}" + "*" * (part == max(parts)) for part in parts)
        out.append((str(num), f"{1e3 * parts.total / recipe.num_iterations:.1f}",
                    clock(parts.total), f"{alone / num / parts.total:.0%}", *shares))
    return out


def text_rows(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned, at most 60 columns."""
    widths = [max(len(row[i]) for row in rows) + (i > 0) for i in range(len(rows[0]))]
    return [" ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows]


def markdlocal_rows(rows: list[tuple[str, ...]]) -> list[str]:
    rule = ("---:",) * len(rows[0])
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def report(gpu: Gpu, link: Link, measured: dict[int, Scale], source: str,
           markdown: bool) -> list[str]:
    """All tables."""
    table = markdlocal_rows if markdown else text_rows
    section = "## " if markdown else ""
    usual = Scale(*(statistics.geometric_mean(values) for values in zip(*measured.values()))) \
        if measured else Scale()
    out = [("# Projection" if markdown else "Projection"), "",
           f"Rates: {source}.",
           f"Nodes of {link.node_size}; {link.intra / 1e9:.0f} GB/s and "
           f"{1e6 * link.intra_latency:.0f} us inside,",
           f"{link.inter / 1e9:.0f} GB/s a GPU and {1e6 * link.inter_latency:.0f} us between them.",
           "Shares of a step: products, memory-bound work, attention,",
           "fixed (optimizer, gaps, launches), exposed communication;",
           "a star marks the largest. target: time of all steps; eff.:",
           "against as many single GPUs; rows: more GPUs than the batch",
           "has rows, which the trainer refuses."]
    for record in SHOWN:
        recipe = RECORDS[record]
        scale = measured.get(record, usual)
        say = "" if not measured else f"measured x {scale.compute:.2f}" if record in measured \
            else f"not measured; x {scale.compute:.2f} as the others"
        words = [f"{recipe.num_rows} rows", f"{recipe.total_tokens / 1e9:.3f}B tokens",
                 *([say] if say else [])]
        out += ["", f"{section}#{record}, {recipe.title}", "", ", ".join(words), "",
                *table([HEAD, *project(recipe, gpu, link, scale)])]
    rows = check(gpu, link)
    cells = [("public run", "measured", "model", "off"),
             *((r.what, f"{r.measured:.4g}", f"{r.predicted:.4g}", f"{r.error:+.1%}")
               for r in rows)]
    errors = [abs(r.error) for r in rows]
    out += ["", f"{section}How far off the public rates are, in ms", "", *(
        table(cells) if markdown else
        [f"{a:<33}{b:>9}{c:>9}{d:>8}" for a, b, c, d in cells]), "",
        f"Mean {statistics.mean(errors):.1%}, largest {max(errors):.1%}. Constants come from one",
        "trace, of #44, which is in no row, and from how #23 and #40",
        "slow down as windows grow (attention's rate); nothing was",
        "fitted to the step times above."]
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, metavar="FILE",
                        help="JSON rows of single-GPU times")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    link = Link()
    for name, unit, text in (("intra", 1e9, "GB/s of bus bandwidth inside a node"),
                             ("inter", 1e9, "GB/s a GPU between nodes"),
                             ("intra_latency", 1e-6, "us"), ("inter_latency", 1e-6, "us")):
        parser.add_argument(f"--{name}", type=float, default=getattr(link, name) / unit,
                            help=f"{text} (%(default).0f)")
    parser.add_argument("--node_size", type=int, default=link.node_size, help="GPUs of a node (8)")
    args = parser.parse_args(argv)
    for name in ("intra", "inter", "node_size"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: expected a number above 0, got {getattr(args, name)}")
    for name in ("intra_latency", "inter_latency"):
        if getattr(args, name) < 0:
            parser.error(f"--{name}: expected 0 or more, got {getattr(args, name)}")
    if args.node_size & (args.node_size - 1):
        parser.error(f"--node_size: expected a power of two, got {args.node_size}")
    link = Link(args.node_size, args.intra * 1e9, args.intra_latency * 1e-6, args.inter * 1e9,
                args.inter_latency * 1e-6)
    gpu, measured, source = Gpu(), {}, "public 8xH100 traces and logs, none of ours"
    try:
        if args.measured:
            measured = read_measured(args.measured, gpu)
            source = f"the same scaled to {args.measured.name}"
    except ValueError as error:
        parser.error(str(error))
    lines = report(gpu, link, measured, source, markdown=args.markdown is not None)
    if args.markdown:
        made = "\n".join([*lines[:1], "", "Made by `python -m bench.project --markdown FILE`.",
                          *lines[1:]])
        try:
            args.markdown.write_text(made + "\n")
        except OSError as error:
            parser.error(f"--markdown {args.markdown}: {error.strerror}")
    else:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
