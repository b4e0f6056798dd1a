"""Micro-batching: how many of a rank's rows the device computes at once, and peak memory.

Nothing here changes what is trained: losses are sums over tokens divided by one number for the
whole step, so any cut into micro-batches gives the same gradients up to rounding.
"""

import math
import resource

import torch
from torch import Tensor

from data.loader import Batch, rank_rows, row_documents
from recipes import Recipe
from trainer.dist import World
from trainer.options import RunOptions

# Bytes that backward keeps of a token, for each layer and channel: 39 to 49 measured with compiled
# layers (bench/memory.py). A checkpointed layer keeps its input alone.
KEPT_BYTES, INPUT_BYTES = 50, 4


def fit_memory(recipe: Recipe, run: RunOptions, device: torch.device,
               optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """(tokens of a micro-batch, layers that backward computes again), by the free memory.

    On a GPU as many tokens as fit, up to 64 rows of 1,024 as in the records. Packed recipes have
    rows of 48K or 64K tokens, which cannot be cut: where one does not fit, as many layers are
    computed again as needed, the first ones, since backward comes to them last, when the memory of
    the others is free. Call it before the first step.
    """
    layers, channels = recipe.model.num_layers, recipe.model.model_dim
    recomputed, seq_len = layers if run.recompute == "on" else 0, recipe.model.seq_len
    if run.micro_batch_tokens is not None or device.type == "cpu":
        return max(seq_len, run.micro_batch_tokens or 8192), recomputed
    total = torch.cuda.get_device_properties(device).total_memory
    # The optimizer's buffers are allocated by now; gradients and state come with the first step.
    gradients = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    needed = torch.cuda.memory_allocated(device) + gradients + optimizer.state_bytes()
    free = 0.85 * total - needed - 3 * 2**30  # the head's chunk

    def kept(recomputed: int) -> int:
        """Bytes of a token and channel, at the end of forward or in the first layers' backward."""
        inputs = INPUT_BYTES * recomputed
        return inputs + KEPT_BYTES * max(layers - recomputed, 2 * (recomputed > 0))

    if run.recompute == "auto":
        recomputed = next((n for n in range(layers) if seq_len * channels * kept(n) <= free),
                          layers)
    tokens = min(65_536, int(free / (kept(recomputed) * channels)))
    # A power of two, which divides validation into equal batches too.
    return max(seq_len, 2 ** int(math.log2(max(1, tokens)))), recomputed


def local_rows(num_rows: int, world: World) -> int:
    """How many of a step's rows are this rank's."""
    return len(rank_rows(num_rows, world.rank, world.size))


def micro_batch_rows(num_rows: int, seq_len: int, micro_tokens: int) -> int:
    """Rows of one micro-batch: as many as micro_tokens allow, or fewer where at most a third more
    micro-batches make them equal, since each number of rows is compiled by itself."""
    fewest = math.ceil(num_rows / max(1, micro_tokens // seq_len))
    parts = next((n for n in range(fewest, 4 * fewest // 3 + 1) if num_rows % n == 0), fewest)
    return math.ceil(num_rows / parts)


def micro_batches(batch: Batch, micro_tokens: int) -> list[tuple[Tensor, ...]]:
    """The batch in micro-batches of about so many tokens, as arguments of the model."""
    rows = micro_batch_rows(*batch.inputs_BT.shape, micro_tokens)
    tensors = (batch.inputs_BT, batch.targets_BT, batch.docs_B2)
    return list(zip(*(t.split(rows) for t in tensors if t is not None)))


def dummy_batch(shape: tuple[int, int], recipe: Recipe, device: torch.device,
                generator: torch.Generator) -> Batch:
    """Random tokens for the warm-up. Strides must match the loader's, also where there is one row,
    or torch.compile recompiles."""
    inputs_BT, targets_BT = torch.randint(recipe.model.vocab_size, (2, *shape), generator=generator)
    inputs_BT = inputs_BT.int()
    docs_B2 = row_documents(inputs_BT.numpy(), recipe.model.bos_id)
    return Batch(inputs_BT.to(device), targets_BT.to(device), docs_B2)


def short_of_memory(device: torch.device) -> bool:
    """Whether a copy of the allocated tensors would be missing later, beside a step: 24 GB hold
    record #62's model, gradients and optimizer (6.9 GB) and a step or a copy of them, not all."""
    return device.type == "cuda" and 4 * torch.cuda.memory_allocated(device) > (
        torch.cuda.get_device_properties(device).total_memory)


class PeakMemory:
    """The largest use of memory in MiB from now on: of training steps (`steps_mib`) and in all
    (`all_mib`). On a CPU both are of the whole process."""

    def __init__(self, device: torch.device):
        self.device, self.steps_mib, self.all_mib = device, 0.0, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def update(self, only_steps: bool) -> None:
        """Take the peak since the last update. `only_steps`: only training steps ran since then."""
        if self.device.type == "cuda":
            mib = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.all_mib = max(self.all_mib, mib)
        self.steps_mib = max(self.steps_mib, mib) if only_steps else self.steps_mib
