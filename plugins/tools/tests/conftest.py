"""Processes that live beside a test, and end with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LIVES = Path(__file__).with_name("lives.py")
PATIENCE = 60


class Life:
    """A process of `lives.py`, which has begun."""

    def __init__(self, folder, *words):
        environment = {**os.environ, "TENSORWAY_METRICS": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, str(LIVES), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.pid = self.process.pid
        line = self.process.stdout.readline()
        assert line, f"{words} ended with {self.process.wait(PATIENCE)}"
        self.said = json.loads(line)

    def signal(self, number):
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(PATIENCE)

    def end(self):
        """Let it end as it wants to; what it says last."""
        self.process.stdin.close()
        said = self.process.stdout.read().splitlines()
        assert 0 == self.process.wait(PATIENCE)
        return json.loads(said[-1]) if said else {}

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def folder(tmp_path):
    """Where the processes of a test have their sockets."""
    return tmp_path / "seen"


@pytest.fixture
def live(folder):
    """Starts processes."""
    with contextlib.ExitStack() as stack:

        def start(*words):
            made = Life(folder, *words)
            stack.callback(made.close)
            return made

        yield start
