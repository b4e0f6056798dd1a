"""A flat program as one static page: colours, a table of contents, what changed."""

import ast
import builtins
import difflib
import io
import keyword
import tokenize
from html import escape

from flat.tree import RULE

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #fff; --text: #1f2328; --soft: #656d76; --line: #d8dee4;
  --keyword: #a3104f; --string: #0a4a8f; --number: #0550ae; --name: #6639ba;
  --new: #dafbe1; --old: #ffebe9; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #0d1117; --text: #e6edf3; --soft: #8b949e;
  --line: #30363d; --keyword: #ff7b9c; --string: #a5d6ff; --number: #79c0ff; --name: #d2a8ff;
  --new: #12351f; --old: #3c1618; }} }}
body {{ margin: 0; background: var(--back); color: var(--text); display: grid;
  font: 15px/1.5 system-ui, sans-serif; grid-template-columns: 15rem minmax(0, 1fr); }}
header {{ grid-column: 1 / 3; padding: 1rem 1.5rem; border-bottom: 1px solid var(--line); }}
h1 {{ font-size: 1.3rem; margin: 0; }}
p {{ margin: .2rem 0 0; color: var(--soft); }}
nav {{ position: sticky; top: 0; max-height: 100vh; overflow: auto; align-self: start;
  box-sizing: border-box; padding: 1rem 0 1rem 1.5rem; font-size: .85rem; }}
nav a {{ display: block; color: inherit; text-decoration: none; padding: .1rem .4rem; }}
nav a.section {{ margin-top: .5rem; color: var(--soft); }}
nav a.method {{ padding-left: 1.4rem; color: var(--soft); }}
nav a:hover {{ text-decoration: underline; }}
pre {{ margin: 0; padding: 1rem 1.5rem 3rem 0; font: 13px/1.5 ui-monospace, Menlo, Consolas,
  monospace; overflow-x: auto; counter-reset: line; }}
.line {{ display: block; padding-left: 4.5em; min-width: max-content; }}
.line::before {{ counter-increment: line; content: counter(line); color: var(--soft); opacity: .6;
  float: left; width: 3em; margin-left: -4.2em; text-align: right; user-select: none; }}
.line:target {{ outline: 1px solid var(--soft); }}
.new {{ background: var(--new); }}
.old {{ background: var(--old); color: var(--soft); }}
.old::before {{ counter-increment: none; content: "-"; }}
.keyword {{ color: var(--keyword); }} .string {{ color: var(--string); }}
.number {{ color: var(--number); }} .name {{ color: var(--name); }}
.comment {{ color: var(--soft); font-style: italic; }}
@media (max-width: 60rem) {{ body {{ display: block; }} header {{ padding: 1rem; }}
  nav {{ position: static; max-height: 12rem; padding: .5rem .6rem; columns: 2;
    border-bottom: 1px solid var(--line); }}
  pre {{ font-size: 11px; padding: 1rem .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
  .line {{ min-width: 0; padding-left: calc((var(--in, 0) + 3) * 1ch);
    text-indent: calc((var(--in, 0) + 2) * -1ch); }}
  .rule {{ white-space: pre; overflow: hidden; }}
  .line::before {{ content: none; }} }}
</style>
<header><h1>{title}</h1>{notes}</header>
<nav>{contents}</nav>
<pre>{program}</pre>
</html>
"""
STRINGS = {"STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}


def kind_of(token: tokenize.TokenInfo, before: str) -> str:
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        if before in ("def", "class", "."):
            return "name" if before != "." else ""
        return "keyword" if keyword.iskeyword(token.string) else (
            "number" if hasattr(builtins, token.string) else "")
    return "string" if name in STRINGS else name.lower() if name in ("NUMBER", "COMMENT") else ""


def coloured(text: str) -> list[str]:
    """The lines of a program as HTML."""
    lines, spans = text.splitlines(), {}
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, before = kind_of(token, before), token.string
        for n in range(token.start[0], token.end[0] + 1) if kind else ():
            first = token.start[1] if n == token.start[0] else 0
            last = token.end[1] if n == token.end[0] else len(lines[n - 1])
            spans.setdefault(n, []).append((first, last, kind))
    found = []
    for n, line in enumerate(lines, 1):
        html, at = "", 0
        for first, last, kind in spans.get(n, ()):
            if first >= at:
                html += f'{escape(line[at:first])}<span class="{kind}">{escape(line[first:last])}'
                html, at = f"{html}</span>", last
        found.append(html + escape(line[at:]))
    return found


def line_html(line: str, html: str, kind: str, name: str = "") -> str:
    kinds = f"line {kind}".strip() + " rule" * bool(RULE.match(line))
    inside = f' style="--in:{len(line) - len(line.lstrip())}"' * line.startswith(" ")
    return f'<span class="{kinds}"{name}{inside}>{html}\n</span>'


def page(text: str, title: str, notes: list[str], other: str | None = None) -> str:
    """The page of a program, beside the program `other`: what it has not is marked as new, what it
    has instead stands above as old."""
    lines, new, old = text.splitlines(), set(), {}
    if other is not None:
        before = other.splitlines()
        matcher = difflib.SequenceMatcher(None, before, lines, autojunk=False)
        for what, i, j, first, last in matcher.get_opcodes():
            if what != "equal":
                new |= set(range(first + 1, last + 1))
                old[first + 1] = before[i:j]
    contents = [(n, f'<a class="section" href="#L{n}">{line.strip("# -")}</a>')
                for n, line in enumerate(lines, 1) if RULE.match(line)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            marked = " new" * bool(new & set(range(node.lineno, node.end_lineno + 1)))
            method = " method" * (node.col_offset > 0)
            contents.append((node.lineno, f'<a class="{(method + marked).strip()}" '
                                          f'href="#L{node.lineno}">{node.name}</a>'))
    program = ""
    for n, (line, html) in enumerate(zip(lines, coloured(text)), 1):
        program += "".join(line_html(gone, escape(gone), "old") for gone in old.get(n, ()))
        program += line_html(line, html, "new" * (n in new), f' id="L{n}"')
    return PAGE.format(title=escape(title), program=program,
                       notes="".join(f"<p>{escape(note)}</p>" for note in notes if note),
                       contents="".join(link for _, link in sorted(contents)))
