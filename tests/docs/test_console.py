"""What runs the console blocks of the pages can tell right from wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sybil", reason="the pages are run in the session `docs`")

_spec = importlib.util.spec_from_file_location("docs_conftest", Path(__file__).parents[2] / "docs" / "conftest.py")
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)


@pytest.fixture
def shell(tmp_path):
    """What the blocks of a page are run in."""
    return runner.PageShell(tmp_path)


@pytest.fixture
def run(shell, monkeypatch):
    """Run one console block; what comes back is the text of the failure, or None."""
    monkeypatch.setattr(runner, "ACCELERATORS", ())
    return lambda block: runner.run_console(SimpleNamespace(parsed=block, namespace={"_shell": shell}))


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\nb", "a\nb\n", True),
        ("a", "a\nb\n", False),
        ("a\nb", "a\n", False),
        ("", "", True),
        ("", "a\n", False),
        ("took ... ms", "took 12.5 ms\n", True),
        ("took ... ms", "took 12.5 s\n", False),
        ("a ... c", "a\nb c\n", False),
        ("a\n...\nc", "a\nc\n", True),
        ("a\n...\nc", "a\nb\nb\nc\n", True),
        ("a\n...", "a\nb\n", True),
        ("...\nc", "a\nb\n", False),
        ("a.c", "abc\n", False),
        ("a", "a   \n", True),
    ],
)
def test_three_dots_stand_for_anything_in_a_line_or_for_any_lines(shown, printed, same):
    assert runner.following.matches(shown, printed) is same


def test_a_block_is_commands_with_what_they_print():
    block = "$ one\n1\n\n2\n$ two \\\n> more\n$ three\n"
    assert [("one", "1\n\n2"), ("two \\\nmore", ""), ("three", "")] == runner.following.commands(block)
    with pytest.raises(ValueError, match="starts with a command"):
        runner.following.commands("no prompt\n")


def test_folder_variables_and_status_last_from_block_to_block(run):
    assert run("$ mkdir here && cd here && export WORD=kept\n$ false\n$ echo $?\n1") is None
    assert run("$ echo $WORD in ${PWD##*/}\nkept in here") is None


def test_a_command_that_fails_must_be_shown_to_fail(run):
    assert "ended with 3" in run("$ (exit 3)")
    assert run("$ (exit 3)\n$ echo $?\n3") is None


def test_other_output_is_a_failure_that_shows_both(run):
    text = run("$ echo there\nhere")
    assert "-here" in text
    assert "+there" in text


def test_a_command_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "DEADLINE", 0.5)
    assert "no end after 0.5 s" in runner.PageShell(tmp_path).run("sleep 30 & sleep 30")


def test_a_command_that_is_stopped_has_failed_whatever_the_page_shows(run, shell):
    assert run("$ true") is None
    shell.seconds = 0.5
    assert "ended with 124" in run("$ sleep 30\n...")


def test_whatever_interrupts_a_command_ends_what_it_started(tmp_path, monkeypatch):
    shell, pid = runner.PageShell(tmp_path), tmp_path / "pid"

    def interrupted(*_, **__):
        while not pid.exists() or not pid.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shell.run(f"sleep 30 & echo $! > {pid}; wait")
    stat, until = Path("/proc", pid.read_text().strip(), "stat"), time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < until, "it goes on"
            time.sleep(0.01)


def test_nothing_of_the_caller_reaches_the_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORWAY_STRICT", "perhaps")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    shell = runner.PageShell(tmp_path)
    assert "core\nplugins" in shell.run("ls; env | grep -E '^(TENSORWAY_|PYTHONPATH)'")
    assert "TENSORWAY_STRICT" not in shell.environment


def test_tensorway_is_that_of_this_interpreter(tmp_path):
    assert (
        str(Path(sys.executable).parent / "tensorway") == runner.PageShell(tmp_path).run("command -v tensorway").strip()
    )


def test_a_json_answer_is_checked_against_its_schema():
    with pytest.raises(runner.jsonschema.ValidationError):
        runner.valid({"schema": "tensorway.error/1", "error": "x"})
