"""How a rank's rows of a step are cut into what it computes at once.

Nothing here changes what is trained: losses are sums over tokens divided by the tokens of the whole
step, so any cut gives the same gradients up to rounding.
"""

import math

import torch
from torch import Tensor

from data.loader import Batch, rank_rows, row_documents
from recipes import Recipe
from trainer import options
from trainer.dist import World

# Bytes that backward keeps of a token, for each layer and channel: 39 to 49 measured with compiled
# layers (bench/memory.py). A layer that is computed again keeps its input alone.
KEPT_BYTES, INPUT_BYTES = 50, 4


def fit_memory(recipe: Recipe, run: options.Run, device: torch.device) -> tuple[int, int]:
    """(tokens that a rank computes at once, layers that backward computes again).

    On a GPU as many as its free memory holds, up to 64 rows of 1,024 as in the records. Packed
    recipes have rows of 48K or 64K tokens, which cannot be cut: where one does not fit, as many
    layers are computed again as must. Both change nothing but rounding. Call it where model and
    optimizer are there.

    Those are the first layers: backward comes to them last, when all that the others kept is free.
    """
    layers, channels = recipe.model.num_layers, recipe.model.model_dim
    recomputed, seq_len = layers if run.recompute == "on" else 0, recipe.model.seq_len
    if run.micro_batch_tokens is not None or device.type == "cpu":
        return max(seq_len, run.micro_batch_tokens or 8192), recomputed
    total = torch.cuda.get_device_properties(device).total_memory
    free = 0.85 * total - torch.cuda.memory_allocated(device) - 3 * 2**30  # the head's chunk

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


def own_rows(num_rows: int, world: World) -> int:
    """How many of a step's rows are this rank's."""
    return len(rank_rows(num_rows, world.rank, world.size))


def rows_at_once(num_rows: int, seq_len: int, micro_tokens: int) -> int:
    """Rows of one micro-step: as many as micro_tokens allow, or fewer where a third more parts at
    most make them equal, since compiled code is made for each number of rows."""
    fewest = math.ceil(num_rows / max(1, micro_tokens // seq_len))
    parts = next((n for n in range(fewest, 4 * fewest // 3 + 1) if num_rows % n == 0), fewest)
    return math.ceil(num_rows / parts)


def micro_batches(batch: Batch, micro_tokens: int) -> list[tuple[Tensor, ...]]:
    """The batch in parts of about so many tokens: what the model takes."""
    rows = rows_at_once(*batch.inputs_BT.shape, micro_tokens)
    tensors = (batch.inputs_BT, batch.targets_BT, batch.docs_B2)
    return list(zip(*(t.split(rows) for t in tensors if t is not None)))


def throw_away(shape: tuple[int, int], recipe: Recipe, device: torch.device,
               generator: torch.Generator) -> Batch:
    """Random tokens, laid out as a loader's: for other strides other code is compiled, even where
    there is one row, to which its stride means nothing."""
    inputs_BT, targets_BT = torch.randint(recipe.model.vocab_size, (2, *shape), generator=generator)
    inputs_BT = inputs_BT.int()
    docs_B2 = row_documents(inputs_BT.numpy(), recipe.model.bos_id)
    return Batch(inputs_BT.to(device), targets_BT.to(device), docs_B2)
