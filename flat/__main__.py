"""Print a record's recipe as one self-contained program.

    python -m flat 6 > record6.py
    python -m flat 6 --scale pocket --num_iterations 50
    python -m flat 5 --diff 6           what record 6 changed, as a diff of two programs
    python -m flat 6 --html > 6.html    the program as a page, with what the record gained
    python -m flat 6 --html --diff 5    the same; lines that it has and #5 has not, and the reverse

Options are the trainer's: --scale, and fields of the recipe.
"""

import difflib
import sys

from flat.html import page
from flat.program import printed
from recipes import RECIPES, RECORDS
from trainer import options


def program(record: str, words: list[str]) -> str:
    """Raises ValueError, one line, for an unknown record or an option that the recipe refuses."""
    if record not in map(str, RECORDS):
        raise ValueError(f"expected a record, one of {', '.join(map(str, RECORDS))}, "
                         f"got {record!r}" + ", which has no program yet" * (record in RECIPES))
    scale = [] if any(w.startswith("--scale") for w in words) else ["--scale", "full"]
    run, recipe = options.parse(["--record", record, *scale, *words], has_cuda=True)
    allowed = options.RunOptions(record=run.record, scale=run.scale)
    if run != allowed:
        raise ValueError("expected --scale and fields of the recipe: a program has no options "
                         f"of the run, got {' '.join(words)}")
    if recipe.other_rule != "adam":
        raise ValueError("--other_rule: expected adam: a program knows the spectral norm alone, "
                         f"got {recipe.other_rule}")
    return printed(recipe, " ".join([record, *words]))


def gains(record: int) -> str:
    """What a record gained over the one before that the ladder has: published, and at pocket scale
    (records/data/ladder.jsonl)."""
    from records import ladder  # a second for scipy, which programs do without

    before, said = None, ""
    for row in ladder.rungs(ladder.read(ladder.ROOT / "records" / "data" / "ladder.jsonl")):
        if row["record"] == record and before:
            said = (f"Published: {row['published']['minutes']} minutes on 8 H100, after "
                    f"{before['published']['minutes']} of #{before['record']}. At pocket scale: "
                    f"loss {row['loss']:.4f}, {-row['gain']:+.4f} ± {row['error']:.4f} against "
                    f"#{before['record']}.")
        before = row
    return said


def main(words: list[str]) -> int:
    if not words or "--help" in words or "-h" in words:
        print(__doc__.strip())
        return 0 if words else 2
    record, *rest = words
    other, as_page = None, "--html" in rest
    if as_page:
        rest.remove("--html")
    if "--diff" in rest:
        at = rest.index("--diff")
        other = rest[at + 1] if at + 1 < len(rest) else ""
        rest = rest[:at] + rest[at + 2:]
    try:
        text = program(record, rest)
        before = program(other, rest) if other is not None else None
        if as_page:
            title = f"Record {record}: {RECORDS[int(record)].title}"
            note = f"{len(text.splitlines())} lines, printed by python -m flat {' '.join(words)}."
            if other is not None:
                note += f" Green: what #{other} has not; red: what it had instead."
            text = page(text, title, [gains(int(record)), note], before)
        elif before is not None:
            names = [f"record{record}.py", f"record{other}.py"]
            text = "".join(difflib.unified_diff(
                text.splitlines(keepends=True), before.splitlines(keepends=True), *names))
    except ValueError as error:
        print(f"flat: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
