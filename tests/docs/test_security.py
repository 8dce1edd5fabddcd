"""Every threat on the page of security has tests, and each of these is there and is collected."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD = ["threat", "what stops it", "what remains", "tests"]
TEST = re.compile(r"`([\w./-]+\.py)::(\w+)`")


def threats(page):
    """The rows of all tables of threats, each with its four cells."""
    text = page("security.md").sections(2)["Threats"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if row != HEAD and not set("".join(row)) <= set("- ")]


@cache
def functions(path):
    """The tests of a file that pytest runs by their names, which are none if all of the file is skipped or renamed."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_tables_are_read(page):
    found = threats(page)
    assert len(found) > 40 and all(len(row) == 4 for row in found)
    assert {tuple(HEAD)} == {tuple(row) for row in _heads(page)}


def _heads(page):
    for _, section in page("security.md").sections(3).items():
        lines = [line for line in section.splitlines() if line.startswith("|")]
        yield [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_every_threat_has_what_stops_it_and_a_test(page):
    for threat, stops, _, tests in threats(page):
        assert threat and stops and TEST.findall(tests), threat
        assert "" == TEST.sub("", tests).strip(), f"{threat}: only tests stand there"


def test_every_test_is_there_and_none_is_always_skipped(page):
    for threat, _, _, tests in threats(page):
        for path, name in TEST.findall(tests):
            assert path.split("/")[-1].startswith("test_") and "tests" in path.split("/"), path
            assert name.startswith("test_") and name in functions(path), f"{threat}: {path}::{name}"
            marks = {ast.unparse(mark) for mark in functions(path)[name].decorator_list}
            assert not [mark for mark in marks if re.match(r"pytest\.mark\.(skip|xfail)\b", mark)], name


def test_pytest_collects_them(page):
    """Of a file that needs a library which is not here, none is: pytest says so, and the session of its dist has it."""
    named = {test for row in threats(page) for test in TEST.findall(row[3])}
    files = sorted({path for path, _ in named})
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "no:cacheprovider", "-q", "--collect-only"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    collected = set(re.findall(r"^([\w./-]+\.py)::(\w+)", done.stdout, re.MULTILINE))
    skipped = set(re.findall(r"^SKIPPED \[\d+\] ([\w./-]+\.py):\d+: ", done.stdout, re.MULTILINE))
    assert set() == {test for test in named - collected if test[0] not in skipped}, done.stdout[-2000:]
    assert not [path for path in skipped if path.startswith("core/")]
    assert len(collected & named) > 60
