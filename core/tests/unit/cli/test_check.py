"""What `tensorway check` makes of the tests' outcomes; whole runs of it are in hosting/test_cli.py."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tensorway.cli import check, exits, main
from tensorway.cli.output import Output
from tensorway.errors import TensorwayError
from tensorway.testing.waiting import eventually


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


def test_a_badge_in_the_place_of_the_report_or_of_another_is_refused_before_the_work(site, tmp_path):
    site.good("alpha", "platform")
    (tmp_path / "other.json").symlink_to("report.json")
    host, report, badge = site.host(), tmp_path / "report.json", tmp_path / "badge.svg"
    (slot,) = host.named("alpha")
    for badges in ([report], [tmp_path / "other.json"], [badge, badge]):
        with pytest.raises(TensorwayError, match="the same file") as raised:
            check._check_places(slot, [report, *badges])
        assert exits.USAGE == exits.code_for(raised.value)
    check._check_places(slot, [report, badge])


def test_options_that_are_too_deep_are_an_error_of_usage(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["check", "cpu", "--options", "[" * 200_000])
    assert exits.USAGE == raised.value.code
    assert "argument --options: no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "said"),
    [(3, "ended with exit status 3"), (-6, "killed by SIGABRT"), (-63, "killed by signal 63")],
)
def test_how_a_process_ended_has_words(status, said):
    assert said in check._how(status)


#: It says which process of pytest has loaded it, and keeps that one for good.
STAYS = """
import attrs, os, sys, time
if "pytest" in sys.modules:
    with open(os.environ["STAYS"] + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, os.environ["STAYS"])
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_check_that_is_told_to_end_takes_its_tests_and_its_folder_with_it(site, tmp_path, number):
    site.good("stays", "platform")
    module = site.path / "stays_dist.py"
    module.write_text(module.read_text().replace("import attrs\n", STAYS))
    said, scratch = tmp_path / "said", tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorway", "check", "stays", "--output", str(tmp_path / "report.json")],
        env={**os.environ, "PYTHONPATH": str(site.path), "STAYS": str(said), "TMPDIR": str(scratch)},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # what runs the tests may have it ignored
        stdout=subprocess.DEVNULL,
    )
    try:
        eventually(said.exists, 60)
        child = int(said.read_text())
        assert list(scratch.iterdir())
        process.send_signal(number)
        assert 128 + number == process.wait(60)
        eventually(lambda: gone(child), 60)
        assert [] == list(scratch.iterdir())
    finally:
        process.kill()
        process.wait(60)
        if said.exists() and not gone(int(said.read_text())):
            os.killpg(int(said.read_text()), signal.SIGKILL)


def gone(pid):
    """Whether a process is, or nobody but its parent knows of it any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
