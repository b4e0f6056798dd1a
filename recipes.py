"""The ladder as code: record N is record N-1 with what changed. And recipes of our own.

A Recipe says everything that defines a training: model, optimizers, schedules, batch, data order,
validation. It never speaks of machines: the same recipe on one GPU, eight, or a laptop's CPU sees
the same tokens in the same steps. A scale is a function from recipe to recipe.

Facts come from the official logs of the records; tests/test_recipes.py holds each recipe to them
and says where one differs on purpose, and why.
"""

import dataclasses
import math
from dataclasses import dataclass, field, fields, replace

from model import CHOICES, GPT, GPTConfig, Phase, flops_per_token, init_weights, parameter_entry
from records.rules import FINEWEB_VAL_TOKENS, TRACKS


@dataclass(frozen=True)
class Recipe:
    """One training. Lengths in tokens or steps, learning rates per update."""

    record: int = 2
    name: str = ""                  # of a recipe of our own, which changes that record
    title: str = ""
    scale: str = "full"             # full, pocket
    track: str = "short"            # of the record table that the run is compared with
    corpus: str = "fineweb"         # fineweb (GPT-2 tokens) or built-in (bytes)
    model: GPTConfig = field(default_factory=GPTConfig)

    # batch and length
    num_iterations: int = 9536      # the extension included
    extension_steps: int = 0        # at the end, schedules standing still (#37)
    batch_tokens: int = 524_288     # of the largest step, over all ranks; rows: this / seq_len
    batch_stages: tuple[int, ...] = ()  # tokens a step in each third; rows get longer (#46)
    round_stages: str = "up"        # a third that no whole step begins: up, or nearest (#63)
    data_align: str = "none"        # none; row: rows start at documents (#26); document (#29)
    max_doc_len: int | None = None  # tokens of a document that are used (#29)
    max_doc_stages: tuple[int, ...] = ()    # the same in each third (#72)
    first_batch_repeated: bool = False  # steps 0 and 1 saw the same batch (#4 to #11)
    loss_divisor: int | None = None     # of a step's summed loss; none: its tokens, a mean; 8 from
                                        # #22 on. Gradients and adam_eps share its unit.

    # learning rates: times lr_multiplier(step)
    warmup_steps: int = 256         # linear
    cooldown_steps: float = 2048    # at the end, to final_lr_frac
    cooldown_shape: str = "linear"  # or cosine (#1)
    final_lr_frac: float = 0.0      # final lr as a fraction of the peak; 0.1 from #19
    lr_stages: tuple[float, ...] = ()   # factors for the larger batches (#46)
    lr_stage_ends: tuple[float, ...] = (1 / 3, 2 / 3)   # fractions of the schedule; a factor still
                                    # holds at its end; none: where the batch changes (#65)
    cooldown_in_extension: bool = False     # the cooldown ends with the extension, not before (#41)

    # matrices of the blocks
    matrix_rule: str = "adam"       # muon from #3; adam needs matrix_lr alone of this section
    matrix_lr: float = 0.0018
    muon_momentum: float = 0.95
    momentum_start: float = 0.85    # where momentum warms up from, and cools down to
    momentum_warmup_steps: int = 0  # (#9)
    momentum_cooldown_steps: int = 0    # (#40)
    momentum_form: str = "ema"      # or heavy_ball (#3 to #14): another direction while it warms up
    muon_method: str = "jordan"     # how the momentum is orthogonalised; polar_express from #38
    muon_steps: int = 5
    muon_scale: str = "none"        # none; unit_rms: sqrt(max(r, c)) (#4); original:
                                    # sqrt(max(1, r/c)) (#8)
    muon_multipliers: dict[str, float] = field(default_factory=dict)    # role -> factor
    split_qkv: bool = True          # Q, K and V orthogonalised each by itself (#4)
    normuon: dict[str, str] = field(default_factory=dict)   # role -> row or col (#41)
    normuon_beta2: float = 0.95     # of its mean square; 0.9 from #78
    matrix_weight_decay: float = 0.0
    muon_mode: str = "fast"         # fast: bf16, what the records used; accurate

    # embedding, head, scalars (and matrices, where matrix_rule is adam)
    other_rule: str = "adam"        # or norms: steepest descent under the norm of their role, see
                                    # NORMS, at matrix_lr; uses nothing else of this section
    embed_momentum: float = 0.0     # of embeddings, where other_rule is norms
    embed_lr: float = 0.0018        # of the shared table where the head is tied
    head_lr: float = 0.0018         # where it is not
    scalar_lr: float = 0.0018
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    adam_weight_decay: float = 0.1  # of all but scalars
    adam_every: int = 1             # step every k-th time, on the gradients since then (#39)
    adam_roles: dict[str, dict] = field(default_factory=dict)   # role -> lr, betas, weight_decay
    cautious: bool = False          # decay where it agrees with the update, at lr squared (#43)
    grad_clip: float | None = None  # norm of all gradients of the mean loss together (#1)
    freeze_steps: int = 0           # scalars are frozen after each change of phase (#52 to #55)

    # how gradients travel; none of it changes what is learned
    grad_collective: str = "all_reduce"     # reduce_scatter from #24
    grad_overlap: bool = True       # with the backward pass

    # attention windows, in tokens
    window_range: tuple[int, ...] = ()  # from, to, in steps of: grows linearly (#13)
    window_stages: tuple[int, ...] = ()     # blocks in each third (#29)
    window_block: int = 128
    window_edge: str = "exact"      # what a window means; see `window_in_keys`
    extension_window: int | None = None     # blocks in the extension (#42); none: as before
    final_window: int | None = None     # blocks at the last validation, with YaRN (#31)
    final_long: int | None = None   # blocks of long layers there, without YaRN (#36)

    # targets
    num_targets: int = 1            # tokens ahead in the first third, one less in each next (#53)
    prefix_weight: float = 0.0      # of the longest token that the next one begins with: in the
                                    # first third, falling to 0 in the second (#88)
    tie_first: bool = False         # the head's table is the embedding until the last third (#51)

    # validation
    val_tokens: int = FINEWEB_VAL_TOKENS
    val_seq_len: int | None = None  # none: seq_len
    val_every: int = 128
    target: float | None = 3.28

    def __post_init__(self) -> None:
        check(self)

    @property
    def scheduled_steps(self) -> int:
        return self.num_iterations - self.extension_steps

    @property
    def num_rows(self) -> int:
        return self.batch_tokens // self.model.seq_len

    @property
    def val_row(self) -> int:
        """Tokens of a row in validation."""
        return self.val_seq_len or self.model.seq_len

    @property
    def total_tokens(self) -> int:
        return sum(rows * seq_len for rows, seq_len in (
            batch_shape(step, self) for step in range(self.num_iterations)))


def check(recipe: Recipe) -> None:
    """Raises ValueError with what is expected, what came, and what would do."""
    m, r = recipe.model, recipe

    def must(ok: bool, name: str, expected: str, got) -> None:
        if not ok:
            raise ValueError(f"--{name}: expected {expected}, got {got}")

    def one_of(where, name: str, *choices: str) -> None:
        must(getattr(where, name) in choices, name, " or ".join(choices), getattr(where, name))

    for name in ("num_layers", "num_heads", "vocab_size", "seq_len", "mlp_ratio"):
        must(getattr(m, name) >= 1, name, "a whole number from 1", getattr(m, name))
    must(m.bigram_factor >= 1, "bigram_factor", "a number from 1", m.bigram_factor)
    must(0 < m.bigram_frac <= 1, "bigram_frac", "a number above 0, up to 1", m.bigram_frac)
    must(m.head_dim >= 2 and m.head_dim % 2 == 0, "head_dim",
         "an even number from 2 (rotary turns pairs)", m.head_dim)
    must(not m.rotary_half or m.head_dim % 4 == 0, "head_dim", "a multiple of 4 (half of the pairs "
         "turn)", m.head_dim)
    must(not m.paired_heads or m.num_heads % 2 == 0, "num_heads", "an even number (heads are "
         "paired)", m.num_heads)
    for name, choices in CHOICES.items():
        one_of(m, name, *choices)
    must(m.head != "fp8" or len(m.fp8_factors) == 3, "head",
         "fp32 or bf16 (this recipe has no factors for fp8)", m.head)
    must(m.head != "fp8" or m.padded_vocab_size % 16 == 0, "pad_vocab",
         "true (fp8 products need multiples of 16)", m.pad_vocab)
    must(m.num_layers > 1 or not (m.drop_attention or m.unet in ("single", "gate")), "num_layers",
         "at least 2 (one layer has no attention, or takes another's output)", m.num_layers)
    must(not (m.value_residual and m.qkv_lambda), "qkv_lambda", "false with value_residual",
         m.qkv_lambda)
    must(not m.sublayer_lambdas or (m.x0_lambdas and m.bigram), "sublayer_lambdas",
         "false without x0_lambdas and bigram", m.sublayer_lambdas)
    must(not (m.value_residual and m.qk_apart), "qk_apart", "false with value_residual",
         m.qk_apart)
    must(not m.qk_apart or m.num_heads % 2 == 0, "num_heads",
         "an even number (Muon takes heads in pairs)", m.num_heads)
    must(not m.mudd or (m.late_input and m.num_heads % 2 == 0), "mudd",
         "false without late_input, or with an odd num_heads", m.mudd)
    must(not m.mudd or m.num_layers > 2, "num_layers", "at least 3 (mudd mixes three outputs)",
         m.num_layers)
    must(not m.token_gates or (m.mudd and m.packed and m.unet == "token"), "token_gates",
         "false without mudd, packed and unet token", m.token_gates)
    must(m.token_gates or (m.dc_window is None and m.unet != "token"), "token_gates",
         "true with dc_window or unet token", m.token_gates)
    must(m.dc_window is None or m.dc_window >= 1, "dc_window", "none or a whole number from 1",
         m.dc_window)
    must(not m.late_input or m.sublayer_lambdas, "late_input", "false without sublayer_lambdas",
         m.late_input)
    must(m.rotary_base > 1, "rotary_base", "a number above 1", m.rotary_base)
    must(m.norm_eps is None or m.norm_eps >= 0, "norm_eps", "none or 0 or more", m.norm_eps)
    must(m.logit_softcap is None or m.logit_softcap > 0, "logit_softcap", "none or above 0",
         m.logit_softcap)
    must(m.x0_lambdas or m.unet != "gate", "unet", "another kind without x0_lambdas", m.unet)
    must(m.max_seq_len is None or m.max_seq_len >= max(m.seq_len, r.val_row), "max_seq_len",
         f"none or at least {max(m.seq_len, r.val_row)}, the longest row", m.max_seq_len)
    must(m.max_seq_len is not None or r.val_row <= m.seq_len, "val_seq_len",
         f"at most seq_len {m.seq_len} (or a larger --max_seq_len)", r.val_seq_len)
    must(r.num_iterations >= 1, "num_iterations", "a whole number from 1", r.num_iterations)
    must(r.loss_divisor is None or r.loss_divisor >= 1, "loss_divisor",
         "none or a whole number from 1", r.loss_divisor)
    must(0 <= r.extension_steps < r.num_iterations, "extension_steps",
         f"0 to below num_iterations {r.num_iterations}", r.extension_steps)
    must(r.batch_tokens >= m.seq_len and r.batch_tokens % m.seq_len == 0, "batch_tokens",
         f"a multiple of seq_len {m.seq_len}", r.batch_tokens)
    must(all(0 < b <= r.batch_tokens and b % r.num_rows == 0 for b in r.batch_stages),
         "batch_stages", f"multiples of {r.num_rows} rows, at most batch_tokens", r.batch_stages)
    must(not r.lr_stage_ends or len(r.lr_stages) in (0, len(r.lr_stage_ends) + 1), "lr_stages",
         f"none or {len(r.lr_stage_ends) + 1} factors, one more than lr_stage_ends", r.lr_stages)
    must(0 <= r.cooldown_steps <= r.num_iterations, "cooldown_steps",
         f"0 to num_iterations {r.num_iterations}", r.cooldown_steps)
    must(r.warmup_steps >= 0, "warmup_steps", "0 or more", r.warmup_steps)
    for name in ("matrix_lr", "embed_lr", "head_lr", "scalar_lr", "adam_eps"):
        value = getattr(r, name)
        must(value > 0 and math.isfinite(value), name, "a finite number above 0", value)
    for name in ("adam_weight_decay", "matrix_weight_decay", "final_lr_frac"):
        must(getattr(r, name) >= 0, name, "0 or more", getattr(r, name))
    for name in ("muon_momentum", "embed_momentum", "normuon_beta2"):
        must(0 <= getattr(r, name) < 1, name, "0 to below 1", getattr(r, name))
    must(len(r.adam_betas) == 2 and all(0 <= b < 1 for b in r.adam_betas), "adam_betas",
         "two numbers from 0 to below 1, as 0.9,0.95", r.adam_betas)
    must(r.adam_every >= 1, "adam_every", "a whole number from 1", r.adam_every)
    must(r.grad_clip is None or r.grad_clip > 0, "grad_clip", "none or above 0", r.grad_clip)
    one_of(r, "matrix_rule", "muon", "adam")
    one_of(r, "other_rule", "adam", "norms")
    must(r.other_rule == "adam" or r.matrix_rule == "muon", "matrix_rule",
         "muon where other_rule is norms", r.matrix_rule)
    must(r.other_rule == "adam" or not (m.tied_head or r.tie_first), "other_rule",
         "adam where head and embedding share a table (their norms differ)", r.other_rule)
    one_of(r, "muon_method", "svd", "cubic", "jordan", "polar_express")
    one_of(r, "muon_scale", "none", "unit_rms", "original", "spectral", "match_rms_adamw")
    one_of(r, "muon_mode", "fast", "accurate")
    one_of(r, "momentum_form", "ema", "heavy_ball")
    one_of(r, "cooldown_shape", "linear", "cosine")
    one_of(r, "round_stages", "up", "nearest")
    one_of(r, "data_align", "none", "row", "document")
    one_of(r, "window_edge", "exact", "block", "flash")
    one_of(r, "grad_collective", "all_reduce", "reduce_scatter")
    must(r.max_doc_len is None or r.data_align == "document", "max_doc_len",
         "none unless data_align is document", r.max_doc_len)
    must(not r.max_doc_stages or r.max_doc_len == max(r.max_doc_stages), "max_doc_len",
         f"the largest of max_doc_stages {r.max_doc_stages}", r.max_doc_len)
    must(not r.window_range or (len(r.window_range) == 3 and min(r.window_range) >= 1),
         "window_range", "three whole numbers: from, to, in steps of", r.window_range)
    must(m.packed or not (r.window_range or r.window_stages), "packed",
         "true where attention has windows", m.packed)
    must(m.packed or m.windows == "one", "windows", "one without windows (packed is false)",
         m.windows)
    must(r.window_block >= 1, "window_block", "a whole number from 1", r.window_block)
    must(m.softcap_div is None or m.softcap_div > 0, "softcap_div", "none or above 0",
         m.softcap_div)
    must(not r.tie_first or not m.tied_head, "tied_head", "false where tie_first is true",
         m.tied_head)
    must(not (r.tie_first or m.tied_head) or m.head_dtype == m.embed_dtype, "head_dtype",
         f"that of the embedding, {m.embed_dtype}, whose table it shares", m.head_dtype)
    must(1 <= r.muon_steps <= 20, "muon_steps", "1 to 20", r.muon_steps)
    must(1 <= r.num_targets <= 3, "num_targets", "1 to 3", r.num_targets)
    must(r.prefix_weight >= 0, "prefix_weight", "0 or more", r.prefix_weight)
    must(r.val_tokens >= r.val_row and r.val_tokens % r.val_row == 0, "val_tokens",
         f"a multiple of a validation row's {r.val_row}", r.val_tokens)
    must(r.val_every >= 1, "val_every", "a whole number from 1", r.val_every)


MODEL_FIELDS = {f.name for f in fields(GPTConfig)}
# Lengths in steps: a shorter run shortens them in proportion.
STEP_FIELDS = ("extension_steps", "warmup_steps", "cooldown_steps", "momentum_warmup_steps",
               "momentum_cooldown_steps", "freeze_steps")


def edit(recipe: Recipe, **changes) -> Recipe:
    """`recipe` with fields replaced, the model's own fields among them."""
    of_model = {k: changes.pop(k) for k in list(changes) if k in MODEL_FIELDS}
    return replace(recipe, model=replace(recipe.model, **of_model), **changes)


def change(recipe: Recipe, **changes) -> Recipe:
    """`edit`, and a new num_iterations stretches the schedules in proportion, unless they are
    given too."""
    if "num_iterations" in changes:
        ratio = changes["num_iterations"] / recipe.num_iterations
        for name in STEP_FIELDS:
            changes.setdefault(name, round(getattr(recipe, name) * ratio))
    return edit(recipe, **changes)


# --- the ladder -----------------------------------------------------------------------------------

RECORDS: dict[int, Recipe] = {}


def _record(record: int, title: str, *, after: int, **changes) -> None:
    RECORDS[record] = edit(RECORDS[after], record=record, title=title, **changes)


# 2024-05-28. GPT-2 as llm.c trained it. Rows come in order, not shuffled: that is the data's only
# order here.
RECORDS[1] = Recipe(
    record=1, title="llm.c baseline",
    model=GPTConfig(learned_positions=True, layer_norm=True, biases=True, gpt2_init=True,
                    activation="gelu_tanh"),
    num_iterations=19_560, warmup_steps=700, cooldown_steps=18_860, cooldown_shape="cosine",
    matrix_lr=0.0006, embed_lr=0.0006, head_lr=0.0006, scalar_lr=0.0006,
    grad_clip=1.0, val_every=250)

# 2024-06-06. The gradient normalisation of its first code is left out: the log looks like a run
# without it, and it was removed eight days later as useless.
_record(2, "Rotary positions, tuned learning rate", after=1,
        learned_positions=False, layer_norm=False, biases=False, gpt2_init=False,
        activation="gelu", attn_damping=True, norm_eps=1e-6,
        num_iterations=9536, warmup_steps=256, cooldown_steps=2048, cooldown_shape="linear",
        matrix_lr=0.0018, embed_lr=0.0018, head_lr=0.0018, scalar_lr=0.0018,
        grad_clip=None, val_every=128)

# 2024-10-04. No log; from the code of the day of the record.
_record(3, "Muon", after=2,
        matrix_rule="muon", matrix_lr=0.018, split_qkv=False, adam_weight_decay=0.0,
        momentum_form="heavy_ball",
        num_iterations=7000, warmup_steps=250, cooldown_steps=2000)

# 2024-10-11
_record(4, "Muon with unit RMS, Q, K and V apart", after=3,
        muon_scale="unit_rms", split_qkv=True, matrix_lr=0.00036, embed_lr=0.0036, head_lr=0.0036,
        num_iterations=6200, warmup_steps=0, cooldown_steps=1800,
        first_batch_repeated=True, val_every=125)

# 2024-10-14
_record(5, "ReLU^2, QK-norm, zero projections, padded vocabulary", after=4,
        num_heads=6, head_dim=128, activation="relu2", qk_norm="after", zero_proj=True,
        attn_damping=False, pad_vocab=True, norm_eps=None,
        num_iterations=5100, cooldown_steps=1450)

# 2024-10-18. Its speed came from sharing Muon's work among the ranks.
_record(6, "Distributed Muon", after=5, qk_norm="before")

# 2024-10-18. torch 2.5.0 instead of 2.4.1: nothing that a recipe could say.
_record(7, "PyTorch 2.5.0", after=6)

# 2024-11-03
_record(8, "Untied head", after=7,
        tied_head=False, embed_norm=True, muon_scale="original",
        matrix_lr=0.02, embed_lr=0.3, head_lr=0.002,
        num_iterations=4578, cooldown_steps=1308)

# 2024-11-06
_record(9, "Value residual, embedding shortcut, softcap, momentum warm-up", after=8,
        value_residual=True, x0_lambdas=True, logit_softcap=30.0,
        scalar_lr=0.02, momentum_warmup_steps=500,
        num_iterations=3200, cooldown_steps=914)

# 2024-11-08. Scalars stay fp32 here (bf16 there until #17), Adam's averages as well (until #62).
_record(10, "bf16 activations", after=9,
        stream_dtype="bf16", embed_dtype="bf16",
        num_iterations=3242, cooldown_steps=926)

# 2024-11-10
_record(11, "U-net skips, doubled learning rates", after=10,
        unet="weight", matrix_lr=0.04, embed_lr=0.6, head_lr=0.008, scalar_lr=0.04,
        num_iterations=3000, cooldown_steps=900)

# 2024-11-19
_record(12, "Rows of 64K tokens with document masks", after=11,
        packed=True, seq_len=65_536, window_range=(1024, 1024, 1024), first_batch_repeated=False,
        num_iterations=1875, cooldown_steps=562)

# 2024-11-24
_record(13, "Attention window warm-up", after=12,
        window_range=(64, 1792, 64), adam_betas=(0.8, 0.95), matrix_lr=0.05,
        momentum_warmup_steps=300,
        num_iterations=1750, cooldown_steps=640)

# 2024-12-04. Rotary tables stay fp32 (nominally bf16 there until #16).
_record(14, "Value embeddings", after=13,
        value_residual=False, value_embeds="all",
        num_iterations=1530, cooldown_steps=600)

# 2024-12-08. A mask of blocks besides that of tokens; see `window_in_keys`.
_record(15, "Value embeddings mirrored over depth", after=14,
        value_embeds="mirror", value_mix="two",
        momentum_form="ema", window_edge="block",
        num_iterations=1480)

# 2024-12-10. The window counts blocks of 128 from here to #27.
_record(16, "Windows by block, separate value tables", after=15,
        window_range=(128, 1856, 128))

# 2024-12-17. Tables keep 50304 rows (50257 there, and in #19 to #23).
_record(17, "Sparse value embeddings, half rotary, one attention less", after=16,
        value_embeds="ends", rotary_half=True, rotary_base=1024.0, drop_attention=True,
        num_iterations=1490)

# 2025-01-04
_record(18, "Softcap 15", after=17,
        logit_softcap=15.0, num_iterations=1390, cooldown_steps=556)

# 2025-01-13
_record(19, "fp8 head, sigmoid softcap, learning rate ends at 0.1", after=18, norm_eps=2 ** -23,
        head="fp8", fp8_factors=(2.0, 32.0, 2 ** 29 / 65_536),
        logit_softcap=30.0, softcap_kind="sigmoid", softcap_div=7.5, init_std=0.5,
        final_lr_frac=0.1, grad_overlap=False,
        num_iterations=1395, cooldown_steps=558)

# 2025-01-16
_record(20, "Long and short windows, attention scale 0.12", after=19,
        windows="two", attn_scale=0.12, adam_eps=1e-10,
        num_iterations=1393, cooldown_steps=557.2)

# 2025-01-26
_record(21, "Smaller batch", after=20,
        seq_len=49_152, batch_tokens=393_216, val_seq_len=262_144, max_seq_len=262_144,
        fp8_factors=(2.0, 512.0, 2 ** 19 / 49_152),
        num_iterations=1770, cooldown_steps=708)

# 2025-05-24. Its speed came from reducing gradients in flat buckets. From here on the loss is a sum
# over the tokens of each of 8 ranks, whose gradients are averaged: they grow with the batch (#46).
_record(22, "Faster gradient all-reduce, head rescaled", after=21,
        loss_divisor=8,
        softcap_sqrt_dim=True, head_lr=0.22,
        fp8_factors=(448 / 768 ** 0.5, 448 / 24, 448.0))

# 2025-05-25
_record(23, "Gradient all-reduce under the backward pass", after=22, grad_overlap=True)

# 2025-05-30
_record(24, "Gradient reduce-scatter", after=23, grad_collective="reduce_scatter")

# 2025-07-13. #25 is a newer torch.
_record(26, "Rows start at documents", after=24,
        data_align="row", num_iterations=1750, cooldown_steps=787.5)

# 2025-07-18. Its MLP's first matrix was stored transposed, which changed its Muon scale to 1.
_record(27, "Triton kernel for Muon's symmetric products", after=26, muon_scale="none")

# 2025-09-03. With #28: attention gates, head back to its old scale.
_record(29, "Varlen attention, documents cut at 2048", after=27,
        attn_gate=True, softcap_sqrt_dim=False, head_lr=0.008,
        fp8_factors=(448 / 768 ** 0.5, 512.0, 448.0),
        data_align="document", max_doc_len=2048,
        window_range=(), window_stages=(3, 7, 11), window_edge="flash",
        num_iterations=1670, cooldown_steps=751.5)

# 2025-09-10. With #30: no MLP in the first layer.
_record(31, "YaRN while the window grows", after=29,
        drop_mlp=True, yarn=True, attn_scale=0.1, final_window=13, cooldown_steps=835)

# 2025-09-29. With #32 to #37: sigmoid skips, smear, the first layer left out, an extension at
# a learning rate of final_lr_frac (0.10018 there).
_record(38, "Polar Express", after=31,
        num_layers=11, drop_first=True, drop_mlp=False, unet="sigmoid", smear=True,
        head_dtype="bf16",
        muon_method="polar_express", matrix_lr=0.06, adam_eps=1e-8,
        extension_steps=40, final_long=20, cooldown_steps=815)

# 2025-10-24. With #39: Adam every second step, smaller batch; #40: backout, momentum cooldown.
# NorMuon looks at Q, K, V and O each by itself (together there until #43).
_record(41, "NorMuon", after=38,
        normuon={"attn_in": "col", "attn_out": "col", "mlp_in": "row", "mlp_out": "col",
                 "attn_gate": "col", "smear_gate": "col"},
        adam_every=2, adam_betas=(0.65, 0.95), seq_len=32_768, batch_tokens=262_144,
        backout=True, momentum_cooldown_steps=50, cooldown_in_extension=True,
        num_iterations=2315, cooldown_steps=1041.75, val_every=250)

# 2025-11-10. With #42: the extension trains with the last window.
_record(43, "Cautious weight decay", after=41,
        matrix_weight_decay=1.2, cautious=True,
        matrix_lr=0.03, muon_multipliers={"mlp_in": 2.0}, cooldown_in_extension=False,
        extension_window=13, final_window=None,
        num_iterations=2245, cooldown_steps=1102.5)

# 2025-11-29. With #44; #45: a single skip, residual lambda 1.1. Batch and window change at thirds,
# the learning rate a few steps earlier.
_record(46, "Batch grows in thirds", after=43,
        unet="single", resid_lambda=1.1, matrix_lr=0.023,
        seq_len=49_152, batch_tokens=393_216, batch_stages=(131_072, 262_144, 393_216),
        lr_stages=(1.0, 1.51, 1.93), lr_stage_ends=(0.33, 0.66),
        num_iterations=2160, cooldown_steps=1166)

# 2025-12-22. With #47 to #52: lambdas on weights, new Muon multipliers, key offset, cautious decay
# in Adam, the head's table as embedding, scalars that rest after each change. The MLP's second
# matrix is stored transposed: NorMuon's one number per hidden neuron is one per column here.
_record(53, "Multi-token prediction, embedding untied at two thirds", after=46,
        num_targets=3, tie_first=True, head_init_std=0.005,
        qkv_lambda=True, qkv_init_std=1.0, key_offset=True,
        value_mix="add", value_embed_init_std=0.0,
        muon_multipliers={"attn_in": 2.0, "attn_out": 2.0, "mlp_in": 2.0, "mlp_out": 4.0},
        normuon=dict.fromkeys(("attn_in", "attn_out", "mlp_in", "attn_gate"), "row")
        | {"mlp_out": "col"},
        embed_lr=0.008, adam_weight_decay=0.005, freeze_steps=40,
        adam_roles={"value_embed": {"lr": 0.6},
                    "smear_gate": {"lr": 8e-5, "weight_decay": 0.0},
                    "scalar": {"betas": (0.9, 0.99)}},
        fp8_factors=(4.48, 448 / 1.5, 448 / 0.75),
        lr_stages=(1.0, 1.52, 1.73), lr_stage_ends=(1 / 3, 2 / 3),
        num_iterations=1920, cooldown_steps=1034)

# 2026-01-19. With #54 to #61: shifted softcap, gates on values and skip, all gates under Adam,
# paired heads. #56 commented out the call that froze scalars.
_record(62, "Bigram hash embedding", after=53,
        bigram=True, logit_softcap=23.0, softcap_shift=5.0, value_mix="gate", unet="gate",
        paired_heads=True, fp8_factors=(4.48, 280.0, 448 / 0.75),
        muon_multipliers={"mlp_in": 2.0, "mlp_out": 4.0},
        normuon=dict.fromkeys(("attn_in", "attn_out", "mlp_in"), "row") | {"mlp_out": "col"},
        adam_eps=1e-10, freeze_steps=0,
        adam_roles={"embed": {"betas": (0.5, 0.95), "weight_decay": 0.75},
                    "head": {"betas": (0.5, 0.95), "weight_decay": 0.75},
                    "value_embed": {"lr": 0.6, "betas": (0.75, 0.95), "weight_decay": 0.025},
                    "bigram": {"lr": 0.6, "betas": (0.75, 0.95), "weight_decay": 0.025},
                    "attn_gate": {"lr": 0.008, "betas": (0.9, 0.99), "weight_decay": 0.005},
                    "value_gate": {"lr": 0.008, "betas": (0.9, 0.99), "weight_decay": 0.005},
                    "smear_gate": {"lr": 8e-5, "betas": (0.9, 0.99), "weight_decay": 0.0},
                    "skip_gate": {"lr": 0.0004, "betas": (0.9, 0.99), "weight_decay": 0.0},
                    "scalar": {"betas": (0.9, 0.99)}},
        num_iterations=1600, cooldown_steps=858)

# 2026-01-26. Each of the five layers has a table of its own; three were shared. Thirds that are no
# whole number of steps begin at the nearest one from here on.
_record(63, "Five value tables, none shared", after=62,
        value_embeds="apart", round_stages="nearest",
        num_iterations=1575, cooldown_steps=0.55 * 1535)

# 2026-01-30
_record(64, "Values and attention's output start away from zero", after=63,
        qkv_init_std=None, out_init_std=0.5,
        num_iterations=1555, cooldown_steps=0.55 * 1515)

# 2026-02-03. With #65 (value tables in one parameter), #66 (torch 2.10), #67 (soft-cap and
# cross-entropy in one kernel with the fp8 cast), #68 (bigram hash on the device), #69 (loads in
# Muon's kernels): systems alone, but for learning rates that change with the batch.
_record(70, "Value tables tuned: start, gates, layers", after=64,
        value_embeds="later", value_mix="gate_both", value_embed_init_std=0.01,
        lr_stage_ends=(), num_iterations=1547, cooldown_steps=1507 - 678)

# 2026-02-10. With #71: ranks exchange only the rows of the bigram table that were read.
_record(72, "Learning rate ends at 0.15, shorter documents in the first third", after=70,
        final_lr_frac=0.15, max_doc_stages=(896, 2048, 2048),
        num_iterations=1530, cooldown_steps=1490 - 670)

# 2026-03-06. With what stayed of #73 (lambdas of half layers, a longer cooldown; its second lane
# went); #74 to #76 are kernels: Muon of tall matrices, cross-entropy, the head's fp8 gradient.
_record(77, "Late attention input, lambdas of half layers", after=72,
        sublayer_lambdas=True, late_input=True, resid_lambda=1.1 ** 0.5, bigram_lambda=0.05,
        adam_roles=RECORDS[72].adam_roles
        | {"resid_lambda": {"lr": 0.04, "betas": (0.9, 0.95)},
           "post_lambda": {"lr": 0.008, "betas": (0.9, 0.95)}},
        num_iterations=1490, cooldown_steps=870)

# 2026-04-08. With #78: a faster mean square. Heads 2p and 2p+1 of Q, or of K, are one matrix of
# 256 x 768 to Muon: wide, so that NorMuon looks at columns. #79 is a kernel: cross-entropy forward
# and backward in one pass.
_record(80, "Muon on pairs of heads of Q and K", after=77,
        qk_apart=True, normuon_beta2=0.9,
        normuon={"attn_qk": "col", "attn_v": "row", "attn_out": "row", "mlp_in": "row",
                 "mlp_out": "col"},
        num_iterations=1480, cooldown_steps=864)

# 2026-04-22. They replace the last layer's lambdas and value gate, and the backout.
_record(81, "Coefficients for each token mix earlier layers (MUDD), short extension", after=80,
        mudd=True, backout=False,
        adam_roles=RECORDS[80].adam_roles
        | {"mudd": {"lr": 0.002, "betas": (0.9, 0.99), "weight_decay": 0.005},
           "mudd_start": {"lr": 0.002, "betas": (0.9, 0.99)}},
        num_iterations=1415, extension_steps=10, cooldown_steps=1405 - 562)

# 2026-04-29
_record(82, "Attention without its own value (XSA)", after=81,
        xsa=True, num_iterations=1385, cooldown_steps=825)

# 2026-05-20. A quarter as wide and three times as many rows: 145M numbers, 193M before.
_record(83, "Bigram rows with signs by a second hash", after=82,
        bigram_signs=True, bigram_frac=0.25, bigram_factor=15)

# 2026-05-27. With #84: the MLP's first matrix forward in fp8 (bf16 here), for five more steps.
# Attention gates stay in the long layers, XSA in those before the late input. #86 (XSA's algebra)
# and #87 (ReLU^2 stores its output alone) are kernels.
_record(85, "Gates from tokens, dynamic composition of heads, wide bigrams", after=83,
        token_gates=True, unet="token", dc_window=112, bigram_frac=1.0, bigram_factor=7.5,
        adam_roles=RECORDS[83].adam_roles
        | {"token_gate": {"lr": 0.0008, "betas": (0.9, 0.99), "weight_decay": 0.005},
           "token_gate_start": {"lr": 0.0008, "betas": (0.9, 0.99)}},
        num_iterations=1300, extension_steps=15, cooldown_steps=1285 - 514)

# 2026-07-13
_record(88, "Prefix loss", after=85,
        prefix_weight=0.25, num_iterations=1285, cooldown_steps=762)

# 2026-07-17. The MLP's second matrix forward in fp8 (bf16 here).
_record(89, "fp8 in the MLP's second matrix", after=88)

RECORDS = dict(sorted(RECORDS.items()))

# --- recipes of our own: a record with another idea -----------------------------------------------

RECIPES = {str(record): recipe for record, recipe in RECORDS.items()}  # by the word after --record


def _recipe(name: str, title: str, *, after: int, **changes) -> None:
    RECIPES[name] = edit(RECORDS[after], name=name, title=title, **changes)


# Steepest descent for the whole network, each layer under its own norm (Bernstein 2025, Deriving
# Muon; Large et al. 2024, Scalable optimization in the modular norm), with a single learning rate.
_recipe("norms", "Each layer under its own norm, without Adam", after=6,
        other_rule="norms", tied_head=False,
        muon_scale="spectral", muon_method="polar_express", momentum_form="ema", matrix_lr=0.04,
        muon_multipliers={"embed": 4.0, "head": 8.0})

# What ./run.sh trains when no record is named: on GPUs #62, whose compiling and memory
# bench/NULL_GPU.md has measured, which the newer ones still lack; on a CPU one
# that gets to the pocket target early. In records/LADDER.md #26, #27, #31, #38 and #62 do so in 26
# to 30 s; of the five, #27 ends lowest.
DEFAULT_FULL = 62
DEFAULT_POCKET = 27


# --- scales ---------------------------------------------------------------------------------------

POCKET_TOKENS = 2 ** 19     # every rung of the pocket ladder sees as many
POCKET_BATCH = 256          # its batches are so many times smaller


def pocket(recipe: Recipe) -> Recipe:
    """The recipe for two CPU cores and the built-in corpus: every idea kept, all sizes shrunk.

    A third of the layers, a sixth of the width, a batch of 1/256, rows, documents and windows a
    quarter as long (packed rows: four in a batch), half a million tokens; schedules in proportion.
    Learning rates and decay as they are, but for Muon at unit RMS (#4 to #7): its rate times the
    root of the width's ratio is the same step in operator norm, which is what carries over between
    widths (measured on #6, 1M tokens: 1.832 as it was, 1.676 with the rule, 1.685 at twice that).
    Adam's eps of an embedding keeps its ratio to the gradient of a row that was seen once: of a
    mean loss that gradient grows as the batch shrinks, of a sum (#22 on) it does not. All other
    gradients of a mean loss keep their size.
    All in fp32, the head included: CPUs only emulate fp8.
    """
    width_ratio = recipe.model.model_dim / 128
    unit_rms = recipe.matrix_rule == "muon" and recipe.muon_scale == "unit_rms"
    num_iterations = round(
        POCKET_TOKENS * POCKET_BATCH * recipe.num_iterations / recipe.total_tokens)
    batch_tokens = recipe.batch_tokens // POCKET_BATCH
    packed = recipe.model.packed
    sparse_eps = {}
    if (recipe.loss_divisor is None and recipe.other_rule == "adam"
            and not recipe.model.tied_head):  # a head's rows are never sparse
        eps = {"eps": recipe.adam_eps * POCKET_BATCH}
        sparse_eps = {role: recipe.adam_roles.get(role, {}) | eps
                      for role in ("embed", "value_embed")}
    return change(
        recipe, scale="pocket", track="pocket", corpus="built-in",
        target=TRACKS["pocket"].target,
        num_layers=max(2, round(recipe.model.num_layers / 3)), num_heads=2, head_dim=64,
        vocab_size=257, seq_len=batch_tokens // 4 if packed else recipe.model.seq_len // 4,
        max_seq_len=1024 if packed else None,
        attn_scale=recipe.model.attn_scale and recipe.model.attn_scale * 2 ** 0.5,  # 128 -> 64
        compute_dtype="fp32", stream_dtype="fp32", embed_dtype="fp32", head_dtype="fp32",
        head="fp32",
        muon_mode="accurate",
        matrix_lr=recipe.matrix_lr * (width_ratio ** 0.5 if unit_rms else 1.0),
        adam_roles=recipe.adam_roles | sparse_eps,
        num_iterations=num_iterations, batch_tokens=batch_tokens,
        prefix_weight=0.0,  # no byte begins with another
        batch_stages=tuple(b // POCKET_BATCH for b in recipe.batch_stages),
        max_doc_len=recipe.max_doc_len and recipe.max_doc_len // 4,
        max_doc_stages=tuple(n // 4 for n in recipe.max_doc_stages),
        window_range=tuple(w // 4 for w in recipe.window_range),
        window_block=recipe.window_block // 4,
        dc_window=recipe.model.dc_window and recipe.model.dc_window // 4,
        val_tokens=TRACKS["pocket"].fixed["val_tokens"],
        val_seq_len=1024 if packed else None,
        val_every=math.ceil(num_iterations / 5))


SCALES = {"full": lambda recipe: recipe, "pocket": pocket}


# --- schedules: what changes from step to step ----------------------------------------------------

def _part_start(part: int, num_parts: int, recipe: Recipe) -> float:
    """Where `part` of num_parts equal parts of the scheduled steps begins; its first step is the
    next whole one."""
    start = part * recipe.scheduled_steps / num_parts
    if recipe.round_stages == "nearest":  # (#63)
        return round(start)
    return start


def _part(step: int, num_parts: int, recipe: Recipe) -> int:
    """Index of `step` among num_parts equal parts of the scheduled steps."""
    return sum(step >= _part_start(part, num_parts, recipe) for part in range(1, num_parts))


def _part_progress(step: int, num_parts: int, recipe: Recipe) -> float:
    """How much of its part is over before `step`, from 0 to below 1."""
    part = _part(step, num_parts, recipe)
    start, end = (_part_start(p, num_parts, recipe) for p in (part, part + 1))
    return (step - start) / (end - start)


def batch_tokens(step: int, recipe: Recipe) -> int:
    if not recipe.batch_stages:
        return recipe.batch_tokens
    return recipe.batch_stages[_part(step, len(recipe.batch_stages), recipe)]


def batch_shape(step: int, recipe: Recipe) -> tuple[int, int]:
    """(rows, tokens a row) of the global batch of `step`, before ranks exist."""
    return recipe.num_rows, batch_tokens(step, recipe) // recipe.num_rows


def max_doc_len(step: int, recipe: Recipe) -> int | None:
    if not recipe.max_doc_stages:
        return recipe.max_doc_len
    return recipe.max_doc_stages[_part(step, len(recipe.max_doc_stages), recipe)]


def lr_multiplier(step: int, recipe: Recipe) -> float:
    """What the learning rates are multiplied by at the update of `step` (0-based).

    Linear warm-up over warmup_steps. Constant, and at last down to final_lr_frac, reached where the
    schedule ends.
    """
    r = recipe
    if step < r.warmup_steps:
        return (step + 1) / r.warmup_steps
    end = r.num_iterations if r.cooldown_in_extension else r.scheduled_steps
    left = min(1.0, max(0, end - step) / r.cooldown_steps) if r.cooldown_steps else 1.0
    if r.cooldown_shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    if r.lr_stage_ends:
        stages_over = sum(step / r.scheduled_steps > over for over in r.lr_stage_ends)
    else:  # (#65)
        stages_over = _part(step, len(r.lr_stages), r)
    full = r.lr_stages[stages_over] if r.lr_stages else 1.0
    return full * left + r.final_lr_frac * (1 - left)


def momentum(step: int, recipe: Recipe) -> float:
    """Muon's momentum at the update of `step`: linear warm-up to muon_momentum. Linear cooldown at
    the end (#40)."""
    r = recipe
    risen = min(1.0, step / r.momentum_warmup_steps) if r.momentum_warmup_steps else 1.0
    into = step - (r.num_iterations - r.momentum_cooldown_steps)
    fallen = max(0, into) / r.momentum_cooldown_steps if r.momentum_cooldown_steps else 0.0
    return r.momentum_start + (r.muon_momentum - r.momentum_start) * (risen - fallen)


def windows(step: int, recipe: Recipe, *, last: bool = False) -> tuple[int, int] | None:
    """(short, long) windows at `step` in tokens, as records count them; `last`: at the final
    validation. None where attention has no windows."""
    r, block = recipe, recipe.window_block
    if r.window_range:
        first, end, by = r.window_range
        long = (first * r.scheduled_steps + (end - first) * step) // (by * r.scheduled_steps) * by
    elif r.window_stages:
        long = block * r.window_stages[_part(step, len(r.window_stages), r)]
        if r.extension_window and step >= r.scheduled_steps:
            long = block * r.extension_window
    else:
        return None
    if last and r.final_window:
        long = block * r.final_window
    short = max(1, long // block // 2) * block
    if last and r.final_long:
        long = block * r.final_long
    return short, long


def window_in_keys(window: int, recipe: Recipe) -> int:
    """Keys that a query sees, itself included, through a window as records count it.

    flash: one more, since flash attention counts the keys before the query (#29 on). block: from
    #15 to #27 a query also saw no more than its own block and the ones before it that the window
    reaches into, so fewer keys, depending on its place in its block; here their mean, rounded
    down, for every query.
    """
    if recipe.window_edge == "exact":
        return window
    if recipe.window_edge == "flash":
        return window + 1
    block = recipe.window_block
    before = (window - 1) // block * block
    own = window - before       # 1 to block; position p of a block sees before + min(p + 1, own)
    return before + (own * (own + 1) // 2 + (block - own) * own) // block


def _yarn_windows(step: int, recipe: Recipe, last: bool) -> tuple[int, ...]:
    """The long windows up to `step`, in tokens, for the rotary frequencies."""
    if not recipe.model.yarn:
        return ()
    r = recipe
    so_far = list(r.window_stages[:_part(step, len(r.window_stages), r) + 1])
    if r.extension_window and step >= r.scheduled_steps:
        so_far.append(r.extension_window)
    if r.final_window and last:
        so_far.append(r.final_window)
    return tuple(n * r.window_block for n in so_far)


def _target_weights(step: int, recipe: Recipe) -> tuple[float, ...]:
    """Weights of the next token, the one after, ...: halves, the last one fading in its third."""
    if recipe.num_targets == 1 or step >= recipe.scheduled_steps:
        return (1.0,)
    part = _part(step, 3, recipe)
    weights = [0.5 ** k for k in range(max(1, recipe.num_targets - part))]
    if len(weights) > 1:
        weights[-1] *= 1 - _part_progress(step, 3, recipe)
    return tuple(weights)


def _prefix_weight(step: int, recipe: Recipe) -> float:
    """(#88) Of the prefix of the next token: constant in the first third, to 0 in the second."""
    part = 2 if step >= recipe.scheduled_steps else _part(step, 3, recipe)
    return recipe.prefix_weight * (1, 1 - _part_progress(step, 3, recipe), 0)[part]


def untie_step(recipe: Recipe) -> int:
    """The first step with an embedding of its own: the one after Adam's first update from the step
    on that two thirds fall in, so that no gradient is half collected."""
    start = math.floor(_part_start(2, 3, recipe))
    return (start // recipe.adam_every + 1) * recipe.adam_every


def _phase(step: int, recipe: Recipe, last: bool, weights: tuple[float, ...],
           prefix_weight: float) -> Phase:
    found = windows(step, recipe, last=last)
    short, long = (window_in_keys(w, recipe) for w in found) if found else (None, None)
    return Phase(
        window=long, short_window=short,
        yarn_windows=_yarn_windows(step, recipe, last), target_weights=weights,
        prefix_weight=prefix_weight, tied=recipe.tie_first and step < untie_step(recipe))


def phase(step: int, recipe: Recipe) -> Phase:
    """The model's phase in the training step `step`."""
    return _phase(step, recipe, False, _target_weights(step, recipe), _prefix_weight(step, recipe))


def eval_phase(step: int, recipe: Recipe) -> Phase:
    """The phase of the validation before `step`: one target, and at the end the windows that some
    records keep for the last validation."""
    return _phase(step, recipe, step == recipe.num_iterations, (1.0,), 0.0)


def phase_steps(recipe: Recipe) -> list[int]:
    """A step for each kind of step: the first with its shapes, windows and number of targets. What
    differs between steps of one kind is numbers only, for which nothing is compiled anew."""
    kinds = {}
    for step in range(recipe.num_iterations):
        s = phase(step, recipe)
        kind = (batch_shape(step, recipe), s.window, s.short_window, len(s.target_weights),
                s.prefix_weight > 0, s.tied)
        kinds.setdefault(kind, step)
    return list(kinds.values())


def _scalars_frozen(step: int, recipe: Recipe) -> bool:
    """Whether scalars are frozen: just after windows, batch or targets changed (#52)."""
    starts = [-(-third * recipe.scheduled_steps // 3) for third in (1, 2, 3)]
    return any(0 <= step - start < recipe.freeze_steps for start in starts)


# --- the optimizer --------------------------------------------------------------------------------

# Roles of parameters (model.parameter_table) in the order of their groups. Gates are treated as
# matrices unless adam_roles names them.
MATRICES = ("attn_in", "attn_qk", "attn_v", "attn_out", "mlp_in", "mlp_out")
GATES = ("attn_gate", "value_gate", "skip_gate", "smear_gate", "mudd", "token_gate")
EMBEDS = ("embed", "value_embed", "bigram")
SCALARS = ("x0_lambda", "scalar", "resid_lambda", "post_lambda", "mudd_start",
           "token_gate_start")
ROLES = (*MATRICES, *GATES, "embed", "head", "value_embed", "bigram", *SCALARS)

# Where other_rule is "norms": norm and scale of the update by role; others are spectral. In units
# of lr, a step changes the rows of an embedding by RMS 1, logits by at most 1 for inputs of RMS 1,
# scalars by 1.
NORMS = {**dict.fromkeys(EMBEDS, ("row", "embed")), "head": ("row", "head"),
         **dict.fromkeys(SCALARS, ("sign", "none"))}


def _is_muon(role: str, recipe: Recipe) -> bool:
    if recipe.matrix_rule != "muon":
        return False
    return recipe.other_rule == "norms" or role in MATRICES or (
        role in GATES and role not in recipe.adam_roles)


def _initial_lr(role: str, recipe: Recipe) -> float:
    r = recipe
    if _is_muon(role, r) or role in MATRICES or (role in GATES and role not in r.adam_roles):
        return r.matrix_lr
    of_role = {"embed": r.embed_lr, "value_embed": r.embed_lr, "bigram": r.embed_lr,
               "head": r.head_lr, "x0_lambda": r.scalar_lr, "scalar": r.scalar_lr}
    return r.adam_roles.get(role, {}).get("lr", of_role.get(role))


def group_schedule(step: int, role: str, recipe: Recipe) -> dict[str, float | bool]:
    """What the optimizer group of `role` is set to before the update of `step`."""
    settings = {"lr": _initial_lr(role, recipe) * lr_multiplier(step, recipe)}
    if _is_muon(role, recipe):
        settings["momentum"] = (
            recipe.embed_momentum if role in EMBEDS else momentum(step, recipe))
    if role == "scalar" and recipe.freeze_steps:
        settings["frozen"] = _scalars_frozen(step, recipe)
    return settings


def _settings(role: str, recipe: Recipe) -> dict:
    """The options of muon.Muon for the group of `role`, those that stay."""
    r = recipe
    decay = "lr2" if r.cautious else "lr"
    if _is_muon(role, r):
        norm, scale = NORMS.get(role, ("spectral", r.muon_scale))
        # Q, K and V each by itself (#4); Q and K in pairs of heads (#80)
        split = {"attn_in": 3 if r.split_qkv else None, "attn_qk": r.model.num_heads}.get(role)
        return {"rule": "muon", "norm": norm, "view": "matrix" if norm == "spectral" else None,
                "weight_decay": r.matrix_weight_decay, "decay": decay, "cautious": r.cautious,
                "method": r.muon_method, "ns_steps": r.muon_steps, "mode": r.muon_mode,
                "scale": scale, "multiplier": r.muon_multipliers.get(role, 1.0),
                "momentum_form": r.momentum_form, "second_moment": r.normuon.get(role),
                "beta2": r.normuon_beta2, "split": split}
    special = {k: v for k, v in r.adam_roles.get(role, {}).items() if k != "lr"}
    return {"rule": "adam", "betas": r.adam_betas, "eps": r.adam_eps,
            "update_interval": r.adam_every, "decay": decay,
            "weight_decay": 0.0 if role in SCALARS else r.adam_weight_decay,
            "cautious": "strict" if r.cautious else False, **special}


def optimizer_groups(recipe: Recipe, named_parameters) -> list[dict]:
    """A group per role (model.parameter_table) for muon.Muon; every parameter in exactly one."""
    members: dict[str, list] = {role: [] for role in ROLES}
    for name, p in named_parameters:
        role, _ = parameter_entry(name, recipe.model)
        members[role].append((name, p))
    return [{"params": params, "name": role, **_settings(role, recipe),
             **group_schedule(0, role, recipe)}
            for role, params in members.items() if params]


# --- the model ------------------------------------------------------------------------------------

def build_model(recipe: Recipe, seed: int, kernels: frozenset[str] = frozenset()) -> GPT:
    """The recipe's model before step 0, on the CPU. `kernels`: what runs in Triton, see GPT."""
    model = GPT(recipe.model, kernels)
    init_weights(model, seed)  # on the CPU, so that every device starts from the same numbers
    model.set_phase(phase(0, recipe))
    return model


def mean_flops_per_token(recipe: Recipe, model: GPT) -> float:
    """model.flops_per_token, averaged over the tokens of all steps with their rows and windows."""
    tokens: dict[tuple, int] = {}
    for step in range(recipe.num_iterations):
        at = phase(step, recipe)
        kind = (Phase(at.window, at.short_window), batch_shape(step, recipe))
        tokens[kind] = tokens.get(kind, 0) + math.prod(kind[1])
    flops = sum(count * flops_per_token(model, at, shape[1])
                for (at, shape), count in tokens.items())
    return flops / sum(tokens.values())


def enter_phase(model: GPT, optimizer, new: Phase) -> None:
    """Tell the model what changed. An embedding that leaves the head takes its table and state."""
    if new == model.phase:
        return
    if model.phase.tied and not new.tied:
        model.untie()
        optimizer.copy_state("lm_head.weight", "embed.weight")
    model.set_phase(new)


# --- as JSON --------------------------------------------------------------------------------------

def to_dict(recipe: Recipe) -> dict:
    """The resolved recipe, as the log has it."""
    return dataclasses.asdict(recipe)


def from_dict(values: dict) -> Recipe:
    """The recipe of a log or a checkpoint."""
    def tuples(value):  # JSON knows lists only
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    values = tuples(values)
    return Recipe(**{**values, "model": GPTConfig(**values["model"])})
