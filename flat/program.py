"""Assemble the program of a recipe: flat/driver.py, with model.py, muon.py and recipes.py put in.

The definitions keep their text; `fold` decides in it what the recipe decides. Tables (the plan of
the layers, the optimizer's groups, the coefficients of the iteration) are printed as literals that
the trainer's own functions made.
"""

import ast
import functools
import gc
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import muon
import recipes
from flat.fold import Known, fold, prune
from flat.tidy import Docs
from flat.tree import parse, show, wrapped
from kernels import DTYPES
from model import (
    GPT,
    GPTConfig,
    Layer,
    backout_layer,
    dropped_attention,
    gates_layer,
    late_layer,
    layer_plan,
    parameter_entry,
    skip_layer,
)
from recipes import Recipe

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"# -+ the program\n")
TORCH_DTYPES = {"fp64": "torch.float64", "fp32": "torch.float32", "bf16": "torch.bfloat16"}
KEEP = {"main"}
# functions that are read better where they are called
INLINED = {"document_ids", "relu_squared", "_gram", "_polynomial", "_ema", "_ema_", "attention",
           "embed_tokens", "attention_keys", "final_norm", "momentum_average",
           "steepest_direction", "adam_average", "normuon", "normalize", "rotary_frequencies",
           "descend", "window_in_keys", "batch_tokens", "reduce",
           "parameter_entry"}
CONFIGS = {"Recipe", "GPTConfig", "RECORDS"}   # decided: only annotations name them


def definitions(path: Path) -> dict[str, str]:
    """Name -> text of each top-level definition, with the comments right above it."""
    text = path.read_text()
    lines, found = text.splitlines(keepends=True), {}
    for node in ast.parse(text).body:
        names = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        if not names:
            continue
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        while first > 1 and lines[first - 2].startswith("#") and "# ---" not in lines[first - 2]:
            first -= 1
        found[names[0]] = "".join(lines[first - 1:node.end_lineno])
    return found


def merged(own: str, plain: str) -> str:
    """Class `own` with the methods of class `plain` in the place of those with their names."""
    def methods(text: str) -> dict[str, tuple[int, int]]:
        return {n.name: (min([n.lineno] + [d.lineno for d in n.decorator_list]) - 1, n.end_lineno)
                for n in ast.parse(text).body[0].body if isinstance(n, ast.FunctionDef)}

    lines, plain_lines = own.splitlines(keepends=True), plain.splitlines(keepends=True)
    for name, (first, last) in reversed(list(methods(own).items())):
        if name in methods(plain):
            a, b = methods(plain)[name]
            lines[first:last] = plain_lines[a:b]
    return "".join(lines)


@functools.cache
def assemble() -> bytes:
    """The tree before folding, the same for every recipe; pickled, because folding changes it."""
    driver = MARKER.split((ROOT / "flat" / "driver.py").read_text())[1]
    plain = {}
    for node in ast.parse(driver).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            plain[node.name] = node
    source = driver.splitlines(keepends=True)
    texts = {name: "".join(source[node.lineno - 1:node.end_lineno]) for name, node in plain.items()}
    for module in ("model", "muon", "recipes"):
        parts = []
        for name, text in definitions(ROOT / f"{module}.py").items():
            if module == "model" and name == "GPT":
                text = merged(text, texts["GPT"])
                text += "\n\n# <- plan\n"
                driver = driver.replace(texts["GPT"], "")
            elif name in plain or name in CONFIGS:
                continue
            gap = "\n" if text.startswith(("def ", "class ", "@", "#")) else ""
            parts.append(f"{gap}\n{text}" if gap else text)
        driver = driver.replace(f"# <- {module}\n", "".join(f"{part}" for part in parts))
    driver = driver.replace("  # fmt: skip", "")
    tree = parse(driver)
    prune(tree, KEEP)
    for unit in tree.body:
        unit.facts = None
    return pickle.dumps(tree)


def uniform(items: list) -> SimpleNamespace:
    """The fields that all of these tuples share."""
    return SimpleNamespace(**{name: values[0] for name, values in (
        (name, [getattr(item, name) for item in items]) for name in items[0]._fields)
        if len(set(values)) == 1})


def groups_of(recipe: Recipe, model: GPT) -> dict[str, dict]:
    """Role -> options of its optimizer group, as the driver reads them."""
    groups = {}
    for group in recipes.optimizer_groups(recipe, model.named_parameters()):
        role, shape = group["name"], group["params"][0][1].shape
        options = muon.RULES[group["rule"]].options | group
        found = {"rule": options["rule"], "lr": recipes._initial_lr(role, recipe)}
        if options["rule"] == "muon":
            split = options["split"] or 1
            scale = muon.SCALES[options["scale"]](shape[0] // split, shape[1])
            found |= {name: options[name] for name in (
                "weight_decay", "decay", "cautious", "momentum_form", "nesterov", "method",
                "ns_steps", "ns_coefficients", "eps", "mode", "second_moment", "beta2")}
            found |= {"split": split, "scale": scale * options["multiplier"], "products": None}
        else:
            found |= {name: options[name] for name in (
                "betas", "eps", "weight_decay", "decay", "cautious")}
        groups[role] = found
    for rule in ("muon", "adam"):
        members = [found for found in groups.values() if found["rule"] == rule]
        if not any(found["weight_decay"] for found in members):
            for found in members:
                found |= {"decay": None, "cautious": False}
    return groups


def known_of(recipe: Recipe, names: list[str], groups: dict[str, dict]) -> Known:
    """What the recipe decides; `names` of the model's parameters."""
    c, r, known = recipe.model, recipe, Known(inlined=set(INLINED))
    known.names = {"c": c, "r": r, "layer": uniform(layer_plan(c)), "DTYPES": DTYPES, "any": any,
                   "backout_layer": backout_layer, "dropped_attention": dropped_attention,
                   "gates_layer": gates_layer, "late_layer": late_layer, "skip_layer": skip_layer}
    known.sources |= {"config": "c", "self.config": "c", "model.config": "c", "recipe.model": "c",
                      "recipe": "r"}
    full, wide = r.scale == "full", "float64" if c.compute_dtype == "fp64" else "float32"
    starts = [parameter_entry(name, c)[1] for name in names]
    known.values |= {
        "'relu2' in kernels": False,
        "isinstance(decay, Tensor)": False, "isinstance(lr, Tensor)": False,
        "wide": False, "G.ndim < 2": False,
        "G.numel() == 0": False, "X.dtype == torch.float64": c.compute_dtype == "fp64",
        "method == 'svd' and ns_coefficients is None": r.muon_method == "svd"}
    alike = len({*layer_plan(c)}) == 1 and not (c.packed or c.drop_mlp or c.backout)
    known.values["LAYERS_ALIKE"] = alike
    known.values["PHASES"] = bool(r.window_range or r.window_stages or r.num_targets > 1
                                  or r.tie_first)
    if not c.drop_attention:
        known.values["self.attn is not None"] = True
    if not c.drop_mlp:
        known.values["self.mlp is not None"] = True
    if full:
        known.values["CUDA"] = True
    if not r.warmup_steps:
        known.values["step < r.warmup_steps"] = False
    if not r.tie_first:
        known.values["self.tied"] = False

    head = c.compute_dtype if c.head == "fp8" else c.head
    safety = 1.0 if r.matrix_rule == "adam" else muon.coefficients(r.muon_method, r.muon_steps)[1]
    on_gpu = "bfloat16" if r.muon_mode == "fast" else "float16"
    known.sources |= {
        "dtype if c.head == 'fp8' else DTYPES[c.head]": TORCH_DTYPES[head],
        "Embedding": "nn.Embedding",    # its own initialisation takes seconds, lines as well
        "layer_plan(config)": "PLAN", "layer_plan(c)": "PLAN", "c.softcap.div": "SOFTCAP_DIV",
        "self.phase.window or T": "self.window",
        "self.phase.short_window or T": "self.short_window",
        "torch.promote_types(compute_dtype, torch.float32)": f"torch.{wide}",
        # the math of muon.py, of which this recipe needs one way
        "coefficients(method, steps, ns_coefficients)":
            "(NS_COEFFICIENTS, " + ("1.0)" if safety == 1 else "NS_SAFETY)"),
        "steepest(update, muon['norm'], method=muon['method'], steps=muon['ns_steps'], "
        "mode=muon['mode'], ns_coefficients=muon['ns_coefficients'], eps=muon['eps'], "
        "products=muon['products'])":
            "orthogonalize(update, muon['method'], muon['ns_steps'], mode=muon['mode'], "
            "ns_coefficients=muon['ns_coefficients'], eps=muon['eps'], products=muon['products'])",
        "storage_dtype(mode, X.device)": f"torch.{on_gpu}" if full else "NS_DTYPE",
        "_precision(X.device)": "", "gram": "_gram", "polynomial": "_polynomial",
        "math.sqrt(1.0)": "1.0",
        # for any shape of G there; (split, rows, cols) in fp32 here
        "(G.mT if tall else G).to(torch.promote_types(G.dtype, torch.float32)).contiguous()":
            "G.mT if tall else G",
        "normalize(X, (-2, -1), safety, eps).to(dtype).view(-1, *X.shape[-2:])":
            "normalize(X, (-2, -1), safety, eps).to(dtype)",
        "(X.mT if tall else X).reshape(G.shape).to(G.dtype)": "(X.mT if tall else X).to(G.dtype)"}
    if wide == "float64":
        known.sources["torch.float32"] = "torch.float64"
    if c.head_dtype != "bf16":
        known.sources["dtype or torch.promote_types(compute_dtype, torch.float32)"] = (
            f"torch.{wide}")
    if not c.yarn:
        known.sources["yarn(rotary_frequencies(self.config), windows)"] = (
            "(rotary_frequencies(self.config), 1.0)")
    if not c.paired_heads:
        known.values["layer.keys == 'paired'"] = False
        call = "attention(q, k, v, self.scale, keys)"
        known.sources[f"{call}.reshape(q_BTHD.shape)"] = call
    if c.embed_dtype == c.stream_dtype:
        table = "F.embedding(tokens_BT, table.weight)"
        known.sources[f"{table}.to(stream)"] = table
    kinds = {start.kind for start in starts if start.number} - {"constant"}
    if len(kinds) == 1:
        known.values["kind == 'uniform'"] = kinds == {"uniform"}
    if not r.extension_steps:
        known.sources |= {"r.scheduled_steps": "r.num_iterations"}
    if r.window_range or r.window_stages:
        known.sources["tuple[int, int] | None"] = "tuple[int, int]"
    if r.val_row == c.seq_len:
        known.sources["r.val_row"] = "c.seq_len"
    if not (r.momentum_warmup_steps or r.momentum_cooldown_steps):
        known.sources["muon['momentum']"] = "MUON_MOMENTUM"
    if r.batch_stages or r.num_targets > 1:  # graphs for each third
        known.sources["GRAPH_STEPS"] = "(0, NUM_ITERATIONS // 2, NUM_ITERATIONS - 1)"
    else:
        known.sources["GRAPH_STEPS"] = "(0,)"
    if not r.batch_stages:
        known.sources["batch_shape(step)"] = "(r.num_rows, c.seq_len)"

    known.dropped = {
        "self.register_buffer('target_weights', torch.ones(1), persistent=False)",
        "self.set_phase(Phase())", "self.phase: Phase | None = None", "self.recomputed = 0",
        "self.segments = [range(c.num_layers)]",
        "self.loss_bodies = KERNELS if 'loss' in kernels else REFERENCES"}
    if not r.prefix_weight:
        known.dropped.add("self.register_buffer('prefixes', None, persistent=False)")
    if c.bigram and c.bigram_frac == 1:
        known.sources["c.bigram_dim"] = "c.model_dim"
    if not any(isinstance(start.number, tuple) for start in starts):
        known.sources["p.copy_(torch.tensor(number, dtype=torch.float64))"] = "p.fill_(number)"
    if c.value_embeds == "none" and not c.value_residual:
        known.dropped.add("v_BTHD = v_BTHD.type_as(q_BTHD)")
    for rule in ("muon", "adam"):
        members = [g for g in groups.values() if g["rule"] == rule]
        for name in members[0].keys() - {"rule", "lr"} if members else ():
            values = [g[name] for g in members]
            if all(v == values[0] and type(v) is type(values[0]) for v in values):
                known.values[f"{rule}['{name}']"] = values[0]
    return known


class Folded(NamedTuple):
    """The tree of a program, still with markers for its tables, and what was decided."""

    tree: ast.Module
    known: Known
    groups: dict[str, dict]
    names: list[str]    # of parameters


def folded(recipe: Recipe) -> Folded:
    with torch.device("meta"):
        model = GPT(recipe.model)
    names = [name for name, _ in model.named_parameters()]
    groups = groups_of(recipe, model)
    known = known_of(recipe, names, groups)
    tree = pickle.loads(assemble())
    for unit in tree.body:  # fields that all layers share are known
        if isinstance(unit, ast.ClassDef) and unit.name == "Layer":
            unit.body = [node for node in unit.body if not isinstance(node, ast.AnnAssign)
                         or not hasattr(known.names["layer"], node.target.id)]
    docs = Docs(tree, known, recipe.record, vars(recipe.model) | vars(recipe))
    collects = gc.isenabled()
    gc.disable()  # it would look through the tree again and again
    fold(tree, known, KEEP, docs.comment)
    if collects:
        gc.enable()
    docs.clean()
    return Folded(tree, known, groups, names)


def printed(recipe: Recipe, words: str) -> str:
    """The program of `recipe`; `words` are those after `python -m flat` that asked for it."""
    c, (tree, known, groups, names) = recipe.model, folded(recipe)
    alike = "Block() for i, layer in enumerate(PLAN)", "Block() for _ in range(NUM_LAYERS)"
    text = show(tree).replace(*alike)
    tables = {"plan": plan_text(recipe, text), "groups": groups_text(groups, text),
              "parameters": parameters_text(recipe, names)}
    tables["constants"] = constants_text(recipe, known, text + "".join(tables.values()))
    for name, table in tables.items():
        at = next(i for i, n in enumerate(tree.body) if getattr(n, "text", "") == f"# <- {name}")
        tree.body[at:at + 1] = parse(f"\n{table}").body
    text = show(tree).replace(*alike)
    if c.compute_dtype == "fp64":
        text = text.replace(".float()", ".double()")
    for name, value in {
            "RECORD": recipe.record, "TITLE": recipe.title, "WORDS": words, "TRACK": recipe.track,
            "TOKENS": "bytes" if c.vocab_size == 257 else "GPT-2 tokens",
            "DEVICES": "bf16" if recipe.scale == "full" else "or CPUs",
            "NEEDS": "bf16" + ", fp8" * (c.head == "fp8")
            + ", flash attention" * c.packed}.items():
        text = text.replace(f"{{{name}}}", str(value))
    taken = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for name in re.findall(r"^def (_\w+)", text, re.M):
        if name.lstrip("_") not in taken:
            text = re.sub(rf"\b{name}\b", name.lstrip("_"), text)
    return text


def parameters_text(recipe: Recipe, names: list[str]) -> str:
    """PARAMETERS as a literal: what parameter_table says of each kind of parameter."""
    rows = {re.sub(r"\.\d+(?=\.)", "", name): parameter_entry(name, recipe.model) for name in names}
    lines = (f'    "{name}": ("{role}", ("{kind}", {std_text(number, recipe.model)})),'
             for name, (role, (kind, number)) in rows.items())
    return ("# Role (which is its optimizer group) and start of each kind of parameter: uniform or "
            "normal with\n# a standard deviation, or a constant.\nPARAMETERS = {\n"
            + "".join(f"{wrapped(line)}\n" for line in lines) + "}\n")


def std_text(number: float | tuple[float, ...], c: GPTConfig) -> str:
    """A start; a standard deviation as a product with a root of a size where that is shorter."""
    if isinstance(number, tuple):
        return literal(tuple(float(f"{x:.15g}") for x in number))
    roots = {"": 1.0, " * MODEL_DIM ** -0.5": c.model_dim ** -0.5,
             " * (MLP_RATIO * MODEL_DIM) ** -0.5": (c.mlp_ratio * c.model_dim) ** -0.5,
             " * (2 * NUM_LAYERS) ** -0.5": (2 * c.num_layers) ** -0.5}
    found = {root: literal(float(f"{number / size:.15g}")) for root, size in roots.items()}
    root = min(found, key=lambda root: len(found[root]))
    return (found[root] + root).removeprefix("1.0 * ")


def literal(value: object) -> str:
    """A number as a person would write it."""
    if isinstance(value, tuple):
        inside = ", ".join(map(literal, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, float) and value > 0 and value != int(value):
        if (3 * value).is_integer():
            return f"{int(3 * value)} / 3"
        square = value * value
        for base, text in ((square, f"{round(square)} ** 0.5"),
                           (1 / square, f"{round(1 / square)} ** -0.5")):
            if abs(base - round(base)) < 1e-12 * base and round(base) != round(base ** 0.5) ** 2:
                return text
    if isinstance(value, float) and value > 0 and abs(math.log2(value)) > 8 and (
            math.log2(value).is_integer()):
        return f"2.0**{int(math.log2(value))}"
    if type(value) in (int, float) and value >= 10_000:
        return f"{value:_}"
    return repr(value).replace("'", '"')


def groups_text(groups: dict[str, dict], text: str) -> str:
    """GROUPS as a literal, with the options that the folded driver still reads."""
    read = {rule: set(re.findall(rf'(?:{rule}|group)\["(\w+)"\]', text))
            for rule in ("muon", "adam")}
    rows = []
    for role, options in groups.items():
        inside = ", ".join(f'"{k}": {literal(v)}' for k, v in options.items()
                           if k in read[options["rule"]])
        rows.append(wrapped(f'    "{role}": {{{inside}}},') + "\n")
    return ("# The optimizer's groups by the role of a parameter; lr is that of the peak.\n"
            "GROUPS = {\n" + "".join(rows) + "}\n")


def constants_text(recipe: Recipe, known: Known, text: str) -> str:
    c = recipe.model
    made = {name.upper(): getattr(owner, name) for owner in (c, recipe) for name in dir(owner)
            if name[0] != "_" and isinstance(getattr(owner, name), int | float | tuple)}
    made |= known.constants | {"SOFTCAP_DIV": c.softcap.div}
    del made["RECORD"]  # the title has it
    if recipe.matrix_rule == "muon" and recipe.muon_method != "svd":
        made["NS_COEFFICIENTS"], made["NS_SAFETY"] = muon.coefficients(
            recipe.muon_method, recipe.muon_steps)
    lines, words = ["# model"], set(re.findall(r"\w+", text))
    order = list(dict.fromkeys(map(str.upper, [*vars(c), *dir(c), "end", *vars(recipe),
                                               *dir(recipe), *made])))
    for name, value in sorted((made | {"END": 0}).items(), key=lambda item: order.index(item[0])):
        if name == "END":
            lines.append("# training")
        elif name in words:
            if name == "NS_COEFFICIENTS" and len(set(value)) > 1:
                rows = "".join(f"    {row!r},\n" for row in value)
                lines.append(f"{name} = (\n{rows})")
            elif name == "NS_COEFFICIENTS":
                lines.append(f"{name} = ({value[0]!r},) * {len(value)}")
            else:
                lines.append(f"{name} = {literal(value)}")
    if "NS_DTYPE" in words:
        wide = "float64" if c.compute_dtype == "fp64" else "float32"
        on_gpu = "bfloat16" if recipe.muon_mode == "fast" else "float16"
        lines.append(f"NS_DTYPE = torch.{on_gpu} if torch.cuda.is_available() else torch.{wide}")
    return "\n".join(lines) + "\n"


def plan_text(recipe: Recipe, text: str) -> str:
    """PLAN as a literal, with the fields of Layer that are still read."""
    match = re.search(r"class Layer\(NamedTuple\):(.*?)\n\n\n", text, re.S)
    if not match or "PLAN" not in text:
        return ""
    kept = re.findall(r"^    (\w+): ", match[1], re.M)
    rows = []
    for layer in layer_plan(recipe.model):
        values = [getattr(layer, name) for name in kept]
        while values and values[-1] == Layer._field_defaults[kept[len(values) - 1]]:
            del values[-1]
        rows.append(f"Layer({', '.join(map(literal, values))})")
    return wrapped(f"PLAN = [{', '.join(rows)}]") + "\n"
