"""Who is told to end does so in order; who is not to hear of a hang-up does not."""

from __future__ import annotations

import os
import signal

import pytest

from tensorway import cli
from tensorway.cli import exits
from tensorway.cli.ending import ended_in_order


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP])
def number(request):
    """One of both; what its handler was is restored."""
    before = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_ends_it_through_all_that_is_to_be_closed_and_the_handler_is_back_then(number):
    signal.signal(number, signal.SIG_DFL)
    closed = []

    @ended_in_order()
    def command():
        try:
            os.kill(os.getpid(), number)
        finally:
            closed.append(number)

    with pytest.raises(SystemExit) as raised:
        command()
    assert (128 + number, [number]) == (raised.value.code, closed)
    assert signal.SIG_DFL == signal.getsignal(number)


def test_a_signal_that_is_ignored_stays_so(number):
    signal.signal(number, signal.SIG_IGN)
    with ended_in_order():
        assert signal.SIG_IGN == signal.getsignal(number)
        os.kill(os.getpid(), number)
    assert signal.SIG_IGN == signal.getsignal(number)


def test_another_pipe_that_breaks_is_no_reader_that_went_away(monkeypatch, capfd):
    def broken(arguments, out):
        raise BrokenPipeError("of a process that was killed")

    monkeypatch.setattr(cli, "_run", broken)
    assert exits.INTERNAL == cli.main(["doctor"])
    assert "BrokenPipeError: of a process that was killed" in capfd.readouterr().err
