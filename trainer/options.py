"""The command line: which recipe, what to change in it, and what the machine should do.

    python train_gpt.py --record 6 --scale pocket --num_iterations 50 --seed 7

Two kinds of options. Those of the run (`RunOptions`) choose the recipe and the seed and change
nothing else of what is trained. Those of the recipe are its fields, by name; setting one trains
something else, and the log says so. All are checked before anything starts; none is ignored.
"""

import difflib
import textwrap
import types
import typing
from dataclasses import dataclass, field, fields

import recipes
from kernels import NAMES
from model import GPTConfig
from recipes import RECIPES, SCALES, Recipe


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RunOptions:
    """Options of the run, not of the recipe."""

    record: str | None = _option(
        None, "which record's recipe to train, or one of our own by its name; default: the newest "
              f"record, at pocket scale #{recipes.DEFAULT_POCKET}")
    scale: str = _option("auto", "full or pocket; auto: full on GPUs, pocket on CPU")
    seed: int = _option(0, "of the initial weights; --runs counts up from it")
    runs: int = _option(1, "train this many times with consecutive seeds, one log each")
    device: str = _option("auto", "cuda or cpu; auto: cuda where there is one")
    compile: str = _option("auto", "on or off: torch.compile; auto: on for GPUs, off on CPU")
    compile_layers: int | None = _option(
        None, "layers per compiled graph, 0: all; with 1 reductions overlap most; default: all on "
              "one GPU, 4 on several")
    compile_optimizer: str = _option(
        "auto", "on or off: fuse the optimizer's updates too; auto: on for GPUs")
    micro_batch_tokens: int | None = _option(
        None, "micro-batch size in tokens per rank; default: by the free memory")
    recompute: str = _option(
        "auto", "on or off: activation checkpointing, for less memory; auto: as many layers as a "
                "row needs to fit")
    data_dir: str | None = _option(
        None, "folder of shards in place of the recipe's corpus: what `python -m data.fineweb "
              "tokenize` wrote, or *train*.bin and *val*.bin")
    log_dir: str = _option("logs", "folder of the log and the trained model")
    checkpoint_every: int = _option(
        0, "write a checkpoint every that many steps; 0: only when asked to stop")
    save_model: bool = _option(True, "false: the trained model is not written")
    keep: int = _option(2, "checkpoints of a run to keep, the newest ones")
    resume: str | None = _option(
        None, "auto: go on from the newest checkpoint of this recipe and seed in --log_dir, or "
              "start; or the path of one")
    timeout_s: float = _option(
        60.0, "timeout of collectives in seconds, from the first step on")
    kernels: str = _option(
        "none", "Triton kernels to use, of symmetric, relu2 and loss, as relu2,loss; or none")
    profile: int = _option(
        0, "profile so many steps, print a table, write a trace, stop; no record")
    wandb: bool = _option(False, "log to Weights & Biases as well (WANDB_MODE=offline works)")
    prepare: bool = _option(False, "check the options, get the data, stop before training")

    @property
    def triton_kernels(self) -> frozenset[str]:
        return frozenset(self.kernels.split(",")) - {"none", ""}


class OptionError(ValueError):
    """A wrong command line; the message is one line."""


def _parse(name: str, text: str, kind) -> object:
    """`text` as `kind`: int, float, str, bool, a tuple of floats, or one of those or None."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "on": True,
                    "false": False, "0": False, "no": False, "off": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            of = typing.get_args(kind)[0]
            return tuple(of(part.replace("_", "")) for part in text.split(",") if part)
        if kind is int:
            return int(text.replace("_", ""))
        return kind(text)
    except (ValueError, KeyError):
        what = wanted.get(kind, "numbers separated by commas, as 0.9,0.95")
        raise OptionError(f"--{name}: expected {what}, got {text!r}") from None


def _kinds(cls) -> dict[str, object]:
    return typing.get_type_hints(cls)


# What --record and --scale decide by themselves is not set by an option of its own.
_NOT_OPTIONS = {"model", "record", "name", "scale", "title", "track", "corpus"}


def recipe_kinds() -> dict[str, object]:
    """Name -> type of every recipe field that an option may set, the model's fields included."""
    own = {k: v for k, v in _kinds(Recipe).items()
           if k not in _NOT_OPTIONS and typing.get_origin(v) is not dict}
    return own | _kinds(GPTConfig)


def parse(argv: list[str], *, has_cuda: bool) -> tuple[RunOptions, Recipe]:
    """The run and the resolved recipe that a command line asks for.

    Raises OptionError (one line: what is wrong, what was expected) for anything unknown,
    misspelt, ill-typed or out of range.
    """
    run_kinds, of_recipe = _kinds(RunOptions), recipe_kinds()
    given_run, given_recipe = {}, {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise OptionError(f"expected an option as --name value, got {word!r}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        kind = run_kinds.get(name, of_recipe.get(name))
        if name == "eval_only":
            raise OptionError("--eval_only: python -m tools.eval logs/RUN --data_dir DIR (or files "
                              "of text) evaluates a trained model")
        if kind is None:
            near = difflib.get_close_matches(name, [*run_kinds, *of_recipe], n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists all"
            raise OptionError(f"unknown option --{name}: {hint}")
        if name in given_run or name in given_recipe:
            raise OptionError(f"--{name} is given twice")
        if not equals:
            if kind is bool and (not words or words[0].startswith("--")):
                value = "true"
            elif not words or words[0].startswith("--"):
                raise OptionError(f"--{name}: expected a value, got nothing")
            else:
                value = words.pop(0)
        (given_run if name in run_kinds else given_recipe)[name] = _parse(name, value, kind)
    run = RunOptions(**given_run)
    _check_run(run, has_cuda)
    return run, _resolve(run, given_recipe, has_cuda)


def _check_run(run: RunOptions, has_cuda: bool) -> None:
    def one_of(name: str, choices) -> None:
        got = getattr(run, name)
        if got not in choices:
            raise OptionError(f"--{name}: expected one of {', '.join(map(str, choices))}; "
                              f"got {got!r}")

    if run.record is not None:
        one_of("record", RECIPES)
    one_of("scale", ("auto", *SCALES))
    one_of("device", ("auto", "cuda", "cpu"))
    for name in ("compile", "compile_optimizer", "recompute"):
        one_of(name, ("auto", "on", "off"))
    if run.device == "cuda" and not has_cuda:
        raise OptionError("--device cuda: there is no CUDA device here; --device cpu trains "
                          "(--scale pocket is its size)")
    if run.runs < 1:
        raise OptionError(f"--runs: expected a whole number from 1, got {run.runs}")
    if run.seed < 0:
        raise OptionError(f"--seed: expected 0 or more, got {run.seed}")
    if unknown := run.triton_kernels - set(NAMES):
        raise OptionError(f"--kernels: expected some of {', '.join(NAMES)} with commas between, or "
                          f"none; got {', '.join(sorted(unknown))}")
    if run.compile_layers is not None and run.compile_layers < 0:
        raise OptionError(f"--compile_layers: expected 0 or more, got {run.compile_layers}")
    if run.checkpoint_every < 0:
        raise OptionError(f"--checkpoint_every: expected 0 or more, got {run.checkpoint_every}")
    if run.profile < 0:
        raise OptionError(f"--profile: expected a number of steps from 1, got {run.profile}")
    if run.profile and run.runs > 1:
        raise OptionError(f"--profile: looks at one run, got --runs {run.runs}")
    if run.keep < 1:
        raise OptionError(f"--keep: expected a whole number from 1, got {run.keep}")
    if not 1 <= run.timeout_s < 1e6:
        raise OptionError(f"--timeout_s: expected 1 to 1000000 seconds, got {run.timeout_s}")
    if run.resume not in (None, "auto") and run.runs > 1:
        raise OptionError("--resume PATH: goes on with one run, got --runs "
                          f"{run.runs}; --resume auto finds the checkpoint of each seed")
    if run.micro_batch_tokens is not None and run.micro_batch_tokens < 1:
        raise OptionError("--micro_batch_tokens: expected a whole number from 1, "
                          f"got {run.micro_batch_tokens}")


def _resolve(run: RunOptions, changes: dict, has_cuda: bool) -> Recipe:
    on_gpu = run.device == "cuda" or (run.device == "auto" and has_cuda)
    scale = run.scale if run.scale != "auto" else ("full" if on_gpu else "pocket")
    if scale == "full" and not on_gpu and run.device != "cpu" and not run.prepare:
        raise OptionError("--scale full: there is no CUDA device here; --scale pocket trains the "
                          "same recipe small (--device cpu insists on this one)")
    record = run.record
    if record is None:
        record = recipes.DEFAULT_POCKET if scale == "pocket" else recipes.DEFAULT_FULL
    try:
        return recipes.change(SCALES[scale](RECIPES[str(record)]), **changes)
    except ValueError as error:
        raise OptionError(str(error)) from None


def help_text() -> str:
    """What --help prints; 80 columns."""
    def rows(items) -> str:
        out = []
        for name, text in items:
            lines = textwrap.wrap(text, 50) or [""]
            out += [f"  --{name:<22} {lines[0]}"]
            out += [" " * 27 + more for more in lines[1:]]
        return "\n".join(out)

    def shown(value) -> str:
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        return str(value).lower() if isinstance(value, bool | None) else str(value)

    recipe = SCALES["pocket"](RECIPES[str(recipes.DEFAULT_POCKET)])
    of_recipe = [(name, shown(getattr(recipe.model if hasattr(recipe.model, name)
                                      and not hasattr(recipe, name) else recipe, name)))
                 for name in recipe_kinds()]
    return "\n".join([
        "Train a GPT by the recipe of a speedrun record, on GPUs or on a CPU.",
        "",
        "  ./run.sh                       the newest recipe; on a CPU "
        f"#{recipes.DEFAULT_POCKET} at pocket scale",
        "  ./run.sh --record 6            that record's recipe",
        "  ./run.sh --seed 7 --runs 5     five runs, seeds 7 to 11, one log each",
        "  NPROC=4 ./run.sh               four processes (GPUs, or CPU ranks)",
        "  NNODES=2 NODE_RANK=0 MASTER_ADDR=host ./run.sh",
        "                                 several machines: one call on each",
        "",
        *textwrap.wrap(f"Records and recipes of our own: {', '.join(RECIPES)}.", 80),
        f"Scales: {', '.join(SCALES)}.",
        "",
        "Options of the run:",
        rows((f.name, f.metadata["help"]) for f in fields(RunOptions)),
        "",
        "Fields of the recipe (with their values at pocket scale); setting one trains",
        "something else, and the log says so:",
        rows(of_recipe),
    ])
