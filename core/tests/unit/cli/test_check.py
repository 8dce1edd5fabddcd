"""What `tensorway check` makes of the tests' outcomes; whole runs of it are in hosting/test_cli.py."""

from __future__ import annotations

import io
import json
import os

import pytest

from tensorway.cli import check
from tensorway.cli.output import Output


@pytest.fixture
def out():
    return Output(stream=io.StringIO())


def play(out, *events):
    """A run that hears these events."""
    run = check._Run()
    return run, [check._take(out, run, event) for event in events]


def end(outcome, reason=""):
    return {"end": "f.py::TestOfferSuite::test_a_b", "outcome": outcome, "reason": reason, "seconds": 0.1, "detail": ""}


def test_a_remedy_is_kept_of_what_failed_only(out):
    start = {"start": "f.py::TestOfferSuite::test_a_b", "remedy": "mend it."}
    for outcome, remedy in (("passed", ""), ("skipped", ""), ("failed", "mend it.")):
        run, _ = play(out, {"collected": ["x"]}, start, end(outcome))
        (row,) = run.rows.values()
        assert ("OfferSuite::test_a_b", outcome, remedy) == (row["id"], row["outcome"], row["remedy"])
    assert "OfferSuite, 1 tests in all\n  + a b\n" in out.stream.getvalue()


def test_a_process_that_ends_in_a_test_has_failed_it_and_the_run_goes_on(out):
    start = {"start": "f.py::TestOfferSuite::test_a_b", "remedy": "mend it."}
    run, over = play(out, start, {"ended": "its process was killed by SIGABRT", "seconds": 1, "output": "x"})
    assert [False, False] == over
    (row,) = run.rows.values()
    assert ("failed", "its process was killed by SIGABRT", "mend it.") == (row["outcome"], row["reason"], row["remedy"])


def test_a_process_that_ends_outside_of_tests_ends_the_run(out):
    run, over = play(out, {"ended": "its process ended with exit status 4", "seconds": 1, "output": "x"})
    assert [True] == over
    assert ["failed"] == [row["outcome"] for row in run.rows.values()]


def test_lines_come_whole_and_silence_ends_them():
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b'{"a": 1}\n{"b"')
    lines = check._lines(read_fd, 0.05)
    assert b'{"a": 1}' == next(lines)
    os.write(write_fd, b": 2}\n")
    assert [b'{"b": 2}', None] == [next(lines), next(lines)]
    os.close(write_fd)
    assert [] == list(check._lines(read_fd, 0.05))
    os.close(read_fd)


def test_the_report_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    check._write(path, '{"a": 1}')
    with pytest.raises(TypeError):
        check._write(path, object())
    assert {"a": 1} == json.loads(path.read_text())
    assert [path] == list(tmp_path.iterdir())


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read_fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    check._write(path, '{"a": 1}')
    assert {"a": 1} == json.loads(os.read(read_fd, 100))
    os.close(read_fd)
    assert path.is_fifo()


@pytest.mark.parametrize(
    ("status", "said"),
    [(3, "ended with exit status 3"), (-6, "killed by SIGABRT"), (-63, "killed by signal 63")],
)
def test_how_a_process_ended_has_words(status, said):
    assert said in check._how(status)
