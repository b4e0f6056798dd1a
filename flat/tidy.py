"""Comments and docstrings of a folded program: without sentences about newer records, about options
that the record has not, or about names that went."""

import ast
import re

from flat.fold import FUNCTION, Known, parameters_of, statement
from flat.tree import RULE, WIDTH, Note, blocks, is_docstring, walk


class Docs:
    """Judges sentences of one recipe's program."""

    def __init__(self, tree: ast.Module, known: Known, record: int, fields: dict[str, object]):
        self.tree, self.known, self.record, self.fields = tree, known, record, fields
        self.unit = {}
        for unit in tree.body:
            for node in walk(unit):
                if isinstance(node, FUNCTION | ast.ClassDef):
                    self.unit[id(node)] = unit.name
                if isinstance(node, FUNCTION):
                    node.given = {a.arg for a in parameters_of(node)}
        self.names = self.identifiers()

    def identifiers(self) -> set[str]:
        found = set()
        for n in walk(self.tree):
            found |= {getattr(n, field, None) for field in ("id", "attr", "arg", "name")}
        return found

    def is_stale(self, words: str, owner: ast.AST | None) -> bool:
        """Whether the program has not what a sentence is about."""
        numbers = [int(n) for n in re.findall(r"#(\d+)", words)]
        if numbers and min(numbers) > self.record:
            return True
        if re.match("[Nn]one (where|if)", words) and isinstance(owner, FUNCTION) and (
                "None" not in ast.unparse(owner.returns)):
            return True
        rejected = self.known.rejected.get(self.unit.get(id(owner)), ())
        quoted = re.findall(r'"([\w ]+)"', words)
        option = re.match(r"([a-z]\w*): ", words)  # another value of a field than the record's
        if option and owner and option[1] not in self.fields.values():
            return True
        gone = getattr(owner, "given", set())
        if isinstance(owner, FUNCTION):
            gone = gone - {n.id for n in walk(owner) if isinstance(n, ast.Name)} - {
                a.arg for a in parameters_of(owner)}
        named = set(re.findall(r"`(\w+)`", words))
        fields = {w for w in re.findall(r"\b[a-z]\w*_\w+\b", words) if w in self.fields}
        return not {*quoted}.isdisjoint(rejected) or bool((named | fields) & gone) or any(
            w not in self.names for w in named) or any(
            w.upper() not in self.known.constants and not isinstance(self.fields[w], str)
            and self.fields[w] is not True for w in fields)

    def docstring(self, node: FUNCTION | ast.ClassDef) -> str:
        """What is left of a docstring, in its paragraphs."""
        text = "\n".join(node.body[0].lines)[3:-3]
        paragraphs = []
        for paragraph in text.split("\n\n"):
            kept = self.sentences(paragraph, node)
            if kept:
                paragraphs.append(kept)
        def shown(match: re.Match) -> str:
            name = match[0].upper()
            return name if name in self.known.constants else match[0]

        return re.sub(r"\b[a-z]+_\w+\b", shown, "\n\n".join(paragraphs)).rstrip()

    def sentences(self, paragraph: str, owner: ast.AST) -> str:
        def inside(match: re.Match) -> str:
            more = re.sub(r"[#\d\W]", "", match[0])
            return "" if more and self.is_stale(match[1], owner) else match[0]

        words = re.sub(r"[,;] see (recipes|model)\.\w+", "", paragraph)
        words = re.sub(r"\s*\(([^()]*)\)", inside, words)
        found = re.split(r"(?<=[.;])\s+(?=\S)", words)
        chosen = {*self.known.chosen.get(self.unit[id(owner)], ()), *map(str, self.fields.values())}
        kept, dropped, more = [], False, False
        for s in found:
            option = re.match(r'"?(\w+)"?: (.)', s)
            dropped = self.is_stale(s, owner) or (dropped and more)
            more = s.endswith(";")  # the next clause goes on with this one
            if not dropped:
                kept.append(option[2].upper() + s[option.end():]
                            if option and option[1] in chosen else s)
        if kept == found and words == paragraph:
            return paragraph
        text = " ".join(" ".join(kept).split())
        if kept[:1] != found[:1]:
            text = text[:1].upper() + text[1:]
        return re.sub(r";$", ".", text)

    def comment(self, function: FUNCTION) -> list[str]:
        """Its docstring as comment lines; of a longer one what gives a source."""
        if not is_docstring(function.body[0]) or function.name.startswith("_"):
            return []
        text = " ".join(self.docstring(function).split())
        if len(text) > WIDTH - 10:
            text = " ".join(s for s in re.split(r"(?<=\.) ", text) if "#" in s)
        return [f"# {line}" for line in fill(text, WIDTH - 10).splitlines() if line]

    def clean(self) -> None:
        """All comments and docstrings of the tree; rules of sections that are empty."""
        self.names = self.identifiers()
        for body in blocks(self.tree):
            for node in body:
                if isinstance(node, Note):
                    continue
                node.above = [line for line in node.above if not self.is_stale(line, None)]
                if node.beside and self.is_stale(node.beside, None):
                    node.beside = ""
                if isinstance(node, FUNCTION | ast.ClassDef) and is_docstring(node.body[0]):
                    self.rewrite(node)
        body = self.tree.body
        rules = [isinstance(n, Note) and bool(RULE.match(n.text)) for n in body] + [True]
        self.tree.body = [n for i, n in enumerate(body) if not (rules[i] and rules[i + 1])]

    def rewrite(self, node: FUNCTION | ast.ClassDef) -> None:
        before = "\n".join(node.body[0].lines)[3:-3]
        text = self.docstring(node)
        if not text:
            del node.body[0]
            node.body = node.body or [statement("pass")]
            node.body[0].blank = False
        elif text != before.rstrip():
            depth = 8 if self.unit[id(node)] != node.name else 4
            paragraphs = [p if p in before else fill(p, WIDTH - depth - 3)
                          for p in text.split("\n\n")]
            end = "\n" if before.endswith("\n") and len(paragraphs) > 1 else ""
            text = "\n\n".join(paragraphs)
            node.body[0].lines = f'"""{text}{end}"""'.split("\n")


def fill(words: str, width: int) -> str:
    lines, line = [], ""
    for word in words.split():
        if len(line) + 1 + len(word) > width - 3 * (not lines):
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])
