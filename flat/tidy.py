"""Lay out a folded program as a person would: lines that fit are joined, long ones are wrapped,
blank lines and section rules are in order, and no comment speaks of a newer record."""

import ast
import io
import re
import tokenize

from flat.fold import WIDTH, Text

RULE = re.compile(r"# --- .* -+$")


def comments_of(text: str) -> set[int]:
    """Lines with a comment."""
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline)
            if t.type == tokenize.COMMENT}


def heads(tree: ast.Module) -> list[tuple[int, int]]:
    """(first, last) line of each simple statement, and of the head of each compound one."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # docstrings
        last = node.end_lineno
        if isinstance(node, ast.FunctionDef):
            last = max([node.lineno] + [a.end_lineno for a in (
                *node.args.args, *node.args.kwonlyargs)] + (
                [node.returns.end_lineno] if node.returns else []))
        elif isinstance(node, ast.ClassDef | ast.Try):
            continue
        elif isinstance(node, ast.If | ast.While):
            last = node.test.end_lineno
        elif isinstance(node, ast.For):
            last = node.iter.end_lineno
        elif isinstance(node, ast.With):
            last = node.items[-1].context_expr.end_lineno
        found.append((node.lineno, last))
    return sorted(set(found))


def joined(lines: list[str]) -> str:
    first, *rest = (line.rstrip("\n") for line in lines)
    text = first
    for line in rest:
        line = line.strip()
        glue = "" if text.endswith(("(", "[", "{")) or line.startswith((")", "]", "}")) else " "
        text += glue + line
    return re.sub(r",([\])}])", r"\1", text) if not re.search(r"\(\w+,\)$", text) else text


def relaid(text: str, keep_broken: set[str]) -> str:
    """Statements over several lines on one where they fit; long lines wrapped."""
    lines, noted = text.splitlines(keepends=True), comments_of(text)
    strings = {line for node in ast.walk(ast.parse(text))
               if isinstance(node, ast.Constant | ast.JoinedStr)
               and node.end_lineno > node.lineno
               for line in range(node.lineno, node.end_lineno + 1)}
    for first, last in reversed(heads(ast.parse(text))):
        span = range(first, last + 1)
        if strings & set(span) or noted & set(span[:-1]):
            continue
        if any(lines[first - 1].startswith(word) for word in keep_broken):
            continue
        one = joined(lines[first - 1:last])
        if last > first and len(one) <= WIDTH:
            lines[first - 1:last] = [one + "\n"]
        elif any(len(line) > WIDTH + 1 for line in lines[first - 1:last]):
            lines[first - 1:last] = [wrapped(one) + "\n"]
    return "".join(lines)


def wrapped(line: str) -> str:
    """Broken behind commas or before operators, under the bracket that is open there."""
    done, outer = [], []
    while len(line) > WIDTH:
        depth, quote, best = list(outer), "", None
        for i, char in enumerate(line):
            if i > WIDTH:
                break
            if quote:
                quote = "" if char == quote else quote
            elif char in "\"'":
                quote = char
            elif char in "([{":
                depth.append(i)
            elif char in ")]}":
                if depth:
                    depth.pop()
            elif char == " " and depth and line[:i].strip():
                word = re.match(r" (for|if|else|and|or|in|\+|-|\*|/) ", line[i:])
                if line[i - 1] == "," or word:
                    score = (-len(depth), line[i - 1] == ",", i)
                    if best is None or score >= best[0]:
                        best = (score, i, depth[-1])
        if best is None:
            break
        _, cut, bracket = best
        if done and cut <= len(line) - len(line.lstrip()):
            break
        if bracket > 0.55 * WIDTH:  # little room there: break behind the bracket
            done.append(line[:bracket + 1])
            indent = len(line) - len(line.lstrip()) + 4 * (len(done) == 1)
            line, outer = " " * indent + line[bracket + 1:], [indent - 1]
            continue
        done.append(line[:cut])
        line, outer = " " * (bracket + 1) + line[cut + 1:], [bracket]
    return "\n".join([*done, line])


def without_newer(text: str, record: int) -> str:
    """Without comments, and sentences of docstrings, that speak of newer records."""
    known = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)} | {
        n.arg for n in ast.walk(ast.parse(text)) if isinstance(n, ast.arg)}

    def newer(words: str) -> bool:
        if any(w not in known and w.isidentifier() for w in re.findall(r"`(\w+)`", words)):
            return True
        numbers = [int(n) for n in re.findall(r"#(\d+)", words)]
        return bool(numbers) and min(numbers) > record

    lines = []
    for line in text.splitlines(keepends=True):
        code, mark, comment = line.partition("#")
        if code.strip() == "" and mark and newer(mark + comment):
            continue
        code, mark, comment = line.rpartition("  # ")
        if mark and newer(comment) and "'" not in comment and '"' not in comment:
            line = code.rstrip() + "\n"
        lines.append(line)
    text = Text("".join(lines))
    for node in ast.walk(text.tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not ast.get_docstring(node):
            continue
        expression = node.body[0].value
        source = text.source(expression)
        body = source[3:-3]
        paragraphs = []
        for paragraph in body.split("\n\n"):
            sentences = re.split(r"(?<=[.;])(\s+)(?=[A-Z`])", paragraph)
            kept = [s for i, s in enumerate(sentences)
                    if not newer(s if i % 2 == 0 else "")]
            if len(kept) == len(sentences):
                paragraphs.append(paragraph)
                continue
            words = " ".join(" ".join(kept).split())
            indent = " " * node.body[0].col_offset
            paragraphs.append(fill(words, indent, 0 if paragraphs else 3))
        gap = "\n\n"
        new = f'"""{gap.join(p for p in paragraphs if p.strip()).lstrip()}"""'
        if new == '""""""':
            text.drop(node.body[0])
        elif new != source:
            text.replace(expression, new.replace('\n\n"""', '"""'))
    return text.apply()


def fill(words: str, indent: str, taken: int) -> str:
    lines, line = [], ""
    for word in words.split():
        if len(indent) + taken + len(line) + 1 + len(word) > WIDTH - 3:
            lines, line, taken = [*lines, line], "", 0
        line = f"{line} {word}".strip()
    return f"\n{indent}".join([*lines, line])


def spaced(text: str) -> str:
    """Two blank lines between definitions, one inside; rules of empty sections go."""
    lines = text.splitlines()
    rules = [i for i, line in enumerate(lines) if RULE.match(line)]
    for i, start in reversed(list(enumerate(rules))):
        end = rules[i + 1] if i + 1 < len(rules) else len(lines)
        body = [line for line in lines[start + 1:end] if line.strip()]
        if not any(not line.startswith("#") for line in body):
            del lines[start:end]
    text = "\n".join(lines) + "\n"
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    text = re.sub(r"(\n    [^\n]*)\n{3,}(    )", r"\1\n\n\2", text)
    text = re.sub(r"\n{2,}(# --- [^\n]*-)\n+", r"\n\n\n\1\n\n", text)
    text = re.sub(r'(:\n)\n+( +\S)', r"\1\2", text)
    return text


def tidy(text: str, record: int, keep_broken: set[str]) -> str:
    text = spaced(without_newer(text, record))
    # around a name or number that is left of a longer expression
    text = re.sub(r"(?<== )\((\w+)\)(?= [*/+-])|(?<=[*/+-] )\((\w+)\)$", r"\1\2", text, flags=re.M)
    while True:
        new = relaid(text, keep_broken)
        if new == text:
            return text
        text = new
