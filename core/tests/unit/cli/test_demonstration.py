"""What a movement's part of the demo is given: time that ends, and errors of three lines for processes that fail."""

from __future__ import annotations

import io
import os
import signal
import time

import pytest

from tensorway.cli.demonstration import Ratio, Stage, memmove
from tensorway.cli.output import Output
from tensorway.errors import DeadlineExceeded, PeerLost, Unsupported
from tensorway.testing.ranks import RankProcess


def stage(seconds):
    return Stage(Output(stream=io.StringIO()), "A test", "local", time.monotonic() + seconds)


def raise_ours(rank):
    raise Unsupported("It was asked.", "It cannot.", "Take another.")


def raise_another(rank):
    raise OSError("no such file")


def end(rank):
    os.kill(os.getpid(), signal.SIGKILL)


def nap(rank, seconds):
    time.sleep(seconds)


@pytest.fixture
def process():
    found = RankProcess("")
    yield found
    found.close()


@pytest.mark.parametrize(
    ("function", "kind", "true"),
    [
        (raise_ours, Unsupported, "It cannot."),
        (raise_another, PeerLost, "One of its processes failed: OSError: no such file."),
        (end, PeerLost, "ended with -9."),
    ],
)
def test_what_a_process_does_is_an_error_of_three_lines(process, function, kind, true):
    with pytest.raises(kind) as caught, stage(60).processes():
        process.call(function)
    assert caught.value.true.endswith(true) and 3 == len(str(caught.value).splitlines())


def test_a_process_that_is_late_ends_with_the_time_that_there_was(process):
    given = stage(3)
    with pytest.raises(DeadlineExceeded) as caught, given.processes():
        process.call(nap, 60, seconds=given.left())
    assert "A test was to be shown." == caught.value.asked


def test_time_that_is_over_is_an_error_and_not_a_wait():
    with pytest.raises(DeadlineExceeded):
        stage(-1).left()
    assert 0 < stage(60).left() <= 60


def test_a_ratio_has_two_digits():
    found = [Ratio("a", "b", seconds, 1.0).text for seconds in (0.01234, 1.26, 9.96, 26.4, 1440)]
    assert ["0.012 x", "1.3 x", "10 x", "26 x", "1,440 x"] == found
    assert 0 < memmove(1 << 16) < 60
