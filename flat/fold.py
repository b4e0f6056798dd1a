"""Fold source text: decide what a frozen configuration decides, drop what is then unused.

    fold(text, Known(objects={"c": config}, values={"x.y()": 3}, sources={}), keep={"main"})

Works on the text, at positions from ast, so that what is left is word for word what was written,
comments included. Three kinds of passes repeat until none changes the text:

    decide      an expression on known attributes or of constants becomes its value or the name of a
                constant, a decided `if` its branch
    propagate   a local, a parameter or a self attribute that only ever has one constant value
                becomes that value
    prune       parameters, locals, fields, methods, functions, imports that nothing reads go

`tidy` then joins and wraps lines to 100 columns and drops comments of newer records.
"""

import ast
import functools
import operator
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

WIDTH = 100
COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Gt: operator.gt, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.LtE: operator.le,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
FUNCTION = ast.FunctionDef
TRUE = object()     # a value that is not known but for its truth


@dataclass
class Known:
    """What is decided: objects whose attributes are, and expressions by their text."""

    objects: dict[str, object] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)     # text of an expression -> value
    sources: dict[str, str] = field(default_factory=dict)       # -> another text
    dropped: set[str] = field(default_factory=set)              # texts of statements
    constants: dict[str, object] = field(default_factory=dict)  # found: NAME -> value


def children(node: ast.AST) -> list[ast.AST]:
    """ast.iter_child_nodes, kept with the node."""
    if not hasattr(node, "child_nodes"):
        node.child_nodes = list(ast.iter_child_nodes(node))
    return node.child_nodes


def walk(node: ast.AST) -> list[ast.AST]:
    """ast.walk, kept with the node: the passes walk the same trees many times."""
    if not hasattr(node, "all_nodes"):
        found = [node]
        for child in children(node):
            found += walk(child)
        node.all_nodes = found
    return node.all_nodes


def unparse(node: ast.AST) -> str:
    """ast.unparse, kept with the node."""
    if not hasattr(node, "word"):
        node.word = node.id if isinstance(node, ast.Name) else (
            f"{unparse(node.value)}.{node.attr}" if isinstance(node, ast.Attribute)
            else ast.unparse(node))
    return node.word


class Unknown(Exception):
    """The configuration does not decide this expression."""


@functools.lru_cache(4)
def parsed(text: str) -> ast.Module:
    """Passes only read the tree, so all passes over one text share it."""
    return ast.parse(text)


class Text:
    """A source text with its tree, and edits by position."""

    def __init__(self, text: str):
        self.raw, self.tree, self.edits = text.encode(), parsed(text), []
        self.lines = self.raw.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (self.starts[node.lineno - 1] + node.col_offset,
                self.starts[node.end_lineno - 1] + node.end_col_offset)

    def source(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.raw[start:end].decode()

    def replace(self, node: ast.AST, text: str) -> None:
        self.edits.append((*self.span(node), text))

    def replace_lines(self, first: int, last: int, text: str = "") -> None:
        self.edits.append((self.starts[first - 1], self.starts[last], text))

    def comments_above(self, line: int) -> int:
        """The first of the comment lines right above `line`, or `line` itself."""
        while line > 1 and self.lines[line - 2].lstrip().startswith(b"#") and (
                not self.lines[line - 2].startswith(b"# ---")):
            line -= 1
        return line

    def drop(self, node: ast.stmt) -> None:
        """Without its comments; a block that becomes empty keeps `pass`."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno] + [d.lineno for d in decorators])
        self.replace_lines(self.comments_above(first), node.end_lineno)

    def attempt(self, work: Callable[[], None]) -> bool:
        """The edits of `work`, all of them or, where one meets an earlier edit, none."""
        before = list(self.edits)
        work()
        new = self.edits[len(before):]
        self.edits = before
        new = sorted(new, key=lambda e: (e[0], -e[1]))
        inside = [e for i, e in enumerate(new) if i and e[0] < max(x[1] for x in new[:i])]
        if inside or any(a < y and x < b for a, b, _ in new for x, y, _ in before):
            return False
        self.edits = before + new
        return True

    def apply(self) -> str:
        """The outermost of overlapping edits; the others come up again in the next round."""
        raw, end = [], 0
        for start, stop, text in sorted(self.edits, key=lambda e: (e[0], -e[1])):
            if start >= end:
                raw += [self.raw[end:start], text.encode()]
                end = stop
        return b"".join([*raw, self.raw[end:]]).decode()


def made_always(tree: ast.Module) -> set[str]:
    """self.x that an __init__ makes by a call, and nothing else assigns."""
    found: dict[str, list[ast.expr]] = {}
    for node in walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                found.setdefault(unparse(target), []).append(node.value)
    always = {unparse(s.targets[0]) for c in tree.body if isinstance(c, ast.ClassDef)
              for f in c.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"
              for s in f.body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Call)}
    return {name for name, values in found.items() if name in always and len(values) == 1}


# --- decide ---------------------------------------------------------------------------------------

def is_literal(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


# Kinds of expressions that Known may name.
KEYS = (ast.Name, ast.Attribute, ast.Compare, ast.BoolOp, ast.Call, ast.Subscript, ast.IfExp)


class Decider:
    """One round of decisions."""

    def __init__(self, text: str, known: Known, made: frozenset[str]):
        self.text, self.known = Text(text), known
        self.made = made    # self attributes that are never None

    def value(self, node: ast.expr) -> object:
        """Raises Unknown."""
        if isinstance(node, ast.Constant):
            return node.value
        word = unparse(node) if isinstance(node, KEYS) and node.end_lineno - node.lineno < 2 else ""
        if word in self.known.values:
            return self.known.values[word]
        if isinstance(node, ast.Attribute):
            owner = unparse(node.value)
            if owner in self.known.objects and hasattr(self.known.objects[owner], node.attr):
                return getattr(self.known.objects[owner], node.attr)
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            return tuple(self.value(e) for e in node.elts)
        elif isinstance(node, ast.Subscript):
            owner, index = self.value(node.value), self.value(node.slice)
            if isinstance(owner, tuple) and isinstance(index, int) and index < len(owner):
                return owner[index]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self.value(node.operand)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.value(node.operand)
        elif isinstance(node, ast.IfExp):
            return self.value(node.body if self.value(node.test) else node.orelse)
        elif isinstance(node, ast.BoolOp):
            return self.bool_op(node)
        elif word.endswith(" is not None") and word.removesuffix(" is not None") in self.made:
            return True
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.value(node.left), self.value(node.comparators[0])
            if TRUE is not left and TRUE is not right:
                return COMPARE[type(node.ops[0])](left, right)
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            if self.is_constant(node):
                return ARITHMETIC[type(node.op)](self.value(node.left), self.value(node.right))
        elif word.endswith(".get(None)"):
            return None
        elif word == "math.sqrt(1.0)":
            return 1.0
        raise Unknown

    @staticmethod
    def is_constant(node: ast.BinOp) -> bool:
        return all(isinstance(x, ast.Tuple) or (isinstance(x, ast.Constant) and isinstance(
            x.value, int | float)) for x in (node.left, node.right))

    def bool_op(self, node: ast.BoolOp) -> object:
        decisive = isinstance(node.op, ast.Or)  # the truth that ends an `or`
        unknown, last = False, None
        for operand in node.values:
            try:
                last = self.value(operand)
            except Unknown:
                unknown = True
                continue
            if bool(last) == decisive:
                if not unknown:
                    return last
                if not decisive or last is True:
                    return decisive
                raise Unknown
        if unknown:
            raise Unknown
        return last

    def decided(self, node: ast.expr) -> tuple[bool, object]:
        try:
            return True, self.value(node)
        except Unknown:
            return False, None

    def expression(self, node: ast.AST) -> None:
        text, word = self.text, ""
        if isinstance(node, KEYS) and (  # longer expressions are no keys, and slow to unparse
                node.end_lineno - node.lineno < 2):
            word = unparse(node)
        if word in self.known.sources and not isinstance(getattr(node, "ctx", None), ast.Store):
            return text.replace(node, self.known.sources[word])
        if isinstance(node, ast.Constant | ast.JoinedStr):
            return None
        if isinstance(node, ast.IfExp):
            ok, value = self.decided(node.test)
            if ok:
                return text.replace(node, text.source(node.body if value else node.orelse))
        ok, value = self.decided(node) if isinstance(node, ast.expr) else (False, None)
        if ok and isinstance(node, ast.BoolOp) and not isinstance(value, bool):
            for operand in node.values:
                if self.decided(operand) == (True, value):
                    return text.replace(node, text.source(operand))
        if ok and not isinstance(getattr(node, "ctx", None), ast.Store):
            is_field = isinstance(node, ast.Attribute) and word not in self.known.values
            if is_field and isinstance(value, int | float | tuple) and value and (
                    not isinstance(value, bool)):
                self.known.constants[node.attr.upper()] = value
                return text.replace(node, node.attr.upper())
            if is_literal(value) and not (
                    isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)):
                return text.replace(node, quoted(value))
        if isinstance(node, ast.BoolOp):
            decisive = isinstance(node.op, ast.Or)
            kept = []
            for operand in node.values:
                ok, value = self.decided(operand)
                if not (ok and bool(value) != decisive):
                    kept.append(operand)
            if 0 < len(kept) < len(node.values):
                joined = f" {'or' if decisive else 'and'} ".join(map(text.source, kept))
                return text.replace(node, joined)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and isinstance(
                node.operand, ast.Compare) and isinstance(node.operand.ops[0], ast.Eq):
            sides = node.operand.left, node.operand.comparators[0]
            return text.replace(node, " != ".join(map(text.source, sides)))
        elif isinstance(node, ast.BinOp):
            simpler = self.simpler(node)
            if simpler is not None:
                return text.replace(node, simpler)
        elif isinstance(node, ast.Call):
            if unparse(node.func) == "F.linear" and len(node.args) == 3 and unparse(
                    node.args[2]) == "None":
                return text.replace(node, f"F.linear({', '.join(map(text.source, node.args[:2]))})")
            if any(k.arg == "out" and unparse(k.value) == "None" for k in node.keywords):
                rest = [*node.args, *(k for k in node.keywords if k.arg != "out")]
                return text.replace(node, f"{text.source(node.func)}("
                                    f"{', '.join(map(text.source, rest))})")
        elif isinstance(node, ast.Tuple) and any(isinstance(e, ast.Starred) and isinstance(
                e.value, ast.List) for e in node.elts):
            elements = [x for e in node.elts for x in (
                e.value.elts if isinstance(e, ast.Starred) else [e])]
            return text.replace(node, ", ".join(map(text.source, elements)))
        for child in children(node):
            self.visit(child)
        return None

    def simpler(self, node: ast.BinOp) -> str | None:
        """x * 1.0 and x + 0.0 are x, x * 0.0 is 0.0."""
        for one, other in ((node.left, node.right), (node.right, node.left)):
            if not (isinstance(one, ast.Constant) and type(one.value) in (int, float)):
                continue
            keep = self.text.source(other)
            if isinstance(node.op, ast.Mult | ast.Div) and (one is node.right or isinstance(
                    node.op, ast.Mult)):
                if one.value == 1:
                    return f"({keep})" if isinstance(other, ast.BinOp) else keep
                if one.value == 0 and isinstance(node.op, ast.Mult):
                    return "0.0"
            if one.value == 0 and (isinstance(node.op, ast.Add) or (
                    isinstance(node.op, ast.Sub) and one is node.right)):
                return keep
        return None

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.If):
            ok, value = self.decided(node.test)
            if ok:
                return self.take_branch(node, bool(value))
        if isinstance(node, ast.With) and unparse(node.items[0]) in self.known.sources:
            body = self.block(node.body, node.body[0].lineno, node.col_offset)
            return self.text.replace_lines(node.lineno, node.end_lineno, body)
        if isinstance(node, ast.Raise):
            return None
        if isinstance(node, ast.stmt) and unparse(node) in self.known.dropped:
            return self.text.drop(node)
        return self.expression(node)

    def block(self, body: list[ast.stmt], first: int, indent: int) -> str:
        """The lines of a block from `first` on, at another indentation."""
        lines = b"".join(self.text.lines[first - 1:body[-1].end_lineno]).decode()
        return textwrap.indent(textwrap.dedent(lines), " " * indent)

    def take_branch(self, node: ast.If, taken: bool) -> None:
        text, indent = self.text, " " * node.col_offset
        branch = node.body if taken else node.orelse
        head = text.lines[node.lineno - 1].decode()
        is_elif = head.lstrip().startswith("elif")
        first = node.lineno if is_elif else text.comments_above(node.lineno)
        if not branch:
            if is_elif:
                return text.replace_lines(node.lineno, node.end_lineno)
            return text.replace_lines(first, node.end_lineno)
        above = b"".join(text.lines[first - 1:node.lineno - 1]).decode() if taken else ""
        if not taken:
            start = branch[0].lineno
            lines = text.lines[start - 1].decode()
            if lines.lstrip().startswith("elif"):
                rest = b"".join(text.lines[start - 1:node.end_lineno]).decode()
                rest = rest if is_elif else rest.replace("elif", "if", 1)
                return text.replace_lines(first, node.end_lineno, rest)
            start = node.body[-1].end_lineno + 1
            while not text.lines[start - 1].lstrip().startswith(b"else"):
                start += 1
            head = text.lines[start - 1].decode()
            start += 1
        else:
            start = max(node.test.end_lineno, node.lineno) + 1
        note = head.split("  # ", 1)[1].strip() if "  # " in head else ""
        deeper = len(indent) + 4 * is_elif
        body = self.block(branch, start, deeper)
        if note:
            lines = body.splitlines(keepends=True)
            one = f"{lines[0].rstrip()}  # {note}\n"
            if "  # " not in lines[0] and len(lines) == 1 and len(one) <= WIDTH + 1:
                body = one
            else:
                body = f"{' ' * deeper}# {note}\n{body}"
        if is_elif:
            return text.replace_lines(node.lineno, node.end_lineno, f"{indent}else:\n{body}")
        return text.replace_lines(first, node.end_lineno, above + body)

    def run(self) -> str:
        for node in self.text.tree.body:
            self.visit(node)
        return self.text.apply()


# --- calls and scopes -----------------------------------------------------------------------------

def names_read(node: ast.AST) -> Counter:
    return Counter(n.id for n in walk(node)
                   if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store))


def attributes_read(node: ast.AST) -> set[str]:
    return {n.attr for n in walk(node)
            if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Store)
            and not unparse(n.value).startswith("torch")}


def shadowed(function: FUNCTION) -> set[str]:
    """Names that are a function's own."""
    if hasattr(function, "own_names"):
        return function.own_names
    arguments = function.args
    function.own_names = {a.arg for a in (*arguments.args, *arguments.kwonlyargs)} | {
        n.id for n in walk(function) if isinstance(n, ast.Name)
        and isinstance(n.ctx, ast.Store)}
    return function.own_names


def visible_names(tree: ast.Module) -> list[ast.Name]:
    """global_names, kept with the tree."""
    if not hasattr(tree, "visible"):
        tree.visible = list(global_names(tree))
    return tree.visible


def global_names(node: ast.AST, own: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Reads of names that no function around them has as its own."""
    if isinstance(node, FUNCTION):
        for part in (*node.decorator_list, node.args, node.returns):
            if part is not None:
                yield from global_names(part, own)
        own = own | shadowed(node)
        for part in node.body:
            yield from global_names(part, own)
        return
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store) and node.id not in own:
        yield node
    for child in children(node):
        yield from global_names(child, own)


class Calls:
    """The functions of a program and the calls of each, as far as names tell."""

    def __init__(self, tree: ast.Module):
        self.functions: dict[str, FUNCTION] = {}
        self.is_method: dict[str, bool] = {}
        classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, FUNCTION):
                self.add(node.name, node, False)
        for name, node in classes.items():
            for method in node.body:
                if isinstance(method, FUNCTION):
                    self.add(f"{name}.{method.name}", method, True)
        owner = {m.name: f"{c}.{m.name}" for c, n in classes.items()
                 for m in n.body if isinstance(m, FUNCTION)}
        modules = {}    # self.attn -> Attention, block -> Block, model -> GPT
        for node in walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made = unparse(node.value.func)
                if made in classes:
                    modules |= {unparse(t): made for t in node.targets}
        modules |= {name.lower(): name for name in classes}
        self.calls: dict[str, list[ast.Call]] = {name: [] for name in self.functions}
        self.escapes: set[str] = set()  # used other than by a call
        called, visible = set(), {id(n) for n in visible_names(tree)}
        for node in walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name, target = unparse(node.func), None
            if name in self.functions:
                target = name if id(node.func) in visible else None
            elif name in classes:
                target = f"{name}.__init__"
            elif name in modules and f"{modules[name]}.forward" in self.functions:
                target = f"{modules[name]}.forward"
            elif isinstance(node.func, ast.Attribute) and node.func.attr in owner and (
                    not node.func.attr.startswith("__")):
                target = owner[node.func.attr]
            if target in self.functions:
                self.calls[target].append(node)
                called.add(id(node.func))
        for node in visible_names(tree):
            if node.id in self.functions and id(node) not in called:
                self.escapes.add(node.id)
        for node in walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in owner and id(node) not in called:
                self.escapes.add(owner[node.attr])

    def add(self, name: str, node: FUNCTION, is_method: bool) -> None:
        self.functions[name], self.is_method[name] = node, is_method

    def parameters(self, name: str) -> list[ast.arg]:
        arguments = self.functions[name].args
        return [*arguments.args[self.is_method[name]:], *arguments.kwonlyargs]

    def defaults(self, name: str) -> dict[str, ast.expr]:
        arguments = self.functions[name].args
        pairs = list(zip(reversed(arguments.args), reversed(arguments.defaults)))
        pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults) if d]
        return {a.arg: d for a, d in pairs}

    def changeable(self, name: str) -> bool:
        """Whether all uses of a function are calls that name their arguments."""
        return name not in self.escapes and bool(self.calls[name]) and not any(
            isinstance(a, ast.Starred) for c in self.calls[name] for a in c.args) and not any(
            k.arg is None for c in self.calls[name] for k in c.keywords)

    def bound(self, name: str, call: ast.Call) -> dict[str, ast.expr]:
        """Parameter -> argument, of those that are given."""
        names = [a.arg for a in self.parameters(name)]
        return dict(zip(names, call.args)) | {k.arg: k.value for k in call.keywords}


def calls_of(tree: ast.Module) -> Calls:
    """Calls, kept with the tree."""
    if not hasattr(tree, "calls"):
        tree.calls = Calls(tree)
    return tree.calls


def rewrite_signature(text: Text, calls: Calls, name: str, gone: set[str]) -> None:
    """Without the parameters `gone`, here and in all calls."""
    function, arguments = calls.functions[name], calls.functions[name].args
    defaults, parts = calls.defaults(name), []
    for i, a in enumerate([*arguments.args, *arguments.kwonlyargs]):
        if i == len(arguments.args):
            parts.append("*")
        if a.arg not in gone:
            default = defaults.get(a.arg)
            equals = " = " if a.annotation else "="
            parts.append(text.source(a) + (equals + text.source(default) if default else ""))
    if parts and parts[-1] == "*":
        parts.pop()
    everything = [*arguments.args, *arguments.kwonlyargs, *arguments.defaults,
                  *(d for d in arguments.kw_defaults if d)]
    spans = [text.span(a) for a in everything]
    start, stop = min(s for s, _ in spans), max(e for _, e in spans)
    while text.raw[stop:stop + 1] in (b",", b" ", b"\n"):
        stop += 1
    text.edits.append((start, stop, ", ".join(parts)))
    assert function.args.vararg is None
    for call in calls.calls[name]:
        if not call.args and not call.keywords:
            continue
        positional = [a.arg for a in calls.parameters(name)]
        kept = [text.source(a) for p, a in zip(positional, call.args) if p not in gone]
        kept += [text.source(k) for k in call.keywords if k.arg not in gone]
        end = text.span(call)[1]
        text.edits.append((text.span(call.func)[1], end, f"({', '.join(kept)})"))


# --- propagate ------------------------------------------------------------------------------------

def simple_value(node: ast.expr | None) -> bool:
    """Short constants, which may stand where their name did."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if isinstance(node, ast.BinOp):
        return Decider.is_constant(node)
    if isinstance(node, ast.Tuple):
        return all(isinstance(e, ast.Constant) for e in node.elts)
    return isinstance(node, ast.Constant)


def substitute(text: Text, scope: ast.AST, name: str, value: str) -> None:
    constant = ast.parse(value).body[0].value
    if isinstance(constant, ast.Constant):
        value = quoted(constant.value)
    if isinstance(constant, ast.BinOp):
        value = f"({value})"
    inside = {id(n) for s in walk(scope) if isinstance(s, ast.JoinedStr) for n in walk(s)}
    for node in walk(scope):
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load) and (
                id(node) not in inside):
            text.replace(node, value)


def assigned_names(scope: ast.AST) -> Counter:
    stores = Counter(n.id for n in walk(scope)
                     if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    for n in walk(scope):
        if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name):
            stores[n.target.id] += 2
    return stores


def propagate_parameters(text: Text) -> None:
    """Parameters that get the same constant in all calls."""
    calls = calls_of(text.tree)
    for name, function in calls.functions.items():
        if not calls.changeable(name):
            continue
        defaults, given = calls.defaults(name), [calls.bound(name, c) for c in calls.calls[name]]
        stores = assigned_names(function)
        for parameter in calls.parameters(name):
            values = [g.get(parameter.arg, defaults.get(parameter.arg)) for g in given]
            words = {unparse(v) for v in values if v is not None}
            if len(words) == 1 and all(map(simple_value, values)) and not stores[parameter.arg]:
                value = words.pop()

                def work(name=name, function=function, parameter=parameter.arg, value=value):
                    substitute(text, function, parameter, value)
                    rewrite_signature(text, calls, name, {parameter})
                if not text.attempt(work) and not text.edits:
                    work()  # a call within its own call: the outer edit first
                    return
                break


def propagate_locals(text: Text) -> None:
    """Locals that are assigned once, a constant."""
    for function in walk(text.tree):
        if not isinstance(function, FUNCTION):
            continue
        stores = assigned_names(function)
        for node in walk(function):
            if not isinstance(node, ast.Assign):
                continue
            pairs = [(t, node.value) for t in node.targets]
            if len(node.targets) == 1 and isinstance(node.targets[0], ast.Tuple) and isinstance(
                    node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts))
            for target, value in pairs:
                if isinstance(target, ast.Name) and simple_value(value) and (
                        stores[target.id] == 1) and names_read(function)[target.id]:
                    text.attempt(lambda f=function, t=target, v=value: substitute(
                        text, f, t.id, unparse(v)))


def propagate_attributes(text: Text) -> None:
    """Attributes of self that are assigned once, a constant."""
    for cls in text.tree.body:
        if not isinstance(cls, ast.ClassDef):
            continue
        found: dict[str, list[ast.expr]] = {}
        for node in walk(cls):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    for t in target.elts if isinstance(target, ast.Tuple) else [target]:
                        found.setdefault(unparse(t), []).append(node.value)
        for name, values in found.items():
            if name.startswith("self.") and len(values) == 1 and simple_value(values[0]):
                attribute = name.removeprefix("self.")
                reads = [n for n in walk(text.tree) if isinstance(n, ast.Attribute)
                         and n.attr == attribute]
                own = [n for n in walk(cls) if unparse(n) == name
                       and isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
                if own and len(reads) == len(own) + 1:
                    text.attempt(lambda own=own, v=values[0]: [
                        text.replace(n, unparse(v)) for n in own])


# --- prune ----------------------------------------------------------------------------------------

def prune_parameters(text: Text) -> None:
    calls = calls_of(text.tree)
    for name, function in calls.functions.items():
        reads = names_read(ast.Module(function.body, []))
        unused = {a.arg for a in calls.parameters(name)
                  if not reads[a.arg] and not assigned_names(function)[a.arg]}
        if unused and calls.changeable(name):
            def work(name=name, unused=unused):
                rewrite_signature(text, calls, name, unused)
            text.attempt(work)


def prune_returns(text: Text) -> None:
    """Elements of a returned tuple that no caller uses."""
    calls = calls_of(text.tree)
    parents = {id(n.value): (f, n) for f in walk(text.tree) if isinstance(f, FUNCTION)
               for n in walk(f) if isinstance(n, ast.Assign)}
    for name, function in calls.functions.items():
        returns = [n for n in walk(function) if isinstance(n, ast.Return)]
        users = [parents.get(id(c)) for c in calls.calls[name]]
        if not calls.changeable(name) or not returns or not all(users):
            continue
        targets = [node.targets[0] for _, node in users]
        if not all(isinstance(x, ast.Tuple) for x in (*targets, *(r.value for r in returns))):
            continue
        size = len(returns[0].value.elts)
        if {len(x.elts) for x in (*targets, *(r.value for r in returns))} != {size}:
            continue
        for i in range(size):
            if any(not isinstance(t.elts[i], ast.Name) or names_read(f)[t.elts[i].id]
                   for (f, _), t in zip(users, targets)):
                continue
            annotation = function.returns
            tuples = [*targets, *(r.value for r in returns)]
            if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
                tuples.append(annotation.slice)

            def work(tuples=tuples, annotation=annotation, i=i):
                for t in tuples:
                    rest = [text.source(e) for j, e in enumerate(t.elts) if j != i]
                    if t is tuples[-1] and len(rest) == 1 and isinstance(annotation, ast.Subscript):
                        text.replace(annotation, rest[0])
                    else:
                        text.replace(t, ", ".join(rest))
            text.attempt(work)
            break


def reachable(tree: ast.Module, keep: set[str]) -> set[str]:
    """Top-level functions and classes that the rest of the program, or one of `keep`, leads to."""
    reads = {n.name: {name.id for name in global_names(n)} for n in tree.body
             if isinstance(n, FUNCTION | ast.ClassDef)}
    found: set[str] = set()
    new = keep | {name for n in tree.body if not isinstance(n, FUNCTION | ast.ClassDef)
                  for name in names_read(n)}
    new &= {*reads, *keep}
    while new:
        found |= new
        new = {name for f in new for name in reads.get(f, ()) if name in reads} - found
    return found


def prune_statements(text: Text, keep: set[str]) -> None:
    """Unused locals, self attributes, fields, methods, functions, classes and imports."""
    tree = text.tree
    attributes = attributes_read(tree) | {
        n.attr for n in walk(tree) if isinstance(n, ast.Attribute) and n.attr == "grad"}
    all_names, alive = names_read(tree), reachable(tree, keep)

    def unused(target: ast.expr, reads: Counter) -> bool:
        if isinstance(target, ast.Name):
            return not reads[target.id] and target.id not in keep
        return isinstance(target, ast.Attribute) and target.attr not in attributes and (
            unparse(target.value) == "self")

    def assignment(node: ast.stmt, reads: Counter) -> None:
        if isinstance(node, ast.AnnAssign):
            if node.value is not None and unused(node.target, reads):
                text.drop(node)
            return
        gone = [t for t in node.targets if unused(t, reads)]
        if len(gone) == len(node.targets):
            text.drop(node)
        elif gone:
            left = [text.source(t) for t in node.targets if t not in gone]
            text.replace(node, " = ".join([*left, text.source(node.value)]))
        elif isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple) and len(
                node.targets) == 1:
            pairs = list(zip(node.targets[0].elts, node.value.elts))
            kept = [(t, v) for t, v in pairs if not unused(t, reads)]
            if not kept:
                text.drop(node)
            elif len(kept) < len(pairs):
                left, right = (", ".join(map(text.source, side)) for side in zip(*kept))
                text.replace(node, f"{left} = {right}")

    for node in walk(tree):
        if isinstance(node, FUNCTION):
            reads = names_read(node)
            for inner in walk(node):
                if isinstance(inner, ast.Assign | ast.AnnAssign):
                    assignment(inner, reads)
                elif isinstance(inner, FUNCTION) and inner is not node and not reads[inner.name]:
                    text.drop(inner)
                elif isinstance(inner, ast.For) and isinstance(inner.target, ast.Tuple) and (
                        unparse(inner.iter).startswith("enumerate(")):
                    i, item = inner.target.elts
                    if not reads[i.id]:
                        text.replace(inner.target, text.source(item).strip("()"))
                        text.replace(inner.iter, text.source(inner.iter.args[0]))
                elif isinstance(inner, ast.comprehension) and (
                        unparse(inner.iter) == "enumerate(self.plan)"):
                    i, item = inner.target.elts
                    if not reads[item.id]:
                        used = names_read(next(
                            n for n in walk(node) if inner in getattr(n, "generators", ())))
                        text.replace(inner.target, i.id if used[i.id] else "_")
                        text.replace(inner.iter, "range(NUM_LAYERS)")
                    elif not reads[i.id]:
                        text.replace(inner.target, item.id)
                        text.replace(inner.iter, "self.plan")
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            assignment(node, all_names)
        elif isinstance(node, FUNCTION | ast.ClassDef):
            if node.name not in alive:
                text.drop(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            kept = [a for a in node.names
                    if all_names[(a.asname or a.name).split(".")[0]]]
            if not kept:
                text.drop(node)
            elif len(kept) < len(node.names):
                text.replace(node, unparse(type(node)(
                    **{**{f: getattr(node, f) for f in node._fields}, "names": kept})))
        if isinstance(node, ast.ClassDef):
            prune_class(text, node, attributes)


# What torch calls or reads by itself.
OF_TORCH = {"forward", "reset_parameters"}


def prune_class(text: Text, cls: ast.ClassDef, attributes: set[str]) -> None:
    named_tuple = any(unparse(b) == "NamedTuple" for b in cls.bases)
    fields = {n.attr for n in walk(text.tree) if isinstance(n, ast.Attribute)
              and unparse(n.value).split(".")[-1] == cls.name.lower()}
    positional = any(isinstance(n, ast.Call) and unparse(n.func) == cls.name and n.args
                     for n in walk(text.tree))
    for node in cls.body:
        if isinstance(node, FUNCTION) and node.name not in attributes | OF_TORCH and (
                not node.name.startswith("__")):
            text.drop(node)
        elif named_tuple and isinstance(node, ast.AnnAssign) and (
                node.target.id not in fields and not positional):
            text.drop(node)
            for call in walk(text.tree):
                if isinstance(call, ast.Call) and unparse(call.func) == cls.name:
                    kept = [k for k in call.keywords if k.arg != node.target.id]
                    if len(kept) < len(call.keywords):
                        inside = ", ".join(map(text.source, kept))
                        text.replace(call, f"{cls.name}({inside})")
            return
    for node in walk(cls):
        if isinstance(node, ast.Expr) and unparse(node).startswith("self.register_buffer("):
            name = node.value.args[0]
            if isinstance(name, ast.Constant) and name.value not in attributes:
                text.drop(node)
        if isinstance(node, ast.For) and len(node.body) == 1 and unparse(
                node.body[0]).startswith("self.register_buffer(") and isinstance(
                node.iter, ast.Tuple) and not {e.value for e in node.iter.elts} & attributes:
            text.drop(node)


def prune_shared(text: Text) -> None:
    """Entries of the dict `shared` that no layer reads."""
    read = {unparse(n.slice) for n in walk(text.tree) if isinstance(n, ast.Subscript)
            and unparse(n.value) == "shared" and isinstance(n.ctx, ast.Load)}
    for node in walk(text.tree):
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if unparse(target) == "shared" and isinstance(node.value, ast.Dict):
            pairs = list(zip(node.value.keys, node.value.values))
            kept = [p for p in pairs if unparse(p[0]) in read]
            if len(kept) < len(pairs):
                inside = ", ".join(f"{text.source(k)}: {text.source(v)}" for k, v in kept)
                text.replace(node.value, f"{{{inside}}}")
        elif isinstance(target, ast.Subscript) and unparse(target.value) == "shared" and (
                unparse(target.slice) not in read):
            text.drop(node)


def prune_empty(text: Text) -> None:
    """Calls of functions that do nothing."""
    empty = {n.name for n in text.tree.body if isinstance(n, FUNCTION) and len(n.body) == 1
             and isinstance(n.body[0], ast.Expr) and isinstance(n.body[0].value, ast.Constant)}
    for node in walk(text.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and unparse(
                node.value.func) in empty:
            text.drop(node)


def prune_unreachable(text: Text) -> None:
    """Statements behind a return, a None that the same block replaces."""
    for node in walk(text.tree):
        if isinstance(node, FUNCTION) and node.name == "__init__":
            for i, early in enumerate(node.body):
                if isinstance(early, ast.Assign) and unparse(early.value) == "None":
                    later = {unparse(s.targets[0]) for s in node.body[i + 1:]
                             if isinstance(s, ast.Assign)}
                    kept = [t for t in early.targets if unparse(t) not in later]
                    if not kept:
                        text.drop(early)
                    elif len(kept) < len(early.targets):
                        text.replace(early, " = ".join([*map(text.source, kept), "None"]))
    for node in walk(text.tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for i, statement in enumerate(body if isinstance(body, list) else []):
                if isinstance(statement, ast.Return | ast.Continue) and i + 1 < len(body):
                    text.replace_lines(statement.end_lineno + 1, body[-1].end_lineno)
                    break


# --- the whole ------------------------------------------------------------------------------------

def chunks(text: str) -> list[str]:
    """The text of each top-level statement, with what is above it."""
    edited, found, start = Text(text), [], 0
    for node in edited.tree.body:
        end = edited.starts[node.end_lineno]
        found.append(edited.raw[start:end].decode())
        start = end
    return [*found, edited.raw[start:].decode()]


def fold_chunk(text: str, known: Known, made: frozenset[str]) -> str:
    """What can be decided in a top-level statement by itself."""
    while True:
        before = text
        text = Decider(text, known, made).run()
        for work in (prune_unreachable, propagate_locals):
            edited = Text(text)
            work(edited)
            text = edited.apply()
        if text == before:
            return text


def fold(text: str, known: Known, keep: set[str]) -> str:
    """The text with everything decided that `known` decides; top-level names in `keep` stay."""
    folded: dict[tuple, str] = {}
    while True:
        before, parts, made = text, [], frozenset(made_always(parsed(text)))
        for part in chunks(text):
            key = (part, made if "is not None" in part else None)
            if key not in folded:
                folded[key] = fold_chunk(part, known, made)
                folded[folded[key], key[1]] = folded[key]
            parts.append(folded[key])
        edited = Text("".join(parts))
        prune_statements(edited, keep)
        prune_empty(edited)
        prune_shared(edited)
        prune_returns(edited)
        propagate_attributes(edited)
        propagate_parameters(edited)
        prune_parameters(edited)
        text = edited.apply()
        if text == before:
            return text
