"""Nothing on the pages is code that nobody runs: each kind of fence has something that executes or compares it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Without what is built of them, and the examples, which are dists with pages of their own.
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if not {"_build", "examples"} & {*path.parts})
#: Run, parsed or written by docs/conftest.py.
EXECUTED = {"python", "console", "toml", "json", "yaml"}
#: Not code: Sphinx makes it part of the page.
DIRECTIVES = {"{toctree}", "{eval-rst}", "{raw}", "{literalinclude}"}
#: Pages whose text blocks a test compares with what the code says.
COMPARED = {
    "docs/reference/errors.md": "tests/docs/test_catalogue.py",
    "docs/vllm-router.md": "plugins/vllm/tests/test_router_options.py",
    "docs/vllm-troubleshooting.md": "plugins/vllm/tests/test_troubleshooting.py",
}
#: Pages whose shell blocks need a vLLM, which the docs are tested without: what runs them where there is one.
RUN_WITH_VLLM = {"docs/vllm.md": "plugins/vllm/tests/test_recipes.py"}
#: First line of each block that nobody runs, with the reason.
UNEXECUTED = {
    'pip install "tensorway[nixl]"': "the dists are not on the index yet",
}


def fences(path):
    """Each fence of a page: its line, its info string, its lines."""
    found, block = [], None
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        opening = re.match(r"\s*(`{3,}|~{3,})(.*)", line)
        if block is None and opening:
            block = (number, opening[2].strip(), [])
        elif block is not None and opening and not opening[2].strip():
            found.append(block)
            block = None
        elif block is not None:
            block[2].append(line)
    assert block is None, f"{path}:{block[0]} does not end"
    return found


ALL = [(path, *fence) for path in PAGES for fence in fences(path)]


def named(path, number):
    return f"{path.relative_to(ROOT)}:{number}"


def test_there_are_pages_and_blocks():
    assert len(PAGES) > 25
    assert {"python", "console"} <= {info for _, _, info, _ in ALL}


def test_every_block_is_run_or_compared_or_listed_here_with_a_reason():
    left = []
    for path, number, info, lines in ALL:
        file = info == "{code-block} python" and lines[0].startswith(":caption: ")
        compared = info == "text" and str(path.relative_to(ROOT)) in COMPARED
        listed = info == "sh" and len(lines) == 1 and lines[0] in UNEXECUTED
        elsewhere = info == "sh" and str(path.relative_to(ROOT)) in RUN_WITH_VLLM
        if not (info in EXECUTED or info.split()[0] in DIRECTIVES or file or compared or listed or elsewhere):
            left.append(f"{named(path, number)}: {info}: {lines[0]}")
    assert [] == left


def test_what_is_listed_as_not_run_is_on_a_page():
    assert set() == set(UNEXECUTED) - {lines[0] for _, _, info, lines in ALL if info == "sh"}


def test_the_page_that_needs_a_vllm_is_followed_by_a_session_of_the_gate():
    (page,) = re.findall(r'^WITH_VLLM = "(.*)"$', (ROOT / "docs" / "following.py").read_text("utf-8"), re.MULTILINE)
    sessions = (ROOT / "noxfile.py").read_text("utf-8")
    assert f'TASKS["vllm"] = ("{page}", "")' in sessions and 'nox.options.sessions += ["tasks(vllm)"]' in sessions


def test_the_compared_pages_have_blocks_and_the_tests_that_compare_them():
    for path, test in COMPARED.items():
        assert (ROOT / test).is_file()
        assert [info for page, _, info, _ in ALL if page == ROOT / path and info == "text"]


def test_what_needs_vllm_is_run_by_a_test_that_knows_every_section_with_a_command():
    for name, test in RUN_WITH_VLLM.items():
        source = (ROOT / test).read_text("utf-8")
        text = (ROOT / name).read_text("utf-8")
        parts = [part for part in re.split(r"^## ", text, flags=re.MULTILINE) if "```sh\n" in part]
        assert parts
        assert [] == [title for title, *_ in map(str.splitlines, parts) if f'    "{title}": "test_' not in source]


def test_no_block_is_skipped_by_a_comment():
    comments = [
        named(path, 1) for path in PAGES if re.search(r"^(%|<!--).*\bskip\b", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert [] == comments


def test_console_blocks_show_commands():
    wrong = [
        named(path, number) for path, number, info, lines in ALL if info == "console" and not lines[0].startswith("$ ")
    ]
    assert [] == wrong


def test_the_readme_s_python_runs(capsys):
    pytest.importorskip("tensorway.platforms")
    blocks = [lines for _, info, lines in fences(ROOT / "README.md") if info == "python"]
    assert blocks
    for lines in blocks:
        exec(compile("\n".join(lines), "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
