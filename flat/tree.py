"""Syntax trees that keep comments, blank lines and the layout of statements that do not change.

    tree = parse(text); ...passes change the tree...; show(tree)

A statement carries `above` (comment lines), `beside` (the comment behind its first line or, where
it is a simple one, its last), `otherwise` (the one behind `else:`), `blank` (an empty line before
it). A comment at the left margin that is not right above a statement is a statement itself, a Note.
A pass that changes a node sets its `dirty`; dirty nodes are printed anew, others as they were
written. Joined strings are never looked into.
"""

import ast
import copy
import io
import re
import tokenize

WIDTH = 100
RULE = re.compile(r"# --- .* -+$")


class Note(ast.stmt):
    """A comment that stands alone."""

    above, beside, blank, text = (), "", True, ""


LEAVES = {"ctx", "op", "ops", "id", "attr", "kind", "arg", "name", "level", "module", "asname",
          "conversion", "is_async", "simple", "type_comment", "type_ignores", "type_params"}


# Kind of node -> its fields that hold nodes.
FIELDS = {kind: tuple(name for name in kind._fields if name not in LEAVES)
          for kind in (Note, *vars(ast).values())
          if isinstance(kind, type) and issubclass(kind, ast.AST)} | {ast.Constant: ()}


def children(node: ast.AST) -> list[ast.AST]:
    found = []
    for name in FIELDS[type(node)]:
        value = getattr(node, name)
        if type(value) is list:
            found += value
        else:
            found.append(value)
    return [child for child in found if child is not None]


def walk(node: ast.AST) -> list[ast.AST]:
    """Nodes in the order of the text, each before its children."""
    found, left = [], [node]
    while left:
        node = left.pop()
        found.append(node)
        left += children(node)[::-1]
    return found


def blocks(node: ast.AST) -> list[list[ast.stmt]]:
    """Lists of statements in `node`, outer ones first."""
    found = []
    for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
        if type(body) is list and body and not isinstance(node, ast.Try):
            found.append(body)
            for inner in body:
                found += blocks(inner)
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` as text; other expressions as nothing."""
    if isinstance(node, ast.Name):
        return node.id
    owner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return owner and f"{owner}.{node.attr}"


# --- parse ----------------------------------------------------------------------------------------

def parse(text: str) -> ast.Module:
    tree, lines = ast.parse(text), text.splitlines()
    comments = {token.start[0]: token for token in tokenize.generate_tokens(
        io.StringIO(text).readline) if token.type == tokenize.COMMENT}
    alone = {n for n, token in comments.items() if not token.line[:token.start[1]].strip()}
    code = [line if n not in comments else line[:comments[n].start[1]].rstrip()
            for n, line in enumerate(lines, 1)]
    taken: set[int] = set()
    for node in walk(tree):
        if isinstance(node, ast.expr):
            node.text = segment(code, node)
        if not isinstance(node, ast.stmt):
            continue
        start = first = first_line(node)
        while first - 1 in alone and not RULE.match(lines[first - 2]):
            first -= 1
        taken |= set(range(first, start))
        node.above = [lines[n - 1].strip() for n in range(first, start)]
        node.blank = first > 1 and not lines[first - 2].strip()
        node.beside, node.gap, node.otherwise = "", "", ""
        last = head_end(node)
        if last in comments and last not in alone:
            node.beside = comments[last].string
            node.gap = lines[last - 1][len(code[last - 1]):comments[last].start[1]]
        if getattr(node, "orelse", None):
            line = node.body[-1].end_lineno + 1
            while not code[line - 1].lstrip().startswith("el"):
                line += 1
            if line in comments and code[line - 1].strip() == "else:":
                node.otherwise = comments[line].string
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.inside = [comments[n].string for n in range(start, last) if n in comments]
            kept = [*(lines if node.inside else code)[start - 1:last - 1], code[last - 1]]
            node.lines = [line[min(node.col_offset, len(line) - len(line.lstrip())):]
                          for line in kept]
    for line in sorted(alone - taken):
        if lines[line - 1].startswith("#"):
            note = Note()
            note.text, note.lineno = lines[line - 1], line
            tree.body.insert(sum(s.lineno < line for s in tree.body), note)
    return tree


def segment(lines: list[str], node: ast.expr) -> str:
    """The text of an expression, on one line."""
    found = [line.encode() for line in lines[node.lineno - 1:node.end_lineno]]
    found[-1] = found[-1][:node.end_col_offset]
    found[0] = found[0][node.col_offset:]
    return joined([line.decode() for line in found])


def joined(lines: list[str]) -> str:
    text, *rest = lines
    for line in rest:
        line = line.strip()
        glue = "" if text.endswith(("(", "[", "{")) or line.startswith((")", "]", "}")) else " "
        text += glue + line
    return re.sub(r"(?<!\(\w),([\])}])", r"\1", text) if rest else text


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def is_plain(node: ast.stmt) -> bool:
    """Whether no pass looks for statements in it."""
    return not hasattr(node, "body") or isinstance(node, ast.Try)


def head_end(node: ast.stmt) -> int:
    """The last line of a plain statement, or of what is before the colon of another one."""
    if is_plain(node):
        return node.end_lineno
    if isinstance(node, ast.FunctionDef):
        return max([node.lineno] + [part.end_lineno for part in (
            *node.args.args, *node.args.kwonlyargs, node.returns) if part])
    for name in ("test", "iter"):
        if hasattr(node, name):
            return getattr(node, name).end_lineno
    return node.lineno


# --- show -----------------------------------------------------------------------------------------

ATOMS = (ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant | ast.JoinedStr
         | ast.List | ast.Dict | ast.Set | ast.ListComp | ast.SetComp | ast.DictComp)
LOOSE = ast.stmt | ast.Call | ast.keyword | ast.List | ast.Set | ast.Dict | ast.Subscript


def settle(node: ast.AST) -> bool:
    """Make everything dirty that is new, or has something dirty in it."""
    node.dirty = getattr(node, "dirty", False) or (
        isinstance(node, ast.expr) and not hasattr(node, "text"))
    inside = [child for child in children(node) if settle(child)]
    node.head_dirty = node.dirty or any(not isinstance(n, ast.stmt) for n in inside)
    node.dirty = bool(node.dirty or inside)
    return node.dirty


def expression(node: ast.AST) -> str:
    """An expression or a simple statement on one line."""
    return ast.unparse(shell(node, None))


def shell(node: ast.AST, parent: ast.AST | None) -> ast.AST:
    """A copy for ast.unparse, which prints the id of a Name as it is: there we put the text of what
    did not change, and of what ast.unparse writes in another way than people do."""
    power = isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Pow)
    match node:
        case ast.Tuple():
            inside = ", ".join(map(expression, node.elts)) + "," * (len(node.elts) == 1)
            bare = isinstance(parent, ast.stmt | ast.comprehension | ast.Subscript | None) and (
                node.elts and not in_parentheses(node) and node is not getattr(parent, "iter", 0))
            return ast.Name(inside if bare else f"({inside})")
        case ast.JoinedStr() | ast.Constant() if hasattr(node, "text"):
            return ast.Name(node.text)
        case ast.Constant(value=str() as value):
            return ast.Name(f'"{value}"')
        case ast.Constant():
            return ast.Name(repr(node.value).replace("e-0", "e-"))
        case ast.UnaryOp(op=ast.USub()) if power:
            inside = expression(node.operand)
            return ast.Name(f"-{inside}" if isinstance(node.operand, ATOMS) else f"-({inside})")
        case ast.GeneratorExp() if isinstance(parent, ast.Call) and not (
                parent.args[1:] or parent.keywords):
            text = ast.unparse(copied(node)) if node.dirty else node.text
            return ast.Name(text[1:-1])
    clean = isinstance(node, ast.expr) and not node.dirty
    if clean and (parent is None or isinstance(node, ATOMS) or isinstance(parent, LOOSE)):
        return ast.Name(node.text)
    return copied(node)


def copied(node: ast.AST) -> ast.AST:
    new = copy.copy(node)
    for name in FIELDS[type(node)]:
        value = getattr(node, name)
        if type(value) is list:
            setattr(new, name, [item and shell(item, node) for item in value])
        elif value is not None:
            setattr(new, name, shell(value, node))
    return new


def in_parentheses(node: ast.Tuple) -> bool:
    """Whether a tuple was written so."""
    text = getattr(node, "text", "")
    try:
        return text.startswith("(") and bool(ast.parse(text[1:-1], mode="eval"))
    except SyntaxError:  # (a), (b)
        return False


def head(node: ast.stmt) -> str:
    """The first line of a compound statement."""
    if hasattr(node, "lines") and not node.head_dirty:
        return joined(node.lines).removeprefix("el")
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {expression(node.returns)}" if node.returns else ""
        return f"def {node.name}({', '.join(signature(node.args))}){returns}:"
    first = copy.copy(node)
    first.body, first.orelse, first.decorator_list = [], [], []
    return expression(first)


def signature(arguments: ast.arguments) -> list[str]:
    """Parameters with their annotations and defaults."""
    missing = [None] * (len(arguments.args) - len(arguments.defaults))
    parts = []
    for arg, default in (*zip(arguments.args, [*missing, *arguments.defaults]),
                         *zip(arguments.kwonlyargs, arguments.kw_defaults)):
        parts += ["*"] * (arg in arguments.kwonlyargs[:1])
        equals = " = " if arg.annotation else "="
        text = f"{arg.arg}: {expression(arg.annotation)}" if arg.annotation else arg.arg
        parts.append(f"{text}{equals}{expression(default)}" if default else text)
    return parts


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(
        node.value.value, str)


def laid_out(node: ast.stmt, text: str, pad: str) -> list[str]:
    """The lines of a head or a simple statement, given on one line."""
    written = getattr(node, "lines", []) if not node.dirty else []
    beside = node.beside and (node.gap if written else "  ") + node.beside
    pieces = len(written) > 1 and re.search(r'" f?"', text)  # of a string, one a line
    if written and (pieces or node.inside):
        return [pad + line for line in written]
    if len(pad + text + beside) <= WIDTH:
        return [pad + text + beside]
    if len(pad + text) > WIDTH and written and all(len(pad + line) <= WIDTH for line in written):
        shown = [pad + line for line in written]
    else:
        shown = wrapped(pad + text).split("\n")
    if node.beside and (len(shown) == 1 or len(shown[-1] + beside) > WIDTH):
        return [pad + node.beside, *shown]
    return [*shown[:-1], shown[-1] + beside]


def block(body: list[ast.stmt], depth: int, owner: ast.AST) -> list[str]:
    """The lines of statements."""
    pad, found, before = "    " * depth, [], None
    inside = isinstance(owner, ast.ClassDef)
    for node in body:
        if len(found) == 1 and not is_docstring(before) and depth:
            node.blank = False  # a first line alone is no paragraph
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if depth == 0:
            rule = isinstance(node, Note) and RULE.match(node.text)
            after = isinstance(before, ast.FunctionDef | ast.ClassDef)
            many = 1 if isinstance(before, Note) else 2 if named or rule or after else node.blank
        else:
            many = node.blank or (inside and named)
        found += [""] * (many if before else 0)
        found += [pad + line for line in node.above]
        found += statement(node, depth)
        before = node
    return found


def statement(node: ast.stmt, depth: int) -> list[str]:
    pad = "    " * depth
    if isinstance(node, Note):
        return [node.text]
    if is_docstring(node) or isinstance(node, ast.Try):
        return [f"{pad}{line}".rstrip() for line in node.lines]
    if is_plain(node):
        return laid_out(node, expression(node) if node.dirty else joined(node.lines), pad)
    found = [f"{pad}@{expression(d)}" for d in getattr(node, "decorator_list", [])]
    found += laid_out(node, head(node), pad) + block(node.body, depth + 1, node)
    if getattr(node, "orelse", None):
        first = node.orelse[0]
        if len(node.orelse) == 1 and isinstance(first, ast.If) and not node.otherwise and not (
                first.above or first.blank):
            inner = statement(first, depth)
            return [*found, inner[0].replace("if", "elif", 1), *inner[1:]]
        beside = node.otherwise and f"  {node.otherwise}"
        found += [f"{pad}else:{beside}", *block(node.orelse, depth + 1, node)]
    return found


def show(tree: ast.Module) -> str:
    settle(tree)
    return "\n".join(block(tree.body, 0, tree)) + "\n"


def wrapped(line: str) -> str:
    """Broken behind commas or before operators, under the bracket that is open there."""
    done, outer = [], []
    while len(line) > WIDTH:
        depth, quote, best = list(outer), "", None
        for i, char in enumerate(line[:WIDTH + 1]):
            if quote:
                quote = "" if char == quote else quote
            elif char in "\"'":
                quote = char
            elif char in "([{":
                depth.append(i)
            elif char in ")]}":
                del depth[-1:]
            elif char == " " and depth and line[:i].strip():
                first = line[i - 1] == "," or re.match(r' (for|f?") ?', line[i:])
                if re.search(r" for [\w, ]*$", line[:i]) or line[i + 1:i + 4] == "in ":
                    continue
                if first or re.match(r" (if|else|and|or|\+|-|\*|/|\|) ", line[i:]):
                    score = (-len(depth), bool(first), i)
                    if best is None or score >= best[0]:
                        best = (score, i, depth[-1])
        indent, opened = len(line) - len(line.lstrip()), depth[len(outer):]
        double = opened[1:2] == [i + 1 for i in opened[:1]]     # ({
        if opened and not done and (best is None or (
                best[2] not in (*outer, opened[0]) and len(opened) > 1 + double)):
            bracket = opened[0] + double  # there is nothing to break at further out
            done.append(line[:bracket + 1])
            line, outer = " " * (indent + 4) + line[bracket + 1:], [indent + 3]
            continue
        if best is None:
            break
        _, cut, bracket = best
        if done and cut <= indent:
            break
        if bracket > 0.55 * WIDTH:  # little room there: break behind the bracket
            done.append(line[:bracket + 1])
            indent += 4 * (len(done) == 1)
            line, outer = " " * indent + line[bracket + 1:], [indent - 1]
        else:
            done.append(line[:cut])
            line, outer = " " * (bracket + 1) + line[cut + 1:], [bracket]
    return "\n".join([*done, line])
