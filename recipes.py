"""The ladder as code: record N is record N-1 with what changed.

A Recipe says everything that defines a training: model, optimizers, schedules, batch, data order,
validation. It never speaks of machines: the same recipe on one GPU, eight, or a laptop's CPU sees
the same tokens in the same steps. A scale is a function from recipe to recipe.

Facts come from the official logs of the records; tests/test_recipes.py holds each recipe to them.
"""

import dataclasses
import math
from dataclasses import dataclass, field, fields, replace

from model import GPTConfig, param_role


@dataclass(frozen=True)
class Recipe:
    """One training. Lengths in tokens or steps, learning rates per update."""

    record: int = 6
    title: str = ""
    scale: str = "full"             # full, pocket
    track: str = "short"            # whose record table the run stands against
    corpus: str = "fineweb"         # fineweb (GPT-2 tokens) or built-in (bytes)
    model: GPTConfig = field(default_factory=GPTConfig)

    # batch and length
    num_iterations: int = 5100
    batch_tokens: int = 524_288     # a step, over all ranks
    first_batch_repeated: bool = True   # steps 0 and 1 of records #4-#11 saw the same batch

    # learning rate: constant, then linear to zero over the last cooldown_steps
    cooldown_steps: int = 1450

    # matrices of the blocks
    matrix_rule: str = "muon"       # muon or adam
    matrix_lr: float = 0.00036
    muon_momentum: float = 0.95
    muon_method: str = "jordan"     # how the momentum is orthogonalised
    muon_steps: int = 5
    muon_scale: str = "unit_rms"    # update times sqrt(max(rows, cols)): entries of RMS one
    muon_mode: str = "fast"         # fast: bf16 products, what the records used; accurate
    grad_collective: str = "all_reduce"

    # embedding, head (and matrices, where matrix_rule is adam)
    embed_lr: float = 0.0036        # of the shared table where the head is tied
    head_lr: float = 0.0036         # where it is not
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    adam_weight_decay: float = 0.0  # of matrices under adam only

    # validation
    val_tokens: int = 10_485_760
    val_every: int = 125
    target: float | None = 3.28

    def __post_init__(self) -> None:
        check(self)

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

    for name in ("num_layers", "num_heads", "vocab_size", "seq_len", "mlp_ratio"):
        must(getattr(m, name) >= 1, name, "a whole number from 1", getattr(m, name))
    must(m.head_dim >= 2 and m.head_dim % 2 == 0, "head_dim",
         "an even number from 2 (rotary turns pairs)", m.head_dim)
    must(m.compute_dtype in ("fp32", "bf16"), "compute_dtype", "fp32 or bf16", m.compute_dtype)
    must(m.rotary_base > 1, "rotary_base", "a number above 1", m.rotary_base)
    must(m.logit_softcap is None or m.logit_softcap > 0, "logit_softcap", "none or above 0",
         m.logit_softcap)
    must(r.num_iterations >= 1, "num_iterations", "a whole number from 1", r.num_iterations)
    must(r.batch_tokens >= m.seq_len and r.batch_tokens % m.seq_len == 0, "batch_tokens",
         f"a multiple of seq_len {m.seq_len}", r.batch_tokens)
    must(0 <= r.cooldown_steps <= r.num_iterations, "cooldown_steps",
         f"0 to num_iterations {r.num_iterations}", r.cooldown_steps)
    for name in ("matrix_lr", "embed_lr", "head_lr", "adam_eps"):
        value = getattr(r, name)
        must(value > 0 and math.isfinite(value), name, "a finite number above 0", value)
    must(r.adam_weight_decay >= 0, "adam_weight_decay", "0 or more", r.adam_weight_decay)
    must(0 <= r.muon_momentum < 1, "muon_momentum", "0 to below 1", r.muon_momentum)
    must(len(r.adam_betas) == 2 and all(0 <= b < 1 for b in r.adam_betas), "adam_betas",
         "two numbers from 0 to below 1, as 0.9,0.95", r.adam_betas)
    must(r.matrix_rule in ("muon", "adam"), "matrix_rule", "muon or adam", r.matrix_rule)
    must(1 <= r.muon_steps <= 20, "muon_steps", "1 to 20", r.muon_steps)
    must(r.val_tokens >= m.seq_len and r.val_tokens % m.seq_len == 0, "val_tokens",
         f"a multiple of seq_len {m.seq_len}", r.val_tokens)
    must(r.val_every >= 1, "val_every", "a whole number from 1", r.val_every)


def change(recipe: Recipe, **changes) -> Recipe:
    """`recipe` with fields replaced, the model's own fields among them.

    A shorter or longer num_iterations stretches the cooldown in proportion unless it is given too.
    """
    model_fields = {f.name for f in fields(GPTConfig)}
    if "num_iterations" in changes and "cooldown_steps" not in changes:
        ratio = changes["num_iterations"] / recipe.num_iterations
        changes["cooldown_steps"] = round(recipe.cooldown_steps * ratio)
    of_model = {k: changes.pop(k) for k in list(changes) if k in model_fields}
    return replace(recipe, model=replace(recipe.model, **of_model), **changes)


# --- the ladder ---------------------------------------------------------------------------------

RECORDS: dict[int, Recipe] = {}

RECORDS[6] = Recipe(record=6, title="Distributed Muon")


# What ./run.sh trains when no record is named: on GPUs the newest complete recipe, on a CPU the one
# that reaches the pocket target first (measured: README).
DEFAULT_FULL = 6
DEFAULT_POCKET = 6


# --- scales -------------------------------------------------------------------------------------

def pocket(recipe: Recipe) -> Recipe:
    """The recipe for two CPU cores and the built-in corpus: every idea kept, all sizes shrunk."""
    stretch = 256 / recipe.num_iterations
    return change(
        recipe, scale="pocket", track="pocket", corpus="built-in", target=None,
        num_layers=4, num_heads=2, head_dim=64, vocab_size=257, seq_len=256,
        compute_dtype="fp32", muon_mode="accurate",
        num_iterations=256, cooldown_steps=round(recipe.cooldown_steps * stretch),
        batch_tokens=4096, val_tokens=262_144, val_every=32)


SCALES = {"full": lambda recipe: recipe, "pocket": pocket}


# --- schedules: what changes from step to step --------------------------------------------------

def batch_shape(step: int, recipe: Recipe) -> tuple[int, int]:
    """(rows, tokens a row) of the global batch of `step`, before ranks exist."""
    return recipe.batch_tokens // recipe.model.seq_len, recipe.model.seq_len


def lr_multiplier(step: int, recipe: Recipe) -> float:
    """What the learning rates are multiplied by at the update of `step` (0-based): 1, then
    linear towards 0, which it would reach at step num_iterations."""
    left = recipe.num_iterations - step
    return min(1.0, left / recipe.cooldown_steps) if recipe.cooldown_steps else 1.0


def group_schedule(step: int, role: str, recipe: Recipe) -> dict[str, float]:
    """What the optimizer group of `role` is set to before the update of `step`."""
    initial = {"matrix": recipe.matrix_lr, "embed": recipe.embed_lr, "head": recipe.head_lr}[role]
    return {"lr": initial * lr_multiplier(step, recipe)}


def optimizer_groups(recipe: Recipe, named_parameters) -> list[dict]:
    """A group per role for muon.Muon; every parameter in exactly one. Roles: model.param_role."""
    adam = {"rule": "adam", "betas": recipe.adam_betas, "eps": recipe.adam_eps}
    muon = {"rule": "muon", "weight_decay": 0.0, "momentum": recipe.muon_momentum,
            "momentum_form": "heavy_ball", "method": recipe.muon_method,
            "ns_steps": recipe.muon_steps, "scale": recipe.muon_scale, "mode": recipe.muon_mode}
    settings = {
        "matrix": muon if recipe.matrix_rule == "muon" else {
            **adam, "weight_decay": recipe.adam_weight_decay},
        "embed": {**adam, "weight_decay": 0.0},
        "head": {**adam, "weight_decay": 0.0},
    }
    members: dict[str, list] = {role: [] for role in settings}
    for name, p in named_parameters:
        members[param_role(name)].append((name, p))
    return [{"params": params, "name": role, **settings[role], **group_schedule(0, role, recipe)}
            for role, params in members.items() if params]


# --- as JSON ---------------------------------------------------------------------

def to_dict(recipe: Recipe) -> dict:
    """The resolved recipe, as it stands in the log."""
    return dataclasses.asdict(recipe)


def from_dict(values: dict) -> Recipe:
    """The recipe of a log or a checkpoint."""
    values = dict(values)
    values["model"] = GPTConfig(**values["model"])
    values["adam_betas"] = tuple(values["adam_betas"])
    return Recipe(**values)
