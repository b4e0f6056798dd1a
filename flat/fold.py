"""Fold a program: decide what a frozen configuration decides, drop what is then unused.

    fold(tree, Known(objects={"c": config}, values={"x.y()": 3}), keep={"main"})

Works in place on a tree of flat.tree, so that what does not change is printed as it was written.
Passes repeat until none finds anything:

    decide      an expression on known attributes or of constants becomes its value or the name of a
                constant, a decided `if` its branch
    propagate   a local, a parameter or a self attribute that only ever has one constant value, or
                is another name of something, becomes that
    inline      a function that is one expression, and is called once or private, goes where it is
                called
    prune       parameters, locals, fields, methods, functions, imports that nothing reads go
"""

import ast
import copy
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flat.tree import (
    FIELDS,
    Note,
    blocks,
    children,
    dotted,
    expression,
    is_docstring,
    settle,
    walk,
)

COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Gt: operator.gt, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.LtE: operator.le,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}
FUNCTION = ast.FunctionDef
ENDS = ast.Return | ast.Continue | ast.Break | ast.Raise
TRUE = object()     # a value that is not known but for its truth


class Unknown(Exception):
    """The configuration does not decide this expression."""


@dataclass
class Known:
    """What is decided: objects whose attributes are, and expressions by their text."""

    objects: dict[str, object] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)     # text of an expression -> value
    sources: dict[str, str] = field(default_factory=dict)       # -> another text; with-item -> ""
    dropped: set[str] = field(default_factory=set)              # texts of statements
    # found while folding
    constants: dict[str, object] = field(default_factory=dict)  # NAME -> value
    chosen: dict[str, set] = field(default_factory=dict)    # unit -> strings that are a decided
    rejected: dict[str, set] = field(default_factory=dict)  # value, and those that it is not
    used: set[str] = field(default_factory=set)             # texts that were met

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
        """The text of `node` if it may be known, else nothing."""
        if mark(node) not in self.marks:
            return ""
        word = ast.unparse(node)
        if word in self.values or word in self.sources or word in self.dropped:
            self.used.add(word)
            return word
        return ""


def mark(node: ast.AST) -> tuple:
    """The kind of a node and the first word that it ends in."""
    kind = type(node)
    while True:
        match node:
            case ast.Name():
                return kind, node.id
            case ast.Attribute():
                return kind, node.attr
            case ast.Constant():
                return kind, node.value
            case ast.Call():
                node = node.func
            case ast.Subscript() | ast.Expr():
                node = node.value
            case ast.Compare() | ast.BinOp():
                node = node.left
            case ast.BoolOp():
                node = node.values[0]
            case ast.IfExp():
                node = node.body
            case ast.Assign():
                node = node.targets[0]
            case ast.AnnAssign():
                node = node.target
            case _:
                return kind, None


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
    """`node` with copies of `values` for the names that are read, but in joined strings."""
    if isinstance(node, ast.Name) and node.id in values and isinstance(node.ctx, ast.Load):
        return copy.deepcopy(values[node.id])
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
    return Counter(n.id for n in nodes
                   if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store))


def names_stored(nodes: list[ast.AST]) -> Counter:
    """How often each name is assigned; an augmented assignment counts more."""
    stores: Counter = Counter()
    for n in nodes:
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            stores[n.id] += 1
        elif isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name):
            stores[n.target.id] += 1
    return stores


def parameters_of(function: FUNCTION) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]


def global_names(node: ast.AST, own: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Reads of names that no function around them has as its own."""
    if isinstance(node, FUNCTION):
        for part in (*node.decorator_list, node.args, node.returns):
            if part is not None:
                yield from global_names(part, own)
        own = own | {a.arg for a in parameters_of(node)} | set(names_stored(walk(node)))
        for part in node.body:
            yield from global_names(part, own)
        return
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store) and node.id not in own:
        yield node
    for child in children(node):
        yield from global_names(child, own)


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
    return node


def parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


# --- decide ---------------------------------------------------------------------------------------

def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


class Decider:
    """One round of decisions in a top-level statement."""

    def __init__(self, known: Known, made: set[str], unit: ast.stmt):
        self.known, self.made, self.changed = known, made, False
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
            case ast.Name():
                if node.id in self.known.constants:
                    return self.known.constants[node.id]
            case ast.Attribute():
                owner = self.known.objects.get(dotted(node.value))
                if hasattr(owner, node.attr):
                    return getattr(owner, node.attr)
            case ast.Tuple() | ast.List() | ast.Set():
                return tuple(self.value(e) for e in node.elts)
            case ast.Subscript():
                owner, index = self.value(node.value), self.value(node.slice)
                if isinstance(owner, tuple) and isinstance(index, int) and index < len(owner):
                    return owner[index]
            case ast.UnaryOp(op=ast.Not()):
                return not self.value(node.operand)
            case ast.UnaryOp(op=ast.USub()):
                return -self.value(node.operand)
            case ast.IfExp():
                return self.value(node.body if self.value(node.test) else node.orelse)
            case ast.BoolOp():
                return self.bool_op(node)
            case ast.Compare(ops=[op], comparators=[right]):
                if isinstance(op, ast.IsNot) and dotted(node.left) in self.made and (
                        isinstance(right, ast.Constant) and right.value is None):
                    return True
                return self.compared(node.left, op, right)
            case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=None)]):
                return None
        raise Unknown

    def compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> bool:
        a, b = self.value(left), self.value(right)
        if a is TRUE or b is TRUE:
            raise Unknown
        for word in b if isinstance(b, tuple) else (b,):
            if isinstance(word, str):
                (self.chosen if word == a else self.rejected).add(word)
        return COMPARE[type(op)](a, b)

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
        if isinstance(node, ast.IfExp):
            ok, value = self.decided(node.test)
            if ok:
                return node.body if value else node.orelse
        if isinstance(node, ast.BinOp):
            return simpler_product(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return node
        if isinstance(node, ast.Name) and word not in self.known.values:
            return node
        ok, value = self.decided(node)
        if ok and isinstance(node, ast.BoolOp) and not isinstance(value, bool):
            return next(x for x in node.values if self.decided(x) == (True, value))
        if ok:
            number = isinstance(value, int | float | tuple) and not isinstance(value, bool)
            if isinstance(node, ast.Attribute) and word not in self.known.values and (
                    number and value):
                self.known.constants[node.attr.upper()] = value
                return ast.Name(node.attr.upper(), ast.Load())
            if value is None or isinstance(value, bool | int | float | str):
                return ast.Constant(value)
        match node:
            case ast.BoolOp():
                decisive = isinstance(node.op, ast.Or)
                found = [(x, *self.decided(x)) for x in node.values]
                kept = [x for x, ok, value in found if not (ok and bool(value) != decisive)]
                if 0 < len(kept) < len(node.values):
                    return kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)
            case ast.UnaryOp(op=ast.Not(), operand=ast.Compare(ops=[ast.Eq()]) as inner):
                return ast.Compare(inner.left, [ast.NotEq()], inner.comparators)
            case ast.Call(args=[*most, ast.Constant(value=None)]):
                if dotted(node.func) == "F.linear":
                    return ast.Call(node.func, most, node.keywords)
        return node

    # --- statements

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        blank = False
        for node in body:
            new = self.statement(node)
            if not new:
                blank = blank or node.blank
            elif blank:
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
                    return self.block(self.branch(node, bool(value)))
                node.body, node.orelse = self.block(node.body), self.block(node.orelse)
                if not node.body and not node.orelse:
                    self.changed = True
                    return []
                if not node.body:
                    node.test, node.beside = ast.UnaryOp(ast.Not(), node.test), node.otherwise
                    node.body, node.orelse, node.otherwise = node.orelse, [], ""
                mapped(node, lambda part: part if isinstance(part, ast.stmt)
                       else self.expression(part))
                return [node]
            case ast.For(iter=ast.Tuple(elts=[only]), target=ast.Name()):
                self.changed = True
                for part in node.body:
                    substitute(part, {node.target.id: only})
                return self.block(lifted(node, node.body, node.beside))
            case ast.With(items=[item]) if self.known.sources.get(self.known.text(
                    item.context_expr)) == "":
                self.changed = True
                return self.block(lifted(node, node.body, node.beside))
        if isinstance(node, FUNCTION | ast.ClassDef | ast.For | ast.While | ast.With):
            node.body = self.block(node.body)
            if not node.body and not isinstance(node, FUNCTION | ast.ClassDef):
                self.changed = True
                return []
            node.body = node.body or [statement("pass")]
        mapped(node, lambda part: part if isinstance(part, ast.stmt) else self.expression(part))
        return [node]

    def branch(self, node: ast.If, taken: bool) -> list[ast.stmt]:
        body = node.body if taken else node.orelse
        if not body:
            return []
        above = node.above if taken else []
        note = node.beside if taken else node.otherwise
        if taken and isinstance(getattr(node.test, "operand", None), ast.BoolOp):
            note = ""  # `if not (x and y):  # about x and y`
        return lifted(node, body, note, above)


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
    for one, other in ((node.left, node.right), (node.right, node.left)):
        if not is_number(one):
            continue
        right = one is node.right
        match node.op:
            case ast.Mult() if one.value == 0:
                return ast.Constant(0.0)
            case ast.Mult() if one.value == 1:
                return other
            case ast.Div() if one.value == 1 and right:
                return other
            case ast.Add() if one.value == 0:
                return other
            case ast.Sub() if one.value == 0 and right:
                return other
    return node


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


def scopes(unit: ast.stmt) -> list[Scope]:
    """Of all functions in a top-level statement, outer ones first."""
    found = [unit] if isinstance(unit, FUNCTION) else []
    found += [n for body in blocks(unit) for n in body if isinstance(n, FUNCTION)]
    return [Scope(function) for function in found]


def fixed_attributes(unit: ast.stmt) -> set[str]:
    """self.x that nothing but __init__ assigns."""
    stored: dict[str, set[str]] = {}
    for method in unit.body if isinstance(unit, ast.ClassDef) else ():
        for n in walk(method):
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store):
                stored.setdefault(dotted(n), set()).add(getattr(method, "name", ""))
    return {name for name, methods in stored.items() if methods == {"__init__"}}


def propagate_locals(unit: ast.stmt) -> bool:
    """Locals that are assigned once, and are a constant or another name of something."""
    changed, fixed = False, fixed_attributes(unit)
    for scope in scopes(unit):
        stores, own, hidden = scope.stores, scope.own, in_strings(scope.nodes) | scope.inner
        looped = {id(n) for loop in scope.nodes if isinstance(loop, ast.For | ast.While)
                  for body in blocks(loop) for n in body}

        def is_alias(value: ast.expr, node: ast.stmt, scope=scope, looped=looped) -> bool:
            if isinstance(value, ast.Attribute):
                return dotted(value) in fixed
            return isinstance(value, ast.Name) and id(node) not in looped and (
                value.id not in scope.inner) and (
                scope.stores[value.id] == (value.id not in scope.own))

        values, body = {}, scope.function.body
        for node in scope.nodes:
            for target, value in pairs_of(node):
                if not isinstance(target, ast.Name) or stores[target.id] != 1 or (
                        target.id in hidden) or not scope.reads[target.id] or (
                        target.id in own and not is_first(body, node, target.id)) or (
                        isinstance(value, ast.BinOp) and (node.above or node.beside)):
                    continue
                if is_simple(value) or is_alias(value, node):
                    values[target.id] = value
        values = {name: value for name, value in values.items()
                  if not (names_read(walk(value)).keys() & values.keys())}
        if values:
            body[:] = [substitute(node, values) for node in body]
            changed = True
    return changed


def is_first(body: list[ast.stmt], node: ast.stmt, name: str) -> bool:
    """Whether a statement of `body` comes before all that read `name`."""
    for other in body:
        if other is node:
            return True
        if names_read(walk(other))[name]:
            return False
    return False


def return_at_once(unit: ast.stmt) -> bool:
    """`x = ...; return x` is `return ...`."""
    changed = False
    for body in blocks(unit):
        for first, last in itertools.pairwise(body):
            match first, last:
                case (ast.Assign(targets=[ast.Name(id=name)]),
                      ast.Return(value=ast.Name(id=other))) if name == other and not last.above:
                    last.value, last.dirty = first.value, True
                    last.above, last.blank = first.above, first.blank
                    last.beside = last.beside or first.beside
                    body.remove(first)
                    changed = True
                    break
    return changed


def prune_none(unit: ast.stmt) -> bool:
    """`X | None` as the annotation of functions that always return an X."""
    changed = False
    for scope in scopes(unit):
        function, returns = scope.function, [n for n in scope.nodes if isinstance(n, ast.Return)]
        match function.returns:
            case ast.BinOp(op=ast.BitOr(), left=left, right=ast.Constant(value=None)):
                if isinstance(function.body[-1], ast.Return) and not any(
                        n.value is None or getattr(n.value, "value", 0) is None for n in returns):
                    function.returns, changed = left, True
    return changed


def prune_locals(unit: ast.stmt) -> bool:
    """Locals, and the numbers of enumerate, that nothing reads."""
    changed = False
    for scope in scopes(unit):
        def unread(target: ast.expr, reads=scope.reads) -> bool:
            return isinstance(target, ast.Name) and not reads[target.id]

        for body in blocks(scope.function):
            for node in list(body):
                if isinstance(node, FUNCTION) and not scope.reads[node.name]:
                    without(body, node)
                    changed = True
                else:
                    changed |= prune_assignment(body, node, unread)
        for node in scope.nodes:
            if isinstance(node, ast.For):
                changed |= prune_enumerate(node, scope.reads)
            for loop in getattr(node, "generators", ()):
                changed |= prune_enumerate(loop, names_read(walk(node)))
    return changed


def prune_assignment(body: list[ast.stmt], node: ast.stmt, unread: Callable) -> bool:
    """Take the targets that are unread from an assignment."""
    if isinstance(node, ast.AnnAssign):
        gone = node.value is not None and unread(node.target)
        if gone:
            without(body, node)
        return gone
    pairs = pairs_of(node)
    kept = [(t, v) for t, v in pairs if not unread(t)]
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


def prune_enumerate(loop: ast.For | ast.comprehension, reads: Counter) -> bool:
    match loop:
        case (ast.For(iter=ast.Call(func=ast.Name(id="enumerate"), args=[items]),
                      target=ast.Tuple(elts=[number, item]))
              | ast.comprehension(iter=ast.Call(func=ast.Name(id="enumerate"), args=[items]),
                                  target=ast.Tuple(elts=[number, item]))):
            loop.dirty = True
            if not reads[number.id]:
                loop.target, loop.iter = item, items
            elif isinstance(item, ast.Name) and not reads[item.id]:
                loop.target, loop.iter = number, parsed(f"range(len({ast.unparse(items)}))")
            else:
                return False
            return True
        case ast.comprehension(iter=ast.Name(id=table), target=ast.Name(id=name)) if (
                table.isupper() and not reads[name]):
            loop.target, loop.iter = ast.Name("_", ast.Store()), parsed(f"range(len({table}))")
            loop.dirty = True
            return True
    return False


# --- the program ----------------------------------------------------------------------------------

class Facts:
    """What passes over the whole program ask of one top-level statement."""

    def __init__(self, unit: ast.stmt, modules: set[str]):
        nodes = walk(unit)
        self.names, self.visible = names_read(nodes), list(global_names(unit))
        self.own = set(names_stored(nodes)) | {n.arg for n in nodes if isinstance(n, ast.arg)}
        self.loads = [n for n in nodes if isinstance(n, ast.Attribute)]
        self.owned = {(dotted(n.value).split(".")[-1], n.attr) for n in self.loads}
        self.attributes = {n.attr for n in self.loads if not isinstance(n.ctx, ast.Store)
                           and dotted(n.value).split(".")[0] not in modules}
        self.calls = [n for n in nodes if isinstance(n, ast.Call)]
        self.assigned: dict[str, list[ast.expr]] = {}   # text of a target -> values
        for node in nodes:
            for target, value in pairs_of(node):
                self.assigned.setdefault(dotted(target), []).append(value)
        self.functions: dict[str, FUNCTION] = {}
        if isinstance(unit, FUNCTION):
            self.functions[unit.name] = unit
        elif isinstance(unit, ast.ClassDef):
            self.functions = {f"{unit.name}.{m.name}": m for m in unit.body
                              if isinstance(m, FUNCTION)}


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

    def facts(self, unit: ast.stmt) -> Facts:
        if getattr(unit, "facts", None) is None:
            unit.facts = Facts(unit, self.modules)
        return unit.facts

    def all(self) -> list[tuple[ast.stmt, Facts]]:
        return [(unit, self.facts(unit)) for unit in self.tree.body]


class Calls:
    """The functions of a program and the calls of each, as far as names tell."""

    def __init__(self, program: Program):
        self.functions: dict[str, FUNCTION] = {}
        self.unit: dict[str, ast.stmt] = {}
        modules: dict[str, str] = {}    # self.attn -> Attention, block -> Block, model -> GPT
        classes = {u.name for u in program.tree.body if isinstance(u, ast.ClassDef)}
        everything = program.all()
        for unit, facts in everything:
            self.functions |= facts.functions
            self.unit |= dict.fromkeys(facts.functions, unit)
            modules |= {name: dotted(value.func) for name, values in facts.assigned.items()
                        for value in values if isinstance(value, ast.Call)
                        and dotted(value.func) in classes}
        modules |= {name.lower(): name for name in classes}
        owner = {name.split(".")[1]: name for name in self.functions if "." in name}
        self.calls: dict[str, list[tuple[ast.stmt, ast.Call]]] = {n: [] for n in self.functions}
        self.escapes: set[str] = set()  # used other than by a call
        for unit, facts in everything:
            called, visible = set(), {id(n) for n in facts.visible}
            for node in facts.calls:
                target = None
                if isinstance(node.func, ast.Name):
                    name = node.func.id
                    if name in self.functions:
                        target = name if id(node.func) in visible else None
                    elif name in classes:
                        target = f"{name}.__init__"
                    elif name in modules:
                        target = f"{modules[name]}.forward"
                elif isinstance(node.func, ast.Attribute):
                    made = modules.get(dotted(node.func))
                    method = owner.get(node.func.attr, "")
                    if made:
                        target = f"{made}.forward"
                    elif ".__" not in method:
                        target = method
                if target in self.functions:
                    self.calls[target].append((unit, node))
                    called.add(id(node.func))
            self.escapes |= {n.id for n in facts.visible if id(n) not in called}
            self.escapes |= {owner[n.attr] for n in facts.loads
                             if n.attr in owner and id(n) not in called}

    def parameters(self, name: str) -> list[ast.arg]:
        return parameters_of(self.functions[name])["." in name and not self.is_static(name):]

    def is_static(self, name: str) -> bool:
        return "staticmethod" in map(dotted, self.functions[name].decorator_list)

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


def drop_parameters(program: Program, calls: Calls, name: str, gone: set[str]) -> None:
    """Here and in all calls."""
    arguments = calls.functions[name].args
    positional = [a.arg for a in calls.parameters(name)]
    defaults = calls.defaults(name)
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
            if stores[word]:
                continue
            if not reads[word]:
                gone.add(word)
            elif word not in hidden and all(map(is_simple, found)):
                if len({ast.unparse(v) for v in found}) == 1:
                    values[word] = found[0]
                elif decide_truth(function, word, found):
                    program.touch(calls.unit[name])
        if values:
            function.body = [substitute(node, values) for node in function.body]
        if gone or values:
            drop_parameters(program, calls, name, {*gone, *values})


def decide_truth(function: FUNCTION, word: str, values: list[ast.expr]) -> bool:
    """`if word:` where all values of a parameter are true, or none is."""
    truths = {bool(v.value) if isinstance(v, ast.Constant) else None for v in values}
    tests = [n for body in blocks(function) for n in body
             if isinstance(n, ast.If) and dotted(n.test) == word]
    for node in tests if len(truths) == 1 and truths != {None} else ():
        node.test = ast.Constant(*truths)
    return bool(tests) and isinstance(tests[0].test, ast.Constant)


def propagate_attributes(program: Program) -> None:
    """Attributes of self that are assigned once, a constant."""
    for unit, facts in program.all():
        if not isinstance(unit, ast.ClassDef):
            continue
        stored = Counter(dotted(n) for n in facts.loads if isinstance(n.ctx, ast.Store))
        for name, values in facts.assigned.items():
            if not name.startswith("self.") or stored[name] != 1 or not is_simple(values[0]):
                continue
            uses = [n for _, other in program.all() for n in other.loads
                    if n.attr == name.removeprefix("self.")]
            own = [n for n in facts.loads if dotted(n) == name]
            if 1 < len(own) == len(uses):
                def change(node: ast.AST, name=name, value=values[0]) -> ast.AST:
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and (
                            dotted(node) == name):
                        return copy.deepcopy(value)
                    return mapped(node, change)
                mapped(unit, change)
                program.touch(unit)


# --- inline ---------------------------------------------------------------------------------------

OF_TORCH = {"forward", "reset_parameters"}  # methods that torch calls by itself


def inline(program: Program, calls: Calls, comment: Callable) -> None:
    """Put functions that are a single expression where they are called: private ones everywhere,
    public ones that are called once, and short actions. `comment(function)` gives a docstring as a
    comment of one line, "" where there is none, None where it is longer: such a function stays."""
    for name, function in calls.functions.items():
        body = function.body[is_docstring(function.body[0]):]
        short, sites, home = name.split(".")[-1], calls.calls[name], calls.unit[name]
        result = getattr(body[0], "value", None) if len(body) == 1 else None
        action = result and isinstance(body[0], ast.Expr) and all(
            is_statement(unit, call) for unit, call in sites)
        if result is None or not (action or isinstance(body[0], ast.Return)) or (
                function.decorator_list or short in OF_TORCH | program.keep
                or short.startswith("__") or not calls.changeable(name)
                or any(unit in program.changed for unit in [home, *(u for u, _ in sites)])):
            continue
        settle(result)
        length = len(expression(result))
        if length > 88 or not (len(sites) == 1 or short.startswith("_") or (
                action and length <= 40)):
            continue
        note = "" if action or short.startswith("_") else comment(function)
        if note is None or not all(
                can_inline(calls, name, call, result, program.facts(unit).own)
                for unit, call in sites):
            continue
        notes = [*filter(None, [note]), *body[0].above, *filter(None, [body[0].beside])]
        for unit, call in sites:
            bound = calls.bound(name, call)
            if isinstance(call.func, ast.Attribute):
                bound["self"] = call.func.value
            around = [node for found in [[unit], *blocks(unit)] for node in found
                      if any(n is call for n in walk(node))][-1]
            around.above = [*around.above, *notes]
            replace(unit, call, substitute(copy.deepcopy(result), bound))
            program.touch(unit)
        without(program.tree.body if home is function else home.body, function)
        program.touch(home)


def is_statement(unit: ast.stmt, call: ast.Call) -> bool:
    return any(getattr(node, "value", None) is call and isinstance(node, ast.Expr)
               for body in blocks(unit) for node in body)


def can_inline(calls: Calls, name: str, call: ast.Call, result: ast.expr, taken: set[str]) -> bool:
    """`taken`: names that the caller's statement has as its own."""
    nodes, bound = walk(result), calls.bound(name, call)
    uses, stores, own = names_read(nodes), names_stored(nodes).keys(), {
        a.arg for a in parameters_of(calls.functions[name])}
    many = {p for p, v in bound.items() if uses[p] > 1 and not isinstance(
        v, ast.Name | ast.Attribute | ast.Constant)}
    return bound.keys() >= own - {"self"} and not (
        many or in_strings(nodes) & own or (uses.keys() - own) & taken
        or any(stores & names_read(walk(v)).keys() for v in bound.values()))


# --- prune ----------------------------------------------------------------------------------------

def prune_returns(program: Program, calls: Calls) -> None:
    """Elements of a returned tuple that no caller uses."""
    for name, function in calls.functions.items():
        returns = [n for body in blocks(function) for n in body if isinstance(n, ast.Return)]
        if not returns or not calls.changeable(name) or not all(
                isinstance(n.value, ast.Tuple) for n in returns):
            continue
        users = {id(n.value): (scope, n) for unit, _ in calls.calls[name]
                 for scope in scopes(unit) for n in scope.nodes if isinstance(n, ast.Assign)}
        found = [users.get(id(call)) for _, call in calls.calls[name]]
        if not all(found):
            continue
        tuples = [*(node.targets[0] for _, node in found), *(n.value for n in returns)]
        if not all(isinstance(t, ast.Tuple) for t in tuples) or len(
                {len(t.elts) for t in tuples}) > 1:
            continue
        kept = [i for i in range(len(tuples[0].elts)) if any(
            not isinstance(node.targets[0].elts[i], ast.Name)
            or scope.reads[node.targets[0].elts[i].id] for scope, node in found)]
        if not kept or len(kept) == len(tuples[0].elts):
            continue
        note = function.returns
        if isinstance(note, ast.Subscript) and isinstance(note.slice, ast.Tuple):
            tuples.append(note.slice)
            if len(kept) == 1:
                function.returns = note.slice.elts[kept[0]]
        for t in tuples:
            t.elts, t.dirty = [t.elts[i] for i in kept], True
        if len(kept) == 1:
            for _, node in found:
                node.targets[0] = node.targets[0].elts[0]
            for node in returns:
                node.value = node.value.elts[0]
        for node in [*returns, *(node for _, node in found)]:
            node.dirty = True
        program.touch(calls.unit[name])
        for unit, _ in calls.calls[name]:
            program.touch(unit)


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
    """Self attributes, fields, methods, functions, classes, constants and imports."""
    everything, alive = program.all(), reachable(program)
    attributes = {"grad"}.union(*(facts.attributes for _, facts in everything))
    names: Counter = sum((facts.names for _, facts in everything), Counter())

    def unread(target: ast.expr) -> bool:
        if isinstance(target, ast.Name):
            return not names[target.id] and target.id not in program.keep
        return isinstance(target, ast.Attribute) and target.attr not in attributes and (
            dotted(target.value) == "self")

    def unread_attribute(target: ast.expr) -> bool:
        return not isinstance(target, ast.Name) and unread(target)

    for unit, _ in everything:
        if isinstance(unit, FUNCTION | ast.ClassDef) and unit.name not in alive:
            program.tree.body.remove(unit)
        elif isinstance(unit, ast.Assign | ast.AnnAssign):
            prune_assignment(program.tree.body, unit, unread)
        elif isinstance(unit, ast.Import | ast.ImportFrom):
            kept = [a for a in unit.names if names[(a.asname or a.name).split(".")[0]]]
            if not kept:
                without(program.tree.body, unit)
            elif len(kept) < len(unit.names):
                unit.names, unit.dirty = kept, True
        elif isinstance(unit, ast.ClassDef):
            changed = prune_class(program, unit, attributes)
            for body in blocks(unit):
                for node in list(body):
                    changed |= prune_assignment(body, node, unread_attribute)
            if changed:
                program.touch(unit)


def prune_class(program: Program, cls: ast.ClassDef, attributes: set[str]) -> bool:
    named_tuple = "NamedTuple" in map(dotted, cls.bases)
    changed = prune_early_none(cls)
    for node in list(cls.body):
        if isinstance(node, FUNCTION) and node.name not in attributes | OF_TORCH and (
                not node.name.startswith("__")):
            without(cls.body, node)
            changed = True
        elif named_tuple and isinstance(node, ast.AnnAssign):
            changed |= prune_field(program, cls, node)
    for body in blocks(cls):
        for node in list(body):
            match node:
                case ast.Expr(value=ast.Call(func=ast.Attribute(attr="register_buffer"),
                                             args=[ast.Constant(value=name), *_])):
                    gone = name not in attributes
                case ast.For(iter=ast.Tuple(elts=elements), body=[ast.Expr(value=ast.Call(
                        func=ast.Attribute(attr="register_buffer")))]):
                    gone = not {e.value for e in elements} & attributes
                case _:
                    gone = False
            if gone:
                without(body, node)
                changed = True
    return changed


def prune_field(program: Program, cls: ast.ClassDef, node: ast.AnnAssign) -> bool:
    """A field of a NamedTuple that nothing reads, where all are given by name."""
    for _, facts in program.all():
        if (cls.name.lower(), node.target.id) in facts.owned or any(
                c.args and dotted(c.func) == cls.name for c in facts.calls):
            return False
    cls.body.remove(node)
    for unit, facts in program.all():
        for call in facts.calls:
            if dotted(call.func) == cls.name:
                call.keywords = [k for k in call.keywords if k.arg != node.target.id]
                call.dirty = True
                program.touch(unit)
    return True


def prune_early_none(cls: ast.ClassDef) -> bool:
    """In __init__, a None that the same block replaces."""
    changed = False
    for method in cls.body:
        if getattr(method, "name", "") != "__init__":
            continue
        for i, early in enumerate(list(method.body)):
            if isinstance(early, ast.Assign) and isinstance(early.value, ast.Constant) and (
                    early.value.value is None):
                later = {ast.unparse(t) for s in method.body[i + 1:]
                         if isinstance(s, ast.Assign) for t in s.targets}
                changed |= prune_assignment(method.body, early,
                                            lambda t, later=later: ast.unparse(t) in later)
    return changed


def prune_empty(program: Program) -> None:
    """Calls of functions that do nothing."""
    empty = {n.name for n in program.tree.body if isinstance(n, FUNCTION) and all(
        is_docstring(s) or isinstance(s, ast.Pass) for s in n.body)}
    for unit, facts in program.all():
        if not empty & facts.names.keys():
            continue
        for body in blocks(unit):
            for node in list(body):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and (
                        dotted(node.value.func) in empty):
                    without(body, node)
                    program.touch(unit)


# --- the whole ------------------------------------------------------------------------------------

def made_always(program: Program) -> set[str]:
    """self.x that an __init__ makes by a call, and nothing else assigns."""
    found, always = Counter(), set()
    for unit, facts in program.all():
        found.update({name: len(values) for name, values in facts.assigned.items()})
        for f in unit.body if isinstance(unit, ast.ClassDef) else ():
            if isinstance(f, FUNCTION) and f.name == "__init__":
                always |= {dotted(s.targets[0]) for s in f.body
                           if isinstance(s, ast.Assign) and isinstance(s.value, ast.Call)}
    return {name for name in always if found[name] == 1}


def prune(tree: ast.Module, keep: set[str]) -> None:
    """Top-level functions and classes that nothing leads to go."""
    alive = reachable(Program(tree, Known(), keep))
    tree.body = [unit for unit in tree.body if getattr(unit, "name", None) in {None, *alive}]


def fold(tree: ast.Module, known: Known, keep: set[str], comment: Callable) -> None:
    """Decide in `tree` everything that `known` decides; top-level names in `keep` stay. `comment`:
    see inline."""
    known.index()
    program, made = Program(tree, known, keep), set()
    while program.changed:
        units, program.changed = program.changed, []
        for unit in units:
            while unit in tree.body:
                decider = Decider(known, made, unit)
                decider.statement(unit)
                if not (decider.changed | propagate_locals(unit) | return_at_once(unit)
                        | prune_locals(unit) | prune_none(unit)):
                    break
            unit.facts = None
        prune_unused(program)
        prune_empty(program)
        prune_returns(program, Calls(program))
        propagate_attributes(program)
        propagate_parameters(program, Calls(program))
        if not program.changed:
            inline(program, Calls(program), comment)
        new = made_always(program) - made
        if new:
            made |= new
            program.changed = list(tree.body)
