"""Assemble the program of a recipe: flat/driver.py, with model.py, muon.py and recipes.py put in.

The definitions keep their text; `fold` decides in it what the recipe decides. Tables (the plan of
the layers, the optimizer's groups, the coefficients of the iteration) are printed as literals that
the trainer's own functions made.
"""

import ast
import functools
import gc
import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import torch

import muon
import recipes
from flat.fold import TRUE, Known, Text, fold, reachable
from flat.tidy import tidy, wrapped
from model import GPT, Layer, layer_plan
from recipes import Recipe

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"# -+ the program\n")
TORCH_DTYPES = {"fp64": "torch.float64", "fp32": "torch.float32", "bf16": "torch.bfloat16"}
KEEP = {"main"}
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
def assemble() -> str:
    """The text before folding: the same for every recipe."""
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
    edited = Text(driver)
    alive = reachable(edited.tree, KEEP)
    for node in edited.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in alive:
            edited.drop(node)
    return edited.apply()


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
        options = muon.RULES[group["rule"]] | group
        found = {"rule": options["rule"], "lr": recipes._initial_lr(role, recipe)}
        if options["every"] > 1:
            found["every"] = options["every"]
        if options["rule"] == "muon":
            split = options["split"] or 1
            scale = muon.SCALES[options["scale"]](shape[0] // split, shape[1])
            found |= {name: options[name] for name in (
                "weight_decay", "decay", "cautious", "momentum_form", "nesterov", "norm", "method",
                "ns_steps", "mode", "second_moment", "beta2")}
            found |= {"split": split, "scale": scale * options["multiplier"]}
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


def known_of(recipe: Recipe, groups: dict[str, dict]) -> Known:
    """What the recipe decides."""
    c, known = recipe.model, Known()
    known.objects |= dict.fromkeys(("c", "config", "self.config", "model.config"), c)
    known.objects |= dict.fromkeys(("r", "recipe"), recipe)
    known.objects |= {"recipe.model": c}
    known.objects["layer"] = uniform(layer_plan(c))
    known.values |= {
        "kernels": frozenset(), "'relu2' in kernels": False, "'loss' in kernels": False,
        "isinstance(weight, Tensor)": False, "isinstance(factor, Tensor)": False,
        "any(r.normuon.values())": any(recipe.normuon.values()),
        "exact and X.shape[-1] >= 2 * X.shape[-2] and (len(polynomials) > 1)": False,
        "rounded": False, "G.ndim < 2": False,
        "X.dtype == torch.float64": c.compute_dtype == "fp64",
        "method == 'svd' and ns_coefficients is None": recipe.muon_method == "svd"}
    for name in ("c", "config"):
        known.sources[f"layer_plan({name})"] = "PLAN"
    known.sources |= {f"DTYPES[c.{name}_dtype]": TORCH_DTYPES[getattr(c, f"{name}_dtype")]
                      for name in ("compute", "stream", "embed", "head")}
    head = c.compute_dtype if c.head == "fp8" else c.head
    known.sources["dtype if c.head == 'fp8' else DTYPES[c.head]"] = TORCH_DTYPES[head]
    if c.compute_dtype == "fp64":
        known.sources["torch.float32"] = "torch.float64"
    if not c.yarn:
        known.sources["yarn(rotary_frequencies(self.config), windows)"] = (
            "(rotary_frequencies(self.config), 1.0)")
    known.sources |= {
        "backout_layer(c)": str(2 * c.num_layers // 3),
        "dropped_attention(c)": str(7 * c.num_layers // 12),
        "c.softcap.div": "SOFTCAP_DIV",
        "coefficients(method, steps, ns_coefficients)": "(NS_COEFFICIENTS, NS_SAFETY)",
        "gram": "_gram", "polynomial": "_polynomial",
        "steepest(update, norm, **options, mode=mode, eps=eps, products=products)":
            "orthogonalize(update, method, ns_steps, mode=mode, eps=eps, products=products)",
        "storage_dtype(mode, X.device)": "NS_DTYPE",
        "_rounds(X, dtype)": "False",
        "_precision(rounded, X.device)": "", "_precision(False, X.device)": ""}
    if not recipe.warmup_steps:
        known.values["step < r.warmup_steps"] = False
    if not recipe.tie_first:
        known.values["self.tied"] = False
    known.dropped = {
        "self.register_buffer('target_weights', torch.ones(1), persistent=False)",
        "self.set_phase(Phase())", "self.phase: Phase | None = None", "self.recomputed = 0",
        "self.segments = [range(c.num_layers)]",
        "self.loss_bodies = KERNELS if 'loss' in kernels else REFERENCES"}
    for rule in ("muon", "adam"):
        members = [g for g in groups.values() if g["rule"] == rule]
        for name in members[0] if members else ():
            values = [g[name] for g in members]
            if all(v == values[0] and type(v) is type(values[0]) for v in values):
                known.values[f"{rule}['{name}']"] = values[0]
    if any(recipe.normuon.values()):
        known.values["axis"] = TRUE
    return known


def printed(recipe: Recipe, words: str) -> str:
    """The program of `recipe`; `words` are those after `python -m flat` that asked for it."""
    collects = gc.isenabled()
    gc.disable()  # it would walk the syntax trees again and again, half of the time (#62: 5.6 s)
    try:
        return _printed(recipe, words)
    finally:
        if collects:
            gc.enable()


def _printed(recipe: Recipe, words: str) -> str:
    c = recipe.model
    with torch.device("meta"):
        model = GPT(c)
    groups = groups_of(recipe, model)
    known = known_of(recipe, groups)
    full = c.compute_dtype == "bf16"
    text = assemble()
    for name, value in {
            "RECORD": recipe.record, "TITLE": recipe.title, "WORDS": words,
            "TOKENS": "bytes" if c.vocab_size == 257 else "GPT-2 tokens",
            "DEVICES": "bf16" if full else "or CPUs",
            "NEEDS": "bf16" + ", fp8" * (c.head == "fp8")
            + ", flash attention" * c.packed}.items():
        text = text.replace(f"{{{name}}}", str(value))
    text = with_rows(text, [name for name, _ in model.named_parameters()])
    text = fold(text, known, KEEP)
    text = text.replace("# <- plan\n", plan_text(recipe, text))
    text = text.replace("# <- groups\n", groups_text(groups, text))
    text = text.replace("# <- constants\n", constants_text(recipe, known, text))
    text = fold(text, Known(), KEEP)
    if c.compute_dtype == "fp64":
        text = text.replace(".float()", ".double()")
    text = text.replace("parameter_table in model.py", "parameter_table")
    taken = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
    for name in re.findall(r"^def (_\w+)", text, re.M):
        if name.lstrip("_") in taken:
            continue
        text = re.sub(rf"\b{name}\b", name.lstrip("_"), text)
    return tidy(text, recipe.record, {"PLAN", "GROUPS"})


def with_rows(text: str, names: list[str]) -> str:
    """parameter_table with the rows of parameters that the model has."""
    def row(match: re.Match) -> str:
        return match[0] if any(fnmatchcase(name, match[1]) for name in names) else ""

    return re.sub(r'^        "([\w.*]+)": \("\w+", .*\),\n', row, text, flags=re.M)


def literal(value: object) -> str:
    if isinstance(value, float):
        power = math.log2(abs(value)) if value else 0.5
        if power == int(power) and abs(power) > 8:
            return f"2.0**{int(power)}"
    return repr(value)


def groups_text(groups: dict[str, dict], text: str) -> str:
    """GROUPS as a literal, with the options that the folded driver still reads."""
    read = {rule: set(re.findall(rf'(?:{rule}|group)\["(\w+)"\]', text))
            for rule in ("muon", "adam")}
    rows = []
    for role, options in groups.items():
        inside = ", ".join(f'"{k}": {literal(v)}'.replace("'", '"')
                           for k, v in options.items() if k in read[options["rule"]])
        rows.append(wrapped(f'    "{role}": {{{inside}}},') + "\n")
    return ("# The optimizer's groups by the role of a parameter; learning rates are times\n"
            "# lr_multiplier(step).\nGROUPS = {\n" + "".join(rows) + "}\n")


def constants_text(recipe: Recipe, known: Known, text: str) -> str:
    c = recipe.model
    made = {name.upper(): getattr(owner, name) for owner in (c, recipe) for name in dir(owner)
            if name[0] != "_" and isinstance(getattr(owner, name), int | float | tuple)}
    made |= known.constants | {"SOFTCAP_DIV": c.softcap.div}
    if recipe.matrix_rule == "muon" and recipe.muon_method != "svd":
        made["NS_COEFFICIENTS"], made["NS_SAFETY"] = muon.coefficients(
            recipe.muon_method, recipe.muon_steps)
    lines = []
    order = {f.upper(): i for i, f in enumerate(
        [*vars(c), *vars(recipe), *dir(c), *dir(recipe)])}
    for name, value in sorted(made.items(), key=lambda item: order.get(item[0], 999)):
        if re.search(rf"\b{name}\b", text):
            if name == "NS_COEFFICIENTS" and len(set(value)) > 1:
                rows = "".join(f"    {row!r},\n" for row in value)
                lines.append(f"{name} = (\n{rows})")
            elif name == "NS_COEFFICIENTS":
                lines.append(f"{name} = ({value[0]!r},) * {len(value)}")
            else:
                lines.append(f"{name} = {literal(value)}")
    result = "\n".join(lines) + "\n"
    if re.search(r"\bNS_DTYPE\b", text):
        wide = "float64" if c.compute_dtype == "fp64" else "float32"
        on_gpu = "bfloat16" if recipe.muon_mode == "fast" else "float16"
        result += f"NS_DTYPE = torch.{on_gpu} if torch.cuda.is_available() else torch.{wide}\n"
    return result


def plan_text(recipe: Recipe, text: str) -> str:
    """PLAN as a literal, with the fields of Layer that are still read."""
    match = re.search(r"class Layer\(NamedTuple\):(.*?)\n\n\n", text, re.S)
    if not match or "PLAN" not in text:
        return ""
    kept = re.findall(r"^    (\w+): ", match[1], re.M)
    rows = []
    for layer in layer_plan(recipe.model):
        inside = ", ".join(f"{name}={getattr(layer, name)!r}" for name in kept
                           if getattr(layer, name) != Layer._field_defaults[name])
        rows.append(f"    Layer({inside}),\n".replace("'", '"'))
    return "PLAN = [\n" + "".join(rows) + "]\n"
