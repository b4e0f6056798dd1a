"""Fold a program: decide what a frozen configuration decides, drop what is then unused.

    fold(tree, Known(names={"c": config}, values={"x.y()": 3}), keep={"main"})

Works in place on a tree of flat.tree, so that what does not change is printed as it was written.
Passes repeat until none finds anything:

    decide      an expression of known names becomes its value or the name of a constant, a decided
                `if` its branch
    propagate   a local, a parameter or an attribute of self that only ever has one constant value,
                or is another name of something, becomes that
    prune       parameters, locals, attributes, methods, functions, imports that nothing reads go
    inline      at last, functions that Known names go where they are called

Names are enough to tell what is called and read where: the programs that we fold have no two
methods of one name, and touch attributes by their names alone.
"""

import ast
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from flat.tree import FIELDS, Note, blocks, children, dotted, is_docstring, walk

FUNCTION = ast.FunctionDef
ENDS = ast.Return | ast.Continue | ast.Break | ast.Raise


class Unknown(Exception):
    """The configuration does not decide this expression."""


@dataclass
class Known:
    """What is decided: names, and expressions by their text."""

    names: dict[str, object] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)     # text of an expression -> value
    sources: dict[str, str] = field(default_factory=dict)       # -> another text; with-item -> ""
    dropped: set[str] = field(default_factory=set)              # texts of statements
    inlined: set[str] = field(default_factory=set)              # functions
    # found while folding
    constants: dict[str, object] = field(default_factory=dict)  # NAME -> value
    chosen: dict[str, set] = field(default_factory=dict)    # unit -> strings that are a decided
    rejected: dict[str, set] = field(default_factory=dict)  # value, and those that it is not
    used: set[str] = field(default_factory=set)             # texts and functions that were met

    def index(self) -> None:
        """The texts in one form, and by a mark that is cheaper to compare."""
        def normal(text: str) -> str:
            node = ast.parse(text).body[0]
            node = node.value if isinstance(node, ast.Expr) else node
            self.marks.add(mark(node))
            return ast.unparse(node)

        self.marks: set[tuple] = set()
        self.values = {normal(text): value for text, value in self.values.items()}
        self.sources = {normal(text): other for text, other in self.sources.items()}
        self.dropped = {normal(text) for text in self.dropped}

    def text(self, node: ast.AST) -> str:
        """The text of `node` if it is known, else nothing."""
        if mark(node) in self.marks:
            word = ast.unparse(node)
            if word in self.values or word in self.sources or word in self.dropped:
                self.used.add(word)
                return word
        return ""


def mark(node: ast.AST) -> tuple:
    """The kind of a node and the first name in it."""
    kind = type(node)
    while type(node) is not ast.Name and (inside := children(node)):
        node = inside[0]
    return kind, getattr(node, "id", None)


# --- trees ----------------------------------------------------------------------------------------

def mapped(node: ast.AST, change: Callable[[ast.AST], ast.AST]) -> ast.AST:
    """`node` with `change` applied to each of its children."""
    for name in FIELDS[type(node)]:
        value = getattr(node, name)
        if type(value) is list:
            for i, item in enumerate(value):
                new = item and change(item)
                if new is not item:
                    value[i], node.dirty = new, True
        elif value is not None:
            new = change(value)
            if new is not value:
                setattr(node, name, new)
                node.dirty = True
    return node


def substitute(node: ast.AST, values: dict[str, ast.expr]) -> ast.AST:
    """`node` with copies of `values` for the names that are read (a.b as well), but in joined
    strings."""
    name = dotted(node)
    if name in values and isinstance(node.ctx, ast.Load):
        return copy.deepcopy(values[name])
    if isinstance(node, ast.JoinedStr):
        return node
    return mapped(node, lambda child: substitute(child, values))


def replace(node: ast.AST, old: ast.expr, new: ast.expr) -> ast.AST:
    return new if node is old else mapped(node, lambda child: replace(child, old, new))


def in_strings(nodes: list[ast.AST]) -> set[str]:
    """Names in joined strings."""
    return {n.id for s in nodes if isinstance(s, ast.JoinedStr) for n in walk(s)
            if isinstance(n, ast.Name)}


def names_read(nodes: list[ast.AST]) -> Counter:
    return Counter([n.id for n in nodes if type(n) is ast.Name and type(n.ctx) is not ast.Store])


def names_stored(nodes: list[ast.AST]) -> Counter:
    """How often each name is assigned; an augmented assignment counts more."""
    found = [n.id for n in nodes if type(n) is ast.Name and type(n.ctx) is ast.Store]
    return Counter(found + [n.target.id for n in nodes if type(n) is ast.AugAssign
                            and isinstance(n.target, ast.Name)])


def parameters_of(function: FUNCTION) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]


def functions_in(unit: ast.stmt) -> list[FUNCTION]:
    """All functions in a top-level statement, outer ones first."""
    found = [unit] if isinstance(unit, FUNCTION) else []
    return found + [n for body in blocks(unit) for n in body if isinstance(n, FUNCTION)]


def without(body: list[ast.stmt], gone: ast.stmt) -> None:
    """Take a statement out of its block; one that would be empty keeps `pass`."""
    at = next(i for i, node in enumerate(body) if node is gone)
    del body[at]
    if at < len(body) and gone.blank:
        body[at].blank = True
    if not body:
        body.append(statement("pass"))


def statement(text: str) -> ast.stmt:
    node = ast.parse(text).body[0]
    node.above, node.beside, node.blank, node.otherwise = [], "", False, ""
    node.dirty = True
    return node


def parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


# --- decide ---------------------------------------------------------------------------------------

class Decider:
    """One round of decisions in a top-level statement."""

    def __init__(self, known: Known, unit: ast.stmt):
        self.known, self.changed = known, False
        self.rejected = known.rejected.setdefault(getattr(unit, "name", ""), set())
        self.chosen = known.chosen.setdefault(getattr(unit, "name", ""), set())

    def value(self, node: ast.expr) -> object:
        """Raises Unknown."""
        if isinstance(node, ast.Constant):
            return node.value
        word = self.known.text(node)
        if word in self.known.values:
            return self.known.values[word]
        match node:
            case ast.BoolOp():
                return self.bool_op(node)
            case ast.Tuple():
                return tuple(map(self.value, node.elts))
            case ast.UnaryOp(op=ast.Not()):
                return not self.value(node.operand)
            case ast.IfExp():
                return self.value(node.body if self.value(node.test) else node.orelse)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                scope = {"a": self.value(left), "b": self.value(right)}
                for word in scope["b"] if isinstance(scope["b"], tuple) else (scope["b"],):
                    if isinstance(word, str):
                        (self.chosen if word == scope["a"] else self.rejected).add(word)
                a_and_b = ast.Compare(ast.Name("a"), [op], [ast.Name("b")])
                return eval(ast.unparse(a_and_b), scope)
        names = self.known.names | self.known.constants
        if mark(node)[1] in names and not isinstance(node, ast.Slice | ast.Starred) and (
                names_read(walk(node)).keys() <= names.keys()):
            try:
                return eval(ast.unparse(node), names)
            except (AttributeError, KeyError) as error:
                raise Unknown from error
        raise Unknown

    def bool_op(self, node: ast.BoolOp) -> object:
        decisive = isinstance(node.op, ast.Or)  # the truth that ends an `or`
        unknown, last = False, None
        for operand in node.values:
            ok, value = self.decided(operand)
            if ok and bool(value) == decisive and (not unknown or value in (True, False, None)):
                return decisive if unknown else value
            unknown, last = unknown or not ok, value
        if unknown:
            raise Unknown
        return last

    def decided(self, node: ast.expr) -> tuple[bool, object]:
        try:
            return True, self.value(node)
        except Unknown:
            return False, None

    def expression(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.JoinedStr | ast.Constant):
            return node
        if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), ast.Store):
            new = self.simpler(node)
            if new is not node:
                self.changed = True
                return self.expression(new)
        return mapped(node, self.expression)

    def simpler(self, node: ast.expr) -> ast.expr:
        word = self.known.text(node)
        if word in self.known.sources:
            return parsed(self.known.sources[word])
        match node:
            case ast.IfExp():
                ok, value = self.decided(node.test)
                if ok:
                    return node.body if value else node.orelse
            case ast.BinOp():
                return simpler_product(node)
            case ast.UnaryOp(op=ast.USub()):
                return node
            case ast.Name() if word not in self.known.values:
                return node
        ok, value = self.decided(node)
        if ok and isinstance(node, ast.BoolOp) and not isinstance(value, bool):
            return next(x for x in node.values if self.decided(x) == (True, value))
        if ok and isinstance(node, ast.Attribute) and word not in self.known.values and value and (
                isinstance(value, int | float | tuple) and not isinstance(value, bool)):
            self.known.constants[node.attr.upper()] = value
            return ast.Name(node.attr.upper(), ast.Load())
        if ok and (value is None or isinstance(value, bool | int | float | str)):
            return ast.Constant(value)
        if ok and repr(value).startswith("torch."):
            return parsed(repr(value))
        match node:
            case ast.BoolOp():
                decisive = isinstance(node.op, ast.Or)
                found = [(x, *self.decided(x)) for x in node.values]
                kept = [x for x, ok, value in found if not (ok and bool(value) != decisive)]
                if 0 < len(kept) < len(node.values):
                    return kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)
            case ast.UnaryOp(op=ast.Not(), operand=ast.Compare(ops=[ast.Eq()]) as inner):
                return ast.Compare(inner.left, [ast.NotEq()], inner.comparators)
            case ast.Call(func=ast.Attribute(attr="linear"), args=[x, w, ast.Constant(value=None)]):
                return ast.Call(node.func, [x, w], node.keywords)
        return node

    # --- statements

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        blank = False
        for node in body:
            new = self.statement(node)
            blank = blank or (node.blank and not new)
            if new and blank:
                new[0].blank, blank = True, False
            found += new
            if found and isinstance(found[-1], ENDS) and node is not body[-1]:
                self.changed = True
                break
        return found

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        """What becomes of a statement."""
        if isinstance(node, Note | ast.Raise | ast.Try):
            return [node]
        inside = node.value if isinstance(node, ast.Expr) else node
        if self.known.text(inside) in self.known.dropped:
            self.changed = True
            return []
        match node:
            case ast.If():
                ok, value = self.decided(node.test)
                if ok:
                    self.changed = True
                    return self.block(branch(node, bool(value)))
                node.body, node.orelse = self.block(node.body), self.block(node.orelse)
                if not node.body and node.orelse:
                    node.test, node.beside = ast.UnaryOp(ast.Not(), node.test), node.otherwise
                    node.body, node.orelse, node.otherwise = node.orelse, [], ""
            case ast.With(items=[item]) if self.known.sources.get(self.known.text(
                    item.context_expr)) == "":
                self.changed = True
                return self.block(lifted(node, node.body, node.beside))
            case ast.For(iter=ast.Tuple(elts=[only]), target=ast.Name(id=name)):
                self.changed = True
                node.body = [substitute(part, {name: only}) for part in node.body]
                return self.block(lifted(node, node.body, node.beside))
            case FUNCTION() | ast.ClassDef():
                node.body = self.block(node.body) or [statement("pass")]
            case ast.For() | ast.While() | ast.With():
                node.body = self.block(node.body)
        if getattr(node, "body", True) == []:
            self.changed = True
            return []
        mapped(node, lambda part: part if isinstance(part, ast.stmt) else self.expression(part))
        return [node]


def branch(node: ast.If, taken: bool) -> list[ast.stmt]:
    body = node.body if taken else node.orelse
    note = node.beside if taken else node.otherwise
    if taken and isinstance(getattr(node.test, "operand", None), ast.BoolOp):
        note = ""  # `if not (x and y):  # about x and y`
    return lifted(node, body, note, node.above if taken else []) if body else []


def lifted(node: ast.stmt, body: list[ast.stmt], note: str, above: list[str] | None = None
           ) -> list[ast.stmt]:
    """`body` in the place of its statement `node`, whose comments go along."""
    first = body[0]
    first.blank = node.blank
    one = len(body) == 1 and len(getattr(first, "lines", ())) == 1
    if note and one and not (hasattr(first, "body") or first.beside or first.above):
        first.beside, first.gap = note, "  "
    elif note:
        first.above = [note, *first.above]
    first.above = [*(node.above if above is None else above), *first.above]
    return body


def simpler_product(node: ast.BinOp) -> ast.expr:
    """x * 1.0 and x + 0.0 are x, x * 0.0 is 0.0."""
    left, right = (getattr(side, "value", None) if isinstance(side, ast.Constant) else None
                   for side in (node.left, node.right))
    op, neutral = type(node.op), {ast.Mult: 1, ast.Div: 1, ast.Add: 0, ast.Sub: 0}
    if op is ast.Mult and 0 in (left, right):
        return ast.Constant(0.0)
    if op in neutral and right == neutral[op]:
        return node.left
    return node.right if op in (ast.Mult, ast.Add) and left == neutral[op] else node


# --- inside a function ----------------------------------------------------------------------------

def is_simple(node: ast.expr | None) -> bool:
    """A short constant, which may be written where its name was."""
    match node:
        case ast.Constant():
            return True
        case ast.Name():
            return node.id.isupper() and len(node.id) > 1
        case ast.Attribute(value=ast.Name(id="torch")):
            return True
        case ast.UnaryOp(op=ast.USub()):
            return is_simple(node.operand)
        case ast.BinOp():
            return not isinstance(node.left, ast.BinOp) and is_simple(node.left) and (
                not isinstance(node.right, ast.BinOp)) and is_simple(node.right)
        case ast.Tuple():
            return all(is_simple(e) and not isinstance(e, ast.Tuple) for e in node.elts)
    return False


def pairs_of(node: ast.stmt) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, those of tuples one by one."""
    if not isinstance(node, ast.Assign):
        return []
    first = node.targets[0]
    if len(node.targets) == 1 and isinstance(first, ast.Tuple) and isinstance(
            node.value, ast.Tuple) and len(first.elts) == len(node.value.elts):
        return list(zip(first.elts, node.value.elts))
    return [(target, node.value) for target in node.targets]


class Scope:
    """The nodes of a function and its names."""

    def __init__(self, function: FUNCTION):
        self.function, self.nodes = function, walk(function)
        self.reads, self.stores = names_read(self.nodes), names_stored(self.nodes)
        self.own = {a.arg for a in parameters_of(function)}
        self.inner = {n.arg for n in self.nodes if isinstance(n, ast.arg)} - self.own


def propagate_locals(unit: ast.stmt) -> bool:
    """Locals that are assigned once, and are a constant or another name of a local."""
    changed = False
    for scope in map(Scope, functions_in(unit)):
        looped = {id(n) for loop in scope.nodes if isinstance(loop, ast.For | ast.While)
                  for body in blocks(loop) for n in body}
        hidden, values = in_strings(scope.nodes) | scope.inner | scope.own, {}
        for node in scope.nodes:
            for target, value in pairs_of(node):
                name, other = getattr(target, "id", None), getattr(value, "id", None)
                once = scope.stores[name] == 1 and scope.reads[name] and name not in hidden
                alias = other not in {None, *scope.inner} and id(node) not in looped and (
                    scope.stores[other] == (other not in scope.own))
                told = isinstance(value, ast.BinOp) and (node.above or node.beside)
                if once and not told and (alias or is_simple(value)):
                    values[name] = value
        values = {name: value for name, value in values.items()
                  if not (names_read(walk(value)).keys() & values.keys())}
        if values:
            scope.function.body = [substitute(node, values) for node in scope.function.body]
            changed = True
    return changed


def prune_locals(unit: ast.stmt) -> bool:
    """Locals that nothing reads."""
    changed = False
    for scope in map(Scope, functions_in(unit)):
        def unread(target: ast.expr, reads=scope.reads) -> bool:
            return isinstance(target, ast.Name) and not reads[target.id]

        for body in blocks(scope.function):
            for node in list(body):
                if isinstance(node, FUNCTION) and not scope.reads[node.name]:
                    without(body, node)
                    changed = True
                else:
                    changed |= prune_assignment(body, node, unread)
    return changed


def prune_assignment(body: list[ast.stmt], node: ast.stmt, unread: Callable) -> bool:
    """Take from an assignment the targets that are unread, or are what they are assigned."""
    if isinstance(node, ast.AnnAssign):
        gone = node.value is not None and unread(node.target)
        if gone:
            without(body, node)
        return gone
    pairs = pairs_of(node)
    kept = [(t, v) for t, v in pairs if not unread(t) and not (
        isinstance(t, ast.Name) and t.id == getattr(v, "id", None))]
    if len(kept) == len(pairs):
        return False
    node.dirty = True
    if not kept:
        without(body, node)
    elif len(node.targets) > 1:
        node.targets = [t for t, _ in kept]
    elif len(kept) == 1:
        [(node.targets[0], node.value)] = kept
    else:
        node.targets[0].elts, node.value.elts = ([*side] for side in zip(*kept))
        node.targets[0].dirty = node.value.dirty = True
    return True


# --- the program ----------------------------------------------------------------------------------

def global_names(node: ast.AST) -> list[ast.Name]:
    """Reads of names that no function around them has as its own."""
    found, left = [], [(node, frozenset())]
    while left:
        node, own = left.pop()
        if isinstance(node, FUNCTION):
            names = own | {a.arg for a in parameters_of(node)} | names_stored(walk(node)).keys()
            left += [(part, own) for part in (*node.decorator_list, node.args, node.returns)
                     if part is not None]
            left += [(part, names) for part in node.body]
        elif isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Store) and node.id not in own:
                found.append(node)
        else:
            left += [(part, own) for part in children(node)]
    return found


class Facts:
    """What passes over the whole program ask of one top-level statement."""

    def __init__(self, unit: ast.stmt, modules: set[str]):
        nodes = walk(unit)
        self.names, self.visible = names_read(nodes), global_names(unit)
        self.attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
        self.loads = {n.attr for n in self.attributes if not isinstance(n.ctx, ast.Store)
                      and dotted(n.value).split(".")[0] not in modules}
        self.calls = [n for n in nodes if isinstance(n, ast.Call)]
        self.assigned: dict[str, list[ast.expr]] = {}   # text of a target -> values
        for node in nodes:
            for target, value in pairs_of(node):
                self.assigned.setdefault(dotted(target), []).append(value)


class Program:
    """The top-level statements, with facts that are kept until a statement changes."""

    def __init__(self, tree: ast.Module, known: Known, keep: set[str]):
        self.tree, self.known, self.keep = tree, known, keep
        self.changed = list(tree.body)
        self.modules = {(a.asname or a.name).split(".")[0] for unit in tree.body
                        if isinstance(unit, ast.Import) for a in unit.names}

    def touch(self, unit: ast.stmt) -> None:
        unit.facts = None
        if unit not in self.changed:
            self.changed.append(unit)

    def all(self) -> list[tuple[ast.stmt, Facts]]:
        for unit in self.tree.body:
            if getattr(unit, "facts", None) is None:
                unit.facts = Facts(unit, self.modules)
        return [(unit, unit.facts) for unit in self.tree.body]


class Calls:
    """The functions of a program and the calls of each, as far as names tell. A method's name here
    is Class.method."""

    def __init__(self, program: Program):
        self.functions: dict[str, FUNCTION] = {}
        self.unit: dict[str, ast.stmt] = {}
        made: dict[str, str] = {}   # self.attn -> Attention, block -> Block, model -> GPT
        everything = program.all()
        for unit, _ in everything:
            if isinstance(unit, FUNCTION):
                self.functions[unit.name], self.unit[unit.name] = unit, unit
            for method in unit.body if isinstance(unit, ast.ClassDef) else ():
                if isinstance(method, FUNCTION):
                    name = f"{unit.name}.{method.name}"
                    self.functions[name], self.unit[name] = method, unit
        classes = {u.name for u in program.tree.body if isinstance(u, ast.ClassDef)}
        for _, facts in everything:
            made |= {name: dotted(call.func) for name, values in facts.assigned.items()
                     for value in values
                     for call in ([value.body, value.orelse] if isinstance(value, ast.IfExp)
                                  else [value])
                     if isinstance(call, ast.Call) and dotted(call.func) in classes}
        made |= {name.lower(): name for name in classes}
        owner = {name.split(".")[1]: name for name in self.functions if "." in name}
        self.calls: dict[str, list[tuple[ast.stmt, ast.Call]]] = {n: [] for n in self.functions}
        self.escapes: set[str] = set()  # used other than by a call
        for unit, facts in everything:
            called, visible = set(), {id(n) for n in facts.visible}
            for node in facts.calls:
                name = dotted(node.func)
                if name in self.functions:
                    target = name if id(node.func) in visible else ""
                elif name in classes:
                    target = f"{name}.__init__"
                elif name in made:
                    target = f"{made[name]}.forward"
                else:
                    target = owner.get(getattr(node.func, "attr", ""), "")
                if target in self.functions and ("__" not in target or name in classes):
                    self.calls[target].append((unit, node))
                    called.add(id(node.func))
            self.escapes |= {n.id for n in facts.visible if id(n) not in called}
            self.escapes |= {owner[n.attr] for n in facts.attributes
                             if n.attr in owner and id(n) not in called}

    def parameters(self, name: str) -> list[ast.arg]:
        static = "staticmethod" in map(dotted, self.functions[name].decorator_list)
        return parameters_of(self.functions[name])["." in name and not static:]

    def defaults(self, name: str) -> dict[str, ast.expr]:
        arguments = self.functions[name].args
        pairs = list(zip(reversed(arguments.args), reversed(arguments.defaults)))
        pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults) if d]
        return {a.arg: d for a, d in pairs}

    def changeable(self, name: str) -> bool:
        """Whether all uses of a function are calls that name their arguments."""
        calls, arguments = self.calls[name], self.functions[name].args
        return name not in self.escapes and bool(calls) and not (
            arguments.vararg or arguments.kwarg) and not any(
            isinstance(a, ast.Starred) for _, c in calls for a in c.args) and not any(
            k.arg is None for _, c in calls for k in c.keywords)

    def bound(self, name: str, call: ast.Call) -> dict[str, ast.expr]:
        """Parameter -> argument or default."""
        names = [a.arg for a in self.parameters(name)]
        return self.defaults(name) | dict(zip(names, call.args)) | {
            k.arg: k.value for k in call.keywords}


def propagate_parameters(program: Program, calls: Calls) -> None:
    """Parameters that get the same constant in all calls, and those that nothing reads."""
    for name, function in calls.functions.items():
        if not calls.changeable(name):
            continue
        given = [calls.bound(name, call) for _, call in calls.calls[name]]
        nodes = [n for s in function.body for n in walk(s)]
        reads, stores = names_read(nodes), names_stored(nodes)
        hidden = in_strings(nodes) | {n.arg for n in nodes if isinstance(n, ast.arg)}
        gone, values = set(), {}
        for parameter in calls.parameters(name):
            word = parameter.arg
            found = [g.get(word) for g in given]
            if not reads[word] and not stores[word]:
                gone.add(word)
            elif word not in hidden and not stores[word] and all(map(is_simple, found)) and len(
                    {ast.unparse(v) for v in found}) == 1:
                values[word] = found[0]
        if gone or values:
            function.body = [substitute(node, values) for node in function.body]
            drop_parameters(program, calls, name, {*gone, *values})


def drop_parameters(program: Program, calls: Calls, name: str, gone: set[str]) -> None:
    """Here and in all calls."""
    arguments, defaults = calls.functions[name].args, calls.defaults(name)
    positional = [a.arg for a in calls.parameters(name)]
    arguments.args = [a for a in arguments.args if a.arg not in gone]
    arguments.kwonlyargs = [a for a in arguments.kwonlyargs if a.arg not in gone]
    arguments.defaults = [defaults[a.arg] for a in arguments.args if a.arg in defaults]
    arguments.kw_defaults = [defaults.get(a.arg) for a in arguments.kwonlyargs]
    program.touch(calls.unit[name])
    for unit, call in calls.calls[name]:
        args = [a for p, a in zip(positional, call.args) if p not in gone]
        keywords = [k for k in call.keywords if k.arg not in gone]
        if len(args) < len(call.args) or len(keywords) < len(call.keywords):
            call.args, call.keywords, call.dirty = args, keywords, True
            program.touch(unit)


def propagate_attributes(program: Program) -> None:
    """Attributes of self that are assigned once, a constant, and read in their class alone."""
    everything = program.all()
    used = Counter(n.attr for _, facts in everything for n in facts.attributes)
    for unit, facts in everything:
        own = Counter(map(dotted, facts.attributes))
        values = {name: found[0] for name, found in facts.assigned.items()
                  if name.startswith("self.") and is_simple(found[0])
                  and 1 < own[name] == used[name.removeprefix("self.")]
                  and sum(dotted(n) == name and isinstance(n.ctx, ast.Store)
                          for n in facts.attributes) == 1}
        if values:
            substitute(unit, values)
            program.touch(unit)


# --- prune ----------------------------------------------------------------------------------------

OF_TORCH = {"forward", "reset_parameters"}  # methods that torch calls by itself


def reachable(program: Program) -> set[str]:
    """Top-level functions and classes that the rest of the program, or one of `keep`, leads to."""
    reads = {u.name: {n.id for n in facts.visible} for u, facts in program.all()
             if isinstance(u, FUNCTION | ast.ClassDef)}
    new = program.keep | {name for u, facts in program.all()
                          if not isinstance(u, FUNCTION | ast.ClassDef) for name in facts.names}
    found: set[str] = set()
    new &= {*reads, *program.keep}
    while new:
        found |= new
        new = {name for f in new for name in reads.get(f, ()) if name in reads} - found
    return found


def prune_unused(program: Program) -> None:
    """Self attributes, methods, functions, classes, constants and imports."""
    everything, alive = program.all(), reachable(program)
    attributes = {"grad"}.union(*(facts.loads for _, facts in everything))
    names: Counter = Counter()
    for _, facts in everything:
        names.update(facts.names)

    def unread_name(target: ast.expr) -> bool:
        return isinstance(target, ast.Name) and not names[target.id]

    def unread_attribute(target: ast.expr) -> bool:
        return isinstance(target, ast.Attribute) and target.attr not in attributes and (
            dotted(target.value) == "self")

    body = program.tree.body
    for unit, _ in everything:
        if isinstance(unit, FUNCTION | ast.ClassDef) and unit.name not in alive:
            body.remove(unit)
        elif isinstance(unit, ast.Import | ast.ImportFrom):
            kept = [a for a in unit.names if names[(a.asname or a.name).split(".")[0]]]
            if not kept:
                without(body, unit)
            elif len(kept) < len(unit.names):
                unit.names, unit.dirty = kept, True
        elif isinstance(unit, ast.ClassDef):
            gone = [m for m in unit.body if isinstance(m, FUNCTION) and not (
                m.name in attributes | OF_TORCH or m.name.startswith("__"))]
            for method in gone:
                without(unit.body, method)
            if any([prune_assignment(inner, node, unread_attribute)
                    for inner in blocks(unit) for node in list(inner)]) or gone:
                program.touch(unit)
        else:
            prune_assignment(body, unit, unread_name)


# --- inline ---------------------------------------------------------------------------------------

def inline(program: Program, calls: Calls, comment: Callable) -> None:
    """Put the bodies of known.inlined before the statements that call them, what they return into
    the call's place. They have one return, at the end, or none. `comment(function)`: lines that
    say what its docstring says."""
    for name, function in calls.functions.items():
        short, home = name.split(".")[-1], calls.unit[name]
        if short not in program.known.inlined or not calls.changeable(name) or any(
                unit in program.changed for unit in (home, *(u for u, _ in calls.calls[name]))):
            continue
        body = function.body[is_docstring(function.body[0]):]
        returns = [n for n in walk(function) if isinstance(n, ast.Return)]
        inner = [loop.target for n in walk(function) for loop in getattr(n, "generators", ())]
        stores = names_stored(walk(function)) - names_stored([m for n in inner for m in walk(n)])
        places = [place_of(unit, call, stores.keys()) for unit, call in calls.calls[name]]
        if not all(places) or returns not in ([], [body[-1]]) or function.decorator_list or (
                stores and len({id(around) for _, around in places}) < len(places)):
            continue
        program.known.used.add(short)
        for (unit, call), (block, around) in zip(calls.calls[name], places):
            bound = calls.bound(name, call)
            if isinstance(call.func, ast.Attribute):
                bound["self"] = call.func.value
            new = copy.deepcopy(body)
            nodes = [n for s in new for n in walk(s)]
            reads, stores = names_read(nodes), names_stored(nodes)
            first = []
            for word, value in list(bound.items()):
                if stores[word] or (reads[word] > 1 and not is_short(value)):
                    del bound[word]
                    first.append(statement(f"{word} = 0"))
                    first[-1].value = value
            new = [*first, *(substitute(node, bound) for node in new)]
            said = [line for line in comment(function) if line not in around.above]
            new[0].above = [*around.above, *said, *new[0].above]
            new[0].blank, last = around.blank, new[-1]
            if isinstance(last, ast.Return):
                around.blank, around.above = last.blank, last.above
                around.beside = around.beside or last.beside
                replace(unit, call, last.value)
                new[-1] = around
            at = next(i for i, node in enumerate(block) if node is around)
            block[at:at + 1] = new
            program.touch(unit)
        without(program.tree.body if home is function else home.body, function)
        program.touch(home)


def is_short(value: ast.expr) -> bool:
    return isinstance(value, ast.Name | ast.Constant) or bool(dotted(value))


def place_of(unit: ast.stmt, call: ast.Call, stores: set[str]
             ) -> tuple[list[ast.stmt], ast.stmt] | None:
    """(block, statement) that evaluates a call once, where names `stores` are free: not used, or
    arguments of the call that nothing reads behind it."""
    found = [(body, node) for body in [[unit], *blocks(unit)] for node in body
             if any(n is call for n in walk(node))]
    around = [f for f in functions_in(unit) if any(n is call for n in walk(f))]
    body, node = found[-1]
    inside = {id(n) for loop in walk(node) if isinstance(loop, ast.Lambda) or hasattr(
        loop, "generators") for n in walk(loop)}
    if id(call) in inside or hasattr(node, "body") or not around:
        return None
    here = walk(node)
    own = {n.id for n in walk(around[-1]) if isinstance(n, ast.Name)} - names_stored(here).keys()
    given = {n.id for part in (*call.args, *(k.value for k in call.keywords))
             for n in walk(part) if isinstance(n, ast.Name)}
    in_order, inside = walk(around[-1]), {id(n) for n in here}
    last = max(i for i, n in enumerate(in_order) if id(n) in inside)
    looped = any(isinstance(n, ast.For | ast.While) and any(m is node for m in walk(n))
                 for n in in_order)
    given -= names_read(in_order if looped else in_order[last + 1:]).keys()
    return None if stores & (own - given) else (body, node)


# --- the whole ------------------------------------------------------------------------------------

def prune(tree: ast.Module, keep: set[str]) -> None:
    """Top-level functions and classes that nothing leads to go."""
    alive = reachable(Program(tree, Known(), keep))
    tree.body = [unit for unit in tree.body if getattr(unit, "name", None) in {None, *alive}]


def fold(tree: ast.Module, known: Known, keep: set[str], comment: Callable) -> None:
    """Decide in `tree` everything that `known` decides; top-level names in `keep` stay. `comment`:
    see inline."""
    known.index()
    program = Program(tree, known, keep)
    while program.changed:
        units, program.changed = program.changed, []
        for unit in units:
            while unit in tree.body:
                decider = Decider(known, unit)
                decider.statement(unit)
                if not (decider.changed | propagate_locals(unit) | prune_locals(unit)):
                    break
            unit.facts = None
        prune_unused(program)
        propagate_attributes(program)
        propagate_parameters(program, Calls(program))
        if not program.changed:
            inline(program, Calls(program), comment)
