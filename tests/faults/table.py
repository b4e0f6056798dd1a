"""Write measured times into the table of README.md.

    python -m pytest tests -n 2 --junitxml=all.xml
    python tests/faults/table.py all.xml

Each row ends in the tests it rests on, as `file::name`; `took` becomes the time of the longest of
them and `reacts` what they recorded as the time from the fault to its end.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

README = Path(__file__).with_name("README.md")


def measured(*xmls: Path) -> dict[str, tuple[float, float | None]]:
    """`file::name` -> (seconds of the slowest variant, seconds that it recorded as reaction)."""
    found: dict[str, tuple[float, float | None]] = {}
    cases = (case for xml in xmls for case in ElementTree.parse(xml).iter("testcase"))
    for case in cases:
        if case.find("failure") is not None or case.find("skipped") is not None:
            continue
        name = case.get("classname").rpartition(".")[2] + "::" + case.get("name").partition("[")[0]
        reacts = [float(p.get("value")) for p in case.iter("property") if p.get("name") == "reacts"]
        took, before = found.get(name, (0.0, None))
        both = [*reacts, *([before] if before is not None else [])]
        found[name] = (max(took, float(case.get("time"))), max(both) if both else None)
    return found


def rows(text: str) -> list[list[str]]:
    """Cells of the table's rows, without its head."""
    lines = [line for line in text.splitlines() if re.match(r"\| [DLNPST]\d+ \|", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named_in(row: list[str]) -> list[str]:
    return re.findall(r"`(\w+::\w+)`", row[-1])


def filled(row: list[str], times: dict) -> list[str]:
    known = [times[name] for name in named_in(row) if name in times]
    if known:
        reacts = [r for _, r in known if r is not None]
        row[3] = f"{max(t for t, _ in known):.1f} s"
        row[2] = f"{max(reacts):.1f} s" if reacts else "-"
    return row


def main(*xmls: Path) -> None:
    times, text = measured(*xmls), README.read_text()
    for line in text.splitlines():
        for row in rows(line):
            text = text.replace(line, f"| {' | '.join(filled(row, times))} |")
    README.write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
