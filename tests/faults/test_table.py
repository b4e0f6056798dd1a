"""The table of README.md is whole: every case, and every test it names."""

import ast
import re
from pathlib import Path

from faults.table import README, named_in, rows

TESTS = README.parent.parent
CASES = {f"{area}{n}" for area, last in
         {"D": 20, "L": 10, "N": 7, "P": 10, "S": 10, "T": 6}.items() for n in range(1, last + 1)}


def names() -> set[str]:
    """file::name of every test and fixture in tests/."""
    files: list[Path] = [*TESTS.glob("*.py"), *README.parent.glob("*.py")]
    return {f"{file.stem}::{node.name}" for file in files
            for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_the_table_has_all_63_cases_once():
    cases = [row[0] for row in rows(README.read_text())]
    assert len(CASES) == 63
    assert sorted(cases) == sorted(CASES)


def test_each_case_rests_on_tests_that_exist():
    there = names()
    for row in rows(README.read_text()):
        assert named_in(row), row[0]
        assert set(named_in(row)) <= there, row[0]


def test_each_test_named_after_a_case_stands_in_its_row():
    by_case = {row[0]: set(named_in(row)) for row in rows(README.read_text())}
    for name in names():
        head = re.match(r"test_\w+::test_((?:[DLNPST]\d+_(?:to_)?)+)", name)
        for case in re.findall(r"[DLNPST]\d+", head[1]) if head else ():
            assert name in by_case[case], (name, case)
