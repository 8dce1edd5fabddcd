"""A real TCPStore in a process of its own; and fresh interpreters."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensorway.testing import elsewhere


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# torch looks up the names of addresses; where no name server answers, that is five seconds for each, or ten.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

#: Runs a TCPStore until it is killed.
SERVE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
time.sleep(600)
"""


class Server:
    """One TCPStore that can be killed, stopped and started again, empty then."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, str(self.port)])
        until = time.monotonic() + 60
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < until
            time.sleep(0.02)

    def answers(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)


@pytest.fixture(scope="session")
def torch_version() -> str:
    """The version of the torch that is installed; a session that was promised one fails without it."""
    promised, found = os.environ.get("TENSORWAY_TEST_LIBRARY"), importlib.util.find_spec("torch")
    if found is None and promised == "with":
        pytest.fail("TENSORWAY_TEST_LIBRARY=with, and torch is not installed")
    if found is None or promised == "without":
        pytest.skip("needs torch: pip install torch -c constraints.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns while it is imported, where there is no numpy
        import torch.distributed as dist

    assert dist.is_available()
    from tensorway.platforms import torch_build

    return str(torch_build().version)


@pytest.fixture(scope="session")
def shared(torch_version: str) -> Iterator[Server]:
    """A store that all tests share, and none harms."""
    server = Server()
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def launch(torch_version: str) -> Iterator[Callable[..., Server]]:
    """Start stores of this test's own."""
    servers: list[Server] = []

    def start() -> Server:
        servers.append(Server())
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def hide(tmp_path: Path) -> Callable[..., Path]:
    """A folder that hides packages from the interpreters that have it on their path."""
    return partial(elsewhere.hide, tmp_path / "hiding")


@pytest.fixture
def probed() -> Callable[..., dict[str, Any]]:
    """What the host makes of `tcpstore` in a process of its own with these folders in front of its path."""
    return partial(elsewhere.probe_elsewhere, "rendezvous", "tcpstore")
